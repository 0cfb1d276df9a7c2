"""ld, st, atom, red and the address conversions.

Generated code calls the block's ``load`` and ``store`` with the state space's name; they check
bounds, alignment and hazards and return one array a vector element.
"""

from ..memory import PARAM_WINDOW, SHARED_WINDOW
from ..ptx import SINK, Address, Immediate, Instruction, Operand, Register, Symbol, Vector
from ..vectorize import BITS, Operation
from . import pure
from .arithmetic import VIEW, simple

_SPACES = ("global", "shared", "param", "local", "const")
_IGNORED = {  # cache and ordering hints: the simulator executes memory operations in order
    "ca", "cg", "cs", "cv", "wb", "wt", "nc", "relaxed", "weak", "volatile", "acquire", "release",
    "cta", "gpu", "sys", "cluster", "L1::no_allocate", "L1::evict_last", "L1::evict_first",
    "L2::128B", "L2::256B", "L2::64B", "L2::cache_hint", "L1::evict_normal", "acq_rel",
}  # fmt: skip


def state_space(instruction: Instruction) -> str:
    for part in instruction.parts[1:]:
        name = part.split("::")[0]
        if name in _SPACES:
            if part == "shared::cluster":
                raise instruction.unknown("distributed shared memory")
            return name
    return "generic"


def address(instruction: Instruction, operand: Operand) -> tuple[str, tuple[str, Operand]]:
    """Expression of an address with {0} for its base, and the base as an input."""
    assert isinstance(operand, Address)
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        view = "U" if base.bits == 32 else "W"
        return (f"{{0}} + {offset % (1 << BITS[view])}" if offset else "{0}"), (view, base)
    if isinstance(base, Immediate):
        return "{0}", ("U", Immediate(base.value + offset))
    if isinstance(base, Symbol):
        return f"{{0}} + {offset}", ("U", base)
    raise instruction.unknown("address operand")


def access(instruction: Instruction) -> tuple[int, int, str]:
    """(bytes an element, elements, type) of a load or store; refuses unknown modifiers."""
    count, kind = 1, instruction.parts[-1]
    for part in instruction.parts[1:-1]:
        if part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif part.split("::")[0] not in _SPACES and part not in _IGNORED:
            raise instruction.unknown(f"modifier .{part}")
    if kind not in VIEW and kind != "b128":
        raise instruction.unknown(f"type .{kind}")
    if kind == "b128":
        raise instruction.unknown("128-bit registers")
    return int("".join(c for c in kind if c.isdigit())) // 8, count, kind


def _items(operand: Operand) -> list[Operand]:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@pure("ld", "ldu")
def _load(instruction: Instruction) -> list[Operation]:
    space = state_space(instruction)
    if space == "param":
        return _load_param(instruction)
    width, count, kind = access(instruction)
    text, base = address(instruction, instruction.operands[1])
    lines = [f"t = C.load(L, {{k0}}, {space!r}, {text}, {width}, {count})"]
    outputs: list[tuple[str, Register]] = []
    for k, register in enumerate(_items(instruction.operands[0])):
        if register == SINK:
            continue
        signed = f".view(np.int{8 * width})" if kind[0] == "s" else ""
        view = {16: "H", 32: "U", 64: "W"}[register.bits]
        if signed and BITS[view] > 8 * width:
            view = {"H": "S", "U": "I", "W": "J"}[view]
        lines.append(f"{{d{len(outputs)}}} = t[{k}]{signed if view in 'SIJ' else ''}")
        outputs.append((view, register))
    return [
        Operation(
            instruction, "\n".join(lines), outputs, [base], "load", "", instruction.guard,
            constants=(instruction,),
        )
    ]  # fmt: skip


def _load_param(instruction: Instruction) -> list[Operation]:
    width, _, kind = access(instruction)
    place = instruction.operands[1]
    if not isinstance(place.base, Symbol):
        raise instruction.unknown("parameter address in a register")
    result = []
    for k, register in enumerate(_items(instruction.operands[0])):
        view = {16: "H", 32: "U", 64: "W"}[register.bits]
        dtype = f"{'int' if kind[0] == 's' else 'uint'}{8 * width}"
        text = f"C.param({{0}} + {place.offset + k * width}, np.{dtype})"
        if kind[0] == "s":
            text += f".astype(np.int{BITS[view]}).astype(np.uint{BITS[view]})"
        result.append(
            Operation(
                instruction, text, [(view, register)], [("W", place.base)], guard=instruction.guard
            )
        )
    return result


@pure("st")
def _store(instruction: Instruction) -> list[Operation]:
    space = state_space(instruction)
    width, count, _ = access(instruction)
    text, base = address(instruction, instruction.operands[0])
    inputs = [base]
    for operand in _items(instruction.operands[1]):
        if isinstance(operand, Immediate):
            inputs.append(({1: "H", 2: "H", 4: "U", 8: "W"}[width], Immediate(operand.value)))
        else:
            inputs.append(({16: "H", 32: "U", 64: "W"}[operand.bits], operand))
    values = ", ".join(f"{{{k + 1}}}" for k in range(count))
    line = f"C.store(L, {{k0}}, {space!r}, {text}, {width}, ({values},))"
    return [
        Operation(
            instruction, line, [], inputs, "store", "", instruction.guard, constants=(instruction,)
        )
    ]


_ATOMIC = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}


@pure("atom", "red")
def _atomic(instruction: Instruction) -> list[Operation]:
    parts, space = instruction.parts, state_space(instruction)
    operation = next((part for part in parts if part in _ATOMIC), None)
    kind = parts[-1]
    known = _IGNORED | _ATOMIC | {"v2", "v4", "noftz"}
    for part in parts[1:-1]:
        if part.split("::")[0] not in _SPACES and part not in known:
            raise instruction.unknown(f"modifier .{part}")
    if operation is None or kind not in ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64"):
        raise instruction.unknown(instruction.opcode)
    operands = list(instruction.operands)
    returns = parts[0] == "atom"
    target = operands.pop(0) if returns else None
    if isinstance(target, Vector):
        raise instruction.unknown("atom with a vector result")
    text, base = address(instruction, operands.pop(0))
    view = VIEW[kind]
    values = _items(operands[0]) if isinstance(operands[0], Vector) else operands
    if operation not in ("cas",) and not isinstance(operands[0], Vector):
        values = values[:1]  # a cache policy may follow
    inputs = [base] + [(view, value) for value in values]
    arguments = ", ".join(f"{{{k + 1}}}" for k in range(len(values)))
    dtype = {"u": "uint", "s": "int", "b": "uint", "f": "float"}[kind[0]] + kind[1:]
    outputs = [] if target is None or target == SINK else [(view, target)]
    call = (
        f"C.atomic(L, {{k0}}, {space!r}, {operation!r}, np.{dtype}, {text}, ({arguments},), "
        f"{bool(outputs)})"
    )
    line = f"{{d0}} = {call}" if outputs else call
    return [
        Operation(
            instruction, line, outputs, inputs, "store", "", instruction.guard,
            constants=(instruction,),
        )
    ]  # fmt: skip


@pure("cvta")
def _convert_address(instruction: Instruction) -> list[Operation]:
    space = next(
        (p.split("::")[0] for p in instruction.parts[1:] if p.split("::")[0] in _SPACES), ""
    )
    window = {"shared": SHARED_WINDOW, "param": PARAM_WINDOW, "global": 0}.get(space)
    if window is None:
        raise instruction.unknown(instruction.opcode)
    if "to" in instruction.parts:
        return simple(instruction, f"({{0}} - {window})", "W", "W")
    return simple(instruction, f"({{0}} + {window})", "W", "W")


@pure("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def _hint(instruction: Instruction) -> list[Operation]:
    if instruction.parts[0] == "createpolicy":
        return simple_zero(instruction)
    return []


def simple_zero(instruction: Instruction) -> list[Operation]:
    """A cache policy: opaque, 0 here."""
    target = instruction.operands[0]
    return [Operation(instruction, "0", [("W", target)], [], guard=instruction.guard)]
