"""GPU memory that a buffer of a deployment takes on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from ep_comm import _core
from ep_comm.plan.deployment import IN_FLIGHT, Deployment
from ep_comm.plan.visits import Visits


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    arena: outputs of two dispatches and their expert outputs; in the worst case, that every token
    comes here, and as the routing has it. control: words and records between ranks of a node; on a
    single node also the places of small batches, up to 320 MiB. mailboxes, staging: the rails' part
    of the symmetric segment. direct: receive slots of decode.
    """

    arena_bytes: int
    arena_worst_bytes: int
    control_bytes: int
    mailbox_bytes: int
    staging_bytes: int
    direct_bytes: int
    chunk_bytes: int
    ring_chunks: int
    num_channels: int  # as many as the staging has room for

    @property
    def total_bytes(self) -> int:
        """With an arena for the routing at hand."""
        parts = (self.arena_bytes, self.control_bytes, self.mailbox_bytes)
        return sum(parts) + self.staging_bytes + self.direct_bytes


def memory(d: Deployment, v: Visits) -> Memory:
    """What `d` takes when its tokens go as in `v`."""
    from ep_comm.buffer import Buffer

    shape = d.shape()
    rails = rail_shape(d)
    notice = _core.RailNoticeLayout(shape, d.num_nodes, rails.num_channels)
    rails.notice_bytes = int(notice.bytes)
    on_rails = d.num_nodes > 1
    segment = int(_core.RailLayout(rails).end) if on_rails else 0
    staging = int(rails.staging_bytes) if on_rails and d.mode == "throughput" else 0
    direct = 0
    if d.mode == "direct":
        record = max(d.rail_head_bytes() + d.row_bytes, d.partial_bytes)
        direct = IN_FLIGHT * d.num_ranks * d.num_tokens * record
    worst = Buffer.size_hint(
        num_ranks=d.num_ranks, num_topk=d.topk, hidden=d.hidden, max_tokens=d.num_tokens,
        num_local_experts=d.local_experts, layout=d.layout, in_flight=IN_FLIGHT,
    )  # fmt: skip
    return Memory(
        arena_bytes=_expected_arena(d, v),
        arena_worst_bytes=int(worst),
        control_bytes=int(_core.ControlLayout(shape).end),
        mailbox_bytes=segment - int(rails.staging_bytes) if on_rails else 0,
        staging_bytes=staging,
        direct_bytes=direct,
        chunk_bytes=int(rails.chunk_bytes) if staging else 0,
        ring_chunks=int(rails.ring_chunks) if staging else 0,
        num_channels=int(rails.num_channels),
    )


def rail_shape(d: Deployment) -> _core.RailShape:
    """Rings for the largest record of either operation."""
    largest = max(d.rail_head_bytes() + 2 * d.hidden, d.partial_bytes + 4 * d.topk)
    return _core.divide_staging(d.num_nodes, d.ranks_per_node, d.num_channels, largest)


def _expected_arena(d: Deployment, v: Visits) -> int:
    """Of the rank that receives most; a slab as large as what it holds."""
    tokens = float(v.ranks.sum(0).max())
    rows = tokens if d.layout == "compact" else float(v.selections.sum(0).max())
    record = d.payload_bytes() - d.row_bytes
    return round(IN_FLIGHT * (rows * (d.row_bytes + d.y_bytes) + tokens * record))
