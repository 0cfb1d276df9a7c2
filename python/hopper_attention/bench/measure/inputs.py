"""Tensors of a problem: random normal, as every published figure assumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.bench.data.workloads import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Inputs:
    """Queries are (batch, seqlen_q, heads, d), keys and values (batch, seqlen, heads_kv, d).

    Packed: (total, heads, d) with cu_seqlens (batch + 1), int32.  Paged: keys and values are
    (pages, page_size, heads_kv, d) with page_table (batch, pages of a sequence), int32.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor | None = None
    """(like out), for backward only."""
    cu_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    sink: Tensor | None = None
    """(heads), in natural-log units of a score."""

    @staticmethod
    def make(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[problem.dtype]

        def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
            wide = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            return wide.to(like)

        p = problem
        cu_seqlens = page_table = None
        lead_q: tuple[int, ...] = (p.batch, p.seqlen_q)
        lead_k: tuple[int, ...] = (p.batch, p.seqlen)
        if p.lengths:
            ends = torch.tensor((0, *p.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
            cu_seqlens = ends.to(device)
            lead_q = lead_k = (sum(p.lengths),)
        elif p.page_size:
            pages = p.batch * -(-p.seqlen // p.page_size)
            order = torch.randperm(pages, generator=generator, device=device)
            page_table = order.view(p.batch, -1).int()
            lead_k = (pages, p.page_size)
        backward = p.direction == "backward"
        return Inputs(
            problem,
            q=normal(*lead_q, p.heads, p.head_dim).requires_grad_(backward),
            k=normal(*lead_k, p.heads_kv, p.head_dim).requires_grad_(backward),
            v=normal(*lead_k, p.heads_kv, p.head_dim_v).requires_grad_(backward),
            grad_out=normal(*lead_q, p.heads, p.head_dim_v) if backward else None,
            cu_seqlens=cu_seqlens,
            page_table=page_table,
            sink=normal(p.heads, like=torch.bfloat16) if p.sink else None,
        )

    def queries(self, like_q: Tensor, sequence: int) -> Tensor:
        """(queries, heads, d) of one sequence, of q or what has its layout (out, its gradient)."""
        if self.cu_seqlens is not None:
            start, end = self.cu_seqlens[sequence : sequence + 2].tolist()
            return like_q[start:end]
        return like_q[sequence]

    def keys(self, like_k: Tensor, sequence: int) -> Tensor:
        """(keys, heads_kv, d) of one sequence, of k, v, or what has their layout."""
        if self.page_table is not None:
            return like_k[self.page_table[sequence].long()].flatten(0, 1)[: self.problem.seqlen]
        return self.queries(like_k, sequence)

    def samples(self, count: int, seed: int = 0) -> Iterator[tuple[int, int]]:
        """(sequence, key head) pairs to check, the last sequence among them."""
        generator = torch.Generator().manual_seed(seed)
        sequences = len(self.problem.sequences)
        for index in range(count):
            chosen = torch.randint(sequences, (), generator=generator).item()
            head = torch.randint(self.problem.heads_kv, (), generator=generator).item()
            yield (sequences - 1 if index == 0 else int(chosen)), int(head)
