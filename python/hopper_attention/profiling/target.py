"""The program under the profiler: `python -m hopper_attention.profiling.target PROBLEM CALLS`."""

from __future__ import annotations

import sys

import torch

from hopper_attention.bench.data.workloads import load_problems
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.benchmarks.peers import PEERS


def main(problem: str, calls: int) -> None:
    inputs = Inputs.make(load_problems([problem])[0], torch.device("cuda"))
    prepared = PEERS[0].prepare(inputs)
    for _ in range(calls):
        prepared.call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
