"""Masked ranks: low-latency calls go on without them, between the ranks that are left.

Those have native buffers of their own, made by the first call without just these ranks. Experts of
a masked rank are nobody's: a token's choice of one is no choice (-1). All ranks that are left mask
the same ranks before the same call, as they make the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rest:
    """The ranks that are left of `num_ranks`, ascending; not all of them."""

    ranks: tuple[int, ...]
    num_ranks: int

    def experts(self, num_experts: int) -> int:
        """How many of the experts are left."""
        return num_experts // self.num_ranks * len(self.ranks)

    def renumber(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """int64 ids among the experts that are left; -1 of a masked rank.

        What is no id stays none: the native call tells all ranks.
        """
        local, left = num_experts // self.num_ranks, self.experts(num_experts)
        new_ids = torch.full((self.num_ranks, local), -1, dtype=torch.int64, device=topk_idx.device)
        new_ids[list(self.ranks)] = torch.arange(left, device=topk_idx.device).view(-1, local)
        ids = topk_idx.to(torch.int64)
        known = new_ids.flatten()[ids.clamp(0, num_experts - 1)]
        return torch.where(ids < 0, ids, torch.where(ids < num_experts, known, left))

    def waits(self, stats: Tensor | None) -> Tensor | None:
        """int64 [ranks left] in place of int64 [R]; `move_waits` then adds them to that."""
        return None if stats is None else stats.new_zeros(len(self.ranks))

    def move_waits(self, waits: Tensor | None, stats: Tensor | None) -> None:
        if stats is not None and waits is not None:
            stats[list(self.ranks)] += waits
            waits.zero_()

    def spread(self, source_range: Tensor) -> Tensor:
        """int64 [El, ranks left] as [El, R]: nothing from a masked rank."""
        wide = source_range.new_zeros((source_range.shape[0], self.num_ranks))
        wide[:, list(self.ranks)] = source_range
        return wide


class Masks:
    """Which ranks are masked, as seen by one rank."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._masked: set[int] = set()
        self.rest: Rest | None = None  # None: nobody is masked

    def update(self, rank: int, mask: bool) -> None:
        if not 0 <= rank < self._num_ranks or rank == self._rank:
            what = f"want one of {self._num_ranks} and not {self._rank}, which is this one"
            raise ValueError(f"rank_to_mask: got {rank}, {what}")
        (self._masked.add if mask else self._masked.discard)(rank)
        left = tuple(r for r in range(self._num_ranks) if r not in self._masked)
        self.rest = Rest(left, self._num_ranks) if self._masked else None

    def clear(self) -> None:
        self._masked.clear()
        self.rest = None

    def query(self, status: Tensor) -> None:
        """Write int32 [R]: 1 = masked."""
        status.zero_()
        status[sorted(self._masked)] = 1
