"""Memory that runs out (F): the call fails everywhere and the next one works."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from patience import PATIENT, three_tries, within
from verdicts import SHAPE, inputs, raised, round_trip

from ep_comm import Buffer, StoreGroup
from ep_comm.errors import EPError, EPMemoryError
from ep_comm.testing import Cluster


@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "static"])
def test_f2_allocation_that_fails_in_dispatch_is_e231_everywhere_and_the_next_works(
    layout: str, sync: bool
) -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, arena_bytes=1 << 18)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank)
            hoard = []
            if rank == 1:
                free = buffer.stats()["arena"]["largest_free"]
                hoard.append(buffer.empty((free,), torch.uint8))
            static = None

            def call() -> None:
                nonlocal static
                static = buffer.dispatch(x, idx, layout=layout, sync=sync)
                buffer.check()

            error = raised(call)
            assert isinstance(error, EPMemoryError)
            assert error.code == "E231"
            assert "need" in str(error)
            assert "free 0 B" in str(error)
            assert (static is None) == sync
            if static is not None:
                assert static.status.item() == 231
            if rank != 1:
                assert error.peer == 1
                assert "on rank 1" in str(error)
            hoard.clear()
            round_trip(buffer)

        cluster.run(work)


def test_f2_allocation_that_fails_in_combine_is_e231_everywhere_and_the_next_works() -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, arena_bytes=1 << 18)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank)
            recv = buffer.dispatch(x, idx)
            y, hoard = recv.x.clone(), []
            if rank == 1:
                free = buffer.stats()["arena"]["largest_free"]
                hoard.append(buffer.empty((free,), torch.uint8))
            out = torch.full_like(x, 5.0)
            error = raised(lambda: buffer.combine(y, recv.handle, out=out))
            assert error.code == "E231"
            assert rank == 1 or error.peer == 1
            assert (out == 5).all()
            hoard.clear()
            assert torch.equal(buffer.combine(y, recv.handle, out=out), x * 2)

        cluster.run(work)


def _with_few_descriptors(me: Any, spare: int) -> tuple[EPError | None, float]:
    """A store whose connection is open already, and no descriptor free but `spare`."""
    import resource

    import ep_comm.backends.cpu  # noqa: F401

    port = dist.FileStore(me.store, me.size)
    if me.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, me.size, True, wait_for_workers=False)
        port.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(port.get("port")), me.size, False)
        most = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        while (last := os.open("/dev/null", os.O_RDONLY)) < most:  # no gaps
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + spare, last + 1 + spare))
    group, start = StoreGroup(store, me.rank, me.size), time.monotonic()
    try:
        round_trip(Buffer(group, **SHAPE, device="cpu", config=PATIENT))
    except EPError as error:
        return error, time.monotonic() - start
    return None, time.monotonic() - start


@pytest.mark.parametrize("spare", range(10))
@three_tries
def test_f6_few_descriptors_are_exact_or_e407_on_every_rank(spare: int) -> None:
    outcomes = ranks.run(_with_few_descriptors, 2, spare, limit_s=120)
    errors = [error for error, _ in outcomes]
    assert (errors[0] is None) == (errors[1] is None) == (spare > 6), errors
    for rank, error in enumerate(errors):
        if error is not None:
            assert (error.code, error.rank, error.scope) == ("E407", rank, "init"), error
            assert "Too many open files" in str(error), error
    within(2.0, max(seconds for _, seconds in outcomes), errors)


def _in_a_bare_place(me: Any) -> str | None:
    """No locked memory, no home, and no /dev/shm."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    os.environ.update(HOME="/proc/1/nowhere", XDG_CACHE_HOME="/proc/1/nowhere")
    new_mount_namespace, private = 0x20000, 1 << 18 | 0x4000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mount_namespace) == 0:
        libc.mount(b"none", b"/", None, private, None)
        libc.umount2(b"/dev/shm", 2)
    buffer = me.buffer(**SHAPE)
    for i in range(3):
        round_trip(buffer, i)
    return None


def test_f6_no_locked_memory_no_home_and_no_dev_shm_is_exact() -> None:
    ranks.run(_in_a_bare_place, 2)
