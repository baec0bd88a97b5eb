"""Which backend a buffer gets: every rank decides from the same handshakes, so all decide alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, Literal

from ep_comm import _core
from ep_comm.backends.nodes import find_nodes, kind_of_rails
from ep_comm.bootstrap import Group, Hello
from ep_comm.errors import EPError, make_error

_log = logging.getLogger("ep_comm")

BACKENDS: Final = ("auto", "cpu", "nvlink", "hybrid", "collective")
Name = Literal["cpu", "nvlink", "hybrid", "collective"]


def choose(
    asked: str,
    device_type: str,
    group: Group,
    hellos: Sequence[Hello],
    ranks_per_node: int | None = None,
) -> tuple[Name, str]:
    """The backend and the reason for it; E404 when the one asked for cannot be had."""
    one_host = len({h.boot_id for h in hellos}) == 1
    if asked == "collective":
        return "collective", "asked for"
    if asked == "cpu" and not (one_host and device_type == "cpu"):
        why = "ranks are on several hosts" if not one_host else f"tensors are on {device_type}"
        raise make_error("E404", f"cannot use backend 'cpu': {why}", rank=group.rank)
    if asked == "hybrid":
        if why := _why_not_hybrid(device_type, hellos, ranks_per_node):
            raise make_error("E404", f"cannot use backend 'hybrid': {why}", rank=group.rank)
        return "hybrid", "asked for"
    if device_type == "cpu" and one_host:
        return "cpu", "CPU tensors, all ranks on one host"
    why = _why_not_nvlink(device_type, one_host)
    if asked == "auto" and device_type == "cuda" and not one_host:
        why_not = _why_not_hybrid(device_type, hellos, ranks_per_node)
        if not why_not:
            return "hybrid", "CUDA tensors, ranks on several hosts"
        why = f"{why}, and {why_not}" if why else why_not
    if not why:
        same_process = all(h.same_process(hellos[0]) for h in hellos)
        place = "in one process" if same_process and len(hellos) > 1 else "on one host"
        return "nvlink", f"CUDA tensors, all ranks {place}"
    if asked == "nvlink":
        raise make_error("E404", f"cannot use backend 'nvlink': {why}", rank=group.rank)
    return "collective", why


# What keeps GPU memory from being mapped, or a network from being used, as their construction says.
_NO_MAPPING: Final = ("E402", "E403", "E405", "E409", "E501")


def instead_of_gpu(asked: str, group: Group, error: EPError) -> tuple[Name, str]:
    """The backend after ranks could not reach each other's GPU memory, told in a warning; raises
    `error` when nothing else was allowed."""
    if asked != "auto" or error.code not in _NO_MAPPING:
        raise error
    _log.warning(f"rank {group.rank} uses backend 'collective': {error.what}")
    return "collective", error.what


def _why_not_nvlink(device_type: str, one_host: bool) -> str:
    """What keeps ranks from mapping each other's GPU memory; empty = nothing known beforehand."""
    if device_type != "cuda":
        return "CPU ranks on several hosts" if device_type == "cpu" else f"device is {device_type}"
    if not _core.BUILD["cuda"]:
        return f"this build has no CUDA kernels ({_core.BUILD['cuda_missing']})"
    return "" if one_host else "CUDA ranks on several hosts"


def _why_not_hybrid(device_type: str, hellos: Sequence[Hello], ranks_per_node: int | None) -> str:
    """What keeps ranks from standing on several nodes; empty = nothing known beforehand."""
    if device_type != "cuda":
        return f"tensors are on {device_type}"
    if not _core.BUILD["cuda"]:
        return f"this build has no CUDA kernels ({_core.BUILD['cuda_missing']})"
    nodes = find_nodes(ranks_per_node, hellos)
    if isinstance(nodes, str):
        return nodes
    if nodes.num_nodes == 1:
        return "all ranks are on one node"
    if not kind_of_rails(hellos):
        return "some ranks share a process and others do not"
    if kind_of_rails(hellos) == "nvshmem" and _core.BUILD["nvshmem_missing"]:
        return f"this build has no NVSHMEM ({_core.BUILD['nvshmem_missing']})"
    return ""
