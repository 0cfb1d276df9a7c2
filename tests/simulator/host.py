"""Run exported CuTe DSL objects in tests without the project's extension.

The object's host code is linked with a stand-in for the CUDA runtime functions it calls; launches
come back through a callback and go to the simulator.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

from hopper_attention import simulator

_STAND_IN = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3]; size_t shared; } Config;  /* its first members */
static int (*callback)(const char *, const Config *, void **);
void set_callback(int (*f)(const char *, const Config *, void **)) { callback = f; }
int _cudaLibraryLoadData(void **library) { *library = (void *)1; return 0; }
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    *kernel = strdup(name);
    return 0;
}
int _cudaKernelSetAttributeForDevice(void) { return 0; }
int _cuKernelGetAttribute(int *value) { *value = 0; return 0; }
int _cudaFuncSetAttribute(void) { return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute) { *value = 132; return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaLaunchKernelEx(const Config *config, const void *kernel, void **args) {
    return callback((const char *)kernel, config, args);
}
"""


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Config), ctypes.POINTER(ctypes.c_void_p)
)


class Exported:
    """``folder`` holds name.o and name.sm_90a.ptx; calls run on the simulator."""

    def __init__(self, folder: Path, name: str, scratch: Path):
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler, "a C compiler is required"
        source, library = scratch / "stand_in.c", scratch / f"{name}.so"
        source.write_text(_STAND_IN)
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", source, folder / f"{name}.o"]
        subprocess.run([*command, "-o", library, "-Wl,-Bsymbolic"], check=True)
        self.library = ctypes.CDLL(str(library))
        self.module = simulator.Module.load(folder / f"{name}.sm_90a.ptx")
        self.name = name
        self._callback = _CALLBACK(self._launch)
        self.library.set_callback(self._callback)
        self._load()

    def _load(self) -> None:
        """What the generated header does: init, then load for device 0."""
        handle, result, device = ctypes.c_void_p(), ctypes.c_int32(), ctypes.c_int32()
        slots = [ctypes.pointer(ctypes.pointer(handle)), ctypes.pointer(device)]
        self._call(f"_mlir_{self.name}_cuda_init", slots[0], ctypes.pointer(ctypes.pointer(result)))
        self._call(
            f"_mlir_{self.name}_cuda_load_to_device",
            slots[0],
            slots[1],
            ctypes.pointer(ctypes.pointer(result)),
        )
        assert result.value == 0

    def _call(self, function: str, *pointers) -> None:
        """Each argument is a pointer; the callee gets their array."""
        array = (ctypes.c_void_p * len(pointers))(
            *(ctypes.cast(pointer, ctypes.c_void_p).value for pointer in pointers)
        )
        getattr(self.library, function)(array)

    def _launch(self, kernel, config, arguments) -> int:
        try:
            name, c = kernel.decode(), config.contents
            params = [
                ctypes.string_at(arguments[k], p.size)
                for k, p in enumerate(self.module.kernels[name].params)
            ]
            self.statistics = simulator.launch(
                self.module, name, grid=c.grid, block=c.block, params=params, memory=self.memory,
                shared_memory_bytes=c.shared,
            )  # fmt: skip
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def __call__(self, *arguments: object) -> simulator.Statistics:
        """Arrays (extents and all strides but the contiguous one are dynamic), ctypes scalars."""
        self.memory, self.error, self.statistics = simulator.GlobalMemory(), None, None
        values = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                self.memory.register(argument.ctypes.data, argument.nbytes, f"argument {number}")
                strides = [
                    s // argument.itemsize for s in argument.strides if s != argument.itemsize
                ]
                blob = np.zeros(8 + 4 * argument.ndim + 7 & ~7, np.uint8)
                blob[:8].view(np.uint64)[0] = argument.ctypes.data
                blob[8 : 8 + 4 * argument.ndim].view(np.int32)[:] = argument.shape
                tail = np.array(strides, np.int64).view(np.uint8)
                values.append(np.concatenate([blob, tail]))
            else:
                values.append(argument)
        values += [ctypes.c_void_p(), ctypes.c_int32()]
        pointers = (ctypes.c_void_p * len(values))(
            *(v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in values)
        )
        function = getattr(self.library, f"_mlir_{self.name}__mlir_ciface_{self.name}")
        function(pointers, ctypes.c_int32(len(values)))
        if self.error is not None:
            raise self.error
        assert values[-1].value == 0 and self.statistics is not None
        return self.statistics
