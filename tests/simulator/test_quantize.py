"""Quantisation by the compiled kernels, interpreted from their PTX, against the plain statement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from support.problems import label
from support.quantize import (
    DTYPES,
    HEAD_DIMS,
    Batch,
    check_equal,
    check_near,
    lengths_of,
    poisoned,
    some,
)
from torch import Tensor

from hopper_attention import simulator
from hopper_attention.dispatch import manifest
from hopper_attention.problem.values import DENSE
from hopper_attention.quantize import (
    LEAST,
    Quantized,
    Recipe,
    Rotary,
    narrowed,
    quantize,
    spread,
    stated,
)
from hopper_attention.reference.quantize import Sequences

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not any(i.family == "quantize" for i in manifest.instances().values()),
        reason="this build has no quantisation kernels",
    ),
]


def simulate(x: Tensor, recipe: Recipe, seed: int = 1, **arguments) -> Quantized:
    with simulator.enabled(seed=seed, hazards="raise"):
        return quantize(x, recipe, **arguments)


@dataclass(frozen=True)
class Way:
    """One way of quantising a tensor."""

    recipe: Recipe
    octaves: bool
    arranged: bool

    def __str__(self) -> str:
        flags = ("octaves" * self.octaves, "arranged" * self.arranged)
        return label(self.recipe.value, *flags)

    @property
    def flags(self) -> dict[str, bool]:
        return {"octaves": self.octaves, "arranged": self.arranged}


# Octaves matter where scales of blocks do, and need what per_head needs besides.
WAYS = [Way(recipe, False, arranged) for recipe in Recipe for arranged in (False, True)]
WAYS += [Way(Recipe.BLOCK64, True, True), Way(Recipe.BLOCK128, True, False)]
BATCHES = (
    Batch("used", (3, 150, 2), lengths_of(None, [129, 0, 65])),
    Batch("packed", (400, 2), lengths_of([0, 130, 1, 200, 64], None)),
    Batch("packed and used", (400, 2), lengths_of([130, 0, 200, 66], [128, 0, 65, 1])),
)
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)


def some_of(batch: Batch, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows have NaN everywhere behind the last one of a sequence."""
    shape = (*batch.shape, head_dim)
    x = some(shape if len(shape) == 4 else (1, *shape), dtype)
    return poisoned(x.view(shape), batch.lengths)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*product(HEAD_DIMS, [torch.bfloat16]), *product((64, 128, 256), [torch.float16])],
)
def test_kernels_equal_the_plain_statement(head_dim, dtype, seed):
    """Two blocks of rows, the last with one row of its second half."""
    x = some((1, 193, 2, head_dim), dtype, seed)
    for way in WAYS[seed::2]:
        print(way)
        way = replace(way, arranged=way.arranged and head_dim % 16 == 0)
        arguments = {"heads_kv": 1, **way.flags}
        got = simulate(x, way.recipe, seed, **arguments)
        check_equal(got, stated(x, way.recipe, **arguments), x)


@dataclass(frozen=True)
class LengthsCase:
    """Sequences that are quantised in one way hold everything that decides what a test runs."""

    batch: Batch
    head_dim: int
    way: Way

    def __str__(self) -> str:
        bound = f"max_seqlen{self.batch.max_seqlen}" if self.batch.max_seqlen else ""
        return label(f"d{self.head_dim}", self.way, self.batch, bound)


def lengths_cases():
    """An upper bound of the lengths is given in every second case."""
    for head_dim, way in [*product([80], WAYS), (256, WAYS[-2]), (64, WAYS[2])]:
        for number, batch in enumerate(BATCHES):
            longest = (None, 200)[(number + WAYS.index(way)) % 2]
            yield LengthsCase(replace(batch, max_seqlen=longest), head_dim, way)


@pytest.mark.parametrize("case", list(lengths_cases()), ids=str)
def test_lengths(case):
    x, recipe, lengths = some_of(case.batch, case.head_dim), case.way.recipe, case.batch.lengths
    arguments = {**case.way.flags, "lengths": lengths, "max_seqlen": case.batch.max_seqlen}
    got, expected = simulate(x, recipe, **arguments), stated(x, recipe, **arguments)
    check_equal(got, expected, x, lengths)
    assert got.descale.isfinite().all()


@every_batch
@pytest.mark.parametrize("centered", [False, True])
def test_lengths_rotated_and_centered(batch, centered):
    x, lengths = some_of(batch, 64), batch.lengths
    for recipe in (Recipe.PER_HEAD, Recipe.BLOCK64):
        arguments = {"hadamard": True, "centered": centered, "lengths": lengths}
        check_near(simulate(x, recipe, **arguments), stated(x, recipe, **arguments), x, lengths)


@pytest.mark.parametrize("heads_kv", [None, 1, 2, 4])
def test_groups_of_heads(heads_kv):
    x = some((2, 40, 4, 64))
    for hadamard in (False, True):
        got = simulate(x, Recipe.PER_HEAD, heads_kv=heads_kv, hadamard=hadamard)
        assert got.descale.shape == (2, heads_kv or 4)
        check_near(got, stated(x, Recipe.PER_HEAD, heads_kv, hadamard), x)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
def test_rotated_and_centered(head_dim, centered, hadamard):
    x = some((2, 70, 2, head_dim))
    for recipe, arranged in zip(Recipe, (False, True, True, False)):
        arguments = {
            "hadamard": hadamard, "centered": centered, "arranged": arranged and head_dim % 16 == 0,
        }  # fmt: skip
        check_near(simulate(x, recipe, **arguments), stated(x, recipe, **arguments), x)


def test_means_of_many_rows():
    """More than one sum of 256 rows, the last of one; a sum's rows not a multiple of a pass's.

    Packed, sums of a sequence follow those of another.
    """
    x = some((1, 513, 1, 80))
    expected = stated(x, Recipe.BLOCK128, centered=True)
    check_near(simulate(x, Recipe.BLOCK128, centered=True), expected, x)
    arguments = {"centered": True, "lengths": lengths_of([3, 260, 0, 250], None)}
    got = simulate(x[0], Recipe.BLOCK128, **arguments)
    check_near(got, stated(x[0], Recipe.BLOCK128, **arguments), x[0], arguments["lengths"])


@pytest.mark.parametrize("seqlen", [1, 2, 15, 16, 17, 64, 65, 128, 129])
@pytest.mark.parametrize("recipe", [Recipe.BLOCK64, Recipe.BLOCK128])
def test_row_counts(seqlen, recipe):
    x = some((2, seqlen, 1, 64), seed=seqlen)
    for arranged in (False, True):
        got = simulate(x, recipe, arranged=arranged)
        check_equal(got, stated(x, recipe, arranged=arranged), x)


def test_octaves_of_very_different_blocks():
    """Up to 100 octaves apart; 60 are told apart.  Of one head there is nothing at all."""
    x = some((1, 640, 3, 64))
    sizes = torch.tensor([0, -1, -3.5, -20, -40, -59, -60, -61, -80, -100]).add(70).exp2()
    x = (x * sizes.repeat_interleave(64).view(1, -1, 1, 1)).bfloat16()
    x[:, :, 1] = 0
    x[:, 64:128, 2] = torch.inf
    got = simulate(x, Recipe.BLOCK64, octaves=True)
    check_equal(got, stated(x, Recipe.BLOCK64, octaves=True), x)
    steps = (got.descale[0, 0, 0] / got.descale[0, 0]).log2()
    assert torch.equal(steps, steps.round())
    assert steps.max() == 60


@pytest.mark.parametrize("recipe", Recipe)
def test_strides(recipe):
    """Heads before rows, parts of longer rows, every second row; all surrounded by NaN."""
    room = torch.full((2, 3, 150, 3 * 64), torch.nan, dtype=torch.bfloat16)
    x = room[:, :, 10:140:2, 64:128].transpose(1, 2)
    x.copy_(some((2, 65, 3, 64)))
    check_equal(simulate(x, recipe), stated(x, recipe), x)
    arguments = {"hadamard": True, "centered": True}
    check_near(simulate(x, recipe, **arguments), stated(x, recipe, **arguments), x)


@pytest.mark.parametrize("recipe", Recipe)
def test_zeros(recipe):
    """Zeros of both signs keep them; their scale is the least there is."""
    x = torch.zeros(1, 130, 2, 64, dtype=torch.bfloat16)
    x[:, ::3] = -0.0
    got = simulate(x, recipe)
    check_equal(got, stated(x, recipe), x)
    assert (got.descale == torch.tensor(LEAST)).all()
    assert torch.equal(got.values.float().signbit(), x.signbit())


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_all_that_shares_its_scale(recipe, value):
    x = some((2, 130, 2, 64))
    x[0, 65, 1, 7] = value
    got = simulate(x, recipe)
    check_equal(got, stated(x, recipe), x)
    lost = (got.values.float() * spread(got.descale, x)).isnan()
    shares = torch.zeros_like(lost)
    rows = slice(64, 128) if recipe is Recipe.BLOCK64 else slice(0, 128)
    shares[0, rows if recipe.rows else slice(None), 1] = True
    assert torch.equal(lost, shares | (recipe is Recipe.PER_TENSOR))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_the_input(dtype):
    """All 2^16, whose quotients meet ties and subnormal numbers; among small ones and large."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    numbers = numbers[numbers.float().abs().argsort()][: numbers.numel() // 256 * 256]
    x = numbers.view(1, -1, 1, 256)
    check_equal(simulate(x, Recipe.BLOCK64), stated(x, Recipe.BLOCK64), x)
    ordinary = x.clamp(-3, 3)
    check_equal(simulate(ordinary, Recipe.BLOCK128), stated(ordinary, Recipe.BLOCK128), x)


def test_same_bits_every_time():
    x = some((1, 300, 2, 128))
    runs = [simulate(x, Recipe.PER_HEAD, s, centered=True, hadamard=True) for s in (0, 1, 2)]
    for run in runs[1:]:
        check_equal(run, runs[0], x)


def test_refusals():
    x = some((1, 8, 2, 64))
    for bad, message in (
        (x.float(), r"x has dtype torch.float32; .* \(nearest: x.bfloat16"),
        (some((1, 8, 2, 60)), r"head_dim 60 of x is not supported; .* \(nearest: 64\)"),
        (some((1, 8, 2, 264)), r"head_dim 264 of x .* \(nearest: 256\)"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            simulate(bad, Recipe.PER_HEAD)
    with pytest.raises(NotImplementedError, match="float8_e5m2 has no kernel"):
        simulate(x, Recipe.PER_HEAD, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="x: the last dimension must be contiguous"):
        simulate(x.transpose(1, 3), Recipe.PER_HEAD)
    with pytest.raises(ValueError, match="x: stride 4 of dimension 1 is not a multiple of 8"):
        simulate(x.as_strided((1, 8, 1, 8), (0, 4, 8, 1)), Recipe.PER_HEAD)


def test_nothing_to_do():
    for shape in ((1, 0, 2, 64), (0, 8, 2, 64)):
        x = torch.empty(shape, dtype=torch.bfloat16)
        for recipe in Recipe:
            check_equal(simulate(x, recipe), stated(x, recipe), x)
    x = some((1, 8, 2, 64))[0]
    for lengths, longest in ((lengths_of([], None), None), (lengths_of([4, 4], [0, 0]), 0)):
        for recipe, arranged in product(Recipe, (False, True)):
            arguments = {"lengths": lengths, "max_seqlen": longest, "arranged": arranged}
            check_equal(
                simulate(x, recipe, **arguments), stated(x, recipe, **arguments), x, lengths
            )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (80, 16), (96, 48), (128, 128), (256, 96)])
def test_rotary(head_dim, dim, interleaved):
    """Bit for bit, all columns or some; the last position is the last there is."""
    dtype = DTYPES[interleaved]
    x = some((2, 131, 2, head_dim), dtype)
    angle = torch.rand(140, dim // 2, generator=torch.Generator().manual_seed(0)) * 7
    cos, sin = (table.to((torch.float32, dtype)[dim == 48]) for table in (angle.cos(), angle.sin()))
    for recipe, offsets in (
        (Recipe.BLOCK64, 9),
        (Recipe.PER_HEAD, torch.tensor([9, 0], dtype=torch.int32)),
    ):
        rotary = Rotary(cos, sin, interleaved, offsets)
        got = simulate(x, recipe, rotary=rotary, arranged=interleaved)
        check_equal(got, stated(x, recipe, rotary=rotary, arranged=interleaved), x)


@every_batch
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_sequences(batch, interleaved):
    """Positions count from each one's start; means are of what has been embedded."""
    x, lengths = some_of(batch, 64), batch.lengths
    angle = torch.rand(204, 16, generator=torch.Generator().manual_seed(0)) * 7
    sequences = len(Sequences.of(x, lengths).places)
    offsets = torch.arange(sequences, dtype=torch.int32)
    rotary = Rotary(angle.cos(), angle.sin(), interleaved, offsets)
    arguments = {"lengths": lengths, "max_seqlen": 200, "rotary": rotary}
    check_equal(
        simulate(x, "block64", **arguments), stated(x, Recipe.BLOCK64, **arguments), x, lengths
    )
    arguments |= {"centered": True, "hadamard": True}
    check_near(
        simulate(x, "per_head", **arguments), stated(x, Recipe.PER_HEAD, **arguments), x, lengths
    )


@pytest.mark.parametrize("batch", [Batch("whole", (1, 400, 2), DENSE), *BATCHES], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "arranged"), [(64, True), (128, False), (256, True), (80, False)]
)
def test_narrowed(batch, head_dim, arranged):
    """All numbers of e5m2 are met, blocks of greatest numbers from its least to its greatest."""
    x, lengths = some_of(batch, head_dim), batch.lengths
    sizes = torch.linspace(-22, 15, x.shape[-3] // 25).exp2().repeat_interleave(25)
    x = poisoned((x.nan_to_num(0) * sizes.view(-1, 1, 1)).to(torch.float8_e5m2), lengths)
    given = torch.tensor([0.37])
    arguments = {"arranged": arranged, "lengths": lengths}
    with simulator.enabled(seed=head_dim, hazards="raise"):
        got = narrowed(x, given, **arguments)
    check_equal(got, narrowed(x, given, **arguments), x, lengths)


def test_narrowed_what_is_not_finite():
    x = some((1, 200, 2, 16)).to(torch.float8_e5m2)
    x[0, 3, 0, 5], x[0, 64, 1, 5] = torch.inf, torch.nan
    with simulator.enabled(seed=1, hazards="raise"):
        got = narrowed(x, torch.ones(1))
    check_equal(got, narrowed(x, torch.ones(1)), x)
    lost = (got.values.float() * spread(got.descale, x)).isnan()
    assert lost[0, :64, 0].all() and lost[0, 64:128, 1].all() and lost.sum() == 2 * 64 * 16


def test_narrowed_other_strides():
    """Columns together, and rows that cannot be loaded: copied."""
    x = some((2, 40, 3, 48)).to(torch.float8_e5m2)
    wide = torch.zeros(2, 40, 3, 50, dtype=torch.uint8).view(x.dtype)[..., 1:49]
    for given in (wide.copy_(x), x.transpose(1, 3).contiguous().transpose(1, 3)):
        with simulator.enabled(seed=1, hazards="raise"):
            got = narrowed(given, torch.ones(1))
        check_equal(got, narrowed(x, torch.ones(1)), x)
