"""The two operations on GPUs: what is queued, on which stream, and what the caller gets."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls
from ep_comm.backends.base import Combined
from ep_comm.backends.calls import Arrival
from ep_comm.checks import CombineCall, DispatchCall
from ep_comm.errors import EPError, make_error
from ep_comm.received import Origins, Promised, Received

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NvlinkBackend

# A row that is quantized on the way lies whole in the shared memory of an SM, with its scales.
_MAX_QUANTIZED_BYTES: Final = 192 << 10


@dataclass
class ArenaReceived(Received):
    """Received in arena memory, which `record_stream` does not reach."""

    holds: tuple[Any, ...] = ()  # extents

    def use_on(self, stream: Any) -> None:
        for hold in self.holds:
            hold.use_on(int(stream.cuda_stream))
        fields = (self.topk_idx, self.topk_weights, self.scales, self.offsets, self.row_index)
        counts = (self.num_tokens_per_expert, self.num_recv, self.status)
        origins = () if self.origins is None else tuple(vars(self.origins).values())
        for tensor in (*fields, *counts, *origins, *self.handle[1:]):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)  # does nothing to memory that is not torch's


class Begun:
    """An operation on the buffer's own stream.

    Args:
        finish: what `wait()` returns; called once, within that stream.
        ready: whether it would wait for the device.
    """

    def __init__(
        self,
        backend: NvlinkBackend,
        finish: Callable[[], Any],
        ready: Callable[[], bool],
        promised: Promised | None = None,
    ) -> None:
        self._backend, self._finish, self._ready = backend, finish, ready
        self.promised = promised

    def done(self) -> bool:
        return self._ready()

    def finish(self) -> Any:
        """The caller's stream waits for the operation, its host only for sizes."""
        stream = torch.cuda.current_stream(self._backend.spec.device)
        with torch.cuda.stream(self._backend.aside):
            result = self._finish()
        stream.wait_stream(self._backend.aside)
        if isinstance(result, Received):
            result.use_on(stream)
        return result


class Halves:
    """An operation of a small batch whose first half has been queued, on the caller's stream.

    Between the halves nothing of ours is on the GPU. The second one is queued by `finish()`, or
    before an operation that needs its slot, or, when nobody wants its result, before the next one.

    Args:
        queue: queues the second half on the current stream.
        result: what `wait()` returns; called once, after `queue`.
        ready: whether `wait()` would return at once.
    """

    def __init__(
        self,
        backend: NvlinkBackend,
        queue: Callable[[], None],
        result: Callable[[], Any],
        ready: bool,
        promised: Promised | None = None,
    ) -> None:
        self._backend, self._queue, self._result, self._ready = backend, queue, result, ready
        self.promised = promised
        self.number = backend.seq()
        self._queued: Any = None  # the stream, once it has been
        backend.halves.append(self.number, self)

    def done(self) -> bool:
        return self._ready

    def queue(self) -> None:
        """Queue the second half, once."""
        if self._queued is not None:
            return
        self._queued = torch.cuda.current_stream(self._backend.spec.device)
        self._backend.halves.remove(self.number)
        with self._backend.cuda_faults():
            self._queue()

    def finish(self) -> Any:
        self._backend.check_usable()
        self.queue()
        result = self._result()
        stream = torch.cuda.current_stream(self._backend.spec.device)
        if stream != self._queued:
            stream.wait_stream(self._queued)
        if isinstance(result, Received):
            result.use_on(stream)
        return result

    def __del__(self) -> None:
        if self._queued is None:
            self._backend.halves.abandon(self.number, self._queue)


class Outstanding:
    """Operations whose second half nobody has queued yet."""

    def __init__(self) -> None:
        self._begun: dict[int, weakref.ref[Halves]] = {}  # by number, ascending
        self._abandoned: dict[int, Callable[[], None]] = {}

    def append(self, number: int, halves: Halves) -> None:
        self._begun[number] = weakref.ref(halves)

    def remove(self, number: int) -> None:
        self._begun.pop(number, None)

    def abandon(self, number: int, queue: Callable[[], None]) -> None:
        """Its `Halves` is gone; from any thread, at any time."""
        if self._begun.pop(number, None) is not None:
            self._abandoned[number] = queue

    def make_room(self, last: int) -> None:
        """Queue what nobody waits for, and operations up to `last`, whose slots are needed."""
        while self._abandoned:
            _, queue = self._abandoned.popitem()
            queue()
        for number in [n for n in self._begun if n <= last]:
            if (halves := self._begun[number]()) is not None:
                halves.queue()


class Dispatch(calls.Dispatch):
    """One dispatch, queued on the current stream or begun on the buffer's own."""

    flight: _core.Flight
    promised: Promised | None = None  # outputs whose shapes do not depend on what arrives

    def __init__(self, backend: NvlinkBackend, call: DispatchCall) -> None:
        self.backend = backend
        if call.sync and _core.is_capturing(backend.stream()):
            raise make_error(
                "E203", "rejected sync=True: want sync=False while a graph is captured"
            )
        row_bytes = backend.spec.hidden * call.x.itemsize + 4 * call.scale_words
        if call.quantize is not None and row_bytes > _MAX_QUANTIZED_BYTES:
            what = f"rejected hidden={backend.spec.hidden}: want rows <= {_MAX_QUANTIZED_BYTES} B"
            raise make_error("E211", f"{what} with quantize= and backend 'nvlink'")
        super().__init__(backend.spec, call)
        self.numbers = self._empty((8,), torch.int32)  # status, tokens received; a `Begun`
        self.offsets: Tensor | None = None
        self.source_range: Tensor | None = None
        if call.layout == "grouped" or call.row_index:
            self.offsets = self._empty((backend.spec.num_local_experts + 1,), torch.int32)
        if call.origins and call.layout != "compact":
            shape = (backend.spec.num_local_experts, backend.spec.num_ranks)
            self.source_range = self._empty(shape, torch.int64)
        self._settled = False
        self._result: Received | None = None
        self._error: EPError | None = None

    def run(self) -> Received:
        self.backend.enter()
        self._start()
        if self.call.sync:
            self._await_sizes()
        self._copy()
        return self._finish()

    def begin(self) -> Begun | Halves:
        """Waits for no peer. With transfer="copy_engine" it waits for sizes."""
        backend = self.backend
        backend.enter()
        if backend.rank.stages_dispatch(self.args):
            self._start(in_halves=True)
            if self.call.layout == "slab" and self.flight.x is not None:
                self._promise()
            return Halves(
                backend, self._second_half, self._take_second, not self.call.sync, self.promised
            )
        with backend.on_own_stream(self):
            self._start()
            if self.call.layout == "slab" and self.flight.x is not None:
                self._promise()
            if not self.call.sync or self.call.transfer == "copy_engine":
                self._settle()  # the host queues the copies, and peers count on them
                return Begun(backend, self._take, backend.when_over(), self.promised)
        backend.unfinished.append(self)
        ready = lambda: self._settled or backend.rank.has_report(self.flight)  # noqa: E731
        return Begun(backend, self._take, ready, self.promised)

    def _take(self) -> Received:
        self.settle()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self) -> None:
        """Make the results of a begun operation, if nobody has yet; waits for its sizes."""
        if self._settled:
            return
        with torch.cuda.stream(self.backend.aside):
            self._settle()
        self.backend.is_over(self)

    def _settle(self) -> None:
        self._settled = True
        try:
            if self.call.sync:
                self._await_sizes()
            self._copy()
            self._result = self._finish()
        except EPError as error:
            self._error = error

    def _start(self, in_halves: bool = False) -> None:
        backend, call = self.backend, self.call
        if not call.sync:
            backend.will_look()
        wants = self._wants()
        wants.in_halves = in_halves
        with backend.cuda_faults():
            self.flight = backend.rank.dispatch(self.args, wants, backend.stream())
        self.number = backend.seq()

    def _second_half(self) -> None:
        self.backend.rank.finish_dispatch(self.flight, self.backend.stream())

    def _take_second(self) -> Received:
        if self.call.sync:
            self._await_sizes()
        return self._finish()

    def _wants(self) -> _core.DispatchWants:
        """What differs from a DispatchWants' defaults."""
        call, wants = self.call, _core.DispatchWants()
        wants.status = self.numbers.data_ptr()
        wants.num_recv = self.numbers.data_ptr() + 4
        wants.begun = self.numbers.data_ptr() + 16
        wants.num_sms = self.backend.blocks(call.num_sms)
        wants.num_warps = self.backend.num_warps
        wants.reports = call.sync
        if call.idx_dtype is not torch.int64:
            wants.wide_ids = False
        if self.offsets is not None:
            wants.offsets = self.offsets.data_ptr()
            wants.row_index = call.row_index
        if call.origins:
            wants.row_token, wants.source_range = True, calls.address(self.source_range)
        if call.transfer == "copy_engine":
            wants.by_copies = True
        if call.handle is not None and call.meta is not None:
            slabs = self.backend.spec.num_local_experts if call.layout == "slab" else 1
            wants.max_recv, wants.max_rows = call.meta.num_unique, call.meta.num_rows * slabs
            wants.recv_row = call.handle.recv_row.data_ptr()
        return wants

    def _await_sizes(self) -> None:
        """Raise what every rank raises."""
        with self.backend.cuda_faults():
            self.backend.rank.await_report(self.flight)
        if self.flight.outcome.code != 0:
            raise self.backend.error(self.flight.outcome, self.call.tag)

    def _copy(self) -> None:
        """Queue the copies of a call that moves its rows so, once sizes are known."""
        if self.call.transfer == "copy_engine":
            with self.backend.cuda_faults():
                self.backend.rank.push_copies(self.flight)

    def _finish(self) -> Received:
        backend, call, flight = self.backend, self.call, self.flight
        if call.sync:
            rows = call.capacity if call.layout == "slab" else flight.num_rows
            arrival = Arrival(flight.num_recv, rows or 0, self.number)
        else:
            arrival = Arrival(0, call.capacity or 0, self.number)
        backend.rank.settle(flight)
        given = self.promised or self._given(arrival)
        x, hold, out = given.x, flight.x, self._routing(arrival)
        values = {
            "topk_idx": given.topk_idx, "topk_weights": given.topk_weights, "scales": given.scales
        }  # fmt: skip
        if self.promised is None and backend.wants_copy(call.output):
            x, hold = x.clone(), None
            values = {k: None if t is None else t.clone() for k, t in values.items()}
            if call.handle is None:
                out = {k: t.clone() for k, t in out.items()}
        return ArenaReceived(
            x=x,
            **values,
            num_tokens_per_expert=self.counts,
            num_recv=arrival.num_recv if call.sync else self.numbers[1:2],
            offsets=self.offsets,
            row_index=out.get("row_index"),
            status=self.numbers[:1],
            handle=self._handle(backend.generation, arrival, out),
            layout=call.layout,
            origins=given.origins,
            holds=() if hold is None else self._holds(),
        )

    # ---- tensors ----

    def _holds(self) -> tuple[Any, ...]:
        f = self.flight
        held = (f.x, f.ids, f.weights, f.src, f.rows, f.scales, f.row_index, f.row_token)
        return tuple(h for h in held if h is not None)

    def _promise(self) -> None:
        """The outputs of a slab, whose shapes do not depend on what arrives."""
        if self.call.output == "torch" or self.backend.crowded():
            return  # copied out when the rows are there
        self.promised = self._given(Arrival(0, self.call.capacity or 0, 0))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.backend.spec.device)

    def _given(self, arrival: Arrival) -> Promised:
        """What there is of every row: where the kernels put it."""
        spec, call, flight = self.backend.spec, self.call, self.flight
        tensor = self.backend.tensor
        rows, local = arrival.num_rows, spec.num_local_experts
        slabs = (local,) if call.layout == "slab" else ()
        per_row = (*slabs, rows) if call.layout != "compact" else (rows, call.num_topk)
        ids = weights = scales = None
        if call.handle is None:
            ids = tensor(flight.ids, per_row, call.idx_dtype)
        if call.topk_weights is not None:
            weights = tensor(flight.weights, per_row, torch.float32)
        if call.scale_dtype is not None:
            words = call.scale_words
            if call.layout == "slab":  # column-major, columns 16 bytes aligned
                shape = (local, words, -(-rows // 4) * 4)
                scales = tensor(flight.scales, shape, call.scale_dtype)
                scales = scales.transpose(1, 2)[:, :rows]
            else:
                scales = tensor(flight.scales, (rows, words), call.scale_dtype)
        origins = None
        if call.origins:
            token = tensor(flight.row_token, (*slabs, rows), torch.int32)
            origins = Origins(self.rank_ends, token, self.source_range)
        return Promised(
            x=tensor(flight.x, (*slabs, rows, spec.hidden), call.wire_dtype),
            topk_idx=ids,
            topk_weights=weights,
            scales=scales,
            num_tokens_per_expert=self.counts,
            origins=origins,
        )

    def _routing(self, arrival: Arrival) -> dict[str, Tensor]:
        """What depends on how many tokens arrived: tensors of the handle, and the row index."""
        call, flight, tensor = self.call, self.flight, self.backend.tensor
        out: dict[str, Tensor] = {}
        if call.handle is None:
            max_recv = self._max_recv(arrival.num_recv)
            with_rows = max_recv if call.layout != "compact" else 0
            out["recv_src"] = tensor(flight.src, (max_recv, 2), torch.int32)
            out["recv_row"] = tensor(flight.rows, (with_rows, call.num_topk), torch.int32)
        else:
            out["recv_src"], out["recv_row"] = call.handle.recv_src, call.handle.recv_row
        if call.row_index:
            index_rows = flight.index_rows if call.sync else self.args.index_capacity
            out["row_index"] = tensor(flight.row_index, (index_rows,), torch.int32)
        return out


class Combine(calls.Combine):
    """One combine, queued on the current stream or begun on the buffer's own."""

    def __init__(self, backend: NvlinkBackend, call: CombineCall) -> None:
        self.backend = backend
        out, x = call.out, call.x
        if out is None:
            shape = (call.meta.num_tokens, backend.spec.hidden)
            out = torch.empty(shape, dtype=x.dtype, device=backend.spec.device)
        offset = -1
        if x.numel() > 0:
            offset = backend.arena.offset_of(x.data_ptr(), x.numel() * x.itemsize)
        super().__init__(backend.spec, call, out, offset)

    def run(self) -> Combined:
        self._queue(in_halves=False)
        return self.result()

    def begin(self) -> Begun | Halves:
        if self.backend.rank.stages_combine(self.args):
            self._queue(in_halves=True)
            return Halves(self.backend, self._second_half, self.result, True)
        with self.backend.on_own_stream(self):
            result = self.run()
            return Begun(self.backend, lambda: result, self.backend.when_over())

    def _queue(self, in_halves: bool) -> None:
        backend = self.backend
        backend.enter()
        backend.will_look()
        wants = _core.CombineWants()
        wants.num_sms = backend.blocks(self.call.num_sms)
        wants.num_stages = backend.num_stages
        if in_halves:
            self._halves = torch.empty(4, dtype=torch.int32, device=backend.spec.device)
            wants.begun, wants.in_halves = self._halves.data_ptr(), True
            self._stream = torch.cuda.current_stream(backend.spec.device)
        with backend.cuda_faults():
            self._begun = backend.rank.combine(self.args, wants, backend.stream())

    def _second_half(self) -> None:
        backend = self.backend
        stream = torch.cuda.current_stream(backend.spec.device)
        if stream != self._stream:
            for tensor in (self.out, self._halves, self.call.x, *self.call.handle[1:]):
                tensor.record_stream(stream)
        backend.rank.finish_combine(self._begun, int(stream.cuda_stream))
