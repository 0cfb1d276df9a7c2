"""One process, or several under torchrun that share the parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gpt.model import GPT
from hopper_attention.errors import UserError


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """Return the mean over all ranks."""
        value = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value.item() / self.world


@contextmanager
def ranks(device: torch.device, distributed: bool) -> Iterator[Ranks]:
    """The process's place; with `distributed` as torchrun's environment says, on a GPU of its own.

    Raises UserError if torchrun did not start it.
    """
    if not distributed:
        yield Ranks(0, 1, device)
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError("start it with torchrun: torchrun --nproc-per-node 8 train_gpt.py --fsdp")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # nobody leaves while another may still need it
    finally:
        dist.destroy_process_group()


def shard(model: GPT, place: Ranks) -> None:
    """FSDP: each block gathers its parameters, as bf16, when it runs; float32 are the shards.

    Gradients are averaged over the ranks in float32.  Activations stay as autocast makes them.
    """
    mesh = init_device_mesh(place.device.type, (place.world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
