"""A run: tensors of a problem, checks against FP64, times, and the environment of it all."""
