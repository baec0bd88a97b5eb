"""ep_comm::dispatch: tokens to the ranks that own their experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_comm.buffer import find_buffer
from ep_comm.checks import (
    BufferSpec,
    DispatchCall,
    check_scales,
    default_capacity,
    worst_grouped_rows,
)
from ep_comm.handle import META_SIZE, Handle
from ep_comm.ops.gradient import combine_grads, keep_differentiable, keep_routing
from ep_comm.ops.library import count, define, dense_rows, new_size, or_empty
from ep_comm.received import Received

# Shapes follow from the arguments alone, hence the sizes of the buffer: compilers keep what they
# made in a cache that other processes, so other ranks, read, and its key is the call.
SCHEMA = (
    "dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, Tensor? scales, int buffer, "
    "int num_ranks, int num_local_experts, int max_tokens, str layout, int alignment, "
    "bool row_index, int? layer, SymInt? capacity, bool sync, int? scale_block, str? quantize, "
    "str output, str transfer, int? num_sms, str tag) -> "
    "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor scales, Tensor num_recv, "
    "Tensor offsets, Tensor row_index, Tensor status, Tensor meta, Tensor idx, Tensor send_row, "
    "Tensor recv_src, Tensor recv_row, Tensor rank_counts, Tensor num_tokens_per_expert)"
)


HOLD = "ep_comm_hold"  # attribute of an x in GPU arena memory


class Arrived(NamedTuple):
    """The results of the op: the fields of Received and of Handle that are not the caller's own.

    Empty are topk_weights, scales, offsets and row_index where Received has None.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    scales: Tensor
    num_recv: Tensor  # int32 [1], with sync, too
    offsets: Tensor
    row_index: Tensor
    status: Tensor
    meta: Tensor
    idx: Tensor  # topk_idx of the handle
    send_row: Tensor
    recv_src: Tensor
    recv_row: Tensor
    rank_counts: Tensor
    num_tokens_per_expert: Tensor

    def handle(self, topk_weights: Tensor | None) -> Handle:
        """The handle, with the weights that the caller passed: gradients of them get there."""
        if topk_weights is None:
            weights = self.x.new_empty((0, self.idx.shape[1]), dtype=torch.float32)
        else:
            weights = topk_weights.to(torch.float32).contiguous()
        return Handle(
            meta=self.meta,
            topk_idx=self.idx,
            topk_weights=weights,
            send_row=self.send_row,
            recv_src=self.recv_src,
            recv_row=self.recv_row,
            rank_counts=self.rank_counts,
            num_tokens_per_expert=self.num_tokens_per_expert,
        )


def run(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    buffer: int,
    num_ranks: int,
    num_local_experts: int,
    max_tokens: int,
    layout: str,
    alignment: int,
    row_index: bool,
    layer: int | None,
    capacity: int | None,
    sync: bool,
    scale_block: int | None,
    quantize: str | None,
    output: str,
    transfer: str,
    num_sms: int | None,
    tag: str,
) -> Arrived:
    received = find_buffer(buffer).dispatch(
        dense_rows(x), topk_idx, topk_weights, scales=scales, scale_block=scale_block,
        quantize=quantize, layout=layout, alignment=alignment, row_index=row_index,
        layer=layer, capacity=capacity, sync=sync, output=output, transfer=transfer,
        num_sms=num_sms, tag=tag,
    )  # fmt: skip
    clear_rows_without_token(received)
    pass_on_hold(received)
    h = received.handle
    assert received.topk_idx is not None
    return Arrived(
        x=received.x,
        topk_idx=received.topk_idx,
        topk_weights=or_empty(received.topk_weights, x),
        scales=or_empty(received.scales, x),
        num_recv=count(received.num_recv, x),
        offsets=or_empty(received.offsets, x),
        row_index=or_empty(received.row_index, x),
        status=received.status,
        meta=h.meta,
        idx=h.topk_idx.clone() if h.topk_idx is topk_idx else h.topk_idx,
        send_row=h.send_row,
        recv_src=h.recv_src,
        recv_row=h.recv_row,
        rank_counts=h.rank_counts,
        num_tokens_per_expert=h.num_tokens_per_expert,
    )


def pass_on_hold(received: Received) -> None:
    """Let x itself carry what `Received.use_on` needs of GPU arena memory: an op returns tensors.

    Not the Received, which would be a cycle and keep the memory until the garbage collector comes.
    """
    hold = getattr(received, "hold", None)
    if hold is not None:
        setattr(received.x, HOLD, (type(received), hold))


def clear_rows_without_token(received: Received) -> None:
    """Zero what a layout leaves unspecified; it must not reach the gradient of an expert."""
    handle, x = received.handle, received.x
    if isinstance(received.num_recv, int) and received.layout != "slab":
        return
    rows = x.view(torch.uint8).reshape(-1, x.shape[-1] * x.itemsize)
    if received.layout == "compact":
        empty = torch.arange(rows.shape[0], device=x.device) >= handle.rank_counts[1].sum()
    else:
        taken = torch.where(handle.recv_row < 0, rows.shape[0], handle.recv_row)
        empty = torch.ones(rows.shape[0] + 1, dtype=torch.bool, device=x.device)
        empty = empty.index_fill_(0, taken.flatten().long(), False)[:-1]
    rows.masked_fill_(empty.unsqueeze(1), 0)


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    buffer: int,
    num_ranks: int,
    num_local_experts: int,
    max_tokens: int,
    layout: Any,
    alignment: int,
    row_index: bool,
    layer: int | None,
    capacity: int | None,
    sync: bool,
    scale_block: int | None,
    quantize: Any,
    output: Any,
    transfer: str,
    num_sms: int | None,
    tag: str,
) -> Arrived:
    spec = as_spec(x, num_ranks, num_local_experts, max_tokens)
    _, words, scale_dtype = check_scales(spec, x, scales, scale_block, quantize)
    call = DispatchCall(
        x=x, topk_idx=topk_idx, idx_dtype=topk_idx.dtype, topk_weights=topk_weights,
        scales=scales, scale_words=words, scale_dtype=scale_dtype, handle=None, meta=None,
        layout=layout, alignment=alignment, given_capacity=capacity, capacity=capacity, sync=sync,
        quantize=quantize, scale_block=scale_block or 0, row_index=row_index, origins=False,
        output=output, num_sms=num_sms, tag=tag,
    )  # fmt: skip
    num_unique, num_rows, num_index = fake_sizes(spec, call)
    local, topk = num_local_experts, call.num_topk
    of_rows = (local, num_rows) if layout == "slab" else (num_rows,)
    of_slots = (num_rows, topk) if layout == "compact" else of_rows
    ints: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    has_offsets = layout == "grouped" or row_index
    return Arrived(
        x=x.new_empty((*of_rows, spec.hidden), dtype=call.wire_dtype),
        topk_idx=topk_idx.new_empty(of_slots),
        topk_weights=fake_weights(x, topk_weights, of_slots),
        scales=fake_scales(x, layout, of_rows, words, scale_dtype),
        num_recv=torch.empty(1, **ints),
        offsets=torch.empty(local + 1, **ints) if has_offsets else x.new_empty(0),
        row_index=torch.empty(num_index, **ints) if row_index else x.new_empty(0),
        status=torch.empty(1, **ints),
        meta=torch.empty(META_SIZE, dtype=torch.int64, device="cpu"),
        idx=torch.empty((x.shape[0], topk), dtype=torch.int64, device=x.device),
        send_row=torch.empty((x.shape[0], topk), **ints),
        recv_src=torch.empty((num_unique, 2), **ints),
        recv_row=torch.empty((0 if layout == "compact" else num_unique, topk), **ints),
        rank_counts=torch.empty((2, num_ranks), dtype=torch.int64, device=x.device),
        num_tokens_per_expert=torch.empty(local, **ints),
    )


def as_spec(x: Tensor, num_ranks: int, num_local_experts: int, max_tokens: int) -> BufferSpec:
    """A buffer with these sizes, for the functions that compute shapes and check scales."""
    return BufferSpec(
        rank=0, num_ranks=num_ranks, num_experts=num_local_experts, num_topk=1, hidden=x.shape[1],
        max_tokens=max_tokens, num_slots=1, owner=(0,) * num_local_experts, device=x.device,
    )  # fmt: skip


def fake_sizes(spec: BufferSpec, call: DispatchCall) -> tuple[int, int, int]:
    """Unique tokens, rows of x (slab: per expert), rows of the index; symbols with sync."""
    worst = spec.num_ranks * spec.max_tokens
    fixed = default_capacity(spec, call)
    if not call.sync:
        assert fixed is not None
        num_unique = min(worst, fixed) if call.layout == "compact" else worst
        return num_unique, fixed, worst_grouped_rows(spec, call) if call.row_index else 0
    num_recv = new_size(worst)
    num_rows = {"compact": num_recv, "slab": fixed}.get(call.layout)
    return (
        num_recv,
        new_size() if num_rows is None else num_rows,
        new_size() if call.row_index else 0,
    )


def fake_weights(x: Tensor, given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The weights that arrive when some were given."""
    return x.new_empty(0) if given is None else x.new_empty(shape, dtype=torch.float32)


def fake_scales(
    x: Tensor, layout: str, of_rows: tuple[int, ...], words: int, dtype: torch.dtype | None
) -> Tensor:
    """The scales that arrive, in the strides of the layout; see Received."""
    if dtype is None:
        return x.new_empty(0)
    if layout != "slab":
        return x.new_empty((*of_rows, words), dtype=dtype)
    local, capacity = of_rows
    columns = x.new_empty((local, words, -(-capacity // 4) * 4), dtype=dtype)
    return columns.transpose(1, 2)[:, :capacity]


# ---- its gradient: combine ----


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, topk_weights, _, buffer, *_, tag = inputs
    arrived = Arrived(*output)
    keep_routing(ctx, arrived.handle(topk_weights), arrived.x.shape, buffer, tag)
    keep_differentiable(ctx, output, ((0, x), (2, topk_weights)))


def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, _, grad_weights, *_ = grads
    needs_x, _, needs_weights, *rest = ctx.needs_input_grad
    home = combine_grads(ctx, grad_x if needs_x else None, grad_weights if needs_weights else None)
    return home[0], None, home[1], *(None for _ in rest)


define(SCHEMA, run, fake, keep, gradient)
