"""The order in which a block of keys visits its blocks of queries."""

from dataclasses import dataclass
from typing import Any

from hopper_attention.cute_kernels.masks.visible_range import BlockRange
from hopper_attention.cute_kernels.primitives.arithmetic import select


@dataclass(frozen=True)
class RowOrder:
    """Last block first: masked, then unmasked, then masked ones again.

    So key blocks that add to a block of dQ in order (lower ones first) hardly wait: each is one
    step behind the one before it, under a window not even that.  Where there is no order, each
    starts at another of its unmasked blocks, `shift` from the last: they would all add to the
    same dQ at the same time.
    """

    blocks: BlockRange
    shift: Any

    @property
    def count(self):
        return self.blocks.end - self.blocks.first

    @property
    def unmasked_begin(self):
        """Steps [unmasked_begin, unmasked_end) need no mask."""
        return self.blocks.end - self.blocks.unmasked_end

    @property
    def unmasked_end(self):
        return self.blocks.end - self.blocks.unmasked_first

    def block(self, step):
        """The block of queries that is visited at `step`, 0 to count - 1."""
        shifted = step + self.shift
        wrapped = select(shifted < self.unmasked_end, shifted, shifted - self.unmasked)
        before = select(step < self.unmasked_begin, step, wrapped)
        return self.blocks.end - 1 - select(step < self.unmasked_end, before, step)

    @property
    def unmasked(self):
        return self.blocks.unmasked_end - self.blocks.unmasked_first
