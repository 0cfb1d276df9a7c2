"""Random problems with their gradients, and of FP8, on the simulator, hazards on, against FP64.

A few, always the same, in every run of the tests; as many as HOPPER_ATTENTION_FUZZ says, others for
every HOPPER_ATTENTION_FUZZ_SEED, by `make fuzz N=... SEED=...`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.strategies import (
    check_dense_gradients,
    check_fp8,
    check_varlen_gradients,
    differentiable,
    for_fp8,
    problems,
    sides,
)

from hopper_attention import backend, simulator
from hopper_attention.dispatch import target

COUNT = int(os.environ.get("HOPPER_ATTENTION_FUZZ") or 0)
SEED = int(os.environ.get("HOPPER_ATTENTION_FUZZ_SEED") or 0)
CHUNK = 25
"""Problems of one test, so that several processes share them and each says how far it is."""
FEW = 4
LONGEST = 150
KINDS = ("dense", "sequences", "ampere-dense", "ampere-sequences", "fp8")

pytestmark = [pytest.mark.simulator, pytest.mark.timeout(3600 if COUNT else 300)]


def chunks() -> list[tuple[str, int, int]]:
    """(kind, number, how many problems)"""
    if not COUNT:
        return [(kind, 0, FEW) for kind in KINDS]
    numbers = range(-(-COUNT // CHUNK))
    return [(KINDS[n % len(KINDS)], n, min(CHUNK, COUNT - n * CHUNK)) for n in numbers]


def check(kind: str, data: st.DataObject) -> None:
    """One problem; several tiles a block where multiprocessors are few."""
    count = data.draw(st.sampled_from((1, 2, target.SIMULATED_SMS)), "multiprocessors")
    kernels, _, kind = kind.rpartition("-")
    dense = kind == "dense"
    problem = data.draw(problems(LONGEST, sequences=2 if dense else 4, same_lengths=dense))
    with (
        patch.object(target, "SIMULATED_SMS", count),
        simulator.enabled(seed=problem.seed),
        backend(kernels) if kernels else nullcontext(),
    ):
        if dense:
            check_dense_gradients(differentiable(problem), "cpu")
            return
        queries, keys = data.draw(sides(problem))
        if kind == "fp8":
            check_fp8(for_fp8(problem), queries, keys, "cpu")
        else:
            check_varlen_gradients(differentiable(problem), queries, keys, "cpu")


@pytest.mark.parametrize(("kind", "number", "count"), chunks(), ids=str)
def test_random_problems(kind, number, count):
    @seed(1000 * SEED + number)
    @settings(
        max_examples=count,
        derandomize=not COUNT,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(kind, data)

    run()
