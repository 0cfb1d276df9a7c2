from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt.attention import Kind
from gpt.model import GPTConfig
from train_gpt import Settings

MODEL = GPTConfig(layers=2, dim=32, heads=4, heads_kv=2, hidden=64, context=32)
SETTINGS = Settings(
    model=MODEL, steps=6, tokens=128, lr=1e-2, attention=Kind.SDPA, warmup=2,
    validate_every=3, validation_batches=1, sample_every=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Layers this small gain nothing from more, and wait for them where tests run beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings() -> Any:
    """`settings(steps=3)`: a run of a second, on the help topics, but for what is given."""
    return lambda **changes: replace(SETTINGS, **changes)
