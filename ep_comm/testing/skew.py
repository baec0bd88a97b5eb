"""Routing as it really is: few experts take much, and which ones they are changes.

Generators of loads and traces for balancers. All are deterministic: equal seeds, equal results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep_comm.eplb.trace import Trace


def zipf_load(num_layers: int, num_experts: int, exponent: float = 1.0, *, seed: int = 0) -> Tensor:
    """float64 [layers, experts]: shares 1 / place ** exponent, places shuffled in every layer."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    share /= share.sum()
    order = torch.rand((num_layers, num_experts), generator=generator).argsort(1)
    return share[order]


def drifted(load: Tensor, fraction: float = 0.05, *, seed: int = 0) -> Tensor:
    """`load` [layers, experts] after `fraction` of it went from some experts to others.

    The givers, a random half of the experts of each layer, lose in proportion to what they have;
    the takers gain in random proportions.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, experts = load.shape
    order = torch.rand((layers, experts), generator=generator).argsort(1)
    gives = order < experts // 2
    given = torch.where(gives, load, 0.0)
    moved = torch.minimum(fraction * load.sum(1, keepdim=True), given.sum(1, keepdim=True))
    given = given / given.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) * moved
    wish = torch.rand((layers, experts), generator=generator, dtype=torch.float64)
    wish = torch.where(gives, 0.0, wish)
    return load - given + wish / wish.sum(1, keepdim=True) * moved


def drifting_load(
    num_steps: int, num_layers: int, num_experts: int, *, exponent: float = 1.0,
    fraction: float = 0.05, seed: int = 0,
) -> Tensor:  # fmt: skip
    """float64 [steps, layers, experts]: Zipf, then `fraction` of the load wanders in every step."""
    loads = [zipf_load(num_layers, num_experts, exponent, seed=seed)]
    for step in range(1, num_steps):
        loads.append(drifted(loads[-1], fraction, seed=seed + step))
    return torch.stack(loads)


def bursty_load(
    num_steps: int, num_layers: int, num_experts: int, *, exponent: float = 0.7,
    probability: float = 0.1, height: float = 8.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """float64 [steps, layers, experts]: Zipf, and in each step one expert per layer may burst.

    With `probability` a random expert has `height` times the mean load on top, for that step only.
    """
    generator = torch.Generator().manual_seed(seed)
    loads = zipf_load(num_layers, num_experts, exponent, seed=seed).repeat(num_steps, 1, 1)
    steps = (num_steps, num_layers)
    who = torch.randint(num_experts, steps, generator=generator)
    burst = torch.rand(steps, generator=generator) < probability
    extra = torch.where(burst, height / num_experts, 0.0).to(torch.float64)
    loads.scatter_add_(2, who.unsqueeze(2), extra.unsqueeze(2))
    return loads / loads.sum(2, keepdim=True)


def shifting_load(
    num_steps: int, num_layers: int, num_experts: int, *, exponent: float = 1.0,
    num_domains: int = 3, steps_per_domain: int = 8, seed: int = 0,
) -> Tensor:  # fmt: skip
    """float64 [steps, layers, experts]: domains with hot experts of their own take turns.

    Half of the load is common to all domains; a new domain takes over within one step.
    """
    common = zipf_load(num_layers, num_experts, exponent / 2, seed=seed)
    domains = [zipf_load(num_layers, num_experts, exponent, seed=seed + 1 + d)
               for d in range(num_domains)]  # fmt: skip
    turns = [domains[step // steps_per_domain % num_domains] for step in range(num_steps)]
    return torch.stack([(common + own) / 2 for own in turns])


def routing_trace(
    load: Tensor, num_tokens: int, num_topk: int, *, num_topics: int = 0, seed: int = 0
) -> Trace:
    """A trace whose tokens choose different experts, each about as often as `load` says.

    Args:
        load: float64 [steps, layers, experts] or [layers, experts] for one step.
        num_topics: > 0: every token belongs to a topic, and prefers its topic's experts (every
            num_topics-th, shuffled in each layer) eightfold: experts chosen together.
    Returns:
        Trace of int64 [steps, layers, num_tokens, num_topk]; the experts of a token differ.

    Hot experts are chosen somewhat less often than `load` says: a token can take each only once.
    """
    generator = torch.Generator().manual_seed(seed)
    loads = load.unsqueeze(0) if load.dim() == 2 else load
    steps, layers, experts = loads.shape
    ids = torch.empty((steps, layers, num_tokens, num_topk), dtype=torch.int64)
    topic_of_expert = None
    if num_topics > 0:
        order = torch.rand((layers, experts), generator=generator).argsort(1)
        topic_of_expert = order % num_topics
    for step in range(steps):
        topic = torch.randint(max(num_topics, 1), (num_tokens, 1), generator=generator)
        for layer in range(layers):
            weight = loads[step, layer].expand(num_tokens, -1)
            if topic_of_expert is not None:
                weight = torch.where(topic_of_expert[layer] == topic, 8.0 * weight, weight)
            # The K largest of log(weight) + Gumbel noise are K draws without replacement.
            uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
            noise = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
            ids[step, layer] = (weight.log() + noise).topk(num_topk, 1).indices
    return Trace(ids, experts)
