"""What backends on mapped memory have in common: checked calls become the core's arguments, and
what comes back becomes the caller's tensors.

`Dispatch` and `Combine` hold every tensor whose address the core has until the operation is over.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall, Layout, worst_grouped_rows
from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Origins
from ep_comm.replicas import LayerReplicas

_LAYOUTS: Final = {
    "compact": _core.RecvLayout.COMPACT,
    "grouped": _core.RecvLayout.GROUPED,
    "slab": _core.RecvLayout.SLAB,
}
_DTYPES: Final = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.F16,
    torch.float32: _core.DType.F32,
    torch.float8_e4m3fn: _core.DType.E4M3,
    torch.float8_e5m2: _core.DType.E5M2,
    torch.int8: _core.DType.I8,
    torch.uint8: _core.DType.U8,
}
_QUANTIZE: Final = {
    None: _core.Quantize.NONE,
    "fp8": _core.Quantize.FP8,
    "fp8_ue8m0": _core.Quantize.FP8_UE8M0,
}
# Above this share of the arena in use, output="auto" returns ordinary torch memory instead.
WATERMARK: Final = 0.75


def byte_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the bytes of a dense tensor: `view(dtype)` of such an array has the shape."""
    *rows, last = shape
    return (*rows, last * dtype.itemsize)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory starts; 0 = there is none."""
    return 0 if tensor is None else tensor.data_ptr()


class Arrival(NamedTuple):
    """The numbers of a dispatch that is over; shapes follow from them."""

    num_recv: int  # unique tokens
    num_rows: int  # of x; slab: per local expert
    seq: int


@dataclass(frozen=True)
class Look:
    """What dispatches that look alike have in common, and the shapes of results follow from."""

    layout: Layout
    alignment: int
    num_topk: int
    given_capacity: int | None
    capacity: int | None
    index_capacity: int | None  # entries of a static row index
    sync: bool
    cached: bool
    has_weights: bool
    idx_dtype: torch.dtype
    wire_dtype: torch.dtype
    scale_words: int
    scale_dtype: torch.dtype | None
    row_index: bool
    origins: bool
    serial: int = field(default_factory=itertools.count().__next__, compare=False)

    @classmethod
    def of(cls, spec: BufferSpec, call: DispatchCall) -> Look:
        static_index = call.row_index and not call.sync
        return cls(
            layout=call.layout,
            alignment=call.alignment,
            num_topk=call.num_topk,
            given_capacity=call.given_capacity,
            capacity=call.capacity,
            index_capacity=worst_grouped_rows(spec, call) if static_index else None,
            sync=call.sync,
            cached=call.handle is not None,
            has_weights=call.has_weights,
            idx_dtype=call.idx_dtype,
            wire_dtype=call.wire_dtype,
            scale_words=call.scale_words,
            scale_dtype=call.scale_dtype,
            row_index=call.row_index,
            origins=call.origins,
        )


def max_recv(spec: BufferSpec, call: DispatchCall | Look, num_recv: int) -> int:
    """Rows of the tensors that have one per unique token."""
    if call.sync:
        return num_recv
    worst = spec.num_ranks * spec.max_tokens
    if call.layout != "compact" or call.capacity is None:
        return worst
    return min(worst, call.capacity)


def make_meta(
    spec: BufferSpec, call: DispatchCall | Look, generation: int, num_tokens: int, num_unique: int,
    num_rows: int, seq: int,
) -> Tensor:  # fmt: skip
    """`meta` of the handle of a fresh dispatch."""
    meta = HandleMeta(
        generation=generation,
        routing_number=seq,
        layout=call.layout,
        alignment=call.alignment,
        num_tokens=num_tokens,
        num_unique=num_unique,
        num_rows=num_rows,
        num_topk=call.num_topk,
        capacity=-1 if call.given_capacity is None else call.given_capacity,
        sync=call.sync,
        has_weights=call.has_weights,
        num_ranks=spec.num_ranks,
        num_experts=spec.num_experts,
        num_local_experts=spec.num_local_experts,
        hidden=spec.hidden,
    )
    return meta.pack()


class Dispatch:
    """One dispatch: the tensors of its routing, and its arguments as the core wants them."""

    send_row: Any  # tensors, or None: the core has the memory
    rank_counts: Any
    counts: Any
    routed_idx: Tensor
    rank_ends: Tensor | None = None

    def __init__(self, spec: BufferSpec, call: DispatchCall) -> None:
        self.spec, self.call = spec, call
        self._make_tensors()
        self.args = self._fill(_core.DispatchArgs())

    def _make_tensors(self) -> None:
        """Memory for the routing: new, or that of the handle."""
        spec, call = self.spec, self.call
        device = spec.device
        if call.handle is None:
            # torch makes a tensor like another one, of sizes that are no tuple, in half the time.
            tokens, topk = call.topk_idx.shape
            self.send_row = torch.empty(tokens, topk, dtype=torch.int32, device=device)
            self.rank_counts = torch.empty(2, spec.num_ranks, dtype=torch.int64, device=device)
            self.counts = self.send_row.new_empty(spec.num_local_experts)
            # The handle's ids: the caller may write to its own.
            self.routed_idx = self.rank_counts.new_empty(tokens, topk)
        else:
            self.send_row = call.handle.send_row
            self.rank_counts = call.handle.rank_counts
            self.counts = call.handle.num_tokens_per_expert
        if call.origins and call.layout == "compact":
            self.rank_ends = self.send_row.new_empty(spec.num_ranks, spec.num_ranks)

    def _fill(self, a: _core.DispatchArgs) -> _core.DispatchArgs:
        """Set what differs from a DispatchArgs' defaults: each assignment costs as much as a copy
        of a small tensor."""
        call = self.call
        x = call.x
        a.x, a.x_stride = x.data_ptr(), x.stride(0) * x.itemsize
        a.topk_idx = call.topk_idx.data_ptr()
        a.send_row = address(self.send_row)
        a.rank_counts = address(self.rank_counts)
        a.expert_counts = address(self.counts)
        a.num_tokens, a.hidden = x.shape
        a.num_topk = call.num_topk
        a.alignment = call.alignment
        a.scale_block = call.scale_block
        a.layout = _LAYOUTS[call.layout]
        a.dtype = _DTYPES[x.dtype]
        if call.topk_weights is not None:
            a.topk_weights, a.with_weights = call.topk_weights.data_ptr(), True
        if call.scale_words:
            a.scales, a.scale_bytes = address(call.scales), 4 * call.scale_words
            a.quantize = _QUANTIZE[call.quantize]
        if call.capacity is not None:
            a.capacity = call.capacity
        if call.given_capacity is not None:
            a.given_capacity = call.given_capacity
        if call.recv_stats is not None:
            a.recv_stats = call.recv_stats.data_ptr()
        if call.wait_stats is not None:
            a.wait_stats = call.wait_stats.data_ptr()
        if self.rank_ends is not None:
            a.rank_ends = self.rank_ends.data_ptr()
        if not call.sync:
            a.is_static = True
            if call.row_index:
                a.index_capacity = worst_grouped_rows(self.spec, call)
        if call.meta is not None:
            a.cached, a.routing = True, call.meta.routing_number
            return a
        if self.routed_idx is not call.topk_idx:
            a.routed_idx = self.routed_idx.data_ptr()
        if call.replicas is not None:
            self._fill_replicas(a, call.replicas)
        return a

    def _fill_replicas(self, a: _core.DispatchArgs, replicas: LayerReplicas) -> None:
        a.routing = replicas.key
        tables = _core.Replicas()
        tables.first, tables.slot = replicas.first.data_ptr(), replicas.slot.data_ptr()
        tables.until, tables.num_logical = replicas.until.data_ptr(), replicas.num_logical
        a.replicas = tables
        a.logical_load = replicas.load.data_ptr()

    def _unpack_args(self, arrival: Arrival, out: dict[str, Tensor]) -> _core.UnpackArgs:
        u = _core.UnpackArgs()
        for name, tensor in out.items():
            setattr(u, name, tensor.data_ptr())
        u.max_recv = out["recv_src"].shape[0]
        u.max_rows = arrival.num_rows
        if "row_index" in out:
            u.max_index = out["row_index"].shape[0]
        u.row_alignment = self.call.alignment
        u.idx_is_int64 = self.call.idx_dtype is torch.int64
        return u

    def _origins(self, out: dict[str, Tensor]) -> Origins | None:
        if not self.call.origins:
            return None
        return Origins(self.rank_ends, out["row_token"], out.get("source_range"))

    def _kept_weights(self) -> Tensor:
        """The handle's weights: those that a combine may read are a copy, as the ids are."""
        call, device = self.call, self.spec.device
        if call.topk_weights is None:
            return torch.empty(0, call.num_topk, dtype=torch.float32, device=device)
        if call.layout == "compact" or device.type != "cpu":
            return call.topk_weights
        return call.topk_weights.clone()

    def _handle(self, generation: int, arrival: Arrival, out: dict[str, Tensor]) -> Handle:
        spec, call = self.spec, self.call
        if call.handle is not None and call.meta is not None:
            if call.topk_weights is None:
                return call.handle
            meta = call.meta._replace(has_weights=True)
            return call.handle._replace(meta=meta.pack(), topk_weights=self._kept_weights())
        packed = make_meta(
            spec, call, generation, call.x.shape[0], out["recv_src"].shape[0], arrival.num_rows,
            arrival.seq,
        )  # fmt: skip
        return Handle(
            meta=packed,
            topk_idx=self.routed_idx,
            topk_weights=self._kept_weights(),
            send_row=self.send_row,
            recv_src=out["recv_src"],
            recv_row=out["recv_row"],
            rank_counts=self.rank_counts,
            num_tokens_per_expert=self.counts,
        )


class Combine:
    """One combine: its outputs, and its arguments as the core wants them."""

    def __init__(self, spec: BufferSpec, call: CombineCall, out: Tensor, arena_offset: int) -> None:
        self.spec, self.call, self.out = spec, call, out
        meta, handle = call.meta, call.handle
        self.out_weights: Tensor | None = None
        a = _core.CombineArgs()
        a.x = call.x.data_ptr()
        a.topk_idx = handle.topk_idx.data_ptr()
        a.send_row = handle.send_row.data_ptr()
        a.rank_counts = handle.rank_counts.data_ptr()
        a.recv_src = handle.recv_src.data_ptr()
        a.recv_row = handle.recv_row.data_ptr()
        a.out = out.data_ptr()
        a.num_tokens, a.hidden, a.num_topk = meta.num_tokens, meta.hidden, meta.num_topk
        slabs = spec.num_local_experts if meta.layout == "slab" else 1
        a.num_recv, a.num_rows = meta.num_unique, meta.num_rows * slabs
        a.arena_offset = arena_offset
        a.layout = _LAYOUTS[meta.layout]
        a.dtype = _DTYPES[call.x.dtype]
        a.topk_order, a.sum_weights = call.order == "topk", call.sum_weights
        a.routing = meta.routing_number
        if call.per_rank:
            a.per_rank = True
            if call.row_weights is not None:
                a.weighted, a.row_weights = True, call.row_weights.data_ptr()
        if call.weighted:
            a.weighted, a.topk_weights = True, handle.topk_weights.data_ptr()
        if call.topk_weights is not None:
            shape = (meta.num_tokens, meta.num_topk)
            self.out_weights = torch.empty(shape, dtype=torch.float32, device=spec.device)
            a.with_weights = True
            a.y_weights = call.topk_weights.data_ptr()
            a.out_weights = self.out_weights.data_ptr()
        if call.wait_stats is not None:
            a.wait_stats = call.wait_stats.data_ptr()
        if call.bias[0] is not None or call.bias[1] is not None:
            a.bias0, a.bias1 = address(call.bias[0]), address(call.bias[1])
        self.args = a

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        """What the caller gets once the operation is over."""
        return self.out if self.out_weights is None else (self.out, self.out_weights)
