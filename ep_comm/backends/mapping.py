"""Construction of backends on mapped memory: every rank creates its control block and arena, gives
them to every peer as descriptors over a socket, and maps theirs.

What kind of memory that is (a sealed memfd, a GPU's) is the business of the backend.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, Protocol, Self, TypeVar

from ep_comm.bootstrap import (
    Exchange,
    Group,
    Hello,
    Listener,
    Mesh,
    group_token,
    no_descriptors,
    receive_fds,
    send_fds,
    why_cut,
)
from ep_comm.errors import EPError, make_error

# What construction may fail with; any other code of a peer is damage.
CODES: Final = frozenset(
    (
        "E110",
        "E111",
        "E120",
        "E232",
        "E310",
        "E401",
        "E402",
        "E403",
        "E405",
        "E406",
        "E407",
        "E409",
        "E501",
    )
)
_SHARE_S: Final = 30.0  # most a peer may take to send its descriptors


class Region(Protocol):
    """Memory that is passed on as a descriptor."""

    @property
    def fd(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def close_fd(self) -> None: ...


RegionT = TypeVar("RegionT", bound=Region)


class Regions(NamedTuple, Generic[RegionT]):
    """What every rank shares."""

    control: RegionT
    arena: RegionT


@dataclass(frozen=True)
class Kind(Generic[RegionT]):
    """How a kind of memory is made and mapped; both raise one of `errors`, explained as
    (what failed, why)."""

    create: Callable[[str, int], RegionT]  # name, bytes
    map: Callable[[int, int], RegionT]  # fd, bytes
    errors: type[Exception]
    explain: Callable[[Exception], tuple[str, str]]
    needs: str  # what mapping needs and may be refused


# Where ranks that are threads of one process find each other: (group token, rank) -> regions.
_in_process: dict[tuple[bytes, int], Regions[Any]] = {}
_in_process_lock = threading.Lock()


class Mapped(Generic[RegionT]):
    """This rank's regions and its view of everybody else's."""

    def __init__(self, rank: int, own: Regions[RegionT], mesh: Mesh) -> None:
        self.rank, self.own, self.mesh = rank, own, mesh
        self.peers: dict[int, Regions[RegionT]] = {rank: own}
        self._key: tuple[bytes, int] | None = None

    def views(self) -> list[Regions[RegionT]]:
        """The regions of every rank, in rank order."""
        return [self.peers[r] for r in range(len(self.peers))]

    def publish_in_process(self, token: bytes) -> Self:
        """Let ranks that are threads of this process find our memory."""
        self._key = (token, self.rank)
        with _in_process_lock:
            _in_process[self._key] = self.own
        return self

    def close(self) -> None:
        """Descriptors only; memory lives as long as a tensor in it."""
        self.mesh.close()
        if self._key is not None:
            with _in_process_lock:
                _in_process.pop(self._key, None)


def connect(
    kind: Kind[RegionT],
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    control_bytes: int,
    arena_bytes: int,
    use: Callable[[Mapped[RegionT]], object] = lambda memory: None,
    near: Sequence[int] | None = None,
) -> Mapped[RegionT]:
    """Create our memory, give it to every peer, map theirs.

    Args:
        listener, exchange: of this construction; `hellos` has been agreed on.
        control_bytes: the same on all ranks.
        arena_bytes: of our own arena; ranks may differ.
        use: what has to succeed on every rank, too, with the memory.
        near: ranks whose memory we map, ours among them; None: all.
    Raises:
        EPMemoryError: E232. EPEnvironmentError: E405, E406. EPTimeout: E120. EPPeerDied: E110.

    Collective: all ranks succeed, or all raise and keep nothing.
    """
    me = group.rank
    token = group_token(hellos)
    mesh = Mesh()
    mapped: Mapped[RegionT] | None = None
    try:
        failure: EPError | None = None
        try:
            mesh = listener.connect_all(me, hellos, token, exchange, near)
            own = _create(kind, me, control_bytes, arena_bytes)
            mapped = Mapped(me, own, mesh).publish_in_process(token)
        except EPError as error:
            failure = error
        except OSError as error:
            failure = _broken_share(me, mesh, exchange, error)
        agree(exchange, "created", me, failure)
        assert mapped is not None
        try:
            _share(kind, mapped, [h for h in hellos if near is None or h.rank in near], token)
            use(mapped)
        except EPError as error:
            failure = error
        except OSError as error:
            failure = _broken_share(me, mesh, exchange, error)
        agree(exchange, "mapped", me, failure)
    except BaseException as error:
        exchange.fail(error)  # before peers see our sockets end
        mesh.close()
        if mapped is not None:
            mapped.close()
        raise
    return mapped


def agree(exchange: Exchange, step: str, me: int, failure: EPError | None) -> None:
    """Every rank learns whether every rank succeeded.

    A rank that failed tells why and raises at once: it owes nobody its patience, and a dead rank
    would never answer. The others raise the error of the lowest rank that failed, or name the rank
    whose death was its reason. A rank that said why before it ended has not just died.
    """
    if failure is not None:
        culprit = me if failure.peer is None else failure.peer
        if failure.code == "E110" and (word := exchange.heard(step, culprit)):
            failure = _told(word.decode(errors="replace"), me, culprit, exchange.group.size)
        exchange.publish(step, f"{failure.code} {culprit} {failure.what}".encode()[:300])
        raise failure
    for rank, answer in enumerate(exchange.gather(step, b"")):
        if answer:
            raise _told(answer.decode(errors="replace"), me, rank, exchange.group.size)


def _told(answer: str, me: int, rank: int, size: int) -> EPError:
    """The error to raise for what another rank published in place of success."""
    code, _, rest = answer.partition(" ")
    number, _, what = rest.partition(" ")
    culprit = int(number) if number.isdecimal() else rank
    if code in ("E110", "E111") and culprit < size and culprit not in (me, rank):
        return make_error(code, what, rank=me, peer=culprit)
    code = code if code in CODES else "E406"
    return make_error(code, f"cannot construct: rank {rank} {what}", rank=me, peer=rank)


def _create(kind: Kind[RegionT], me: int, control_bytes: int, arena_bytes: int) -> Regions[RegionT]:
    try:
        control = kind.create("ep_comm_control", control_bytes)
        return Regions(control, kind.create("ep_comm_arena", arena_bytes))
    except kind.errors as error:
        if isinstance(error, OSError) and (limit := no_descriptors(error, me)):
            raise limit from error
        call, why = kind.explain(error)
        what = f"is out of memory: {call} of {arena_bytes} B: {why}"
        raise make_error("E232", what, rank=me) from error


def _share(
    kind: Kind[RegionT],
    mapped: Mapped[RegionT],
    hellos: Sequence[Hello],
    token: bytes,
) -> None:
    me, own, sockets = mapped.rank, mapped.own, mapped.mesh.sockets
    for sock in sockets.values():
        send_fds(sock, [region.fd for region in own], [region.bytes for region in own], _SHARE_S)
    for peer in hellos:
        if peer.rank == me:
            continue
        if peer.rank not in sockets:
            with _in_process_lock:
                mapped.peers[peer.rank] = _in_process[token, peer.rank]
            continue
        fds, sizes = receive_fds(sockets[peer.rank], 2, _SHARE_S)
        try:
            if sizes[0] != own.control.bytes:
                what = f"rejected bootstrap of rank {peer.rank}: control block of {sizes[0]} B"
                raise make_error("E406", what, rank=me)
            control, arena = (kind.map(fd, size) for fd, size in zip(fds, sizes, strict=True))
            mapped.peers[peer.rank] = Regions(control, arena)
        except kind.errors as error:
            call, why = kind.explain(error)
            what = f"cannot share memory: {call}: {why}, needs {kind.needs}"
            raise make_error("E405", what, rank=me, peer=peer.rank) from error
        finally:
            for fd in fds:
                os.close(fd)


def _broken_share(me: int, mesh: Mesh, exchange: Exchange, error: OSError) -> EPError:
    if (limit := no_descriptors(error, me)) is not None:
        return limit
    if (loss := why_cut(exchange, mesh)) is not None:
        return loss
    return make_error("E405", f"cannot share memory: {error}, needs descriptor passing", rank=me)
