"""The file that a run leaves: every raw sample, and what is needed to judge it.

    schema     1
    date       ISO 8601, UTC
    commit     of the repository, with "+" if it had changes; "unknown" outside of one
    device     name, sms, memory_gib, driver, cuda, power_limit_w, sm_mhz, memory_mhz, max_sm_mhz
    versions   package -> version
    protocol   repeats, warmup, flush_mib, load_seconds, idle_seconds, modes
    rows       problem, workload, peer, mode, status, reason, instance, kernels, flop, bytes,
               samples_ms, sm_mhz, power_w, error

`mode` is "burst" (the GPU idle before every round) or "sustained" (after seconds of load); `status`
is "ok", "wrong" (FP64 disagrees: not timed), "skipped" or "failed", the last three with a `reason`.
`error` holds maximum and rms against FP64 on sampled rows, and PyTorch's in the same dtype.
`sm_mhz` and `power_w` were sampled while the row was timed; the device's `sm_mhz` is that of an
idle GPU, before the run.  Results until 2026-11-27 have neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hopper_attention import files
from hopper_attention.bench.data.statistics import Summary
from hopper_attention.errors import UserError

SCHEMA = 1
MODES = ("burst", "sustained")
STATUSES = ("ok", "wrong", "skipped", "failed")

BASELINE = "baseline"
"""The workload of these peers: what the device can do, measured in every run."""

CUBLAS_BF16 = "cuBLAS bf16 8192^3"
CUBLAS_FP8 = "cuBLAS FP8 8192^3"
DEVICE_COPY = "device copy"
BASELINES = (CUBLAS_BF16, CUBLAS_FP8, DEVICE_COPY)

QUANTISATION = "quantize"
"""The workload of the kernels around FP8 attention."""

OURS = "hopper-attention"
CUDNN = ("torch cuDNN", "cuDNN FP8")


def is_decode(problem: str) -> bool:
    return problem.partition("/")[2].startswith("decode")


@dataclass(frozen=True)
class Row:
    problem: str
    workload: str
    peer: str
    mode: str
    status: str
    reason: str = ""
    instance: str = ""
    """The compiled instance that ran, for our own rows."""
    kernels: dict[str, float] = field(default_factory=dict)
    """Every instance that ran -> median milliseconds, launched by itself."""
    flop: int = 0
    bytes: int = 0
    samples_ms: list[float] = field(default_factory=list)
    sm_mhz: list[int] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)
    """maximum, rms, pytorch_maximum, pytorch_rms."""

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.status not in STATUSES:
            raise ValueError(f"{self.mode} {self.status}")
        if (self.status == "ok") != bool(self.samples_ms):
            raise ValueError(f"{self.status} with {len(self.samples_ms)} samples")

    @property
    def key(self) -> tuple[str, str, str]:
        return self.problem, self.peer, self.mode

    @property
    def is_decode(self) -> bool:
        return is_decode(self.problem)

    @property
    def is_fp8(self) -> bool:
        return "_fp8_" in self.problem or self.peer == CUBLAS_FP8

    @property
    def memory_bound(self) -> bool:
        """Judged by bytes, not by FLOP."""
        return self.is_decode or not self.flop

    @property
    def milliseconds(self) -> Summary:
        return Summary.of(self.samples_ms)

    @property
    def tflops(self) -> float:
        return self.flop / self.milliseconds.median / 1e9

    @property
    def terabytes_per_second(self) -> float:
        return self.bytes / self.milliseconds.median / 1e9


@dataclass(frozen=True)
class Run:
    date: str
    commit: str
    device: dict[str, Any]
    versions: dict[str, str]
    protocol: dict[str, Any]
    rows: list[Row]

    def cublas(self, row: Row) -> Row | None:
        """The baseline of the row's precision, in its mode."""
        return self.baseline(CUBLAS_FP8 if row.is_fp8 else CUBLAS_BF16, row.mode)

    def baseline(self, peer: str, mode: str) -> Row | None:
        for row in self.rows:
            if (row.peer, row.mode, row.status) == (peer, mode, "ok"):
                return row
        return None

    def fraction(self, row: Row) -> float | None:
        """The fraction of cuBLAS's rate in the same precision, or of the copy's.

        None without that baseline.
        """
        if row.memory_bound:
            copy = self.baseline(DEVICE_COPY, row.mode)
            return row.terabytes_per_second / copy.terabytes_per_second if copy else None
        cublas = self.cublas(row)
        return row.tflops / cublas.tflops if cublas else None

    def beside_cudnn(self, row: Row) -> float | None:
        """How many times as fast as cuDNN, in the same run; None where it did not run."""
        for other in self.rows:
            if other.peer in CUDNN and (other.problem, other.mode) == (row.problem, row.mode):
                if other.status == "ok" and row.status == "ok":
                    return other.milliseconds.median / row.milliseconds.median
        return None


def load(path: Path) -> Run:
    """Raises UserError for what is not such a file."""
    try:
        data = json.loads(path.read_text())
        schema = data.pop("schema")
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a result of `hopper-attention bench`") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}; this version reads {SCHEMA}")
    try:
        return Run(**{**data, "rows": [Row(**row) for row in data["rows"]]})
    except (ValueError, TypeError, KeyError) as fault:
        raise UserError(f"{path} is damaged: {fault}") from None


def save(path: Path, run: Run) -> None:
    """Replaces the file at once: a run that is interrupted leaves what it had measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps({"schema": SCHEMA, **asdict(run)}, indent=1) + "\n")


def load_folder(folder: Path) -> list[Run]:
    """Every result in the folder, oldest first, those of one date by name."""
    return sorted((load(path) for path in sorted(folder.glob("*.json"))), key=lambda run: run.date)


def timed(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """The rows with samples, by problem, peer and mode."""
    return {row.key: row for row in rows if row.status == "ok"}
