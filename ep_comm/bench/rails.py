"""Bytes of a call across nodes: over rails, by the kernels' own counters, and over NVLink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_comm.backends.hybrid import COUNTERS
from ep_comm.bench.cases import Case, choose_experts
from ep_comm.buffer import Buffer


def split(
    case: Case, rank: int, buffer: Buffer, call: Callable[[], Any], op: str, row_bytes: int
) -> dict[str, int]:
    """Make one call, and tell its traffic at the busiest rank. Collective over the default group.

    Args:
        op: "dispatch" or "combine", which the call is; row_bytes: of a row, or of a sum.

    A small batch goes straight to ranks (direct mode). Of that only what leaves is counted, each
    token at each rank as a row; combine without per_rank, of slabs, sends one for each selection.
    """
    before = buffer.stats()["rails"]
    call()
    torch.cuda.synchronize()
    after = buffer.stats()["rails"]
    crossed = {k: after[k] - before[k] for k in COUNTERS}
    what = "rows" if op == "dispatch" else "sums"
    rows = max(crossed[f"{what}_out"], crossed[f"{what}_in"]) + crossed["direct_out"]
    near = near_rows(case, rank, after["ranks_per_node"])
    busiest = torch.tensor([rows * row_bytes, near * row_bytes])
    if dist.get_backend() == "nccl":
        busiest = busiest.cuda()
    dist.all_reduce(busiest, dist.ReduceOp.MAX)
    rail_bytes, nvlink_bytes = busiest.tolist()
    return {"rail_bytes": rail_bytes, "nvlink_bytes": nvlink_bytes}


def near_rows(case: Case, rank: int, per_node: int) -> int:
    """Rows that a rank stores over NVLink in a dispatch: of its own tokens, and of those of its
    rail, which it forwards; a combine pulls as many from there."""
    node, local = divmod(rank, per_node)
    rows = 0
    for src in range(local, case.ranks, per_node):
        owner = choose_experts(case, src) // (case.experts // case.ranks)
        for dst in range(node * per_node, (node + 1) * per_node):
            rows += int((owner == dst).any(1).sum()) if dst != rank else 0
    return rows


def rates(moved: dict[str, int], us: float) -> dict[str, float]:
    """GB/s of `split`'s bytes."""
    return {name.replace("bytes", "gbps"): round(n / us / 1e3, 1) for name, n in moved.items()}


def describe(buffer: Buffer) -> dict[str, Any]:
    """How the cluster is cut, and what its rails are."""
    rails = buffer.stats()["rails"]
    return {
        "num_nodes": rails["num_nodes"],
        "ranks_per_node": rails["ranks_per_node"],
        "nodes_per_token": round(rails["nodes_per_token"], 3),
        "transport": rails["transport"],
    }
