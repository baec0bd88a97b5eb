"""ep_comm::dispatch: tokens to the ranks that own their experts."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ep_comm.buffer import find_buffer
from ep_comm.checks import (
    BufferSpec,
    DispatchCall,
    Layout,
    Output,
    Quantize,
    check_scales,
    default_capacity,
    worst_grouped_rows,
)
from ep_comm.handle import META_SIZE, Handle
from ep_comm.ops.gradient import combine_grads, keep_differentiable, keep_routing
from ep_comm.ops.library import (
    Gradients,
    Size,
    count,
    define,
    dense_rows,
    new_size,
    or_empty,
)
from ep_comm.received import Received

HOLD = "ep_comm_hold"  # attribute of an x in GPU arena memory


class DispatchArgs(NamedTuple):
    """The arguments of the op; those of `Buffer.dispatch` mean what they mean there.

    Shapes follow from them alone, hence the sizes of the buffer: compilers keep what they made in a
    cache that other processes, so other ranks, read, and its key is the call.
    """

    turn: Tensor | None  # see in_turn
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    scales: Tensor | None
    buffer: int
    num_ranks: int
    num_local_experts: int
    max_tokens: int
    num_far_nodes: int
    layout: str
    alignment: int
    row_index: bool
    layer: int | None
    capacity: Size | None
    sync: bool
    scale_block: int | None
    quantize: str | None
    output: str
    transfer: str
    num_sms: int | None
    tag: str


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


def run(a: DispatchArgs) -> Arrived:
    received = find_buffer(a.buffer).dispatch(
        dense_rows(a.x), a.topk_idx, a.topk_weights, scales=a.scales, scale_block=a.scale_block,
        quantize=a.quantize, layout=a.layout, alignment=a.alignment, row_index=a.row_index,
        layer=a.layer, capacity=a.capacity, sync=a.sync, output=a.output, transfer=a.transfer,
        num_sms=a.num_sms, tag=a.tag,
    )  # fmt: skip
    clear_rows_without_token(received)
    pass_on_hold(received)
    h = received.handle
    assert received.topk_idx is not None
    return Arrived(
        x=received.x,
        topk_idx=received.topk_idx,
        topk_weights=or_empty(received.topk_weights, a.x),
        scales=or_empty(received.scales, a.x),
        num_recv=count(received.num_recv, a.x),
        offsets=or_empty(received.offsets, a.x),
        row_index=or_empty(received.row_index, a.x),
        status=received.status,
        meta=h.meta,
        idx=h.topk_idx.clone() if h.topk_idx is a.topk_idx else h.topk_idx,
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
        own = handle.recv_row[: handle.recv_src.shape[0]]
        empty = rows_without_token(own, rows.shape[0])
    rows.masked_fill_(empty.unsqueeze(1), 0)


def rows_without_token(recv_row: Tensor, num_rows: int) -> Tensor:
    """bool [num_rows] grouped, slab: whether a row is padding."""
    taken = torch.where(recv_row < 0, num_rows, recv_row).flatten().long()
    empty = torch.ones(num_rows + 1, dtype=torch.bool, device=recv_row.device)
    return empty.index_fill_(0, taken, False)[:-1]


def fake(a: DispatchArgs) -> Arrived:
    x, layout = a.x, cast(Layout, a.layout)
    spec = as_spec(x, a.num_ranks, a.num_local_experts, a.max_tokens)
    _, words, scale_dtype = check_scales(spec, x, a.scales, a.scale_block, a.quantize)
    call = DispatchCall(
        x=x, topk_idx=a.topk_idx, idx_dtype=a.topk_idx.dtype, topk_weights=a.topk_weights,
        scales=a.scales, scale_words=words, scale_dtype=scale_dtype, handle=None, meta=None,
        layout=layout, alignment=a.alignment, given_capacity=a.capacity, capacity=a.capacity,
        sync=a.sync, quantize=cast(Quantize | None, a.quantize), scale_block=a.scale_block or 0,
        row_index=a.row_index, origins=False, output=cast(Output, a.output), num_sms=a.num_sms,
        tag=a.tag,
    )  # fmt: skip
    num_unique, num_rows, num_index = fake_sizes(spec, call)
    local, topk = a.num_local_experts, call.num_topk
    of_rows = (local, num_rows) if layout == "slab" else (num_rows,)
    of_slots = (num_rows, topk) if layout == "compact" else of_rows
    ints: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    has_offsets = layout == "grouped" or a.row_index
    return Arrived(
        x=x.new_empty((*of_rows, spec.hidden), dtype=call.wire_dtype),
        topk_idx=a.topk_idx.new_empty(of_slots),
        topk_weights=fake_weights(x, a.topk_weights, of_slots),
        scales=fake_scales(x, layout, of_rows, words, scale_dtype),
        num_recv=torch.empty(1, **ints),
        offsets=torch.empty(local + 1, **ints) if has_offsets else x.new_empty(0),
        row_index=torch.empty(num_index, **ints) if a.row_index else x.new_empty(0),
        status=torch.empty(1, **ints),
        meta=torch.empty(META_SIZE, dtype=torch.int64, device="cpu"),
        idx=torch.empty((x.shape[0], topk), dtype=torch.int64, device=x.device),
        send_row=torch.empty((x.shape[0], topk), **ints),
        recv_src=torch.empty((num_unique, 2), **ints),
        recv_row=torch.empty((fake_recv_rows(a, num_unique), topk), **ints),
        rank_counts=torch.empty((2, a.num_ranks), dtype=torch.int64, device=x.device),
        num_tokens_per_expert=torch.empty(local, **ints),
    )


def fake_recv_rows(a: DispatchArgs, num_unique: int) -> int:
    """Of received tokens, and of what crossed to here from other nodes; see Handle."""
    rows = 0 if a.layout == "compact" else num_unique
    if a.num_far_nodes == 0:
        return rows
    crossed = new_size() if a.sync else a.num_far_nodes * a.max_tokens
    return rows + crossed * (2 if a.topk_weights is None else 3)


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


def keep(ctx: Any, a: DispatchArgs, results: Arrived) -> None:
    keep_routing(ctx, a, results.handle(a.topk_weights), results.x.shape)
    keep_differentiable(ctx, results, x=a.x, topk_weights=a.topk_weights)


def gradient(ctx: Any, needed: set[str], grads: Arrived) -> Gradients:
    return combine_grads(
        ctx,
        grads.x if "x" in needed else None,
        grads.topk_weights if "topk_weights" in needed else None,
    )


define("dispatch", DispatchArgs, Arrived, run=run, fake=fake, keep=keep, gradient=gradient)
