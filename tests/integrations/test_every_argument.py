"""No adapter accepts an argument that it does not use.

Of every parameter of every adapter there is a call with another value of it.  The result is another
one, namely the right one; or the call is refused, and the message names the argument; or PyTorch
computes it, where there is something to fall through to; or the argument says how others compute,
and then the result is the same bit for bit, and what is no such argument is refused.  A parameter
without a case fails, so that one that is added later gets its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from hopper_attention import enable_sdpa, flash_attn_func, flash_attn_varlen_func, reference
from hopper_attention.integrations import sdpa, transformers, vllm, xformers
from hopper_attention.launch import forward

aten = torch.ops.aten
Arguments = dict[str, Any]


# ------------------------------------------------------------------------- what a change comes to


@dataclass(frozen=True)
class Change:
    """One argument gets another value, in a call with `also` beside it."""

    value: Any
    also: Arguments = field(default_factory=dict)


@dataclass(frozen=True)
class Another(Change):
    """The result becomes that of `expected`, a tensor or several; with None, its bits change."""

    expected: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Refused(Change):
    error: type[Exception] | tuple[type[Exception], ...] = NotImplementedError
    said: str = ""
    """The message names this; by default, the argument."""


@dataclass(frozen=True)
class Same(Change):
    """The result keeps its bits, for a `reason`; the value `wrong` is refused."""

    wrong: Any = None
    reason: str = ""
    said: str = ""


@dataclass(frozen=True)
class Left(Change):
    """To PyTorch, whose result it is bit for bit."""


Cases = dict[str, Change | Sequence[Change]]


def check_parameters(names: Sequence[str], cases: Cases) -> None:
    for name in names:
        assert name in cases, f"no case for parameter {name}"


def flat(cases: Cases) -> list[Any]:
    """(parameter, change), with an id of the parameter."""
    found = []
    for name, changes in cases.items():
        changes = [changes] if isinstance(changes, Change) else list(changes)
        for change in changes:
            kind = type(change).__name__.lower()
            more = f"-{'-'.join(change.also)}" if change.also else ""
            found.append(pytest.param(name, change, id=f"{name}-{kind}{more}"))
    return found


def tensors_of(result: Any) -> list[Tensor]:
    given = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in given if isinstance(x, Tensor)]


def same(actual: Any, expected: Any) -> bool:
    ours, theirs = tensors_of(actual), tensors_of(expected)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def close(actual: Any, expected: Any) -> None:
    for mine, right in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.double(), right.double(), rtol=2e-2, atol=2e-2)


def check(
    function: Callable[..., Any],
    base: Arguments,
    name: str,
    change: Change,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """`inside`: makes what the calls happen in."""
    changed = {**base, **change.also, name: change.value}
    before = {**base, **change.also}
    with inside():
        if isinstance(change, Refused):
            with pytest.raises(change.error, match=change.said or name):
                function(**changed)
            return
        result = function(**changed)
        plain = function(**before)
    if isinstance(change, Another):
        assert not same(result, plain), f"{name} is accepted and not used"
        if change.expected is not None:
            close(result, change.expected())
    elif isinstance(change, Same):
        assert change.reason
        assert same(result, plain)
        errors = (TypeError, ValueError, RuntimeError)
        with inside(), pytest.raises(errors, match=change.said or name):
            function(**{**changed, name: change.wrong})
    else:
        assert isinstance(change, Left)
        assert same(result, function(**changed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


LENGTHS = (9, 1, 14)
STARTS, OTHER_STARTS = int32(0, 9, 10, 24), int32(0, 3, 10, 24)
HEADS, HEADS_KV, DIM = 4, 2, 64
Q, K, V = normal(24, 4, 64), normal(24, 2, 64, seed=1), normal(24, 2, 64, seed=2)
OTHER_Q, OTHER_K, OTHER_V = normal(24, 4, 64, seed=3), normal(24, 2, 64, seed=4), -V
SINKS = torch.tensor([0.0, 1.0, 2.0, -1.0])


def ours(**changes: Any) -> Any:
    """The library's own function on the packed problem."""
    call = {"q": Q, "k": K, "v": V, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    return flash_attn_varlen_func(**{**call, "max_seqlen_q": 14, "max_seqlen_k": 14, **changes})


# -------------------------------------------------------------------------------------------- vLLM

VLLM: Arguments = {
    "q": Q, "k": K, "v": V, "max_seqlen_q": 14, "cu_seqlens_q": STARTS, "max_seqlen_k": 14,
    "cu_seqlens_k": STARTS,
}  # fmt: skip
ROWS = {"k": normal(3, 14, 2, 64, seed=1), "v": normal(3, 14, 2, 64, seed=2), "cu_seqlens_k": None}
USED, OTHER_USED = int32(*LENGTHS), int32(2, 1, 5)
E4M3 = {name: x.to(torch.float8_e4m3fn) for name, x in (("q", Q), ("k", K), ("v", V))}
ONES = torch.ones(3, HEADS_KV)
DESCALE = torch.tensor([[0.5, 1.5], [2.0, 0.25], [0.75, 1.25]])
PLAIN = "keys are not split and tiles not scheduled ahead, whatever others need"
MEANINGLESS = "vLLM hands descales over with 16-bit tensors, too"
UPPER = "an upper bound: the lengths are in cu_seqlens"


def exact_fp8(**descales: Tensor) -> Tensor:
    """float64, of e4m3 times descales (batch, heads_kv)."""
    parts = []
    for i, (start, end) in enumerate(zip(STARTS.tolist(), STARTS[1:].tolist())):
        rows = []
        for name in "qkv":
            scale = descales.get(f"{name}_descale", ONES)[i].double()
            x = E4M3[name][start:end].double()
            rows.append(x * scale.repeat_interleave(x.shape[1] // HEADS_KV)[:, None])
        q, k, v = (x[None] for x in rows)
        out, _ = reference.attention(q, k, v, softmax_scale=DIM**-0.5, compute_dtype=torch.float64)
        parts.append(out[0])
    return torch.cat(parts)


VLLM_CASES: Cases = {
    "q": [Another(OTHER_Q, expected=lambda: ours(q=OTHER_Q)),
          Refused([1.0], error=TypeError)],
    "k": [Another(OTHER_K, expected=lambda: ours(k=OTHER_K)),
          Refused(E4M3["k"], said="^k has dtype torch.float8_e4m3fn, q has torch.bfloat16"),
          Refused(K, also=E4M3, said="^k has dtype torch.bfloat16")],
    "v": [Another(OTHER_V, expected=lambda: ours(v=OTHER_V)),
          Refused(E4M3["v"], said="^v has dtype torch.float8_e4m3fn, q has torch.bfloat16")],
    "max_seqlen_q": Same(99, wrong="14", reason=UPPER),
    "cu_seqlens_q": Another(OTHER_STARTS, expected=lambda: ours(cu_seqlens_q=OTHER_STARTS)),
    "max_seqlen_k": Same(99, wrong="14", reason=UPPER),
    "cu_seqlens_k": Another(OTHER_STARTS, expected=lambda: ours(cu_seqlens_k=OTHER_STARTS)),
    "seqused_k": [
        Refused(USED, error=ValueError),
        Another(
            OTHER_USED, also={**ROWS, "seqused_k": USED},
            expected=lambda: ours(**ROWS, seqused_k=OTHER_USED),
        ),
    ],
    "q_v": Refused(Q),
    "dropout_p": [Refused(0.1), Refused("0", error=TypeError)],
    "softmax_scale": Another(0.3, expected=lambda: ours(softmax_scale=0.3)),
    "causal": [Another(True, expected=lambda: ours(causal=True)), Refused(1, error=TypeError)],
    "window_size": Another([3, 1], expected=lambda: ours(window_size=(3, 1))),
    "softcap": Another(2.0, expected=lambda: ours(softcap=2.0)),
    "alibi_slopes": Refused(torch.zeros(HEADS)),
    "deterministic": Same(True, wrong="no", reason="of gradients; forward always is"),
    "return_attn_probs": [Refused(True), Refused("no", error=TypeError)],
    "block_table": Refused(
        int32(0)[None], also={**ROWS, "seqused_k": USED}
    ),
    "return_softmax_lse": [
        Another(True, expected=lambda: ours(return_lse=True)), Refused(1, error=TypeError)
    ],
    "out": [Refused(Q[1:], error=ValueError), Refused([1.0], error=TypeError)],
    "scheduler_metadata": Same(int32(1, 2), wrong="x", reason=PLAIN),
    "q_descale": [
        Same(DESCALE, wrong=0.5, reason=MEANINGLESS),
        Another(DESCALE, also=E4M3, expected=lambda: exact_fp8(q_descale=DESCALE)),
        Refused(torch.ones(5), also=E4M3, error=ValueError),
    ],
    "k_descale": [
        Same(DESCALE, wrong=0.5, reason=MEANINGLESS),
        Another(DESCALE, also=E4M3, expected=lambda: exact_fp8(k_descale=DESCALE)),
    ],
    "v_descale": [
        Same(DESCALE, wrong=0.5, reason=MEANINGLESS),
        Another(DESCALE, also=E4M3, expected=lambda: exact_fp8(v_descale=DESCALE)),
    ],
    "num_splits": Same(16, wrong=-1, reason=PLAIN),
    "fa_version": [
        Same(version, wrong="3", reason="there is one implementation") for version in (2, None)
    ],
    "s_aux": Another(SINKS, expected=lambda: ours(learnable_sink=SINKS)),
    "cp_world_size": Refused(2),
    "cp_rank": Refused(1),
    "cp_tot_seqused_k": Refused(USED),
    "later": [],  # below
}  # fmt: skip


def test_every_parameter_of_vllm_has_a_case():
    check_parameters(list(inspect.signature(vllm.flash_attn_varlen_func).parameters), VLLM_CASES)


@pytest.mark.parametrize(("name", "change"), flat(VLLM_CASES))
def test_vllm(name, change):
    check(vllm.flash_attn_varlen_func, VLLM, name, change)


@pytest.mark.parametrize("value", [print, 0, False, int32(1)], ids=str)
def test_arguments_of_later_versions_of_vllm_are_refused(value):
    check(vllm.flash_attn_varlen_func, VLLM, "mask_mod", Refused(value))


def test_out_of_vllm_is_where_the_result_is():
    out = torch.full_like(Q, 7.0)
    assert vllm.flash_attn_varlen_func(**VLLM, out=out) is out
    assert torch.equal(out, ours())


@pytest.mark.parametrize("keys", ["packed", "rows"])
def test_fp8_of_vllm_against_fp64(keys):
    """All three descales, expanded as vLLM does; the error is that of a result in bf16."""
    descales = {
        name: scale[:, :1].expand(3, HEADS_KV)
        for name, scale in (
            ("q_descale", DESCALE),
            ("k_descale", 2 * DESCALE),
            ("v_descale", DESCALE),
        )
    }
    call = {**VLLM, **E4M3, **descales}
    if keys == "rows":
        k, v = (torch.zeros(3, 14, 2, 64).to(torch.float8_e4m3fn) for _ in "kv")
        for i, start in enumerate(STARTS[:-1].tolist()):
            k[i, : LENGTHS[i]] = E4M3["k"][start : start + LENGTHS[i]]
            v[i, : LENGTHS[i]] = E4M3["v"][start : start + LENGTHS[i]]
        call |= {"k": k, "v": v, "cu_seqlens_k": None, "seqused_k": USED}
    out = torch.empty_like(Q)
    vllm.flash_attn_varlen_func(**call, out=out)
    exact = exact_fp8(**descales)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4e-3, "a rounding to bf16 has 2e-3"


# ---------------------------------------------------------------------------------------- xFormers

DENSE = {"query": normal(2, 12, 4, 64), "key": normal(2, 12, 4, 64, seed=1),
         "value": normal(2, 12, 4, 64, seed=2)}  # fmt: skip
OTHER = normal(2, 12, 4, 64, seed=3)


def bias(kind: str, **attributes: Any) -> Any:
    """A stand-in: biases are known by the names of their classes."""
    found = type(kind, (), {})()
    vars(found).update(attributes)
    return found


def dense(**changes: Any) -> Any:
    names = {"query": "q", "key": "k", "value": "v"}
    call = {names.get(name, name): x for name, x in {**DENSE, **changes}.items()}
    return flash_attn_func(**call)


XFORMERS_CASES: Cases = {
    "query": Another(OTHER, expected=lambda: dense(query=OTHER)),
    "key": Another(OTHER, expected=lambda: dense(key=OTHER)),
    "value": Another(OTHER, expected=lambda: dense(value=OTHER)),
    "attn_bias": [
        Another(bias("LowerTriangularMask"), expected=lambda: dense(causal=True)),
        Refused(torch.zeros(2, 4, 12, 12)),
        Refused(bias("SomethingElse")),
    ],
    "p": [Refused(0.5, said="^p="), Refused("0", error=TypeError, said="^p:")],
    "scale": Another(0.3, expected=lambda: dense(softmax_scale=0.3)),
    "op": Refused(object()),
    "output_dtype": [
        Another(torch.float32, expected=lambda: dense(out_dtype=torch.float32)),
        Refused(torch.float16, said="out_dtype"),
    ],
}
XFORMERS = {
    name: getattr(xformers, name)
    for name in (
        "memory_efficient_attention",
        "memory_efficient_attention_forward",
        "memory_efficient_attention_forward_requires_grad",
    )
}


@pytest.mark.parametrize("function", XFORMERS)
def test_every_parameter_of_xformers_has_a_case(function):
    check_parameters(list(inspect.signature(XFORMERS[function]).parameters), XFORMERS_CASES)


@pytest.mark.parametrize("function", XFORMERS)
@pytest.mark.parametrize(("name", "change"), flat(XFORMERS_CASES))
def test_xformers(function, name, change):
    def first(**call: Any) -> Tensor:
        return tensors_of(XFORMERS[function](**call))[0]

    check(first, DENSE, name, change)


BLOCKS, OTHER_BLOCKS = (4, 1, 7), (2, 4, 6)
ONE = {name: x[:1] for name, x in DENSE.items()}


def seqinfo(lengths: Sequence[int], **changes: Any) -> SimpleNamespace:
    places = [0, *accumulate(lengths)]
    return SimpleNamespace(**{
        "seqstart": int32(*places), "max_seqlen": max(lengths), "min_seqlen": min(lengths),
        "seqstart_py": places, **changes,
    })  # fmt: skip


def room(starts: Sequence[int], lengths: Sequence[int], **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "seqstart": int32(*starts), "max_seqlen": max(lengths), "min_seqlen": min(lengths),
        "seqstart_py": list(starts), "seqlen": int32(*lengths), "seqlen_py": list(lengths),
        "padding": 4, **changes,
    })  # fmt: skip


ROOM = ((0, 4, 8, 12), (4, 1, 3))
OF_BLOCKS = {"q_seqinfo": seqinfo(BLOCKS), "k_seqinfo": seqinfo(BLOCKS)}
OF_ROOM = {"q_seqinfo": seqinfo(BLOCKS), "k_seqinfo": room(*ROOM)}
BLOCK_CHANGES: Cases = {
    "q_seqinfo": Another(seqinfo(OTHER_BLOCKS)), "k_seqinfo": Another(seqinfo(OTHER_BLOCKS)),
}  # fmt: skip
SHORTER: Cases = {
    "q_seqinfo": Another(seqinfo(OTHER_BLOCKS)), "k_seqinfo": Another(room(ROOM[0], (3, 1, 2))),
}  # fmt: skip
WINDOW: Cases = {
    "_window_size": [
        Another(1), Refused(0, error=ValueError), Refused(1.5, error=TypeError),
        Refused(True, error=TypeError),
    ]
}  # fmt: skip
SIDES: Cases = {
    name: [Another(1), Refused(1.5, error=TypeError), Refused(-2, error=ValueError)]
    for name in ("window_left", "window_right")
}
NOTHING: Cases = {}
UNEVEN: Cases = {
    name: Refused(seqinfo(OTHER_BLOCKS), said="more queries than keys")
    for name in ("q_seqinfo", "k_seqinfo")
}
BIASES: dict[str, tuple[Arguments, Cases]] = {
    "LowerTriangularMask": ({}, NOTHING),
    "LowerTriangularFromBottomRightMask": ({}, NOTHING),
    "LowerTriangularFromBottomRightLocalAttentionMask": ({"_window_size": 3}, WINDOW),
    "LocalAttentionFromBottomRightMask": ({"window_left": 3, "window_right": 2}, SIDES),
    "BlockDiagonalMask": (OF_BLOCKS, BLOCK_CHANGES),
    "BlockDiagonalCausalMask": (OF_BLOCKS, UNEVEN),
    "BlockDiagonalCausalFromBottomRightMask": (OF_BLOCKS, BLOCK_CHANGES),
    "BlockDiagonalCausalLocalAttentionMask": (
        {**OF_BLOCKS, "_window_size": 3}, {**UNEVEN, **WINDOW},
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        {**OF_BLOCKS, "_window_size": 3}, {**BLOCK_CHANGES, **WINDOW},
    ),
    "BlockDiagonalPaddedKeysMask": (OF_ROOM, SHORTER),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (OF_ROOM, SHORTER),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        {**OF_ROOM, "window_left": 3, "window_right": 2}, {**SHORTER, **SIDES},
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        {**OF_ROOM, "_window_size": 3}, {**SHORTER, **WINDOW},
    ),
    "BlockDiagonalGappyKeysMask": (OF_ROOM, SHORTER),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (OF_ROOM, SHORTER),
}  # fmt: skip
"""Attributes of each, and what their changes come to; what is right, test_xformers.py says."""


def test_every_bias_has_a_case():
    assert BIASES.keys() == xformers.MASKS.keys()


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        pytest.param(kind, *param.values, id=f"{kind}-{param.id}")
        for kind, (_, cases) in BIASES.items()
        for param in flat(cases)
    ],
)
def test_attributes_of_biases(kind, name, change):
    def attend(**attributes: Any) -> Tensor:
        return xformers.memory_efficient_attention(**ONE, attn_bias=bias(kind, **attributes))

    check(attend, BIASES[kind][0], name, change)


@pytest.mark.parametrize("side", ["q_seqinfo", "k_seqinfo"])
@pytest.mark.parametrize(
    ("name", "change"),
    flat(
        {
            "seqstart": Another(int32(0, *accumulate(OTHER_BLOCKS))),
            "seqstart_py": Refused([0, 4, 5, 13], error=ValueError, said="attn_bias packs"),
            "max_seqlen": Same(99, wrong=7.5, reason=UPPER),
            "min_seqlen": Change(0),
        }
    ),
)
def test_attributes_of_seqinfos(side, name, change):
    def attend(**attributes: Any) -> Tensor:
        blocks = {**OF_BLOCKS, side: seqinfo(BLOCKS, **attributes)}
        return xformers.memory_efficient_attention(
            **ONE, attn_bias=bias("BlockDiagonalMask", **blocks)
        )

    if type(change) is Change:  # nothing reads it
        assert same(attend(**{name: change.value}), attend())
    else:
        check(attend, {}, name, change)


@pytest.mark.parametrize(
    ("name", "change"),
    flat(
        {
            "seqlen": Another(int32(3, 1, 2)),
            "seqlen_py": Refused([5, 1, 3], said="overlap"),
            "padding": Change(8),
        }
    ),
)
def test_attributes_of_rooms(name, change):
    def attend(**attributes: Any) -> Tensor:
        blocks = {**OF_ROOM, "k_seqinfo": room(*ROOM, **attributes)}
        return xformers.memory_efficient_attention(
            **ONE, attn_bias=bias("BlockDiagonalPaddedKeysMask", **blocks)
        )

    if type(change) is Change:  # nothing reads it: the rows of seqstart say the same
        assert same(attend(**{name: change.value}), attend())
    else:
        check(attend, {}, name, change)


# ------------------------------------------------------------------------------------ transformers

HEADS_FIRST = {name: x.transpose(1, 2) for name, x in DENSE.items()}


class Layer(torch.nn.Module):
    def __init__(self, is_causal: bool = True):
        super().__init__()
        self.is_causal, self.layer_idx = is_causal, 0


EVERY_TOKEN = torch.ones(2, 12, dtype=torch.bool)
PADDING = EVERY_TOKEN.clone()
PADDING[1, 9:] = False
LAYER: Arguments = {
    "module": Layer(), **HEADS_FIRST, "attention_mask": EVERY_TOKEN, "scaling": DIM**-0.5,
}  # fmt: skip
ROW = {name: x[:1] for name, x in HEADS_FIRST.items()}
MASKED_ROW = {**ROW, "attention_mask": transformers.make_mask(1, 12, 12)}
UNMASKED = {**ROW, "module": Layer(is_causal=False), "attention_mask": None}
RESTART = torch.tensor([[*range(4), *range(8)]])
PACKS, OTHER_PACKS = int32(0, 4, 12), int32(0, 5, 12)
CU = {"cu_seq_lens_q": PACKS, "cu_seq_lens_k": PACKS, "max_length_q": 8, "max_length_k": 8}
PACKED_ROW = {**ROW, **CU, "attention_mask": None}


def padded() -> Tensor:
    used = int32(12, 9)
    call = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 12, "max_seqlen_k": 12}
    q, k, v = DENSE.values()
    return flash_attn_varlen_func(q, k, v, **call, causal=True, seqused_q=used, seqused_k=used)


def packed_row(starts_q: Tensor, starts_k: Tensor) -> Tensor:
    q, k, v = (x[0] for x in ONE.values())
    return flash_attn_varlen_func(q, k, v, starts_q, starts_k, 8, 8, causal=True)[None]


def in_layer(**changes: Any) -> Callable[[], Tensor]:
    return lambda: dense(**{"causal": True, **changes})


TRANSFORMERS_CASES: Cases = {
    "module": Another(Layer(is_causal=False), expected=in_layer(causal=False)),
    "query": Another(OTHER.transpose(1, 2), expected=in_layer(query=OTHER)),
    "key": Another(OTHER.transpose(1, 2), expected=in_layer(key=OTHER)),
    "value": Another(OTHER.transpose(1, 2), expected=in_layer(value=OTHER)),
    "attention_mask": Another(PADDING, expected=padded),
    "scaling": Another(0.3, expected=in_layer(softmax_scale=0.3)),
    "dropout": Refused(0.1),
    "sliding_window": Another(3, expected=in_layer(window_size=(2, 0))),
    "softcap": Another(2.0, expected=in_layer(softcap=2.0)),
    "is_causal": Another(False, expected=in_layer(causal=False)),
    "s_aux": Another(SINKS, expected=in_layer(learnable_sink=SINKS)),
    "position_ids": Another(RESTART, also=MASKED_ROW, expected=lambda: packed_row(PACKS, PACKS)),
    "cu_seq_lens_q": [
        Another(OTHER_PACKS, also=PACKED_ROW, expected=lambda: packed_row(OTHER_PACKS, PACKS)),
        Refused(PACKS, also=UNMASKED, error=ValueError),
        Refused(PACKS, also=MASKED_ROW, error=ValueError),
    ],
    "cu_seq_lens_k": [
        Another(OTHER_PACKS, also=PACKED_ROW, expected=lambda: packed_row(PACKS, OTHER_PACKS)),
        Refused(PACKS, also=UNMASKED, error=ValueError),
        Refused(PACKS, also=MASKED_ROW, error=ValueError),
    ],
    "max_length_q": Same(
        11, also=PACKED_ROW, wrong="8", reason=UPPER, said="max_(length|seqlen)_q"
    ),
    "max_length_k": Same(
        11, also=PACKED_ROW, wrong="8", reason=UPPER, said="max_(length|seqlen)_k"
    ),
    "deterministic": Same(True, wrong="no", reason="of gradients; forward always is"),
    "kwargs": [],  # below
}
REFUSED_BY_TRANSFORMERS = (
    *("position_bias", "alibi", "head_mask", "block_table", "attention_chunk", "output_attentions"),
)


def attend_in_layer(**call: Any) -> Tensor:
    return transformers.attention_forward(**call)[0]


def test_every_parameter_of_transformers_has_a_case():
    names = list(inspect.signature(transformers.attention_forward).parameters)
    check_parameters(names, TRANSFORMERS_CASES)


@pytest.mark.parametrize(("name", "change"), flat(TRANSFORMERS_CASES))
def test_transformers(name, change):
    check(attend_in_layer, LAYER, name, change)


@pytest.mark.parametrize("name", REFUSED_BY_TRANSFORMERS)
def test_what_transformers_may_hand_over(name):
    check(attend_in_layer, LAYER, name, Refused(torch.ones(1)))


# ---------------------------------------------------------------------------- PyTorch's operators

QUERY, KEY, VALUE = HEADS_FIRST.values()
FIRST = OTHER.transpose(1, 2)
GRAD = normal(2, 12, 4, 64, seed=5)
STATE, OTHER_STATE = (torch.full((2,), n, dtype=torch.uint64) for n in (0, 1))
OUT, LSE = dense(return_lse=True)
ROWS_SAY = "the rows of the tensors are known"
RANDOM = "of dropout, of which there is none"


def gradients(**changes: Any) -> list[Tensor]:
    """The library's own function gives these, heads first; changes are options or tensors."""
    found = {**DENSE, "grad_out": GRAD, **changes}
    q, k, v = (found[name].detach().requires_grad_() for name in DENSE)
    options = {name: x for name, x in changes.items() if name in ("causal", "softmax_scale")}
    out = flash_attn_func(q, k, v, **options)
    return [x.transpose(1, 2) for x in torch.autograd.grad(out, (q, k, v), found["grad_out"])]


def first(result: Any) -> Tensor:
    return tensors_of(result)[0].transpose(1, 2)


FORWARD_CASES: Cases = {
    "query": Another(FIRST, expected=lambda: first(dense(query=OTHER))),
    "key": Another(FIRST, expected=lambda: first(dense(key=OTHER))),
    "value": Another(FIRST, expected=lambda: first(dense(value=OTHER))),
    "dropout_p": Refused(0.5),
    "is_causal": Another(True, expected=lambda: first(dense(causal=True))),
    "return_debug_mask": Refused(True),
    "scale": Another(0.3, expected=lambda: first(dense(softmax_scale=0.3))),
}
BACKWARD: Arguments = {
    "grad_out": GRAD.transpose(1, 2), **HEADS_FIRST, "out": OUT.transpose(1, 2), "logsumexp": LSE,
    "cum_seq_q": None, "cum_seq_k": None, "max_q": 12, "max_k": 12, "dropout_p": 0.0,
    "is_causal": False, "philox_seed": STATE, "philox_offset": STATE,
}  # fmt: skip
BACKWARD_CASES: Cases = {
    "grad_out": Another(FIRST, expected=lambda: gradients(grad_out=OTHER)),
    "query": Another(FIRST), "key": Another(FIRST), "value": Another(FIRST),
    "out": Another(FIRST), "logsumexp": Another(LSE + 1),
    "cum_seq_q": Refused(PACKS), "cum_seq_k": Refused(PACKS),
    "max_q": Same(99, wrong="12", reason=ROWS_SAY),
    "max_k": Same(99, wrong="12", reason=ROWS_SAY),
    "dropout_p": Refused(0.5),
    "is_causal": Another(True),
    "philox_seed": Same(OTHER_STATE, wrong="x", reason=RANDOM),
    "philox_offset": Same(OTHER_STATE, wrong="x", reason=RANDOM),
    "scale": Another(0.3),
}  # fmt: skip
PACKED: Arguments = {
    "query": Q, "key": K, "value": V, "cum_seq_q": STARTS, "cum_seq_k": STARTS, "max_q": 14,
    "max_k": 14, "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False,
}  # fmt: skip
PACKED_CASES: Cases = {
    "query": Another(OTHER_Q, expected=lambda: ours(q=OTHER_Q)),
    "key": Another(OTHER_K, expected=lambda: ours(k=OTHER_K)),
    "value": Another(OTHER_V, expected=lambda: ours(v=OTHER_V)),
    "cum_seq_q": Another(OTHER_STARTS, expected=lambda: ours(cu_seqlens_q=OTHER_STARTS)),
    "cum_seq_k": Another(OTHER_STARTS, expected=lambda: ours(cu_seqlens_k=OTHER_STARTS)),
    "max_q": [Same(99, wrong="14", reason=UPPER), Refused(-3, error=ValueError)],
    "max_k": [Same(99, wrong="14", reason=UPPER), Refused(-3, error=ValueError)],
    "dropout_p": Refused(0.5),
    "is_causal": Another(True, expected=lambda: ours(causal=True)),
    "return_debug_mask": Refused(True),
    "scale": Another(0.3, expected=lambda: ours(softmax_scale=0.3)),
    "window_size_left": Another(2, expected=lambda: ours(window_size=(2, -1))),
    "window_size_right": Another(2, expected=lambda: ours(window_size=(-1, 2))),
    "seqused_k": Another(OTHER_USED, expected=lambda: ours(seqused_k=OTHER_USED)),
    "alibi_slopes": Refused(torch.zeros(HEADS)),
    "block_table": Refused(int32(0)[None]),
    "num_splits": [
        Same(1, wrong="1", reason="1 is what it does"), Refused(4),
        Refused(-1, error=ValueError),
    ],
}  # fmt: skip
PACKED_OUT, PACKED_LSE = ours(return_lse=True)
PACKED_BACKWARD: Arguments = {
    **{name: x for name, x in PACKED.items() if name != "return_debug_mask"},
    "grad_out": normal(24, 4, 64, seed=5), "out": PACKED_OUT, "logsumexp": PACKED_LSE,
    "rng_state": STATE, "unused": STATE,
}  # fmt: skip
PACKED_BACKWARD_CASES: Cases = {
    **{
        name: Another(value)
        for name, value in {
            "grad_out": OTHER_Q, "query": OTHER_Q, "key": OTHER_K, "value": OTHER_V,
            "out": OTHER_Q, "logsumexp": PACKED_LSE + 1, "cum_seq_q": OTHER_STARTS,
            "cum_seq_k": OTHER_STARTS, "is_causal": True, "scale": 0.3, "window_size_left": 2,
            "window_size_right": 2,
        }.items()
    },
    "max_q": [Same(99, wrong="14", reason=UPPER), Refused(-3, error=ValueError)],
    "max_k": [Same(99, wrong="14", reason=UPPER), Refused(-3, error=ValueError)],
    "dropout_p": Refused(0.5),
    "rng_state": Same(OTHER_STATE, wrong="x", reason=RANDOM),
    "unused": Same(OTHER_STATE, wrong="x", reason=RANDOM),
}  # fmt: skip
CPU_BACKWARD = {
    name: x for name, x in BACKWARD.items()
    if name not in ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")
}  # fmt: skip
MASK = torch.zeros(2, 1, 12, 12).masked_fill_(~torch.ones(12, 12).tril().bool(), -torch.inf)
NO_PEER = {"error": RuntimeError, "said": "dropout"}
"""PyTorch's own kernel refuses so."""
OPERATORS: dict[str, tuple[Arguments, Cases]] = {
    "_scaled_dot_product_flash_attention": (HEADS_FIRST, FORWARD_CASES),
    "_scaled_dot_product_flash_attention_backward": (BACKWARD, BACKWARD_CASES),
    "_flash_attention_forward": (PACKED, PACKED_CASES),
    "_flash_attention_forward_no_dropout_inplace": (
        {**PACKED, "out": torch.empty_like(Q)},
        {**PACKED_CASES, "out": Refused(Q[1:].clone(), error=ValueError)},
    ),
    "_flash_attention_backward": (PACKED_BACKWARD, PACKED_BACKWARD_CASES),
    "_scaled_dot_product_flash_attention_for_cpu": (
        HEADS_FIRST,
        {**FORWARD_CASES, "dropout_p": Refused(0.5, **NO_PEER), "attn_mask": Left(MASK)},
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        CPU_BACKWARD,
        {**BACKWARD_CASES, "dropout_p": Left(0.5), "attn_mask": Left(MASK)},
    ),
}
HERE = [name for name in OPERATORS if hasattr(aten, name)]
"""This version of PyTorch has these operators."""


def on_cpu() -> Any:
    return enable_sdpa(device="cpu")


def parameters_of(operator: str) -> list[str]:
    return [argument.name for argument in getattr(aten, operator).default._schema.arguments]


def call_operator(operator: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        result = getattr(aten, operator)(**arguments)
        if operator.endswith("inplace"):
            return arguments["out"].clone(), result
        return result[:2] if "backward" not in operator else result

    return call


def test_every_operator_is_here():
    assert OPERATORS.keys() == {**sdpa._OPERATORS, **sdpa._CPU_OPERATORS}.keys()


@pytest.mark.parametrize("operator", HERE)
def test_every_parameter_of_an_operator_has_a_case(operator):
    check_parameters(parameters_of(operator), OPERATORS[operator][1])


@pytest.mark.parametrize(
    ("operator", "name", "change"),
    [
        pytest.param(operator, *param.values, id=f"{operator}-{param.id}")
        for operator in HERE
        for param in flat(OPERATORS[operator][1])
        if param.values[0] in parameters_of(operator)
    ],
)
def test_operators(operator, name, change):
    function = call_operator(operator)
    if isinstance(change, Another) and change.expected is not None and "backward" not in operator:
        compared = function

        def function(**arguments: Any) -> Tensor:
            return compared(**arguments)[0]

    check(function, OPERATORS[operator][0], name, change, inside=on_cpu)


GROUPED: Arguments = {
    "query": Q, "key": K, "value": V, "cu_seq_q": STARTS, "cu_seq_k": STARTS, "max_q": 14,
    "max_k": 14, "enable_gqa": True,
}  # fmt: skip
VARLEN_CASES: Cases = {
    **{name: PACKED_CASES[name] for name in ("query", "key", "value", "max_q", "max_k", "scale")},
    "out": Refused(Q[1:].clone(), error=(ValueError, RuntimeError)),
    "cu_seq_q": PACKED_CASES["cum_seq_q"],
    "cu_seq_k": PACKED_CASES["cum_seq_k"],
    "return_aux": Another(varlen.AuxRequest(lse=True), expected=lambda: (PACKED_OUT, PACKED_LSE)),
    "window_size": Another((3, 1), expected=lambda: ours(window_size=(3, 1))),
    "enable_gqa": Refused(False, error=ValueError),
    "seqused_k": PACKED_CASES["seqused_k"],
    "block_table": Refused(
        int32(0)[None], also={"key": ROWS["k"], "value": ROWS["v"], "seqused_k": USED}
    ),
    "num_splits": PACKED_CASES["num_splits"],
}
VARLEN = {
    name: getattr(varlen, name)
    for name in ("varlen_attn", "varlen_attn_out")
    if hasattr(varlen, name)
}


def varlen_parameters(function: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(VARLEN[function]).parameters)


@pytest.mark.parametrize("function", VARLEN)
def test_every_parameter_of_varlen_attn_has_a_case(function):
    check_parameters(list(varlen_parameters(function)), VARLEN_CASES)


@pytest.mark.parametrize(
    ("function", "name", "change"),
    [
        pytest.param(function, *param.values, id=f"{function}-{param.id}")
        for function in VARLEN
        for param in flat(VARLEN_CASES)
        if param.values[0] in varlen_parameters(function)
    ],
)
def test_varlen_attn(function, name, change):
    known = varlen_parameters(function)

    def attend(**arguments: Any) -> Any:
        call = {key: x for key, x in arguments.items() if key in known}
        if "out" in known:
            call.setdefault("out", torch.empty_like(Q))
        return VARLEN[function](**call)

    check(attend, GROUPED, name, change, inside=on_cpu)


BOTTOM = torch.ones(12, 12, dtype=torch.bool).tril()
SDPA_CASES: Cases = {
    **{name: FORWARD_CASES[name] for name in ("query", "key", "value", "is_causal", "scale")},
    "attn_mask": Left(BOTTOM),
    "dropout_p": Left(0.5),
    "enable_gqa": Another(
        True, also={"key": KEY[:, :2], "value": VALUE[:, :2]},
        expected=lambda: first(dense(key=DENSE["key"][:, :, :2], value=DENSE["value"][:, :, :2])),
    ),
}  # fmt: skip


def attend_by_sdpa(**call: Any) -> Tensor:
    torch.manual_seed(0)
    return F.scaled_dot_product_attention(**call)


def test_every_parameter_of_sdpa_has_a_case():
    check_parameters(parameters_of("scaled_dot_product_attention"), SDPA_CASES)


@pytest.mark.parametrize(("name", "change"), flat(SDPA_CASES))
def test_scaled_dot_product_attention(name, change, monkeypatch):
    runs, run = [], forward.run
    monkeypatch.setattr(forward, "run", lambda *args: (runs.append(0), run(*args))[1])
    if name == "enable_gqa":  # without it, these heads do not fit
        with on_cpu():
            close(
                attend_by_sdpa(**{**HEADS_FIRST, **change.also}, enable_gqa=True), change.expected()
            )
    else:
        check(attend_by_sdpa, HEADS_FIRST, name, change, inside=on_cpu)
    assert runs


@pytest.mark.parametrize("longest", [5, 14, None])
def test_max_q_decides_whether_heads_share_tiles(longest, monkeypatch):
    """max_q decides as max_seqlen_q does; without packed tensors, the number of rows decides."""
    seen, attend = [], sdpa._attend
    monkeypatch.setattr(
        sdpa, "_attend", lambda inputs, options, out: (
            seen.append(options.max_seqlen_q), attend(inputs, options, out)
        )[1],
    )  # fmt: skip
    q, k, v = DENSE.values()
    starts = {"cum_seq_q": STARTS, "cum_seq_k": STARTS, "max_q": longest}
    with on_cpu():
        if longest is None:
            aten._flash_attention_forward(q, k, v, None, None, 12, 12, 0.0, False, False)
        else:
            aten._flash_attention_forward(**{**PACKED, **starts})
    assert seen == [longest]
