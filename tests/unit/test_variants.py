"""`python -m benchmarks.variants` without a GPU: table, revisions, whose kernel a launch gets."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hopper_attention.benchmarks.peers import PEERS
from hopper_attention.benchmarks.variants import __main__ as command
from hopper_attention.benchmarks.variants import build, run, table
from hopper_attention.benchmarks.variants.table import Replacement, Variant

from hopper_attention.bench.data.workloads import load_problems
from hopper_attention.bench.measure.runner import Prepared
from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError
from hopper_attention.launch import runtime

INSTANCE = "fwd_bf16_d64"


@pytest.mark.parametrize(
    "text", ["", "name", "name=HEAD", "=HEAD:fwd*", "a__b=HEAD:fwd*", "a-b=HEAD:fwd*", "a=HEAD:"]
)
def test_what_is_no_variant(text):
    with pytest.raises(UserError, match="expected NAME=REVISION:INSTANCE"):
        Variant.parse(text)


def test_variant():
    parsed = Variant.parse("unpinned=HEAD~2:fwd_bf16_d64,bwd_*")
    assert parsed == Variant("unpinned", ("fwd_bf16_d64", "bwd_*"), "HEAD~2")
    assert Variant.parse("nored") == table.variants()["nored"]


TABLE = """
[variants.small]
instances = ["fwd*"]
config = { stages = 4, tile_n = 64 }
claim = "faster"
[[variants.small.replace]]
file = "hopper/file.py"
old = "old"
new = "new"

[variants.smaller]
on = "small"
instances = ["bwd*"]
config = { stages = 3 }
timing_only = true
[[variants.smaller.replace]]
file = "hopper/file.py"
old = "new"
new = "newer"

[[plan]]
minutes = 0.5
what = "everything"
command = "-c 'print(1)' {minutes} {out}"
"""


def test_a_variant_on_another(tmp_path):
    (tmp_path / "table.toml").write_text(TABLE)
    first, second = (Replacement("hopper/file.py", *t) for t in (("old", "new"), ("new", "newer")))
    small, smaller = table.variants(tmp_path / "table.toml").values()
    assert small == Variant(
        "small", ("fwd*",), "HEAD", {"stages": 4, "tile_n": 64}, (first,), claim="faster"
    )
    assert (smaller.name, smaller.patterns, smaller.timing_only) == ("smaller", ("bwd*",), True)
    assert smaller.replacements == (first, second)
    assert smaller.config == {"stages": 3, "tile_n": 64}


@pytest.mark.parametrize("name", [n for n, v in table.variants().items() if v.revision == "HEAD"])
def test_changes_of_the_table_fit_the_kernels(name, root, tmp_path):
    """Texts are there, fields exist, instances are known; and each says what it decides."""
    variant = table.variants()[name]
    assert variant.claim and variant.decides and (variant.config or variant.replacements)
    for folder in ("hopper", "cute_kernels"):
        shutil.copytree(root / folder, tmp_path / folder)
    for replacement in variant.replacements:
        replacement.apply(tmp_path)
        compile((tmp_path / replacement.file).read_text(), replacement.file, "exec")
    known = manifest.instances()
    assert set(variant.patterns) <= known.keys()
    for instance in variant.patterns:
        assert variant.config.keys() <= known[instance].config.keys()


def test_a_text_that_is_not_there_once_is_refused(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\n")
    for replacement in (Replacement("file.py", "a", "b"), Replacement("other.py", "a", "b")):
        with pytest.raises(UserError, match="not once: 'a'"):
            replacement.apply(tmp_path)


def test_plan():
    """Ten minutes at most, of workloads and peers that exist."""
    steps = table.plan()
    assert sum(step.minutes for step in steps) <= 10
    peers = {peer.name for peer in PEERS}
    for step in steps:
        arguments = shlex.split(step.command)
        given = list(zip(arguments, arguments[1:]))
        assert load_problems([value for option, value in given if option == "-w"])
        assert {value for option, value in given if option == "-p"} <= peers


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("assert __import__('sys').argv[1:] == ['0.2', 'out']", "done"),
        ("exit(3)", "failed: 3"),
        ("__import__('time').sleep(9)", "stopped after 0.5 minutes"),
    ],
)
def test_a_step_of_the_plan(code, ending, monkeypatch):
    ran = subprocess.run
    quick = lambda command, timeout: ran(command, timeout=timeout / 60)  # noqa: E731
    monkeypatch.setattr(table.subprocess, "run", quick)
    step = table.Step(0.5, "", f'-c "{code}" {{minutes}} {{out}}')
    assert step.run(Path("out")) == ending


def test_list(capsys):
    command.show()
    shown = capsys.readouterr().out
    assert "timing only" in shown and "0 to 1.5" in shown
    assert all(name in shown for name in table.variants())


@pytest.fixture
def repository(tmp_path):
    """With one kernel that was compiled, and a driver that only says what it was asked."""
    root = tmp_path / "repository"
    for folder in ("hopper", "cute_kernels", "python/aot", "build/tag/kernels"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file.py").write_text("old")
    for suffix in build.OBJECTS:
        (root / "build/tag/kernels" / f"{INSTANCE}{suffix}").write_text("shipped")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "old"]):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(root), *identity, *words], check=True)
    (root / "hopper" / "file.py").write_text("new")
    return root


def test_build(repository, tmp_path, monkeypatch):
    """The revision's kernels, not the working tree's; the shipped objects beside them."""
    asked = []
    monkeypatch.setattr(build, "_compile", lambda *job: (asked.append(job), "")[1])
    out = tmp_path / "out"
    variant = Variant("was", ("fwd*",))
    (found,) = build.build([variant], repository, out)
    assert found == (f"{INSTANCE}__was", "")
    ((tree, name, asked_for, folder),) = asked
    assert (name, asked_for, folder) == (INSTANCE, variant, out)
    assert (tree / "hopper" / "file.py").read_text() == "old"
    assert (tree / "python" / "aot" / "file.py").exists()
    assert (out / f"{INSTANCE}.o").read_text() == "shipped"


def test_dry_run(repository, tmp_path, monkeypatch):
    """One instance of the changed kernels, without any shipped object."""
    asked = []
    monkeypatch.setattr(build, "_compile", lambda *job: (asked.append(job), "")[1])
    out = tmp_path / "out"
    change = Replacement("hopper/file.py", "old", "newer")
    variant = Variant("was", ("fwd*",), replacements=(change,))
    assert len(list(build.build([variant], repository, out, try_only=True))) == 1
    ((tree, *_),) = asked
    assert (tree / "hopper" / "file.py").read_text() == "newer"
    assert [path.name for path in out.iterdir()] == ["sources"]


def test_what_is_asked_of_the_compiler(tmp_path, monkeypatch):
    asked = []
    done = SimpleNamespace(returncode=1, stdout="", stderr="first\nlast")
    monkeypatch.setattr(
        build.subprocess, "run", lambda command, **_: (asked.append(command), done)[1]
    )
    variant = Variant("was", (), config={"stages": 4}, timing_only=True)
    assert build._compile(tmp_path, INSTANCE, variant, tmp_path) == "last"
    config, fields = map(json.loads, asked[0][-2:])
    assert config == {"stages": 4}
    assert fields == {"name": f"{INSTANCE}__was", "family": build.FAMILY, "claims": []}


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("a", ("bwd*",)), "no instance matches"),
        (Variant("a", ("fwd*",), "nowhere"), "git archive nowhere"),
    ],
)
def test_build_refuses(repository, tmp_path, variant, message):
    with pytest.raises(UserError, match=message):
        list(build.build([variant], repository, tmp_path / "out"))


def test_build_needs_objects(repository, tmp_path):
    (repository / "build/tag/kernels" / f"{INSTANCE}.o").unlink()
    with pytest.raises(UserError, match="no compiled kernels"):
        list(build.build([Variant("a", ("fwd*",))], repository, tmp_path / "out"))


def test_a_revision_with_fewer_lists(root, tmp_path):
    """The quantisation kernels stood in Hopper's list before they had their own."""
    for name in ("hopper", "cute_kernels"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copytree(root / "python" / "aot", tmp_path / "python" / "aot")
    (tmp_path / "cute_kernels/quantization/instances.py").unlink()
    listing = build.COMPILE[: build.COMPILE.index("name, out")]
    listing += "print(*(i.name for i in sources.all_instances()))"
    done = subprocess.run(
        [sys.executable, "-c", listing],
        cwd=tmp_path / "python", capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = done.stdout.split()
    assert INSTANCE in names and not any(name.startswith("quantize") for name in names)


class Clock:
    def __init__(self):
        self.now = 0.0

    def milliseconds(self, call):
        call()
        self.now += 1.0
        return self.now


@pytest.fixture
def launches(monkeypatch):
    """The build has a variant of one instance, and its launches are collected."""
    known = dict(manifest.instances())
    name = f"{INSTANCE}__other"
    known[name] = replace(known[INSTANCE], name=name, family=build.FAMILY)
    monkeypatch.setattr(manifest, "instances", lambda: known)
    seen = []
    launch = lambda instance, *_: seen.append(instance)  # noqa: E731
    monkeypatch.setattr(runtime, "_cuda", SimpleNamespace(launch=launch))
    return seen


def test_launches_of_a_variant(launches):
    assert run.variants_of(INSTANCE) == ["other"]
    with run.using("other"):
        runtime._cuda.launch(INSTANCE, 0)
        runtime._cuda.launch("fwd_bf16_d128", 0)
    runtime._cuda.launch(INSTANCE, 0)
    assert launches == [f"{INSTANCE}__other", "fwd_bf16_d128", INSTANCE]


def test_other_tiles_of_dq_are_refused(monkeypatch):
    known = dict(manifest.instances())
    base = known["bwd_bf16_d64"]
    config = {**base.config, "tile_m": 2 * base.config["tile_m"]}
    known["bwd_bf16_d64__a"] = replace(base, family=build.FAMILY, config=config)
    monkeypatch.setattr(manifest, "instances", lambda: known)
    with pytest.raises(UserError, match="workspace"):
        run.variants_of("bwd_bf16_d64")


def test_turns_and_verdicts(launches, monkeypatch):
    """All of ours are timed shipped and as variant, in turns with a peer; who is wrong, too."""
    (problem,) = load_problems(["fa3/forward_bf16_d64_b32_s512"])
    problem = replace(problem, batch=1, heads=1, heads_kv=1, seqlen=64, seqlen_q=64)

    class Ours:
        name = PEERS[0].name

        def prepare(self, inputs):
            out = PEERS[0].prepare(inputs).call()[0]

            def call():
                runtime._cuda.launch(INSTANCE)
                return out if launches[-1] == INSTANCE else out * 1.5

            return Prepared(call, INSTANCE)

    class OursOtherwise(Ours):
        name = "hopper-attention, one level"

    class Peer(Ours):
        name = "peer"

        def prepare(self, inputs):
            return Prepared(super().prepare(inputs).call)

    peers = [Ours(), OursOtherwise(), Peer()]
    found = run.measure(problem, peers, 2, Clock(), torch.device("cpu"))
    assert {(row["peer"], row["variant"]): row["passed"] for row in found} == {
        ("hopper-attention", ""): True,
        ("hopper-attention", "other"): False,
        ("hopper-attention, one level", ""): True,
        ("hopper-attention, one level", "other"): False,
        ("peer", ""): True,
    }
    assert [row["samples_ms"] for row in found] == [[5.0 + i, 10.0 + i] for i in range(1, 6)]


def test_what_is_wrong_on_purpose_is_not_judged(launches, monkeypatch):
    other = Variant("other", (INSTANCE,), timing_only=True)
    monkeypatch.setattr(table, "variants", lambda: {"other": other})
    (problem,) = load_problems(["fa3/forward_bf16_d64_b32_s512"])
    problem = replace(problem, batch=1, heads=1, heads_kv=1, seqlen=64, seqlen_q=64)

    class Ours:
        name = "ours"

        def prepare(self, inputs):
            out = PEERS[0].prepare(inputs).call()[0]
            return Prepared(lambda: out, INSTANCE)

    found = run.measure(problem, [Ours()], 2, Clock(), torch.device("cpu"))
    assert {row["variant"]: row["passed"] for row in found} == {"": True, "other": None}
    shown = command._table(found)
    assert "timing only" in list(shown.columns[-1].cells)


def test_problems_end_with_the_time(monkeypatch, capsys):
    monkeypatch.setattr(command.environment, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr("hopper_attention.bench.measure.protocol.CudaTimer", lambda _: Clock())
    command.run(["fa3/forward_bf16_d64_b32_s512"], minutes=-1.0)
    assert "no time left" in capsys.readouterr().out


def test_a_problem_that_fails_is_a_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(run, "candidates", broken)
    (problem,) = load_problems(["fa3/forward_bf16_d64_b32_s512"])
    (row,) = run.measure(problem, [], 2, Clock(), torch.device("cpu"))
    assert row == {"problem": problem.name, "failed": "RuntimeError: out of"}
