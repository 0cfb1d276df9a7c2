"""The parser."""

import pytest
from simulator.snippets import module

from hopper_attention import simulator
from hopper_attention.simulator.ptx.parser import Address, Immediate, Negated, Pair, Symbol, Vector

TEXT = """//
.version 9.4
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry first(
 .param .align 1 .b8 first_param_0[3],
 .param .align 64 .b8 first_param_1[128],
 .param .f32 first_param_2,
 .param .u64 first_param_3
)
.reqntid 384, 1, 1
.minnctapersm 2
{
 .reg .pred  %p<3>;
 .reg .b32  %r<9>;
 .reg .b64  %rd<4>;
 .shared .align 16 .b8 fixed[48];
 mov.b32  %r1, dynamic;   // a comment; with a semicolon
 /* another
    comment */
$L__1:
 .pragma "nounroll";
 @!%p1 bra  $L__1;
 {
 .reg .pred P1;
 AGAIN:
 mbarrier.try_wait.parity.shared.b64 P1, [%r1+-8], %r2, 10000000;
 @P1 bra.uni DONE;  bra.uni AGAIN;
 DONE:
 }
 {
 .reg .pred P1;
 AGAIN: @P1 bra AGAIN;
 }
 elect.sync  %r3|%p2, -1;
 setp.ne.and.b32  %p0, %r1, 0x10, !%p2;
 ld.global.v2.b32  {%r4, _}, [%rd1-16];
 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
  [%r5], [%rd2, {%r6, %r7}], [%r8];
 mov.b32 %r1, 0fBF800000;
 ret;
}
.visible .entry second() { ret; }
"""


@pytest.fixture(scope="module")
def kernel():
    return simulator.Module.parse(TEXT).kernels["first"]


def test_parameters_have_sizes_alignments_and_offsets(kernel):
    assert [(p.size, p.align, p.offset) for p in kernel.params] == [
        (3, 1, 0),
        (128, 64, 64),
        (4, 4, 192),
        (8, 8, 200),
    ]


def test_a_parameter_may_say_what_it_points_to():
    """Compilers that go through LLVM write where a pointer points and how that is aligned."""
    text = TEXT.replace(".param .u64 first", ".param .u64 .ptr .global .align 1 first")
    last = simulator.Module.parse(text).kernels["first"].params[-1]
    assert (last.name, last.size, last.align) == ("first_param_3", 8, 8)


def test_directives(kernel):
    assert kernel.required_block == (384, 1, 1)
    assert kernel.min_blocks == 2
    assert [(v.name, v.size, v.align, v.dynamic) for v in kernel.shared] == [
        ("dynamic", 0, 1024, True),
        ("fixed", 48, 16, False),
    ]
    assert set(simulator.Module.parse(TEXT).kernels) == {"first", "second"}


def test_repeated_names_of_inline_assembly_stay_apart(kernel):
    waits = [i for i in kernel.instructions if i.parts[0] in ("mbarrier", "bra")]
    assert [i.text for i in waits[2:5]] == ["@P1 bra.uni DONE", "bra.uni AGAIN", "@P1 bra AGAIN"]
    loop, wait, done, again, other = waits
    position = kernel.instructions.index
    assert loop.target == position(loop)
    assert again.target == position(wait)
    assert done.target == position(other)
    assert other.target == position(other)
    assert done.guard[0] is wait.operands[0]
    assert other.guard[0] is not wait.operands[0]


def test_operands(kernel):
    by_name = {i.parts[0]: i for i in kernel.instructions}
    assert by_name["mbarrier"].operands[1].offset == -8
    assert isinstance(by_name["elect"].operands[0], Pair)
    compare = by_name["setp"]
    assert compare.operands[2] == Immediate(16)
    assert isinstance(compare.operands[3], Negated)
    load = by_name["ld"]
    assert isinstance(load.operands[0], Vector)
    assert load.operands[0].items[1] == Symbol("_")
    assert load.operands[1].offset == -16
    copy = by_name["cp"]
    assert copy.parts[-1] == "mbarrier::complete_tx::bytes"
    assert isinstance(copy.operands[1], Address)
    assert [r.name for r in copy.operands[1].coordinates] == ["%r6", "%r7"]
    assert by_name["mov"].operands[1] == Immediate(0xBF800000, 32)


def test_line_numbers_are_the_file_s(kernel):
    lines = TEXT.split("\n")
    for instruction in kernel.instructions:
        assert instruction.opcode in lines[instruction.line - 1]


def test_files_are_cached_until_they_change(tmp_path):
    path = tmp_path / "kernel.ptx"
    path.write_text(TEXT)
    loaded = simulator.Module.load(path)
    assert simulator.Module.load(str(path)) is loaded
    path.write_text(TEXT + "\n.visible .entry third() { ret; }\n")
    assert "third" in simulator.Module.load(path).kernels


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s32 %r1, %q1, 1;", "symbol %q1"),
        ("bra nowhere;", "unknown label nowhere"),
        (".reg .q64 %x;", "unknown register type .q64"),
    ],
)
def test_syntax_errors(body, message):
    from simulator.snippets import run

    with pytest.raises(simulator.SimulatorError, match=message):
        run(body, outputs=0)


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ("frobnicate.b32 %r1, %r2;", "opcode frobnicate.b32"),
        ("add.rm.f32 %r1, %r2, %r3;", "modifier .rm"),
        ("cvt.rna.tf32.f32 %r1, %r2;", "cvt.tf32.f32"),
        ("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%r1}, %rd1, %rd2, 1;", "wgmma"),
    ],
)
def test_an_unknown_instruction_is_named_with_its_line(body, missing):
    parsed = module(body)
    line = next(i.line for i in parsed.kernels["snippet"].instructions if i.text == body[:-1])
    with pytest.raises(simulator.UnknownInstruction) as error:
        simulator.launch(
            parsed,
            "snippet",
            grid=(1, 1, 1),
            block=(32, 1, 1),
            params=[bytes(8), bytes(8), bytes(128)],
            memory=simulator.GlobalMemory(),
        )
    assert f"PTX line {line}: {body[:-1]}" in str(error.value)
    assert missing in str(error.value)
