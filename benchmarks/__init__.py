"""Workloads, peers and committed results of `hopper-attention bench`."""
