"""The nvlink backend: GPUs that map each other's memory; the work is done in csrc/kernels.

Outputs lie in the arena, GPU memory that every rank has mapped: peers push rows straight into
the tensor the caller gets. Everything is queued on the current stream, begun operations on one of
the buffer's own. A call with `sync=True` waits for its sizes while the rows travel; `sync=False`
and `combine` never touch the host: what goes wrong in them is raised by the next call that looks.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls, mapping
from ep_comm.backends.nvlink_calls import Combine, Dispatch, Outstanding
from ep_comm.backends.nvlink_memory import Lease, Memory, kind_of_memory, refusal
from ep_comm.backends.nvlink_plans import Plans
from ep_comm.backends.nvlink_results import ArenaReceived, Outputs, as_dtype
from ep_comm.bootstrap import Exchange, Group, Hello, Listener
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall, overlap, rejected
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.masks import Unmasking, needs_all, ranks_in
from ep_comm.verdict import PeerState, error_of

_log = logging.getLogger("ep_comm")

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
    fills = frozenset({"recv_stats", "wait_stats"})
    outputs_type: type[Outputs] = Outputs
    # A row that is quantized on the way lies whole in the shared memory of an SM, with its scales.
    max_quantized_bytes = 192 << 10

    def __init__(
        self,
        spec: BufferSpec,
        generation: int,
        config: EPConfig,
        memory: Memory,
        exchange: Exchange,
        shape: _core.Shape,
        num_sms: int | None,
        ranks_on_device: int,
        *,
        rails: _core.RailSetup | None = None,
        arena_sizes: Sequence[int] = (),
    ) -> None:
        """`arena_sizes`: of all ranks, where some stand on other nodes."""
        self.spec = spec
        self.generation = generation
        self.num_sms = num_sms
        self.num_warps = self.num_stages = 0  # of a block; 0 = computed, bench/tune.py tries others
        self._memory = memory
        self.arena = _core.DeviceArena(memory.own.arena)
        self._copies_out = 0
        # By address, streams of calls whose failure nobody has looked for.
        self._unseen: dict[int, torch.cuda.Stream] = {}
        # Streams of one device share few hardware queues; ours goes first when SMs are short.
        self.aside: Any = torch.cuda.Stream(spec.device, priority=-1)  # type: ignore[no-untyped-call]
        self.masking = config.masking
        # Nobody sees the end of a rank on another node.
        self._unmasking = Unmasking(exchange, config.arrival_s, sees_all=rails is None)
        self.unfinished: list[Dispatch] = []  # begun, their sizes not read
        self.halves = Outstanding()
        self.plans = Plans(self)
        self._in_flight: list[tuple[Any, object]] = []  # (event, begun operation)
        mesh, ranks = memory.mesh, range(spec.num_ranks)
        self._peer_pids = [mesh.pids.get(r, 0) for r in ranks]
        sockets = {r: sock.fileno() for r, sock in mesh.sockets.items()}
        sizes = arena_sizes or [0] * spec.num_ranks
        peers = [  # no pidfd, no socket: -1; a process that is not visible: pid 0
            (*memory.peers.get(r, (None, None)), mesh.pidfds.get(r, -1), sockets.get(r, -1),
             self._peer_pids[r], sizes[r])
            for r in ranks
        ]  # fmt: skip
        arrival = -1.0 if config.arrival_s is None else config.arrival_s
        sms = torch.cuda.get_device_properties(spec.device).multi_processor_count
        if ranks_on_device > 1:  # their kernels wait for each other, two operations of each at once
            sms = max(sms // (2 * ranks_on_device), 1)
        self.rank = _core.DeviceRank(
            shape, spec.rank, generation, list(spec.owner), peers, self.arena,
            (config.arrival_warn_s, arrival, config.progress_s), sms,
            _warning(spec.rank), rails, self.masking,
        )  # fmt: skip
        self._lease = Lease(memory, exchange, config.arrival_s, self.rank.pause_watch)
        _load_conversions(spec.device)

    # ---- operations ----

    def prepare_dispatch(self, call: DispatchCall) -> Dispatch:
        work = Dispatch(self, call)
        self.check_masks(self.rank.stages_dispatch(work.args))
        return work

    def prepare_combine(self, call: CombineCall) -> Combine:
        self.check_out(call)
        work = Combine(self, call)
        self.check_masks(self.rank.stages_combine(work.args))
        return work

    # ---- masks ----

    def check_out(self, call: CombineCall) -> None:
        """E202 for sums in the memory of their bias: they start again when a rank is lost."""
        out = call.out if self.masking else None
        if out is not None and any(b is not None and overlap(out, b) for b in call.bias):
            want = "memory of its own where ranks may be masked"
            raise rejected("E202", "out", "memory of bias", want)

    def check_masks(self, is_small: bool) -> None:
        """E311 for a call that cannot go on without a rank, while one is masked."""
        if self.may_repeat(is_small) or not (masked := self.rank.masked_and_seq()[0]):
            return
        raise needs_all(masked, self.spec.rank)

    def may_repeat(self, is_small: bool) -> bool:
        """Whether a call may be made again without asking who is masked."""
        return is_small or not self.masking

    def masked_ranks(self) -> tuple[int, ...]:
        return ranks_in(self.rank.masked())

    def mask(self, rank: int) -> None:
        self.check_usable()
        self.rank.mask(rank)

    def unmask(self) -> None:
        """What is begun is finished first."""
        self.check_usable()
        self._unmasking.run(self.rank, self._finish_begun)
        self.check_usable()

    def _finish_begun(self) -> None:
        self.halves.make_room(self.seq())
        while self.unfinished:
            self.unfinished[0].settle()
        torch.cuda.synchronize(self.spec.device)
        self.check_usable()

    # ---- order ----

    def stream(self) -> int:
        """Address of the current stream."""
        return int(torch.cuda.current_stream(self.spec.device).cuda_stream)

    def enter(self) -> None:
        """Before an operation."""
        self.make_room()
        self.check_usable()

    def check_usable(self) -> None:
        """After a failure, and without an arena, nothing works."""
        if self.rank.failed():
            raise self.error(self.rank.verdict(), "")
        if self._lease.released:
            what = "has no arena: it was given back, want resume() first"
            raise make_error("E310", what, rank=self.spec.rank)

    def is_released(self) -> bool:
        return self._lease.released

    def make_room(self) -> None:
        """The report of what is begun is read before a later one takes its place, and its slot is
        left before a later one needs it."""
        self.forget_finished()
        following = self.seq() + 1
        self.halves.make_room(following - self.spec.num_slots)
        while self.unfinished and self.unfinished[0].number + _core.MAX_REPORTS <= following:
            self.unfinished[0].settle()

    @contextlib.contextmanager
    def on_own_stream(self, work: object) -> Iterator[None]:
        """Queue behind what the caller has queued; `work` and its tensors live until it is over."""
        self.aside.wait_stream(torch.cuda.current_stream(self.spec.device))
        with torch.cuda.stream(self.aside):
            yield
            if not _core.is_capturing(self.stream()):
                self._in_flight.append((self.aside.record_event(), work))

    def forget_finished(self) -> None:
        """Let go of begun operations that are over, and so of arena memory that only they hold."""
        if self._in_flight:
            with _core.BesideCaptures():
                self._in_flight = [(e, w) for e, w in self._in_flight if not e.query()]

    def when_over(self) -> Callable[[], bool]:
        """Asks whether what is queued on our stream by now is over."""
        if _core.is_capturing(self.stream()):
            return lambda: False
        event = self.aside.record_event()

        def is_over() -> bool:
            with _core.BesideCaptures():
                return bool(event.query())

        return is_over

    def is_over(self, work: Dispatch) -> None:
        """The sizes of a begun dispatch have been read."""
        self.unfinished.remove(work)
        self._in_flight.append((self.aside.record_event(), work))

    def will_look(self) -> None:
        """A call has begun on the current stream whose failure is raised later."""
        self.will_look_at(self.stream())

    def will_look_at(self, address: int) -> None:
        """The same; `address` is that of the current stream."""
        if address not in self._unseen:
            self._unseen[address] = torch.cuda.current_stream(self.spec.device)

    def take_deferred(self) -> EPError | None:
        """Waits for static calls and combines queued since the last look, and for what is begun."""
        while self.unfinished:
            self.unfinished[0].settle()
        while self._unseen:
            self._join(self._unseen.popitem()[1])
        return self.known_failure()

    def known_failure(self) -> EPError | None:
        outcome = self.rank.take_deferred()
        return None if outcome is None else self.error(outcome, "")

    def _join(self, stream: torch.cuda.Stream) -> None:
        """Wait for a stream so that signals are seen; one that raises ends the communicator."""
        event = stream.record_event()
        try:
            with _core.BesideCaptures():
                while not event.query():
                    time.sleep(50e-6)
        except BaseException:
            self.rank.interrupt()
            raise

    def raise_fault(self, error: RuntimeError) -> None:
        """Raise E112, our own failure, when CUDA refused a call because our context is broken."""
        if self.rank.fault() == 0:
            return
        why = str(error).partition("\n")[0]
        what = f"lost its CUDA context: {why}"
        raise make_error("E112", what, rank=self.spec.rank, peer=self.spec.rank) from error

    def refuse(self, op: str, error: EPError) -> None:
        kind = _core.OpKind.DISPATCH if op == "dispatch" else _core.OpKind.COMBINE
        reason = error.what.encode()[: _core.REASON_BYTES - 1].decode(errors="ignore")
        self.make_room()
        self.rank.refuse(kind, _core.Outcome(int(error.code[1:]), reason), self.stream())

    def error(self, outcome: _core.Outcome, tag: str) -> EPError:
        op = "combine" if outcome.op == _core.OpKind.COMBINE else "dispatch"
        return error_of(outcome, op=op, tag=tag, peer=self.peer_state(outcome.peer))

    def peer_state(self, peer: int) -> PeerState:
        return PeerState(self._peer_pids[peer] if 0 <= peer < len(self._peer_pids) else 0)

    def seq(self) -> int:
        return int(self.rank.seq())

    def blocks(self, num_sms: int | None) -> int:
        """SMs of a call: its own number, the buffer's, or 0 = computed."""
        return num_sms or self.num_sms or 0

    # ---- memory ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Arena memory, uninitialized; E231 when no free piece is long enough.

        After a failure the error that ended the communicator: late peers may still write there.
        """
        self.check_usable()
        self.forget_finished()
        num_bytes = dtype.itemsize * math.prod(shape)
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.spec.device)
        hold = self.arena.grant(num_bytes, self.stream())
        if hold is None:
            free = self.arena.stats()["largest_free"]
            what = f"is out of arena memory: need {num_bytes} B in one piece, free {free} B"
            raise make_error("E231", what, rank=self.spec.rank)
        arena = self.arena
        return as_dtype(lambda s, type_: arena.tensor(hold, s, type_), shape, dtype)

    def wants_copy(self, output: str) -> bool:
        """Whether an output should leave the arena at once."""
        if output != "auto":
            return output == "torch"
        crowded = self.crowded()
        self._copies_out += crowded
        return crowded

    def crowded(self) -> bool:
        """Whether so much of the arena is in use that outputs should not stay there."""
        stats: dict[str, int] = self.arena.stats()
        return stats["in_use"] > calls.WATERMARK * stats["capacity"]

    def stats(self) -> dict[str, Any]:
        return {
            "arena": self.arena.stats(),
            "copied_out": self._copies_out,
            "memory": "ipc" if self._memory.own.arena.is_ipc else "vmm",
            "num_sms": {
                "dispatch": self.num_sms or self.rank.default_sms(_core.OpKind.DISPATCH),
                "combine": self.num_sms or self.rank.default_sms(_core.OpKind.COMBINE),
            },
        }

    def release(self) -> None:
        """Give the arena back to the GPU, on all ranks; E310 on all when a tensor of one holds it.

        What is begun is finished first. Where memory is shared by IPC handles nothing happens.
        """
        if self._lease.released or not self._lease.possible:
            return
        failure: EPError | None = None
        try:
            self._reclaim_all()
        except EPError as error:
            failure = error
        self._lease.release(failure)

    def _reclaim_all(self) -> None:
        try:
            self.make_room()
            while self.unfinished:
                self.unfinished[0].settle()
            if self.rank.failed():
                raise self.error(self.rank.verdict(), "")
            torch.cuda.synchronize(self.spec.device)
            self._in_flight.clear()
            self.arena.reclaim(self.stream())
        except RuntimeError as error:
            self.raise_fault(error)
            raise
        if in_use := self.arena.stats()["in_use"]:
            what = f"cannot give the arena back: tensors hold {in_use} B of it"
            raise make_error("E310", what, rank=self.spec.rank)

    def resume(self) -> None:
        """Take the memory again, on all ranks; E232 on all, still released, when one gets none."""
        self._lease.resume()

    def close(self) -> None:
        self.rank.leave()
        self._memory.close()


# ---- construction ----


def _warning(rank: int) -> Callable[[_core.OpKind, int, float], None]:
    """What the watching thread calls when a peer is late: one W101 per peer and operation."""

    def warn(kind: _core.OpKind, peer: int, waited_s: float) -> None:
        op = "combine" if kind == _core.OpKind.COMBINE else "dispatch"
        _log.warning(f"W101: rank {rank} has waited {waited_s:.1f} s for rank {peer} in {op}")

    return warn


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
        EPMemoryError: E232. EPEnvironmentError: E401 to E406, E409. EPTimeout: E120. EPPeerDied:
            E110.

    Collective: all ranks succeed, or all raise and keep nothing.
    """
    shape.stage_bytes = _core.stage_bytes_for(shape, spec.hidden)

    def make(memory: Memory, ranks_on_device: int) -> NvlinkBackend:
        return NvlinkBackend(
            spec, generation, config, memory, exchange, shape, num_sms, ranks_on_device
        )

    return connect_backend(make, group, hellos, listener, exchange, shape, spec, arena_bytes)


def connect_backend(
    make: Callable[[Memory, int], NvlinkBackend],
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    shape: _core.Shape,
    spec: BufferSpec,
    arena_bytes: int | None,
    near: Sequence[int] | None = None,
) -> NvlinkBackend:
    """What `make(memory, ranks on our device)` makes, once it has been made on every rank.

    Args:
        near: the ranks that map each other's memory, ours among them; None: all.
    """
    _core.release_dropped()  # a closed buffer's, when its graphs have gone since
    kind = kind_of_memory(spec.device.index or 0, group.rank)
    ranks_on_device = sum(h.same_gpu(hellos[group.rank]) for h in hellos)
    size = default_arena_bytes(spec, ranks_on_device) if arena_bytes is None else arena_bytes
    control_bytes = _core.ControlLayout(shape).end
    memory = mapping.connect(
        kind, group, hellos, listener, exchange, control_bytes, size, near=near
    )
    for region in memory.own:
        region.close_fd()
    backend: NvlinkBackend | None = None
    failure: EPError | None = None
    try:
        try:
            backend = make(memory, ranks_on_device)
        except _core.DeviceCallError as error:
            what = "is out of memory: {call}: {why}"
            failure = refusal(error, group.rank, "E232", what)
        mapping.agree(exchange, "ready", group.rank, failure)
        assert backend is not None
        return backend
    except BaseException:
        memory.close()
        if backend is not None:  # another rank has none
            backend.close()
            backend = None
            gc.collect()  # its parts know each other, and the arena
        raise


__all__ = [
    "ArenaReceived", "NvlinkBackend", "connect_backend", "default_arena_bytes", "open_backend",
]  # fmt: skip
