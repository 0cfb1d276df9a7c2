"""Micro-benchmarks of what d64 forward may lose its clocks to; README.md says what each decides."""
