"""Bytes on every link, the time they take, and which link is the slowest.

Dispatch: a token goes once to each other rank of its node, and once to each other node: there to
the rank with its source's local index, which forwards it to the ranks that own its experts. Combine
goes the same way back, a node's rows added up before they cross. Small batches, and direct mode,
go as lines: a token to every rank by itself, where a receiver makes rows of it, and back the same
way, added up by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.errors import make_error
from ep_comm.plan.deployment import Deployment
from ep_comm.plan.hardware import Hardware
from ep_comm.plan.memory import Memory, memory
from ep_comm.plan.visits import Visits, visits


@dataclass
class Bytes:
    """Of one operation, float64 [R] each. Links as the rank sees them; then what its SMs do."""

    nvlink_out: Tensor
    nvlink_in: Tensor
    nic_out: Tensor
    nic_in: Tensor
    pushed: Tensor  # stored into peers; as lines in small batches, like all that travels so
    stored: Tensor  # into the own memory, staging included
    loaded: Tensor  # from anywhere

    def links(self) -> dict[str, Tensor]:
        names = ("nvlink_out", "nvlink_in", "nic_out", "nic_in")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Operation:
    """A prediction for one operation. Bytes are those of the busiest rank of each link."""

    op: str
    time_us: float
    is_small: bool  # goes as a small batch does, see `Deployment.is_small`
    bound: str  # the slowest of `resource_us`
    sms: int  # it was computed for
    sms_needed: int  # with so many, SMs are no slower than the slowest of the others
    resource_us: dict[str, float]  # time of each resource alone, at `sms`
    latency_us: float  # until the pipeline runs, and after its last chunk
    overhead_us: float  # of an operation without bytes
    link_bytes: dict[str, int]
    mean_link_bytes: dict[str, int]
    chunk_tokens: float  # of a full chunk on a rail; below 1: a row goes in pieces

    @property
    def scaleup_gbps(self) -> float:
        """Bytes that arrive over NVLink at the busiest rank, over the time of the call."""
        return self.link_bytes["nvlink_in"] / self.time_us / 1e3

    @property
    def scaleout_gbps(self) -> float:
        """The same by NIC."""
        return self.link_bytes["nic_in"] / self.time_us / 1e3

    def as_dict(self) -> dict[str, Any]:
        gbps = {"scaleup_gbps": self.scaleup_gbps, "scaleout_gbps": self.scaleout_gbps}
        return {**vars(self), **gbps}


@dataclass(frozen=True)
class Plan:
    deployment: Deployment
    hardware: Hardware
    visits: Visits
    dispatch: Operation
    dispatch_cached: Operation
    combine: Operation
    memory: Memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; times in µs, sizes in bytes."""
        v = self.visits
        return {
            "deployment": vars(self.deployment),
            "hardware": vars(self.hardware),
            "routing": {
                "ranks_per_token": v.ranks_per_token,
                "nodes_per_token": v.nodes_per_token,
                "remote_nodes_per_token": v.remote_nodes_per_token,
                "imbalance": v.imbalance,
                "drawn_tokens": v.drawn,
            },
            **{op.op: op.as_dict() for op in (self.dispatch, self.dispatch_cached, self.combine)},
            "memory": {**vars(self.memory), "total_bytes": self.memory.total_bytes},
        }


def predict(
    deployment: Deployment,
    hardware: Hardware | None = None,
    *,
    num_sms: int | None = None,
    seed: int = 0,
    routing: Visits | None = None,
) -> Plan:
    """Predict dispatch, cached dispatch and combine.

    Args:
        hardware: None: its defaults.
        num_sms: of the kernels; None: as many as each operation needs, of small batches all. As in
            `Buffer`, kernels of a small batch start beside those ahead only where it is None.
        seed: of drawn tokens.
        routing: where tokens go, when it is known already.
    Returns:
        Plan. Its times leave out: links shared by several ranks, congestion in the network, jitter
        between ranks, expert kernels on the same GPU, and stores of both directions that get in
        each other's way. They are what a good implementation may reach, not what a bad day brings.
    Raises:
        EPArgumentError: E203.

    Cost: no GPU; 0 to 3 s, most of it for drawing tokens.
    """
    hw = Hardware() if hardware is None else hardware
    if num_sms is not None and not 1 <= num_sms <= hw.num_sms:
        raise make_error("E203", f"rejected num_sms={num_sms}: want 1 to {hw.num_sms}")
    v = visits(deployment, seed=seed) if routing is None else routing
    sizes = memory(deployment, v)
    ops = {op: _operation(op, deployment, hw, v, sizes, num_sms)
           for op in ("dispatch", "dispatch_cached", "combine")}  # fmt: skip
    return Plan(deployment, hw, v, **ops, memory=sizes)


# ---- bytes ----


class _Flows(NamedTuple):
    """Rows of one operation, float64 [R] unless said otherwise."""

    near: Tensor  # to the other ranks of the node, own tokens
    near_in: Tensor
    own: Tensor  # own tokens for own experts
    near_tokens: Tensor  # own tokens that visit the own node
    over: Tensor  # (token, other node)
    over_in: Tensor  # the same as they arrive on the rail
    on: Tensor  # of these, rows forwarded to the other ranks of the node
    on_in: Tensor
    on_own: Tensor  # and rows that stay where the rail ends
    far: Tensor  # (token, rank of another node)
    far_in: Tensor


def _flows(d: Deployment, v: Visits) -> _Flows:
    n, m = d.num_nodes, d.ranks_per_node
    visits = v.ranks.reshape(n, m, n, m)  # source node and local index, destination the same
    node_visits = v.nodes.reshape(n, m, n)
    same = torch.eye(n, dtype=torch.float64)
    home = torch.einsum("aibj,ab->aij", visits, same)  # within a node, [N, source, destination]
    away = visits * (1 - same)[:, None, :, None]
    forwarded = away.sum(0).transpose(0, 1)  # [node, rail, destination]
    self_rows, self_on = (t.diagonal(dim1=1, dim2=2).reshape(-1) for t in (home, forwarded))
    crossing = node_visits * (1 - same)[:, None, :]
    return _Flows(
        near=home.sum(2).reshape(-1) - self_rows,
        near_in=home.sum(1).reshape(-1) - self_rows,
        own=self_rows,
        near_tokens=torch.einsum("aib,ab->ai", node_visits, same).reshape(-1),
        over=crossing.sum(2).reshape(-1),
        over_in=crossing.sum(0).transpose(0, 1).reshape(-1),
        on=forwarded.sum(2).reshape(-1) - self_on,
        on_in=forwarded.sum(1).reshape(-1) - self_on,
        on_own=self_on,
        far=away.sum((2, 3)).reshape(-1),
        far_in=away.sum((0, 1)).reshape(-1),
    )


def _bytes(op: str, d: Deployment, v: Visits) -> Bytes:
    f = _flows(d, v)
    cached = op == "dispatch_cached"
    if d.is_small(op):
        moved = _small_combine(d, v, f) if op == "combine" else _small_dispatch(d, v, f, cached)
    else:
        moved = _combine(d, f) if op == "combine" else _dispatch(d, f, cached)
    if d.rail == "nvlink":  # the put is a copy by our SMs
        moved.loaded = moved.loaded + moved.nic_out
        moved.pushed = moved.pushed + moved.nic_out
        moved.nvlink_out = moved.nvlink_out + moved.nic_out
        moved.nvlink_in = moved.nvlink_in + moved.nic_in
        moved.nic_out = moved.nic_in = torch.zeros_like(moved.nic_in)
    return moved


def _dispatch(d: Deployment, f: _Flows, cached: bool) -> Bytes:
    row = d.payload_bytes(cached=cached)
    record = d.rail_head_bytes(cached=cached) + d.row_bytes
    out = (f.near + f.on) * row
    loaded = (f.near_tokens + f.over.clamp(max=d.num_tokens)) * d.row_bytes + f.over_in * record
    return Bytes(
        nvlink_out=out,
        nvlink_in=(f.near_in + f.on_in) * row,
        nic_out=f.over * record,
        nic_in=f.over_in * record,
        pushed=out,
        stored=(f.own + f.on_own) * row + f.over * record,
        loaded=loaded,
    )


def _combine(d: Deployment, f: _Flows) -> Bytes:
    pulled = (f.near + f.on) * d.y_bytes
    return Bytes(
        nvlink_out=(f.near_in + f.on_in) * d.y_bytes,
        nvlink_in=pulled,
        nic_out=f.over_in * d.partial_bytes,
        nic_in=f.over * d.partial_bytes,
        pushed=torch.zeros_like(pulled),
        stored=f.over_in * d.partial_bytes + d.num_tokens * d.y_bytes,
        loaded=pulled + (f.own + f.on_own) * d.y_bytes + f.over * d.partial_bytes,
    )


# A line of 128 bytes has 112 of a record (csrc/contract/stage.h). What pieces leave free of their
# last line is not counted: records of 7168 elements are up to 3 % longer.
_LINES: Final = 128 / 112


def _small_dispatch(d: Deployment, v: Visits, f: _Flows, cached: bool) -> Bytes:
    """Composed once for the NIC; receivers make rows of lines. For slabs x is read as bf16."""
    row = d.payload_bytes(cached=cached)
    record = d.rail_head_bytes(cached=cached) + d.row_bytes
    arrived = f.near_in + f.own + f.far_in
    composed = f.far.clamp(max=d.num_tokens) * record
    made = arrived if d.layout == "compact" else v.selections.sum(0)
    read = 2 * d.hidden if d.layout == "slab" else d.row_bytes
    return Bytes(
        nvlink_out=f.near * row,
        nvlink_in=f.near_in * row,
        nic_out=f.far * record,
        nic_in=f.far_in * record,
        pushed=f.near * row * _LINES,
        stored=(f.own * row + composed) * _LINES + made * d.row_bytes,
        loaded=float(d.num_tokens * read) + arrived * row * _LINES,
    )


def _small_combine(d: Deployment, v: Visits, f: _Flows) -> Bytes:
    """Rows of a token on one rank are added there, then go to its source."""
    home = f.near + f.own + f.far  # rows that come back
    sent = f.near_in + f.own + f.far_in
    added = sent if d.layout == "compact" else v.selections.sum(0)
    far = f.far_in * d.partial_bytes
    return Bytes(
        nvlink_out=f.near_in * d.y_bytes,
        nvlink_in=f.near * d.y_bytes,
        nic_out=far,
        nic_in=f.far * d.partial_bytes,
        pushed=f.near_in * d.y_bytes * _LINES,
        stored=(f.own * d.y_bytes + far) * _LINES + d.num_tokens * d.y_bytes,
        loaded=added * d.y_bytes + home * d.y_bytes * _LINES,
    )


# ---- time ----


def _operation(
    op: str, d: Deployment, hw: Hardware, v: Visits, sizes: Memory, num_sms: int | None
) -> Operation:
    moved = _bytes(op, d, v)
    is_small = d.is_small(op)
    busiest = {name: float(link.max()) for name, link in moved.links().items()}
    resources = {**_links_us(op, hw, busiest, is_small), **_rail_resources(op, d, hw, v, sizes)}
    links = max(resources.values())
    if is_small:
        resources["memory"] = _us(float(moved.stored.max()), hw.memory_gbps)
        resources["one row"] = hw.small_row_us
    one_sm = _one_sm_us(hw, moved, is_small)
    needed = _needed_sms(hw, one_sm, max(resources.values()))
    sms = num_sms or (hw.num_sms if is_small else needed)
    resources["SMs"] = one_sm / sms
    bound = max(resources, key=resources.__getitem__)
    busy = resources[bound]
    if is_small:  # too short to be a pipeline: what has crossed is then made rows of
        busy = max(hw.small_row_us, links + resources["SMs"] + resources["memory"])
    latency = _latency_us(op, d, hw, v, sizes)
    overhead = _overhead_us(op, d, hw, num_sms is not None)
    return Operation(
        op=op,
        time_us=overhead + latency + busy,
        is_small=is_small,
        bound=bound,
        sms=sms,
        sms_needed=needed,
        resource_us=resources,
        latency_us=latency,
        overhead_us=overhead,
        link_bytes={name: round(value) for name, value in busiest.items()},
        mean_link_bytes={name: round(float(t.mean())) for name, t in moved.links().items()},
        chunk_tokens=_chunk_tokens(op, d, sizes),
    )


def _links_us(op: str, hw: Hardware, busiest: dict[str, float], is_small: bool) -> dict[str, float]:
    pulls = op == "combine" and not is_small
    nvlink = hw.nvlink_pull_gbps if pulls else hw.nvlink_push_gbps
    size = _LINES if is_small else 1.0
    return {
        "NVLink out": _us(busiest["nvlink_out"] * size, nvlink),
        "NVLink in": _us(busiest["nvlink_in"] * size, nvlink),
        "NIC out": _us(busiest["nic_out"] * size, hw.nic_gbps),
        "NIC in": _us(busiest["nic_in"] * size, hw.nic_gbps),
    }


def _needed_sms(hw: Hardware, one_sm: float, slowest: float) -> int:
    needed = hw.num_sms if slowest == 0 else min(-(-one_sm // slowest), hw.num_sms)
    return max(int(needed), 1)


def _us(num_bytes: float, gbps: float) -> float:
    return num_bytes / gbps / 1e3


def _one_sm_us(hw: Hardware, moved: Bytes, is_small: bool) -> float:
    """Loads and stores overlap, but for small batches; the rank with more of either counts."""
    if is_small:
        return _us(float((moved.pushed + moved.stored + moved.loaded).max()), hw.small_sm_gbps)
    stores = moved.pushed / hw.sm_push_gbps + moved.stored / hw.sm_store_gbps
    loads = moved.loaded / hw.sm_load_gbps
    return float(torch.maximum(stores, loads).max()) / 1e3


def _overhead_us(op: str, d: Deployment, hw: Hardware, sms_given: bool) -> float:
    if not d.is_small(op):
        return hw.op_overhead_us(op)
    by_expert = hw.small_slab_us if d.layout != "compact" else 0.0
    alone = hw.small_start_us if sms_given else 0.0
    return hw.op_overhead_us(op, is_small=True) + by_expert + alone


def _on_rails(d: Deployment) -> bool:
    return d.num_nodes > 1 and d.mode == "throughput"


def _chunks(op: str, d: Deployment, sizes: Memory) -> _core.RailChunks:
    if op == "combine":
        return _core.RailChunks(sizes.chunk_bytes, 0, d.partial_bytes)
    head = d.rail_head_bytes(cached=op == "dispatch_cached")
    return _core.RailChunks(sizes.chunk_bytes, head, d.row_bytes)


def _chunk_tokens(op: str, d: Deployment, sizes: Memory) -> float:
    if not _on_rails(d):
        return 0.0
    chunks = _chunks(op, d, sizes)
    return float(chunks.records) / float(chunks.pieces)


def _rail_resources(
    op: str, d: Deployment, hw: Hardware, v: Visits, sizes: Memory
) -> dict[str, float]:
    """Warps that hand puts to the NIC, and rings that wait for their credits."""
    if d.num_nodes == 1:
        return {}
    f = _flows(d, v)
    crossing = f.over_in if op == "combine" else f.over
    if not _on_rails(
        d
    ):  # a put for each row, by one warp of each SM that an operation of decode has
        far = float((f.far_in if op == "combine" else f.far).max())
        return {"rail puts": far * hw.put_us / hw.num_sms}
    tokens = _chunk_tokens(op, d, sizes)
    most = float(crossing.max())
    full = most / tokens / sizes.num_channels * hw.put_us
    window = sizes.num_channels * (d.num_nodes - 1) * sizes.ring_chunks * tokens
    return {"rail puts": full, "rail credits": most / window * _round_trip_us(op, d, hw, v, sizes)}


def _round_trip_us(op: str, d: Deployment, hw: Hardware, v: Visits, sizes: Memory) -> float:
    """From a put to the credit that allows another one in its place."""
    return hw.put_us + 2 * hw.nic_us + _forward_us(op, d, hw, v, sizes)


def _forward_us(op: str, d: Deployment, hw: Hardware, v: Visits, sizes: Memory) -> float:
    """One SM's time to spread a chunk over the ranks of a node, or to add one up from there."""
    per_node = v.ranks_per_token / max(v.nodes_per_token, 1e-9)
    rate = hw.sm_load_gbps if op == "combine" else hw.sm_push_gbps
    return _us(sizes.chunk_bytes * per_node, rate)


def _latency_us(op: str, d: Deployment, hw: Hardware, v: Visits, sizes: Memory) -> float:
    if d.num_nodes == 1:
        return 0.0
    if not _on_rails(d):
        return hw.put_us + hw.nic_us  # rows leave with the notice
    counts = hw.nic_us + hw.flag_us  # entries cross, and are relayed inside the node
    chunk = sizes.chunk_bytes
    rate = hw.nic_gbps if d.rail == "nic" else hw.nvlink_push_gbps
    fill = _us(chunk, hw.sm_store_gbps) + hw.put_us + _us(chunk, rate) + hw.nic_us
    return counts + fill + _forward_us(op, d, hw, v, sizes)
