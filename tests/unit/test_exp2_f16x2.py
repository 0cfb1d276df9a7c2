"""The exponential in half precision: its constants, and the model of it that FP8's tests have."""

from __future__ import annotations

import torch
from hopper_attention.cute_kernels.softmax import exp2_f16x2
from support.fp8 import exp2_in_f16x2


def test_error_is_as_stated():
    """The error is that of all halves from the smallest normal one to P's largest."""
    x = torch.arange(-14 * 1024, 8 * 1024 + 1).double() / 1024
    error = exp2_in_f16x2(x) / torch.exp2(x) - 1
    assert error.abs().max() < 0.0053
    assert error.square().mean().sqrt() < 0.0032
    assert error.mean().abs() < 3e-5
    assert (error[::1024] == 0).all(), "powers of two are exact"


def test_parabola_is_made_of_halves():
    """`exp2_in_f16x2` has the same numbers: the kernels agree with it on the simulator."""
    for constant in exp2_f16x2.PARABOLA:
        assert float(torch.tensor(constant, dtype=torch.float16)) == constant


def test_below_the_smallest_is_nothing():
    assert (exp2_in_f16x2(torch.tensor([-15.0, -100.0, -torch.inf])) == 0).all()
    assert exp2_in_f16x2(torch.tensor([exp2_f16x2.SMALLEST + 1.0])) == 2.0**-14
