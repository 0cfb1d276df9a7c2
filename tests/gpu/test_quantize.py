"""Quantisation on a GPU against the plain statement on the CPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.quantize import (
    DTYPES,
    HEAD_DIMS,
    check_columns,
    check_equal,
    check_near,
    lengths_of,
    poisoned,
    some,
)

from hopper_attention.problem.values import DENSE, Lengths
from hopper_attention.quantize import Quantized, Recipe, columns_of, quantize, stated

pytestmark = pytest.mark.gpu

PACKED = lengths_of([300, 0, 1, 650], [300, 0, 1, 500])


def on_gpu(x: torch.Tensor, recipe: Recipe, **arguments) -> Quantized:
    if "lengths" in arguments:
        arguments["lengths"] = moved(arguments["lengths"])
    values, descale = quantize(x.cuda(), recipe, **arguments)
    return Quantized(values.cpu(), descale.cpu())


def moved(lengths: Lengths) -> Lengths:
    tensors = (lengths.cu_seqlens, lengths.seqused)
    return Lengths(*(None if t is None else t.cuda() for t in tensors))


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), list(product(HEAD_DIMS, DTYPES)))
def test_kernels_equal_the_plain_statement(head_dim, dtype, arranged):
    x = some((2, 1000, 4, head_dim), dtype)
    for recipe in Recipe:
        arguments = {"octaves": True, "arranged": arranged and head_dim % 16 == 0}
        got = on_gpu(x, recipe, heads_kv=2, **arguments)
        check_equal(got, stated(x, recipe, 2, **arguments), x)


@pytest.mark.parametrize("recipe", Recipe)
def test_statement_is_the_same_on_a_gpu(recipe):
    """PyTorch on a GPU divides by a number otherwise than a CPU; the other tests rely on this."""
    x = some((2, 1000, 4, 64))
    for here, there in zip(stated(x, recipe), stated(x.cuda(), recipe), strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("centered", [False, True])
def test_rotated_and_centered(head_dim, centered):
    x = some((2, 1000, 4, head_dim))
    for recipe in Recipe:
        got = on_gpu(x, recipe, hadamard=True, centered=centered)
        check_near(got, stated(x, recipe, hadamard=True, centered=centered), x)


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("recipe", Recipe)
def test_packed(recipe, arranged):
    x = poisoned(some((1, 1000, 4, 128))[0], PACKED)
    arguments = {"lengths": PACKED, "arranged": arranged, "max_seqlen": 700}
    check_equal(on_gpu(x, recipe, **arguments), stated(x, recipe, **arguments), x, PACKED)
    arguments |= {"hadamard": True, "centered": True}
    check_near(on_gpu(x, recipe, **arguments), stated(x, recipe, **arguments), x, PACKED)


@pytest.mark.parametrize("lengths", [DENSE, PACKED])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_columns(lengths, head_dim):
    """Rows together, then columns."""
    x = some((1, 1008, 2, head_dim)).to(torch.float8_e4m3fn)
    v = x if lengths is DENSE else x[0]
    together = v.cuda().transpose(-1, -3).contiguous().transpose(-1, -3)
    for given in (v.cuda(), together):
        got = columns_of(given, moved(lengths)).cpu()
        check_columns(got, columns_of(v, lengths), v, lengths)


def test_graph():
    """Captured after one call, then given other input."""
    first, second = (some((1, 300, 2, 72), seed=seed) for seed in (0, 1))
    x, graph = first.cuda(), torch.cuda.CUDAGraph()
    arguments = {"hadamard": True, "centered": True}
    quantize(x, Recipe.PER_HEAD, **arguments)  # loads the kernels
    with torch.cuda.graph(graph):
        values, descale = quantize(x, Recipe.PER_HEAD, **arguments)
    for given in (second, first):
        x.copy_(given)
        graph.replay()
        expected = stated(given, Recipe.PER_HEAD, **arguments)
        check_near(Quantized(values.cpu(), descale.cpu()), expected, given)
