"""Moving experts while the model serves: bounded pieces, then all ranks change at once.

Rows of weights travel as rows of dispatches, beside those of tokens. Until the last step the old
placement is in force and no weight that it uses is touched: what arrives is kept aside. The last
step first asks all ranks whether they have everything; one that does not leaves all as they were.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ep_comm.buffer import Buffer
from ep_comm.checks import positive
from ep_comm.eplb.placement import Placement, check_same_world
from ep_comm.eplb.transport import gather_bytes, row_bytes, send_rows
from ep_comm.errors import EPError, make_error

Weights = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Transfer:
    """One expert of one layer, from one rank to another."""

    layer: int
    expert: int
    src: int  # slot it is read from, under the old placement
    dst: int  # rank that gets it


def transfers(old: Placement, new: Placement) -> list[Transfer]:
    """What has to cross, layer by layer; the same on all ranks.

    A rank gets an expert once, whatever the number of its slots for it. It comes from a replica on
    its own node if there is one; several that ask for an expert take its replicas in turn.
    """
    check_same_world(new, old)
    wanted = ((new.hosted > 0) & (old.hosted == 0)).nonzero().tolist()
    per_rank = old.num_slots // old.num_ranks
    ranks_per_node = old.num_ranks // old.num_nodes
    slots = old.logical_to_physical
    asked: dict[tuple[int, int], int] = {}
    found = []
    for layer, rank, expert in wanted:
        row = [s for s in slots[layer, expert].tolist() if s >= 0]
        node = rank // ranks_per_node
        near = [s for s in row if s // per_rank // ranks_per_node == node] or row
        turn = asked.get((layer, expert), 0)
        asked[layer, expert] = turn + 1
        found.append(Transfer(layer, expert, near[turn % len(near)], rank))
    return found


class Migration:
    """A change of placement under way; see `migrate`.

    Attributes:
        num_pieces: calls of `step` that move something; one more puts the placement in force.
        moved_bytes: that this rank receives in total.
    """

    def __init__(
        self,
        buffer: Buffer,
        old: Placement,
        new: Placement,
        weights: Weights,
        piece_bytes: int,
        options: dict[str, Any],
    ) -> None:
        positive("piece_bytes", piece_bytes)
        self.old, self.new = old, new
        self._buffer = buffer
        self._put_in_force = buffer._prepare_placement(new, **options)
        self._per_rank = new.num_slots // new.num_ranks
        self._weights = _check_weights(weights, new.num_layers, self._per_rank, buffer.device)
        self._error: Exception | None = None
        self._width = row_bytes(buffer)
        sizes = [sum(t[0].numel() * t.itemsize for t in layer) for layer in self._weights]
        self._sizes, self._rows = sizes, [math.ceil(n / self._width) for n in sizes]
        self._streams = self._stream(transfers(old, new))
        lengths = [[self._rows[t.layer] for t in stream] for stream in self._streams]
        self._starts = [[0, *accumulate(rows)] for rows in lengths]
        self._chunk = max(1, min(buffer.max_tokens, piece_bytes // self._width))
        self.num_pieces = math.ceil(max(s[-1] for s in self._starts) / self._chunk)
        self._piece = 0
        self._done = False
        mine = [t for stream in self._streams for t in stream if t.dst == buffer.rank]
        self.moved_bytes = sum(sizes[t.layer] for t in mine)
        self._staged = {
            (t.layer, t.expert): torch.empty(
                (self._rows[t.layer], self._width), dtype=torch.uint8, device=buffer.device
            )
            for t in mine
        }

    def _stream(self, found: list[Transfer]) -> list[list[Transfer]]:
        """What each rank sends, in order."""
        streams: list[list[Transfer]] = [[] for _ in range(self.new.num_ranks)]
        for t in found:
            streams[t.src // self._per_rank].append(t)
        return streams

    def step(self) -> bool:
        """Move one piece, or, when all are moved, change over on all ranks.

        Returns:
            True: the new placement is in force here and everywhere, before the next dispatch.
        Raises:
            EPArgumentError: E203, some rank could not send, receive or keep everything: the old
                placement stays, with its weights; on the rank to blame, its own error. Again on
                later calls.
            Others as `Buffer.dispatch`; after those that end the buffer the old placement stays.

        Collective, between the operations of the model, in the same order on all ranks; the last
            one, which changes weights, not between a dispatch and its experts.
        Cost: at most piece_bytes sent per rank; the last step copies what arrived into place.
        """
        if self._done:
            return True
        if self._piece < self.num_pieces:
            self._move_piece()
            self._piece += 1
            return False
        self._change_over()
        return True

    # ---- pieces ----

    def _part(self, source: int) -> list[tuple[Transfer, int, int]]:
        """What `source` sends in this piece: transfers with their first and last row."""
        begin, end = self._piece * self._chunk, (self._piece + 1) * self._chunk
        starts, part = self._starts[source], []
        for i in range(max(bisect_right(starts, begin) - 1, 0), len(self._streams[source])):
            if starts[i] >= end:
                break
            first, last = max(begin, starts[i]), min(end, starts[i + 1])
            if first < last:
                part.append((self._streams[source][i], first - starts[i], last - starts[i]))
        return part

    def _move_piece(self) -> None:
        mine = self._part(self._buffer.rank)
        device = self._buffer.device
        rows = torch.empty((0, self._width), dtype=torch.uint8, device=device)
        dst = torch.empty(0, dtype=torch.int64, device=device)
        try:
            if mine:
                rows = torch.cat([self._expert_rows(t, a, b) for t, a, b in mine])
                to = torch.tensor([t.dst for t, _, _ in mine], device=device)
                count = torch.tensor([b - a for _, a, b in mine], device=device)
                dst = to.repeat_interleave(count)
        except Exception as error:  # the peers wait for us: tell them at the change
            self._error = error
            rows, dst = rows[:0], dst[:0]
        came = send_rows(self._buffer, rows, dst, "eplb migrate")
        for source, got in enumerate(came):
            self._keep(source, got)

    def _expert_rows(self, t: Transfer, first: int, last: int) -> Tensor:
        """Some rows of an expert: the bytes of its tensors, one after the other."""
        begin, end, at = first * self._width, last * self._width, 0
        parts = []
        for w in self._weights[t.layer]:
            data = w[t.src % self._per_rank].flatten().view(torch.uint8)
            parts.append(data[max(begin - at, 0) : max(end - at, 0)])
            at += data.numel()
        padding = max(end - at, 0)  # of the last row
        return torch.nn.functional.pad(torch.cat(parts), (0, padding)).view(-1, self._width)

    def _keep(self, source: int, got: Tensor) -> None:
        part = [p for p in self._part(source) if p[0].dst == self._buffer.rank]
        want = sum(last - first for _, first, last in part)
        if got.shape[0] != want:
            what = f"abandoned migration: {got.shape[0]} rows of rank {source}, want {want}"
            self._error = self._error or make_error(
                "E203", what, rank=self._buffer.rank, peer=source, fix=_FIX
            )
            return
        at = 0
        for t, first, last in part:
            self._staged[t.layer, t.expert][first:last] = got[at : at + last - first]
            at += last - first

    # ---- the change ----

    def _change_over(self) -> None:
        changes = [] if self._error is not None else self._prepare()
        vote = _READY if self._error is None else _LACKS if _is_ours(self._error) else _FAILED
        mine = torch.tensor([vote], dtype=torch.uint8, device=self._buffer.device)
        votes = gather_bytes(self._buffer, mine, "eplb change").flatten().tolist()
        if max(votes) != _READY:
            if self._error is None or _is_ours(self._error):
                peer = votes.index(max(votes))  # who failed, rather than who lacks its rows
                what = f"abandoned migration: rank {peer} could not take part"
                self._error = make_error("E203", what, rank=self._buffer.rank, peer=peer, fix=_FIX)
            raise self._error
        for target, value in changes:  # all ranks agreed, and nothing here can fail
            target.copy_(value)
        self._put_in_force()
        self._staged.clear()
        self._done = True

    def _prepare(self) -> list[tuple[Tensor, Tensor]]:
        """Where to write what: copies of slots that move inside this rank are made now."""
        changes = []
        try:
            rank = self._buffer.rank
            for layer, tensors in enumerate(self._weights):
                before = self.old.experts_of(rank, layer)
                for slot, expert in enumerate(self.new.experts_of(rank, layer)):
                    if before[slot] == expert:
                        continue
                    if expert in before:
                        source = before.index(expert)
                        changes += [(w[slot], w[source].clone()) for w in tensors]
                    else:
                        staged = self._staged[layer, expert].flatten()[: self._sizes[layer]]
                        changes += _unpack(staged, tensors, slot)
        except Exception as error:  # as in a piece
            self._error = error
            return []
        return changes


_READY, _LACKS, _FAILED = 0, 1, 2  # what ranks tell each other before the change


def _is_ours(error: Exception) -> bool:
    """Raised here because a peer sent too little, not because this rank failed."""
    return isinstance(error, EPError) and error.peer is not None


_FIX = "serve on with the old placement; migrate again when that rank can"


def _unpack(data: Tensor, tensors: Sequence[Tensor], slot: int) -> list[tuple[Tensor, Tensor]]:
    sizes = [t[0].numel() * t.itemsize for t in tensors]
    changes = []
    for t, part in zip(tensors, torch.split(data, sizes), strict=True):
        # A part may start anywhere, and a wider type wants it aligned.
        aligned = part if part.storage_offset() % t.itemsize == 0 else part.clone()
        changes.append((t[slot], aligned.view(t.dtype).view(t[slot].shape)))
    return changes


def _check_weights(
    weights: Weights, num_layers: int, per_rank: int, device: torch.device
) -> Weights:
    if len(weights) != num_layers:
        raise make_error("E201", f"rejected weights: of {len(weights)} layers, want {num_layers}")
    for layer, tensors in enumerate(weights):
        for t in tensors:
            if t.dim() < 1 or t.shape[0] != per_rank or not t.is_contiguous():
                got = f"{list(t.shape)} in layer {layer}"
                want = f"contiguous [{per_rank}, ...], a row for each slot"
                raise make_error("E201", f"rejected weights: got {got}, want {want}")
            if t.device != device:
                what = f"rejected weights: on {t.device} in layer {layer}, want {device}"
                raise make_error("E202", what)
    return weights


def migrate(
    buffer: Buffer,
    old: Placement,
    new: Placement,
    weights: Weights,
    *,
    piece_bytes: int = 64 << 20,
    **options: Any,
) -> Migration:
    """Begin to move experts from where `old` has them to where `new` wants them.

    Args:
        buffer: over the placements' slots; `old` is in force.
        weights: for each layer, the tensors of its experts: contiguous, [slots of this rank, ...],
            any dtype, the same sizes on all ranks. Read while pieces move; written in the last
            step, not before.
        piece_bytes: that a rank sends in one step at most, at least one row.
        options: of `Buffer.set_placement`: capacity, prefer.
    Returns:
        Migration: call `step` until it is True, between operations of the model, as often as it
        suits; dropping it, on all ranks, leaves everything as it is.
    Raises:
        EPArgumentError: E201, E203.

    Collective. Memory: the experts that come to this rank, once more, until the last step.
    """
    try:
        return Migration(buffer, old, new, weights, piece_bytes, options)
    except EPError as error:
        facts = {"rank": buffer.rank, "peer": error.peer}
        raise make_error(error.code, error.what, fix=error.fix, **facts) from None


__all__ = ["Migration", "Transfer", "migrate", "transfers"]
