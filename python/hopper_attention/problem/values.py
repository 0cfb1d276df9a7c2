"""The arguments of attention as plain values: masks, lengths, options, inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention.cute_kernels.conventions import UNBOUNDED
from hopper_attention.problem.scalars import bound, flag, integer, real, shown

Shape = Sequence[int]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, beside the ends of the sequence.

    Query i is aligned with key a = i + seqlen_k - seqlen_q and sees keys a - left .. a + right, of
    those within a's chunk; UNBOUNDED sides and chunk hide nothing.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    chunk: int = UNBOUNDED

    @property
    def kind(self) -> str:
        """The cheapest kernel's: "full", "causal" or "local"."""
        if self.left == UNBOUNDED and self.chunk == UNBOUNDED and self.right in (0, UNBOUNDED):
            return "causal" if self.right == 0 else "full"
        return "local"


FULL, CAUSAL = Mask(), Mask(right=0)


@dataclass(frozen=True)
class Lengths:
    """Sequences of one side that are not whole batch entries; flash-attn's tensors, int32.

    cu_seqlens (batch + 1): rows of packed sequences.  seqused (batch): used rows of each.
    """

    cu_seqlens: Tensor | None = None
    seqused: Tensor | None = None

    @property
    def given(self) -> bool:
        return self.cu_seqlens is not None or self.seqused is not None


DENSE = Lengths()
"""Every batch entry is a sequence."""


Bound = Annotated[int, torch.SymInt]
"""An upper bound of lengths; compilers may keep it symbolic."""
NO_WINDOW = (-1, -1)
"""The functions' default, known by identity: (-1.0, -1) equals it and is refused all the same."""


class Options(NamedTuple):
    """The scalar arguments as plain values: equal calls have equal options, and a hash.

    The operators' scalar arguments have these names, types and order.  A tuple, since it is made
    and hashed at every call: a frozen dataclass costs 2 us more.
    """

    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    """-1: unbounded."""
    attention_chunk: int
    softcap: float
    """0: none."""
    max_seqlen_q: Bound | None
    """An upper bound for packed queries, for `pack_gqa`; None: the tensor's rows."""
    pack_gqa: bool | None
    out_dtype: torch.dtype | None
    sm_margin: int
    deterministic: bool

    @staticmethod
    def of(
        softmax_scale: Any = None,
        causal: Any = False,
        window_size: Any = NO_WINDOW,
        attention_chunk: Any = 0,
        softcap: Any = 0.0,
        max_seqlen_q: Any = None,
        pack_gqa: Any = None,
        out_dtype: Any = None,
        sm_margin: Any = 0,
        deterministic: Any = False,
    ) -> Options:
        """Raises TypeError or ValueError that names the argument.

        `max_seqlen_q` is taken as it is: `bound` and `packing_bound` have made it.
        """
        if softmax_scale is not None:
            softmax_scale = real("softmax_scale", softmax_scale, SCALE_RANGE)
        left = right = -1
        if window_size is not NO_WINDOW:
            left, right = _window(window_size)
        if type(softcap) is not float or softcap != 0.0:
            no_cap = isinstance(softcap, Real) and not isinstance(softcap, bool) and softcap == 0
            softcap = 0.0 if no_cap else real("softcap", softcap, SOFTCAP_RANGE)
        if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
            raise TypeError(f"out_dtype: expected a torch.dtype, got {shown(out_dtype)}")
        return Options(
            softmax_scale,
            flag("causal", causal),
            left,
            right,
            integer("attention_chunk", attention_chunk, 0),
            softcap,
            max_seqlen_q,
            None if pack_gqa is None else flag("pack_gqa", pack_gqa),
            out_dtype,
            integer("sm_margin", sm_margin, 0, MAX_SM_MARGIN),
            flag("deterministic", deterministic) or torch.are_deterministic_algorithms_enabled(),
        )

    def checked(self) -> Options:
        """Return an operator's options checked as `of` does; raise what it raises."""
        scale, causal, left, right, chunk, softcap, longest, *rest = self
        longest = bound("max_seqlen_q", longest)
        return Options.of(scale, causal, (left, right), chunk, softcap, longest, *rest)


MAX_SM_MARGIN = 100
"""An H100 or A100 has more multiprocessors; others may have fewer (dispatch/target.py)."""
SCALE_RANGE = (1e-20, 1e6)
"""Scores of inputs around 1 then stay below 1e8.  Beyond 1e9 rounding moves the exponent of a row's
greatest score, which should be 0, so far that its exponential overflows or vanishes."""
SOFTCAP_RANGE = (1e-6, 4096.0)
"""tanh x is computed as 1 - 2 / (1 + e^2x): its digits are worth less the larger the cap."""
LONG = 1024
"""From so many queries on, packing the heads of a group cannot save a third of the tiles."""


def packing_bound(max_seqlen_q: int | None) -> int:
    """Return `Options.max_seqlen_q`, at most LONG: a longer one would only make another plan."""
    if max_seqlen_q is None:
        return LONG
    if isinstance(max_seqlen_q, torch.SymInt):
        return torch.sym_min(max_seqlen_q, LONG)
    return min(max_seqlen_q, LONG)


def _window(window_size: Any) -> tuple[int, int]:
    sides = list(window_size) if isinstance(window_size, (tuple, list)) else []
    if len(sides) != 2:
        raise ValueError(f"window_size must be (left, right), got {shown(window_size)}")
    left, right = (-1 if w is None else integer("window_size", w, -1) for w in sides)
    return left, right


def resolve_mask(options: Options, max_seqlen_q: int, max_seqlen_k: int) -> Mask:
    """The least mask that hides the same; the bounds may exceed the sequences' true lengths."""
    left, chunk = options.window_left, options.attention_chunk
    right = 0 if options.causal else options.window_right
    left_hides = 0 <= left < max_seqlen_k - 1
    right_hides = options.causal or 0 <= right < max_seqlen_q - 1
    return Mask(
        left if left_hides else UNBOUNDED,
        right if right_hides else UNBOUNDED,
        chunk if 0 < chunk < max_seqlen_k else UNBOUNDED,
    )


FP8_TENSORS = (torch.float8_e4m3fn, torch.float8_e5m2)


class PrecisionOptions(NamedTuple):
    """How exactly the FP8 kernels compute: `attention_fp8`'s arguments of these names."""

    two_level: bool | None = None
    accumulate_every: int = 1
    exact_softmax: bool = True

    @staticmethod
    def of(
        two_level: Any = None, accumulate_every: Any = 1, exact_softmax: Any = True
    ) -> PrecisionOptions:
        """Raises TypeError or ValueError that names the argument."""
        every = integer("accumulate_every", accumulate_every, 1)
        if every & (every - 1):
            nearest = 1 << every.bit_length() - 1
            raise ValueError(f"accumulate_every must be a power of two; got {every}, use {nearest}")
        if two_level is False and every > 1:
            raise ValueError(f"accumulate_every={every}: without two_level nothing is flushed")
        return PrecisionOptions(
            None if two_level is None else flag("two_level", two_level),
            every,
            flag("exact_softmax", exact_softmax),
        )


class Inputs(NamedTuple):
    """The tensors of one call; `learnable_sink` is float32.

    Public functions, operators and kernels have arguments of these names; an operator takes them
    in this order (torch_ops/schema.py).  Gradients, and DTensor's specs, come as an `Inputs` too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    learnable_sink: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None = None,
        queries: Lengths = DENSE,
        keys: Lengths = DENSE,
    ) -> Inputs:
        """Return the inputs whose sequences lie as `queries` and `keys` say."""
        if queries is DENSE and keys is DENSE:
            return Inputs(q, k, v, sink)  # a quarter of a microsecond less
        index = (queries.cu_seqlens, keys.cu_seqlens, queries.seqused, keys.seqused)
        return Inputs(q, k, v, sink, *index)

    @property
    def queries(self) -> Lengths:
        return Lengths(self.cu_seqlens_q, self.seqused_q)

    @property
    def keys(self) -> Lengths:
        return Lengths(self.cu_seqlens_k, self.seqused_k)

    @property
    def varlen(self) -> bool:
        """True if sequences are not whole batch entries (INDEX_TENSORS; every call asks)."""
        return not (
            self.cu_seqlens_q is self.cu_seqlens_k is self.seqused_q is self.seqused_k is None
        )

    @property
    def packed(self) -> tuple[bool, bool]:
        """Say whether queries are packed, and whether keys are."""
        return self.cu_seqlens_q is not None, self.cu_seqlens_k is not None

    @property
    def sequences(self) -> int:
        """How many there are: batch entries, if they are not packed."""
        cu_seqlens = self.cu_seqlens_q
        return self.q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


INDEX_TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
"""Fields of `Inputs` that say where sequences lie: an element a sequence, and no heads."""


class Gradients(NamedTuple):
    """Gradients of q, k, v and the sinks.

    Without sinks `dsink` is None; the operator returns an empty tensor in its place.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None

    @property
    def of_inputs(self) -> Inputs:
        """The gradients in the places of what they are gradients of; index tensors have none."""
        return Inputs(self.dq, self.dk, self.dv, learnable_sink=self.dsink)


class ResultsAndGradients(NamedTuple):
    """Forward's results and their gradients, as the operator for backward takes them."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor


class Descales(NamedTuple):
    """Factors of FP8 tensors: the public functions' arguments of these names."""

    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    out_descale: Tensor | None = None


class SequenceBounds(NamedTuple):
    """max_seqlen_q and max_seqlen_k of the public functions, for tables of scales."""

    bound_q: Bound | None = None
    bound_k: Bound | None = None


def result_shapes(q: Shape, v: Shape, packed_q: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of out and lse."""
    *rows, heads, _ = q
    return (*rows, heads, v[-1]), ((heads, *rows) if packed_q else (rows[0], heads, rows[1]))
