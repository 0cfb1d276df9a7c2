"""The quantisation kernels."""
