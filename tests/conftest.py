"""Fixtures and the skipping of GPU tests serve every test.

`aot`, the compile driver, is not installed.  It is made importable by itself, because `python/` on
the path would shadow the installed package with its sources.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hopper_attention.dispatch import target

ROOT = Path(__file__).resolve().parents[1]


def _import_aot() -> None:
    folder = ROOT / "python" / "aot"
    spec = importlib.util.spec_from_file_location(
        "aot", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["aot"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_aot()


def _runs_on(capability: tuple[int, int] | None, kernels: str) -> bool:
    try:
        return capability is not None and target.choose(capability, kernels).kernels == kernels
    except NotImplementedError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu, or gpu("ampere"), where there is none that the kernels run on."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for item in items:
        if marker := item.get_closest_marker("gpu"):
            kernels = marker.args[0] if marker.args else "hopper"
            if not _runs_on(capability, kernels):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU for {kernels}'s kernels"))


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT
