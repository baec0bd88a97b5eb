"""Whose construction it is: a caller's group, as ranks over a store."""

from __future__ import annotations

import hashlib
import operator
import struct
from dataclasses import dataclass
from typing import Any

from ep_comm.errors import make_error, shown


@dataclass(frozen=True)
class StoreGroup:
    """Ranks that share a `torch.distributed` store; all a Buffer needs of a process group.

    Args:
        store: any c10d Store that all ranks reach (TCPStore, FileStore, HashStore for threads).
        rank, size: this rank, and how many there are.
        name: tells groups over one store apart.
    """

    store: Any
    rank: int
    size: int
    name: str = "default"


@dataclass(frozen=True)
class Group:
    """A caller's group as the library uses it."""

    store: Any
    rank: int
    size: int
    process_group: Any = None  # what torch.distributed collectives take; None = there is none
    members: tuple[int, ...] = ()  # global ranks, in order


def resolve_group(group: Any) -> Group:
    """Accept a ProcessGroup, a StoreGroup, or None (the default group, else a single rank).

    Raises:
        EPEnvironmentError: E406, the group cannot be used; local, peers are not told.
    """
    import torch.distributed as dist

    if isinstance(group, StoreGroup):
        return _resolve_store(group)
    initialized = dist.is_available() and dist.is_initialized()
    if group is None and not initialized:
        return Group(dist.HashStore(), 0, 1, None, (0,))
    if not initialized:
        raise make_error(
            "E406", "rejected bootstrap of this rank: torch.distributed is not initialized"
        )
    from torch.distributed.distributed_c10d import _get_default_store

    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        what = f"rejected bootstrap of this rank: group is {shown(group)}, want a ProcessGroup"
        raise make_error("E406", what)
    members = tuple(dist.get_process_group_ranks(group))
    digest = hashlib.sha256(struct.pack(f"<{len(members)}q", *members)).hexdigest()[:16]
    store = dist.PrefixStore(f"ep_comm/{digest}", _get_default_store())
    return Group(store, dist.get_rank(group), len(members), group, members)


def _resolve_store(group: StoreGroup) -> Group:
    """E406 unless its fields can be what they must be; E212 for more ranks than there can be."""
    import torch.distributed as dist

    from ep_comm import _core

    try:
        rank, size = operator.index(group.rank), operator.index(group.size)
    except Exception:  # not even ints
        rank, size = -1, 0
    if not 0 <= rank < size:
        what = f"rejected bootstrap of rank {shown(group.rank)}: size {shown(group.size)}"
        raise make_error("E406", what)
    if size > _core.MAX_RANKS:
        raise make_error("E212", f"rejected {size} ranks: limit {_core.MAX_RANKS}", rank=rank)
    if not isinstance(group.store, dist.Store) or not isinstance(group.name, str):
        what = f"store {shown(group.store)}, name {shown(group.name)}"
        raise make_error("E406", f"rejected bootstrap of rank {rank}: {what}", rank=rank)
    store = dist.PrefixStore(f"ep_comm/{group.name}", group.store)
    return Group(store, rank, size, None, tuple(range(size)))
