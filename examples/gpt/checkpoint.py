"""Checkpoints: a folder for each step, with torch.distributed.checkpoint's shards and a JSON file.

What eight ranks wrote one can read, and the other way round.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gpt.model import GPT, GPTConfig
from hopper_attention.errors import UserError

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """The state of a run that is not a tensor."""

    step: int
    """Steps done."""
    position: int
    """Tokens of the stream that all ranks together have taken."""
    stream: str
    """The stream's fingerprint."""
    config: GPTConfig


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Called by all ranks.  The folder gets its name when it is complete: a crash leaves none."""
    target = folder / f"step_{progress.step:06d}"
    unfinished = folder / f".{target.name}.unfinished"
    state = _state(model, optimizer)
    with _one_process_is_fine():
        dcp.save(state, checkpoint_id=unfinished)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (unfinished / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    if dist.is_initialized():
        dist.barrier()
    return target


def latest(folder: Path) -> Path:
    """Raises UserError if there is none."""
    steps = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not steps:
        raise UserError(f"there is no checkpoint in {folder}")
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")))


def read_progress(checkpoint: Path) -> Progress:
    entries: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text())
    return Progress(**{**entries, "config": GPTConfig(**entries["config"])})


def restore(checkpoint: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    state = _state(model, optimizer)
    with _one_process_is_fine():
        dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def load_model(checkpoint: Path, device: torch.device) -> GPT:
    """For use, not for training."""
    model = GPT(read_progress(checkpoint).config).to(device).eval()
    state = {"model": model.state_dict()}
    with _one_process_is_fine():
        dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    return model


def _state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """torch warns of a missing process group whenever there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
