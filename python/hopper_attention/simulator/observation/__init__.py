"""Recordings of what warps do, and the timeline drawn from them."""
