"""Rows of a shared tile that belong to no query or key of the sequence."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def zero_fill_rows(
    start: cute.Pointer,
    shape: cutlass.Constexpr,
    span: cutlass.Constexpr,
    valid: Int32,
    thread: Int32,
    threads: cutlass.Constexpr,
    barrier: cutlass.Constexpr,
):
    """Zero the rows from `valid` of the tile `shape` (rows, columns) at `start`, by all `threads`.

    The factor of such rows is 0, but 0 * NaN would not be: behind a packed sequence lies the next
    one, behind the used rows whatever there is.
    """
    rows, columns = shape
    if valid < rows:
        # A row of one swizzle span is contiguous, and swizzling permutes only within it.
        vectors = span // 8
        zeros = cute.make_rmem_tensor((8,), start.value_type)
        zeros.fill(0.0)
        for i in cutlass.range(thread, rows * (columns // 8), threads, unroll=1):
            row = i // vectors % rows
            if row >= valid:
                place = (start + i * 8).align(16)
                cute.autovec_copy(zeros, cute.make_tensor(place, cute.make_layout(8)))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=barrier, number_of_threads=threads)
