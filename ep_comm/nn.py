"""A mixture-of-experts layer: how a model uses dispatch and combine.

Route, dispatch, experts, combine; the whole layer is some twenty lines, to be copied and changed.
Its result does not depend on how many ranks share the experts: every sum has one order, so the
layer on one rank with the tokens of all (`over_shards`) gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ep_comm.autograd import combine, dispatch
from ep_comm.buffer import Buffer
from ep_comm.received import Received
from ep_comm.reference.routing import rank_in_group


class Expert(nn.Module):
    """Two linear maps with a GELU in between: [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn_hidden, bias=False)
        self.down = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


class MoE(nn.Module):
    """Top-k routed experts, spread over the ranks of a buffer.

    Args:
        buffer: of as many experts as the layer has; layers may share one.
        ffn_hidden: inner size of an expert.
        num_topk: experts of a token; not above the buffer's.
        capacity_factor: of a rank's tokens at most capacity_factor * num_tokens * num_topk /
            num_experts choose the same expert; later ones lose that choice (-1). None: no limit.
        shared_hidden: inner size of an expert that sees every token, 0 = none. It runs on the
            token's own rank and enters the sum as bias, first.

    Attributes:
        load: int32 [local experts] tokens each got in the last forward.
        dropped: choices lost to the capacity in the last forward.
        balance_loss: scalar, 1 when the router spreads tokens evenly, up to num_experts otherwise;
            add a little of it to the loss.

    The experts of this rank are parameters here (`expert_parameters`); all others are replicated,
    and their gradients have to be summed over the ranks.
    """

    load: Tensor
    balance_loss: Tensor

    def __init__(
        self,
        buffer: Buffer,
        hidden: int,
        ffn_hidden: int,
        num_topk: int,
        *,
        capacity_factor: float | None = None,
        shared_hidden: int = 0,
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.num_topk = num_topk
        self.capacity_factor = capacity_factor
        self.dropped = 0
        self.router = nn.Linear(hidden, buffer.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, ffn_hidden) for _ in buffer.local_experts)
        self.shared = Expert(hidden, shared_hidden) if shared_hidden > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]. Collective, backward too: see ep_comm.autograd."""
        return over_shards([self], [x])[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for the tokens of this rank.

        Returns:
            topk_idx: int64 [num_tokens, num_topk], ascending in each token, -1 = dropped. Owners
                then ascend with the slots, so the order of sums is the same on any number of ranks.
            topk_weights: float32 [num_tokens, num_topk], of a token's choices together 1.
        """
        scores = self.router(x).float().softmax(-1)  # [T, E]
        topk_idx = scores.topk(self.num_topk).indices.sort(-1).values
        chosen = scores.gather(1, topk_idx)
        topk_weights = chosen / chosen.sum(-1, keepdim=True)
        place, sizes = rank_in_group(topk_idx, scores.shape[1])
        share = sizes / max(topk_idx.numel(), 1)
        self.balance_loss = (share * scores.mean(0)).sum() * scores.shape[1]
        if self.capacity_factor is None:
            return topk_idx, topk_weights
        capacity = math.ceil(self.capacity_factor * topk_idx.numel() / scores.shape[1])
        fits = place < capacity
        self.dropped = int((~fits).sum())
        return torch.where(fits, topk_idx, -1), torch.where(fits, topk_weights, 0.0)

    def run_experts(self, received: Received) -> Tensor:
        """Each local expert on its rows, times the weights: [rows, hidden] as `received.x`."""
        self.load = received.num_tokens_per_expert
        groups = torch.split(received.x, received.counts)
        rows = [expert(group) for expert, group in zip(self.experts, groups, strict=True)]
        # A rank without experts returns its no rows, so that its backward takes part.
        y = torch.cat(rows) if rows else received.x
        assert received.topk_weights is not None
        return y * received.topk_weights.unsqueeze(1).to(y.dtype)

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters that only this rank has."""
        return list(self.experts.parameters())


def over_shards(layers: Sequence[MoE], shards: Sequence[Tensor]) -> list[Tensor]:
    """One layer over several shards of tokens in one process.

    Each shard is routed by a layer of its own (say, a replica with its own gradients), as each rank
    does; the experts are those of the first layer and see all shards at once, in order. So one
    process with R shards computes what R ranks compute together, in the same order, bit for bit.

    Args:
        layers: one per shard, of the same buffer.
        shards: [..., hidden] each.
    Returns:
        One [..., hidden] per shard.
    """
    first = layers[0]
    tokens = [x.flatten(0, -2) for x in shards]
    routed = [layer.route(x) for layer, x in zip(layers, tokens, strict=True)]
    shared = [
        layer.shared(x) for layer, x in zip(layers, tokens, strict=True) if layer.shared is not None
    ]
    received = dispatch(
        first.buffer,
        torch.cat(tokens),
        torch.cat([idx for idx, _ in routed]),
        torch.cat([weights for _, weights in routed]),
        layout="grouped",
    )
    bias = torch.cat(shared) if shared else None
    out = combine(first.buffer, first.run_experts(received), received.handle, bias=bias)
    parts = out.split([x.shape[0] for x in tokens])
    return [part.view(x.shape) for part, x in zip(parts, shards, strict=True)]
