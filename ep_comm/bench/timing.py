"""Clocks, ranks that start at one moment, and the time until the slowest of them has returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ep_comm.bench.machine import CORES

_LEAD_NS: Final = 1_000_000  # from the barrier to the common start: all ranks are through by then
_SPIN_NS: Final = 300_000  # the end of it is not slept where every rank has a core: sleeps end late


class Sample(NamedTuple):
    """One iteration on one rank, in nanoseconds."""

    enter: int  # host clock, the same for all ranks of one host
    leave: int
    device: int  # by the events of a device whose calls return early; -1: the call did not


class Times(NamedTuple):
    """Of each iteration, over all ranks, in nanoseconds."""

    done: list[int]  # until every rank was done
    call: list[int]  # the longest call
    skew: list[int]  # from the first rank's entry to the last one's


class Clock(Protocol):
    """How long a call takes on a device.

    A device whose calls return early times them with its own events, and `prepare` is where it
    flushes its caches. Which device is measured with which clock: CLOCKS.
    """

    def prepare(self) -> None:
        """Before the barrier: whatever must be equal for every iteration."""

    def measure(self, call: Callable[[], Any]) -> tuple[Sample, Any]:
        """The call, timed, and its result."""


class HostClock:
    """Calls that return when their result is there."""

    def prepare(self) -> None:
        """Caches stay as they are, as between the layers of a model."""

    def measure(self, call: Callable[[], Any]) -> tuple[Sample, Any]:
        enter = time.monotonic_ns()
        result = call()
        return Sample(enter, time.monotonic_ns(), -1), result


CLOCKS: dict[str, Callable[[], Clock]] = {"cpu": HostClock}


class Stopwatch:
    """Aligned runs on every rank of the default group. Collective to make and to use."""

    def __init__(self, device: str) -> None:
        self.clock = CLOCKS[device]()
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, Path("/proc/sys/kernel/random/boot_id").read_text())
        self.one_host = len(set(hosts)) == 1
        self._spin_ns = _SPIN_NS if len(hosts) <= len(CORES) else 0

    def run(
        self,
        call: Callable[[], Any],
        iterations: int,
        after: Callable[[int], None] | None = None,
    ) -> tuple[list[Sample], Any]:
        """Call it on every rank at once, again and again; our samples, and the last result."""
        samples, result = [], None
        for _ in range(iterations):
            result = None  # its memory is free before the next call asks for some
            self.clock.prepare()
            self._align()
            sample, result = self.clock.measure(call)
            samples.append(sample)
            if after is not None:
                after(1)
        return samples, result

    def _align(self) -> None:
        """A barrier; on one host also a moment after it that all ranks wait for.

        Ranks leave a barrier one by one; on few cores the last may leave when the first is done.
        """
        start = torch.tensor([time.monotonic_ns() + _LEAD_NS])
        dist.all_reduce(start, op=dist.ReduceOp.MAX)
        if not self.one_host:
            return
        moment = int(start)
        time.sleep(max(moment - self._spin_ns - time.monotonic_ns(), 0) / 1e9)
        while time.monotonic_ns() < moment:
            pass

    def times(self, samples: list[Sample]) -> Times:
        """Bring the ranks' samples together. Collective.

        Events of devices and clocks of several hosts cannot be compared with each other: there
        `done` is the longest of the ranks, and `skew` means nothing.
        """
        values = torch.tensor(samples, dtype=torch.int64).view(-1, 3)
        enter, leave, device = values.unbind(1)
        most = torch.stack([-enter, enter, leave, leave - enter, device], 1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        minus_first, last, left, call, device = most.unbind(1)
        span = left + minus_first if self.one_host else call
        done = torch.where(device >= 0, device, span)
        return Times(done.tolist(), call.tolist(), (last + minus_first).tolist())


def summary(values_ns: list[int]) -> dict[str, float]:
    """p10, p50, p90, min in microseconds, and n."""
    p10, p50, p90 = np.percentile(values_ns, [10, 50, 90])
    numbers = {"p10": p10, "p50": p50, "p90": p90, "min": min(values_ns)}
    return {**{k: round(float(v) / 1e3, 2) for k, v in numbers.items()}, "n": len(values_ns)}
