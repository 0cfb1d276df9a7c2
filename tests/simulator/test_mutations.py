"""Correct kernels with one synchronisation dropped or changed: each must be named.

Each mutation is a real bug: none is implied by another synchronisation of the kernel.  An error
must name the kernel, the block, a warp and a PTX line.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from simulator.snippets import module, run
from simulator.test_programs import ampere, gemm, scale

from hopper_attention import simulator

pytestmark = pytest.mark.simulator
needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl to compile"
)

PASSES = r"setp.eq.u32 \1, 0, 0;"
WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64\s+(\w+)[^;]*;"


def multicast(program, seed: int) -> None:
    x = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    y = np.zeros((32, 64), np.float32)
    with simulator.enabled(seed=seed):
        program(x, y)


RUNNERS = {"gemm_bf16": gemm, "gemm_bf16_rs": gemm, "scale": scale, "ampere": ampere,
           "multicast": multicast}  # fmt: skip

PROGRAMS = [  # program, pattern, replacement, which match, what is reported
    ("gemm_bf16", r"wgmma\.wait_group[^;]*;", "", 0, "still being read|before wgmma.wait_group"),
    (
        "gemm_bf16",
        r"wgmma\.wait_group\S*\s+0;",
        "wgmma.wait_group.sync.aligned 1;",
        0,
        "still being read|may still",
    ),
    ("gemm_bf16", r"wgmma\.commit_group[^;]*;", "", 0, "still being read|before wgmma.wait_group"),
    ("gemm_bf16", r"wgmma\.fence[^;]*;", "", 0, "since the last wgmma.fence"),
    ("gemm_bf16", r"mbarrier\.arrive\.shared[^;]*;", "", 0, "deadlock"),
    ("gemm_bf16", r"mbarrier\.arrive\.expect_tx[^;]*;", "", 0, "deadlock"),
    ("gemm_bf16", r"fence\.mbarrier_init[^;]*;", "", 0, "no fence.mbarrier_init"),
    ("gemm_bf16", r"bar\.sync\s+0;", "", 0, "no mbarrier was|that warp 0 initialised"),
    ("gemm_bf16", WAIT, PASSES, "empty", "may still read|arrivals with|being read"),
    ("gemm_bf16", WAIT, PASSES, "full", "a bulk load .* wrote|being written|nothing has"),
    ("gemm_bf16", r"(mbarrier\.init\S*\s+\[\S+\], )%r\d+;", r"\1 5;", "init 4", "deadlock"),
    (
        "gemm_bf16",
        r"(mbarrier\.init\S*\s+\[\S+\], )%r\d+;",
        r"\1 3;",
        "init 4",
        "arrivals with|may still read",
    ),
    ("gemm_bf16_rs", r"wgmma\.wait_group[^;]*;", "", 0, "before wgmma.wait_group"),
    ("gemm_bf16_rs", r"wgmma\.fence[^;]*;", "", 0, "since the last wgmma.fence"),
    ("gemm_bf16_rs", WAIT, PASSES, "full", "a bulk load .* wrote|being written|nothing has"),
    ("scale", WAIT, PASSES, 0, "being written|a bulk load .* wrote"),
    ("scale", r"fence\.proxy\.async[^;]*;", "", 0, "without a fence.proxy.async"),
    ("scale", r"cp\.async\.bulk\.wait_group[^;]*;", "", 0, "exit while a bulk store"),
    ("scale", r"cp\.async\.bulk\.commit_group[^;]*;", "", 0, "exit while a bulk store"),
    ("ampere", r"cp\.async\.wait_group\s+1;", "", 0, "no barrier between"),
    ("ampere", r"cp\.async\.wait_group\s+1;", "cp.async.wait_group 2;", 0, "no barrier between"),
    ("ampere", r"bar\.sync\s+0;", "", 0, "no barrier between|may still read"),
    ("multicast", r"barrier\.cluster\.wait[^;]*;", "", 0, "initialised"),
    ("multicast", r"barrier\.cluster\.arrive\.relaxed[^;]*;", "", 0, "without arrive"),
    ("multicast", WAIT, PASSES, 0, "being written|a bulk load .* wrote"),
    ("multicast", r"mbarrier\.arrive\.expect_tx[^;]*;", "", 0, "deadlock|beyond what"),
]


def which_match(text: str, pattern: str, kind: int | str) -> int:
    """A match by number, or the wait for an empty or full stage, or an init by its count."""
    if isinstance(kind, int):
        return kind
    found = list(re.finditer(pattern, text))
    if kind.startswith("init"):
        count = kind.split()[1]
        registers = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", text))
        for number, match in enumerate(found):
            if registers.get(re.search(r"%r\d+;$", match.group())[0][:-1]) == count:
                return number
    user = "cp.async.bulk.tensor" if kind == "empty" else "wgmma.mma_async"
    if kind == "full" and "ldmatrix" in text[: text.index(user)]:
        user = "ldmatrix"
    return sum(match.start() < text.index(user) for match in found) - 1


def assert_names_the_place(error: simulator.SimulatorError, kernel: str) -> None:
    text = str(error)
    assert kernel in text
    assert "PTX line" in text
    assert "block (" in text
    assert "warp" in text


def error_of(runner, *arguments) -> simulator.SimulatorError | None:
    """The simulator's error is returned; a wrong result alone is None."""
    try:
        runner(*arguments)
    except simulator.SimulatorError as error:
        return error
    except AssertionError:
        pass
    return None


@needs_dsl
@pytest.mark.parametrize(("name", "pattern", "replacement", "kind", "message"), PROGRAMS)
def test_program(compiled, name, pattern, replacement, kind, message):
    program = compiled(name)
    original = program.module
    text = Path(original.path).read_text()
    number = which_match(text, pattern, kind)
    match = list(re.finditer(pattern, text))[number]
    mutant = text[: match.start()] + match.expand(replacement) + text[match.end() :]
    program.module = simulator.Module.parse(mutant)
    try:
        for seed in range(4):
            found = error_of(RUNNERS[name], program, seed)
            if found is not None:
                break
    finally:
        program.module = original
    assert found is not None
    assert re.search(message, str(found))
    assert_names_the_place(found, f"{name}_0")


# ------------------------------------------------------------------------------ hand-written PTX

BLOCK_SUM = """
    mov.b32 %r1, memory;                // each warp's sum, then the total by warp 0
    redux.sync.add.u32 %r2, %a0, -1;
    shr.u32 %r3, %r500, 5;
    shl.b32 %r4, %r3, 2;
    add.u32 %r4, %r4, %r1;
    and.b32 %r5, %r500, 31;
    setp.eq.u32 %p1, %r5, 0;
    @%p1 st.shared.b32 [%r4], %r2;
    bar.sync 0;                         // sums
    setp.lt.u32 %p2, %r500, 1;
    @!%p2 bra WAIT;
    ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r1];
    add.u32 %r6, %r6, %r7;
    add.u32 %r8, %r8, %r9;
    add.u32 %r6, %r6, %r8;
    st.shared.b32 [%r1], %r6;
    WAIT:
    bar.sync 1;                         // total
    ld.shared.b32 %d0, [%r1];
    bar.sync 2;                         // read
    st.shared.b32 [%r4], %r500;
"""

MESSAGE = """
    mov.b32 %r1, memory;                // a barrier, then a value for the other block
    mov.u32 %r2, %cluster_ctarank;
    xor.b32 %r3, %r2, 1;
    mapa.shared::cluster.u32 %r4, %r1, %r3;
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
    READY:
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;               // initialised
    @%p1 bra SENT;
    add.u32 %r5, %r2, 40;
    st.shared::cluster.b32 [%r4+8], %r5;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];
    SENT:
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    ld.shared.b32 %d0, [%r1+8];
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;                       // received
"""


def block_sum(body: str, seed: int) -> np.ndarray:
    inputs = np.arange(128, dtype=np.uint32)[:, None]
    return run(body, inputs, threads=128, shared=32, seed=seed)[:, 0]


def message(body: str, seed: int) -> np.ndarray:
    """Both blocks write their threads' results to the same rows: they must agree up to rank."""
    memory, result = simulator.GlobalMemory(), np.zeros((64, 1), np.uint32)
    memory.register(result.ctypes.data, result.nbytes, "result")
    rows = body + "mov.u32 %r9, %ctaid.x; mul.wide.u32 %rd1, %r9, 128; add.s64 %rd63, %rd63, %rd1;"
    params = [bytes(8), np.uint64(result.ctypes.data).tobytes(), bytes(128)]
    simulator.launch(
        module(rows, 0, 1), "snippet", grid=(2, 1, 1), block=(32, 1, 1), cluster=(2, 1, 1),
        params=params, memory=memory, shared_memory_bytes=32, options=simulator.Options(seed),
    )  # fmt: skip
    return result[:, 0]


@pytest.mark.parametrize("seed", range(7))
def test_the_snippets_are_correct(seed):
    assert (block_sum(BLOCK_SUM, seed) == 127 * 64).all()
    assert message(MESSAGE, seed).tolist() == [41] * 32 + [40] * 32


SNIPPETS = [
    (block_sum, BLOCK_SUM, "bar.sync 0; ", "", "warp . wrote at PTX line"),
    (block_sum, BLOCK_SUM, "bar.sync 1; ", "", "warp 0 wrote at PTX line|may still read"),
    (block_sum, BLOCK_SUM, "bar.sync 2; ", "", "may still read|wrote at"),
    (block_sum, BLOCK_SUM, "bar.sync 1; ", "bar.arrive 1, 128;", "warp 0 wrote|may still read"),
    (block_sum, BLOCK_SUM, "bar.sync 0; ", "bar.sync 0, 96;", "threads arrive|deadlock|wrote"),
    (block_sum, BLOCK_SUM, "bar.sync 0; ", "bar.sync 0, 160;", "deadlock"),
    (message, MESSAGE, "barrier.cluster.wait.acquire.aligned;", "", "initialised"),
    (message, MESSAGE, "mbarrier.arrive.release", "mbarrier.arrive.relaxed", "no barrier between"),
    (message, MESSAGE, "mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;",
     "setp.eq.u32 P, 0, 0;", "nothing has written|no barrier between"),
    (message, MESSAGE, "mbarrier.init.shared.b64 [%r1], 1;", "mbarrier.init.shared.b64 [%r1], 2;",
     "deadlock"),
    (message, MESSAGE, "barrier.cluster.arrive.release.aligned;",
     "barrier.cluster.arrive.relaxed.aligned;", None),
]  # fmt: skip


@pytest.mark.parametrize(("runner", "body", "old", "new", "expected"), SNIPPETS)
def test_snippet(runner, body, old, new, expected):
    """expected None: the fence before the relaxed arrival makes it correct."""
    assert old in body
    mutant = body.replace(old, new, 1)
    if expected is None:
        runner(mutant, 1)
        return
    errors = [error_of(runner, mutant, seed) for seed in range(4)]
    for error in errors:
        assert error is not None
        assert re.search(expected, str(error))
        assert_names_the_place(error, "snippet")


@needs_dsl
@pytest.mark.parametrize("name", ["fwd_bf16_d192", "fwd_bf16_d128_causal"])
def test_forward_kernel(monkeypatch, name):
    """Every wait for products, commit, arrival and fence of a kernel that has one stage of Q.

    The last tile's second consumer has no rows: it releases blocks that it does not read.

    Of one that has two, and releases Q late, the waits for stores: it needs tile after tile, some
    without keys, before Q's buffer is used again.
    """
    import torch

    from hopper_attention.dispatch import manifest

    if name not in manifest.instances():
        pytest.skip(f"{name} is not built")
    from hopper_attention import flash_attn_func
    from hopper_attention.dispatch import target

    monkeypatch.setattr(target, "SIMULATED_SMS", 1)
    text = manifest.ptx_path(name).read_text()
    kinds = [r"cp\.async\.bulk\.wait_group[^;]*;"]
    causal = name.endswith("causal")
    if not causal:
        kinds += [
            r"wgmma\.wait_group[^;]*;", r"wgmma\.commit_group[^;]*;", r"mbarrier\.arrive[^;]*;",
            r"fence\.proxy\.async[^;]*;", r"fence\.mbarrier_init[^;]*;",
        ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = ((500, 3), (200, 1), (200, 1)) if causal else ((180, 1), (600, 1), (600, 1))
    head_dim = manifest.instances()[name].config["head_dim"]
    q, k, v = (torch.randn(1, n, h, head_dim, generator=generator).bfloat16() for n, h in shapes)
    missed, count = [], 0
    for kind in kinds:
        for match in re.finditer(rf"(?<![.\w]){kind}", text):
            count += 1
            mutant = text[: match.start()] + text[match.end() :]
            parsed = simulator.Module.parse(mutant)
            load = staticmethod(lambda _, parsed=parsed: parsed)
            monkeypatch.setattr(simulator.Module, "load", load)
            with simulator.enabled(seed=1):
                error = error_of(lambda: flash_attn_func(q, k, v, causal=causal))
            if error is None:
                missed.append(match.group())
            else:
                assert_names_the_place(error, name)
    assert count >= (3 if causal else 15)
    assert not missed
