"""Operators' signatures, and kernel arguments, by the names of a description's fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hopper_attention.dispatch import manifest
from hopper_attention.launch.arguments import bind
from hopper_attention.problem.values import Bound
from hopper_attention.torch_ops.schema import Signature


class Cache(NamedTuple):
    pages: Tensor
    table: Tensor | None = None


class Choices(NamedTuple):
    causal: bool
    scale: float | None
    longest: Bound | None
    kind: str
    dtype: torch.dtype | None
    count: int


CACHE = Signature(Cache, Choices)
ARGUMENTS = ("pages", None, True, 0.5, 7, "paged", torch.float16, 3)


def test_text_is_what_the_fields_say():
    assert str(CACHE) == (
        "Tensor pages, Tensor? table, bool causal, float? scale, SymInt? longest, str kind, "
        "ScalarType? dtype, int count"
    )
    library = torch.library.Library("hopper_attention_test", "FRAGMENT")
    library.define(f"cached({CACHE}) -> Tensor")
    schema = torch.ops.hopper_attention_test.cached.default._schema
    assert [argument.name for argument in schema.arguments] == list(Cache._fields + Choices._fields)


def test_groups_and_tensors_of_arguments():
    cache, choices = CACHE.groups_of(ARGUMENTS)
    assert (cache.pages, cache.table) == ("pages", None)
    assert (*cache, *choices) == ARGUMENTS
    assert CACHE.tensors(ARGUMENTS) == {"pages": "pages", "table": None}


def test_every_argument_has_a_gradient_or_none():
    assert CACHE.gradients(Cache("gradient")) == ("gradient", *[None] * 7)
    with pytest.raises(AssertionError, match="no group"):
        CACHE.gradients(("gradient", None))


@pytest.mark.parametrize(
    ("groups", "error"),
    [((Cache, Cache), AssertionError), ((NamedTuple("X", [("x", list)]),), TypeError)],
)
def test_refuses_what_no_schema_can_say(groups, error):
    with pytest.raises(error):
        Signature(*groups)


def test_kernel_arguments_are_found_by_name(monkeypatch):
    """Tensors, addresses of tensors that are kept alive, absent ones and numbers, in order."""
    kinds = {"table": "int64", "pages": "tensor", "sink": "int64", "scale": "float32"}
    added = {"tile_counter": "int64", "max_blocks": "int64"}
    arguments = [{"name": name, "kind": kind} for name, kind in {**kinds, **added}.items()]
    monkeypatch.setattr(manifest, "instances", lambda: {"k": SimpleNamespace(arguments=arguments)})
    manifest.arguments.cache_clear()
    pages, table = torch.zeros(2), torch.ones(3)
    values = {"scale": 0.5, "pages": pages, "table": table, "sink": None, "of_another": 1}
    try:
        found = bind("k", values)
        assert found.tensors == [pages]
        assert found.scalars == [table.data_ptr(), 0, 0.5]
        assert found.pointees == [table]
        with pytest.raises(KeyError, match="scale"):
            bind("k", {"pages": pages, "table": table, "sink": None})
        with pytest.raises(AssertionError, match="k: pages is None, not a tensor"):
            bind("k", {**values, "pages": None})
    finally:
        manifest.arguments.cache_clear()
