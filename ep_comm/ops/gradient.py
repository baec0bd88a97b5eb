"""What gradients keep, and those that dispatch and redispatch share: combine over the routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ep_comm.handle import Handle


def keep_routing(ctx: Any, handle: Handle, shape: Sequence[int], buffer: int, tag: str) -> None:
    """Keep what a gradient needs to send along the same routing; `shape` is that of its rows."""
    ctx.save_for_backward(*handle)
    ctx.shape, ctx.buffer, ctx.tag = shape, buffer, grad_tag(tag)


def keep_differentiable(
    ctx: Any, results: Sequence[Tensor], made_of: Sequence[tuple[int, Tensor | None]]
) -> None:
    """Only the results listed, by number, have gradients, and only if what they are made of does.

    Args:
        made_of: number of a result, and the argument it is made of.
    """
    has = {number for number, source in made_of if source is not None and source.requires_grad}
    ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in has))
    ctx.weights_dtype = None if made_of[1][1] is None else made_of[1][1].dtype


def combine_grads(
    ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the x and topk_weights that were sent, from those of what arrived.

    Args:
        grad_x: in the rows that arrived; None when x needs none and only the weights' travel.
        grad_weights: float32, one per selection; None when the weights need none.
    """
    handle = Handle(*ctx.saved_tensors)
    if grad_x is None and grad_weights is None:
        return None, None
    rows = no_rows(handle.send_row, ctx.shape) if grad_x is None else grad_x
    total, home = torch.ops.ep_comm.combine(
        rows, grad_weights, None, None, *handle, ctx.buffer, False, "rank", None, ctx.tag
    )
    return (
        None if grad_x is None else total,
        None if grad_weights is None else home.to(ctx.weights_dtype),
    )


def no_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros to send when only weights have to travel; as few bytes as there may be."""
    dtype = torch.bfloat16 if shape[-1] % 8 == 0 else torch.float32
    return like.new_zeros(shape, dtype=dtype)


def grad_tag(tag: str) -> str:
    return f"{tag} backward".lstrip()
