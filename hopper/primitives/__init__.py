"""Hopper's instructions, and the small pieces that several kernels are made of."""
