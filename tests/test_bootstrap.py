"""How ranks find each other: what they must agree on, whom they refuse, and what stays behind."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONGER_S, PATIENT, three_tries, until, within

import ep_comm.backends.mapping
import ep_comm.construct
from ep_comm import Buffer, EPConfig, StoreGroup, _core, bootstrap
from ep_comm.bootstrap import Exchange, Group, Hello, Listener, check_agreement, group_token
from ep_comm.errors import CODES, EPEnvironmentError, EPError, EPMemoryError, EPTimeout
from ep_comm.testing import Cluster

SHAPE: dict[str, Any] = {"num_experts": 6, "num_topk": 2, "hidden": 32, "max_tokens": 8}


def works(cluster: Cluster) -> None:
    def work(rank: int) -> None:
        x, n = torch.full((2, 32), float(rank)), cluster.num_ranks
        recv = cluster.buffers[rank].dispatch(x, torch.tensor([[0, 5], [-1, -1]]))
        out = cluster.buffers[rank].combine(recv.x, recv.handle)
        assert torch.equal(out, x * torch.tensor([[2.0 if n > 1 else 1.0], [0.0]]))

    cluster.run(work)


# ---- agreement ----

# Field of the handshake: code, what rank 1 says instead.
DISAGREE: dict[str, tuple[str, Any]] = {
    "protocol": ("E222", 99),
    "version": ("E222", "9.9.9"),
    "structs": ("E222", 5),
    "world_size": ("E406", 7),
    "members": ("E406", 5),
    "num_experts": ("E221", 12),
    "expert_map": ("E221", 5),
    "hidden": ("E221", 64),
    "num_topk": ("E221", 3),
    "max_tokens": ("E221", 9),
    "num_slots": ("E221", 3),
    "paranoid": ("E221", 1),
    "masking": ("E221", 1),
    "direct": ("E221", 0),
    "backend": ("E221", "cpu"),
    "ranks_per_node": ("E221", 2),
    "device": ("E221", "cuda"),
}


def test_every_field_that_must_agree_is_in_the_table() -> None:
    assert {f.name for f in fields(Hello) if f.metadata["code"] is not None} == set(DISAGREE)


@pytest.mark.parametrize("name", DISAGREE)
@pytest.mark.parametrize("size", [2, 3])
def test_b1_b2_b3_a_differing_field_is_named_with_rank_and_both_values(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    code, value = DISAGREE[name]
    real, common = ep_comm.construct._hello, []

    def hello(spec: Any, *args: Any, **options: Any) -> Hello:
        mine = real(spec, *args, **options)
        common.append(getattr(mine, name))
        return replace(mine, **{name: value}) if spec.rank == 1 else mine

    monkeypatch.setattr(ep_comm.construct, "_hello", hello)
    with Cluster(1, size) as cluster:
        errors = cluster.run_catching(lambda r: Buffer(cluster.group(r), **SHAPE, device="cpu"))
        assert len({str(e).replace(f"rank {r} ", "", 1) for r, e in enumerate(errors)}) == 1
        for rank, error in enumerate(errors):
            assert isinstance(error, EPError)
            assert isinstance(error, CODES[code].cls)
            assert (error.code, error.rank, error.scope) == (code, rank, "init")
            assert f"{name}={value}" in str(error)
            assert str(common[0]) in str(error)
            if size == 3:  # the minority is named
                assert error.peer == 1
                assert f"rank 1 has {name}={value}, ranks 0,2 have {common[0]}" in str(error)
        monkeypatch.undo()
        cluster.make_buffers(**SHAPE)
        works(cluster)


def test_minority_is_named_wherever_it_sits() -> None:
    def hellos(values: list[int]) -> list[Hello]:
        return [Hello(rank=r, world_size=len(values), hidden=v) for r, v in enumerate(values)]

    for values, odd, words in (
        ([1, 2, 2], 0, "rank 0 has hidden=1, ranks 1-2 have 2"),
        ([2, 2, 1], 2, "rank 2 has hidden=1, ranks 0-1 have 2"),
        ([5, 5, 5, 5, 9, 5], 4, "rank 4 has hidden=9, ranks 0-3,5 have 5"),
        ([3, 4], 1, "rank 1 has hidden=4, rank 0 has 3"),
    ):
        for me in range(len(values)):
            with pytest.raises(EPError) as caught:
                check_agreement(me, hellos(values))
            assert caught.value.peer == odd
            assert words in str(caught.value)


def test_real_differences_of_options_are_found() -> None:
    for change, name in (
        ({"hidden": 64}, "hidden"),
        ({"num_experts": 9}, "num_experts"),
        ({"num_topk": 4}, "num_topk"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"num_slots": 4}, "num_slots"),
        ({"expert_map": [0, 0, 0, 1, 1, 0]}, "expert_map"),
        ({"backend": "cpu"}, "backend"),
        ({"config": EPConfig(paranoid=True)}, "paranoid"),
        ({"config": EPConfig(masking=True)}, "masking"),
        ({"config": EPConfig(direct=False)}, "direct"),
    ):
        with Cluster(1, 2) as cluster:

            def work(rank: int, change: Any = change, cluster: Cluster = cluster) -> Buffer:
                options = {**SHAPE, **(change if rank == 1 else {})}
                return Buffer(cluster.group(rank), **options, device="cpu")

            errors = cluster.run_catching(work)
            assert [e.code for e in errors] == ["E221", "E221"]  # type: ignore[union-attr]
            assert all(f"{name}=" in str(e) for e in errors)


def test_b4_variables_of_one_rank_change_nothing() -> None:
    ranks.run(_with_junk_variables, 2)


def _with_junk_variables(me: Any) -> None:
    if me.rank == 1:
        for name in ("BACKEND", "NUM_SLOTS", "TIMEOUT", "DEBUG", "ARENA_BYTES", "PARANOID"):
            os.environ[f"EP_COMM_{name}"] = "junk"
    buffer = me.buffer(**SHAPE)
    x = torch.ones(2, 32)
    recv = buffer.dispatch(x, torch.tensor([[0, 5], [1, 4]]))
    assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)


def _on_a_host_of_its_own(me: Any) -> str:
    boot = bytes([me.rank]) * 16
    ep_comm.construct.host_identity = lambda: (boot, 0)
    buffer = me.buffer(**SHAPE)
    x = torch.ones(2, 32)
    recv = buffer.dispatch(x, torch.tensor([[0, 5], [1, 4]]))
    assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)
    return repr(buffer)


def test_ranks_of_several_hosts_need_no_more_than_a_store() -> None:
    for text in ranks.run(_on_a_host_of_its_own, 2):
        assert "collective: CPU ranks on several hosts" in text


# ---- hostile bytes ----


def good_hello(rank: int = 1) -> Hello:
    return Hello(
        protocol=1, version="0.1.0", structs=7, world_size=2, members=3, num_experts=8,
        hidden=16, num_topk=2, max_tokens=8, num_slots=2, backend="cpu", device="cpu",
        rank=rank, pid=os.getpid(), token=bytes(range(16)),
    )  # fmt: skip


def test_a_hello_survives_its_journey() -> None:
    hello = good_hello()
    assert Hello.unpack(hello.pack(), 1) == hello


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.booleans(), st.booleans())
def test_s1_random_bytes_are_refused(data: bytes, magic: bool, checked: bool) -> None:
    size = len(good_hello().pack()) - 16
    if checked:  # a valid frame around random content
        body = (data * (size // max(1, len(data)) + 1))[:size].ljust(size, b"\0")
        data = struct.pack("<8sII", b"EPHELLO1", size, zlib.crc32(body)) + body
    elif magic:
        data = b"EPHELLO1" + data
    with pytest.raises(EPError) as caught:
        # By chance whole and of that rank: then comparing it finds the difference.
        check_agreement(0, [good_hello(0), Hello.unpack(data, 1)])
    assert caught.value.code in ("E203", "E210", "E211", "E212", "E221", "E222", "E406")
    assert "rank 1" in str(caught.value)
    assert len(str(caught.value)) <= 400


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 400))
def test_s1_a_flipped_bit_or_a_cut_is_refused(at: int, bit: int, cut: int) -> None:
    packed = bytearray(good_hello().pack())
    packed[at % len(packed)] ^= 1 << bit
    for data in (bytes(packed), bytes(good_hello().pack())[: min(cut, len(packed) - 1)]):
        with pytest.raises(EPError) as caught:
            Hello.unpack(data, 1)
        assert caught.value.code in ("E406", "E222")
    with pytest.raises(EPError) as caught:
        Hello.unpack(good_hello().pack() + b"\0", 1)
    assert caught.value.code == "E406"
    with pytest.raises(EPError) as caught:
        Hello.unpack(good_hello(rank=0).pack(), 1)  # of another rank
    assert caught.value.code == "E406"


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("kind", ["pickle", "framed-pickle", "empty", "large", "text"])
def test_s1_a_rank_that_publishes_something_else_is_e406_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    data = {
        "pickle": bomb,
        "framed-pickle": struct.pack("<8sII", b"EPHELLO1", len(bomb), zlib.crc32(bomb)) + bomb,
        "empty": b"\0",
        "large": b"EPHELLO1" * (1 << 17),
        "text": b"import os; os.mkdir('executed')",
    }[kind]
    real = Exchange.publish

    def publish(self: Exchange, name: str, payload: bytes) -> None:
        real(self, name, data if name == "hello" and self.group.rank == 1 else payload)

    monkeypatch.setattr(Exchange, "publish", publish)
    with Cluster(1, 3) as cluster:
        errors = cluster.run_catching(lambda r: Buffer(cluster.group(r), **SHAPE, device="cpu"))
    for error in errors:
        assert isinstance(error, EPError)
        assert error.code in ("E406", "E222")
        assert "rank 1" in str(error)
    assert not (tmp_path / "executed").exists()


def test_hello_of_another_version_is_recognized_by_its_length() -> None:
    body = bytes(40)
    data = struct.pack("<8sII", b"EPHELLO1", 40, zlib.crc32(body)) + body
    with pytest.raises(EPError) as caught:
        Hello.unpack(data, 3)
    assert caught.value.code == "E222"
    assert "rank 3" in str(caught.value)


# ---- who is missing ----


@three_tries
def test_b10_a_rank_alone_names_the_absentees_and_may_try_again() -> None:
    with Cluster(1, 4) as cluster:
        start = time.monotonic()
        with pytest.raises(EPTimeout) as caught:
            Buffer(cluster.group(2), **SHAPE, device="cpu", config=EPConfig(arrival_s=0.4))
        took = time.monotonic() - start
        assert took >= 0.4
        assert caught.value.code == "E120"
        assert "ranks [0, 1, 3] missing" in str(caught.value)
        assert caught.value.scope == "init"
        cluster.make_buffers(**SHAPE)
        cluster.run(
            lambda r: cluster.buffers[r].dispatch(torch.ones(1, 32), torch.tensor([[0, 5]]))
        )
    within(2.0, took)


def test_b10_who_gives_up_a_moment_before_us_is_not_missing() -> None:
    """Of ranks 0 to 3, 1 and 2 never come; 4 comes when the others have gone."""
    store = dist.HashStore()

    def comes(rank: int) -> Exchange:
        exchange = Exchange(Group(store, rank, 5, None, (0, 1, 2, 3, 4)), 0.001)
        exchange.publish("hello", b"here")
        return exchange

    def gives_up(exchange: Exchange) -> EPError:
        with pytest.raises(EPTimeout) as caught:
            exchange.gather("hello", b"here")
        exchange.abandon()
        return caught.value

    together = [comes(rank) for rank in (0, 3)]
    for exchange in reversed(together):
        error = gives_up(exchange)
        assert (error.code, error.peer) == ("E120", 1)
        assert "ranks [1, 2, 4] missing" in str(error)
    error = gives_up(comes(4))
    assert (error.code, error.peer) == ("E120", 0)
    assert "ranks [0, 1, 2, 3] missing" in str(error)


def test_b10_a_late_rank_does_not_meet_the_ghost_of_one_that_gave_up() -> None:
    """Rank 1 comes after rank 0 has gone: for it, rank 0 is missing, until it tries again."""
    with Cluster(1, 2) as cluster:
        short, long = EPConfig(arrival_s=0.3), PATIENT
        with pytest.raises(EPTimeout):
            Buffer(cluster.group(0), **SHAPE, device="cpu", config=short)
        with pytest.raises(EPTimeout) as caught:
            Buffer(cluster.group(1), **SHAPE, device="cpu", config=short)
        assert "ranks [0] missing" in str(caught.value)

        def work(rank: int) -> Buffer:
            time.sleep(0.3 * (1 - rank))  # rank 1 waits for rank 0 this time
            return Buffer(cluster.group(rank), **SHAPE, device="cpu", config=long)

        cluster.buffers += cluster.run(work)
        works(cluster)


def test_b11_wrong_world_is_refused_by_all_who_can_know() -> None:
    store = dist.HashStore()
    results: dict[int, Any] = {}

    def work(rank: int, size: int) -> None:
        try:
            Buffer(StoreGroup(store, rank, size), **SHAPE, device="cpu", config=PATIENT)
        except EPError as error:
            results[rank] = error

    def start(rank: int, size: int) -> threading.Thread:
        thread = threading.Thread(target=work, args=(rank, size))
        thread.start()
        return thread

    first, second = start(0, 2), start(1, 3)
    first.join(60)
    assert list(results) == [0]  # rank 1 waits for a third one
    third = start(2, 3)
    for thread in (second, third):
        thread.join(60)
    for rank in range(3):
        assert results[rank].code == "E406"
        assert "world_size" in str(results[rank])


@pytest.mark.parametrize(
    "group",
    [
        lambda s: StoreGroup(s, 2, 2),
        lambda s: StoreGroup(s, -1, 2),
        lambda s: StoreGroup(s, 0, 0),
        lambda s: StoreGroup(s, "0", 2),
        lambda s: StoreGroup(None, 0, 2),
        lambda s: StoreGroup(s, 0, 2, name=5),
        lambda s: "world",
        lambda s: s,
    ],
)
def test_groups_that_are_none_are_e406(group: Any) -> None:
    with pytest.raises(EPEnvironmentError) as caught:
        Buffer(group(dist.HashStore()), **SHAPE, device="cpu")
    assert caught.value.code == "E406"


# ---- sockets ----


class TwoSides:
    """Two listeners in this process that take each other for processes."""

    def __init__(self) -> None:
        self.listeners = [Listener(), Listener()]
        boot, namespace = bootstrap.host_identity()
        pids = (os.getpid(), os.getppid())
        self.hellos = [
            replace(
                good_hello(r), token=self.listeners[r].token, pid=pids[r], boot_id=boot,
                pid_namespace=namespace,
            )
            for r in range(2)
        ]  # fmt: skip
        self.token = group_token(self.hellos)
        self.results: dict[int, Any] = {}

    def connect(self, rank: int, limit_s: float = 60.0) -> threading.Thread:
        def body() -> None:
            group = Group(dist.HashStore(), rank, 2, None, (0, 1))
            try:
                self.results[rank] = self.listeners[rank].connect_all(
                    rank, self.hellos, self.token, Exchange(group, limit_s)
                )
            except EPError as error:
                self.results[rank] = error

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    def address(self, rank: int) -> bytes:
        return b"\0ep_comm-" + self.listeners[rank].token.hex().encode()

    def __enter__(self) -> TwoSides:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self.listeners:
            listener.close()
        for result in self.results.values():
            if isinstance(result, bootstrap.Mesh):
                result.close()


def stranger(address: bytes, data: bytes, *, stay: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address)
    sock.sendall(data)
    if not stay:
        sock.close()
    return sock


def test_s1_strangers_at_the_socket_are_refused_and_peers_still_get_in() -> None:
    with TwoSides() as sides:
        accepting = sides.connect(0)
        greeting = struct.Struct("<8s16si")
        for data in (
            b"",
            b"GET / HTTP/1.0\r\n\r\n",
            pickle.dumps(Bomb()),
            os.urandom(28),
            greeting.pack(b"EPHELLO1", bytes(16), 1),  # right form, wrong token
            greeting.pack(b"EPHELLO1", sides.token, 0),  # our own rank
            greeting.pack(b"EPHELLO1", sides.token, -5),
            greeting.pack(b"EPHELLO1", sides.token, 1000),
            greeting.pack(b"EPHELLO1", sides.token, 1)[:20],  # cut
        ):
            stranger(sides.address(0), data)
        connecting = sides.connect(1)
        for thread in (accepting, connecting):
            thread.join(120)
        assert isinstance(sides.results[0], bootstrap.Mesh), sides.results[0]
        assert isinstance(sides.results[1], bootstrap.Mesh), sides.results[1]
        assert list(sides.results[0].sockets) == [1]
        sides.results[1].sockets[0].sendall(b"it is me")
        sides.results[0].sockets[1].settimeout(5)
        assert sides.results[0].sockets[1].recv(8) == b"it is me"


@three_tries
def test_silent_stranger_does_not_keep_peers_out_for_long() -> None:
    with TwoSides() as sides:
        accepting = sides.connect(0)
        silent = stranger(sides.address(0), b"E", stay=True)
        time.sleep(0.1)
        start = time.monotonic()
        connecting = sides.connect(1)
        for thread in (accepting, connecting):
            thread.join(120)
        took = time.monotonic() - start
        silent.close()
        assert isinstance(sides.results[0], bootstrap.Mesh), sides.results[0]
        within(4.0, took)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_s3_another_user_is_refused_at_the_socket() -> None:
    with TwoSides() as sides:
        accepting = sides.connect(0)
        greeting = struct.pack("<8s16si", b"EPHELLO1", sides.token, 1)
        program = (
            "import os, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX)\n"
            "os.setuid(65534)\n"
            f"s.connect({sides.address(0)!r})\n"
            "s.settimeout(60)\n"
            "try:\n"
            f"    s.sendall({greeting!r})\n"
            "    sys.exit(0 if s.recv(1) == b'' else 1)\n"
            "except ConnectionError:\n"
            "    sys.exit(0)\n"
        )
        refused = subprocess.run([sys.executable, "-I", "-c", program], timeout=100, check=False)
        assert refused.returncode == 0, "the greeting of another user was not hung up on"
        assert accepting.is_alive()
        connecting = sides.connect(1)
        for thread in (accepting, connecting):
            thread.join(120)
        assert isinstance(sides.results[0], bootstrap.Mesh)


def test_s3_uid_of_the_other_end_is_checked_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.sockets, "_credentials", lambda sock: (os.getpid(), 12345, 0))
    with TwoSides() as sides:
        threads = [sides.connect(rank, limit_s=0.5) for rank in range(2)]
        for thread in threads:
            thread.join(60)
        accepted, connected = sides.results[0], sides.results[1]
        assert accepted.code == "E120"  # rank 1 never came: that was somebody else
        assert connected.code == "E406"
        assert "uid 12345" in str(connected)


def test_descriptors_travel_close_on_exec_and_whole() -> None:
    ours, theirs = socket.socketpair()
    first, second = (_core.Segment.create("test", 4096 * n) for n in (1, 2))
    bootstrap.send_fds(ours, [first.fd, second.fd], [4096, 8192], 5.0)
    fds, sizes = bootstrap.receive_fds(theirs, 2, 5.0)
    assert sizes == [4096, 8192]
    for fd, size in zip(fds, sizes, strict=True):
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_size == size
        os.close(fd)
    before = set(os.listdir("/proc/self/fd"))
    bootstrap.send_fds(ours, [first.fd], [4096, 1], 5.0)
    with pytest.raises(OSError, match="1 descriptors"):
        bootstrap.receive_fds(theirs, 2, 5.0)
    bootstrap.send_fds(ours, [first.fd] * 4, [1, 2], 5.0)
    with pytest.raises(OSError, match="descriptors"):
        bootstrap.receive_fds(theirs, 2, 5.0)
    ours.close()
    with pytest.raises(OSError, match="0 descriptors"):
        bootstrap.receive_fds(theirs, 2, 5.0)
    theirs.close()
    assert not set(os.listdir("/proc/self/fd")) - before  # all closed


# ---- what stays behind ----


def footprint() -> dict[str, Any]:
    """What this process holds that a buffer might leave."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = [line.split(maxsplit=5)[5].strip() for line in maps if "memfd:ep_comm" in line]
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/net/unix") as unix:
        rows = [line.split() for line in unix if "@ep_comm-" in line]
    listening = {f"socket:[{row[6]}]" for row in rows if row[3] == "00010000"}
    return {
        "segments": mapped,
        "descriptors": sorted(link.split(":")[0] for link in links),
        "threads": len(os.listdir("/proc/self/task")),
        "shm": [link for link in links if link.startswith("/dev/shm")],
        "reachable": [link for link in links if link in listening],
        "vm_bytes": address_space(),
    }


def address_space() -> int:
    """Mapped bytes, but for the heaps of threads: malloc reserves 64 MiB for each thread that runs
    beside others for the first time, and keeps them for later ones.
    """
    heap = 64 << 20
    spans = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, *_ = line.split(maxsplit=5)
            start, end = (int(at, 16) for at in span.split("-"))
            spans.append((start, end, rights))
    total = sum(end - start for start, end, _ in spans)
    for (start, middle, used), (begin, end, unused) in pairwise(spans):
        is_heap = start % heap == 0 and end - start == heap and middle == begin
        if is_heap and (used, unused) == ("rw-p", "---p"):
            total -= heap
    return total


def assert_same_footprint(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["vm_bytes"] - before["vm_bytes"] < 64 << 20, "address space grew"
    for name in ("segments", "descriptors", "threads", "shm", "reachable"):
        assert after[name] == before[name], name


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of this test's buffers is left when it ends."""
    before = footprint()
    yield
    after = footprint()
    assert after["segments"] == before["segments"]
    assert not ep_comm.backends.mapping._in_process  # type: ignore[attr-defined]


def test_closed_processes_leave_nothing_in_processes() -> None:
    ranks.run(_leaves_nothing, 3)


def _leaves_nothing(me: Any) -> None:
    def use(name: str) -> None:
        buffer = Buffer(me.group(name), **SHAPE, device="cpu")
        recv = buffer.dispatch(torch.ones(4, 32), torch.zeros(4, 2, dtype=torch.int64))
        buffer.combine(recv.x, recv.handle, wait=False).wait()
        buffer.close()

    use("warm")
    before = footprint()
    for i in range(5):
        use(f"round {i}")
    assert_same_footprint(before, footprint())
    assert footprint()["segments"] == []
    # While a buffer lives, its memory has no name anybody could open.
    buffer = Buffer(me.group("last"), **SHAPE, device="cpu")
    living = footprint()
    assert living["shm"] == []
    assert living["reachable"] == []
    assert len(living["segments"]) >= 2 * me.size
    assert all(name.startswith("/memfd:") for name in living["segments"])
    buffer.close()


def test_f3_construct_and_close_1000_times_keeps_memory_and_descriptors_flat() -> None:
    store = dist.HashStore()

    def once() -> None:
        def work(rank: int) -> None:
            group = StoreGroup(store, rank, 2)
            with Buffer(group, **SHAPE, device="cpu", arena_bytes=1 << 20) as buffer:
                buffer.dispatch(torch.ones(1, 32), torch.tensor([[0, 5]]))

        threads = [threading.Thread(target=work, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    once()
    before = footprint()
    for _ in range(1000):
        once()
    assert_same_footprint(before, footprint())


@pytest.mark.usefixtures("clean")
def test_f1_allocation_that_fails_on_one_rank_is_e232_everywhere_and_memory_comes_back() -> None:
    with Cluster(1, 3) as cluster:
        before = footprint()

        def work(rank: int) -> Buffer:
            size = (1 << 62) if rank == 1 else (1 << 20)
            return Buffer(cluster.group(rank), **SHAPE, device="cpu", arena_bytes=size)

        def check(rank: int, error: Any) -> None:
            assert isinstance(error, EPMemoryError)
            assert (error.code, error.rank) == ("E232", rank)
            assert "out of memory" in str(error)
            assert rank == 1 or (error.peer == 1 and "rank 1" in str(error))

        for rank, error in enumerate(cluster.run_catching(work)):
            check(rank, error)
        del error
        assert_same_footprint(before, footprint())
        cluster.make_buffers(**SHAPE)
        works(cluster)


def test_f1_allocation_that_fails_in_one_process_leaves_nothing() -> None:
    ranks.run(_fails_to_allocate, 3)


def test_f1_an_error_that_is_kept_keeps_no_memory() -> None:
    ranks.run(_keeps_an_error, 3)


def _keeps_an_error(me: Any) -> None:
    me.buffer("warm").close()
    me.kept.clear()
    before = footprint()["segments"]
    gc.disable()
    size = (1 << 62) if me.rank == 2 else (1 << 20)
    with pytest.raises(EPMemoryError) as caught:
        me.buffer("fails", arena_bytes=size)
    with open("/proc/self/maps") as maps:
        assert sum("memfd:ep_comm" in line for line in maps) == len(before)
    assert caught.value.code == "E232"


def _fails_to_allocate(me: Any) -> None:
    me.buffer("warm").close()
    me.kept.clear()
    before = footprint()
    size = (1 << 62) if me.rank == 2 else (1 << 20)
    with pytest.raises(EPMemoryError) as caught:
        me.buffer("fails", arena_bytes=size)
    assert caught.value.code == "E232"
    del caught
    assert_same_footprint(before, footprint())


# ---- what nobody foresaw, on one rank ----

STEPS: dict[str, tuple[str, str]] = {  # backend, what fails
    "cpu-before": ("cpu", "ep_comm.construct.host_identity"),
    "cpu-agree": ("cpu", "ep_comm.construct.check_agreement"),
    "cpu-connect": ("cpu", "ep_comm.bootstrap.Listener.connect_all"),
    "cpu-create": ("cpu", "ep_comm.backends.mapping._create"),
    "cpu-share": ("cpu", "ep_comm.backends.mapping._share"),
    "cpu-open": ("cpu", "ep_comm.backends.cpu.CpuBackend.__init__"),
    "collective-agree": ("collective", "ep_comm.construct.choose"),
    "collective-open": ("collective", "ep_comm.backends.wire._open"),
    "collective-meet": ("collective", "ep_comm.backends.wire.Wire._meet"),
}
FAILURES: dict[str, BaseException | None] = {
    "memory": MemoryError("no more"),
    "interrupt": KeyboardInterrupt(),
    "killed": None,
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("step", STEPS)
@three_tries
def test_c1_failure_of_one_rank_ends_construction_everywhere_at_once(
    step: str, failure: str
) -> None:
    with ranks.Ranks(_constructs, 3, step, failure) as three:
        three.hear_all()
        three.go()
        failed, took = three.hear(1), 0.0
        for rank in (0, 2):
            error, when = three.hear(rank)
            assert (error.code, error.rank, error.peer) == (_code(step, failure), rank, 1), error
            took = max(took, when - failed)
            if failure != "killed":
                assert f"raised {FAILURES[failure]!r}" in str(error)
        if failure != "killed":
            assert three.hear(1) == repr(FAILURES[failure])  # not what came of it
    if _code(step, failure) != "E120":
        within(2.0, took)


def _code(step: str, failure: str) -> str:
    if step == "cpu-before" and failure != "interrupt":
        return "E120" if failure == "killed" else "E203"  # killed: nobody knows that it ever lived
    return "E110" if failure == "killed" else "E111"


def _constructs(me: Any, step: str, failure: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        until(lambda: store.check([f"ep_comm/default/1/hello/{rank}" for rank in (0, 2)]))
        me.say(time.monotonic())
        error = FAILURES[failure]
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise error

    backend, name = STEPS[step]
    patch = pytest.MonkeyPatch()
    if me.rank == 1:
        patch.setattr(name, fail)
    limit_s = LONGER_S if _code(step, failure) == "E120" else 60.0
    store = me.group().store
    me.say("starts")
    me.wait_for_go()
    try:
        me.buffer(backend=backend, config=EPConfig(arrival_s=limit_s))
    except EPError as error:
        me.say((error, time.monotonic()))
    except BaseException as error:
        me.say(repr(error))
    me.wait_for_go()  # a rank that ended would be found dead, too


@pytest.mark.usefixtures("clean")
def test_refused_construction_leaves_nothing() -> None:
    with Cluster(1, 2) as cluster:
        before = footprint()
        for change in ({"num_topk": 99}, {"hidden": 64}):
            cluster.run_catching(
                lambda r, c=change: Buffer(
                    cluster.group(r), **{**SHAPE, **(c if r else {})}, device="cpu"
                )
            )
        assert_same_footprint(before, footprint())


def test_dropped_buffer_closes_itself() -> None:
    before = footprint()
    cluster = Cluster(1, 2)
    cluster.make_buffers(**SHAPE)
    works(cluster)
    cluster.buffers.clear()
    assert_same_footprint(before, footprint())


# ---- E341 ----


def test_c9_a_fork_may_not_use_the_buffer_nor_end_it() -> None:
    ranks.run(_forks, 2)


def _forks(me: Any) -> None:
    buffer = me.buffer(**SHAPE)
    x, idx = torch.ones(2, 32), torch.tensor([[0, 5], [1, 4]])
    begun = buffer.dispatch(x, idx, wait=False)
    recv = begun.wait()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            buffer.dispatch(x, idx)
        except EPError as error:
            code = 0 if error.code == "E341" else 2
        finally:
            buffer.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)  # still here, on every rank
