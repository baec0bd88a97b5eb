"""A socket to every rank of this host: descriptors travel over it, its end tells of a death."""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ep_comm.bootstrap.descriptors import no_descriptors
from ep_comm.bootstrap.exchange import Exchange, died_early
from ep_comm.bootstrap.hello import MAGIC, Hello
from ep_comm.errors import EPError, make_error

_GREETING: Final = struct.Struct("<8s16si")  # magic, token of the group, rank


@dataclass
class Mesh:
    """One Unix socket to every rank of another process on this host."""

    sockets: dict[int, socket.socket] = field(default_factory=dict)
    pidfds: dict[int, int] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)  # 0 = not visible from here
    gone: set[int] = field(default_factory=set)  # dead before we could watch them

    def watch(self, me: int, hellos: Sequence[Hello]) -> None:
        """See the end of the processes that can be seen from here."""
        for peer in hellos:
            if peer.shares_processes(hellos[me]):
                _watch(self, peer.rank, peer.pid)

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()
        for fd in self.pidfds.values():
            os.close(fd)
        self.sockets.clear()
        self.pidfds.clear()

    def dead_ranks(self) -> list[int]:
        """Ranks whose process is gone; where that cannot be seen, their end of the socket.

        A process that lives may still have failed and closed its socket: it says so in the store.
        """
        return [
            rank
            for rank in sorted({*self.pidfds, *self.sockets, *self.gone})
            if self._is_dead(rank)
        ]

    def _is_dead(self, rank: int) -> bool:
        if rank in self.gone:
            return True
        if rank in self.pidfds:
            return _is_over(self.pidfds[rank])
        return _is_cut(self.sockets[rank])


def _is_over(pidfd: int) -> bool:
    watch = select.poll()  # not select: descriptors may be large numbers
    watch.register(pidfd, select.POLLIN)
    return bool(watch.poll(0))


def _is_cut(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def why_cut(exchange: Exchange, mesh: Mesh, patience_s: float = 0.3) -> EPError | None:
    """The peer that ended or failed, after its end of a socket did: that is seen a moment before.

    Who said why it failed has not just died.
    """
    end = time.monotonic() + patience_s
    while True:
        if (failure := exchange.failure()) is not None:
            return failure
        if (dead := min(mesh.dead_ranks(), default=None)) is not None:
            return died_early(exchange.group.rank, dead)
        if time.monotonic() >= end:
            return None
        time.sleep(0.01)


class Listener:
    """Where peers of this host reach us; made before the handshake, so nobody comes too early.

    An abstract Unix socket whose name is our random token. Only processes of the same user that
    know the token of the whole group get in.
    """

    def __init__(self) -> None:
        self.token = secrets.token_bytes(16)
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise no_descriptors(error) or _no_sockets(error) from error
        try:
            self._socket.bind(_address(self.token))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            raise _no_sockets(error) from error

    def connect_all(
        self,
        me: int,
        hellos: Sequence[Hello],
        group_token: bytes,
        exchange: Exchange,
        near: Sequence[int] | None = None,
    ) -> Mesh:
        """Connect to every lower rank and accept every higher one, of those that are `near`.

        Ranks of our own process are left out: their memory is found in a table. Processes that can
        be seen are watched, near or not.

        Raises:
            EPEnvironmentError: E405, a peer cannot be reached; E406, it is of another user.
            EPPeerDied, EPTimeout: E110, E120, as `Exchange.gather`.
        """
        mesh = Mesh()
        exchange.dead_ranks = mesh.dead_ranks
        try:
            others = [
                h for h in hellos
                if (near is None or h.rank in near) and not h.same_process(hellos[me])
            ]  # fmt: skip
            mesh.watch(me, hellos)
            for peer in others:
                if peer.rank < me:
                    self._connect(mesh, me, peer, group_token, exchange)
            waiting = {peer.rank for peer in others if peer.rank > me}
            while waiting:
                rank = self._accept(mesh, group_token, exchange, waiting)
                waiting.discard(rank)
        except BaseException:
            mesh.close()
            raise
        return mesh

    def _connect(
        self, mesh: Mesh, me: int, peer: Hello, group_token: bytes, exchange: Exchange
    ) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_seconds_left(exchange))
            sock.connect(_address(peer.token))
            _check_user(sock, peer.rank)
            sock.sendall(_GREETING.pack(MAGIC, group_token, me))
        except OSError as error:
            sock.close()
            if (loss := why_cut(exchange, mesh)) is not None:
                raise loss from error
            if isinstance(error, ConnectionRefusedError) and not _same_network(peer):
                call = f"connect to rank {peer.rank}: {error.strerror}"
                what = f"cannot share memory: {call}, needs one network namespace"
                raise make_error("E405", what, rank=me, peer=peer.rank) from error
            what = f"lost rank {peer.rank}: {error} during construction"
            raise make_error("E110", what, rank=me, peer=peer.rank) from error
        except BaseException:
            sock.close()
            raise
        _keep(mesh, peer.rank, sock)

    def _accept(self, mesh: Mesh, group_token: bytes, exchange: Exchange, waiting: set[int]) -> int:
        for _ in _slices(exchange, waiting, mesh):
            self._socket.settimeout(0.2)
            try:
                sock, _ = self._socket.accept()
            except TimeoutError:
                continue
            rank = self._greet(sock, group_token, waiting)
            if rank is not None:
                _keep(mesh, rank, sock)
                return rank
            sock.close()  # a stranger: refused, and we go on waiting for ours
        raise AssertionError("_slices ends by raising")

    @staticmethod
    def _greet(sock: socket.socket, group_token: bytes, waiting: set[int]) -> int | None:
        """The rank behind a connection, or None when it is not one we wait for."""
        try:
            _check_user(sock, -1)
            sock.settimeout(2.0)
            data = _receive_exactly(sock, _GREETING.size)
        except (OSError, EPError):
            return None
        magic, token, rank = _GREETING.unpack(data)
        genuine = magic == MAGIC and secrets.compare_digest(token, group_token)
        return rank if genuine and rank in waiting else None

    def close(self) -> None:
        self._socket.close()


def _no_sockets(error: OSError) -> EPError:
    what = f"cannot share memory: socket: {error.strerror}, needs Unix sockets"
    return make_error("E405", what)


def _address(token: bytes) -> bytes:
    return b"\0ep_comm-" + token.hex().encode()


def _same_network(peer: Hello) -> bool:
    """Whether the peer's listener is visible here.

    Abstract sockets belong to a network namespace; True when the kernel does not tell.
    """
    try:
        with open("/proc/net/unix") as file:
            return f"@ep_comm-{peer.token.hex()}" in file.read()
    except OSError:
        return True


def _check_user(sock: socket.socket, rank: int) -> None:
    _, uid, _ = _credentials(sock)
    if uid != os.getuid():
        raise make_error(
            "E406", f"rejected bootstrap of rank {rank}: uid {uid}, want {os.getuid()}"
        )


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def _keep(mesh: Mesh, rank: int, sock: socket.socket) -> None:
    mesh.sockets[rank] = sock
    pid, _, _ = _credentials(sock)
    _watch(mesh, rank, pid)


def _watch(mesh: Mesh, rank: int, pid: int) -> None:
    mesh.pids[rank] = pid
    if rank not in mesh.pidfds and pid > 0 and hasattr(os, "pidfd_open"):
        try:
            mesh.pidfds[rank] = os.pidfd_open(pid)
        except ProcessLookupError:
            mesh.gone.add(rank)
        except OSError:
            pass  # an old kernel, or no descriptors left: its socket will tell


def _seconds_left(exchange: Exchange) -> float:
    if exchange.deadline is None:
        return 600.0
    return max(0.01, exchange.deadline - time.monotonic())


def _slices(exchange: Exchange, waiting: set[int], mesh: Mesh) -> Iterator[None]:
    """Turns of a wait for the ranks `waiting`; ends by raising E110 or E120."""
    start = time.monotonic()
    while True:
        yield
        if (loss := why_cut(exchange, mesh, patience_s=0.0)) is not None:
            raise loss
        if exchange.deadline is not None and time.monotonic() > exchange.deadline:
            exchange.missed = sorted(waiting)
            what = f"waited {time.monotonic() - start:.1f} s: ranks {exchange.missed} missing"
            raise make_error("E120", what, rank=exchange.group.rank, peer=min(waiting))


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise OSError("connection closed")
        data += piece
    return data
