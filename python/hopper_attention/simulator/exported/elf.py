"""Load a relocatable x86-64 ELF object into this process, without a compiler or a linker.

CuTe DSL exports a kernel as an object file: a cubin as data, and host code that builds tensor maps
and calls the CUDA runtime.  Linking it at run time would need a toolchain on the user's machine and
would bind those calls to whatever runtime the process has; here every undefined name is given an
address by the caller instead, so several objects and a real CUDA runtime do not meet.

    sections   copied to one anonymous mapping, executable ones on pages of their own
    GOT        one 8-byte entry a symbol that asks for it
    stubs      ``jmp *[rip]`` for calls with 32-bit displacements to far-away functions
"""

import ctypes
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hopper_attention.simulator.errors import LaunchError

_PAGE = mmap.PAGESIZE
_X86_64 = 62
_MACHINES = {3: "x86", 40: "arm", 62: "x86-64", 183: "aarch64", 190: "CUDA"}
_ALLOCATED, _EXECUTABLE = 2, 4  # section flags
_SYMBOLS, _RELOCATIONS, _NO_BITS, _UNWIND = 2, 4, 8, 0x70000001  # section types
_PROTECT_READ_EXECUTE = 5
_ABSOLUTE, _COMMON = 0xFFF1, 0xFFF2  # section numbers of symbols


@dataclass(frozen=True)
class Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


@dataclass(frozen=True)
class Symbol:
    name: str
    section: int
    value: int


class ObjectFile:
    """Sections and symbols of a relocatable object.  Raises LaunchError for anything else."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.data = self.path.read_bytes()
        if self.data[:4] != b"\x7fELF" or len(self.data) < 64:
            raise LaunchError(f"{self.path} is not an ELF object")
        kind, machine = struct.unpack_from("<HH", self.data, 16)
        if self.data[4] != 2 or machine != _X86_64:
            name = _MACHINES.get(machine, f"machine {machine}")
            raise LaunchError(f"{self.path} is for {name}; this simulator loads x86-64 objects")
        if kind != 1:
            raise LaunchError(f"{self.path} is not a relocatable object (ELF type {kind}, not 1)")
        self.sections = self._read_sections()
        self.symbols = self._read_symbols()

    def _read_sections(self) -> list[Section]:
        (start,) = struct.unpack_from("<Q", self.data, 40)
        _, count, names = struct.unpack_from("<HHH", self.data, 58)
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", self.data, start + 64 * k) for k in range(count)
        ]
        strings = headers[names][4]
        return [
            Section(self._string(strings + name), kind, flags, offset, size, link, info, align)
            for name, kind, flags, _, offset, size, link, info, align, _ in headers
        ]

    def _read_symbols(self) -> list[Symbol]:
        table = next((s for s in self.sections if s.kind == _SYMBOLS), None)
        if table is None:
            raise LaunchError(f"{self.path} has no symbols")
        strings = self.sections[table.link].offset
        result = []
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self.data, at)
            result.append(Symbol(self._string(strings + name), section, value))
        return result

    def _string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def content(self, section: Section) -> bytes:
        if section.kind == _NO_BITS:
            return bytes(section.size)
        return self.data[section.offset : section.offset + section.size]

    def cubins(self) -> list[bytes]:
        """The machine code inside: ELF images for CUDA within the object's data."""
        found, at = [], self.data.find(b"\x7fELF", 64)
        while at >= 0:
            if struct.unpack_from("<H", self.data, at + 18)[0] == 190:
                found.append(self.data[at:])
            at = self.data.find(b"\x7fELF", at + 4)
        return found


class LoadedObject:
    """An object in memory.  ``resolve(name)`` gives the address of an undefined symbol."""

    def __init__(self, source: ObjectFile, resolve: Callable[[str], int]):
        self.source = source
        self.places: dict[int, int] = {}  # section number -> offset in the mapping
        self.got: dict[int, int] = {}  # symbol number -> offset of its entry
        self.stubs: dict[int, int] = {}
        size = self._lay_out()
        self.memory = mmap.mmap(-1, size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for number, place in self.places.items():
            content = source.content(source.sections[number])
            self.memory[place : place + len(content)] = content
        self.addresses = [self._address(symbol, resolve) for symbol in source.symbols]
        self._relocate()
        libc = ctypes.CDLL(None, use_errno=True)
        length = ctypes.c_size_t(self.code_end)
        if libc.mprotect(ctypes.c_void_p(self.base), length, _PROTECT_READ_EXECUTE):
            raise LaunchError(f"{source.path}: this system refuses executable memory")

    def symbol(self, name: str) -> int:
        """Return the address of a defined symbol."""
        for symbol, address in zip(self.source.symbols, self.addresses, strict=True):
            if symbol.name == name and symbol.section:
                return address
        raise LaunchError(f"{self.source.path} does not define {name}")

    def _lay_out(self) -> int:
        offset = 0
        sections = [
            (n, s)
            for n, s in enumerate(self.source.sections)
            if s.flags & _ALLOCATED and s.kind != _UNWIND
        ]
        for executable in (True, False):
            for number, section in sections:
                if bool(section.flags & _EXECUTABLE) == executable:
                    offset = -(-offset // max(1, section.align)) * max(1, section.align)
                    self.places[number] = offset
                    offset += section.size
            if executable:
                self.stub_start = -(-offset // 16) * 16
                offset = self.stub_start + 16 * len(self.source.symbols)
                offset = self.code_end = -(-offset // _PAGE) * _PAGE
        self.got_start = -(-offset // 8) * 8
        return -(-(self.got_start + 8 * len(self.source.symbols) + 1) // _PAGE) * _PAGE

    def _address(self, symbol: Symbol, resolve: Callable[[str], int]) -> int:
        if symbol.section == 0:
            if symbol.name == "_GLOBAL_OFFSET_TABLE_":
                return self.base + self.got_start
            return resolve(symbol.name) if symbol.name else 0
        if symbol.section == _ABSOLUTE:
            return symbol.value
        if symbol.section == _COMMON:
            raise LaunchError(f"{self.source.path}: common symbol {symbol.name} is not supported")
        return self.base + self.places.get(symbol.section, 0) + symbol.value

    def _entry(self, number: int) -> int:
        """Return the offset within the GOT of a symbol's entry."""
        if number not in self.got:
            place = self.got_start + 8 * len(self.got)
            struct.pack_into("<Q", self.memory, place, self.addresses[number])
            self.got[number] = place
        return self.got[number] - self.got_start

    def _stub(self, number: int) -> int:
        """Return the address of code near this object that jumps to a symbol anywhere."""
        if number not in self.stubs:
            place = self.stub_start + 16 * len(self.stubs)
            code = b"\xff\x25\x00\x00\x00\x00" + struct.pack("<Q", self.addresses[number])
            self.memory[place : place + len(code)] = code
            self.stubs[number] = self.base + place
        return self.stubs[number]

    def _relocate(self) -> None:
        for section in self.source.sections:
            if section.kind != _RELOCATIONS or section.info not in self.places:
                continue
            for at in range(section.offset, section.offset + section.size, 24):
                offset, info, addend = struct.unpack_from("<QQq", self.source.data, at)
                self._apply(
                    self.places[section.info] + offset, info & 0xFFFFFFFF, info >> 32, addend
                )

    def _apply(self, place: int, kind: int, number: int, addend: int) -> None:
        """Apply a relocation of the x86-64 psABI; code without TLS has no others."""
        here, got = self.base + place, self.base + self.got_start
        value = self.addresses[number] + addend
        if kind == 0:
            return
        if kind in (4, 2):  # PLT32, PC32
            if not -(1 << 31) <= value - here < 1 << 31:
                value = self._stub(number) + addend
            self._put(place, value - here, 4)
        elif kind == 1:  # 64
            self._put(place, value, 8)
        elif kind == 24:  # PC64
            self._put(place, value - here, 8)
        elif kind == 25:  # GOTOFF64
            self._put(place, value - got, 8)
        elif kind in (27, 30):  # GOT64, GOTPLT64
            self._put(place, self._entry(number) + addend, 8)
        elif kind == 29:  # GOTPC64
            self._put(place, got + addend - here, 8)
        elif kind == 28:  # GOTPCREL64
            self._put(place, got + self._entry(number) + addend - here, 8)
        elif kind in (9, 41, 42):  # GOTPCREL, GOTPCRELX, REX_GOTPCRELX
            self._put(place, got + self._entry(number) + addend - here, 4)
        elif kind == 26:  # GOTPC32
            self._put(place, got + addend - here, 4)
        elif kind == 31:  # PLTOFF64
            self._put(place, self._stub(number) + addend - got, 8)
        else:
            name = self.source.symbols[number].name
            raise LaunchError(f"{self.source.path}: relocation type {kind} of {name}")

    def _put(self, place: int, value: int, size: int) -> None:
        if size == 4 and not -(1 << 31) <= value < 1 << 31:
            raise LaunchError(f"{self.source.path}: a 32-bit relocation does not reach its target")
        struct.pack_into(
            "<Q" if size == 8 else "<I", self.memory, place, value & (1 << 8 * size) - 1
        )
