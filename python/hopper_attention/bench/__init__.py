"""Measurements that others can repeat: what is measured, how, against whom, and how it is kept.

`data` holds problems, the rows of a run and their file.  `measure` checks and times implementations
on a GPU; its `overhead` needs none.  `report` reads what runs left.  `measure` and `report` import
`data` and not each other.  The peers and the committed data are in `hopper_attention.benchmarks`.
"""
