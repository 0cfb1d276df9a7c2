"""Names that kernels, their lists and the dispatcher agree on.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

DTYPES = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
