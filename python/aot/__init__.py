"""Ahead-of-time compilation of the kernels.  Used by the build only; never installed.

`python -m aot` with `python/` on the path: `list` the selected instances, `compile` one of them to
an object file, write the C++ `registry` and the manifest of what was compiled; `flavour` tells for
which CUDA.  Only `compile` needs the CuTe DSL.
"""
