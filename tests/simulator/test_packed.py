"""Arithmetic on f16x2, bf16x2 and single halves: rounded once, element by element."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from simulator.snippets import run

RNG = np.random.default_rng(0)
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def halves(kind: str, count: int) -> torch.Tensor:
    """Random numbers of many magnitudes, with zeros, infinities and NaN among them."""
    x = torch.from_numpy(RNG.standard_normal((count, 2)) * 2.0 ** RNG.integers(-6, 7, (count, 2)))
    x[:4] = torch.tensor([[0.0, -0.0], [float("inf"), 1.0], [float("nan"), 2.0], [1.0, 0.0]])
    return x.to(TORCH[kind])


def words(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint32)


def nearest(exact: Fraction, kind: str) -> float:
    """The closest number of the format, ties to even."""
    bits, low = {"f16": (11, -24), "bf16": (8, -133)}[kind]
    if exact == 0:
        return 0.0
    exponent = 0
    magnitude = abs(exact)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, low)
    return float(round(exact / unit) * unit)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_rounding(name, kind):
    operands = [halves(kind, 64)[4:36] for _ in range(3)]
    modifier = ".rn"
    count = 3 if name == "fma" else 2
    inputs = np.concatenate([words(x) for x in operands], axis=1)
    registers = ", ".join(f"%a{k}" for k in range(count))
    got = run(f"{name}{modifier}.{kind}x2 %d0, {registers};", inputs)
    result = torch.from_numpy(got.view(np.int16)).view(TORCH[kind]).double()
    for row in range(32):
        for column in range(2):
            a, b, c = (Fraction(x[row, column].item()) for x in operands)
            exact = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c}[name]
            assert result[row, column].item() == nearest(exact, kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("max.{}", lambda a, b: np.fmax(a, b)), ("min.{}", lambda a, b: np.fmin(a, b)),
        ("max.NaN.{}", np.maximum), ("min.NaN.{}", np.minimum), ("add.sat.{}", None),
        ("fma.rn.relu.{}", None),
    ],
)  # fmt: skip
def test_minimum_maximum_and_clamps(text, meaning, kind):
    a, b = halves(kind, 32), halves(kind, 32).flip(0)
    opcode = text.format(f"{kind}x2")
    inputs = np.concatenate([words(a), words(b)], axis=1)
    more = ", %a1" if opcode.startswith("fma") else ""
    got = run(f"{opcode} %d0, %a0, %a1{more};", inputs)
    result = torch.from_numpy(got.view(np.int16)).view(TORCH[kind]).double().numpy()
    x, y = a.double().numpy(), b.double().numpy()
    with np.errstate(invalid="ignore"):
        if opcode.startswith("add.sat"):
            total = (a.double() + b.double()).to(TORCH[kind]).double().numpy()
            expected = np.fmin(np.fmax(total, 0), 1)
        elif opcode.startswith("fma"):
            total = (a.double() * b.double() + b.double()).to(TORCH[kind]).double().numpy()
            expected = np.where(np.isnan(total), total, np.maximum(total, 0))
        else:
            expected = meaning(x, y)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_single_halves(kind):
    a, b = (halves(kind, 36)[4:, :1] for _ in range(2))
    inputs = np.concatenate([x.view(torch.int16).numpy().astype(np.uint32) for x in (a, b)], axis=1)
    body = f"cvt.u16.u32 %rs1, %a0; cvt.u16.u32 %rs2, %a1; mul.{kind} %rs3, %rs1, %rs2;"
    got = run(body + "cvt.u32.u16 %d0, %rs3;", inputs & 0xFFFF)
    expected = (a.double() * b.double()).to(TORCH[kind]).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("name", "meaning"), [("ex2.approx", np.exp2), ("tanh.approx", np.tanh)])
def test_functions(name, meaning):
    x = (torch.from_numpy(RNG.standard_normal((32, 2))) * 2).half()
    got = run(f"{name}.f16x2 %d0, %a0;", words(x))
    expected = meaning(x.double().numpy()).astype(np.float16)
    np.testing.assert_array_equal(got.view(np.float16), expected)


def test_negation_and_magnitude():
    x = halves("bf16", 32)
    got = run("neg.bf16x2 %d0, %a0; abs.bf16x2 %d1, %a0;", words(x), outputs=2)
    negated, magnitude = (
        torch.from_numpy(np.ascontiguousarray(got[:, k : k + 1]).view(np.int16)).view(
            torch.bfloat16
        )
        for k in (0, 1)
    )
    assert torch.equal(negated.nan_to_num(9), (-x).nan_to_num(9))
    assert torch.equal(magnitude.nan_to_num(9), x.abs().nan_to_num(9))
