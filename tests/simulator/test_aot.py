"""Objects exported ahead of time: what is refused, and that nothing is written after an error."""

import ctypes
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hopper_attention import simulator

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl to compile"
    ),
]


@pytest.fixture
def softmax(compiled):
    return compiled("softmax")


@pytest.fixture
def files(softmax, tmp_path) -> list[Path]:
    """Copies of the object, the header and the PTX."""
    folder = Path(softmax.module.path).parent
    names = ["softmax.o", "softmax.h", "softmax.sm_90a.ptx"]
    return [Path(shutil.copy(folder / name, tmp_path)) for name in names]


def patch(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def refused(files: list[Path], message: str, prefix: str = "softmax") -> None:
    with pytest.raises(simulator.LaunchError, match=message):
        simulator.load_aot(*files, prefix)


def test_two_copies_of_an_object_do_not_meet(files):
    first, second = (simulator.load_aot(*files, "softmax") for _ in range(2))
    x = torch.randn(5, 64)
    results = [torch.zeros_like(x) for _ in range(2)]
    first(x, results[0])
    second(x, results[1], None)  # a stream may be given
    torch.testing.assert_close(results[0], x.softmax(dim=1))
    assert torch.equal(*results)


def test_other_files(files, softmax):
    refused(files, "declares no function of prefix 'other'; it has \\['softmax'\\]", "other")
    refused([files[0], files[1], files[2].with_name("none.ptx")], "none.ptx does not exist")
    refused([files[1], *files[1:]], "softmax.h is not an ELF object")


def test_another_host_or_kind_of_object(files):
    patch(files[0], 18, b"\xb7\x00")
    refused(files, "is for aarch64; this simulator loads x86-64 objects")
    patch(files[0], 16, b"\x03\x00\x3e\x00")
    refused(files, "not a relocatable object")


def test_another_gpu(files):
    files[2].write_text(files[2].read_text().replace(".target sm_90a", ".target sm_100a"))
    refused(files, "is for sm_100a; supported: sm_80, .*, sm_90a")


def test_ptx_of_another_kernel(files, compiled):
    other = Path(compiled("scale").module.path)
    refused([files[0], files[1], other], "kernel scale_0 is not among the object's .*softmax_0")
    text = files[2].read_text()
    files[2].write_text(text.replace("softmax_0(", "softmax_0(.param .u32 more,", 1))
    refused(files, "the parameters of softmax_0 have .* bytes, in the object")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([np.zeros((2, 4), np.float32)], r"takes 2 arguments \(mX: tensor, mY: tensor\), got 1"),
        ([np.zeros((2, 4), np.float32)] * 4, "got 4"),
        ([np.zeros((2, 4), np.float32), 3], "mY must be a numpy array or a torch tensor"),
        ([np.zeros((2, 4, 4), np.float32)] * 2, "mX has 3 modes"),
        ([torch.zeros(2, 4, device="meta")] * 2, "mX is on meta"),
    ],
)
def test_wrong_arguments(softmax, arguments, message):
    with pytest.raises(simulator.LaunchError, match=message):
        softmax(*arguments)


def test_wrong_dtype(compiled):
    x = np.zeros((32, 32), np.float32)
    with pytest.raises(simulator.LaunchError, match="mX is float32; the kernel reads it as f16"):
        compiled("scale")(x, x.copy())


def test_read_only_output(softmax):
    x, y = np.zeros((8, 32), np.float32), np.zeros((8, 32), np.float32)
    y.flags.writeable = False
    with pytest.raises(simulator.OutOfBounds, match="write to read-only mY"):
        softmax(x, y)


def test_modes_by_name(files):
    """Which modes are dynamic may be said; a size-one mode of unit stride leaves no doubt then."""
    modes = {"mX": ((0, 1), (0,)), "mY": ((0, 1), (0,))}
    program = simulator.load_aot(*files, "softmax", dynamic_modes=modes)
    x = torch.randn(3, 4)
    y = torch.zeros_like(x)
    program(x, y)
    torch.testing.assert_close(y, x.softmax(dim=1))
    with pytest.raises(simulator.LaunchError, match="the header has 2 dynamic extents and 1"):
        simulator.load_aot(*files, "softmax", dynamic_modes={"mX": ((0,), ())})(x, y)


def test_scalars():
    from hopper_attention.simulator.exported.aot import Parameter, _scalar

    integer, real = Parameter("n", "scalar", "int32_t"), Parameter("s", "scalar", "float")
    assert _scalar(integer, np.int64(7)).value == 7
    assert _scalar(real, ctypes.c_float(0.5)).value == 0.5
    assert _scalar(Parameter("b", "scalar", "__nv_bfloat16"), 1.0).value == 0x3F80
    for value, message in ((1 << 31, "does not fit int32_t"), (1.5, "must be an integer")):
        with pytest.raises(simulator.LaunchError, match=message):
            _scalar(integer, value)
    with pytest.raises(simulator.LaunchError, match="s must be a number"):
        _scalar(real, "1")


def test_memory_is_restored_page_by_page():
    data = np.arange(100_000, dtype=np.uint32)
    memory = simulator.GlobalMemory()
    memory.register(data.ctypes.data, data.nbytes, "data")

    def write(column: int) -> None:
        box = memory.box(data.ctypes.data + 4 * column, (5, 3), (40_000, 4), 4, True)
        box[...] = 0
        addresses = data.ctypes.data + 4 * np.arange(90_000, 90_032).astype(np.uint64)
        memory.store(addresses, 4, [np.zeros(32, np.uint32)])

    def fail() -> None:
        with memory.transaction():
            write(7)
            assert data[7] == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (data == np.arange(100_000)).all()
    with memory.transaction():
        write(7)
    assert data[7] == data[10_008] == data[90_031] == 0 and data[10] == 10
