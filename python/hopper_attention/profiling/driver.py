"""The four functions of the CUDA driver that a patched kernel needs; torch has initialised it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from hopper_attention.errors import UserError

MAX_DYNAMIC_SHARED_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


def load(ptx: str, kernel: str, shared_memory_bytes: int) -> ctypes.c_void_p:
    """The kernel's CUfunction, compiled by the driver in the current context; never unloaded.

    Raises UserError with the driver's reason.
    """
    cuda = _library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), ptx.encode()), "loading the PTX")
    _check(cuda.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()), "the kernel")
    _check(
        cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_MEMORY, shared_memory_bytes),
        "its shared memory",
    )
    return function


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_memory_bytes: int,
    stream: int,
    parameters: Sequence[int],
) -> None:
    """`parameters`: addresses of the parameters' values."""
    pointers = (ctypes.c_void_p * len(parameters))(*parameters)
    error = _library().cuLaunchKernel(
        function, *grid, *block, shared_memory_bytes, ctypes.c_void_p(stream), pointers, None
    )
    _check(error, "the launch")


def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError("no CUDA driver (libcuda.so.1)") from None


def _check(error: int, what: str) -> None:
    if error != 0:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(error, ctypes.byref(name))
        text = name.value.decode() if name.value else f"error {error}"
        raise UserError(f"the driver refused {what}: {text}")
