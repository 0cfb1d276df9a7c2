"""The built extensions: what they list, what they refuse, what reaches a launch."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest

from hopper_attention import _cuda, _simulator

NAME = "fwd_bf16_d128_causal"
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, HEAD_DIM = 2, 203, 113, 4, 2, 128


class Tensor:
    """Memory for one tensor argument, with the address aligned as a kernel wants it."""

    def __init__(self, *shape: int, itemsize: int = 2):
        self.memory = np.zeros(int(np.prod(shape)) * itemsize + 64, np.uint8)
        self.address = (self.memory.ctypes.data + 63) // 64 * 64
        self.shape = shape
        self.strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))

    def argument(self, **changes):
        values = {"address": self.address, "shape": self.shape, "strides": self.strides}
        return tuple({**values, **changes}.values())


@pytest.fixture
def tensors() -> list[Tensor]:
    q, o = (Tensor(BATCH, SEQLEN_Q, HEADS, HEAD_DIM) for _ in range(2))
    k, v = (Tensor(BATCH, SEQLEN_K, HEADS_KV, HEAD_DIM) for _ in range(2))
    return [q, k, v, o, Tensor(BATCH, HEADS, SEQLEN_Q, itemsize=4)]


@pytest.fixture
def arguments(tensors):
    return [tensor.argument() for tensor in tensors]


@pytest.fixture(autouse=True)
def launches():
    """Arguments of every call of the simulator's handler are kept; no handler stays behind."""
    calls: list[tuple] = []
    _simulator.set_launch_handler(lambda *call: calls.append(call))
    yield calls
    _simulator.set_launch_handler(None)


def launch(arguments, scalars=(0.125, 0, 0, 1, 0, 0, 132), name=NAME, device=0, module=_simulator):
    module.launch(name, device, 0, arguments, list(scalars))


def test_both_extensions_hold_what_the_manifest_lists():
    folder = Path(_simulator.__file__).parent / "kernels"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(_simulator.instances()) == sorted(_cuda.instances()) == sorted(manifest)
    for name, facts in manifest.items():
        ptx = (folder / f"{name}.ptx").read_text()
        assert all(f".entry {kernel}(" in ptx for kernel in facts["kernels"])


def test_launch_reaches_the_handler(tensors, arguments):
    seen = []

    def handler(kernel, grid, block, cluster, shared_memory_bytes, addresses):
        # Valid during the call only.
        parameters = [ctypes.string_at(address, 8) for address in addresses]
        seen.append((kernel, grid, block, cluster, shared_memory_bytes, parameters))

    _simulator.set_launch_handler(handler)
    launch(arguments)
    [(kernel, grid, block, cluster, shared_memory_bytes, parameters)] = seen
    manifest = json.loads((Path(_simulator.__file__).parent / "kernels/manifest.json").read_text())
    facts = manifest[NAME]
    assert kernel == f"{NAME}_0"
    assert np.prod(grid) == BATCH * HEADS * -(-SEQLEN_Q // facts["config"]["tile_m"])
    assert block == (facts["threads"], 1, 1)
    assert cluster == (1, 1, 1)
    assert shared_memory_bytes == facts["shared_memory_bytes"]
    assert len(parameters) == len(facts["parameters"][kernel])
    for tensor in tensors:  # tensor maps and plain tensors both begin with the address
        assert tensor.address.to_bytes(8, "little") in parameters


class Unusual(Exception):
    pass


def test_exceptions_of_the_handler_pass_unchanged(arguments):
    raised = Unusual("with", "arguments")

    def handler(*_):
        raise raised

    _simulator.set_launch_handler(handler)
    with pytest.raises(Unusual) as caught:
        launch(arguments)
    assert caught.value is raised
    _simulator.set_launch_handler(lambda *_: None)
    launch(arguments)  # and do not linger


def test_without_a_handler(arguments):
    _simulator.set_launch_handler(None)
    with pytest.raises(RuntimeError, match="no simulator is attached"):
        launch(arguments)
    with pytest.raises(TypeError, match="callable"):
        _simulator.set_launch_handler(3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (2, 203, 128)}, ValueError, "q: expected 4 dimensions, got 3 extents"),
        ({"shape": (2, 203, 4, 60)}, ValueError, r"q, shape\[3\]: 60 .* multiple of 8"),
        ({"shape": (2, 2**31, 4, 128)}, ValueError, r"q, shape\[1\]: 2147483648 .* 32 bits"),
        ({"shape": (2, 2**70, 4, 128)}, ValueError, r"q, shape\[1\]: does not fit 64 bits"),
        ({"shape": (2, -1, 4, 128)}, ValueError, r"q, shape\[1\]: negative"),
        ({"shape": (2, 1.5, 4, 128)}, TypeError, r"q, shape\[1\]: expected an integer, not float"),
        ({"shape": 2}, TypeError, "q, shape must be a list or tuple, not int"),
        ({"strides": (103936, 512, 129, 1)}, ValueError, r"q, strides\[2\]: 129 .* multiple of 8"),
        ({"strides": (103936, 512, 128, 2)}, ValueError, r"q, strides\[3\]: 2, .* compiled for 1"),
        ({"address": 2}, ValueError, "q: address is not aligned to 16 bytes"),
        ({"address": None}, TypeError, "q: address must be an int"),
    ],
)
def test_refuses_tensors_before_launching(tensors, arguments, launches, changes, error, message):
    arguments[0] = tensors[0].argument(**changes)
    with pytest.raises(error, match=f"^{NAME}: argument {message}"):
        launch(arguments)
    assert launches == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"scalars": ("x", 0, 0, 1, 0, 0, 132)},
            TypeError,
            "softmax_scale: expected a number, not str",
        ),
        (
            {"scalars": (1.0, 0.5, 0, 1, 0, 0, 132)},
            TypeError,
            "learnable_sink: expected an integer, not float",
        ),
        ({"scalars": ()}, TypeError, "expected 7 scalars, got 0"),
        ({"scalars": (1.0, 0, 0)}, TypeError, "expected 7 scalars, got 3"),
        ({"name": "nothing"}, KeyError, "no instance 'nothing'"),
        ({"device": -1}, RuntimeError, "invalid device"),
        ({"device": 64}, RuntimeError, "invalid device"),
    ],
)
def test_refuses_other_arguments(arguments, launches, given, error, message):
    with pytest.raises(error, match=message):
        launch(arguments, **given)
    assert launches == []


def test_refuses_a_wrong_number_of_tensors(arguments):
    with pytest.raises(TypeError, match="expected 5 tensors, got 4"):
        launch(arguments[:4])
    with pytest.raises(TypeError, match="tensors must be a list or tuple"):
        launch(None)


def test_strides_of_single_extents_do_not_matter(tensors, arguments, launches):
    arguments[0] = tensors[0].argument(shape=(1, 203, 4, 128), strides=(3, 512, 128, 1))
    launch(arguments)
    assert len(launches) == 1


def test_strides_beyond_32_bits(tensors, arguments, launches):
    arguments[0] = tensors[0].argument(strides=(2**40, 512, 128, 1))
    launch(arguments)
    assert len(launches) == 1


def test_launch_limits_are_a_gpus(tensors, arguments):
    arguments[0] = tensors[0].argument(shape=(2, 0, 4, 128))
    arguments[3] = tensors[3].argument(shape=(2, 0, 4, 128))
    with pytest.raises(RuntimeError, match=rf"{NAME} on device 0: .*q \(2, 0, 4, 128\), k"):
        launch(arguments)


def test_cuda_without_a_gpu_is_a_clear_error(arguments):
    info = _cuda.runtime_info()
    assert info["flavour"] in ("cu12", "cu13")
    if info["available"]:
        pytest.skip("there is a GPU")
    assert info["reason"]
    with pytest.raises(RuntimeError, match=NAME):
        launch(arguments, module=_cuda)
    with pytest.raises(RuntimeError, match=NAME):
        _cuda.load(NAME, 0)
