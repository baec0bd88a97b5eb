"""What plans are measured against: the public greedy, randomized greedies, brute force.

The public greedy is the algorithm of DeepSeek's EPLB, written from its description: groups to nodes
longest-processing-time first, one replica after the other for the heaviest, replicas to ranks
longest-processing-time first.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ep_comm.testing.skew import zipf_load


def pack(weight: Tensor, num_packs: int, noise: Tensor | None = None) -> Tensor:
    """Longest-processing-time first: int64 [B, n] pack of each item; n / num_packs to a pack.

    weight: [B, n]. noise: [B, n] factors on the weights that decide the order only.
    """
    batch, n = weight.shape
    order = (weight if noise is None else weight * noise).argsort(
        dim=1, descending=True, stable=True
    )
    load = torch.zeros((batch, num_packs), dtype=weight.dtype)
    room = torch.full((batch, num_packs), n // num_packs)
    pack_of = torch.empty((batch, n), dtype=torch.int64)
    for place in range(n):
        item = order[:, place : place + 1]
        lightest = load.masked_fill(room == 0, float("inf")).argmin(1, keepdim=True)
        pack_of.scatter_(1, item, lightest)
        load.scatter_add_(1, lightest, weight.gather(1, item))
        room.scatter_add_(1, lightest, torch.full_like(lightest, -1))
    return pack_of


def replicate(weight: Tensor, num_slots: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replica after replica for the heaviest: int64 expert of each slot [B, n], replicas [B, E]."""
    batch, experts = weight.shape
    count = torch.ones((batch, experts), dtype=torch.int64)
    slots = torch.arange(experts).expand(batch, -1)
    for _ in range(num_slots - experts):
        share = weight / count
        heaviest = (share if noise is None else share * noise).argmax(1, keepdim=True)
        count.scatter_add_(1, heaviest, torch.ones_like(heaviest))
        slots = torch.cat([slots, heaviest], 1)
    return slots, count


def greedy(
    weight: Tensor, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int,
    *, temperature: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """float64 [B] heaviest rank over the mean.

    temperature: > 0 makes it randomized: every decision sees weights times exp(temperature * N).
    """
    weight = weight.to(torch.float64)
    batch = weight.shape[0]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor | None:
        if temperature == 0:
            return None
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * temperature).exp()

    if num_groups % num_nodes != 0:
        num_groups = num_nodes = 1
    groups = weight.view(batch, num_groups, -1).sum(2)
    node = pack(groups, num_nodes, noise(batch, num_groups))
    by_node = node.argsort(dim=1, stable=True).view(batch, num_nodes, -1)  # groups of each node
    members = weight.view(batch, num_groups, -1)
    rows = torch.arange(batch).view(-1, 1, 1)
    inside = members[rows, by_node].reshape(batch * num_nodes, -1)  # experts of each node
    cells, n = inside.shape
    slots, count = replicate(inside, num_slots // num_nodes, noise(cells, n))
    share = (inside / count).gather(1, slots)
    rank = pack(share, num_ranks // num_nodes, noise(*share.shape))
    load = torch.zeros((cells, num_ranks // num_nodes), dtype=torch.float64)
    load.scatter_add_(1, rank, share)
    load = load.view(batch, num_ranks)
    return load.amax(1) / load.mean(1)


def best_of_randomized(
    weight: Tensor, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int,
    restarts: int = 1000, *, seed: int = 0,
) -> float:  # fmt: skip
    """The best of many randomized greedies for one layer, weight [E], noise from 0 to 30 %."""
    best = float("inf")
    for i, temperature in enumerate((0.003, 0.01, 0.03, 0.1, 0.3)):
        tries = weight.expand(restarts // 5, -1)
        found = greedy(
            tries, num_slots, num_groups, num_nodes, num_ranks,
            temperature=temperature, seed=seed + i,
        )  # fmt: skip
        best = min(best, float(found.min()))
    return best


def optimum(weight: list[float], num_slots: int, num_ranks: int, *, distinct: bool = True) -> float:
    """The least heaviest rank, found by trying everything. Small cases only.

    distinct: every rank holds num_slots / num_ranks different experts.
    """
    experts, per_rank = len(weight), num_slots // num_ranks
    choose = itertools.combinations if distinct else itertools.combinations_with_replacement
    choices = list(choose(range(experts), per_rank))
    best = float("inf")
    for ranks in itertools.combinations_with_replacement(choices, num_ranks):
        count = [0] * experts
        for held in ranks:
            for e in held:
                count[e] += 1
        if min(count) == 0:
            continue
        heaviest = max(sum(weight[e] / count[e] for e in held) for held in ranks)
        best = min(best, heaviest)
    return best


def optimum_of_layer(
    weight: list[float], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> float:
    """The same under either policy: every way to pack groups onto nodes is tried, too."""
    if num_groups % num_nodes != 0:
        return optimum(weight, num_slots, num_ranks)
    size = len(weight) // num_groups
    ranks, slots = num_ranks // num_nodes, num_slots // num_nodes

    @functools.cache
    def of_node(groups: tuple[int, ...]) -> float:
        return optimum([w for g in groups for w in weight[g * size : (g + 1) * size]], slots, ranks)

    def of_nodes(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        best = float("inf")
        for others in itertools.combinations(left[1:], num_groups // num_nodes - 1):
            rest = tuple(g for g in left[1:] if g not in others)
            best = min(best, max(of_node((left[0], *others)), of_nodes(rest)))
        return best

    return of_nodes(tuple(range(num_groups)))


def generated_cases() -> list[tuple[str, Tensor, tuple[int, int, int, int]]]:
    """200 cases: five kinds of load, shapes from 2 to 32 ranks, both policies."""
    cases = []
    for i in range(200):
        seed = torch.Generator().manual_seed(i)
        nodes = (1, 2, 4)[i % 3]
        ranks = nodes * (2, 4, 8)[i // 3 % 3]
        experts = ranks * (2, 4, 8)[i // 9 % 3]
        groups = (1, nodes, 2 * nodes, experts)[i // 2 % 4]
        slots = experts + ranks * (1 + i % 2)
        kind = ("zipf", "uniform", "exponential", "lognormal", "integers")[i % 5]
        load = {
            "zipf": zipf_load(2, experts, 0.4 + i % 7 / 6, seed=i),
            "uniform": torch.rand((2, experts), generator=seed),
            "exponential": -torch.rand((2, experts), generator=seed).log(),
            "lognormal": (1.5 * torch.randn((2, experts), generator=seed)).exp(),
            "integers": torch.randint(1, 50, (2, experts), generator=seed).float(),
        }[kind].to(torch.float64)
        cases.append((f"{i}-{kind}", load, (ranks, nodes, slots, groups)))
    return cases
