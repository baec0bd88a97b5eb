"""Odd machines (G): hidden processes, equal hostnames, strange paths and variables."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import pytest
import ranks
from verdicts import (
    SHAPE,
    Survivor,
    check_survivor,
    check_verdict,
    round_trip,
    survive,
)


def _without_pidfd(me: Any) -> Any:
    """As in containers that do not see each other's processes: only the sockets tell of a death."""
    from ep_comm import bootstrap

    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(3, "no such process here")

    os.pidfd_open = refuse  # type: ignore[assignment]
    boot, _ = bootstrap.host_identity()
    import ep_comm.buffer

    ep_comm.buffer.host_identity = lambda: (boot, 1000 + me.rank)  # type: ignore[assignment]
    return _busy(me)


def _busy(me: Any) -> Survivor:
    buffer = me.buffer(**SHAPE)
    me.say(os.getpid())
    return survive(buffer, lambda i: round_trip(buffer, i))


def test_g6_death_is_seen_through_the_socket_where_processes_are_hidden() -> None:
    with ranks.Ranks(_without_pidfd, 3) as three:
        three.hear_all()
        time.sleep(0.1)
        died = three.kill(1)
        for rank in (0, 2):
            check_survivor(three.result(rank, 10), rank, "E110", 1, died)


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
        results = three.results(20)
    if "not permitted" in results:
        pytest.skip("needs the right to make namespaces")
    assert results == [0, 0, 0]
