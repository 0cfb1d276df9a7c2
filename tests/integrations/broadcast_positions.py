"""Two processes of test_transformers_stale: positions that one sends and the other attends with.

Without transformers, which takes long to import.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hopper_attention.integrations.transformers import attention_forward, make_mask

LENGTH = 12
BATCHES = ((3, 4, 5), (8, 4))


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def receive(rank: int, port: int, results: Any) -> None:
    """Put (rank, a figure for each batch: with a mask made ahead, with one of its own)."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16, dtype=torch.bfloat16)
    layer, ahead = torch.nn.Module(), make_mask(1, LENGTH, LENGTH)
    layer.is_causal = True
    buffer, figures = positions(BATCHES[0]), []
    try:
        for lengths in BATCHES:
            if rank == 0:
                buffer.data.copy_(positions(lengths))
            version = buffer._version
            dist.broadcast(buffer, 0)
            assert buffer._version == version  # why a version cannot tell batches apart
            for mask in (ahead, make_mask(1, LENGTH, LENGTH)):
                out, _ = attention_forward(layer, q, k, v, mask, position_ids=buffer)
                figures.append(out.float().square().sum().item())
        results.put((rank, figures))
    finally:
        dist.destroy_process_group()
