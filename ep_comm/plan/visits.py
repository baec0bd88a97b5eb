"""Which ranks and nodes tokens visit: exactly where a formula exists, else by drawing tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ep_comm.plan.deployment import Deployment
from ep_comm.reference.routing import expert_owner

MAX_DRAWN: Final = 1 << 15  # tokens of all ranks together
_AT_ONCE: Final = 1 << 12
_FOR_LOAD: Final = 1 << 13  # tokens that tell the balancer how popular experts are


@dataclass(frozen=True)
class Visits:
    """Tokens of one call, in expectation. R ranks, N nodes; rows are sources.

    A token visits a rank, or node, once, however many of its experts are there.
    """

    num_tokens: int  # of each rank
    ranks: Tensor  # float64 [R, R] tokens that visit a rank
    nodes: Tensor  # float64 [R, N] tokens that visit a node
    selections: Tensor  # float64 [R, R] selections of experts of a rank
    drawn: int  # tokens drawn; 0 = computed exactly

    @property
    def ranks_per_token(self) -> float:
        return float(self.ranks.sum(1).mean()) / self.num_tokens

    @property
    def nodes_per_token(self) -> float:
        return float(self.nodes.sum(1).mean()) / self.num_tokens

    @property
    def remote_nodes_per_token(self) -> float:
        """Other nodes than the token's own."""
        num_ranks, num_nodes = self.nodes.shape
        own = torch.arange(num_ranks).unsqueeze(1) // (num_ranks // num_nodes)
        return self.nodes_per_token - float(self.nodes.gather(1, own).mean()) / self.num_tokens

    @property
    def imbalance(self) -> float:
        """Selections that the busiest rank gets, over the mean."""
        load = self.selections.sum(0)
        return float(load.max() / load.mean())


def visits(deployment: Deployment, *, seed: int = 0) -> Visits:
    """Where the tokens of every rank go.

    Exact for uniform routing without groups, replicas and shared experts: the chance that a rank is
    missed is hypergeometric. Otherwise tokens are drawn, at most 32768 in all, with `seed`; without
    replicas all ranks draw alike and share their draws. Replicas are chosen as dispatch chooses
    them: on the own rank, else on the own node, else spread over all.
    """
    d = deployment
    unlimited = d.top_groups in (None, d.num_groups)
    if d.zipf == 0 and unlimited and not d.num_shared and not d.has_replicas:
        return _exact(d)
    return _drawn_with_replicas(d, seed) if d.has_replicas else _drawn_alike(d, seed)


def _exact(d: Deployment) -> Visits:
    owner = expert_owner(d.num_experts, d.num_ranks).owner
    on_rank = torch.bincount(owner, minlength=d.num_ranks)
    on_node = on_rank.view(d.num_nodes, d.ranks_per_node).sum(1)

    def hit(num_experts: int) -> float:
        others = d.num_experts - num_experts
        return 1.0 - math.comb(others, d.num_topk) / math.comb(d.num_experts, d.num_topk)

    def rows(chances: list[float]) -> Tensor:
        return (torch.tensor(chances, dtype=torch.float64) * d.num_tokens).expand(d.num_ranks, -1)

    return Visits(
        d.num_tokens,
        ranks=rows([hit(n) for n in on_rank.tolist()]),
        nodes=rows([hit(n) for n in on_node.tolist()]),
        selections=rows([d.num_topk * n / d.num_experts for n in on_rank.tolist()]),
        drawn=0,
    )


# ---- drawing ----


class _Draw:
    """Experts of tokens, by the rules of a deployment."""

    def __init__(self, d: Deployment, seed: int) -> None:
        self.d = d
        self.generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(d.num_experts, generator=self.generator)
        self.log_popularity = -d.zipf * (place + 1.0).log()

    def __call__(self, num_tokens: int) -> Tensor:
        """int64 [num_tokens, topk] logical experts, the experts of a token distinct."""
        d = self.d
        uniform = torch.rand((num_tokens, d.num_experts), generator=self.generator)
        # The largest of log(weight) plus Gumbel noise: a draw by weight without replacement.
        score = self.log_popularity - (-uniform.clamp(1e-30, 1 - 1e-7).log()).log()
        if d.top_groups not in (None, d.num_groups):
            score = self._limit_groups(score)
        ids = score.topk(d.num_topk, 1).indices
        if d.num_shared == 0:
            return ids
        shared = torch.arange(d.num_experts, d.num_logical).expand(num_tokens, -1)
        return torch.cat([ids, shared], 1)

    def _limit_groups(self, score: Tensor) -> Tensor:
        assert self.d.top_groups is not None
        grouped = score.sigmoid().view(score.shape[0], self.d.num_groups, -1)
        best = grouped.topk(min(2, grouped.shape[2]), 2).values.sum(2)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen.scatter_(1, best.topk(self.d.top_groups, 1).indices, True)
        allowed = chosen.repeat_interleave(grouped.shape[2], 1)
        return score.masked_fill(~allowed, -math.inf)

    def load(self) -> Tensor:
        """float64 [num_logical] selections of each expert by one token, from a draw of its own."""
        draws = [torch.bincount(self(n).flatten(), minlength=self.d.num_logical)
                 for n in _portions(_FOR_LOAD)]  # fmt: skip
        return torch.stack(draws).sum(0).to(torch.float64) / _FOR_LOAD


def _portions(total: int) -> Iterator[int]:
    for begin in range(0, total, _AT_ONCE):
        yield min(_AT_ONCE, total - begin)


class _Count:
    """Visits of one source's tokens, added up."""

    def __init__(self, d: Deployment) -> None:
        self.d = d
        self.ranks = torch.zeros(d.num_ranks, dtype=torch.float64)
        self.nodes = torch.zeros(d.num_nodes, dtype=torch.float64)
        self.selections = torch.zeros(d.num_ranks, dtype=torch.float64)
        self.tokens = 0

    def add(self, dst: Tensor) -> None:
        """dst: int64 [tokens, topk] rank of each selection."""
        visited = torch.zeros((dst.shape[0], self.d.num_ranks), dtype=torch.bool)
        visited.scatter_(1, dst, True)
        self.ranks += visited.sum(0)
        self.nodes += visited.view(-1, self.d.num_nodes, self.d.ranks_per_node).any(2).sum(0)
        self.selections += torch.bincount(dst.flatten(), minlength=self.d.num_ranks)
        self.tokens += dst.shape[0]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """As if there had been num_tokens."""
        scale = self.d.num_tokens / self.tokens
        return self.ranks * scale, self.nodes * scale, self.selections * scale


def _drawn_alike(d: Deployment, seed: int) -> Visits:
    draw, count = _Draw(d, seed), _Count(d)
    owner = expert_owner(d.num_logical, d.num_ranks).owner
    total = min(d.num_ranks * d.num_tokens, MAX_DRAWN)
    for portion in _portions(total):
        count.add(owner[draw(portion)])
    ranks, nodes, selections = (row.expand(d.num_ranks, -1) for row in count.rows())
    return Visits(d.num_tokens, ranks, nodes, selections, total)


def _drawn_with_replicas(d: Deployment, seed: int) -> Visits:
    from ep_comm.eplb import plan as place
    from ep_comm.replicas import make_replicas

    draw = _Draw(d, seed)
    placement = place(draw.load(), d.num_ranks, d.num_nodes, d.slots, d.num_groups)
    per_source = max(min(d.num_tokens, MAX_DRAWN // d.num_ranks), 1)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for source in range(d.num_ranks):
        table = make_replicas(
            placement.physical_to_logical, d.num_logical, source, d.num_ranks, d.num_nodes
        ).of_layer(0)
        count = _Count(d)
        for portion in _portions(per_source):
            count.add(table.route(draw(portion), source) // (d.slots // d.num_ranks))
        rows.append(count.rows())
    ranks, nodes, selections = (torch.stack(part) for part in zip(*rows, strict=True))
    return Visits(d.num_tokens, ranks, nodes, selections, per_source * d.num_ranks)
