"""The CUDA runtime functions that exported host code calls, answered like one H200.

Signatures are those of the CUDA runtime with an underscore in front, as CuTe DSL's host code names
them.  An exception must not cross the host code's frames: it is kept until control is back.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hopper_attention.simulator.errors import LaunchError
from hopper_attention.simulator.exported.elf import ObjectFile
from hopper_attention.simulator.ptx.parser import Module

_UNKNOWN_ERROR = 999
_CLUSTER, _PROGRAMMATIC = 4, 6  # cudaLaunchAttributeID
_ATTRIBUTES = {  # cudaDeviceAttr
    1: 1024, 8: 49152, 10: 32, 12: 65536, 16: 132, 39: 2048, 75: 9, 76: 0, 81: 233472, 82: 65536,
    97: 232448, 106: 32,
}  # fmt: skip


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class LaunchCall:
    """One call of cudaLaunchKernelEx."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int
    programmatic: bool
    pointers: Any

    def arguments(self, count: int) -> list[int]:
        """Return the addresses of the kernel's parameters."""
        return [self.pointers[k] or 0 for k in range(count)]


class Runtime:
    """Addresses of the functions for one loaded object."""

    def __init__(self, source: ObjectFile, launch: Callable[[LaunchCall], None]):
        self.source, self.launch = source, launch
        self.raised: BaseException | None = None
        self.names: dict[int, str] = {}
        self.functions = {
            "_cudaLibraryLoadData": self._function(self._load, 8),
            "_cudaLibraryGetKernel": self._function(self._kernel, 3),
            "_cudaLibraryUnload": self._function(lambda *_: 0, 1),
            "_cudaKernelSetAttributeForDevice": self._function(lambda *_: 0, 4),
            "_cuKernelGetAttribute": self._function(lambda value, *_: _put(value, 0), 4),
            "_cudaFuncSetAttribute": self._function(lambda *_: 0, 3),
            "_cudaFuncGetAttributes": self._function(lambda *_: 0, 2),
            "_cudaDeviceGetAttribute": self._function(self._attribute, 3),
            "_cudaGetDevice": self._function(lambda device: _put(device, 0), 1),
            "_cudaSetDevice": self._function(lambda *_: 0, 1),
            "_cudaGetDeviceCount": self._function(lambda count: _put(count, 1), 1),
            "_cudaGetLastError": self._function(lambda: 0, 0),
            "_cudaLaunchKernelEx": self._function(self._launch, 3),
        }
        self.process = ctypes.CDLL(None)

    def resolve(self, name: str) -> int:
        """Return the address of an undefined symbol: a function above, or one of the C library."""
        if name in self.functions:
            return ctypes.cast(self.functions[name], ctypes.c_void_p).value or 0
        if not name.startswith(("cu", "_cu")):
            try:
                found = ctypes.cast(getattr(self.process, name), ctypes.c_void_p).value
            except AttributeError:
                found = None
            if found:
                return found
        raise LaunchError(f"{self.source.path} needs {name}, which the simulator does not provide")

    def reraise(self) -> None:
        """Raise what a function raised below the host code."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised

    def _function(self, body: Callable[..., int], count: int):
        """Make a C function of word-sized arguments."""

        def guarded(*arguments: int) -> int:
            try:
                return body(*(x or 0 for x in arguments))
            except BaseException as error:
                self.raised = self.raised or error
                return _UNKNOWN_ERROR

        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * count)(guarded)

    def _load(self, library: int, *_: int) -> int:
        ctypes.c_void_p.from_address(library).value = 1
        return 0

    def _kernel(self, kernel: int, library: int, name: int) -> int:
        text = ctypes.string_at(name).decode()
        handle = next((h for h, n in self.names.items() if n == text), len(self.names) + 1)
        self.names[handle] = text
        ctypes.c_void_p.from_address(kernel).value = handle
        return 0

    def _attribute(self, value: int, attribute: int, device: int) -> int:
        number = attribute & 0xFFFFFFFF
        if number not in _ATTRIBUTES:
            raise LaunchError(f"the host code asks for device attribute {number}")
        return _put(value, _ATTRIBUTES[number])

    def _launch(self, config: int, kernel: int, pointers: int) -> int:
        c = _Config.from_address(config)
        cluster, programmatic = (1, 1, 1), False
        for k in range(c.count):
            attribute = c.attributes[k]
            if attribute.id == _CLUSTER:
                x, y, z = attribute.value[:3]
                cluster = (x, y, z)
            elif attribute.id == _PROGRAMMATIC:
                programmatic = bool(attribute.value[0])
        self.launch(
            LaunchCall(
                self.names.get(kernel, f"unknown kernel {kernel}"),
                tuple(c.grid),
                tuple(c.block),
                cluster,
                c.shared,
                programmatic,
                (ctypes.c_void_p * 4096).from_address(pointers),
            )
        )
        return 0


def _put(address: int, value: int) -> int:
    ctypes.c_int.from_address(address).value = value
    return 0


# ------------------------------------------------------------------- object and PTX belong together


def check_machine_code(source: ObjectFile, module: Module) -> None:
    """Check that every kernel of the PTX is in the object's cubin, with the same parameters.

    Raises LaunchError otherwise: the PTX is of another build.
    """
    kernels: dict[str, list[tuple[int, int]]] = {}
    for image in source.cubins():
        kernels.update(_kernel_parameters(image))
    if not kernels:
        raise LaunchError(f"{source.path} holds no CUDA kernels")
    for name, kernel in module.kernels.items():
        if name not in kernels:
            raise LaunchError(
                f"{module.path} does not match {source.path}: kernel {name} is not among the "
                f"object's {sorted(kernels)}"
            )
        given = [param.size for param in kernel.params]
        sizes = [size for _, size in sorted(kernels[name])]
        if kernels[name] and sizes != given:
            raise LaunchError(
                f"{module.path} does not match {source.path}: the parameters of {name} have "
                f"{given} bytes, in the object {sizes}"
            )


def _kernel_parameters(image: bytes) -> dict[str, list[tuple[int, int]]]:
    """Read each kernel's parameters, (offset, size), from a cubin's .nv.info sections."""
    (start,) = struct.unpack_from("<Q", image, 40)
    _, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, start + 64 * k) for k in range(count)]
    strings = headers[names][4]
    result: dict[str, list[tuple[int, int]]] = {}
    for name_at, _, _, _, offset, size, *_ in headers:
        at = strings + name_at
        name = image[at : image.index(b"\0", at)].decode()
        if name.startswith(".text."):
            result.setdefault(name.removeprefix(".text."), [])
        elif name.startswith(".nv.info."):
            found = _parameter_info(image[offset : offset + size])
            result.setdefault(name.removeprefix(".nv.info."), []).extend(found)
    return result


def _parameter_info(data: bytes) -> list[tuple[int, int]]:
    result, at = [], 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        payload = data[at + 4 : at + 4 + value] if form == 4 else b""
        if form == 4 and attribute == 0x17:  # EIATTR_KPARAM_INFO
            _, _, offset, flags = struct.unpack_from("<IHHI", payload)
            result.append((offset, flags >> 18))
        at += 4 + len(payload)
    return result
