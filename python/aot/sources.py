"""The repository as the build sees it: sources under their installed names, instances, hashes."""

import functools
import hashlib
import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

INSTANCE_MODULES = (
    "hopper_attention.hopper.instances",
    "hopper_attention.cute_kernels.quantization.instances",
    "hopper_attention.cute_kernels.ampere.instances",
)
"""Every module with a list of kernels to compile, `INSTANCES`."""

SOURCE_FOLDERS = tuple(ROOT / name for name in ("hopper", "cute_kernels", "python"))
"""Folders whose files a kernel may depend on; a virtual environment may lie beside them."""


def make_importable() -> None:
    """Make the kernel sources importable as `hopper_attention.hopper` and `.cute_kernels`.

    A stub takes the package's place: its real `__init__` imports torch, which a build lacks.
    """
    package = ModuleType("hopper_attention")
    package.__path__ = [str(ROOT), str(ROOT / "python" / "hopper_attention")]
    sys.modules["hopper_attention"] = package
    sys.meta_path.insert(0, _ThisRepository())


def file_of(module: str) -> Path:
    """Return where a module of the kernels' folders lies in this repository, if it does."""
    return ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")


class _ThisRepository:
    """First of all finders: that of an editable install may lead to another checkout."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("hopper_attention."):
            return None
        return PathFinder.find_spec(name, path, target)


def all_instances() -> list[Any]:
    """The instances of every list, in order; a name may occur once."""
    instances = [i for name in INSTANCE_MODULES for i in importlib.import_module(name).INSTANCES]
    names = [i.name for i in instances]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"instance names used twice: {', '.join(sorted(twice))}")
    return instances


def imported_sources() -> list[Path]:
    """The repository's source files among the imported modules, sorted."""
    files = {
        Path(file).resolve()
        for module in list(sys.modules.values())
        if isinstance(file := getattr(module, "__file__", None), str)
    }
    return sorted(f for f in files if any(f.is_relative_to(folder) for folder in SOURCE_FOLDERS))


def is_instance_list(path: Path) -> bool:
    """Lists stay out of the hash: an instance depends on its own line, which is hashed instead."""
    return path.name == "instances.py"


@functools.cache
def hash_file(path: Path) -> str:
    """Hash the content as it was when first asked, or first since `forget_hashes`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remember_hashes() -> None:
    """Hash everything imported by now: later edits must not count."""
    for file in imported_sources():
        hash_file(file)


def forget_hashes() -> None:
    """Forget hashes of files that are imported later: they may be edited in between."""
    hash_file.cache_clear()
