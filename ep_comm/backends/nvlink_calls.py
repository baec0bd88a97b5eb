"""The two operations on GPUs: what is queued, on which stream, and what the caller gets."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls
from ep_comm.backends.base import Combined
from ep_comm.backends.nvlink_results import ArenaReceived, Outputs
from ep_comm.checks import CombineCall, DispatchCall
from ep_comm.errors import EPError, make_error
from ep_comm.received import Promised, Received

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NvlinkBackend


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
        try:
            return self._ready()
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise

    def finish(self) -> Any:
        """The caller's stream waits for the operation, its host only for sizes."""
        try:
            return self._take()
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise

    def _take(self) -> Any:
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
        self._queue()

    def finish(self) -> Any:
        try:
            return self._take()
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise

    def _take(self) -> Any:
        self._backend.check_usable()
        self.queue()
        stream = torch.cuda.current_stream(self._backend.spec.device)
        if stream != self._queued:
            stream.wait_stream(self._queued)
        result = self._result()  # may copy, on the stream of the caller
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

    def is_idle(self) -> bool:
        return not self._begun and not self._abandoned

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
    outputs: Outputs
    promised: Promised | None = None  # outputs whose shapes do not depend on what arrives

    def __init__(self, backend: NvlinkBackend, call: DispatchCall) -> None:
        self.backend = backend
        if call.sync and _core.is_capturing(backend.stream()):
            raise make_error(
                "E203", "rejected sync=True: want sync=False while a graph is captured"
            )
        row_bytes = backend.spec.hidden * call.x.itemsize + 4 * call.scale_words
        if call.quantize is not None and row_bytes > (most := backend.max_quantized_bytes):
            what = f"rejected hidden={backend.spec.hidden}: want rows <= {most} B"
            raise make_error("E211", f"{what} with quantize= and backend {backend.name!r}")
        self.given: dict[_core.Out, Tensor] = {}
        super().__init__(backend.spec, call)
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
            self._promise()
            return Halves(
                backend, self._second_half, self._take_second, not self.call.sync, self.promised
            )
        with backend.on_own_stream(self):
            self._start()
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
            self._result = self._arrived()
        except EPError as error:
            self._error = error

    def _arrived(self) -> Received:
        try:
            if self.call.sync:
                self._await_sizes()
            self._copy()
            return self._finish()
        except RuntimeError as error:  # which may be one of another call, that needs our slot
            self.backend.raise_fault(error)
            raise

    def _start(self, in_halves: bool = False) -> None:
        backend, call = self.backend, self.call
        if not call.sync:
            backend.will_look()
        wants = self.wants()
        wants.in_halves = in_halves
        flight = backend.rank.dispatch(self.args, wants, backend.stream())
        if flight is None:  # no room in the arena: the rest is ordinary memory
            self._give(wants)
            flight = backend.rank.dispatch(self.args, wants, backend.stream())
        assert flight is not None
        self.flight = flight
        self.number = flight.number
        self.outputs = backend.outputs_type(
            backend, backend.plans.look_of(call), flight, self.routed_idx, call.topk_weights,
            call.handle, self.given,
        )  # fmt: skip

    def _second_half(self) -> None:
        stream = torch.cuda.current_stream(self.backend.spec.device)
        _use_on(stream, self.call.recv_stats, self.call.wait_stats)
        self.backend.rank.finish_dispatch(self.flight, int(stream.cuda_stream))

    def _take_second(self) -> Received:
        if self.call.sync:
            self._await_sizes()
        return self._finish()

    def wants(self) -> _core.DispatchWants:
        """What differs from a DispatchWants' defaults."""
        call, wants = self.call, _core.DispatchWants()
        wants.grants_all = True
        wants.num_sms = self.backend.blocks(call.num_sms)
        wants.num_warps = self.backend.num_warps
        wants.reports = call.sync
        if call.idx_dtype is not torch.int64:
            wants.wide_ids = False
        wants.row_index = call.row_index
        wants.row_token = call.origins
        if call.transfer == "copy_engine":
            wants.by_copies = True
        if call.handle is not None and call.meta is not None:
            slabs = self.backend.spec.num_local_experts if call.layout == "slab" else 1
            wants.max_recv, wants.max_rows = call.meta.num_unique, call.meta.num_rows * slabs
            wants.recv_row = call.handle.recv_row.data_ptr()
        return wants

    def _await_sizes(self) -> None:
        """Raise what every rank raises."""
        self.backend.rank.await_report(self.flight)
        if self.flight.outcome.code != 0:
            raise self.backend.error(self.flight.outcome, self.call.tag)

    def _copy(self) -> None:
        """Queue the copies of a call that moves its rows so, once sizes are known."""
        if self.call.transfer == "copy_engine":
            self.backend.rank.push_copies(self.flight)

    def _finish(self) -> Received:
        backend = self.backend
        backend.rank.settle(self.flight)
        received = ArenaReceived.of(self.outputs)
        if self.promised is None and backend.wants_copy(self.call.output):
            return received.copied()
        return received

    # ---- tensors ----

    def _make_tensors(self) -> None:
        """None at first: a dispatch is granted the memory of its routing."""
        handle, ids = self.call.handle, self.call.topk_idx
        # The handle keeps the ids as they were given, or what replicas have made of them.
        self.routed_idx = ids if self.call.replicas is None else torch.empty_like(ids)
        self.send_row = self.rank_counts = self.counts = None
        if handle is not None:
            self.send_row, self.rank_counts = handle.send_row, handle.rank_counts
            self.counts = handle.num_tokens_per_expert

    def _give(self, wants: _core.DispatchWants) -> None:
        """What would have been granted, of torch's memory."""
        spec, call, out = self.backend.spec, self.call, _core.Out
        routed = self.routed_idx
        super()._make_tensors()
        self.routed_idx = routed
        self.args = self._fill(_core.DispatchArgs())
        numbers = torch.empty(8, dtype=torch.int32, device=spec.device)
        given = self.given
        given[out.NUMBERS] = numbers
        wants.grants_all = False
        wants.status, wants.num_recv = numbers.data_ptr(), numbers.data_ptr() + 4
        wants.begun = numbers.data_ptr() + _core.BEGUN_AT
        if call.handle is None:
            given[out.SEND_ROW], given[out.RANK_COUNTS] = self.send_row, self.rank_counts
            given[out.COUNTS] = self.counts
        if call.layout == "grouped" or call.row_index:
            given[out.OFFSETS] = numbers.new_empty(spec.num_local_experts + 1)
            wants.offsets = given[out.OFFSETS].data_ptr()
        if self.rank_ends is not None:
            given[out.RANK_ENDS] = self.rank_ends
        elif call.origins:
            shape = (spec.num_local_experts, spec.num_ranks)
            given[out.SOURCE_RANGE] = torch.empty(shape, dtype=torch.int64, device=spec.device)
            wants.source_range = given[out.SOURCE_RANGE].data_ptr()

    def _promise(self) -> None:
        """The outputs of a slab, whose shapes do not depend on what arrives."""
        is_there = self.call.layout == "slab" and self.flight.has(_core.Out.X)
        if not is_there or self.call.output == "torch" or self.backend.crowded():
            return  # copied out when the rows are there
        self.promised = self.outputs.promise()


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

    def wants(self) -> _core.CombineWants:
        wants = _core.CombineWants()
        wants.num_sms = self.backend.blocks(self.call.num_sms)
        wants.num_stages = self.backend.num_stages
        return wants

    def _queue(self, in_halves: bool) -> None:
        backend = self.backend
        backend.enter()
        backend.will_look()
        wants = self.wants()
        if in_halves:
            self._halves = torch.empty(4, dtype=torch.int32, device=backend.spec.device)
            wants.begun, wants.in_halves = self._halves.data_ptr(), True
            self._stream = torch.cuda.current_stream(backend.spec.device)
        self._begun = backend.rank.combine(self.args, wants, backend.stream())

    def _second_half(self) -> None:
        backend = self.backend
        stream = torch.cuda.current_stream(backend.spec.device)
        if stream != self._stream:
            call = self.call
            _use_on(stream, self.out, self._halves, call.x, call.wait_stats, *call.handle[1:])
        backend.rank.finish_combine(self._begun, int(stream.cuda_stream))


def _use_on(stream: Any, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
