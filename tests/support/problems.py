"""Problems of tests, on the simulator and on a GPU: cases with their shapes, windows and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hopper_attention.dispatch import manifest

Arguments = dict[str, Any]
"""Arguments of the public function."""
Pairs = Sequence[tuple[int, int]]
"""(seqlen_q, seqlen_k) of every sequence."""

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int

    def __str__(self) -> str:
        return f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{self.heads}-{self.heads_kv}"


SHAPES = (
    Shape(2, 97, 131, 4, 1),  # MQA
    Shape(1, 203, 113, 2, 2),  # causal: rows without keys
    Shape(1, 1, 509, 3, 1),  # one query, a prime number of keys
    Shape(1, 113, 203, 2, 1),
    Shape(1, 256, 384, 4, 2),  # GQA, every block full
    Shape(1, 1, 1, 1, 1),
    Shape(2, 64, 64, 1, 1),
    Shape(1, 0, 128, 2, 1),
    Shape(1, 128, 0, 2, 1),
    Shape(1, 389, 1, 2, 1),  # more than one row block, one key
)
FEW_SHAPES = SHAPES[:3]

PACKED = (
    # Empty sequences in front, between, behind; on either side.
    ((0, 0), (64, 64), (113, 203), (0, 5), (1, 1), (7, 0), (203, 113), (0, 0)),
    tuple((1 + i % 3, 40 - i) for i in range(37)),  # more sequences than lanes
)

WINDOWS: tuple[Arguments, ...] = (
    {"window_size": (37, 0)},
    {"window_size": (50, 20)},
    {"window_size": (-1, 7)},
    {"window_size": (13, None)},
    {"causal": True, "attention_chunk": 48},
    {"window_size": (0, 0)},
    {"attention_chunk": 100},
    {"causal": True, "window_size": (100, -1)},
    {"window_size": (3, 1)},
    {"window_size": (200, 150)},
)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Case:
    """A dense problem of one instance holds everything that decides what a test runs.

    A test of several cases prints each before it runs: pytest shows that if the test fails.
    """

    instance: str
    shape: Shape
    arguments: Arguments
    seeds: tuple[int, ...] = SEEDS
    """Each is a schedule of the simulator."""

    def __str__(self) -> str:
        return label(self.instance, self.shape, self.arguments, seeds_label(self.seeds))

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        return inputs_for(self.instance, self.shape, device)


@dataclass(frozen=True)
class PackedCase:
    """A problem of packed sequences holds everything that decides what a test runs."""

    instance: str
    lengths: Pairs
    arguments: Arguments
    heads: int = 2
    heads_kv: int = 1
    seeds: tuple[int, ...] = SEEDS
    """Each is a schedule of the simulator."""

    def __str__(self) -> str:
        heads = f"h{self.heads}-{self.heads_kv}"
        parts = (lengths_label(self.lengths), heads, self.arguments, seeds_label(self.seeds))
        return label(self.instance, *parts)

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        return packed_inputs(self.instance, self.lengths, self.heads, self.heads_kv, device)


def label(*parts: Any) -> str:
    """The id of a test joins the parts of its case that are not empty; arguments are a dict."""
    texts = [arguments_label(part) if isinstance(part, dict) else str(part) for part in parts]
    return "-".join(text for text in texts if text)


def arguments_label(arguments: Arguments) -> str:
    """Arguments in short: {"window_size": (37, None), "softcap": 15.0} is "left37-softcap15"."""
    parts = []
    for name, value in arguments.items():
        if name == "window_size":
            sides = zip(("left", "right"), value)
            parts += [f"{side}{bound}" for side, bound in sides if bound not in (-1, None)]
        elif value is True or isinstance(value, Tensor):
            parts.append(name)
        elif value is not False:
            parts.append(f"{name.removeprefix('attention_')}{value:g}")
    return "-".join(parts)


def seeds_label(seeds: Sequence[int]) -> str:
    """Seeds are part of an id where they are not those of most tests."""
    return "" if tuple(seeds) == SEEDS else "seeds" + "+".join(map(str, seeds))


def lengths_label(lengths: Pairs) -> str:
    """Few sequences are written out; of many, their number and the rows of each side."""
    sides = list(zip("qk", zip(*lengths)))
    if len(lengths) <= len(PACKED[0]):
        return "-".join(side + "+".join(map(str, rows)) for side, rows in sides)
    return "-".join([f"{len(lengths)}sequences", *(f"{side}{sum(rows)}" for side, rows in sides)])


def window(number: int) -> Arguments:
    """Windows take turns: number 0 has the first one, number 10 again."""
    return WINDOWS[number % len(WINDOWS)]


def dense_cases(instances: Sequence[str], shapes: Sequence[Shape]) -> list[Case]:
    """Every instance has all shapes, and every shape a window in turn."""
    return [
        Case(instance, shape, arguments_for(instance, window(number)))
        for instance in instances
        for number, shape in enumerate(shapes)
    ]


def forward_instances(*, varlen: bool) -> list[str]:
    return instances_of("forward", varlen)


def backward_instances(*, varlen: bool) -> list[str]:
    return instances_of("backward", varlen)


def instances_of(family: str, varlen: bool) -> list[str]:
    return [
        name
        for name, i in manifest.instances().items()
        if i.family == family and i.config["varlen"] == varlen
    ]


def arguments_for(instance: str, window: Arguments) -> Arguments:
    """Arguments of the public function that lead to the instance; the window is for local ones."""
    config = manifest.instances()[instance].config
    masks: dict[str, Arguments] = {"causal": {"causal": True}, "local": window}
    arguments = masks.get(config["mask"], {})
    return arguments | ({"softcap": 15.0} if config["softcap"] else {})


def random_inputs(
    shape: Shape,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    scale: float = 1.0,
    head_dim_v: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hash((shape, head_dim)) % 2**31)

    def normal(seqlen: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(shape.batch, seqlen, heads, dim, generator=generator)
        return (scale * x).to(device, dtype)

    return (
        normal(shape.seqlen_q, shape.heads, head_dim),
        normal(shape.seqlen_k, shape.heads_kv, head_dim),
        normal(shape.seqlen_k, shape.heads_kv, head_dim_v or head_dim),
    )


def inputs_for(instance: str, shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    config = manifest.instances()[instance].config
    dtype = TORCH_DTYPES[config["dtype"]]
    return random_inputs(shape, config["head_dim"], dtype, device, head_dim_v=config["head_dim_v"])


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def packed_inputs(
    instance: str, lengths: Pairs, heads: int = 2, heads_kv: int = 1, device: str = "cpu"
) -> list[Tensor]:
    """q, k and v of shape (total, heads, dim)."""
    total_q, total_k = (sum(side) for side in zip(*lengths))
    shape = Shape(1, total_q, total_k, heads, heads_kv)
    return [x[0] for x in inputs_for(instance, shape, device)]
