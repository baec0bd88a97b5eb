"""What a dispatch on GPUs returns: tensors over arena memory, each made when somebody asks for it.

A tensor costs the host a microsecond, so a call in a loop makes only those that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls
from ep_comm.backends.calls import Look
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


def as_dtype(
    make: Callable[[Sequence[int], tuple[int, int]], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """What `make(shape, type)` makes of memory, also of types that DLPack may not know."""
    if (type_ := _DLPACK.get(dtype)) is not None:
        return make(shape, type_)
    return make(calls.byte_shape(shape, dtype), (_core.DLPACK_UINT, 8)).view(dtype)


class OwnHandle(Handle):
    """A handle as this process made it: `routing` says what its tensors do, and keeps them."""

    routing: _core.Routing | None = None  # None: of a copy
    look: Look


class Outputs:
    """The tensors of one dispatch, by the names they have in Received.

    Args:
        num_tokens: of this rank.
        topk_idx, topk_weights: as dispatched, int64 and float32.
        handle: of a cached dispatch.
        given: tensors that torch made for the call, by what they would have been granted as.
    """

    def __init__(
        self,
        backend: NvlinkBackend,
        look: Look,
        flight: _core.Flight,
        num_tokens: int,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: Handle | None = None,
        given: dict[_core.Out, Tensor] | None = None,
    ) -> None:
        self._backend, self.look, self.flight = backend, look, flight
        self._num_tokens, self._idx, self._weights = num_tokens, topk_idx, topk_weights
        self._handle, self._given = handle, given or {}

    # ---- what there is of every row ----

    @cached_property
    def x(self) -> Tensor:
        shape = (*self._slabs, self._num_rows, self._backend.spec.hidden)
        return self._tensor(_core.Out.X, shape, self.look.wire_dtype)

    @cached_property
    def topk_idx(self) -> Tensor | None:
        if self.look.cached:
            return None
        return self._tensor(_core.Out.IDS, self._per_row, self.look.idx_dtype)

    @cached_property
    def topk_weights(self) -> Tensor | None:
        if not self.look.has_weights:
            return None
        return self._tensor(_core.Out.WEIGHTS, self._per_row, torch.float32)

    @cached_property
    def scales(self) -> Tensor | None:
        look, rows = self.look, self._num_rows
        if look.scale_dtype is None:
            return None
        if look.layout != "slab":
            return self._tensor(_core.Out.SCALES, (rows, look.scale_words), look.scale_dtype)
        # Column-major, columns 16 bytes aligned.
        shape = (*self._slabs, look.scale_words, -(-rows // 4) * 4)
        return self._tensor(_core.Out.SCALES, shape, look.scale_dtype).transpose(1, 2)[:, :rows]

    @cached_property
    def origins(self) -> Origins | None:
        if not self.look.origins:
            return None
        spec, is_compact = self._backend.spec, self.look.layout == "compact"
        square, ranges = (spec.num_ranks,) * 2, (spec.num_local_experts, spec.num_ranks)
        return Origins(
            self._tensor(_core.Out.RANK_ENDS, square, torch.int32) if is_compact else None,
            self._tensor(_core.Out.ROW_TOKEN, (*self._slabs, self._num_rows), torch.int32),
            None if is_compact else self._tensor(_core.Out.SOURCE_RANGE, ranges, torch.int64),
        )

    # ---- the rest ----

    @cached_property
    def num_tokens_per_expert(self) -> Tensor:
        if self._handle is not None:
            return self._handle.num_tokens_per_expert
        shape = (self._backend.spec.num_local_experts,)
        return self._tensor(_core.Out.COUNTS, shape, torch.int32)

    @property
    def num_recv(self) -> int | Tensor:
        if self.look.sync:
            return int(self.flight.num_recv)
        return self._tensor(_core.Out.NUMBERS, (1,), torch.int32, skip_bytes=4)

    @property
    def status(self) -> Tensor:
        return self._tensor(_core.Out.NUMBERS, (1,), torch.int32)

    @cached_property
    def offsets(self) -> Tensor | None:
        if not self.look.row_index and self.look.layout != "grouped":
            return None
        shape = (self._backend.spec.num_local_experts + 1,)
        return self._tensor(_core.Out.OFFSETS, shape, torch.int32)

    @cached_property
    def row_index(self) -> Tensor | None:
        if not self.look.row_index:
            return None
        entries = self.look.index_capacity
        shape = (self.flight.index_rows if entries is None else entries,)
        return self._tensor(_core.Out.ROW_INDEX, shape, torch.int32)

    @cached_property
    def handle(self) -> Handle:
        look, weights = self.look, self._weights
        if self._handle is not None:
            return self._of_cached(self._handle)
        spec, num_tokens, topk = self._backend.spec, self._num_tokens, look.num_topk
        if weights is None:
            weights = torch.empty((0, topk), dtype=torch.float32, device=spec.device)
        most = calls.max_recv(spec, look, self.flight.num_recv)
        meta = calls.make_meta(
            spec, look, self._backend.generation, num_tokens, most, self._num_rows,
            self.flight.number,
        )  # fmt: skip
        num_rows = most if look.layout != "compact" else 0
        handle = OwnHandle(
            meta,
            self._idx,
            weights,
            self._tensor(_core.Out.SEND_ROW, (num_tokens, topk), torch.int32),
            self._tensor(_core.Out.SRC, (most, 2), torch.int32),
            self._tensor(_core.Out.ROWS, (num_rows, topk), torch.int32),
            self._tensor(_core.Out.RANK_COUNTS, (2, spec.num_ranks), torch.int64),
            self.num_tokens_per_expert,
        )
        if not self._given:
            handle.routing, handle.look = self.flight.routing(), look
        return handle

    def _of_cached(self, handle: Handle) -> Handle:
        if self._weights is None:
            return handle
        meta = edit_meta(handle.meta, has_weights=1)
        same = handle._replace(meta=meta, topk_weights=self._weights)
        if isinstance(handle, OwnHandle) and isinstance(same, OwnHandle) and handle.routing:
            same.routing, same.look = handle.routing, handle.look
        return same

    def promise(self) -> Promised:
        """Of a slab, whose shapes do not depend on what arrives."""
        return Promised(
            x=self.x,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            scales=self.scales,
            num_tokens_per_expert=self.num_tokens_per_expert,
            origins=self.origins,
        )

    # ---- shapes, and memory ----

    @property
    def _num_rows(self) -> int:
        """Of x; slab: per expert."""
        if self.look.sync and self.look.layout != "slab":
            return int(self.flight.num_rows)
        return self.look.capacity or 0

    @property
    def _slabs(self) -> tuple[int, ...]:
        return (self._backend.spec.num_local_experts,) if self.look.layout == "slab" else ()

    @property
    def _per_row(self) -> tuple[int, ...]:
        if self.look.layout == "compact":
            return (self._num_rows, self.look.num_topk)
        return (*self._slabs, self._num_rows)

    def _tensor(
        self, out: _core.Out, shape: Sequence[int], dtype: torch.dtype, skip_bytes: int = 0
    ) -> Tensor:
        if (given := self._given.get(out)) is not None:
            return given.view(-1)[skip_bytes // 4 :][:1] if out == _core.Out.NUMBERS else given
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype, device=self._backend.spec.device)
        flight = self.flight
        return as_dtype(lambda s, type_: flight.tensor(out, s, type_, skip_bytes), shape, dtype)


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
            fields["origins"] = outputs.origins
        return self

    def __getattr__(self, name: str) -> Any:
        """A field that nobody has asked for yet."""
        if name not in _FIELDS or (outputs := self.__dict__.get("_outputs")) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(outputs, name)
        self.__dict__[name] = value
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
