"""What all ranks draw alike: routings and options. Rows, weights and scales that are functions of
(number of the dispatch, rank, token).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@dataclass(frozen=True)
class World:
    """What a buffer is made for."""

    name: str
    experts: int
    topk: int
    hidden: int
    tokens: int  # most of a rank
    slots: int = 2
    duplicates: bool = False  # a token may choose an expert twice
    dtypes: tuple[torch.dtype, ...] = (BF16,)

    @property
    def worst(self) -> int:
        return self.tokens * (self.topk if self.duplicates else 1)

    def owners(self, num_ranks: int) -> list[int]:
        """As even as possible, lower ranks first."""
        base, extra = divmod(self.experts, num_ranks)
        return [r for r in range(num_ranks) for _ in range(base + (r < extra))]


WORLDS = {
    w.name: w
    for w in (
        World("small", 10, 4, 64, 24, duplicates=True, dtypes=(BF16, FP16, FP32, FP8)),
        World("few-experts", 3, 4, 128, 32, slots=3, duplicates=True, dtypes=(BF16, FP32)),
        World("many-experts", 64, 8, 512, 96, dtypes=(BF16, FP8)),
        World("many-tokens", 16, 6, 128, 1500, dtypes=(BF16,)),
        World("long-rows", 32, 8, 7168, 48, slots=4, dtypes=(BF16, FP8)),
    )
}

# ---- one dispatch: what all ranks draw alike ----


@dataclass
class Draw:
    """A routing, and what is asked of it."""

    number: int  # of the dispatch in the program; rows depend on it
    tokens: list[int]  # of each rank
    ids: Tensor  # int64 [R, most, K], -1 = none
    dtype: torch.dtype
    options: dict[str, Any]  # of the call
    weights: bool = True
    narrow: bool = False  # int32 ids

    @property
    def layout(self) -> str:
        return str(self.options["layout"])

    @property
    def sync(self) -> bool:
        return bool(self.options.get("sync", True))


def draw_ids(program: random.Random, world: World, num_ranks: int, skew: str) -> Tensor:
    """Routing of all ranks: even, popular experts, one expert, one rank, none."""
    g = torch.Generator().manual_seed(program.getrandbits(40))
    shape = (num_ranks, world.tokens, world.topk)
    if skew == "popular":
        picked = (torch.rand(shape, generator=g) ** 4 * world.experts).long()
    else:
        picked = torch.randint(0, world.experts, shape, generator=g)
    if not world.duplicates:
        scores = torch.rand((*shape[:2], world.experts), generator=g)
        if skew == "popular":
            scores *= torch.linspace(1, 0.1, world.experts)
        picked = scores.topk(world.topk, dim=2).indices
    if skew == "one" and world.duplicates:
        picked.fill_(program.randrange(world.experts))
    if skew == "none":
        picked.fill_(-1)
    holes = torch.rand(shape, generator=g) < program.choice([0.0, 0.0, 0.2, 0.9])
    return picked.masked_fill_(holes, -1)


def draw_tokens(program: random.Random, world: World, num_ranks: int) -> list[int]:
    most = program.choice([1, world.tokens // 3, world.tokens, world.tokens])
    return [program.choice([0, program.randint(0, most), most]) for _ in range(num_ranks)]


def draw(program: random.Random, world: World, num_ranks: int, number: int, **fixed: Any) -> Draw:
    tokens = fixed.pop("tokens", None) or draw_tokens(program, world, num_ranks)
    skew = program.choice(["even", "even", "popular", "popular", "one", "none"])
    ids = draw_ids(program, world, num_ranks, skew)
    for rank, n in enumerate(tokens):
        ids[rank, n:] = -1
    options: dict[str, Any] = {"layout": program.choice(["compact", "compact", "grouped", "slab"])}
    options |= {"num_sms": program.choice([None, 1, 3, 8])}
    options |= {"output": program.choice(["auto", "auto", "torch"])}
    if program.random() < 0.3:
        options["sync"] = False
    options |= fixed
    if options["layout"] == "grouped":
        options["alignment"] = program.choice([1, 4, 16])
    if options["layout"] == "compact" and options.get("sync", True) and program.random() < 0.2:
        options |= {"row_index": True, "alignment": program.choice([1, 8])}
    if options["layout"] == "slab" and world.duplicates:
        options["capacity"] = num_ranks * world.worst
    if options["layout"] == "grouped" and not options.get("sync", True) and world.duplicates:
        options["capacity"] = num_ranks * world.worst + 16 * world.experts
    dtype = program.choice(world.dtypes)
    return Draw(number, tokens, ids, dtype, options, program.random() < 0.8, program.random() < 0.3)


# ---- rows that tell where they come from ----


def rows_of(world: World, number: int, dtype: torch.dtype, src: Any, token: Tensor) -> Tensor:
    """[n, hidden] of tokens of ranks."""
    start = token * 37 + src * 101 + number * 17
    column = torch.arange(world.hidden, dtype=torch.int32, device=token.device) * 11
    cells = start.int()[:, None] + column
    if dtype.itemsize == 1:
        return (cells % 113).to(torch.uint8).view(dtype)
    return (cells % 251 - 125).to(dtype)


def scales_of(world: World, number: int, src: Any, token: Tensor) -> Tensor:
    """float32 [n, hidden / 32]."""
    words = torch.arange(world.hidden // 32, dtype=torch.int32, device=token.device) * 7
    start = (token * 3 + src * 11 + number).int()
    return ((start[:, None] + words) % 97 + 1).float()


def weights_of(number: int, src: Any, token: Tensor, slot: Tensor) -> Tensor:
    return ((token * 5 + slot * 3 + src + number) % 5 - 2).float()
