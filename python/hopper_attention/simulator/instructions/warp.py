"""Operations among the lanes of a warp: shfl, vote, elect, redux, ldmatrix, stmatrix."""

import numpy as np

from hopper_attention.simulator.errors import HazardError
from hopper_attention.simulator.hardware.memory import REDUCTIONS
from hopper_attention.simulator.instructions.memory import address
from hopper_attention.simulator.instructions.registry import helper, pure
from hopper_attention.simulator.ptx.parser import SINK, Immediate, Instruction, Pair, Vector
from hopper_attention.simulator.ptx.vectorize import Operation


def _shuffle_source(mode: str, lane: np.ndarray, b, c) -> tuple[np.ndarray, np.ndarray]:
    """Return source lane and in-range predicate, after the PTX documentation's pseudo-code."""
    b, c = np.asarray(b).astype(np.int64), np.asarray(c).astype(np.int64)
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    minimum = lane & segment
    maximum = minimum | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        valid = source >= maximum
    else:
        source = {"down": lane + b, "bfly": lane ^ b, "idx": minimum | (b & ~segment)}[mode]
        valid = source <= maximum
    return np.where(valid, source, lane), valid


def _shuffle_index(lanes, mode: str, b, c) -> tuple[np.ndarray, np.ndarray]:
    """Return the column of each lane's source within the window, and the predicate."""
    constant = isinstance(b, int) and isinstance(c, int)
    key = (mode, b, c)
    if constant and key in lanes.shuffles:
        return lanes.shuffles[key]
    lane = lanes.lanes & 31
    source, valid = _shuffle_source(mode, lane, b, c)
    wanted = (lanes.lanes & ~31) + source
    index = np.minimum(np.searchsorted(lanes.lanes, wanted), len(lanes.lanes) - 1)
    if (lanes.lanes[index] != wanted).any():
        raise HazardError("shfl.sync reads a lane that does not take part")
    if constant:
        lanes.shuffles[key] = index, valid
    return index, valid


@helper
def shuffle(lanes, mode: str, value: np.ndarray, b, c) -> np.ndarray:
    index = _shuffle_index(lanes, mode, b, c)[0]
    value = np.broadcast_to(value, (*np.shape(value)[:-1], lanes.count))
    if index.ndim > 1:  # several shuffles, each by its own register
        return np.take_along_axis(np.broadcast_to(value, index.shape), index, axis=-1)
    return value[..., index]


@helper
def shuffle_valid(lanes, mode: str, b, c) -> np.ndarray:
    return _shuffle_index(lanes, mode, b, c)[1]


@pure("shfl.sync", modifiers="up down bfly idx")
def _shuffle(instruction: Instruction) -> list[Operation]:
    mode = instruction.parts[2]
    target, value, b, c, _ = instruction.operands
    predicate = None
    if isinstance(target, Pair):
        target, predicate = target.first, target.second
    result = []
    inputs = [("U", value), ("U", b), ("U", c)]
    if predicate is not None and predicate != SINK:
        text = f"shuffle_valid(L, {mode!r}, {{1}}, {{2}})"
        result.append(Operation(instruction, text, [("P", predicate)], inputs))
    text = f"shuffle(L, {mode!r}, {{0}}, {{1}}, {{2}})"
    if isinstance(value, Immediate):
        text = "{0}"
    result.append(Operation(instruction, text, [("U", target)], inputs))
    if instruction.guard is not None:
        raise instruction.unknown("predicated shfl")
    return result


@pure("elect.sync", modifiers="")
def _elect(instruction: Instruction) -> list[Operation]:
    """Translate elect: the lowest lane of each warp that takes part is elected."""
    target, predicate = instruction.operands[0], None
    if isinstance(target, Pair):
        target, predicate = target.first, target.second
    result = []
    if target != SINK:
        result.append(Operation(instruction, "L.leader", [("U", target)], []))
    if predicate is not None:
        result.append(Operation(instruction, "L.elected", [("P", predicate)], []))
    return result


@helper
def vote(lanes, mode: str, value) -> np.ndarray:
    """Return each warp's vote in all of its lanes; value: the lanes' predicates."""
    value = np.broadcast_to(value, (lanes.count,))
    if mode == "ballot":
        result = np.zeros(lanes.count, np.uint32)
    else:
        result = np.zeros(lanes.count, np.bool_)
    for columns in lanes.warp_columns:
        part = value[columns]
        if mode == "ballot":
            bits = np.uint32(1) << (lanes.lanes[columns] & 31).astype(np.uint32)
            result[columns] = np.bitwise_or.reduce(np.where(part, bits, np.uint32(0)))
        elif mode == "uni":
            result[columns] = part.all() or not part.any()
        else:
            result[columns] = part.any() if mode == "any" else part.all()
    return result


@pure("vote.sync", "activemask", modifiers="ballot any all uni")
def _vote(instruction: Instruction) -> list[Operation]:
    if instruction.parts[0] == "activemask":
        text = "vote(L, 'ballot', True)"
        return [Operation(instruction, text, [("U", instruction.operands[0])], [])]
    mode = instruction.parts[2]
    if mode not in ("ballot", "any", "all", "uni"):
        raise instruction.unknown(f"vote.{mode}")
    target, source = instruction.operands[:2]
    view = "U" if mode == "ballot" else "P"
    text = f"vote(L, {mode!r}, {{0}})"
    # One warp's vote is one value a warp: never batched, hence effect "load".
    return [
        Operation(instruction, f"{{d0}} = {text}", [(view, target)], [("P", source)], effect="load")
    ]


@helper
def reduce_warp(lanes, name: str, value: np.ndarray) -> np.ndarray:
    ufunc = REDUCTIONS[name]
    value = np.broadcast_to(value, (lanes.count,))
    result = np.empty_like(value)
    for columns in lanes.warp_columns:
        result[columns] = ufunc.reduce(value[columns], dtype=value.dtype)
    return result


@pure("redux.sync", modifiers="add min max and or xor")
def _reduce(instruction: Instruction) -> list[Operation]:
    name, kind = instruction.parts[2], instruction.parts[-1]
    if kind not in ("u32", "s32", "b32") or len(instruction.parts) != 4:
        raise instruction.unknown(instruction.opcode)
    view = "I" if kind == "s32" else "U"
    text = f"{{d0}} = reduce_warp(L, {name!r}, {{0}})"
    target, source = instruction.operands[:2]
    return [Operation(instruction, text, [(view, target)], [(view, source)], effect="load")]


@helper
def match(lanes, value: np.ndarray, everyone: bool) -> np.ndarray:
    """Return the mask of the warp's lanes with the same value; ``everyone``: all or nothing."""
    value = np.broadcast_to(value, (lanes.count,))
    result = np.zeros(lanes.count, np.uint32)
    for columns in lanes.warp_columns:
        bits = np.uint32(1) << (lanes.lanes[columns] & 31).astype(np.uint32)
        same = value[columns][:, None] == value[columns][None, :]
        masks = np.bitwise_or.reduce(np.where(same, bits[None, :], np.uint32(0)), axis=1)
        if everyone and not same.all():
            masks[:] = 0
        result[columns] = masks
    return result


@pure("match", modifiers="any all sync")
def _match(instruction: Instruction) -> list[Operation]:
    target, source = instruction.operands[:2]
    predicate = None
    if isinstance(target, Pair):
        target, predicate = target.first, target.second
    everyone = "all" in instruction.parts
    view = "W" if instruction.parts[-1] == "b64" else "U"
    lines = [f"t = match(L, {{0}}, {everyone})"]
    outputs: list = []
    for kind, register, text in (("U", target, "t"), ("P", predicate, "t != 0")):
        if register is not None and register != SINK:
            lines.append(f"{{d{len(outputs)}}} = {text}")
            outputs.append((kind, register))
    return [Operation(instruction, "\n".join(lines), outputs, [(view, source)], effect="load")]


def _matrix_form(instruction: Instruction) -> tuple[int, bool]:
    parts = instruction.parts
    if parts[1:4] != ("sync", "aligned", "m8n8") or parts[-1] != "b16":
        raise instruction.unknown(instruction.opcode)
    if instruction.guard is not None:
        raise instruction.unknown(f"predicated {parts[0]}")
    return {"x1": 1, "x2": 2, "x4": 4}[parts[4]], "trans" in parts


@pure("stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _store_matrix(instruction: Instruction) -> list[Operation]:
    count, transpose = _matrix_form(instruction)
    text, base = address(instruction, instruction.operands[0])
    source = instruction.operands[1]
    items = source.items if isinstance(source, Vector) else (source,)
    values = ", ".join(f"{{{k + 1}}}" for k in range(count))
    line = f"C.lane_memory.store_matrix(L, {{k0}}, {text}, ({values},), {transpose})"
    inputs = [base] + [("U", item) for item in items]
    return [Operation(instruction, line, [], inputs, "store", constants=(instruction,))]


@pure("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _load_matrix(instruction: Instruction) -> list[Operation]:
    count, transpose = _matrix_form(instruction)
    target = instruction.operands[0]
    items: tuple = target.items if isinstance(target, Vector) else (target,)
    text, base = address(instruction, instruction.operands[1])
    lines = [f"t = C.lane_memory.load_matrix(L, {{k0}}, {text}, {count}, {transpose})"]
    lines += [f"{{d{k}}} = t[{k}]" for k in range(count)]
    return [
        Operation(
            instruction, "\n".join(lines), [("U", item) for item in items], [base], "load",
            constants=(instruction,),
        )
    ]  # fmt: skip
