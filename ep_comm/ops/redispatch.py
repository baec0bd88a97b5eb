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
from ep_comm.ops.library import HANDLE, count, define, dense_rows, new_size, or_empty

# shape: of x as it arrives, -1 = not known; layout: that of the handle, "rows" = compact or
# grouped, nobody asks which. Both are there for tracing, where a handle has no numbers.
SCHEMA = (
    "redispatch(Tensor x, Tensor? topk_weights, Tensor? scales, " + HANDLE + ", int buffer, "
    "SymInt[] shape, str layout, int? scale_block, str? quantize, str output, str transfer, "
    "int? num_sms, str tag) -> (Tensor x, Tensor topk_weights, Tensor scales, Tensor num_recv, "
    "Tensor offsets, Tensor status, Tensor meta, Tensor num_tokens_per_expert)"
)


class Rearrived(NamedTuple):
    """The results of the op; empty are topk_weights, scales and offsets where Received has None."""

    x: Tensor
    topk_weights: Tensor
    scales: Tensor
    num_recv: Tensor  # int32 [1]
    offsets: Tensor
    status: Tensor
    meta: Tensor
    num_tokens_per_expert: Tensor

    def handle(self, old: Handle, topk_weights: Tensor | None) -> Handle:
        """The handle of what arrived: the old one, with the weights if they travelled along."""
        if topk_weights is None:
            return old
        weights = topk_weights.to(torch.float32).contiguous()
        return old._replace(meta=self.meta, topk_weights=weights)


def run(
    x: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    meta: Tensor,
    idx: Tensor,
    weights: Tensor,
    send_row: Tensor,
    recv_src: Tensor,
    recv_row: Tensor,
    rank_counts: Tensor,
    num_tokens_per_expert: Tensor,
    buffer: int,
    shape: list[int],
    layout: str,
    scale_block: int | None,
    quantize: str | None,
    output: str,
    transfer: str,
    num_sms: int | None,
    tag: str,
) -> Rearrived:
    handle = Handle(
        meta, idx, weights, send_row, recv_src, recv_row, rank_counts, num_tokens_per_expert
    )
    received = find_buffer(buffer).dispatch(
        dense_rows(x), None, topk_weights, handle=handle, scales=scales, scale_block=scale_block,
        quantize=quantize, output=output, transfer=transfer, num_sms=num_sms, tag=tag,
    )  # fmt: skip
    got = received.x.shape
    fits = len(got) == len(shape) and all(w in (-1, g) for g, w in zip(got, shape, strict=True))
    if not fits or layout not in (received.layout, "rows"):
        want = f"want {received.layout!r} {list(got)}, as the handle's dispatch"
        raise make_error("E203", f"rejected layout={layout!r} of {list(shape)}: {want}")
    clear_rows_without_token(received)
    pass_on_hold(received)
    of_handle = received.handle
    counts = received.num_tokens_per_expert
    return Rearrived(
        x=received.x,
        topk_weights=or_empty(received.topk_weights, x),
        scales=or_empty(received.scales, x),
        num_recv=count(received.num_recv, x),
        offsets=or_empty(received.offsets if layout == "grouped" else None, x),
        status=received.status,
        meta=meta.clone() if of_handle.meta is meta else of_handle.meta,
        num_tokens_per_expert=counts.clone() if counts is num_tokens_per_expert else counts,
    )


def fake(
    x: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    meta: Tensor,
    idx: Tensor,
    weights: Tensor,
    send_row: Tensor,
    recv_src: Tensor,
    recv_row: Tensor,
    rank_counts: Tensor,
    num_tokens_per_expert: Tensor,
    buffer: int,
    shape: list[int],
    layout: str,
    scale_block: int | None,
    quantize: str | None,
    output: str,
    transfer: str,
    num_sms: int | None,
    tag: str,
) -> Rearrived:
    local = num_tokens_per_expert.shape[0]
    spec = as_spec(x, rank_counts.shape[1], local, x.shape[0])
    _, words, scale_dtype = check_scales(spec, x, scales, scale_block, quantize)
    *rows, hidden = (new_size() if type(s) is int and s == -1 else s for s in shape)
    of_rows = tuple(rows)
    of_slots = (of_rows[0], idx.shape[1]) if layout == "compact" else of_rows
    dtype = x.dtype if quantize is None else torch.float8_e4m3fn
    ints: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    offsets = torch.empty(local + 1, **ints)
    return Rearrived(
        x=x.new_empty((*of_rows, hidden), dtype=dtype),
        topk_weights=fake_weights(x, topk_weights, of_slots),
        scales=fake_scales(x, layout, of_rows, words, scale_dtype),
        num_recv=torch.empty(1, **ints),
        offsets=offsets if layout == "grouped" else x.new_empty(0),
        status=torch.empty(1, **ints),
        meta=torch.empty(META_SIZE, dtype=torch.int64, device="cpu"),
        num_tokens_per_expert=torch.empty(local, **ints),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, topk_weights, _, *rest = inputs
    handle, (buffer, *_, tag) = Handle(*rest[:8]), rest[8:]
    arrived = Rearrived(*output)
    keep_routing(ctx, handle, arrived.x.shape, buffer, tag)
    keep_differentiable(ctx, output, ((0, x), (1, topk_weights)))


def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weights, *rest = ctx.needs_input_grad
    home = combine_grads(ctx, grads[0] if needs_x else None, grads[1] if needs_weights else None)
    return *home, *(None for _ in rest)


define(SCHEMA, run, fake, keep, gradient)
