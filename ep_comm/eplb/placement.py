"""A placement: which logical expert each physical slot holds, and what follows from that.

Slots are numbered rank by rank, ranks node by node, so slot p lives on rank p // (P / R). A Buffer
over a placement has P experts: its physical slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ep_comm.checks import positive
from ep_comm.eplb.trace import Trace
from ep_comm.errors import make_error


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts of every layer live.

    L layers, E logical experts, P slots, R ranks, N nodes.

    Raises:
        EPArgumentError: E203, slots do not fill ranks, or ranks nodes, evenly; E213, a slot names
            no expert, or an expert has no slot.

    All tensors are on the CPU. Shared experts are the last logical experts.
    """

    physical_to_logical: Tensor  # int64 [L, P] logical expert of each slot
    num_logical: int  # E, shared experts included
    num_ranks: int
    num_nodes: int = 1
    rank_load: Tensor | None = None  # float64 [L, R] predicted, see `predict_load`
    traffic: Tensor | None = None  # float64 [L, N, N] predicted, see `predict_traffic`

    def __post_init__(self) -> None:
        slots = self.physical_to_logical
        if slots.dim() != 2 or slots.dtype != torch.int64 or slots.device.type != "cpu":
            got = f"{slots.dtype} {list(slots.shape)} on {slots.device}"
            raise make_error("E201", f"rejected slots: got {got}, want CPU int64 [layers, slots]")
        check_world(slots.shape[1], self.num_ranks, self.num_nodes)
        if slots.numel() == 0:
            return
        if not 0 <= int(slots.min()) <= int(slots.max()) < self.num_logical:
            what = f"rejected slots: expert {int(slots.max())}, want 0 to {self.num_logical - 1}"
            raise make_error("E213", what)
        without = (self.num_replicas == 0).nonzero()
        if without.shape[0] > 0:
            layer, expert = without[0].tolist()
            what = f"rejected slots: expert {expert} of layer {layer} is nowhere"
            raise make_error("E213", what, fix="give every expert a slot")

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """P, the experts of a Buffer that uses this placement."""
        return self.physical_to_logical.shape[1]

    @cached_property
    def num_replicas(self) -> Tensor:
        """int64 [L, E] slots of each expert."""
        count = torch.zeros((self.num_layers, self.num_logical), dtype=torch.int64)
        ones = torch.ones_like(self.physical_to_logical)
        return count.scatter_add_(1, self.physical_to_logical, ones)

    @cached_property
    def replica(self) -> Tensor:
        """int64 [L, P] which replica of its expert a slot is: 0, 1, ... in order of slots."""
        order = self.physical_to_logical.sort(dim=1, stable=True)
        starts = self.num_replicas.cumsum(1) - self.num_replicas
        place = torch.arange(self.num_slots).expand_as(order.indices)
        number = place - starts.gather(1, order.values)
        return torch.empty_like(number).scatter_(1, order.indices, number)

    @cached_property
    def logical_to_physical(self) -> Tensor:
        """int64 [L, E, X] slots of each expert, ascending, padded with -1; X the most replicas."""
        return self.padded(int(self.num_replicas.max()) if self.num_layers > 0 else 1)

    def padded(self, width: int) -> Tensor:
        """`logical_to_physical` with room for `width` replicas."""
        table = torch.full((self.num_layers, self.num_logical * width), -1)
        slots = torch.arange(self.num_slots).expand(self.num_layers, -1)
        table.scatter_(1, self.physical_to_logical * width + self.replica, slots)
        return table.view(self.num_layers, self.num_logical, width)

    def experts_of(self, rank: int, layer: int = 0) -> list[int]:
        """Logical experts of a rank's slots, in order; a Buffer's local expert i is the i-th."""
        return self.per_rank[layer, rank].tolist()

    @property
    def per_rank(self) -> Tensor:
        """int64 [L, R, P / R] the slots, rank by rank."""
        return self.physical_to_logical.view(self.num_layers, self.num_ranks, -1)

    @cached_property
    def hosted(self) -> Tensor:
        """int64 [L, R, E] replicas of each expert on each rank."""
        shape = (self.num_layers, self.num_ranks, self.num_logical)
        ones = torch.ones_like(self.per_rank)
        return torch.zeros(shape, dtype=torch.int64).scatter_add_(2, self.per_rank, ones)

    # ---- predictions ----

    def predict_load(self, load: Tensor) -> Tensor:
        """Load of each rank when replicas share their expert's load evenly.

        Args:
            load: [L, E] load of each logical expert, any unit.
        Returns:
            float64 [L, R], the same unit.
        """
        share = load.to(torch.float64) / self.num_replicas
        by_slot = share.gather(1, self.physical_to_logical)
        return by_slot.view(self.num_layers, self.num_ranks, -1).sum(2)

    def imbalance(self, load: Tensor) -> Tensor:
        """float64 [L] load of the heaviest rank over the mean; 1 where there is no load."""
        ranks = self.predict_load(load)
        mean = ranks.mean(1)
        return torch.where(mean > 0, ranks.amax(1) / mean, 1.0)

    def predict_traffic(self, load: Tensor | Trace) -> Tensor:
        """What each node sends to each node, itself included.

        Tokens come from all nodes alike; a selection stays on its node when there is a replica, as
        dispatch has it, and else spreads over all replicas.

        Args:
            load: [L, E], then the result counts selections; or a trace, then it counts rows: a
                token goes to a node once, however many of its experts are there.
        Returns:
            float64 [L, N, N], [source node, destination node].
        """
        on_node = self.on_nodes.to(torch.float64)
        spread = on_node / on_node.sum(1, keepdim=True)  # over the nodes of other replicas
        absent = (on_node == 0).to(torch.float64)
        if isinstance(load, Trace):
            return _rows_between(spread, absent, load) / self.num_nodes
        loads = load.to(torch.float64).unsqueeze(1)
        flow = (absent * loads) @ spread.transpose(1, 2)
        flow += torch.diag_embed(((1 - absent) * loads).sum(2))
        return flow / self.num_nodes

    @cached_property
    def on_nodes(self) -> Tensor:
        """int64 [L, N, E] replicas of each expert on each node."""
        by_node = self.physical_to_logical.view(self.num_layers, self.num_nodes, -1)
        shape = (self.num_layers, self.num_nodes, self.num_logical)
        return torch.zeros(shape, dtype=torch.int64).scatter_add_(
            2, by_node, torch.ones_like(by_node)
        )

    # ---- differences ----

    def moves_from(self, old: Placement) -> Tensor:
        """int64 [L] replicas that a rank holds here and did not hold in `old`."""
        check_same_world(self, old)
        return (self.hosted - old.hosted).clamp(min=0).sum((1, 2))

    def moved_bytes(self, old: Placement, expert_bytes: int) -> int:
        """Bytes that change ranks, at `expert_bytes` per expert and layer."""
        return int(self.moves_from(old).sum()) * expert_bytes

    def layers(self, which: Sequence[int]) -> Placement:
        """The placement of some layers only, without predictions."""
        return Placement(
            self.physical_to_logical[list(which)], self.num_logical, self.num_ranks, self.num_nodes
        )


def initial_placement(
    num_layers: int, num_logical: int, num_slots: int, num_ranks: int, num_nodes: int = 1
) -> Placement:
    """Experts in order, rank by rank, and again from the first one in the slots that are left."""
    if num_slots < num_logical:
        raise make_error("E203", f"rejected {num_slots} slots: want >= {num_logical} experts")
    slots = (torch.arange(num_slots) % num_logical).expand(num_layers, -1).contiguous()
    return Placement(slots, num_logical, num_ranks, num_nodes)


def check_world(num_slots: int, num_ranks: int, num_nodes: int) -> None:
    """E203 unless slots fill ranks, and ranks nodes, evenly."""
    for name, value in (("slots", num_slots), ("ranks", num_ranks), ("nodes", num_nodes)):
        positive(f"number of {name}", value)
    if num_slots % num_ranks != 0:
        what = f"rejected {num_slots} slots: want a multiple of {num_ranks} ranks"
        raise make_error("E203", what)
    if num_ranks % num_nodes != 0:
        what = f"rejected {num_ranks} ranks: want a multiple of {num_nodes} nodes"
        raise make_error("E203", what)


def check_same_world(new: Placement, old: Placement) -> None:
    """E203 unless the two differ only in what the slots hold."""
    for name in ("num_layers", "num_logical", "num_slots", "num_ranks", "num_nodes"):
        mine, theirs = getattr(new, name), getattr(old, name)
        if mine != theirs:
            raise make_error("E203", f"rejected placement: {name}={mine}, want {theirs}")


def _rows_between(spread: Tensor, absent: Tensor, trace: Trace) -> Tensor:
    """float64 [L, N, N] expected unique (token, node) pairs, if every node had all tokens.

    A token's selections choose among replicas independently. spread, absent: [L, N, E].
    """
    layers, nodes, _ = spread.shape
    rows = torch.zeros((layers, nodes, nodes), dtype=torch.float64)
    for layer in range(layers):
        ids = trace.of_layer(layer)  # [tokens, K]
        chosen, ids = (ids >= 0).unsqueeze(2), ids.clamp(min=0)
        for source in range(nodes):
            goes = spread[layer] * absent[layer, source]  # [N, E]
            goes[source] += 1 - absent[layer, source]
            hit = torch.where(chosen, goes.T[ids], 0.0)  # [T, K, N]
            rows[layer, source] = (1 - (1 - hit).prod(1)).sum(0)
    return rows
