"""ep_comm::combine: results home to their tokens, added; the gradient of dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_comm.buffer import find_buffer
from ep_comm.handle import Handle
from ep_comm.ops.gradient import grad_tag, no_rows
from ep_comm.ops.library import HANDLE, define, dense
from ep_comm.ops.redispatch import Rearrived

# home: empty without topk_weights.
SCHEMA = (
    "combine(Tensor x, Tensor? topk_weights, Tensor? bias, Tensor? bias2, " + HANDLE + ", "
    "int buffer, bool weighted, str order, int? num_sms, str tag) -> (Tensor total, Tensor home)"
)


def run(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    meta: Tensor,
    idx: Tensor,
    weights: Tensor,
    send_row: Tensor,
    recv_src: Tensor,
    recv_row: Tensor,
    rank_counts: Tensor,
    num_tokens_per_expert: Tensor,
    buffer: int,
    weighted: bool,
    order: str,
    num_sms: int | None,
    tag: str,
) -> tuple[Tensor, Tensor]:
    handle = Handle(
        meta, idx, weights, send_row, recv_src, recv_row, rank_counts, num_tokens_per_expert
    )
    biases = tuple(None if b is None else dense(b) for b in (bias, bias2))
    result: Any = find_buffer(buffer).combine(
        dense(x), handle, topk_weights=topk_weights, bias=biases, weighted=weighted, order=order,
        num_sms=num_sms, tag=tag,
    )  # fmt: skip
    if topk_weights is None:
        return result, x.new_empty(0, dtype=torch.float32)
    total, home = result
    return total, home


def fake(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    meta: Tensor,
    idx: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    home = 0 if topk_weights is None else idx.shape
    return x.new_empty((idx.shape[0], x.shape[-1])), x.new_empty(home, dtype=torch.float32)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, topk_weights, _, _, *rest = inputs
    handle, (buffer, weighted, *_, tag) = Handle(*rest[:8]), rest[8:]
    ctx.save_for_backward(x if weighted else None, *handle)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.buffer, ctx.weighted, ctx.tag = buffer, weighted, grad_tag(tag)
    ctx.layout = _layout(x, topk_weights, weighted)
    if topk_weights is None or not topk_weights.requires_grad:
        ctx.mark_non_differentiable(output[1])


def _layout(x: Tensor, topk_weights: Tensor | None, weighted: bool) -> str:
    """The layout as far as gradients need it: which shape weights have that travel with them."""
    if x.dim() == 3:
        return "slab"
    if topk_weights is None:
        return "grouped" if weighted else "rows"
    return "compact" if topk_weights.dim() == 2 else "grouped"


def gradient(ctx: Any, grad: Tensor, grad_home: Tensor) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    handle = Handle(*saved)
    needs_x, needs_values, needs_bias, needs_bias2, *needs_rest = ctx.needs_input_grad
    needs_weights = needs_rest[_WEIGHTS]
    travels = grad_home if needs_values else None
    grad_x = grad_values = grad_weights = None
    if ctx.weighted:
        if needs_x or needs_weights:
            grad_x, grad_weights = _weighted(ctx, handle, x, grad, needs_weights)
        if needs_values:
            no_tokens = no_rows(grad, (grad.shape[0], ctx.x_shape[-1]))
            grad_values = _send(ctx, handle, no_tokens, travels).topk_weights
    elif needs_x or needs_values:
        sent = _send(ctx, handle, grad, travels)
        grad_x, grad_values = sent.x, sent.topk_weights if needs_values else None
    of_rest: list[Tensor | None] = [None] * len(needs_rest)
    of_rest[_WEIGHTS] = grad_weights
    return (
        grad_x if needs_x else None,
        grad_values,
        grad if needs_bias else None,
        grad if needs_bias2 else None,
        *of_rest,
    )


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
    _, home = torch.ops.ep_comm.combine(
        no_rows(x, x.shape), dots, None, None, *handle, ctx.buffer, False, "rank", None, ctx.tag
    )
    return grad_x, home


def _send(ctx: Any, handle: Handle, grad: Tensor, values: Tensor | None) -> Rearrived:
    """The gradient of a combine's result, and of what it took home, in the rows of x."""
    sent = torch.ops.ep_comm.redispatch(
        grad, values, None, *handle, ctx.buffer, ctx.x_shape, ctx.layout, 128, None, "auto", "sm",
        None, ctx.tag,
    )  # fmt: skip
    return Rearrived(*sent)


_WEIGHTS = Handle._fields.index("topk_weights")

define(SCHEMA, run, fake, keep, gradient)
