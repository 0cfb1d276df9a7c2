"""MaskRange, block ranges and the dense scheduler, on Python integers, against enumeration."""

from __future__ import annotations

import pytest
from hopper_attention.cute_kernels.masks.visible_range import UNBOUNDED, BlockRange, MaskRange
from hopper_attention.cute_kernels.scheduling.sequence import TileRows
from hopper_attention.cute_kernels.scheduling.tile_scheduler import L2_BYTES, DenseScheduler
from hypothesis import given
from hypothesis import strategies as st

from hopper_attention.problem import values

TILE_M, TILE_N = 12, 5

sides = st.one_of(st.integers(0, 40), st.just(UNBOUNDED))
mask_ranges = st.builds(
    MaskRange,
    kind=st.sampled_from(("full", "causal", "local")),
    seqlen_q=st.integers(1, 60),
    seqlen_k=st.integers(0, 60),
    window_left=sides,
    window_right=sides,
    chunk=st.one_of(st.integers(1, 40), st.just(UNBOUNDED)),
)


def visible(mask: MaskRange, row: int, key: int) -> bool:
    """From the definition, not from `begin` and `end`."""
    aligned = row + mask.seqlen_k - mask.seqlen_q
    if not 0 <= key < mask.seqlen_k:
        return False
    if mask.kind == "full":
        return True
    if mask.kind == "causal":
        return key <= aligned
    in_window = aligned - mask.window_left <= key <= aligned + mask.window_right
    return in_window and key // mask.chunk == max(aligned, 0) // mask.chunk


@given(mask_ranges)
def test_begin_and_end_bound_what_is_visible(mask):
    for row in range(mask.seqlen_q):
        keys = [key for key in range(mask.seqlen_k) if visible(mask, row, key)]
        assert keys == list(range(max(mask.begin(row), 0), mask.end(row)))


@given(mask_ranges, st.integers(1, 5))
def test_blocks_cover_what_is_visible(mask, group):
    for m_block in range((mask.seqlen_q * group + TILE_M - 1) // TILE_M):
        found = BlockRange.of(mask, m_block, TILE_M, TILE_N, group)
        tile_rows = range(m_block * TILE_M, min((m_block + 1) * TILE_M, mask.seqlen_q * group))
        rows = {TileRows(group, 0, m_block * TILE_M).position(r - tile_rows[0]) for r in tile_rows}
        blocks = range((mask.seqlen_k + TILE_N - 1) // TILE_N)

        def seen(block, rows=rows):
            keys = range(block * TILE_N, (block + 1) * TILE_N)
            return [visible(mask, r, j) for r in rows for j in keys]

        needed = [b for b in blocks if any(seen(b))]
        visited = range(found.first, found.end)
        assert set(needed) <= set(visited)
        if needed:
            assert visited == range(needed[0], needed[-1] + 1)
        unmasked = range(found.unmasked_first, found.unmasked_end)
        assert set(unmasked) <= set(visited)
        assert set(unmasked) == {b for b in visited if all(seen(b))}


@given(mask_ranges, st.integers(1, 5))
def test_rows_of_a_tile_have_the_blocks_that_they_see(mask, group):
    parts = 3
    rows = TILE_M // parts
    for m_block in range((mask.seqlen_q * group + TILE_M - 1) // TILE_M):
        tile = BlockRange.of(mask, m_block, TILE_M, TILE_N, group)
        for part in range(parts):
            row_block = m_block * parts + part
            own = BlockRange.within(tile, mask, row_block, rows, TILE_N, group)
            own_rows = range(row_block * rows, (row_block + 1) * rows)
            queries = {row // group for row in own_rows if row < mask.seqlen_q * group}
            seen = [j for j in range(mask.seqlen_k) if any(visible(mask, i, j) for i in queries)]
            if seen:
                assert (own.first, own.end) == (seen[0] // TILE_N, seen[-1] // TILE_N + 1)
            else:
                assert own.first == own.end == tile.first
            assert tile.first <= own.first <= own.unmasked_first
            assert own.unmasked_first <= own.unmasked_end <= own.end <= tile.end
            unmasked = set(range(own.unmasked_first, own.unmasked_end))
            assert unmasked == {
                block
                for block in range(own.first, own.end)
                if all(visible(mask, i, block * TILE_N + j) for i in queries for j in range(TILE_N))
            }


@given(
    seqlen_q=st.integers(1, 50),
    seqlen_k=st.integers(0, 40000),
    group=st.integers(1, 4),
    heads_kv=st.integers(1, 5),
    batch=st.integers(1, 4),
)
def test_every_tile_once(seqlen_q, seqlen_k, group, heads_kv, batch):
    heads = group * heads_kv
    scheduler = DenseScheduler.create(
        seqlen_q, seqlen_k, heads, heads_kv, batch, TILE_M, key_bytes=512
    )
    tiles = [scheduler.tile(i) for i in range(scheduler.tiles)]
    m_blocks = (seqlen_q + TILE_M - 1) // TILE_M
    everything = {(m, h, b) for m in range(m_blocks) for h in range(heads) for b in range(batch)}
    assert len(tiles) == len(everything)
    assert {(t.m_block, t.head, t.batch) for t in tiles} == everything


def test_sections_share_l2_and_run_longest_first():
    seqlen_k, key_bytes = 16384, 512
    scheduler = DenseScheduler.create(4 * TILE_M, seqlen_k, 16, 4, 2, TILE_M, key_bytes)
    resident = L2_BYTES // (seqlen_k * key_bytes)
    tiles = [scheduler.tile(i) for i in range(scheduler.tiles)]
    section = resident * 4  # query heads of `resident` key heads
    for start in range(0, len(tiles), section * 4):
        of_section = tiles[start : start + section * 4]
        m_blocks = [t.m_block for t in of_section]
        assert m_blocks == sorted(m_blocks, reverse=True)
        assert len({(t.batch, t.head // 4) for t in of_section}) <= resident


@pytest.mark.parametrize("seqlen_k", [0, 1, 2**31 - 1])
def test_extreme_lengths_keep_a_section(seqlen_k):
    assert DenseScheduler.create(1, seqlen_k, 8, 1, 1, TILE_M, 1024).section >= 1


def test_the_kernels_and_the_package_mean_the_same_by_unbounded():
    assert UNBOUNDED == values.UNBOUNDED


def test_sections_fit_32_bits():
    scheduler = DenseScheduler.create(400, 1, 20000, 1, 1, 192, 512)
    assert scheduler.section == 20000


@given(mask_ranges)
def test_viewers_are_visibility_transposed(mask):
    for key in range(mask.seqlen_k + 3):
        rows = [row for row in range(mask.seqlen_q) if visible(mask, row, key)]
        begin, end = (
            max(mask.transposed.begin(key), 0),
            min(mask.transposed.end(key), mask.seqlen_q),
        )
        assert rows == list(range(begin, end))


@given(mask_ranges)
def test_pairs_of_blocks_are_the_same_from_both_sides(mask):
    m_blocks = (mask.seqlen_q + TILE_M - 1) // TILE_M
    n_blocks = (mask.seqlen_k + TILE_N - 1) // TILE_N
    by_query = {m: BlockRange.of(mask, m, TILE_M, TILE_N) for m in range(m_blocks)}
    for n in range(n_blocks):
        found = BlockRange.of_keys(mask.transposed, n, TILE_N, TILE_M)
        visited = range(found.first, found.end)
        assert list(visited) == [m for m, by in by_query.items() if by.first <= n < by.end]
        for m in range(found.unmasked_first, found.unmasked_end):
            rows = range(m * TILE_M, min((m + 1) * TILE_M, mask.seqlen_q))
            keys = range(n * TILE_N, (n + 1) * TILE_N)
            assert all(visible(mask, row, key) for row in rows for key in keys)
