"""Masked ranks: low-latency calls go on without them, between the ranks that are left.

Those have native buffers of their own, made by the first call without just these ranks. Experts of
a masked rank are nobody's: a token's choice of one is no choice (-1). All ranks that are left mask
the same ranks before the same call, as they make the same calls.

A rank that fails is not masked by the call that finds out: it may have done its part for some ranks
and not for others, so they find out in different calls, and only the program can bring them to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_comm.handle import Handle, HandleMeta


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

    def former(self, rest: Rest | None) -> tuple[int, ...]:
        """The ranks of a native buffer made for `rest`."""
        return tuple(range(self._num_ranks)) if rest is None else rest.ranks

    def is_smaller(self, rest: Rest | None) -> bool:
        """Whether of those ranks some are masked, and no other one is left."""
        return self.rest is not None and {*self.rest.ranks} < {*self.former(rest)}

    def query(self, status: Tensor) -> None:
        """Write int32 [R]: 1 = masked."""
        status.zero_()
        status[sorted(self._masked)] = 1


def without_masked(handle: Handle, kept: Sequence[int], local: int, generation: int) -> Handle:
    """The handle of a slab dispatch among more ranks as one of a buffer of those that are left.

    Args:
        kept: the ranks that are left, as they were numbered, ascending.
        local: experts of each rank.
        generation: of that buffer.
    """
    meta = HandleMeta.unpack(handle.meta)
    place = torch.full((meta.num_ranks,), -1)
    place[list(kept)] = torch.arange(len(kept))
    ids = handle.topk_idx
    owner = place[ids.clamp_min(0) // local]
    stays = (ids >= 0) & (owner >= 0)
    source = place[handle.recv_src[:, 0].long()]
    came = source >= 0
    rows = handle.recv_row[came]
    counts = torch.bincount(rows[rows >= 0] // meta.num_rows, minlength=local)
    meta = meta._replace(
        generation=generation,
        num_unique=rows.shape[0],
        num_ranks=len(kept),
        num_experts=len(kept) * local,
    )
    return Handle(
        meta=meta.pack(),
        topk_idx=torch.where(stays, owner * local + ids % local, -1),
        topk_weights=handle.topk_weights,
        send_row=torch.where(stays, handle.send_row, -1),
        recv_src=torch.stack([source[came].to(torch.int32), handle.recv_src[came, 1]], 1),
        recv_row=rows,
        rank_counts=handle.rank_counts[:, list(kept)].contiguous(),
        num_tokens_per_expert=counts.to(torch.int32),
    )
