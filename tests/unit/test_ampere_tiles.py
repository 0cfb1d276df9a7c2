"""Shared memory of the Ampere kernels, on Python integers: places, banks, what threads copy."""

from __future__ import annotations

import pytest
from hopper_attention.cute_kernels.ampere.config import (
    BACKWARD_TILES,
    FORWARD_TILES,
    HOPPER_BACKWARD_TILES,
    HOPPER_FORWARD_TILES,
    AmpereBackwardConfig,
    AmpereForwardConfig,
)
from hopper_attention.cute_kernels.ampere.mma import Coordinates
from hopper_attention.cute_kernels.ampere.shared_tile import CHUNK, SharedTile, TileCopy
from hopper_attention.cute_kernels.hardware import SHARED_MEMORY

TILES = [(rows, columns) for rows in (48, 64, 128) for columns in (64, 96, 128, 192, 256)]


@pytest.mark.parametrize(("rows", "columns"), TILES)
def test_places(rows, columns):
    """Every chunk has one, 16 bytes apart; reads and writes of eight chunks are in all banks."""
    tile = SharedTile(1024, rows, columns)
    chunks = columns // CHUNK
    places = {(row, c): tile.place(row, c) for row in range(rows) for c in range(chunks)}
    assert sorted(places.values()) == list(range(0, tile.bytes, 16))
    for first in range(0, rows, 8):
        for chunk in range(chunks):
            matrix = {places[first + i, chunk] // 16 % 8 for i in range(8)}
            assert len(matrix) == 8, "ldmatrix"


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("across", [False, True])
def test_places_in_a_block_follow_from_those_in_the_first(rows, columns, across):
    """A lane's place in a block is its place in the first one, xor a few bits, plus a constant."""
    tile, first = SharedTile(0, rows, columns), SharedTile(0, 16, 64 if columns % 64 == 0 else 32)
    for lane in range(32):
        half, quarter = lane >> 3 & 1, lane >> 4
        down, right = (quarter, half) if across else (half, quarter)
        row, chunk = lane % 8 + 8 * down, right
        for r in range(0, rows, 16):
            for c in range(0, columns, 16):
                which, constant = tile.block(r, c)
                address = (first.place(row, chunk) ^ 32 * which) + constant
                assert address == tile.place(r + row, c // CHUNK + chunk)


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("threads", [128, 256])
def test_threads_copy_every_chunk_once(rows, columns, threads):
    tile = SharedTile(2048, rows, columns)
    copy = TileCopy(tile, threads)
    if rows % copy.rows_at_once:
        pytest.skip("no instance has it")
    copied = {}
    for thread in range(threads):
        for i in range(copy.row_steps):
            for j in range(copy.column_steps):
                row, column = copy.row(thread, i), copy.column(thread, j)
                place = copy.place(thread) + copy.constant(i, j)
                assert place == tile.start + tile.place(row, column // CHUNK)
                copied[row, column] = thread
                # What `copy` adds to the thread's first address in a row.
                assert column - copy.column(thread, 0) == CHUNK * copy.row_threads * j
    assert len(copied) == rows * columns // CHUNK
    quarter = {copy.place(thread) // 16 % 8 for thread in range(8)}
    assert len(quarter) == 8, "eight lanes write to all banks"


def test_coordinates():
    """Those of mma.sync's C, for every row block and column block; each element once."""
    seen = set()
    for lane in range(32):
        coordinates = Coordinates(32, lane)
        for i in range(4):
            for j in range(8):
                row, column = coordinates[i, j]
                assert row == 32 + 16 * (i // 2) + 8 * (i % 2) + lane // 4
                assert column == 8 * (j // 2) + 2 * (lane % 4) + j % 2
                seen.add((row, column))
    assert len(seen) == 32 * 32


def test_every_device_has_room_for_every_head_dim():
    kinds = ((AmpereForwardConfig, FORWARD_TILES), (AmpereBackwardConfig, BACKWARD_TILES))
    for config, of_dims in kinds:
        for dims, tiles in of_dims.items():
            least = min(config("bf16", *dims, *tile).shared_memory_bytes for tile in tiles)
            assert least <= min(SHARED_MEMORY.values())
    assert set(HOPPER_FORWARD_TILES) == set(FORWARD_TILES)
    assert set(HOPPER_BACKWARD_TILES) == set(BACKWARD_TILES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "e4m3"}, "e4m3"),
        ({"head_dim": 72}, "whole swizzle spans"),
        ({"head_dim": 96}, "spans of one width"),
        ({"tile_m": 96}, "whole matrices a warp"),
        ({"tile_n": 40}, "40"),
        ({"tile_m": 256}, "a thread finds"),
        ({"tile_n": 512}, "shared|[0-9]+"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    good = {"dtype": "bf16", "head_dim": 128, "head_dim_v": 128, "tile_m": 128, "tile_n": 64}
    with pytest.raises(AssertionError, match=message):
        AmpereForwardConfig(**{**good, "warps": 4, **change})
