"""A byte-level language model: attention and MoE layers, for one shard of a batch or for several.

A rank of an expert-parallel run has one shard. One process that checks it has all shards: for each
a replica of everything but the experts, with its own gradients, because that is what ranks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ep_comm.buffer import Buffer
from ep_comm.nn import MoE, over_shards

NUM_BYTES = 256


@dataclass(frozen=True)
class Size:
    """Of the model and of a rank's share of a batch."""

    hidden: int = 128
    num_heads: int = 4
    num_layers: int = 2
    num_experts: int = 16
    num_topk: int = 2
    ffn_hidden: int = 128
    shared_hidden: int = 128
    capacity_factor: float = 2.0
    length: int = 64  # bytes of a sequence
    batch: int = 4  # sequences of a shard

    @property
    def tokens(self) -> int:
        """Of a shard."""
        return self.batch * self.length


class Block(nn.Module):
    """Attention, then experts, each added to what came in."""

    def __init__(self, size: Size, buffer: Buffer) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.moe = MoE(
            buffer,
            size.hidden,
            size.ffn_hidden,
            size.num_topk,
            capacity_factor=size.capacity_factor,
            shared_hidden=size.shared_hidden,
        )

    def attend(self, x: Tensor) -> Tensor:
        """[batch, length, hidden] -> the same."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)  # each [batch, heads, length, size of a head]
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = x + self.out(seen.transpose(1, 2).flatten(2))
        return result


class LanguageModel(nn.Module):
    """Bytes in, a distribution over the next byte out."""

    def __init__(self, size: Size, buffer: Buffer) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, size.hidden)
        self.position = nn.Parameter(torch.zeros(size.length, size.hidden))
        self.blocks = nn.ModuleList(Block(size, buffer) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.head = nn.Linear(size.hidden, NUM_BYTES, bias=False)

    def moe_layers(self) -> list[MoE]:
        return [block.moe for block in self.blocks]  # type: ignore[misc]

    def replicated(self) -> list[nn.Parameter]:
        """Parameters every rank has, in one order."""
        return [p for name, p in self.named_parameters() if ".experts." not in name]

    def initialize(self, seed: int) -> None:
        """The same numbers whatever experts live here: each expert has a generator of its own."""
        numbers = torch.Generator().manual_seed(seed)
        for p in self.replicated():
            if p.dim() > 1:
                _fill(p, numbers)
        for i, moe in enumerate(self.moe_layers()):
            for expert, module in zip(moe.buffer.local_experts, moe.experts, strict=True):
                numbers = torch.Generator().manual_seed((seed + 1) * 1_000_003 + 1000 * i + expert)
                for p in module.parameters():
                    _fill(p, numbers)


def _fill(parameter: nn.Parameter, numbers: torch.Generator) -> None:
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.05)


def make_replicas(size: Size, buffer: Buffer, seed: int, num_shards: int) -> list[LanguageModel]:
    """One model per shard: same memory for parameters, gradients apart, experts only once."""
    replicas = [LanguageModel(size, buffer) for _ in range(num_shards)]
    first = replicas[0]
    first.initialize(seed)
    for replica in replicas[1:]:
        for p, source in zip(replica.replicated(), first.replicated(), strict=True):
            p.data = source.data
        for moe, source_moe in zip(replica.moe_layers(), first.moe_layers(), strict=True):
            moe.experts = source_moe.experts
    return replicas


def forward(replicas: Sequence[LanguageModel], shards: Sequence[Tensor]) -> list[Tensor]:
    """Logits of every shard, layer by layer, so that experts see all shards at once.

    Args:
        shards: int64 [batch, length] of bytes, one per replica.
    Returns:
        [batch, length, 256] per shard.
    """
    pairs = list(zip(replicas, shards, strict=True))
    x = [model.embed(shard) + model.position for model, shard in pairs]
    for blocks in zip(*(model.blocks for model in replicas), strict=True):
        x = [block.attend(h) for block, h in zip(blocks, x, strict=True)]
        normed = [block.moe_norm(h) for block, h in zip(blocks, x, strict=True)]
        mixed = over_shards([block.moe for block in blocks], normed)
        x = [h + m for h, m in zip(x, mixed, strict=True)]
    return [model.head(model.norm(h)) for model, h in zip(replicas, x, strict=True)]
