"""What the compiled code says of itself: claimed opcodes in SASS, parameters of each PTX entry."""

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def find_nvdisasm() -> str | None:
    """The disassembler of the `nvidia-cuda-nvdisasm` wheel, or None.

    A toolkit's is not asked: it is often older than the DSL's compiler and cannot read its cubins.
    """
    spec = importlib.util.find_spec("nvidia")
    for location in spec.submodule_search_locations or () if spec else ():
        for candidate in sorted(Path(location).glob("cu*/bin/nvdisasm"), reverse=True):
            return str(candidate)
    return None


def count_opcodes(cubin: Path, opcodes: Iterable[str]) -> dict[str, int] | None:
    """Instructions of `cubin` by opcode, modifiers dropped; None without a disassembler."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        return None
    sass = subprocess.run(
        [nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    # "/*0a30*/ @!P0 HGMMA.64x128x16.F32.BF16 R24, ..."
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.M))
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
