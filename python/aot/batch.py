"""Compile several instances: the DSL is imported once, and each is compiled in a child of its own.

Importing takes 0.5 s, as long as a small kernel takes to compile, and leaving the interpreter
another 0.3 s; a forked child does neither.  It starts from the state that the import left, whatever
was compiled before.
"""

import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot import compile as compiler
from aot import outputs, ptxas, sources


class BatchError(RuntimeError):
    """Not all instances were compiled."""


def compile_batch(instances: Sequence[Any], out: Path, cuda_major: int) -> None:
    """Compile into `out` what is not current there.  Raises BatchError at the first failure."""
    stale = [instance for instance in instances if _is_stale(instance, out, cuda_major)]
    if not stale:
        return
    architectures = {instance.architecture for instance in stale}
    if len(architectures) > 1:
        raise BatchError(f"the DSL is loaded for one of {', '.join(sorted(architectures))}")
    sources.forget_hashes()  # of the kernels: it is the children that import them
    sources.remember_hashes()
    compiler.load_dsl(architectures.pop(), cuda_major)
    compiled = []
    try:
        for instance in stale:
            _compile_apart(instance, out)
            compiled.append(instance)
    finally:  # a failure costs no other instance its outputs
        _publish(compiled, out)


def _publish(instances: Sequence[Any], out: Path) -> None:
    try:
        compiler.publish(instances, out)
    except ptxas.GateError as fault:
        raise BatchError(str(fault)) from None


def _is_stale(instance: Any, out: Path, cuda_major: int) -> bool:
    shutil.rmtree(outputs.scratch_folder(out, instance.name), ignore_errors=True)
    return not outputs.is_current(instance, out / f"{instance.name}.json", cuda_major)


def _compile_apart(instance: Any, out: Path) -> None:
    """In a child; raise `BatchError` where it fails or is killed."""
    child = multiprocessing.get_context("fork").Process(
        target=_compile, args=(instance, out), name=instance.name
    )
    child.start()
    child.join()
    if child.exitcode:
        raise BatchError(
            f"instance {instance.name} was not compiled (exit status {child.exitcode});"
            f" what it left is in {outputs.scratch_folder(out, instance.name)}"
        )


def _compile(instance: Any, out: Path) -> None:
    try:
        compiler.compile_instance(instance, out)
    except ptxas.GateError as fault:
        raise SystemExit(f"error: {fault}") from None
