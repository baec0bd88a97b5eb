"""Memory of GPU ranks: made and mapped, given back for a while, and what its refusals mean."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeVar

from ep_comm import _core
from ep_comm.backends import mapping
from ep_comm.bootstrap import Exchange, receive_fds, send_fds
from ep_comm.errors import EPError, make_error

Memory = mapping.Mapped[_core.DeviceMemory]
T = TypeVar("T")

# Refusals of CUDA that do not depend on what was asked for: number -> code, what is missing.
_REFUSALS: Final = {
    35: ("E402", "lacks {call}: {why}, need CUDA 12.0 or later"),
    100: ("E401", "has no GPU: {why}"),
    101: ("E401", "has no GPU: {why}"),
    209: ("E403", "has no code for this GPU: {why}"),
    218: ("E403", "has no code for this GPU: {why}"),
    222: ("E403", "has no code for this GPU: {why}"),
    46: ("E409", "cannot use GPU: {why} ({call})"),
    801: ("E405", "cannot share memory: {call}: {why}, needs peer access between the GPUs"),
}
_SHARE_S: Final = 30.0  # most a peer may take to send its descriptor


def refusal(error: _core.DeviceCallError, rank: int, code: str, what: str) -> EPError:
    """What a call that CUDA refused means for the user; `code` and `what` where it says no more."""
    call, why, number = error.args
    code, template = _REFUSALS.get(number, (code, what))
    return make_error(code, template.format(call=call, why=why), rank=rank)


def kind_of_memory(device: int, rank: int) -> mapping.Kind[_core.DeviceMemory]:
    """How `mapping.connect` makes and maps it."""

    def create(_: str, num_bytes: int) -> _core.DeviceMemory:
        what = f"is out of memory: {{call}} of {num_bytes} B: {{why}}"
        return _explained(lambda: _core.DeviceMemory.create(device, num_bytes), rank, "E232", what)

    def map_peer(fd: int, num_bytes: int) -> _core.DeviceMemory:
        what = "cannot share memory: {call}: {why}, needs peer access between the GPUs"
        return _explained(lambda: _core.DeviceMemory.map(device, fd, num_bytes), rank, "E405", what)

    return mapping.Kind(
        create,
        map_peer,
        _core.DeviceCallError,
        lambda error: (error.args[0], error.args[1]),
        "peer access between the GPUs",
    )


def _explained(call: Callable[[], T], rank: int, code: str, what: str) -> T:
    try:
        return call()
    except _core.DeviceCallError as error:
        raise refusal(error, rank, code, what) from error


class Lease:
    """Gives the arenas of all ranks back to their GPUs for a while. Collective, both ways.

    Args:
        exchange: of the construction, whose rounds go on here.
        watch: pauses the thread that reads the bootstrap connections.
    """

    def __init__(
        self,
        memory: Memory,
        exchange: Exchange,
        limit_s: float | None,
        watch: Callable[[bool], None],
    ) -> None:
        self._memory, self._exchange, self._limit_s = memory, exchange, limit_s
        self._watch = watch
        self._rounds = 0
        self.released = False

    @property
    def possible(self) -> bool:
        """Memory shared by IPC handles stays: its address would change."""
        return not self._memory.own.arena.is_ipc

    def release(self, failure: EPError | None) -> None:
        """Unmap everywhere; `failure`: why this rank cannot. Then, or when another cannot, nothing
        happens and all raise."""
        if self.released or not self.possible:
            return
        self._agree("release", failure)
        for arena in self._arenas():
            arena.drop()
        self.released = True

    def resume(self) -> None:
        """Take memory again, at the same addresses, zeroed.

        Raises:
            EPMemoryError: E232, on all ranks; still released.
        """
        if not self.released:
            return
        memory, me = self._memory, self._memory.rank
        failure: EPError | None = None
        try:
            what = f"is out of memory: {{call}} of {memory.own.arena.bytes} B: {{why}}"
            _explained(memory.own.arena.restore, me, "E232", what)
        except EPError as error:
            failure = error
        with self._paused():
            try:
                self._agree("resume", failure)
                self._share()
                self._agree("mapped", None)
            except BaseException:
                for arena in self._arenas():
                    arena.drop()
                raise
        memory.own.arena.close_fd()
        self.released = False

    def _share(self) -> None:
        memory = self._memory
        own, sockets = memory.own.arena, memory.mesh.sockets
        for sock in sockets.values():
            send_fds(sock, [own.fd], [own.bytes], _SHARE_S)
        for rank, sock in sockets.items():
            fds, _ = receive_fds(sock, 1, _SHARE_S)
            try:
                what = "cannot share memory: {call}: {why}, needs peer access between the GPUs"
                arena = memory.peers[rank].arena
                _explained(partial(arena.restore_from, fds[0]), memory.rank, "E405", what)
            finally:
                for fd in fds:
                    os.close(fd)

    def _arenas(self) -> list[_core.DeviceMemory]:
        """Those this rank has mapped; ranks of its own process do so themselves."""
        memory = self._memory
        return [memory.own.arena, *(memory.peers[r].arena for r in memory.mesh.sockets)]

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._watch(True)
        try:
            yield
        finally:
            self._watch(False)

    def _agree(self, step: str, failure: EPError | None) -> None:
        """All ranks can, or all raise."""
        self._rounds += 1
        if self._limit_s is not None:
            self._exchange.deadline = time.monotonic() + self._limit_s
        name, me = f"{step}{self._rounds}", self._memory.rank
        if failure is not None:
            self._exchange.publish(name, f"{failure.code} {failure.what}".encode()[:300])
            raise failure
        for rank, answer in enumerate(self._exchange.gather(name, b"")):
            if answer:
                code, _, what = answer.decode(errors="replace").partition(" ")
                code = code if code in mapping.CODES else "E406"
                raise make_error(code, f"cannot {step}: rank {rank} {what}", rank=me, peer=rank)
        self._exchange.finish()


__all__ = ["Lease", "Memory", "kind_of_memory", "refusal"]
