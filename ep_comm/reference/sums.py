"""Combine: which rows an owner sends back, and the one order in which a source adds them.

Floating-point addition depends on the order, so the order is part of the contract: ascending owner
rank, then slot; fp32 from the first addition to the one rounding at the end; products rounded
before they are added (no fma). Where owners add up their rows of a token first, a rank's sum is
rounded when it is sent, and the source adds those of the ranks. Across nodes what other nodes hold
comes as one sum for each, which its node began with 0 and rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm.handle import Handle, HandleMeta
from ep_comm.reference.routing import ExpertOwner, SendPlan, plan_sends, rank_in_group
from ep_comm.reference.rows import take_rows


def plan_from_handle(handle: Handle, experts: ExpertOwner) -> SendPlan:
    """Recover the plan of the source from its handle. Of a failed dispatch nothing was sent."""
    return plan_sends(torch.where(handle.send_row >= 0, handle.topk_idx, -1), experts)


def rows_for_source(handle: Handle, meta: HandleMeta, source: int) -> Tensor:
    """Rows of x this owner sends back to `source`, in the order in which they travel.

    Returns:
        int64 [m]. compact: one per token of that source; grouped, slab (x seen as [El * capacity,
        H]): one per selection, by (source token, slot).
    """
    first = int(handle.rank_counts[1, :source].sum())
    count = int(handle.rank_counts[1, source])
    if meta.layout == "compact":
        return torch.arange(first, first + count, device=handle.recv_src.device)
    rows = handle.recv_row[first : first + count].flatten().long()
    return rows[rows >= 0]


def parts_for_source(
    rows: Tensor, handle: Handle, meta: HandleMeta, source: int, row_weights: Tensor | None
) -> Tensor:
    """What an owner sends back to `source` when it first adds up its own rows of each token.

    Args:
        rows: x of the owner, grouped or slab, as [rows, H].
        row_weights: float32 [rows], multiplies each row; None = plain sum.
    Returns:
        [n, H], one per token of that source in the order of compact rows: slots added as they
        stand, dtype of the rows, rounded once.
    """
    first = int(handle.rank_counts[1, :source].sum())
    count = int(handle.rank_counts[1, source])
    row = handle.recv_row[first : first + count].long()  # [n, K]
    total = _start(None, (count, rows.shape[1]), rows)
    for slot in range(row.shape[1]):
        token = (row[:, slot] >= 0).nonzero().squeeze(1)
        at = row[token, slot]
        value = rows[at].to(total.dtype)
        if row_weights is not None:
            value = row_weights[at].to(total.dtype).unsqueeze(1) * value
        total = total.index_add(0, token, value)  # no token twice
    return total.to(rows.dtype)


def contribution_of(plan: SendPlan, layout: str) -> Tensor:
    """Where every selection's contribution lies in the concatenation of what the ranks returned.

    Args:
        plan: of this source; rank 0's contributions come first, each rank's in travelling order.
    Returns:
        int64 [T, K], -1 = none; compact: all slots owned by one rank name the same contribution.
    """
    dst = plan.dst.clamp(min=0)
    if layout == "compact":
        place, per_rank = plan.token_place.gather(1, dst), plan.tokens_per_rank
    else:
        place, per_rank = rank_in_group(plan.dst, plan.tokens_per_rank.numel())
    first = per_rank.cumsum(0) - per_rank
    return torch.where(plan.dst >= 0, first[dst] + place, -1)


def adding_order(plan: SendPlan, layout: str, order: str = "rank") -> tuple[Tensor, Tensor]:
    """Slots of every token in the order in which their contributions are added.

    Args:
        order: "rank", or (grouped, slab) "topk".
    Returns:
        slot: int64 [T, K], ascending by (owner rank, slot), slots that add nothing last; with
            order="topk" as they stand.
        adds: bool [T, K], whether that step adds anything; compact: the first slot of each rank.
    """
    if order == "topk":
        slots = torch.arange(plan.dst.shape[1], device=plan.dst.device)
        return slots.expand_as(plan.dst), plan.dst >= 0
    num_ranks = plan.tokens_per_rank.numel()
    dst, slot = torch.sort(torch.where(plan.dst >= 0, plan.dst, num_ranks), dim=1, stable=True)
    adds = dst < num_ranks
    if layout == "compact":
        adds[:, 1:] &= dst[:, 1:] != dst[:, :-1]
        adds, first = torch.sort(adds, dim=1, descending=True, stable=True)
        slot = slot.gather(1, first)
    return slot, adds


class NodesOfSource(NamedTuple):
    """Where the source of a sum stands."""

    ranks_per_node: int
    own: int  # its node


def add_in_order(
    contributions: Tensor,
    plan: SendPlan,
    layout: str,
    *,
    topk_weights: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    order: str = "rank",
    nodes: NodesOfSource | None = None,
) -> Tensor:
    """Sum the contributions to every token of one source.

    Args:
        contributions: [C, H], concatenated by rank, each rank's in travelling order.
        topk_weights: float32 [T, K], multiplies each selection's contribution; None = plain sum.
        bias: [T, H] where the sum starts, or two that are added first.
        order: see `adding_order`.
        nodes: rows of other nodes are added there first.
    Returns:
        [T, H], dtype of the contributions, rounded once, and once on each other node.
    """
    dtype = contributions.dtype
    total = _start(bias, (plan.dst.shape[0], contributions.shape[1]), contributions)
    slot, adds = adding_order(plan, layout, order)
    index = contribution_of(plan, layout)

    def add(to: Tensor, here: Tensor) -> None:
        _add(to, contributions, index, slot, topk_weights, here)

    if nodes is None:
        add(total, adds)
        return total.to(dtype)
    node = plan.dst.gather(1, slot) // nodes.ranks_per_node
    for there in range(plan.tokens_per_rank.numel() // nodes.ranks_per_node):
        here = adds & (node == there)
        if there == nodes.own:
            add(total, here)
            continue
        part = torch.zeros_like(total)
        add(part, here)
        token = here.any(dim=1).nonzero().squeeze(1)
        total.index_add_(0, token, part[token].to(dtype).to(total.dtype))
    return total.to(dtype)


def _add(
    total: Tensor,
    contributions: Tensor,
    index: Tensor,
    slot: Tensor,
    topk_weights: Tensor | None,
    adds: Tensor,
) -> None:
    """Add to `total` what `adds` names, a step of every token at a time."""
    for step in range(adds.shape[1]):
        # A token that adds nothing is left out: adding 0.0 would turn a bias of -0.0 into 0.0.
        token = adds[:, step].nonzero().squeeze(1)  # [n]
        token_slot = slot[token, step]
        value = contributions.index_select(0, index[token, token_slot]).to(total.dtype)  # [n, H]
        if topk_weights is not None:
            value = topk_weights[token, token_slot].to(total.dtype).unsqueeze(1) * value
        if token.numel() == total.shape[0]:
            total += value
        else:
            total.index_add_(0, token, value)  # no token twice


def weights_home(values: Tensor, plan: SendPlan, layout: str) -> Tensor:
    """Bring one number per selection back to its source, as the owner of the expert holds it.

    Args:
        values: compact [C, K], grouped and slab [C], concatenated like the contributions.
    Returns:
        [T, K], 0 for slots without an expert.
    """
    index = contribution_of(plan, layout)
    home = take_rows(values, index.flatten(), 0).view(*index.shape, *values.shape[1:])
    if layout != "compact":
        return home  # [T, K]
    return home.diagonal(dim1=1, dim2=2)  # [T, K, K]: slot k takes column k


def _start(
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None, shape: tuple[int, int], like: Tensor
) -> Tensor:
    """New accumulator, fp32 (float64 for float64), that holds 0 or the bias."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    given = bias if isinstance(bias, tuple) else (bias,)
    terms = [b.to(dtype) for b in given if b is not None]
    if not terms:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return terms[0].clone() if len(terms) == 1 else terms[0] + terms[1]
