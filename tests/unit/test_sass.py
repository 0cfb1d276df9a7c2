"""`hopper-attention sass`: control flow, the model, the installed kernels and their budget."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hopper_attention import _cuda
from hopper_attention.cli import app
from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError

pytest.importorskip("elftools", reason="needs hopper-attention[tools]")

from hopper_attention.sass import disassembler, model, report
from hopper_attention.sass.control_flow import ControlFlow
from hopper_attention.sass.cubin import find_cubins
from hopper_attention.sass.disassembler import Instruction
from hopper_attention.sass.pipes import PIPES, count_pipes
from hopper_attention.sass.scheduling import Run, longest_run, stall_counts

needs_disassembler = pytest.mark.skipif(
    disassembler.find_nvdisasm() is None, reason="needs the nvidia-cuda-nvdisasm wheel"
)
EXTENSION = Path(_cuda.__file__)


def assemble(text):
    """ "@P0 OPCODE a,b" a line; `L:` before an instruction and `-> L` for a branch target."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if ":" in line}
    code = []
    for line in lines:
        words = line.split(":")[-1].replace("->", "").split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        opcode, *operands = words
        operands = [o for operand in operands for o in operand.split(",")]
        operands = tuple(hex(16 * labels[o]) if o in labels else o for o in operands)
        code.append(Instruction(opcode, operands, predicate))
    return code


def kernel_of(symbol, threads, stalls):
    """A kernel of machine code that says nothing but how long each instruction stalls."""
    words = [(stall << 105).to_bytes(16, "little") for stall in stalls]
    return report.Kernel(symbol, "SM90a", b"".join(words), 168, threads)


@pytest.fixture(scope="module")
def rows():
    return report.rows_of(EXTENSION)


# ---------------------------------------------------------------- control flow


def test_loop_with_an_inner_wait():
    code = assemble(
        """
        MOV
        top: FADD
        wait: SYNCS
        @!P0 BRA -> wait
        HGMMA.64x128x16.F32.BF16 R0,gdesc[UR4],RZ
        @P1 BRA -> top
        EXIT
        """
    )
    flow = ControlFlow(code)
    assert [loop.header for loop in flow.loops] == [1, 2]
    assert flow.pass_of(flow.loops[0]) == [1, 2, 3, 4, 5]
    assert flow.pass_of(flow.loops[1]) == [2, 3]


def test_repetitions_of_a_wait_behind_the_kernel_are_no_part_of_a_pass():
    code = assemble(
        """
        top: SYNCS
        @!P0 BRA -> again
        back: HGMMA.64x128x16.F32.BF16 R0,gdesc[UR4],RZ
        @P1 BRA -> top
        EXIT
        again: SYNCS
        @!P0 BRA -> again
        BRA -> back
        """
    )
    flow = ControlFlow(code)
    outer = flow.loops[0]
    assert flow.instructions(outer) == [0, 1, 2, 3, 5, 6, 7]
    assert flow.pass_of(outer) == [0, 1, 2, 3]
    assert flow.skippable_of(outer) == []


def test_a_skipped_block_stays_part_of_a_pass():
    code = assemble(
        """
        top: FADD
        @P0 BRA -> skip
        FMUL
        skip: HGMMA.64x128x16.F32.BF16 R0,gdesc[UR4],RZ
        @P1 BRA -> top
        EXIT
        """
    )
    flow = ControlFlow(code)
    assert flow.pass_of(flow.loops[0]) == [0, 1, 2, 3, 4]
    assert flow.skippable_of(flow.loops[0]) == [2]


def test_rotated_loop_has_one_header():
    code = assemble(
        """
        BRA -> middle
        top: FADD
        middle: HGMMA.64x128x16.F32.BF16 R0,gdesc[UR4],RZ
        @P1 BRA -> top
        EXIT
        """
    )
    (loop,) = ControlFlow(code).loops
    assert (loop.header, sorted(loop.blocks)) == (2, [1, 2])


def test_uniform_branch_is_conditional():
    code = assemble("top: FADD\nBRA.U UP0,top\nEXIT\nBRA -> top")
    flow = ControlFlow(code)
    assert set(flow.graph.successors(0)) == {0, 2}
    assert not list(flow.graph.successors(2))
    assert [loop.header for loop in flow.loops] == [0]  # unreachable code makes none


def test_main_loops_of_a_persistent_kernel_are_the_inner_ones():
    code = assemble(
        """
        tile: MOV
        a: HGMMA.64x64x16.F32.BF16 R0,gdesc[UR4],RZ
        FSEL
        @P0 BRA -> a
        b: HGMMA.64x64x16.F32.BF16 R0,gdesc[UR4],RZ
        @P0 BRA -> b
        @P1 BRA -> tile
        EXIT
        """
    )
    stalls = range(1, len(code) + 1)
    row = report.row_of(kernel_of("k_0", 256, stalls), code, 1.0)
    assert row.name == "k"
    assert row.warpgroups == 2
    assert row.main_loop.instructions == 2
    assert [loop.instructions for loop in row.masked_loops] == [3]
    assert (row.main_loop.stalls, row.masked_loops[0].stalls) == (5 + 6, 2 + 3 + 4)


def test_stall_counts_are_four_of_an_instructions_bits():
    image = b"".join(word.to_bytes(16, "little") for word in (0xF << 105, 1 << 109, 7 << 105 | 1))
    assert stall_counts(image) == [15, 0, 7]


def test_longest_run_is_the_slowest_one():
    """Four exponentials take as long as sixteen conversions; whatever is between ends a run."""
    code = assemble("MUFU.EX2\n" * 4 + "FADD\n" + "F2FP.BF16.F32.PACK_AB\n" * 15 + "MUFU.EX2")
    assert longest_run(code) == Run("mufu", 4)
    assert longest_run(code).clocks == 32
    assert longest_run(code[5:]) == Run("cvt", 15)
    assert longest_run([]).clocks == 0


# ---------------------------------------------------------------- instructions and model


def test_no_opcode_is_in_two_pipes():
    opcodes = [opcode for pipe in PIPES.values() for opcode in pipe]
    assert len(opcodes) == len(set(opcodes))


def test_unknown_opcodes_show():
    counts = count_pipes([Instruction("FROB.X", (), ""), Instruction("MUFU.EX2", (), "")])
    assert counts["unknown"] == 1
    assert counts["mufu"] == 1


def test_wgmma_operands():
    shared = Instruction("HGMMA.64x176x16.F32.BF16", ("R8", "gdesc[UR4]", "RZ", "!UPT"), "")
    registers = Instruction("QGMMA.64x64x32.F32.E4M3.E4M3", ("R8", "R2", "gdesc[UR4]", "R8"), "")
    a, b = model.Wgmma.of(shared), model.Wgmma.of(registers)
    assert (a.clocks, a.a_bytes, a.b_bytes, a.flop) == (88, 2048, 5632, 2 * 64 * 176 * 16)
    assert (b.clocks, b.a_bytes, b.b_bytes, b.flop) == (32, 0, 2048, 2 * 64 * 64 * 32)
    assert model.Wgmma.of(Instruction("HMMA.16816.F32", ("R0", "R1", "R2", "R3"), "")) is None


@pytest.mark.parametrize(
    ("tile_m", "tile_n", "head_dim", "tensor", "mufu", "shared"),
    [(192, 128, 64, 1536, 1536, 1216), (128, 176, 128, 2816, 1408, 2368)],
)
def test_model_by_hand(tile_m, tile_n, head_dim, tensor, mufu, shared):
    """S = Q K^T from shared memory, O += P V with P from registers, one exponential an element."""
    qk = Instruction(f"HGMMA.64x{tile_n}x16.F32.BF16", ("R0", "gdesc[UR4]", "R0"), "")
    pv = Instruction(f"HGMMA.64x{head_dim}x16.F32.BF16", ("R0", "R8", "gdesc[UR4]", "R0"), "")
    ex2 = Instruction("MUFU.EX2", ("R0", "R0"), "")
    code = [qk] * (head_dim // 16) + [pv] * (tile_n // 16) + [ex2] * (64 * tile_n // 128)
    prediction = model.predict(code, tile_m // 64, clock_ghz=1.755)
    assert prediction.clocks["tensor"] == tensor
    assert prediction.clocks["mufu"] == mufu
    assert prediction.clocks["shared"] == shared
    assert prediction.bound == "tensor"
    assert prediction.tflops == pytest.approx(4096 * 132 * 1.755e-3, rel=1e-3)


def test_schedule_of_a_loop():
    code = assemble(
        """
        top: BAR.SYNC.DEFER_BLOCKING R1,0x100
        HGMMA.64x64x16.F32.BF16 R0,gdesc[UR4],RZ
        HGMMA.64x64x16.F32.BF16 R0,gdesc[UR4],RZ
        BAR.ARV R1,0x100
        MUFU.EX2 R0,R0
        WARPGROUP.DEPBAR.LE gsb0,0x1
        MUFU.EX2 R0,R0
        FMUL R0,R0
        MUFU.EX2 R0,R0
        WARPGROUP.DEPBAR.LE gsb0,0x0
        @P0 BRA -> top
        """
    )
    loop = report.row_of(kernel_of("k", 128, [1] * len(code)), code, 1.0).main_loop
    assert loop.schedule == ["sync", "2 HGMMA", "arrive", "EX2", "wait<=1", "2 EX2", "wait<=0"]
    assert (loop.ex2, loop.waits, loop.ex2_before_arrive) == ([1, 2, 0], 2, 0)


# ---------------------------------------------------------------- the installed kernels


def test_cubins_are_found_anywhere_in_a_file(tmp_path):
    cubins = find_cubins(EXTENSION)
    assert [c.kernels[0].symbol for c in cubins] == [f"{name}_0" for name in _cuda.instances()]
    file = tmp_path / "embedded.bin"
    file.write_bytes(b"\x7fELF\0" + b"x" * 99 + cubins[0].image + b"\x7fELFxx")
    assert find_cubins(file) == cubins[:1]


def test_kernel_facts_agree_with_the_compiler():
    facts = {c.kernels[0].name: c.kernels[0] for c in find_cubins(EXTENSION)}
    for name, instance in manifest.instances().items():
        assert facts[name].registers == instance.registers
        assert facts[name].threads == instance.threads


def configs_of(family):
    return {name: i.config for name, i in manifest.instances().items() if i.family == family}


@needs_disassembler
def test_every_attention_instance_has_main_loops(rows):
    assert {row.name for row in rows} == set(manifest.instances())
    fp8 = {*configs_of("forward_fp8")}
    ampere = {*configs_of("ampere_forward"), *configs_of("ampere_backward")}
    attention = {*configs_of("forward"), *configs_of("backward"), *fp8, *ampere}
    for row in rows:
        assert row.spills == 0
        assert bool(row.loops) == (row.name in attention)
        for loop in row.loops.values():
            assert "unknown" not in loop.pipes
            assert sum(loop.pipes.values()) == loop.instructions
            assert loop.instructions <= loop.stalls < 15 * loop.instructions
            assert 0 < loop.longest_run <= 8 * loop.pipes[loop.longest_run_pipe]
            if row.name not in ampere:  # its matrix instructions are not modelled
                assert 0 < loop.tflops < (2000 if row.name in fp8 else 1000)


@needs_disassembler
def test_forward_loops_are_within_the_model(rows):
    configs = configs_of("forward")
    for row in (row for row in rows if row.name in configs):
        config = configs[row.name]
        tile = config["tile_m"] * config["tile_n"]
        assert row.warpgroups == config["tile_m"] // 64
        assert len(row.masked_loops) == ("full", "causal", "local").index(config["mask"])
        for loop in row.loops.values():
            assert loop.waits == 2, "one for S, one for O: WGMMA is asynchronous"
            dims = config["head_dim"] + config["head_dim_v"]
            assert loop.clocks["tensor"] == 2 * tile * dims // 4096
            assert loop.clocks["mufu"] >= tile // 16


@needs_disassembler
def test_ampere_loops_have_their_products_and_no_more(rows):
    """Every warp has a loop with masks, one without; ldmatrix.x4 for Q, K, V and nothing twice."""
    configs = configs_of("ampere_forward")
    for row in (row for row in rows if row.name in configs):
        config = configs[row.name]
        assert len(row.masked_loops) == 1
        keys, dims = config["tile_n"] // 16, (config["head_dim"] + config["head_dim_v"]) // 16
        row_blocks = config["tile_m"] // config["warps"] // 16
        for loop in row.loops.values():
            assert loop.pipes["tensor"] == 2 * row_blocks * keys * dims
            assert loop.ex2 == [4 * row_blocks * 2 * keys]
            matrices = keys * dims + row_blocks * config["head_dim"] // 16
            assert matrices < loop.pipes["lsu"] < matrices + 45


@needs_disassembler
def test_fp8_loops_are_within_the_model(rows):
    configs = configs_of("forward_fp8")
    for row in (row for row in rows if row.name in configs):
        config = configs[row.name]
        tile, dims = config["tile_m"] * config["tile_n"], config["head_dim"] + config["head_dim_v"]
        for loop in row.loops.values():
            assert loop.waits == 2, "one for S, one for O: WGMMA is asynchronous"
            # Twice bf16's speed, but for N of 64, where reading A takes as long.
            ideal = 2 * tile * dims // 8192
            assert ideal <= loop.clocks["tensor"] <= 4 * ideal // 3
            # Two rows a thread; every second four columns up to d128 without MUFU; tanh takes two.
            scores = config["tile_n"] // 2
            computed = scores // (2 if config["head_dim"] <= 128 else 1)
            computed += 2 * scores if config["softcap"] else 0
            blocks = config["tile_n"] // 64  # with factors of their own
            if config["codes"]:
                assert loop.pipes["mufu"] == 0 and loop.pipes["cvt"] == scores // 2
                continue
            assert 0 <= loop.pipes["mufu"] - computed <= 2 * blocks


@needs_disassembler
def test_fp8_instances_have_no_other_products():
    """Whoever asks for FP8 gets QGMMA, not bf16 behind a cast."""
    names = set(configs_of("forward_fp8"))
    kernels = [kernel for kernel in report.kernels_of(EXTENSION) if kernel.name in names]
    assert {kernel.name for kernel in kernels} == names
    for kernel, code in zip(kernels, disassembler.disassemble_together(kernels)):
        products = {i.name for i in code if "MMA" in i.name}
        assert products == {"QGMMA"}, kernel.name


@needs_disassembler
def test_backward_loops_are_within_the_model(rows):
    configs = configs_of("backward")
    for row in (row for row in rows if row.name in configs):
        config = configs[row.name]
        tile, wide = config["tile_m"] * config["tile_n"], config["tile_n"] == 64
        dims, dims_v = 3 * config["head_dim"], 2 * config["head_dim_v"]
        assert row.warpgroups == 2
        for loop in row.loops.values():
            assert loop.waits <= 5, "S, dQ, dK, dP (twice with 128 rows): WGMMA is asynchronous"
            if not wide:
                assert loop.clocks["tensor"] == 2 * tile * (dims + dims_v) // 4096
                assert loop.clocks["mufu"] >= tile // 16


@needs_disassembler
def test_main_loops_stay_within_the_budget(root, rows):
    """If this fails for a good reason: sass --update-budget benchmarks/sass_budget.json --reason"""
    budgets = report.read_budget(root / "benchmarks" / "sass_budget.json")
    assert report.over_budget(rows, budgets) == []


# ---------------------------------------------------------------- budget, comparison, bad input


def loop_of(instructions, stall=2):
    code = [Instruction("FADD", (), "")] * (instructions - 2)
    code.insert(0, Instruction("HGMMA.64x64x16.F32.BF16", ("R0", "gdesc[UR4]", "R0"), ""))
    code.append(Instruction("BRA", ("0x0",), "@P0"))
    return report.row_of(kernel_of("k", 128, [stall] * instructions), code, 1.0)


def figures(instructions, stalls=None, longest_run=None):
    """Return the figures of a `loop_of` so many instructions."""
    stalls = 2 * instructions if stalls is None else stalls
    longest_run = instructions - 2 if longest_run is None else longest_run
    return {"instructions": instructions, "stalls": stalls, "longest_run": longest_run}


def budget(loops, reason):
    return report.Budget({name: figures(count) for name, count in loops.items()}, reason)


def test_budget_allows_two_percent():
    budgets = {"k": report.Budget({"main": figures(100, 300, 120)}, "measured")}
    assert report.over_budget([loop_of(102)], budgets) == []
    (fault,) = report.over_budget([loop_of(103)], budgets)
    assert "103 instructions, +3.0% of its budget 100" in fault
    (fault,) = report.over_budget([loop_of(100, stall=4)], budgets)
    assert "400 clocks of stall counts, +33.3% of its budget 300" in fault
    short = {"k": report.Budget({"main": figures(100, 300, 90)}, "measured")}
    (fault,) = report.over_budget([loop_of(100)], short)
    assert "98 clocks in its longest run of one pipe, +8.9% of its budget 90" in fault
    assert report.over_budget([loop_of(9)], {}) == ["k: the main loop has no budget"]


def test_budget_keeps_reasons_of_what_did_not_change(tmp_path):
    old = {"k": budget({"main": 100}, "first"), "other": budget({"main": 3}, "kept")}
    assert report.updated_budget([loop_of(100)], old, "second") == old
    new = report.updated_budget([loop_of(90)], old, "second")
    assert new["k"] == budget({"main": 90}, "second")
    file = tmp_path / "budget.json"
    report.write_budget(file, new)
    assert report.read_budget(file) == new


def test_budget_of_an_older_version(tmp_path):
    file = tmp_path / "budget.json"
    file.write_text('{"k": {"loops": {"main": {"instructions": 1}}, "reason": "old"}}')
    with pytest.raises(UserError, match="needs instructions, stalls, longest_run"):
        report.read_budget(file)


@pytest.mark.parametrize(
    "text", ["[]", "{}}", '{"k": 1}', '{"k": {"loops": {}}}', '{"k": {"loops": [], "reason": ""}}']
)
def test_not_a_budget(tmp_path, text):
    file = tmp_path / "budget.json"
    file.write_text(text)
    with pytest.raises(UserError, match="is not a budget"):
        report.read_budget(file)


def test_a_budget_of_which_nothing_was_compiled_stays_as_it_is(root, tmp_path):
    """Byte for byte."""
    committed, file = root / "benchmarks" / "sass_budget.json", tmp_path / "budget.json"
    known = report.read_budget(committed)
    report.write_budget(file, report.updated_budget([], known, "nothing changed"))
    assert file.read_bytes() == committed.read_bytes()


def test_budget_needs_reasons(tmp_path):
    file = tmp_path / "budget.json"
    report.write_budget(file, {"k": budget({"main": 3}, " ")})
    with pytest.raises(UserError, match="k has no reason"):
        report.read_budget(file)


def test_growth_pairs_loops_by_name():
    ((name, loop, before, after),) = report.growth([loop_of(100)], [loop_of(110)])
    assert (name, loop, before.instructions, after.instructions) == ("k", "main", 100, 110)
    with pytest.raises(UserError, match="in common"):
        report.growth([], [loop_of(3)])


def test_files_without_device_code(tmp_path):
    file = tmp_path / "a.o"
    file.write_bytes(b"no ELF in here")
    with pytest.raises(UserError, match="no uncompressed cubin"):
        report.rows_of(file)
    with pytest.raises(UserError, match="No such file"):
        report.rows_of(tmp_path / "missing.o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        report.rows_of(tmp_path / "empty")
    (tmp_path / "a.json").write_text('{"name": 1}')
    with pytest.raises(UserError, match="not written by"):
        report.rows_of(tmp_path / "a.json")


def test_without_the_disassembler(monkeypatch):
    monkeypatch.setattr(disassembler, "find_nvdisasm", lambda: None)
    with pytest.raises(UserError, match="pip install 'hopper-attention"):
        disassembler.disassemble(b"")


@needs_disassembler
def test_not_a_cubin_inside():
    with pytest.raises(UserError, match="nvdisasm cannot read"):
        disassembler.disassemble(b"\x7fELF nonsense")


@needs_disassembler
def test_kernels_read_together_are_those_read_one_by_one():
    """But for calls and returns, which have a symbol as an operand alone."""
    cubins = find_cubins(EXTENSION)
    some = [*cubins[:2], *{cubin.kernels[0].architecture: cubin for cubin in cubins}.values()]
    kernels = [kernel for cubin in some for kernel in cubin.kernels]
    codes = disassembler.disassemble_together(kernels)
    for cubin, kernel, together in zip(some, kernels, codes, strict=True):
        alone = disassembler.disassemble(cubin.image)[kernel.symbol]
        assert len(together) == len(alone)
        for a, b in zip(together, alone):
            assert a == b or (a.name in ("CALL", "RET") and replace(a, operands=b.operands) == b)


@needs_disassembler
def test_command_line(root, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["sass", "fwd_bf16_d64*", "--json", "--clock-ghz", "1.98"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert {row["name"] for row in rows} == {
        name for name in manifest.instances() if name.startswith("fwd_bf16_d64")
    }
    assert {"name", "registers", "spills", "main_loop"} <= set(rows[0])
    saved = tmp_path / "before.json"
    saved.write_text(done.stdout)

    done = run(app, ["sass", "*_d64", "--diff", str(saved), str(EXTENSION)])
    assert done.exit_code == 0
    assert "fwd_bf16_d64" in done.stdout and "fwd_bf16_d64_causal" not in done.stdout
    done = run(app, ["sass", "--diff", str(saved), str(saved), "--json"])
    assert all(change["before"] == change["after"] for change in json.loads(done.stdout))

    tight = tmp_path / "budget.json"
    names = [row["name"] for row in rows]
    report.write_budget(tight, {name: budget({"main": 3, "masked": 3}, "tight") for name in names})
    done = run(app, ["sass", "fwd_bf16_d64", "--budget", str(tight)])
    assert done.exit_code == 1
    assert "over budget: fwd_bf16_d64" in done.stderr

    assert isinstance(run(app, ["sass", "nothing*"]).exception, UserError)
    assert isinstance(run(app, ["sass", "--update-budget", str(tight)]).exception, UserError)
