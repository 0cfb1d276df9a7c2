"""Which kernels a call runs: Hopper's, Ampere's, or none, the reference implementation.

What a GPU gets by itself is `choose`'s table.  Another choice is forced for a process by the
environment variable HOPPER_ATTENTION_BACKEND, read when the package is imported, or inside
`with backend(name):`, for calls of that thread or task.  An operator in a compiled graph is a call
as well: it is decided when it runs, not when it was traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import simulator
from hopper_attention.cute_kernels.hardware import ARCHITECTURES, SHARED_MEMORY
from hopper_attention.dispatch import manifest

VARIABLE = "HOPPER_ATTENTION_BACKEND"
HOPPER, AMPERE, REFERENCE = "hopper", "ampere", "reference"
BACKENDS = (HOPPER, AMPERE, REFERENCE)


@dataclass(frozen=True, eq=False)
class Target:
    """Whose kernels, and for what; one object each, so that plans are quickly found by it."""

    kernels: str
    architecture: str = ""
    """The architecture that its instances are compiled for."""
    shared_memory: int = 0
    """Bytes that a block may have."""
    launches: bool = True
    """False: the reference computes everything that a kernel exists for, compiled or not."""


@functools.cache
def choose(capability: tuple[int, int], forced: str | None = None, launches: bool = True) -> Target:
    """The kernels for a GPU of this compute capability.

        capability          by itself    may be forced
        9.0                 hopper       ampere, compiled for sm_90; reference
        8.0, 8.6, 8.7, 8.9  ampere       reference

    Raises NotImplementedError for everything else.
    """
    if forced == REFERENCE:
        return Target(REFERENCE)
    number = ".".join(map(str, capability))
    if capability not in ARCHITECTURES:
        have = ", ".join(".".join(map(str, known)) for known in ARCHITECTURES)
        raise NotImplementedError(
            f"compute capability {number}; there are kernels for {have}; use "
            f"{VARIABLE}={REFERENCE}, or CPU tensors, for the reference implementation"
        )
    if capability == (9, 0) and forced != AMPERE:
        return Target(HOPPER, "sm_90a", SHARED_MEMORY[capability], launches)
    if forced == HOPPER:
        raise NotImplementedError(
            f"compute capability {number}; Hopper's kernels need 9.0 (H100, H200); use "
            f"{VARIABLE}={AMPERE}, or leave it unset"
        )
    return Target(AMPERE, ARCHITECTURES[capability], SHARED_MEMORY[capability], launches)


SIMULATED = {HOPPER: (9, 0), AMPERE: (8, 0)}
"""The GPU that the simulator stands for, by what is forced, or else by what was built."""


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "hopper_attention_backend",
    default=_known(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None,
)
forced = _forced.get
"""The backend that is forced here, or None."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Calls inside run on "hopper", "ampere" or "reference", and so do their gradients.

    What a device has no such kernels for raises NotImplementedError.  CPU tensors go to the
    reference anyhow, unless the simulator is enabled.

    Raises ValueError for another name.
    """
    with restored(_known(name)):
        yield


@contextlib.contextmanager
def restored(name: str | None) -> Iterator[None]:
    """Restore the choice `name` of forward, for gradients, which other threads may compute."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def target_for(tensor: Tensor) -> Target:
    """Return the target of a call with `tensor`.  Raises NotImplementedError as `choose`.

    CPU tensors launch kernels inside `simulator.enabled()` only.
    """
    if tensor.is_cuda:
        return of_device(tensor.get_device(), forced())
    name = forced()
    return choose(SIMULATED.get(name or _built(), (9, 0)), name, simulator.is_enabled())


@functools.cache
def _built() -> str:
    """Whose kernels stand behind CPU tensors: Hopper's, unless the build has Ampere's alone."""
    families = {instance.family for instance in manifest.instances().values()}
    return AMPERE if "ampere_forward" in families and "forward" not in families else HOPPER


@functools.cache
def of_device(index: int, forced: str | None) -> Target:
    """Return the target of a GPU, which messages name."""
    try:
        return choose(torch.cuda.get_device_capability(index), forced)
    except NotImplementedError as reason:
        name = torch.cuda.get_device_name(index)
        raise NotImplementedError(f"cuda:{index} ({name}) has {reason}") from None


def target_for_fp8(tensor: Tensor) -> Target:
    """Like `target_for`; also raises NotImplementedError for Ampere's kernels, which have no FP8.

    Not where they were only built: CPU tensors that launch nothing need no kernel.
    """
    target = target_for(tensor)
    if target.kernels == AMPERE and not target.launches and forced() is None:
        return choose(SIMULATED[HOPPER], HOPPER, launches=False)
    if target.kernels == AMPERE:
        raise NotImplementedError(
            "FP8: only Hopper's kernels have it; use bfloat16 or float16, or backend "
            f'"{REFERENCE}" ({VARIABLE})'
        )
    return target


SIMULATED_SMS = 132
"""Multiprocessors of the simulated GPU, as many as an H200 has."""


class Executor(enum.Enum):
    CUDA = "CUDA"
    SIMULATOR = "simulator"
    REFERENCE = "reference"


def executor_for(tensor: Tensor, name: str = "q") -> Executor:
    """Raises NotImplementedError for a device without kernels, or without those that are forced."""
    if forced() == REFERENCE:
        return Executor.REFERENCE
    if tensor.is_cuda:
        check_gpu(tensor.device)
        return Executor.CUDA
    if tensor.is_cpu:
        return Executor.SIMULATOR if simulator.is_enabled() else Executor.REFERENCE
    raise NotImplementedError(
        f"{name} is on {tensor.device}; supported: a Hopper or Ampere GPU (cuda), or the CPU for "
        "reference and simulator"
    )


def check_gpu(device: torch.device) -> None:
    """Raises NotImplementedError for one without kernels."""
    of_device(device.index, forced())


def check_margin(tensor: Tensor, sm_margin: int) -> None:
    """Raises ValueError where no multiprocessor would be left: small GPUs, slices of a GPU."""
    device = tensor.get_device()
    count = multiprocessors(device) if tensor.is_cuda else SIMULATED_SMS
    if sm_margin >= count:
        raise ValueError(
            f"sm_margin must be below {count}, the multiprocessors of {tensor.device}; got "
            f"{sm_margin}"
        )


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
