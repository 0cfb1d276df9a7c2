"""A launch: kernels as lists of steps, the warps that run them, blocks, clusters, the scheduler."""
