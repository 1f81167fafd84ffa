"""Times of interleaved runs, and peak memory.

Contenders take turns step by step, so that whatever else the machine does hits all of them alike. What is reported is
the ratio of two steps of the same turn: its median over all turns, with quartiles.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Steps = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return median and quartiles of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of every step, by contender: wall clock, and processor time of the process that ran it."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    def ratio(self, name: str, reference: str, clock: str = "wall") -> Spread:
        """Ratio of two contenders' steps of the same turn."""
        seconds = getattr(self, clock)
        return Spread.of([a / b for a, b in zip(seconds[name], seconds[reference], strict=True)])


def interleave(steps: Steps, turns: int, device: str = "cpu", block: int = 1) -> Times:
    """Run each contender's step once a turn, in an order that rotates.

    Args:
        steps: What to run, by name; warmed up.
        turns: How often.
        device: A GPU is waited for before the clock is read.
        block: Steps between two readings: on a GPU more than one, so that the host may run ahead as in training.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = Times({name: [] for name in steps}, {name: [] for name in steps})
    order = list(steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name in order:
                wait()
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(block):
                    steps[name]()
                wait()
                times.wall[name].append((time.perf_counter() - wall) / block)
                times.processor[name].append((time.process_time() - processor) / block)
            order.append(order.pop(0))
            gc.collect()
    finally:
        gc.enable()
    return times


def peak_memory(step: Callable[[], object], device: str) -> int:
    """Bytes of tensors alive at the worst moment of a step, weights and optimizer included."""
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    alive = bytes_alive(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return alive + _highest(profiler)


def _highest(profiler: profile) -> int:
    """The most that a profiled step held on top of what it found."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def bytes_alive(device: str) -> int:
    """Bytes of all tensors on a device; on a CPU, of those that Python can reach."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
