"""Random problems through the public functions on the simulator, hazards on, against FP64."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import (
    check_dense,
    check_qkvpacked,
    check_varlen,
    examples,
    problems,
    sides,
)

from hopper_attention import simulator
from hopper_attention.dispatch import target

pytestmark = pytest.mark.simulator
both = pytest.mark.usefixtures("kernels")

LONGEST = 200

multiprocessors = st.sampled_from((1, 2, target.SIMULATED_SMS))
"""Few of them: each block has several tiles."""


@contextmanager
def simulated(problem, count):
    with patch.object(target, "SIMULATED_SMS", count), simulator.enabled(seed=problem.seed):
        yield


@both
@examples(14)
@given(problems(LONGEST, sequences=2, same_lengths=True), multiprocessors)
def test_dense(problem, count):
    with simulated(problem, count):
        check_dense(problem, "cpu")


@both
@examples(5)
@given(problems(LONGEST, sequences=2, same_lengths=True), multiprocessors)
def test_packed_qkv(problem, count):
    with simulated(problem, count):
        check_qkvpacked(problem, "cpu")


@both
@examples(14)
@given(st.data(), multiprocessors)
def test_sequences(data, count):
    problem = data.draw(problems(LONGEST, sequences=5))
    queries, keys = data.draw(sides(problem))
    with simulated(problem, count):
        check_varlen(problem, queries, keys, "cpu")
