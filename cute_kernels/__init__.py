"""Architecture-neutral device code: softmax, masks, block ranges, sequence info, schedulers.

Everything here is CuTe DSL, or plain frozen dataclasses that work on traced values and on Python
integers alike, so that index arithmetic is tested on the host.
"""
