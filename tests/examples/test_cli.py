"""The commands as a user calls them."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from hopper_attention.errors import UserError
from train_gpt import main

RUN = ("--tokens", "64", "--context", "32", "--steps", "2", "--device", "cpu")


@pytest.fixture
def command(root):
    """Run examples/NAME.py; returns the finished process."""

    def run(name, *arguments):
        line = [sys.executable, str(root / "examples" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    return run


def test_a_run_from_training_to_text(command, tmp_path):
    folder, metrics, plot = (tmp_path / name for name in ("checkpoints", "run.jsonl", "loss.png"))
    trained = command(
        "train_gpt", *RUN, "--attention", "reference", "--checkpoint", folder, "--json", metrics,
        "--plot", plot,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "plain PyTorch" in trained.stdout and "tokens/s" in trained.stdout
    assert plot.exists() and metrics.exists()
    written = command("generate", "--checkpoint", folder, "--prompt", "The ", "--max-tokens", 8)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "huge"), "huge"),
        (("--attention", "flash"), "flash"),
        (("--steps", "0"), "steps"),
        (("--data", "/nowhere.txt"), "nowhere.txt"),
        (("--full-context", "--tokens", "100"), "100 tokens are not a multiple of the context"),
        (("--sdpa-backend", "cudnn", "--attention", "sdpa"), "on a GPU"),
        (("--resume",), "--resume needs --checkpoint DIR"),
        (("--compare", __file__), "--compare needs --plot FILE"),
        (("--device", "tpu"), "choose cpu or cuda"),
        (("--fsdp",), "start it with torchrun"),
    ],
)
def test_wrong_flags_get_a_sentence(arguments, message):
    """In this process, where what the script prints as an error is still an exception."""
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [*RUN, *arguments])
    assert isinstance(result.exception, (UserError, SystemExit))
    assert message in f"{result.exception} {result.output}"


def test_refusals_are_printed(command, tmp_path):
    failed = command("generate", "--checkpoint", tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: there is no checkpoint in")
