"""The security rules, one by one; a name carries the number of its rule.

Ranks of a group trust each other's intentions, not their numbers; everybody else is a stranger.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from patience import PATIENT, three_tries, within

import ep_comm
from ep_comm import _core, bootstrap, construct
from ep_comm.bootstrap import Hello, Listener, receive_fds, send_fds, sockets
from ep_comm.bootstrap.hello import MAGIC
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted((ROOT / "ep_comm").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cc", ".h", ".cu", ".cuh"))
SHAPE: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 16, "max_tokens": 8}


# ---- reading our own sources ----


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "ep_comm").as_posix()


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything called, as written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def files_that_import(*modules: str) -> set[str]:
    return {name_of(p) for p in PYTHON if imports(ast.parse(p.read_text())) & set(modules)}


def files_that_call(pattern: str) -> set[str]:
    matches = re.compile(pattern).fullmatch
    return {name_of(p) for p in PYTHON if any(map(matches, calls(ast.parse(p.read_text()))))}


def native_files_with(pattern: str) -> set[str]:
    found = re.compile(pattern).search
    return {p.relative_to(ROOT).as_posix() for p in NATIVE if found(_code(p.read_text()))}


def _code(text: str) -> str:
    return re.sub(r"//.*", "", text)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
    )


# ---- 7.1 bootstrap: a fixed struct, never code ----


class Trap:
    """Pickled, it is a command."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("/tmp/ep_comm-was-unpickled",))


def test_s7_1_handshake_carries_magic_length_checksum_version_and_token() -> None:
    data = Hello(rank=3, version="1.2", token=b"t" * 16).pack()
    magic, length, _ = struct.unpack_from("<8sII", data)
    assert magic == b"EPHELLO1"
    assert len(data) == 16 + length
    assert b"1.2" in data
    assert Hello.unpack(data, 3).token == b"t" * 16
    tokens = set()
    for _ in range(8):
        listener = Listener()
        tokens.add(listener.token)
        listener.close()
    assert len(tokens) == 8
    assert {len(token) for token in tokens} == {16}


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"EPHELLO1", pickle.dumps(Trap()), pickle.dumps(Trap(), 0), b"\0" * 10**6],
    ids=["empty", "byte", "magic", "pickle", "pickle-text", "megabyte"],
)
def test_s7_1_foreign_bytes_are_e406_and_nothing_runs(data: bytes) -> None:
    with pytest.raises(EPError) as caught:
        Hello.unpack(data, 0)
    assert caught.value.code == "E406"
    assert not os.path.exists("/tmp/ep_comm-was-unpickled")


def test_s7_1_nothing_in_the_package_unpickles_or_evaluates() -> None:
    # The spawner of test ranks talks to its own children, as multiprocessing does.
    assert files_that_import("pickle", "marshal", "shelve", "dill", "cloudpickle") <= {
        "testing/processes.py"
    }
    assert files_that_call(r"eval|exec|__import__|(builtins\.)?compile") == set()
    # The benchmark's ranks tell each other their times through torch.distributed.
    objects = r"torch\.load|.*\.\w*(gather|scatter|broadcast|send|recv)_object\w*"
    assert {name for name in files_that_call(objects) if not name.startswith("bench/")} == set()


# ---- 7.2 descriptors ----


def connected() -> tuple[Listener, socket.socket, socket.socket]:
    """A listener, a stranger's end, and ours."""
    listener = Listener()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.connect(sockets._address(listener.token))
    ours, _ = listener._socket.accept()
    return listener, stranger, ours


def greeting(token: bytes, rank: int) -> bytes:
    return sockets._GREETING.pack(MAGIC, token, rank)


def test_s7_2_socket_of_another_uid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, stranger, ours = connected()
    stranger.sendall(greeting(b"g" * 16, 1))
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)  # now the stranger is another user
    assert Listener._greet(ours, b"g" * 16, {1}) is None
    with pytest.raises(EPError) as caught:
        sockets._check_user(ours, 1)
    assert caught.value.code == "E406"
    for each in (stranger, ours):
        each.close()
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_s7_2_another_user_who_knows_every_token_is_still_refused() -> None:
    listener = Listener()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            stranger.connect(sockets._address(listener.token))
            stranger.sendall(greeting(b"g" * 16, 1))
            stranger.recv(1)
        finally:
            os._exit(0)
    ours, _ = listener._socket.accept()
    assert Listener._greet(ours, b"g" * 16, {1}) is None
    ours.close()
    listener.close()
    os.waitpid(pid, 0)


def test_s7_2_descriptors_arrive_close_on_exec() -> None:
    a, b = socket.socketpair()
    segment = _core.Segment.create("test", 4096)
    send_fds(a, [segment.fd, segment.fd], [1, 2], 1.0)
    fds, sizes = receive_fds(b, 2, 1.0)
    assert sizes == [1, 2]
    assert [fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds] == [1, 1]
    assert fcntl.fcntl(segment.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    for fd in fds:
        os.close(fd)
    a.close()
    b.close()


@pytest.mark.parametrize(
    ("num_fds", "num_bytes"), [(0, 16), (1, 16), (3, 16), (2, 0), (2, 8), (2, 15)]
)
def test_s7_2_message_with_other_descriptors_leaves_none_behind(
    num_fds: int, num_bytes: int
) -> None:
    a, b = socket.socketpair()
    segment = _core.Segment.create("test", 4096)
    before = set(os.listdir("/proc/self/fd"))
    if num_bytes == 0:
        a.shutdown(socket.SHUT_WR)
    else:
        socket.send_fds(a, [b"\1" * num_bytes], [segment.fd] * num_fds)
    with pytest.raises(OSError, match="descriptors"):
        receive_fds(b, 2, 1.0)
    assert set(os.listdir("/proc/self/fd")) <= before
    a.close()
    b.close()


def _descriptors(me: Any) -> tuple[list[str], list[str], list[int]]:
    """Memory this rank has descriptors of while it works and after close; inheritable ones."""

    def memory() -> list[str]:
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue
        return sorted(link.split(" ")[0] for link in links if "memfd:ep_comm" in link)

    before = set(os.listdir("/proc/self/fd"))
    buffer = me.buffer()
    buffer.dispatch(torch.ones(2, 16), torch.tensor([[0, 5], [7, -1]]))
    now = [int(fd) for fd in set(os.listdir("/proc/self/fd")) - before]
    inheritable = []
    for fd in now:
        try:
            if not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                inheritable.append(fd)
        except OSError:
            continue
    during = memory()
    buffer.close()
    me.kept.clear()
    del buffer
    gc.collect()
    return during, memory(), inheritable


def test_s7_2_descriptors_are_closed_once_memory_is_mapped() -> None:
    for during, after, inheritable in ranks.run(_descriptors, 2):
        assert during == ["/memfd:ep_comm_arena"]  # our own: release() gives its pages back
        assert after == []
        assert inheritable == []


def test_s7_2_no_descriptor_is_taken_out_of_another_process() -> None:
    forbidden = r"pidfd_getfd|ptrace|process_vm_(readv|writev)|/proc/.*/(fd|mem)\b"
    assert native_files_with(forbidden) == set()
    assert [
        p for p in PYTHON if re.search(r"pidfd_getfd|ptrace\(|process_vm_", p.read_text())
    ] == []


def test_s7_2_tokens_are_neither_logged_nor_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Cluster(1, 2) as cluster:
        buffers = cluster.make_buffers(**SHAPE)
        tokens = [key[0] for key in _in_process()]
        assert tokens
        shown = caplog.text + repr(buffers) + str(buffers[0].stats())
        assert not [t for t in tokens if t.hex() in shown or repr(t) in shown]
    secret = b"\x5a" * 16
    hellos = [Hello(rank=r, hidden=16 * (r + 1), token=secret) for r in range(2)]
    with pytest.raises(EPError) as caught:
        bootstrap.check_agreement(0, hellos)
    assert secret.hex() not in str(caught.value)
    assert repr(secret) not in str(caught.value)


def _in_process() -> list[tuple[bytes, int]]:
    from ep_comm.backends import mapping

    return list(mapping._in_process)


# ---- 7.3 host identity ----


def test_s7_3_host_is_known_by_boot_id_and_never_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> str:
        raise AssertionError("asked for the hostname")

    monkeypatch.setattr(socket, "gethostname", forbidden)
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = bytes.fromhex(file.read().strip().replace("-", ""))
    assert bootstrap.host_identity()[0] == boot

    def unreadable(*args: Any, **options: Any) -> Any:
        raise PermissionError("no /proc here")

    monkeypatch.setattr("builtins.open", unreadable)
    mine = bootstrap.host_identity()[0]
    assert len(mine) == 16
    assert mine != boot
    assert bootstrap.host_identity()[0] == mine  # ranks that are threads still find each other
    names = r"(socket\.)?(gethostname|getfqdn)|platform\.node|os\.uname"
    assert files_that_call(names) == set()


def test_s7_3_processes_without_boot_id_share_no_memory() -> None:
    code = (
        "import builtins\n"
        "from ep_comm import bootstrap\n"
        "def no(*args, **options): raise PermissionError\n"
        "builtins.open = no\n"
        "print(bootstrap.host_identity()[0].hex())"
    )
    assert run_python(code).stdout != run_python(code).stdout


def test_s7_3_gpu_is_known_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(visible: list[str]) -> list[int]:
        properties = [SimpleNamespace(uuid=uuid) for uuid in visible]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties[d.index])
        return [construct._gpu(torch.device("cuda", i)) for i in range(len(visible))]

    first, second = known(["GPU-a", "GPU-b"])
    assert first != second
    assert known(["GPU-b", "GPU-a"]) == [second, first]  # whatever number it has here
    assert construct._gpu(torch.device("cpu")) == 0
    assert 0 not in (first, second)


# ---- 7.4 shared memory ----


def test_s7_4_memory_cannot_be_resized_or_unsealed() -> None:
    segment = _core.Segment.create("test", 8192)
    seals = fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS)
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert seals & wanted == wanted
    for size in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_s7_4_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    segment = _core.Segment.create("ep_comm_test", 8192)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not [name for name in after - before if "ep_comm" in name]
    assert os.fstat(segment.fd).st_nlink == 0
    assert os.readlink(f"/proc/self/fd/{segment.fd}").endswith(" (deleted)")


def _unsealed(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("size", "seals"),
    [
        (8192, 0),
        (8192, fcntl.F_SEAL_SHRINK),
        (8192, fcntl.F_SEAL_GROW),
        (4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    ],
    ids=["unsealed", "may-grow", "may-shrink", "short"],
)
def test_s7_4_memory_a_peer_could_cut_off_is_refused(size: int, seals: int) -> None:
    fd = _unsealed(size, seals)
    with pytest.raises(OSError, match="unsealed or short"):
        _core.Segment.map(fd, 8192)
    os.close(fd)


def test_s7_4_file_instead_of_memory_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        file.truncate(8192)
        with pytest.raises(OSError):
            _core.Segment.map(file.fileno(), 8192)


# ---- 7.5 mappings ----


def test_s7_5_control_and_payload_are_mapped_apart() -> None:
    with Cluster(1, 2) as cluster:
        for buffer in cluster.make_buffers(**SHAPE, arena_bytes=1 << 20):
            for control, arena in buffer._backend._memory.peers.values():
                spans = sorted((s.address, s.address + s.bytes) for s in (control, arena))
                assert spans[0][1] + 4096 <= spans[1][0]
                assert control.fd == -1


@pytest.mark.parametrize("offset", ["-1", "-4096", "+n", "+n+4095"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_s7_5_guard_pages_stop_what_runs_over(offset: str, access: str) -> None:
    """In a process of its own, which the kernel ends."""
    code = (
        "import ctypes, faulthandler\n"
        "from ep_comm import _core\n"
        "s = _core.Segment.create('test', 3 * 4096); n = s.bytes\n"
        "ctypes.c_ubyte.from_address(s.address).value = 1\n"
        "ctypes.c_ubyte.from_address(s.address + n - 1).value = 1\n"
        f"at = ctypes.c_ubyte.from_address(s.address {offset})\n"
        "print('in bounds is fine', flush=True)\n"
    ) + ("print(at.value)" if access == "read" else "at.value = 1")
    done = run_python(code)
    assert "in bounds is fine" in done.stdout, done.stderr
    assert done.returncode == -signal.SIGSEGV


READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


def _rights_of_devices(me: Any) -> dict[tuple[int, str], list[set[int]]] | None:
    """For each region of each rank, as it is mapped here: the rights of every GPU, at both ends."""
    torch.cuda.set_device(me.rank)
    buffer = ep_comm.Buffer(me.group(), **SHAPE, device="cuda", backend="nvlink")
    regions = [
        (rank, name, memory)
        for rank, pair in buffer._backend._memory.peers.items()
        for name, memory in pair._asdict().items()
    ]
    if any(memory.is_ipc for *_, memory in regions):
        return None
    driver = ctypes.CDLL("libcuda.so.1")

    def rights(address: int, device: int) -> int:
        flags, location = ctypes.c_ulonglong(99), (ctypes.c_int * 2)(1, device)  # a device's
        error = driver.cuMemGetAccess(
            ctypes.byref(flags), ctypes.byref(location), ctypes.c_ulonglong(address)
        )
        assert error == 0, f"cuMemGetAccess: {error}"
        return flags.value

    return {
        (rank, name): [
            {rights(at, device) for at in (memory.address, memory.address + memory.bytes - 1)}
            for device in range(torch.cuda.device_count())
        ]
        for rank, name, memory in regions
    }


@pytest.mark.gpus(2)
def test_s7_5_memory_is_accessible_to_devices_of_the_group_only() -> None:
    """More exactly: a process maps memory, its own and that of its peers, for its own GPU alone."""
    found = ranks.run(_rights_of_devices, 2)
    if None in found:
        pytest.skip("memory is shared by IPC handles here: the driver decides who may use it")
    for me, regions in enumerate(found):
        assert {rank for rank, _ in regions} == {0, 1}
        assert {name for _, name in regions} == {"control", "arena"}
        for region, by_device in regions.items():
            for device, rights in enumerate(by_device):
                assert rights == {READ_WRITE if device == me else 0}, (me, region, device)


# ---- 7.6 numbers of peers ----

ENTRY = struct.Struct("<Qii11q6q4q112s")  # EntryRecord
BASE = struct.Struct("<Qii4q2q")  # BaseRecord
ENTRY_STRIDE, WORD_STRIDE = _core.STRUCT_SIZES[4], _core.STRUCT_SIZES[5]


class HostilePeer:
    """Two ranks of which only rank 0 calls; this test writes what rank 1 would, and lies."""

    def __init__(self) -> None:
        assert _core.STRUCT_SIZES[:2] == (ENTRY.size, BASE.size)
        self.cluster = Cluster(1, 2)
        # No lie is found out by a clock.
        self.cluster.make_buffers(**SHAPE, arena_bytes=1 << 20, config=PATIENT)
        x, ids = torch.ones(4, 16), torch.tensor([[0, 2], [1, 3], [2, 2], [-1, 0]])
        self.call = (x, ids)
        # An honest call first: what rank 0 said there, rank 1 says from now on, too.
        self.cluster.run(lambda rank: self.cluster.buffers[rank].dispatch(x, ids))
        shape = _core.Shape()
        shape.num_ranks, shape.num_slots, shape.num_experts = 2, 2, 4
        shape.max_local_experts, shape.num_topk, shape.max_tokens = 2, 2, 8
        self.regions = {name: at for name, at, _ in _core.ControlLayout(shape).regions()}
        self.mine = self.cluster.buffers[1]._backend._memory.own.control.address
        self.victim = self.cluster.buffers[0]._backend._memory.own.control.address
        heard = (ctypes.c_char * ENTRY.size).from_address(
            self.mine + self.regions["entries"] + 2 * ENTRY_STRIDE
        )
        self.descriptor = ENTRY.unpack(heard.raw)[3:14]

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def say(self, entry: dict[str, Any], base: dict[str, Any], counts: tuple[int, ...]) -> None:
        """Everything rank 0 waits for in operation 2, slot 0."""
        e: dict[str, Any] = {
            "seq": 2, "kind": 1, "code": 0, "num_tokens": 4, "num_rows": 3, "y_offset": 0,
            "streamed_rows": -1, "ring_rows": 0, "weights_offset": -1, "detail": (0, 0, 0, 0),
            "reason": b"", **entry,
        }  # fmt: skip
        b: dict[str, Any] = {
            "seq": 2, "code": 0, "x_offset": 0, "meta_offset": 4096, "row": 0, "num_rows": 8,
            "detail": (0, 0), **base,
        }  # fmt: skip
        self.write(self.victim + self.regions["counts"] + 1 * 2 * 4, struct.pack("<2i", *counts))
        record = ENTRY.pack(
            e["seq"], e["kind"], e["code"], *e.get("descriptor", self.descriptor), e["num_tokens"],
            e["num_rows"], e["y_offset"], e["streamed_rows"], e["ring_rows"],
            e["weights_offset"], *e["detail"], e["reason"],
        )  # fmt: skip
        self.write(self.victim + self.regions["entries"] + ENTRY_STRIDE, record)
        record = BASE.pack(
            b["seq"], b["code"], 0, b["x_offset"], b["meta_offset"], b["row"], b["num_rows"],
            *b["detail"],
        )  # fmt: skip
        self.write(self.victim + self.regions["bases"] + BASE.size, record)
        self.write(self.victim + self.regions["arrived"] + WORD_STRIDE, struct.pack("<Q", 1 << 20))

    def fail(self, **verdict: int) -> None:
        """Rank 1's communicator has failed, and this is why."""
        v = {"code": 330, "rank": 1, "peer": 0, "want": 1, "have": 2, **verdict}
        incident = struct.pack(
            "<IHBBhhIQQQqqII", 0x49505045, v["code"], 0, 1, v["rank"], v["peer"], 0, 2, 0, 0,
            v["want"], v["have"], 0, 0,
        )  # fmt: skip
        header = self.mine + self.regions["header"]
        self.write(header + 56, incident)
        self.write(header + 48, struct.pack("<Q", 1))
        self.write(header + 24, struct.pack("<I", 3))  # Life::kFailed

    def error(self) -> EPError:
        """What rank 0's dispatch raises, as an EPError."""
        with pytest.raises(EPError) as caught:
            self.cluster.buffers[0].dispatch(*self.call)
        return caught.value


@pytest.fixture
def hostile() -> Iterator[HostilePeer]:
    peer = HostilePeer()
    yield peer
    peer.cluster.close()


LIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "rows-negative": ("E240", {"num_rows": -1}, {}, (1, 2)),
    "rows-huge": ("E240", {"num_rows": 1 << 40}, {}, (1, 2)),
    "rows-over-tokens": ("E240", {"num_rows": 5}, {}, (1, 2)),
    "tokens-and-rows-over-max": ("E240", {"num_tokens": 1 << 40, "num_rows": 9}, {}, (1, 2)),
    "selections-negative": ("E240", {}, {}, (-1, 2)),
    "selections-huge": ("E240", {}, {}, (1, 2**31 - 1)),
    "code-0-in-16-bits": ("E240", {"code": 1 << 16}, {}, (1, 2)),
    "code-unknown": ("E240", {"code": 999}, {}, (1, 2)),
    "code-interrupted": ("E240", {"code": 1}, {}, (1, 2)),
    "code-negative": ("E240", {"code": -1}, {}, (1, 2)),
    "reason-no-text": ("E201", {"code": 201, "reason": b"\xff" * 112}, {}, (1, 2)),
    "kind-unknown": ("E330", {"kind": 2**31 - 1}, {}, (1, 2)),
    "seq-of-later": ("E241", {"seq": 1 << 60}, {}, (1, 2)),
    "offset-outside": ("E240", {}, {"x_offset": 1 << 20}, (1, 2)),
    "offset-negative": ("E240", {}, {"x_offset": -4096}, (1, 2)),
    "offset-wraps": ("E240", {}, {"x_offset": 2**63 - 1}, (1, 2)),
    "offset-odd": ("E240", {}, {"x_offset": 8}, (1, 2)),
    "meta-outside": ("E240", {}, {"meta_offset": (1 << 20) - 16}, (1, 2)),
    "rows-there-huge": ("E240", {}, {"num_rows": 1 << 60}, (1, 2)),
    "rows-there-negative": ("E240", {}, {"num_rows": -1}, (1, 2)),
    "row-huge": ("E240", {}, {"row": 2**63 - 1}, (1, 2)),
    "row-past-the-rows": ("E242", {}, {"row": 8}, (1, 2)),
    "base-code-unknown": ("E240", {}, {"code": 70000}, (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_s7_6_hostile_numbers_are_refused(hostile: HostilePeer, lie: Any) -> None:
    code, entry, base, counts = lie
    hostile.say(entry, base, counts)
    error = hostile.error()
    assert error.code == code, error
    assert error.peer == 1
    assert len(str(error)) <= 400
    assert "\n" not in str(error)


def test_s7_6_metadata_of_a_peer_is_checked(hostile: HostilePeer) -> None:
    """Rows are there, but their records name an expert that is none."""
    arena = hostile.cluster.buffers[0]._backend._memory.own.arena
    ctypes.memset(arena.address, 0x7F, arena.bytes)
    hostile.say({}, {}, (1, 2))
    assert hostile.error().code == "E240"


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        ({"peer": 30000}, "E111"),
        ({"peer": -1}, "E111"),
        ({"rank": 30000}, "E111"),
        ({"code": 0}, "E111"),
        ({"code": 999}, "E111"),
        ({"code": 230}, "E111"),
        ({"have": 1 << 60, "want": -(1 << 60)}, "E330"),
    ],
    ids=["peer", "peer-none", "rank", "ok", "unknown", "of-a-call", "kinds"],
)
def test_s7_6_verdict_of_a_peer_is_checked(
    hostile: HostilePeer, verdict: dict[str, int], code: str
) -> None:
    hostile.fail(**verdict)
    error = hostile.error()
    assert error.code == code, error
    assert error.peer in (0, 1)


# ---- 7.7 contents ----


def test_s7_7_arena_starts_zeroed_and_is_zero_again_after_release() -> None:
    with Cluster(1, 1) as cluster:
        (buffer,) = cluster.make_buffers(**SHAPE, arena_bytes=1 << 20)
        memory = buffer.empty((1 << 19,), torch.uint8)
        assert not memory.any()
        memory.fill_(0xFF)
        del memory
        buffer.release()
        assert not buffer.empty((1 << 19,), torch.uint8).any()


def test_s7_7_padding_rows_are_blank_whatever_lay_there() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, arena_bytes=1 << 20)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            old = buffer.empty((1 << 18,), torch.uint8)
            old.fill_(0xEE)
            del old
            x, ids = torch.ones(3, 16), torch.tensor([[0, 2], [1, 3], [2, -1]])
            weights = torch.ones(3, 2)
            recv = buffer.dispatch(x, ids, weights, layout="grouped", alignment=8)
            padding = recv.topk_idx == -1
            assert padding.sum() > 0
            assert not recv.x[padding].any()
            assert not recv.topk_weights[padding].any()
            static = buffer.dispatch(x, ids, weights, sync=False)
            rest = slice(int(static.num_recv), None)
            assert (static.topk_idx[rest] == -1).all()
            assert not static.topk_weights[rest].any()

        cluster.run(work)


SECRET = b"of a closed buffer, to be read by nobody"


def _uses_and_closes(me: Any) -> list[str]:
    """What is left of a buffer full of secrets when all ranks have closed it."""
    buffer = me.buffer("first", arena_bytes=1 << 20)
    line = torch.frombuffer(bytearray(SECRET.ljust(64, b".")), dtype=torch.uint8)
    memory = buffer.empty((buffer.stats()["arena"]["largest_free"],), torch.uint8)
    memory.view(-1, 64).copy_(line.expand(len(memory) // 64, 64))
    assert SECRET in ctypes.string_at(buffer._backend._memory.own.arena.address, 1 << 16)
    del memory
    me.say("full")
    me.wait_for_go()
    buffer.close()
    me.kept.clear()
    del buffer
    gc.collect()
    me.say("closed")
    me.wait_for_go()
    left = []
    with open("/proc/self/maps") as maps:
        for line_of_maps in maps:
            if "memfd:ep_comm" in line_of_maps:
                left.append(line_of_maps)
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "memfd:ep_comm" in os.readlink(f"/proc/self/fd/{fd}"):
                left.append(f"descriptor {fd}")
    following = me.buffer("second", arena_bytes=1 << 20)
    blank = following.empty((following.stats()["arena"]["largest_free"],), torch.uint8)
    if blank.any():
        left.append("memory of the next buffer")
    return left


def test_s7_7_nothing_of_a_closed_buffer_is_left_for_anybody() -> None:
    """Nobody scrubs: the last unmapping gives pages back to the kernel, which zeroes them."""
    with ranks.Ranks(_uses_and_closes, 2) as two:
        for _ in range(2):  # all have filled theirs, all have closed
            two.hear_all()
            two.go()
        assert two.results() == [[], []]


# ---- 7.8 listeners ----


def listening() -> set[str]:
    """Listening sockets of this network namespace: TCP ones by port, ours among the Unix ones."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        found |= {line.split()[9] for line in lines if line.split()[3] == "0A"}
    unix = Path("/proc/net/unix").read_text().splitlines()
    return found | {line.split()[-1] for line in unix if "@ep_comm-" in line}


def _listens(me: Any) -> list[str]:
    import torch.distributed as dist

    group = me.group()  # a FileStore: nothing of torch listens either
    assert isinstance(group.store, dist.Store)
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit()
           and os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
    buffer = me.buffer()
    buffer.dispatch(torch.ones(1, 16), torch.tensor([[0, 1]]))
    now = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            now.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    inodes = {link[8:-1] for link in now - own if link.startswith("socket:[")}
    return sorted(inodes & listening())


def test_s7_8_no_port_is_opened() -> None:
    assert ranks.run(_listens, 2) == [[], []]
    assert files_that_call(r".*\.bind") <= {"bootstrap/sockets.py", "doctor/share.py"}
    text = "".join(p.read_text() for p in PYTHON if name_of(p).startswith("bootstrap/"))
    assert "AF_UNIX" in text
    assert "AF_INET" not in text


def test_s7_8_listener_is_gone_when_the_buffer_is_built() -> None:
    listener = Listener()
    name = f"@ep_comm-{listener.token.hex()}"
    assert name in listening()
    listener.close()
    assert name not in listening()


@pytest.mark.parametrize(
    "data",
    [
        greeting(b"x" * 16, 1),
        greeting(b"g" * 16, 2),
        greeting(b"g" * 16, -1),
        b"EPHELLO2" + b"g" * 16 + struct.pack("<i", 1),
        b"GET / HTTP/1.1\r\n\r\n" + b"a" * 65536,
        greeting(b"g" * 16, 1)[:-1],
        b"",
    ],
    ids=["token", "rank", "rank-negative", "magic", "http", "short", "nothing"],
)
@three_tries
def test_s7_8_strangers_are_refused_and_cost_bounded_time(data: bytes) -> None:
    listener, stranger, ours = connected()
    stranger.sendall(data)
    if len(data) < sockets._GREETING.size:
        stranger.shutdown(socket.SHUT_WR)
    start = time.monotonic()
    assert Listener._greet(ours, b"g" * 16, {1}) is None
    took = time.monotonic() - start
    for each in (stranger, ours):
        each.close()
    listener.close()
    within(3.0, took)


@three_tries
def test_s7_8_stranger_who_says_nothing_is_dropped() -> None:
    listener, stranger, ours = connected()
    start = time.monotonic()
    assert Listener._greet(ours, b"g" * 16, {1}) is None
    took = time.monotonic() - start
    for each in (stranger, ours):
        each.close()
    listener.close()
    within(4.0, took)


# ---- 7.9 no shell, no compiler, no files ----


def test_s7_9_no_shell_and_no_compiler_at_run_time() -> None:
    assert files_that_call(r"os\.(system|popen|spawn\w*)|subprocess\.getoutput") == set()
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(f"{path} passes shell=")
    # Tools for people start processes; the library itself does not.
    assert files_that_import("subprocess") <= {
        "bench/machine.py", "compat/__main__.py", "doctor/machine.py"
    }  # fmt: skip
    assert (
        native_files_with(r"\b(system|popen|execv\w*|execl\w*|posix_spawn\w*|vfork)\s*\(") == set()
    )
    compiles = re.compile(r"nvrtc|cpp_extension|torch\.utils\.cpp|triton|numba|ninja")
    assert [name_of(p) for p in PYTHON if compiles.search(p.read_text())] == []


WATCHED = """
import os, sys, torch, ep_comm
from ep_comm import Buffer, EPConfig, StoreGroup
from ep_comm.testing import Cluster
import torch.distributed, ep_comm.buffer, ep_comm.backends.cpu
before, seen = dict(os.environ), []
def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                 "os.putenv", "os.unsetenv", "socket.connect", "socket.bind", "urllib.Request",
                 "shutil.rmtree", "os.mkdir", "os.rename", "os.remove", "ctypes.dlopen"):
        if event == "socket.bind" and isinstance(args[1], bytes): return  # abstract, no network
        seen.append((event, str(args[1:])[:80]))
    elif event == "open" and (args[1] or "r") not in ("r", "rb", "rt"):
        seen.append((event, str(args)))
sys.addaudithook(watch)
with Cluster(1, 2) as cluster:
    cluster.make_buffers(num_experts=4, num_topk=2, hidden=16, max_tokens=8)
    def work(rank):
        b = cluster.buffers[rank]
        recv = b.dispatch(torch.ones(3, 16), torch.tensor([[0, 2], [1, 3], [2, -1]]))
        out = b.combine(recv.x, recv.handle)
        assert out.shape == (3, 16)
    cluster.run(work)
try: Buffer(num_experts=0, num_topk=1, hidden=16, max_tokens=1, device="cpu")
except ep_comm.EPError: pass
print(seen, dict(os.environ) == before)
"""


def test_s7_9_s7_10_s7_11_work_starts_nothing_writes_nothing_calls_nobody(tmp_path: Path) -> None:
    done = run_python(WATCHED, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr
    assert [p for p in tmp_path.rglob("*") if "ep_comm" in p.name] == []


LOOKS = """
import os, sys, torch, ep_comm
from ep_comm import Buffer
import ep_comm.backends.cpu
home, seen = os.environ["HOME"], []
def watch(event, args):
    if event.startswith(("os.", "open", "shutil.", "glob.", "pathlib.", "tempfile.", "import")):
        seen.extend(f"{event} {a}" for a in args if home in str(a))
sys.addaudithook(watch)
open(os.path.join(home, "by this test")).close()
assert len(seen) == 1, seen
with Buffer(num_experts=4, num_topk=2, hidden=16, max_tokens=8, device="cpu") as b:
    recv = b.dispatch(torch.ones(3, 16), torch.tensor([[0, 2], [1, 3], [2, -1]]))
    b.combine(recv.x, recv.handle)
print(seen[1:])
"""


def test_s2_folders_that_look_like_a_cache_of_ours_are_not_used(tmp_path: Path) -> None:
    """World-writable, of another user, a symlink: nothing is kept, so none of them matters."""
    (tmp_path / "by this test").touch()
    (tmp_path / "somewhere").mkdir()
    folders = [tmp_path / name for name in (".ep_comm", ".config/ep_comm", ".local/share/ep_comm")]
    for folder in folders:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/ep_comm").symlink_to(tmp_path / "somewhere")
    before = sorted(tmp_path.rglob("*"))
    done = run_python(LOOKS, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / ".cache"))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # What is native opens one file: the state of a process.
    opens = r"\b(f?open(at|64)?|creat|mkd?stemps?)\s*\(|\b[io]?fstream\b|std::filesystem"
    assert native_files_with(opens) == {"csrc/host/peer_process.cc"}


# ---- 7.10 environment ----


def test_s7_10_environment_is_never_written_and_read_only_by_tools() -> None:
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            assert not [t for t in targets if ast.unparse(t).startswith("os.environ")], path
    assert (
        files_that_call(r"os\.(putenv|unsetenv)|.*environ\.(setdefault|update|pop|clear)") == set()
    )
    readers = {name_of(p) for p in PYTHON if re.search(r"\benviron\b|getenv", p.read_text())}
    tools = ("bench/", "cli/", "compat/__main__.py", "doctor/", "testing/", "demo/", "examples/")
    # NVSHMEM is told in no other way: where its library lies, and, while it initializes, what we
    # ask of it where its user has not. Only buffers across nodes come there.
    assert {r for r in readers if not r.startswith(tools)} == {"backends/nvshmem.py"}
    # No variable, so none to ignore when a process has more rights than its user (AT_SECURE), and
    # none that arms a debugging hook.
    assert native_files_with(r"\b(secure_)?(getenv|setenv|putenv)\s*\(|\benviron\b") == {
        "csrc/transport/nvshmem.cc"
    }


def test_s7_10_variables_named_like_ours_change_nothing() -> None:
    code = (
        "import torch, ep_comm\n"
        "b = ep_comm.Buffer(num_experts=2, num_topk=1, hidden=16, max_tokens=4, device='cpu')\n"
        "print(repr(b), b.dispatch(torch.ones(1, 16), torch.tensor([[1]])).x.sum().item())"
    )
    plain = run_python(code)
    odd = run_python(code, EP_COMM_BACKEND="collective", EP_COMM_DEBUG="1", EP_COMM_INJECT="kill")
    assert plain.stdout == odd.stdout
    assert plain.returncode == 0, plain.stderr


# ---- 7.11 nobody is told ----


def test_s7_11_no_module_that_talks_to_the_network_is_used() -> None:
    network = (
        "urllib",
        "http",
        "requests",
        "httpx",
        "aiohttp",
        "smtplib",
        "ftplib",
        "xmlrpc",
        "ssl",
    )
    assert files_that_import(*network) == set()
    assert files_that_import("socket") <= {
        "bootstrap/descriptors.py", "bootstrap/sockets.py",
        "doctor/driver.py", "doctor/share.py", "doctor/selftest.py",
    }  # fmt: skip
    assert native_files_with(r"\b(AF_INET6?|getaddrinfo|gethostby\w+|curl_\w+)\b") == set()
