"""ep_comm::combine: results home to their tokens, added; the gradient of dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_comm.buffer import find_buffer
from ep_comm.handle import Handle
from ep_comm.ops.dispatch import rows_without_token
from ep_comm.ops.gradient import grad_tag, no_rows
from ep_comm.ops.library import Gradients, define, dense, handle_of, in_turn
from ep_comm.ops.redispatch import Rearrived


class CombineArgs(NamedTuple):
    """The arguments of the op; they mean what those of `Buffer.combine` mean."""

    turn: Tensor | None  # see in_turn
    x: Tensor
    topk_weights: Tensor | None
    row_weights: Tensor | None
    bias: Tensor | None
    bias2: Tensor | None
    meta: Tensor  # from here to num_tokens_per_expert: the handle
    idx: Tensor
    weights: Tensor
    send_row: Tensor
    recv_src: Tensor
    recv_row: Tensor
    rank_counts: Tensor
    num_tokens_per_expert: Tensor
    buffer: int
    weighted: bool
    order: str
    per_rank: bool
    num_sms: int | None
    tag: str


class Combined(NamedTuple):
    """The results of the op."""

    total: Tensor
    home: Tensor  # the weights that came back; empty when none were sent


def run(a: CombineArgs) -> Combined:
    biases = tuple(None if b is None else dense(b) for b in (a.bias, a.bias2))
    result: Any = find_buffer(a.buffer).combine(
        dense(a.x), handle_of(a), topk_weights=a.topk_weights, bias=biases, weighted=a.weighted,
        order=a.order, per_rank=a.per_rank,
        row_weights=None if a.row_weights is None else dense(a.row_weights), num_sms=a.num_sms,
        tag=a.tag,
    )  # fmt: skip
    if a.topk_weights is None:
        return Combined(result, a.x.new_empty(0, dtype=torch.float32))
    return Combined(*result)


def fake(a: CombineArgs) -> Combined:
    home = 0 if a.topk_weights is None else a.idx.shape
    return Combined(
        total=a.x.new_empty((a.idx.shape[0], a.x.shape[-1])),
        home=a.x.new_empty(home, dtype=torch.float32),
    )


def keep(ctx: Any, a: CombineArgs, results: Combined) -> None:
    of_weights = a.weighted or (a.row_weights is not None and a.row_weights.requires_grad)
    ctx.save_for_backward(a.x if of_weights else None, a.row_weights, *handle_of(a))
    ctx.x_shape, ctx.weighted = a.x.shape, a.weighted
    ctx.turn, ctx.buffer, ctx.tag = a.turn, a.buffer, grad_tag(a.tag)
    ctx.layout = _layout(a.x, a.topk_weights, a.weighted)
    if a.topk_weights is None or not a.topk_weights.requires_grad:
        ctx.mark_non_differentiable(results.home)


def _layout(x: Tensor, topk_weights: Tensor | None, weighted: bool) -> str:
    """The layout as far as gradients need it: which shape weights have that travel with them."""
    if x.dim() == 3:
        return "slab"
    if topk_weights is None:
        return "grouped" if weighted else "rows"
    return "compact" if topk_weights.dim() == 2 else "grouped"


def gradient(ctx: Any, needed: set[str], grads: Combined) -> Gradients:
    x, row_weights, *saved = ctx.saved_tensors
    handle, grad = Handle(*saved), grads.total
    travels = grads.home if "topk_weights" in needed else None
    found: Gradients = {"bias": grad, "bias2": grad}
    if ctx.weighted:
        if needed & {"x", "weights"}:
            with_weights = "weights" in needed
            found["x"], found["weights"] = _weighted(ctx, handle, x, grad, with_weights)
        if travels is not None:
            no_tokens = no_rows(grad, (grad.shape[0], ctx.x_shape[-1]))
            found["topk_weights"] = _send(ctx, handle, no_tokens, travels).topk_weights
    elif row_weights is not None and needed & {"x", "row_weights"}:
        found["x"], found["row_weights"] = _row_weighted(ctx, handle, x, row_weights, grad)
    elif needed & {"x", "topk_weights"}:
        sent = _send(ctx, handle, grad, travels)
        found |= {"x": sent.x, "topk_weights": sent.topk_weights}
    return found


def _weighted(
    ctx: Any, handle: Handle, x: Tensor, grad: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weighted combine's x and of the weights in its handle.

    Of a row, the weight times the gradient of its token; of a weight, the dot product of its row
    with that gradient, in float32, which its source needs back.
    """
    sent = _send(ctx, handle, grad, handle.topk_weights)
    rows = sent.x.to(torch.float32)
    grad_x = (sent.topk_weights.unsqueeze(-1) * rows).to(x.dtype)
    if not needs_weights:
        return grad_x, None
    dots = (rows * x.to(torch.float32)).sum(-1)
    _, home = in_turn(
        torch.ops.ep_comm.combine, ctx.turn, no_rows(x, x.shape), dots, None, None, None, *handle,
        ctx.buffer, False, "rank", False, None, ctx.tag,
    )  # fmt: skip
    return grad_x, home


def _row_weighted(
    ctx: Any, handle: Handle, x: Tensor | None, row_weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a combine's x and of the weights that its owner multiplied it by.

    Both stay where they are. Padding is in no sum, so what stands there is in no gradient, be it a
    NaN; x is None when the weights need none.
    """
    empty = rows_without_token(handle.recv_row, row_weights.numel()).view(row_weights.shape)
    rows = _send(ctx, handle, grad, None).x.to(torch.float32)
    factors = row_weights.masked_fill(empty, 0.0).unsqueeze(-1)
    grad_x = (factors * rows).to(grad.dtype)
    if x is None:
        return grad_x, None
    return grad_x, (rows * x.to(torch.float32)).sum(-1).masked_fill(empty, 0.0)


def _send(ctx: Any, handle: Handle, grad: Tensor, values: Tensor | None) -> Rearrived:
    """The gradient of a combine's result, and of what it took home, in the rows of x."""
    sent = in_turn(
        torch.ops.ep_comm.redispatch, ctx.turn, grad, values, None, *handle, ctx.buffer,
        ctx.x_shape, ctx.layout, False, 128, None, "auto", "sm", None, ctx.tag,
    )  # fmt: skip
    return Rearrived(*sent)


define("combine", CombineArgs, Combined, run=run, fake=fake, keep=keep, gradient=gradient)
