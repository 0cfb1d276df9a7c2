"""The checks of kernels: races, missing waits and fences, and their reports."""
