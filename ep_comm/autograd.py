"""Differentiable dispatch and combine: each is the other's gradient, over the same handle.

    y = dispatch(x)    grad x = combine(grad y): a token's gradient is the sum of its copies'
    y = combine(x)     grad x = dispatch(grad y): every row that was added gets the sum's gradient

Top-k weights travel with dispatch, so their gradients come home with combine, slot by slot. The
gradients are made of the differentiable calls again, so they can be differentiated, too.

Both are torch.library ops (ep_comm.ops): they can be compiled into one graph, which keeps their
order, and checkpointing can be told to keep their results.

Collective: a backward pass communicates as the forward pass did. All ranks must run it over the
same operations in the same order, which autograd does when all ranks build the same graph: let
`recv.x` pass through the experts also where no token arrived, and ask for the same gradients. A
checkpoint that recomputes a dispatch or a combine does it again on all ranks, in backward; with
`context_fn=partial(create_selective_checkpoint_contexts, OPS)` it keeps their results instead. In a
graph, whose calls have one order, it recomputes those of all layers before the first gradient, so
there keeping the results may even take less memory.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

import ep_comm.ops  # noqa: F401  # defines torch.ops.ep_comm
from ep_comm.buffer import Buffer
from ep_comm.errors import EPError, make_error
from ep_comm.handle import Handle, HandleMeta
from ep_comm.ops.arguments import (
    are_flags,
    are_ints,
    are_tensors,
    are_texts,
    flags,
    is_routing,
    is_whole,
    refusal,
    text,
)
from ep_comm.ops.dispatch import HOLD, Arrived
from ep_comm.ops.library import TURN, in_turn
from ep_comm.ops.redispatch import Rearrived
from ep_comm.received import Received

# The ops, for policies of checkpoints.
OPS: Final = [
    torch.ops.ep_comm.dispatch.default,
    torch.ops.ep_comm.redispatch.default,
    torch.ops.ep_comm.combine.default,
]

Bias = Tensor | tuple[Tensor | None, Tensor | None] | None


def dispatch(
    buffer: Buffer,
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    scale_block: int | None = 128,
    quantize: str | None = None,
    handle: Any = None,
    layout: str = "compact",
    alignment: int = 1,
    row_index: bool = False,
    layer: int | None = 0,
    capacity: int | None = None,
    sync: bool = True,
    wait: bool = True,
    output: str = "auto",
    transfer: str = "sm",
    num_sms: int | None = None,
    tag: str = "",
) -> Received:
    """`buffer.dispatch`, differentiable in x and topk_weights, also inside of torch.compile.

    Args:
        x: bfloat16, float16 or float32 [num_tokens, hidden] to be differentiable; rows that are not
            dense or aligned are copied.
        topk_idx: as `Buffer.dispatch`; None with `handle=`.
        topk_weights: [num_tokens, num_topk] float32, bfloat16 or float16.
        handle: as `Buffer.dispatch`. A compiler cannot look into one: inside of torch.compile pass
            its layout, its sync and, for a slab, its capacity, too, as far as they are no defaults.
        quantize: only for x without gradients.
        wait: True; a begun dispatch has no result to differentiate.
        scales, scale_block, layout, alignment, row_index, layer, capacity, sync, output, transfer,
            num_sms, tag: as `Buffer.dispatch`.
    Returns:
        Received. Rows of x without a token are zero in every layout, so that they add nothing to
        the gradients of expert weights. The handle carries topk_weights with their graph. Inside of
        torch.compile sizes that depend on what arrives are symbols.
    Raises:
        As `Buffer.dispatch`; E203 for `wait=False`, or `quantize` of an x with gradients.

    Stream: the current stream.
    Collective: every rank calls it, in the same order; its backward, too (see the module).
    Cost: backward is one combine.
    """
    if not are_flags(row_index, sync, wait):
        row_index, sync, wait = flags(
            buffer, "dispatch", tag, row_index=row_index, sync=sync, wait=wait
        )
    fits = (
        are_tensors(x, topk_idx, topk_weights, scales)
        and is_routing(topk_idx, handle)
        and are_ints(alignment, scale_block, layer, capacity, num_sms)
        and are_texts(layout, output, transfer, quantize)
    )
    if not fits:
        return buffer.dispatch(  # which says what is wrong, to all ranks
            x, topk_idx, topk_weights, scales=scales, scale_block=scale_block, quantize=quantize,
            handle=handle, layout=layout, alignment=alignment, row_index=row_index, layer=layer,
            capacity=capacity, sync=sync, output=output, transfer=transfer, num_sms=num_sms,
            tag=tag,
        )  # fmt: skip
    if not wait:
        what = "rejected wait=False: want True, autograd needs the result"
        raise refusal(buffer, "dispatch", make_error("E203", what), tag)
    if quantize is not None and x.requires_grad and torch.is_grad_enabled():
        what = "rejected quantize: want None, rounding to fp8 has no gradient"
        raise refusal(buffer, "dispatch", make_error("E203", what), tag)
    options = (scale_block, quantize, output, transfer, num_sms, text(buffer, "dispatch", tag))
    arrived: Arrived | Rearrived
    if topk_idx is not None:
        arrived = Arrived(
            *in_turn(
                torch.ops.ep_comm.dispatch, _turn(), x, topk_idx, topk_weights, scales,
                buffer.number, *buffer.sizes, layout, alignment, row_index, layer, capacity, sync,
                *options,
            )
        )  # fmt: skip
        handle = arrived.handle(topk_weights)
    else:
        handle, row_index = Handle(*handle), False
        if torch.compiler.is_compiling():
            shape = _told_shape(buffer, handle, x.shape[1], layout, capacity)
        else:
            shape, layout, sync = _read_shape(buffer, handle, tag)
        crosses = topk_weights is not None and buffer.sizes[3] > 0
        arrived = Rearrived(
            *in_turn(
                torch.ops.ep_comm.redispatch, _turn(), x, topk_weights, scales, *handle,
                buffer.number, shape, layout, crosses, *options,
            )
        )  # fmt: skip
        handle = arrived.handle(handle, topk_weights, crosses=crosses)
    return _received(
        x=arrived.x,
        topk_idx=arrived.topk_idx if isinstance(arrived, Arrived) else None,
        topk_weights=None if topk_weights is None else arrived.topk_weights,
        scales=None if scales is None and quantize is None else arrived.scales,
        num_tokens_per_expert=arrived.num_tokens_per_expert,
        num_recv=handle.recv_src.shape[0] if sync else arrived.num_recv,
        offsets=arrived.offsets if layout == "grouped" or row_index else None,
        row_index=arrived.row_index if isinstance(arrived, Arrived) and row_index else None,
        status=arrived.status,
        handle=handle,
        layout=layout,
    )


def combine(
    buffer: Buffer,
    x: Tensor,
    handle: Any,
    *,
    weighted: bool = False,
    topk_weights: Tensor | None = None,
    order: str = "rank",
    per_rank: bool = False,
    row_weights: Tensor | None = None,
    bias: Bias = None,
    num_sms: int | None = None,
    tag: str = "",
) -> Any:
    """`buffer.combine`, differentiable in x, bias, topk_weights, row_weights and, when weighted,
    the weights.

    Args:
        x, handle, weighted, topk_weights, order, per_rank, row_weights, bias, num_sms, tag: as
            `Buffer.combine`, but tensors are copied where not contiguous or aligned. The weights of
            weighted=True are those in the handle: keep the one `dispatch` returned to have their
            gradients. The rounding of a rank's sum (per_rank) has the gradient of any rounding: 1.
    Returns:
        [num_tokens, hidden]; with topk_weights a pair, the second float32 [num_tokens, num_topk].
    Raises:
        As `Buffer.combine`.

    Stream: the current stream.
    Collective: every rank calls it, in the same order; its backward, too (see the module).
    Cost: backward is one cached dispatch. With weighted=True and weights that need gradients it is
        a combine more: row_weights, or scaling x by `recv.topk_weights` before, need none.
    """
    pair: Any = bias if isinstance(bias, tuple | list) else (bias, None)
    if not are_flags(weighted, per_rank):
        weighted, per_rank = flags(buffer, "combine", tag, weighted=weighted, per_rank=per_rank)
    fits = (
        is_whole(handle)
        and len(pair) == 2
        and are_tensors(x, topk_weights, row_weights, *pair)
        and are_ints(1, num_sms)
        and are_texts(order)
    )
    if not fits:
        return buffer.combine(  # which says what is wrong, to all ranks
            x, handle, weighted=weighted, topk_weights=topk_weights, order=order,
            per_rank=per_rank, row_weights=row_weights, bias=bias, num_sms=num_sms, tag=tag,
        )  # fmt: skip
    total, home = in_turn(
        torch.ops.ep_comm.combine, _turn(), x, topk_weights, row_weights, *pair, *handle,
        buffer.number, weighted, order, per_rank, num_sms, text(buffer, "combine", tag),
    )  # fmt: skip
    return total if topk_weights is None else (total, home)


def _turn() -> Tensor | None:
    """What keeps the ops of a graph in order; outside of graphs they are run as they are called."""
    return TURN if torch.compiler.is_compiling() else None


def _read_shape(buffer: Buffer, handle: Handle, tag: object) -> tuple[tuple[int, ...], str, bool]:
    """Shape of the x that a handle makes, its layout, its sync."""
    try:
        meta = HandleMeta.unpack(handle.meta)
    except EPError as error:
        raise refusal(buffer, "dispatch", error, tag) from None
    return meta.x_shape, meta.layout, meta.sync


def _told_shape(
    buffer: Buffer, handle: Handle, hidden: int, layout: str, capacity: int | None
) -> tuple[int, ...]:
    """Shape of the x that a handle makes, as far as a compiler can know it: -1 = it cannot."""
    rows = {"compact": handle.recv_src.shape[0], "slab": capacity}.get(layout)
    slabs = (buffer.num_local_experts,) if layout == "slab" else ()
    return (*slabs, -1 if rows is None else rows, hidden)


def _received(x: Tensor, **fields: Any) -> Received:
    """Received, of the kind that GPU arena memory needs where x is such memory."""
    held = None if torch.compiler.is_compiling() else getattr(x, HOLD, None)
    if held is None:
        return Received(x=x, **fields)
    kind, hold = held
    received: Received = kind(x=x, hold=hold, **fields)
    return received
