"""Four ranks as threads, each with a `deep_ep.Buffer`, and random inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ep_comm import reference
from ep_comm.compat import deep_ep
from ep_comm.received import Received
from ep_comm.testing import Cluster

R, E, K, H, M = 4, 8, 3, 64, 8
EL = E // R
UNEVEN = (5, 0, 8, 3)


class Ranks:
    """`num_ranks` ranks; `run(work)` calls work(rank, buffer) on all of them at once."""

    def __init__(self, num_ranks: int = R) -> None:
        self.cluster = Cluster(1, num_ranks)
        self.buffers = [self.new(rank) for rank in range(num_ranks)]

    def new(self, rank: int, *sizes: Any, **options: Any) -> deep_ep.Buffer:
        return deep_ep.Buffer(self.cluster.group(rank), *sizes, **options)

    def run(self, work: Callable[[int, deep_ep.Buffer], Any]) -> list[Any]:
        return self.cluster.run(lambda rank: work(rank, self.buffers[rank]))

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.destroy()


class Inputs:
    """Rows, ids with -1 and duplicates, and weights of every rank."""

    def __init__(
        self,
        tokens: Sequence[int] = UNEVEN,
        *,
        hidden: int = H,
        num_experts: int = E,
        num_topk: int = K,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_experts, self.tokens = num_experts, tuple(tokens)
        self.x = [torch.randn(t, hidden, generator=generator).bfloat16() for t in tokens]
        self.idx = [
            torch.randint(-1, num_experts, (t, num_topk), generator=generator) for t in tokens
        ]
        self.weights = [torch.rand(t, num_topk, generator=generator) for t in tokens]

    def reference(self, x: Sequence[Tensor] | None = None, **options: Any) -> list[Received]:
        return reference.dispatch(
            self.x if x is None else x,
            self.idx,
            self.weights,
            num_experts=self.num_experts,
            max_tokens=max(*self.tokens, 1),
            **{"origins": True, **options},
        )


def dispatch(
    buffer: deep_ep.Buffer,
    x: Any,
    idx: Tensor,
    weights: Tensor | None,
    num_experts: int,
    **more: Any,
) -> tuple[Any, ...]:
    """Layout, then dispatch, as every program does it."""
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, num_experts)
    return buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
        previous_event=event,
        **more,
    )
