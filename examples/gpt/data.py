"""Text as an endless stream of packed batches, a pure function of seed and position.

An epoch is all pieces (documents, cut to the context's length) in an order of its own.  Batch after
batch takes the next `tokens` bytes of the stream, so a position, a count of tokens, is all that a
checkpoint needs of it, whatever the number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hopper_attention.errors import UserError

BOUNDARY = 0
"""The byte before and after every document."""
VALIDATION_SHARE = 10
"""One in so many documents is not trained on."""


class Packing(NamedTuple):
    """The places of a batch's sequences."""

    positions: Tensor
    """(tokens,) int64: of each token in its sequence, from 0."""
    cu_seqlens: Tensor
    """(sequences + 1,) int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]."""
    slots: Tensor
    """(tokens,) int64: the token's row where every sequence is padded to `context`."""
    sequences: int
    context: int
    """No sequence is longer."""
    full: bool
    """Every sequence is exactly that long."""

    @staticmethod
    def of(
        lengths: Sequence[int], context: int, sequences: int | None = None, full: bool = False
    ) -> Packing:
        """The packing of sequences of these lengths, with empty ones behind up to `sequences`."""
        sequences = len(lengths) if sequences is None else sequences
        padded = np.zeros(sequences, dtype=np.int64)
        padded[: len(lengths)] = lengths
        ends = np.cumsum(padded)
        starts = np.repeat(ends - padded, padded)
        positions = np.arange(len(starts)) - starts
        slots = np.repeat(np.arange(sequences), padded) * context + positions
        cu_seqlens = np.concatenate(([0], ends)).astype(np.int32)
        tensors = [torch.from_numpy(x) for x in (positions, cu_seqlens, slots)]
        return Packing(tensors[0], tensors[1], tensors[2], sequences, context, full)

    def to(self, device: torch.device) -> Packing:
        positions, cu_seqlens, slots = (x.to(device) for x in self[:3])
        return self._replace(positions=positions, cu_seqlens=cu_seqlens, slots=slots)


class Batch(NamedTuple):
    ids: Tensor
    """(tokens,) int64."""
    targets: Tensor
    """(tokens,) int64: the byte after each."""
    packing: Packing

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.targets.to(device), self.packing.to(device))


@dataclass(frozen=True)
class Corpus:
    """Documents behind one another, a boundary before and after each."""

    name: str
    data: np.ndarray
    """uint8."""
    starts: np.ndarray
    """The first boundary of each document; its inputs end before its last boundary."""
    lengths: np.ndarray
    """Inputs of each document: its first boundary and its bytes."""

    @staticmethod
    def of(name: str, documents: Sequence[bytes]) -> Corpus:
        edge = bytes([BOUNDARY])
        lengths = np.array([len(document) + 1 for document in documents], dtype=np.int64)
        data = np.frombuffer(b"".join(edge + d + edge for d in documents), dtype=np.uint8)
        starts = np.concatenate(([0], np.cumsum(lengths + 1)[:-1]))
        return Corpus(name, data, starts, lengths)

    def __len__(self) -> int:
        return int(self.lengths.sum())


def read_documents(files: Sequence[Path]) -> list[bytes]:
    """Each file, or each of CPython's help topics, is a document."""
    if not files:
        return [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    documents = [file.read_bytes() for file in files]
    for file, document in zip(files, documents):
        if not document:
            raise UserError(f"{file} is empty")
    return documents


def split(documents: Sequence[bytes], seed: int) -> tuple[list[bytes], list[bytes]]:
    """(training, validation) documents; of a single one the end is for validation."""
    if len(documents) == 1:
        cut = len(documents[0]) - len(documents[0]) // VALIDATION_SHARE
        if cut == len(documents[0]):
            raise UserError(f"{cut} bytes of text are too few to keep some for validation")
        return [documents[0][:cut]], [documents[0][cut:]]
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    held_out = max(1, len(documents) // VALIDATION_SHARE)
    return [documents[i] for i in order[held_out:]], [documents[i] for i in order[:held_out]]


class TokenStream:
    def __init__(
        self,
        corpus: Corpus,
        *,
        tokens: int,
        context: int,
        seed: int,
        full_context: bool = False,
        fixed_shapes: bool = False,
    ):
        """Batches of exactly `tokens` tokens, in sequences of at most `context`.

        `full_context`: the corpus is one long document, cut to sequences of exactly `context`.
        `fixed_shapes`: all batches have the same number of sequences, the last ones empty, so that
        a compiled model sees tensors of the same shapes in every step.
        """
        if full_context and tokens % context:
            raise UserError(f"{tokens} tokens are no multiple of the context, {context}")
        self.corpus, self.tokens, self.context, self.seed = corpus, tokens, context, seed
        self.full_context = full_context
        self.pieces = _rows(corpus, context) if full_context else _pieces(corpus, context)
        if not len(self.pieces):
            size = len(corpus.data)
            raise UserError(f"{corpus.name} has {size} bytes, less than one context of {context}")
        self.epoch_tokens = int(self.pieces[:, 1].sum())
        self.sequences = self._most_sequences() if fixed_shapes else None
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def batch(self, position: int) -> Batch:
        """Tokens `position` to `position + tokens` of the stream.

        A piece that crosses either end is cut there; its rest is a sequence of the next batch.
        """
        taken = []  # (start in the corpus, length)
        epoch, offset = divmod(position, self.epoch_tokens)
        left = self.tokens
        while left:
            pieces, ends = self._epoch(epoch)
            index = int(np.searchsorted(ends, offset, side="right"))
            while left and index < len(pieces):
                start, length = pieces[index].tolist()
                skipped = length - (int(ends[index]) - offset)
                length = min(length - skipped, left)
                taken.append((start + skipped, length))
                offset, left, index = offset + length, left - length, index + 1
            epoch, offset = epoch + 1, 0
        rows = np.concatenate([np.arange(start, start + length) for start, length in taken])
        ids, targets = (torch.from_numpy(self.corpus.data[r].astype(int)) for r in (rows, rows + 1))
        lengths = [length for _, length in taken]
        return Batch(
            ids, targets, Packing.of(lengths, self.context, self.sequences, self.full_context)
        )

    @property
    def fingerprint(self) -> str:
        """Equal for streams that hold the same tokens at the same positions."""
        settings = f"{self.seed} {self.context} {self.full_context}".encode()
        return hashlib.blake2b(self.corpus.data.tobytes() + settings, digest_size=16).hexdigest()

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(pieces, where each ends in the epoch) in the epoch's order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pieces))
        pieces = self.pieces[order]
        return pieces, np.cumsum(pieces[:, 1])

    def _most_sequences(self) -> int:
        """No batch has more: the shortest pieces, of all epochs it may touch, and two cut ones."""
        epochs = self.tokens // self.epoch_tokens + 2
        shortest = np.sort(np.repeat(self.pieces[:, 1], epochs)).cumsum()
        return int(np.searchsorted(shortest, self.tokens, side="right")) + 2


def _pieces(corpus: Corpus, context: int) -> np.ndarray:
    """(start, length) of documents, cut after every `context` tokens."""
    pieces = [
        (start + offset, min(context, length - offset))
        for start, length in zip(corpus.starts.tolist(), corpus.lengths.tolist())
        for offset in range(0, length, context)
    ]
    return np.array(pieces, dtype=np.int64)


def _rows(corpus: Corpus, context: int) -> np.ndarray:
    """(start, context) of all full rows of the corpus as one document; its end is left out."""
    starts = np.arange(0, len(corpus.data) - context, context, dtype=np.int64)
    return np.stack((starts, np.full_like(starts, context)), axis=1)
