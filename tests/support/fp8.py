"""FP8 problems, on the simulator and on a GPU: an FP64 model that rounds P as the kernel does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hopper_attention import reference
from hopper_attention.dispatch import manifest
from hopper_attention.problem.values import DENSE, Lengths, Options, resolve_mask
from hopper_attention.quantize import Quantized, Recipe, block_rows, spread, stated
from hopper_attention.reference.error import Error, pytorch_attention
from hopper_attention.reference.fp8 import coded
from support.problems import (
    Arguments,
    Shape,
    arguments_for,
    label,
    lengths_label,
    offsets,
    random_inputs,
    window,
)

INSTANCES = {n: i for n, i in manifest.instances().items() if i.family == "forward_fp8"}
DENSE_INSTANCES = [name for name, i in INSTANCES.items() if not i.config["varlen"]]
PACKED = [name for name, i in INSTANCES.items() if i.config["varlen"]]
SHAPES = (
    Shape(2, 97, 131, 4, 1),
    Shape(1, 203, 113, 2, 2),  # causal: rows without keys
    Shape(1, 1, 509, 2, 1),
    Shape(1, 256, 384, 2, 2),  # every block full
)
LENGTHS = ((0, 0), (64, 64), (113, 203), (0, 5), (1, 1), (7, 0), (203, 113), (0, 0))
"""(seqlen_q, seqlen_k) of packed sequences."""
RECIPES = tuple(Recipe)
HEADROOM = 8


@dataclass(frozen=True)
class Case:
    """A dense FP8 problem of one instance holds everything that decides what a test runs."""

    instance: str
    shape: Shape
    recipe: Recipe
    arguments: Arguments

    @classmethod
    def of(cls, instance: str, shape: Shape, number: int) -> Case:
        """Recipes and windows take turns by a number."""
        return cls(instance, shape, recipe(number), arguments_for(instance, window(number)))

    def __str__(self) -> str:
        return label(self.instance, self.shape, self.recipe.value, self.arguments)

    @property
    def codes(self) -> bool:
        return bool(INSTANCES[self.instance].config["codes"])

    @property
    def call(self) -> Arguments:
        """All arguments of `attention_fp8` beside the tensors."""
        return {"recipe": self.recipe, **precision(self.instance), **self.arguments}

    def inputs(self) -> Any:
        return inputs_for(INSTANCES[self.instance].config, self.shape)


@dataclass(frozen=True)
class PackedCase:
    """An FP8 problem of the sequences of `LENGTHS` holds everything that decides what is run."""

    instance: str
    recipe: Recipe
    arguments: Arguments
    bounded: bool = False
    """The greatest length of either side is given."""

    @classmethod
    def of(cls, instance: str, number: int, bounded: bool = False) -> PackedCase:
        """Recipes and windows take turns by a number."""
        return cls(instance, recipe(number), arguments_for(instance, window(number)), bounded)

    def __str__(self) -> str:
        bounds = "bounded" if self.bounded else ""
        parts = (lengths_label(LENGTHS), self.recipe.value, self.arguments, bounds)
        return label(self.instance, *parts)

    @property
    def codes(self) -> bool:
        return bool(INSTANCES[self.instance].config["codes"])

    @property
    def call(self) -> Arguments:
        """All arguments of `attention_fp8` beside the tensors and their offsets."""
        bounds = [max(side) for side in zip(*LENGTHS)]
        longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), bounds)) if self.bounded else {}
        return {"recipe": self.recipe, **precision(self.instance), **longest, **self.arguments}

    def inputs(self, device: str = "cpu") -> Any:
        return packed_inputs(INSTANCES[self.instance].config, device)


def precision(instance: str) -> Arguments:
    """Arguments of `attention_fp8` that decide between instances for one problem."""
    config = INSTANCES[instance].config
    return {"two_level": config["two_level"], "exact_softmax": not config["codes"]}


def recipe(number: int) -> Recipe:
    """Recipes take turns."""
    return RECIPES[number % len(RECIPES)]


def options(causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, **_):
    return Options.of(None, causal, window_size, attention_chunk, softcap)


def outliers(q, k, v):
    """Rows of other magnitudes, so that scales of blocks differ from each other."""
    for x in (q, k, v):
        x[:, 1::64] *= 8
    v[:, 70:] *= 0.05
    return q, k, v


class Operands(NamedTuple):
    q: Quantized
    k: Quantized
    v: Quantized


def quantized(q, k, v, recipe, *, queries=DENSE, keys=DENSE, codes=False, **how):
    """`codes`: V has one scale a head."""
    lengths = ({"lengths": queries}, {"lengths": keys})
    of_values = Recipe.PER_HEAD if codes and recipe.rows else recipe
    return Operands(
        stated(q, recipe, heads_kv=k.shape[-2], **lengths[0], **how),
        stated(k, recipe, **lengths[1], **how),
        stated(v, of_values, octaves=True, **lengths[1]),
    )


def unscaled(q, k, v):
    """FP8 values have scales of 1."""
    return Operands(*(Quantized(x, torch.ones(1)) for x in (q, k, v)))


def of_sequence(operands, number, rows, keys):
    """One packed sequence of packed operands, as a batch of its own."""
    found = []
    for (values, descale), at in zip(operands, (rows, keys, keys), strict=True):
        if descale.ndim > 1:
            descale = descale[number : number + 1]
        if descale.ndim == 3:  # as many blocks as the longest sequence has
            block = block_rows(descale.shape[2], values.shape[0])
            descale = descale[:, :, : -(-(at.stop - at.start) // block)]
        found.append(Quantized(values[at][None], descale))
    return Operands(*found)


def exact(operands):
    return [x.values.double() * spread(x.descale, x.values).double() for x in operands]


def exp2_in_f16x2(x):
    """The kernels compute 2^x so where they do without MUFU: bits of halves, and a parabola."""
    line = ((x + 15) * 1024).clamp(0, 32 * 1024 - 1).round().to(torch.int16)
    mantissa = (line & 1023 | 0x3C00).view(torch.float16).double()
    slope = (0.243408203125 * mantissa - 0.72607421875).half().double()
    ratio = (mantissa * slope + 1.482421875).half().double()
    return (line.view(torch.float16).double() * ratio).half().double()


def model(operands, call: Options, config, sink=None):
    """(out, lse) are computed in FP64, but P is rounded to e4m3, key block by block, last to first.

    P is taken relative to the largest score so far, times 2^8 and V's descale over the largest of
    its head.  Up to d128 those of every second 16 keys are computed in half precision; or all of
    them come as codes, which are summed as they are.
    """
    tile_n = config["tile_n"]
    q, k, v = exact(operands)
    group = q.shape[2] // k.shape[2]
    mask = resolve_mask(call, q.shape[1], k.shape[1])
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    rows = slice(0, q.shape[1])
    seen = reference.visible(mask, q.shape[1], k.shape[1], rows, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    descale = spread(operands.v.descale, operands.v.values).double()
    descale = descale.expand(*operands.v.values.shape[:3], 1)
    relative = descale / descale.amax(dim=1, keepdim=True)
    relative = relative.repeat_interleave(group, dim=2)[..., 0].permute(0, 2, 1)[:, :, None]
    top = torch.full_like(scores[..., 0], -torch.inf)
    out, total = torch.zeros_like(q[..., :1].expand(*q.shape[:3], v.shape[-1])), top.exp()
    for start in range((k.shape[1] - 1) // tile_n * tile_n, -1, -tile_n):
        keys = slice(start, min(start + tile_n, k.shape[1]))
        new = torch.maximum(top, scores[..., keys].amax(dim=-1))
        finite = torch.where(new == -torch.inf, 0.0, new)
        shrink = torch.exp(top - finite)
        below = relative[..., keys]
        exponents = (scores[..., keys] - finite[..., None]) / math.log(2) + HEADROOM
        p = torch.exp2(exponents)
        wide = p * below
        if config["codes"]:
            p = wide = coded(exponents).double()
        elif config["head_dim"] <= 128:
            in_f16x2 = torch.arange(keys.start, keys.stop, device=q.device) // 16 % 2 == 1
            p = torch.where(in_f16x2, exp2_in_f16x2(p.log2()), p)
            wide = torch.where(in_f16x2, (p * below.half().double()).half().double(), wide)
        weights = wide.float().to(torch.float8_e4m3fn).double() / 2**HEADROOM / below
        out = out * shrink.transpose(1, 2)[..., None] + torch.einsum(
            "bhqk,bkhd->bqhd", weights, v[:, keys]
        )
        total, top = total * shrink + p.sum(dim=-1) / 2**HEADROOM, new
    if sink is not None:
        joined = torch.maximum(top, sink.double()[:, None])
        shrink = torch.exp(top - joined)
        total = total * shrink + torch.exp(sink.double()[:, None] - joined)
        out, top = out * shrink.transpose(1, 2)[..., None], joined
    inverse = torch.where(total == 0, 0.0, 1 / total)
    return out * inverse.transpose(1, 2)[..., None], top + total.log()


def check(
    instance, operands, out, lse=None, *, dtype=None, sink=None, short_sums=False, **arguments
):
    """out is judged by PyTorch's error in `dtype`, by default out's, on the same quantised values.

    short_sums: by tensor cores, which keep about 14 bits.
    """
    config, dtype = manifest.instances()[instance].config, dtype or out.dtype
    call = options(**arguments)
    expected, expected_lse = model(operands, call, config, sink)
    values = exact(operands)
    problem = {
        "softmax_scale": 1 / math.sqrt(values[0].shape[-1]),
        "mask": resolve_mask(call, values[0].shape[1], values[1].shape[1]),
        "softcap": call.softcap or None,
        "sink": sink,
    }
    torch_error = Error.of(
        pytorch_attention(*(x.to(dtype) for x in values), **problem),
        pytorch_attention(*(x.to(dtype).double() for x in values), **problem),
    )
    if short_sums or out.is_cuda:
        check_short_sums(instance, operands, out, lse, expected, expected_lse, torch_error, problem)
        return
    error = Error.of(out, expected)
    # Some P lie so near the middle of two e4m3 numbers that the kernel rounds them the other way.
    rounding = expected.square().mean().sqrt().item() * torch.finfo(dtype).eps / 2
    assert error.rms <= 2 * torch_error.rms + rounding, (error, torch_error, rounding)
    assert error.maximum <= values[2].abs().max().item() / 16, error
    if lse is not None:
        atol = sum_error(config)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=atol)


def sum_error(config):
    """A row's sum of exponentials differs from the model's by at most so much of itself.

    An exponent of 10 bits may round the other way, which costs 2^-10.5 of one exponential; and
    halves are added pairwise, which costs 2^-11 a level.
    """
    return 2.0**-9 if config["head_dim"] <= 128 else 1e-5


LSE_ERROR = 5.3e-3
"""LSE is off by at most so much up to d128: the largest error of an exponential in halves."""
KEPT_BITS = 13
"""FP8 tensor cores keep at least so many bits of a sum, and cut off the rest every instruction."""


def check_short_sums(instance, operands, out, lse, expected, expected_lse, torch_error, problem):
    """out may add PyTorch's error and that of rounding P: inexact scores make P round otherwise."""
    q, k, v = exact(operands)
    group = q.shape[2] // k.shape[2]
    magnitude = torch.einsum("bqhd,bkhd->bhqk", q.abs(), k.abs().repeat_interleave(group, dim=2))
    scores = 2.0**-KEPT_BITS * magnitude.max().item() * problem["softmax_scale"]
    if lse is not None:
        atol = sum_error(manifest.instances()[instance].config) + scores
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=atol)
    best, _ = reference.attention(q, k, v, **problem, compute_dtype=torch.float64)
    rounding, error = Error.of(expected, best), Error.of(out, best)
    half_step = best.square().mean().sqrt().item() * torch.finfo(out.dtype).eps / 2
    allowed = 2 * (torch_error.rms + rounding.rms) + half_step
    if not manifest.instances()[instance].config["two_level"]:
        instructions = -(-k.shape[1] // 32)
        allowed += instructions * 2.0**-KEPT_BITS * best.square().mean().sqrt().item()
    assert error.rms <= allowed, (error, torch_error, rounding)
    assert error.maximum <= v.abs().max().item() / 16, error


def check_packed(instance, operands, lengths, out, lse, **arguments):
    """Each sequence is judged by itself; one without keys is 0, and its lse -inf."""
    end_q = end_k = 0
    for number, (seqlen_q, seqlen_k) in enumerate(lengths):
        end_q, end_k = end_q + seqlen_q, end_k + seqlen_k
        rows, keys = slice(end_q - seqlen_q, end_q), slice(end_k - seqlen_k, end_k)
        if seqlen_k == 0:
            assert (out[rows] == 0).all() and (lse[:, rows] == -torch.inf).all()
        elif seqlen_q > 0:
            one = of_sequence(operands, number, rows, keys)
            check(instance, one, out[rows][None], lse[:, rows][None], **arguments)


def inputs_for(config, shape):
    dims = (config["head_dim"], torch.bfloat16)
    return outliers(*random_inputs(shape, *dims, head_dim_v=config["head_dim_v"]))


def packed_inputs(config, device="cpu"):
    """(total, heads, head_dim) with 9 rows of no sequence, and the lengths of either side."""
    sides = [list(side) for side in zip(*LENGTHS, strict=True)]
    shape = Shape(1, sum(sides[0]) + 9, sum(sides[1]) + 9, 2, 1)
    tensors = [x[0].to(device) for x in inputs_for(config, shape)]
    for x in tensors:
        x[-9:] = torch.nan
    return tensors, *(Lengths(offsets(side, device)) for side in sides)
