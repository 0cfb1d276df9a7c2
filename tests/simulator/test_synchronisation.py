"""Named barriers, mbarriers, setmaxnreg, fences and the reports about their misuse."""

import numpy as np
import pytest
from simulator.snippets import run

from hopper_attention import simulator

SEEDS = range(8)

PING_PONG = """
    mov.b32 %r1, memory;
    shr.u32 %r2, %r500, 7;          // warpgroup
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra SECOND;
    mov.b32 %r3, 0;
    FIRST:
    st.shared.b32 [%r1], %r3;
    bar.arrive 1, 256;
    bar.sync 2, 256;
    add.s32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, 5;
    @%p2 bra FIRST;
    mov.b32 %d0, 0;
    bra END;
    SECOND:
    mov.b32 %d0, 0;
    mov.b32 %r3, 0;
    AGAIN:
    bar.sync 1, 256;
    ld.shared.b32 %r4, [%r1];
    mad.lo.s32 %d0, %d0, 10, %r4;
    bar.arrive 2, 256;
    add.s32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, 5;
    @%p2 bra AGAIN;
    END:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_order_two_warpgroups(seed):
    got = run(PING_PONG, threads=256, shared=16, seed=seed)[:, 0]
    assert got.tolist() == [0] * 128 + [1234] * 128


def test_without_the_barrier_some_schedule_shows_it():
    broken = PING_PONG.replace("bar.sync 2, 256;", "bar.arrive 2, 256;")
    results = set()
    for seed in SEEDS:
        try:
            results.add(run(broken, threads=256, shared=16, seed=seed)[200, 0])
        except simulator.SimulatorError as error:
            results.add(type(error))
    assert results != {1234}


PRODUCER_CONSUMER = """
    mov.b32 %r1, memory;            // full barrier, empty barrier, value
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 4;
    fence.mbarrier_init.release.cluster;
    READY:
    bar.sync 0;
    mov.b32 %d0, 0;
    mov.b32 %r2, 0;                 // iteration
    setp.lt.u32 %p2, %r500, 128;
    @%p2 bra CONSUMER;
    setp.ne.u32 %p3, %r500, 128;
    @%p3 bra END;
    PRODUCER:
    and.b32 %r3, %r2, 1;
    xor.b32 %r4, %r3, 1;
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1+8], %r4, 1000;
      @P bra DONE; bra LOOP; DONE: }
    mul.lo.s32 %r5, %r2, %r2;
    st.shared.b32 [%r1+16], %r5;
    mbarrier.arrive.shared.b64 _, [%r1];
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 6;
    @%p4 bra PRODUCER;
    bra END;
    CONSUMER:
    and.b32 %r3, %r2, 1;
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], %r3, 1000;
      @P bra DONE; bra LOOP; DONE: }
    ld.shared.b32 %r5, [%r1+16];
    add.s32 %d0, %d0, %r5;
    and.b32 %r6, %r500, 31;
    setp.ne.u32 %p5, %r6, 0;
    @!%p5 mbarrier.arrive.shared.b64 _, [%r1+8];
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 6;
    @%p4 bra CONSUMER;
    END:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarriers_hand_values_over(seed):
    got = run(PRODUCER_CONSUMER, threads=160, shared=32, seed=seed)[:, 0]
    assert got.tolist() == [55] * 128 + [0] * 32


def test_a_peek_may_fail_without_deadlock():
    """One try_wait that fails must let the warp go on: it is what fills the barrier."""
    body = """
    mov.b32 %r1, memory;
    mbarrier.init.shared.b64 [%r1], 32;
    mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0;
    selp.b32 %d0, 1, 0, %p1;
    mbarrier.arrive.shared.b64 _, [%r1];
    mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0;
    selp.b32 %d1, 1, 0, %p1;
    """
    body = body.replace("mbarrier.init", "setp.eq.u32 %p2, %r500, 0; @%p2 mbarrier.init")
    assert run(body, outputs=2, shared=16).tolist() == [[0, 1]] * 32


def test_a_deadlock_report_names_every_warp_and_barrier():
    body = """
    mov.b32 %r1, memory;
    setp.eq.u32 %p1, %r500, 0;
    @%p1 mbarrier.init.shared.b64 [%r1], 2;
    bar.sync 0;
    setp.lt.u32 %p2, %r500, 128;
    @%p2 bra WAIT;
    bar.sync 3, 256;
    WAIT:
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    """
    with pytest.raises(simulator.DeadlockError) as error:
        run(body, outputs=0, threads=256, shared=16)
    report = str(error.value)
    assert "warps [0, 1, 2, 3]" in report
    assert "warps [4, 5, 6, 7]" in report
    assert "mbarrier.try_wait" in report
    assert "bar.sync 3, 256" in report
    assert "phase 0 (parity 0), 2 of 2 arrivals and 0 bytes outstanding" in report
    assert "barrier 3: 128 of 256 threads" in report


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive.shared.b64 _, [%r1], 5;", "5 arrivals with 4 of 4 pending"),
        ("mbarrier.arrive.shared.b64 _, [%r1+8];", "no mbarrier was initialised at 0x408"),
        ("bar.sync 16;", "named barrier 16"),
        ("bar.sync 1, 16;", "32 threads arrive at 0 of 16"),
        ("@%p1 mbarrier.init.shared.b64 [%r1], 0;", "mbarrier.init with count 0"),
    ],
)
def test_misuse_of_barriers(body, message):
    setup = """
    mov.b32 %r1, memory;
    setp.eq.u32 %p1, %r500, 0;
    @%p1 mbarrier.init.shared.b64 [%r1], 4;
    """
    with pytest.raises(simulator.BarrierError, match=message) as error:
        run(setup + body, outputs=0, shared=16)
    assert "PTX line" in str(error.value)


def test_a_last_warp_that_is_not_whole():
    assert run("bar.sync 0; bar.sync 1, 64; mov.b32 %d0, %r500;", threads=40).tolist() == [
        [thread] for thread in range(40)
    ]


def test_polling_memory_that_nobody_writes(monkeypatch):
    monkeypatch.setattr("hopper_attention.simulator.execution.machine.MAX_IDLE_STEPS", 10_000)
    body = """
    LOOP:
    ld.global.b32 %r1, [%rd62];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra LOOP;
    """
    with pytest.raises(simulator.DeadlockError, match="warps poll memory"):
        run(body, np.zeros((32, 1), np.uint32), 0)
    assert run(body, np.ones((32, 1), np.uint32), 0).shape == (32, 0)


def test_too_many_bytes_for_a_transaction():
    body = """
    mov.b32 %r1, memory;
    setp.eq.u32 %p1, %r500, 0;
    @!%p1 bra END;
    mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+16], [%rd60], 32, [%r1];
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    END:
    """
    values = np.zeros((32, 1), np.uint32)
    with pytest.raises(simulator.BarrierError, match="16 bytes arrived beyond"):
        run(body, values, 0, shared=64)
    assert run(body.replace("_, [%r1], 16", "_, [%r1], 32"), values, 0, shared=64).shape == (32, 0)


REGISTERS = """
    shr.u32 %r2, %r500, 7;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra CONSUMER;
    setmaxnreg.dec.sync.aligned.u32 {low};
    bra END;
    CONSUMER:
    setmaxnreg.inc.sync.aligned.u32 {high};
    END:
    mov.b32 %d0, 1;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_registers_are_moved_between_warpgroups(seed):
    got = run(REGISTERS.format(low=40, high=232), threads=384, seed=seed)
    assert (got == 1).all()


def test_more_registers_than_the_block_has():
    with pytest.raises(simulator.DeadlockError, match=r"8192 registers, \d+ are free"):
        run(REGISTERS.format(low=120, high=232), threads=384)


BULK_STORE = """
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 4, %r1;
    st.shared.b32 [%r2], %a0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r500, 0;
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd61], [%r1], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.b32 [%r1], 1;
    END:
    bar.sync 0;
"""


@pytest.fixture
def bulk_store():
    """Runs a body whose bulk store goes to an array of 32 words."""

    def runner(body: str, seed: int, hazards: str = "raise") -> list[int]:
        target = np.zeros(32, np.uint32)
        values = np.arange(100, 132, dtype=np.uint32)[:, None]
        body = f"mov.b64 %rd61, {target.ctypes.data};" + body
        run(body, values, 0, shared=128, seed=seed, extra=(target,), hazards=hazards)
        return target.tolist()

    return runner


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_store(bulk_store, seed):
    assert bulk_store(BULK_STORE, seed) == list(range(100, 132))


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("fence.proxy.async.shared::cta;", "without a fence.proxy.async"),
        ("cp.async.bulk.wait_group.read 0;", "shared memory still being read"),
        ("cp.async.bulk.commit_group;", "shared memory still being read"),
    ],
)
def test_what_a_bulk_store_needs(bulk_store, dropped, message):
    with pytest.raises(simulator.HazardError, match=message):
        bulk_store(BULK_STORE.replace(dropped, ""), 0)


def test_exit_with_a_bulk_store_under_way(bulk_store):
    body = BULK_STORE.replace("cp.async.bulk.wait_group.read 0;", "")
    body = body.replace("st.shared.b32 [%r1], 1;", "")
    with pytest.raises(simulator.HazardError, match="exit while a bulk store may still read"):
        bulk_store(body, 0)
    with pytest.warns(simulator.HazardWarning, match="exit while a bulk store"):
        assert bulk_store(body, 0, "warn") == list(range(100, 132))
    assert bulk_store(body, 0, "off") == list(range(100, 132))


def test_a_late_store_reads_what_overwrote_its_source(bulk_store):
    body = BULK_STORE.replace("cp.async.bulk.wait_group.read 0;", "")
    late = 1
    assert bulk_store(body, late, "off")[0] == 1


def test_options():
    assert not simulator.is_enabled()
    with simulator.enabled(seed=3, hazards="warn"):
        assert simulator.is_enabled()
        assert simulator.current_options() == simulator.Options(3, "warn")
        with simulator.enabled():
            assert simulator.current_options() == simulator.Options()
        assert simulator.current_options().seed == 3
    assert simulator.current_options() == simulator.Options()
    with pytest.raises(ValueError, match="hazards must be one of"):
        simulator.Options(hazards="ignore")


def test_the_environment_enables_it(monkeypatch):
    monkeypatch.setenv("HOPPER_ATTENTION_SIMULATOR", "1")
    assert simulator.is_enabled()
    assert simulator.current_options() == simulator.Options()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (0, 1, 1)}, "grid"),
        ({"block": (1025, 1, 1)}, "1 to 1024 threads"),
        ({"params": [bytes(8)]}, "1 parameters, the kernel has 3"),
        ({"params": [bytes(8), bytes(4), bytes(128)]}, "parameter 1 has 4 bytes, not 8"),
        ({"cluster": (2, 1, 1)}, "clusters"),
        ({"shared_memory_bytes": 232449}, "shared memory"),
        ({"name": "other"}, "no kernel other"),
    ],
)
def test_launches_that_a_device_would_refuse(changes, message):
    from simulator.snippets import module

    arguments = {
        "name": "snippet", "grid": (1, 1, 1), "block": (32, 1, 1),
        "params": [bytes(8), bytes(8), bytes(128)], "memory": simulator.GlobalMemory(),
    } | changes  # fmt: skip
    with pytest.raises(simulator.LaunchError, match=message):
        simulator.launch(module("mov.b32 %r1, 1;"), **arguments)


def test_more_mbarriers_than_there_was_room_for():
    """Each warp waits for a barrier of its own that another warp initialised and arrives on."""
    body = """
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 8, %r1;
    mbarrier.init.shared.b64 [%r2], 1;
    bar.sync 0;
    xor.b32 %r3, %r500, 64;
    mad.lo.s32 %r4, %r3, 8, %r1;
    mad.lo.s32 %r5, %r500, 4, %r1;
    st.shared.b32 [%r5+1024], %r500;
    mbarrier.arrive.shared.b64 _, [%r4];
    { .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r2], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }
    mad.lo.s32 %r6, %r3, 4, %r1;
    ld.shared.b32 %d0, [%r6+1024];
    """
    for seed in SEEDS:
        got = run(body, threads=128, shared=2048, seed=seed)[:, 0]
        assert got.tolist() == [thread ^ 64 for thread in range(128)]
    wait = "mbarrier.try_wait.parity.shared.b64 P, [%r2], 0, 1000;"
    unordered = body.replace(wait, "setp.eq.u32 P, 0, 0;")
    with pytest.raises(simulator.HazardError, match="no barrier between"):
        run(unordered, threads=128, shared=2048)
