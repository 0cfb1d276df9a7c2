"""benchmarks/micro: results on the simulator, machine code, figures from clocks, the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from hopper_attention.benchmarks.micro import __main__ as command
from hopper_attention.benchmarks.micro import measure, programs
from hopper_attention.benchmarks.micro.arithmetic import INSTRUCTIONS
from hopper_attention.benchmarks.micro.kernel import KERNEL, MAX_GROUPS

from hopper_attention import simulator
from hopper_attention.sass import disassembler
from hopper_attention.sass.control_flow import ControlFlow
from hopper_attention.sass.cubin import find_cubins
from hopper_attention.sass.scheduling import stall_counts

CASES = list(programs.cases())
TIGHTEST = {re.sub(r"\d WG", "", f"{case.program} {case.name}"): case for case in CASES}.values()
"""Of those that differ in the number of warpgroups the one with the fewest registers for each."""
PASSES = 3


def case_named(name):
    return next(case for case in CASES if case.name == name)


def simulate(case, passes, seed=1):
    """(results, clocks) of one block."""
    image = np.frombuffer(case.image, np.uint8).copy()
    results = np.zeros((case.threads, case.result_words), np.uint32)
    clocks = np.zeros((case.threads // 32, 2), np.uint64)
    scratch = np.zeros(max(case.scratch_bytes, 16), np.uint8)
    arrays = (image, results, clocks, scratch)
    memory = simulator.GlobalMemory()
    for array in arrays:
        memory.register(array.ctypes.data, array.nbytes, "argument")
    counts = np.array([*passes, *[0] * MAX_GROUPS][:MAX_GROUPS], np.uint32)
    addresses = (array.ctypes.data.to_bytes(8, "little") for array in arrays)
    simulator.launch(
        simulator.Module.parse(case.ptx(), case.name),
        KERNEL,
        grid=(1, 1, 1),
        block=(case.threads, 1, 1),
        params=[*addresses, counts.tobytes()],
        memory=memory,
        shared_memory_bytes=case.shared_bytes,
        options=simulator.Options(seed),
    )
    return results, clocks


@pytest.mark.simulator
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.program}: {case.name}")
def test_programs_compute_what_is_expected(case):
    passes = [PASSES + index for index in range(len(case.groups))]
    results, clocks = simulate(case, passes)
    assert case.check(results, passes) == []
    assert (clocks[:, 1] > clocks[:, 0]).all()


@pytest.mark.simulator
def test_wrong_results_are_noticed():
    case = case_named("RS N=64, 2 WG")
    results, _ = simulate(case, [PASSES])
    assert case.check(results, [PASSES + 1]) != []
    results[200, 7] ^= 1 << 22
    (wrong,) = case.check(results, [PASSES])
    assert wrong.startswith("RS N=64, 2 WG: WGMMA, copy 1: off by ")


def find_ptxas():
    """One that knows the PTX version: CUDA 12.8 or newer."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        return None
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    return ptxas if version and tuple(map(int, version.groups())) >= (12, 8) else None


@pytest.mark.skipif(find_ptxas() is None, reason="needs a ptxas of CUDA 12.8 or newer")
@pytest.mark.skipif(disassembler.find_nvdisasm() is None, reason="needs nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("case", TIGHTEST, ids=lambda case: f"{case.program}: {case.name}")
def test_machine_code(case, tmp_path):
    """Nothing spilled, WGMMA not serialised, each loop what it should be (ptxas may unroll it)."""
    source, cubin = tmp_path / "case.ptx", tmp_path / "case.cubin"
    source.write_text(case.ptx())
    arguments = ["-arch=sm_90a", "-v", str(source), "-o", str(cubin)]
    done = subprocess.run([find_ptxas(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "C75" not in done.stderr, done.stderr
    code = disassembler.disassemble(cubin.read_bytes())[KERNEL]
    ((kernel,),) = (found.kernels for found in find_cubins(cubin))
    flow, scheduled = ControlFlow(code), list(zip(code, stall_counts(kernel.code)))
    loops = [[scheduled[i] for i in flow.pass_of(loop)] for loop in flow.loops]
    for role, _ in case.groups:
        if case.program == "tile":
            check_tile_loop(case.name, role.does[0], [[i for i, _ in loop] for loop in loops])
        else:
            assert any(is_loop_of(role, loop) for loop in loops), f"no loop of {role.does}"


def is_loop_of(role, loop):
    """Say whether a loop does whole passes of a role's work; of arithmetic, little else."""
    found = [sum(fnmatchcase(i.opcode, work.opcode) for i, _ in loop) for work in role.does]
    ratios = {count / work.count for count, work in zip(found, role.does)}
    (unrolled,) = ratios if len(ratios) == 1 else (0,)
    if unrolled < 1 or unrolled != int(unrolled):
        return False
    work = role.does[0]
    if work.kind in INSTRUCTIONS:  # ptxas issues them as often as the model says
        assert len(loop) - found[0] <= 4 + found[0] // 8
        assert sum(stalls for _, stalls in loop) == pytest.approx(found[0] * work.model, rel=0.15)
    return True


def check_tile_loop(name, work, loops):
    """Two waits, each WGMMA once, and exp2 on the side of the waits that the schedule says."""
    (loop,) = (loop for loop in loops if any(i.name == "HGMMA" for i in loop))
    kinds = Counter(i.name for i in loop)
    keys = int(work.kind.removeprefix("64x"))
    assert kinds["HGMMA"] == 4 + keys // 16
    assert kinds["F2FP"] == keys // 4
    waits = [i for i, x in enumerate(loop) if x.opcode.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 2
    at = [i for i, x in enumerate(loop) if x.name == "MUFU"]
    assert len(at) == keys // 2 + (2 if "softmax" in name else 0)
    between = sum(waits[0] < i < waits[1] for i in at)
    behind = sum(i > waits[1] for i in at)
    if "sunk" in name:
        assert between <= len(at) // 4 and between + behind == len(at)
    else:
        assert between == len(at)


def test_figures_from_clocks():
    """Two samples of three warpgroups: one multiplies, two compute exponentials."""
    case = case_named("2 WG beside 1 of SS N=64")
    clocks = np.zeros((2, 12, 2), np.uint64)
    clocks[:, :, 0] = 1000
    clocks[0, :, 0] += np.arange(12, dtype=np.uint64)
    clocks[:, :4, 1] = 1000 + 800
    clocks[:, 4:, 1] = 1000 + 640
    clocks[1, 11, 1] += 40
    wgmma, exp2 = measure.figures_of(case, [2, 5], clocks)
    assert (wgmma.kind, wgmma.clocks, wgmma.model) == ("WGMMA", 800 / (2 * 8), 32)
    assert (exp2.kind, exp2.low, exp2.high) == ("MUFU.EX2", 0.5, round(680 / 1280, 2))
    assert exp2.group_clocks == 660
    assert measure.balanced(case, [2, 5], clocks) == [500, round(5 * 200_000 / 660)]


def test_first_guess_takes_the_target_by_the_model():
    for case in CASES:
        for (role, copies), passes in zip(case.groups, measure.first_passes(case)):
            modelled = [w.model * w.count for w in role.does if w.model is not None]
            if modelled:
                assert passes * copies * max(modelled) == pytest.approx(200_000, rel=0.01)


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["micro", *arguments])
        try:
            command.main()
        except SystemExit as exit_:
            return exit_.code
        return 0

    return run


def test_command_without_a_gpu(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert run("nope") == 2
    assert "unknown program 'nope'; there are: alu" in capsys.readouterr().err


def test_command_lists_and_writes_ptx(run, tmp_path, capsys):
    assert run("alu", "--list") in (0, None)
    assert "VIMNMX3, 3 WG" in capsys.readouterr().out
    assert run("--ptx", str(tmp_path / "new")) in (0, None)
    written = list((tmp_path / "new").glob("*.ptx"))
    assert len(written) == len(CASES)


def test_command_with_a_gpu(run, monkeypatch, tmp_path, capsys):
    """A GPU whose every role takes the model's clocks."""

    class Simulated(measure.Gpu):
        def __init__(self, _device):
            self.device = torch.device("cpu")

        def measure(self, case, repeats):
            clocks = np.zeros((repeats, case.threads // 32, 2), np.uint64)
            clocks[..., 1] = 200_000
            return measure.figures_of(case, measure.first_passes(case), clocks)

    monkeypatch.setattr(command.environment, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(command.environment, "device_facts", lambda _: {"name": "none"})
    monkeypatch.setattr(command, "Gpu", Simulated)
    assert run("wgmma", "alu", "--json", str(tmp_path / "a.json")) in (0, None)
    assert "RS N=64, 3 WG" in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert {figure["program"] for figure in result["figures"]} == {"wgmma", "alu"}
    for figure in result["figures"]:
        assert figure["clocks"] == pytest.approx(figure["model"], rel=0.02)
