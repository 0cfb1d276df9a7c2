"""Attention of DTensors on two ranks, against the same call on whole tensors.

Run by torchrun; any rank that finds a difference exits with an error.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hopper_attention import flash_attn_func, flash_attn_varlen_func

HEADS_DENSE, HEADS_PACKED, BATCH = Shard(2), Shard(1), Shard(0)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


def dense(q, k, v, sink):
    return flash_attn_func(q, k, v, causal=True, learnable_sink=sink, return_lse=True)


def packed(q, k, v, sink):
    cu_seqlens = torch.tensor((0, 5, 5, 12), dtype=torch.int32)
    if isinstance(q, DTensor):
        cu_seqlens = DTensor.from_local(cu_seqlens, q.device_mesh, [Replicate()])
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, 7, 7, learnable_sink=sink, return_lse=True
    )


def loss(out, lse):
    return out.float().sin().sum() + lse.cos().sum()


def check(mesh, attention, inputs, placements, out_placement, communication):
    """`communication`: whether the forward call has to move tensors; None: not looked at."""
    expected = attention(*inputs)
    exact = torch.autograd.grad(loss(*expected), inputs)
    split = [
        distribute_tensor(x.detach(), mesh, [p]).requires_grad_()
        for x, p in zip(inputs, placements, strict=True)
    ]
    if communication is None:
        out, lse = attention(*split)
    else:
        with CommDebugMode() as traffic:
            out, lse = attention(*split)
        assert (traffic.get_total_counts() > 0) == communication, traffic.get_comm_counts()
    assert out_placement in (None, *out.placements), out.placements
    assert torch.equal(out.full_tensor(), expected[0])
    assert torch.equal(lse.full_tensor(), expected[1])
    gradients = torch.autograd.grad(loss(out, lse), split)
    for gradient, true in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.full_tensor(), true)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = Replicate()
    inputs = leaves((2, 9, 4, 64), (2, 11, 2, 64), (2, 11, 2, 64)) + [
        torch.randn(4, requires_grad=True)
    ]
    by_heads, by_batch = [HEADS_DENSE] * 3 + [Shard(0)], [BATCH] * 3 + [whole]
    check(mesh, dense, inputs, by_heads, HEADS_DENSE, False)
    check(mesh, dense, inputs, by_batch, BATCH, False)
    check(mesh, dense, inputs, [whole] * 4, whole, False)
    # Sequences cannot be split: they are gathered.
    check(mesh, dense, inputs, [Shard(1)] * 3 + [whole], whole, True)
    # Three key heads do not divide by two ranks.
    odd = leaves((2, 9, 6, 64), (2, 11, 3, 64), (2, 11, 3, 64)) + [
        torch.randn(6, requires_grad=True)
    ]
    check(mesh, dense, odd, by_batch, BATCH, False)
    check(mesh, dense, odd, by_heads, None, True)
    inputs = leaves((12, 4, 64), (12, 2, 64), (12, 2, 64)) + [torch.randn(4, requires_grad=True)]
    check(mesh, packed, inputs, [HEADS_PACKED] * 3 + [Shard(0)], HEADS_PACKED, False)
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")

    def attention(*tensors):
        return (compiled if isinstance(tensors[0], DTensor) else dense)(*tensors)

    inputs = leaves((2, 9, 4, 64), (2, 9, 2, 64), (2, 9, 2, 64))
    inputs.append(torch.randn(4, requires_grad=True))
    # No compiler works under the mode that counts.
    check(mesh, attention, inputs, by_heads, HEADS_DENSE, None)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may outlive the group, and C++ aborts if the interpreter's end finds them.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
