"""Measurements that others can repeat: what is measured, how, against whom, and how it is kept.

`workloads` are problems as data, `protocol` times implementations beside each other, `correctness`
checks them first, `results` is the file format, `compare`, `plots` and `report` read it; `overhead`
needs no GPU.  The peers and the committed data are in `hopper_attention.benchmarks`.
"""
