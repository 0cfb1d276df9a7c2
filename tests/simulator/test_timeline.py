"""The timeline: costs of small kernels by hand, the forward kernel's picture, the command."""

import json

import numpy as np
import pytest
import torch
from simulator.snippets import module, run
from typer.testing import CliRunner

from hopper_attention import flash_attn_func, simulator
from hopper_attention.cli import app
from hopper_attention.simulator.observation.recording import work_of

MODEL = simulator.CostModel()


def timeline(body: str, **arguments) -> simulator.Timeline:
    with simulator.record() as recording:
        run(body, **arguments)
    return simulator.Timeline(recording.traces[0])


def test_issue_slots_and_mufu():
    adds = "add.f32 %r1, %r1, %r2;" * 320
    one = timeline(adds, outputs=0, threads=32).clocks
    assert 320 <= one <= 330
    assert timeline(adds, outputs=0, threads=128).clocks == one  # a warp on each sub-core
    assert 2 * 320 <= timeline(adds, outputs=0, threads=256).clocks <= 2 * 330
    exponentials = "ex2.approx.f32 %r1, %r2;" * 50
    assert timeline(exponentials, outputs=0, threads=32).clocks >= 50 * MODEL.mufu_clocks


ROUND = "cvt.rni.s32.f32 %r1, %a0; cvt.rni.s32.f32 %r2, %a1; "
PACK = "cvt.pack.sat.u8.s32.b32 %d0, %r1, %r2, %d0; "


@pytest.mark.parametrize(
    ("body", "slots"),
    [
        (ROUND + PACK, 1),
        (ROUND.replace("rni", "rzi") + PACK.replace("u8", "s8"), 1),
        ("cvt.rni.s32.f32 %r1, %a0; " + PACK.replace("%r2", "%r1"), 1),
        (ROUND + PACK + PACK, 2),
        (ROUND + PACK + "add.s32 %d0, %d0, %r2; ", 3),
        (ROUND + PACK + "mov.b64 %rd1, {%r2, %r2}; ", 2),
        (ROUND + "add.s32 %d1, %r1, 1; " + PACK.replace("%r1", "%d1"), 4),
        ("cvt.rni.s32.f32 %r1, %a0; " + PACK, 2),
        (ROUND, 2),
        (ROUND.replace("rni", "rni.ftz") + PACK, 3),
        (ROUND + "cvt.pack.sat.u16.s32 %d0, %r1, %r2; ", 3),
    ],
)
def test_rounding_and_packing_is_one_instruction(body, slots):
    """ptxas makes F2IP so: of two numbers that nothing else reads, without ftz, to bytes only."""
    slots_of = lambda text: work_of(module(text).kernels["snippet"].instructions).slots  # noqa: E731
    assert slots_of(body) - slots_of("") == slots


def test_a_bulk_copy_and_its_wait():
    body = """
    mov.b32 %r1, memory;
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra END;
    mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 6400;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+16], [%rd60], 6400, [%r1];
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    END:
    """
    data = np.zeros((1600, 1), np.uint32)
    replay = timeline(body, inputs=data, outputs=0, shared=8192, per_thread=False)
    least = 6400 / MODEL.load_bytes_per_clock + MODEL.load_latency
    assert least <= replay.clocks <= least + 100
    (wait,) = (r for r in replay.ranges if r.kind == "wait")
    (load,) = (r for r in replay.ranges if r.kind == "load")
    assert abs(wait.end - load.end) <= MODEL.barrier_latency


def test_nothing_recorded_outside():
    with simulator.record(blocks=0) as recording:
        run("mov.b32 %d0, 1;")
    assert recording.traces == []


@pytest.fixture(scope="module")
def forward() -> simulator.Timeline:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 128, generator=generator).bfloat16() for n in (128, 1024, 1024))
    with simulator.enabled(), simulator.record() as recording:
        flash_attn_func(q, k, v)
    return simulator.Timeline(recording.traces[0])


def test_consumers_of_the_forward_kernel_alternate(forward):
    """Softmax of one warpgroup under the products of the other."""
    softmax = {
        warp: [r for r in forward.ranges if r.warp == warp and r.kind == "softmax"]
        for warp in (4, 8)
    }
    assert all(len(ranges) >= 5 for ranges in softmax.values())
    assert forward.overlap(4, 8) > 0.7
    assert forward.clocks_per_tile > 1000
    utilisation = forward.utilisation
    assert 0.4 < utilisation["tensor"] <= 1
    assert all(0 <= share <= 1 for share in utilisation.values())


def test_a_slower_tensor_core_takes_longer(forward):
    slower = simulator.Timeline(forward.trace, simulator.CostModel(wgmma_clocks_per_column=1.0))
    assert slower.clocks > 1.5 * forward.clocks


def test_files(forward, tmp_path):
    forward.save_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"warp 0", "warp 0 bulk copies", "warp 4", "warp 4 wgmma"} <= names
    kinds = {e["name"] for e in events if e["ph"] == "X"}
    assert kinds >= {"softmax", "wait", "wgmma", "load", "store"}
    forward.save_png(tmp_path / "trace.png", window=(0, 5000))
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path):
    arguments = [
        "simulate", "--seqlen-k", "900", "--seqlen-q", "100", "--seed", "2", "--json", "--timeline",
        str(tmp_path / "t.json"), "--png", str(tmp_path / "t.png"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"]
    assert report["clocks_per_tile"] > 0
    assert report["hazards"] == []
    assert (tmp_path / "t.json").stat().st_size > 1000
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.parametrize("arguments", [["--dtype", "fp64"], ["--hazards", "no"], ["--seed", "-1"]])
def test_bad_options(arguments):
    assert CliRunner().invoke(app, ["simulate", *arguments]).exit_code == 2
