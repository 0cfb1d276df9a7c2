"""Objects that CuTe DSL exported ahead of time, as callables on CPU tensors.

``load_aot`` loads the object into the process (elf.py), answers the CUDA runtime functions that its
host code calls (cuda_runtime.py) and hands each launch to the simulator with the PTX at hand.  The
header tells the arguments:

    T *name               a tensor: {data; dynamic_shapes[k]; dynamic_strides[j]}
    void *name            a pointer: an array, or an integer address
    int32_t, float, ...   a scalar
    cudaStream_t name     a stream: ignored, may be left out of the call
"""

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hopper_attention.simulator.errors import LaunchError, SimulatorError
from hopper_attention.simulator.execution.machine import Statistics, launch
from hopper_attention.simulator.exported import cuda_runtime
from hopper_attention.simulator.exported.elf import LoadedObject, ObjectFile
from hopper_attention.simulator.hardware.memory import GlobalMemory
from hopper_attention.simulator.hardware.tensor_map import decode
from hopper_attention.simulator.options import Options, current_options
from hopper_attention.simulator.ptx.parser import Kernel, Module

_SCALARS: dict[str, Any] = {
    "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8, "int16_t": ctypes.c_int16,
    "uint16_t": ctypes.c_uint16, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
    "double": ctypes.c_double, "bool": ctypes.c_bool,
}  # fmt: skip
_HALVES = {"__nv_bfloat16": "bf16", "nv_bfloat16": "bf16", "half": "f16", "__half": "f16"}
_SUPPORTED_TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a")


@dataclass(frozen=True)
class Parameter:
    """One argument of the wrapper function.

    kind: "tensor", "pointer", "scalar" or "stream".  shapes, strides: counts of dynamic modes;
    shape_bits, stride_bits: their widths.
    """

    name: str
    kind: str
    type: str
    shapes: int = 0
    strides: int = 0
    shape_bits: int = 32
    stride_bits: int = 64


@dataclass(frozen=True)
class Header:
    """The facts of a generated header."""

    entry: str
    returns: str
    parameters: tuple[Parameter, ...]

    @staticmethod
    def load(path: str | Path, prefix: str) -> "Header":
        """Read a header.  Raises LaunchError where it has no wrapper of this prefix."""
        text = Path(path).read_text()
        wrapper = re.search(rf"(\w+) \w+_{re.escape(prefix)}_wrapper\((.*?)\)\s*\{{", text, re.S)
        entry = re.search(rf"void (_mlir_{re.escape(prefix)}__mlir_ciface_\w+)\(", text)
        if wrapper is None or entry is None:
            found = re.findall(r"(\w+)_Kernel_Module_Load\(", text)
            raise LaunchError(f"{path} declares no function of prefix {prefix!r}; it has {found}")
        tensors = {
            name: re.findall(r"(int32_t|int64_t) dynamic_(shapes|strides)\[(\d+)\]", body)
            for body, name in re.findall(r"typedef struct \{([^{}]*)\} (\w+_t);", text)
        }
        declared = [" ".join(item.split()) for item in wrapper[2].split(",")][1:]
        return Header(entry[1], wrapper[1], tuple(_parameter(x, tensors) for x in declared))


def _parameter(declaration: str, tensors: dict[str, list]) -> Parameter:
    found = re.fullmatch(r"(.*?[\s*])(\w+)", declaration)
    if found is None:
        raise LaunchError(f"cannot parse the header's argument {declaration!r}")
    kind, name = found[1].strip(), found[2]
    base = kind.rstrip("* ")
    if base == "cudaStream_t":
        return Parameter(name, "stream", base)
    if base == "void":
        return Parameter(name, "pointer", base)
    if "*" not in kind and (base in _SCALARS or base in _HALVES):
        return Parameter(name, "scalar", base)
    if base in tensors and "TensorList" not in base:
        facts = {what: (int(bits[3:5]), int(n)) for bits, what, n in tensors[base]}
        shape_bits, shapes = facts.get("shapes", (32, 0))
        stride_bits, strides = facts.get("strides", (64, 0))
        return Parameter(name, "tensor", base, shapes, strides, shape_bits, stride_bits)
    raise LaunchError(f"the header's argument {declaration!r} is of a kind that is not supported")


@dataclass(frozen=True)
class Array:
    """A CPU tensor of torch or numpy: address, extents and strides in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    writable: bool

    @staticmethod
    def of(name: str, value: object) -> "Array":
        if isinstance(value, np.ndarray):
            strides = tuple(s // value.itemsize for s in value.strides)
            pointer, writable = value.ctypes.data, bool(value.flags.writeable)
            return Array(pointer, value.shape, strides, value.itemsize, value.dtype.name, writable)
        if all(hasattr(value, attribute) for attribute in ("data_ptr", "stride", "element_size")):
            tensor: Any = value
            if tensor.device.type != "cpu":
                raise LaunchError(f"{name} is on {tensor.device}; the simulator takes CPU tensors")
            return Array(
                tensor.data_ptr(),
                tuple(tensor.shape),
                tuple(tensor.stride()),
                tensor.element_size(),
                str(tensor.dtype).removeprefix("torch."),
                True,
            )
        raise LaunchError(f"{name} must be a numpy array or a torch tensor, got {type(value)}")

    @property
    def nbytes(self) -> int:
        if 0 in self.shape:
            return 0
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (reach + 1) * self.itemsize


class AotFunction:
    """A loaded object.  Calls take the header's arguments in order; the stream may be left out.

    dynamic_modes, where the header's counts leave open which modes are dynamic: name -> (modes
    whose extent is passed, modes whose stride is).  Otherwise all modes are, but those of unit
    stride for the strides, and for the extents if one is missing.
    """

    def __init__(
        self,
        source: ObjectFile,
        header: Header,
        module: Module,
        prefix: str,
        dynamic_modes: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
    ):
        self.header, self.module, self.prefix = header, module, prefix
        self.dynamic_modes = dict(dynamic_modes or {})
        self.runtime = cuda_runtime.Runtime(source, self._launch)
        self.loaded = LoadedObject(source, self.runtime.resolve)
        self._memory = GlobalMemory()
        self._arrays: dict[str, Array] = {}
        self._options = Options()
        self.statistics: list[Statistics] = []
        self._load_module()

    def __call__(self, *arguments: object, options: Options | None = None) -> list[Statistics]:
        """Run the host function; returns the statistics of its launches.

        Raises LaunchError for arguments that do not fit, and what the kernels raise.  Arrays are
        as before the call after any error.
        """
        parameters = self.header.parameters
        expected = [p for p in parameters if p.kind != "stream"]
        if len(arguments) == len(parameters):
            pairs = [
                (p, a) for p, a in zip(parameters, arguments, strict=True) if p.kind != "stream"
            ]
        elif len(arguments) == len(expected):
            pairs = list(zip(expected, arguments, strict=True))
        else:
            names = ", ".join(f"{p.name}: {p.kind}" for p in expected)
            raise LaunchError(f"{self.prefix} takes {len(expected)} arguments ({names}), "
                              f"got {len(arguments)}")  # fmt: skip
        self._memory, self._arrays, self.statistics = GlobalMemory(), {}, []
        self._options = options or current_options()
        given = {p.name: self._marshal(p, a) for p, a in pairs}
        values = [given.get(p.name, ctypes.c_void_p()) for p in parameters]
        with self._memory.transaction():
            result = self._call(self.header.entry, [*values, ctypes.c_int32()])
            self.runtime.reraise()
            if result:
                raise LaunchError(f"the host code of {self.prefix} returned error {result}")
        return self.statistics

    # --- arguments

    def _marshal(self, parameter: Parameter, value: object) -> Any:
        name = parameter.name
        if parameter.kind == "scalar":
            return _scalar(parameter, value)
        if parameter.kind == "pointer" and isinstance(value, int):
            return ctypes.c_void_p(value)
        array = Array.of(name, value)
        self._arrays[name] = array
        self._memory.register(array.address, array.nbytes, name, array.writable)
        if parameter.kind == "pointer":
            return ctypes.c_void_p(array.address)
        shapes, strides = self._modes(parameter, array)
        shape_type = ctypes.c_int32 if parameter.shape_bits == 32 else ctypes.c_int64
        stride_type = ctypes.c_int32 if parameter.stride_bits == 32 else ctypes.c_int64
        fields: list[tuple[str, Any]] = [("data", ctypes.c_void_p)]
        fields += [("shapes", shape_type * len(shapes))] if shapes else []
        fields += [("strides", stride_type * len(strides))] if strides else []
        blob = type("TensorArgument", (ctypes.Structure,), {"_fields_": fields})()
        blob.data = array.address
        for field, modes, source in (
            ("shapes", shapes, array.shape),
            ("strides", strides, array.strides),
        ):
            for k, mode in enumerate(modes):
                getattr(blob, field)[k] = source[mode]
        return blob

    def _modes(self, parameter: Parameter, array: Array) -> tuple[Sequence[int], Sequence[int]]:
        name, rank = parameter.name, len(array.shape)
        if name in self.dynamic_modes:
            shapes, strides = self.dynamic_modes[name]
            if (len(shapes), len(strides)) != (parameter.shapes, parameter.strides):
                raise LaunchError(
                    f"dynamic_modes of {name}: the header has {parameter.shapes} dynamic extents "
                    f"and {parameter.strides} strides"
                )
            if max((*shapes, *strides), default=0) >= rank:
                raise LaunchError(f"{name} has {rank} modes, dynamic_modes names more")
            return shapes, strides
        everything = list(range(rank))
        unit = [k for k in everything if array.strides[k] == 1]
        others = [k for k in everything if not unit or k != unit[-1]]
        choices = {rank: everything, len(others): others, 0: []}
        if parameter.shapes not in choices or parameter.strides not in choices:
            raise LaunchError(
                f"{name} has {rank} modes, strides {array.strides}; the header passes "
                f"{parameter.shapes} extents and {parameter.strides} strides: wrong rank, or name "
                "the modes with dynamic_modes"
            )
        return choices[parameter.shapes], choices[parameter.strides]

    # --- host code

    def _call(self, name: str, values: Sequence[Any]) -> int:
        """Call a host function.  Arguments are passed by address; the last one is the result."""
        slots = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)
        function(self.loaded.symbol(name))(ctypes.addressof(slots), len(values))
        return values[-1].value

    def _load_module(self) -> None:
        """Do for one device what the header's Kernel_Module_Load does."""
        library, device = ctypes.c_void_p(), ctypes.c_int32(0)
        pointer = ctypes.c_void_p(ctypes.addressof(library))
        results = [
            self._call(f"_mlir_{self.prefix}_cuda_init", [pointer, ctypes.c_int32()]),
            self._call(
                f"_mlir_{self.prefix}_cuda_load_to_device", [pointer, device, ctypes.c_int32()]
            ),
        ]
        self.runtime.reraise()
        if any(results):
            raise LaunchError(f"the host code of {self.prefix} failed to load: {results}")

    def _launch(self, call: cuda_runtime.LaunchCall) -> None:
        kernel = self.module.kernels.get(call.kernel)
        if kernel is None:
            raise LaunchError(f"the object launches {call.kernel}, {self.module.path} has "
                              f"{sorted(self.module.kernels)}")  # fmt: skip
        params = [
            ctypes.string_at(address, param.size)
            for address, param in zip(
                call.arguments(len(kernel.params)), kernel.params, strict=True
            )
        ]
        self._check_dtypes(kernel, params)
        self.statistics.append(
            launch(
                self.module,
                call.kernel,
                grid=call.grid,
                block=call.block,
                params=params,
                memory=self._memory,
                cluster=call.cluster,
                shared_memory_bytes=call.shared,
                options=self._options,
            )
        )

    def _check_dtypes(self, kernel: Kernel, params: list[bytes]) -> None:
        """Compare the dtypes of arrays with those of tensor maps: the header has none."""
        for blob, param in zip(params, kernel.params, strict=True):
            if param.size != 128 or param.align != 64:
                continue
            try:
                tensor_map = decode(blob)
            except SimulatorError:
                continue
            for name, array in self._arrays.items():
                inside = array.address <= tensor_map.base < array.address + array.nbytes
                if inside and not _same_kind(tensor_map.element, array):
                    raise LaunchError(
                        f"{name} is {array.dtype}; the kernel reads it as {tensor_map.element}"
                    )


_KINDS = {
    "f16": ("float16",), "bf16": ("bfloat16", "uint16", "int16"), "f32": ("float32",),
    "tf32": ("float32",), "f64": ("float64",),
}  # fmt: skip


def _same_kind(element: str, array: Array) -> bool:
    names = _KINDS.get(element)
    if names is None:  # integer elements carry anything of their width
        return array.itemsize == int("".join(c for c in element if c.isdigit())) // 8
    return array.dtype in names


def _scalar(parameter: Parameter, value: object) -> Any:
    name = parameter.name
    if isinstance(value, ctypes._SimpleCData):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (int, float)):
        raise LaunchError(f"{name} must be a number ({parameter.type}), got {type(value)}")
    if parameter.type in _HALVES:
        bits = np.float32(value).view(np.uint32)
        half = np.float16(value).view(np.uint16)
        rounded = (
            half if _HALVES[parameter.type] == "f16" else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        )
        return ctypes.c_uint16(int(rounded))
    kind = _SCALARS[parameter.type]
    if kind in (ctypes.c_float, ctypes.c_double):
        return kind(value)
    if not isinstance(value, int):
        raise LaunchError(f"{name} must be an integer ({parameter.type}), got {value!r}")
    result = kind(value)
    if result.value != value:
        raise LaunchError(f"{name} = {value} does not fit {parameter.type}")
    return result


def load_aot(
    object_path: str | Path,
    header_path: str | Path,
    ptx_path: str | Path,
    prefix: str,
    dynamic_modes: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
) -> AotFunction:
    """Load an object exported by CuTe DSL for sm_80 to sm_90a.

    object_path, header_path: what ``export_to_c`` wrote under ``prefix``; ptx_path: what
    ``--keep-ptx`` kept.  Raises LaunchError for another architecture and where the three do not
    belong together.
    """
    for path in (object_path, header_path, ptx_path):
        if not Path(path).is_file():
            raise LaunchError(f"{path} does not exist")
    source = ObjectFile(object_path)
    module = Module.load(ptx_path)
    target = module.target.split(",")[0]
    if target not in _SUPPORTED_TARGETS:
        raise LaunchError(
            f"{ptx_path} is for {target or 'no target'}; supported: {', '.join(_SUPPORTED_TARGETS)}"
        )
    cuda_runtime.check_machine_code(source, module)
    return AotFunction(source, Header.load(header_path, prefix), module, prefix, dynamic_modes)
