"""What the compiled code says of itself: claimed opcodes in SASS, parameters of each PTX entry."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hopper_attention.sass import disassembler


def count_opcodes(cubin: Path, opcodes: Iterable[str]) -> dict[str, int] | None:
    """Instructions of `cubin` by opcode, modifiers dropped; None without a disassembler."""
    if disassembler.find_nvdisasm() is None:
        return None
    kernels = disassembler.disassemble(cubin.read_bytes())
    found = Counter(instruction.name for code in kernels.values() for instruction in code)
    return {opcode: found[opcode] for opcode in opcodes}


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
