"""Checks of the public functions' arguments, and the forms that the implementations take.

Messages name the argument, what was given and what is accepted.  Nothing is written before the last
check has passed.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _get_tracing_state, _TorchDispatchModeKey
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

Shape = Sequence[int]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEAD_DIM = 256
MAX_SINK = 1e38
"""Times log2(e) it must fit float32."""
ALIGNMENT = 8
"""Elements of 16 bytes."""
UNBOUNDED = 1 << 30
"""What the kernels take for a window side or chunk that hides nothing."""


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


WHOLE = Lengths()
"""Every batch entry is a sequence."""


def check_unsupported(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not supported yet; leave it at its default")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What every call must check anew: types and devices."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    device = q.device
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {device}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise ValueError(f"{name}: expected a plain tensor, not a sparse or nested one")


def check_dtypes(*dtypes: torch.dtype) -> None:
    """Of q, k and v."""
    for name, dtype in zip("qkv", dtypes, strict=True):
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {dtype}; supported: torch.bfloat16, torch.float16"
            )
        if dtype != dtypes[0]:
            raise ValueError(f"{name} has dtype {dtype}, q has {dtypes[0]}")


def autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype where autocast is on, as PyTorch's own attention has them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrower = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t.dtype in narrower else t for t in tensors]


def check_shapes(q: Shape, k: Shape, v: Shape, packed_q: bool, packed_k: bool) -> None:
    """(batch, seqlen, heads, head_dim), or (total, heads, head_dim) where packed."""
    for name, shape, packed in (("q", q, packed_q), ("k", k, packed_k), ("v", v, packed_k)):
        if len(shape) != (3 if packed else 4):
            form = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
            raise ValueError(f"{name} has shape {tuple(shape)}; expected {form}")
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if any(rows >= UNBOUNDED for rows in shape[:-2]):
            raise ValueError(f"{name} has shape {tuple(shape)}; at most {UNBOUNDED - 1} rows")
    if not packed_q and not packed_k:
        for name, shape in (("k", k), ("v", v)):
            if shape[0] != q[0]:
                raise ValueError(f"{name} has batch {shape[0]}, q has {q[0]}")
    rows = ("total",) if packed_k else ("batch", "seqlen")
    for what, given, expected in zip((*rows, "heads"), v, k):
        if given != expected:
            raise ValueError(f"v has {what} {given}, k has {expected}")
    (heads, head_dim), (heads_kv, head_dim_k) = q[-2:], k[-2:]
    if head_dim_k != head_dim:
        raise ValueError(f"k has head_dim {head_dim_k}, q has {head_dim}")
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"q has {heads} heads, not a multiple of the {heads_kv} of k and v")
    for name, dim in (("q and k", head_dim), ("v", v[-1])):
        if dim % 8 != 0 or not 0 < dim <= MAX_HEAD_DIM:
            nearest = min(MAX_HEAD_DIM, max(8, -(-dim // 8) * 8))
            raise NotImplementedError(
                f"head_dim {dim} of {name} is not supported; supported: multiples of 8 up to "
                f"{MAX_HEAD_DIM} (nearest: {nearest})"
            )


def check_fp8_head_dims(head_dim: int, head_dim_v: int) -> None:
    """Rows of bytes are addressed in steps of 16."""
    for name, dim in (("q and k", head_dim), ("v", head_dim_v)):
        if dim % 16:
            raise NotImplementedError(
                f"head_dim {dim} of {name} is not supported for FP8; supported: multiples of 16 "
                f"(nearest: {-(-dim // 16) * 16})"
            )


Description = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A tensor's address, shape and strides, as the extension takes them."""


def described(name: str, tensor: Tensor) -> Description:
    """Of the tensor as `addressable` makes it."""
    address, strides = tensor.data_ptr(), tensor.stride()
    outer_bits = strides[0] | strides[1] | strides[-2]  # of three or four dimensions
    if strides[-1] == 1 and not (outer_bits % ALIGNMENT or address % 16):
        return address, tensor.shape, strides
    tensor = addressable(name, tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def addressable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as TMA can address it: contiguous rows, everything else in steps of 16 bytes.

    That goes for strides which an extent of 1 leaves unused, too: those are replaced.
    """
    *outer, last = tensor.stride()
    step = 16 // tensor.element_size()
    aligned = all(stride % step == 0 for stride in outer) and tensor.data_ptr() % 16 == 0
    if (last == 1 and aligned) or tensor.numel() == 0:
        return tensor
    if last != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous (stride 1, got {last}); "
            f"use {name}.contiguous()"
        )
    for axis, stride in enumerate(outer):
        if tensor.shape[axis] > 1 and stride % step != 0:
            raise ValueError(
                f"{name}: stride {stride} of dimension {axis} is not a multiple of "
                f"{step} elements (16 bytes); use {name}.contiguous()"
            )
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(f"{name}: the data pointer is not aligned to 16 bytes; use {name}.clone()")
    used = [s if n > 1 else step for n, s in zip(tensor.shape, outer)]
    return tensor.as_strided(tensor.shape, [*used, 1])


def made_addressable(name: str, tensor: Tensor) -> Tensor:
    """The same, copied where TMA cannot address it: what the caller has not laid out."""
    try:
        return addressable(name, tensor)
    except ValueError:
        return tensor.clone(memory_format=torch.contiguous_format)


def check_index(
    name: str, index: Tensor | None, size: int, beside: Tensor, beside_name: str = "q"
) -> None:
    """An int32 vector of known size, where `beside` is, or None."""
    if index is None:
        return
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.device != beside.device:
        raise ValueError(f"{name} is on {index.device}, {beside_name} is on {beside.device}")
    if index.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {index.dtype}; expected torch.int32")
    if index.dim() != 1 or index.shape[0] != size:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; expected a vector of {size}")
    if index.layout is not torch.strided or not index.is_contiguous():
        raise ValueError(f"{name} must be contiguous; use {name}.contiguous()")


def readable(index: Tensor) -> bool:
    """Whether to look at values: a GPU would have to be waited for."""
    return not index.is_cuda or bool(os.environ.get("HOPPER_ATTENTION_DEBUG"))


def check_lengths(side: str, lengths: Lengths, rows: int) -> None:
    """The values: ascending, inside the tensor.  On a GPU this waits for it: debugging only.

    `side` is that of the arguments' names; "" if there is but one.
    """
    suffix = f"_{side}" if side else ""
    cu_seqlens, seqused = lengths.cu_seqlens, lengths.seqused
    given = cu_seqlens if cu_seqlens is not None else seqused
    if given is None or not readable(given):
        return
    allotted: list[int] | None = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        allotted = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        if offsets[0] != 0 or min(allotted, default=0) < 0 or offsets[-1] > rows:
            raise ValueError(f"cu_seqlens{suffix} must ascend from 0 to at most {rows} rows")
    if seqused is not None:
        used = seqused.tolist()
        limits = allotted if allotted is not None else [rows] * len(used)
        if any(not 0 <= n <= limit for n, limit in zip(used, limits, strict=True)):
            raise ValueError(f"seqused{suffix} must be between 0 and the sequences' lengths")


class Options(NamedTuple):
    """The scalar arguments as plain values: equal calls have equal options, and a hash.

    In the order of the library ops' scalar arguments.  A tuple, since it is made and hashed at
    every call: a frozen dataclass costs 2 us more.
    """

    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    """-1: unbounded."""
    attention_chunk: int
    softcap: float
    """0: none."""
    max_seqlen_q: int | None
    """An upper bound for packed queries, for `pack_gqa`; None: the tensor's rows."""
    pack_gqa: bool | None
    out_dtype: torch.dtype | None
    sm_margin: int
    deterministic: bool

    @staticmethod
    def of(
        softmax_scale: Any,
        causal: Any,
        window_size: Any,
        attention_chunk: Any,
        softcap: Any,
        max_seqlen_q: Any,
        pack_gqa: Any,
        out_dtype: Any,
        sm_margin: Any,
        deterministic: Any,
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
            raise TypeError(f"out_dtype: expected a torch.dtype, got {_shown(out_dtype)}")
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
        """Raises what `of` does."""
        scale, causal, left, right, chunk, softcap, longest, *rest = self
        longest = bound("max_seqlen_q", longest)
        return Options.of(scale, causal, (left, right), chunk, softcap, longest, *rest)


NO_WINDOW = (-1, -1)
"""The functions' default: what is given instead is looked at, as (-1.0, -1) equals it."""
MAX_SM_MARGIN = 100
"""An H100 or A100 has more multiprocessors; others may have fewer (`runtime.check_margin`)."""
SCALE_RANGE = (1e-20, 1e6)
"""Scores of inputs around 1 then stay below 1e8.  Beyond 1e9 rounding moves the exponent of a row's
greatest score, which should be 0, so far that its exponential overflows or vanishes."""
SOFTCAP_RANGE = (1e-6, 4096.0)
"""tanh x is computed as 1 - 2 / (1 + e^2x): its digits are worth less the larger the cap."""


def flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_") and getattr(value, "ndim", 0) == 0:  # numpy's
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {_shown(value)}")


def integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Of Python, NumPy or whatever else says that it is one (`__index__`).

    No bool, no float, no tensor: reading a tensor may wait for a device.
    """
    if type(value) is int and least <= value <= most:
        return value
    if isinstance(value, (bool, Tensor)) or type(value).__name__ == "bool_":  # NumPy 1's
        raise TypeError(f"{name}: expected an integer, got {_shown(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {_shown(value)}") from None
    if not least <= number <= most:
        bounds = f"from {least}" if most == 2**31 - 1 else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def bound(name: str, value: Any) -> int | None:
    """An upper bound of lengths; None: not known here, so the tensor's rows are one.

    An integer as `integer` has it, or a tensor of one.  Of a tensor on another device it is None,
    as reading would wait for the device, and so is that of any tensor while something traces: it
    would be a constant of what is traced.

    Raises TypeError or ValueError that names the argument.
    """
    compiling = is_compiling()
    if type(value) is int and (compiling or 0 <= value < 2**31):
        return value  # to a compiler perhaps a number that only the device knows: not comparable
    if value is None:
        return None
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # as good as an integer
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS or value.numel() != 1:
            kind = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected one integer, got {kind}")
        if type(value) is not Tensor or not value.is_cpu or compiling or _traced():
            return None
        value = value.item()
    return integer(name, value, 0)


def _traced() -> bool:
    """By other tracers than compilers, or a transform to which tensors stand for several."""
    return (
        _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    )


LONG = 1024
"""From so many queries on, packing the heads of a group cannot save a third of the tiles."""


def packing_bound(max_seqlen_q: int | None) -> int:
    """`Options.max_seqlen_q`: whatever is longer is the same to a plan, kept by its options."""
    if max_seqlen_q is None:
        return LONG
    if isinstance(max_seqlen_q, torch.SymInt):
        return torch.sym_min(max_seqlen_q, LONG)
    return min(max_seqlen_q, LONG)


def real(name: str, value: Any, limits: tuple[float, float]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {_shown(value)}")
    low, high = limits
    if not (value >= low and value <= high):  # type: ignore[operator]  # false for NaN
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def _window(window_size: Any) -> tuple[int, int]:
    sides = list(window_size) if isinstance(window_size, (tuple, list)) else []
    if len(sides) != 2:
        raise ValueError(f"window_size must be (left, right), got {_shown(window_size)}")
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


def resolve_out_dtype(out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if out_dtype is None or out_dtype == dtype:
        return dtype
    if out_dtype != torch.float32:
        raise NotImplementedError(
            f"out_dtype={out_dtype} is not supported with inputs of {dtype}; use {dtype} or "
            "torch.float32"
        )
    return out_dtype


def check_out(out: Any, q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype | None) -> None:
    """A tensor for the result."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    shape, dtype = (*q.shape[:-1], v.shape[-1]), q.dtype if out_dtype is None else out_dtype
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}; expected {dtype}")
    if out.device != q.device:
        raise ValueError(f"out is on {out.device}, q is on {q.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad, which what is written cannot; use out.detach()")
    if _overlaps_itself(out):
        raise ValueError("out overlaps itself: several of its elements are one")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        plain = type(out) is type(tensor) is Tensor and not torch.compiler.is_compiling()
        if plain and not out.is_meta and _overlap(out, tensor):
            raise ValueError(f"out overlaps {name}: it is written while others are read")


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += (n - 1) * stride
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether elements may be shared; they are not where both are columns of the same rows."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not a.numel():
        return False
    (first, n), (second, m) = ((x.data_ptr(), _reach(x)) for x in (a, b))
    if first + n <= second or second + m <= first:
        return False
    row = a.stride(-3)
    if a.stride(0) != b.stride(0) or row != b.stride(-3) or row == 0 or a.stride(0) % row:
        return True
    column = (second - first) % (row * a.element_size())
    width, other = (_reach(x[(0,) * (x.ndim - 2)]) for x in (a, b))
    return column < width or column + other > row * a.element_size()


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size() if tensor.numel() else 0


def check_differentiable(out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if out_dtype != dtype:
        raise NotImplementedError(
            f"out_dtype={out_dtype} is not differentiable yet; leave it at {dtype}, or call under "
            "torch.no_grad()"
        )


def resolve_sink(learnable_sink: Tensor | None, q: Tensor) -> Tensor | None:
    """A float32 score for each head."""
    if learnable_sink is None:
        return None
    if not isinstance(learnable_sink, Tensor):
        kind = type(learnable_sink).__name__
        raise TypeError(f"learnable_sink: expected a torch.Tensor, got {kind}")
    if learnable_sink.layout is not torch.strided:
        raise ValueError("learnable_sink: expected a plain tensor, not a sparse one")
    heads = q.shape[-2]
    if learnable_sink.dim() != 1 or learnable_sink.shape[0] != heads:
        shape = tuple(learnable_sink.shape)
        raise ValueError(
            f"learnable_sink has shape {shape}; expected ({heads},), one for each head"
        )
    if learnable_sink.device != q.device:
        raise ValueError(f"learnable_sink is on {learnable_sink.device}, q is on {q.device}")
    if not learnable_sink.dtype.is_floating_point:
        raise ValueError(f"learnable_sink has dtype {learnable_sink.dtype}; expected a float type")
    return learnable_sink.float().contiguous().resolve_neg()


def check_sink_values(sink: Tensor | None) -> None:
    """On the CPU; a GPU would have to be waited for."""
    if sink is None or not sink.is_cpu:
        return
    if not ((sink.abs() <= MAX_SINK) | (sink == -torch.inf)).all():
        raise ValueError(f"learnable_sink must be -inf or between -{MAX_SINK:g} and {MAX_SINK:g}")
