"""What a dispatch on GPUs returns: tensors over arena memory, each made when somebody asks for it.

A tensor costs the host a microsecond, so a call in a loop makes only those that are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls
from ep_comm.backends.calls import Look
from ep_comm.checks import BufferSpec
from ep_comm.handle import Handle, edit_meta
from ep_comm.received import Origins, Promised, Received

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NvlinkBackend

# Types as DLPack numbers them; others are seen as bytes first.
_DLPACK: Final = {
    torch.bfloat16: (_core.DLPACK_BFLOAT, 16),
    torch.float16: (_core.DLPACK_FLOAT, 16),
    torch.float32: (_core.DLPACK_FLOAT, 32),
    torch.int32: (_core.DLPACK_INT, 32),
    torch.int64: (_core.DLPACK_INT, 64),
    torch.int8: (_core.DLPACK_INT, 8),
    torch.uint8: (_core.DLPACK_UINT, 8),
}
_BYTES: Final = (_core.DLPACK_UINT, 8)


def as_dtype(
    make: Callable[[Sequence[int], tuple[int, int]], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """What `make(shape, type)` makes of memory, also of types that DLPack may not know."""
    if (type_ := _DLPACK.get(dtype)) is not None:
        return make(shape, type_)
    return make(calls.byte_shape(shape, dtype), _BYTES).view(dtype)


class OwnHandle(Handle):
    """A handle as this process made it: `routing` says what its tensors do, and keeps them."""

    routing: _core.Routing | None = None  # None: of a copy
    look: Look


class Piece(NamedTuple):
    """Where a tensor lies, and how."""

    out: _core.Out
    shape: tuple[int, ...]
    dtype: torch.dtype
    skip_bytes: int = 0
    strides: tuple[int, ...] = ()  # dense

    def of(self, flight: _core.Flight, device: torch.device) -> Tensor:
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        if not flight.has(self.out):
            return self._of_nothing(device)
        type_ = _DLPACK.get(self.dtype)
        if type_ is not None:
            return flight.tensor(self.out, self.shape, type_, self.skip_bytes, self.strides)
        byte_shape = calls.byte_shape(self.shape, self.dtype)
        return flight.tensor(self.out, byte_shape, _BYTES, self.skip_bytes).view(self.dtype)

    def _of_nothing(self, device: torch.device) -> Tensor:
        """Of a static call that found no memory: it has failed, and nothing has come."""
        if self.out in (_core.Out.X, _core.Out.SCALES):
            if self.strides:
                return torch.empty_strided(
                    self.shape, self.strides, dtype=self.dtype, device=device
                )
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        fill = 0 if self.out == _core.Out.WEIGHTS else -1
        return torch.full(self.shape, fill, dtype=self.dtype, device=device)


def pieces_of(
    spec: BufferSpec, look: Look, num_recv: int, num_rows: int, index_rows: int
) -> dict[str, Piece]:
    """The fields of Received, and `Origins`, that a dispatch is granted.

    Args:
        num_recv, num_rows, index_rows: what has arrived; of static shapes nothing depends on them.
    """
    local, rows = spec.num_local_experts, num_rows
    if not look.sync or look.layout == "slab":
        rows = look.capacity or 0
    if look.index_capacity is not None:
        index_rows = look.index_capacity
    slabs = (local,) if look.layout == "slab" else ()
    per_row = (rows, look.num_topk) if look.layout == "compact" else (*slabs, rows)
    out = _core.Out
    pieces = {
        "x": Piece(out.X, (*slabs, rows, spec.hidden), look.wire_dtype),
        "status": Piece(out.NUMBERS, (1,), torch.int32),
    }
    if not look.sync:
        pieces["num_recv"] = Piece(out.NUMBERS, (1,), torch.int32, skip_bytes=4)
    if not look.cached:
        pieces["topk_idx"] = Piece(out.IDS, per_row, look.idx_dtype)
        pieces["num_tokens_per_expert"] = Piece(out.COUNTS, (local,), torch.int32)
    if look.has_weights:
        pieces["topk_weights"] = Piece(out.WEIGHTS, per_row, torch.float32)
    if look.scale_dtype is not None:
        words, apart = look.scale_words, -(-rows // 4) * 4
        # Of a slab column-major, columns 16 bytes aligned.
        strides = (words * apart, 1, apart) if slabs else ()
        pieces["scales"] = Piece(
            out.SCALES, (*slabs, rows, words), look.scale_dtype, strides=strides
        )
    if look.row_index or look.layout == "grouped":
        pieces["offsets"] = Piece(out.OFFSETS, (local + 1,), torch.int32)
    if look.row_index:
        pieces["row_index"] = Piece(out.ROW_INDEX, (index_rows,), torch.int32)
    if look.origins:
        pieces["row_token"] = Piece(out.ROW_TOKEN, (*slabs, rows), torch.int32)
        if look.layout == "compact":
            pieces["rank_ends"] = Piece(out.RANK_ENDS, (spec.num_ranks,) * 2, torch.int32)
        else:
            ranges = (local, spec.num_ranks)
            pieces["source_range"] = Piece(out.SOURCE_RANGE, ranges, torch.int64)
    return pieces


class Outputs:
    """The tensors of one dispatch, by the names they have in Received.

    Args:
        topk_idx, topk_weights: as dispatched, int64 and float32.
        handle: of a cached dispatch.
        given: tensors that torch made for the call, by what they would have been granted as.
        pieces: of a call of static shapes, when they are known; else they follow from what arrives.
    """

    def __init__(
        self,
        backend: NvlinkBackend,
        look: Look,
        flight: _core.Flight,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: Handle | None = None,
        given: dict[_core.Out, Tensor] | None = None,
        pieces: dict[str, Piece] | None = None,
    ) -> None:
        self._backend, self.look, self.flight = backend, look, flight
        self._idx, self._weights = topk_idx, topk_weights
        self._handle, self._given, self._pieces = handle, given, pieces
        self._made: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """A field, the same object each time."""
        made = self._made
        if name not in made:
            made[name] = self._make(name)
        return made[name]

    def promise(self) -> Promised:
        """Of a slab, whose shapes do not depend on what arrives."""
        return Promised(
            x=self.get("x"),
            topk_idx=self.get("topk_idx"),
            topk_weights=self.get("topk_weights"),
            scales=self.get("scales"),
            num_tokens_per_expert=self.get("num_tokens_per_expert"),
            origins=self.get("origins"),
        )

    def _make(self, name: str) -> Any:
        if name == "handle":
            return self._make_handle()
        if name == "num_recv" and self.look.sync:
            return int(self.flight.num_recv)
        if name == "num_tokens_per_expert" and self._handle is not None:
            return self._handle.num_tokens_per_expert
        if name == "origins":
            return self._make_origins()
        if self._pieces is None:
            f = self.flight
            self._pieces = pieces_of(
                self._backend.spec, self.look, f.num_recv, f.num_rows, f.index_rows
            )
        piece = self._pieces.get(name)
        if piece is None:
            return None
        given = None if self._given is None else self._given.get(piece.out)
        if given is None:
            return piece.of(self.flight, self._backend.spec.device)
        return given.view(-1)[piece.skip_bytes // given.itemsize :][: math.prod(piece.shape)].view(
            piece.shape
        )

    def _make_origins(self) -> Origins | None:
        if not self.look.origins:
            return None
        return Origins(self.get("rank_ends"), self.get("row_token"), self.get("source_range"))

    def _make_handle(self) -> Handle:
        look, weights, flight = self.look, self._weights, self.flight
        if self._handle is not None:
            return self._of_cached(self._handle)
        spec, num_tokens, topk = self._backend.spec, flight.num_tokens, look.num_topk
        if weights is None:
            weights = torch.empty((0, topk), dtype=torch.float32, device=spec.device)
        most = calls.max_recv(spec, look, flight.num_recv)
        is_sized = look.sync and look.layout != "slab"
        num_rows = flight.num_rows if is_sized else look.capacity or 0
        meta = calls.make_meta(
            spec, look, self._backend.generation, num_tokens, most, num_rows, flight.number
        )
        with_rows = most if look.layout != "compact" else 0
        sizes = (num_tokens, topk, most, with_rows, spec.num_ranks, spec.num_local_experts)
        if not self._given:
            handle = OwnHandle(meta, self._idx, weights, *flight.routing_tensors(*sizes))
            handle.routing, handle.look = flight.routing(), look
            return handle
        out, given, device = _core.Out, self._given, spec.device
        return Handle(
            meta,
            self._idx,
            weights,
            given[out.SEND_ROW],
            Piece(out.SRC, (most, 2), torch.int32).of(flight, device),
            Piece(out.ROWS, (with_rows, topk), torch.int32).of(flight, device),
            given[out.RANK_COUNTS],
            given[out.COUNTS],
        )

    def _of_cached(self, handle: Handle) -> Handle:
        if self._weights is None:
            return handle
        meta = edit_meta(handle.meta, has_weights=1)
        same = handle._replace(meta=meta, topk_weights=self._weights)
        if isinstance(handle, OwnHandle) and isinstance(same, OwnHandle) and handle.routing:
            same.routing, same.look = handle.routing, handle.look
        return same


@dataclass
class ArenaReceived(Received):
    """Received in arena memory, which `record_stream` does not reach."""

    hold: Any = None  # the flight; None for what has been copied out

    @classmethod
    def of(cls, outputs: Outputs) -> ArenaReceived:
        """Its fields are those of `outputs`, when they are asked for."""
        self = cls.__new__(cls)
        fields = self.__dict__
        fields["_outputs"] = outputs
        fields["layout"] = outputs.look.layout
        fields["hold"] = outputs.flight
        if outputs.look.origins:
            fields["origins"] = outputs.get("origins")
        return self

    @classmethod
    def later(cls, look: Look, flight: _core.Flight, outputs_of: tuple[Any, ...]) -> ArenaReceived:
        """The same of Outputs(*outputs_of), which are made then, too."""
        if look.origins:
            return cls.of(Outputs(*outputs_of))
        self = cls.__new__(cls)
        fields = self.__dict__
        fields["_outputs_of"] = outputs_of
        fields["layout"] = look.layout
        fields["hold"] = flight
        return self

    def __getattr__(self, name: str) -> Any:
        """A field that nobody has asked for yet."""
        fields = self.__dict__
        if name == "_outputs" and "_outputs_of" in fields:
            value: Any = Outputs(*fields.pop("_outputs_of"))
        elif name in _FIELDS and ("_outputs" in fields or "_outputs_of" in fields):
            value = self._outputs.get(name)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        fields[name] = value
        return value

    def copied(self) -> ArenaReceived:
        """The same in ordinary memory."""
        routing = () if self._outputs.look.cached else ("handle",)
        copies = {name: _clone(getattr(self, name)) for name in _FIELDS if name not in routing}
        handle = self.handle
        if routing:
            handle = Handle(*handle[:3], *(t.clone() for t in handle[3:]))
        copies |= {"handle": handle, "layout": self.layout, "origins": self.origins}
        return ArenaReceived(**copies)

    def use_on(self, stream: Any) -> None:
        if self.hold is not None:
            self.hold.use_on(int(stream.cuda_stream))
        loaded = (*vars(self).values(), *vars(self).get("handle", ()))
        for tensor in loaded:
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)  # does nothing to memory that is not torch's


_FIELDS: Final = frozenset(Received.__dataclass_fields__) - {"layout", "origins"}


def _clone(value: Any) -> Any:
    """A copy with the same strides."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)
