"""Training runs, by their losses."""

import functools
import json
import os
import socket

import pytest
import torch
import torch.multiprocessing
from matplotlib.figure import Figure
from torch._dynamo.utils import counters

from gpt import checkpoint, plot
from gpt.attention import Kind
from gpt.data import read_documents
from gpt.model import GPTConfig
from gpt.plot import Curve, max_difference
from hopper_attention import simulator
from hopper_attention.errors import UserError
from train_gpt import Settings, draw, train


def losses(report):
    return [record["loss"] for record in report.of("step")]


@pytest.mark.parametrize("kind", list(Kind))
def test_loss_falls(settings, kind):
    report = train(settings(attention=kind, steps=20))
    assert losses(report)[0] > 5
    assert losses(report)[-1] < 4
    assert report.last("validation", "loss") < 4


def test_implementations_train_alike(settings):
    a, b = (train(settings(attention=kind, steps=12)) for kind in (Kind.SDPA, Kind.REFERENCE))
    assert max_difference(Curve.of(a.records), Curve.of(b.records)) < 0.02


@pytest.mark.parametrize("full_context", [False, True])
def test_resumed_training_is_bitwise_the_same(settings, tmp_path, full_context):
    common = {"full_context": full_context, "accumulate": 2, "checkpoint_every": 4}
    whole = train(settings(**common, checkpoint=tmp_path / "whole"))
    train(settings(**common, checkpoint=tmp_path / "parts", stop_after=3))
    rest = train(settings(**common, checkpoint=tmp_path / "parts", resume=True))
    assert [record["step"] for record in rest.of("step")] == [4, 5, 6]
    assert losses(rest) == losses(whole)[3:]
    assert rest.last("validation", "loss") == whole.last("validation", "loss")
    weights = [
        checkpoint.load_model(checkpoint.latest(tmp_path / name), torch.device("cpu")).state_dict()
        for name in ("whole", "parts")
    ]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    folders = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert folders == ["step_000004", "step_000006"]


def test_a_checkpoint_of_something_else_is_refused(settings, tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(UserError, match="no checkpoint in"):
        train(settings(checkpoint=folder, resume=True))
    train(settings(checkpoint=folder, stop_after=2))
    with pytest.raises(UserError, match="another seed"):
        train(settings(checkpoint=folder, resume=True, seed=1))
    other = GPTConfig(layers=1, dim=32, heads=4, heads_kv=2, hidden=64, context=32)
    with pytest.raises(UserError, match="another model"):
        train(settings(checkpoint=folder, resume=True, model=other))
    with pytest.raises(UserError, match="give more --steps"):
        train(settings(checkpoint=folder, resume=True, steps=2, warmup=1))


def test_accumulated_batches_are_a_larger_batch(settings):
    """With rows of the context's length no sequence is cut, so that both see the same."""
    small = train(settings(full_context=True, accumulate=2, steps=4))
    large = train(settings(full_context=True, tokens=256, steps=4))
    assert losses(small) == pytest.approx(losses(large), abs=2e-3)


def test_a_nudge_is_small_but_seen(settings):
    a, b = (train(settings(steps=3, nudge=share)) for share in (0.0, 1e-3))
    assert losses(a) != losses(b)
    assert losses(a) == pytest.approx(losses(b), abs=0.01)


def test_metrics_and_plot(settings, tmp_path):
    files = [tmp_path / f"{kind.value}.jsonl" for kind in (Kind.SDPA, Kind.REFERENCE)]
    for file, kind in zip(files, (Kind.SDPA, Kind.REFERENCE)):
        report = train(settings(attention=kind, metrics=file, sample_every=2))
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert records == json.loads(json.dumps(report.records))
    events = [record["event"] for record in records]
    assert events.count("step") == 6 and events.count("validation") == 2
    assert events[0] == "start" and events[-1] == "end"
    shares = [record["share"] for record in records if record["event"] == "attention"]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares)
    draw(tmp_path / "plots" / "loss.png", report, files[1], [files[0]])
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    files[0].write_text("{}\n")
    with pytest.raises(UserError, match="not what --json writes"):
        draw(tmp_path / "loss.png", report, None, [files[0]])


def test_a_plot_says_what_each_of_its_runs_was(monkeypatch, tmp_path):
    """Not only the last one."""
    found, curves = [], []
    monkeypatch.setattr(Figure, "suptitle", lambda _, text: found.append(text))
    step = {"event": "step", "step": 1, "loss": 5.0}
    for device in ("one H200", "a CPU", "one H200"):
        start = {"event": "start", "attention": "sdpa", "parameters": 4.2e6, "device": device}
        curves.append(Curve.of([start, step]))
        plot.write(tmp_path / "loss.png", curves)
    assert found[0] == "byte-level GPT, bf16: 4.2 M parameters, one H200"
    assert found[1] == found[2] == f"{found[0]}; 4.2 M parameters, a CPU"


def test_a_diverged_run_says_so(settings):
    with pytest.raises(UserError, match="lower --lr"):
        train(settings(lr=1e30, warmup=1))


def test_own_files_are_documents(settings, tmp_path):
    files = tuple(tmp_path / f"{n}.txt" for n in range(3))
    for n, file in enumerate(files):
        file.write_text(f"line {n}\n" * 100)
    assert len(read_documents(files)) == 3
    assert losses(train(settings(data=files, steps=3)))
    files[1].write_text("")
    with pytest.raises(UserError, match=r"1\.txt is empty"):
        train(settings(data=files))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind.SDPA, Kind.HOPPER])
def test_compiled_blocks_train_alike_and_compile_once(settings, kind):
    """Documents are more in one batch than in another, and layers more than are compiled apart."""
    deep = GPTConfig(layers=9, dim=32, heads=4, heads_kv=2, hidden=64, context=32)
    settings = functools.partial(settings, model=deep)
    torch.compiler.reset()
    counters.clear()
    compiled = train(settings(attention=kind, steps=4, sample_every=2, compile=True))
    plain = train(settings(attention=kind, steps=4))
    assert losses(compiled) == pytest.approx(losses(plain), abs=0.02)
    assert "uncompiled" in compiled.last("attention", "how")
    graphs = counters["stats"]["unique_graphs"]
    more = train(settings(attention=kind, steps=8, compile=True))
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(more.of("step")) == 8
    assert not counters["graph_break"]


def in_process(rank: int, port: int, settings: Settings) -> None:
    """A rank of two, as torchrun starts it."""
    os.environ |= {
        "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    train(settings)


@pytest.mark.distributed
def test_two_ranks_train_like_one(settings, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sharded = settings(fsdp=True, metrics=tmp_path / "two.jsonl", checkpoint=tmp_path / "two")
    torch.multiprocessing.spawn(in_process, (port, sharded), nprocs=2)
    two = Curve.read(tmp_path / "two.jsonl")
    one = train(settings(accumulate=2, metrics=tmp_path / "one.jsonl"))
    assert max_difference(Curve.of(one.records), two) < 5e-3
    # One process goes on with what two have written.
    more = settings(accumulate=2, steps=8, checkpoint=tmp_path / "two", resume=True)
    assert [record["step"] for record in train(more).of("step")] == [7, 8]


@pytest.mark.simulator
def test_kernels_on_the_simulator_train_like_the_reference(settings):
    """Forward and backward kernels, on packed documents."""
    short = functools.partial(settings, steps=3, tokens=64)
    plain = train(short(attention=Kind.REFERENCE))
    with simulator.enabled(seed=1):
        simulated = train(short(attention=Kind.HOPPER))
    assert "simulator" in simulated.last("start", "runs")
    assert losses(simulated) == pytest.approx(losses(plain), abs=2e-3)
    assert losses(simulated) != losses(plain)
