"""Tiles of 16-bit numbers in shared memory: where each element is, ldmatrix, cp.async.

A tile is cut into spans of 64 columns, or of 32 where 64 do not divide them, one span's rows after
the other.  A row of a span, 128 or 64 bytes, has 8 or 4 chunks of 16 bytes, and chunk c of row r
lies at place c ^ swizzle(r): eight successive rows of one chunk, which is what a matrix of ldmatrix
is, and eight chunks of a row, which is what cp.async writes, are in different banks.

Blocks of 16 x 16, of which a lane reads one row and chunk, begin at even chunks and at multiples of
16 rows, so a lane's place in a block is one of two or four addresses (`Lanes`), plus a constant.
These differ by an exclusive or: they are made anew for every GEMM, not kept in registers.

Where warps share a tile's columns, each has a part of every span: its blocks, too, are a constant
away from a few addresses.
"""

from dataclasses import dataclass
from typing import Any

from cutlass import Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from hopper_attention.cute_kernels.ampere.config import MATRIX
from hopper_attention.cute_kernels.primitives.fragments import opaque

CHUNK = 8
"""Columns of 16 bytes."""


def split(index, size: int):
    """(index // size, index % size), `size` a power of two; a division minds the sign."""
    assert size & (size - 1) == 0
    return index >> size.bit_length() - 1, index & size - 1


@dataclass(frozen=True)
class SharedTile:
    """The layout of one tile; works on Python integers and traced values alike."""

    start: int
    """Bytes from the block's shared memory: a multiple of 1024."""
    rows: int
    columns: int

    @property
    def span(self) -> int:
        """Columns."""
        return 64 if self.columns % 64 == 0 else 32

    @property
    def span_chunks(self) -> int:
        return self.span // CHUNK

    @property
    def bytes(self) -> int:
        return 2 * self.rows * self.columns

    @property
    def end(self) -> int:
        return self.start + self.bytes

    def swizzle(self, row):
        return row & 7 if self.span == 64 else row >> 1 & 3

    def place(self, row, chunk):
        """Byte of a chunk, from the beginning of the tile."""
        span, within = split(chunk, self.span_chunks)
        of_span = row * 2 * self.span + (within ^ self.swizzle(row)) * 16
        return span * self.rows * 2 * self.span + of_span

    def block(self, row: int, column: int) -> tuple[int, int]:
        """Which of `Lanes` reads the 16 x 16 block that begins here, and the constant to add."""
        assert row % MATRIX == 0 and column % MATRIX == 0
        span, within = divmod(column, self.span)
        return within // MATRIX, self.start + 2 * self.span * (span * self.rows + row)

    def column_of(self, number: int, parts: int) -> int:
        """The first column of the `number`-th block of 16 among those that are one of `parts`'s.

        Each part has as much of every span; the first part's are meant.
        """
        blocks = self.span // parts // MATRIX
        assert blocks * parts * MATRIX == self.span, "whole blocks"
        return number // blocks * self.span + number % blocks * MATRIX

    def first_column(self, part, parts: int):
        """How much farther to the right those of `part` are."""
        return part * (self.span // parts)


@dataclass(frozen=True)
class Lanes:
    """A lane's addresses in the blocks of a span, of any tile with spans of that width."""

    addresses: list[Int32]

    @staticmethod
    def of(shared: Int32, lane: Int32, span: int, across: bool, column: Any = None) -> "Lanes":
        """`shared`: where the block's shared memory begins; `column`: to the right by so many.

        `across`: the quarters of a block come in the order (0, 0), (0, 8), (8, 0), (8, 8), and not
        (0, 0), (8, 0), (0, 8), (8, 8): pairs that an mma.sync takes must be in adjacent registers.
        """
        layout, half, quarter = SharedTile(0, MATRIX, span), lane >> 3 & 1, lane >> 4
        down, right = (quarter, half) if across else (half, quarter)
        first = shared + layout.place((lane & 7) + 8 * down, right)
        first = opaque(first if column is None else first ^ 2 * column)
        return Lanes([first ^ (32 * i) for i in range(span // MATRIX)])

    def load(self, tile: SharedTile, row: int, column: int, transposed: bool = False) -> list:
        """The quarters of the 16 x 16 block at (row, column)."""
        which, constant = tile.block(row, column)
        return ldmatrix(self.addresses[which], constant, transposed)


@dsl_user_op
def ldmatrix(address: Int32, constant: int, transposed: bool, *, loc=None, ip=None) -> list[Int32]:
    """Four 8 x 8 matrices, a word of each; lane l has the address of row l % 8 of matrix l / 8."""
    trans = ".trans" if transposed else ""
    words = llvm.inline_asm(
        llvm.StructType.get_literal([T.i32()] * 4),
        [address.ir_value(loc=loc, ip=ip)],
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4 + {constant}];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def store_word(address: Int32, constant: int, word: Int32, *, loc=None, ip=None) -> None:
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (address, word)],
        f"st.shared.b32 [$0 + {constant}], $1;",
        "r,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@dataclass(frozen=True)
class TileCopy:
    """How `threads` copy a tile from global memory: each some chunks of every n-th row."""

    tile: SharedTile
    threads: int

    @property
    def row_threads(self) -> int:
        """Threads side by side: whole spans, and at least 8 rows at a time, to keep the swizzle."""
        chunks = self.tile.columns // CHUNK
        return min(chunks & -chunks, 2 * self.tile.span_chunks, self.threads // 8)

    @property
    def rows_at_once(self) -> int:
        return self.threads // self.row_threads

    @property
    def row_steps(self) -> int:
        assert self.tile.rows % self.rows_at_once == 0
        return self.tile.rows // self.rows_at_once

    @property
    def column_steps(self) -> int:
        return self.tile.columns // CHUNK // self.row_threads

    def row(self, thread, step: int):
        return split(thread, self.row_threads)[0] + step * self.rows_at_once

    def column(self, thread, step: int):
        """First of a chunk."""
        return (split(thread, self.row_threads)[1] + step * self.row_threads) * CHUNK

    def columns(self, thread, width) -> list[Any]:
        """Say for each step whether its chunk exists."""
        return [self.column(thread, step) < width for step in range(self.column_steps)]

    def place(self, thread):
        """The address of this thread's first chunk, from the block's shared memory."""
        return self.tile.start + self.tile.place(*split(thread, self.row_threads))

    def constant(self, row_step: int, column_step: int) -> int:
        """The offset of the other chunks."""
        row_bytes = 2 * self.tile.span
        spans = column_step * self.row_threads // self.tile.span_chunks
        return row_bytes * (row_step * self.rows_at_once + spans * self.tile.rows)

    def copy(
        self,
        shared: Int32,
        row_step: int,
        source: Int64,
        columns: list[Any],
        present: Any = None,
    ) -> None:
        """One row's chunks, by one thread; asynchronous.

        `shared`: of `place`, as an address.  `source`: address of the thread's first chunk of the
        row.  `columns`: whether the chunk of each column step exists; where it does not, nothing is
        written.  With `present`, all is written: zeros unless both row and column exist.
        """
        for step, exists in enumerate(columns):
            constant = self.constant(row_step, step)
            offset = 2 * CHUNK * self.row_threads * step
            if present is None:
                copy_chunk(shared, constant, source, offset, exists)
            else:
                copy_chunk_or_zeros(shared, constant, source, offset, present & exists)


CACHING = "cp.async.cg.shared.global.L2::128B"


@dsl_user_op
def copy_chunk(shared, constant: int, source, offset: int, wanted, *, loc=None, ip=None) -> None:
    """16 bytes from `source` + offset to `shared` + constant, if wanted."""
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (shared, source, Int32(wanted))],
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
        f"@p {CACHING} [$0 + {constant}], [$1 + {offset}], 16; }}",
        "r,l,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def copy_chunk_or_zeros(
    shared, constant: int, source, offset: int, wanted, *, loc=None, ip=None
) -> None:
    """Copy a chunk, or zeros where it is not wanted; the source is not read then."""
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (shared, source, Int32(wanted) * 16)],
        f"{CACHING} [$0 + {constant}], [$1 + {offset}], 16, $2;",
        "r,l,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
