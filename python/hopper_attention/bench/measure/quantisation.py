"""Rates of the kernels around FP8 attention: they only move data, so a copy is their measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from hopper_attention.bench.data.results import OURS, QUANTISATION, Row
from hopper_attention.bench.measure.protocol import Call, Protocol, Timer
from hopper_attention.bench.measure.runner import one_line
from hopper_attention.dispatch import manifest
from hopper_attention.quantize import columns_of, means_of, narrowed, quantize

TOKENS = 32768
HIDDEN = 4096
"""Columns of all heads: 256 MiB in 16 bits, several times L2."""
DTYPES = (torch.bfloat16, torch.float16)
BYTES_OF_ELEMENT = {
    "quantize": 3,
    "quantize_absmax": 2,
    "quantize_sums": 2,
    "narrow": 2,
    "arrange": 2,
}
"""Family -> read and written of each; means are of sums, and of no matter."""


def quantisation_rows(protocol: Protocol, timer: Timer, device: torch.device) -> Iterator[Row]:
    """A row for each kernel that a call launches, timed by itself."""
    done: set[str] = set()
    for number, make in enumerate(_cases(device)):
        try:
            call = make()
            kernels = [name for name in timer.kernels(call) if name not in done]
        except Exception as fault:
            problem, reason = f"{QUANTISATION}/{number}", one_line(fault)
            yield from (
                Row(problem, QUANTISATION, OURS, m, "failed", reason) for m in protocol.modes
            )
            continue
        done.update(kernels)
        for mode in protocol.modes:
            runs = [timer.kernels(call) for _ in range(protocol.repeats)]
            for name in kernels:
                family = manifest.instances()[name].family
                samples = [run[name] for run in runs]
                yield Row(
                    f"{QUANTISATION}/{name}", QUANTISATION, OURS, mode, "ok", instance=name,
                    bytes=TOKENS * HIDDEN * BYTES_OF_ELEMENT.get(family, 0),
                    kernels={name: median(samples)}, samples_ms=samples,
                )  # fmt: skip


def _cases(device: torch.device) -> Iterator[Callable[[], Call]]:
    """Makers of calls, which between them launch every kernel."""
    for dtype, head_dim, arranged in product(DTYPES, (64, 128, 256), (False, True)):
        yield partial(_quantize, _rows(head_dim, dtype, device), arranged)
    for dtype in DTYPES:
        yield partial(partial, means_of, _rows(128, dtype, device))
    for head_dim, arranged in product((128, 256), (False, True)):
        yield partial(_narrow, _rows(head_dim, torch.float8_e5m2, device), arranged)
    for by_columns in (False, True):
        yield partial(_arrange, _rows(128, torch.float8_e4m3fn, device), by_columns)


def _rows(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (1, TOKENS, HIDDEN // head_dim, head_dim)
    return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)


def _quantize(x: Tensor, arranged: bool) -> Call:
    return partial(quantize, x, "block64", octaves=arranged, arranged=arranged)


def _narrow(x: Tensor, arranged: bool) -> Call:
    return partial(narrowed, x, torch.ones(1, device=x.device), arranged=arranged)


def _arrange(v: Tensor, by_columns: bool) -> Call:
    return partial(columns_of, v.transpose(1, 3).contiguous().transpose(1, 3) if by_columns else v)
