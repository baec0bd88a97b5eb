"""The handle: what dispatch returns and combine (or a cached dispatch) needs, as eight tensors.

A handle is flat and holds nothing else, so `ctx.save_for_backward(*handle)` just works and a
rebuilt `Handle(*saved)`, tuple or list is as good as the original. Its numbers live in `meta`, an
int64 tensor that always stays on the CPU: reading it never waits for a device. `HandleMeta` is the
only place that knows which index means what.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from ep_comm.errors import make_error

MAGIC: Final = 0x45505F48414E444C  # "EP_HANDL"
META_SIZE: Final = 16
_META: Final = struct.Struct(f"={META_SIZE}q")
LAYOUTS: Final = ("compact", "grouped", "slab")  # a layout's code in `meta` is its index here


class Handle(NamedTuple):
    """One routing, seen by one rank: as the source of its tokens and as the owner of its experts.

    T tokens here, K top-k, R ranks, El local experts, N unique tokens received here. With
    `sync=False` the N rows are N_max rows, and rows past the real count hold -1.
    """

    meta: Tensor  # int64 [16], CPU; see HandleMeta
    topk_idx: Tensor  # int64 [T, K] global expert ids as given, -1 = none
    topk_weights: Tensor  # float32 [T, K]; [0, K] when none were given
    send_row: Tensor  # int32 [T, K] row of the selection at its owner, -1 = none; e.g. [[5, -1]]
    #   compact: the token's row, the same for all slots of one owner
    #   slab: local_expert * capacity + i
    recv_src: Tensor  # int32 [N, 2] source rank and source token of each received token
    recv_row: Tensor  # int32 [N, K] row of each selection owned here, else -1; compact: [0, K]
    #   hybrid: behind them two rows (with weights three) for each token that crossed to here: of
    #   each slot the expert on this node, its row there, its weight as bits; see RailLog in
    #   csrc/contract/rail.h
    rank_counts: Tensor  # int64 [2, R] unique tokens: [0] sent to, [1] received from each rank
    num_tokens_per_expert: Tensor  # int32 [El] selections received, duplicates counted


class HandleMeta(NamedTuple):
    """The numbers of a handle by name, in the order they have in `meta` behind the magic."""

    generation: int  # id of the buffer that made it
    routing_number: int  # sequence number of the dispatch that made it
    layout: str  # one of LAYOUTS
    alignment: int  # group sizes are multiples of it
    num_tokens: int  # T
    num_unique: int  # rows of recv_src: N, or N_max when static
    num_rows: int  # rows of x; slab: rows per local expert
    num_topk: int  # K
    capacity: int  # as given by the caller, -1 = none
    sync: bool  # False: static shapes
    has_weights: bool
    num_ranks: int  # R
    num_experts: int  # E
    num_local_experts: int  # El
    hidden: int  # elements of a row of x

    def pack(self) -> Tensor:
        """Write the fields as `meta`, int64 [16]."""
        generation, routing_number, layout, *sizes = self
        packed = _META.pack(MAGIC, generation, routing_number, LAYOUTS.index(layout), *sizes)
        # A quarter of the time of torch.tensor(list): this is on every dispatch.
        return torch.frombuffer(bytearray(packed), dtype=torch.int64)

    @classmethod
    def unpack(cls, meta: object) -> HandleMeta:
        """Read `meta`, int64 [16]; raises EPUsageError E320 when it is not one."""
        if not _is_tensor(meta, (META_SIZE,), torch.int64) or meta.device.type != "cpu":
            reject_handle(f"meta is {_describe(meta)}", f"int64 [{META_SIZE}]")
        magic, *numbers = meta.tolist()
        if magic != MAGIC:
            reject_handle(f"magic {magic:#x}", f"{MAGIC:#x}")
        generation, routing_number, layout, *sizes = numbers
        alignment, tokens, unique, rows, topk, capacity, sync, has_weights, *world = sizes
        ranks, experts, local_experts, hidden = world
        if not 0 <= layout < len(LAYOUTS):
            reject_handle(f"layout code {layout}", f"0 to {len(LAYOUTS) - 1}")
        if min(tokens, unique, rows, topk, local_experts, hidden) < 0 or min(alignment, ranks) < 1:
            reject_handle(f"sizes {numbers[3:]}", "no negative size")
        if routing_number < 0:
            reject_handle(f"routing number {routing_number}", "that of a dispatch")
        return cls(
            generation=generation,
            routing_number=routing_number,
            layout=LAYOUTS[layout],
            alignment=alignment,
            num_tokens=tokens,
            num_unique=unique,
            num_rows=rows,
            num_topk=topk,
            capacity=capacity,
            sync=bool(sync),
            has_weights=bool(has_weights),
            num_ranks=ranks,
            num_experts=experts,
            num_local_experts=local_experts,
            hidden=hidden,
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of what dispatch returned as x, which combine expects back."""
        if self.layout == "slab":
            return (self.num_local_experts, self.num_rows, self.hidden)
        return (self.num_rows, self.hidden)

    @property
    def recv_rows(self) -> int:
        """Rows of recv_row that are of received tokens."""
        return 0 if self.layout == "compact" else self.num_unique

    @property
    def log_words(self) -> int:
        """Rows of recv_row for each token that crossed from another node."""
        return 3 if self.has_weights else 2

    def tensor_specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype every other field of the handle must have."""
        tokens, topk = self.num_tokens, self.num_topk
        return {
            "topk_idx": ((tokens, topk), torch.int64),
            "topk_weights": ((tokens if self.has_weights else 0, topk), torch.float32),
            "send_row": ((tokens, topk), torch.int32),
            "recv_src": ((self.num_unique, 2), torch.int32),
            "recv_row": ((self.recv_rows, topk), torch.int32),  # or more, see Handle
            "rank_counts": ((2, self.num_ranks), torch.int64),
            "num_tokens_per_expert": ((self.num_local_experts,), torch.int32),
        }


_META_INDEX: Final = {name: i for i, name in enumerate(HandleMeta._fields, start=1)}


def meta_index(name: str) -> int:
    """Where `meta` holds a field of HandleMeta."""
    return _META_INDEX[name]


def edit_meta(meta: Tensor, **values: int) -> Tensor:
    """A copy of `meta` with some fields of HandleMeta changed; cheaper than unpack and pack."""
    edited = meta.clone()
    for name, value in values.items():
        edited[_META_INDEX[name]] = value
    return edited


def parse_handle(
    handle: Handle | Sequence[Tensor], *, generation: int | None = None
) -> tuple[Handle, HandleMeta]:
    """Check what a caller hands in as a handle and read its numbers.

    Args:
        handle: a Handle, or a tuple or list of the same eight tensors in the same order.
        generation: id of the buffer that is asked to use it; None = any.
    Returns:
        The Handle and its HandleMeta.
    Raises:
        EPUsageError: E320, not a handle, not whole, or made by another buffer.

    Host only: shapes, dtypes and the CPU tensor `meta` are read, no device is waited for.
    """
    wanted = len(Handle._fields)
    if not isinstance(handle, tuple | list) or len(handle) != wanted:
        reject_handle(_describe(handle), f"the {wanted} tensors of Received.handle")
    parsed = handle if isinstance(handle, Handle) else Handle(*handle)
    meta = HandleMeta.unpack(parsed.meta)
    if generation is not None and meta.generation != generation:
        reject_handle(f"generation {meta.generation}", str(generation))
    for name, (shape, dtype) in meta.tensor_specs().items():
        tensor = getattr(parsed, name)
        # Only the reference makes float64 weights: it is gradchecked in double precision.
        dtypes = (dtype, torch.float64) if name == "topk_weights" else (dtype,)
        if name == "recv_row" and _has_log(tensor, meta):
            shape = tuple(tensor.shape)
        if not _is_tensor(tensor, shape, *dtypes):
            want = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            reject_handle(f"{name} is {_describe(tensor)}", want)
    return parsed, meta


def _has_log(recv_row: object, meta: HandleMeta) -> bool:
    if not isinstance(recv_row, Tensor) or recv_row.dim() != 2:
        return False
    more = recv_row.shape[0] - meta.recv_rows
    return recv_row.shape[1] == meta.num_topk and more > 0 and more % meta.log_words == 0


def reject_handle(got: str, want: str) -> NoReturn:
    """Raise E320: the handle is foreign, stale or damaged."""
    raise make_error("E320", f"rejected handle: got {got}, want {want}")


def _is_tensor(value: object, shape: tuple[int, ...], *dtypes: torch.dtype) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return False
    return value.shape == shape and value.dtype in dtypes


def _describe(value: object) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Sequence):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
