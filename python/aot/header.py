"""The arguments of a compiled kernel, read from the C header that the DSL exports."""

import re
from collections.abc import Sequence
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


def parse_arguments(
    header: str, name: str, groups: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The arguments of instance `name` in order, the stream left out.

    `groups` has for each parameter of the wrapper function the names of its members, or nothing if
    it is no NamedTuple.  A tensor has the number and the width in bits of its dynamic extents and
    strides.
    """
    signature = re.search(rf"cute_dsl_{name}_wrapper\(([^)]*)\)", header)
    if signature is None:
        raise HeaderError(f"{name}: no wrapper function in the exported header")
    _module, *parameters = [parameter.strip() for parameter in signature[1].split(",")]
    if not parameters or parameters[-1].split()[0] != "cudaStream_t":
        raise HeaderError(f"{name}: the last argument of __call__ must be the stream")
    if len(parameters) != len(groups) + 1:
        raise HeaderError(
            f"{name}: {len(groups)} example arguments, but the header has {len(parameters) - 1};"
            " compile-time constants belong into the configuration"
        )
    return [
        argument
        for parameter, members in zip(parameters, groups)
        for argument in _arguments(header, name, parameter, members)
    ]


def _arguments(
    header: str, name: str, parameter: str, members: Sequence[str]
) -> list[dict[str, Any]]:
    """The arguments of one parameter: its own, or those of a group's members."""
    c_type, symbol = parameter.replace("*", "* ").replace(" * ", "* ").split()
    if c_type == f"{name}_Tensor_{symbol}_t*":
        return [{"name": symbol, "kind": "tensor", **_tensor_struct(header, name, symbol)}]
    if c_type == f"{name}_TensorList_{symbol}_t*":
        struct = _tensor_struct(header, name, symbol)
        return [{"name": member, "kind": "tensor", **struct} for member in members]
    if c_type in SCALARS:
        return [{"name": symbol, "kind": SCALARS[c_type]}]
    if c_type.endswith("*") and c_type[:-1] in SCALARS and members:
        return [{"name": member, "kind": SCALARS[c_type[:-1]]} for member in members]
    accepted = ", ".join(["tensors", *SCALARS])
    raise HeaderError(
        f"{name}: argument {symbol} is a {c_type}; accepted: {accepted}, and NamedTuples of one"
    )


def _tensor_struct(header: str, name: str, symbol: str) -> dict[str, int]:
    struct = re.search(rf"typedef struct {{([^}}]*)}} {name}_Tensor_{symbol}_t;", header)
    if struct is None:
        raise HeaderError(f"{name}: no struct for tensor {symbol} in the exported header")
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
