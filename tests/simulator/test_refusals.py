"""A modifier that a translator does not know must stop the kernel, whatever the instruction."""

import numpy as np
import pytest
from simulator.snippets import module

from hopper_attention import simulator
from hopper_attention.simulator.execution.program import program_of
from hopper_attention.simulator.instructions.registry import CONTROL, PURE

FAMILIES = sorted({*PURE, *CONTROL} - {"nanosleep", "pmevent", "trap", "cp.async.bulk.prefetch"})


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_modifiers_are_refused(family):
    operands = "[%r1], %r2, %r3, %r4"
    kernel = module(f"{family}.bogus.b32 {operands};").kernels["snippet"]
    with pytest.raises(simulator.SimulatorError) as error:
        program_of(kernel)
    assert isinstance(error.value, simulator.UnknownInstruction)
    assert "PTX line" in str(error.value)


KNOWN_BUT_NOT_IMPLEMENTED = [
    "add.sat.s32 %r1, %r2, %r3;", "add.cc.u32 %r1, %r2, %r3;", "mul.hi.s64 %rd1, %rd2, %rd3;",
    "mad.hi.sat.s32 %r1, %r2, %r3, %r4;", "prmt.b32.f4e %r1, %r2, %r3, %r4;",
    "min.xorsign.abs.f32 %r1, %r2, %r3;", "fma.rz.f32 %r1, %r2, %r3, %r4;",
    "add.rz.f32 %r1, %r2, %r3;", "cvt.rz.bf16.f32 %rs1, %r2;",
    "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 1, %p2;", "bar.red.popc.u32 %r1, 0, %p1;",
    "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1;",
    "cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], "
    "[%rd1, {%r2, %r3}], [%r4];",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;",
    "call.uni function, ();",
]  # fmt: skip


@pytest.mark.parametrize("text", KNOWN_BUT_NOT_IMPLEMENTED)
def test_what_is_missing_is_said(text):
    with pytest.raises(simulator.UnknownInstruction, match=r"PTX line 2.: .*\n  not implemented: "):
        program_of(module(text).kernels["snippet"])


def test_source_lines_where_the_ptx_has_them():
    text = '.file 1 "/kernels/attention.py"\n.loc 1 42 7\nld.global.b32 %r1, [%rd10];'
    body = text.split("\n", 1)[1]
    parsed = module(body)
    source = parsed.kernels["snippet"].instructions[-2]
    assert source.source == "?:42"
    template = ".version 8.7\n.target sm_90a\n.visible .entry k()\n{\n"
    template += ".reg .b64 %rd<11>;\n.reg .b32 %r<9>;\n"
    whole = template + body + "\nret;\n}\n" + text.split("\n")[0]
    kernel = simulator.Module.parse(whole).kernels["k"]
    assert "attention.py:42" in kernel.instructions[0].where()
    assert np.prod(kernel.required_block or (1,)) == 1
