"""Groups of arguments that several kernels take.

nvidia-cutlass-dsl 4.8.1 exports a group as one C array: of integers of one type, or of tensors with
the same dynamic extents and strides.  A group that a kernel does not read is None as a whole.  The
host passes every argument by its member's name (python/hopper_attention/launch/arguments.py), so
names are unique within a kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64


class ForwardOperands(NamedTuple):
    """Q, K, V and O, in the layouts that the kernel's file describes; FP8 kernels take V^T."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor


class BackwardOperands(NamedTuple):
    """(batch, seqlen, heads, head_dim) of the forward pass and its gradients, all in one dtype."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    dout: cute.Tensor
    dk: cute.Tensor
    dv: cute.Tensor


class WorkspaceStatistics(NamedTuple):
    """Two float32 numbers of every query row, laid out as in cute_kernels/backward/workspace.py."""

    lse_workspace: cute.Tensor
    delta_workspace: cute.Tensor


class Window(NamedTuple):
    """Bounds of what a query sees, `problem.values.Mask` on the host."""

    window_left: Int32
    window_right: Int32
    attention_chunk: Int32


class SequenceAddresses(NamedTuple):
    """Addresses of int32 arrays that say where sequences lie; 0 where absent."""

    cu_seqlens_q: Int64
    cu_seqlens_k: Int64
    seqused_q: Int64
    seqused_k: Int64


class QueryAddresses(NamedTuple):
    """The queries' half of `SequenceAddresses`."""

    cu_seqlens_q: Int64
    seqused_q: Int64


class RowAddresses(NamedTuple):
    """`SequenceAddresses` of a kernel that reads one tensor."""

    cu_seqlens: Int64
    seqused: Int64


class ForwardCounts(NamedTuple):
    """Integers of a forward kernel."""

    num_sequences: Int32
    """Sequences, where their lengths are looked up; 0: every batch entry is one."""
    qheads_per_tile: Int32
    """Query heads that share a tile."""
    output_type: Int32
    """The number of the result's dtype among those that the kernel stores."""


class TileQueueArguments(NamedTuple):
    """The arguments of persistent blocks, which the launch adds behind all others."""

    tile_counter: Int64
    """Address of two int32, zero (scheduling/tile_queue.py)."""
    max_blocks: Int64
    """Blocks that run at the same time; as wide as the address, as a group has one type."""


def example(group: type, make: Callable[[], Any]) -> Any:
    """Return a group whose members are made by `make`, for compilation."""
    return group(*(make() for _ in group._fields))
