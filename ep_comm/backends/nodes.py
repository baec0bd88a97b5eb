"""Which ranks stand on which node, as their handshakes tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from ep_comm.bootstrap import Hello


class Nodes(NamedTuple):
    """Ranks are numbered node by node, and all nodes have equally many."""

    num_nodes: int
    ranks_per_node: int

    def near(self, rank: int) -> range:
        """The ranks of its node, itself included."""
        first = rank // self.ranks_per_node * self.ranks_per_node
        return range(first, first + self.ranks_per_node)


def find_nodes(asked: int | None, hellos: Sequence[Hello]) -> Nodes | str:
    """Where ranks stand, or why that is no grid.

    Args:
        asked: ranks of a node; None: those of a host are one.
    """
    size = len(hellos)
    if asked is not None:
        if size % asked != 0:
            return f"ranks_per_node={asked} does not divide {size} ranks"
        return Nodes(size // asked, asked)
    hosts = [h.boot_id for h in hellos]
    runs = [0] + [r for r in range(1, size) if hosts[r] != hosts[r - 1]] + [size]
    if len(runs) - 1 != len(set(hosts)):
        return "ranks of a host are not numbered one after the other"
    per_host = [end - begin for begin, end in pairwise(runs)]
    if len(set(per_host)) != 1:
        return f"hosts have {per_host} ranks, want equally many"
    return Nodes(len(per_host), per_host[0])


def kind_of_rails(hellos: Sequence[Hello]) -> Literal["loopback", "nvshmem", ""]:
    """ "loopback", "nvshmem", or "" where some ranks share a process and others do not."""
    together = [h.same_process(hellos[0]) for h in hellos[1:]]
    if all(together):
        return "loopback"
    places = {(h.boot_id, h.pid_namespace, h.pid) for h in hellos}
    return "nvshmem" if len(places) == len(hellos) else ""
