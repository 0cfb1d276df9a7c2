"""The instructions trap and setmaxnreg.  Branches and exits are steps, see program.py."""

from hopper_attention.simulator.errors import SimulatorError
from hopper_attention.simulator.instructions.registry import control
from hopper_attention.simulator.ptx.parser import Instruction


@control("trap", modifiers="")
def _trap(instruction: Instruction):
    def run(block, unit) -> bool:
        raise SimulatorError(f"trap executed at {instruction.where()}")

    return run


@control("setmaxnreg", modifiers="inc dec sync aligned")
def _set_registers(instruction: Instruction):
    """Translate dec, which returns registers to the block's pool, and inc, which waits for them."""
    count = instruction.operands[0].value
    if count % 8 or not 24 <= count <= 256:
        raise instruction.unknown(f"register count {count}: a multiple of 8 in 24..256 is required")

    def run(block, unit) -> bool:
        unit.require_whole_warps(instruction)
        warps = [warp for warp in unit.warps if block.warp_registers[warp] != count]
        needed = sum(32 * (count - block.warp_registers[warp]) for warp in warps)
        if "inc" in instruction.parts:
            if any(block.warp_registers[warp] > count for warp in warps):
                raise SimulatorError("setmaxnreg.inc below the present count")
        elif any(block.warp_registers[warp] < count for warp in warps):
            raise SimulatorError("setmaxnreg.dec above the present count")
        if needed > block.free_registers:
            unit.waiting = f"{needed} registers, {block.free_registers} are free"
            return False
        block.free_registers -= needed
        for warp in warps:
            block.warp_registers[warp] = count
        return True

    return run
