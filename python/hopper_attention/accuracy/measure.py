"""Errors of FP8 attention, by recipe, and of bf16 attention beside it, all against FP64."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hopper_attention import reference
from hopper_attention.accuracy.inputs import Distribution, Inputs, Size, draw
from hopper_attention.launch import forward_fp8
from hopper_attention.problem.quantization import Quantized, Recipe
from hopper_attention.problem.values import PrecisionOptions
from hopper_attention.quantize import stated
from hopper_attention.reference import fp8
from hopper_attention.reference.error import Error, pytorch_attention
from hopper_attention.reference.fp8 import CODES, EXACT, HOPPER, PLAIN, Arithmetic, Cut, exactly


class Accumulation(str, enum.Enum):
    """How sums of PV are kept; QK^T is cut to 14 bits except with `exact`."""

    TWO_LEVEL = "two_level"
    PLAIN = "plain"
    EXACT = "exact"
    CODES = "codes"
    """Two levels, of P without exponentials."""

    @property
    def arithmetic(self) -> Arithmetic:
        return {
            Accumulation.TWO_LEVEL: HOPPER,
            Accumulation.PLAIN: PLAIN,
            Accumulation.EXACT: EXACT,
            Accumulation.CODES: CODES,
        }[self]


@dataclass(frozen=True)
class Variant:
    """How operands are quantised, and products summed."""

    recipe: Recipe
    hadamard: bool = False
    smooth_k: bool = False
    accumulation: Accumulation = Accumulation.TWO_LEVEL

    @property
    def name(self) -> str:
        """block64+hadamard+smooth_k, without the accumulation."""
        flags = [name for name in ("hadamard", "smooth_k") if getattr(self, name)]
        return "+".join([self.recipe.value, *flags])

    @staticmethod
    def parse(name: str, accumulation: Accumulation = Accumulation.TWO_LEVEL) -> Variant:
        """Return the variant `name`; raises ValueError if there is none."""
        recipe, *flags = name.split("+")
        if unknown := set(flags) - {"hadamard", "smooth_k"}:
            raise ValueError(f"{unknown.pop()!r} is neither hadamard nor smooth_k")
        return Variant(Recipe(recipe), "hadamard" in flags, "smooth_k" in flags, accumulation)

    def operands(self, inputs: Inputs) -> tuple[Quantized, Quantized, Quantized]:
        heads_kv = inputs.k.shape[2]
        return (
            stated(inputs.q, self.recipe, heads_kv, self.hadamard),
            stated(inputs.k, self.recipe, hadamard=self.hadamard, centered=self.smooth_k),
            stated(inputs.v, self.recipe_of_values, octaves=True),
        )

    @property
    def recipe_of_values(self) -> Recipe:
        """V's: codes can take no scale of its blocks."""
        codes = self.accumulation.arithmetic.codes and self.recipe.rows is not None
        return Recipe.PER_HEAD if codes else self.recipe

    def run(self, inputs: Inputs) -> Tensor:
        return emulated(self.operands(inputs), inputs, self.accumulation.arithmetic)

    def run_kernel(self, inputs: Inputs, device: torch.device) -> Tensor:
        """On a GPU, or the simulator; its accumulators are as exact as those are."""
        q, k, v = (Quantized(*(x.to(device) for x in one)) for one in self.operands(inputs))
        arithmetic = self.accumulation.arithmetic
        precision = PrecisionOptions(arithmetic.two_level, exact_softmax=not arithmetic.codes)
        return forward_fp8.compute((q, k, v), inputs.softmax_scale, inputs.mask, precision).cpu()


def variants(
    recipes: Iterable[Recipe] = tuple(Recipe),
    accumulations: Iterable[Accumulation] = (Accumulation.TWO_LEVEL, Accumulation.PLAIN),
) -> list[Variant]:
    """All of {hadamard} x {smooth_k} for each recipe and accumulation."""
    flags = (False, True)
    return [Variant(*chosen) for chosen in itertools.product(recipes, flags, flags, accumulations)]


@dataclass(frozen=True)
class Row:
    """A figure for each measure, of one method on one distribution."""

    distribution: str
    shape: str
    method: str
    accumulation: str
    rmse: float
    relative: float
    """rmse over the exact output's root mean square."""
    maximum: float
    cosine: float

    @staticmethod
    def of(inputs: Inputs, method: str, accumulation: str, out: Tensor, exact: Tensor) -> Row:
        error = Error.of(out, exact)
        size = exact.square().mean().sqrt().item()
        cosine = F.cosine_similarity(out.double().flatten(), exact.flatten(), dim=0).item()
        return Row(
            inputs.name, inputs.shape, method, accumulation,
            error.rms, error.rms / size, error.maximum, cosine,
        )  # fmt: skip


def emulated(
    operands: tuple[Quantized, Quantized, Quantized], inputs: Inputs, arithmetic: Arithmetic
) -> Tensor:
    out, _ = fp8.attention(
        *operands, softmax_scale=inputs.softmax_scale, mask=inputs.mask, arithmetic=arithmetic
    )
    return out


def exact_attention(inputs: Inputs) -> Tensor:
    """float64, of what was not quantised."""
    return _reference(inputs, inputs.q, inputs.k, inputs.v, torch.float64)


def _reference(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    scale, mask = inputs.softmax_scale, inputs.mask
    out, _ = reference.attention(q, k, v, softmax_scale=scale, mask=mask, compute_dtype=dtype)
    return out


def _rounded(dtype: torch.dtype, inputs: Inputs) -> Tensor:
    """The reference on rounded inputs, with a rounded result."""
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    return _reference(inputs, q, k, v, torch.float32)


def _sdpa(dtype: torch.dtype, inputs: Inputs) -> Tensor:
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    return pytorch_attention(q, k, v, softmax_scale=inputs.softmax_scale, mask=inputs.mask)


def _p_cast_alone(inputs: Inputs) -> Tensor:
    return emulated((exactly(inputs.q), exactly(inputs.k), exactly(inputs.v)), inputs, EXACT)


def _v_alone(inputs: Inputs) -> Tensor:
    operands = exactly(inputs.q), exactly(inputs.k), stated(inputs.v, Recipe.BLOCK64)
    return emulated(operands, inputs, replace(EXACT, p_dtype=None))


BASELINES: dict[str, Callable[[Inputs], Tensor]] = {
    "PyTorch SDPA, bf16": lambda inputs: _sdpa(torch.bfloat16, inputs),
    "reference, bf16": lambda inputs: _rounded(torch.bfloat16, inputs),
    "only P in e4m3": _p_cast_alone,
    "only V in e4m3 (block64)": _v_alone,
}
"""Rows to compare FP8 with: 16 bits, and two parts of its error that Q and K do not cause."""


def measure(
    inputs: Inputs, chosen: Sequence[Variant], device: torch.device | None = None
) -> Iterator[Row]:
    """Baselines, then variants: a row for each, as it is done.

    Variants are emulated, or computed by the kernel on a `device`.
    """
    exact = exact_attention(inputs)
    for name, method in BASELINES.items():
        yield Row.of(inputs, name, "", method(inputs), exact)
    for variant in chosen:
        out = variant.run_kernel(inputs, device) if device else variant.run(inputs)
        yield Row.of(inputs, variant.name, variant.accumulation.value, out, exact)


# ------------------------------------------------------ the two studies of docs/lab/2026-11-fp8.md


PAPER = {"fp16": 1.9e-4, "per_tensor": 2.4e-2, "block64+hadamard": 9.1e-3}
"""FlashAttention-3, arXiv 2407.08608, table 3: RMSE, the last with FlashAttention-3's block scales.

At which sizes we do not know.
"""


def compare_with_paper(size: Size, seed: int) -> dict[str, float]:
    """RMSE on the paper's distribution of PAPER's methods and of each ingredient alone."""
    inputs = draw(Distribution.OUTLIERS, size, seed)
    exact = exact_attention(inputs)
    outputs = {"fp16": _rounded(torch.float16, inputs)}
    for name in ("per_tensor", "block64", "per_tensor+hadamard", "block64+hadamard"):
        outputs[name] = Variant.parse(name).run(inputs)
    return {name: Error.of(out, exact).rms for name, out in outputs.items()}


def pooled(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """RMSE over runs of equal size."""
    squares = {name: sum(run[name] ** 2 for run in runs) / len(runs) for name in runs[0]}
    return {name: square**0.5 for name, square in squares.items()}


def gain(run: dict[str, float]) -> float:
    return run["per_tensor"] / run["block64+hadamard"]


@dataclass(frozen=True)
class Accumulated:
    """RMSE over one context."""

    keys: int
    label: str
    rmse: float
    from_exact: float
    """Root mean square of the difference to exact sums of the same quantised operands."""


def accumulation_modes(where: Cut = Cut.SUMS) -> dict[str, Arithmetic]:
    modes = {"exact": EXACT, "plain": replace(PLAIN, cut=where)}
    for n in (1, 4, 16):
        modes[f"two-level, every {n}"] = Arithmetic(accumulate_every=n, cut=where)
    return modes


def accumulation(
    size: Size, recipe: Recipe, v_mean: float, seed: int, where: Cut = Cut.SUMS
) -> Iterator[Accumulated]:
    """Measure what sums of 14 bits lose over a context: normal inputs, values with a mean."""
    inputs = draw(Distribution.NORMAL, size, seed)
    inputs = replace(inputs, v=inputs.v + v_mean)
    operands = Variant(recipe).operands(inputs)
    truth = exact_attention(inputs)
    summed = emulated(operands, inputs, EXACT)
    for label, arithmetic in accumulation_modes(where).items():
        out = emulated(operands, inputs, arithmetic)
        errors = Error.of(out, truth).rms, Error.of(out, summed).rms
        yield Accumulated(size.seqlen, label, *errors)
