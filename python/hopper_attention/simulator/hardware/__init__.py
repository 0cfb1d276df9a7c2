"""The parts of an SM beside its warps: memories, tensor maps, barriers, asynchronous copies."""
