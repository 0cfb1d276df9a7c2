"""Micro-benchmarks: rates of single units, d64 in miniature; README.md says what each decides."""
