"""Options of a simulated launch and the context manager that sets them."""

import contextlib
import contextvars
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_HAZARDS = ("raise", "warn", "off")


@dataclass(frozen=True)
class Options:
    """How a launch is simulated.

    seed: 0 is a friendly schedule (round robin, asynchronous operations complete soon and in
        order); every other seed picks a schedule with skewed warps and early, late or random
        completion.  Results do not depend on it unless the kernel has a race.
    hazards: what to do about a missing wait or fence: "raise", "warn" or "off".
    fp8_accumulator_bits: significant bits that FP8 WGMMA keeps of its sums, cut after every
        instruction; Hopper keeps about 14.  None: sums in f32, as the PTX documentation reads.
    """

    seed: int = 0
    hazards: str = "raise"
    fp8_accumulator_bits: int | None = None

    def __post_init__(self) -> None:
        bits = self.fp8_accumulator_bits
        if bits is not None and not 2 <= bits <= 24:
            raise ValueError(f"fp8_accumulator_bits must be 2 to 24 or None, got {bits}")
        if self.hazards not in _HAZARDS:
            raise ValueError(f"hazards must be one of {_HAZARDS}, got {self.hazards!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


_current: contextvars.ContextVar[Options | None] = contextvars.ContextVar(
    "hopper_attention_simulator", default=None
)


@dataclass(frozen=True, eq=False)
class _Block:
    """A ``with enabled()`` that was entered and not left; two with equal options are two."""

    thread: int
    options: Options


_open: list[_Block] = []
"""In the order in which they were entered."""


def _keep_own_blocks() -> None:
    """Forget the other threads' blocks in a forked process: only the thread that forked goes on."""
    _open[:] = [block for block in _open if block.thread == threading.get_ident()]


os.register_at_fork(after_in_child=_keep_own_blocks)


@contextlib.contextmanager
def enabled(
    seed: int = 0, hazards: str = "raise", fp8_accumulator_bits: int | None = None
) -> Iterator[Options]:
    """Run launches on the simulator inside the ``with`` block; arguments as for Options.

    The block is that of the thread or task that entered it.  Other threads have no part in its
    context, but while it lasts those that entered none themselves take it, too: what a pool of
    threads launches inside the block is simulated as well.
    """
    options = Options(seed, hazards, fp8_accumulator_bits)
    block = _Block(threading.get_ident(), options)
    token = _current.set(options)
    _open.append(block)
    try:
        yield options
    finally:
        _open.remove(block)
        _current.reset(token)


def is_enabled() -> bool:
    """True inside ``enabled()`` or when the environment has HOPPER_ATTENTION_SIMULATOR=1."""
    return _entered() is not None or os.environ.get("HOPPER_ATTENTION_SIMULATOR") == "1"


def current_options() -> Options:
    """Return the options of the innermost ``enabled()``, else the defaults."""
    return _entered() or Options()


def _entered() -> Options | None:
    """Return the innermost block of this thread or task, else the newest of another thread."""
    options = _current.get()
    if options is None and _open:
        me = threading.get_ident()
        return next((block.options for block in reversed(_open) if block.thread != me), None)
    return options
