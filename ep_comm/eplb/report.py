"""What a plan would do for a recorded routing: the numbers behind `ep-comm eplb`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_comm.eplb.placement import Placement, initial_placement
from ep_comm.eplb.planner import plan
from ep_comm.eplb.trace import Trace


@dataclass(frozen=True)
class Report:
    """Before: experts in order. After: planned. Both measured on steps the plan did not see."""

    before: Placement
    after: Placement
    seen: Trace  # steps the plan was made from
    measured: Trace  # the others; all of them when there is one step
    plan_s: float
    expert_bytes: int

    @property
    def load(self) -> Tensor:
        """float64 [L, E] that both are measured on."""
        return self.measured.load()

    def as_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON.

        imbalance: heaviest rank over the mean; mean and worst of the layers. cross_node: rows that
        a token sends to other nodes in a layer, predicted, at most nodes - 1. moved: experts that
        change ranks, over all layers.
        """
        numbers: dict[str, Any] = {
            "layers": self.after.num_layers,
            "experts": self.after.num_logical,
            "slots": self.after.num_slots,
            "ranks": self.after.num_ranks,
            "nodes": self.after.num_nodes,
            "steps_seen": self.seen.num_steps,
            "steps_measured": self.measured.num_steps,
            "plan_ms": self.plan_s * 1e3,
            "moved": int(self.after.moves_from(self.before).sum()),
            "moved_bytes": self.after.moved_bytes(self.before, self.expert_bytes),
            "most_replicas": int(self.after.num_replicas.max()),
            "replicated": int((self.after.num_replicas > 1).sum()),
        }
        for name, placement in (("before", self.before), ("after", self.after)):
            imbalance = placement.imbalance(self.load)
            traffic = placement.predict_traffic(self.measured)
            numbers[name] = {
                "imbalance": float(imbalance.mean()),
                "worst_imbalance": float(imbalance.max()),
                "cross_node": _crossing(traffic) / self._tokens,
                "node_traffic": traffic.sum(0).tolist(),
            }
        return numbers

    @property
    def _tokens(self) -> int:
        """In all measured steps and layers."""
        steps, layers, tokens, _ = self.measured.ids.shape
        return max(steps * layers * tokens, 1)

    def relative_load(self, placement: Placement) -> Tensor:
        """float64 [L, R] load of each rank over the layer's mean."""
        load = placement.predict_load(self.load)
        mean = load.mean(1, keepdim=True)
        return torch.where(mean > 0, load / mean, 1.0)


def evaluate(
    trace: Trace,
    *,
    num_ranks: int,
    num_nodes: int,
    num_slots: int,
    num_groups: int,
    policy: str = "auto",
    coactivation: bool = True,
    expert_bytes: int = 0,
) -> Report:
    """Plan from the first half of the steps, to be measured on the second.

    Args:
        coactivation: cut traffic between nodes by what tokens chose together.
    Raises:
        EPArgumentError: E203.
    """
    half = max(trace.num_steps // 2, 1)
    seen = trace.steps(slice(0, half))
    measured = trace.steps(slice(half, None)) if trace.num_steps > 1 else trace
    before = initial_placement(trace.num_layers, trace.num_experts, num_slots, num_ranks, num_nodes)
    start = time.perf_counter()
    source = seen if coactivation else seen.load()
    after = plan(source, num_ranks, num_nodes, num_slots, num_groups, policy=policy)  # type: ignore[arg-type]
    return Report(before, after, seen, measured, time.perf_counter() - start, expert_bytes)


def _crossing(traffic: Tensor) -> float:
    return float(traffic.sum() - torch.diagonal(traffic, dim1=1, dim2=2).sum())
