"""Tensor maps: decoding, and TMA loads and stores against plain index arithmetic."""

import itertools

import numpy as np
import pytest
from simulator.snippets import run

from hopper_attention import simulator
from hopper_attention.simulator.hardware.tensor_map import swizzle_address

RNG = np.random.default_rng(0)
ELEMENTS = {np.uint8: 0, np.uint16: 1, np.uint32: 2, np.uint64: 4, np.float16: 6, np.float32: 7}


def encode(
    array: np.ndarray, box: tuple[int, ...], swizzle: int = 0, code: int | None = None
) -> bytes:
    """A tensor map of an array (last dimension contiguous); box has the contiguous one first."""
    words = np.zeros(32, np.uint32)
    code = ELEMENTS[array.dtype.type] if code is None else code
    address = array.ctypes.data
    words[0], words[1] = address & 0xFFFFFFFF, address >> 32
    mode = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    words[2] = 2 | (array.ndim - 1) << 4 | code << 7 | mode << 13 | 1 << 18
    for k, stride in enumerate(array.strides[-2::-1]):
        words[3 + k] = stride // 16 & 0xFFFFFFFF
        words[7] |= stride // 16 >> 32 << 4 * k
    for k, size in enumerate(array.shape[::-1]):
        words[8 + k] = size - 1
    words[13] = (box[0] - 1) << 24
    words[14] = sum((n - 1) << 8 * k for k, n in enumerate(box[1:]))
    return words.tobytes()


def test_tensor_map_reads_back_what_was_encoded():
    array = np.zeros((3, 5, 7, 64), np.uint16)
    found = simulator.decode(encode(array, (64, 2, 4, 1), 128, code=10))
    assert (found.base, found.element, found.element_bytes) == (array.ctypes.data, "bf16", 2)
    assert found.sizes == (64, 7, 5, 3)
    assert found.strides == (2, 128, 896, 4480)
    assert found.box == (64, 2, 4, 1)
    assert (found.swizzle, found.rank, found.box_bytes) == (128, 4, 1024)
    assert found.element_strides == (1, 1, 1, 1)


def test_decode_takes_all_bits_of_strides():
    words = np.zeros(32, np.uint32)
    words[2] = 2 | 2 << 4 | 7 << 7 | 1 << 16
    words[3], words[4], words[7] = 5, 0xFFFFFFFF, 0x0F0
    found = simulator.decode(words.tobytes())
    assert found.strides == (4, 80, (0xF << 32 | 0xFFFFFFFF) * 16)
    assert found.element == "tf32"


def test_decode_refuses_other_bytes():
    with pytest.raises(simulator.SimulatorError, match="not a tensor map"):
        simulator.decode(bytes(128))


@pytest.mark.parametrize(("span", "rows"), [(0, 1), (32, 2), (64, 4), (128, 8)])
def test_swizzle(span, rows):
    """Tables of the PTX documentation: unit c of 128-byte line r goes to c ^ f(r)."""
    for line, unit, byte in itertools.product(range(16), range(8), (0, 15)):
        moved = unit ^ {0: 0, 32: line % 2, 64: line % 4, 128: line % 8}[span]
        address = np.array([4096 + line * 128 + unit * 16 + byte])
        assert swizzle_address(address, span)[0] == 4096 + line * 128 + moved * 16 + byte
    assert rows == max(1, span // 16)


LOAD = """
    mov.b32 %r1, memory;
    mov.b64 %rd1, map;
    cvta.param.u64 %rd2, %rd1;
    setp.eq.u32 %p1, %r500, 0;
    @!%p1 bra WAIT;
    mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {nbytes};
    cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%r1+1024], [%rd2, {{{coordinates}}}], [%r1];
    WAIT:
    bar.sync 0;
    {{ .reg .pred P; LOOP: mbarrier.try_wait.parity.shared.b64 P, [%r1], 0, 1000;
      @P bra DONE; bra LOOP; DONE: }}
"""


def load(array, box, coordinates, swizzle=0, seed=0, body=LOAD) -> np.ndarray:
    """Bytes of shared memory after a TMA load."""
    nbytes = int(np.prod(box)) * array.itemsize
    body = body.format(
        nbytes=nbytes, rank=array.ndim, coordinates=", ".join(str(c) for c in coordinates)
    )
    dump = "\n".join(
        f"ld.shared.b32 %d{k}, [%r3+{1024 + 4 * k}];" for k in range(nbytes // 4 // 32)
    )
    body += f"mad.lo.s32 %r3, %r500, {nbytes // 32}, %r1;" + dump
    got = run(
        body, None, nbytes // 128, shared=8192, seed=seed, tensor_map=encode(array, box, swizzle),
        extra=(array,),
    )  # fmt: skip
    return got.reshape(-1).view(np.uint8)


def expected_box(array: np.ndarray, box, coordinates) -> np.ndarray:
    """Element by element, zeros outside of the tensor."""
    result = np.zeros(box[::-1], array.dtype)
    for place in np.ndindex(*box[::-1]):
        at = tuple(p + c for p, c in zip(place, coordinates[::-1], strict=True))
        if all(0 <= a < n for a, n in zip(at, array.shape, strict=True)):
            result[place] = array[at]
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("dtype", "shape", "box", "coordinates"),
    [
        (np.uint16, (40, 72), (64, 32), (0, 0)),
        (np.uint16, (40, 72), (64, 32), (16, 24)),
        (np.uint16, (40, 72), (64, 32), (-8, -5)),
        (np.uint32, (9, 8, 16), (8, 4, 8), (4, 6, 3)),
        (np.uint8, (2, 3, 40, 32), (32, 16, 2, 2), (0, 30, 1, 1)),
        (np.uint16, (4, 64), (64, 32), (0, 100)),
    ],
)
def test_load_fills_with_zeros_outside(dtype, shape, box, coordinates, seed):
    array = RNG.integers(1, 250, shape).astype(dtype)
    got = load(array, box, coordinates, seed=seed).view(dtype).reshape(box[::-1])
    np.testing.assert_array_equal(got, expected_box(array, box, coordinates))


@pytest.mark.parametrize("span", [32, 64, 128])
def test_load_with_swizzle(span):
    array = RNG.integers(1, 2**16, (40, 80)).astype(np.uint16)
    box = (span // 2, 32)
    got = load(array, box, (4, 10), span).reshape(-1, 16)
    rows = expected_box(array, box, (4, 10)).view(np.uint8).reshape(32, -1, 16)
    for row, unit in np.ndindex(32, span // 16):
        address = row * span + unit * 16
        line = address // 128
        mask = {32: line % 2, 64: line % 4, 128: line % 8}[span]
        assert (got[(address // 16) ^ mask] == rows[row, unit]).all()


STORE = """
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p1 bra END;
    cp{reduce}.async.bulk.tensor.2d.global.shared::cta{add}.tile.bulk_group
        [%rd2, {{24, 30}}], [%r1+1024];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    END:
"""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reduce", [False, True])
def test_store_drops_what_lies_outside(reduce, seed):
    array = RNG.integers(1, 100, (40, 48)).astype(np.float32)
    before = array.copy()
    text = {"reduce": ".reduce" if reduce else "", "add": ".add" if reduce else ""}
    body = LOAD + STORE.replace("{reduce}", text["reduce"]).replace("{add}", text["add"])
    load(array, (32, 16), (0, 0), 128, seed, body)
    want = before.copy()
    part = before[:10, :24]
    want[30:, 24:] = part + (before[30:, 24:] if reduce else 0)
    np.testing.assert_array_equal(array, want)


def test_a_box_outside_of_registered_memory():
    array = RNG.integers(1, 100, (40, 64)).astype(np.uint16)
    other = np.lib.stride_tricks.as_strided(array, (80, 64), array.strides)
    body = LOAD.format(nbytes=4096, rank=2, coordinates="0, 60")
    with pytest.raises(simulator.OutOfBounds, match="global access"):
        run(body, shared=8192, tensor_map=encode(other, (64, 32)), extra=(array,), outputs=0)


def test_the_destination_is_poison_until_the_data_arrives():
    array = RNG.integers(1, 250, (32, 64)).astype(np.uint16)
    wait = LOAD[LOAD.index("{{ .reg") :]
    body = LOAD.replace(wait, "")
    late = 1
    with pytest.raises(simulator.HazardError, match="reads shared memory being written"):
        load(array, (64, 32), (0, 0), seed=late, body=body)


def test_a_load_over_one_that_is_under_way():
    array = RNG.integers(1, 250, (32, 64)).astype(np.uint16)
    copy = LOAD[LOAD.index("mbarrier.arrive") : LOAD.index("WAIT:")]
    twice = LOAD.replace(
        copy, copy.replace("mbarrier.arrive.expect_tx", "mbarrier.expect_tx") + copy
    )
    with pytest.raises(simulator.HazardError, match="writes shared memory being written"):
        load(array, (64, 32), (0, 0), seed=1, body=twice)


def test_an_mbarrier_that_was_not_fenced():
    array = RNG.integers(1, 250, (32, 64)).astype(np.uint16)
    body = LOAD.replace("fence.mbarrier_init.release.cluster;", "")
    with pytest.raises(simulator.HazardError, match=r"no fence\.mbarrier_init"):
        load(array, (64, 32), (0, 0), body=body)
