"""Differentiable dispatch and combine: each is the other's gradient, over the same handle.

    y = dispatch(x)    grad x = combine(grad y): a token's gradient is the sum of its copies'
    y = combine(x)     grad x = dispatch(grad y): every row that was added gets the sum's gradient

Top-k weights travel with dispatch, so their gradients come home with combine, slot by slot. The
gradients are made of the differentiable calls again, so they can be differentiated, too.

Collective: a backward pass communicates as the forward pass did. All ranks must run it over the
same operations in the same order, which autograd does when all ranks build the same graph: let
`recv.x` pass through the experts also where no token arrived, and ask for the same gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ep_comm.buffer import Buffer
from ep_comm.errors import make_error
from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Received

Bias = Tensor | tuple[Tensor | None, Tensor | None] | None


def dispatch(
    buffer: Buffer,
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None = None,
    **options: Any,
) -> Received:
    """`buffer.dispatch`, differentiable in x and topk_weights.

    Args:
        x: bfloat16, float16 or float32 [num_tokens, hidden] to be differentiable.
        topk_idx: as `Buffer.dispatch`; None with `handle=`.
        topk_weights: [num_tokens, num_topk] float32, bfloat16 or float16.
        options: of `Buffer.dispatch`, but not `wait`; `quantize` only for x without gradients.
    Returns:
        Received. Rows of x without a token are zero in every layout, so that they add nothing to
        the gradients of expert weights. The handle carries topk_weights with their graph.
    Raises:
        As `Buffer.dispatch`; E203 for `wait=False`, or `quantize` of an x with gradients.

    Stream: the current stream.
    Collective: every rank calls it, in the same order; its backward, too (see the module).
    Cost: backward is one combine.
    """
    if not options.get("wait", True):
        raise make_error("E203", "rejected wait=False: want True, autograd needs the result")
    if options.get("quantize") is not None and x.requires_grad and torch.is_grad_enabled():
        raise make_error("E203", "rejected quantize: want None, rounding to fp8 has no gradient")
    box: list[Received] = []
    rows, weights = _Dispatch.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, buffer, topk_idx, options, box
    )
    handle = box[0].handle
    if topk_weights is not None:
        handle = handle._replace(topk_weights=topk_weights.to(torch.float32).contiguous())
    return replace(box[0], x=rows, topk_weights=weights, handle=handle)


def combine(
    buffer: Buffer,
    x: Tensor,
    handle: Any,
    *,
    weighted: bool = False,
    topk_weights: Tensor | None = None,
    order: str = "rank",
    bias: Bias = None,
    num_sms: int | None = None,
    tag: str = "",
) -> Any:
    """`buffer.combine`, differentiable in x, bias, topk_weights and, when weighted, the weights.

    Args:
        x, handle, weighted, topk_weights, order, bias, num_sms, tag: as `Buffer.combine`. The
            weights of weighted=True are those in the handle: keep the one `dispatch` returned to
            have their gradients.
    Returns:
        [num_tokens, hidden]; with topk_weights a pair, the second float32 [num_tokens, num_topk].
    Raises:
        As `Buffer.combine`.

    Stream: the current stream.
    Collective: every rank calls it, in the same order; its backward, too (see the module).
    Cost: backward is one cached dispatch. With weighted=True and weights that need gradients it is
        a combine more: scaling x by `recv.topk_weights` before a plain combine needs none.
    """
    options: dict[str, Any] = {"weighted": weighted, "order": order, "num_sms": num_sms, "tag": tag}
    pair = bias if isinstance(bias, tuple | list) else (bias, None)
    whole = isinstance(handle, tuple | list) and len(handle) == len(Handle._fields)
    if not whole or len(pair) != 2:  # the buffer says what is wrong, to all ranks
        return buffer.combine(x, handle, topk_weights=topk_weights, bias=bias, **options)
    total, home = _Combine.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, *pair, buffer, options, *handle
    )
    return total if topk_weights is None else (total, home)


# ---- The gradients, as functions of tensors ----


def dispatch_grad(
    buffer: Buffer, handle: Handle, grad_x: Tensor | None, grad_weights: Tensor | None, tag: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a dispatch's x and topk_weights from those of what it returned.

    Args:
        grad_x: in the rows of the dispatch; None when x needs none and only the weights' travel.
        grad_weights: float32, one per selection; None when the weights need none.
    """
    rows = _no_rows(handle) if grad_x is None else _dense(grad_x)
    if grad_weights is None:
        return combine(buffer, rows, handle, tag=tag), None
    home: tuple[Tensor, Tensor] = combine(
        buffer, rows, handle, topk_weights=_dense(grad_weights), tag=tag
    )
    return home


def combine_grad(
    buffer: Buffer, handle: Handle, grad: Tensor, grad_home: Tensor | None, tag: str
) -> Received:
    """What a combine's gradients are made of: the gradient of its result, in the rows of x.

    Args:
        grad: [num_tokens, hidden] of the result.
        grad_home: float32 [num_tokens, num_topk] to travel with it.
    """
    return dispatch(buffer, _dense(grad), None, grad_home, handle=handle, tag=tag)


def weighted_combine_grad(
    buffer: Buffer, handle: Handle, x: Tensor, grad: Tensor, needs_weights: bool, tag: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weighted combine's x and of the weights in its handle.

    Of a row, the weight times the gradient of its token; of a weight, the dot product of its row
    with that gradient, in float32, which its source needs back.
    """
    received = combine_grad(buffer, handle, grad, handle.topk_weights, tag)
    assert received.topk_weights is not None
    rows = received.x.to(torch.float32)
    grad_x = (received.topk_weights.unsqueeze(-1) * rows).to(x.dtype)
    if not needs_weights:
        return grad_x, None
    dots = (rows * x.to(torch.float32)).sum(-1)
    _, home = combine(buffer, _no_rows(handle), handle, topk_weights=dots, tag=tag)
    return grad_x, home


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        buffer: Buffer,
        topk_idx: Tensor | None,
        options: dict[str, Any],
        box: list[Received],
    ) -> tuple[Tensor, Tensor | None]:
        received: Received = buffer.dispatch(x, topk_idx, topk_weights, **options)
        _clear_rows_without_token(received)
        box.append(received)
        ctx.buffer, ctx.tag = buffer, _grad_tag(options.get("tag", ""))
        ctx.weights_dtype = None if topk_weights is None else topk_weights.dtype
        ctx.save_for_backward(*received.handle)
        outputs = ((received.x, x), (received.topk_weights, topk_weights))
        ctx.mark_non_differentiable(
            *(o for o, i in outputs if o is not None and (i is None or not i.requires_grad))
        )
        return received.x, received.topk_weights

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor | None) -> Any:
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        home, weights = dispatch_grad(
            ctx.buffer,
            Handle(*ctx.saved_tensors),
            grad_x if needs_x else None,
            grad_weights if needs_weights else None,
            ctx.tag,
        )
        weights = None if weights is None else weights.to(ctx.weights_dtype)
        return (home if needs_x else None), weights, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        buffer: Buffer,
        options: dict[str, Any],
        *handle: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        result = buffer.combine(
            x, handle, topk_weights=topk_weights, bias=(first, second), **options
        )
        total, home = result if isinstance(result, tuple) else (result, None)
        ctx.buffer, ctx.tag, ctx.weighted = buffer, _grad_tag(options["tag"]), options["weighted"]
        ctx.save_for_backward(x if ctx.weighted else None, *handle)
        if home is not None and topk_weights is not None and not topk_weights.requires_grad:
            ctx.mark_non_differentiable(home)
        return total, home

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_home: Tensor | None) -> Any:
        x, *saved = ctx.saved_tensors
        needs_x, needs_values, needs_first, needs_second, _, _, *needs_handle = ctx.needs_input_grad
        grad_x = grad_values = None
        of_handle: list[Tensor | None] = [None] * len(saved)
        handle, travels = Handle(*saved), grad_home if needs_values else None
        if ctx.weighted:
            needs_weights = needs_handle[_WEIGHTS]
            if needs_x or needs_weights:
                grad_x, of_handle[_WEIGHTS] = weighted_combine_grad(
                    ctx.buffer, handle, x, grad, needs_weights, ctx.tag
                )
            if needs_values:
                received = combine_grad(ctx.buffer, handle, _no_tokens(handle), travels, ctx.tag)
                grad_values = received.topk_weights
        elif needs_x or needs_values:
            received = combine_grad(ctx.buffer, handle, grad, travels, ctx.tag)
            grad_x, grad_values = received.x, received.topk_weights if needs_values else None
        return (
            grad_x if needs_x else None,
            grad_values,
            grad if needs_first else None,
            grad if needs_second else None,
            None,
            None,
            *of_handle,
        )


_WEIGHTS = Handle._fields.index("topk_weights")


# ---- Rows ----


def _grad_tag(tag: str) -> str:
    return f"{tag} backward".lstrip()


def _clear_rows_without_token(received: Received) -> None:
    """Zero what a layout leaves unspecified; it must not reach the gradient of an expert."""
    handle, x = received.handle, received.x
    meta = HandleMeta.unpack(handle.meta)
    if meta.sync and meta.layout != "slab":
        return
    rows = x.view(torch.uint8).reshape(-1, x.shape[-1] * x.itemsize)
    if meta.layout == "compact":
        empty = torch.arange(rows.shape[0], device=x.device) >= handle.rank_counts[1].sum()
    else:
        taken = torch.where(handle.recv_row < 0, rows.shape[0], handle.recv_row)
        empty = torch.ones(rows.shape[0] + 1, dtype=torch.bool, device=x.device)
        empty = empty.index_fill_(0, taken.flatten().long(), False)[:-1]
    rows.masked_fill_(empty.unsqueeze(1), 0)


def _no_rows(handle: Handle) -> Tensor:
    """Zeros to combine when only weights have to come home; as few bytes as there may be."""
    meta = HandleMeta.unpack(handle.meta)
    return torch.zeros(meta.x_shape, dtype=_small(meta), device=handle.topk_idx.device)


def _no_tokens(handle: Handle) -> Tensor:
    """The same to dispatch."""
    meta = HandleMeta.unpack(handle.meta)
    shape = (meta.num_tokens, meta.hidden)
    return torch.zeros(shape, dtype=_small(meta), device=handle.topk_idx.device)


def _small(meta: HandleMeta) -> torch.dtype:
    return torch.bfloat16 if meta.hidden % 8 == 0 else torch.float32


def _dense(grad: Tensor) -> Tensor:
    """What a buffer accepts: contiguous and 16 bytes aligned, as few gradients of views are."""
    grad = grad.contiguous()
    return grad if grad.numel() == 0 or grad.data_ptr() % 16 == 0 else grad.clone()
