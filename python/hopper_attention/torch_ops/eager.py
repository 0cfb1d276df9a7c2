"""The test whether a call may go past PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd import profiler as autograd_profiler
from torch.compiler import is_compiling

from hopper_attention.problem.values import INDEX_TENSORS, Inputs

_PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = DispatchKey.PreDispatch


def needs_dispatcher(inputs: Inputs) -> bool:
    """Compilers and tracers, dispatch modes, transforms, subclasses, the profiler.

    Views that only the dispatcher resolves and tensors without data belong there, too.
    """
    q, k, v, sink, *_ = inputs
    return (
        is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor)
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or autograd_profiler._is_profiler_enabled
        or q.is_meta
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
        or (sink is not None and type(sink) not in _PLAIN)
        or (inputs.varlen and not _plain_lengths(inputs))
    )


def _plain_lengths(inputs: Inputs) -> bool:
    tensors = (getattr(inputs, name) for name in INDEX_TENSORS)
    return all(type(x) is Tensor for x in tensors if isinstance(x, Tensor))
