"""The backward kernels, and the one that finishes dQ."""
