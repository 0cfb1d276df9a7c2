"""Block ranges and the tile scheduler, on Python integers, against enumeration."""

from __future__ import annotations

import pytest
from hopper_attention.cute_kernels.block_range import BlockRange
from hopper_attention.cute_kernels.tile_scheduler import L2_BYTES, TileScheduler
from hypothesis import given
from hypothesis import strategies as st

TILE_M, TILE_N = 12, 5


def visible(row: int, key: int, seqlen_q: int, seqlen_k: int, causal: bool) -> bool:
    return key < seqlen_k and (not causal or key <= row + seqlen_k - seqlen_q)


@given(st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_block_range_is_tight(seqlen_q, seqlen_k, causal):
    for m_block in range((seqlen_q + TILE_M - 1) // TILE_M):
        found = BlockRange.of(m_block, seqlen_q, seqlen_k, TILE_M, TILE_N, causal)
        rows = range(m_block * TILE_M, (m_block + 1) * TILE_M)
        blocks = range((seqlen_k + TILE_N - 1) // TILE_N)

        def seen(block, rows=rows):
            keys = range(block * TILE_N, (block + 1) * TILE_N)
            return [visible(r, j, seqlen_q, seqlen_k, causal) for r in rows for j in keys]

        assert found.count == sum(any(seen(b)) for b in blocks)
        assert found.unmasked == sum(all(seen(b)) for b in blocks)


@given(
    seqlen_q=st.integers(1, 50),
    seqlen_k=st.integers(0, 40000),
    group=st.integers(1, 4),
    heads_kv=st.integers(1, 5),
    batch=st.integers(1, 4),
)
def test_every_tile_once(seqlen_q, seqlen_k, group, heads_kv, batch):
    heads = group * heads_kv
    scheduler = TileScheduler.create(
        seqlen_q, seqlen_k, heads, heads_kv, batch, TILE_M, key_bytes=512
    )
    tiles = [scheduler.tile(i) for i in range(scheduler.blocks)]
    m_blocks = (seqlen_q + TILE_M - 1) // TILE_M
    everything = {(m, h, b) for m in range(m_blocks) for h in range(heads) for b in range(batch)}
    assert len(tiles) == len(everything)
    assert {(t.m_block, t.head, t.batch) for t in tiles} == everything


def test_sections_share_l2_and_run_longest_first():
    seqlen_k, key_bytes = 16384, 512
    scheduler = TileScheduler.create(4 * TILE_M, seqlen_k, 16, 4, 2, TILE_M, key_bytes)
    resident = L2_BYTES // (seqlen_k * key_bytes)
    tiles = [scheduler.tile(i) for i in range(scheduler.blocks)]
    section = resident * 4  # query heads of `resident` key heads
    for start in range(0, len(tiles), section * 4):
        of_section = tiles[start : start + section * 4]
        assert [t.m_block for t in of_section] == sorted(
            (t.m_block for t in of_section), reverse=True
        )
        assert len({(t.batch, t.head // 4) for t in of_section}) <= resident


@pytest.mark.parametrize("seqlen_k", [0, 1, 2**31 - 1])
def test_extreme_lengths_keep_a_section(seqlen_k):
    assert TileScheduler.create(1, seqlen_k, 8, 1, 1, TILE_M, 1024).section >= 1
