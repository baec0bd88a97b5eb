"""Ranks that are threads talk to CUDA one after the other: a pytest plugin, `-p launch_turns`.

compute-sanitizer's racecheck loses track of a kernel now and then when another thread launches or
waits at the same time, and what waits for that kernel fails. Kernels run side by side all the same.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

# A call may wait for memory whose last kernel waits for another rank: then turns are given up.
LONGEST_S = 5.0
_turn = threading.Lock()

LAUNCHING = {
    "DeviceRank": (
        "dispatch", "combine", "finish_dispatch", "finish_combine", "push_copies", "refuse",
        "settle", "unmask",
    ),
    "DispatchPlan": ("run",),
    "CombinePlan": ("run",),
}  # fmt: skip


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def turn(*args: Any, **options: Any) -> Any:
        mine = _turn.acquire(timeout=LONGEST_S)
        try:
            return function(*args, **options)
        finally:
            if mine:
                _turn.release()

    return turn


def synchronize(stream: torch.cuda.Stream) -> None:
    query = in_turn(torch.cuda.Stream.query)
    while not query(stream):
        time.sleep(0.001)


def pytest_configure() -> None:
    from ep_comm import _core  # not before --emulator has put its own in place

    for name, methods in LAUNCHING.items():
        for method in methods:
            owner = getattr(_core, name)
            setattr(owner, method, in_turn(getattr(owner, method)))
    torch.cuda.Stream.synchronize = synchronize  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.replay = in_turn(torch.cuda.CUDAGraph.replay)  # type: ignore[method-assign]
