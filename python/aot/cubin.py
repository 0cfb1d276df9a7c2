"""Facts read from compiled code: claimed opcodes in SASS, parameters of each PTX entry."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hopper_attention.sass import cubin, disassembler


def count_opcodes(files: Sequence[Path]) -> list[Counter[str] | None]:
    """Instructions of each cubin by opcode, modifiers dropped; None without a disassembler."""
    if disassembler.find_nvdisasm() is None:
        return [None] * len(files)
    kernels = [[k for c in cubin.find_cubins(file) for k in c.kernels] for file in files]
    codes = iter(disassembler.disassemble_together(itertools.chain.from_iterable(kernels)))
    return [Counter(i.name for _ in of_one for i in next(codes)) for of_one in kernels]


def parse_parameters(ptx: str) -> dict[str, list[dict[str, int]]]:
    """Kernel symbol -> size and alignment in bytes of each of its parameters.

    The runtime is handed one pointer a parameter, without their number.
    """
    return {
        entry: [_parameter(text) for text in re.findall(r"\.param ([^,\n]+)", parameters)]
        for entry, parameters in re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)
    }


def _parameter(declaration: str) -> dict[str, int]:
    pattern = r"(?:\.align (\d+) )?\.[bfsu](\d+) \S+?(?:\[(\d+)\])?"
    match = re.fullmatch(pattern, declaration.strip())
    if match is None:
        raise ValueError(f"unknown PTX parameter: {declaration}")
    align, bits, count = match.groups()
    size = int(bits) // 8 * int(count or 1)
    return {"size": size, "align": int(align or size)}
