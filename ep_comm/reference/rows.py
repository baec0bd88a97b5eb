"""Where rows come to lie: what a receiver grants to its sources, and how it lays out what arrived.

A receiver first gets the counts of every source and answers with bases (`plan_receive`). What
then arrives is always the compact form, each token once, by (source rank, source token); grouped
and slab are the same rows, copied to the places `recv_row` names (`arrange`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Origins, Received
from ep_comm.reference.routing import SendPlan, rank_in_group

SCALE_COLUMN_ALIGNMENT: Final = 4  # slab scales: a column holds the capacity rounded up to this


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Options:
    """What a call to dispatch asks for, equal on all ranks, and the sizes that follow from it."""

    layout: str
    num_ranks: int
    max_tokens: int
    num_topk: int
    hidden: int
    alignment: int = 1
    capacity: int | None = None
    sync: bool = True
    row_index: bool = False  # compact only
    generation: int = 0
    routing_number: int = 0

    @property
    def max_unique(self) -> int:
        """Most unique tokens a rank may receive: rows of recv_src when shapes are static."""
        worst = self.num_ranks * self.max_tokens
        if self.layout == "compact" and self.capacity is not None:
            return min(worst, self.capacity)
        return worst

    @property
    def slab_rows(self) -> int:
        """Rows per local expert of a slab."""
        return self.num_ranks * self.max_tokens if self.capacity is None else self.capacity

    def max_grouped_rows(self, num_local: int) -> int:
        """Rows into which any routing without duplicate experts fits, padding included."""
        if num_local == 0:
            return 0
        selections = self.max_unique * min(self.num_topk, num_local)
        return round_up(selections + num_local * (self.alignment - 1), self.alignment)


# ---- Before data moves: bases, capacity ----


class ReceivePlan(NamedTuple):
    """What a receiver derives from the announced counts; the first two go back to the sources."""

    token_base: Tensor  # int64 [R] first compact row of each source
    expert_base: Tensor  # int64 [R, El] grouped, slab: first row of each source in each group
    offsets: Tensor  # int64 [El + 1] first row of each group, and the end of the last one
    tokens_from: Tensor  # int64 [R] unique tokens from each source
    num_tokens_per_expert: Tensor  # int64 [El] selections
    num_tokens: int  # N


def group_offsets(num_tokens_per_expert: Tensor, alignment: int) -> Tensor:
    """int64 [El + 1] starts of groups padded to `alignment`; e.g. [3, 0, 2], 2 -> [0, 4, 4, 6]."""
    sizes = (num_tokens_per_expert.long() + alignment - 1) // alignment * alignment
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def plan_receive(tokens_from: Tensor, selections_from: Tensor, options: Options) -> ReceivePlan:
    """Place everything one rank will receive.

    Args:
        tokens_from: int64 [R] unique tokens announced by each source.
        selections_from: int64 [R, El] selections of each local expert announced by each source.
    """
    per_expert = selections_from.sum(0)
    if options.layout == "slab":
        offsets = torch.arange(per_expert.numel() + 1, device=per_expert.device) * options.slab_rows
    else:
        offsets = group_offsets(per_expert, options.alignment)
    return ReceivePlan(
        token_base=tokens_from.cumsum(0) - tokens_from,
        expert_base=offsets[:-1] + selections_from.cumsum(0) - selections_from,
        offsets=offsets,
        tokens_from=tokens_from,
        num_tokens_per_expert=per_expert,
        num_tokens=int(tokens_from.sum()),
    )


def find_overflow(plan: ReceivePlan, options: Options) -> tuple[int, int] | None:
    """(got, limit) of the first limit this rank exceeds (E230), None when everything fits."""
    num_local = plan.num_tokens_per_expert.numel()
    grouped_rows = int(plan.offsets[-1])
    limits: list[tuple[int, int | None]] = []
    if options.layout == "slab":
        fullest = int(plan.num_tokens_per_expert.max()) if num_local else 0
        limits.append((fullest, options.slab_rows))
    elif options.layout == "grouped":
        static_rows = None if options.sync else options.max_grouped_rows(num_local)
        limits.append((grouped_rows, static_rows if options.capacity is None else options.capacity))
    else:
        limits.append((plan.num_tokens, options.capacity))
        if options.row_index and not options.sync:
            limits.append((grouped_rows, options.max_grouped_rows(num_local)))
    for got, limit in limits:
        if limit is not None and got > limit:
            return got, limit
    return None


def result_rows(plan: ReceivePlan, options: Options) -> tuple[int, int]:
    """Rows of recv_src and rows of x (slab: per expert)."""
    num_unique = plan.num_tokens if options.sync else options.max_unique
    if options.layout == "slab":
        return num_unique, options.slab_rows
    if options.layout == "grouped" and options.sync:
        return num_unique, int(plan.offsets[-1])
    if options.sync:
        return num_unique, plan.num_tokens
    if options.capacity is not None:
        return num_unique, options.capacity
    if options.layout == "grouped":
        return num_unique, options.max_grouped_rows(plan.num_tokens_per_expert.numel())
    return num_unique, num_unique


def row_index_length(plan: ReceivePlan, options: Options) -> int | None:
    """Length of the row index that goes with a compact result; None when none was asked for."""
    if not options.row_index or options.layout != "compact":
        return None
    if options.sync:
        return int(plan.offsets[-1])
    return options.max_grouped_rows(plan.num_tokens_per_expert.numel())


# ---- After data moved: handle and layouts ----


class Arrived(NamedTuple):
    """What reached one rank, in compact order; N rows, whatever the layout.

    The last two are None for a cached dispatch: its handle already knows them.
    """

    x: Tensor  # [N, H]
    scales: Tensor | None  # [N, S]
    topk_weights: Tensor | None  # [N, K], 0 for slots owned elsewhere
    token: Tensor | None  # int64 [N] source token
    local_id: Tensor | None  # int64 [N, K] local expert of each slot, -1 = not here


def received_rows(local_id: Tensor, group_start: Tensor) -> Tensor:
    """Row of every selection that arrived: start of its group + place in (row, slot) order.

    Args:
        local_id: int64 [N, K] local expert of each slot, -1 = not here.
        group_start: int64 [El] first row of each group.
    Returns:
        int64 [N, K], -1 = not here.
    """
    place, _ = rank_in_group(local_id, group_start.numel())
    if group_start.numel() == 0:
        return place
    return torch.where(local_id >= 0, group_start[local_id.clamp(min=0)] + place, -1)


def rows_to_selections(row: Tensor, num_rows: int) -> Tensor:
    """Invert `received_rows`: int64 [num_rows] index into row.flatten(), -1 = padding."""
    flat = row.flatten()
    selection = (flat >= 0).nonzero().squeeze(1)
    inverse = torch.full((num_rows,), -1, dtype=torch.int64, device=row.device)
    inverse[flat[selection]] = selection
    return inverse


def make_handle(
    options: Options,
    sends: SendPlan,
    topk_weights: Tensor | None,
    send_row: Tensor,
    receives: ReceivePlan,
    arrived: Arrived,
) -> Handle:
    """Put together the handle of one rank.

    Args:
        topk_weights: [T, K] as given on this rank, or None.
        send_row: int32 [T, K], see `send_rows`.
        arrived: needs `token` and `local_id`.
    """
    assert arrived.token is not None
    assert arrived.local_id is not None
    num_tokens, num_topk = sends.topk_idx.shape
    num_unique, num_rows = result_rows(receives, options)
    device = sends.topk_idx.device
    ranks = torch.arange(options.num_ranks, device=device)
    recv_src = torch.stack([torch.repeat_interleave(ranks, receives.tokens_from), arrived.token], 1)
    recv_row = arrived.local_id.new_empty((0, num_topk))
    if options.layout != "compact":
        rows = received_rows(arrived.local_id, receives.offsets[:-1])
        recv_row = pad_rows(rows, num_unique, -1)
    meta = HandleMeta(
        generation=options.generation,
        routing_number=options.routing_number,
        layout=options.layout,
        alignment=options.alignment,
        num_tokens=num_tokens,
        num_unique=num_unique,
        num_rows=num_rows,
        num_topk=num_topk,
        capacity=-1 if options.capacity is None else options.capacity,
        sync=options.sync,
        has_weights=topk_weights is not None,
        num_ranks=options.num_ranks,
        num_experts=sends.selections_per_expert.numel(),
        num_local_experts=receives.num_tokens_per_expert.numel(),
        hidden=options.hidden,
    )
    no_weights = torch.empty((0, num_topk), dtype=torch.float32, device=device)
    return Handle(
        meta=meta.pack(),
        topk_idx=sends.topk_idx,
        topk_weights=no_weights if topk_weights is None else topk_weights,
        send_row=send_row,
        recv_src=pad_rows(recv_src, num_unique, -1).to(torch.int32),
        recv_row=recv_row.to(torch.int32),
        rank_counts=torch.stack([sends.tokens_per_rank, receives.tokens_from]),
        num_tokens_per_expert=receives.num_tokens_per_expert.to(torch.int32),
    )


def arrange(
    arrived: Arrived,
    handle: Handle,
    meta: HandleMeta,
    *,
    idx_dtype: torch.dtype = torch.int64,
    row_index_rows: int | None = None,
    status: int = 0,
) -> Received:
    """Lay out what arrived as the handle says; differentiable in x and topk_weights.

    Args:
        idx_dtype: dtype of the topk_idx given, which the returned one gets.
        row_index_rows: (compact) length of the row index, see `row_index_length`; None = no index.
        status: number of the error of a failed dispatch with sync=False.
    """
    device = handle.rank_counts.device
    num_recv = int(handle.rank_counts[1].sum())
    counts = handle.num_tokens_per_expert
    offsets = row_index = None
    if meta.layout == "compact":
        x, scales, topk_idx, topk_weights = _lay_compact(arrived, meta)
        if row_index_rows is not None and arrived.local_id is not None:
            starts = group_offsets(counts, meta.alignment)
            rows = received_rows(arrived.local_id, starts[:-1])
            selection = rows_to_selections(rows, row_index_rows)
            row_index = torch.where(selection >= 0, selection // meta.num_topk, -1).to(torch.int32)
            offsets = starts.to(torch.int32)
    else:
        rows = handle.recv_row[:num_recv].long()
        x, scales, topk_idx, topk_weights = _lay_expanded(arrived, rows, meta)
        if meta.layout == "grouped":
            offsets = group_offsets(counts, meta.alignment).to(torch.int32)
    counted = torch.tensor([num_recv], dtype=torch.int32, device=device)
    return Received(
        x=x,
        topk_idx=None if topk_idx is None else topk_idx.to(idx_dtype),
        topk_weights=topk_weights,
        scales=scales,
        num_tokens_per_expert=counts,
        num_recv=num_recv if meta.sync else counted,
        offsets=offsets,
        row_index=row_index,
        status=torch.tensor([status], dtype=torch.int32, device=device),
        handle=handle,
        layout=meta.layout,
    )


# x, scales, topk_idx, topk_weights
_Fields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _lay_compact(arrived: Arrived, meta: HandleMeta) -> _Fields:
    """What arrived is compact already; static shapes add rows."""
    x, scales, weights, _, local_id = arrived
    return (
        pad_rows(x, meta.num_rows, 0),
        None if scales is None else pad_rows(scales, meta.num_rows, 0),
        None if local_id is None else pad_rows(local_id, meta.num_rows, -1),
        None if weights is None else pad_rows(weights, meta.num_rows, 0),
    )


def _lay_expanded(arrived: Arrived, recv_row: Tensor, meta: HandleMeta) -> _Fields:
    """One row per selection, recv_row int64 [N, K]; grouped and slab differ only in shape."""
    x, scales, weights, _, local_id = arrived
    is_slab = meta.layout == "slab"
    num_rows = meta.num_rows * (meta.num_local_experts if is_slab else 1)
    selection = rows_to_selections(recv_row, num_rows)  # [rows]
    token = torch.where(selection >= 0, selection // max(meta.num_topk, 1), -1)  # [rows]
    x = take_rows(x, token, 0)
    scales = None if scales is None else take_rows(scales, token, 0)
    local_id = None if local_id is None else take_rows(local_id.flatten(), selection, -1)
    weights = None if weights is None else take_rows(weights.flatten(), selection, 0)
    if is_slab:
        shape = (meta.num_local_experts, meta.num_rows)
        x = x.reshape(*shape, x.shape[1])
        scales = None if scales is None else _column_major(scales.reshape(*shape, scales.shape[1]))
        local_id = None if local_id is None else local_id.reshape(shape)
        weights = None if weights is None else weights.reshape(shape)
    return x, scales, local_id, weights


def _column_major(scales: Tensor) -> Tensor:
    """[El, capacity, S] with strides (S * capA, 1, capA), as a masked grouped GEMM loads it."""
    num_local, capacity, num_scales = scales.shape
    column = round_up(capacity, SCALE_COLUMN_ALIGNMENT)
    columns = scales.new_zeros((num_local, num_scales, column)).transpose(1, 2)[:, :capacity]
    return columns.copy_(scales)


# ---- Rows of any dtype ----


def trace_origins(rank_rows: Tensor, handle: Handle, meta: HandleMeta) -> Origins:
    """Who sent what, from the handle of a fresh dispatch.

    Args:
        rank_rows: [R, R] unique tokens from each source (row) to each rank (column).
    """
    if meta.layout == "compact":
        rank_ends = rank_rows.cumsum(0).to(torch.int32)
        tokens = handle.recv_src[:, 1].contiguous()
        return Origins(rank_ends, pad_rows(tokens, meta.num_rows, -1), None)
    num_local, counts = meta.num_local_experts, handle.num_tokens_per_expert
    starts, shape = group_offsets(counts, meta.alignment), meta.x_shape[:-1]
    if meta.layout == "slab":
        starts = torch.arange(num_local + 1, device=counts.device) * meta.num_rows
    present = handle.recv_row >= 0
    row = handle.recv_row[present].long()  # of every selection, as the two below
    src, token = (handle.recv_src[:, i : i + 1].expand_as(present)[present] for i in (0, 1))
    row_token = torch.full((math.prod(shape),), -1, dtype=torch.int32, device=row.device)
    row_token[row] = token
    group = torch.searchsorted(starts, row, right=True) - 1
    key, num_keys = group * meta.num_ranks + src.long(), num_local * meta.num_ranks
    num_rows = torch.bincount(key, minlength=num_keys)
    first = torch.zeros(num_keys, dtype=torch.int64, device=row.device)
    first.scatter_reduce_(0, key, row - starts[group], "amin", include_self=False)
    ranges = (first << 32 | num_rows).view(num_local, meta.num_ranks)
    return Origins(None, row_token.view(shape), ranges)


def take_rows(rows: Tensor, index: Tensor, fill: int) -> Tensor:
    """rows[index], or `fill` where the index is -1.

    Args:
        rows: [n, ...] any dtype, 8-bit floats included.
        index: int64 [m] in [-1, n).
    """
    if rows.dtype.itemsize == 1 and rows.is_floating_point():
        # Few operations know 8-bit floats, so their bytes move.
        return take_rows(rows.view(torch.uint8), index, fill).view(rows.dtype)
    if rows.shape[0] == 0:
        return rows.new_full((index.numel(), *rows.shape[1:]), fill)
    present = (index >= 0).view(-1, *([1] * (rows.dim() - 1)))
    return torch.where(present, rows[index.clamp(min=0)], fill)


def pad_rows(rows: Tensor, num_rows: int, fill: int) -> Tensor:
    """rows [n, ...] followed by rows of `fill` up to num_rows >= n."""
    if rows.shape[0] == num_rows:
        return rows
    index = torch.arange(num_rows, device=rows.device)
    return take_rows(rows, torch.where(index < rows.shape[0], index, -1), fill)
