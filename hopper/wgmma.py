"""WGMMA groups: fence, issue, commit in one call."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warpgroup


@cute.jit
def issue(
    mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    accumulate: cutlass.Constexpr,
):
    """acc = a b, or acc += a b, as one committed group; a and b have modes (MMA, M or N, K).

    Asynchronous: neither acc nor the operands may be touched before `warpgroup.wait_group`.
    """
    # A fresh atom: a field set inside the caller's loop would not survive the loop's iteration.
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    warpgroup.fence()
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
