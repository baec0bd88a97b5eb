"""What tests need on a machine that may stand still: events to wait for, and promises about time.

A process may pause for seconds, on a host that others use as well. So clocks that must not run out
are long (`PATIENT`), a clock that must run out while others may not is longer than a pause
(`LONGER_S`), and what happens first is waited for and not slept for.

Where the promise itself is a time, a pause breaks it, and so does a library that is too slow: a
pause now and then, the library each time. `three_tries` begins such a test again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec

from ep_comm import EPConfig

P = ParamSpec("P")

PATIENT = EPConfig(arrival_s=60.0, progress_s=60.0)
LONGER_S = 6.0  # than a machine pauses
# How many times longer a call may take than it does: what runs tests under a tool says so.
SLOWED = float(os.environ.get("EP_TESTS_SLOWED", "1"))


class Disturbed(AssertionError):
    """What is wrong would be so, too, had the machine paused."""


def within(limit_s: float, took_s: float, what: object = "") -> None:
    """A promise about time. What takes longer in vain waits for a clock of many seconds."""
    if not took_s < limit_s:
        raise Disturbed(f"took {took_s:.2f} s, not less than {limit_s} s: {what}")


def three_tries(test: Callable[P, None]) -> Callable[P, None]:
    """The whole test again, twice at most, and only when it was `Disturbed`."""

    @functools.wraps(test)
    def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        for tries_left in (2, 1, 0):
            try:
                test(*args, **kwargs)
            except Disturbed as disturbed:
                if not tries_left:
                    raise
                print(f"{test.__name__} begins again: {disturbed}")
            else:
                break

    return tried


def until(ready: Callable[[], Any], limit_s: float = 60.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end, f"it did not come in {limit_s} s"
        time.sleep(0.001)


# ---- where a rank of the cpu backend is; words of ControlHeader in csrc/contract/records.h ----


def is_waiting(buffer: Any, rank: int | None = None, seq: int = 0) -> bool:
    """Whether a rank, by default ours, sleeps until a peer publishes something.

    Args:
        seq: the operation that it does so in; 0: any. The ends of operations before it wait, too.
    """
    memory = buffer._backend._memory
    address = memory.peers[memory.rank if rank is None else rank].control.address
    assert ctypes.string_at(address, 8) == b"EPCONTRL"
    if seq and ctypes.c_uint64.from_address(address + 32).value != seq:
        return False
    return ctypes.c_uint32.from_address(address + 20).value != 0


def is_inside(thread: threading.Thread) -> bool:
    """Whether a thread is in a call of the library."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "ep_comm":
            return True
        frame = frame.f_back
    return False
