"""CuTe DSL programs, compiled here and run through their own host code, under many schedules."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from hopper_attention import simulator
from hopper_attention.simulator.instructions.conversion import FP8

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl to compile"
    ),
]
SEEDS = range(7)
RNG = np.random.default_rng(0)


def bf16(x: np.ndarray) -> np.ndarray:
    """Truncated to bf16, as bits: inputs need no particular rounding."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def scale(program: simulator.AotFunction, seed: int, shape=(70, 72)) -> np.ndarray:
    x = RNG.standard_normal(shape).astype(np.float16)
    y = np.full_like(x, np.nan)
    with simulator.enabled(seed=seed):
        program(x, y)
    np.testing.assert_array_equal(y, (x.astype(np.float32) * 2 + 1).astype(np.float16))
    return y


@pytest.mark.parametrize("seed", SEEDS)
def test_tma_in_and_out(compiled, seed):
    scale(compiled("scale"), seed)


def gemm(program: simulator.AotFunction, seed: int, m=100, n=72, k=512) -> np.ndarray:
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(shape) for shape in ((m, k), (n, k)))
    if program.prefix == "gemm_e4m3":
        a, b = (
            np.minimum(np.abs(x) * 40, 119).astype(np.uint8) | (x < 0) * np.uint8(0x80)
            for x in (a, b)
        )
        wide = FP8["e4m3"][a], FP8["e4m3"][b]
    else:
        a, b = bf16(a), bf16(b)
        wide = widen(a), widen(b)
    if program.prefix == "gemm_bf16_mn":
        b = np.ascontiguousarray(b.T).T
    d = np.full((m, n), np.nan, np.float32)
    with simulator.enabled(seed=seed):
        program(a, b, d)
    exact = wide[0].astype(np.float64) @ wide[1].T.astype(np.float64)
    assert np.abs(d - exact).max() < 1e-5 * np.abs(exact).max()
    return d


@pytest.mark.parametrize("name", ["gemm_bf16", "gemm_bf16_mn", "gemm_e4m3"])
def test_gemm_is_the_same_bits_under_every_schedule(compiled, name):
    results = [gemm(compiled(name), seed) for seed in SEEDS]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("shape", [(1, 4), (9, 128), (5, 100)])
def test_softmax(compiled, shape):
    x = (RNG.standard_normal(shape) * 5).astype(np.float32)
    y = np.full_like(x, np.nan)
    compiled("softmax")(x, y)
    exact = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y, exact, rtol=1e-5)  # the exponents are f32


def test_statistics_count_blocks_and_instructions(compiled):
    x = np.zeros((9, 128), np.float32)
    (statistics,) = compiled("softmax")(x, np.zeros_like(x))
    assert statistics.blocks == 3
    text = compiled("softmax").module.kernels["softmax_0"].instructions
    assert 9 * 50 < statistics.warp_instructions < 12 * len(text)
    assert statistics.seconds > 0


def test_vectorising_does_not_change_a_bit(compiled, monkeypatch):
    """One numpy call an instruction, in program order, against batches and folded chains."""
    program = compiled("gemm_bf16")
    x = (RNG.standard_normal((5, 100)) * 5).astype(np.float32)
    fast, slow = np.zeros_like(x), np.zeros_like(x)
    product = gemm(program, 0)
    compiled("softmax")(x, fast)
    monkeypatch.setattr("hopper_attention.simulator.program.fold_chains", lambda ops, usage: ops)
    monkeypatch.setattr("hopper_attention.simulator.program.batch", lambda ops: [[x] for x in ops])
    for name in ("gemm_bf16", "softmax"):
        exported = compiled(name)
        text = Path(exported.module.path).read_text()
        monkeypatch.setattr(exported, "module", simulator.Module.parse(text))
    np.testing.assert_array_equal(gemm(program, 0), product)
    compiled("softmax")(x, slow)
    np.testing.assert_array_equal(slow, fast)


# --------------------------------------------------------------------------------------- mutations


def mutate(
    program: simulator.AotFunction, pattern: str, replacement: str, number: int
) -> simulator.Module:
    """The program's module with the ``number``-th match replaced."""
    text = Path(program.module.path).read_text()
    found = list(re.finditer(pattern, text))[number]
    return simulator.Module.parse(text[: found.start()] + replacement + text[found.end() :])


PASSES = "setp.eq.u32 P1, 0, 0;"
WAIT = r"mbarrier\.try_wait\.parity[^;]*;"


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "number"),
    [
        ("gemm_bf16", r"wgmma\.wait_group[^;]*;", "", 0),
        ("gemm_bf16", r"wgmma\.commit_group[^;]*;", "", 0),
        ("gemm_bf16", r"wgmma\.fence[^;]*;", "", 0),
        ("gemm_bf16", r"mbarrier\.arrive\.shared[^;]*;", "", 0),
        ("gemm_bf16", r"mbarrier\.arrive\.expect_tx[^;]*;", "", 0),
        ("gemm_bf16", r"fence\.mbarrier_init[^;]*;", "", 0),
        ("gemm_bf16", WAIT, PASSES, "empty"),
        ("gemm_bf16", WAIT, PASSES, "full"),
        ("scale", WAIT, PASSES, 0),
        ("scale", r"fence\.proxy\.async[^;]*;", "", 0),
        ("scale", r"cp\.async\.bulk\.wait_group[^;]*;", "", 0),
    ],
)
def test_dropping_one_synchronisation_is_noticed(compiled, name, pattern, replacement, number):
    program = compiled(name)
    if isinstance(number, str):
        number = wait_number(program, number)
    original = program.module
    program.module = mutate(program, pattern, replacement, number)
    try:
        for seed in range(12):
            try:
                {"gemm_bf16": gemm, "scale": scale}[name](program, seed)
            except (simulator.SimulatorError, AssertionError):
                return
    finally:
        program.module = original
    pytest.fail("no schedule noticed it")


def wait_number(program: simulator.AotFunction, kind: str) -> int:
    """Which wait is the producer's for an empty stage, and which the consumers' for a full one."""
    text = Path(program.module.path).read_text()
    waits = [m.start() for m in re.finditer(WAIT, text)]
    if kind == "empty":
        return sum(place < text.index("cp.async.bulk.tensor") for place in waits) - 1
    return sum(place < text.index("wgmma.mma_async") for place in waits) - 1


def test_errors_cross_the_host_code(compiled):
    x = np.zeros((8, 32), np.float32)
    too_small = np.full((5, 32), 7, np.float32)  # the first of two blocks writes 4 rows
    with pytest.raises(simulator.OutOfBounds, match="global access"):
        compiled("softmax")(x, too_small)
    assert (too_small == 7).all()
