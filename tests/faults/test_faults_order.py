"""Ranks that do different things (B): found, and told with both numbers."""

from __future__ import annotations

import threading
from typing import Any

from patience import LONGER_S, PATIENT
from verdicts import (
    SHAPE,
    check_verdict,
    inputs,
    raised,
    round_trip,
)

from ep_comm import Buffer, EPConfig, StoreGroup
from ep_comm.errors import (
    EPPeerLeft,
    EPTimeout,
    EPUsageError,
)
from ep_comm.testing import Cluster


def test_b6_one_combines_while_the_others_dispatch_is_e330_naming_both() -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, config=PATIENT)
        received = cluster.run(lambda r: cluster.buffers[r].dispatch(*inputs(r)))

        def work(rank: int) -> Any:
            buffer, recv = cluster.buffers[rank], received[rank]
            if rank == 1:
                return buffer.combine(recv.x, recv.handle)
            return buffer.dispatch(*inputs(rank))

        errors = cluster.run_catching(work, limit_s=60)
        for error in errors:
            assert isinstance(error, EPUsageError), error
            assert error.code == "E330"
            assert "combine #2" in str(error)
            assert "dispatch #2" in str(error)
            assert "rank 1 in combine" in str(error)
        for rank in range(3):  # later calls: the same, at once
            assert raised(lambda r=rank: cluster.buffers[r].dispatch(*inputs(r))).code == "E330"


def test_b7_a_skipped_call_is_found_with_both_numbers() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_s=LONGER_S))

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            for i in range(4):
                if (rank, i) != (1, 2):  # rank 1 leaves one layer out
                    round_trip(buffer, i)

        results = cluster.run_catching(work, limit_s=60)
        assert isinstance(results[0], EPTimeout)
        check_verdict(results[0], 0, "E101", 1)
        assert "dispatch #7" in str(results[0])
        assert "last entered #6" in str(results[0])
        assert results[1] is None


def test_b7_an_extra_call_between_others_is_e330_or_e220() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=PATIENT)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank)
            recv = buffer.dispatch(x, idx)
            if rank == 1:
                recv = buffer.dispatch(x, idx)
            buffer.combine(recv.x, recv.handle)

        errors = cluster.run_catching(work, limit_s=60)
        assert [e.code for e in errors] == ["E330", "E330"]  # type: ignore[union-attr]
        assert "rank 1 in dispatch #2" in str(errors[0])
        assert "rank 0 in combine #2" in str(errors[0])


def test_b9_buffers_of_overlapping_groups_do_not_disturb_each_other() -> None:
    store_pairs = [(0, 1), (1, 2), (0, 2)]
    import torch.distributed as dist

    stores = [dist.HashStore() for _ in store_pairs]

    def work(rank: int, failures: list[BaseException]) -> None:
        try:
            mine = [
                Buffer(StoreGroup(stores[i], pair.index(rank), 2), **SHAPE, device="cpu")
                for i, pair in enumerate(store_pairs)
                if rank in pair
            ]
            for i in range(10):
                for buffer in mine:
                    round_trip(buffer, i)
            mine[0].close()
            if rank == 1:
                round_trip(mine[1])
            if rank == 2:
                assert raised(lambda: mine[0].check()).code == "E340"
        except BaseException as error:
            failures.append(error)

    failures: list[BaseException] = []
    threads = [threading.Thread(target=work, args=(r, failures)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # Rank 1 went on with rank 2, which had closed that buffer.
    assert all(isinstance(f, EPPeerLeft) for f in failures), failures
