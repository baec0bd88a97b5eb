"""Odd machines (G): hidden processes, equal hostnames, strange paths and variables."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from patience import three_tries
from verdicts import (
    SHAPE,
    Survivor,
    check_survivor,
    check_verdict,
    inputs,
    raised,
    round_trip,
    survive,
)

from ep_comm import Buffer, EPConfig, StoreGroup
from ep_comm.errors import EPEnvironmentError
from ep_comm.testing import Cluster


def _without_pidfd(me: Any) -> Any:
    """As in containers that do not see each other's processes: only the sockets tell of a death."""
    from ep_comm import bootstrap

    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(3, "no such process here")

    os.pidfd_open = refuse  # type: ignore[assignment]
    boot, _ = bootstrap.host_identity()
    import ep_comm.construct

    ep_comm.construct.host_identity = lambda: (boot, 1000 + me.rank)  # type: ignore[assignment]
    return _busy(me)


def _busy(me: Any) -> Survivor:
    buffer = me.buffer(**SHAPE)
    me.say(os.getpid())
    return survive(buffer, lambda i: round_trip(buffer, i))


@three_tries
def test_g6_death_is_seen_through_the_socket_where_processes_are_hidden() -> None:
    with ranks.Ranks(_without_pidfd, 3) as three:
        three.hear_all()
        time.sleep(0.1)  # any moment is one
        died = three.kill(1)
        for rank in (0, 2):
            check_survivor(three.result(rank), rank, "E110", 1, died)


def _in_its_own_pid_namespace(me: Any) -> Any:
    """Every rank is process 1 of a namespace of its own, on hosts that all have one name."""

    new_pid_namespace, new_uts_namespace = 0x20000000, 0x04000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_pid_namespace | new_uts_namespace) != 0:
        return "not permitted"
    libc.sethostname(b"localhost", 9)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        buffer = me.buffer(**SHAPE)
        for i in range(5):
            round_trip(buffer, i)
        me.say(os.getpid())
        if me.rank == 1:
            os._exit(0)  # as good as killed
        survivor = survive(buffer, lambda i: round_trip(buffer, i))
        check_verdict(survivor.error, me.rank, "E110", 1)
        code = 0
    finally:
        os._exit(code)


def test_g6_private_pid_namespaces_and_equal_hostnames() -> None:
    with ranks.Ranks(_in_its_own_pid_namespace, 3) as three:
        results = three.results(60)
    if "not permitted" in results:
        pytest.skip("needs the right to make namespaces")
    assert results == [0, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_g7_without_a_gpu_everything_imports_and_its_use_is_e401_everywhere() -> None:
    program = "import ep_comm, ep_comm.autograd, ep_comm.testing; print(ep_comm.build_info())"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=200)
    with Cluster(1, 2) as cluster:
        errors = cluster.run_catching(
            lambda r: Buffer(cluster.group(r), **SHAPE, device="cuda" if r == 1 else "cpu")
        )
        for rank, error in enumerate(errors):
            assert isinstance(error, EPEnvironmentError), error
            assert (error.code, error.rank) == ("E401", rank)
            assert "has no GPU" in str(error)
        assert errors[0].peer == 1  # type: ignore[union-attr]
        cluster.make_buffers(**SHAPE)
        cluster.run(lambda r: round_trip(cluster.buffers[r]))


ODD_NAMES = ["with space", "quote'\"`", "semi;touch hacked", "$(touch hacked)", "täglich\n"]


def _in_an_odd_place(me: Any, folder: str) -> None:
    os.chdir(folder)
    os.environ.update(LC_ALL="tr_TR.UTF-8", TMPDIR=folder, HOME=folder)
    store = dist.FileStore(os.path.join(folder, "store"), me.size)
    buffer = Buffer(StoreGroup(store, me.rank, me.size, folder), **SHAPE, device="cpu")
    for i in range(3):
        x, idx = inputs(buffer.rank, i)
        recv = buffer.dispatch(x, idx, tag=folder)
        assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)
    error = raised(lambda: buffer.dispatch(None, tag=folder))
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_g8_odd_paths_names_and_locales_are_only_text(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    ranks.run(_in_an_odd_place, 2, str(folder))
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("value", ["true", "", "1e9", "-1"])
def test_g9_junk_variables_change_nothing(value: str) -> None:
    ranks.run(_with_junk, 2, value)


def _with_junk(me: Any, value: str) -> None:
    for name in ("BACKEND", "NUM_SLOTS", "ARRIVAL_S", "PARANOID", "ARENA_BYTES", "LOG"):
        os.environ[f"EP_COMM_{name}"] = value
    buffer = me.buffer(**SHAPE)
    assert buffer.config == EPConfig()
    round_trip(buffer)


def test_n1_one_host_needs_no_network_library() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)
        cluster.run(lambda r: round_trip(cluster.buffers[r]))
    with open("/proc/self/maps") as maps:
        loaded = maps.read()
    assert "nvshmem" not in loaded
    assert "libibverbs" not in loaded
