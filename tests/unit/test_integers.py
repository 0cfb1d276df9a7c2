"""Integers of every kind mean the same in every function, or are refused by the argument's name."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hopper_attention import (
    attention_fp8,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from hopper_attention.integrations import vllm
from hopper_attention.problem import scalars, values
from hopper_attention.problem.values import Lengths
from hopper_attention.quantize import columns_of, means_of, narrowed, quantize
from hopper_attention.torch_ops import attention, fp8


class Index:
    """An object is an integer by its `__index__` only."""

    def __init__(self, value: int):
        self.value = value

    def __index__(self) -> int:
        return self.value


INTEGERS: dict[str, Callable[[int], Any]] = {
    "numpy int64": np.int64,
    "numpy int32": np.int32,
    "numpy uint8": np.uint8,
    "numpy 0-d": np.array,
    "index": Index,
}
TENSORS: dict[str, Callable[[int], Any]] = {
    "tensor": torch.tensor,
    "int32 tensor of one": lambda n: torch.tensor([n], dtype=torch.int32),
}
OTHERS: dict[str, Callable[[int], Any]] = {
    "True": lambda n: True,
    "numpy True": lambda n: np.True_,
    "float": float,
    "numpy float": np.float32,
    "text": str,
    "list": lambda n: [n],
    "too low": lambda n: -2,
    "too high": lambda n: 2**31,
    "float tensor": lambda n: torch.tensor(float(n)),
    "bool tensor": lambda n: torch.tensor(True),
    "two": lambda n: torch.tensor([n, n]),
    "numpy two": lambda n: np.array([n, n]),
    "negative tensor": lambda n: torch.tensor(-1),
}


# ------------------------------------------------------------------------------------------- calls

LENGTHS = (70, 0, 130)
STARTS = torch.tensor([0, 70, 70, 200], dtype=torch.int32)
LONGEST = 130


def normal(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


Q, K, V = normal(200, 4, 64), normal(200, 2, 64), normal(201, 2, 64)[:200]
PACKED = {"q": Q, "k": K, "v": V, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
E4M3 = {name: PACKED[name].to(torch.float8_e4m3fn) for name in "qkv"}
BLOCKS = {"q_descale": (3, 4, 3), "k_descale": (3, 2, 3), "v_descale": (3, 2, 3)}
DESCALES = {name: 0.5 + torch.rand(shape) for name, shape in BLOCKS.items()}
"""Scales of 3 blocks of 64 rows are as many as the bounds say, not as the tensors' rows do."""
DENSE = {name: PACKED[name][None] for name in "qkv"}
BOUNDS = {"max_seqlen_q": LONGEST, "max_seqlen_k": LONGEST}
PARTS = Lengths(STARTS)


def packed(**call):
    return flash_attn_varlen_func(**PACKED, **{**BOUNDS, **call}, return_lse=True)


def packed_fp8(**call):
    quantised = {**PACKED, **E4M3, **DESCALES, **BOUNDS, **call}
    return flash_attn_varlen_func(**quantised, return_lse=True)


def quantised_here(**call):
    return attention_fp8(**PACKED, **{**BOUNDS, **call}, return_lse=True)


def in_window(function, side):
    def call(window_size):
        sides = (window_size, 5) if side == "left" else (5, window_size)
        return function(window_size=sides)

    return call


def dense(**call):
    return flash_attn_func(**DENSE, **call)


def in_one(num_heads_q):
    return flash_attn_qkvpacked_func(torch.cat([Q, K, V], dim=1)[None], num_heads_q=num_heads_q)


def as_vllm(**call):
    return vllm.flash_attn_varlen_func(**PACKED, **{**BOUNDS, **call})


def as_vllm_fp8(**call):
    return vllm.flash_attn_varlen_func(**{**PACKED, **E4M3, **DESCALES, **BOUNDS, **call})


def blocks(**call):
    return quantize(Q, "block64", lengths=PARTS, **call)


def heads(**call):
    return quantize(Q, "per_head", lengths=PARTS, **call)


def rotated(offsets):
    return quantize(
        Q, "block64", lengths=PARTS, rotary=(normal(300, 16), normal(300, 16), False, offsets)
    )


@dataclass(frozen=True)
class Case:
    call: Callable[..., Any]
    argument: str
    value: int
    bound: bool = False
    """A tensor of one integer will do."""
    none: str = "refused"
    """None is "refused", gives the "same" or "more blocks", or has a meaning of its "own"."""


CASES = {
    "packed max_seqlen_q": Case(packed, "max_seqlen_q", 130, True, "same"),
    "packed max_seqlen_k": Case(packed, "max_seqlen_k", 130, True, "same"),
    "packed FP8 max_seqlen_q": Case(packed_fp8, "max_seqlen_q", 130, True),
    "packed FP8 max_seqlen_k": Case(packed_fp8, "max_seqlen_k", 130, True),
    "attention_fp8 max_seqlen_q": Case(quantised_here, "max_seqlen_q", 130, True, "same"),
    "attention_fp8 max_seqlen_k": Case(quantised_here, "max_seqlen_k", 130, True, "same"),
    "attention_fp8 attention_chunk": Case(quantised_here, "attention_chunk", 16),
    "attention_fp8 accumulate_every": Case(quantised_here, "accumulate_every", 4),
    "vllm max_seqlen_q": Case(as_vllm, "max_seqlen_q", 130, True, "same"),
    "vllm max_seqlen_k": Case(as_vllm, "max_seqlen_k", 130, True, "same"),
    "vllm FP8 max_seqlen_q": Case(as_vllm_fp8, "max_seqlen_q", 130, True),
    "vllm FP8 max_seqlen_k": Case(as_vllm_fp8, "max_seqlen_k", 130, True),
    "vllm num_splits": Case(as_vllm, "num_splits", 3),
    "vllm fa_version": Case(as_vllm, "fa_version", 3, none="same"),
    "vllm cp_world_size": Case(as_vllm, "cp_world_size", 1),
    "vllm cp_rank": Case(as_vllm, "cp_rank", 0),
    "quantize max_seqlen": Case(blocks, "max_seqlen", 130, True, "more blocks"),
    "quantize heads_kv": Case(heads, "heads_kv", 2, none="own"),
    "quantize rotary offsets": Case(rotated, "offsets", 7),
    "means_of max_seqlen": Case(
        lambda max_seqlen: means_of(K, PARTS, max_seqlen), "max_seqlen", 130, True, "same"
    ),
    "narrowed max_seqlen": Case(
        lambda max_seqlen: narrowed(
            K.to(torch.float8_e5m2), torch.ones(1), lengths=PARTS, max_seqlen=max_seqlen
        ),
        "max_seqlen", 130, True, "more blocks",
    ),
    "columns_of max_seqlen": Case(
        lambda max_seqlen: columns_of(E4M3["v"], PARTS, max_seqlen), "max_seqlen", 130, True, "same"
    ),
    "num_heads_q": Case(in_one, "num_heads_q", 4, none="own"),
    **{
        f"{name} {argument}": Case(function, argument, value)
        for name, function in {"dense": dense, "packed": packed, "packed FP8": packed_fp8}.items()
        for argument, value in {"attention_chunk": 16, "sm_margin": 2, "num_splits": 1}.items()
    },
    **{
        f"{name} window_size {side}": Case(in_window(function, side), "window_size", 9, none="own")
        for name, function in {
            "dense": dense, "packed": packed, "packed FP8": packed_fp8,
            "attention_fp8": quantised_here, "vllm": as_vllm,
        }.items()
        for side in ("left", "right")
    },
}  # fmt: skip


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


def same(actual, expected):
    pairs = zip(tensors_of(actual), tensors_of(expected), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def given(case, kind):
    return case.call(**{case.argument: kind(case.value)})


@pytest.mark.parametrize("kind", {**INTEGERS, **TENSORS})
@pytest.mark.parametrize("name", CASES)
def test_an_integer_means_the_same_or_is_refused(name, kind):
    case = CASES[name]
    if kind in TENSORS and not case.bound:
        with pytest.raises((TypeError, ValueError), match=case.argument):
            given(case, TENSORS[kind])
    else:
        kinds = {**INTEGERS, **TENSORS}
        assert same(given(case, kinds[kind]), given(case, int))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_such_integer_is_refused(name, kind):
    case = CASES[name]
    with pytest.raises((TypeError, ValueError), match=case.argument):
        given(case, OTHERS[kind])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.none != "own"])
def test_none_is_no_bound_or_refused(name):
    """Without a bound, scales of blocks are as many as the rows of all sequences have."""
    case = CASES[name]
    if case.none == "same":
        assert same(given(case, lambda n: None), given(case, int))
    elif case.none == "more blocks":
        assert given(case, lambda n: None).descale.shape[-1] == 4
    else:
        with pytest.raises((TypeError, ValueError), match=case.argument):
            given(case, lambda n: None)


def test_every_integer_of_the_public_functions_has_a_case():
    """Those that are annotated as integers; one that is added later needs a case, too."""
    functions = {
        "dense": flash_attn_func, "packed": flash_attn_varlen_func,
        "packed FP8": flash_attn_varlen_func, "attention_fp8": attention_fp8,
        "vllm": vllm.flash_attn_varlen_func, "quantize": quantize, "means_of": means_of,
        "narrowed": narrowed, "columns_of": columns_of,
    }  # fmt: skip
    for prefix, function in functions.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if re.search(r"\bint\b", str(parameter.annotation)) or name == "window_size":
                found = [case for case in CASES if case.startswith(f"{prefix} {name}")]
                assert found, f"no case for parameter {name} of {function.__name__}"


# ------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("kind", {"int": int, **INTEGERS, **TENSORS})
def test_a_bound_reaches_the_plan(kind, monkeypatch):
    """It decides whether the heads of a group share tiles."""
    seen = []
    attend = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda *args: (seen.append(args[6].max_seqlen_q), attend(*args))[1]
    )
    packed(max_seqlen_q={"int": int, **INTEGERS, **TENSORS}[kind](150))
    assert seen == [150]
    packed(max_seqlen_q=None)
    packed(max_seqlen_q=10**6)
    assert seen[1:] == [values.LONG] * 2


@pytest.mark.parametrize("kind", {"int": int, **INTEGERS, **TENSORS})
def test_a_bound_reaches_the_scales(kind, monkeypatch):
    seen = []
    attend = fp8.attend
    monkeypatch.setattr(fp8, "attend", lambda *args: (seen.append(args[6]), attend(*args))[1])
    make = {"int": int, **INTEGERS, **TENSORS}[kind]
    packed_fp8(max_seqlen_q=make(130), max_seqlen_k=make(129 + 1))
    assert seen == [(130, 130)]


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (None, None),
        (0, 0),
        (np.int64(7), 7),
        (torch.tensor(7), 7),
        (torch.tensor([7], dtype=torch.int16), 7),
        (torch.tensor(7, device="meta"), None),
    ],
    ids=str,
)
def test_what_a_bound_means(value, meaning):
    """The value of a tensor on another device is not known without waiting for it."""
    found = scalars.bound("max_seqlen", value)
    assert found == meaning and type(found) in (int, type(None))


def test_a_tensor_elsewhere_means_what_none_means():
    elsewhere = torch.tensor(LONGEST, device="meta")
    for call in (packed, quantised_here):
        absent = call(max_seqlen_q=None, max_seqlen_k=None)
        assert same(call(max_seqlen_q=elsewhere, max_seqlen_k=elsewhere), absent)
    assert same(blocks(max_seqlen=elsewhere), blocks(max_seqlen=None))
    with pytest.raises(ValueError, match=r"^q_descale has shape .*max_seqlen_q of 200"):
        packed_fp8(max_seqlen_q=elsewhere)


@pytest.mark.parametrize("bound", ["int", "shape", "tensor", "data"])
@pytest.mark.parametrize("function", [flash_attn_varlen_func, attention_fp8])
def test_bounds_while_a_compiler_traces(function, bound):
    """A number, a symbolic one, a tensor, and a number that only the data say."""

    def call(q, k, v, starts, longest):
        n = {"int": longest, "shape": q.shape[0], "tensor": starts.diff().max()}.get(bound)
        n = starts.diff().max().item() if bound == "data" else n
        return function(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=n, max_seqlen_k=n
        )

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=bound == "shape")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert torch.equal(compiled(Q, K, V, STARTS, LONGEST), call(Q, K, V, STARTS, LONGEST))


TRACERS = {
    "make_fx": lambda call, n: make_fx(call)(n)(n),
    "jit.trace": lambda call, n: torch.jit.trace(call, n, check_trace=False)(n),
    "vmap": lambda call, n: torch.vmap(call)(torch.stack([n, n]))[0],
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_tensor_is_no_constant_of_what_is_traced(tracer, monkeypatch):
    """There it is no bound: what was traced may be called with longer sequences."""
    seen, packing_bound = [], values.packing_bound
    monkeypatch.setattr(values, "packing_bound", lambda n: (seen.append(n), packing_bound(n))[1])

    def call(n):
        return flash_attn_varlen_func(**{**PACKED, "max_seqlen_q": n, "max_seqlen_k": n})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jit.trace, which is deprecated
        result = TRACERS[tracer](call, torch.tensor(LONGEST))
    assert set(seen) == {None}
    assert torch.equal(result, call(None))


@pytest.mark.parametrize("sides", [np.array([3, 1]), torch.tensor([3, 1]), "31", {3: 1}], ids=str)
@pytest.mark.parametrize("call", [dense, packed, packed_fp8, quantised_here, as_vllm])
def test_windows_are_pairs(call, sides):
    with pytest.raises(ValueError, match=r"^window_size must be"):
        call(window_size=sides)
    expected = call(window_size=(3, 1))
    for pair in ([3, 1], torch.Size([3, 1]), (np.int64(3), np.uint8(1))):
        assert same(call(window_size=pair), expected)


@pytest.mark.parametrize("sides", [(-1.0, -1), (-1, torch.tensor(-1)), (True, 1)], ids=str)
@pytest.mark.parametrize("call", [dense, packed, packed_fp8, quantised_here, as_vllm])
def test_what_equals_no_window_is_looked_at(call, sides):
    with pytest.raises(TypeError, match="window_size"):
        call(window_size=sides)


def test_operators_refuse_negative_bounds():
    tensors = (Q, K, V, None, STARTS, STARTS, None, None)
    options = (None, False, -1, -1, 0, 0.0, -5, None, None, 0, False)
    with pytest.raises(ValueError, match="max_seqlen_q must be from 0, got -5"):
        torch.ops.hopper_attention.forward(*tensors, *options)
    quantised = (*E4M3.values(), *tensors[3:], None, None, None, None)
    options = (*options[:6], None, *options[7:])
    with pytest.raises(ValueError, match="bound_k must be from 0, got -5"):
        torch.ops.hopper_attention.forward_fp8(*quantised, *options, 130, -5, None, 1, True)
    treatment = ("block64", False, None, 1, True, 130, -5)
    with pytest.raises(ValueError, match="max_seqlen_k must be from 0, got -5"):
        torch.ops.hopper_attention.attention_fp8(*tensors, *options, *treatment)
