"""Compile revisions of kernels under names of their own, beside the shipped objects."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError

from .table import SEPARATOR, Variant

FAMILY = "variant"
"""The family in a variant's record: dispatch looks under the others only."""
OBJECTS = (".o", ".h", ".ptx", ".json")
WORKERS = 2
"""A compile takes up to 1.5 GiB."""

COMPILE = """
import json
import sys
from dataclasses import replace
from pathlib import Path
from aot import sources
sources.make_importable()
from aot import batch, flavour
modules = sources.INSTANCE_MODULES  # older revisions have fewer lists
sources.INSTANCE_MODULES = tuple(m for m in modules if sources.file_of(m).exists())
name, out, config, fields = sys.argv[1:]
instance = next(i for i in sources.all_instances() if i.name == name)
config = replace(instance.config, **json.loads(config))
variant = replace(instance, config=config, **json.loads(fields))
batch.compile_batch([variant], Path(out), flavour.resolve("auto"))
"""


def build(
    variants: list[Variant], repository: Path, out: Path, *, try_only: bool = False
) -> Iterator[tuple[str, str]]:
    """(instance, "" or what went wrong) as they are compiled.  Raises UserError.

    `try_only`: the first instance of each, without the shipped objects.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = sorted(manifest.instances()) if try_only else _copy_shipped(repository, out)
    jobs: list[tuple[Path, str, Variant]] = []
    for variant in variants:
        names = [n for n in known if any(fnmatchcase(n, p) for p in variant.patterns)]
        if not names:
            raise UserError(f"{variant.name}: no instance matches {', '.join(variant.patterns)}")
        tree = out / "sources" / variant.name
        _check_out(repository, variant.revision, tree)
        for replacement in variant.replacements:
            replacement.apply(tree)
        jobs += [(tree, name, variant) for name in (names[:1] if try_only else names)]
    with ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(_compile, *job, out) for job in jobs]
        for (_, name, variant), compiled in zip(jobs, started):
            yield f"{name}{SEPARATOR}{variant.name}", compiled.result()


def _copy_shipped(repository: Path, out: Path) -> list[str]:
    """Names of the shipped instances."""
    shipped = _shipped(repository)
    names = sorted(record.stem for record in shipped.glob("*.json"))
    for name in names:
        for suffix in OBJECTS:
            shutil.copy2(shipped / f"{name}{suffix}", out)
    return names


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


def _compile(tree: Path, name: str, variant: Variant, out: Path) -> str:
    """Compile one instance; return the error, or nothing."""
    fields: dict[str, Any] = {"name": f"{name}{SEPARATOR}{variant.name}", "family": FAMILY}
    if variant.timing_only:
        fields["claims"] = []  # it may lack what the instance promises
    options = map(json.dumps, (dict(variant.config), fields))
    command = [sys.executable, "-c", COMPILE, name, str(out.resolve()), *options]
    done = subprocess.run(command, cwd=tree / "python", capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else "failed")
