"""ep_comm::redispatch: tokens along the routing of a handle; the gradient of combine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_comm.buffer import find_buffer
from ep_comm.checks import check_scales
from ep_comm.errors import make_error
from ep_comm.handle import META_SIZE, Handle
from ep_comm.ops.dispatch import (
    as_spec,
    clear_rows_without_token,
    fake_scales,
    fake_weights,
    pass_on_hold,
)
from ep_comm.ops.gradient import combine_grads, keep_differentiable, keep_routing
from ep_comm.ops.library import (
    Gradients,
    Sizes,
    count,
    define,
    dense_rows,
    handle_of,
    new_size,
    or_empty,
)


class RedispatchArgs(NamedTuple):
    """The arguments of the op; those of `Buffer.dispatch` mean what they mean there."""

    turn: Tensor | None  # see in_turn
    x: Tensor
    topk_weights: Tensor | None
    scales: Tensor | None
    meta: Tensor  # from here to num_tokens_per_expert: the handle
    idx: Tensor
    weights: Tensor
    send_row: Tensor
    recv_src: Tensor
    recv_row: Tensor
    rank_counts: Tensor
    num_tokens_per_expert: Tensor
    buffer: int
    shape: Sizes  # of x as it arrives, -1 = not known: in a graph a handle has no numbers
    layout: str  # that of the handle; "rows" = compact or grouped, nobody asks which
    crosses: bool  # the handle of what arrives is wanted, and nodes are several
    scale_block: int | None
    quantize: str | None
    output: str
    transfer: str
    num_sms: int | None
    tag: str


class Rearrived(NamedTuple):
    """The results of the op; empty are topk_weights, scales and offsets where Received has None."""

    x: Tensor
    topk_weights: Tensor
    scales: Tensor
    num_recv: Tensor  # int32 [1]
    offsets: Tensor
    status: Tensor
    recv_row: Tensor  # of the handle; empty unless `crosses`
    meta: Tensor
    num_tokens_per_expert: Tensor

    def handle(self, old: Handle, topk_weights: Tensor | None, *, crosses: bool) -> Handle:
        """The handle of what arrived: the old one, with the weights if they travelled along."""
        if topk_weights is None:
            return old
        weights = topk_weights.to(torch.float32).contiguous()
        recv_row = self.recv_row if crosses else old.recv_row
        return old._replace(meta=self.meta, topk_weights=weights, recv_row=recv_row)


def run(a: RedispatchArgs) -> Rearrived:
    received = find_buffer(a.buffer).dispatch(
        dense_rows(a.x), None, a.topk_weights, handle=handle_of(a), scales=a.scales,
        scale_block=a.scale_block, quantize=a.quantize, output=a.output, transfer=a.transfer,
        num_sms=a.num_sms, tag=a.tag,
    )  # fmt: skip
    got, want = received.x.shape, a.shape
    fits = len(got) == len(want) and all(w in (-1, g) for g, w in zip(got, want, strict=True))
    if not fits or a.layout not in (received.layout, "rows"):
        why = f"want {received.layout!r} {list(got)}, as the handle's dispatch"
        raise make_error("E203", f"rejected layout={a.layout!r} of {list(want)}: {why}")
    clear_rows_without_token(received)
    pass_on_hold(received)
    meta, counts = received.handle.meta, received.num_tokens_per_expert
    recv_row = received.handle.recv_row
    if not a.crosses:
        recv_row = a.recv_row.new_empty((0, a.recv_row.shape[1]))
    return Rearrived(
        x=received.x,
        topk_weights=or_empty(received.topk_weights, a.x),
        scales=or_empty(received.scales, a.x),
        num_recv=count(received.num_recv, a.x),
        offsets=or_empty(received.offsets if a.layout == "grouped" else None, a.x),
        status=received.status,
        recv_row=recv_row.clone() if recv_row is a.recv_row else recv_row,
        meta=meta.clone() if meta is a.meta else meta,
        num_tokens_per_expert=counts.clone() if counts is a.num_tokens_per_expert else counts,
    )


def fake(a: RedispatchArgs) -> Rearrived:
    x, local = a.x, a.num_tokens_per_expert.shape[0]
    spec = as_spec(x, a.rank_counts.shape[1], local, x.shape[0])
    _, words, scale_dtype = check_scales(spec, x, a.scales, a.scale_block, a.quantize)
    *rows, hidden = (new_size() if type(s) is int and s == -1 else s for s in a.shape)
    of_rows = tuple(rows)
    of_slots = (of_rows[0], a.idx.shape[1]) if a.layout == "compact" else of_rows
    dtype = x.dtype if a.quantize is None else torch.float8_e4m3fn
    ints: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    offsets = torch.empty(local + 1, **ints)
    return Rearrived(
        x=x.new_empty((*of_rows, hidden), dtype=dtype),
        topk_weights=fake_weights(x, a.topk_weights, of_slots),
        scales=fake_scales(x, a.layout, of_rows, words, scale_dtype),
        num_recv=torch.empty(1, **ints),
        offsets=offsets if a.layout == "grouped" else x.new_empty(0),
        status=torch.empty(1, **ints),
        recv_row=torch.empty((fake_recv_rows(a), a.recv_row.shape[1]), **ints),
        meta=torch.empty(META_SIZE, dtype=torch.int64, device="cpu"),
        num_tokens_per_expert=torch.empty(local, **ints),
    )


def fake_recv_rows(a: RedispatchArgs) -> int:
    """As many tokens cross as before; each has three rows now, with weights."""
    if not a.crosses:
        return 0
    first = 0 if a.layout == "compact" else a.recv_src.shape[0]
    had_weights = a.weights.shape[0] > 0
    return first + (a.recv_row.shape[0] - first) // (3 if had_weights else 2) * 3


def keep(ctx: Any, a: RedispatchArgs, results: Rearrived) -> None:
    keep_routing(ctx, a, handle_of(a), results.x.shape)
    keep_differentiable(ctx, results, x=a.x, topk_weights=a.topk_weights)


def gradient(ctx: Any, needed: set[str], grads: Rearrived) -> Gradients:
    return combine_grads(
        ctx,
        grads.x if "x" in needed else None,
        grads.topk_weights if "topk_weights" in needed else None,
    )


define("redispatch", RedispatchArgs, Rearrived, run=run, fake=fake, keep=keep, gradient=gradient)
