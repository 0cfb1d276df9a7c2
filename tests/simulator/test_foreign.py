"""A kernel of another package, as docs/simulator.md runs it."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.9", reason="needs Triton to compile")


@pytest.mark.simulator
def test_the_documented_program(root, tmp_path):
    program = re.search(r"```python\n(.*?)```", (root / "docs/simulator.md").read_text(), re.S)
    file = tmp_path / "matmul.py"
    file.write_text(program[1])
    ran = subprocess.run([sys.executable, file], check=True, capture_output=True, text=True)
    assert "Statistics(blocks=6" in ran.stdout
    assert "without a fence.proxy.async after it" in ran.stderr
