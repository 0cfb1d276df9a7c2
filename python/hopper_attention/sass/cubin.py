"""Device code inside files: cubins, objects and extensions that embed them.

A cubin is an ELF file that the compiler's host code carries verbatim as read-only data, so the
installed extension is all that is needed: nothing is added to the wheel, and what is disassembled
is what is launched.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from hopper_attention.errors import UserError

MAGIC = b"\x7fELF"

# Attributes of .nv.info sections (EIATTR_* of the CUDA tools).
SIZED_VALUE = 0x04
MAX_THREADS = 0x05
REQUIRED_THREADS = 0x10
REGISTER_COUNT = 0x2F


@dataclass(frozen=True)
class Kernel:
    """One kernel in a cubin."""

    symbol: str
    architecture: str
    """The architecture in nvdisasm's spelling: SM90a."""
    code: bytes
    registers: int
    """Per thread at entry; `setmaxnreg` redistributes them between warpgroups."""
    threads: int
    """A block's; 0 where the kernel was compiled without a bound."""

    @property
    def name(self) -> str:
        """The instance's; the compiler numbers the kernels of one, and all have one."""
        return self.symbol.removesuffix("_0")


@dataclass(frozen=True)
class Cubin:
    image: bytes
    kernels: tuple[Kernel, ...]


def find_cubins(path: Path) -> list[Cubin]:
    """All cubins in the file, in order.

    Raises UserError for a file without any: also one whose device code is compressed, as nvcc's is.
    """
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    cubins = list(_embedded(data))
    if not cubins:
        raise UserError(
            f"{path} holds no uncompressed cubin; extract nvcc's with `cuobjdump -xelf all`"
        )
    return cubins


def _embedded(data: bytes) -> Iterator[Cubin]:
    position = data.find(MAGIC)
    while position >= 0:
        image = data[position:]
        step = len(MAGIC)
        try:
            elf = ELFFile(io.BytesIO(image))
            if elf["e_machine"] == "EM_CUDA":
                step = _size(elf)
                yield Cubin(image[:step], tuple(_kernels(elf)))
        except (ELFError, struct.error):
            pass  # four bytes that only look like a header
        position = data.find(MAGIC, position + step)


def _size(elf: ELFFile) -> int:
    """An ELF file does not say how long it is: up to the end of its last part."""
    ends = [
        elf["e_shoff"] + elf["e_shnum"] * elf["e_shentsize"],
        elf["e_phoff"] + elf["e_phnum"] * elf["e_phentsize"],
    ]
    ends += [
        section["sh_offset"] + section["sh_size"]
        for section in elf.iter_sections()
        if section["sh_type"] != "SHT_NOBITS"
    ]
    return int(max(ends))


def _kernels(elf: ELFFile) -> Iterator[Kernel]:
    symbols = elf.get_section_by_name(".symtab")
    if not isinstance(symbols, SymbolTableSection):
        return
    registers = {
        symbols.get_symbol(struct.unpack_from("<I", value)[0]).name: value[4]
        for attribute, value in _attributes(elf, ".nv.info")
        if attribute == REGISTER_COUNT
    }
    sections = {section.name: section for section in elf.iter_sections()}
    for name in sections:
        prefix, _, symbol = name.partition(".nv.info.")
        if prefix or not symbol:
            continue
        extents = [
            struct.unpack_from("<3I", value)
            for attribute, value in _attributes(elf, name)
            if attribute in (REQUIRED_THREADS, MAX_THREADS)
        ]
        x, y, z = extents[0] if extents else (0, 0, 0)
        code = sections[f".text.{symbol}"].data()
        yield Kernel(symbol, _architecture(elf), code, registers.get(symbol, 0), x * y * z)


def _architecture(elf: ELFFile) -> str:
    """SM90's instructions are among SM90a's, and the flags do not tell the two apart."""
    number = elf["e_flags"] >> 8 & 0xFF
    return "SM90a" if number == 90 else f"SM{number}"


def _attributes(elf: ELFFile, name: str) -> Iterator[tuple[int, bytes]]:
    """(attribute, value) of the entries that have a value of their own size."""
    section = elf.get_section_by_name(name)
    data = section.data() if section is not None else b""
    position = 0
    while position < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == SIZED_VALUE:
            yield attribute, data[position : position + size]
            position += size
