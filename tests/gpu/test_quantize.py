"""Quantisation on a GPU against the plain statement on the CPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from quantize_cases import DTYPES, HEAD_DIMS, check_equal, check_near, some

from hopper_attention.quantize import Quantized, Recipe, quantize, stated

pytestmark = pytest.mark.gpu


def on_gpu(x: torch.Tensor, recipe: Recipe, **arguments) -> Quantized:
    """The results as they lie on the GPU, padding included."""
    values, descale = quantize(x.cuda(), recipe, **arguments)
    memory = values.untyped_storage().cpu()
    copy = torch.empty(0, dtype=values.dtype).set_(memory, 0, values.shape, values.stride())
    return Quantized(copy, descale.cpu())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), list(product(HEAD_DIMS, DTYPES)))
def test_is_what_is_stated(head_dim, dtype, transposed):
    x = some((2, 1000, 4, head_dim), dtype)
    for recipe in Recipe:
        got = on_gpu(x, recipe, heads_kv=2, transposed=transposed)
        check_equal(got, stated(x, recipe, 2, transposed=transposed))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("centered", [False, True])
def test_rotated_and_centered(head_dim, centered):
    x = some((2, 1000, 4, head_dim))
    for recipe in Recipe:
        got = on_gpu(x, recipe, hadamard=True, centered=centered)
        check_near(got, stated(x, recipe, hadamard=True, centered=centered))


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
        check_near(Quantized(values.cpu(), descale.cpu()), expected)
