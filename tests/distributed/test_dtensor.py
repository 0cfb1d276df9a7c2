"""Sharding rules: attention of DTensors, on two processes that talk through gloo."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.distributed
def test_dtensor(root):
    program = root / "tests" / "distributed" / "programs" / "dtensor.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, str(program)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[:4000]
