"""The arguments of a compiled kernel, read from the C header that the DSL exports."""

import re
from typing import Any

SCALARS = {
    "float": "float32",
    "double": "float64",
    "int32_t": "int32",
    "int64_t": "int64",
    "uint8_t": "uint8",
}
"""C type in the wrapper's signature -> kind the marshaller knows."""


class HeaderError(ValueError):
    """The header is not one that the marshaller can serve."""


def parse_arguments(header: str, name: str) -> list[dict[str, Any]]:
    """The arguments of instance `name` in order, the stream left out.

    A tensor has the number and the width in bits of its dynamic extents and strides.
    """
    signature = re.search(rf"cute_dsl_{name}_wrapper\(([^)]*)\)", header)
    if signature is None:
        raise HeaderError(f"{name}: no wrapper function in the exported header")
    _module, *parameters = [parameter.strip() for parameter in signature[1].split(",")]
    if not parameters or parameters[-1].split()[0] != "cudaStream_t":
        raise HeaderError(f"{name}: the last argument of __call__ must be the stream")
    return [_argument(header, name, parameter) for parameter in parameters[:-1]]


def _argument(header: str, name: str, parameter: str) -> dict[str, Any]:
    c_type, argument = parameter.replace("*", "* ").replace(" * ", "* ").split()
    if c_type == f"{name}_Tensor_{argument}_t*":
        return {"name": argument, "kind": "tensor", **_tensor_struct(header, name, argument)}
    if c_type not in SCALARS:
        accepted = ", ".join(["tensors", *SCALARS])
        raise HeaderError(f"{name}: argument {argument} is a {c_type}; accepted: {accepted}")
    return {"name": argument, "kind": SCALARS[c_type]}


def _tensor_struct(header: str, name: str, argument: str) -> dict[str, int]:
    struct = re.search(rf"typedef struct {{([^}}]*)}} {name}_Tensor_{argument}_t;", header)
    if struct is None:
        raise HeaderError(f"{name}: no struct for tensor {argument} in the exported header")
    fields = {
        field: (int(width), int(count))
        for width, field, count in re.findall(r"int(\d+)_t (dynamic_\w+)\[(\d+)\];", struct[1])
    }
    shape_bits, shapes = fields.get("dynamic_shapes", (32, 0))
    stride_bits, strides = fields.get("dynamic_strides", (64, 0))
    return {
        "shape_bits": shape_bits,
        "dynamic_shapes": shapes,
        "stride_bits": stride_bits,
        "dynamic_strides": strides,
    }
