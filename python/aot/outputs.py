"""The files of a compiled instance: whether they are current, what they depend on."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aot import sources

SUFFIXES = (".o", ".h", ".ptx", ".cubin", ".json")


def prune(out: Path, names: set[str]) -> None:
    """Remove the outputs of instances that are in no list any more; a prebuilt link takes all."""
    for record in out.glob("*.json"):
        if record.stem not in names:
            for suffix in SUFFIXES:
                record.with_suffix(suffix).unlink(missing_ok=True)


def is_current(instance: Any, record: Path, cuda_major: int) -> bool:
    """Say whether the outputs beside `record` came from these sources and this instance.

    Content decides, not time, so a touched file or another line of an instance list costs nothing.
    """
    if not all(record.with_suffix(suffix).exists() for suffix in SUFFIXES):
        return False
    facts = json.loads(record.read_text())
    files = [sources.ROOT / file for file in facts["sources"]]
    return (
        facts["flavour"] == f"cu{cuda_major}"
        and all(file.exists() for file in files)
        and facts["source_hash"] == source_hash(instance, files)
    )


def source_hash(instance: Any, files: list[Path]) -> str:
    """Hash the instance, the DSL's version and the sources imported for it, but for lists."""
    parts: dict[str, Any] = {
        "instance": asdict(instance),
        "dsl": version("nvidia-cutlass-dsl"),
        "host": platform.machine(),
        "sources": {
            str(file.relative_to(sources.ROOT)): sources.hash_file(file)
            for file in files
            if not sources.is_instance_list(file)
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, facts: dict[str, Any]) -> None:
    (folder / f"{facts['name']}.json").write_text(json.dumps(facts, indent=1) + "\n")


def move(scratch: Path, out: Path, name: str) -> None:
    """The record vouches for the others: gone first, back last."""
    (out / f"{name}.json").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        (scratch / f"{name}{suffix}").replace(out / f"{name}{suffix}")
    shutil.rmtree(scratch)


def scratch_folder(out: Path, name: str) -> Path:
    """Return the folder in which an instance is compiled; after a failure it stays."""
    return out / f"{name}.scratch"


def write_depfile(path: Path, target: Path, records: Iterable[Path]) -> None:
    """Tell the build system, in make's syntax, what `target` and its batch were compiled from."""
    files = {file for record in records for file in json.loads(record.read_text())["sources"]}
    escaped = (str(sources.ROOT / file).replace(" ", r"\ ") for file in sorted(files))
    path.write_text(f"{target}: " + " \\\n  ".join(escaped) + "\n")
