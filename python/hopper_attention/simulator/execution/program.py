"""A kernel as the machine runs it: a list of steps.

A step is a straight run of arithmetic and memory instructions (Region), a branch (Branch) or an
instruction that needs the machine (Control).  Each has ``execute(block, unit) -> bool``; False
means that the unit is blocked there.  Branches know where their paths meet again: the immediate
post-dominator in the control-flow graph.
"""

import threading
from collections.abc import Callable

import numpy as np

from hopper_attention.simulator.hardware.memory import SHARED_BASE
from hopper_attention.simulator.hazards.races import smallest_access
from hopper_attention.simulator.instructions.registry import CONTROL, HELPERS, PURE, find
from hopper_attention.simulator.observation.recording import Work, work_of
from hopper_attention.simulator.ptx.parser import (
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Register,
    Symbol,
    registers_of,
)
from hopper_attention.simulator.ptx.vectorize import (
    Numbering,
    Operation,
    Usage,
    batch,
    fold_chains,
    generate,
)

EXIT = 1 << 30  # where paths meet that only meet at the end of the kernel


class Region:
    """A straight run, compiled when first reached."""

    def __init__(self, pc: int):
        self.pc = pc
        self.operations: list[Operation] = []
        self.groups: list[list[Operation]] = []
        self.first: Instruction | None = None
        self.length = 0
        self.function: Callable | None = None
        self.work: Work | None = None
        self.touched = self.written = 0  # masks of 32-bit registers
        self.symbols: Callable[[str], str] | None = None

    def schedule(self, usage: Usage) -> None:
        self.groups = batch(fold_chains(self.operations, usage))

    def number(self) -> None:
        for operation in self.operations:
            for register in operation.registers_read():
                if register.bits == 32:
                    self.touched |= 1 << register.index
            for _, register in operation.outputs:
                if register.bits == 32:
                    self.written |= 1 << register.index
        self.touched |= self.written

    def execute(self, block, unit) -> bool:
        if self.function is None:
            self.function = generate(self.groups, HELPERS, self.symbols)
        warpgroup = unit.warpgroup
        queue = warpgroup.queue
        if self.touched & queue.accumulators or self.written & queue.operands:
            block.hazards.report_early_use(
                self.operations, queue.accumulators, queue.operands, warpgroup.warps
            )
        warpgroup.touched |= self.touched
        if block.trace:
            self.work = self.work or work_of([op.instruction for op in self.operations])
            block.trace.region(unit.lanes.warps.tolist(), self.work)
        self.function(unit.lanes, block)
        block.warp_instructions += self.length * unit.lanes.warp_count
        unit.advance(self.pc + 1)
        return True


def _select(unit, guard: tuple[Register, bool]) -> np.ndarray:
    values = unit.lanes.P[guard[0].index]
    return values if guard[1] else ~values


class Guarded:
    """A predicated load, store or other step: it runs on the lanes whose predicate holds."""

    def __init__(self, step, guard: tuple[Register, bool]):
        self.step, self.guard, self.pc = step, guard, step.pc
        self.first = step.first

    def execute(self, block, unit) -> bool:
        chosen = _select(unit, self.guard)
        if chosen.all():
            return self.step.execute(block, unit)
        if not chosen.any():
            unit.advance(self.pc + 1)
            return True
        whole = unit.lanes
        if whole.gathered:
            whole.push()
        unit.lanes = part = unit.warpgroup.window(whole.lanes[chosen])
        if part.gathered:
            part.pull()
        try:
            return self.step.execute_on_lanes(block, unit)
        finally:
            if part.gathered:
                part.push()
            if whole.gathered:
                whole.pull()  # its copies would overwrite what the part wrote
            if unit.lanes is part:  # not after an exit
                unit.lanes = whole


class GuardedRegion(Region):
    """A straight run of one predicated instruction that loads or stores."""

    def execute_on_lanes(self, block, unit) -> bool:
        return self.execute(block, unit)


class Control:
    """An instruction that needs the block."""

    def __init__(self, pc: int, instruction: Instruction, handler: Callable):
        self.pc, self.first, self.handler = pc, instruction, handler

    def execute(self, block, unit) -> bool:
        if not self.handler(block, unit):
            return False
        block.progress()
        block.warp_instructions += unit.lanes.warp_count
        unit.advance(self.pc + 1)
        return True

    execute_on_lanes = execute


class Exit(Control):
    """The end of threads: ret, exit, and the end of the kernel's text."""

    def __init__(self, pc: int, instruction: Instruction):
        self.pc, self.first = pc, instruction

    def execute(self, block, unit) -> bool:
        block.progress()
        block.warp_instructions += unit.lanes.warp_count
        unit.exit_lanes()
        return True

    execute_on_lanes = execute


class Branch:
    """A branch, with its target step and the step where both paths meet."""

    def __init__(self, pc: int, instruction: Instruction):
        self.pc, self.first, self.guard = pc, instruction, instruction.guard
        self.target = self.join = EXIT

    def execute(self, block, unit) -> bool:
        block.warp_instructions += unit.lanes.warp_count
        if self.guard is None:
            unit.advance(self.target)
            return True
        taken = _select(unit, self.guard)
        count = np.count_nonzero(taken)
        if count == 0:
            unit.advance(self.pc + 1)
        elif count == len(taken):
            unit.advance(self.target)
        else:
            unit.diverge(taken, self.target, self.pc + 1, self.join)
        return True


_building = threading.Lock()


def program_of(kernel: Kernel) -> "Program":
    """Return the kernel's program, which is made at its first launch."""
    with _building:
        if kernel.program is None:
            kernel.program = Program(kernel)
        return kernel.program


class Program:
    """The steps of a kernel, its symbols and the number of register rows."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.steps: list = []
        self.symbols: dict[str, int] = {p.name: p.offset for p in kernel.params}
        self.shared_names = {variable.name for variable in kernel.shared}
        self.smallest_access = smallest_access(kernel.instructions)
        self._lay_out_shared()
        self._build()
        self._join_points()
        self._number()

    def _lay_out_shared(self) -> None:
        offset = SHARED_BASE
        for variable in sorted(self.kernel.shared, key=lambda variable: variable.dynamic):
            offset = -(-offset // variable.align) * variable.align
            self.symbols[variable.name] = offset
            if not variable.dynamic:
                offset += variable.size
        self.static_end = offset
        self.local_bytes = 0
        for variable in self.kernel.local:
            self.local_bytes = -(-self.local_bytes // variable.align) * variable.align
            self.symbols[variable.name] = self.local_bytes
            self.local_bytes += variable.size

    def symbol_code(self, name: str) -> str:
        """Return the Python text of a symbol's value inside generated code."""
        if name in self.shared_names:
            return f"({self.symbols[name]} + C.window)"
        if name in self.symbols:
            return f"({self.symbols[name]})"
        found = special_register(name)
        if found is None:
            raise KeyError(name)
        return found

    def _build(self) -> None:
        instructions = self.kernel.instructions
        targets = {i.target for i in instructions if i.parts[0] == "bra"}
        start_of: dict[int, int] = {}
        region: Region | None = None
        for number, instruction in enumerate(instructions):
            if number in targets:
                region = None
            if instruction.parts[0] == "bra":
                region = None
                start_of[number] = len(self.steps)
                self.steps.append(Branch(len(self.steps), instruction))
                continue
            if instruction.parts[0] in ("ret", "exit"):
                region = None
                start_of[number] = len(self.steps)
                self._append(Exit(len(self.steps), instruction), instruction)
                continue
            control = find(CONTROL, instruction)
            if control is not None:
                region = None
                start_of[number] = len(self.steps)
                handler = _translated(instruction, control)
                step = Control(len(self.steps), instruction, handler)
                self._append(step, instruction)
                continue
            operations = self._translate(instruction)
            if instruction.guard is not None and any(op.effect for op in operations):
                region = None
                start_of[number] = len(self.steps)
                guarded = GuardedRegion(len(self.steps))
                for operation in operations:
                    operation.guard = None
                self._extend(guarded, instruction, operations)
                self._append(guarded, instruction)
                continue
            if region is None:
                region = Region(len(self.steps))
                self.steps.append(region)
            start_of[number] = region.pc
            self._extend(region, instruction, operations)
        start_of[len(instructions)] = len(self.steps)
        self.steps.append(Exit(len(self.steps), instructions[-1]))
        for step in self.steps:
            if isinstance(step, Branch):
                step.target = start_of[step.first.target]

    def _append(self, step, instruction: Instruction) -> None:
        self.steps.append(step if instruction.guard is None else Guarded(step, instruction.guard))

    def _extend(self, region: Region, instruction: Instruction, operations: list) -> None:
        region.first = region.first or instruction
        region.symbols = self.symbol_code
        region.operations += operations
        region.length += 1

    def _translate(self, instruction: Instruction) -> list[Operation]:
        translate = find(PURE, instruction)
        if translate is None:
            raise instruction.unknown(f"opcode {instruction.opcode}")
        operations = _translated(instruction, translate)
        for operation in operations:
            for view, operand in operation.inputs:
                if isinstance(operand, Symbol):
                    if operand.name not in self.symbols and special_register(operand.name) is None:
                        raise instruction.unknown(f"symbol {operand.name}")
                elif not isinstance(operand, (Register, Immediate, Negated)):
                    raise instruction.unknown(f"operand {operand} as {view}")
        return operations

    def _successors(self, step) -> list[int]:
        if isinstance(step, Branch):
            return [step.target] if step.guard is None else [step.target, step.pc + 1]
        if isinstance(step, Exit):
            return [len(self.steps)]
        if isinstance(step, Guarded) and isinstance(step.step, Exit):
            return [len(self.steps), step.pc + 1]
        return [step.pc + 1]

    def _join_points(self) -> None:
        """Find the immediate post-dominators (Cooper, Harvey, Kennedy) on the reversed graph."""
        end = len(self.steps)
        successors = [self._successors(step) for step in self.steps] + [[]]
        predecessors: list[list[int]] = [[] for _ in range(end + 1)]
        for node, targets in enumerate(successors):
            for target in targets:
                predecessors[target].append(node)
        order, seen, stack = [], {end}, [(end, iter(predecessors[end]))]
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(predecessors[following])))
        rank = {node: i for i, node in enumerate(order)}
        parent = {end: end}
        changed = True
        while changed:
            changed = False
            for node in reversed(order[:-1]):
                known = [s for s in successors[node] if s in parent]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        while rank[best] < rank[other]:
                            best = parent[best]
                        while rank[other] < rank[best]:
                            other = parent[other]
                if parent.get(node) != best:
                    parent[node], changed = best, True
        for step in self.steps:
            if isinstance(step, Branch) and step.guard is not None:
                join = parent.get(step.pc, end)
                step.join = EXIT if join == end else join

    def _number(self) -> None:
        usage, regions, numbering = Usage(), [], Numbering()
        for register in self.kernel.registers:
            register.index = -1
        for step in self.steps:
            inner = step.step if isinstance(step, Guarded) else step
            if isinstance(inner, Region):
                regions.append(inner)
                for operation in inner.operations:
                    usage.add(operation)
            for register in getattr(getattr(inner, "handler", None), "registers", ()):
                numbering.assign(register)  # wgmma fragments come first, each in one piece
        for instruction in self.kernel.instructions:
            if instruction.guard is not None:
                usage.add_read(instruction.guard[0])
            if instruction.parts[0] != "bra" and find(CONTROL, instruction) is not None:
                for operand in instruction.operands:
                    for register in registers_of(operand):
                        usage.add_read(register)
        for region in regions:
            region.schedule(usage)
            for group in region.groups:
                numbering.assign_batch(group)
        for register in self.kernel.registers:
            numbering.assign(register)
        for region in regions:
            region.number()
        self.rows = numbering.rows


def _translated(instruction: Instruction, translate: Callable):
    try:
        return translate(instruction)
    except (ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise instruction.unknown(f"this operand form ({error})") from error


_LANE_REGISTERS = {
    "%tid.x", "%tid.y", "%tid.z", "%laneid", "%warpid", "%lanemask_eq", "%lanemask_lt",
    "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
}  # fmt: skip
_VECTOR_REGISTERS = {  # {k}: 0, 1, 2 for x, y, z
    "%ntid": "C.launch.block[{k}]",
    "%ctaid": "C.ctaid[{k}]",
    "%nctaid": "C.launch.grid[{k}]",
    "%clusterid": "(C.ctaid[{k}] // C.launch.cluster[{k}])",
    "%nclusterid": "(C.launch.grid[{k}] // C.launch.cluster[{k}])",
    "%cluster_ctaid": "(C.ctaid[{k}] % C.launch.cluster[{k}])",
    "%cluster_nctaid": "C.launch.cluster[{k}]",
}
_BLOCK_REGISTERS = {
    f"{name}.{c}": text.format(k=k)
    for name, text in _VECTOR_REGISTERS.items()
    for k, c in enumerate("xyz")
} | {
    "%cluster_ctarank": "C.rank", "%cluster_nctarank": "len(C.cluster.blocks)",
    "%is_explicit_cluster": "(len(C.cluster.blocks) > 1)", "%smid": "(0)", "%nsmid": "(132)",
    "%nwarpid": "(64)", "%gridid": "(0)",
    "%clock": "C.clock()", "%clock64": "C.clock()", "%globaltimer": "C.clock()",
    "%dynamic_smem_size": "C.launch.dynamic_shared", "WARP_SZ": "(32)",
}  # fmt: skip


def special_register(name: str) -> str | None:
    """Return the Python text of a special register, or None."""
    return f"X[{name!r}]" if name in _LANE_REGISTERS else _BLOCK_REGISTERS.get(name)
