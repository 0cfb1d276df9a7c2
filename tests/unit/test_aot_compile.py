"""The compile driver end to end on one instance, in processes of its own as the build runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="compiling needs the CuTe DSL")

NAME = "fwd_bf16_d64"
OTHER = "arrange_rows"


def aot(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "aot", *arguments]
    done = subprocess.run(command, cwd=root / "python", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_to(root: Path, out: Path, *names: str) -> dict[str, bytes]:
    """The outputs of NAME, compiled in a batch of `names`."""
    aot(root, "compile", *names, "--out", str(out), "--depfile", str(out / "d"), "--cuda", "13")
    return {file.suffix: file.read_bytes() for file in out.glob(f"{NAME}.*")}


def test_compile_twice(root, tmp_path):
    first = compile_to(root, tmp_path / "a", NAME)
    facts = json.loads(first[".json"])
    assert facts["kernels"] == [f"{NAME}_0"]
    assert facts["flavour"] == "cu13"
    assert [a["name"] for a in facts["arguments"]][:4] == ["q", "k", "v", "out"]
    assert facts["arguments"][0]["shape"] == [None] * 4
    assert facts["arguments"][0]["shape_divisibility"] == [1, 1, 1, 8]
    assert set(facts["opcodes"]) == set(facts["claims"])
    assert (facts["spill_stores"], facts["spill_loads"], facts["stack"]) == (0, 0, 0)
    assert str(root / "hopper/forward/kernel.py") in (tmp_path / "a/d").read_text()

    # Up to date: not even the time in the JSON changes.
    assert compile_to(root, tmp_path / "a", NAME) == first

    # From nothing in another folder, after another instance: the same bytes.
    again = compile_to(root, tmp_path / "b", OTHER, NAME)
    assert set(again) == {".o", ".h", ".ptx", ".cubin", ".json"}
    assert all(again[suffix] == first[suffix] for suffix in first if suffix != ".json")


def test_list_names_its_sources(root, tmp_path):
    listed = tmp_path / "sources.txt"
    names = aot(root, "list", "--selection", f"{NAME}_[cv]*", "--sources", str(listed)).split()
    assert names == [f"{NAME}_varlen", f"{NAME}_causal", f"{NAME}_causal_varlen"]
    assert str(root / "hopper/instances.py") in listed.read_text().split()
    assert str(root / "hopper/forward/kernel.py") not in listed.read_text().split()


def test_list_in_batches(root):
    names = aot(root, "list").split()
    lines = [line.split() for line in aot(root, "list", "--cores", "1").splitlines()]
    assert [name for line in lines for name in line] == names
    assert {len(line) for line in lines[:-1]} == {8}
