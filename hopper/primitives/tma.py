"""TMA: views, partitions and pipeline loads."""

from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync


class L2Hint(IntEnum):
    """Policies as `createpolicy.fractional` encodes them for all of the lines."""

    EVICT_FIRST = 0x12F0000000000000
    EVICT_LAST = 0x14F0000000000000


def permute(tensor: cute.Tensor, modes: tuple[int, ...]) -> cute.Tensor:
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=list(modes)))


def partition(tma: cpasync.TmaInfo, s: cute.Tensor, g: cute.Tensor):
    """(shared, global) with the tile's two modes merged, as `cute.copy` takes them."""
    s, g = cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
    return cpasync.tma_partition(tma.atom, 0, cute.make_layout(1), s, g)


@cute.jit
def load_stage(pipe, state, atom, source, stages, hint: cutlass.Constexpr = None):
    """A whole warp waits until the stage is free, then fills it.  The caller advances.

    `hint`: what L2 does with the lines, or None.
    """
    pipe.producer_acquire(state)
    full = pipe.producer_get_barrier(state)
    hints = {} if hint is None else {"cache_policy": cutlass.Int64(hint)}
    cute.copy(atom, source, stages[None, state.index], tma_bar_ptr=full, **hints)


@cute.jit
def load_row(source: cute.Tensor, target: cute.Tensor, full: cute.Pointer):
    """A whole warp copies a contiguous vector to shared memory, counted by the barrier `full`."""
    bits = cute.size(target) * target.element_type.width
    atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), target.element_type, num_bits_per_copy=bits)
    with cute.arch.elect_one():
        cute.copy(atom, source, target, mbar_ptr=full)
