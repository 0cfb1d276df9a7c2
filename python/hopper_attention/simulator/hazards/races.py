"""Happens-before on shared memory: races, reads before arrival, missing proxy fences.

Every warp of a cluster has a vector clock: what it knows of every agent.  Agents are the warps and
the mbarriers; an mbarrier's clock is its number of completed phases, so what a bulk load writes
belongs to (mbarrier, phase) and is visible to whoever has waited for that phase.

    release  arrive on an mbarrier or a barrier: hands over what the warp knows, ticks its clock
    acquire  a wait that succeeds: takes what all arrivals of the phase knew
    fence    fence.proxy.async: the asynchronous proxy sees the warp's stores up to here; known in a
             second vector that travels along the same edges

An access is a race if the last conflicting one is unknown to the accessing warp; this does not
depend on the order in which this run happened to execute them.  Not seen: races between lanes of
one warp, and order that is established by polling a flag in memory.
"""

from dataclasses import dataclass, field

import numpy as np

_NOBODY = 0xFFFF
_NEVER = 0xFFFFFFFF  # clock of a write that nobody may see yet
_GENERIC, _PROXY = 0, 1


@dataclass
class Sync:
    """The knowledge that a barrier hands from those who arrive to those who wait."""

    pending: np.ndarray
    released: np.ndarray

    def complete(self) -> None:
        np.maximum(self.released, self.pending, out=self.released)


class Clocks:
    """The vector clocks of a cluster's warps.  names: what reports call the agents."""

    def __init__(self, names: list[str]):
        self.names = names
        self.warps = warps = len(names)
        self.known = np.zeros((warps, 2, warps + 64), np.uint32)
        self.known[np.arange(warps), _GENERIC, np.arange(warps)] = 1
        self.fenced: dict[int, np.ndarray] = {}

    def new_agent(self, name: str) -> int:
        """Return the number of an agent beside the warps: an mbarrier."""
        self.names.append(name)
        if len(self.names) > self.known.shape[2]:
            self.known = _widen(self.known, 2 * len(self.names))
        return len(self.names) - 1

    def sync(self) -> Sync:
        shape = self.known.shape[1:]
        return Sync(np.zeros(shape, np.uint32), np.zeros(shape, np.uint32))

    def _fit(self, sync: Sync) -> None:
        width = self.known.shape[2]
        if sync.pending.shape[1] < width:
            sync.pending, sync.released = _widen(sync.pending, width), _widen(sync.released, width)

    def release(self, agents: np.ndarray, sync: Sync) -> None:
        self._fit(sync)
        np.maximum(sync.pending, self.known[agents].max(axis=0), out=sync.pending)
        self.known[agents, _GENERIC, agents] += np.uint32(1)

    def acquire(self, agents: np.ndarray, sync: Sync) -> None:
        self._fit(sync)
        self.known[agents] = np.maximum(self.known[agents], sync.released)

    def complete_phase(self, sync: Sync, agent: int, phase: int) -> None:
        """End an mbarrier's phase: its bulk loads' data is visible to waiters, by either proxy."""
        self._fit(sync)
        sync.complete()
        sync.released[:, agent] = phase

    def release_fence(self, agents: np.ndarray) -> None:
        """Keep the knowledge that a later relaxed arrival may hand over."""
        for agent in agents.tolist():
            self.fenced[agent] = self.known[agent].copy()
        self.known[agents, _GENERIC, agents] += np.uint32(1)

    def release_relaxed(self, agents: np.ndarray, sync: Sync) -> None:
        """Hand over at a relaxed arrival what was known at the warp's last fence."""
        self._fit(sync)
        width = self.known.shape[2]
        for agent in agents.tolist():
            if agent in self.fenced:
                np.maximum(sync.pending, _widen(self.fenced[agent], width), out=sync.pending)

    def fence(self, agents: np.ndarray) -> None:
        self.known[agents, _PROXY, agents] = self.known[agents, _GENERIC, agents]
        self.known[agents, _GENERIC, agents] += np.uint32(1)

    def now(self, agents: np.ndarray) -> np.ndarray:
        return self.known[agents, _GENERIC, agents]


SWIZZLE_ATOM = 1024
"""Bytes within which a swizzle permutes."""


def _widen(array: np.ndarray, width: int) -> np.ndarray:
    padding = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
    return np.pad(array, padding)


@dataclass
class PastReads:
    """Intervals that asynchronous operations have read, with who waited for that and when."""

    found: dict[tuple[int, int, tuple[int, ...]], tuple[np.ndarray, np.ndarray, str]] = field(
        default_factory=dict
    )
    bounds: np.ndarray | None = None

    def add(self, low: int, high: int, agents: np.ndarray, clocks: np.ndarray, text: str) -> None:
        key = low, high, tuple(agents.tolist())
        if key not in self.found:
            self.bounds = None
        self.found[key] = agents, clocks, text

    def overlapping(self, low: int, high: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
        if not self.found:
            return []
        if self.bounds is None:
            self.bounds = np.array([key[:2] for key in self.found])
        hits = np.flatnonzero((self.bounds[:, 0] < high) & (low < self.bounds[:, 1]))
        if not len(hits):
            return []
        entries = list(self.found.values())
        return [entries[k] for k in hits.tolist()]


@dataclass(frozen=True)
class Conflict:
    """Another agent's access that is not ordered before the present one."""

    kind: str  # "unwritten", "write" or "read"
    agent: int = -1
    line: int = 0
    by: int = -1  # the agent of the present access
    fenced: bool = True  # False: ordered, but a proxy fence is missing
    text: str = ""


class Shadow:
    """The last writer and readers of each piece of a block's shared memory, of ``grain`` bytes.

    grain is the smallest access of the kernel, so that neighbours do not disturb each other.
    ``even`` marks 16-byte pieces with one writer: bulk operations look at one unit of those.
    """

    def __init__(self, nbytes: int, grain: int, clocks: Clocks):
        self.grain, self.clocks = grain, clocks
        units = nbytes // grain
        self.writer = np.full(units, _NOBODY, np.uint16)
        self.written = np.zeros(units, np.uint32)
        self.line = np.zeros(units, np.int32)
        self.strong = np.zeros(units, np.bool_)
        self.readers = np.zeros((units, clocks.warps), np.uint32)
        self.even = np.ones(nbytes // 16, np.bool_)
        self.past_reads = PastReads()

    def reset(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.writer[:] = _NOBODY
        self.written[:] = 0
        self.readers[:] = 0
        self.even[:] = True
        self.past_reads = PastReads()

    def units(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        """Return the numbers of the units that each access covers, (..., units)."""
        first = addresses // self.grain
        return first[..., None] + np.arange(max(1, nbytes // self.grain))

    # --- ordinary accesses.  agents: one an address

    def read(self, agents: np.ndarray, units: np.ndarray, strong: bool = False) -> Conflict | None:
        agents = agents[..., None]
        writer, written = self.writer[units], self.written[units]
        if (writer == _NOBODY).any():
            unwritten = np.broadcast_to(agents, units.shape)[writer == _NOBODY]
            return Conflict("unwritten", by=int(unwritten[0]))
        seen = self.clocks.known[agents, _GENERIC, writer] >= written
        if strong:
            seen |= self.strong[units]
        self.readers[units, agents] = self.clocks.now(agents)
        return None if seen.all() else self._unseen(units, seen, agents)

    def write(
        self, agents: np.ndarray, units: np.ndarray, line: int, strong: bool = False
    ) -> Conflict | None:
        conflict = self._before_write(agents[..., None], units, strong)
        owners = np.broadcast_to(agents[..., None], units.shape)
        self.writer[units] = owners
        self.written[units] = self.clocks.now(owners)
        self.line[units] = line
        self.strong[units] = strong
        self.even[units * self.grain >> 4] = units.shape[-1] * self.grain >= 16
        return conflict

    def _before_write(self, agents: np.ndarray, units: np.ndarray, strong: bool):
        writer, written = self.writer[units], self.written[units]
        safe = np.where(writer == _NOBODY, 0, writer)
        seen = (writer == _NOBODY) | (self.clocks.known[agents, _GENERIC, safe] >= written)
        if strong:
            seen |= self.strong[units]
        if not seen.all():
            return self._unseen(units, seen, agents)
        known = self.clocks.known[agents, _GENERIC, : self.clocks.warps]
        unseen = self.readers[units] > known
        if unseen.any() and not strong:
            first = tuple(np.argwhere(unseen)[0])
            by = np.broadcast_to(agents, units.shape)[first[:-1]]
            return Conflict("read", int(first[-1]), by=int(by))
        if not self.past_reads.found:
            return None
        for agent in np.unique(agents):
            mine = units[np.broadcast_to(agents, units.shape) == agent] * self.grain
            for low, high in _stretches(mine):
                found = self._unordered_past(low, high + self.grain, agent)
                if found:
                    return found
        return None

    def _unseen(self, units: np.ndarray, seen: np.ndarray, agents: np.ndarray) -> Conflict:
        at = units[~seen].flat[0]
        by = int(np.broadcast_to(agents, units.shape)[~seen].flat[0])
        return Conflict("write", int(self.writer[at]), int(self.line[at]), by=by)

    def _unordered_past(self, low: int, high: int, agent: int) -> Conflict | None:
        for readers, clocks, text in self.past_reads.overlapping(low, high):
            unseen = clocks > self.clocks.known[agent, _GENERIC, readers]
            if unseen.any():
                return Conflict("read", int(readers[unseen][0]), text=text, by=int(agent))
        return None

    # --- bulk and wgmma accesses, on 16-byte pieces

    def bulk_read(self, agents: np.ndarray, pieces: np.ndarray | slice) -> Conflict | None:
        """Check a read by the asynchronous proxy: it sees what agents know and what is fenced."""
        step = 16 // self.grain
        even = self.even[pieces].all()
        units = np.arange(len(self.even))[pieces] if isinstance(pieces, slice) else pieces
        units = units * step if even else units[..., None] * step + np.arange(step)
        writer, written = self.writer[units], self.written[units]
        if (writer == _NOBODY).any():
            return Conflict("unwritten", by=int(agents[0]))
        known = self.clocks.known[agents]
        least = known.min(axis=0) if len(agents) > 1 else known[0]
        fenced = least[_PROXY, writer] >= written
        if fenced.all():
            return None
        at = units[~fenced].flat[0]
        owner, line, clock = int(self.writer[at]), int(self.line[at]), self.written[at]
        by = int(agents[np.argmin(known[:, _PROXY, owner])])
        ordered = bool(least[_GENERIC, owner] >= clock)
        return Conflict("write", owner, line, by=by, fenced=not ordered)

    def bulk_write(
        self, agent: int, low: int, high: int, owner: int, clock: int, line: int
    ) -> Conflict | None:
        """Check a write that ``agent`` issues and that ``owner`` completes at ``clock``."""
        units = slice(low // self.grain, high // self.grain)
        writer, written = self.writer[units], self.written[units]
        known = self.clocks.known[agent, _GENERIC]
        seen = known[np.where(writer == _NOBODY, 0, writer)] >= written
        seen |= writer == _NOBODY
        conflict: Conflict | None
        if not seen.all():
            conflict = self._unseen(np.arange(units.start, units.stop), seen, np.array([agent]))
        elif (unread := self.readers[units].max(axis=0) > known[: self.clocks.warps]).any():
            conflict = Conflict("read", int(np.argmax(unread)), by=agent)
        else:
            conflict = self._unordered_past(low, high, agent)
        writer[:], written[:] = owner, clock
        self.line[units], self.strong[units] = line, False
        self.even[low >> 4 : high + 15 >> 4] = True
        return conflict

    def remote_write(
        self, agents: np.ndarray, units: np.ndarray, line: int, owner: int, clock: int
    ) -> Conflict | None:
        """Check a write of st.async, which those see who wait for that phase of the mbarrier."""
        conflict = self.write(agents, units, line)
        self.writer[units], self.written[units] = owner, clock
        return conflict

    # --- cp.async: nobody sees it before the wait of the warp that issued it

    def hide(self, units: np.ndarray) -> None:
        self.written[units] = _NEVER

    def show(self, agents: np.ndarray, units: np.ndarray) -> None:
        """Show what warps wrote and waited for, unless another has overwritten it since."""
        owners = np.broadcast_to(agents[..., None], units.shape)
        mine = (self.writer[units] == owners) & (self.written[units] == _NEVER)
        self.written[units[mine]] = self.clocks.now(owners)[mine]


def _stretches(addresses: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, last) of what lies together: a tile's swizzle spans may be far apart."""
    addresses = np.unique(addresses)
    gaps = np.flatnonzero(np.diff(addresses) >= SWIZZLE_ATOM)
    firsts, lasts = np.append(0, gaps + 1), np.append(gaps, len(addresses) - 1)
    return list(zip(addresses[firsts].tolist(), addresses[lasts].tolist()))


def smallest_access(instructions) -> int:
    """Return the bytes of the smallest access that may go to shared memory: 1, 2 or 4."""
    smallest = 4
    for instruction in instructions:
        parts = instruction.parts
        if parts[0] in ("ld", "st", "atom", "red") and not {"global", "param"} & set(parts[1:3]):
            digits = "".join(c for c in parts[-1] if c.isdigit())
            if digits in ("8", "16"):
                smallest = min(smallest, int(digits) // 8)
    return smallest
