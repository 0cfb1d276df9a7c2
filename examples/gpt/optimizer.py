"""AdamW, its groups, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

BETAS = (0.9, 0.95)
FINAL_SHARE = 0.1
"""The share of the peak rate at the last step."""


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Matrices decay; the scales of norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=parameters[0].is_cuda)


def cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The share of the peak rate in step 0, 1, ...: up in a line, down in half a cosine."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2

    return share
