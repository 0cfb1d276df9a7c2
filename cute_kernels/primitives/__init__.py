"""Arithmetic, instructions, memory, types and register fragments."""
