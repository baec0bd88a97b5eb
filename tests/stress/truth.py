"""What a rank must get of a dispatch, by torch alone, and the comparison with what it got."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ep_comm import Buffer, Received

from .draw import Draw, World, rows_of, scales_of, weights_of

MOST_STAGED = 1024  # tokens of a rank, csrc/contract/stage.h


class Mismatch(AssertionError):
    """A result that is not what it must be."""


@dataclass
class Side:
    """A rank's buffer, and what it has been asked to do."""

    world: World
    buffer: Buffer
    device: torch.device
    stream: Any = None
    looked_at: list[tuple[str, Tensor, Tensor, Tensor]] = field(default_factory=list)
    graph: Any = None

    def __post_init__(self) -> None:
        self.rank, self.num_ranks = self.buffer.rank, self.buffer.num_ranks
        owners = self.world.owners(self.num_ranks)
        local = [owners[:e].count(r) for e, r in enumerate(owners)]
        self.owner = torch.tensor(owners, device=self.device)
        self.local = torch.tensor(local, device=self.device)
        self.num_local = owners.count(self.rank)

    def on_stream(self) -> Any:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def rows(self, drawn: Draw, number: int) -> Tensor:
        token = torch.arange(drawn.tokens[self.rank], device=self.device)
        return rows_of(self.world, number, drawn.dtype, self.rank, token)

    def inputs(self, drawn: Draw, number: int) -> dict[str, Any]:
        """Arguments of a dispatch."""
        n = drawn.tokens[self.rank]
        token = torch.arange(n, device=self.device)
        slot = torch.arange(self.world.topk, device=self.device)
        ids = drawn.ids[self.rank, :n].to(self.device)
        given: dict[str, Any] = {
            "x": self.rows(drawn, number),
            "topk_idx": ids.int() if drawn.narrow else ids,
        }
        if drawn.weights:
            given["topk_weights"] = weights_of(number, self.rank, token[:, None], slot)
        if drawn.dtype.itemsize == 1:
            given |= {"scales": scales_of(self.world, number, self.rank, token), "scale_block": 32}
        return given

    def adds_per_rank(self, drawn: Draw) -> bool:
        """Whether combine takes per_rank=True: on GPUs, of batches that go as lines."""
        small = self.world.tokens <= MOST_STAGED and drawn.dtype.itemsize == 2
        return self.device.type == "cuda" and small

    def same(self, what: str, got: Tensor, want: Tensor) -> None:
        if got.shape != want.shape:
            raise Mismatch(f"{what}: {list(got.shape)}, want {list(want.shape)}")
        self.looked_at.append((what, got, want, (got != want).sum().to(self.device)))

    def look(self) -> None:
        """Raise what any comparison since the last look has found."""
        looked_at, self.looked_at = self.looked_at, []
        if not looked_at:
            return
        counts = torch.stack([count for *_, count in looked_at]).tolist()
        bad = [
            f"{what}: {difference(got, want)}"
            for (what, got, want, _), n in zip(looked_at, counts, strict=True)
            if n
        ]
        if bad:
            raise Mismatch("; ".join(bad[:4]))


def difference(got: Tensor, want: Tensor) -> str:
    """How many values differ, in which rows, and those of the first."""
    bad = (got != want).reshape(len(got), -1) if got.ndim else (got != want).reshape(1, 1)
    rows = bad.any(1).nonzero().flatten().tolist()
    few = ", ".join(map(str, rows[:6])) + (", ..." if len(rows) > 6 else "")
    first = [t.reshape(len(bad), -1)[rows[0]][bad[rows[0]]][:4].tolist() for t in (got, want)]
    text = f"{int(bad.sum())} of {bad.numel()} differ, in {len(rows)} of {len(bad)} rows"
    return f"{text} ({few}): {first[0]}, want {first[1]}"


class Truth:
    """What a rank must receive of a draw, by torch alone. Selections are (source, token, slot)."""

    def __init__(self, side: Side, drawn: Draw) -> None:
        self.side, self.world, self.draw = side, side.world, drawn
        ids = drawn.ids.to(side.device)
        safe = ids.clamp(min=0)
        self.owner = torch.where(ids >= 0, side.owner[safe], -1)
        self.local = side.local[safe]
        self.here = self.owner == side.rank
        self.rows = self.here.any(-1).nonzero()  # [N, 2] of compact, in order

    def check(self, got: Received, number: int, *, cached: bool = False) -> None:
        n = len(self.rows)
        self.same("num_recv", torch.as_tensor(got.num_recv).reshape(-1)[0].cpu(), torch.tensor(n))
        self.same("status", got.status.reshape(-1)[0].cpu(), torch.tensor(0))
        counts = torch.bincount(self.local[self.here], minlength=self.side.num_local)
        self.same("counts", got.num_tokens_per_expert.long(), counts)
        if self.draw.layout == "compact":
            self.check_compact(got, number, cached)
        else:
            self.check_selections(got, number, counts, cached)

    def check_compact(self, got: Received, number: int, cached: bool) -> None:
        src, token = self.rows.unbind(1)
        n = len(src)
        self.same_rows(got.x[:n], number, src, token)
        here = self.here[src, token]
        if self.draw.weights:
            slots = torch.arange(self.world.topk, device=src.device)
            want = weights_of(number, src[:, None], token[:, None], slots)
            self.same("weights", got.topk_weights[:n], torch.where(here, want, 0.0))
        if got.scales is not None:
            self.same("scales", got.scales[:n], scales_of(self.world, number, src, token))
        if cached:
            return
        self.same("ids", got.topk_idx[:n].long(), torch.where(here, self.local[src, token], -1))
        self.same("ids of padding", got.topk_idx[n:].long().max(-1).values.clamp(min=-1),
                  torch.full((len(got.topk_idx) - n,), -1, device=src.device))  # fmt: skip
        if got.row_index is not None:
            self.check_index(got)

    def check_index(self, got: Received) -> None:
        """The compact row of every selection, by expert."""
        place = torch.full(self.here.shape[:2], -1, dtype=torch.long, device=self.side.device)
        place[self.rows[:, 0], self.rows[:, 1]] = torch.arange(len(self.rows), device=place.device)
        sel, at, starts = self.groups(self.draw.options["alignment"])
        want = torch.full((int(starts[-1]),), -1, dtype=torch.long, device=self.side.device)
        want[at] = place[sel[:, 0], sel[:, 1]]
        self.same("row_index", got.row_index.long(), want)

    def groups(self, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
        """Selections by expert, the row of each, where groups start."""
        sel = self.here.nonzero()
        expert = self.local[sel.unbind(1)]
        order = expert.argsort(stable=True)
        sel, expert = sel[order], expert[order]
        counts = torch.bincount(expert, minlength=self.side.num_local)
        ends = counts.cumsum(0)
        if self.draw.layout == "slab":
            size = torch.full_like(counts, self.capacity)
        else:
            size = (counts + alignment - 1) // alignment * alignment
        starts = torch.cat([counts.new_zeros(1), size.cumsum(0)])
        within = torch.arange(len(sel), device=sel.device) - (ends - counts)[expert]
        return sel, starts[expert] + within, starts

    @property
    def capacity(self) -> int:
        given: int | None = self.draw.options.get("capacity")
        return len(self.draw.tokens) * self.world.tokens if given is None else given

    def check_selections(self, got: Received, number: int, counts: Tensor, cached: bool) -> None:
        sel, at, starts = self.groups(self.draw.options.get("alignment", 1))
        src, token, slot = sel.unbind(1)
        slab = self.draw.layout == "slab"

        def flat(rows: Tensor) -> Tensor:
            return rows.reshape(-1, *rows.shape[2:]) if slab else rows

        x = flat(got.x)
        self.same_rows(x[at], number, src, token)
        used = int(starts[-1])
        if self.draw.layout == "grouped":
            self.same("offsets", got.offsets.long(), starts)
            nobody = torch.ones(used, dtype=torch.bool, device=x.device)
            nobody[at] = False
            bits = x[:used][nobody].contiguous().view(torch.uint8)
            self.same("rows of padding", bits, torch.zeros_like(bits))
        if self.draw.weights:
            want = torch.zeros(len(flat(got.topk_weights)), device=x.device)
            want[at] = weights_of(number, src, token, slot)
            self.same("weights", flat(got.topk_weights), want)
        if got.scales is not None:
            want = scales_of(self.world, number, src, token)
            self.same("scales", flat(got.scales.contiguous())[at], want)
        if not cached:
            ids = flat(got.topk_idx).long()
            want = torch.full_like(ids, -1)
            want[at] = self.local[src, token, slot]
            self.same("ids", ids, want)

    def sums(self, number: int, weighted: bool = False, per_rank: bool = False) -> Tensor:
        """What combine returns of rows sent back as they are: own tokens, so many times.

        per_rank: owners round what their rows come to; the products are whole numbers, exact.
        """
        rank, n = self.side.rank, self.draw.tokens[self.side.rank]
        owner = self.owner[rank, :n]
        token, slot = torch.arange(n, device=owner.device), torch.arange(owner.shape[1])
        times = (owner >= 0).float()
        if weighted:
            times = times * weights_of(number, rank, token[:, None], slot.to(owner.device))
        x = self.side.rows(self.draw, number)
        of_rank = [torch.where(owner == r, times, 0.0).sum(1) for r in range(self.side.num_ranks)]
        if self.draw.layout == "compact":
            of_rank = [(owner == r).any(1).float() for r in range(self.side.num_ranks)]
        if not per_rank:
            of_rank = [torch.stack(of_rank).sum(0)]
        total = torch.zeros(x.shape, device=x.device)
        for many in of_rank:
            part = x.float() * many[:, None]
            total += part.to(x.dtype).float() if per_rank else part
        return total.to(x.dtype) + 0.0

    # Differences are summed up, and looked at once a round: a look waits for the device.

    def same_rows(self, got: Tensor, number: int, src: Tensor, token: Tensor) -> None:
        want = rows_of(self.world, number, self.draw.dtype, src, token)
        if self.draw.dtype.itemsize == 1:
            got, want = got.contiguous().view(torch.uint8), want.view(torch.uint8)
        self.same("x", got, want)

    def same(self, what: str, got: Tensor, want: Tensor) -> None:
        self.side.same(f"{what} of {self.draw.layout}", got, want)
