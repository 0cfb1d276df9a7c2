"""nvdisasm of the `nvidia-cuda-nvdisasm` wheel."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hopper_attention.refusal import Refusal

INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With modifiers: "HGMMA.64x128x16.F32.BF16"."""
    operands: tuple[str, ...]
    predicate: str
    """"@!P0", or empty."""

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def find_nvdisasm() -> str | None:
    """A toolkit's is not asked: it is often older than the compiler and cannot read its cubins."""
    spec = importlib.util.find_spec("nvidia")
    for location in spec.submodule_search_locations or () if spec else ():
        for candidate in sorted(Path(location).glob("cu*/bin/nvdisasm"), reverse=True):
            return str(candidate)
    return None


@functools.lru_cache(maxsize=1024)  # every instance: nvdisasm takes a third of a second
def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Kernel symbol -> its instructions; the byte offset of instruction i is 16 i.

    Raises Refusal without the disassembler, and for what it cannot read.
    """
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise Refusal(
            "no disassembler: pip install 'hopper-attention[tools]' (nvidia-cuda-nvdisasm)"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [nvdisasm, "-json", file.name], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Refusal(f"nvdisasm cannot read the cubin: {lines[-1] if lines else 'no message'}")
    _header, functions = json.loads(done.stdout)
    return {
        function["function-name"]: [
            Instruction(
                entry["opcode"],
                tuple(operand for operand in entry.get("operands", "").split(",") if operand),
                entry.get("predicate", ""),
            )
            for entry in function["sass-instructions"]
        ]
        for function in functions
    }
