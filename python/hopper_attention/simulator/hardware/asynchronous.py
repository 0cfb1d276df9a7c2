"""State that proceeds beside the warps: barriers, and asynchronous operations under way.

An asynchronous operation poisons its destination when issued and takes effect at a time drawn from
the seed, between its issue and the wait that orders it:

    friendly (seed 0)  soon, in order
    early              at once: finds readers and writers that were not finished when it was issued
    late               only when nothing else can run or a wait demands it: finds missing waits
    random             after a random number of scheduler slices
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hopper_attention.simulator.errors import BarrierError
from hopper_attention.simulator.hazards.checks import SharedAccess
from hopper_attention.simulator.hazards.races import Clocks, Sync

_MAX_TRANSACTIONS = (1 << 20) - 1


@dataclass
class Mbarrier:
    """An mbarrier object in shared memory."""

    address: int
    expected: int
    pending: int
    transactions: int = 0
    phase: int = 0
    unfenced_warp: int = -1  # initialised by this warp, without a fence since
    clocks: Clocks | None = None
    sync: Sync | None = None
    agent: int = -1
    creator: tuple[int, int] = (0, 0)  # agent and clock of mbarrier.init

    def arrive(self, count: int = 1) -> None:
        if count > self.pending:
            raise BarrierError(
                f"mbarrier {self.address:#x}: {count} arrivals with {self.pending} of "
                f"{self.expected} pending in phase {self.phase}"
            )
        self.pending -= count
        self._advance()

    def expect(self, nbytes: int) -> None:
        self.transactions += nbytes
        if self.transactions > _MAX_TRANSACTIONS:
            raise BarrierError(f"mbarrier {self.address:#x}: transaction count overflows")

    def complete(self, nbytes: int) -> None:
        self.transactions -= nbytes
        self._advance()

    def _advance(self) -> None:
        if self.pending:
            return
        if self.transactions < 0:
            raise BarrierError(
                f"mbarrier {self.address:#x}: {-self.transactions} bytes arrived beyond what "
                f"expect_tx announced in phase {self.phase}"
            )
        if self.transactions == 0:
            self.phase += 1
            self.pending = self.expected
            if self.clocks is not None and self.sync is not None:
                self.clocks.complete_phase(self.sync, self.agent, self.phase)

    def passed(self, parity: int) -> bool:
        """True if the phase of this parity has completed."""
        return self.phase & 1 != parity & 1

    def __str__(self) -> str:
        return (
            f"mbarrier {self.address:#x}: phase {self.phase} (parity {self.phase & 1}), "
            f"{self.pending} of {self.expected} arrivals and {self.transactions} bytes outstanding"
        )


@dataclass
class NamedBarrier:
    """A barrier of bar.sync and bar.arrive, which counts threads."""

    number: int
    count: int = 0
    arrived: int = 0
    generation: int = 0
    whole_block: bool = False  # no count given: all threads that have not exited
    sync: Sync | None = None

    def arrive(self, threads: int, count: int, whole_block: bool) -> None:
        self.whole_block = whole_block
        if self.arrived and self.count != count:
            raise BarrierError(
                f"barrier {self.number}: arrival with count {count}, others came with {self.count}"
            )
        if count % 32 or self.arrived + threads > count:
            raise BarrierError(
                f"barrier {self.number}: {threads} threads arrive at {self.arrived} of {count}"
            )
        self.arrived += threads
        self.resize(count)

    def resize(self, count: int) -> None:
        self.count = count
        if self.arrived == count:
            self.arrived = 0
            self.generation += 1
            if self.sync is not None:
                self.sync.complete()

    def __str__(self) -> str:
        return (
            f"barrier {self.number}: {self.arrived} of {self.count} threads, "
            f"generation {self.generation}"
        )


@dataclass
class ClusterBarrier:
    """The barrier of a cluster: every thread arrives, then waits."""

    count: int = 0
    arrived: int = 0
    generation: int = 0
    arrivals: dict[int, int] = field(default_factory=dict)  # thread -> generation it arrived in
    sync: Sync | None = None

    def arrive(self, threads: list[int]) -> None:
        for thread in threads:
            if self.arrivals.get(thread, -1) == self.generation:
                raise BarrierError("barrier.cluster.arrive twice in a phase")
            self.arrivals[thread] = self.generation
        self.arrived += len(threads)
        self.resize(self.count)

    def resize(self, count: int) -> None:
        self.count = count
        if self.arrived and self.arrived >= count:
            self.arrived = 0
            self.generation += 1
            if self.sync is not None:
                self.sync.complete()

    def passed(self, threads: list[int]) -> bool:
        if any(thread not in self.arrivals for thread in threads):
            raise BarrierError("barrier.cluster.wait without arrive")
        return all(self.arrivals[thread] < self.generation for thread in threads)

    def __str__(self) -> str:
        return (
            f"cluster barrier: {self.arrived} of {self.count} threads, generation {self.generation}"
        )


@dataclass(eq=False)
class Event:
    """An asynchronous operation under way."""

    due: float
    effect: Callable[[], None]
    text: str
    done: bool = False
    access: SharedAccess | None = None
    written: "Event | None" = None  # of a bulk store: its second half

    def complete(self) -> None:
        if not self.done:
            self.done = True
            self.effect()


class Schedule:
    """The decisions of a seed: completion times, slice lengths and which unit is slow."""

    _FOREVER = float("inf")

    def __init__(self, seed: int, block: int):
        self.random = random.Random(seed * 1_000_003 + block)
        modes = ("friendly", "late", "early", "random")
        self.mode = modes[0] if seed == 0 else modes[1 + (seed - 1) % 3]
        self.now = 0
        self.slow: object = None
        self._until = 0

    def delay(self) -> float:
        """Return the slices until an operation issued now takes effect; 0 is at once."""
        if self.mode == "friendly":
            return 1
        if self.mode == "early":
            return 0
        if self.mode == "late":
            return self._FOREVER
        return self.random.choice((0, 1, 2, 5, 20, 100, self._FOREVER))

    def choose(self, units: list) -> tuple[Any, int]:
        """Return the unit to run next and for how many steps."""
        self.now += 1
        if self.mode == "friendly":
            return units[self.now % len(units)], 200
        if self.now >= self._until:
            # One warpgroup falls behind for a while: uniform shuffling misses most races.
            self.slow = self.random.choice(units).warpgroup
            self._until = self.now + self.random.choice((5, 20, 100, 400))
        fast = [unit for unit in units if unit.warpgroup is not self.slow]
        if fast and self.random.random() < 0.95:
            return self.random.choice(fast), self.random.choice((1, 2, 3, 10, 200))
        # Short steps: the others must be able to catch up with it at every place.
        return self.random.choice(units), self.random.choice((1, 2, 3, 10))


class Events:
    """The asynchronous operations of a cluster, in order of issue."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.pending: list[Event] = []

    def issue(self, effect: Callable[[], None], text: str) -> Event:
        event = Event(0, effect, text)
        self.schedule_event(event)
        return event

    def schedule_event(self, event: Event) -> None:
        delay = self.schedule.delay()
        event.due = self.schedule.now + delay
        if delay == 0:
            event.complete()
        else:
            self.pending.append(event)

    def run_due(self) -> bool:
        """Complete what is due.  True if anything was."""
        now = self.schedule.now
        due = [event for event in self.pending if event.due <= now]
        if due:
            self.pending = [event for event in self.pending if event.due > now]
            for event in due:
                event.complete()
        return bool(due)

    def run_one(self) -> bool:
        """Complete one operation because nothing else can proceed.  False if there is none."""
        self.pending = [event for event in self.pending if not event.done]
        if not self.pending:
            return False
        at = 0
        if self.schedule.mode != "friendly":
            at = self.schedule.random.randrange(len(self.pending))
        self.pending.pop(at).complete()
        return True


@dataclass
class BulkGroups:
    """The cp.async.bulk groups of one thread: operations not committed, then groups in order."""

    thread: int = 0
    open: list[Event] = field(default_factory=list)
    groups: list[list[Event]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int, only_read: bool) -> list[SharedAccess]:
        """Complete all but the last ``keep`` groups; returns the reads that are over now."""
        count = max(0, len(self.groups) - keep)
        events = [event for group in self.groups[:count] for event in group]
        over = []
        for event in events:
            event.complete()
            if event.access is not None:
                over.append(event.access)
                event.access = None
            if not only_read and event.written is not None:
                event.written.complete()
        if not only_read:
            del self.groups[:count]
        return over


@dataclass(eq=False)
class Copy:
    """One cp.async of some lanes.  units: those of the shadow that each lane writes."""

    warps: np.ndarray  # of each lane
    units: np.ndarray | None
    event: Event


@dataclass
class CopyGroups:
    """The cp.async groups of one warp."""

    open: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def take(self, keep: int, everything: bool) -> list[Copy]:
        """Return the copies that a wait is for; they are not tracked any longer."""
        count = max(0, len(self.groups) - keep)
        taken = [copy for group in self.groups[:count] for copy in group]
        del self.groups[:count]
        if everything:
            taken += self.open
            self.open = []
        return taken

    def all(self) -> list[Copy]:
        return [copy for group in self.groups for copy in group] + self.open
