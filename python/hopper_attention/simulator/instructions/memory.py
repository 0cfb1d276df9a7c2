"""Loads, stores, atomics (ld, st, atom, red) and the address conversions.

Generated code calls the block's LaneMemory with the state space's name; it checks bounds, alignment
and hazards and returns one array a vector element.
"""

from hopper_attention.simulator.hardware.memory import (
    CLUSTER_BITS,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
)
from hopper_attention.simulator.instructions.arithmetic import VIEW, simple
from hopper_attention.simulator.instructions.registry import pure, refuse_unknown
from hopper_attention.simulator.ptx.parser import (
    SINK,
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Symbol,
    Vector,
)
from hopper_attention.simulator.ptx.vectorize import BITS, Operation

_SPACES = ("global", "shared", "param", "local", "const")
_IGNORED = {  # cache and ordering hints: the simulator executes memory operations in order
    "ca", "cg", "cs", "cv", "wb", "wt", "nc", "relaxed", "weak", "volatile", "acquire", "release",
    "cta", "gpu", "sys", "cluster", "L1::no_allocate", "L1::evict_last", "L1::evict_first",
    "L2::128B", "L2::256B", "L2::64B", "L2::cache_hint", "L1::evict_normal", "acq_rel",
}  # fmt: skip


_STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel"}


def state_space(instruction: Instruction) -> str:
    for part in instruction.parts[1:]:
        if part == "shared::cluster":
            return part
        name = part.split("::")[0]
        if name in _SPACES:
            return name
    return "generic"


def address(instruction: Instruction, operand: Operand) -> tuple[str, tuple[str, Operand]]:
    """Return the expression of an address with {0} for its base, and the base as an input."""
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
    """Return (bytes an element, elements, type) of an access; refuses unknown modifiers."""
    count, kind = 1, instruction.parts[-1]
    for part in instruction.parts[1:-1]:
        if part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif part.split("::")[0] not in _SPACES and part not in _IGNORED:
            raise instruction.unknown(f"modifier .{part}")
    if kind == "b128":
        return 8, 2 * count, kind
    if kind not in VIEW:
        raise instruction.unknown(f"type .{kind}")
    return int("".join(c for c in kind if c.isdigit())) // 8, count, kind


def _items(operand: Operand) -> list[Operand]:
    """Return the registers of a vector; a 128-bit register is two of 64 bits."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    return [half for item in items for half in (item.items if isinstance(item, Vector) else [item])]


def is_strong(instruction: Instruction) -> bool:
    """True for accesses that may race with each other by design."""
    return not _STRONG.isdisjoint(instruction.parts)


@pure("ld", "ldu")
def _load(instruction: Instruction) -> list[Operation]:
    space = state_space(instruction)
    if space == "param":
        return _load_param(instruction)
    width, count, kind = access(instruction)
    text, base = address(instruction, instruction.operands[1])
    arguments = f"{space!r}, {text}, {width}, {count}, {is_strong(instruction)}"
    lines = [f"t = C.lane_memory.load(L, {{k0}}, {arguments})"]
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
        text, base = address(instruction, place)
        registers = _items(instruction.operands[0])
        lines = [f"t = C.lane_memory.param_lanes({text}, {width}, {len(registers)})"]
        outputs = [({16: "H", 32: "U", 64: "W"}[r.bits], r) for r in registers]
        sign = f".view(np.int{8 * width})" if kind[0] == "s" else ""
        lines += [f"{{d{k}}} = t[{k}]{sign}" for k in range(len(outputs))]
        return [
            Operation(instruction, "\n".join(lines), outputs, [base], "load", "", instruction.guard)
        ]
    result = []
    for k, register in enumerate(_items(instruction.operands[0])):
        view = {16: "H", 32: "U", 64: "W"}[register.bits]
        dtype = f"{'int' if kind[0] == 's' else 'uint'}{8 * width}"
        text = f"C.lane_memory.param({{0}} + {place.offset + k * width}, np.{dtype})"
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
    arguments = f"{space!r}, {text}, {width}, ({values},), {is_strong(instruction)}"
    line = f"C.lane_memory.store(L, {{k0}}, {arguments})"
    return [
        Operation(
            instruction, line, [], inputs, "store", "", instruction.guard, constants=(instruction,)
        )
    ]


_ATOMIC = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}
_HALVES = {"f16": 1, "bf16": 1, "f16x2": 2, "bf16x2": 2}


@pure("atom", "red")
def _atomic(instruction: Instruction) -> list[Operation]:
    """Translate atom d, [a], b {, c} and red [a], b; vectors element by element."""
    parts, space = instruction.parts, state_space(instruction)
    operation = next((part for part in parts if part in _ATOMIC), None)
    kind = parts[-1]
    known = _IGNORED | _ATOMIC | {"v2", "v4", "v8", "noftz"}
    for part in parts[1:-1]:
        if part.split("::")[0] not in _SPACES and part not in known:
            raise instruction.unknown(f"modifier .{part}")
    words = ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64")
    if operation is None or (kind not in words and kind not in _HALVES):
        raise instruction.unknown(instruction.opcode)
    operands = list(instruction.operands)
    targets = _items(operands.pop(0)) if parts[0] == "atom" else []
    text, base = address(instruction, operands.pop(0))
    count = 2 if operation == "cas" else 1
    values = _items(operands[0]) if isinstance(operands[0], Vector) else operands[:count]
    kept = [k for k, x in enumerate(targets) if x != SINK]
    if kind in _HALVES:
        return _atomic_halves(instruction, space, operation, text, base, values, targets, kept)
    view = VIEW[kind]
    inputs = [base] + [(view, value) for value in values]
    arguments = ", ".join(f"{{{k + 1}}}" for k in range(len(values)))
    dtype = {"u": "uint", "s": "int", "b": "uint", "f": "float"}[kind[0]] + kind[1:]
    outputs = [(view, targets[k]) for k in kept]
    line = (
        f"t = C.lane_memory.atomic(L, {{k0}}, {space!r}, {operation!r}, np.{dtype}, {text}, "
        f"({arguments},), {bool(outputs)})"
    )
    lines = [line] + [f"{{d{n}}} = t[{k}]" for n, k in enumerate(kept)]
    return [
        Operation(
            instruction, "\n".join(lines), outputs, inputs, "store", "", instruction.guard,
            constants=(instruction,),
        )
    ]  # fmt: skip


def _atomic_halves(instruction, space, operation, text, base, values, targets, kept):
    """Translate atomics of 16-bit floats, one or two a register."""
    kind = instruction.parts[-1]
    packed, element = _HALVES[kind] == 2, kind.removesuffix("x2")
    if operation not in ("add", "min", "max"):
        raise instruction.unknown(instruction.opcode)
    view = "U" if packed else "H"
    inputs = [base] + [(view, value) for value in values]
    halves = []
    for k in range(len(values)):
        halves += [f"{{{k + 1}}}", f"{{{k + 1}}} >> 16"] if packed else [f"{{{k + 1}}}"]
    lines = [
        f"t = C.lane_memory.atomic_packed(L, {{k0}}, {space!r}, {operation!r}, {element!r}, "
        f"{text}, ({', '.join(f'({h}).astype(np.uint16)' for h in halves)},))"
    ]
    for n, k in enumerate(kept):
        value = f"t[{2 * k}] | t[{2 * k + 1}].astype(np.uint32) << 16" if packed else f"t[{k}]"
        lines.append(f"{{d{n}}} = {value}")
    outputs = [(view, targets[k]) for k in kept]
    return [
        Operation(
            instruction, "\n".join(lines), outputs, inputs, "store", "", instruction.guard,
            constants=(instruction,),
        )
    ]  # fmt: skip


@pure(
    "cvta", modifiers="to global shared shared::cta shared::cluster param param::entry const local"
)
def _convert_address(instruction: Instruction) -> list[Operation]:
    space = next(
        (p.split("::")[0] for p in instruction.parts[1:] if p.split("::")[0] in _SPACES), ""
    )
    window = {"shared": SHARED_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0,
              "local": LOCAL_WINDOW}.get(space)  # fmt: skip
    if window is None or instruction.parts[-1] != "u64":
        raise instruction.unknown(instruction.opcode)
    sign = "-" if "to" in instruction.parts else "+"
    return simple(instruction, f"({{0}} {sign} {window})", "W", "W")


@pure("mapa")
def _map_address(instruction: Instruction) -> list[Operation]:
    """Map an address to the same offset in the shared memory of another block of the cluster."""
    refuse_unknown(instruction, {"shared::cluster", "u32", "u64"})
    view = "W" if instruction.parts[-1] == "u64" else "U"
    dtype, bits = ("np.uint64", 64) if view == "W" else ("np.uint32", 32)
    keep = (1 << bits) - 1 - (255 << CLUSTER_BITS)
    text = f"({{0}} & {keep}) | {dtype}({{1}}) << {CLUSTER_BITS}"
    operands = instruction.operands
    inputs = [(view, operands[1]), ("U", operands[2])]
    return [Operation(instruction, text, [(view, operands[0])], inputs, guard=instruction.guard)]


@pure("getctarank")
def _block_rank(instruction: Instruction) -> list[Operation]:
    refuse_unknown(instruction, {"shared::cluster", "u32", "u64"})
    view = "W" if instruction.parts[-1] == "u64" else "U"
    text = f"({{0}} >> {CLUSTER_BITS} & 255).astype(np.uint32)"
    return simple(instruction, text, view, view, "U")


@pure("isspacep")
def _is_space(instruction: Instruction) -> list[Operation]:
    low = {"shared": SHARED_WINDOW, "param": PARAM_WINDOW, "local": LOCAL_WINDOW, "global": 0}
    space = instruction.parts[1].split("::")[0]
    if space not in low:
        raise instruction.unknown(instruction.opcode)
    high = min([x for x in low.values() if x > low[space]], default=1 << 64)
    text = f"(({{0}} >= {low[space]}) & ({{0}} <= {high - 1}))"
    return simple(instruction, text, "P", "W")


@pure(
    "prefetch", "prefetchu", "discard", "applypriority", "createpolicy",
    modifiers="global L1 L2 tensormap param const fractional range L2::evict_last "
    "L2::evict_normal L2::evict_first L2::evict_unchanged",
)  # fmt: skip
def _hint(instruction: Instruction) -> list[Operation]:
    if instruction.parts[0] == "createpolicy":
        return simple_zero(instruction)
    return []


def simple_zero(instruction: Instruction) -> list[Operation]:
    """Return the cache policy, which is opaque and 0 here."""
    target = instruction.operands[0]
    return [Operation(instruction, "0", [("W", target)], [], guard=instruction.guard)]
