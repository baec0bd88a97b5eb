"""`deep_ep.utils`: events, and what programs ask about the machine."""

from __future__ import annotations

from typing import Any

from ep_comm.bootstrap import resolve_group
from ep_comm.compat.deep_ep.events import EventHandle, EventOverlap


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """(nodes, ranks that load and store each other's memory): CPU ranks of a host share it."""
    return 1, resolve_group(group).size


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """As `get_physical_domain_size`: nothing is forwarded here."""
    return get_physical_domain_size(group)


def check_nvlink_connections(group: Any) -> None:
    """Nothing to find out: each native buffer chooses a backend that works, and says which."""


__all__ = [
    "EventHandle",
    "EventOverlap",
    "check_nvlink_connections",
    "get_logical_domain_size",
    "get_physical_domain_size",
]
