"""What every test may use.

`aot`, the compile driver, is not installed.  It is made importable by itself, because `python/` on
the path would shadow the installed package with its sources.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _import_aot() -> None:
    folder = ROOT / "python" / "aot"
    spec = importlib.util.spec_from_file_location(
        "aot", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["aot"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_aot()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none that the kernels run on."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return
    skip = pytest.mark.skip(reason="needs a Hopper GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT
