"""Every model class of the installed transformers, tiny and random, on hopper_attention and eager.

`configs` makes a class's configuration small, `inputs` what its forward takes, `outcomes` builds
the class three times (eager in float32, eager in bf16, ours in bf16; one set of weights), runs them
and judges; `python -m zoo` (in tests/) does so for all and writes docs/transformers.md.
"""
