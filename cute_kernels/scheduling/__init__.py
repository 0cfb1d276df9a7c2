"""Sequences of a batch, and which block computes which tile."""
