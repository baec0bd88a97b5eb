"""The two operations on GPUs: what is queued, on which stream, and what the caller gets."""

from __future__ import annotations

import math
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
from ep_comm.received import Promised, Received

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NvlinkBackend

# A row that is quantized on the way lies whole in the shared memory of an SM, with its scales.
_MAX_QUANTIZED_BYTES: Final = 192 << 10


@dataclass
class ArenaReceived(Received):
    """Received whose x is arena memory, which `record_stream` does not reach."""

    hold: Any = None

    def use_on(self, stream: Any) -> None:
        if self.hold is not None:
            self.hold.use_on(int(stream.cuda_stream))
        fields = (self.topk_idx, self.topk_weights, self.scales, self.offsets, self.row_index)
        counts = (self.num_tokens_per_expert, self.num_recv, self.status)
        origins = () if self.origins is None else tuple(vars(self.origins).values())
        for tensor in (*fields, *counts, *origins, *self.handle[1:]):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)


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


class Dispatch(calls.Dispatch):
    """One dispatch, queued on the current stream or begun on the buffer's own."""

    flight: _core.Flight
    promised: Promised | None = None  # outputs made before the operation began
    _promised_out: dict[str, Tensor]
    _hold: _core.StreamHold | None = None  # of promised.x

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
        self.status = torch.empty(1, dtype=torch.int32, device=backend.spec.device)
        self.num_recv = torch.empty(1, dtype=torch.int32, device=backend.spec.device)
        self._settled = False
        self._result: Received | None = None
        self._error: EPError | None = None

    def run(self) -> Received:
        self.backend.enter()
        self._start(apart=False)
        if self.call.sync:
            self._await_sizes()
        self._copy()
        return self._finish()

    def begin(self) -> Begun:
        """Waits for no peer, but num_slots operations after one whose sizes are wanted: that one
        leaves its slot first. With transfer="copy_engine" it waits for sizes."""
        backend = self.backend
        backend.enter()
        with backend.on_own_stream(self):
            if self.call.layout == "slab":
                self._promise()
            by_copies = self.call.transfer == "copy_engine"
            self._start(apart=self.call.sync and not by_copies)
            if by_copies:  # the host queues the copies, and peers count on them
                self._settle()
                return Begun(backend, self._take, backend.when_over())
            if not self.call.sync:
                self._settle()
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
        """Queue the second half of a begun operation, if nobody has yet; waits for its sizes."""
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

    def _start(self, apart: bool) -> None:
        backend, call = self.backend, self.call
        if not call.sync:
            backend.will_look()
        with backend.cuda_faults():
            self.flight = backend.rank.begin_dispatch(
                self.args, call.sync, apart, self.status.data_ptr(), self.num_recv.data_ptr(),
                backend.blocks(call.num_sms), backend.stream(), call.transfer == "copy_engine",
            )  # fmt: skip
        self.number = backend.seq()
        if self.flight.outcome.code != 0:  # refused before it was queued
            raise backend.error(self.flight.outcome, call.tag)

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
        if self.promised is None:
            hold, x = flight.x, backend.tensor(flight.x, self._x_shape(arrival), call.wire_dtype)
            out = self._outputs(arrival)
        else:
            hold, x, out = self._hold, self.promised.x, dict(self._promised_out)
        out |= self._handle_outputs(arrival)
        with backend.cuda_faults():
            backend.rank.finish_dispatch(flight, self._unpack_args(arrival, out))
        self._transpose_scales(out, arrival.num_rows)
        if self.promised is None and backend.wants_copy(call.output):
            x, hold = x.clone(), None
        return ArenaReceived(
            x=x,
            topk_idx=out.get("topk_idx"),
            topk_weights=out.get("topk_weights"),
            scales=out.get("scales"),
            num_tokens_per_expert=self.counts,
            num_recv=arrival.num_recv if call.sync else self.num_recv,
            offsets=out.get("offsets"),
            row_index=out.get("row_index"),
            status=self.status,
            handle=self._handle(backend.generation, arrival, out),
            layout=call.layout,
            origins=self._origins(out),
            hold=hold,
        )

    # ---- tensors ----

    def _promise(self) -> None:
        """Make the outputs of a slab, whose shapes do not depend on what arrives."""
        backend, call = self.backend, self.call
        arrival = Arrival(0, call.capacity or 0, 0)
        shape = self._x_shape(arrival)
        num_bytes = math.prod(shape) * call.wire_dtype.itemsize
        if num_bytes == 0 or call.output == "torch" or backend.crowded():
            return  # x is made, or copied out, when the rows are there
        self._hold = backend.arena.grant(num_bytes, backend.stream())
        if self._hold is None:
            return  # the operation will find that, too, and tell the peers
        x = backend.tensor(self._hold, shape, call.wire_dtype)
        self.args.x_offset = backend.arena.offset_of(x.data_ptr(), num_bytes)
        out = self._promised_out = self._outputs(arrival)
        shown = dict(out)
        self._transpose_scales(shown, arrival.num_rows)
        self.promised = Promised(
            x=x,
            topk_idx=shown.get("topk_idx"),
            topk_weights=shown.get("topk_weights"),
            scales=shown.get("scales"),
            num_tokens_per_expert=self.counts,
            origins=self._origins(out),
        )

    def _x_shape(self, arrival: Arrival) -> tuple[int, ...]:
        spec = self.backend.spec
        slabs = (spec.num_local_experts,) if self.call.layout == "slab" else ()
        return (*slabs, arrival.num_rows, spec.hidden)

    def _transpose_scales(self, out: dict[str, Tensor], rows: int) -> None:
        if self.call.layout == "slab" and "scales" in out:
            out["scales"] = out["scales"].transpose(1, 2)[:, :rows]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.backend.spec.device)

    def _outputs(self, arrival: Arrival) -> dict[str, Tensor]:
        """What there is of every row but x, by the names of UnpackArgs; kernels write all of it."""
        spec, call = self.backend.spec, self.call
        rows, local = arrival.num_rows, spec.num_local_experts
        per_row = {"grouped": (rows,), "slab": (local, rows)}.get(
            call.layout, (rows, call.num_topk)
        )
        out: dict[str, Tensor] = {}
        if call.handle is None:
            out["topk_idx"] = self._empty(per_row, call.idx_dtype)
        if call.topk_weights is not None:
            out["topk_weights"] = self._empty(per_row, torch.float32)
        if call.scale_dtype is not None:
            words = call.scale_words
            shape = (local, words, -(-rows // 4) * 4) if call.layout == "slab" else (rows, words)
            out["scales"] = self._empty(shape, call.scale_dtype)
        if call.origins:
            compact = call.layout == "compact"
            out["row_token"] = self._empty(per_row[:1] if compact else per_row, torch.int32)
            if not compact:
                out["source_range"] = self._empty((local, spec.num_ranks), torch.int64)
        return out

    def _handle_outputs(self, arrival: Arrival) -> dict[str, Tensor]:
        """What depends on how many tokens arrived, and the starts of groups."""
        call, out = self.call, {}
        if call.handle is None:
            max_recv = self._max_recv(arrival.num_recv)
            with_rows = max_recv if call.layout != "compact" else 0
            out["recv_src"] = self._empty((max_recv, 2), torch.int32)
            out["recv_row"] = self._empty((with_rows, call.num_topk), torch.int32)
        else:
            out["recv_src"], out["recv_row"] = call.handle.recv_src, call.handle.recv_row
        if call.layout == "grouped" or call.row_index:
            out["offsets"] = self._empty((self.backend.spec.num_local_experts + 1,), torch.int32)
        if call.row_index:
            index_rows = self.flight.index_rows if call.sync else self.args.index_capacity
            out["row_index"] = self._empty((index_rows,), torch.int32)
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
        backend = self.backend
        backend.enter()
        backend.will_look()
        with backend.cuda_faults():
            backend.rank.combine(self.args, backend.blocks(self.call.num_sms), backend.stream())
        return self.result()

    def begin(self) -> Begun:
        with self.backend.on_own_stream(self):
            result = self.run()
            return Begun(self.backend, lambda: result, self.backend.when_over())
