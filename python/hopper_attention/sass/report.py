"""One row a kernel: resources, main loops, predictions; comparison of builds; the budget."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from hopper_attention import files
from hopper_attention.errors import UserError
from hopper_attention.sass import model
from hopper_attention.sass.control_flow import ControlFlow, Loop
from hopper_attention.sass.cubin import Kernel, find_cubins
from hopper_attention.sass.disassembler import Instruction, disassemble_together
from hopper_attention.sass.pipes import count_pipes
from hopper_attention.sass.scheduling import longest_run, stall_counts

TOLERANCE = 1.02
"""How much longer than its budget a main loop may be."""

SUFFIXES = (".cubin", ".o", ".so")


@dataclass(frozen=True)
class MainLoop:
    """One main loop, as a consumer warp executes one pass of it."""

    instructions: int
    """Issue slots of every pass; a wait that does not spin counts once."""
    skippable: int
    """Instructions that branches go around: a pass may issue them as well."""
    stalls: int
    """The sum of their stall counts: a warp that waits for nothing else takes so many clocks."""
    longest_run: int
    """Clocks of the longest run of successive instructions of one pipe."""
    longest_run_pipe: str
    pipes: dict[str, int]
    waits: int
    """WARPGROUP.DEPBAR: more than the source's means that ptxas serialised WGMMA."""
    ex2: list[int]
    """Exponentials before the first wait, between waits, and after the last."""
    ex2_before_arrive: int | None
    """Exponentials above the hand-over to the next warpgroup; None without one."""
    schedule: list[str]
    """The instructions that order the loop, in order, runs of one kind merged."""
    clocks: dict[str, int]
    bound: str
    tflops: float


@dataclass(frozen=True)
class Row:
    name: str
    registers: int
    threads: int
    warpgroups: int
    """Consumers."""
    spills: int
    """Instructions that access local memory."""
    main_loop: MainLoop | None
    """The shortest loop with warpgroup matrix instructions: the one without masks."""
    masked_loops: list[MainLoop]
    """The others."""

    @property
    def loops(self) -> dict[str, MainLoop]:
        """Name -> loop: main, masked, masked 2, ..."""
        named = {"main": self.main_loop} if self.main_loop else {}
        for index, loop in enumerate(self.masked_loops):
            named[f"masked {index + 1}" if index else "masked"] = loop
        return named

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        main, masked = data["main_loop"], data["masked_loops"]
        loops = {
            "main_loop": MainLoop(**main) if main else None,
            "masked_loops": [MainLoop(**loop) for loop in masked],
        }
        return Row(**{**data, **loops})


Named = TypeVar("Named", Kernel, Row)


def rows_of(
    path: Path, clock_ghz: float = model.CLOCK_GHZ, patterns: Sequence[str] = ("*",)
) -> list[Row]:
    """The kernels in a file, or in a folder's cubins (objects, extensions if it has none).

    A `.json` file is one that `hopper-attention sass --json` wrote.  Raises UserError for one of
    the `patterns` that matches no name.
    """
    if path.suffix == ".json":
        return _matching(_saved(path), patterns)
    kernels = _matching(kernels_of(path), patterns)
    codes = disassemble_together(kernels)
    return [row_of(kernel, code, clock_ghz) for kernel, code in zip(kernels, codes)]


def kernels_of(path: Path) -> list[Kernel]:
    """Those in a file, or in a folder's cubins (objects, extensions if it has none)."""
    files = [path]
    if path.is_dir():
        kinds = [sorted(path.glob(f"*{suffix}")) for suffix in SUFFIXES]
        files = next(filter(None, kinds), [])
        if not files:
            raise UserError(f"{path} holds no {', '.join(SUFFIXES)} files")
    return [kernel for file in files for cubin in find_cubins(file) for kernel in cubin.kernels]


def _matching(all_of_them: list[Named], patterns: Sequence[str]) -> list[Named]:
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in all_of_them):
            names = ", ".join(one.name for one in all_of_them)
            raise UserError(f"no instance matches {pattern!r}; there are: {names}")
    return [one for one in all_of_them if any(fnmatchcase(one.name, p) for p in patterns)]


def _saved(path: Path) -> list[Row]:
    try:
        return [Row.from_json(data) for data in json.loads(path.read_text())]
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} was not written by `hopper-attention sass --json`") from None


def row_of(kernel: Kernel, code: Sequence[Instruction], clock_ghz: float) -> Row:
    warpgroups = _consumers(kernel, code)
    flow = ControlFlow(code)
    with_gemms = [
        loop
        for loop in flow.loops
        if count_pipes(code[i] for i in flow.instructions(loop))["tensor"]
    ]
    loops = [
        _main_loop(kernel, code, flow, loop, clock_ghz)
        for loop in with_gemms
        if not any(inner.header in loop.blocks for inner in with_gemms if inner is not loop)
    ]
    shortest = min(loops, key=lambda loop: loop.instructions, default=None)
    return Row(
        name=kernel.name,
        registers=kernel.registers,
        threads=kernel.threads,
        warpgroups=warpgroups,
        spills=sum(instruction.name in ("LDL", "STL") for instruction in code),
        main_loop=shortest,
        masked_loops=[loop for loop in loops if loop is not shortest],
    )


def _consumers(kernel: Kernel, code: Iterable[Instruction]) -> int:
    """Warpgroups of a block; one of them is the producer where registers are redistributed."""
    specialised = any(instruction.name == "USETMAXREG" for instruction in code)
    return max(kernel.threads // 128 - specialised, 1)


def _main_loop(
    kernel: Kernel, all_code: Sequence[Instruction], flow: ControlFlow, loop: Loop, clock_ghz: float
) -> MainLoop:
    skippable, stalls = flow.skippable_of(loop), stall_counts(kernel.code)
    one_pass = [i for i in flow.pass_of(loop) if i not in skippable]
    code = [all_code[i] for i in one_pass]
    run = longest_run(code)
    marks = [mark for mark in map(_mark, code) if mark]
    segments, arrived = [0], None
    for mark in marks:
        if mark == "EX2":
            segments[-1] += 1
        elif mark.startswith("wait<="):
            segments.append(0)
        elif mark == "arrive" and arrived is None:
            arrived = sum(segments)
    runs = [(mark, len(list(group))) for mark, group in itertools.groupby(marks)]
    return MainLoop(
        instructions=len(code),
        skippable=len(skippable),
        stalls=sum(stalls[i] for i in one_pass),
        longest_run=run.clocks,
        longest_run_pipe=run.pipe,
        pipes=count_pipes(code),
        waits=len(segments) - 1,
        ex2=segments,
        ex2_before_arrive=arrived,
        schedule=[mark if count == 1 else f"{count} {mark}" for mark, count in runs],
        **asdict(model.predict(code, _consumers(kernel, all_code), clock_ghz)),
    )


def _mark(instruction: Instruction) -> str | None:
    """Return an instruction's kind in the schedule of a loop; None for arithmetic."""
    opcode = instruction.opcode
    if instruction.name in ("HGMMA", "QGMMA"):
        return instruction.name
    if opcode.startswith("MUFU.EX2"):
        return "EX2"
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return f"wait<={int(instruction.operands[-1], 16)}"
    if opcode.startswith("BAR.SYNC"):
        return "sync"
    if opcode.startswith("BAR.ARV"):
        return "arrive"
    return None


# ---------------------------------------------------------------- comparison and budget


def growth(
    before: Iterable[Row], after: Iterable[Row]
) -> list[tuple[str, str, MainLoop, MainLoop]]:
    """(kernel, loop, before, after) of the loops that both builds have.

    Raises UserError if the builds share no kernel.
    """
    earlier = {row.name: row.loops for row in before}
    pairs = [
        (row.name, name, earlier[row.name][name], loop)
        for row in after
        for name, loop in row.loops.items()
        if name in earlier.get(row.name, {})
    ]
    if not pairs:
        raise UserError("the two builds have no main loop of the same kernel in common")
    return pairs


@dataclass(frozen=True)
class Budget:
    """Committed figures of one instance's loops, and why they are what they are."""

    loops: dict[str, dict[str, int]]
    """Loop -> BUDGETED field of `MainLoop` -> its value."""
    reason: str


BUDGETED = {
    "instructions": "instructions",
    "stalls": "clocks of stall counts",
    "longest_run": "clocks in its longest run of one pipe",
}
"""Field of `MainLoop` -> what it counts."""


def _figures(loop: MainLoop) -> dict[str, int]:
    return {field: getattr(loop, field) for field in BUDGETED}


def read_budget(path: Path) -> dict[str, Budget]:
    """Raises UserError for a file that is not a budget, and for an entry without a reason."""
    try:
        budgets = {name: Budget(**entry) for name, entry in json.loads(path.read_text()).items()}
        complete = all(
            set(figures) == set(BUDGETED)
            for budget in budgets.values()
            for figures in budget.loops.values()
        )
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is not a budget: {{instance: {{loops, reason}}}}") from None
    if not complete:
        raise UserError(f"{path}: every loop needs {', '.join(BUDGETED)}")
    for name, budget in budgets.items():
        if not budget.reason.strip():
            raise UserError(f"{path}: the budget of {name} has no reason")
    return budgets


def over_budget(rows: Iterable[Row], budgets: dict[str, Budget]) -> list[str]:
    """One sentence for every loop that is over its budget, or has none."""
    faults = []
    for row in rows:
        allowed = budgets[row.name].loops if row.name in budgets else {}
        for name, loop in row.loops.items():
            if name not in allowed:
                faults.append(f"{row.name}: the {name} loop has no budget")
                continue
            for field, figure in _figures(loop).items():
                most = allowed[name][field]
                if figure > TOLERANCE * most:
                    faults.append(
                        f"{row.name}: the {name} loop has {figure} {BUDGETED[field]}, "
                        f"{figure / most - 1:+.1%} of its budget {most}"
                    )
    return faults


def updated_budget(
    rows: Iterable[Row], budgets: dict[str, Budget], reason: str
) -> dict[str, Budget]:
    """`budgets` with the rows' present figures; `reason` for those that changed."""
    updated = dict(budgets)
    for row in rows:
        loops = {name: _figures(loop) for name, loop in row.loops.items()}
        if loops and (row.name not in budgets or budgets[row.name].loops != loops):
            updated[row.name] = Budget(loops, reason)
    return dict(sorted(updated.items()))


def write_budget(path: Path, budgets: dict[str, Budget]) -> None:
    """Write a line for each instance, so that a difference between versions shows which changed."""
    entries = {name: json.dumps(asdict(budget)) for name, budget in budgets.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {entry}" for name, entry in entries.items())
    files.replace(path, f"{{\n{lines}\n}}\n")
