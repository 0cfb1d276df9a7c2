"""cp.async, local memory, 128-bit registers, 16-bit and vector atomics, distributed shared memory,
bulk stores and reductions, element strides: each against its documented meaning."""

import numpy as np
import pytest
import torch
from simulator.snippets import module, run

from hopper_attention import simulator
from hopper_attention.simulator.hardware.tensor_map import TensorMap
from hopper_attention.simulator.instructions.bulk import Tile

RNG = np.random.default_rng(0)
SEEDS = range(4)

CP_ASYNC = """
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 16, %r1;
    mad.wide.u32 %rd1, %r500, 16, %rd60;
    {copy}
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r3, %r500, 33;             // read what a lane of another warp copied
    mad.lo.s32 %r4, %r3, 16, %r1;
    ld.shared.v4.b32 {{%d0, %d1, %d2, %d3}}, [%r4];
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("copy", "kept"),
    [
        ("cp.async.cg.shared.global [%r2], [%rd1], 16;", 16),
        ("cp.async.ca.shared::cta.global.L2::128B [%r2], [%rd1], 16, 4;", 4),
        ("cp.async.cg.shared.global.L2::cache_hint [%r2], [%rd1], 16, 10, %rd2;", 10),
        ("cp.async.cg.shared.global [%r2], [%rd1], 16, 0;", 0),
        ("setp.eq.u32 %p1, 0, 0; cp.async.cg.shared.global [%r2], [%rd1], 16, %p1;", 0),
        ("cp.async.ca.shared.global [%r2], [%rd1], 8; "
         "cp.async.ca.shared.global [%r2+8], [%rd1+8], 8;", 16),
    ],
)  # fmt: skip
def test_cp_async_copies_and_fills_with_zeros(copy, kept, seed):
    data = RNG.integers(0, 1 << 32, (64, 4)).astype(np.uint32)
    got = run(CP_ASYNC.format(copy=copy), data, 4, threads=64, shared=1024, per_thread=False,
              seed=seed)  # fmt: skip
    expected = data.copy()
    expected.view(np.uint8)[:, kept:] = 0
    np.testing.assert_array_equal(got, expected[np.arange(64) ^ 33])


@pytest.mark.parametrize(
    "drop", ["cp.async.wait_group 0;", "cp.async.commit_group;", "bar.sync 0;"]
)
def test_what_cp_async_needs(drop):
    data = np.zeros((64, 4), np.uint32)
    body = CP_ASYNC.format(copy="cp.async.cg.shared.global [%r2], [%rd1], 16;").replace(drop, "")
    with pytest.raises(simulator.HazardError, match=r"no barrier between|exit with cp\.async"):
        run(body, data, 4, threads=64, shared=1024, per_thread=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_arrives_on_an_mbarrier(seed):
    body = """
    mov.b32 %r1, memory;
    setp.eq.u32 %p1, %r500, 0;
    @%p1 mbarrier.init.shared.b64 [%r1+1024], 64;
    bar.sync 0;
    mad.lo.s32 %r2, %r500, 16, %r1;
    mad.wide.u32 %rd1, %r500, 16, %rd60;
    cp.async.cg.shared.global [%r2], [%rd1], 16;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r1+1024];
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1+1024], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    xor.b32 %r3, %r500, 33;
    mad.lo.s32 %r4, %r3, 16, %r1;
    ld.shared.v4.b32 {%d0, %d1, %d2, %d3}, [%r4];
    cp.async.wait_all;
    """
    data = RNG.integers(0, 1 << 32, (64, 4)).astype(np.uint32)
    got = run(body, data, 4, threads=64, shared=1040, per_thread=False, seed=seed)
    np.testing.assert_array_equal(got, data[np.arange(64) ^ 33])


def test_local_memory_is_each_threads_own():
    body = """
    .local .align 16 .b8 __local_depot0[64];
    mov.b64 %rd1, __local_depot0;
    cvta.local.u64 %rd2, %rd1;
    and.b32 %r1, %r500, 7;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    st.b32 [%rd4], %r500;
    add.s64 %rd5, %rd1, %rd3;
    ld.local.b32 %d0, [%rd5];
    """
    assert run(body)[:, 0].tolist() == list(range(32))
    with pytest.raises(simulator.OutOfBounds, match="local memory"):
        run(body.replace("mul.wide.u32 %rd3, %r1, 4", "mul.wide.u32 %rd3, %r500, 4"))


def test_128_bit_registers():
    data = RNG.integers(0, 1 << 32, (32, 4)).astype(np.uint32)
    body = """
    .reg .b128 %rq<3>;
    ld.global.b128 %rq1, [%rd62];
    mov.b128 {%rd1, %rd2}, %rq1;
    mov.b64 {%d0, %d1}, %rd2;
    mov.b64 {%d2, %d3}, %rd1;
    """
    np.testing.assert_array_equal(run(body, data, 4)[:, [2, 3, 0, 1]], data)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_atomics_round_each_sum(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    x = torch.randn(32, 2).to(dtype)
    total = np.zeros(4, np.uint32)
    body = f"mov.b64 %rd1, {total.ctypes.data}; red.global.add.noftz.{kind}x2 [%rd1], %a0;"
    body += f"red.global.add.noftz.v2.{kind}x2 [%rd1+8], {{%a0, %a0}};"
    run(body, x.view(torch.int16).numpy().view(np.uint32), 0, extra=(total,))
    expected = torch.zeros(2, dtype=dtype)
    for row in x:
        expected = (expected.double() + row.double()).to(dtype)
    got = torch.from_numpy(total.view(np.int16)).view(dtype)
    for k in (0, 2, 3):
        assert torch.equal(got[2 * k : 2 * k + 2], expected)


def test_vector_atomics_return_what_was_there():
    total = np.array([5, 6, 7, 8], np.float32)
    body = f"mov.b64 %rd1, {total.ctypes.data}; setp.eq.u32 %p1, %r500, 3;"
    body += "@%p1 atom.global.add.v2.f32 {%d0, %d1}, [%rd1+8], {%a0, %a1};"
    inputs = np.full((32, 2), 1.5, np.float32).view(np.uint32)
    got = run(body, inputs, 2, extra=(total,)).view(np.float32)
    assert got[3].tolist() == [7, 8]
    assert total.tolist() == [5, 6, 8.5, 9.5]


def test_match_finds_lanes_with_equal_values():
    values = (np.arange(32) % 5).astype(np.uint32)[:, None]
    body = "match.any.sync.b32 %d0, %a0, -1; match.all.sync.b32 %d1|%p1, %a0, -1;"
    got = run(body + "selp.b32 %d2, 1, 0, %p1;", values, 3)
    masks = [sum(1 << j for j in range(32) if j % 5 == i % 5) for i in range(32)]
    assert got[:, 0].tolist() == masks
    assert not got[:, 1:].any()
    assert (run(body, np.ones((32, 1), np.uint32), 2) == 0xFFFFFFFF).all()


def cluster(body: str, seed: int = 0) -> np.ndarray:
    """Two blocks of 32 threads; (2, 32) results."""
    memory, result = simulator.GlobalMemory(), np.zeros((2, 32), np.uint32)
    memory.register(result.ctypes.data, result.nbytes, "result")
    body += "mov.u32 %r9, %ctaid.x; mul.wide.u32 %rd1, %r9, 128; add.s64 %rd63, %rd63, %rd1;"
    params = [bytes(8), np.uint64(result.ctypes.data).tobytes(), bytes(128)]
    simulator.launch(
        module(body, 0, 1), "snippet", grid=(2, 1, 1), block=(32, 1, 1), cluster=(2, 1, 1),
        params=params, memory=memory, shared_memory_bytes=512, options=simulator.Options(seed),
    )  # fmt: skip
    return result


SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
EXCHANGE = f"""
    mov.b32 %r1, memory;
    mov.u32 %r2, %cluster_ctarank;
    xor.b32 %r3, %r2, 1;
    mad.lo.s32 %r4, %r500, 4, %r1;
    mad.lo.s32 %r5, %r2, 100, %r500;
    st.shared.b32 [%r4], %r5;
    {SYNC}
    mapa.shared::cluster.u32 %r6, %r4, %r3;
    ld.shared::cluster.b32 %d0, [%r6];
    atom.shared::cluster.add.u32 %r7, [%r6], 1000;
    cvt.u64.u32 %rd2, %r4;
    cvta.shared.u64 %rd3, %rd2;
    mapa.u64 %rd4, %rd3, %r3;
    ld.b32 %r8, [%rd4];
    add.u32 %d0, %d0, %r8;
    {SYNC}
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_distributed_shared_memory(seed):
    got = cluster(EXCHANGE, seed)
    assert got[0].tolist() == [2 * (100 + i) + 1000 for i in range(32)]
    assert got[1].tolist() == [2 * i + 1000 for i in range(32)]


def test_a_block_must_not_exit_while_others_read_its_memory():
    body = EXCHANGE[: EXCHANGE.rindex(SYNC)]

    def every_order() -> None:
        for seed in range(12):
            cluster(body, seed)

    with pytest.raises(simulator.OutOfBounds, match="whose threads have all exited"):
        every_order()


def test_cluster_special_registers():
    body = "mov.u32 %d0, %cluster_nctarank; mov.u32 %r1, %cluster_ctaid.x; shl.b32 %r1, %r1, 4;"
    body += "add.u32 %d0, %d0, %r1; mov.u32 %r2, %clusterid.x; add.u32 %d0, %d0, %r2;"
    assert cluster(body)[:, 0].tolist() == [2, 18]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("operation", ["add", "min", "max"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "s32"])
def test_bulk_reductions(kind, operation, seed):
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "s32": torch.int32}
    count = 256 // dtype[kind].itemsize
    x, y = (torch.randint(-50, 50, (count,)).to(dtype[kind]) for _ in range(2))
    target = y.clone()
    body = f"""
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 8, %r1;
    st.shared.v2.b32 [%r2], {{%a0, %a1}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra END;
    mov.b64 %rd1, {target.data_ptr()};
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}{{}}.{kind} [%rd1], [%r1], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    END:
    """.replace("{}", ".noftz" if kind in ("f16", "bf16") and operation == "add" else "")
    raw = target.view(torch.uint8).numpy()
    run(body, x.view(torch.int32).numpy().view(np.uint32).reshape(32, 2), 0, shared=256,
        extra=(raw,), seed=seed)  # fmt: skip
    torch_name = {"add": "add", "min": "minimum", "max": "maximum"}[operation]
    assert torch.equal(target, getattr(torch, torch_name)(x, y))


def test_read_only_waits_for_shared_memory_alone():
    """After wait_group.read global memory may still be old; after wait_group it is not."""
    body = """
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 4, %r1;
    st.shared.b32 [%r2], %a0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra END;
    mov.b64 %rd1, TARGET;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    ld.global.b32 %d0, [%rd1];
    cp.async.bulk.wait_group 0;
    ld.global.b32 %d1, [%rd1];
    END:
    """
    seen = set()
    for seed in range(7):
        target = np.zeros(32, np.uint32)
        text = body.replace("TARGET", str(target.ctypes.data))
        got = run(text, np.full((32, 1), 9, np.uint32), 2, shared=128, extra=(target,), seed=seed)
        seen.add(int(got[0, 0]))
        assert got[0, 1] == 9
    assert seen == {0, 9}


@pytest.mark.parametrize("start", [(0, 0), (3, -1), (-5, 6)])
def test_element_strides_skip_rows(start):
    """A box of 8 rows with element stride 3 takes rows 0, 3, 6; columns are never skipped."""
    data = RNG.integers(0, 99, (12, 16)).astype(np.uint8)
    memory = simulator.GlobalMemory()
    memory.register(data.ctypes.data, data.nbytes, "data")
    tensor_map = TensorMap(data.ctypes.data, "u8", 1, (16, 12), (1, 16), (16, 8), (1, 3), 0)
    tile = Tile(tensor_map, [start[0], start[1]])
    got = tile.read(memory).view(np.uint8).reshape(3, 16)
    for j, i in np.ndindex(3, 16):
        row, column = start[1] + 3 * j, start[0] + i
        inside = 0 <= row < 12 and 0 <= column < 16
        assert got[j, i] == (data[row, column] if inside else 0)


def test_blocks_that_wait_for_later_blocks():
    """Block 0 polls what block 1 writes: it is set aside until that has run."""
    flag = np.zeros(1, np.uint32)
    body = f"""
    mov.b64 %rd1, {flag.ctypes.data};
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p1, %r1, 1;
    @%p1 bra WRITE;
    LOOP:
    ld.acquire.gpu.global.b32 %r2, [%rd1];
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra LOOP;
    bra END;
    WRITE:
    st.release.gpu.global.b32 [%rd1], 7;
    END:
    """
    memory = simulator.GlobalMemory()
    memory.register(flag.ctypes.data, 4, "flag")
    params = [bytes(8)] * 2 + [bytes(128)]
    statistics = simulator.launch(
        module(body), "snippet", grid=(2, 1, 1), block=(32, 1, 1), params=params, memory=memory
    )
    assert statistics.blocks == 2
    assert flag[0] == 7


@pytest.mark.parametrize(("clusters", "ran"), [(None, 6), (1, 1), (3, 3), (9, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_blocks_of_a_larger_grid(clusters, ran, seed):
    """They alone run, and know how large the grid is."""
    sizes = np.zeros(6, np.uint32)
    body = f"""
    mov.b64 %rd1, {sizes.ctypes.data};
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %nctaid.x;
    mad.lo.u32 %r1, %r2, %r3, %r1;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    mov.u32 %r4, %nctaid.y;
    mad.lo.u32 %r3, %r3, 10, %r4;
    st.global.b32 [%rd1], %r3;
    """
    memory = simulator.GlobalMemory()
    memory.register(sizes.ctypes.data, sizes.nbytes, "sizes")
    call = {
        "grid": (3, 2, 1), "block": (32, 1, 1), "params": [bytes(8)] * 2 + [bytes(128)],
        "memory": memory, "options": simulator.Options(seed),
    }  # fmt: skip
    statistics = simulator.launch(module(body), "snippet", **call, clusters=clusters)
    assert statistics.blocks == ran
    assert sizes.tolist() == [32] * ran + [0] * (6 - ran)
    with pytest.raises(simulator.LaunchError, match="clusters must be from 1"):
        simulator.launch(module(body), "snippet", **call, clusters=0)
