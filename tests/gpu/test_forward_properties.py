"""The simulator's random problems with lengths up to 4k on hardware."""

from __future__ import annotations

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

pytestmark = pytest.mark.gpu

LONGEST = 4096


@examples(60)
@given(problems(LONGEST, sequences=3, same_lengths=True, most_heads=8))
def test_dense(problem):
    check_dense(problem, "cuda")


@examples(20)
@given(problems(LONGEST, sequences=3, same_lengths=True, most_heads=8))
def test_packed_qkv(problem):
    check_qkvpacked(problem, "cuda")


@examples(60)
@given(st.data())
def test_sequences(data):
    problem = data.draw(problems(LONGEST, sequences=8, most_heads=8))
    queries, keys = data.draw(sides(problem))
    check_varlen(problem, queries, keys, "cuda")
