"""V^T for FP8 attention (v_layout.py) from V in e4m3: bytes are moved, once, at the copy's speed.

A thread block of 256 threads has 128 keys of 64 columns of a head.

TransposeRows      V's rows lie together.  A thread loads 16 columns of two successive keys and
                   stores them pair by pair to shared memory, where columns are put together.
TransposeColumns   V's columns do.  A thread permutes 16 keys of a column in registers.  Where
                   packed sequences start between multiples of 16, it loads twice and shifts.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint16, Uint32
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.conventions import BLOCK_ROWS
from hopper_attention.cute_kernels.primitives.arguments import RowAddresses, example
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, minimum
from hopper_attention.cute_kernels.primitives.instructions import permute_bytes
from hopper_attention.cute_kernels.primitives.types import DTYPES, strided
from hopper_attention.cute_kernels.quantization.config import TransposeVConfig
from hopper_attention.cute_kernels.quantization.v_layout import (
    CHUNKS,
    EIGHT,
    KEYS,
    Block,
    Staging,
    store_keys,
)
from hopper_attention.cute_kernels.scheduling.sequence import Lengths

COLUMNS = 64
"""Columns of a thread block: four threads with 16 bytes of a row."""
LANES = COLUMNS // KEYS
ALL = 0xFFFFFFFF
"""Bits of a word."""


def example_arguments() -> tuple:
    e4m3 = DTYPES["e4m3"]
    addresses = example(RowAddresses, lambda: Int64(0))
    return (strided(e4m3, 4), strided(e4m3, 4), addresses, Int32(1), Int32(1))


def piece_of(lengths: Lengths, columns: Int32) -> tuple[Block, Int32]:
    """This thread block's rows, and the first of its columns."""
    x, number, index = cute.arch.block_idx()
    pieces = ceil_div(columns, COLUMNS)
    return Block(index, lengths.of(index), x // pieces, number), x % pieces * COLUMNS


class TransposeRows:
    def __init__(self, config: TransposeVConfig):
        self.cfg = config

    def example_arguments(self) -> tuple:
        return example_arguments()

    @cute.jit
    def __call__(
        self,
        v: cute.Tensor,
        columns: cute.Tensor,
        addresses: RowAddresses,
        sequences: Int32,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """v (batch, seqlen, heads, columns), or (1, total, ...); columns: v_layout.py.

        Sequences have at most `max_seqlen` rows.
        """
        lengths = Lengths(*addresses, v.shape[1])
        grid = [
            v.shape[2] * ceil_div(v.shape[3], COLUMNS),
            ceil_div(max_seqlen, BLOCK_ROWS),
            sequences,
        ]
        self.kernel(v, columns, lengths).launch(
            grid=grid, block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mV: cute.Tensor, mColumns: cute.Tensor, lengths: Lengths):
        thread = cute.arch.thread_idx()[0]
        block, first = piece_of(lengths, mV.shape[3])
        staging = Staging.allocate(SmemAllocator(), COLUMNS)
        if block.rows > 0:
            self.load(mV, block, first, staging, thread)
            cute.arch.sync_threads()
            staging.store(mColumns, block, first, thread, self.cfg.threads)

    @cute.jit
    def load(self, mV: cute.Tensor, block: Block, first: Int32, staging: Staging, thread: Int32):
        pair, vector = thread // LANES, thread % LANES
        column = minimum(first // KEYS + vector, mV.shape[3] // KEYS - 1)
        rows = []
        for r in cutlass.range_constexpr(2):
            source = mV[block.sequence.batch, block.row(2 * pair + r), block.head, None]
            loaded = cute.make_rmem_tensor((KEYS,), mV.element_type)
            cute.autovec_copy(cute.local_tile(source, (KEYS,), (column,)), loaded)
            exists = Uint32(ALL) if 2 * pair + r < block.rows else Uint32(0)
            words = cute.recast_tensor(loaded, Uint32)
            rows.append([words[i] & exists for i in range(KEYS // 4)])
        for half in cutlass.range_constexpr(KEYS // EIGHT):
            slots = staging.slots(vector * (KEYS // EIGHT) + half, pair)
            for i in cutlass.range_constexpr(EIGHT // 2):
                word = half * EIGHT // 4 + i // 2
                two = permute_bytes(rows[0][word], rows[1][word], 0x7362 if i % 2 else 0x5140)
                slots[2 * i] = Uint16(two & 0xFFFF)
                slots[2 * i + 1] = Uint16(two >> 16)


class TransposeColumns:
    def __init__(self, config: TransposeVConfig):
        self.cfg = config

    def example_arguments(self) -> tuple:
        return example_arguments()

    @cute.jit
    def __call__(
        self,
        v: cute.Tensor,
        columns: cute.Tensor,
        addresses: RowAddresses,
        sequences: Int32,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """v (batch or 1, heads, columns, keys up to a multiple of 16); else as TransposeRows.

        Without `addresses`, the sequences' lengths are `max_seqlen`.
        """
        lengths = Lengths(*addresses, max_seqlen)
        pieces = ceil_div(v.shape[2], COLUMNS)
        self.kernel(v, columns, lengths).launch(
            grid=[v.shape[1] * pieces, ceil_div(max_seqlen, BLOCK_ROWS), sequences],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mVt: cute.Tensor, mColumns: cute.Tensor, lengths: Lengths):
        thread = cute.arch.thread_idx()[0]
        block, first = piece_of(lengths, mVt.shape[2])
        if block.rows > 0:
            at_once = self.cfg.threads // CHUNKS
            for i in cutlass.range_constexpr(COLUMNS // at_once):
                column, chunk = first + i * at_once + thread // CHUNKS, thread % CHUNKS
                words = self.load(mVt, block, minimum(column, mVt.shape[2] - 1), chunk)
                store_keys(self.permuted(words), mColumns, block, column, chunk)

    @cute.jit
    def load(self, mVt: cute.Tensor, block: Block, column: Int32, chunk: Int32):
        """(4,) words: the keys of `chunk` in their order, zeros behind the last."""
        source = mVt[block.sequence.batch, block.head, column, None]
        key = block.sequence.offset + block.first_row + chunk * KEYS
        last, shift = source.shape[0] // KEYS - 1, key % KEYS
        loaded = cute.make_rmem_tensor((2 * KEYS,), mVt.element_type)
        loaded.fill(0)
        for i in cutlass.range_constexpr(2):
            if i == 0 or shift != 0:
                vector = cute.local_tile(source, (KEYS,), (minimum(key // KEYS + i, last),))
                cute.autovec_copy(vector, cute.local_tile(loaded, (KEYS,), (i,)))
        both = cute.recast_tensor(loaded, Uint32)
        words = [both[i] for i in range(8)]
        for distance in (2, 1):  # words
            moves = shift // 4 & distance != 0
            words = [b if moves else a for a, b in zip(words, words[distance:])]
        found = cute.make_rmem_tensor((KEYS // 4,), Uint32)
        for i in cutlass.range_constexpr(KEYS // 4):
            exist = minimum(block.rows - chunk * KEYS - 4 * i, 4)
            bits = Uint32(ALL) >> Uint32(8 * (4 - exist)) if exist > 0 else Uint32(0)
            word = permute_bytes(words[i], words[i + 1], 0x3210 + 0x1111 * (shift % 4))
            found[i] = word & bits
        return found

    def permuted(self, words: cute.Tensor) -> cute.Tensor:
        """Pairs of keys in the order 0, 4, 1, 5, ...: of words 0 and 2, then of 1 and 3."""
        found = cute.make_rmem_tensor(words.shape, Uint32)
        for i in range(4):
            low, high = words[i // 2], words[i // 2 + 2]
            found[i] = permute_bytes(low, high, 0x7632 if i % 2 else 0x5410)
        return found
