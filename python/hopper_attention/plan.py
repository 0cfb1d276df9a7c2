"""What a call runs: its checked inputs, and the plan that all calls of one kind share."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention import arguments, dispatch, runtime, selection
from hopper_attention.arguments import WHOLE, Lengths, Mask, Options
from hopper_attention.selection import Target

FP8_TENSORS = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_OUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)
"""By their number in the kernels (`Output.types` of hopper/forward/kernel_fp8.py)."""
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "num_sequences")


class Fp8(NamedTuple):
    """How FP8 tensor cores are used: `attention_fp8`'s arguments of these names."""

    two_level: bool | None = None
    accumulate_every: int = 1


class Inputs(NamedTuple):
    """The tensors of one call, as the public functions take them; `sink` is float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None
    queries: Lengths = WHOLE
    keys: Lengths = WHOLE

    @staticmethod
    def of(flat: tuple[Any, ...]) -> Inputs:
        """From an operator's tensors."""
        q, k, v, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = flat
        return Inputs(
            q, k, v, sink, Lengths(cu_seqlens_q, seqused_q), Lengths(cu_seqlens_k, seqused_k)
        )

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        """As an operator's tensors."""
        q, k, v, sink, queries, keys = self
        index = (queries.cu_seqlens, keys.cu_seqlens, queries.seqused, keys.seqused)
        return q, k, v, sink, *index

    @property
    def varlen(self) -> bool:
        return self.queries.given or self.keys.given

    @property
    def sequences(self) -> int:
        """How many there are: batch entries, if they are not packed."""
        cu_seqlens = self.queries.cu_seqlens
        return self.q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def prepare(inputs: Inputs, options: Options, fp8: Fp8 | None = None) -> Plan:
    """The plan for a call, with everything about the call checked; `fp8`: of FP8 kernels.

    Raises TypeError, ValueError or NotImplementedError, as the public functions say.
    """
    q, k, v, sink, queries, keys = inputs
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    if fp8 is not None and q.dtype in FP8_TENSORS:
        dtypes = (torch.bfloat16,) * 3  # whose result theirs is
    if queries is WHOLE and keys is WHOLE:
        plan = make_plan(shapes, dtypes, options, _target(q, fp8), fp8=fp8)
    else:
        packed = (queries.cu_seqlens is not None, keys.cu_seqlens is not None)
        target = _target(q, fp8)
        plan = make_plan(shapes, dtypes, options, target, *packed, inputs.varlen, fp8)
        runtime.backend_for(q)  # refuses other devices before their index tensors are read
        _check_index_tensors(inputs)
    if sink is not None:
        arguments.check_sink_values(sink)
    if options.sm_margin > 0:
        runtime.check_margin(q, options.sm_margin)
    return plan


def _target(q: Tensor, fp8: Fp8 | None) -> Target:
    return selection.target_for(q) if fp8 is None else selection.target_for_fp8(q)


def check_shapes_of(inputs: Inputs) -> None:
    """What can be said of tensors without data."""
    q, k, v, _, queries, keys = inputs
    packed = (queries.cu_seqlens is not None, keys.cu_seqlens is not None)
    arguments.check_dtypes(q.dtype, k.dtype, v.dtype)
    arguments.check_shapes(q.shape, k.shape, v.shape, *packed)


def check_fp8_shapes_of(inputs: Inputs, options: Options, two_level: bool | None) -> None:
    """The same of what FP8 kernels take."""
    q, k, v, _, queries, keys = inputs
    packed = (queries.cu_seqlens is not None, keys.cu_seqlens is not None)
    arguments.check_shapes(q.shape, k.shape, v.shape, *packed)
    arguments.check_fp8_head_dims(q.shape[-1], v.shape[-1])
    _result_type(options.out_dtype, torch.bfloat16, Fp8(two_level))


def _check_index_tensors(inputs: Inputs) -> None:
    q, k, _, _, queries, keys = inputs
    batch = _batch(q, k, queries, keys)
    for side, tensor, lengths in (("q", q, queries), ("k", k, keys)):
        arguments.check_index(f"cu_seqlens_{side}", lengths.cu_seqlens, batch + 1, q)
        arguments.check_index(f"seqused_{side}", lengths.seqused, batch, q)
        arguments.check_lengths(side, lengths, tensor.shape[-3])


@dataclass(frozen=True)
class Plan:
    """What all calls of one kind share: shapes, dtypes and options checked, the instance chosen."""

    target: Target
    """Whose kernels."""
    instance: str
    """Empty: the reference was asked for.  Compiled, if the target launches kernels."""
    scale: float
    mask: Mask
    softcap: float | None
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    output_type: int
    """Number of out_dtype among those that the kernel stores."""
    like_q: bool
    """Whether out has q's shape and dtype."""
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]
    varlen: bool
    qheads_per_tile: int
    """More than one: the instance is one that looks up lengths, for dense problems, too."""
    options: Options
    accumulate_every: int = 1

    @functools.cached_property
    def scalars(self) -> list[float | int]:
        """The instance's scalar arguments where none of them stands for a tensor."""
        return self.scalars_with({})

    def scalars_with(self, tensors: dict[str, int]) -> list[float | int]:
        """The same with addresses and the number of sequences by name; 0 where absent."""
        absent = dict.fromkeys(("learnable_sink", "out_descale", *LENGTHS), 0)
        values: dict[str, float | int] = {**absent, **self.values, **tensors}
        return [values[name] for name in runtime.scalar_names(self.instance)]

    @property
    def values(self) -> dict[str, float | int]:
        """Scalar arguments of the kernels that stand for no tensor, by name."""
        return {
            "softmax_scale": self.scale,
            "softcap": self.softcap or 0.0,
            "window_left": self.mask.left,
            "window_right": self.mask.right,
            "attention_chunk": self.mask.chunk,
            "qheads_per_tile": self.qheads_per_tile,
            "output_type": self.output_type,
            "accumulate_every": self.accumulate_every,
        }

    def backend_for(self, q: Tensor) -> runtime.Backend:
        """Where it runs; gradients may be asked for where nothing is forced any more."""
        if self.target.backend == selection.REFERENCE:
            return runtime.Backend.REFERENCE
        return runtime.backend_for(q)

    def backward_instances(self, q: Tensor, v: Tensor) -> dispatch.BackwardInstances:
        """Raises NotImplementedError if there is no backward for this kind of call."""
        dtype, capped = arguments.DTYPES[q.dtype], self.softcap is not None
        kind, dims = self.mask.kind, (q.shape[-1], v.shape[-1])
        return dispatch.backward_instances(dtype, *dims, kind, capped, self.varlen, self.target)


@functools.lru_cache(maxsize=1024)
def make_plan(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    options: Options,
    target: Target,
    packed_q: bool = False,
    packed_k: bool = False,
    varlen: bool = False,
    fp8: Fp8 | None = None,
    mask: Mask | None = None,
) -> Plan:
    """Raises what `prepare` does about these.  `mask`: in place of the options'."""
    arguments.check_dtypes(*dtypes)
    q, k, v = shapes
    arguments.check_shapes(q, k, v, packed_q, packed_k)
    out_dtype, output_type = _result_type(options.out_dtype, dtypes[0], fp8)
    mask = mask or arguments.resolve_mask(options, q[-3], k[-3])
    scale = 1.0 / math.sqrt(q[-1]) if options.softmax_scale is None else options.softmax_scale
    softcap = options.softcap or None
    group = q[-2] // k[-2]
    kind = (q[-1], v[-1], mask.kind, softcap is not None)
    instance, packs = "", False
    if fp8 is not None:  # heads are not packed: the rows of a tile share Q's scale
        arguments.check_fp8_head_dims(q[-1], v[-1])
        if target.backend != selection.REFERENCE:
            choose = dispatch.forward_fp8_instance
            instance = dispatch.or_listed(target, choose, *kind, varlen, fp8.two_level)
            if fp8.accumulate_every > 1 and not dispatch.is_two_level(instance):
                raise NotImplementedError(
                    f"accumulate_every={fp8.accumulate_every}: head dims {q[-1]} and {v[-1]} have "
                    "no kernel of two levels; use 1"
                )
    elif target.backend != selection.REFERENCE:
        dtype = arguments.DTYPES[dtypes[0]]
        seqlen_q = q[-3] if options.max_seqlen_q is None else min(q[-3], options.max_seqlen_q)
        packs = dispatch.packs_heads(dtype, *kind, group, seqlen_q, options.pack_gqa, target)
        indexed = varlen or packs
        instance = dispatch.or_listed(
            target, dispatch.forward_instance, dtype, *kind, indexed, target
        )
    out_shape, lse_shape = result_shapes(q, v, packed_q)
    return Plan(
        target=target,
        instance=instance,
        scale=scale,
        mask=mask,
        softcap=softcap,
        out_shape=out_shape,
        out_dtype=out_dtype,
        output_type=output_type,
        like_q=fp8 is None and out_shape == tuple(q) and out_dtype == dtypes[0],
        lse_shape=lse_shape,
        lse_strides=torch.empty(lse_shape, device="meta").stride(),
        varlen=varlen,
        qheads_per_tile=group if packs else 1,
        options=options,
        accumulate_every=1 if fp8 is None else fp8.accumulate_every,
    )


def _result_type(
    out_dtype: torch.dtype | None, dtype: torch.dtype, fp8: Fp8 | None
) -> tuple[torch.dtype, int]:
    """out's dtype, and its number among those that the kernel stores."""
    if fp8 is None:
        out_dtype = arguments.resolve_out_dtype(out_dtype, dtype)
        return out_dtype, int(out_dtype == torch.float32)
    out_dtype = out_dtype or dtype
    if out_dtype not in FP8_OUT_DTYPES:
        have = ", ".join(map(str, FP8_OUT_DTYPES))
        raise NotImplementedError(f"out_dtype={out_dtype} is not supported for FP8; use {have}")
    return out_dtype, FP8_OUT_DTYPES.index(out_dtype)


def result_shapes(
    q: arguments.Shape, v: arguments.Shape, packed_q: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of out and lse."""
    *rows, heads, _ = q
    return (*rows, heads, v[-1]), ((heads, *rows) if packed_q else (rows[0], heads, rows[1]))


def _batch(q: Tensor, k: Tensor, queries: Lengths, keys: Lengths) -> int:
    """Number of sequences, which whatever names it first says; the others are held to it."""
    sides = (("q", q, queries), ("k", k, keys))
    counts = {}
    for name, tensor, lengths in sides:
        cu_seqlens = lengths.cu_seqlens
        if cu_seqlens is None:
            counts[name] = tensor.shape[0]
        elif not isinstance(cu_seqlens, Tensor):
            kind = type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens_{name}: expected a torch.Tensor, got {kind}")
        elif cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            shape = tuple(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens_{name} has shape {shape}; expected (batch + 1,)")
        else:
            counts[f"cu_seqlens_{name}"] = cu_seqlens.shape[0] - 1
    (first, batch), (second, other) = counts.items()
    if batch != other:
        raise ValueError(f"{second} has {other} sequences, {first} has {batch}")
    return batch
