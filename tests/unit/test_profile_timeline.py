"""`hopper-attention profile timeline`: stamps in PTX, what they become, a run on the simulator."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hopper_attention
from hopper_attention import cli, simulator
from hopper_attention.bench.data.workloads import load_problems
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.dispatch import manifest, target
from hopper_attention.errors import UserError
from hopper_attention.profiling import driver, spans, stamps, timeline
from hopper_attention.profiling.spans import Span

KERNEL = """\
.version 9.4
.target sm_90a
.visible .entry k_0(
	.param .u64 k_0_param_0
)
.reqntid 64, 1, 1
{
	.reg .b32 	%r<3>;

	bar.sync 	0;
	// begin inline asm
	{
	LAB_WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [%r1], 0;
	bra.uni 	LAB_WAIT;
}
	// end inline asm
	bar.sync 	%r2, 256;
	cp.async.wait_group 	1;
	wgmma.fence.sync.aligned;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 	0;
	ret;
}
"""


def marks(ptx):
    """Marks and the statements between them."""
    body = ptx[ptx.index("add.s64 \t%stamp_end") :]
    found = re.findall(
        r"or.b64 .*, (\d+);|(bar\.sync|try_wait|wgmma\.\w+|(?<=async\.)wait_group)", body
    )
    return [int(mark) if mark else statement for mark, statement in found]


def test_stamps_around_what_a_warp_waits_in():
    stamped = stamps.instrument(KERNEL, "k_0", blocks=3)
    assert marks(stamped.ptx) == [
        "bar.sync",  # of the whole block, once: no turn
        *(1, "try_wait", 2),
        *(3, "bar.sync", 4),
        *(7, "wait_group", 8),
        *(9, "wgmma.fence"),
        *("wgmma.commit_group", 10),
        *(5, "wgmma.wait_group", 6),
    ]
    assert (stamped.warps, stamped.slots) == (2, 3 * 2 * stamps.CAPACITY)
    assert "k_0_param_0,\n\t.param .u64 k_0_stamps\n)" in stamped.ptx
    assert stamped.ptx.startswith(".version 8.7\n")
    assert stamped.ptx.endswith("ret;\n}\n")
    without = re.sub(r"\t[^\n]*%stamp[^\n]*\n", "", stamped.ptx)
    without = without.replace(",\n\t.param .u64 k_0_stamps", "").replace("8.7", "9.4")
    assert without == KERNEL


def test_every_instance_can_be_stamped():
    """The inserted text is the same everywhere; one instance of each family shows it is PTX."""
    parsed = set()
    for name, instance in manifest.instances().items():
        ptx = manifest.ptx_path(name).read_text()
        stamped = stamps.instrument(ptx, f"{name}_0", blocks=1)
        waits = len(re.findall(r"try_wait|(?:wgmma|cp\.async)\.wait_group|bar\.sync\s+[%1-9]", ptx))
        gemms = len(re.findall(r"wgmma\.fence|wgmma\.commit_group", ptx))
        assert stamped.ptx.count("%clock64") == 2 * waits + gemms
        if instance.family not in parsed:
            parsed.add(instance.family)
            module = simulator.Module.parse(stamped.ptx, name)
            assert module.kernels[f"{name}_0"].params[-1].size == 8


@pytest.mark.parametrize(("text", "kernel"), [("", "k_0"), (KERNEL, "other")])
def test_ptx_that_cannot_be_stamped(text, kernel):
    with pytest.raises(UserError, match=f"cannot put stamps into the PTX of {kernel}"):
        stamps.instrument(text, kernel, blocks=1)


def test_stamps_become_spans():
    stamped = stamps.Stamped("", "k", blocks=2, warps=2)
    buffer = np.zeros(stamped.slots, dtype=np.uint64)
    issue = 2 * stamps.NAMES.index(stamps.ISSUE)
    events = [(1000, 1), (1010, 2), (1030, issue + 1), (1040, issue + 2), (1040, 5), (1090, 6)]
    buffer[: len(events)] = [time << 8 | mark for time, mark in events]
    buffer[stamps.CAPACITY] = 990 << 8 | 3  # the other warp: begun, never ended
    assert stamps.decode(buffer, stamped) == [
        Span(0, 0, "wait for mbarrier", 10, 20),
        Span(0, 0, "arithmetic", 20, 40),
        Span(0, 0, "issue GEMM", 40, 50),
        Span(0, 0, "wait for WGMMA", 50, 100),
    ]


def test_every_name_has_a_colour():
    assert {*stamps.NAMES, stamps.ARITHMETIC} == set(spans.COLOURS)


def test_exports(tmp_path):
    recorded = [Span(0, 0, "wait for mbarrier", 0, 5), Span(0, 4, "issue GEMM", 2, 3)]
    trace, picture = tmp_path / "new" / "a.json", tmp_path / "other" / "a.png"
    spans.write_perfetto(recorded, trace, "clocks")
    events = json.loads(trace.read_text())["traceEvents"]
    assert events[1] == {"name": "issue GEMM", "ph": "X", "ts": 2, "dur": 1, "pid": 0, "tid": 4}
    pytest.importorskip("matplotlib")
    spans.write_picture(recorded, picture, "clocks", "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="nothing was recorded"):
        spans.write_picture([], picture, "clocks", "title")


HOPPER_WARPS = [(0, "wait for mbarrier"), *((warp, spans.ISSUE) for warp in range(4, 12))]


@pytest.mark.parametrize(
    ("recorded", "labels"),
    [
        (HOPPER_WARPS, {0: "producer", 4: "consumer 0", 8: "consumer 1"}),
        ([(0, spans.ISSUE), (4, "wait for turn")], {0: "consumer 0", 4: "producer"}),
        ([(w, "wait for copies") for w in range(3)], {w: f"warp {w}" for w in range(3)}),
    ],
    ids=["hopper", "the producer is the last", "ampere"],
)
def test_rows_of_a_picture(recorded, labels):
    """The names of rows follow from what the warps did."""
    assert spans._labels(Span(0, warp, name, 0, 1) for warp, name in recorded) == labels


def test_a_picture_shows_the_middle(monkeypatch):
    monkeypatch.setattr(spans, "PICTURE_UNITS", 10)
    recorded = [Span(0, 0, "arithmetic", 0, 44), Span(0, 4, "issue GEMM", 44, 46)]
    recorded += [Span(0, 4, "wait for WGMMA", 46, 100)]
    assert spans.middle(recorded) == [
        Span(0, 4, "issue GEMM", 45, 46),
        Span(0, 4, "wait for WGMMA", 46, 55),
    ]
    assert spans.middle(recorded[1:2]) == recorded[1:2]


def test_without_a_driver(monkeypatch):
    def missing(_):
        raise OSError

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(UserError, match="no CUDA driver"):
        driver.load("", "k", 0)


PROBLEM = "fa3/forward_bf16_d128_causal_b32_s512"


@pytest.mark.simulator
def test_stamps_of_a_run_show_consumers_taking_turns():
    inputs = Inputs.make(load_problems([PROBLEM])[0], torch.device("cpu"))
    recorded, unit = timeline.record(inputs, "fwd_bf16_d128_causal", blocks=1)
    assert unit == timeline.SIMULATOR_UNIT
    turns = sorted(
        (span.end, span.warp)
        for span in recorded
        if span.name == "wait for turn" and span.warp in (4, 8)
    )
    warps = [warp for _, warp in turns]
    assert len(warps) == 2 * 3, "four key blocks, the first without a turn"
    assert warps == [4, 8] * 3
    assert {span.warp for span in recorded} == {0, *range(4, 12)}


@pytest.mark.simulator
def test_model_of_backward():
    """The model is of the kernel with the GEMMs, not of those before it."""
    (problem,) = load_problems(["instances/backward_bf16_d128_b4_s4096"])
    small = {"batch": 1, "heads": 1, "heads_kv": 1, "seqlen": 128, "seqlen_q": 512}
    inputs = Inputs.make(replace(problem, **small), torch.device("cpu"))
    modelled = timeline.model(inputs, "bwd_bf16_d128")
    assert modelled.summary()["kernel"].startswith("bwd_bf16_d128")
    assert modelled.summary()["utilisation"]["tensor"] > 0.5


KERNELS = {
    "forward": ("hopper", "fwd_bf16_d64", "forward"),
    "backward": ("hopper", "bwd_bf16_d64", "backward"),
    "ampere forward": ("ampere", "ampere_fwd_bf16_d64", "forward"),
    "ampere backward": ("ampere", "ampere_bwd_bf16_d64", "backward"),
}
"""Every name stands for a backend, an instance and a direction."""


@pytest.fixture
def grids(monkeypatch):
    """The grids of all launches on the simulator from now on are collected."""
    found, launch = [], simulator.launch

    def noted(*args, **how):
        found.append(how["grid"])
        return launch(*args, **how)

    monkeypatch.setattr(simulator, "launch", noted)
    return found


def small(direction, batch):
    (problem,) = load_problems([f"instances/{direction}_bf16_d64_b4_s4096"])
    sizes = {"batch": batch, "heads": 2, "heads_kv": 1, "seqlen": 256, "seqlen_q": 256}
    return Inputs.make(replace(problem, **sizes), torch.device("cpu"))


@pytest.mark.simulator
@pytest.mark.parametrize("name", KERNELS)
def test_a_block_has_one_tile_whatever_the_batch(name, grids):
    """In the launch's own grid: all tiles, or as many as a persistent kernel has blocks."""
    kernels, instance, direction = KERNELS[name]
    clocks, asked = [], []
    with hopper_attention.backend(kernels):
        for inputs in (small(direction, batch) for batch in (1, 40)):
            clocks.append(timeline.model(inputs, instance).clocks)
            timeline._host_code(inputs, instance, lambda ask, _: asked.append(ask.grid))
    assert clocks[0] == clocks[1]
    assert grids == asked
    assert asked[1][0] in (40 * asked[0][0], target.SIMULATED_SMS)


@pytest.mark.simulator
def test_stamps_of_ampere():
    """Stamps are of the first blocks, which have one tile each whatever the batch is."""
    with hopper_attention.backend("ampere"):
        one, three = (
            timeline.record(small("forward", batch), "ampere_fwd_bf16_d64", blocks=2)[0]
            for batch in (1, 3)
        )
    assert one == three
    assert {span.block for span in one} == {0, 1}
    assert {span.name for span in one} == {"wait for copies", "arithmetic"}


@pytest.mark.simulator
def test_command_without_a_gpu(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trace, picture = tmp_path / "new" / "a.json", tmp_path / "a.png"
    arguments = ["profile", "timeline", "-w", PROBLEM, "--out", str(trace), "--png", str(picture)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "clocks_per_tile" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "nope"], "unknown workload"),
        (["-w", "h200"], "is 20 problems"),
        (["-w", "decode_paged/decode_bf16_d128_b1_s1024"], "no compiled kernel runs"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["hopper-attention", "profile", "timeline", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
