"""Clocks of a case on the GPU: groups of a block balanced to take equally long, then timed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from hopper_attention.errors import UserError
from hopper_attention.profiling import driver

from .kernel import KERNEL, MAX_GROUPS, Case

TARGET_CLOCKS = 200_000
"""Clocks of a launch: start and end of the loops do not matter."""
BALANCING_RUNS = 4


@dataclass(frozen=True)
class Figure:
    """The measurement of one kind of work of one case."""

    program: str
    case: str
    kind: str
    clocks: float
    """For each, of the SM (a sub-core, for a warp's instruction); median of blocks and launches."""
    low: float
    high: float
    model: float | None
    group_clocks: float
    """How long its warps took: the same for all groups of a case, or they were not always beside
    each other."""


def figures_of(case: Case, passes: list[int], clocks: np.ndarray) -> list[Figure]:
    """`clocks`: uint64 (samples, warps, 2), start and stop of each warp of a block."""
    figures = []
    for index, (role, copies) in enumerate(case.groups):
        elapsed = _elapsed(case, clocks)[:, index]
        for work in role.does:
            each = elapsed / (passes[index] * work.count * copies)
            figures.append(
                Figure(
                    program=case.program,
                    case=case.name,
                    kind=work.kind,
                    clocks=round(median(each.tolist()), 2),
                    low=round(each.min(), 2),
                    high=round(each.max(), 2),
                    model=work.model,
                    group_clocks=median(elapsed.tolist()),
                )
            )
    return figures


def first_passes(case: Case) -> list[int]:
    """Return passes by the model, as if each group were alone."""
    passes = []
    for role, copies in case.groups:
        clocks = max((work.model or 256) * work.count for work in role.does)
        passes.append(max(1, int(TARGET_CLOCKS / (copies * clocks))))
    return passes


def balanced(case: Case, passes: list[int], clocks: np.ndarray) -> list[int]:
    """Passes with which each group would have taken TARGET_CLOCKS."""
    taken = np.median(_elapsed(case, clocks), axis=0)
    return [max(1, round(n * TARGET_CLOCKS / t)) for n, t in zip(passes, taken, strict=True)]


def _elapsed(case: Case, clocks: np.ndarray) -> np.ndarray:
    """(samples, groups): from the first warp's start to the group's last stop."""
    start = clocks[..., 0].min(axis=1).astype(np.int64)
    warps = [
        range(r.start // 32, r.stop // 32) for r in map(case.threads_of, range(len(case.groups)))
    ]
    stops = [clocks[:, list(w), 1].max(axis=1).astype(np.int64) for w in warps]
    return np.stack([stop - start for stop in stops], axis=1)


class Gpu:
    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)  # makes the context that the driver loads kernels into
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count

    def measure(self, case: Case, repeats: int) -> list[Figure]:
        """Raises UserError if a kernel's results are wrong: then it is not what should be timed."""
        function = driver.load(case.ptx(), KERNEL, case.shared_bytes)
        passes = first_passes(case)
        for _ in range(BALANCING_RUNS):
            clocks, results = self._launch(case, function, passes)
            wrong = case.check(results, passes)
            if wrong:
                raise UserError("; ".join(wrong))
            passes = balanced(case, passes, clocks)
        samples = [self._launch(case, function, passes)[0] for _ in range(repeats)]
        return figures_of(case, passes, np.concatenate(samples))

    def _launch(
        self, case: Case, function: ctypes.c_void_p, passes: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clocks (blocks, warps, 2) and results of one launch, a block on every SM."""
        warps = case.threads // 32
        image = torch.frombuffer(bytearray(case.image), dtype=torch.uint8).to(self.device)
        results = torch.zeros(
            case.threads, case.result_words, dtype=torch.int32, device=self.device
        )
        clocks = torch.zeros(self.blocks, warps, 2, dtype=torch.int64, device=self.device)
        scratch = torch.zeros(
            self.blocks, case.scratch_bytes, dtype=torch.uint8, device=self.device
        )
        addresses = [ctypes.c_uint64(x.data_ptr()) for x in (image, results, clocks, scratch)]
        counts = (ctypes.c_uint32 * MAX_GROUPS)(*passes)
        driver.launch(
            function,
            (self.blocks, 1, 1),
            (case.threads, 1, 1),
            case.shared_bytes,
            torch.cuda.current_stream(self.device).cuda_stream,
            [ctypes.addressof(x) for x in (*addresses, counts)],
        )
        torch.cuda.synchronize(self.device)
        return clocks.cpu().numpy().view(np.uint64), results.cpu().numpy().view(np.uint32)
