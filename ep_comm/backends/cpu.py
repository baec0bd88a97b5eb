"""The cpu backend: ranks of one host share memory; the work is done in csrc/cpu.

Only this file and its GPU sibling take addresses of tensors. Outputs lie in the arena, a sealed
memfd that every rank has mapped: peers write rows straight into the tensor the caller gets.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls, mapping
from ep_comm.backends.base import Combined, Plans
from ep_comm.backends.calls import Arrival
from ep_comm.bootstrap import Exchange, Group, Hello, Listener
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.masks import Unmasking, needs_all, ranks_in
from ep_comm.received import Promised, Received
from ep_comm.verdict import PeerState, error_of

_log = logging.getLogger("ep_comm")

# Failures a static call finds after it began: shown as its status, raised later.
_DEFERRABLE: Final = (213, 230, 231)

Memory = mapping.Mapped[_core.Segment]


def default_arena_bytes() -> int:
    """As much as the machine has: pages that nobody touches cost nothing."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class CpuBackend:
    """One rank of a buffer over shared memory. Collective to construct; see `connect`."""

    name = "cpu"
    plans: Plans | None = None
    fills = frozenset({"recv_stats", "wait_stats"})

    def __init__(
        self,
        spec: BufferSpec,
        generation: int,
        config: EPConfig,
        memory: Memory,
        exchange: Exchange,
        shape: _core.Shape,
    ) -> None:
        self.spec = spec
        self.generation = generation
        self.paranoid = config.paranoid
        self._memory = memory
        self._arena = _core.Arena(memory.own.arena)
        self._most_in_use = calls.WATERMARK * memory.own.arena.bytes
        self._deferred: EPError | None = None
        self._copies_out = 0
        self._lost: list[Tensor] = []
        self._in_flight: list[tuple[_core.Pending, Any]] = []
        mesh, ranks = memory.mesh, range(spec.num_ranks)
        self._peer_pids = [mesh.pids.get(r, 0) for r in ranks]
        sockets = {r: sock.fileno() for r, sock in mesh.sockets.items()}
        peers = [  # no pidfd, no socket: -1; a process that is not visible: pid 0
            (*memory.peers[r], mesh.pidfds.get(r, -1), sockets.get(r, -1), self._peer_pids[r])
            for r in ranks
        ]
        arrival = -1.0 if config.arrival_s is None else config.arrival_s
        self.comm = _core.CpuCommunicator(
            shape, spec.rank, generation, list(spec.owner), peers, self._arena,
            (config.arrival_warn_s, arrival, config.progress_s), config.masking,
        )  # fmt: skip
        self.masking = config.masking
        self._unmasking = Unmasking(exchange, config.arrival_s)

    # ---- operations ----

    def prepare_dispatch(self, call: DispatchCall) -> _Dispatch:
        work = _Dispatch(self, call)
        self._check_masks(_core.dispatch_can_lack_ranks(work.args))
        return work

    def prepare_combine(self, call: CombineCall) -> _Combine:
        work = _Combine(self, call)
        self._check_masks(_core.combine_can_lack_ranks(work.args))
        return work

    def _check_masks(self, can_lack: bool) -> None:
        """E311 for a call that cannot go on without a rank, while one is masked."""
        if self.masking and not can_lack and (masked := self.comm.masked()):
            raise needs_all(masked, self.spec.rank)

    def masked_ranks(self) -> tuple[int, ...]:
        return ranks_in(self.comm.masked())

    def mask(self, rank: int) -> None:
        self.comm.mask(rank)

    def unmask(self) -> None:
        """What is begun is finished first."""
        self._unmasking.run(self.comm, self._finish_begun)

    def _finish_begun(self) -> None:
        self.comm.drain()
        outcome = self.comm.verdict()
        if outcome.code != 0:
            raise self.error(outcome, "unmask", "")

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

    def known_failure(self) -> EPError | None:
        error, self._deferred = self._deferred, None
        return error

    def refuse(self, op: str, error: EPError) -> None:
        kind = _core.OpKind.DISPATCH if op == "dispatch" else _core.OpKind.COMBINE
        reason = error.what.encode()[: _core.REASON_BYTES - 1].decode(errors="ignore")
        self.comm.refuse(kind, _core.Outcome(int(error.code[1:]), reason))

    def raise_fault(self, error: RuntimeError) -> None:
        """Nothing: there is no context."""

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
        if not shape:
            return self.empty((1,), dtype).view(())
        num_bytes = dtype.itemsize * math.prod(shape)
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        capsule = self._arena.array(calls.byte_shape(shape, dtype))
        if capsule is None:
            free = self._arena.stats()["largest_free"]
            what = f"is out of arena memory: need {num_bytes} B in one piece, free {free} B"
            raise make_error("E231", what, rank=self.spec.rank)
        array: Tensor = torch.from_dlpack(capsule)
        return array.view(dtype)

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
        return self._arena.in_use > self._most_in_use

    def wants_copy(self, output: str) -> bool:
        """Whether an output should leave the arena at once."""
        if output != "auto":
            return output == "torch"
        crowded = self.crowded()
        self._copies_out += crowded
        return crowded

    def stats(self) -> dict[str, Any]:
        return {
            "arena": dict(self._arena.stats(), committed=self._memory.own.arena.committed_bytes()),
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


class _Dispatch(calls.Dispatch):
    """One dispatch: run by this thread or begun on the communication thread."""

    promised: Promised | None = None  # outputs made before the operation began
    _promised_out: dict[str, Tensor]

    def __init__(self, backend: CpuBackend, call: DispatchCall) -> None:
        super().__init__(backend.spec, call)
        if backend.paranoid:
            self.args.paranoid = True
        self.backend = backend
        self.reported = False  # a failure of this static call has been remembered

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
        arrival = Arrival(result.num_recv, result.num_rows, result.seq)
        if result.has_lost and self.promised is not None:
            self.backend.abandon(self.promised.x)  # a masked rank that lives may still write there
        x = self._take_x(result)
        out = self._outputs(arrival)
        if not self.backend.comm.unpack(result, self.args, self._unpack_args(arrival, out)):
            facts = {"rank": self.backend.spec.rank, "op": "dispatch", "seq": result.seq}
            if self.call.handle is not None:  # then the rows are ours, not a peer's
                what = "rejected handle: damaged, a row of recv_row does not exist"
                raise make_error("E320", what, tag=self.call.tag, **facts)
            peer = self.backend.comm.verdict().peer
            what = f"refused metadata of rank {peer}: an expert or row that does not exist"
            raise make_error("E240", what, peer=peer, tag=self.call.tag, **facts)
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
        dtype = call.wire_dtype
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        capsule = self.backend.comm.x_array(result, calls.byte_shape(shape, dtype))
        array: Tensor = torch.from_dlpack(capsule)
        return array.view(dtype)

    def _outputs(self, arrival: Arrival) -> dict[str, Tensor]:
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
            max_recv = calls.max_recv(self.spec, self.call, arrival.num_recv)
            with_rows = max_recv if call.layout != "compact" else 0
            out["recv_src"] = self.send_row.new_empty(max_recv, 2)
            out["recv_row"] = self.send_row.new_empty(with_rows, topk)
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
            out["topk_idx"] = self.send_row.new_empty(*per_row, dtype=call.idx_dtype)
        if call.topk_weights is not None:
            out["topk_weights"] = self.send_row.new_empty(*per_row, dtype=torch.float32)
        if call.origins:
            rows = per_row[:1] if call.layout == "compact" else per_row
            out["row_token"] = self.send_row.new_empty(*rows)
            if call.layout != "compact":
                local, ranks = spec.num_local_experts, spec.num_ranks
                out["source_range"] = self.rank_counts.new_empty(local, ranks)
        return out

    def _assemble(
        self, arrival: Arrival, x: Tensor, out: dict[str, Tensor], status: int
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
            handle=self._handle(self.backend.generation, arrival, out),
            layout=call.layout,
            origins=self._origins(out),
        )

    def _failed(self, error: EPError) -> Received:
        """A static call's result when it failed: its shapes, nothing in them, and the code."""
        call, spec = self.call, self.backend.spec
        assert call.capacity is not None
        arrival = Arrival(num_recv=0, num_rows=call.capacity, seq=error.seq or 0)
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


class _Combine(calls.Combine):
    """One combine: run by this thread or begun on the communication thread."""

    def __init__(self, backend: CpuBackend, call: CombineCall) -> None:
        self.backend = backend
        out = call.out
        if out is None:
            out = backend.warm((call.meta.num_tokens, backend.spec.hidden), call.x.dtype)
        offset = backend.offset_in_arena(call.x) if call.x.numel() > 0 else -1
        super().__init__(backend.spec, call, out, offset)

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
        return self.result()


# ---- construction ----


def _explain(error: Exception) -> tuple[str, str]:
    number, call = error.args
    return call, os.strerror(number)


_SEGMENTS: Final = mapping.Kind(
    _core.Segment.create, _core.Segment.map, _core.SystemCallError, _explain, "address space"
)


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
) -> CpuBackend:
    """A backend that is ready on every rank.

    Raises:
        EPMemoryError: E232. EPEnvironmentError: E405, E406. EPTimeout: E120. EPPeerDied: E110.

    Collective: all ranks succeed, or all raise and keep nothing.
    """
    control_bytes = _core.ControlLayout(shape).end
    size = default_arena_bytes() if arena_bytes is None else arena_bytes
    made: list[CpuBackend] = []

    def use(memory: Memory) -> None:
        memory.own.control.close_fd()
        made.append(CpuBackend(spec, generation, config, memory, exchange, shape))

    try:
        mapping.connect(_SEGMENTS, group, hellos, listener, exchange, control_bytes, size, use)
    except BaseException:
        for backend in made:
            backend.close()
        raise
    return made[0]


__all__ = ["CpuBackend", "default_arena_bytes", "open_backend"]
