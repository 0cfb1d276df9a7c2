"""Compile one instance to `<name>.{o,h,ptx,cubin,json}`.  No GPU and no nvcc are needed."""

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aot import cubin, flavour, header, outputs, ptxas, sources

HOST_TARGETS = {
    "x86_64": "llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64-v2",
    "aarch64": "llvm -mtriple=aarch64-unknown-linux-gnu",
}
"""Left to itself the DSL compiles host code for the very CPU it runs on (AVX-512 included), and the
object dies of SIGILL elsewhere."""


def load_dsl(architecture: str, cuda_major: int) -> None:
    """Import the DSL; a process can do so once, for one architecture and one CUDA."""
    os.environ["CUTE_DSL_ARCH"] = architecture  # read when cutlass is imported, not later
    os.environ["CUTE_DSL_DISABLE_FILE_CACHING"] = "1"  # what is current is decided here alone
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of numpy's survive no fork
    flavour.choose(cuda_major)
    importlib.import_module("cutlass.cute")
    _skip_source_lines()


def compile_instance(instance: Any, out: Path) -> None:
    """Compile `instance` into its scratch folder, in a process that has loaded the DSL."""
    scratch = outputs.scratch_folder(out, instance.name)
    scratch.mkdir(parents=True)
    outputs.write_record(scratch, _compile(instance, scratch))


def publish(instances: Sequence[Any], out: Path) -> None:
    """Look at the machine code of compiled instances and move their files from scratch to `out`.

    All at once: starting the disassembler takes several times longer than reading a kernel.  Raises
    GateError when those that keep their promises are moved and others are not.
    """
    faults = []
    scratches = [outputs.scratch_folder(out, instance.name) for instance in instances]
    cubins = [scratch / f"{i.name}.cubin" for i, scratch in zip(instances, scratches)]
    for instance, scratch, found in zip(instances, scratches, cubin.count_opcodes(cubins)):
        try:
            ptxas.check_claims(instance, found)
        except ptxas.GateError as fault:
            faults.append(str(fault))
            continue
        counts = None if found is None else {opcode: found[opcode] for opcode in instance.claims}
        facts = json.loads((scratch / f"{instance.name}.json").read_text())
        outputs.write_record(scratch, {**facts, "opcodes": counts})
        outputs.move(scratch, out, instance.name)
    if faults:
        raise ptxas.GateError("\n".join(faults))


def _compile(instance: Any, out: Path) -> dict[str, Any]:
    """Compile into the empty folder `out`; return what the instance's JSON says."""
    import cuda.bindings.driver as cuda
    from cutlass import cute

    name = instance.name
    started = time.perf_counter()
    module, _, class_name = instance.kernel.partition(":")
    kernel_class = getattr(importlib.import_module(module), class_name)
    for function in (kernel_class.__call__, kernel_class.kernel):
        function.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    kernel = kernel_class(instance.config)
    arguments = kernel.example_arguments()
    sources.remember_hashes()
    remarks = out / "remarks.yaml"
    options = (
        f"remarks{{ptx}} --remark-output '{remarks}'",
        f"--keep-ptx --keep-cubin --dump-dir '{out}'",
        f"--host-target '{HOST_TARGETS[platform.machine()]}'",
    )
    compiled = cute.compile(kernel, *arguments, cuda.CUstream(0), options=" ".join(options))
    compiled.export_to_c(file_path=str(out), file_name=name, function_prefix=name)
    for suffix in (".ptx", ".cubin"):  # named after the architecture too
        next(out.glob(f"*{suffix}")).rename(out / f"{name}{suffix}")
    seconds = round(time.perf_counter() - started, 2)

    resources = ptxas.parse_remarks(remarks.read_text())
    ptxas.check_resources(instance, resources)
    parameters = cubin.parse_parameters((out / f"{name}.ptx").read_text())
    if alien := [symbol for symbol in parameters if not symbol.startswith(f"{name}_")]:
        raise ptxas.GateError(f"instance {name}: kernel symbols not named after it: {alien}")
    return {
        **describe_instance(instance),
        "arguments": describe_arguments((out / f"{name}.h").read_text(), name, arguments),
        "kernels": list(parameters),
        "parameters": parameters,
        **asdict(resources),
        "compile_seconds": seconds,
        **describe_build(instance),
    }


def _skip_source_lines() -> None:
    """Keep the DSL from looking up the line of every operation it traces, as it does for remarks.

    A quarter of the time, and neither PTX nor cubin depends on it; 4.8.1 has no option for it.
    """
    from cutlass.base_dsl import dsl

    setattr(dsl, "_set_enable_frame_filtering", lambda enable: None)  # noqa: B010 (mypy)


def describe_instance(instance: Any) -> dict[str, Any]:
    """Return the facts of the instance's line in its list, and those of its configuration."""
    return {
        "name": instance.name,
        "family": instance.family,
        "architecture": instance.architecture,
        "group": instance.group,
        "config": asdict(instance.config),
        "claims": list(instance.claims),
        "spills_because": instance.spills_because,
        "shared_memory_bytes": instance.config.shared_memory_bytes,
        "threads": instance.config.threads,
    }


def describe_build(instance: Any) -> dict[str, Any]:
    """Return sources and versions of a compile, when all sources are imported."""
    files = sources.imported_sources()
    kernel = sys.modules[instance.kernel.partition(":")[0]]
    if Path(str(kernel.__file__)).resolve() not in files:
        raise ImportError(f"{kernel.__name__} was imported from elsewhere: {kernel.__file__}")
    return {
        "source_hash": outputs.source_hash(instance, files),
        "sources": [str(file.relative_to(sources.ROOT)) for file in files],
        "dsl_version": version("nvidia-cutlass-dsl"),
        "flavour": flavour.in_use(),
    }


def describe_arguments(text: str, name: str, examples: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The header's arguments, each tensor's completed by what its fake tensor was declared with.

    A NamedTuple among the examples is a group: its members are arguments by their names.
    """
    given = [example for example in examples if example is not None]
    groups = [getattr(example, "_fields", ()) for example in given]
    parsed = header.parse_arguments(text, name, groups)
    names = [argument["name"] for argument in parsed]
    if len(set(names)) < len(names):
        raise header.HeaderError(f"{name}: two arguments of the same name among {names}")
    singles = [single for example in given for single in _members_of(example)]
    return [
        {**argument, **_describe_tensor(example)} if argument["kind"] == "tensor" else argument
        for argument, example in zip(parsed, singles, strict=True)
    ]


def _members_of(example: Any) -> tuple[Any, ...]:
    return example if hasattr(example, "_fields") else (example,)


def _describe_tensor(tensor: Any) -> dict[str, Any]:
    """Extents and strides: an int where static, null where dynamic, and the divisors of those."""
    static = {
        key: [n if isinstance(n, int) else None for n in modes]
        for key, modes in (("shape", tensor.shape), ("stride", tensor.stride))
    }
    divisors = {
        f"{key}_divisibility": [1 if isinstance(n, int) else n.divisibility for n in modes]
        for key, modes in (("shape", tensor.shape), ("stride", tensor.stride))
    }
    return {
        "dtype": tensor.element_type.__name__,
        "rank": len(tensor.shape),
        "alignment": tensor._assumed_align,
        **static,
        **divisors,
    }
