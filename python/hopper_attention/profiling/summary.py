"""One screen about a profiled launch, and what its numbers suggest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hopper_attention.bench.data.workloads import Problem
from hopper_attention.errors import UserError
from hopper_attention.profiling.report import KernelReport
from hopper_attention.sass.disassembler import INSTRUCTION_BYTES

TENSOR_FLOP_PER_CLOCK = {"bf16": 4096, "fp16": 4096, "fp8": 8192}
"""FLOPs that the tensor cores of one SM do in a clock, by dtype."""

DURATION = ("gpu__time_duration.sum",)
CLOCK = (
    "sm__cycles_elapsed.avg.per_second",
    "smsp__cycles_elapsed.avg.per_second",
    "gpc__cycles_elapsed.avg.per_second",
)
SMS = ("device__attribute_multiprocessor_count", "launch__sm_count")
DRAM_BYTES = ("dram__bytes.sum",)
WAVES = ("launch__waves_per_multiprocessor",)

UTILISATION: dict[str, tuple[str, ...]] = {
    "tensor": (
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    ),
    "MUFU": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",),
    "FMA": (
        "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    ),
    "ALU": (
        "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    ),
    "issue": (
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
    ),
    "shared memory": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
        "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    ),
    "L2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "HBM": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}
"""Percent of the unit's peak; metric names in order of preference."""

STALLS_SHOWN = 5


@dataclass(frozen=True)
class Summary:
    kernel: str
    microseconds: float
    tflops: float
    clock_ghz: float | None
    peak_fraction: float | None
    """The fraction of the tensor cores' rate at the measured clock."""
    utilisation: dict[str, float | None]
    """Percent; None where the report has no such metric."""
    waves: float | None
    dram_bytes: float | None
    stalls: dict[str, dict[str, float]]
    """Role -> reason -> share of the role's sampled warps, largest first."""
    advice: list[str]


def summarise(report: KernelReport, problem: Problem, roles: Sequence[str] = ()) -> Summary:
    """`roles`: of every instruction (`sass.roles`); without them stalls have no role.

    Raises UserError if the report lacks the duration.
    """
    nanoseconds = report.first(*DURATION)
    if not nanoseconds:
        raise UserError("the report lacks gpu__time_duration.sum; profile with `--set full`")
    clock, sms = report.first(*CLOCK), report.first(*SMS)
    tflops = problem.flop / nanoseconds / 1e3
    fraction = None
    if clock and sms:
        peak = TENSOR_FLOP_PER_CLOCK[problem.dtype] * sms * clock
        fraction = tflops * 1e12 / peak
    utilisation = {unit: report.first(*names) for unit, names in UTILISATION.items()}
    stalls = _stalls_by_role(report, roles)
    waves = report.first(*WAVES)
    return Summary(
        kernel=report.kernel,
        microseconds=nanoseconds / 1e3,
        tflops=tflops,
        clock_ghz=clock / 1e9 if clock else None,
        peak_fraction=fraction,
        utilisation=utilisation,
        waves=waves,
        dram_bytes=report.first(*DRAM_BYTES),
        stalls=stalls,
        advice=_advice(utilisation, stalls, waves),
    )


def _stalls_by_role(report: KernelReport, roles: Sequence[str]) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter[str]] = {}
    for reason, samples in report.stalls.items():
        for offset, count in samples.items():
            index = offset // INSTRUCTION_BYTES
            role = roles[index] if index < len(roles) else "all"
            counts.setdefault(role, Counter())[reason] += count
    return {
        role: {
            reason: count / reasons.total()
            for reason, count in reasons.most_common(STALLS_SHOWN)
            if count
        }
        for role, reasons in counts.items()
        if reasons.total()
    }


def _advice(
    utilisation: dict[str, float | None],
    stalls: dict[str, dict[str, float]],
    waves: float | None,
) -> list[str]:
    """Each with the number that it follows from."""
    use = {unit: value or 0.0 for unit, value in utilisation.items()}
    tensor, mufu = use["tensor"], use["MUFU"]
    advice = []
    if tensor >= 85:
        advice.append(f"tensor pipe at {tensor:.0f} %: at its limit; only fewer FLOP help")
    elif max(use["HBM"], use["L2"]) >= 80 and tensor < 60:
        level = max(("HBM", "L2"), key=lambda unit: use[unit])
        advice.append(
            f"{level} at {use[level]:.0f} %: memory-bound; larger tiles, pack_gqa or splits "
            "change the traffic, schedules do not"
        )
    elif mufu >= 80:
        advice.append(
            f"MUFU at {mufu:.0f} %, tensor at {tensor:.0f} %: exponentials bind; compute a share "
            "of them by polynomials on FMA, or take a larger head dim's tile"
        )
    elif tensor + mufu >= 90:
        advice.append(
            f"tensor {tensor:.0f} % + MUFU {mufu:.0f} %: near 100 % in sum is GEMMs and "
            "exponentials in turn; look at `profile timeline` and at EX2 around waits in `sass`"
        )
    if use["issue"] >= 85:
        advice.append(f"issue slots at {use['issue']:.0f} %: shorten the loop (`sass`)")
    consumer = stalls.get("consumer", {})
    if (barrier := consumer.get("barrier", 0.0)) >= 0.3:
        advice.append(
            f"consumers wait at named barriers in {barrier:.0%} of samples: the turn is passed "
            "late; where is BAR.ARV in `sass --json`, schedule?"
        )
    if (loads := consumer.get("long_scoreboard", 0.0)) >= 0.2:
        advice.append(
            f"consumers wait for memory in {loads:.0%} of samples: more stages, or spills (`sass`)"
        )
    if waves is not None and 0 < waves % 1 < 0.5 and waves < 8:
        advice.append(
            f"{waves:.2f} waves: the last is mostly idle; persistent blocks or smaller tiles"
        )
    return advice or ["no unit near its limit: latency; look at `profile timeline`"]
