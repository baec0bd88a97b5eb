"""Which token goes where: the rules a source applies to its own top-k, before anyone is asked.

Everything else follows from two orders. A source sends each of its tokens to a rank at most once,
tokens ascending. The selections of one expert are ordered by (source rank, source token, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm.errors import make_error


class ExpertOwner(NamedTuple):
    """Where each expert lives. Local experts of a rank are its experts in ascending global id."""

    owner: Tensor  # int64 [E] rank
    local_id: Tensor  # int64 [E] position among the experts of that rank
    num_local: list[int]  # [R] experts of each rank; may be 0


def expert_owner(
    num_experts: int, num_ranks: int, expert_map: Sequence[int] | Tensor | None = None
) -> ExpertOwner:
    """Place the experts on the ranks.

    Args:
        expert_map: int [E], owner of each expert; None = contiguous blocks whose sizes differ by at
            most one, the first E mod R ranks having one more.
    Returns:
        ExpertOwner, tensors on the CPU; e.g. E=5, R=2: owner 0 0 0 1 1, local_id 0 1 2 0 1.
    Raises:
        EPArgumentError: E212, the map has another length or names a rank outside [0, R).
    """
    if expert_map is None:
        small, num_larger = divmod(num_experts, num_ranks)
        sizes = torch.full((num_ranks,), small)
        sizes[:num_larger] += 1
        owner = torch.repeat_interleave(torch.arange(num_ranks), sizes)
    else:
        owner = torch.as_tensor(expert_map, dtype=torch.int64).cpu()
        _check_map(owner, num_experts, num_ranks)
    local_id, num_local = rank_in_group(owner, num_ranks)
    return ExpertOwner(owner, local_id, num_local.tolist())


def _check_map(owner: Tensor, num_experts: int, num_ranks: int) -> None:
    if owner.shape != (num_experts,):
        what = f"rejected map: got shape {list(owner.shape)}, want [{num_experts}]"
        raise make_error("E212", what)
    for expert, rank in enumerate(owner.tolist()):
        if not 0 <= rank < num_ranks:
            what = f"rejected map: expert {expert} on rank {rank} of {num_ranks}"
            raise make_error("E212", what)


def rank_in_group(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Number the members of each group in the order in which they stand.

    This one function fixes every order of the library: read row by row, "the order in which they
    stand" is (token, slot) at a source and (source rank, source token, slot) at a receiver.

    Args:
        group: int64, any shape, read in row-major order; -1 = in no group. E.g. [0, 1, 0, -1].
    Returns:
        place: int64, same shape, 0 = first of its group, -1 = in no group; [0, 0, 1, -1].
        sizes: int64 [num_groups]; [2, 1].
    """
    flat = group.flatten()
    member = (flat >= 0).nonzero().squeeze(1)
    sorted_group, order = torch.sort(flat[member], stable=True)
    sizes = torch.bincount(sorted_group, minlength=num_groups)
    starts = sizes.cumsum(0) - sizes
    ordinal = torch.arange(member.numel(), device=flat.device) - starts[sorted_group]
    place = torch.full_like(flat, -1)
    place[member[order]] = ordinal
    return place.view(group.shape), sizes


class BadIds(NamedTuple):
    """Ids outside [-1, E), with the first of them for the error message."""

    num_bad: int
    token: int
    slot: int
    expert: int


def find_bad_ids(topk_idx: Tensor, num_experts: int) -> BadIds | None:
    """The ids of `topk_idx`, int [T, K], that name no expert (E213); None when all are good."""
    bad = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()
    if bad.shape[0] == 0:
        return None
    token, slot = bad[0].tolist()
    return BadIds(bad.shape[0], token, slot, int(topk_idx[token, slot]))


class SendPlan(NamedTuple):
    """What one source knows from its own top-k alone; the last two are the counts it announces."""

    topk_idx: Tensor  # int64 [T, K] global expert ids, -1 = none
    dst: Tensor  # int64 [T, K] owner of the selected expert, -1 = none
    local_id: Tensor  # int64 [T, K] that expert's local id there, -1 = none
    token_place: Tensor  # int64 [T, R] place among the tokens sent to rank r, -1 = not sent there
    selection_place: Tensor  # int64 [T, K] place among the selections of that expert, -1 = none
    tokens_per_rank: Tensor  # int64 [R] announced: rows to each rank, each token once
    selections_per_expert: Tensor  # int64 [E] announced: duplicates counted

    def tokens_to(self, rank: int) -> Tensor:
        """int64 [n] tokens sent to `rank`, ascending: the order in which they travel."""
        return (self.token_place[:, rank] >= 0).nonzero().squeeze(1)


def plan_sends(topk_idx: Tensor, experts: ExpertOwner) -> SendPlan:
    """Plan the sends of one source.

    Args:
        topk_idx: int64 [T, K] global expert ids in [-1, E).
    """
    owner, local_id = experts.owner.to(topk_idx.device), experts.local_id.to(topk_idx.device)
    num_experts, num_ranks = owner.numel(), len(experts.num_local)
    selected = topk_idx >= 0
    expert = topk_idx.clamp(min=0)
    dst = torch.where(selected, owner[expert], -1)
    selection_place, selections_per_expert = rank_in_group(topk_idx, num_experts)
    ranks = torch.arange(num_ranks, device=topk_idx.device)
    sent = (dst.unsqueeze(2) == ranks).any(1)  # [T, R]: a token crosses to a rank once
    return SendPlan(
        topk_idx=topk_idx,
        dst=dst,
        local_id=torch.where(selected, local_id[expert], -1),
        token_place=torch.where(sent, sent.cumsum(0) - 1, -1),
        selection_place=selection_place,
        tokens_per_rank=sent.sum(0),
        selections_per_expert=selections_per_expert,
    )


class Outgoing(NamedTuple):
    """What one source sends to one rank beside rows of x: n tokens, in the order of `tokens_to`."""

    tokens: Tensor  # int64 [n]
    local_id: Tensor  # int64 [n, K] ids at the receiver, -1 for slots owned elsewhere
    topk_weights: Tensor | None  # [n, K], 0 for slots owned elsewhere


def metadata_to(plan: SendPlan, rank: int, topk_weights: Tensor | None) -> Outgoing:
    """Tokens, local ids and weights that `rank` gets; topk_weights [T, K] of the source or None."""
    tokens = plan.tokens_to(rank)
    here = plan.dst[tokens] == rank
    local_id = torch.where(here, plan.local_id[tokens], -1)
    weights = None if topk_weights is None else torch.where(here, topk_weights[tokens], 0)
    return Outgoing(tokens, local_id, weights)


def send_rows(plan: SendPlan, layout: str, token_base: Tensor, expert_base: Tensor) -> Tensor:
    """Final row of every selection at its owner, from the bases the receivers published.

    Args:
        token_base: int64 [R] first compact row for this source at every rank.
        expert_base: int64 [E] grouped, slab: first row for this source's selections of each expert.
    Returns:
        int32 [T, K], -1 = none; compact: the token's row, the same for all slots of one owner.
    """
    if layout == "compact":
        dst = plan.dst.clamp(min=0)
        row = token_base[dst] + plan.token_place.gather(1, dst)
    else:
        row = expert_base[plan.topk_idx.clamp(min=0)] + plan.selection_place
    return torch.where(plan.dst >= 0, row, -1).to(torch.int32)
