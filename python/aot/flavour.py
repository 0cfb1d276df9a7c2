"""Which of the DSL's two toolchains compiles: CUDA 12 or CUDA 13.

A cubin runs on drivers of its own CUDA major version and newer.  The DSL takes the newest that the
local driver supports, which says nothing of the machine where the kernels are to run.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

MODULE = "cutlass._mlir._mlir_libs._cutlass_ir"


def choose(major: int) -> None:
    """Load the DSL's compiler for CUDA `major` before `cutlass` is imported.

    The DSL leaves the choice to whoever has put its compiler module into `sys.modules`.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("nvidia-cutlass-dsl is not installed; set HOPPER_ATTENTION_PREBUILT to link without it")
    folder = Path(spec.submodule_search_locations[0]) / "dsl_packages/cutlass/_mlir/_mlir_libs"
    candidates = sorted(folder.glob(f"_cutlass_ir.cu{major}.cpython-{sys.version_info[0]}{sys.version_info[1]}*.so"))
    if not candidates:
        extra = "[cu13]" if major == 13 else ""
        raise RuntimeError(f"the DSL's CUDA {major} toolchain is not installed: pip install 'nvidia-cutlass-dsl{extra}'")
    module = _load(candidates[0])
    importlib.import_module("cutlass")
    importlib.import_module(MODULE.rpartition(".")[0])._cutlass_ir = module  # type: ignore[attr-defined]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def installed() -> str:
    """The flavour in use, once `cutlass` is imported: "cu12" or "cu13"."""
    file = sys.modules[MODULE].__file__
    assert file is not None
    return Path(file).name.split(".")[1]
