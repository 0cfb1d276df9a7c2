"""The compile driver without the DSL: selection, header, ptxas report, gate, outputs, registry."""

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hopper_attention.cute_kernels.instance import Instance

from aot import batch, cubin, flavour, header, outputs, ptxas, registry, selection, sources


@dataclass(frozen=True)
class Config:
    head_dim: int = 64


INSTANCE = Instance("fwd_a", "forward", "module:Kernel", Config())
INSTANCES = [
    INSTANCE,
    replace(INSTANCE, name="fwd_b"),
    replace(INSTANCE, name="bwd_a", group="full"),
    replace(INSTANCE, name="fp8_a", group="fp8"),
]


AMPERE = replace(INSTANCE, name="ampere_a", architecture="sm_80")


class TestSelection:
    @pytest.mark.parametrize(
        ("words", "names"),
        [
            ("core", ["fwd_a", "fwd_b"]),
            ("full", ["fwd_a", "fwd_b", "bwd_a", "fp8_a"]),
            ("fp8", ["fp8_a"]),
            ("*_a", ["fwd_a", "bwd_a", "fp8_a"]),
            ("fp8_a;fwd_a", ["fwd_a", "fp8_a"]),
            ("core, bwd_?", ["fwd_a", "fwd_b", "bwd_a"]),
        ],
    )
    def test_selects_in_the_order_of_the_list(self, words, names):
        assert [i.name for i in selection.select(INSTANCES, words)] == names

    @pytest.mark.parametrize(
        ("words", "message"), [("core,fwd_x", "'fwd_x'.*fwd_a"), (" ", "no instances selected")]
    )
    def test_refuses_what_matches_nothing(self, words, message):
        with pytest.raises(ValueError, match=message):
            selection.select(INSTANCES, words)

    @pytest.mark.parametrize(
        ("count", "cores", "sizes"),
        [(100, 1, [8] * 12 + [4]), (1, 2, [1]), (16, 2, [2] * 8), (4, 64, [1] * 4)],
    )
    def test_batches_are_small_enough_for_all_cores(self, count, cores, sizes):
        assert list(map(len, selection.batches([INSTANCE] * count, cores))) == sizes

    def test_a_batch_is_of_one_architecture(self):
        instances = [INSTANCE] * 9 + [AMPERE] * 2 + [INSTANCE]
        batches = selection.batches(instances, cores=1)
        assert [i for batch in batches for i in batch] == instances
        assert all(len({i.architecture for i in batch}) == 1 for batch in batches)


HEADER = """
typedef struct {
    void *data;
    int32_t dynamic_shapes[3];
    int64_t dynamic_strides[2];
} k_Tensor_mQ_t;
typedef struct {
    void *data;
} k_Tensor_mS_t;
typedef struct {
    void *data;
    int32_t dynamic_shapes[1];
} k_Tensor_sums_t;
typedef struct {
    k_Tensor_sums_t elements[2];
    int32_t count;
} k_TensorList_sums_t;
static inline int32_t cute_dsl_k_wrapper(k_Kernel_Module_t *module, k_Tensor_mQ_t *mQ, \
k_Tensor_mS_t *mS, k_TensorList_sums_t *sums, float scale, int32_t *window, int64_t address, \
cudaStream_t stream) {
"""
GROUPS = [(), (), ("row_sum", "row_max"), (), ("left", "right"), ()]
"""Names of the members of HEADER's NamedTuples."""


class TestHeader:
    def test_arguments_in_order(self):
        arguments = header.parse_arguments(HEADER, "k", GROUPS)
        assert [(a["name"], a["kind"]) for a in arguments] == [
            ("mQ", "tensor"),
            ("mS", "tensor"),
            ("row_sum", "tensor"),
            ("row_max", "tensor"),
            ("scale", "float32"),
            ("left", "int32"),
            ("right", "int32"),
            ("address", "int64"),
        ]
        assert arguments[0] == {
            "name": "mQ",
            "kind": "tensor",
            "shape_bits": 32,
            "dynamic_shapes": 3,
            "stride_bits": 64,
            "dynamic_strides": 2,
        }
        assert [a["dynamic_shapes"] for a in arguments[1:4]] == [0, 1, 1]
        assert [a["dynamic_strides"] for a in arguments[1:4]] == [0, 0, 0]

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("float scale", "void *scale", "scale is a void"),
            (", cudaStream_t stream", "", "must be the stream"),
            ("cute_dsl_k_", "cute_dsl_other_", "no wrapper"),
            ("} k_Tensor_mS_t", "} other", "no struct for tensor mS"),
            ("} k_Tensor_sums_t", "} other", "no struct for tensor sums"),
            ("int32_t *window", "void *window", "window is a void"),
            ("int64_t address", "int64_t *address", r"address is a int64_t\*"),
            ("int64_t address, ", "", "6 example arguments, but the header has 5"),
        ],
    )
    def test_refuses_what_the_marshaller_cannot_pass(self, before, after, message):
        with pytest.raises(header.HeaderError, match=message):
            header.parse_arguments(HEADER.replace(before, after), "k", GROUPS)


REMARKS = """
  - Remark:      'ptxas output: ptxas info    : 0 bytes gmem
ptxas info    : Function properties for k_0
ptxas         . {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas info    : Function properties for k_1
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
'
"""
CLEAN = REMARKS.format(stack=0, stores=0, loads=0)
SERIALISED = (
    CLEAN + "ptxas info    : (C7512) Potential Performance Loss:"
    " wgmma.mma_async instructions are serialized due to insufficient register resources"
)
OPCODES = {"HGMMA": 24, "UTMALDG": 5}


class TestGate:
    def test_report_is_the_worst_of_the_kernels(self):
        report = ptxas.parse_remarks(REMARKS.format(stack=16, stores=8, loads=4))
        assert report == ptxas.Resources(168, 16, 8, 4, 2, serialized_wgmma=False)

    def test_an_empty_report_is_not_a_clean_one(self):
        with pytest.raises(ptxas.GateError, match="no register count"):
            ptxas.parse_remarks("--- !Analysis")

    def test_clean_kernel_passes(self):
        ptxas.check_resources(INSTANCE, ptxas.parse_remarks(CLEAN))
        ptxas.check_claims(INSTANCE, OPCODES)
        ptxas.check_claims(INSTANCE, None)

    @pytest.mark.parametrize(
        ("remarks", "message"),
        [
            (REMARKS.format(stack=16, stores=0, loads=0), "fwd_a.* 16 bytes of stack frame"),
            (
                REMARKS.format(stack=0, stores=8, loads=0),
                "fwd_a.* 8 bytes of register spill stores",
            ),
            (REMARKS.format(stack=0, stores=0, loads=4), "fwd_a.* 4 bytes of register spill loads"),
            (SERIALISED, "fwd_a.* WGMMA serialised .*pin"),
        ],
    )
    def test_fault_stops_the_build_unless_declared(self, remarks, message):
        with pytest.raises(ptxas.GateError, match=message):
            ptxas.check_resources(INSTANCE, ptxas.parse_remarks(remarks))
        declared = replace(INSTANCE, spills_because="a measured trade")
        ptxas.check_resources(declared, ptxas.parse_remarks(remarks))

    def test_missing_claim_stops_the_build_even_when_spills_are_declared(self):
        declared = replace(INSTANCE, spills_because="a measured trade")
        with pytest.raises(ptxas.GateError, match=r"fwd_a.* no HGMMA in the SASS"):
            ptxas.check_claims(declared, {**OPCODES, "HGMMA": 0})


def test_parameters_of_ptx_entries():
    ptx = """
.visible .entry k_0(
	.param .align 64 .b8 k_0_param_0[128],
	.param .u64 k_0_param_1,
	.param .f32 k_0_param_2
)
.reqntid 128, 1, 1
.visible .entry k_1()
"""
    assert cubin.parse_parameters(ptx) == {
        "k_0": [{"size": 128, "align": 64}, {"size": 8, "align": 8}, {"size": 4, "align": 4}],
        "k_1": [],
    }


class TestOutputs:
    @pytest.fixture
    def tree(self, tmp_path, monkeypatch) -> Path:
        """A repository with two sources, and outputs that were compiled from it."""
        monkeypatch.setattr(sources, "ROOT", tmp_path)
        files = [tmp_path / "hopper" / name for name in ("kernel.py", "instances.py")]
        (tmp_path / "hopper").mkdir()
        for file in files:
            file.write_text("original")
        facts = {
            "source_hash": self.fresh_hash(files),
            "sources": [str(file.relative_to(tmp_path)) for file in files],
            "flavour": "cu13",
        }
        for suffix in outputs.SUFFIXES:
            (tmp_path / f"fwd_a{suffix}").write_text(json.dumps(facts))
        return tmp_path

    def fresh_hash(self, files):
        sources.hash_file.cache_clear()
        return outputs.source_hash(INSTANCE, files)

    def is_current(self, tree, instance=INSTANCE, major=13):
        sources.hash_file.cache_clear()
        return outputs.is_current(instance, tree / "fwd_a.json", major)

    def test_nothing_changed(self, tree):
        (tree / "hopper/kernel.py").touch()
        assert self.is_current(tree)

    def test_another_line_of_the_instance_list(self, tree):
        (tree / "hopper/instances.py").write_text("edited")
        assert self.is_current(tree)

    def test_edited_kernel(self, tree):
        (tree / "hopper/kernel.py").write_text("edited")
        assert not self.is_current(tree)

    def test_removed_source(self, tree):
        (tree / "hopper/kernel.py").unlink()
        assert not self.is_current(tree)

    def test_edited_configuration(self, tree):
        assert not self.is_current(tree, replace(INSTANCE, config=Config(head_dim=128)))

    def test_other_toolchain(self, tree):
        assert not self.is_current(tree, major=12)

    @pytest.mark.parametrize("suffix", outputs.SUFFIXES)
    def test_missing_output(self, tree, suffix):
        (tree / f"fwd_a{suffix}").unlink()
        assert not self.is_current(tree)

    def test_edit_during_the_compile_is_noticed_later(self, tree):
        kernel = tree / "hopper/kernel.py"
        before = outputs.source_hash(INSTANCE, [kernel])
        kernel.write_text("edited")
        assert outputs.source_hash(INSTANCE, [kernel]) == before
        assert self.fresh_hash([kernel]) != before

    def test_depfile(self, tree):
        facts = {"sources": ["hopper/kernel.py", "cute_kernels/masks/apply.py"]}
        (tree / "fwd_b.json").write_text(json.dumps(facts))
        records = [tree / "fwd_a.json", tree / "fwd_b.json"]
        outputs.write_depfile(tree / "fwd_a.d", tree / "fwd_a.o", records)
        target, files = (tree / "fwd_a.d").read_text().replace("\\\n", "").split(": ")
        assert target == str(tree / "fwd_a.o")
        sources_of_both = ("cute_kernels/masks/apply.py", "hopper/instances.py", "hopper/kernel.py")
        assert files.split() == [str(tree / file) for file in sources_of_both]

    def test_prune_removes_unlisted_instances_only(self, tree):
        outputs.prune(tree, {"fwd_a"})
        assert self.is_current(tree)
        outputs.prune(tree, {"fwd_b"})
        assert list(tree.glob("fwd_a.*")) == []


class TestBatch:
    @pytest.fixture
    def compiled(self, tmp_path, monkeypatch) -> Path:
        """A folder for outputs; the compiler leaves a file there, or fails as the name says."""

        def compile_instance(instance, out):
            if instance.name == "fwd_spills":
                raise ptxas.GateError("8 bytes of register spill stores")
            if instance.name == "fwd_killed":
                os.kill(os.getpid(), signal.SIGKILL)
            outputs.scratch_folder(out, instance.name).write_text(str(os.getpid()))

        def publish(instances, out):
            for instance in instances:
                outputs.scratch_folder(out, instance.name).rename(out / instance.name)

        monkeypatch.setattr(batch.compiler, "load_dsl", lambda architecture, cuda_major: None)
        monkeypatch.setattr(batch.compiler, "compile_instance", compile_instance)
        monkeypatch.setattr(batch.compiler, "publish", publish)
        return tmp_path

    def test_each_in_a_process_of_its_own(self, compiled):
        batch.compile_batch(INSTANCES, compiled, 13)
        processes = {(compiled / instance.name).read_text() for instance in INSTANCES}
        assert len(processes) == len(INSTANCES)
        assert str(os.getpid()) not in processes

    def test_what_is_current_is_not_compiled(self, compiled, monkeypatch):
        monkeypatch.setattr(outputs, "is_current", lambda instance, *_: instance.name != "fwd_b")
        batch.compile_batch(INSTANCES, compiled, 13)
        assert [file.name for file in compiled.iterdir()] == ["fwd_b"]

    @pytest.mark.parametrize(
        ("name", "status", "said"),
        [("fwd_spills", 1, "error: 8 bytes of register spill"), ("fwd_killed", -9, "")],
    )
    def test_a_failure_names_the_instance_and_ends_the_batch(
        self, compiled, capfd, name, status, said
    ):
        failing = replace(INSTANCE, name=name)
        message = rf"instance {name} was not compiled \(exit status {status}\)"
        with pytest.raises(batch.BatchError, match=message):
            batch.compile_batch([INSTANCES[0], failing, INSTANCES[1]], compiled, 13)
        assert said in capfd.readouterr().err
        assert [file.name for file in compiled.iterdir()] == [INSTANCES[0].name]

    def test_a_missing_claim_costs_no_other_instance_its_outputs(self, tmp_path, monkeypatch):
        def compile_instance(instance, out):
            scratch = outputs.scratch_folder(out, instance.name)
            scratch.mkdir()
            for suffix in outputs.SUFFIXES:
                (scratch / f"{instance.name}{suffix}").write_text(instance.name)
            outputs.write_record(scratch, {"name": instance.name})

        def count_opcodes(files):
            return [Counter(HGMMA=24) if "fwd_b" in str(file) else Counter() for file in files]

        monkeypatch.setattr(batch.compiler, "load_dsl", lambda architecture, cuda_major: None)
        monkeypatch.setattr(batch.compiler, "compile_instance", compile_instance)
        monkeypatch.setattr(cubin, "count_opcodes", count_opcodes)
        b, c = (replace(INSTANCE, name=name, claims=("HGMMA",)) for name in ("fwd_b", "fwd_c"))
        with pytest.raises(batch.BatchError, match=r"fwd_c.* no HGMMA in the SASS"):
            batch.compile_batch([c, b], tmp_path, 13)
        assert json.loads((tmp_path / "fwd_b.json").read_text())["opcodes"] == {"HGMMA": 24}
        left = {file.name for file in tmp_path.iterdir()}
        assert left == {*(f"fwd_b{suffix}" for suffix in outputs.SUFFIXES), "fwd_c.scratch"}

    def test_scratch_of_an_earlier_failure_is_removed(self, compiled):
        outputs.scratch_folder(compiled, INSTANCE.name).mkdir()
        batch.compile_batch([INSTANCE], compiled, 13)
        assert [file.name for file in compiled.iterdir()] == [INSTANCE.name]

    def test_refuses_two_architectures(self, compiled):
        with pytest.raises(batch.BatchError, match="sm_80, sm_90a"):
            batch.compile_batch([INSTANCE, AMPERE], compiled, 13)

    def test_edit_after_the_compiled_was_looked_at_counts(self, compiled, monkeypatch):
        kernel = compiled / "kernel.py"
        kernel.write_text("before")
        before = sources.hash_file(kernel)
        hashed = compiled / "hash"
        monkeypatch.setattr(
            batch.compiler,
            "compile_instance",
            lambda instance, out: hashed.write_text(sources.hash_file(kernel)),
        )
        monkeypatch.setattr(batch.compiler, "publish", lambda instances, out: None)
        kernel.write_text("after")
        batch.compile_batch([INSTANCE], compiled, 13)
        assert hashed.read_text() != before


RECORD = {
    "name": "k",
    "flavour": "cu13",
    "compile_seconds": 1.5,
    "sources": ["hopper/kernel.py"],
    "kernels": ["k_0"],
    "parameters": {"k_0": [{"size": 128, "align": 64}]},
    "arguments": [
        {
            "name": "mQ",
            "kind": "tensor",
            "rank": 2,
            "alignment": 16,
            "shape_bits": 32,
            "stride_bits": 64,
            "shape": [None, 64],
            "shape_divisibility": [1, 1],
            "stride": [None, 1],
            "stride_divisibility": [8, 1],
        },
        {"name": "scale", "kind": "float32"},
    ],
}


class TestRegistry:
    def test_cpp(self):
        text = registry.cpp([RECORD])
        assert (
            '{"mQ", Kind::tensor, 2, 16, 32, 64, {{dynamic, 1}, {64, 1}}, {{dynamic, 8}, {1, 1}}}'
            in text
        )
        assert '{"scale", Kind::float32}' in text
        assert '{"k_0", 1}' in text
        assert "instance_count = 1" in text
        assert "cuda_major = 13" in text

    def test_manifest_is_the_same_for_equal_builds(self):
        slower = {**RECORD, "compile_seconds": 3.0}
        assert registry.manifest([RECORD]) == registry.manifest([slower])

    def test_refuses_mixed_flavours(self):
        with pytest.raises(ValueError, match="different CUDA versions"):
            registry.cpp([RECORD, {**RECORD, "name": "l", "flavour": "cu12"}])


class TestFlavour:
    def test_explicit(self):
        assert [flavour.resolve(major) for major in ("12", "13")] == [12, 13]
        with pytest.raises(ValueError, match="CUDA 11"):
            flavour.resolve("11")

    def test_newest_without_a_driver(self, monkeypatch):
        def no_driver(_name):
            raise OSError("cannot open shared object file")

        monkeypatch.setattr(flavour.ctypes, "CDLL", no_driver)
        assert flavour.resolve("auto") == 13

    @pytest.mark.parametrize(("version", "major"), [(12040, 12), (13010, 13), (14000, 13)])
    def test_follows_the_driver(self, monkeypatch, version, major):
        class Driver:
            def __init__(self, _name):
                pass

            def cuDriverGetVersion(self, pointer):
                pointer._obj.value = version

        monkeypatch.setattr(flavour.ctypes, "CDLL", Driver)
        assert flavour.resolve("auto") == major
