"""The order in which thread blocks of one launch add to dQ: counters in global memory.

Key blocks wait in ascending order, in `order_dq_adds` of hopper/backward/common.py and in `add_dq`
of ampere/backward.py.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, Int64


@dataclass(frozen=True)
class DqSemaphore:
    """One int32 for every (entry, head, block of rows), zero before the launch."""

    address: Int64
    """0: blocks add in any order."""
    heads: Int32
    blocks: Int32

    def counter(self, place: tuple) -> Int64:
        entry, head, block = place
        return self.address + 4 * ((Int64(entry) * self.heads + head) * self.blocks + block)

    @cute.jit
    def wait(self, place: tuple, earlier: Int32):
        """One thread waits until `earlier` others have signalled; their writes are then visible."""
        counter = self.counter(place)
        signalled = Int32(-1)
        while signalled != earlier:
            signalled = cute.arch.inline_ptx(
                "ld.acquire.gpu.global.b32 {$w0}, [{$r0}];",
                write_only_types=[Int32],
                read_only_args=[counter],
            )

    def signal(self, place: tuple) -> None:
        """One thread signals that its own writes are complete."""
        cute.arch.inline_ptx(
            "red.release.gpu.global.add.s32 [{$r0}], {$r1};",
            read_only_args=[self.counter(place), Int32(1)],
        )
