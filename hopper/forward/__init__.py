"""The forward kernels: 16-bit and FP8."""
