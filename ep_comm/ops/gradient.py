"""What gradients keep, and those that dispatch and redispatch share: combine over the routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ep_comm.handle import Handle
from ep_comm.ops.library import Gradients, in_turn


def keep_routing(ctx: Any, args: Any, handle: Handle, shape: Sequence[int]) -> None:
    """Keep what a gradient needs to send along the same routing; `shape` is that of its rows."""
    ctx.save_for_backward(*handle)
    ctx.turn, ctx.buffer, ctx.tag, ctx.shape = args.turn, args.buffer, grad_tag(args.tag), shape


def keep_differentiable(ctx: Any, results: Any, **made_of: Tensor | None) -> None:
    """Only these results have gradients, and only if the arguments they are made of do.

    Args:
        made_of: by the name of a result, the argument.
    """
    has = {name for name, source in made_of.items() if source is not None and source.requires_grad}
    ctx.mark_non_differentiable(*(t for f, t in results._asdict().items() if f not in has))
    weights = made_of["topk_weights"]
    ctx.weights_dtype = None if weights is None else weights.dtype


def combine_grads(ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None) -> Gradients:
    """Gradients of the x and topk_weights that were sent, from those of what arrived.

    Args:
        grad_x: in the rows that arrived; None when x needs none and only the weights' travel.
        grad_weights: float32, one per selection; None when the weights need none.
    """
    if grad_x is None and grad_weights is None:
        return {}
    handle = Handle(*ctx.saved_tensors)
    rows = no_rows(handle.send_row, ctx.shape) if grad_x is None else grad_x
    total, home = in_turn(
        torch.ops.ep_comm.combine, ctx.turn, rows, grad_weights, None, None, None, *handle,
        ctx.buffer, False, "rank", False, None, ctx.tag,
    )  # fmt: skip
    return {
        "x": None if grad_x is None else total,
        "topk_weights": None if grad_weights is None else home.to(ctx.weights_dtype),
    }


def no_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros to send when only weights have to travel; as few bytes as there may be."""
    dtype = torch.bfloat16 if shape[-1] % 8 == 0 else torch.float32
    return like.new_zeros(shape, dtype=dtype)


def grad_tag(tag: str) -> str:
    return f"{tag} backward".lstrip()
