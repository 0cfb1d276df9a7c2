"""Kernels of several revisions beside each other in one process; README.md says how."""
