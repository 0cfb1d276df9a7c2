"""`hopper-attention profile` without a GPU: command lines, reports written here, refusals."""

import json
import os
import stat
import sys

import pytest
import torch
from typer.testing import CliRunner

from hopper_attention import backend, cli
from hopper_attention.bench.data.workloads import load_problems
from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError
from hopper_attention.profiling import ncu, report
from hopper_attention.profiling.report import KernelReport, from_action, from_csv
from hopper_attention.profiling.roofline import write_roofline
from hopper_attention.profiling.summary import UTILISATION, summarise
from hopper_attention.sass.disassembler import Instruction
from hopper_attention.sass.roles import roles_of

PROBLEM = load_problems(["fa3/forward_bf16_d128_causal_b4_s4096"])[0]
INSTANCE = "fwd_bf16_d128_causal"

METRICS = {
    "gpu__time_duration.sum": 400_000.0,
    "sm__cycles_elapsed.avg.per_second": 1.755e9,
    "device__attribute_multiprocessor_count": 132.0,
    "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active": 71.0,
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": 40.0,
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": 5.0,
    "dram__bytes.sum": 1e8,
    "launch__waves_per_multiprocessor": 3.2,
}

# ---------------------------------------------------------------- writers of what ncu would leave


class FakeMetric:
    def __init__(self, value=None, instances=None):
        self.total, self.instances = value, instances or {}

    def has_value(self):
        return self.total is not None

    def value(self, instance=None):
        return self.total if instance is None else list(self.instances.values())[instance]

    def num_instances(self):
        return len(self.instances)

    def has_correlation_ids(self):
        return bool(self.instances)

    def correlation_ids(self):
        return FakeMetric(instances=dict(enumerate(self.instances)))


class FakeAction:
    """Four instructions at 0x7000; 30 samples at the third, 10 at the last."""

    START = 0x7000

    def __init__(self, name):
        self._name = name
        addresses = [self.START + 16 * i for i in range(4)]
        self.metrics = {key: FakeMetric(value) for key, value in METRICS.items()}
        self.metrics["inst_executed"] = FakeMetric(4.0, dict.fromkeys(addresses, 1))
        samples = report.SAMPLES
        barrier = {addresses[2]: 30, addresses[3]: 6}
        self.metrics[samples + "barrier"] = FakeMetric(36.0, barrier)
        self.metrics[samples + "long_scoreboard"] = FakeMetric(4.0, {addresses[3]: 4})
        self.metrics[samples + "barrier_not_issued"] = FakeMetric(9.0, {addresses[2]: 9})
        self.metrics["launch__func_cache_config"] = FakeMetric("text")
        self.metrics["without value"] = FakeMetric()

    def name(self):
        return self._name

    def metric_names(self):
        return list(self.metrics)

    def metric_by_name(self, name):
        return self.metrics.get(name)


def raw_page(*kernels):
    names = ["ID", "Kernel Name", "Block Size", *METRICS]
    units = ["", "", "block", *("x" for _ in METRICS)]
    values = [f"{value:,}" for value in METRICS.values()]
    lines = [["0", kernel, "(384, 1, 1)", *values] for kernel in kernels]
    table = "\n".join(",".join(f'"{cell}"' for cell in line) for line in (names, units, *lines))
    return "==PROF== Connected to process 1\n" + table + "\n"


# ---------------------------------------------------------------- the command line of ncu


def test_command(tmp_path):
    out = tmp_path / "a.ncu-rep"
    command = ncu.command("ncu", INSTANCE, PROBLEM, out)
    text = " ".join(command)
    assert f"--kernel-name regex:^{INSTANCE}_[0-9]+ " in text
    assert "--launch-skip 5 --launch-count 1 --set full --import-source yes" in text
    assert "--clock-control none" in text
    assert command[-5:] == [
        sys.executable,
        "-m",
        "hopper_attention.profiling.target",
        PROBLEM.name,
        "6",
    ]


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """Put a program named ncu on the path that does what it is told."""

    def install(body):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "ncu"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


def test_run_returns_the_report(tmp_path, fake_ncu):
    fake_ncu('while [ "$1" != --export ]; do shift; done; echo report > "$2"')
    path = ncu.run(INSTANCE, PROBLEM, tmp_path / "new" / "mine")
    assert path == tmp_path / "new" / "mine.ncu-rep"
    assert path.read_text() == "report\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", "ERR_NVGPUCTRPERM.*as root"),
        ("echo '==WARNING== No kernels were profiled.'", "launched no kernel of that name"),
        ("echo hello; echo '==ERROR== Unknown option'; exit 1", "ncu failed: Unknown option"),
        ("exit 3", "ncu failed: no output"),
        ("echo fine", "ncu failed: fine"),
    ],
)
def test_what_can_go_wrong_with_ncu(tmp_path, fake_ncu, body, message):
    fake_ncu(body)
    with pytest.raises(UserError, match=message):
        ncu.run(INSTANCE, PROBLEM, tmp_path / "a.ncu-rep")


def test_without_ncu(monkeypatch):
    monkeypatch.setattr(ncu.shutil, "which", lambda _: None)
    monkeypatch.setattr(ncu.Path, "glob", lambda *_: iter(()))
    with pytest.raises(UserError, match="no Nsight Compute"):
        ncu.find_ncu()


# ---------------------------------------------------------------- reading reports


def test_csv(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text(raw_page("other_kernel", f"{INSTANCE}_0"))
    loaded = report.load(path, INSTANCE)
    assert loaded.kernel == f"{INSTANCE}_0"
    assert METRICS.items() <= loaded.metrics.items()
    assert loaded.stalls == {}


def test_metrics_and_stalls_are_read_from_an_action():
    loaded = from_action(FakeAction(f"{INSTANCE}_0"))
    assert METRICS.items() <= loaded.metrics.items()
    assert "launch__func_cache_config" not in loaded.metrics
    assert loaded.stalls == {"barrier": {32: 30, 48: 6}, "long_scoreboard": {48: 4}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            raw_page("fwd_bf16_d128_0"),
            "is a report of fwd_bf16_d128_0, not of",
        ),
        (raw_page(), "holds no profiled kernel"),
        ("hello", "not a CSV of ncu's raw page"),
        ('"a","b"\n"1","2"', "not a CSV of ncu's raw page"),
    ],
)
def test_reports_of_something_else(tmp_path, text, message):
    path = tmp_path / "raw.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        report.load(path, INSTANCE)
    with pytest.raises(UserError, match="No such file"):
        report.load(tmp_path / "none.csv", INSTANCE)


def test_a_file_that_is_no_report(tmp_path):
    pytest.importorskip("ncu_report")
    path = tmp_path / "a.ncu-rep"
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="holds no profiled kernel"):
        report.load(path, INSTANCE)


def test_the_installed_reader_has_what_is_used():
    ncu_report = pytest.importorskip("ncu_report")
    for protocol, real in ((report.Action, "IAction"), (report.Metric, "IMetric")):
        used = [name for name in vars(protocol) if not name.startswith("_")]
        assert used
        assert all(hasattr(getattr(ncu_report, real), name) for name in used)
    assert hasattr(ncu_report.IContext, "num_ranges")
    assert hasattr(ncu_report.IContext, "range_by_idx")
    assert hasattr(ncu_report.IRange, "num_actions")
    assert hasattr(ncu_report.IRange, "action_by_idx")


@pytest.mark.parametrize(
    ("kernel", "same"),
    [
        ("fwd_bf16_d64_0", True),
        ("fwd_bf16_d64", True),
        ("fwd_bf16_d64_0(Params)", True),
        ("fwd_bf16_d64_causal_0", False),
        ("fwd_bf16_d64_causal", False),
    ],
)
def test_kernel_names(kernel, same):
    assert report.is_instance(kernel, "fwd_bf16_d64") is same


# ---------------------------------------------------------------- summary, advice, roofline


def test_summary():
    roles = ["all", "producer", "consumer", "producer"]
    summary = summarise(from_action(FakeAction(f"{INSTANCE}_0")), PROBLEM, roles)
    assert summary.microseconds == 400.0
    assert summary.tflops == pytest.approx(PROBLEM.flop / 400e-6 / 1e12)
    assert summary.peak_fraction == pytest.approx(summary.tflops / (4096 * 132 * 1.755e-3))
    assert summary.utilisation["tensor"] == 71.0
    assert summary.utilisation["L2"] is None
    assert set(summary.utilisation) == set(UTILISATION)
    assert summary.stalls == {
        "consumer": {"barrier": 1.0},
        "producer": {"barrier": 0.6, "long_scoreboard": 0.4},
    }
    advice = " ".join(summary.advice)
    assert "tensor 71 % + MUFU 40 %" in advice
    assert "named barriers in 100% of samples" in advice
    assert "3.20 waves" in advice


@pytest.mark.parametrize(
    ("units", "advice"),
    [
        ({"tensor": 91.0}, "tensor pipe at 91 %"),
        ({"tensor": 30.0, "HBM": 88.0}, "HBM at 88 %: memory-bound"),
        ({"tensor": 70.0, "MUFU": 84.0}, "MUFU at 84 %, tensor at 70 %"),
        ({"issue": 90.0}, "issue slots at 90 %"),
        ({}, "no unit near its limit"),
    ],
)
def test_advice(units, advice):
    metrics = {UTILISATION[unit][0]: value for unit, value in units.items()}
    launch = KernelReport("k", {"gpu__time_duration.sum": 1e5, **metrics})
    assert summarise(launch, PROBLEM).advice[0].startswith(advice)


def test_a_report_without_a_duration():
    with pytest.raises(UserError, match="lacks gpu__time_duration"):
        summarise(KernelReport("k", {}), PROBLEM)


def test_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "roofline.png"
    write_roofline(summarise(KernelReport("k", METRICS), PROBLEM), PROBLEM, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    bare = summarise(KernelReport("k", {"gpu__time_duration.sum": 1e5}), PROBLEM)
    with pytest.raises(UserError, match="lacks clock"):
        write_roofline(bare, PROBLEM, path)


def test_roles():
    def code(*opcodes):
        return [Instruction(*opcode) for opcode in opcodes]

    kernel = code(
        ("MOV", (), ""),
        ("BRA", ("0x40",), "@P0"),
        ("USETMAXREG.DEALLOC.CTAPOOL", ("0x20",), ""),
        ("EXIT", (), ""),
        ("USETMAXREG.TRY_ALLOC.CTAPOOL", ("UP0", "0xa0"), ""),
        ("BRA", ("0x40",), "@!P0"),
        ("EXIT", (), ""),
    )
    assert roles_of(kernel) == ["all", "all", *["producer"] * 2, *["consumer"] * 3]


# ---------------------------------------------------------------- command line


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["profile", "ncu", *map(str, arguments)])


def test_import_a_csv(tmp_path):
    if INSTANCE not in manifest.instances():
        pytest.skip(f"{INSTANCE} is not in this build")
    path = tmp_path / "raw.csv"
    path.write_text(raw_page(f"{INSTANCE}_0"))
    done = invoke("--import", path)
    assert done.exit_code == 0, done.output
    assert "400.0 us at 1.75 GHz" in done.stdout or "400.0 us at 1.76 GHz" in done.stdout
    assert "of the tensor cores" in done.stdout
    figures = json.loads(invoke("--import", path, "--json").stdout)
    assert figures["problem"] == PROBLEM.name
    assert figures["utilisation"]["tensor"] == 71.0


def test_the_kernel_is_of_the_backend_that_is_forced(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text(raw_page("ampere_fwd_bf16_d128_0"))
    with backend("ampere"):
        done = invoke("--import", path)
    assert done.exit_code == 0, done.output
    assert "ampere_fwd_bf16_d128" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here"),
        (["-w", "nope"], "unknown workload"),
        (["-w", "h200"], "is 20 problems; name one of"),
        (["-w", "decode_paged/*b1_s1024"], "no compiled kernel runs"),
        (["-w", "fa3/backward_bf16_d64_b1_s16384"], "there is no GPU here"),
        (["--import", "none.ncu-rep"], "none.ncu-rep: No such file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["hopper-attention", "profile", "ncu", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_no_csv_without_launches():
    assert from_csv(raw_page()) == []
