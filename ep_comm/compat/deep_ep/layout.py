"""Who gets which token: the tensors of `get_dispatch_layout`, and routing without top-k."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

RANKS_PER_NODE: Final = 8  # what `deep_ep` means by a node: above it calls are "internode"


class DispatchLayout(NamedTuple):
    """R ranks, E experts, T tokens here."""

    num_tokens_per_rank: Tensor  # int32 [R], a token counts once per rank
    num_tokens_per_node: Tensor | None  # int32 [nodes], None for one node
    num_tokens_per_expert: Tensor  # int32 [E], selections: a duplicate counts twice
    is_token_in_rank: Tensor  # bool [T, R]


def dispatch_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> DispatchLayout:
    """Count tokens from their choices.

    Args:
        topk_idx: int64 or int32 [T, K] global expert, -1 = none; experts lie in equal blocks.
    """
    if num_experts % num_ranks:
        raise ValueError(f"num_experts={num_experts}: want a multiple of {num_ranks} ranks")
    chosen = topk_idx >= 0
    owner = torch.where(chosen, topk_idx // (num_experts // num_ranks), num_ranks).long()
    num_tokens = topk_idx.shape[0]
    in_rank = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=topk_idx.device)
    in_rank = in_rank.scatter_(1, owner, True)[:, :num_ranks].contiguous()
    return DispatchLayout(
        num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32),
        num_tokens_per_node=_tokens_per_node(in_rank),
        num_tokens_per_expert=torch.bincount(topk_idx[chosen], minlength=num_experts).int(),
        is_token_in_rank=in_rank,
    )


def _tokens_per_node(in_rank: Tensor) -> Tensor | None:
    num_ranks = in_rank.shape[1]
    if num_ranks <= RANKS_PER_NODE:
        return None
    nodes = torch.split(in_rank, RANKS_PER_NODE, 1)
    return torch.stack([node.any(1).sum(dtype=torch.int32) for node in nodes])


def experts_of_ranks(is_token_in_rank: Tensor, num_experts: int) -> Tensor:
    """int64 [T, R] choices that reach these ranks: slot r is rank r's first expert, or -1."""
    num_ranks = is_token_in_rank.shape[1]
    first = torch.arange(num_ranks, device=is_token_in_rank.device) * (num_experts // num_ranks)
    return torch.where(is_token_in_rank, first, -1)
