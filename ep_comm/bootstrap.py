"""How ranks find each other before there is shared memory: a store, then one socket per pair.

Only fixed structs cross, each with magic, version, length and checksum; nothing is ever unpickled.
Every rank reads every other rank's struct, so all come to the same verdict about a disagreement.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import operator
import os
import resource
import secrets
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Final

from ep_comm.errors import EPError, make_error, shown

_MAGIC: Final = b"EPHELLO1"
_HEAD: Final = struct.Struct("<8sII")  # magic, length of the body, crc32 of the body
_GREETING: Final = struct.Struct("<8s16si")  # magic, token of the group, rank


@dataclass(frozen=True)
class StoreGroup:
    """Ranks that share a `torch.distributed` store; all a Buffer needs of a process group.

    Args:
        store: any c10d Store that all ranks reach (TCPStore, FileStore, HashStore for threads).
        rank, size: this rank, and how many there are.
        name: tells groups over one store apart.
    """

    store: Any
    rank: int
    size: int
    name: str = "default"


@dataclass(frozen=True)
class Group:
    """A caller's group as the library uses it."""

    store: Any
    rank: int
    size: int
    process_group: Any = None  # what torch.distributed collectives take; None = there is none
    members: tuple[int, ...] = ()  # global ranks, in order


def resolve_group(group: Any) -> Group:
    """Accept a ProcessGroup, a StoreGroup, or None (the default group, else a single rank).

    Raises:
        EPEnvironmentError: E406, the group cannot be used; local, peers are not told.
    """
    import torch.distributed as dist

    if isinstance(group, StoreGroup):
        return _resolve_store(group)
    initialized = dist.is_available() and dist.is_initialized()
    if group is None and not initialized:
        return Group(dist.HashStore(), 0, 1, None, (0,))
    if not initialized:
        raise make_error(
            "E406", "rejected bootstrap of this rank: torch.distributed is not initialized"
        )
    from torch.distributed.distributed_c10d import _get_default_store

    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        what = f"rejected bootstrap of this rank: group is {shown(group)}, want a ProcessGroup"
        raise make_error("E406", what)
    members = tuple(dist.get_process_group_ranks(group))
    digest = hashlib.sha256(struct.pack(f"<{len(members)}q", *members)).hexdigest()[:16]
    store = dist.PrefixStore(f"ep_comm/{digest}", _get_default_store())
    return Group(store, dist.get_rank(group), len(members), group, members)


def _resolve_store(group: StoreGroup) -> Group:
    """E406 unless its fields can be what they must be; E212 for more ranks than there can be."""
    import torch.distributed as dist

    from ep_comm import _core

    try:
        rank, size = operator.index(group.rank), operator.index(group.size)
    except Exception:  # not even ints
        rank, size = -1, 0
    if not 0 <= rank < size:
        what = f"rejected bootstrap of rank {shown(group.rank)}: size {shown(group.size)}"
        raise make_error("E406", what)
    if size > _core.MAX_RANKS:
        raise make_error("E212", f"rejected {size} ranks: limit {_core.MAX_RANKS}", rank=rank)
    if not isinstance(group.store, dist.Store) or not isinstance(group.name, str):
        what = f"store {shown(group.store)}, name {shown(group.name)}"
        raise make_error("E406", f"rejected bootstrap of rank {rank}: {what}", rank=rank)
    store = dist.PrefixStore(f"ep_comm/{group.name}", group.store)
    return Group(store, rank, size, None, tuple(range(size)))


# ---- what a rank says of itself ----


def _blank(fmt: str) -> Any:
    return "" if fmt.endswith("s") else 0


def _free(fmt: str) -> Any:
    """A field that may differ between ranks."""
    return field(default=_blank(fmt), metadata={"fmt": fmt, "code": None})


def _same(fmt: str, code: str) -> Any:
    """A field all ranks must agree on, and the error when they don't."""
    return field(default=_blank(fmt), metadata={"fmt": fmt, "code": code})


@dataclass(frozen=True)
class Hello:
    """The construction handshake: one per rank, compared field by field.

    A string too long for its field is cut, on every rank alike.
    """

    protocol: int = _same("I", "E222")
    version: str = _same("24s", "E222")
    structs: int = _same("Q", "E222")  # hash of the sizes of all structs on the wire
    world_size: int = _same("i", "E406")
    members: int = _same("Q", "E406")  # hash of the ordered membership
    num_experts: int = _same("q", "E221")
    expert_map: int = _same("Q", "E221")  # hash
    hidden: int = _same("q", "E221")
    num_topk: int = _same("i", "E221")
    max_tokens: int = _same("q", "E221")
    num_slots: int = _same("i", "E221")
    paranoid: int = _same("i", "E221")
    masking: int = _same("i", "E221")
    direct: int = _same("i", "E221")
    backend: str = _same("16s", "E221")  # as asked for
    ranks_per_node: int = _same("i", "E221")  # as asked for, 0 = those of a host
    device: str = _same("16s", "E221")
    rank: int = _free("i")
    pid: int = _free("q")
    boot_id: bytes = field(default=bytes(16), metadata={"fmt": "16s", "code": None})
    pid_namespace: int = _free("Q")
    gpu: int = _free("Q")  # hash of its UUID, 0: none
    token: bytes = field(default=bytes(16), metadata={"fmt": "16s", "code": None})  # random
    refusal: str = _free("128s")  # why this rank cannot construct: "E203 rejected ..."; "" = it can

    @classmethod
    def _format(cls) -> struct.Struct:
        return struct.Struct("<" + "".join(f.metadata["fmt"] for f in fields(cls)))

    def pack(self) -> bytes:
        values = [
            v.encode("ascii", "replace") if isinstance(v, str) else v for v in vars(self).values()
        ]
        body = self._format().pack(*values)
        return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body

    @classmethod
    def unpack(cls, data: bytes, sender: int) -> Hello:
        """Parse what `sender` published.

        Raises:
            EPEnvironmentError: E406, anything but a whole, intact Hello of that rank.
            EPMismatch: E222, a Hello of another version, recognized by its length.
        """

        def reject(what: str) -> EPError:
            return make_error("E406", f"rejected bootstrap of rank {sender}: {what}")

        form = cls._format()
        if len(data) < _HEAD.size:
            raise reject(f"{len(data)} bytes")
        magic, length, crc = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise reject("magic")
        if length != form.size:  # another version: its own fields cannot be read, its existence can
            what = f"rank {sender} speaks another handshake, of {length} bytes, want {form.size}"
            raise make_error("E222", f"cannot construct: {what}")
        if len(data) != _HEAD.size + length:
            raise reject(f"length {len(data)}")
        body = data[_HEAD.size :]
        if zlib.crc32(body) != crc:
            raise reject("checksum")
        values: list[Any] = []
        for f, value in zip(fields(cls), form.unpack(body), strict=True):
            if f.type == "str":
                try:
                    value = value.rstrip(b"\0").decode("ascii")
                except UnicodeDecodeError:
                    raise reject(f.name) from None
            values.append(value)
        hello = cls(*values)
        if hello.rank != sender:
            raise reject(f"rank {hello.rank}")
        return hello

    def same_process(self, other: Hello) -> bool:
        """Whether two ranks are threads of one process."""
        mine = (self.boot_id, self.pid_namespace, self.pid)
        return mine == (other.boot_id, other.pid_namespace, other.pid)

    def same_gpu(self, other: Hello) -> bool:
        """Whether two ranks run on one GPU, as threads of a process or under MPS."""
        if self.gpu == 0:
            return self.same_process(other)
        return (self.boot_id, self.gpu) == (other.boot_id, other.gpu)

    def shares_processes(self, other: Hello) -> bool:
        """Whether two ranks are processes that see each other."""
        visible = (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)
        return visible and self.pid != other.pid


_REFUSALS: Final = ("E111", "E203", "E210", "E211", "E212", "E401", "E405", "E407")


def check_agreement(me: int, hellos: Sequence[Hello]) -> None:
    """Raise the same error on every rank when one refused or a field differs.

    Names one rank of the minority, its value, and the value of the majority.
    """
    for hello in hellos:
        if hello.refusal:
            code, _, what = hello.refusal.partition(" ")
            code = code if code in _REFUSALS else "E406"
            raise make_error(
                code, f"cannot construct: rank {hello.rank} {what}", rank=me, peer=hello.rank
            )
    for f in fields(Hello):
        code = f.metadata["code"]
        values = [getattr(h, f.name) for h in hellos]
        if code is None or len(set(values)) == 1:
            continue
        common = max(set(values), key=lambda v: (values.count(v), -values.index(v)))
        odd = next(r for r, v in enumerate(values) if v != common)
        others = _name_ranks([r for r, v in enumerate(values) if v == common])
        what = f"cannot construct: rank {odd} has {f.name}={values[odd]}, {others} {common}"
        raise make_error(code, what, rank=me, peer=odd)


def _name_ranks(ranks: list[int]) -> str:
    """ "rank 3 has" or "ranks 0,2-7 have"."""
    runs: list[str] = []
    for r in ranks:
        if runs and int(runs[-1].split("-")[-1]) == r - 1:
            runs[-1] = f"{runs[-1].split('-')[0]}-{r}"
        else:
            runs.append(str(r))
    return f"rank {runs[0]} has" if len(ranks) == 1 else f"ranks {','.join(runs)} have"


# Where the kernel tells no boot id, every process is a host of its own and shares no memory.
_NO_BOOT_ID: Final = secrets.token_bytes(16)


def host_identity() -> tuple[bytes, int]:
    """Boot id of the kernel and our PID namespace; hostnames lie, and containers share them."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and (limit := no_descriptors(error)):
            raise limit from error
        boot = _NO_BOOT_ID
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return boot, namespace


# ---- the store ----

# No hello, and no sentence of a failure. The ranks that were missed stand behind it.
_GAVE_UP: Final = b"\0gave up"


class Exchange:
    """One construction: rounds in which every rank publishes bytes and reads everybody's."""

    def __init__(self, group: Group, limit_s: float | None) -> None:
        self.group = group
        self.deadline = None if limit_s is None else time.monotonic() + limit_s
        self.dead_ranks: Callable[[], list[int]] = list  # as far as we know
        self.missed: list[int] = []  # when we gave up
        # The store counts the constructions of each rank: any number of buffers share a group.
        self._number = group.store.add(f"count/{group.rank}", 1)
        self._keys: list[str] = []

    def publish(self, name: str, payload: bytes) -> None:
        """Our bytes of a round, without waiting for anybody else's."""
        key = f"{self._number}/{name}/{self.group.rank}"
        self.group.store.set(key, payload)
        self._keys.append(key)

    def gather(self, name: str, payload: bytes) -> list[bytes]:
        """Everybody's bytes, by rank. Collective.

        Raises:
            EPTimeout: E120, the deadline has passed; names all ranks that are missing.
            EPPeerDied: E110, a rank whose process we know ended without an answer.
        """
        group = self.group
        self.publish(name, payload)
        start = time.monotonic()
        answers: list[bytes] = []
        for rank in range(group.size):
            while (answer := self._wait_slice(name, rank)) is None:
                self.raise_failure()
                for dead in self.dead_ranks():
                    if self.heard(name, dead) is None:
                        raise died_early(group.rank, dead)
                self._check_deadline(name, rank, start)
            answers.append(answer)
        return answers

    def gather_living(
        self, name: str, payload: bytes, is_gone: Callable[[int], bool]
    ) -> dict[int, bytes]:
        """The bytes of all ranks but those that are gone and had not published any. Collective.

        All that are heard of in a round are the same for everybody: who is gone says no more.

        Raises:
            EPTimeout: E120, the deadline has passed; names all ranks that are missing.
        """
        self.publish(name, payload)
        start = time.monotonic()
        answers: dict[int, bytes] = {}
        for rank in range(self.group.size):
            while (answer := self._wait_slice(name, rank)) is None:
                if is_gone(rank) and (answer := self.heard(name, rank)) is None:
                    break
                self._check_deadline(name, rank, start)
            if answer is not None:
                answers[rank] = answer
        return answers

    def _check_deadline(self, name: str, rank: int, start: float) -> None:
        """E120 when we have waited for too long, now for this rank."""
        now = time.monotonic()
        if self.deadline is None or now <= self.deadline:
            return
        unheard = [r for r in range(rank, self.group.size) if self.heard(name, r) is None]
        # Who has given up on others a moment before us is none of those we both lack.
        self.missed = [r for r in unheard if not self._gave_up_on_others(name, r)] or [rank]
        what = f"waited {now - start:.1f} s: ranks {self.missed} missing"
        raise make_error("E120", what, rank=self.group.rank, peer=self.missed[0])

    def fail(self, error: BaseException) -> None:
        """Tell ranks that wait for us, in whatever round, that we will not come: we lost a rank, or
        raise what nobody foresaw. Other errors are found or told in the rounds."""
        culprit, what = self.group.rank, f"it raised {shown(error)}"
        if isinstance(error, EPError):
            if error.code not in ("E110", "E111") or error.peer is None:
                return
            culprit, what = error.peer, error.what.partition(": ")[2]
        code = error.code if isinstance(error, EPError) else "E111"
        with contextlib.suppress(Exception):  # the store may be what failed
            self.group.store.set(
                f"{self._number}/failed", f"{code} {culprit} {what}".encode()[:300]
            )

    def failure(self) -> EPError | None:
        """E110 or E111 when a peer has told that a rank is lost, itself or another."""
        key = f"{self._number}/failed"
        if not self.group.store.check([key]):
            return None
        text = bytes(self.group.store.get(key)).decode(errors="replace")
        code, _, rest = text.partition(" ")
        rank, _, what = rest.partition(" ")
        lost = int(rank) if rank.isdecimal() and len(rank) < 8 else -1
        if not 0 <= lost < self.group.size or lost == self.group.rank:
            return None
        code = code if code in ("E110", "E111") else "E111"
        return make_error(code, f"lost rank {lost}: {what}", rank=self.group.rank, peer=lost)

    def raise_failure(self) -> None:
        if (error := self.failure()) is not None:
            raise error

    def heard(self, name: str, rank: int) -> bytes | None:
        """What a rank has published in a round, if anything."""
        return self._read(f"{self._number}/{name}/{rank}")

    def leave_note(self, name: str) -> None:
        """What any rank may find from now on, of whoever left it; it stays."""
        self.group.store.set(f"{self._number}/{name}", b"note")

    def has_note(self, name: str) -> bool:
        return bool(self.group.store.check([f"{self._number}/{name}"]))

    def _read(self, key: str) -> bytes | None:
        """What is there now; None = nothing, or of a rank that gave up."""
        answer = self._stored(key)
        return None if answer.startswith(_GAVE_UP) else answer

    def _stored(self, key: str) -> bytes:
        store = self.group.store
        return bytes(store.get(key)) if store.check([key]) else _GAVE_UP

    def _gave_up_on_others(self, name: str, rank: int) -> bool:
        """Whether a rank was here together with us and is gone, for want of others."""
        missed = self._stored(f"{self._number}/{name}/{rank}").removeprefix(_GAVE_UP).split()
        return bool(missed) and str(self.group.rank).encode() not in missed

    def _wait_slice(self, name: str, rank: int) -> bytes | None:
        key = f"{self._number}/{name}/{rank}"
        answer = self._read(key)
        if answer is None:
            with contextlib.suppress(Exception):  # each kind of store raises its own timeout
                self.group.store.wait([key], timedelta(milliseconds=200))
            answer = self._read(key)
            if answer is None:
                time.sleep(0.01)  # a store does not wait for the next value of a key
        return answer

    def finish(self) -> None:
        """Take back what everybody has read: all rounds but the last."""
        for key in self._keys[:-1]:
            with contextlib.suppress(Exception):
                self.group.store.delete_key(key)

    def abandon(self) -> None:
        """Others never came: our next construction, their first, takes this number again.

        What we published is marked, or who comes later would take it for us. Nothing is deleted: a
        rank that has just seen a key would wait for it.
        """
        mark = _GAVE_UP + " ".join(map(str, self.missed)).encode()
        for key in self._keys:
            with contextlib.suppress(Exception):
                self.group.store.set(key, mark)
        with contextlib.suppress(Exception):
            self.group.store.add(f"count/{self.group.rank}", -1)


# ---- sockets: descriptors travel over them, and their end tells of a death ----


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


def no_descriptors(error: OSError, me: int | None = None) -> EPError | None:
    """E407 when the reason is that no more files may be opened."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = os.strerror(error.errno)
    what = f"hit RLIMIT_NOFILE: {why}, limit {most}, need about 10 and 4 for each rank"
    return make_error("E407", what, rank=me)


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


def died_early(me: int, dead: int) -> EPError:
    """E110 before there is a buffer."""
    what = f"lost rank {dead}: its process ended during construction"
    return make_error("E110", what, rank=me, peer=dead)


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
            sock.sendall(_GREETING.pack(_MAGIC, group_token, me))
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
        genuine = magic == _MAGIC and secrets.compare_digest(token, group_token)
        return rank if genuine and rank in waiting else None

    def close(self) -> None:
        self._socket.close()


def _no_sockets(error: OSError) -> EPError:
    what = f"cannot share memory: socket: {error.strerror}, needs Unix sockets"
    return make_error("E405", what)


def group_token(hellos: Sequence[Hello]) -> bytes:
    """Sixteen bytes only the members know, the same on all of them."""
    return hashlib.sha256(b"".join(h.token for h in hellos)).digest()[:16]


def send_fds(sock: socket.socket, fds: Sequence[int], sizes: Sequence[int], limit_s: float) -> None:
    """Hand descriptors to the peer, with the size of the memory behind each."""
    sock.settimeout(limit_s)
    socket.send_fds(sock, [struct.pack(f"<{len(sizes)}q", *sizes)], list(fds))


def receive_fds(sock: socket.socket, count: int, limit_s: float) -> tuple[list[int], list[int]]:
    """Descriptors of the peer, close-on-exec, and the size of the memory behind each."""
    sock.settimeout(limit_s)
    # Not socket.recv_fds, which drops its flags: another thread may exec before we mark them.
    data, ancillary, flags, _ = sock.recvmsg(
        8 * count, socket.CMSG_LEN(4 * count), socket.MSG_CMSG_CLOEXEC
    )
    fds = [
        fd
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("i", payload[: len(payload) // 4 * 4])
    ]
    if len(fds) != count or len(data) != 8 * count or flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        if flags & socket.MSG_CTRUNC and len(fds) < count:  # the kernel had no number for them
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise OSError(f"got {len(fds)} descriptors and {len(data)} bytes")
    return fds, list(struct.unpack(f"<{count}q", data))


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
