"""The nvlink backend: GPUs that map each other's memory; the work is done in csrc/kernels.

Outputs lie in the arena, GPU memory that every rank has mapped: peers push rows straight into
the tensor the caller gets. Everything is queued on the current stream. A call with `sync=True`
waits for its sizes while the rows travel; `sync=False` and `combine` never touch the host, and
what goes wrong in them is raised by the next call that looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls, mapping
from ep_comm.backends.base import Combined
from ep_comm.backends.calls import Arrival
from ep_comm.bootstrap import Exchange, Group, Hello, Listener
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.received import Received
from ep_comm.verdict import PeerState, error_of

Memory = mapping.Mapped[_core.DeviceMemory]

# A row that is quantized on the way lies whole in the shared memory of an SM, with its scales.
_MAX_QUANTIZED_BYTES: Final = 192 << 10
# Of the free memory of a GPU, what one rank takes for its arena at most.
_ARENA_SHARE: Final = 0.25


def default_arena_bytes(spec: BufferSpec, ranks_on_device: int) -> int:
    """Room for two dispatches of the worst case and an expert output for each, within reason."""
    worst_rows = spec.num_ranks * spec.max_tokens
    record = _core.MetaLayout(spec.num_topk, True, True, True, spec.hidden // 8).bytes
    wanted = 2 * worst_rows * (2 * 2 * spec.hidden + record) + (64 << 20)
    free, _ = torch.cuda.mem_get_info(spec.device)
    return min(wanted, int(free * _ARENA_SHARE) // ranks_on_device)


class NvlinkBackend:
    """One rank of a buffer on GPUs. Collective to construct; see `connect`."""

    name = "nvlink"

    def __init__(
        self,
        spec: BufferSpec,
        generation: int,
        config: EPConfig,
        memory: Memory,
        shape: _core.Shape,
        num_sms: int | None,
        ranks_on_device: int,
    ) -> None:
        self.spec = spec
        self.generation = generation
        self.num_sms = num_sms
        self._memory = memory
        self.arena = _core.DeviceArena(memory.own.arena)
        self._copies_out = 0
        self._unseen = False  # calls whose failure nobody has looked for
        self._last_stream: torch.cuda.Stream | None = None
        self._peer_pids = [memory.mesh.pids.get(r, 0) for r in range(spec.num_ranks)]
        arrival = -1.0 if config.arrival_s is None else config.arrival_s
        sms = torch.cuda.get_device_properties(spec.device).multi_processor_count
        self.rank = _core.DeviceRank(
            shape, spec.rank, generation, list(spec.owner), memory.views(), self.arena,
            (arrival, config.progress_s), sms // ranks_on_device,
        )  # fmt: skip
        _load_conversions(spec.device)

    # ---- operations ----

    def prepare_dispatch(self, call: DispatchCall) -> _Dispatch:
        return _Dispatch(self, call)

    def prepare_combine(self, call: CombineCall) -> _Combine:
        return _Combine(self, call)

    def stream(self) -> int:
        """Address of the stream an operation is queued on."""
        self._last_stream = torch.cuda.current_stream(self.spec.device)
        return int(self._last_stream.cuda_stream)

    def will_look(self) -> None:
        """A call has begun whose failure is raised later."""
        self._unseen = True

    def take_deferred(self) -> EPError | None:
        """Waits for the device when a static call or a combine was queued since the last look."""
        if self._unseen and self._last_stream is not None:
            self._last_stream.synchronize()
            self._unseen = False
        outcome = self.rank.take_deferred()
        return None if outcome is None else self.error(outcome, "")

    def refuse(self, op: str, error: EPError) -> None:
        kind = _core.OpKind.DISPATCH if op == "dispatch" else _core.OpKind.COMBINE
        reason = error.what.encode()[: _core.REASON_BYTES - 1].decode(errors="ignore")
        self.rank.refuse(kind, _core.Outcome(int(error.code[1:]), reason), self.stream())

    def error(self, outcome: _core.Outcome, tag: str) -> EPError:
        peer = outcome.peer
        pid = self._peer_pids[peer] if 0 <= peer < len(self._peer_pids) else 0
        op = "combine" if outcome.op == _core.OpKind.COMBINE else "dispatch"
        return error_of(outcome, op=op, tag=tag, peer=PeerState(pid))

    def seq(self) -> int:
        return int(self.rank.seq())

    def blocks(self, num_sms: int | None) -> int:
        """SMs of a call: its own number, the buffer's, or 0 = computed."""
        return num_sms or self.num_sms or 0

    # ---- memory ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Arena memory, uninitialized; E231 when no free piece is long enough."""
        num_bytes = dtype.itemsize * math.prod(shape)
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.spec.device)
        hold = self.arena.grant(num_bytes, self.stream())
        if hold is None:
            free = self.arena.stats()["largest_free"]
            what = f"is out of arena memory: need {num_bytes} B in one piece, free {free} B"
            raise make_error("E231", what, rank=self.spec.rank)
        return self.tensor(hold, shape, dtype)

    def tensor(
        self, hold: _core.StreamHold | None, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The start of an extent as a tensor that keeps it."""
        num_bytes = dtype.itemsize * math.prod(shape)
        if hold is None or num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.spec.device)
        flat: Tensor = torch.from_dlpack(self.arena.array(hold, num_bytes))
        return flat.view(dtype).view(tuple(shape))

    def wants_copy(self, output: str) -> bool:
        """Whether an output should leave the arena at once."""
        if output != "auto":
            return output == "torch"
        stats = self.arena.stats()
        crowded = stats["in_use"] > calls.WATERMARK * stats["capacity"]
        self._copies_out += crowded
        return bool(crowded)

    def stats(self) -> dict[str, Any]:
        return {
            "arena": self.arena.stats(),
            "copied_out": self._copies_out,
            "num_sms": {
                "dispatch": self.num_sms or self.rank.default_sms(_core.OpKind.DISPATCH),
                "combine": self.num_sms or self.rank.default_sms(_core.OpKind.COMBINE),
            },
        }

    def release(self) -> None:
        """The arena stays where it is: peers have mapped it."""

    def resume(self) -> None:
        """Nothing was released."""

    def close(self) -> None:
        self.rank.leave()
        self._memory.close()


@dataclass
class ArenaReceived(Received):
    """Received whose x is arena memory, which `record_stream` does not reach."""

    hold: Any = None

    def use_on(self, stream: Any) -> None:
        if self.hold is not None:
            self.hold.use_on(int(stream.cuda_stream))
        fields = (self.topk_idx, self.topk_weights, self.scales, self.offsets, self.row_index)
        counts = (self.num_tokens_per_expert, self.num_recv, self.status)
        for tensor in (*fields, *counts, *self.handle[1:]):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)


class _Begun:
    """A queued operation: it needs no host, so finishing it is only looking at what came of it."""

    def __init__(self, device: torch.device, finish: Callable[[], Any]) -> None:
        self._event: Any = torch.cuda.current_stream(device).record_event()
        self._finish = finish

    def done(self) -> bool:
        return bool(self._event.query())

    def finish(self) -> Any:
        return self._finish()


class _Dispatch(calls.Dispatch):
    """One dispatch on the current stream."""

    def __init__(self, backend: NvlinkBackend, call: DispatchCall) -> None:
        self.backend, self.stream = backend, backend.stream()
        if call.sync and _core.is_capturing(self.stream):
            raise make_error(
                "E203", "rejected sync=True: want sync=False while a graph is captured"
            )
        row_bytes = backend.spec.hidden * call.x.itemsize + 4 * call.scale_words
        if call.quantize is not None and row_bytes > _MAX_QUANTIZED_BYTES:
            what = f"rejected hidden={backend.spec.hidden}: want rows <= {_MAX_QUANTIZED_BYTES} B"
            raise make_error("E211", f"{what} with quantize= and backend 'nvlink'")
        if call.origins:
            raise make_error("E203", "rejected origins=True: want False with backend 'nvlink'")
        super().__init__(backend.spec, call)
        self.status = torch.empty(1, dtype=torch.int32, device=backend.spec.device)
        self.num_recv = torch.empty(1, dtype=torch.int32, device=backend.spec.device)

    def run(self) -> Received:
        flight = self._start()
        if self.call.sync:
            self._settle(flight)
        return self._finish(flight)

    def begin(self) -> _Begun:
        # Sizes are waited for here: the next operation may only begin once this one knows its own.
        error: list[EPError] = []
        result: list[Received] = []
        try:
            result.append(self.run())
        except EPError as raised:
            error.append(raised)

        def finish() -> Received:
            if error:
                raise error[0]
            return result[0]

        return _Begun(self.backend.spec.device, finish)

    def _start(self) -> _core.Flight:
        backend, call = self.backend, self.call
        if not call.sync:
            backend.will_look()
        flight: _core.Flight = backend.rank.begin_dispatch(
            self.args, call.sync, self.status.data_ptr(), self.num_recv.data_ptr(),
            backend.blocks(call.num_sms), self.stream,
        )  # fmt: skip
        self.routing = backend.seq()
        return flight

    def _settle(self, flight: _core.Flight) -> None:
        """Wait for the sizes; raise what every rank raises."""
        self.backend.rank.await_report(flight, self.stream)
        if flight.outcome.code != 0:
            raise self.backend.error(flight.outcome, self.call.tag)

    def _finish(self, flight: _core.Flight) -> Received:
        backend, call, spec = self.backend, self.call, self.backend.spec
        slabs = (spec.num_local_experts,) if call.layout == "slab" else ()
        if call.sync:
            rows = call.capacity if call.layout == "slab" else flight.num_rows
            arrival = Arrival(flight.num_recv, rows or 0, self.routing)
        else:
            arrival = Arrival(0, call.capacity or 0, self.routing)
        hold = flight.x
        x = backend.tensor(hold, (*slabs, arrival.num_rows, spec.hidden), call.wire_dtype)
        self.index_rows = flight.index_rows if call.sync else self.args.index_capacity
        out = self._outputs(arrival)
        backend.rank.finish_dispatch(flight, self._unpack_args(arrival, out), self.stream)
        if call.layout == "slab" and "scales" in out:
            out["scales"] = out["scales"].transpose(1, 2)[:, : arrival.num_rows]
        if backend.wants_copy(call.output):
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
            hold=hold,
        )

    def _outputs(self, arrival: Arrival) -> dict[str, Tensor]:
        """Tensors for everything but x, by the names of UnpackArgs; kernels write all of them."""
        spec, call = self.backend.spec, self.call
        rows, topk, local = arrival.num_rows, call.num_topk, spec.num_local_experts
        per_row = {"compact": (rows, topk), "grouped": (rows,), "slab": (local, rows)}[call.layout]

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(tuple(shape), dtype=dtype, device=spec.device)

        out: dict[str, Tensor] = {}
        if call.handle is None:
            max_recv = self._max_recv(arrival.num_recv)
            with_rows = max_recv if call.layout != "compact" else 0
            out["recv_src"] = empty((max_recv, 2), torch.int32)
            out["recv_row"] = empty((with_rows, topk), torch.int32)
            out["topk_idx"] = empty(per_row, call.idx_dtype)
        else:
            out["recv_src"], out["recv_row"] = call.handle.recv_src, call.handle.recv_row
        if call.topk_weights is not None:
            out["topk_weights"] = empty(per_row, torch.float32)
        if call.scale_dtype is not None:
            words = call.scale_words
            shape = (local, words, -(-rows // 4) * 4) if call.layout == "slab" else (rows, words)
            out["scales"] = empty(shape, call.scale_dtype)
        if call.layout == "grouped" or call.row_index:
            out["offsets"] = empty((local + 1,), torch.int32)
        if call.row_index:
            out["row_index"] = empty((self.index_rows,), torch.int32)
        return out


class _Combine(calls.Combine):
    """One combine on the current stream."""

    def __init__(self, backend: NvlinkBackend, call: CombineCall) -> None:
        self.backend, self.stream = backend, backend.stream()
        out, x = call.out, call.x
        if out is None:
            shape = (call.meta.num_tokens, backend.spec.hidden)
            out = torch.empty(shape, dtype=x.dtype, device=backend.spec.device)
        offset = -1
        if x.numel() > 0:
            offset = backend.arena.offset_of(x.data_ptr(), x.numel() * x.itemsize)
        super().__init__(backend.spec, call, out, offset)

    def run(self) -> Combined:
        self.backend.will_look()
        blocks = self.backend.blocks(self.call.num_sms)
        self.backend.rank.combine(self.args, blocks, self.stream)
        return self.result()

    def begin(self) -> _Begun:
        result = self.run()
        return _Begun(self.backend.spec.device, lambda: result)


# ---- construction ----


def _load_conversions(device: torch.device) -> None:
    """Run what torch may have to run for a call: a kernel loaded at its first use would wait for
    kernels that wait for us."""
    one = torch.zeros(4, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        one.to(dtype).to(torch.float32)
    one.to(torch.int32).to(torch.int64)
    for words in (torch.int32, torch.float32):
        torch.zeros((2, 2), dtype=words, device=device).t().contiguous()
    torch.cuda.synchronize(device)


def open_backend(
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    shape: _core.Shape,
    spec: BufferSpec,
    generation: int,
    config: EPConfig,
    arena_bytes: int | None,
    num_sms: int | None,
) -> NvlinkBackend:
    """A backend that is ready on every rank: from here on nothing allocates or loads.

    Raises:
        EPMemoryError: E232. EPEnvironmentError: E405, E406. EPTimeout: E120. EPPeerDied: E110.

    Collective: all ranks succeed, or all raise and keep nothing.
    """
    device = spec.device.index or 0
    kind: mapping.Kind[_core.DeviceMemory] = mapping.Kind(
        lambda _, num_bytes: _core.DeviceMemory.create(device, num_bytes),
        lambda fd, num_bytes: _core.DeviceMemory.map(device, fd, num_bytes),
        _core.DeviceCallError,
        lambda error: error.args,
        "peer access between the GPUs",
    )
    ranks_on_device = sum(h.same_process(hellos[group.rank]) for h in hellos)
    size = default_arena_bytes(spec, ranks_on_device) if arena_bytes is None else arena_bytes
    control_bytes = _core.ControlLayout(shape).end
    memory = mapping.connect(kind, group, hellos, listener, exchange, control_bytes, size)
    for region in memory.own:
        region.close_fd()
    backend: NvlinkBackend | None = None
    failure: EPError | None = None
    try:
        try:
            backend = NvlinkBackend(
                spec, generation, config, memory, shape, num_sms, ranks_on_device
            )
        except _core.DeviceCallError as error:
            call, text = error.args
            failure = make_error("E232", f"is out of memory: {call}: {text}", rank=group.rank)
        mapping.agree(exchange, "ready", group.rank, failure)
        assert backend is not None
        return backend
    except BaseException:
        memory.close()
        raise


__all__ = ["ArenaReceived", "NvlinkBackend", "default_arena_bytes", "open_backend"]
