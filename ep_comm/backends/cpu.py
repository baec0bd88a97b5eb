"""The cpu backend: ranks of one host share memory; the work is done in csrc/cpu.

Only this file and its GPU sibling take addresses of tensors. Outputs lie in the arena, a sealed
memfd that every rank has mapped: peers write rows straight into the tensor the caller gets.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends.base import Combined
from ep_comm.bootstrap import (
    Exchange,
    Group,
    Hello,
    Listener,
    Mesh,
    died_early,
    group_token,
    receive_fds,
    send_fds,
)
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall, worst_grouped_rows
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Origins, Promised, Received
from ep_comm.verdict import PeerState, error_of

_log = logging.getLogger("ep_comm")

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
# Failures a static call finds after it began: shown as its status, raised later.
_DEFERRABLE: Final = (213, 230, 231)
# Above this share of the arena in use, output="auto" returns ordinary torch memory instead.
_WATERMARK: Final = 0.75

# Where ranks that are threads of one process find each other's memory: (token of the group, rank)
# -> (control block, arena).
_in_process: dict[tuple[bytes, int], tuple[_core.Segment, _core.Segment]] = {}
_in_process_lock = threading.Lock()


def default_arena_bytes() -> int:
    """As much as the machine has: pages that nobody touches cost nothing."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class CpuBackend:
    """One rank of a buffer over shared memory. Collective to construct; see `connect`."""

    name = "cpu"

    def __init__(
        self,
        spec: BufferSpec,
        generation: int,
        config: EPConfig,
        memory: Memory,
        shape: _core.Shape,
    ) -> None:
        self.spec = spec
        self.generation = generation
        self._memory = memory
        self._arena = memory.arena
        self._deferred: EPError | None = None
        self._copies_out = 0
        self._lost: list[Tensor] = []
        self._in_flight: list[tuple[_core.Pending, Any]] = []
        self._peer_pids = [memory.mesh.pids.get(r, 0) for r in range(spec.num_ranks)]
        arrival = -1.0 if config.arrival_s is None else config.arrival_s
        self.comm = _core.CpuCommunicator(
            shape, spec.rank, generation, list(spec.owner), memory.views(), memory.arena,
            (config.arrival_warn_s, arrival, config.progress_s),
        )  # fmt: skip

    # ---- operations ----

    def prepare_dispatch(self, call: DispatchCall) -> _Dispatch:
        return _Dispatch(self, call)

    def prepare_combine(self, call: CombineCall) -> _Combine:
        return _Combine(self, call)

    def keep(self, pending: _core.Pending, work: object) -> None:
        """Hold the tensors of a begun operation until the communication thread is done with them,
        also when the caller drops it."""
        for done, over in self._in_flight:
            if done.done() and isinstance(over, _Dispatch):
                over.keep_promise(done.dispatched.outcome)
        self._in_flight = [(p, w) for p, w in self._in_flight if not p.done()]
        self._in_flight.append((pending, work))

    def defer(self, work: _Dispatch, error: EPError) -> None:
        """Remember a static call's failure until somebody may be told."""
        if self._deferred is None and not work.reported:
            self._deferred = error
        work.reported = True

    def abandon(self, x: Tensor) -> None:
        """Keep memory that a late peer may still write to, after the communicator failed."""
        self._lost.append(x)

    def take_deferred(self) -> EPError | None:
        # Everything begun so far takes part, waited for or not: so all ranks find the same here.
        for pending, work in self._in_flight:
            pending.wait()
            if isinstance(work, _Dispatch) and not work.call.sync and not work.reported:
                outcome = pending.dispatched.outcome
                if outcome.code in _DEFERRABLE and not outcome.reason:
                    self.defer(work, self.error(outcome, "dispatch", work.call.tag))
        error, self._deferred = self._deferred, None
        return error

    def refuse(self, op: str, error: EPError) -> None:
        kind = _core.OpKind.DISPATCH if op == "dispatch" else _core.OpKind.COMBINE
        reason = error.what.encode()[: _core.REASON_BYTES - 1].decode(errors="ignore")
        self.comm.refuse(kind, _core.Outcome(int(error.code[1:]), reason))

    def error(self, outcome: _core.Outcome, op: str, tag: str) -> EPError:
        peer = outcome.peer
        pid = self._peer_pids[peer] if 0 <= peer < len(self._peer_pids) else 0
        return error_of(outcome, op=op, tag=tag, peer=PeerState(pid))

    def late(self, op: str, tag: str) -> Callable[[int, int, float], None]:
        """What the core calls when a peer is late: one warning W101 per wait."""

        def warn(site: int, peer: int, waited_s: float) -> None:
            name = f' (tag "{tag}")' if tag else ""
            late = f"for rank {peer} in {op}{name}"
            _log.warning(f"W101: rank {self.spec.rank} has waited {waited_s:.1f} s {late}")

        return warn

    def seq(self) -> int:
        return int(self.comm.seq())

    # ---- memory ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Arena memory, uninitialized; E231 when no free piece is long enough."""
        num_bytes = dtype.itemsize * math.prod(shape)
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        capsule = self._arena.array(num_bytes)
        if capsule is None:
            free = self._arena.stats()["largest_free"]
            what = f"is out of arena memory: need {num_bytes} B in one piece, free {free} B"
            raise make_error("E231", what, rank=self.spec.rank)
        flat: Tensor = torch.from_dlpack(capsule)
        return flat.view(dtype).view(tuple(shape))

    def warm(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result: of the arena when there is room, its pages have been touched before;
        else of torch."""
        try:
            return self.empty(shape, dtype)
        except EPError:
            return torch.empty(tuple(shape), dtype=dtype)

    def offset_in_arena(self, tensor: Tensor) -> int:
        """Where a dense tensor lies in our arena, or -1."""
        return int(self._arena.offset_of(tensor.data_ptr(), tensor.numel() * tensor.itemsize))

    def crowded(self) -> bool:
        """Whether so much of the arena is in use that outputs should not stay there."""
        stats: dict[str, int] = self._arena.stats()
        return stats["in_use"] > _WATERMARK * stats["capacity"]

    def wants_copy(self, output: str) -> bool:
        """Whether an output should leave the arena at once."""
        if output != "auto":
            return output == "torch"
        crowded = self.crowded()
        self._copies_out += crowded
        return crowded

    def stats(self) -> dict[str, Any]:
        return {
            "arena": dict(self._arena.stats(), committed=self._memory.own_arena.committed_bytes()),
            "copied_out": self._copies_out,
        }

    def release(self) -> None:
        self._arena.discard_free()

    def resume(self) -> None:
        """Pages come back by themselves, zeroed, when they are touched."""

    def close(self) -> None:
        self.comm.close()
        self._memory.close()


class _Begun:
    def __init__(
        self,
        pending: _core.Pending,
        finish: Callable[[], Any],
        promised: Promised | None = None,
    ) -> None:
        self._pending = pending
        self._finish = finish
        self.promised = promised

    def done(self) -> bool:
        return bool(self._pending.done())

    def finish(self) -> Any:
        self._pending.wait()
        return self._finish()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Arrival(NamedTuple):
    """The numbers of a dispatch that is over; shapes follow from them."""

    num_recv: int  # unique tokens
    num_rows: int  # of x; slab: per local expert
    seq: int


class _Dispatch:
    """One dispatch: its arguments as the core wants them, then the tensors the caller gets.

    Holds every tensor whose address the core has until the operation is over.
    """

    promised: Promised | None = None  # outputs made before the operation began
    _promised_out: dict[str, Tensor]

    def __init__(self, backend: CpuBackend, call: DispatchCall) -> None:
        self.backend, self.call = backend, call
        self.reported = False  # a failure of this static call has been remembered
        spec = backend.spec
        tokens, topk = call.topk_idx.shape
        if call.handle is None:
            self.send_row = torch.empty((tokens, topk), dtype=torch.int32)
            self.rank_counts = torch.zeros((2, spec.num_ranks), dtype=torch.int64)
            self.counts = torch.empty(spec.num_local_experts, dtype=torch.int32)
        else:
            self.send_row = call.handle.send_row
            self.rank_counts = call.handle.rank_counts
            self.counts = call.handle.num_tokens_per_expert
        self.rank_ends: Tensor | None = None
        if call.origins and call.layout == "compact":
            self.rank_ends = torch.empty((spec.num_ranks, spec.num_ranks), dtype=torch.int32)
        self.args = self._fill(_core.DispatchArgs())

    def _fill(self, a: _core.DispatchArgs) -> _core.DispatchArgs:
        call = self.call
        a.x, a.x_stride = call.x.data_ptr(), call.x.stride(0) * call.x.itemsize
        a.scales = _address(call.scales)
        a.topk_idx = call.topk_idx.data_ptr()
        a.topk_weights = _address(call.topk_weights)
        a.send_row = self.send_row.data_ptr()
        a.rank_counts = self.rank_counts.data_ptr()
        a.expert_counts = self.counts.data_ptr()
        a.num_tokens, a.hidden = call.x.shape
        a.scale_bytes = 4 * call.scale_words
        a.capacity = -1 if call.capacity is None else call.capacity
        if call.row_index and not call.sync:
            a.index_capacity = worst_grouped_rows(self.backend.spec, call)
        a.given_capacity = -1 if call.given_capacity is None else call.given_capacity
        a.rank_ends = _address(self.rank_ends)
        a.num_topk = call.num_topk
        a.alignment = call.alignment
        a.scale_block = call.scale_block
        a.layout = _LAYOUTS[call.layout]
        a.dtype = _DTYPES[call.x.dtype]
        a.quantize = _QUANTIZE[call.quantize]
        a.with_weights = call.topk_weights is not None
        a.is_static = not call.sync
        a.cached = call.handle is not None
        a.routing = call.meta.routing_number if call.meta is not None else 0
        return a

    def run(self) -> Received:
        comm, late = self.backend.comm, self.backend.late("dispatch", self.call.tag)
        return self.received(comm.dispatch(self.args, late))

    def begin(self) -> _Begun:
        if self.call.layout == "slab":
            self._promise()
        pending = self.backend.comm.begin_dispatch(self.args)
        self.backend.keep(pending, self)
        return _Begun(pending, lambda: self.received(pending.dispatched), self.promised)

    def _promise(self) -> None:
        """Make the outputs of a slab, whose shapes do not depend on what arrives."""
        spec, call, backend = self.backend.spec, self.call, self.backend
        assert call.capacity is not None
        shape = (spec.num_local_experts, call.capacity, spec.hidden)
        if math.prod(shape) == 0 or call.output == "torch" or backend.crowded():
            return  # x is made, or copied out, when the rows are there
        try:
            x = backend.empty(shape, call.wire_dtype)
        except EPError:
            return  # the operation will find that, too, and tell the peers
        self.args.x_offset = backend.offset_in_arena(x)
        out = self._slab_outputs(call.capacity)
        self.promised = Promised(
            x=x,
            topk_idx=out.get("topk_idx"),
            topk_weights=out.get("topk_weights"),
            scales=out.get("scales"),
            num_tokens_per_expert=self.counts,
            origins=self._origins(out),
        )
        self._promised_out = out

    def keep_promise(self, outcome: _core.Outcome) -> None:
        """A late peer may still write to the rows of a communicator that failed."""
        if self.promised is None or outcome.code == 0:
            return
        if self.backend.error(outcome, "dispatch", self.call.tag).scope == "comm":
            self.backend.abandon(self.promised.x)

    def received(self, result: _core.Dispatched) -> Received:
        """Unpack what arrived, or raise; a failure that a static call keeps becomes its status."""
        outcome = result.outcome
        if outcome.code != 0:
            self.keep_promise(outcome)
            error = self.backend.error(outcome, "dispatch", self.call.tag)
            if self.call.sync or outcome.code not in _DEFERRABLE or outcome.reason:
                raise error
            return self._failed(error)
        arrival = _Arrival(result.num_recv, result.num_rows, result.seq)
        x = self._take_x(result)
        out = self._outputs(arrival)
        if not self.backend.comm.unpack(result, self.args, self._unpack_args(arrival, out)):
            facts = {"rank": self.backend.spec.rank, "op": "dispatch", "seq": result.seq}
            if self.call.handle is not None:  # then the rows are ours, not a peer's
                what = "rejected handle: damaged, a row of recv_row does not exist"
                raise make_error("E320", what, tag=self.call.tag, **facts)
            what = "refused metadata of a peer: an expert or row that does not exist"
            raise make_error("E240", what, tag=self.call.tag, **facts)
        result.drop()  # from here on the extents belong to the tensors
        if self.promised is None and self.backend.wants_copy(self.call.output):
            x = x.clone()
        return self._assemble(arrival, x, out, status=0)

    def _take_x(self, result: _core.Dispatched) -> Tensor:
        spec, call = self.backend.spec, self.call
        if self.promised is not None:
            return self.promised.x
        shape: tuple[int, ...] = (result.num_rows, spec.hidden)
        if call.layout == "slab":
            shape = (spec.num_local_experts, *shape)
        num_bytes = call.wire_dtype.itemsize * math.prod(shape)
        if num_bytes == 0:
            return torch.empty(shape, dtype=call.wire_dtype)
        flat: Tensor = torch.from_dlpack(self.backend.comm.x_array(result, num_bytes))
        return flat.view(call.wire_dtype).view(shape)

    def _max_recv(self, num_recv: int) -> int:
        """Rows of the tensors that have one per unique token."""
        spec, call = self.backend.spec, self.call
        if call.sync:
            return num_recv
        worst = spec.num_ranks * spec.max_tokens
        if call.layout != "compact" or call.capacity is None:
            return worst
        return min(worst, call.capacity)

    def _outputs(self, arrival: _Arrival) -> dict[str, Tensor]:
        """Tensors for everything but x, by the names of UnpackArgs."""
        call, topk = self.call, self.call.num_topk
        rows, local = arrival.num_rows, self.backend.spec.num_local_experts
        if self.promised is not None:
            out = dict(self._promised_out)
        elif call.layout == "slab":
            out = self._slab_outputs(rows)
        else:
            out = self._row_outputs((rows, topk) if call.layout == "compact" else (rows,))
            if call.scale_dtype is not None:
                out["scales"] = torch.zeros((rows, call.scale_words), dtype=call.scale_dtype)
        if call.handle is None:
            max_recv = self._max_recv(arrival.num_recv)
            with_rows = max_recv if call.layout != "compact" else 0
            out["recv_src"] = torch.empty((max_recv, 2), dtype=torch.int32)
            out["recv_row"] = torch.empty((with_rows, topk), dtype=torch.int32)
        else:
            out["recv_src"], out["recv_row"] = call.handle.recv_src, call.handle.recv_row
        if call.layout == "grouped" or call.row_index:
            out["offsets"] = torch.empty(local + 1, dtype=torch.int32)
        if call.row_index:
            total = self.args.index_capacity
            if total < 0:
                counts = self.counts.to(torch.int64)
                total = int((-(-counts // call.alignment) * call.alignment).sum())
            out["row_index"] = torch.empty(total, dtype=torch.int32)
        return out

    def _slab_outputs(self, capacity: int) -> dict[str, Tensor]:
        call, local = self.call, self.backend.spec.num_local_experts
        out = self._row_outputs((local, capacity))
        if call.scale_dtype is not None:  # column-major, columns of a multiple of four words
            columns = (local, call.scale_words, -(-capacity // 4) * 4)
            padded = torch.zeros(columns, dtype=call.scale_dtype)
            out["scales"] = padded.transpose(1, 2)[:, :capacity]
        return out

    def _row_outputs(self, per_row: tuple[int, ...]) -> dict[str, Tensor]:
        """What there is of every row, whatever the layout."""
        spec, call = self.backend.spec, self.call
        out: dict[str, Tensor] = {}
        if call.handle is None:
            out["topk_idx"] = torch.empty(per_row, dtype=call.idx_dtype)
        if call.topk_weights is not None:
            out["topk_weights"] = torch.empty(per_row, dtype=torch.float32)
        if call.origins:
            rows = per_row[:1] if call.layout == "compact" else per_row
            out["row_token"] = torch.empty(rows, dtype=torch.int32)
            if call.layout != "compact":
                ranges = (spec.num_local_experts, spec.num_ranks)
                out["source_range"] = torch.empty(ranges, dtype=torch.int64)
        return out

    def _unpack_args(self, arrival: _Arrival, out: dict[str, Tensor]) -> _core.UnpackArgs:
        u = _core.UnpackArgs()
        for name, tensor in out.items():
            setattr(u, name, tensor.data_ptr())
        u.max_recv = out["recv_src"].shape[0]
        u.max_rows = arrival.num_rows
        u.max_index = out["row_index"].shape[0] if "row_index" in out else 0
        u.row_alignment = self.call.alignment
        u.idx_is_int64 = self.call.idx_dtype == torch.int64
        return u

    def _assemble(
        self, arrival: _Arrival, x: Tensor, out: dict[str, Tensor], status: int
    ) -> Received:
        call, num_recv = self.call, arrival.num_recv
        return Received(
            x=x,
            topk_idx=out.get("topk_idx"),
            topk_weights=out.get("topk_weights"),
            scales=out.get("scales"),
            num_tokens_per_expert=self.counts,
            num_recv=num_recv if call.sync else torch.tensor([num_recv], dtype=torch.int32),
            offsets=out.get("offsets"),
            row_index=out.get("row_index"),
            status=torch.full((1,), status, dtype=torch.int32),
            handle=self._handle(arrival, out),
            layout=call.layout,
            origins=self._origins(out),
        )

    def _origins(self, out: dict[str, Tensor]) -> Origins | None:
        if not self.call.origins:
            return None
        return Origins(self.rank_ends, out["row_token"], out.get("source_range"))

    def _handle(self, arrival: _Arrival, out: dict[str, Tensor]) -> Handle:
        spec, call = self.backend.spec, self.call
        if call.handle is not None and call.meta is not None:
            if call.topk_weights is None:
                return call.handle
            meta = replace(call.meta, has_weights=True)
            return call.handle._replace(meta=meta.pack(), topk_weights=call.topk_weights)
        meta = HandleMeta(
            generation=self.backend.generation,
            routing_number=arrival.seq,
            layout=call.layout,
            alignment=call.alignment,
            num_tokens=call.x.shape[0],
            num_unique=out["recv_src"].shape[0],
            num_rows=arrival.num_rows,
            num_topk=call.num_topk,
            capacity=-1 if call.given_capacity is None else call.given_capacity,
            sync=call.sync,
            has_weights=call.topk_weights is not None,
            num_ranks=spec.num_ranks,
            num_experts=spec.num_experts,
            num_local_experts=spec.num_local_experts,
            hidden=spec.hidden,
        )
        weights = call.topk_weights
        if weights is None:
            weights = torch.empty((0, call.num_topk), dtype=torch.float32)
        return Handle(
            meta=meta.pack(),
            topk_idx=call.topk_idx,
            topk_weights=weights,
            send_row=self.send_row,
            recv_src=out["recv_src"],
            recv_row=out["recv_row"],
            rank_counts=self.rank_counts,
            num_tokens_per_expert=self.counts,
        )

    def _failed(self, error: EPError) -> Received:
        """A static call's result when it failed: its shapes, nothing in them, and the code."""
        call, spec = self.call, self.backend.spec
        assert call.capacity is not None
        arrival = _Arrival(num_recv=0, num_rows=call.capacity, seq=error.seq or 0)
        slabs = (spec.num_local_experts,) if call.layout == "slab" else ()
        if self.promised is None:
            x = torch.zeros((*slabs, call.capacity, spec.hidden), dtype=call.wire_dtype)
        else:
            x = self.promised.x
        out = self._outputs(arrival)
        fresh = dict(out)
        if call.handle is None:
            self.counts.zero_()
            self.rank_counts.zero_()
            if self.rank_ends is not None:
                self.rank_ends.zero_()
            self.send_row.fill_(-1)
        else:  # these are the caller's
            self.counts = torch.zeros_like(self.counts)
            del fresh["recv_src"], fresh["recv_row"]
        for name, tensor in fresh.items():
            tensor.fill_(0 if name in ("topk_weights", "scales", "offsets", "source_range") else -1)
        self.backend.defer(self, error)
        return self._assemble(arrival, x, out, status=int(error.code[1:]))


class _Combine:
    """One combine: its arguments as the core wants them, then the result."""

    def __init__(self, backend: CpuBackend, call: CombineCall) -> None:
        self.backend, self.call = backend, call
        meta, handle = call.meta, call.handle
        shape = (meta.num_tokens, backend.spec.hidden)
        self.out = backend.warm(shape, call.x.dtype) if call.out is None else call.out
        self.out_weights = None
        if call.topk_weights is not None:
            self.out_weights = torch.empty((meta.num_tokens, meta.num_topk), dtype=torch.float32)
        a = _core.CombineArgs()
        a.x = call.x.data_ptr()
        a.y_weights = _address(call.topk_weights)
        a.topk_idx = handle.topk_idx.data_ptr()
        a.topk_weights = handle.topk_weights.data_ptr() if call.weighted else 0
        a.send_row = handle.send_row.data_ptr()
        a.rank_counts = handle.rank_counts.data_ptr()
        a.recv_src = handle.recv_src.data_ptr()
        a.recv_row = handle.recv_row.data_ptr()
        a.bias0, a.bias1 = _address(call.bias[0]), _address(call.bias[1])
        a.out, a.out_weights = self.out.data_ptr(), _address(self.out_weights)
        slabs = backend.spec.num_local_experts if meta.layout == "slab" else 1
        a.num_tokens, a.hidden, a.num_topk = meta.num_tokens, meta.hidden, meta.num_topk
        a.num_recv, a.num_rows = meta.num_unique, meta.num_rows * slabs
        a.arena_offset = backend.offset_in_arena(call.x) if call.x.numel() > 0 else -1
        a.layout = _LAYOUTS[meta.layout]
        a.dtype = _DTYPES[call.x.dtype]
        a.weighted = call.weighted
        a.with_weights = call.topk_weights is not None
        a.sum_weights = call.sum_weights
        a.topk_order = call.order == "topk"
        a.routing = meta.routing_number
        self.args = a

    def run(self) -> Combined:
        comm, late = self.backend.comm, self.backend.late("combine", self.call.tag)
        return self.combined(comm.combine(self.args, late))

    def begin(self) -> _Begun:
        pending = self.backend.comm.begin_combine(self.args)
        self.backend.keep(pending, self)
        return _Begun(pending, lambda: self.combined(pending.combined))

    def combined(self, outcome: _core.Outcome) -> Combined:
        if outcome.code != 0:
            raise self.backend.error(outcome, "combine", self.call.tag)
        return self.out if self.out_weights is None else (self.out, self.out_weights)


# ---- construction ----


class Memory:
    """This rank's segments and its view of everybody else's."""

    def __init__(
        self, rank: int, control: _core.Segment, own_arena: _core.Segment, mesh: Mesh
    ) -> None:
        self.rank, self.control, self.own_arena, self.mesh = rank, control, own_arena, mesh
        self.arena = _core.Arena(own_arena)
        self.peers: dict[int, tuple[_core.Segment, _core.Segment]] = {rank: (control, own_arena)}
        self.key: tuple[bytes, int] | None = None

    def views(self) -> list[tuple[_core.Segment, _core.Segment, int, int, int]]:
        """(control, arena, pidfd, socket, pid) of each rank, as the core takes them.

        No pidfd, no socket: -1; a process that is not visible: pid 0.
        """
        mesh, ranks = self.mesh, range(len(self.peers))
        sockets = {r: sock.fileno() for r, sock in mesh.sockets.items()}
        return [
            (*self.peers[r], mesh.pidfds.get(r, -1), sockets.get(r, -1), mesh.pids.get(r, 0))
            for r in ranks
        ]

    def publish_in_process(self, token: bytes) -> None:
        """Let ranks that are threads of this process find our memory."""
        self.key = (token, self.rank)
        with _in_process_lock:
            _in_process[self.key] = (self.control, self.own_arena)

    def close(self) -> None:
        """Descriptors only; memory lives as long as a tensor in it."""
        self.mesh.close()
        if self.key is not None:
            with _in_process_lock:
                _in_process.pop(self.key, None)


def connect(
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    shape: _core.Shape,
    arena_bytes: int,
) -> Memory:
    """Create our memory, give it to every peer, map theirs.

    Args:
        listener, exchange: of this construction; `hellos` has been agreed on.
        shape: decides the size of the control block.
        arena_bytes: of our own arena; ranks may differ.
    Raises:
        EPMemoryError: E232. EPEnvironmentError: E405, E406. EPTimeout: E120. EPPeerDied: E110.

    Collective: all ranks succeed, or all raise and keep nothing.
    """
    me = group.rank
    token = group_token(hellos)
    mesh = Mesh()
    memory: Memory | None = None
    try:
        failure: EPError | None = None
        try:
            mesh = listener.connect_all(me, hellos, token, exchange)
            memory = _create(me, mesh, shape, arena_bytes)
            memory.publish_in_process(token)
        except EPError as error:
            failure = error
        _agree(exchange, "created", me, failure)
        assert memory is not None
        try:
            _share(memory, hellos, token, shape)
        except EPError as error:
            failure = error
        except OSError as error:
            failure = _broken_share(me, mesh, error)
        _agree(exchange, "mapped", me, failure)
    except BaseException:
        mesh.close()
        if memory is not None:
            memory.close()
        raise
    memory.control.close_fd()
    return memory


def _broken_share(me: int, mesh: Mesh, error: OSError) -> EPError:
    dead = mesh.dead_rank()
    if dead is not None:
        return died_early(me, dead)
    return make_error("E405", f"cannot share memory: {error}, needs descriptor passing", rank=me)


def _create(me: int, mesh: Mesh, shape: _core.Shape, arena_bytes: int) -> Memory:
    try:
        control = _core.Segment.create("ep_comm_control", _core.ControlLayout(shape).end)
        arena = _core.Segment.create("ep_comm_arena", arena_bytes)
    except _core.SystemCallError as error:
        number, call = error.args
        what = f"is out of memory: {call} of {arena_bytes} B: {os.strerror(number)}"
        raise make_error("E232", what, rank=me) from error
    return Memory(me, control, arena, mesh)


def _share(memory: Memory, hellos: Sequence[Hello], token: bytes, shape: _core.Shape) -> None:
    me, mesh = memory.rank, memory.mesh
    control_bytes = _core.ControlLayout(shape).end
    for sock in mesh.sockets.values():
        send_fds(
            sock,
            [memory.control.fd, memory.own_arena.fd],
            [control_bytes, memory.own_arena.bytes],
            30.0,
        )
    for peer in hellos:
        if peer.rank == me:
            continue
        if peer.rank not in mesh.sockets:
            with _in_process_lock:
                memory.peers[peer.rank] = _in_process[(token, peer.rank)]
            continue
        fds, sizes = receive_fds(mesh.sockets[peer.rank], 2, 30.0)
        try:
            if sizes[0] != control_bytes:
                raise make_error(
                    "E406",
                    f"rejected bootstrap of rank {peer.rank}: control block of {sizes[0]} B",
                    rank=me,
                )
            memory.peers[peer.rank] = (
                _core.Segment.map(fds[0], sizes[0]),
                _core.Segment.map(fds[1], sizes[1]),
            )
        except _core.SystemCallError as error:
            number, call = error.args
            what = f"cannot share memory: {call} {os.strerror(number)}, needs address space"
            raise make_error("E405", what, rank=me, peer=peer.rank) from error
        finally:
            for fd in fds:
                os.close(fd)


def _agree(exchange: Exchange, step: str, me: int, failure: EPError | None) -> None:
    """Every rank learns whether every rank succeeded.

    A rank that failed raises its own error, the others that of the lowest rank that failed.
    """
    text = "" if failure is None else f"{failure.code} {failure.what}"
    answers = exchange.gather(step, text.encode()[:300])
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if answer:
            code, _, what = answer.decode(errors="replace").partition(" ")
            code = code if code in ("E110", "E120", "E232", "E405", "E406", "E407") else "E406"
            raise make_error(code, f"cannot construct: rank {rank} {what}", rank=me, peer=rank)


__all__ = ["CpuBackend", "Memory", "connect", "default_arena_bytes"]
