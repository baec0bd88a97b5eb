"""Which replica of a logical expert a token goes to: the tables, and the rule in torch.

The rule is that of csrc/contract/replicas.h; here it serves the reference and the collective
backend.

A source chooses among the replicas on its own rank, else on its node, else among all. Within those
the token decides: tokens spread over [0, 2^32) in golden-ratio steps, and each candidate has a
part of that range in proportion to its capacity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ep_comm.errors import make_error

if TYPE_CHECKING:
    from ep_comm.checks import BufferSpec
    from ep_comm.eplb.placement import Placement

Prefer = Literal["node", "rank", "none"]
PREFER: Final = get_args(Prefer)
MAX_LAYERS: Final = (1 << 16) - 1
KEY_MARK: Final = 1 << 62  # of a key in the `routing` of a call's signature
_RANGE: Final = 1 << 32
_STEP: Final = 2654435769  # 2^32 / golden ratio
_SOURCE_STEP: Final = 40503


class LayerReplicas(NamedTuple):
    """The tables of one layer at one source. E logical experts, C candidates in all."""

    first: Tensor  # int32 [E + 1] where an expert's candidates start
    slot: Tensor  # int32 [>= C] physical expert of each candidate
    until: Tensor  # int32 [>= C] bits of uint32: largest spread that goes there
    key: int  # of placement and layer: all ranks must agree
    load: Tensor  # int64 [E] selections so far; dispatch adds to it
    most: int  # candidates of an expert

    @property
    def num_logical(self) -> int:
        return self.load.shape[0]

    def route(self, ids: Tensor, source: int) -> Tensor:
        """Physical expert of each id; what is no logical expert (-1, or bad) becomes -1.

        Args:
            ids: int64 [T, K] logical experts.
            source: rank whose tokens they are.
        Returns:
            int64 [T, K] on the device of ids and tables; no wait for the device.
        """
        valid = (ids >= 0) & (ids < self.num_logical)
        expert = torch.where(valid, ids, 0)
        tokens = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        spread = ((tokens + source * _SOURCE_STEP) * _STEP) % _RANGE
        until = self.until.to(torch.int64) % _RANGE
        chosen = self.first[expert].to(torch.int64)
        last = self.first[expert + 1] - 1
        for _ in range(self.most - 1):
            chosen += (spread > until[chosen]) & (chosen < last)
        return torch.where(valid, self.slot[chosen].to(torch.int64), -1)

    def add_load(self, ids: Tensor) -> None:
        """Add ids, int64 [T, K], to `load`; none if any of them is bad. No wait for the device."""
        bad = (ids < -1) | (ids >= self.num_logical)
        counts = (ids >= 0) & ~bad.any()
        self.load.scatter_add_(0, torch.where(counts, ids, 0).flatten(), counts.long().flatten())


@dataclass(frozen=True, eq=False)
class Replicas:
    """The tables of all layers at one source. L layers, E logical experts, P physical ones."""

    first: Tensor  # int32 [L, E + 1]
    slot: Tensor  # int32 [L, P], behind the candidates anything
    until: Tensor  # int32 [L, P]
    load: Tensor  # int64 [L, E] selections of this rank's tokens since the tables were made
    most: tuple[int, ...]  # of each layer, candidates of an expert
    digest: int  # of what is where, 45 bits
    _views: dict[int, LayerReplicas] = field(init=False, default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.first.shape[0]

    def of_layer(self, layer: int) -> LayerReplicas:
        """Views of one layer's tables; made once, they are asked for in every dispatch."""
        if (made := self._views.get(layer)) is not None:
            return made
        key = KEY_MARK | self.digest << 16 | layer
        first, slot, until = self.first[layer], self.slot[layer], self.until[layer]
        made = LayerReplicas(first, slot, until, key, self.load[layer], self.most[layer])
        self._views[layer] = made
        return made


def make_replicas(
    physical_to_logical: Tensor,
    num_logical: int,
    source: int,
    num_ranks: int,
    num_nodes: int,
    *,
    capacity: Tensor | None = None,
    prefer: Prefer = "node",
    device: torch.device | str = "cpu",
) -> Replicas:
    """The tables of one source rank.

    Args:
        physical_to_logical: int64 [L, P], on the CPU; slots stand rank by rank, ranks node by node.
        capacity: float [L, P], positive: what a replica takes beside its candidates; None = alike.
        prefer: "node": own rank, then own node, then all; "rank": own rank, then all; "none": all.

    Cost: sorts of [L, P] on the host.
    """
    layers, slots = physical_to_logical.shape
    per_rank, per_node = slots // num_ranks, slots // num_nodes
    place = torch.arange(slots)
    near = torch.zeros(slots, dtype=torch.int64)
    if prefer == "node":
        near += place // per_node == source // (num_ranks // num_nodes)
    if prefer != "none":
        near += place // per_rank == source
    near = near.expand(layers, -1)
    nearest = torch.zeros((layers, num_logical), dtype=torch.int64)
    nearest.scatter_reduce_(1, physical_to_logical, near, "amax")
    chosen_from = near == nearest.gather(1, physical_to_logical)
    expert = torch.where(chosen_from, physical_to_logical, num_logical)
    order = expert.sort(dim=1, stable=True)
    count = torch.zeros((layers, num_logical + 1), dtype=torch.int64)
    count.scatter_add_(1, expert, torch.ones_like(expert))
    first = torch.zeros((layers, num_logical + 1), dtype=torch.int64)
    first[:, 1:] = count[:, :num_logical].cumsum(1)

    weight = torch.ones((layers, slots), dtype=torch.float64) if capacity is None else capacity
    weight = weight.to(torch.float64).gather(1, order.indices)
    total = torch.zeros((layers, num_logical + 1), dtype=torch.float64)
    total.scatter_add_(1, order.values, weight)
    # Running sums expert by expert, so that they do not depend on what else there is.
    most = count[:, :num_logical].amax(1).tolist()
    begin = first.gather(1, order.values)
    upto = weight.clone()
    for step in range(1, max(most)):
        upto += torch.where(place - step >= begin, weight.roll(step, 1), 0.0)
    share = (upto / total.gather(1, order.values)).clamp(max=1.0)
    until = (share * _RANGE).floor().to(torch.int64) - 1
    ends = torch.nn.functional.pad(order.values[:, 1:], (0, 1), value=-1) != order.values
    until = torch.where(ends, _RANGE - 1, until.clamp(min=0))
    until = torch.where(until >= _RANGE // 2, until - _RANGE, until)  # the same 32 bits

    def put(table: Tensor) -> Tensor:
        return table.to(torch.int32).contiguous().to(device)

    load = torch.zeros((layers, num_logical), dtype=torch.int64, device=device)
    digest = _digest(physical_to_logical, num_logical)
    return Replicas(put(first), put(order.indices), put(until), load, tuple(most), digest)


def _digest(physical_to_logical: Tensor, num_logical: int) -> int:
    data = physical_to_logical.to(torch.int32).contiguous().numpy().tobytes()
    text = f"{num_logical} {list(physical_to_logical.shape)}".encode()
    return int.from_bytes(hashlib.sha256(text + data).digest()[:8], "little") >> 19


def check_placement(spec: BufferSpec, placement: Placement, capacity: Any) -> Tensor | None:
    """E200, E201 or E203 unless a buffer can route by it; returns `capacity` as float64."""
    if not hasattr(placement, "physical_to_logical"):
        what = f"rejected placement: got {type(placement).__name__}, want an eplb.Placement"
        raise make_error("E200", what)
    got = placement.num_slots, placement.num_ranks
    if got != (spec.num_experts, spec.num_ranks):
        want = f"{spec.num_experts} and {spec.num_ranks}"
        raise make_error("E203", f"rejected placement: {got[0]} slots, {got[1]} ranks, want {want}")
    per_rank = placement.num_slots // placement.num_ranks
    if any(owner != slot // per_rank for slot, owner in enumerate(spec.owner)):
        raise make_error("E203", "rejected placement: want a buffer with the default expert_map")
    if placement.num_layers > MAX_LAYERS:
        raise make_error(
            "E203", f"rejected placement: {placement.num_layers} layers, want <= 65535"
        )
    if capacity is None:
        return None
    shares = torch.as_tensor(capacity).to("cpu", torch.float64)
    shape = (placement.num_layers, placement.num_slots)
    if shares.shape != shape:
        what = f"rejected capacity: got {list(shares.shape)}, want {list(shape)}"
        raise make_error("E201", what)
    if not bool(((shares > 0) & shares.isfinite()).all()):
        raise make_error("E203", "rejected capacity: want finite numbers > 0")
    return shares
