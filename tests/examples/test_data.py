"""The stream of packed batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import examples

from gpt.data import BOUNDARY, Corpus, Packing, TokenStream, read_documents, split
from hopper_attention.errors import UserError

documents = st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6)


def stream(texts: list[bytes], tokens: int, context: int, **options: bool) -> TokenStream:
    return TokenStream(Corpus.of("text", texts), tokens=tokens, context=context, seed=1, **options)


@examples(60)
@given(documents, st.integers(1, 90), st.integers(1, 40), st.integers(0, 500), st.booleans())
def test_sequences_fill_the_batch_and_fit_the_context(texts, tokens, context, position, fixed):
    ids, targets, packing = stream(texts, tokens, context, fixed_shapes=fixed).batch(position)
    lengths = packing.cu_seqlens.diff()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens[0] == 0 and packing.cu_seqlens[-1] == tokens
    assert len(ids) == len(targets) == len(packing.positions) == tokens
    assert (lengths >= 0).all() and (lengths <= context).all()
    assert packing.sequences == len(lengths)
    if not fixed:
        assert (lengths > 0).all()
    empty = (lengths == 0).tolist()
    assert empty == sorted(empty)  # behind
    expected = [torch.arange(n) for n in lengths.tolist()]
    torch.testing.assert_close(packing.positions, torch.cat(expected))


@examples(60)
@given(documents, st.integers(1, 90), st.integers(1, 40), st.integers(0, 500))
def test_every_sequence_is_a_part_of_one_document(texts, tokens, context, position):
    ids, targets, packing = stream(texts, tokens, context).batch(position)
    edge = bytes([BOUNDARY])
    bounded = [edge + text + edge for text in texts]
    for start, end in zip(packing.cu_seqlens, packing.cu_seqlens[1:]):
        part = bytes([*ids[start:end].tolist(), int(targets[end - 1])])
        assert any(part in document for document in bounded)
        assert part[1:] == bytes(targets[start:end].tolist())


@examples(30)
@given(documents, st.integers(1, 50), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_has_every_target_once(texts, tokens, context, epoch):
    whole = stream(texts, tokens, context)
    everything = stream(texts, whole.epoch_tokens, context)
    _, targets, _ = everything.batch(epoch * whole.epoch_tokens)
    wanted = np.frombuffer(b"".join(text + bytes([BOUNDARY]) for text in texts), dtype=np.uint8)
    assert sorted(targets.tolist()) == sorted(wanted.tolist())


@examples(30)
@given(documents, st.integers(1, 30), st.integers(1, 40), st.integers(0, 200))
def test_batches_continue_one_another(texts, tokens, context, position):
    """Two batches hold the tokens of one of twice the size, but for sequences cut in between."""
    small, large = stream(texts, tokens, context), stream(texts, 2 * tokens, context)
    first, second = small.batch(position), small.batch(position + tokens)
    both = large.batch(position)
    assert torch.equal(torch.cat((first.ids, second.ids)), both.ids)
    assert torch.equal(torch.cat((first.targets, second.targets)), both.targets)


@examples(30)
@given(documents, st.integers(1, 200), st.integers(1, 40))
def test_fixed_shapes_hold_every_batch(texts, tokens, context):
    fixed = stream(texts, tokens, context, fixed_shapes=True)
    shapes = {
        fixed.batch(position).packing.cu_seqlens.shape for position in range(0, 9 * tokens, tokens)
    }
    assert shapes == {(fixed.sequences + 1,)}


def test_full_context_is_rows_of_the_same_length():
    rows = stream([b"some text " * 20, b"more of it"], 64, 16, full_context=True)
    packing = rows.batch(128).packing
    assert packing.cu_seqlens.tolist() == [0, 16, 32, 48, 64]
    assert packing.full
    with pytest.raises(UserError, match="multiple of the context"):
        stream([b"text"], 60, 16, full_context=True)
    with pytest.raises(UserError, match="less than one context"):
        stream([b"text"], 64, 16, full_context=True)


def test_order_depends_on_seed_and_epoch_only():
    corpus = Corpus.of("text", read_documents(()))
    options = {"tokens": 512, "context": 64}
    a, b, c = (TokenStream(corpus, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(a.batch(10_000).ids, b.batch(10_000).ids)
    assert not torch.equal(a.batch(0).ids, c.batch(0).ids)
    assert not torch.equal(a.batch(0).ids, a.batch(a.epoch_tokens).ids)
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_no_document_is_on_both_sides():
    texts = read_documents(())
    training, validation = split(texts, seed=3)
    assert len(training) + len(validation) == len(texts)
    assert not set(training) & set(validation)
    assert split([b"0123456789"], seed=3) == ([b"012345678"], [b"9"])


def test_slots_are_rows_of_padded_sequences():
    packing = Packing.of([2, 0, 3], context=4, sequences=5)
    assert packing.slots.tolist() == [0, 1, 8, 9, 10]
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5, 5, 5]
