"""The compiler of straight runs of instructions: they become Python functions over numpy arrays.

Registers are rows of one array per width, lanes are columns, so an instruction is one numpy call
on rows.  Kernels are full of runs of like instructions (64 multiplications by the same scale):
within a region, instructions of equal depth, opcode and operand kinds become one call on a block of
rows.

    levels     depth of each operation by its register and memory dependencies; operations of equal
               depth are independent
    chains     d1 = d0 + x1; d2 = d1 + x2; ... whose partial results nobody else reads becomes one
               reduction along rows, which numpy performs in the same order
    numbering  rows are given out so that the operands of a batch are slices where possible

``Operation`` is what an instruction family hands over: an expression with ``{0}``, ``{1}`` for its
inputs, or lines of code for loads, stores and shuffles.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hopper_attention.simulator.ptx.parser import (
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Symbol,
)

# View letters: U I F 32-bit unsigned, signed, float; W J D 64-bit; H S E 16-bit; P predicates.
DTYPES = {
    "U": np.uint32, "I": np.int32, "F": np.float32,
    "W": np.uint64, "J": np.int64, "D": np.float64,
    "H": np.uint16, "S": np.int16, "E": np.float16,
    "P": np.bool_,
}  # fmt: skip
BITS = {letter: 1 if letter == "P" else dtype().itemsize * 8 for letter, dtype in DTYPES.items()}
_FILES = {1: "P", 16: "H", 32: "U", 64: "W"}
_MIN_CHAIN = 4


@dataclass(eq=False)
class Operation:
    """One step on lane arrays.

    expression: value of the output; ``{out}`` marks where ``, out=row`` may be inserted.
    inputs, outputs: (view letter, operand).  guard: (predicate, sense) or None.
    effect: "" (pure), "load" or "store"; those are lines of code and never batched.
    chain: name of a numpy ufunc f with output = f(input 0, input 1) that may be folded.
    """

    instruction: Instruction
    expression: str
    outputs: list[tuple[str, Register]]
    inputs: list[tuple[str, Operand]]
    effect: str = ""
    chain: str = ""
    guard: tuple[Register, bool] | None = None
    links: int = 0  # folded chain: number of inputs
    constants: tuple[object, ...] = ()

    def registers_read(self) -> list[Register]:
        found = [_register(x) for _, x in self.inputs]
        if self.guard is not None:
            found += [self.guard[0]] + [x for _, x in self.outputs]
        return [x for x in found if x is not None]

    def signature(self) -> object:
        if self.effect:
            return id(self)
        kinds = tuple(
            (view, "r" if isinstance(x, Register) else "i" if isinstance(x, Immediate) else x)
            for view, x in self.inputs
        )
        sense = None if self.guard is None else self.guard[1]
        return self.expression, self.links, tuple(v for v, _ in self.outputs), kinds, sense


def _register(operand: Operand) -> Register | None:
    if isinstance(operand, Register):
        return operand
    return operand.register if isinstance(operand, Negated) else None


def immediate(view: str, operand: Immediate) -> object:
    """Return the value of a literal in a view: Python int, numpy float or bool."""
    dtype = DTYPES[view]
    if view == "P":
        return bool(operand.value)
    if view in "FDE":
        if operand.float_bits == 64:
            return dtype(np.uint64(operand.value).view(np.float64))
        if operand.float_bits == 32:
            return dtype(np.uint32(operand.value).view(np.float32))
        return dtype(operand.value)
    bits = BITS[view]
    value = operand.value & ((1 << bits) - 1)
    if view in "IJS" and value >> (bits - 1):
        value -= 1 << bits
    return value


# -------------------------------------------------------------------------------------- schedule


class Usage:
    """The counts of each register's writes and reads, for finding dead partial results."""

    def __init__(self) -> None:
        self.writes: dict[Register, int] = {}
        self.reads: dict[Register, int] = {}

    def add(self, operation: Operation) -> None:
        for _, register in operation.outputs:
            self.writes[register] = self.writes.get(register, 0) + 1
        for register in operation.registers_read():
            self.reads[register] = self.reads.get(register, 0) + 1

    def add_read(self, register: Register) -> None:
        self.reads[register] = self.reads.get(register, 0) + 1

    def private(self, register: Register) -> bool:
        return self.writes.get(register) == 1 and self.reads.get(register) == 1


def fold_chains(operations: list[Operation], usage: Usage) -> list[Operation]:
    """Replace chains of one associative-looking ufunc by a single operation, in the same order."""
    producer: dict[Register, int] = {}
    writers: dict[Register, list[int]] = {}
    previous: dict[int, int] = {}
    following: dict[int, int] = {}
    for i, operation in enumerate(operations):
        if operation.chain and operation.guard is None:
            for position in (0, 1):
                register = _register(operation.inputs[position][1])
                j = producer.get(register, -1) if register is not None else -1
                linked = j >= 0 and operations[j].chain == operation.chain and j not in following
                if linked and usage.private(register):
                    if position == 1:
                        operation.inputs.reverse()
                    previous[i], following[j] = j, i
                    break
        for _, register in operation.outputs:
            producer[register] = i if operation.chain and operation.guard is None else -1
            writers.setdefault(register, []).append(i)
    folded: dict[int, Operation] = {}
    dropped: set[int] = set()
    for last in [i for i in previous if i not in following]:
        path = [last]
        while path[-1] in previous:
            path.append(previous[path[-1]])
        path.reverse()
        if len(path) < _MIN_CHAIN or _overwritten(operations, path, writers):
            continue
        first = operations[path[0]]
        inputs = list(first.inputs) + [operations[i].inputs[1] for i in path[1:]]
        if any(not isinstance(x, Register) for _, x in inputs[1:]):
            continue
        folded[last] = Operation(
            operations[last].instruction,
            f"chain(np.{first.chain}",
            operations[last].outputs,
            inputs,
            links=len(inputs),
        )
        dropped.update(path[:-1])
    return [folded.get(i, op) for i, op in enumerate(operations) if i not in dropped]


def _overwritten(
    operations: list[Operation], path: list[int], writers: dict[Register, list[int]]
) -> bool:
    """True if an input is written between its place in the chain and the chain's end."""
    for i in path:
        for _, operand in operations[i].inputs:
            register = _register(operand)
            places = writers.get(register, []) if register is not None else []
            inside = any(i <= w < path[-1] for w in places)
            if inside and not any(w in path for w in places):
                return True
    return False


def batch(operations: list[Operation]) -> list[list[Operation]]:
    """Group independent like operations; the groups are in an order that keeps all dependencies."""
    written: dict[Register, int] = {}
    read: dict[Register, int] = {}
    last_load = last_store = -1
    groups: dict[tuple[int, object], list[Operation]] = {}
    for operation in operations:
        level = 0
        for register in operation.registers_read():
            level = max(level, written.get(register, -1) + 1)
        for _, register in operation.outputs:
            level = max(level, written.get(register, -1) + 1, read.get(register, -1) + 1)
        if operation.effect == "load":
            level = max(level, last_store + 1)
            last_load = max(last_load, level)
        elif operation.effect == "store":
            level = max(level, last_store + 1, last_load + 1)
            last_store = level
        for register in operation.registers_read():
            read[register] = max(read.get(register, -1), level)
        for _, register in operation.outputs:
            written[register] = level
        groups.setdefault((level, operation.signature()), []).append(operation)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


# ------------------------------------------------------------------------------------- numbering


class Numbering:
    """The rows of registers, given out in the order of first use in fragments and batches."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys(_FILES, 0)

    def assign(self, register: Register) -> None:
        if register.index < 0:
            register.index = self.rows[register.bits]
            self.rows[register.bits] += 1

    def assign_batch(self, group: list[Operation]) -> None:
        """Sort a batch by the rows its operands have already, then number what is new."""
        if len(group) > 1:
            first = group[0]
            columns: list[list[Operand]] = [
                [op.outputs[k][1] for op in group] for k in range(len(first.outputs))
            ]
            columns += [[op.inputs[k][1] for op in group] for k in range(len(first.inputs))]
            for column in columns:
                rows = [r.index if isinstance(r, Register) else -1 for r in column]
                if min(rows) >= 0 and len(set(rows)) == len(rows):
                    group[:] = [group[i] for i in sorted(range(len(group)), key=rows.__getitem__)]
                    break
        if group[0].links:
            for k in range(group[0].links):
                self._assign_all(op.inputs[k][1] for op in group)
            self._assign_all(op.outputs[0][1] for op in group)
            return
        for k in range(len(group[0].inputs)):
            self._assign_all(op.inputs[k][1] for op in group)
        for k in range(len(group[0].outputs)):
            self._assign_all(op.outputs[k][1] for op in group)
        for op in group:
            if op.guard is not None:
                self.assign(op.guard[0])

    def _assign_all(self, operands) -> None:
        for operand in operands:
            register = _register(operand)
            if register is not None:
                self.assign(register)


# --------------------------------------------------------------------------------------- code


def _progression(rows: list[int]) -> slice | None:
    step = rows[1] - rows[0]
    if step == 0 or any(b - a != step for a, b in itertools.pairwise(rows)):
        return None
    stop = rows[-1] + (1 if step > 0 else -1)
    return slice(rows[0], stop if stop >= 0 else None, step)


class _Code:
    def __init__(self, helpers: dict[str, object], symbols: Callable[[str], str]):
        self.namespace: dict[str, Any] = dict(helpers)
        self.lines: list[str] = []
        self.views: set[str] = set()
        self.symbols = symbols

    def constant(self, value: object) -> str:
        name = f"K{len(self.namespace)}"
        self.namespace[name] = value
        return name

    def rows(self, view: str, registers: list[Register]) -> str:
        """Rows of one view: an index where all are the same, a slice, or an index array."""
        self.views.add(view)
        rows = [register.index for register in registers]
        if len(set(rows)) == 1:
            return f"{view}[{rows[0]}]"
        found = _progression(rows)
        if found is None:
            return f"{view}[{self.constant(np.array(rows))}]"
        stop = "" if found.stop is None else found.stop
        step = "" if found.step == 1 else f":{found.step}"
        return f"{view}[{found.start}:{stop}{step}]"

    def input(self, view: str, operands: list[Operand]) -> str:
        first = operands[0]
        if isinstance(first, Register):
            return self.rows(view, operands)
        if isinstance(first, Negated):
            return f"(~{self.rows(view, [x.register for x in operands])})"
        if isinstance(first, Symbol):
            return self.symbols(first.name)
        values = [immediate(view, x) for x in operands]
        if all(x == values[0] for x in values) or len(values) == 1:
            plain = isinstance(values[0], (int, bool))
            return f"({values[0]!r})" if plain else self.constant(values[0])
        return self.constant(np.array(values, DTYPES[view])[:, None])

    def emit(self, group: list[Operation]) -> None:
        first = group[0]
        if first.links:
            self.emit_chain(group)
            return
        inputs = [
            self.input(view, [op.inputs[k][1] for op in group])
            for k, (view, _) in enumerate(first.inputs)
        ]
        if first.effect:
            outputs = [self.rows(view, [register]) for view, register in first.outputs]
            names = {f"k{i}": self.constant(value) for i, value in enumerate(first.constants)}
            names |= {f"d{i}": output for i, output in enumerate(outputs)}
            self.lines += first.expression.format(*inputs, **names).split("\n")
            return
        (view, _) = first.outputs[0]
        target = self.rows(view, [op.outputs[0][1] for op in group])
        in_place = "[K" not in target and first.guard is None and "{out}" in first.expression
        value = first.expression.format(*inputs, out=f", out={target}" if in_place else "")
        if first.guard is not None:
            guard = self.rows("P", [op.guard[0] for op in group if op.guard is not None])
            guard = guard if first.guard[1] else f"~{guard}"
            self.lines.append(f"{target} = where({guard}, {value}, {target})")
        else:
            self.lines.append(value if in_place else f"{target} = {value}")

    def emit_chain(self, group: list[Operation]) -> None:
        first = group[0]
        view = first.inputs[0][0]
        self.views.add(view)
        start = first.inputs[0][1]
        skip = 0 if isinstance(start, Register) else 1
        rows = np.array([[x.index for _, x in op.inputs[skip:]] for op in group]).T
        if len(group) == 1:
            rows = rows[:, 0]
        head = self.input(view, [op.inputs[0][1] for op in group]) if skip else "None"
        target = self.rows(view, [op.outputs[0][1] for op in group])
        self.lines.append(f"{target} = {first.expression}, {view}[{self.constant(rows)}], {head})")


def chain(ufunc: np.ufunc, rows: np.ndarray, start: object) -> np.ndarray:
    """ufunc(...ufunc(ufunc(start, rows[0]), rows[1])...), exactly in this order."""
    if start is not None:
        rows[0] = ufunc(start, rows[0])
    if rows[0].size == 1:  # numpy would sum a single column pairwise
        return functools.reduce(ufunc, rows)
    return ufunc.reduce(rows, axis=0)


def generate(
    groups: list[list[Operation]], helpers: dict[str, object], symbols: Callable[[str], str]
) -> Callable:
    """Compile groups to ``run(lanes, block)``."""
    code = _Code({**helpers, "chain": chain, "where": np.where}, symbols)
    for group in groups:
        code.emit(group)
    views = [f"{view}=L.{view}" for view in sorted(code.views)]
    body = "\n ".join(["X=L.special", *views, *code.lines])
    exec(compile(f"def run(L, C):\n {body}\n", "<region>", "exec"), code.namespace)
    return code.namespace["run"]
