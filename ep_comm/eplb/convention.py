"""The calling convention engines already have for a balancer (that of DeepSeek's EPLB)."""

from __future__ import annotations

from torch import Tensor

from ep_comm.eplb.planner import plan


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan with `plan` behind the signature of the public balancer.

    Never is the heaviest rank heavier than there; a rank holds an expert twice only where that is
    the reason, see `distinct` of `plan`.

    Args:
        weight: [layers, experts] load of each logical expert.
        num_replicas: slots in total, a multiple of num_gpus.
        num_groups: expert groups; hierarchical when it is a multiple of num_nodes, else global.
        num_nodes, num_gpus: gpus stand node by node.
    Returns:
        phy2log: int64 [layers, num_replicas] logical expert of each slot.
        log2phy: int64 [layers, experts, num_replicas - experts + 1] slots of each expert, then -1.
        logcnt: int64 [layers, experts] replicas of each expert.
        All on the CPU, wherever weight is.
    Raises:
        EPArgumentError: as `plan`.
    """
    placement = plan(weight, num_gpus, num_nodes, num_replicas, num_groups)
    width = num_replicas - placement.num_logical + 1
    return placement.physical_to_logical, placement.padded(width), placement.num_replicas
