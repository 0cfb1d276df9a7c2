"""DTensor: how the operators may be split over a device mesh.

By heads (tensor parallelism), whatever the layout; by batch entries, where nothing is packed.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Sharding = tuple[list["Placement"], list["Placement | None"]]
"""Placements of the results and of the arguments along one mesh dimension; None: no tensor."""
LENGTHS = 4
"""Tensors of lengths, last of an operator's tensors: cu_seqlens of q and k, seqused of q and k."""


def register() -> bool:
    """Gives DTensor the rules, once, if it is in use: importing it takes half a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    _register()
    return True


# A compiler that traces the call makes it instead.  This is what assume_constant_result of
# torch.compiler sets, but that imports the compiler, which takes a second.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.hopper_attention
    register_sharding(operators.forward.default)(_forward)
    register_sharding(operators.backward.default)(_backward)


def _forward(q: Any, k: Any, v: Any, sink: Any, *rest: Any) -> list[Sharding]:
    """Arguments are the operator's, with a DTensorSpec for each tensor."""
    lengths, options = rest[:LENGTHS], rest[LENGTHS:]
    lse_dims = q.ndim - 1
    return _shardings(k, [q.ndim, lse_dims], [q, k, v, sink], lengths, len(options))


def _backward(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, sink: Any, *rest: Any
) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate

    lengths, options = rest[:LENGTHS], rest[LENGTHS:]
    tensors = [dout, dlse, out, lse, q, k, v, sink]
    found = _shardings(k, [q.ndim, k.ndim, v.ndim, 1], tensors, lengths, len(options))
    replicated, *split = found
    for results, arguments in split:
        if sink is None:
            results[3] = Replicate()  # nothing
        elif arguments[7] == Replicate():  # every rank's batch entries add to the sinks' gradient
            results[3] = Partial()
    return [replicated, *split]


def _shardings(
    k: Any, results: list[int], tensors: list[Any], lengths: tuple[Any, ...], scalars: int
) -> list[Sharding]:
    """Replicated, by heads, by batch entries; `results`: how many dimensions each result has."""
    from torch.distributed.tensor import Replicate, Shard

    def heads(dims: int) -> Placement:
        return Shard(max(dims - 2, 0))

    def batch(dims: int) -> Placement:
        return Shard(0) if dims > 1 else Replicate()  # sinks belong to no entry

    def sharding(place: Any, place_lengths: Placement) -> Sharding:
        arguments = [None if t is None else place(t.ndim) for t in tensors]
        index = [None if t is None else place_lengths for t in lengths]
        return [place(dims) for dims in results], [*arguments, *index, *[None] * scalars]

    found = [sharding(lambda _: Replicate(), Replicate())]
    # A group of heads stays together, even if every mesh dimension splits them.
    if k.shape[-2] % math.prod(k.mesh.shape) == 0:
        found.append(sharding(heads, Replicate()))
    cu_seqlens_q, cu_seqlens_k, *_ = lengths
    if cu_seqlens_q is None and cu_seqlens_k is None:
        found.append(sharding(batch, Shard(0)))
    return found
