"""Random problems for hypothesis, through the public functions, on simulator and GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from hopper_attention import (
    attention_fp8,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    reference,
)
from hopper_attention.problem.values import Lengths
from hopper_attention.quantize import Recipe, spread, stated
from support.judge import check_forward, expected_gradients, judge, mask_of
from support.problems import offsets

EXAMPLES = os.environ.get("HOPPER_ATTENTION_EXAMPLES")
"""How many random problems a test tries; unset: a few, always the same ones."""


def examples(few: int) -> settings:
    return settings(
        max_examples=int(EXAMPLES or few),
        derandomize=EXAMPLES is None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


ROOM = 40
"""NaN rows around every tensor."""
PLACES = ("contiguous", "heads first", "some of more heads", "some of more rows", "some columns")


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    heads_kv: int
    group: int
    """Query heads of a key head."""
    lengths: tuple[tuple[int, int], ...]
    """(seqlen_q, seqlen_k) of each sequence; all the same where nothing is packed or padded."""
    pack_gqa: bool | None
    options: dict[str, Any]
    sink: tuple[float, ...] | None
    places: tuple[str, str, str]
    """How q, k and v lie in memory."""
    magnitude: float
    seed: int
    """Values and the simulator's schedule are chosen by it."""
    deterministic: bool = False
    with_dlse: bool = False
    """The loss depends on lse, too."""

    @property
    def heads(self) -> int:
        return self.heads_kv * self.group

    def operands(self, rows: tuple[int, ...], keys: tuple[int, ...], device: str) -> list[Tensor]:
        """q, k, v with these leading dimensions, at their places."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (*rows, self.heads, self.head_dim),
            (*keys, self.heads_kv, self.head_dim),
            (*keys, self.heads_kv, self.head_dim_v),
        )
        return [
            placed(
                (self.magnitude * torch.randn(shape, generator=generator)).to(device, self.dtype),
                place,
            )
            for shape, place in zip(shapes, self.places)
        ]

    def arguments(self, device: str) -> dict[str, Any]:
        if self.sink is None:
            return self.options
        return {**self.options, "learnable_sink": torch.tensor(self.sink, device=device)}


def placed(x: Tensor, place: str) -> Tensor:
    """A copy of x lies in a larger tensor that is NaN everywhere else, unless it is contiguous."""
    *outer, rows, heads, dim = x.shape
    if place == "heads first":
        shape: tuple[int, ...] = (*outer, heads, rows + ROOM, dim)
        view = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)[..., :rows, :]
        view = view.transpose(-2, -3)
    else:
        more_heads = 3 if place == "some of more heads" else 0
        more_columns = 24 if place == "some columns" else 0
        before = ROOM if place == "some of more rows" else 0
        shape = (*outer, before + rows + ROOM, heads + more_heads, dim + more_columns)
        if place == "contiguous":
            shape = (*outer, rows, heads, dim)
        view = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        view = view[..., before : before + rows, more_heads // 2 : more_heads // 2 + heads, :]
        view = view[..., more_columns // 3 : more_columns // 3 + dim]
    return view.copy_(x)


head_dims = st.one_of(
    st.sampled_from((64, 96, 128, 192, 256)), st.integers(1, 32).map(lambda n: 8 * n)
)


@st.composite
def _dims(draw: st.DrawFn) -> tuple[int, int]:
    """(head_dim, head_dim_v): mostly equal."""
    kind = draw(st.sampled_from(("equal", "equal", "equal", "DeepSeek", "64", "any")))
    if kind == "DeepSeek":
        return 192, 128
    if kind == "64":
        return 64, draw(head_dims)
    head_dim = draw(head_dims)
    return head_dim, head_dim if kind == "equal" else draw(head_dims)


@st.composite
def _options(draw: st.DrawFn, longest: int) -> dict[str, Any]:
    """Masks and what else changes scores; a window and a chunk may come together."""
    side = st.one_of(
        st.sampled_from((None, -1, 0, 10**6)), st.integers(1, 9), st.integers(1, longest)
    )
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window_size"] = (draw(side), draw(side))
    if draw(st.integers(0, 3)) == 0:
        options["attention_chunk"] = draw(st.integers(1, longest + 10))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from((0.5, 3.0, 50.0)))
    if draw(st.integers(0, 3)) == 0:
        options["softmax_scale"] = draw(st.sampled_from((0.01, 0.3, 1.0)))
    if draw(st.integers(0, 3)) == 0:
        options["out_dtype"] = torch.float32
    return options


@st.composite
def problems(
    draw: st.DrawFn, longest: int, sequences: int, same_lengths: bool = False, most_heads: int = 4
) -> Problem:
    """`longest`: bound of every length, 0 included; `sequences`: at most so many, at least one."""
    head_dim, head_dim_v = draw(_dims())
    heads_kv = draw(st.integers(1, 2))
    group = draw(st.integers(1, most_heads // heads_kv))
    length = st.one_of(
        st.integers(1, longest), st.sampled_from((0, 1, 63, 64, 65, 127, 128, 129, longest))
    ).filter(lambda n: n <= longest)
    count = draw(st.integers(1, sequences))
    lengths = tuple(draw(st.tuples(length, length)) for _ in range(1 if same_lengths else count))
    sink = None
    if draw(st.integers(0, 3)) == 0:
        scores = st.sampled_from((-torch.inf, -5.0, 0.0, 1.5, 20.0))
        sink = tuple(draw(scores) for _ in range(heads_kv * group))
    place = st.sampled_from(PLACES)
    return Problem(
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads_kv=heads_kv,
        group=group,
        lengths=lengths * count if same_lengths else lengths,
        pack_gqa=draw(st.sampled_from((None, True, False))),
        options=draw(_options(longest)),
        sink=sink,
        places=(draw(place), draw(place), draw(place)),
        magnitude=draw(st.sampled_from((1.0, 1.0, 0.1, 4.0))),
        seed=draw(st.integers(0, 1000)),
        deterministic=draw(st.booleans()),
        with_dlse=draw(st.integers(0, 3)) == 0,
    )


def check_dense(problem: Problem, device: str) -> None:
    """flash_attn_func."""
    batch, (seqlen_q, seqlen_k) = len(problem.lengths), problem.lengths[0]
    q, k, v = problem.operands((batch, seqlen_q), (batch, seqlen_k), device)
    arguments = problem.arguments(device)
    out, lse = flash_attn_func(q, k, v, pack_gqa=problem.pack_gqa, return_lse=True, **arguments)
    check_forward(q, k, v, out, lse, **arguments)


def check_qkvpacked(problem: Problem, device: str) -> None:
    """flash_attn_qkvpacked_func, both layouts; as many queries as keys, and one head dim."""
    batch, seqlen = len(problem.lengths), problem.lengths[0][0]
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (batch, seqlen, problem.heads + 2 * problem.heads_kv, problem.head_dim)
    qkv = problem.magnitude * torch.randn(shape, generator=generator)
    qkv = placed(qkv.to(device, problem.dtype), problem.places[0])
    arguments = problem.arguments(device)
    heads, heads_kv = problem.heads, problem.heads_kv
    given, num_heads_q = qkv, heads
    if problem.group == 1:
        given, num_heads_q = qkv.unflatten(2, (3, heads)), None
    out, lse = flash_attn_qkvpacked_func(
        given, num_heads_q=num_heads_q, return_lse=True, **arguments
    )
    check_forward(*qkv.split((heads, heads_kv, heads_kv), 2), out, lse, **arguments)


@dataclass(frozen=True)
class Side:
    """How the queries, or the keys, of sequences of different lengths are given."""

    packed: bool
    allotted: tuple[int, ...]
    """Rows of each sequence, at least its length."""
    behind: int
    """Packed rows, or padding of every entry, that no sequence has."""
    bound: str
    """max_seqlen: "none", "exact", "above", "tensor"."""

    @property
    def shape(self) -> tuple[int, ...]:
        if self.packed:
            return (sum(self.allotted) + self.behind,)
        return len(self.allotted), max(self.allotted) + self.behind

    def rows(self, sequence: int, length: int) -> tuple[int | slice, ...]:
        """Index of the sequence's used rows."""
        if not self.packed:
            return sequence, slice(0, length)
        start = sum(self.allotted[:sequence])
        return (slice(start, start + length),)

    def unused(self, lengths: tuple[int, ...]) -> Tensor:
        """True for rows of no sequence."""
        unused = torch.ones(self.shape, dtype=torch.bool)
        for b, length in enumerate(lengths):
            unused[self.rows(b, length)] = False
        return unused

    def tensors(
        self, lengths: tuple[int, ...], device: str
    ) -> tuple[Tensor | None, Tensor | None, int | Tensor | None]:
        """cu_seqlens, seqused, max_seqlen."""
        cu_seqlens = offsets(self.allotted, device) if self.packed else None
        limits = self.allotted if self.packed else (self.shape[1],) * len(lengths)
        seqused = None
        if lengths != limits:
            seqused = torch.tensor(lengths, dtype=torch.int32, device=device)
        bound: int | Tensor | None = max(limits)
        if self.bound == "above":
            bound = 3 * max(limits) + 100
        elif self.bound == "tensor":
            bound = torch.tensor(max(limits), dtype=torch.int32, device=device)
        return cu_seqlens, seqused, None if self.bound == "none" else bound


@st.composite
def sides(draw: st.DrawFn, problem: Problem) -> tuple[Side, Side]:
    """Queries and keys are each packed or padded, and whole or partly used."""
    made = []
    for lengths in zip(*problem.lengths):
        slack = st.integers(0, 20) if draw(st.booleans()) else st.just(0)
        made.append(
            Side(
                packed=draw(st.sampled_from((True, True, False))),
                allotted=tuple(n + draw(slack) for n in lengths),
                behind=draw(st.sampled_from((0, 0, 7))),
                bound=draw(st.sampled_from(("none", "exact", "above", "tensor"))),
            )
        )
    return made[0], made[1]


def check_varlen(problem: Problem, queries: Side, keys: Side, device: str) -> None:
    """flash_attn_varlen_func ignores rows of no sequence: they are NaN, and 0 and -inf after it."""
    lengths_q, lengths_k = zip(*problem.lengths)
    q, k, v = problem.operands(queries.shape, keys.shape, device)
    unused_q, unused_k = queries.unused(lengths_q), keys.unused(lengths_k)
    q[unused_q.to(device)] = torch.nan
    k[unused_k.to(device)], v[unused_k.to(device)] = torch.nan, torch.nan
    (cu_q, used_q, max_q), (cu_k, used_k, max_k) = (
        queries.tensors(lengths_q, device),
        keys.tensors(lengths_k, device),
    )
    arguments = problem.arguments(device)
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, used_q, used_k, pack_gqa=problem.pack_gqa,
        return_lse=True, **arguments,
    )  # fmt: skip
    for b, (length_q, length_k) in enumerate(problem.lengths):
        at_q, at_k = queries.rows(b, length_q), keys.rows(b, length_k)
        lse_rows = (slice(None), *at_q) if queries.packed else (b, slice(None), at_q[1])
        one = (x[None] for x in (q[at_q], k[at_k], v[at_k], out[at_q], lse[lse_rows]))
        check_forward(*one, **arguments)
    if device == "cpu" or used_q is not None:
        rows = lse if queries.packed else lse.transpose(0, 1)  # heads first
        assert (out.cpu()[unused_q] == 0).all()
        assert (rows.cpu()[:, unused_q] == -torch.inf).all()


def differentiable(problem: Problem) -> Problem:
    """A problem that has gradients: without an output type."""
    options = {name: x for name, x in problem.options.items() if name != "out_dtype"}
    return replace(problem, options=options)


def for_fp8(problem: Problem) -> Problem:
    """A problem whose head dims and arguments `attention_fp8` takes."""
    head_dim, head_dim_v = (-(-n // 16) * 16 for n in (problem.head_dim, problem.head_dim_v))
    return replace(differentiable(problem), head_dim=head_dim, head_dim_v=head_dim_v)


def check_dense_gradients(problem: Problem, device: str) -> tuple[Tensor, ...]:
    """flash_attn_func, forward and backward; returns the gradients."""
    batch, (seqlen_q, seqlen_k) = len(problem.lengths), problem.lengths[0]
    operands = problem.operands((batch, seqlen_q), (batch, seqlen_k), device)
    arguments = problem.arguments(device)

    def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, **given)  # type: ignore[return-value]

    unused = torch.zeros(batch, seqlen_q, dtype=torch.bool)
    out, lse, dout, dlse, gradients = _differentiate(problem, attend, operands, unused)
    q, k, v = operands
    check_forward(q, k, v, out, lse, **arguments)
    every = slice(None)
    _judge_gradients([((every,), (every,))], operands, dout, dlse, gradients, arguments)
    return gradients


def check_varlen_gradients(
    problem: Problem, queries: Side, keys: Side, device: str
) -> tuple[Tensor, ...]:
    """flash_attn_varlen_func, forward and backward, makes 0 of the NaN in rows of no sequence.

    Returns the gradients.
    """
    lengths_q, lengths_k = zip(*problem.lengths)
    operands = problem.operands(queries.shape, keys.shape, device)
    unused_q, unused_k = queries.unused(lengths_q), keys.unused(lengths_k)
    for x, unused in zip(operands, (unused_q, unused_k, unused_k)):
        x[unused.to(device)] = torch.nan
    (cu_q, used_q, max_q), (cu_k, used_k, max_k) = (
        queries.tensors(lengths_q, device),
        keys.tensors(lengths_k, device),
    )
    arguments = problem.arguments(device)

    def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return flash_attn_varlen_func(  # type: ignore[return-value]
            q, k, v, cu_q, cu_k, max_q, max_k, used_q, used_k, **given
        )

    out, lse, dout, dlse, gradients = _differentiate(problem, attend, operands, unused_q)
    places = [
        (queries.rows(b, length_q), keys.rows(b, length_k))
        for b, (length_q, length_k) in enumerate(problem.lengths)
    ]
    q, k, v = operands
    for at_q, at_k in places:
        lse_rows = (slice(None), *at_q) if queries.packed else (at_q[0], slice(None), at_q[1])
        one = (x[None] for x in (q[at_q], k[at_k], v[at_k], out[at_q], lse[lse_rows]))
        check_forward(*one, **arguments)
    for x, unused in zip(gradients, (unused_q, unused_k, unused_k)):
        assert (x.cpu()[unused] == 0).all(), "rows of no sequence have a gradient"
    _judge_gradients(places, operands, dout, dlse, gradients, arguments)
    return gradients


def _differentiate(
    problem: Problem, attend: Callable[..., Any], operands: list[Tensor], unused: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """out, lse, their random gradients (NaN where `unused`), and those of the operands and sinks.

    lse's gradient has lse's shape, or is None.
    """
    leaves = [x.detach().requires_grad_() for x in operands]
    arguments = problem.arguments(operands[0].device.type)
    if "learnable_sink" in arguments:
        leaves.append(arguments["learnable_sink"].clone().requires_grad_())
        arguments = {**arguments, "learnable_sink": leaves[3]}
    out, lse = attend(
        *leaves[:3], pack_gqa=problem.pack_gqa, deterministic=problem.deterministic,
        return_lse=True, **arguments,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(problem.seed + 1)
    dout = torch.randn(out.shape, generator=generator).to(out)
    dout[unused.to(out.device)] = torch.nan
    outputs, given, dlse = [out], [dout], None
    if problem.with_dlse:
        dlse = torch.randn(lse.shape, generator=generator).to(lse)
        heads_last = dlse.T if dlse.ndim == 2 else dlse.transpose(1, 2)
        heads_last[unused.to(out.device)] = torch.nan
        outputs, given = [out, lse], [dout, dlse]
    gradients = torch.autograd.grad(outputs, leaves, given)
    return out.detach(), lse.detach(), dout, dlse, gradients


def _judge_gradients(
    places: list[tuple[Any, Any]],
    operands: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, ...],
    arguments: dict[str, Any],
) -> None:
    """All sequences together, beside PyTorch's errors of each: many have only a few elements."""
    expected, torchs, floor = [], [], 0.0
    for x in gradients:
        exact = x.new_zeros(x.shape, dtype=torch.float64)
        expected.append(exact)
        torchs.append(exact.clone())
    q, k, v = operands
    for at_q, at_k in places:
        one = [x[at] if x[at].ndim == 4 else x[at][None] for x, at in
               ((q, at_q), (k, at_k), (v, at_k), (dout, at_q))]  # fmt: skip
        more = dict(arguments)
        if dlse is not None:
            heads_last = dlse.T if dlse.ndim == 2 else dlse.transpose(1, 2)
            rows = heads_last[at_q]
            rows = rows if rows.ndim == 3 else rows[None]
            more["dlse"] = rows.transpose(1, 2)
        best, others, least = expected_gradients(*one, **more)
        floor = max(floor, least)
        for results, parts in ((expected, best), (torchs, others)):
            for number, (part, at) in enumerate(zip(parts, (at_q, at_k, at_k, None))):
                if at is None:
                    results[number] += part
                else:
                    results[number][at] = part.view_as(results[number][at]).to(torch.float64)
    judge(gradients, expected, torchs, floor)


def check_fp8(problem: Problem, queries: Side, keys: Side, device: str) -> None:
    """attention_fp8 is judged by FP64 of the same quantised values; rows of no sequence are NaN."""
    lengths_q, lengths_k = zip(*problem.lengths)
    q, k, v = problem.operands(queries.shape, keys.shape, device)
    unused_q, unused_k = queries.unused(lengths_q), keys.unused(lengths_k)
    for x, unused in ((q, unused_q), (k, unused_k), (v, unused_k)):
        x[unused.to(device)] = torch.nan
    (cu_q, used_q, _), (cu_k, used_k, _) = (
        queries.tensors(lengths_q, device),
        keys.tensors(lengths_k, device),
    )
    arguments = problem.arguments(device)
    recipe = list(Recipe)[problem.seed % len(Recipe)]
    out, lse = attention_fp8(  # type: ignore[misc]
        q, k, v, recipe=recipe, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_q=used_q,
        seqused_k=used_k, return_lse=True, **arguments,
    )  # fmt: skip
    sides = ((q, Lengths(cu_q, used_q)), (k, Lengths(cu_k, used_k)), (v, Lengths(cu_k, used_k)))
    rounded = []
    for number, (x, lengths) in enumerate(sides):
        heads_kv = k.shape[-2] if number == 0 else None
        values, descale = stated(
            x.cpu(), recipe, heads_kv, octaves=number == 2, lengths=lengths_on_cpu(lengths)
        )
        scale = spread(descale, x.cpu(), lengths_on_cpu(lengths))
        rounded.append((values.double() * scale.double()).nan_to_num(0.0))
    for b, (length_q, length_k) in enumerate(problem.lengths):
        at_q, at_k = queries.rows(b, length_q), keys.rows(b, length_k)
        lse_rows = (slice(None), *at_q) if queries.packed else (b, slice(None), at_q[1])
        one = (x[None] for x in (rounded[0][at_q], rounded[1][at_k], rounded[2][at_k]))
        _check_fp8_sequence(*one, out.cpu()[at_q][None], lse.cpu()[lse_rows][None], arguments)
    if device == "cpu" or used_q is not None:
        assert (out.cpu()[unused_q] == 0).all()


def lengths_on_cpu(lengths: Lengths) -> Lengths:
    cu_seqlens, seqused = (
        None if x is None else x.cpu() for x in (lengths.cu_seqlens, lengths.seqused)
    )
    return Lengths(cu_seqlens, seqused)


def _check_fp8_sequence(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, arguments: dict[str, Any]
) -> None:
    """Rounding P to e4m3 costs at most 2^-4 of each summand, and exponentials in halves 2^-7.

    Of a row: sum_j p_j |v_j| / 16; a wrong mask, scale or sequence costs far more.
    """
    mask = mask_of(
        arguments.get("causal", False),
        arguments.get("window_size", (-1, -1)),
        arguments.get("attention_chunk", 0),
    )
    given: dict[str, Any] = {
        "softmax_scale": arguments.get("softmax_scale") or q.shape[-1] ** -0.5,
        "mask": mask,
        "softcap": arguments.get("softcap") or None,
        "sink": arguments.get("learnable_sink"),
        "compute_dtype": torch.float64,
    }
    exact, exact_lse = reference.attention(q, k, v, **given)
    magnitude, _ = reference.attention(q, k, v.abs(), **given)
    largest = v.abs().amax() if v.numel() else 0.0
    # P below 2^-9 of the row's greatest score is rounded to steps of 2^-18: all keys together.
    allowed = magnitude * (2.0**-4 + 2.0**-7) + largest * k.shape[1] * 2.0**-17 + 1e-5
    worst = ((out.double() - exact).abs() - allowed).amax() if out.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"out is off by {worst} more than rounding allows"
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    error = (lse.double() - exact_lse)[~empty].abs()
    scale = exact_lse[~empty].abs().clamp(min=1.0)
    assert (error <= 8e-3 + 1e-5 * scale).all(), f"lse is off by {error.amax()}"
