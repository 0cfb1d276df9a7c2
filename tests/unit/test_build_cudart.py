"""`_cuda` on a recording stand-in for libcudart: what it calls, how often, and its errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = ("unloadable", "first", "second", "other device", "no device", "refused", "recovered")

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

PROGRAM = """
import ctypes, sys
fake = ctypes.CDLL(sys.argv[1])
from test_build_bindings import NAME, Tensor, _cuda
info = _cuda.runtime_info()
assert info["available"] and info["libcudart"] == sys.argv[1] and info["device_count"] == 2, info
assert (info["runtime_version"], info["driver_version"]) == ("13.0", "13.1"), info
tensors = [Tensor(1, 64, 2, 128) for _ in range(4)] + [Tensor(1, 2, 64, itemsize=4)]
arguments = [tensor.argument() for tensor in tensors]

def launch(device, stream=0):
    try:
        _cuda.launch(NAME, device, stream, arguments, [0.125, 0, 0, 1, 0, 0, 132])
    except RuntimeError as error:
        print(error, flush=True)

fake.fail_loads(1)
print("unloadable", flush=True); launch(0)
print("first", flush=True); launch(0, 0x1230)
print("second", flush=True); launch(0)
print("other device", flush=True); launch(1)
print("no device", flush=True); launch(2)
fake.fail_launches(1)
print("refused", flush=True); launch(0)
print("recovered", flush=True); launch(0)
_cuda.load(NAME, 1)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, list[str]]:
    """Lines that the stand-in and the program print, by step."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    here = Path(__file__).parent
    library = tmp_path_factory.mktemp("cudart") / "libcudart.so.13"
    source = here / "cudart" / "fake_cudart.cpp"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line in STEPS:
            lines = steps.setdefault(line, [])
        else:
            lines.append(line)
    return steps


def test_first_launch_loads(report):
    *loading, launch = report["first"]
    assert loading[0] == "load library"
    assert loading[1] == "get kernel fwd_bf16_d128_causal_0"
    assert loading[2] == "attribute 8 = 232448 on device 0"  # largest dynamic shared memory
    assert all(line.endswith("on device 0") for line in loading[2:])
    assert launch.startswith("launch on device 0 stream 0x1230 block 384 shared memory ")


def test_second_launch_only_launches(report):
    assert [line.split(" stream")[0] for line in report["second"]] == ["launch on device 0"]


def test_other_device_is_made_current_and_restored(report):
    lines = report["other device"]
    assert "load library" not in lines
    assert lines[0] == "set device 1"
    assert "attribute 8 = 232448 on device 1" in lines
    assert lines[-2].startswith("launch on device 1")
    assert lines[-1] == "set device 0"


def test_errors_name_instance_device_and_shapes(report):
    error = "fwd_bf16_d128_causal on device {}: {} (q (1, 64, 2, 128), k (1, 64, 2, 128), "
    invalid = error.format(2, "cudaErrorInvalidDevice: invalid device ordinal")
    assert report["no device"][0] == "set device 2"
    assert report["no device"][1].startswith(invalid)
    resources = "cudaErrorLaunchOutOfResources: too many resources requested for launch"
    [refused] = report["refused"]
    assert refused.startswith(error.format(0, resources))


def test_an_error_does_not_linger(report):
    [unloadable] = report["unloadable"]
    assert "cudaErrorInvalidKernelImage: device kernel image is invalid" in unloadable
    assert report["first"][0] == "load library"
    assert report["recovered"][0].startswith("launch on device 0")
