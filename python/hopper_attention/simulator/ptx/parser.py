"""The parser: PTX text becomes Module, Kernel and Instruction.

The parser keeps instructions as they stand: an opcode split at its dots, an optional guard
predicate and operands.  Inline-asm blocks ``{ ... }`` open a scope: their registers and labels are
renamed so that names repeated in other blocks stay apart.  Line numbers are those of the file.
"""

import bisect
import re
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hopper_attention.simulator.errors import PtxSyntaxError, SimulatorError, UnknownInstruction

# ------------------------------------------------------------------------------------- operands


class Register:
    """A virtual register.  bits: 1 (predicate), 16, 32 or 64; index: its row, see program.py."""

    __slots__ = ("bits", "index", "name")

    def __init__(self, name: str, bits: int):
        self.name, self.bits, self.index = name, bits, -1

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Immediate:
    """A literal: the value of an integer, or the bits of a 0f / 0d floating point literal."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared variable or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Negated:
    register: Register


@dataclass(frozen=True)
class Pair:
    """``a|b``: a result and a predicate."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]`` or, for tensor maps, ``[base, {coordinates}]``."""

    base: "Operand"
    offset: int = 0
    coordinates: tuple["Operand", ...] = ()


SINK = Symbol("_")
Operand = Register | Immediate | Symbol | Negated | Pair | Vector | Address


def registers_of(operand: Operand) -> Iterable[Register]:
    """Yield all registers of an operand."""
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Negated):
        yield operand.register
    elif isinstance(operand, Pair):
        yield from registers_of(operand.first)
        yield from registers_of(operand.second)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Address):
        yield from registers_of(operand.base)
        for item in operand.coordinates:
            yield from registers_of(item)


# ------------------------------------------------------------------------------------- structure


@dataclass(eq=False)
class Instruction:
    """One instruction; parts: the opcode split at single dots; guard: (register, sense)."""

    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    line: int
    text: str
    target: int = -1
    source: str = ""  # file:line, where the PTX has line information

    def where(self) -> str:
        text = self.text if len(self.text) <= 160 else self.text[:157] + "..."
        source = f" ({self.source})" if self.source else ""
        return f"PTX line {self.line}: {text}{source}"

    def located(self, error: SimulatorError) -> SimulatorError:
        """Return the error with this instruction's place, unless it names one."""
        if "PTX line" in str(error):
            return error
        return type(error)(f"{error}\n  at {self.where()}")

    def unknown(self, missing: str) -> UnknownInstruction:
        return UnknownInstruction(f"{self.where()}\n  not implemented: {missing}")


@dataclass(frozen=True)
class Param:
    """One kernel parameter, in bytes; offset is its place in the parameter space."""

    size: int
    align: int
    name: str = ""
    offset: int = 0


@dataclass
class SharedVariable:
    name: str
    size: int
    align: int
    dynamic: bool


@dataclass(eq=False)
class Kernel:
    name: str
    params: list[Param]
    required_block: tuple[int, int, int] | None = None
    max_registers: int | None = None
    min_blocks: int = 1
    required_cluster: tuple[int, int, int] | None = None
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    shared: list[SharedVariable] = field(default_factory=list)
    local: list[SharedVariable] = field(default_factory=list)
    program: Any = None  # program.Program, made at the first launch


@dataclass
class Module:
    """The kernels of one PTX file by name."""

    path: str
    target: str
    kernels: dict[str, Kernel]

    @staticmethod
    def load(path: str | Path) -> "Module":
        """Parse a PTX file; cached by path and modification time."""
        path = Path(path).resolve()
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        with _cache_lock:
            if key not in _cache:
                _cache[key] = Module.parse(path.read_text(), str(path))
            return _cache[key]

    @staticmethod
    def parse(text: str, path: str = "<string>") -> "Module":
        return _Parser(text, path).module()


_cache: dict[tuple[str, int, int], Module] = {}
_cache_lock = threading.Lock()

# --------------------------------------------------------------------------------------- parser

_BITS = {
    "pred": 1, "b8": 16, "u8": 16, "s8": 16, "b16": 16, "u16": 16, "s16": 16, "f16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16": 16, "bf16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*?)\{", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*$")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)(%?[\w$.]+)\s+")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


class _Scope:
    def __init__(self, parent: "_Scope | None", index: int):
        self.parent, self.index = parent, index
        self.registers: dict[str, Register] = {}
        self.labels: dict[str, str] = {}
        self.pairs: dict[str, Vector] = {}

    def register(self, name: str) -> "Register | Vector | None":
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            if name in scope.pairs:
                return scope.pairs[name]
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str, path: str):
        self.path = path
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
        self.files = dict(_FILE.findall(text))
        self.starts = [0] + [m.end() for m in re.finditer("\n", self.text)]

    def line(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position)

    def error(self, position: int, message: str) -> PtxSyntaxError:
        return PtxSyntaxError(f"{self.path}:{self.line(position)}: {message}")

    def module(self) -> Module:
        target = re.search(r"\.target\s+([\w, ]+)", self.text)
        shared, kernels = [], {}
        entries = list(_ENTRY.finditer(self.text))
        outside = self.text[: entries[0].start()] if entries else self.text
        for statement in outside.split(";"):
            found = _SHARED.search(statement.strip())
            if found:
                shared.append(self.shared_variable(found, ".extern" in statement))
        for entry in entries:
            kernel = self.kernel(entry)
            kernel.shared = [*shared, *kernel.shared]
            kernels[kernel.name] = kernel
        return Module(self.path, target.group(1).strip() if target else "", kernels)

    @staticmethod
    def shared_variable(found: re.Match, dynamic: bool) -> SharedVariable:
        element = _BYTES[found[2][1:]]
        count = int(found[4]) if found[4] else (0 if found[4] == "" else 1)
        return SharedVariable(found[3], element * count, int(found[1] or element), dynamic)

    def kernel(self, entry: re.Match) -> Kernel:
        params, offset = [], 0
        for found in _PARAM.finditer(entry[2] or ""):
            element = _BYTES[found[2][1:]]
            size = element * int(found[4]) if found[4] else element
            align = int(found[1] or element)
            offset = -(-offset // align) * align
            params.append(Param(size, align, found[3], offset))
            offset += size
        kernel = Kernel(entry[1], params)
        directives = entry[3]
        block = re.search(r"\.reqntid\s+([\d, ]+)", directives)
        if block:
            sizes = [int(x) for x in block[1].split(",")]
            x, y, z = (*sizes, 1, 1)[:3]
            kernel.required_block = x, y, z
        if cluster := re.search(r"\.reqnctapercluster\s+([\d, ]+)", directives):
            x, y, z = (*(int(n) for n in cluster[1].split(",")), 1, 1)[:3]
            kernel.required_cluster = x, y, z
        if limit := re.search(r"\.maxnreg\s+(\d+)", directives):
            kernel.max_registers = int(limit[1])
        if count := re.search(r"\.minnctapersm\s+(\d+)", directives):
            kernel.min_blocks = int(count[1])
        _Body(self, kernel, entry.end()).parse()
        return kernel


class _Body:
    """The statements of one kernel, from behind its opening brace."""

    def __init__(self, parser: _Parser, kernel: Kernel, position: int):
        self.parser, self.kernel, self.position = parser, kernel, position
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[Instruction, _Scope, str]] = []
        self.scopes = 0
        self.source = ""

    def parse(self) -> None:
        text, scope = self.parser.text, _Scope(None, 0)
        while True:
            while text[self.position].isspace():
                self.position += 1
            character = text[self.position]
            if character == "{":
                self.scopes += 1
                scope = _Scope(scope, self.scopes)
                self.position += 1
            elif character == "}":
                self.position += 1
                if scope.parent is None:
                    break
                scope = scope.parent
            elif found := _LOCATION.match(text, self.position):
                self.source = f"{self.parser.files.get(found[1], '?')}:{found[2]}"
                self.position = text.index("\n", self.position)
            elif text.startswith(".file", self.position):
                self.position = text.index("\n", self.position)
            elif label := _LABEL.match(text, self.position):
                name = f"{label[1]}@{scope.index}"
                scope.labels[label[1]] = name
                self.labels[name] = len(self.kernel.instructions)
                self.position = label.end()
            else:
                end = text.index(";", self.position)
                self.statement(text[self.position : end], self.position, scope)
                self.position = end + 1
        self.resolve()

    def resolve(self) -> None:
        for instruction, scope, label in self.branches:
            at: _Scope | None = scope
            while at is not None and label not in at.labels:
                at = at.parent
            if at is None:
                raise PtxSyntaxError(f"{instruction.where()}\n  unknown label {label}")
            instruction.target = self.labels[at.labels[label]]

    def statement(self, text: str, position: int, scope: _Scope) -> None:
        text = " ".join(text.split())
        if not text:
            return
        if text.startswith("."):
            self.directive(text, position, scope)
            return
        original, guard = text, None
        if found := _GUARD.match(text):
            guard = (self.register(found[2], position, scope), found[1] != "!")
            text = text[found.end() :]
        opcode, _, rest = text.partition(" ")
        parts = tuple(re.split(r"(?<!:)\.", opcode))
        line = self.parser.line(position)
        if parts[0] == "bra":
            instruction = Instruction(opcode, parts, (), guard, line, original)
            self.branches.append((instruction, scope, rest.strip()))
        else:
            operands = tuple(self.operand(item, position, scope) for item in _split(rest))
            instruction = Instruction(opcode, parts, operands, guard, line, original)
        instruction.source = self.source
        self.kernel.instructions.append(instruction)

    def directive(self, text: str, position: int, scope: _Scope) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            if kind == ".b128":
                for name in names.split(","):
                    self.declare_pair(name.strip(), scope)
                return
            bits = _BITS.get(kind[1:])
            if bits is None:
                raise self.parser.error(position, f"unknown register type {kind}")
            for name in names.split(","):
                self.declare(name.strip(), bits, scope)
        elif text.startswith(".local"):
            found = _SHARED.search(text.replace(".local", ".shared", 1))
            if not found:
                raise self.parser.error(position, f"cannot parse {text}")
            self.kernel.local.append(self.parser.shared_variable(found, False))
        elif text.startswith(".shared"):
            found = _SHARED.search(text)
            if not found:
                raise self.parser.error(position, f"cannot parse {text}")
            self.kernel.shared.append(self.parser.shared_variable(found, False))
        elif not text.startswith(".pragma"):
            raise self.parser.error(position, f"unknown directive {text}")

    def declare_pair(self, name: str, scope: _Scope) -> None:
        """Declare a 128-bit register as two of 64 bits."""
        found = re.fullmatch(r"(.+)<(\d+)>", name)
        for base in [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name]:
            halves = f"{base}.low", f"{base}.high"
            for half in halves:
                self.declare(half, 64, scope)
            scope.pairs[base] = Vector(tuple(scope.registers[half] for half in halves))

    def declare(self, name: str, bits: int, scope: _Scope) -> None:
        found = re.fullmatch(r"(.+)<(\d+)>", name)
        names = [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name]
        for name in names:
            register = Register(name if scope.index == 0 else f"{name}@{scope.index}", bits)
            scope.registers[name] = register
            self.kernel.registers.append(register)

    def register(self, name: str, position: int, scope: _Scope) -> Register:
        register = scope.register(name)
        if not isinstance(register, Register):
            raise self.parser.error(position, f"unknown register {name}")
        return register

    def operand(self, text: str, position: int, scope: _Scope) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(t, position, scope) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1], position, scope)
        if "|" in text:
            first, second = text.split("|")
            return Pair(
                self.operand(first.strip(), position, scope),
                self.operand(second.strip(), position, scope),
            )
        if text.startswith("!"):
            return Negated(self.register(text[1:].strip(), position, scope))
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if text[:2] in ("0f", "0F"):
            return Immediate(int(text[2:], 16), 32)
        if text[:2] in ("0d", "0D"):
            return Immediate(int(text[2:], 16), 64)
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        register = scope.register(text)
        return register if register is not None else Symbol(text)

    def address(self, text: str, position: int, scope: _Scope) -> Address:
        items = _split(text)
        coordinates: tuple[Operand, ...] = ()
        if len(items) == 2:
            vector = self.operand(items[1], position, scope)
            coordinates = vector.items if isinstance(vector, Vector) else (vector,)
        base, sign, offset = re.fullmatch(r"([^+]+?)\s*(?:(\+)\s*(-?\w+))?", items[0]).groups()
        found = re.fullmatch(r"(.*[^\s])\s*-\s*(\d+)", base)
        if not sign and found:
            base, offset = found[1], "-" + found[2]
        return Address(
            self.operand(base, position, scope), int(offset, 0) if offset else 0, coordinates
        )


def _split(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        items.append(text[start:].strip())
    return items
