"""DTensor: how the operators may be split over a device mesh.

By heads (tensor parallelism), whatever the layout; by batch entries, where nothing is packed.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any

import torch

from hopper_attention.problem.values import INDEX_TENSORS, Gradients, Inputs
from hopper_attention.torch_ops.schema import BACKWARD, FORWARD, Signature

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Sharding = tuple[list["Placement"], list["Placement | None"]]
"""Placements of the results and of the arguments along one mesh dimension; None: no tensor."""


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


def _forward(*arguments: Any) -> list[Sharding]:
    """Arguments are the operator's, with a DTensorSpec for each tensor."""
    inputs, _ = FORWARD.groups_of(arguments)
    return _shardings(FORWARD, arguments, inputs, [inputs.q.ndim, inputs.q.ndim - 1])


def _backward(*arguments: Any) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate

    _, inputs, _ = BACKWARD.groups_of(arguments)
    dims = [inputs.q.ndim, inputs.k.ndim, inputs.v.ndim, 1]
    replicated, *split = _shardings(BACKWARD, arguments, inputs, dims)
    found = [replicated]
    for results, placements in split:
        gradients = dict(zip(Gradients._fields, results, strict=True))
        sink = BACKWARD.tensors(placements)["learnable_sink"]
        if sink is None:
            gradients["dsink"] = Replicate()  # nothing
        elif sink == Replicate():  # every rank's batch entries add to the sinks' gradient
            gradients["dsink"] = Partial()
        found.append((list(gradients.values()), placements))
    return found


def _shardings(
    signature: Signature, arguments: tuple[Any, ...], inputs: Inputs, results: list[int]
) -> list[Sharding]:
    """Replicated, by heads, by batch entries; `results`: how many dimensions each result has."""
    from torch.distributed.tensor import Replicate, Shard

    tensors = signature.tensors(arguments)

    def heads(dims: int) -> Placement:
        return Shard(max(dims - 2, 0))

    def batch(dims: int) -> Placement:
        return Shard(0) if dims > 1 else Replicate()  # sinks belong to no entry

    def sharding(place: Any, place_index: Placement) -> Sharding:
        def placement(name: str) -> Placement | None:
            spec = tensors.get(name)
            if spec is None:
                return None
            return place_index if name in INDEX_TENSORS else place(spec.ndim)

        return [place(dims) for dims in results], [placement(name) for name in signature.types]

    found = [sharding(lambda _: Replicate(), Replicate())]
    # A group of heads stays together, even if every mesh dimension splits them.
    if inputs.k.shape[-2] % math.prod(inputs.k.mesh.shape) == 0:  # type: ignore[attr-defined]
        found.append(sharding(heads, Replicate()))
    if inputs.packed == (False, False):
        found.append(sharding(batch, Shard(0)))
    return found
