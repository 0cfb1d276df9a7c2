"""Test programs in CuTe DSL, compiled when first asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hopper_attention import backend, simulator

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(params=["hopper", "ampere"])
def kernels(request):
    """Whose kernels the calls of a test run."""
    with backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """name -> AotFunction; a program is compiled when first asked for."""
    folder = tmp_path_factory.mktemp("programs")
    loaded: dict[str, simulator.AotFunction] = {}

    def get(name: str) -> simulator.AotFunction:
        if name not in loaded:
            architecture = "sm_80" if name == "ampere" else "sm_90a"
            environment = {
                **os.environ, "CUTE_DSL_ARCH": architecture, "PYTHONDONTWRITEBYTECODE": "1",
            }  # fmt: skip
            if not (folder / f"{name}.o").exists():
                command = [sys.executable, PROGRAMS / f"{name.split('_')[0]}.py", folder]
                subprocess.run(command, check=True, env=environment, cwd=folder, timeout=120)
            files = (folder / f"{name}{end}" for end in (".o", ".h", f".{architecture}.ptx"))
            loaded[name] = simulator.load_aot(*files, name)
        return loaded[name]

    return get
