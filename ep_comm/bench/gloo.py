"""The baseline: dispatch and combine as one would write them with torch and a gloo group.

Same semantics as ours, one row per (token, rank): sort by rank, `all_to_all_single` the counts,
the rows, and ids with weights packed in one tensor; combine sends rows back and adds in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.bench.cases import SCALE_BLOCK, Case, Inputs
from ep_comm.reference.fp8 import quantize


class Route(NamedTuple):
    """What combine, or a dispatch along the same route, needs to know."""

    token: Tensor  # int64 [pairs] token of every row sent, by destination rank, then token
    send_counts: list[int]  # rows to each rank
    recv_counts: list[int]
    row: Tensor | None  # grouped, slab: received row of every selection
    place: Tensor | None  # and its row in x
    num_rows: int  # grouped, slab: rows of x


class Arrived(NamedTuple):
    x: Tensor
    topk_idx: Tensor  # int32 [N, K] local expert or -1
    topk_weights: Tensor  # float32 [N, K]
    scales: Tensor | None
    route: Route


class GlooBaseline:
    """One rank's end; uses the default group, which must be gloo."""

    def __init__(self, case: Case, rank: int) -> None:
        owners = case.owners()
        self.case = case
        self.owner, self.local_id = owners.owner, owners.local_id
        self.num_local = int(owners.num_local[rank])
        self.capacity = case.capacity or case.ranks * case.tokens

    def dispatch(self, inputs: Inputs) -> Arrived:
        dst = self.owner[inputs.topk_idx]  # [T, K]
        goes = torch.zeros((dst.shape[0], self.case.ranks), dtype=torch.bool)
        goes.scatter_(1, dst, True)
        rank, token = goes.t().nonzero(as_tuple=True)  # by rank, then token
        send = goes.sum(0)
        recv = torch.empty_like(send)
        dist.all_to_all_single(recv, send)
        route = Route(token, send.tolist(), recv.tolist(), None, None, 0)
        x, scales = self._send_rows(inputs, route)
        topk_idx, topk_weights = self._send_metadata(inputs, dst, rank, route)
        if self.case.layout != "compact":
            route = self._group(topk_idx, route)
            x, scales = self._expand(x, route), None if scales is None else scales[route.row]
        return Arrived(x, topk_idx, topk_weights, scales, route)

    def dispatch_cached(self, inputs: Inputs, route: Route) -> Tensor:
        x, _ = self._send_rows(inputs, route)
        return x if route.row is None else self._expand(x, route)

    def combine(self, y: Tensor, route: Route) -> Tensor:
        if route.row is not None and route.place is not None:
            # Add the selections of a token here already: fewer bytes travel.
            flat = y.view(-1, y.shape[-1]).index_select(0, route.place)
            sums = torch.zeros((sum(route.recv_counts), y.shape[-1]))
            y = sums.index_add_(0, route.row, flat.to(torch.float32)).to(y.dtype)
        back = y.new_empty((sum(route.send_counts), y.shape[-1]))
        dist.all_to_all_single(back, y, route.send_counts, route.recv_counts)
        out = torch.zeros((self.case.tokens, y.shape[-1]))
        first = 0
        for count in route.send_counts:  # rank by rank: the fp32 copy stays small
            part = slice(first, first + count)
            out.index_add_(0, route.token[part], back[part].to(torch.float32))
            first += count
        return out.to(y.dtype)

    # ---- steps of dispatch ----

    def _send_rows(self, inputs: Inputs, route: Route) -> tuple[Tensor, Tensor | None]:
        x, scales = inputs.x, inputs.scales
        if self.case.quantize:
            x, scales = quantize(x, kind=self.case.quantize, scale_block=SCALE_BLOCK)
        dtype = x.dtype
        if dtype.itemsize == 1:  # gloo has no 8-bit floats
            x = x.view(torch.uint8)
        rows = self._exchange(x.index_select(0, route.token), route).view(dtype)
        if scales is None:
            return rows, None
        return rows, self._exchange(scales.index_select(0, route.token), route)

    def _send_metadata(
        self, inputs: Inputs, dst: Tensor, rank: Tensor, route: Route
    ) -> tuple[Tensor, Tensor]:
        here = dst.index_select(0, route.token) == rank.unsqueeze(1)  # [pairs, K]
        local = self.local_id[inputs.topk_idx.index_select(0, route.token)]
        ids = torch.where(here, local, -1).to(torch.int32)
        weights = torch.where(here, inputs.topk_weights.index_select(0, route.token), 0.0)
        both = torch.cat([ids, weights.view(torch.int32)], 1)
        got = self._exchange(both, route)
        topk = self.case.topk
        return got[:, :topk], got[:, topk:].contiguous().view(torch.float32)

    def _exchange(self, rows: Tensor, route: Route) -> Tensor:
        got = rows.new_empty((sum(route.recv_counts), rows.shape[1]))
        dist.all_to_all_single(got, rows, route.recv_counts, route.send_counts)
        return got

    def _group(self, topk_idx: Tensor, route: Route) -> Route:
        """Where every selection goes in the grouped or slab layout."""
        row, slot = (topk_idx >= 0).nonzero(as_tuple=True)
        expert = topk_idx[row, slot].long()
        order = expert.argsort(stable=True)
        row, expert = row[order], expert[order]
        counts = expert.bincount(minlength=self.num_local)
        if self.case.layout == "slab":
            room = torch.full_like(counts, self.capacity)
        else:
            room = (counts + self.case.alignment - 1) // self.case.alignment * self.case.alignment
        shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
        place = torch.arange(row.numel()) + shift[expert]
        return route._replace(row=row, place=place, num_rows=int(room.sum()))

    def _expand(self, rows: Tensor, route: Route) -> Tensor:
        assert route.row is not None
        assert route.place is not None
        dtype = rows.dtype
        bits = rows.view(torch.uint8) if dtype.itemsize == 1 else rows
        if route.num_rows == route.row.numel():  # no padding: places are 0, 1, 2 ...
            out = bits.index_select(0, route.row)
        else:
            make = torch.empty if self.case.layout == "slab" else torch.zeros
            out = make((route.num_rows, rows.shape[1]), dtype=bits.dtype)
            out.index_copy_(0, route.place, bits.index_select(0, route.row))
        out = out.view(dtype)
        if self.case.layout == "slab":
            return out.view(self.num_local, self.capacity, -1)
        return out
