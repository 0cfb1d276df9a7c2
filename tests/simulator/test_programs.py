"""CuTe DSL programs, compiled here and run through their own host code, under many schedules."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hopper_attention import simulator
from hopper_attention.simulator.hardware.formats import FP8

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


def gemm(program: simulator.AotFunction, seed: int, m=104, n=72, k=512) -> np.ndarray:
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(shape) for shape in ((m, k), (n, k)))
    kind = program.prefix.split("_")[1]
    if kind in FP8:
        a, b = (
            np.minimum(np.abs(x) * 40, 100).astype(np.uint8) | (x < 0) * np.uint8(0x80)
            for x in (a, b)
        )
        wide = FP8[kind][a], FP8[kind][b]
    elif kind == "f16":
        a, b = a.astype(np.float16), b.astype(np.float16)
        wide = a.astype(np.float32), b.astype(np.float32)
    else:
        a, b = bf16(a), bf16(b)
        wide = widen(a), widen(b)
    if program.prefix == "gemm_bf16_mn":
        b = np.ascontiguousarray(b.T).T
    if program.prefix == "gemm_bf16_amn":
        a = np.ascontiguousarray(a.T).T
    d = np.full((m, n), np.nan, np.float32)
    with simulator.enabled(seed=seed):
        program(a, b, d)
    exact = wide[0].astype(np.float64) @ wide[1].T.astype(np.float64)
    assert np.abs(d - exact).max() < 1e-5 * np.abs(exact).max()
    return d


GEMMS = ["bf16", "bf16_mn", "bf16_amn", "bf16_rs", "f16", "e4m3", "e5m2"]


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_is_the_same_bits_under_every_schedule(compiled, name):
    results = [gemm(compiled(f"gemm_{name}"), seed) for seed in SEEDS]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


TMA_SHAPES = {
    "rank1": (72,), "rank2": (9, 24), "rank3": (3, 3, 24), "rank4": (5, 1, 3, 24),
    "rank5": (5, 3, 2, 3, 32), "swizzle0": (70, 24), "swizzle32": (33, 32), "swizzle64": (64, 24),
    "swizzle128": (70, 56),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TMA_SHAPES)
def test_tma_of_every_rank_and_swizzle(compiled, name, seed):
    x = RNG.standard_normal(TMA_SHAPES[name]).astype(np.float16)
    y = np.full_like(x, np.nan)
    with simulator.enabled(seed=seed):
        compiled(f"tma_{name}")(x, y)
    assert (y == x).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast_within_a_cluster(compiled, seed):
    x = RNG.standard_normal((16, 64)).astype(np.float32)
    y = np.zeros((32, 64), np.float32)
    with simulator.enabled(seed=seed):
        compiled("multicast")(x, y)
    assert (y == np.concatenate([x, x])).all()


def ampere(program: simulator.AotFunction, seed: int) -> np.ndarray:
    generator = np.random.default_rng(2)
    a, b = (bf16(generator.standard_normal((n, 128))) for n in (128, 64))
    d = np.full((128, 64), np.nan, np.float32)
    with simulator.enabled(seed=seed):
        program(a, b, d)
    exact = widen(a).astype(np.float64) @ widen(b).astype(np.float64).T
    assert np.abs(d - exact).max() < 1e-4
    return d


def test_ampere_gemm(compiled):
    results = [ampere(compiled("ampere"), seed) for seed in SEEDS]
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
    monkeypatch.setattr(
        "hopper_attention.simulator.execution.program.fold_chains", lambda ops, usage: ops
    )
    monkeypatch.setattr(
        "hopper_attention.simulator.execution.program.batch", lambda ops: [[x] for x in ops]
    )
    for name in ("gemm_bf16", "softmax"):
        exported = compiled(name)
        text = Path(exported.module.path).read_text()
        monkeypatch.setattr(exported, "module", simulator.Module.parse(text))
    np.testing.assert_array_equal(gemm(program, 0), product)
    compiled("softmax")(x, slow)
    np.testing.assert_array_equal(slow, fast)


def test_errors_cross_the_host_code(compiled):
    x = np.zeros((8, 32), np.float32)
    too_small = np.full((5, 32), 7, np.float32)  # the first of two blocks writes 4 rows
    with pytest.raises(simulator.OutOfBounds, match="global access"):
        compiled("softmax")(x, too_small)
    assert (too_small == 7).all()
