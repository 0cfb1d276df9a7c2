"""nvdisasm of the `nvidia-cuda-nvdisasm` wheel."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern

from hopper_attention.errors import UserError
from hopper_attention.sass.cubin import Kernel

INSTRUCTION_BYTES = 16

TOGETHER = 32
"""Kernels that are read in one run: starting is then an eighth of the time."""

LEADING_ELSEWHERE = ("BRA", "BSSY")
"""Opcodes whose last operand is a place in the kernel."""


@dataclass(frozen=True, slots=True)  # slots and interned strings: a full build has 1.5 million
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


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Kernel symbol -> its instructions; the byte offset of instruction i is 16 i.

    Raises UserError without the disassembler, and for what it cannot read.
    """
    return dict(_run(cubin))


def disassemble_together(kernels: Iterable[Kernel]) -> list[list[Instruction]]:
    """The instructions of each kernel, many of them read in one run.

    nvdisasm takes 0.3 s to start and 0.06 s to read a kernel.  Where `disassemble` has symbols as
    operands (of calls, returns, addresses) these have what the bits say.
    """
    runs = [
        neighbours[start : start + TOGETHER]
        for _, group in itertools.groupby(kernels, lambda kernel: kernel.architecture)
        for neighbours in [list(group)]
        for start in range(0, len(neighbours), TOGETHER)
    ]
    with ThreadPoolExecutor() as threads:  # they wait for nvdisasm
        return [code for codes in threads.map(_read, runs) for code in codes]


def _read(kernels: Sequence[Kernel]) -> list[list[Instruction]]:
    """Disassemble kernels of one architecture together, as one program."""
    program = b"".join(kernel.code for kernel in kernels)
    ((_, instructions),) = _run(program, "-b", kernels[0].architecture)
    found, start = [], 0
    for kernel in kernels:
        end = start + len(kernel.code) // INSTRUCTION_BYTES
        base = start * INSTRUCTION_BYTES
        found.append([_relative(instruction, base) for instruction in instructions[start:end]])
        start = end
    return found


def _relative(instruction: Instruction, base: int) -> Instruction:
    """With the place that it leads to, if any, counted from `base`."""
    if instruction.name not in LEADING_ELSEWHERE:
        return instruction
    *others, place = instruction.operands
    return replace(instruction, operands=(*others, f"{int(place, 16) - base:#x}"))


def _run(image: bytes, *options: str) -> Iterator[tuple[str, list[Instruction]]]:
    """nvdisasm's functions and their instructions."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise UserError(
            "no disassembler: pip install 'hopper-attention[tools]' (nvidia-cuda-nvdisasm)"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run(
            [nvdisasm, "-json", *options, file.name], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UserError(f"nvdisasm cannot read the cubin: {lines[-1] if lines else 'no message'}")
    _header, functions = json.loads(done.stdout)
    for function in functions:
        yield function["function-name"], list(map(_instruction, function["sass-instructions"]))


def _instruction(entry: dict[str, str]) -> Instruction:
    return Instruction(
        intern(entry["opcode"]),
        tuple(intern(operand) for operand in entry.get("operands", "").split(",") if operand),
        intern(entry.get("predicate", "")),
    )
