"""Compile revisions of kernels under names of their own, beside the shipped objects."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path

from hopper_attention.errors import UserError

SEPARATOR = "__"
"""Between an instance's name and its variant's."""
FAMILY = "variant"
"""The family in a variant's record: dispatch looks under the others only."""
OBJECTS = (".o", ".h", ".ptx", ".json")
WORKERS = 2
"""A compile takes up to 1.5 GiB."""

COMPILE = """
import sys
from dataclasses import replace
from pathlib import Path
from aot import sources
sources.make_importable()
from aot import batch, flavour
modules = sources.INSTANCE_MODULES  # older revisions have fewer lists
sources.INSTANCE_MODULES = tuple(m for m in modules if sources.file_of(m).exists())
name, as_name, family, out = sys.argv[1:]
instance = next(i for i in sources.all_instances() if i.name == name)
variant = replace(instance, name=as_name, family=family)
batch.compile_batch([variant], Path(out), flavour.resolve("auto"))
"""


@dataclass(frozen=True)
class Variant:
    name: str
    revision: str
    patterns: tuple[str, ...]
    """Patterns of the instances' names."""

    @staticmethod
    def parse(text: str) -> Variant:
        """NAME=REVISION:PATTERN[,PATTERN...].  Raises UserError."""
        name, equals, rest = text.partition("=")
        revision, colon, patterns = rest.rpartition(":")
        if not (equals and colon and name.isidentifier() and SEPARATOR not in name and patterns):
            raise UserError(f"{text!r}: expected NAME=REVISION:INSTANCE[,INSTANCE...]")
        return Variant(name, revision, tuple(patterns.split(",")))


def build(variants: list[Variant], repository: Path, out: Path) -> Iterator[tuple[str, str]]:
    """(instance, "" or what went wrong) as they are compiled.  Raises UserError."""
    shipped = _shipped(repository)
    out.mkdir(parents=True, exist_ok=True)
    for record in shipped.glob("*.json"):
        for suffix in OBJECTS:
            shutil.copy2(record.with_suffix(suffix), out)
    known = [record.stem for record in shipped.glob("*.json")]
    jobs: list[tuple[Path, str, str]] = []
    for variant in variants:
        names = [n for n in known if any(fnmatchcase(n, p) for p in variant.patterns)]
        if not names:
            raise UserError(f"{variant.name}: no instance matches {', '.join(variant.patterns)}")
        tree = out / "sources" / variant.name
        _check_out(repository, variant.revision, tree)
        jobs += [(tree, name, f"{name}{SEPARATOR}{variant.name}") for name in sorted(names)]
    with ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(_compile, tree, name, as_name, out) for tree, name, as_name in jobs]
        for (_, _, as_name), compiled in zip(jobs, started):
            yield as_name, compiled.result()


def _shipped(repository: Path) -> Path:
    builds = [path for path in repository.glob("build/*/kernels") if any(path.glob("*.o"))]
    if not builds:
        raise UserError("no compiled kernels in build/*/kernels: make test, or pip install . first")
    return max(builds, key=lambda path: path.stat().st_mtime)


def _check_out(repository: Path, revision: str, tree: Path) -> None:
    """The revision's kernels, with this checkout's compile driver."""
    shutil.rmtree(tree, ignore_errors=True)
    command = ["git", "-C", str(repository), "archive", revision, "hopper", "cute_kernels"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise UserError(f"git archive {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")
    shutil.copytree(repository / "python" / "aot", tree / "python" / "aot")


def _compile(tree: Path, name: str, as_name: str, out: Path) -> str:
    """Compile one instance; return the error, or nothing."""
    command = [sys.executable, "-c", COMPILE, name, as_name, FAMILY, str(out.resolve())]
    done = subprocess.run(command, cwd=tree / "python", capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else "failed")
