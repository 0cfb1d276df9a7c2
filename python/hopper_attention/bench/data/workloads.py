"""Attention problems as data: `benchmarks/workloads.toml`, and how much work each is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from hopper_attention.dispatch import instances, manifest
from hopper_attention.dispatch.manifest import CompiledInstance
from hopper_attention.dispatch.target import Target
from hopper_attention.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIRECTIONS = ("forward", "backward", "decode")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}
BACKWARD_FLOP = 2.5
"""Five GEMMs where forward has two."""


@dataclass(frozen=True)
class Problem:
    """One call.  `lengths` are those of packed (varlen) sequences, else all have `seqlen`."""

    workload: str
    direction: str
    dtype: str
    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    seqlen: int
    """The length of keys, and of queries unless seqlen_q says otherwise."""
    seqlen_q: int
    causal: bool = False
    window: int = -1
    """Keys to the left that a query sees beside its own; -1: all."""
    lengths: tuple[int, ...] = ()
    page_size: int = 0
    """The page size of a paged cache; 0: contiguous."""
    softcap: float = 0.0
    sink: bool = False

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS or self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"{self.workload}: unknown {self.direction} or {self.dtype}")
        if self.heads % self.heads_kv != 0:
            raise ValueError(f"{self.workload}: {self.heads_kv} heads do not divide {self.heads}")

    @property
    def name(self) -> str:
        """Unique: "fa3/forward_bf16_d128_causal_b4_s4096"."""
        dims = f"d{self.head_dim}" + (f"v{self.head_dim_v}" * (self.head_dim_v != self.head_dim))
        window = f"w{self.window}" if self.window >= 0 else ""
        mask = ["causal" * self.causal, window, "softcap" * (self.softcap > 0)]
        parts = [self.direction, self.dtype, dims, *mask]
        size = [f"b{self.batch}", "varlen" * bool(self.lengths), f"s{self.seqlen}"]
        return f"{self.workload}/" + "_".join(filter(None, [*parts, *size]))

    def instance(
        self,
        target: Target = instances.HOPPER,
        two_level: bool | None = None,
        exact_softmax: bool = True,
    ) -> str:
        """The instance that runs it; of backward's three the one with the GEMMs.

        Raises NotImplementedError for paged problems, and where dispatch does.
        """
        if self.page_size:
            raise NotImplementedError(f"no compiled kernel runs {self.name} yet")
        mask = "local" if self.window >= 0 else "causal" if self.causal else "full"
        kind = (self.head_dim, self.head_dim_v, mask, self.softcap > 0, bool(self.lengths))
        if self.dtype == "fp8":
            return instances.forward_fp8_instance(*kind, two_level, exact_softmax)
        if self.direction == "backward":
            return instances.backward_instances(self.dtype, *kind, target).main
        return instances.forward_instance(self.dtype, *kind, target)

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(queries, keys) of every sequence."""
        if self.lengths:
            return [(n, n) for n in self.lengths]
        return [(self.seqlen_q, self.seqlen)] * self.batch

    @property
    def flop(self) -> int:
        """FLOPs of the GEMMs.  Plain causal squares count as half of all pairs, as is the custom;
        everything else by its unmasked pairs."""
        pairs = 0
        for queries, keys in self.sequences:
            if self.causal and self.window < 0 and queries == keys:
                pairs += queries * keys // 2
            else:
                pairs += unmasked_pairs(queries, keys, self.causal, self.window)
        forward = 2 * pairs * self.heads * (self.head_dim + self.head_dim_v)
        return int(BACKWARD_FLOP * forward) if self.direction == "backward" else forward

    @property
    def bytes(self) -> int:
        """That forward has to move: Q, K, V read once, O and LSE written."""
        queries = sum(q for q, _ in self.sequences)
        keys = sum(k for _, k in self.sequences)
        dims = self.head_dim + self.head_dim_v
        read = keys * self.heads_kv * dims + queries * self.heads * self.head_dim
        written = queries * self.heads * self.head_dim_v
        return ELEMENT_BYTES[self.dtype] * read + 2 * written + 4 * queries * self.heads


def unmasked_pairs(queries: int, keys: int, causal: bool, window: int) -> int:
    """(query, key) pairs that are not masked; masks are aligned to the bottom right."""
    shift = keys - queries
    total = 0
    for row in range(queries):
        last = min(row + shift, keys - 1) if causal else keys - 1
        first = max(row + shift - window, 0) if window >= 0 else 0
        total += max(last - first + 1, 0)
    return total


INSTANCES = "instances"
"""The workload that the build makes: for every attention kernel that it has one problem."""
DIRECTION_OF = {
    "forward": "forward",
    "forward_fp8": "forward",
    "backward": "backward",
    "ampere_forward": "forward",
    "ampere_backward": "backward",
}
"""Family of instances -> direction."""
INSTANCE_LENGTHS = (8192, 4096, 2048, 1024, 512, 512)


def of_instances() -> list[Problem]:
    """16k tokens, 16 heads to 4; several instances may run one problem (Ampere's, two-level)."""
    found = (i for i in manifest.instances().values() if i.family in DIRECTION_OF)
    return list(dict.fromkeys(_problem_of(instance) for instance in found))


def _problem_of(instance: CompiledInstance) -> Problem:
    config = instance.config
    mask = config.get("mask", "full")  # Ampere's instances serve all
    lengths = INSTANCE_LENGTHS if config.get("varlen") else ()
    dtype = config["dtype"]
    return Problem(
        workload=INSTANCES,
        direction=DIRECTION_OF[instance.family],
        dtype="fp8" if dtype == "e4m3" else dtype,
        batch=len(lengths) or 4,
        heads=16,
        heads_kv=4,
        head_dim=config["head_dim"],
        head_dim_v=config["head_dim_v"],
        seqlen=max(lengths, default=4096),
        seqlen_q=max(lengths, default=4096),
        causal=mask != "full",
        window=1023 if mask == "local" else -1,
        lengths=lengths,
        softcap=30.0 if config.get("softcap") else 0.0,
    )


def load_problems(patterns: Sequence[str] = ()) -> list[Problem]:
    """All problems of the committed workloads, and for every instance one; or those whose workload
    or name matches a pattern.

    Raises UserError for a pattern that matches nothing.
    """
    text = resources.files("hopper_attention.benchmarks").joinpath("workloads.toml").read_text()
    problems = [p for name, table in tomllib.loads(text).items() for p in expand(name, table)]
    problems += of_instances()
    for pattern in patterns:
        if not any(_matches(problem, pattern) for problem in problems):
            known = ", ".join(dict.fromkeys(problem.workload for problem in problems))
            raise UserError(f"unknown workload {pattern!r}; there are: {known}")
    return [p for p in problems if not patterns or any(_matches(p, x) for x in patterns)]


def descriptions() -> dict[str, str]:
    """Workload -> what it is."""
    text = resources.files("hopper_attention.benchmarks").joinpath("workloads.toml").read_text()
    found = {name: table["about"] for name, table in tomllib.loads(text).items()}
    return found | {INSTANCES: "a problem for every compiled attention kernel"}


def _matches(problem: Problem, pattern: str) -> bool:
    return fnmatchcase(problem.workload, pattern) or fnmatchcase(problem.name, pattern)


def expand(workload: str, table: dict[str, Any]) -> Iterator[Problem]:
    """The problems of one table: every combination of what its lists hold."""
    fields = {key: value for key, value in table.items() if key != "about"}
    choices = [value if isinstance(value, list) else [value] for value in fields.values()]
    for values in itertools.product(*choices):
        problem = _problem(workload, dict(zip(fields, values)))
        if problem is not None:
            yield problem


def _problem(workload: str, fields: dict[str, Any]) -> Problem | None:
    """None for a combination beyond `max_total_tokens`."""
    limit = fields.pop("max_total_tokens", None)
    fields.setdefault("dtype", "bf16")
    fields.setdefault("head_dim_v", fields["head_dim"])
    if "lengths" in fields:
        fields["lengths"] = tuple(fields["lengths"])
        fields |= {"batch": len(fields["lengths"]), "seqlen": max(fields["lengths"])}
    if "hidden" in fields:
        fields["heads"] = fields["heads_kv"] = fields.pop("hidden") // fields["head_dim"]
    if "total_tokens" in fields:
        fields["batch"] = fields.pop("total_tokens") // fields["seqlen"]
    fields.setdefault("seqlen_q", fields["seqlen"])
    if limit is not None and fields["batch"] * fields["seqlen"] > limit:
        return None
    return Problem(workload=workload, **fields)
