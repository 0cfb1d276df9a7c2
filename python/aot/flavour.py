"""Which of the DSL's two toolchains compiles: CUDA 12 or CUDA 13.

A cubin runs on drivers of its own CUDA major version and newer.
"""

import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

MAJORS = (12, 13)
MODULE = "cutlass._mlir._mlir_libs._cutlass_ir"


def resolve(wanted: str) -> int:
    """CUDA major version for `12`, `13` or `auto`: the local driver's, the newest without one."""
    if wanted != "auto":
        if wanted not in map(str, MAJORS):
            raise ValueError(f"CUDA {wanted}: choose auto, 12 or 13")
        return int(wanted)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return MAJORS[-1]
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return min(max(version.value // 1000, MAJORS[0]), MAJORS[-1])


def choose(major: int) -> None:
    """Load the DSL's compiler for CUDA `major`, before anything imports `cutlass`.

    By itself the DSL takes the newest that the local driver supports, which says nothing of the
    machine where the kernels will run; it respects a compiler that is in `sys.modules` already.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "nvidia-cutlass-dsl is not installed; HOPPER_ATTENTION_PREBUILT links without it"
        )
    folder = Path(spec.submodule_search_locations[0]) / "dsl_packages/cutlass/_mlir/_mlir_libs"
    python = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    compilers = list(folder.glob(f"_cutlass_ir.cu{major}.{python}-*.so"))
    if not compilers:
        package = "nvidia-cutlass-dsl[cu13]" if major == 13 else "nvidia-cutlass-dsl"
        raise RuntimeError(f"no CUDA {major} toolchain for {python}: pip install '{package}'")
    module = _load(compilers[0])
    importlib.import_module("cutlass")
    parent = importlib.import_module(MODULE.rpartition(".")[0])
    parent._cutlass_ir = module  # type: ignore[attr-defined]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def in_use() -> str:
    """The flavour of the compiler that is loaded: "cu12" or "cu13"."""
    file = sys.modules[MODULE].__file__
    assert file is not None
    return Path(file).name.split(".")[1]
