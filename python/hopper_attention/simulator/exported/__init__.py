"""Object files that CuTe DSL exported: loaded, their CUDA calls answered, called with tensors."""
