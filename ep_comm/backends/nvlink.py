"""The nvlink backend: GPUs that map each other's memory; the work is done in csrc/kernels.

Outputs lie in the arena, GPU memory that every rank has mapped: peers push rows straight into
the tensor the caller gets. Everything is queued on the current stream. A call with `sync=True`
waits for its sizes while the rows travel; `sync=False` and `combine` never touch the host, and
what goes wrong in them is raised by the next call that looks.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import cpu
from ep_comm.backends.base import Combined
from ep_comm.bootstrap import Exchange, Group, Hello, Listener, Mesh, receive_fds, send_fds
from ep_comm.bootstrap import group_token as token_of
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.handle import Handle
from ep_comm.received import Received
from ep_comm.verdict import PeerState, error_of

Memories = tuple[_core.DeviceMemory, _core.DeviceMemory]  # control block, arena

# Where ranks that are threads of one process find each other's memory.
_in_process: dict[tuple[bytes, int], Memories] = {}
_in_process_lock = threading.Lock()
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
    ) -> None:
        self.spec = spec
        self.generation = generation
        self.num_sms = num_sms
        self._memory = memory
        self.arena = memory.arena
        self._copies_out = 0
        self._unseen = False  # calls whose failure nobody has looked for
        self._last_stream: torch.cuda.Stream | None = None
        self._peer_pids = [memory.mesh.pids.get(r, 0) for r in range(spec.num_ranks)]
        arrival = -1.0 if config.arrival_s is None else config.arrival_s
        sms = torch.cuda.get_device_properties(spec.device).multi_processor_count
        self.rank = _core.DeviceRank(
            shape, spec.rank, generation, list(spec.owner), memory.views(), memory.arena,
            (arrival, config.progress_s), sms // memory.ranks_on_device,
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
        crowded = stats["in_use"] > cpu._WATERMARK * stats["capacity"]
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


class _Dispatch(cpu._Dispatch):
    """One dispatch on the current stream; what no device changes is the cpu backend's."""

    backend: NvlinkBackend  # type: ignore[assignment]

    def __init__(self, backend: NvlinkBackend, call: DispatchCall) -> None:
        self.backend, self.call = backend, call
        spec, device = backend.spec, backend.spec.device
        self.stream = backend.stream()
        if call.sync and _core.is_capturing(self.stream):
            raise make_error(
                "E203", "rejected sync=True: want sync=False while a graph is captured"
            )
        tokens, topk = call.topk_idx.shape
        if call.handle is None:
            self.send_row = torch.empty((tokens, topk), dtype=torch.int32, device=device)
            self.rank_counts = torch.empty((2, spec.num_ranks), dtype=torch.int64, device=device)
            self.counts = torch.empty(spec.num_local_experts, dtype=torch.int32, device=device)
        else:
            self.send_row = call.handle.send_row
            self.rank_counts = call.handle.rank_counts
            self.counts = call.handle.num_tokens_per_expert
        self.rank_ends = None
        row_bytes = spec.hidden * call.x.itemsize + 4 * call.scale_words
        if call.quantize is not None and row_bytes > _MAX_QUANTIZED_BYTES:
            what = f"rejected hidden={spec.hidden}: want rows <= {_MAX_QUANTIZED_BYTES} B"
            raise make_error("E211", f"{what} with quantize= and backend 'nvlink'")
        if call.origins:
            raise make_error("E203", "rejected origins=True: want False with backend 'nvlink'")
        self.status = torch.empty(1, dtype=torch.int32, device=device)
        self.num_recv = torch.empty(1, dtype=torch.int32, device=device)
        self.args = self._fill(_core.DispatchArgs())

    def run(self) -> Received:
        flight = self._start()
        if self.call.sync:
            self._settle(flight)
        return self._finish(flight)

    def begin(self) -> _Begun:  # type: ignore[override]
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
            arrival = cpu._Arrival(flight.num_recv, rows or 0, self.routing)
        else:
            arrival = cpu._Arrival(0, call.capacity or 0, self.routing)
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
            handle=self._handle(arrival, out),
            layout=call.layout,
            hold=hold,
        )

    def _outputs(self, arrival: cpu._Arrival) -> dict[str, Tensor]:
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

    def _handle(self, arrival: cpu._Arrival, out: dict[str, Tensor]) -> Handle:
        handle = super()._handle(arrival, out)
        if handle.topk_weights.device == self.backend.spec.device:
            return handle
        return handle._replace(topk_weights=handle.topk_weights.to(self.backend.spec.device))


class _Combine:
    """One combine on the current stream."""

    def __init__(self, backend: NvlinkBackend, call: CombineCall) -> None:
        self.backend, self.call = backend, call
        self.stream = backend.stream()
        meta, handle, device = call.meta, call.handle, backend.spec.device
        shape = (meta.num_tokens, backend.spec.hidden)
        self.out = torch.empty(shape, dtype=call.x.dtype, device=device)
        if call.out is not None:
            self.out = call.out
        self.out_weights = None
        if call.topk_weights is not None:
            shape = (meta.num_tokens, meta.num_topk)
            self.out_weights = torch.empty(shape, dtype=torch.float32, device=device)
        a = _core.CombineArgs()
        a.x = call.x.data_ptr()
        a.y_weights = cpu._address(call.topk_weights)
        a.topk_idx = handle.topk_idx.data_ptr()
        a.topk_weights = handle.topk_weights.data_ptr() if call.weighted else 0
        a.send_row = handle.send_row.data_ptr()
        a.rank_counts = handle.rank_counts.data_ptr()
        a.recv_src = handle.recv_src.data_ptr()
        a.recv_row = handle.recv_row.data_ptr()
        a.bias0, a.bias1 = (cpu._address(b) for b in call.bias)
        a.out, a.out_weights = self.out.data_ptr(), cpu._address(self.out_weights)
        slabs = backend.spec.num_local_experts if meta.layout == "slab" else 1
        a.num_tokens, a.hidden, a.num_topk = meta.num_tokens, meta.hidden, meta.num_topk
        a.num_recv, a.num_rows = meta.num_unique, meta.num_rows * slabs
        a.arena_offset = -1
        if call.x.numel() > 0:
            num_bytes = call.x.numel() * call.x.itemsize
            a.arena_offset = backend.arena.offset_of(call.x.data_ptr(), num_bytes)
        a.layout = cpu._LAYOUTS[meta.layout]
        a.dtype = cpu._DTYPES[call.x.dtype]
        a.weighted = call.weighted
        a.sum_weights = call.sum_weights
        a.topk_order = call.order == "topk"
        a.with_weights = call.topk_weights is not None
        a.routing = meta.routing_number
        self.args = a

    def run(self) -> Combined:
        self.backend.will_look()
        blocks = self.backend.blocks(self.call.num_sms)
        self.backend.rank.combine(self.args, blocks, self.stream)
        return self.out if self.out_weights is None else (self.out, self.out_weights)

    def begin(self) -> _Begun:
        result = self.run()
        return _Begun(self.backend.spec.device, lambda: result)


# ---- construction ----


class Memory:
    """This rank's memory and its view of everybody else's."""

    def __init__(self, rank: int, own: Memories, mesh: Mesh, ranks_on_device: int) -> None:
        self.rank, self.own, self.mesh = rank, own, mesh
        self.ranks_on_device = ranks_on_device
        self.arena = _core.DeviceArena(own[1])
        self.peers: dict[int, Memories] = {rank: own}
        self.key: tuple[bytes, int] | None = None

    def views(self) -> list[Memories]:
        return [self.peers[r] for r in range(len(self.peers))]

    def publish_in_process(self, token: bytes) -> None:
        """Let ranks that are threads of this process find our memory."""
        self.key = (token, self.rank)
        with _in_process_lock:
            _in_process[self.key] = self.own

    def close(self) -> None:
        """Descriptors only; memory lives as long as a tensor in it."""
        self.mesh.close()
        if self.key is not None:
            with _in_process_lock:
                _in_process.pop(self.key, None)


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
    memory = connect(group, hellos, listener, exchange, shape, spec, arena_bytes)
    backend: NvlinkBackend | None = None
    failure: EPError | None = None
    try:
        try:
            backend = NvlinkBackend(spec, generation, config, memory, shape, num_sms)
        except _core.DeviceCallError as error:
            call, text = error.args
            failure = make_error("E232", f"is out of memory: {call}: {text}", rank=group.rank)
        cpu._agree(exchange, "ready", group.rank, failure)
        assert backend is not None
        return backend
    except BaseException:
        memory.close()
        raise


def connect(
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    shape: _core.Shape,
    spec: BufferSpec,
    arena_bytes: int | None,
) -> Memory:
    """Create our memory, give it to every peer, map theirs; collective."""
    me = group.rank
    token = token_of(hellos)
    mesh = Mesh()
    memory: Memory | None = None
    try:
        failure: EPError | None = None
        try:
            mesh = listener.connect_all(me, hellos, token, exchange)
            neighbours = sum(h.same_process(hellos[me]) for h in hellos)
            memory = _create(me, mesh, shape, spec, arena_bytes, neighbours)
            memory.publish_in_process(token)
        except EPError as error:
            failure = error
        cpu._agree(exchange, "created", me, failure)
        assert memory is not None
        try:
            _share(memory, hellos, token, shape, spec)
        except EPError as error:
            failure = error
        except OSError as error:
            failure = cpu._broken_share(me, mesh, error)
        cpu._agree(exchange, "mapped", me, failure)
    except BaseException:
        mesh.close()
        if memory is not None:
            memory.close()
        raise
    for part in memory.own:
        part.close_fd()
    return memory


def _create(
    me: int,
    mesh: Mesh,
    shape: _core.Shape,
    spec: BufferSpec,
    arena_bytes: int | None,
    neighbours: int,
) -> Memory:
    device = spec.device.index or 0
    size = default_arena_bytes(spec, neighbours) if arena_bytes is None else arena_bytes
    try:
        control = _core.DeviceMemory.create(device, _core.ControlLayout(shape).end)
        arena = _core.DeviceMemory.create(device, size)
        return Memory(me, (control, arena), mesh, neighbours)
    except _core.DeviceCallError as error:
        call, text = error.args
        what = f"is out of memory: {call} of {size} B: {text}"
        raise make_error("E232", what, rank=me) from error


def _share(
    memory: Memory, hellos: Sequence[Hello], token: bytes, shape: _core.Shape, spec: BufferSpec
) -> None:
    me, mesh, device = memory.rank, memory.mesh, spec.device.index or 0
    least = _core.ControlLayout(shape).end
    for sock in mesh.sockets.values():
        send_fds(sock, [m.fd for m in memory.own], [m.bytes for m in memory.own], 30.0)
    for peer in hellos:
        if peer.rank == me:
            continue
        if peer.rank not in mesh.sockets:
            with _in_process_lock:
                memory.peers[peer.rank] = _in_process[token, peer.rank]
            continue
        fds, sizes = receive_fds(mesh.sockets[peer.rank], 2, 30.0)
        try:
            if sizes[0] < least:
                what = f"rejected bootstrap of rank {peer.rank}: control block of {sizes[0]} B"
                raise make_error("E406", what, rank=me)
            control, arena = (
                _core.DeviceMemory.map(device, fd, size)
                for fd, size in zip(fds, sizes, strict=True)
            )
            memory.peers[peer.rank] = (control, arena)
        except _core.DeviceCallError as error:
            call, text = error.args
            what = f"cannot share memory: {call}: {text}, needs peer access between the GPUs"
            raise make_error("E405", what, rank=me, peer=peer.rank) from error
        finally:
            for fd in fds:
                os.close(fd)


__all__ = [
    "ArenaReceived",
    "Memory",
    "NvlinkBackend",
    "connect",
    "default_arena_bytes",
    "open_backend",
]
