"""The parts of an SM beside its warps: memories, barriers, asynchronous copies, tensor cores."""
