"""Results are judged by their error against FP64, beside PyTorch's in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.problem.values import UNBOUNDED, Mask
from hopper_attention.reference.error import (
    FLOOR,
    Error,
    cancellation,
    pytorch_attention,
    pytorch_gradients,
)


def mask_of(causal: bool, window_size: Sequence[int | None], attention_chunk: int) -> Mask:
    left, right = (UNBOUNDED if w in (-1, None) else w for w in window_size)
    return Mask(left, 0 if causal else right, attention_chunk or UNBOUNDED)


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """out and lse have at most twice PyTorch's error in the same dtype.

    PyTorch's on CPU tensors is hardly more than the rounding of out, which may be exact by luck
    where there are few elements: its greatest error counts as no less than that could be.
    """
    mask = mask_of(causal, window_size, attention_chunk)
    problem: dict[str, Any] = {
        "softmax_scale": softmax_scale or 1.0 / math.sqrt(q.shape[-1]),
        "mask": mask,
        "softcap": softcap or None,
        "sink": learnable_sink,
    }
    exact, exact_lse = reference.attention(q, k, v, **problem, compute_dtype=torch.float64)
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and out.dtype == (out_dtype or q.dtype)
    ours, torchs = Error.of(out, exact), Error.of(pytorch_attention(q, k, v, **problem), exact)
    torchs = replace(torchs, maximum=max(torchs.maximum, greatest_rounding(exact, out.dtype)))
    assert ours.within_twice(torchs), f"error {ours}, PyTorch's {torchs}"

    assert lse.shape == exact_lse.shape and lse.dtype == torch.float32
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.all(out.transpose(1, 2)[empty] == 0)
    _, torch_lse = reference.attention(q, k, v, **problem, compute_dtype=torch.float32)
    largest = exact_lse[~empty].abs().max().item() if (~empty).any() else 0.0
    allowed = 2 * Error.of(torch_lse[~empty], exact_lse[~empty]).maximum + 2e-6 * max(1.0, largest)
    allowed += 2**-22 * softcap  # tanh x as 1 - 2 / (1 + e^2x): digits of 1 are lost
    worst = Error.of(lse[~empty], exact_lse[~empty]).maximum
    assert worst <= allowed, f"lse error {worst}, allowed {allowed}"


def greatest_rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Half the distance between numbers of `dtype` at the largest of `exact`."""
    largest = exact.abs().max().item() if exact.numel() > 0 else 0.0
    return math.ldexp(torch.finfo(dtype).eps / 2, math.frexp(largest)[1] - 1) if largest else 0.0


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths, **arguments: Any
) -> None:
    """Each sequence of (total, heads, dim) tensors is judged by itself; lse is (heads, total_q)."""
    ends_q, ends_k = (list(accumulate(side)) for side in zip(*lengths))
    for (seqlen_q, seqlen_k), end_q, end_k in zip(lengths, ends_q, ends_k):
        rows, keys = slice(end_q - seqlen_q, end_q), slice(end_k - seqlen_k, end_k)
        one = (x[None] for x in (q[rows], k[keys], v[keys], out[rows], lse[:, rows]))
        check_forward(*one, **arguments)


def check_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    gradients: Sequence[Tensor],
    **arguments: Any,
) -> None:
    """dq, dk, dv (and dsink) have at most twice PyTorch's error in the same dtype."""
    exact, torchs, floor = expected_gradients(q, k, v, dout, **arguments)
    judge(gradients, exact, torchs, floor)


def check_packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    gradients: Sequence[Tensor],
    lengths: Sequence[tuple[int, int]],
    **arguments: Any,
) -> None:
    """All sequences of (total, heads, dim) tensors are judged together: many have few elements."""
    ends_q, ends_k = (list(accumulate(side)) for side in zip(*lengths))
    exact, torchs = ([x.new_zeros(x.shape, dtype=torch.float64) for x in (q, k, v)] for _ in "12")
    floor = 0.0
    for (seqlen_q, seqlen_k), end_q, end_k in zip(lengths, ends_q, ends_k):
        rows, keys = slice(end_q - seqlen_q, end_q), slice(end_k - seqlen_k, end_k)
        places = (rows, keys, keys)
        if seqlen_q * seqlen_k == 0:
            assert all((g[at] == 0).all() for g, at in zip(gradients, places))
            continue
        one = (x[None] for x in (q[rows], k[keys], v[keys], dout[rows]))
        *found, least = expected_gradients(*one, **arguments)
        floor = max(floor, least)
        for results, parts in zip((exact, torchs), found):
            for result, part, at in zip(results, parts, places):
                result[at] = part[0]
    judge(gradients, exact, torchs, floor)


def judge(
    gradients: Sequence[Tensor], exact: Sequence[Tensor], torchs: Sequence[Tensor], floor: float
) -> None:
    for name, ours, best, other in zip(("dq", "dk", "dv", "dsink"), gradients, exact, torchs):
        assert ours.shape == best.shape
        error, allowed = Error.of(ours, best), Error.of(other, best)
        assert error.within_twice(allowed, floor), f"{name}: error {error}, PyTorch's {allowed}"


def expected_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    dlse: Tensor | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], float]:
    """Gradients in float64, PyTorch's in the inputs' dtype, and an error that is always allowed.

    Where PyTorch's are of the steps written out (sinks, softcap, lse, and V wider than Q, which its
    flash kernel does not take), it never rounds out; every backward that is given out must expect
    what that costs, so theirs are off by so much.
    """
    problem: dict[str, Any] = {
        "softmax_scale": softmax_scale or 1.0 / math.sqrt(q.shape[-1]),
        "mask": mask_of(causal, window_size, attention_chunk),
        "softcap": softcap or None,
        "sink": learnable_sink,
    }
    q, k, v, dout = (x.detach() for x in (q, k, v, dout))
    float64 = {"compute_dtype": torch.float64}
    *exact, dsink = reference.gradients(q, k, v, dout, dlse, **problem, **float64)
    *torchs, _ = pytorch_gradients(q, k, v, dout, dlse, **problem)
    wide = v.shape[-1] > q.shape[-1]
    if wide or dlse is not None or softcap or learnable_sink is not None:
        out, lse = reference.attention(q, k, v, **problem, **float64)
        terms = (out * dout.double()).transpose(1, 2) * torch.finfo(q.dtype).eps / 2
        of_rows = terms.square().sum(-1).sqrt()
        # Gradients are linear in that of lse, which enters as the sum over out does.
        signs = torch.randint(0, 2, of_rows.shape, generator=torch.Generator().manual_seed(0))
        moved = of_rows * (2.0 * signs.to(of_rows) - 1) + (0.0 if dlse is None else dlse.double())
        *others, _ = reference.gradients(q, k, v, dout, moved, **problem, **float64)
        torchs = [t.double() + (o - e) for t, o, e in zip(torchs, others, exact)]
        if dsink is not None and learnable_sink is not None:
            weight = torch.exp(learnable_sink.double()[None, :, None] - lse).nan_to_num(0.0)
            spread = (weight * of_rows).square().sum((0, 2)).sqrt()
            exact, torchs = [*exact, dsink], [*torchs, dsink + spread]
    floor = FLOOR + cancellation(q, k, v, dout, problem["softmax_scale"])
    return exact, torchs, floor
