"""Which NVSHMEM libraries fit together: the device library inside our plugin, the host library that
the process has loaded.

A plugin built with 3.4.5 runs beside host libraries from 3.3.20 to 3.8.0, with one exception that
the library's own check lets pass: from 3.5.19 on, queue pairs of IBGDA are laid out anew. A device
library of one side under a host library of the other hangs at its first put.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Version = tuple[int, int, int]

NEW_QUEUES: Final[Version] = (3, 5, 19)  # first with the other layout
OLDEST_HOST: Final[Version] = (3, 3, 20)


def parse(text: str) -> Version:
    """(3, 4, 5) of "3.4.5"; what is missing is 0, what follows is ignored."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(".")[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def why_apart(host: Version, device: Version) -> str | None:
    """Why the two cannot work together; None when they can."""
    if host[0] != device[0]:
        return "other major versions are not known"
    if (host < NEW_QUEUES) != (device < NEW_QUEUES):
        return f"IBGDA queues changed in {text(NEW_QUEUES)}, between the two"
    if host < OLDEST_HOST:
        return f"host libraries before {text(OLDEST_HOST)} are too old"
    return None
