"""The flash backend of PyTorch: `F.scaled_dot_product_attention` and `varlen_attn`.

`enable_sdpa` puts our kernels behind the aten operators that PyTorch calls.  What they do not
support (dropout, other dtypes, other GPUs, ...) goes on to PyTorch's own kernels; at level DEBUG
the logger of this module says what and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from hopper_attention.dispatch.plan import prepare
from hopper_attention.launch import backward, forward
from hopper_attention.problem import checks, memory, scalars, values
from hopper_attention.problem.values import Inputs, Options

logger = logging.getLogger(__name__)
NAME = "hopper_attention"
"""In PyTorch's registry of flash backends."""
DEVICES = {"cuda": "CUDA", "cpu": "CPU"}
"""Dispatch keys."""


def enable_sdpa(device: str = "cuda") -> AbstractContextManager[None]:
    """Makes this library PyTorch's flash backend, until `disable_sdpa`, or as a context manager.

    On CUDA, PyTorch prefers cuDNN to flash backends on Hopper, so cuDNN's is switched off
    meanwhile.  Calls with masks, dropout or whatever else the kernels lack go to PyTorch's own
    kernels as before.

    Args:
        device: "cuda"; or "cpu", where the reference implementation, or the simulator, takes over
            bf16 and fp16: for tests.

    Returns:
        A context manager whose end restores what was before; to be ignored where not wanted.

    Raises:
        ValueError: another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    before = _State.now()
    try:
        attention.register_flash_attention_impl(NAME, register_fn=lambda: _Overrides(device))
        attention.activate_flash_attention_impl(NAME)
    except BaseException:
        before.restore()
        raise
    return _restoring(before)


def disable_sdpa() -> None:
    """Restores PyTorch's own backends; nothing happens if ours is not the one that is active."""
    if attention.current_flash_attention_impl() == NAME:
        attention.restore_flash_attention_impl()


@dataclass(frozen=True)
class _State:
    """Which flash backend is active; of ours, on which device."""

    name: str | None
    device: str

    @staticmethod
    def now() -> _State:
        return _State(attention.current_flash_attention_impl(), _Overrides.device)

    def restore(self) -> None:
        if self.name is None:
            disable_sdpa()
        elif self.name == NAME:
            enable_sdpa(self.device)
        else:
            attention.activate_flash_attention_impl(self.name)


@contextmanager
def _restoring(before: _State) -> Iterator[None]:
    try:
        yield
    finally:
        before.restore()


class _Overrides:
    """Our implementations of PyTorch's operators on one device, until `remove`."""

    device = "cuda"
    """The device of the registration that was made last."""

    def __init__(self, device: str):
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        self._switched_cudnn_off = False
        operators = _OPERATORS | (_CPU_OPERATORS if device == "cpu" else {})
        try:
            for name, attempt in operators.items():
                if hasattr(torch.ops.aten, name):  # in this version of PyTorch
                    self._override(name, attempt, DEVICES[device])
        except BaseException:
            self.remove()
            raise
        if device == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
            self._switched_cudnn_off = True
            torch.backends.cuda.enable_cudnn_sdp(False)
        _Overrides.device = device

    def _override(self, name: str, attempt: Callable[..., Any], key: str) -> None:
        try:
            original = torch.library.get_kernel(f"aten::{name}", key)
        except RuntimeError:
            original = None  # the varlen operators have no kernel on a CPU

        def implementation(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return attempt(*args, **kwargs)
            except (NotImplementedError, ValueError) as refusal:  # before anything was launched
                if original is None:
                    raise
                logger.debug("%s falls through to PyTorch: %s", name, refusal)
            return original.call_boxed(keyset, *args, **kwargs)

        assert self._library is not None
        self._library.impl(name, implementation, key, with_keyset=True)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None
            if self._switched_cudnn_off:
                torch.backends.cuda.enable_cudnn_sdp(True)


def _refuse(**arguments: Any) -> None:
    """Refuse arguments that are neither False nor 0 nor None."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise NotImplementedError(f"{name}: not supported; leave it at its default")


def _options(
    scale: float | None,
    causal: bool,
    window_left: int | None = None,
    window_right: int | None = None,
    longest: int | None = None,
) -> Options:
    window = (window_left, window_right)
    return Options.of(scale, causal, window, max_seqlen_q=longest)


def _longest(cum_seq_q: Tensor | None, max_q: int, max_k: int) -> int | None:
    """`Options.max_seqlen_q`: of queries that are not packed, the rows say it."""
    bound = scalars.bound("max_q", max_q)
    scalars.bound("max_k", max_k)  # the lengths are in cum_seq_k
    return None if cum_seq_q is None else values.packing_bound(bound)


def _attend(inputs: Inputs, options: Options, out: Tensor) -> Tensor:
    """Writes out; returns lse."""
    checks.check_tensors(*inputs[:3])
    if inputs.q.shape[-1] != inputs.v.shape[-1]:
        raise NotImplementedError("value has another head dim than query")
    return forward.run(prepare(inputs, options), inputs, out)[1]


def _gradients(
    inputs: Inputs, options: Options, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse may be those of more keys: ring attention merges them before it comes here."""
    checks.check_tensors(*inputs[:3])
    plan = prepare(inputs, options)
    dq, dk, dv, _ = backward.run(
        plan, inputs, out.to(inputs.q.dtype), lse.contiguous(), grad_out, None
    )
    return dq, dk, dv


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, heads, seqlen, head_dim) to (batch, seqlen, heads, head_dim), or back."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _laid_out_like(tensors: tuple[Tensor, ...], models: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return them with the strides of PyTorch's own gradients, on which compiled graphs rely."""
    pairs = [(t, torch.empty_like(model)) for t, model in zip(tensors, models, strict=True)]
    return tuple(t if t.stride() == like.stride() else like.copy_(t) for t, like in pairs)


def _no_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State of the random generator and debug mask, unused."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **more: Any,
) -> tuple[Any, ...]:
    """Attention of (batch, heads, seqlen, head_dim); out has query's strides."""
    _refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask, **more)
    out = torch.empty_like(query)
    q, k, v, written = _transposed(query, key, value, out)
    lse = _attend(Inputs(q, k, v), _options(scale, is_causal), written)
    return out, lse, None, None, q.shape[1], k.shape[1], *_no_dropout(query)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **more: Any,
) -> tuple[Tensor, ...]:
    _refuse(dropout_p=dropout_p, cum_seq_q=cum_seq_q, cum_seq_k=cum_seq_k, **more)
    q, k, v, dout, o = _transposed(query, key, value, grad_out, out)
    found = _gradients(Inputs(q, k, v), _options(scale, is_causal), o, logsumexp, dout)
    return _laid_out_like(_transposed(*found), (query, key, value))


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **more: Any,
) -> tuple[Tensor, ...]:
    """Attention of (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim)."""
    out = torch.empty_like(query)
    lse = _flash_forward_inplace(
        out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, **more,
    )  # fmt: skip
    return out, lse, *_no_dropout(query)


def _flash_forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
    **more: Any,
) -> Tensor:
    """Paged keys, ALiBi and whatever newer versions pass are refused by name."""
    _refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask, **more)
    if scalars.integer("num_splits", num_splits or 0, 0) > 1:
        raise NotImplementedError("num_splits: keys are not split")
    memory.check_out(out, query, key, value, None)
    longest = _longest(cum_seq_q, max_q, max_k)
    options = _options(scale, is_causal, window_size_left, window_size_right, longest)
    inputs = Inputs(
        query, key, value, cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k, seqused_k=seqused_k
    )
    return _attend(inputs, options, out)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **more: Any,
) -> tuple[Tensor, ...]:
    _refuse(dropout_p=dropout_p, **more)
    longest = _longest(cum_seq_q, max_q, max_k)
    options = _options(scale, is_causal, window_size_left, window_size_right, longest)
    inputs = Inputs(query, key, value, cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k)
    found = _gradients(inputs, options, out, logsumexp, grad_out)
    return _laid_out_like(found, (query, key, value))


def _check_top_left(query: Tensor, key: Tensor, is_causal: bool) -> None:
    """PyTorch's CPU kernels align causal masks to the top left, unlike its flash kernels."""
    if is_causal and query.shape[2] != key.shape[2]:
        raise NotImplementedError("is_causal: aligned to the bottom right")


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    _refuse(attn_mask=attn_mask)
    _check_top_left(query, key, is_causal)
    out, lse, *_ = _sdpa_forward(query, key, value, dropout_p, is_causal, **more)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # as PyTorch's lies in memory


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _refuse(dropout_p=dropout_p, attn_mask=attn_mask)
    _check_top_left(query, key, is_causal)
    q, k, v, dout, o = _transposed(query, key, value, grad_out, out)
    return _transposed(*_gradients(Inputs(q, k, v), _options(scale, is_causal), o, logsumexp, dout))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,
    "_flash_attention_backward": _flash_backward,
}
_CPU_OPERATORS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}
