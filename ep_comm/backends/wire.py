"""The wire: rows between the ranks of any process group, one all-to-all at a time, waits bounded.

It has a process group of its own over the caller's store: its exchanges cannot mix with the
caller's collectives, and leaving breaks nobody else's connections. An all-to-all does not say who
is missing, so the culprit is looked for beside it: processes of this host by their pidfds, others
by the notes they leave in the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.bootstrap import Exchange, Group, Hello, died_early
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, EPTimeout, make_error
from ep_comm.verdict import PeerState, error_of

T = TypeVar("T")
_log = logging.getLogger("ep_comm")

_SLICE_S: Final = 0.05  # a wait looks around this often
_LOOK_S: Final = 0.3  # and at the store no sooner than this
_GRACE_S: Final = 1.5  # after a broken connection: until its cause can be seen
_SLOWEST_BYTES_PER_S: Final = 10e6  # an all-to-all shows no progress, so large ones get more time
_NEVER_S: Final = 1e8


@dataclass(frozen=True)
class Finding:
    """A verdict on an operation, as `verdict.error_of` reads it."""

    code: int
    peer: int
    rank: int = -1
    seq: int = 0
    want: int = 0
    have: int = 0
    detail: tuple[int, ...] = (0, 0, 0, 0)
    reason: str = ""
    site: _core.Site = _core.Site.NONE
    peer_seq: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """Where an operation is, for clocks and sentences."""

    op: str
    seq: int
    tag: str
    announced: bool  # False: we wait for ranks to enter; True: all have, and rows move

    def moving(self) -> Step:
        """The same operation, all ranks having entered."""
        return replace(self, announced=True)


@dataclass(frozen=True)
class _Note:
    """What a rank that stops leaves in the store for those who find its connection broken."""

    code: int
    peer: int  # whom it blames; itself when it just left
    seq: int
    reason: str = ""

    def pack(self) -> str:
        return f"{self.code} {self.peer} {self.seq} {self.reason}"

    @classmethod
    def unpack(cls, data: bytes) -> _Note | None:
        words = data.decode(errors="replace").split(" ", 3)
        try:
            code, peer, seq = (int(w) for w in words[:3])
        except ValueError:
            return None
        return cls(code, peer, seq, words[3] if len(words) > 3 else "")


class Wire:
    """One rank's end. Collective to construct: every rank opens it.

    Args:
        generation: tells the buffers of one group apart, the same on all ranks.
        device: of the tensors exchanged; they pass through the CPU where the group cannot reach it.
        hellos: of all ranks; they tell which are processes that can be watched.
        construction: where ranks say that they failed.
    Raises:
        EPTimeout: E120, a rank did not open its end within the arrival clock. EPPeerDied,
            EPPeerLeft: E110, E111, it ended or failed instead.
    """

    def __init__(
        self,
        group: Group,
        generation: int,
        config: EPConfig,
        device: torch.device,
        hellos: Sequence[Hello],
        construction: Exchange,
    ) -> None:
        import torch.distributed as dist

        self.rank, self.size = group.rank, group.size
        self.bytes_sent = 0
        self.waited_s = 0.0
        self._config = config
        self._closing = False
        self._since = 0.0  # when the exchange under way began
        self._stuck = False  # an exchange is still under way in the group's own threads
        self._peers = _Peers.of(group.rank, hellos)
        self._construction: Exchange | None = construction  # until it is over
        self._group: Any = None
        self._device = device
        self._sleeps = True
        if self.size == 1:
            return
        self._store = dist.PrefixStore(f"wire/{generation}", group.store)
        try:
            self._group, self._device, self._sleeps = _meanwhile(
                lambda: _open(group, self._store, config, device), self._look_early
            )
            self._meet()
            self._construction = None
        except EPTimeout as error:
            raise make_error("E120", error.what, rank=self.rank, peer=error.peer) from error
        except RuntimeError as error:
            what = f"waited for ranks to connect: {_first_line(error)}"
            raise make_error("E120", what, rank=self.rank) from error
        finally:
            if self._group is None:
                self._peers.close()

    def exchange(
        self, rows: Tensor, send: Sequence[int], recv: Sequence[int], step: Step
    ) -> Tensor:
        """Give each rank its rows and return what came, by rank.

        Args:
            rows: [sum(send), ...] contiguous, first those for rank 0; bytes, or a dtype the group
                can move.
            send, recv: rows to and from each rank; what one rank sends, the other must expect.
        Raises:
            EPError: of scope "comm"; the wire is dead then.
        """
        if self.size == 1:
            return rows
        self._since = start = time.monotonic()
        mine = rows.to(self._device)
        arrived = mine.new_empty((sum(recv), *rows.shape[1:]))
        num_bytes = max(mine.numel(), arrived.numel()) * mine.itemsize
        limit = self._limit(step, num_bytes)
        self._stuck = True
        try:
            work = self._start(arrived, mine, send, recv, limit)
            self._await(work, step, limit)
        except EPError:
            raise
        except RuntimeError as error:
            raise self.fail(self._cause(step, error), step) from error
        self._stuck = False
        self.bytes_sent += mine.numel() * mine.itemsize
        self.waited_s += time.monotonic() - start
        return arrived.to(rows.device)

    def fail(self, finding: Finding, step: Step) -> EPError:
        """Leave because of `finding`, tell the others why, and return the error to raise."""
        blamed = finding.peer if finding.code != 1 else self.rank
        code = finding.code if finding.code != 1 else 111
        self.leave(_Note(code, blamed, step.seq))
        return self.error(finding, step)

    def error(self, finding: Finding, step: Step) -> EPError:
        """The sentence of a finding of this operation."""
        facts = {**vars(finding), "rank": self.rank, "seq": step.seq}
        if finding.peer_seq == 0:
            facts["peer_seq"] = step.seq if step.announced else step.seq - 1
        return error_of(
            Finding(**facts), op=step.op, tag=step.tag, peer=self._peers.state(finding.peer)
        )

    def leave(self, note: _Note | None = None) -> None:
        """End it here, without waiting; an exchange under way in another thread raises soon."""
        if self._closing:
            return
        self._closing = True
        if self._group is None:
            return
        with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
            note = note or _Note(111, self.rank, 0)
            self._store.set(f"note/{self.rank}", note.pack())
            self._store.set("noted", "1")
        with contextlib.suppress(Exception):
            self._group.abort()
        if self._stuck:
            # Its destructor would wait for the exchange, and that for a peer: it stays for good.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._group = None
        self._peers.close()

    def refused(self, seq: int, error: EPError) -> None:
        """Leave while peers may not yet know that we refused operation `seq`."""
        self.leave(_Note(int(error.code[1:]), self.rank, seq, error.what))

    # ---- inside an exchange ----

    def _start(
        self, out: Tensor, rows: Tensor, send: Sequence[int], recv: Sequence[int], limit: float
    ) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError("left")
        if isinstance(group, _Borrowed):
            return group.all_to_all(out, rows, recv, send)
        ours_first = timedelta(seconds=limit + 10.0)
        return group.alltoall_base(out, rows, list(recv), list(send), timeout=ours_first)

    def _await(self, work: Any, step: Step, limit: float) -> None:
        told = False
        while not (_slept_until if self._sleeps else _polled_until)(work):
            waited = time.monotonic() - self._since
            self._look(step, waited)
            stopped = self._peers.stopped() if waited > _LOOK_S else None
            if stopped is not None:
                limit = min(limit, self._config.progress_s)
            if not told and waited > self._patience(limit):
                told = True
                self._store.set(f"waiting/{self.rank}", str(step.seq))
                if waited > self._config.arrival_warn_s:
                    self._warn(step, waited)
            if waited > limit:
                peer = self._suspect(step.seq) if stopped is None else stopped
                raise self.fail(self._late(102 if step.announced else 101, peer, step), step)

    def _late(self, code: int, peer: int, step: Step, found_by: int = 0) -> Finding:
        site = _core.Site.ROWS if step.announced else _core.Site.ENTRY
        waited = time.monotonic() - self._since
        return Finding(code, peer, site=site, have=-1, detail=(found_by, 0, 0, 0), waited_s=waited)

    def _look(self, step: Step, waited: float) -> None:
        """Raise when somebody, or we ourselves, ended this."""
        if self._closing:
            raise self.error(Finding(1, self.rank), step)
        self._look_early()
        dead = self._peers.dead()
        if dead is None and waited < _LOOK_S:
            return
        finding = Finding(110, dead) if dead is not None else self._noted(step)
        if finding is not None:
            raise self.fail(finding, step)

    def _cause(self, step: Step, error: RuntimeError) -> Finding:
        """Why a connection broke: the kernel and the store know a moment later than the socket."""
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end:
            if self._closing:
                return Finding(1, self.rank)
            self._look_early()
            dead = self._peers.dead()
            finding = Finding(110, dead) if dead is not None else self._noted(step)
            if finding is not None:
                return finding
            time.sleep(0.02)
        _log.warning("E110: rank %d: %s", self.rank, _first_line(error))
        return Finding(110, self._suspect(step.seq))

    def _noted(self, step: Step) -> Finding | None:
        """What a rank that stopped had to say; a death before anything else."""
        notes: list[tuple[int, _Note]] = []
        with contextlib.suppress(Exception):
            if self._store.check(["noted"]):
                for r in range(self.size):
                    if r != self.rank and self._store.check([f"note/{r}"]):
                        note = _Note.unpack(self._store.get(f"note/{r}"))
                        notes += [(r, note)] if note is not None else []
        for r, note in sorted(notes, key=lambda n: (n[1].code != 110, n[1].code != 111, n[0])):
            if note.code >= 200:
                if note.seq == step.seq and note.reason:
                    return Finding(note.code, r, reason=note.reason)
                return Finding(111, r)
            return self._late(note.code, note.peer, step, 0 if note.peer == r else 1 + r)
        return None

    def _suspect(self, seq: int) -> int:
        """The first rank that has not said that it waits in operation `seq`, too."""
        others = [r for r in range(self.size) if r != self.rank]
        with contextlib.suppress(Exception):
            for r in others:
                key = f"waiting/{r}"
                if not self._store.check([key]) or int(self._store.get(key)) < seq:
                    return r
        return others[0]

    def _limit(self, step: Step, num_bytes: int) -> float:
        if step.announced:
            return self._config.progress_s + num_bytes / _SLOWEST_BYTES_PER_S
        return _NEVER_S if self._config.arrival_s is None else self._config.arrival_s

    def _patience(self, limit: float) -> float:
        return min(self._config.arrival_warn_s, limit / 2)

    def _warn(self, step: Step, waited: float) -> None:
        time.sleep(_SLICE_S)  # the others say that they wait at about this time
        name = f' (tag "{step.tag}")' if step.tag else ""
        late = f"for rank {self._suspect(step.seq)} in {step.op}{name}"
        _log.warning(f"W101: rank {self.rank} has waited {waited:.1f} s {late}")

    def _meet(self) -> None:
        """The first exchange connects whatever the group connects late."""
        ones = [1] * self.size
        step = Step("construction", 0, "", announced=False)
        self.exchange(torch.zeros((self.size, 1), dtype=torch.int64), ones, ones, step)

    def _look_early(self) -> None:
        """During construction: raise when a rank that we wait for will not come."""
        if self._construction is None:
            return
        if (failure := self._construction.failure()) is not None:
            raise failure
        if (dead := self._peers.dead()) is not None:
            error = died_early(self.rank, dead)
            self._construction.fail(error)  # who looks later may find us ended, too
            raise error


@dataclass
class _Peers:
    """Ranks that are other processes of this host."""

    pids: dict[int, int]
    pidfds: dict[int, int]
    gone: set[int]  # already before they could be watched

    @classmethod
    def of(cls, me: int, hellos: Sequence[Hello]) -> _Peers:
        pids = {h.rank: h.pid for h in hellos if h.shares_processes(hellos[me])}
        peers = cls(pids, {}, set())
        for rank, pid in pids.items():
            try:
                peers.pidfds[rank] = os.pidfd_open(pid)
            except ProcessLookupError:
                peers.gone.add(rank)
            except (OSError, AttributeError):
                pass  # an old kernel, or no descriptors left
        return peers

    def dead(self) -> int | None:
        if self.gone:
            return min(self.gone)
        for rank, fd in self.pidfds.items():
            if select.select([fd], [], [], 0)[0]:
                return rank
        return None

    def stopped(self) -> int | None:
        for rank in self.pids:
            if "stopped" in self.state(rank).describe():
                return rank
        return None

    def state(self, rank: int) -> PeerState:
        return PeerState(self.pids.get(rank, 0))

    def close(self) -> None:
        for fd in self.pidfds.values():
            os.close(fd)
        self.pidfds.clear()


@dataclass(frozen=True)
class _Borrowed:
    """The caller's own group, for a backend of which we cannot make another one."""

    process_group: Any

    def all_to_all(
        self, out: Tensor, rows: Tensor, recv: Sequence[int], send: Sequence[int]
    ) -> Any:
        import torch.distributed as dist

        return dist.all_to_all_single(
            out, rows, list(recv), list(send), group=self.process_group, async_op=True
        )

    def abort(self) -> None:
        """It is not ours."""


def _open(
    group: Group, store: Any, config: EPConfig, device: torch.device
) -> tuple[Any, torch.device, bool]:
    """A process group like the caller's, the device of what it moves, whether its waits may end."""
    import torch.distributed as dist

    limit = timedelta(seconds=_NEVER_S if config.arrival_s is None else config.arrival_s)
    kind, on = _kind(group.process_group, device)
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, group.rank, group.size, limit), on, True
    if kind == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=_NEVER_S)  # ours raises; its own ends the process
        return dist.ProcessGroupNCCL(store, group.rank, group.size, options), on, False
    return _Borrowed(group.process_group), on, False


def _meanwhile(work: Callable[[], T], look: Callable[[], None]) -> T:
    """The result of `work`, which may wait long and hear nothing, unless `look` raises before.

    Then it goes on by itself until its own limit.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed on, whatever it is
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_SLICE_S)
        if thread.is_alive():
            look()
    if errors:
        raise errors[0]
    return results[0]


def _kind(process_group: Any, device: torch.device) -> tuple[str, torch.device]:
    """What moves tensors of `device` in the caller's group, else what moves CPU tensors."""
    if process_group is None:
        return "gloo", torch.device("cpu")
    for on in (device, torch.device("cpu")):
        try:
            kind = str(process_group._get_backend(on).name())
        except RuntimeError:
            continue
        if kind != "gloo" or on.type == "cpu":  # gloo has no all-to-all for GPU tensors
            return kind, on
    return "gloo", torch.device("cpu")


def _slept_until(work: Any) -> bool:
    """Sleep a little until an exchange is over; whether it is. RuntimeError when it failed."""
    try:
        work.wait(timedelta(seconds=_SLICE_S))
    except RuntimeError as error:
        if str(error).startswith("Operation timed out"):
            return False
        raise
    return True


def _polled_until(work: Any) -> bool:
    """The same where a wait that runs out of time would break the group."""
    end, nap = time.monotonic() + _SLICE_S, 2e-5
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(nap)
        nap = min(2 * nap, 1e-3)
    work.wait()  # raises what went wrong; on a GPU, orders the current stream behind it
    return True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
