"""Profiles of kernels: Nsight Compute, run and read, and timelines.

`ncu` runs the profiler on one problem (`target` is the program it runs), `report` reads what it
left, `summary` says what that means, `roofline` draws it.
"""
