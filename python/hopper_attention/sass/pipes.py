"""Which unit of an SM an instruction occupies, by opcode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hopper_attention.sass.disassembler import Instruction

PIPES: dict[str, tuple[str, ...]] = {
    "tensor": ("HGMMA", "QGMMA", "IGMMA", "BGMMA", "HMMA", "IMMA", "DMMA"),
    "mufu": ("MUFU",),
    "fma": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2", "FFMA32I", "FMUL32I"),
    "alu": (
        *("FMNMX", "FSETP", "FSEL", "FSET", "FCHK", "HMNMX2", "VHMNMX", "HSETP2"),
        *("ISETP", "IADD3", "IABS", "IMNMX", "VIMNMX", "VIMNMX3", "VIADD", "VIADDMNMX"),
        *("LOP3", "PLOP3", "SHF", "LEA", "MOV", "SEL", "PRMT", "SGXT", "BMSK", "IDP", "VABSDIFF"),
        *("R2P", "P2R", "VOTE", "CS2R", "FLO", "POPC", "BREV"),
    ),
    "cvt": ("F2FP", "F2F", "F2I", "I2F", "I2FP", "I2I", "F2IP", "FRND"),
    "lsu": (
        *("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "MATCH", "LDC", "REDUX"),
        *("LDG", "STG", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS"),
        "CCTL",
    ),
    "uniform": (
        *("UIADD3", "UIMAD", "UISETP", "ULDC", "ULEA", "ULOP3", "UPLOP3", "UMOV", "USEL", "USHF"),
        *("UPRMT", "USGXT", "UFLO", "UPOPC", "UBREV", "UBMSK", "UP2UR", "UR2UP", "R2UR", "S2UR"),
        *("VOTEU", "USETMAXREG", "UTMALDG", "UTMASTG", "UTMAREDG", "UTMACMDFLUSH", "UTMACCTL"),
        *("UTMAPF", "UBLKCP", "UBLKRED", "UBLKPF", "UCGABAR_ARV", "UCGABAR_WAIT", "UIADD3X"),
    ),
    "control": (
        *("BRA", "EXIT", "RET", "CALL", "BRX", "JMP", "NOP", "BSSY", "BSYNC", "BREAK", "BPT"),
        *("WARPSYNC", "ELECT", "NANOSLEEP", "YIELD", "S2R", "WARPGROUP", "WARPGROUPSET", "BAR"),
        *("DEPBAR", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "LDGDEPBAR", "ARRIVES", "ACQBULK"),
        *("PREEXIT", "CGAERRBAR", "KILL", "LEPC", "BMOV", "B2R", "R2B"),
    ),
}
"""Pipe -> opcodes without modifiers.  `fma` runs IMAD too; `cvt` is what packs P; TMA instructions
are issued by the uniform datapath; `control` is branches, barriers and waits."""

UNKNOWN = "unknown"

_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}


def pipe_of(instruction: Instruction) -> str:
    return _PIPE_OF.get(instruction.name, UNKNOWN)


def count_pipes(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by pipe, every pipe present; `unknown` only where there are such."""
    counts = Counter(map(pipe_of, code))
    return {pipe: counts[pipe] for pipe in (*PIPES, UNKNOWN) if pipe in PIPES or counts[pipe]}
