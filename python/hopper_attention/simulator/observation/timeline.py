"""A run on a modelled SM: when each warp computes, waits, loads and multiplies.

The model replays a recording with one queue a unit, first come first served; no unit is faster than
its documented rate.  It is meant to show structure (who overlaps what, which unit binds), and its
constants stand in one table to be calibrated on hardware.
"""

import heapq
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hopper_attention.simulator.observation.recording import Step, Trace

SUB_CORES = 4
_CHUNK = 16  # issue slots after which another warp of the sub-core has its turn


@dataclass(frozen=True)
class CostModel:
    """The clocks of one SM.  Rates are those of H100 and H200; latencies are estimates."""

    slots_per_clock: float = 1.0  # warp instructions, each sub-core
    mufu_clocks: float = 8.0  # a warp instruction of ex2, rcp, ...: 4 lanes a clock and sub-core
    wgmma_clocks_per_column: float = 0.5  # m64nNk(32 bytes): N / 2
    wgmma_latency: float = 32.0  # from the last product to the end of wait_group
    shared_bytes_per_clock: float = 128.0
    load_bytes_per_clock: float = 64.0  # L2 to shared memory, each SM
    load_latency: float = 700.0
    store_bytes_per_clock: float = 64.0
    store_latency: float = 400.0
    issue_bulk: float = 20.0  # a TMA instruction's own time in its warp
    barrier_latency: float = 20.0  # from the last arrival to the first waiting warp


@dataclass(frozen=True)
class Range:
    """A stretch of a warp's time.

    kind: softmax (runs with MUFU work), arithmetic, wait, wgmma, load or store.
    """

    warp: int
    kind: str
    start: float
    end: float
    line: int = 0


@dataclass
class _Warp:
    number: int
    steps: list[Step]
    at: int = 0
    left: float = 0.0  # issue slots of the present step that are still to come
    blocked_since: float = -1.0
    open: list[float] = field(default_factory=list)  # ends of products not committed
    groups: list[float] = field(default_factory=list)
    stores: list[float] = field(default_factory=list)


class Timeline:
    """The replay of one block."""

    def __init__(self, trace: Trace, model: CostModel | None = None):
        self.trace, self.model = trace, model or CostModel()
        self.ranges: list[Range] = []
        self.busy: defaultdict[str, float] = defaultdict(float)
        self._starts: dict[tuple[int, int], list[float]] = {}  # (warp, line) of each wgmma
        self._free: defaultdict[tuple[str, int], float] = defaultdict(
            float
        )  # unit -> time it is free from
        self._remaining = dict(trace.contributions)
        self._ready: dict[tuple[int, int], float] = {}
        self._sleeping: dict[tuple[int, int], list[_Warp]] = {}
        self._queue: list[tuple[float, int, _Warp]] = []
        for number, steps in enumerate(trace.warps):
            self._push(0.0, _Warp(number, steps))
        while self._queue:
            time, _, warp = heapq.heappop(self._queue)
            if warp.at < len(warp.steps):
                self._run(time, warp)
        self.ranges = _joined(self.ranges)
        self.clocks = max((r.end for r in self.ranges), default=0.0)

    # --- results

    @property
    def clocks_per_tile(self) -> float | None:
        """The median distance of executions of the wgmma that a warp executes most, if any."""
        if not self._starts:
            return None
        most = max(len(times) for times in self._starts.values())
        if most < 2:
            return None
        distances = [
            b - a
            for times in self._starts.values()
            if len(times) == most
            for a, b in zip(times, times[1:], strict=False)
        ]
        return median(distances)

    @property
    def utilisation(self) -> dict[str, float]:
        """The fraction of the block's clocks that each unit is busy."""
        if not self.clocks:
            return {}
        many = {"issue": SUB_CORES, "mufu": SUB_CORES, "tensor": SUB_CORES}
        units = ("issue", "mufu", "tensor", "shared memory", "loads", "stores")
        return {u: self.busy[u] / (self.clocks * many.get(u, 1)) for u in units}

    def summary(self) -> dict[str, object]:
        return {
            "kernel": self.trace.kernel,
            "block": list(self.trace.ctaid),
            "clocks": round(self.clocks),
            "clocks_per_tile": self.clocks_per_tile,
            "utilisation": {name: round(x, 3) for name, x in self.utilisation.items()},
        }

    def overlap(self, first: int, second: int) -> float:
        """Return the share of one warp in softmax alone, of the time in which either is."""
        marks = []
        for warp in (first, second):
            for r in self.ranges:
                if r.warp == warp and r.kind == "softmax":
                    marks += [(r.start, 1), (r.end, -1)]
        both = either = level = 0.0
        last = 0.0
        for time, change in sorted(marks):
            both += (time - last) * (level == 2)
            either += (time - last) * (level >= 1)
            level, last = level + change, time
        return 1 - both / either if either else 0.0

    # --- replay

    def _push(self, time: float, warp: _Warp) -> None:
        heapq.heappush(self._queue, (time, warp.number, warp))

    def _reserve(self, unit: str, index: int, time: float, clocks: float) -> float:
        """Occupy a unit from when it is free; returns the end."""
        end = max(time, self._free[unit, index]) + clocks
        self._free[unit, index] = end
        self.busy[unit] += clocks
        return end

    def _mark(self, warp: _Warp, kind: str, start: float, end: float, line: int = 0) -> None:
        if end > start:
            self.ranges.append(Range(warp.number, kind, start, end, line))

    def _run(self, time: float, warp: _Warp) -> None:
        step, model = warp.steps[warp.at], self.model
        core = warp.number % SUB_CORES
        if step.kind == "work":
            if self._work(time, warp, step):
                return
            warp.at += 1
            return
        warp.at += 1
        if step.kind == "wgmma":
            n, nbytes = step.value
            self._starts.setdefault((warp.number, step.line), []).append(time)
            clocks = n * model.wgmma_clocks_per_column
            end = self._reserve("tensor", core, time, clocks)
            self.busy["shared memory"] += nbytes / model.shared_bytes_per_clock
            self._mark(warp, "wgmma", end - clocks, end, step.line)
            warp.open.append(end)
            time = self._reserve("issue", core, time, 1 / model.slots_per_clock)
        elif step.kind == "commit":
            warp.groups.append(max(warp.open, default=0.0) + model.wgmma_latency)
            warp.open = []
        elif step.kind == "wgmma_wait":
            time = self._until(time, warp, warp.groups, step)
        elif step.kind == "load":
            end = self._reserve("loads", 0, time, step.value / model.load_bytes_per_clock)
            self.busy["shared memory"] += step.value / model.shared_bytes_per_clock
            self._mark(warp, "load", time, end + model.load_latency, step.line)
            self._contribute(step.key, end + model.load_latency)
            time += model.issue_bulk
        elif step.kind == "store":
            end = self._reserve("stores", 0, time, step.value / model.store_bytes_per_clock)
            self.busy["shared memory"] += step.value / model.shared_bytes_per_clock
            self._mark(warp, "store", time, end + model.store_latency, step.line)
            warp.stores.append(end + model.store_latency)
            time += model.issue_bulk
        elif step.kind == "store_wait":
            time = self._until(time, warp, warp.stores, step)
        elif step.kind == "arrive":
            self._contribute(step.key, time)
        elif not self._wait(time, warp, step):
            return
        self._push(time, warp)

    def _until(self, time: float, warp: _Warp, ends: list[float], step: Step) -> float:
        """Wait for all but the last ``step.value`` of these."""
        count = max(0, len(ends) - step.value)
        end = max([time, *ends[:count]])
        del ends[:count]
        self._mark(warp, "wait", time, end)
        return end

    def _work(self, time: float, warp: _Warp, step: Step) -> bool:
        """Replay a piece of a straight run; True while there is more."""
        work, model, core = step.value, self.model, warp.number % SUB_CORES
        if not work.slots:
            self._push(time, warp)
            return False
        left = warp.left or work.slots
        piece = min(left, _CHUNK)
        share = piece / work.slots
        end = self._reserve("issue", core, time, piece / model.slots_per_clock)
        if work.mufu:
            clocks = work.mufu * share * model.mufu_clocks
            end = max(end, self._reserve("mufu", core, time, clocks))
        if work.shared_bytes:
            clocks = work.shared_bytes * share / model.shared_bytes_per_clock
            end = max(end, self._reserve("shared memory", 0, time, clocks))
        self._mark(warp, "softmax" if work.mufu else "arithmetic", time, end, work.line)
        warp.left = left - piece
        self._push(end, warp)
        return warp.left > 0

    def _contribute(self, key, time: float) -> None:
        self._ready[key] = max(self._ready.get(key, 0.0), time)
        self._remaining[key] -= 1
        if self._remaining[key] == 0:
            for warp in self._sleeping.pop(key, []):
                wake = max(self._ready[key], warp.blocked_since) + self.model.barrier_latency
                self._mark(warp, "wait", warp.blocked_since, wake)
                self._push(wake, warp)

    def _wait(self, time: float, warp: _Warp, step: Step) -> bool:
        """Replay a wait; False if the warp sleeps until the barrier's phase ends."""
        key = step.key
        assert key is not None
        if self._remaining.get(key, 0) > 0:
            warp.blocked_since = time
            self._sleeping.setdefault(key, []).append(warp)
            return False
        ready = self._ready.get(key, 0.0)
        if ready > time:
            warp.blocked_since = time
            self._mark(warp, "wait", time, ready)
            self._push(ready, warp)
            return False
        return True

    # --- pictures

    def save_chrome(self, path: str | Path) -> None:
        """Write trace events for chrome://tracing and ui.perfetto.dev; a clock is a microsecond.

        A row a warp; what runs beside it (wgmma, bulk copies) has a row of its own under it.
        """
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "name": "process_name",
             "args": {"name": f"{self.trace.kernel} block {self.trace.ctaid}"}},
        ]  # fmt: skip
        rows = {"load": 1, "store": 1, "wgmma": 2}
        names = {0: "", 1: " bulk copies", 2: " wgmma"}
        seen = set()
        for r in self.ranges:
            row = 3 * r.warp + rows.get(r.kind, 0)
            if row not in seen:
                seen.add(row)
                label = f"warp {r.warp}{names[row % 3]}"
                events.append({"ph": "M", "pid": 0, "tid": row, "name": "thread_name",
                               "args": {"name": label}})  # fmt: skip
            events.append({"ph": "X", "pid": 0, "tid": row, "name": r.kind, "ts": r.start,
                           "dur": r.end - r.start, "args": {"ptx_line": r.line}})  # fmt: skip
        document = {"traceEvents": events, "otherData": self.summary()}
        Path(path).write_text(json.dumps(document))

    def save_png(self, path: str | Path, window: tuple[float, float] | None = None) -> None:
        """Draw one row a warp that does anything: its own time below, wgmma and copies above.

        Raises ImportError without matplotlib.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        low, high = window or (0.0, self.clocks)
        shown = [r for r in self.ranges if r.end > low and r.start < high]
        warps = sorted({r.warp for r in shown if r.kind != "arithmetic" or r.end - r.start > 99})
        figure = Figure(figsize=(11, 0.9 + 0.34 * len(warps)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for row, warp in enumerate(warps):
            for kind, colour in _COLOURS.items():
                bars = [
                    (max(r.start, low), min(r.end, high) - max(r.start, low))
                    for r in shown
                    if r.warp == warp and r.kind == kind
                ]
                beside = kind in ("wgmma", "load", "store")
                axes.broken_barh(bars, (row - (0.4 if beside else 0.05), 0.35), color=colour)
        axes.set_yticks(range(len(warps)), [f"warp {warp}" for warp in warps], fontsize=7)
        axes.set_xlim(low, high)
        axes.invert_yaxis()
        axes.set_xlabel(f"clocks (model); {self.trace.kernel}, block {self.trace.ctaid}")
        handles = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
        axes.legend(handles=handles, ncols=6, fontsize=7, loc="lower center", frameon=False,
                    bbox_to_anchor=(0.5, 1.0))  # fmt: skip
        figure.savefig(path, dpi=110)


_COLOURS = {
    "softmax": "#d9822b", "arithmetic": "#9db4c0", "wait": "#e6e6e6", "wgmma": "#2a7f62",
    "load": "#3b6fb6", "store": "#8c6bb1",
}  # fmt: skip


def _joined(ranges: list[Range]) -> list[Range]:
    """Join ranges that touch and are of one kind."""
    result: list[Range] = []
    last: dict[tuple[int, str], int] = {}
    for r in sorted(ranges, key=lambda r: r.start):
        at = last.get((r.warp, r.kind))
        joins = r.kind not in ("load", "store") and at is not None
        if joins and at is not None and r.start - result[at].end < 1.0:
            before = result[at]
            end = max(before.end, r.end)
            result[at] = Range(r.warp, r.kind, before.start, end, before.line)
        else:
            last[r.warp, r.kind] = len(result)
            result.append(r)
    return result
