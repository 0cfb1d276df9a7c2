"""Names and numbers that kernels and host agree on.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

DTYPES = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
UNBOUNDED = 1 << 30
"""A window side or a chunk that hides nothing; sequences must be shorter."""

WORKSPACE_ROWS = 128
"""A sequence's rows start at a multiple of it in backward's workspace, and every kernel's block of
query rows divides it."""

BLOCK_ROWS = 128
"""Rows of one head that a block of the quantisation kernels takes.  Packed sequences start at
multiples of it among V's columns."""
SUM_ROWS = 256
"""Rows that a block of the kernel for sums of columns adds up."""
LEAST_DESCALE = 1e-12
"""The least descale: what is all zeros has this one."""
OCTAVES = 60
"""The most powers of two by which a block's descale lies below the largest of its head."""
LARGEST_E4M3 = 448.0
"""The greatest number of float8_e4m3fn."""
