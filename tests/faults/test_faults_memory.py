"""Memory that runs out (F): the call fails everywhere and the next one works."""

from __future__ import annotations

import pytest
import torch
from verdicts import (
    SHAPE,
    inputs,
    raised,
    round_trip,
)

from ep_comm.errors import (
    EPMemoryError,
)
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
