"""`hopper-attention bench` without a GPU: everything but the clock.  Nothing here is timed."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hopper_attention.benchmarks.peers import PEERS
from typer.testing import CliRunner

from hopper_attention import cli, files
from hopper_attention.bench.data import results, workloads
from hopper_attention.bench.data.results import CUBLAS_BF16, DEVICE_COPY, OURS, Row, Run
from hopper_attention.bench.data.statistics import Ratio, Summary
from hopper_attention.bench.data.workloads import Problem, unmasked_pairs
from hopper_attention.bench.measure import baselines, environment, overhead, protocol
from hopper_attention.bench.measure.correctness import judge
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.protocol import Protocol, Samples, measure
from hopper_attention.bench.measure.runner import Prepared, Unsupported, run_problem
from hopper_attention.bench.measure.sampling import Sampler, State
from hopper_attention.bench.report import ledger, report
from hopper_attention.bench.report.compare import compare
from hopper_attention.dispatch import manifest, plan
from hopper_attention.dispatch.target import Executor, choose
from hopper_attention.errors import UserError
from hopper_attention.launch import runtime

SAMPLES = Path(__file__).parent / "bench_samples"
CPU = torch.device("cpu")

# ---------------------------------------------------------------- workloads


def problem(**fields):
    defaults = {
        "workload": "test",
        "direction": "forward",
        "dtype": "bf16",
        "batch": 2,
        "heads": 4,
        "heads_kv": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "seqlen": 48,
        "seqlen_q": 48,
    }
    return Problem(**{**defaults, **fields})


@pytest.mark.parametrize("queries", [1, 5, 8])
@pytest.mark.parametrize("keys", [1, 5, 9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [-1, 0, 3, 100])
def test_unmasked_pairs_by_hand(queries, keys, causal, window):
    expected = 0
    for row in range(queries):
        place = row + keys - queries
        for key in range(keys):
            expected += (not causal or key <= place) and (window < 0 or key >= place - window)
    assert unmasked_pairs(queries, keys, causal, window) == expected


def test_flop_conventions():
    full = problem()
    assert full.flop == 4 * 2 * 48 * 48 * 64 * 4
    assert problem(causal=True).flop == full.flop // 2
    assert problem(direction="backward").flop == int(2.5 * full.flop)
    windowed = problem(causal=True, window=7)
    assert windowed.flop == 4 * 2 * 64 * 4 * unmasked_pairs(48, 48, True, 7)
    assert problem(head_dim=192, head_dim_v=128).flop == 2 * 2 * 48 * 48 * 4 * 320
    packed = problem(lengths=(5, 9), causal=True)
    assert packed.flop == 4 * 64 * 4 * (5 * 5 // 2 + 9 * 9 // 2)


def test_bytes_of_decode():
    decode = problem(direction="decode", seqlen=1024, seqlen_q=1)
    cache = 2 * 1024 * 2 * (64 + 64) * 2
    assert decode.bytes == cache + 2 * 4 * 64 * (2 + 2) + 4 * 2 * 4


def test_committed_workloads():
    problems = workloads.load_problems()
    assert len({p.name for p in problems}) == len(problems)
    assert {p.direction for p in problems} == set(workloads.DIRECTIONS)
    paper = workloads.load_problems(["fa3"])
    assert {p.head_dim for p in paper} == {64, 128, 256}
    assert all(p.batch * p.seqlen == 16384 and p.heads * p.head_dim == 2048 for p in paper)
    decode = workloads.load_problems(["decode*"])
    assert {p.page_size for p in decode} == {0, 64}
    assert max(p.seqlen for p in decode) == 262144
    assert max(p.batch for p in decode) == 256
    assert all(p.batch * p.seqlen <= 8388608 for p in decode)
    (one,) = workloads.load_problems(["fa3/forward_bf16_d128_causal_b4_s4096"])
    assert one.heads == 16
    packed = workloads.load_problems(["varlen*"])
    assert all(sum(p.lengths) == 32768 for p in packed)


def test_every_attention_kernel_has_a_problem():
    """That leads to it: by itself, forced to Ampere's, without two-level sums or exponentials."""
    problems = workloads.of_instances()
    assert len({p.name for p in problems}) == len(problems)
    targets = (choose((9, 0)), choose((9, 0), "ampere"))
    reached = set()
    flags = (False, True)
    for p, target, *precision in itertools.product(problems, targets, flags, flags):
        with contextlib.suppress(NotImplementedError):
            reached.add(p.instance(target, *precision))
    compiled = manifest.instances().items()
    on_hopper = {
        n for n, i in compiled if i.family in workloads.DIRECTION_OF and "90" in i.architecture
    }
    assert on_hopper <= reached


def test_unknown_workload():
    with pytest.raises(UserError, match="unknown workload 'nope'; there are: fa3, h200"):
        workloads.load_problems(["nope"])


# ---------------------------------------------------------------- statistics and protocol


def test_summary_and_ratio():
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (summary.median, summary.minimum, summary.count) == (3.0, 1.0, 5)
    assert summary.spread == pytest.approx(1 / 3)
    ratio = Ratio.of(Summary(2.0, 0.03, 2.0, 9), Summary(2.2, 0.04, 2.1, 9))
    assert ratio.value == pytest.approx(1.1)
    assert ratio.noise == pytest.approx(0.05)
    assert ratio.is_significant
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


class FakeTimer:
    """Durations are 1, 2, 3, ... ms in the order of the calls."""

    def __init__(self):
        self.events = []
        self.now = 0.0

    def idle(self, seconds):
        self.events.append(f"idle {seconds}")

    def load(self, seconds):
        self.events.append(f"load {seconds}")

    def milliseconds(self, call):
        self.events.append(call())
        self.now += 1.0
        return self.now

    def state(self):
        """Clocks and power since the last question: once a call, and something before each."""
        return State([1000 + int(self.now)], [100.0 + self.now])

    def kernels(self, call):
        call()
        self.now += 1.0
        return {"first": self.now, "second": 0.5}


PROTOCOL = Protocol(repeats=2, warmup=1, idle_seconds=0.25, load_seconds=5.0)
CALLS = {"a": lambda: "a", "b": lambda: "b"}


def test_burst_takes_turns_and_idles():
    timer = FakeTimer()
    samples = measure(CALLS, "burst", PROTOCOL, timer)
    assert timer.events == ["a", "b", "idle 0.25", "a", "b", "idle 0.25", "a", "b"]
    assert samples == {
        "a": Samples([3.0, 5.0], [1003, 1005], [103.0, 105.0]),
        "b": Samples([4.0, 6.0], [1004, 1006], [104.0, 106.0]),
    }


class FakeNvml(ModuleType):
    """A GPU whose clock falls by 1 MHz with every question."""

    NVML_CLOCK_SM = 1
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_SUCCESS = 0

    def __init__(self, status=0):
        super().__init__("pynvml")
        self.mhz, self.status, self.asked = 1981, status, threading.Event()

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-7"
        return self

    def nvmlDeviceGetClockInfo(self, device, kind):
        assert (device, kind) == (self, self.NVML_CLOCK_SM)
        self.mhz -= 1
        return self.mhz

    def nvmlDeviceGetFieldValues(self, device, fields):
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        if self.mhz <= 1977:
            self.asked.set()
        return [SimpleNamespace(nvmlReturn=self.status, value=SimpleNamespace(uiVal=650_500))]


def test_clocks_and_power_are_sampled_until_closed(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sampler = Sampler("GPU-7")
    assert sampler.reason == ""
    assert nvml.asked.wait(timeout=60)
    sampler.close()
    state = sampler.taken()
    assert state.sm_mhz[:2] == [1979, 1978] and set(state.power_w) == {650.5}
    assert 1979 not in sampler.taken().sm_mhz, "what was handed out is gone"


@pytest.mark.parametrize(
    "missing", [None, ModuleType("pynvml"), FakeNvml(status=3)], ids=["package", "library", "power"]
)
def test_without_nvml_there_are_no_samples_and_a_reason(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "pynvml", missing)
    sampler = Sampler("GPU-7")
    assert sampler.taken() == State([], []) and "Error" in sampler.reason


def test_sustained_loads_first_and_does_not_idle():
    timer = FakeTimer()
    measure(CALLS, "sustained", PROTOCOL, timer)
    assert timer.events == ["load 5.0", "a", "b", "a", "b", "a", "b"]


def test_modes_that_are_not_asked_for_are_not_measured():
    timer = FakeTimer()
    protocol = dataclasses.replace(PROTOCOL, modes=("sustained",))
    rows = list(run_problem(problem(), [FakePeer("good")], protocol, timer, CPU))
    assert [row.mode for row in rows] == ["sustained"]
    assert "idle 0.25" not in timer.events


def test_baselines_that_fail_leave_rows(monkeypatch):
    def broken():
        raise RuntimeError("no FP8")

    monkeypatch.setattr(baselines, "_matmul_bf16", lambda: lambda: None)
    monkeypatch.setattr(baselines, "_matmul_fp8", broken)
    monkeypatch.setattr(baselines, "_copy", lambda: lambda: None)
    rows = list(baselines.baseline_rows(PROTOCOL, FakeTimer()))
    status = {(r.peer, r.mode): r.status for r in rows}
    assert len(rows) == len(status) == 6
    assert status[results.CUBLAS_FP8, "burst"] == "failed"
    assert status[CUBLAS_BF16, "burst"] == status[DEVICE_COPY, "sustained"] == "ok"
    assert {r.flop for r in rows if r.peer == CUBLAS_BF16} == {2 * 8192**3}


# ---------------------------------------------------------------- correctness

ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "longer cache": {"causal": True, "seqlen": 80},
    "more queries than keys": {"causal": True, "seqlen": 20},
    "window": {"causal": True, "window": 9},
    "packed": {"lengths": (17, 48, 1), "batch": 3, "causal": True},
    "paged": {"direction": "decode", "seqlen_q": 1, "seqlen": 50, "page_size": 16},
    "softcap": {"softcap": 5.0},
    "sink": {"sink": True, "causal": True},
    "two head dims": {"head_dim": 96, "head_dim_v": 32},
    "FP8": {"dtype": "fp8"},
}


def by_autograd(inputs, dtype):
    """Attention written another way than the module under test does: one sequence at a time."""
    p = inputs.problem
    outs = []
    for sequence, (queries, keys) in enumerate(p.sequences):
        q = inputs.queries(inputs.q, sequence).to(dtype)
        k = inputs.keys(inputs.k, sequence).to(dtype).repeat_interleave(p.heads // p.heads_kv, 1)
        v = inputs.keys(inputs.v, sequence).to(dtype).repeat_interleave(p.heads // p.heads_kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(p.head_dim)
        if p.softcap:
            scores = p.softcap * torch.tanh(scores / p.softcap)
        place = torch.arange(queries)[:, None] + keys - queries
        visible = torch.ones(queries, keys, dtype=torch.bool)
        if p.causal:
            visible &= torch.arange(keys) <= place
        if p.window >= 0:
            visible &= torch.arange(keys) >= place - p.window
        weights = torch.exp(scores) * visible
        total = weights.sum(-1, keepdim=True)
        if p.sink:
            total = total + torch.exp(inputs.sink.to(dtype))[:, None, None]
        outs.append(torch.einsum("hqk,khd->qhd", weights / total.clamp(min=1e-30), v))
    return torch.cat(outs) if p.lengths else torch.stack(outs)


@pytest.mark.parametrize("case", ATTENTION)
def test_right_results_pass_and_wrong_ones_fail(case):
    inputs = Inputs.make(problem(**ATTENTION[case]), CPU)
    out = by_autograd(inputs, torch.float32).to(torch.bfloat16)
    verdict = judge(inputs, [out])
    assert verdict.passed, verdict
    assert verdict.ours.maximum > 0
    assert not judge(inputs, [out * 1.05]).passed
    spoiled = out.clone()
    spoiled[-1] = math.nan
    assert not judge(inputs, [spoiled]).passed


@pytest.mark.parametrize("case", ["plain", "causal", "window", "packed", "softcap"])
def test_gradients(case):
    inputs = Inputs.make(problem(direction="backward", **ATTENTION[case]), CPU)
    out = by_autograd(inputs, torch.float32)
    leaves = (inputs.q, inputs.k, inputs.v)
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out.float())
    assert judge(inputs, gradients).passed
    dq, dk, dv = gradients
    assert not judge(inputs, (dq, dk * 1.05, dv)).passed
    assert not judge(inputs, (dq, dk, dv + 0.05)).passed


# ---------------------------------------------------------------- peers and runner


def peer(name):
    return next(p for p in PEERS if p.name == name)


def test_peers_refuse_politely():
    """Without their packages, without a GPU, or for shapes that they do not have: one sentence."""
    cases = [problem(), problem(**ATTENTION["packed"]), problem(dtype="fp8")]
    for member in (p for p in PEERS if not p.name.startswith(OURS)):
        for case in cases:
            if member.name == "torch flash" and case is cases[0]:
                continue  # which PyTorch has for CPUs as well
            with pytest.raises(Unsupported) as refusal:
                member.prepare(Inputs.make(case, CPU))
            assert str(refusal.value).strip()
            assert "\n" not in str(refusal.value)


def test_ours_runs_what_it_supports():
    ours = peer(OURS)
    prepared = ours.prepare(Inputs.make(problem(causal=True), CPU))
    assert prepared.instance == "fwd_bf16_d64_causal"
    assert prepared.call()[0].shape == (2, 48, 4, 64)


def test_ours_refuses_or_is_right():
    for case in ATTENTION.values():
        inputs = Inputs.make(problem(**case), CPU)
        try:
            prepared = peer(OURS).prepare(inputs)
        except Unsupported:
            continue
        assert judge(inputs, prepared.call()).passed


@dataclasses.dataclass
class FakePeer:
    name: str
    factor: float = 1.0
    fault: Exception | None = None

    def prepare(self, inputs):
        if self.fault is not None:
            raise self.fault
        out = by_autograd(inputs, torch.float32).to(torch.bfloat16) * self.factor
        return Prepared(lambda: out)


def test_one_run_with_peers_of_all_kinds():
    peers = [
        peer(OURS),
        FakePeer("good"),
        FakePeer("wrong", factor=1.1),
        FakePeer("missing", fault=Unsupported("not installed")),
        FakePeer("broken", fault=RuntimeError("out of\nmemory")),
    ]
    rows = list(run_problem(problem(), peers, PROTOCOL, FakeTimer(), CPU))
    assert len({row.key for row in rows}) == len(rows) == 2 * len(peers)
    status = {row.peer: (row.status, row.reason) for row in rows}
    assert status[OURS] == status["good"] == ("ok", "")
    assert status["missing"] == ("skipped", "not installed")
    assert status["broken"] == ("failed", "RuntimeError: out of")
    assert status["wrong"][0] == "wrong"
    assert "against FP64" in status["wrong"][1]
    ours = next(row for row in rows if row.peer == OURS)
    assert ours.instance == "fwd_bf16_d64"
    assert (ours.flop, len(ours.samples_ms)) == (problem().flop, 2)
    assert ours.kernels == {"first": 3.0, "second": 0.5}, "median of five"
    assert not next(row for row in rows if row.peer == "good").kernels
    assert 0 < ours.error["rms"] < 2 * ours.error["pytorch_rms"] + 1e-5


def test_a_peer_that_breaks_while_timed_leaves_rows():
    class Breaking(FakeTimer):
        def milliseconds(self, call):
            raise RuntimeError("illegal address")

    rows = list(run_problem(problem(), [FakePeer("good")], PROTOCOL, Breaking(), CPU))
    assert [row.status for row in rows] == ["failed", "failed"]
    assert rows[0].reason == "RuntimeError: illegal address"


def test_a_problem_that_does_not_fit_leaves_rows(monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory.\nTried")

    monkeypatch.setattr(Inputs, "make", out_of_memory)
    rows = list(run_problem(problem(), [FakePeer("a"), FakePeer("b")], PROTOCOL, FakeTimer(), CPU))
    assert {(row.peer, row.mode) for row in rows} == {
        (peer, mode) for peer in "ab" for mode in results.MODES
    }
    assert {row.reason for row in rows} == {"RuntimeError: CUDA out of memory."}


# ---------------------------------------------------------------- results, comparison, report


def row(name, who=OURS, mode="sustained", ms=1.0, **fields):
    workload = name.partition("/")[0]
    samples = [ms * (1 + 0.001 * i) for i in range(20)]
    defaults = {"status": "ok", "flop": 10**12, "bytes": 10**9, "samples_ms": samples}
    return Row(name, workload, who, mode, **{**defaults, **fields})


FORWARD = "fa3/forward_bf16_d128_causal_b{}_s{}"


def fabricated(factor=1.0, date="2026-11-20T00:00:00+00:00"):
    rows = []
    for mode in results.MODES:
        rows.append(row(f"baseline/{CUBLAS_BF16}", CUBLAS_BF16, mode, 1.4))
        rows.append(row(f"baseline/{DEVICE_COPY}", DEVICE_COPY, mode, 0.25, flop=0))
        for seqlen in (512, 4096):
            name = FORWARD.format(16384 // seqlen, seqlen)
            instance = "fwd_bf16_d128_causal"
            error = {"maximum": 1e-3, "rms": 1e-4, "pytorch_maximum": 1e-3, "pytorch_rms": 1e-4}
            ours = {"instance": instance, "error": error}
            rows.append(row(name, OURS, mode, factor * 2048 / seqlen, **ours))
            rows.append(row(name, "torch cuDNN", mode, 2.0))
        decode = "decode/decode_bf16_d128_b8_s4096"
        rows.append(row(decode, "torch flash", mode, 0.5))
        wrong = {"status": "wrong", "reason": "rms", "samples_ms": []}
        rows.append(row(decode, "flash-attn-4", mode, **wrong))
        skipped = {"status": "skipped", "reason": "not installed", "samples_ms": []}
        rows.append(row(decode, "flashinfer fa3", mode, **skipped))
    device = {"name": "fabricated by the tests", "sms": 132}
    return Run(date, "0" * 40, device, {"torch": "0"}, {"repeats": 20}, rows)


def test_results_survive_the_disk(tmp_path):
    run = fabricated()
    path = tmp_path / "new" / "a.json"
    results.save(path, run)
    assert results.load(path) == run
    assert json.loads(path.read_text())["schema"] == results.SCHEMA
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not a result"),
        ("[]", "is not a result"),
        ('{"schema": 99}', "has schema 99"),
        ('{"schema": 1, "rows": [{"peer": 1}]}', "is damaged"),
        ('{"schema": 1, "rows": []}', "is damaged"),
    ],
)
def test_damaged_results(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        results.load(path)
    with pytest.raises(UserError, match="No such file"):
        results.load(tmp_path / "b.json")


def test_a_row_is_timed_or_says_why_not():
    with pytest.raises(ValueError, match="ok with 0 samples"):
        Row("a/b", "a", OURS, "burst", "ok")
    with pytest.raises(ValueError, match="wrong with 1 samples"):
        Row("a/b", "a", OURS, "burst", "wrong", samples_ms=[1.0])


def test_compare():
    changes = {(c.peer, c.mode): c for c in compare(fabricated(), fabricated(factor=0.5))}
    assert changes[OURS, "burst"].verdict == "faster"
    assert changes[OURS, "burst"].speedup == pytest.approx(2.0)
    assert changes["torch cuDNN", "burst"].verdict == "same"
    slower = compare(fabricated(), fabricated(factor=1.5))
    assert {c.verdict for c in slower if c.peer == OURS} == {"slower"}
    other = dataclasses.replace(fabricated(), rows=[])
    with pytest.raises(UserError, match="no measurement in common"):
        compare(fabricated(), other)


def test_report_shows_rates_fractions_and_reasons():
    entries = ledger.update({}, [fabricated()], [], ["fwd_bf16_d128_causal", "fwd_bf16_d64"])
    page = report.markdown([fabricated()], entries)
    assert "## fabricated by the tests\n\n- 2026-11-20T00:00, commit 000000000000" in page
    assert "| `forward_bf16_d128_causal_b4_s4096` | 1981 (2.80)" in page
    assert "2.00 TB/s" not in page.split("### decode")[0]
    assert "1.98 TB/s (0.50)" in page
    assert "**wrong**" in page
    assert "- flashinfer fa3: skipped, not installed" in page
    assert "| `fwd_bf16_d64` | simulator only |  | simulator only |" in page
    assert "| `fwd_bf16_d128_causal` | fabricated by the tests, 2026-11-20 | 000000000000 |" in page


def test_report_shows_the_newest_figure_of_each_problem():
    """Later runs need not repeat what earlier ones measured."""
    old, new = fabricated(), fabricated(factor=2.0, date="2026-12-01T00:00:00+00:00")
    kept = [r for r in new.rows if r.problem.endswith("b4_s4096") or r.workload == "baseline"]
    new = dataclasses.replace(new, commit="1" * 40, rows=kept)
    page = report.markdown([old, new], {})
    lines = [line for line in page.splitlines() if line.startswith("| `forward_")]
    assert any("b4_s4096` | 991 (" in line and line.endswith(" 111111111111 |") for line in lines)
    assert any("b32_s512` | 248 (" in line and line.endswith(" 000000000000 |") for line in lines)


def test_ledger_takes_the_newest_run():
    old, new = fabricated(), fabricated(factor=2.0, date="2026-12-01T00:00:00+00:00")
    name = "fwd_bf16_d128_causal"
    entry = ledger.update({}, [new, old], [], [name])[name]
    assert entry["speed"]["date"] == entry["numerics"]["date"] == new.date
    assert entry["speed"]["problem"] == FORWARD.format(4, 4096), "the fastest of its problems"
    assert entry["speed"]["tflops"] == pytest.approx(990, abs=5)
    assert ledger.update({name: entry}, [], [], [name]) == {name: entry}
    assert ledger.update({"gone": entry}, [], [], [name]) == {name: {}, "gone": entry}


def test_ledger_has_what_tests_saw(tmp_path):
    """Numerics without speed; a test that is older than a measurement changes nothing."""
    run, name = fabricated(), "fwd_bf16_d128_causal"
    fields = {"commit": "1" * 40, "device": "another", "by": "tests/gpu"}
    for number, date in enumerate(("2026-01-01", "2026-11-30")):
        text = json.dumps({"date": date, **fields, "instances": [name, "bwd_pre_bf16", "gone"]})
        (tmp_path / f"{number}.json").write_text(text)
    old, new = ledger.load_checks(tmp_path)
    entries = ledger.update({}, [run], [old], [name, "bwd_pre_bf16"])
    assert entries["bwd_pre_bf16"] == {"numerics": {"date": "2026-01-01", **fields}}
    assert entries[name]["numerics"]["date"] == run.date
    entries = ledger.update(entries, [run], [old, new], [name])
    assert entries[name]["numerics"]["commit"] == "1" * 40
    assert entries[name]["speed"]["commit"] == run.commit
    (tmp_path / "2.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        ledger.load_checks(tmp_path)


def test_ledger_has_what_helped():
    run = fabricated()
    kernels = {"bwd_pre_bf16": 0.1, "bwd_bf16_d128": 0.8}
    main = row("instances/backward_bf16_d128_b4_s4096", instance="bwd_bf16_d128", kernels=kernels)
    failed = row(
        "a/b", instance="bwd_post_bf16_d128", status="failed", samples_ms=[],
        kernels={"bwd_post_bf16_d128": 1.0},
    )  # fmt: skip
    run = dataclasses.replace(run, rows=[main, failed])
    entries = ledger.update({}, [run], [], [*kernels, "bwd_post_bf16_d128"])
    assert entries["bwd_bf16_d128"]["speed"]["tflops"] > 0
    assert entries["bwd_bf16_d128"]["speed"]["milliseconds"] == 0.8
    assert entries["bwd_pre_bf16"]["speed"]["milliseconds"] == 0.1
    assert "tflops" not in entries["bwd_pre_bf16"]["speed"]
    assert "numerics" not in entries["bwd_pre_bf16"], "nothing was checked in this run"
    assert entries["bwd_post_bf16_d128"] == {}
    assert "| 0.1 ms |" in report.markdown([run], entries)


def test_rows_without_flop_are_judged_by_bytes():
    moved = row("quantize/narrow_d128", flop=0, bytes=10**9)
    run = fabricated()
    run = dataclasses.replace(run, rows=[*run.rows, moved])
    assert moved.memory_bound
    assert run.fraction(moved) == pytest.approx(0.25, rel=0.02)
    assert "1.00 TB/s" in report.markdown([run], {}) or "0.99 TB/s" in report.markdown([run], {})


def test_fp8_is_compared_with_cublas_fp8_and_cudnn():
    """Twice cuBLAS's rate in bf16 is no merit where its FP8 runs at 1.8 times that."""
    bf16 = row(f"baseline/{CUBLAS_BF16}", CUBLAS_BF16, flop=100)
    fp8 = row(f"baseline/{results.CUBLAS_FP8}", results.CUBLAS_FP8, flop=180)
    ours, theirs = (row("fp8/forward_fp8_d128_b1_s1024", peer) for peer in (OURS, "cuDNN FP8"))
    run = dataclasses.replace(fabricated(), rows=[bf16, fp8, ours, theirs])
    assert run.fraction(ours) == pytest.approx(ours.tflops / fp8.tflops)
    assert run.fraction(fp8) == 1.0
    speedup = theirs.milliseconds.median / ours.milliseconds.median
    assert run.beside_cudnn(ours) == pytest.approx(speedup)
    assert run.beside_cudnn(bf16) is None
    page = report.markdown([run], {})
    assert "ours / cuDNN" in page and f"| {speedup:.2f} |" in page


def test_committed_ledger_and_page_are_current(root):
    """If this fails: hopper-attention bench report"""
    entries = ledger.read(root / "benchmarks" / "ledger.json")
    runs = results.load_folder(root / "benchmarks" / "results")
    checks = ledger.load_checks(root / "benchmarks" / "results" / "checks")
    assert list(entries) == sorted(manifest.listed())
    assert entries == ledger.update(entries, runs, checks, list(entries))
    assert (root / "docs" / "results.md").read_text() == report.markdown(runs, entries)


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from hopper_attention.bench.report.plots import write_plots

    paths = write_plots(fabricated(), tmp_path / "plots")
    assert sorted(path.name for path in paths) == [
        "decode_decode_burst.png",
        "decode_decode_sustained.png",
        "fa3_forward_burst.png",
        "fa3_forward_sustained.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(UserError, match="no timed attention"):
        write_plots(dataclasses.replace(fabricated(), rows=[]), tmp_path)


def test_every_problem_can_be_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    from hopper_attention.bench.report.plots import _panel, _size

    panels = {(_panel(r), _size(r)) for r in (row(p.name) for p in workloads.load_problems())}
    assert ("bf16 d128 causal", "4k") in panels
    assert ("bf16 d128", "b256 1k") in panels


# ---------------------------------------------------------------- command line and overhead


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_list():
    done = invoke("--list")
    assert done.exit_code == 0
    assert "fa3" in done.stdout
    assert "flash-attn-4" in done.stdout
    one = invoke("--list", "-w", "llama3_8b", "-p", "torch*")
    assert "fa3" not in one.stdout
    assert "flash-attn-4" not in one.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "there is no GPU here"),
        (["bench", "-w", "nope"], "unknown workload"),
        (["bench", "-p", "nope"], "unknown peer"),
        (["bench", "--mode", "nope"], "unknown mode 'nope'; there are: burst, sustained"),
        (["bench", "compare", "a.json", "b.json"], "a.json: No such file"),
        (["bench", "report", "--results", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["hopper-attention", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("elftools", ["sass"]), ("matplotlib", ["bench", "plot", str(SAMPLES / "before.json")])],
)
def test_without_the_tools(tmp_path, package, arguments):
    program = f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = {arguments!r};"
    program += "from hopper_attention.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: no {package}: pip install 'hopper-attention[tools]'\n"


def test_a_whole_run(monkeypatch, tmp_path):
    """The command itself; the clock, the baselines and the device are fakes."""
    monkeypatch.setattr(environment, "require_gpu", lambda: CPU)
    monkeypatch.setattr(environment, "device_facts", lambda _: {"name": "no GPU"})
    monkeypatch.setattr(baselines, "baseline_rows", lambda *_: [])
    monkeypatch.setattr(protocol, "CudaTimer", lambda _: FakeTimer())
    small = [problem(), problem(direction="backward"), problem(workload="decode", seqlen_q=1)]
    monkeypatch.setattr(workloads, "load_problems", lambda _: small)
    out, plots = tmp_path / "run.json", tmp_path / "plots"
    arguments = ["-p", OURS, "-p", "flash*", "--repeats", 2, "--out", out, "--plot", plots]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    result = results.load(out)
    assert {row.problem for row in result.rows} == {p.name for p in small}
    ours = [row for row in result.rows if row.peer == OURS]
    assert [row.status for row in ours] == ["ok"] * 6
    assert result.protocol["repeats"] == 2
    assert result.commit
    assert list(plots.glob("*.png"))


def test_compare_committed_samples():
    before, after = SAMPLES / "before.json", SAMPLES / "after.json"
    done = invoke("compare", before, after)
    assert done.exit_code == 0
    assert "faster" in done.stdout
    changes = json.loads(invoke("compare", before, after, "--json").stdout)
    assert {change["verdict"] for change in changes} == {"faster", "same"}


def test_report_command(tmp_path):
    out, entries = tmp_path / "results.md", tmp_path / "ledger.json"
    done = invoke("report", "--results", SAMPLES, "--ledger", entries, "--out", out)
    assert done.exit_code == 0, done.output
    assert "fabricated by the tests" in out.read_text()
    assert list(json.loads(entries.read_text())) == sorted(manifest.listed())


@pytest.fixture
def one_kernel(monkeypatch):
    """A build of one."""
    kept = {"fwd_bf16_d64": next(iter(manifest.instances().values()))}
    monkeypatch.setattr(manifest, "instances", lambda: kept)


def test_report_on_a_partial_build_leaves_the_ledger_as_it_is(root, tmp_path, one_kernel):
    """Byte for byte, as nothing was measured; and the page."""
    committed = root / "benchmarks" / "ledger.json"
    entries, page = tmp_path / "ledger.json", tmp_path / "results.md"
    entries.write_bytes(committed.read_bytes())
    where = ("--results", root / "benchmarks" / "results", "--ledger", entries, "--out", page)
    done = invoke("report", *where)
    assert done.exit_code == 0, done.output
    assert "no instance that is listed" not in done.output
    assert entries.read_bytes() == committed.read_bytes()
    assert page.read_bytes() == (root / "docs" / "results.md").read_bytes()


def test_report_names_entries_of_no_instance_and_keeps_them(tmp_path):
    entries, page = tmp_path / "ledger.json", tmp_path / "results.md"
    seen = {"numerics": {"date": "2026-01-01", "commit": "1" * 40, "device": "x", "by": "y"}}
    entries.write_text(json.dumps({"renamed": seen}))
    done = invoke("report", "--results", SAMPLES, "--ledger", entries, "--out", page)
    assert "has entries of no instance that is listed: renamed" in done.output
    assert json.loads(entries.read_text())["renamed"] == seen


@pytest.mark.parametrize("text", ["{", "[]", '{"fwd_bf16_d64": 1}'], ids=["cut", "list", "number"])
def test_report_does_not_replace_what_is_no_ledger(tmp_path, text):
    entries, page = tmp_path / "ledger.json", tmp_path / "results.md"
    entries.write_text(text)
    done = invoke("report", "--results", SAMPLES, "--ledger", entries, "--out", page)
    assert isinstance(done.exception, UserError)
    assert entries.read_text() == text
    assert not page.exists()


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["kept", "overwritten"])
def test_a_run_does_not_replace_another_result(monkeypatch, tmp_path, more):
    monkeypatch.setattr(environment, "require_gpu", lambda: CPU)
    command = importlib.import_module("hopper_attention.cli.bench")  # the name is its Typer's, too
    monkeypatch.setattr(command, "_measure", lambda *_: fabricated())
    out = tmp_path / "bench.json"
    out.write_text("measured for hours")
    done = invoke("-w", "fa3", "--out", out, *more)
    assert isinstance(done.exception, UserError) != bool(more)
    assert more or "--overwrite" in str(done.exception)
    assert out.read_text() == "measured for hours"


def test_what_is_replaced_is_replaced_at_once(monkeypatch, tmp_path):
    path = tmp_path / "ledger.json"
    files.replace(path, "old")

    def broken(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(KeyboardInterrupt):
        files.replace(path, "new")
    assert path.read_bytes() == b"old"


def test_null_launches_take_the_gpu_path_and_leave_no_trace():
    before = (plan.executor_for, runtime._cuda, runtime.current_stream)
    q = torch.randn(1, 128, 8, 128, dtype=torch.bfloat16)
    with overhead.null_launches():
        from hopper_attention import flash_attn_func

        out, lse = flash_attn_func(q, q, q, causal=True, return_lse=True)
        assert plan.executor_for(q) is Executor.CUDA
    assert (out.shape, lse.shape) == (q.shape, (1, 8, 128))
    assert (plan.executor_for, runtime._cuda, runtime.current_stream) == before


def test_overhead_command(monkeypatch):
    monkeypatch.setattr(overhead, "CALLS", 1)
    done = invoke("overhead", "--json", "--repeats", 3)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures["call_us"]) == set(overhead.SHAPES)
    assert set(figures["start_ms"]) == {"import", "first_call"}
    assert figures["included"]
    assert figures["not_included"]
