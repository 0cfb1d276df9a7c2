"""Imports go one way: docs/architecture.md has the order."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import hopper_attention

LAYERS = (
    ("errors", "files", "nvtx"),
    ("_cuda", "_simulator"),
    ("simulator",),
    ("problem",),
    ("reference",),
    ("dispatch",),
    ("launch",),
    ("torch_ops",),
    ("functional", "fp8", "quantize"),
    ("integrations",),
    ("arguments", "backward", "fp8_emulation"),
    ("__init__",),
    ("sass", "profiling", "bench", "accuracy", "benchmarks"),
    ("cli",),
)
"""Each may import itself and those before it."""
PLACE = {name: place for place, names in enumerate(LAYERS) for name in names}
PACKAGE = Path(__file__).parents[2] / "python" / "hopper_attention"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
INIT = "__init__.py"
HOST = ("instance.py", "instances.py", "hardware.py", "conventions.py", "config.py")
"""Files of the kernels' folders that are read where the DSL is not installed."""


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, also within functions; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str:
    """The first part of a module within the package; names that it exports are its own."""
    first = module.split(".")[1:2]
    return first[0] if first and first[0] in PLACE else "__init__"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_layer_imports_one_above(file):
    own = file.parts[0].removesuffix(".py")
    assert own in PLACE, f"{own} has no place among the layers"
    for module in imports(PACKAGE / file):
        kernels = module.startswith(("hopper_attention.hopper", "hopper_attention.cute_kernels"))
        if module.split(".")[0] == "hopper_attention" and not kernels:
            assert PLACE[layer_of(module)] <= PLACE[own], f"{file} imports {module}"


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports: `from a import b` is a/b.py, else a.py."""
    found = set()
    for module in imports(path):
        first, *names = module.split(".")
        for parts in (names, names[:-1]) if first == "hopper_attention" and names else ():
            places = (PACKAGE.joinpath(*parts).with_suffix(".py"), PACKAGE.joinpath(*parts, INIT))
            if place := next((place for place in places if place.exists()), None):
                found.add(place)
                break
    return found


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a circle, or nothing."""
    done: set[Path] = set()

    def walk(file: Path, path: list[Path]) -> list[Path]:
        if file in path:
            return path[path.index(file) :]
        for other in graph[file] - done if file not in done else ():
            if found := walk(other, [*path, file]):
                return found
        done.add(file)
        return []

    return next((found for file in graph if (found := walk(file, []))), [])


def test_the_simulator_has_no_circle_of_imports():
    """Imports that only type checkers follow count, too."""
    files = set((PACKAGE / "simulator").rglob("*.py"))
    graph = {file: imported_files(file) & files for file in files}
    assert sum(map(len, graph.values())) > len(files), "imports were not understood"
    assert not circle(graph)
    place = {file: file if file.parent.name == "simulator" else file.parent for file in files}
    folders: dict[Path, set[Path]] = {folder: set() for folder in place.values()}
    for file, others in graph.items():
        folders[place[file]] |= {place[other] for other in others} - {place[file]}
    assert not circle(folders)


def test_the_simulator_knows_no_attention():
    for path in (PACKAGE / "simulator").rglob("*.py"):
        for module in imports(path):
            ours = module.split(".")[0] == "hopper_attention"
            assert not ours or module.startswith("hopper_attention.simulator."), f"{path}: {module}"


def test_measuring_and_reporting_share_data_only():
    for file in (PACKAGE / "bench").rglob("*.py"):
        for module in imports(file):
            if module.startswith("hopper_attention.bench."):
                assert module.split(".")[2] in ("data", file.parent.name), f"{file}: {module}"


def test_shared_device_code_knows_no_architecture(root):
    for path in (root / "cute_kernels").rglob("*.py"):
        for module in imports(path):
            assert not module.startswith("hopper_attention.hopper"), f"{path} imports {module}"


def reached(path: Path, root: Path) -> set[str]:
    """Modules that a file of the kernels' folders imports, and those that these import."""
    found, left = set(), [path]
    while left:
        for module in imports(left.pop()):
            # `from a import b`: b is a module of a package, or a name in a module.
            for name in {module, module.rpartition(".")[0]} - found:
                found.add(name)
                file = root.joinpath(*name.split(".")[1:]).with_suffix(".py")
                if name.startswith("hopper_attention.") and file.exists():
                    left.append(file)
    return found


def test_lists_and_configurations_need_no_dsl(root):
    kernels = [p for name in ("hopper", "cute_kernels") for p in (root / name).rglob("*.py")]
    lists = [path for path in kernels if path.name in HOST]
    assert {path.name for path in lists} == set(HOST)
    for path in lists:
        assert not any(name.split(".")[0] == "cutlass" for name in reached(path, root)), path
    assert "cutlass" in reached(root / "hopper/forward/kernel.py", root)


def test_former_names_stay_for_one_version():
    assert hopper_attention.backward.workspace_bytes is hopper_attention.workspace_bytes
    assert hopper_attention.arguments.Lengths is hopper_attention.quantize.Lengths
    assert hopper_attention.arguments.Mask(right=0) == hopper_attention.arguments.CAUSAL
    emulation = importlib.import_module("hopper_attention.fp8_emulation")
    assert (
        emulation.attention is importlib.import_module("hopper_attention.reference.fp8").attention
    )


def test_folders_stay_small(root):
    """A newcomer reads a listing at a glance."""
    folders = [root / "hopper", root / "cute_kernels", root / "python"]
    counts = Counter(
        path.parent
        for folder in folders
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    )
    assert not [folder for folder, count in counts.items() if count > 15]
