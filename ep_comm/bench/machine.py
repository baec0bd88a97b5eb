"""What ran where: enough to judge a number, or to distrust it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import numpy
import torch

from ep_comm import _core, build_info

# Those this process may use, before it keeps to one of them.
CORES: Final = tuple(sorted(os.sched_getaffinity(0)))


def keep_to_core(rank: int) -> None:
    """Bind this process to one core, ranks in turn, as mpirun does; threads made later follow.

    Left alone, a scheduler that moves ranks every few milliseconds decides how many of them share a
    core during a call of a few milliseconds.
    """
    os.sched_setaffinity(0, {CORES[rank % len(CORES)]})


def facts() -> dict[str, Any]:
    """Machine and software; the parts of a record that are the same for the whole run."""
    return {
        "cpu": _cpu_model(),
        "cores": len(CORES),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "simd": _core.simd(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "build": build_info(),
        "git": git_state(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether tracked files differ from it."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy is in nobody's checkout
        results = (
            ":(exclude,top)bench/results"  # what a run writes does not make the next one dirty
        )
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", results)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


class LoadMeter:
    """How busy the machine was beside us, from start to `read`."""

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.monotonic(), time.process_time(), _busy_s()
        self._load = os.getloadavg()[0]

    def own_s(self) -> float:
        """CPU seconds of this process since the start."""
        return time.process_time() - self._own

    def read(self, own_s: float) -> dict[str, float]:
        """Load averages, and the share of all cores that others used.

        Args:
            own_s: CPU seconds of all ranks on this machine.
        """
        cores = os.cpu_count() or 1
        capacity = max(time.monotonic() - self._wall, 1e-3) * cores
        others = (_busy_s() - self._busy - own_s) / capacity
        return {
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others_cpu_share": round(max(0.0, others), 3),
        }


def _busy_s() -> float:
    """CPU seconds the machine has spent on anything, stolen time included."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
