"""`python -m benchmarks.variants` without a GPU: names, revisions, whose kernel a launch gets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hopper_attention.benchmarks.peers import PEERS
from hopper_attention.benchmarks.variants import build, run
from hopper_attention.benchmarks.variants.build import Variant

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
    assert parsed == Variant("unpinned", "HEAD~2", ("fwd_bf16_d64", "bwd_*"))


@pytest.fixture
def repository(tmp_path):
    """With one kernel that was compiled, and a driver that only says what it was asked."""
    root = tmp_path / "repository"
    for folder in ("hopper", "cute_kernels", "python/aot", "build/tag/kernels"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file.py").write_text("old")
    for suffix in build.OBJECTS:
        (root / "build/tag/kernels" / f"{INSTANCE}{suffix}").write_text("shipped")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "old"]):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(root), *identity, *command], check=True)
    (root / "hopper" / "file.py").write_text("new")
    return root


def test_build(repository, tmp_path, monkeypatch):
    """The revision's kernels, not the working tree's; the shipped objects beside them."""
    asked = []
    monkeypatch.setattr(build, "_compile", lambda *job: (asked.append(job), "")[1])
    out = tmp_path / "out"
    (found,) = build.build([Variant("was", "HEAD", ("fwd*",))], repository, out)
    assert found == (f"{INSTANCE}__was", "")
    ((tree, name, as_name, folder),) = asked
    assert (name, as_name, folder) == (INSTANCE, f"{INSTANCE}__was", out)
    assert (tree / "hopper" / "file.py").read_text() == "old"
    assert (tree / "python" / "aot" / "file.py").exists()
    assert (out / f"{INSTANCE}.o").read_text() == "shipped"


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("a", "HEAD", ("bwd*",)), "no instance matches"),
        (Variant("a", "nowhere", ("fwd*",)), "git archive nowhere"),
    ],
)
def test_build_refuses(repository, tmp_path, variant, message):
    with pytest.raises(UserError, match=message):
        list(build.build([variant], repository, tmp_path / "out"))


def test_build_needs_objects(repository, tmp_path):
    (repository / "build/tag/kernels" / f"{INSTANCE}.o").unlink()
    with pytest.raises(UserError, match="no compiled kernels"):
        list(build.build([Variant("a", "HEAD", ("fwd*",))], repository, tmp_path / "out"))


def test_a_revision_with_fewer_lists(root, tmp_path):
    """The quantisation kernels stood in Hopper's list before they had their own."""
    for name in ("hopper", "cute_kernels"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copytree(root / "python" / "aot", tmp_path / "python" / "aot")
    (tmp_path / "cute_kernels/quantization/instances.py").unlink()
    listing = build.COMPILE[: build.COMPILE.index("name, as_name")]
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


def test_a_problem_that_fails_is_a_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(run, "candidates", broken)
    (problem,) = load_problems(["fa3/forward_bf16_d64_b32_s512"])
    (row,) = run.measure(problem, [], 2, Clock(), torch.device("cpu"))
    assert row == {"problem": problem.name, "failed": "RuntimeError: out of"}
