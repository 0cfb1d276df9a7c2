"""Baselines of the device: rows of every run, of which results are given as fractions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hopper_attention.bench.data.results import BASELINE, CUBLAS_BF16, CUBLAS_FP8, DEVICE_COPY, Row
from hopper_attention.bench.measure.protocol import Call, Protocol, Timer, measure
from hopper_attention.bench.measure.runner import one_line

N = 8192
COPY_BYTES = 4 << 30


def baseline_rows(protocol: Protocol, timer: Timer) -> Iterator[Row]:
    """cuBLAS 8192^3 on random normal data, and a copy far larger than L2."""
    work = {CUBLAS_BF16: (2 * N**3, 0), CUBLAS_FP8: (2 * N**3, 0), DEVICE_COPY: (0, 2 * COPY_BYTES)}
    makers = {CUBLAS_BF16: _matmul_bf16, CUBLAS_FP8: _matmul_fp8, DEVICE_COPY: _copy}
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            call = make()
            call()
            calls[name] = call
        except Exception as fault:  # FP8 products depend on cuBLAS's version
            reason = one_line(fault)
            modes = protocol.modes
            yield from (Row(_problem(name), BASELINE, name, m, "failed", reason) for m in modes)
    for mode in protocol.modes:
        for name, taken in measure(calls, mode, protocol, timer).items():
            flop, moved = work[name]
            yield Row(
                _problem(name), BASELINE, name, mode, "ok", samples_ms=taken.milliseconds,
                sm_mhz=taken.sm_mhz, power_w=taken.power_w, flop=flop, bytes=moved,
            )  # fmt: skip


def _problem(name: str) -> str:
    return f"{BASELINE}/{name}"


def _matmul_bf16() -> Call:
    a, b = (torch.randn(N, N, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _matmul_fp8() -> Call:
    a, b = (
        torch.randn(N, N, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)


def _copy() -> Call:
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)
