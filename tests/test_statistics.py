"""Statistics that calls add up in place: rows for each expert, and time waited for each rank.

A rank comes late here by sleeping before a call. Clocks of a busy machine are coarse, so a wait is
compared with another one, or with three quarters of the time slept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from patience import Disturbed, three_tries
from torch import Tensor

from ep_comm import Buffer, EPConfig, Received, reference
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

R, E, K, H, T = 3, 7, 3, 64, 12  # the first rank has three experts
SHAPE: dict[str, Any] = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens": T}
NAP = 0.2  # seconds
LEAST = int(0.75 * NAP * 1e9)
LAYOUTS: dict[str, dict[str, Any]] = {
    "compact": {},
    "static": {"sync": False},
    "grouped": {"layout": "grouped", "alignment": 4},
    "slab": {"layout": "slab"},
}


@pytest.fixture(scope="module", params=["cpu", "collective"])
def any_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(1, R) as cluster:
        cluster.make_buffers(**SHAPE, backend=request.param)
        yield cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(1, R) as three:
        three.make_buffers(**SHAPE, config=EPConfig(arrival_s=60.0, progress_s=60.0))
        yield three


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    tokens = [T, 0, T - 3]
    ids = [torch.randint(-1, E, (t, K), generator=g) for t in tokens]
    return [torch.randn(t, H, generator=g).bfloat16() for t in tokens], ids


# ---- rows for each expert ----


@pytest.mark.parametrize("begun", [False, True], ids=["now", "begun"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_added_to_what_there_was(any_cluster: Cluster, layout: str, begun: bool) -> None:
    x, ids = inputs()
    options = LAYOUTS[layout]
    sums = [torch.full((n,), 10, dtype=torch.int32) for n in (3, 2, 2)]
    want = reference.dispatch(
        x, ids, num_experts=E, max_tokens=T, recv_stats=sums, **options
    )  # fmt: skip

    def work(rank: int) -> Tensor:
        buffer: Buffer = any_cluster.buffers[rank]
        layers = torch.full((3, buffer.num_local_experts), 10, dtype=torch.int32)
        for _ in range(2):  # rows of a tensor of all layers need not be aligned
            if begun:
                work = buffer.dispatch(
                    x[rank], ids[rank], recv_stats=layers[1], wait=False, **options
                )
                work.wait()
            else:
                buffer.dispatch(x[rank], ids[rank], recv_stats=layers[1], **options)
        return layers

    for rank, layers in enumerate(any_cluster.run(work)):
        counts = want[rank].num_tokens_per_expert
        assert counts.sum() > 0
        assert torch.equal(sums[rank], 10 + counts)
        assert torch.equal(layers[1], 10 + 2 * counts)
        assert (layers[::2] == 10).all()


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "static"])
def test_a_call_that_fails_counts_no_rows(any_cluster: Cluster, sync: bool) -> None:
    x, ids = inputs()
    bad = ids[0].clone()
    bad[2, 1] = E

    def work(rank: int) -> None:
        buffer: Buffer = any_cluster.buffers[rank]
        stats = torch.full((buffer.num_local_experts,), 10, dtype=torch.int32)
        mine = bad if rank == 0 else ids[rank]
        call = functools.partial(buffer.dispatch, x[rank], mine, recv_stats=stats, sync=sync)
        if not sync:
            assert call().status.tolist() == [213]
        with pytest.raises(EPError, match="E213"):
            (call if sync else buffer.check)()
        assert (stats == 10).all()

    any_cluster.run(work)


def test_tensors_of_inference_mode_are_added_to(any_cluster: Cluster) -> None:
    x, ids = inputs()

    def work(rank: int) -> None:
        buffer: Buffer = any_cluster.buffers[rank]
        with torch.inference_mode():
            stats = torch.zeros(buffer.num_local_experts, dtype=torch.int32)
            begun = buffer.dispatch(x[rank], ids[rank], recv_stats=stats, wait=False)
            assert torch.equal(stats, begun.wait().num_tokens_per_expert)

    any_cluster.run(work)


# ---- time waited for each rank ----


def arrive_late(
    cluster: Cluster, late: dict[int, float], call: Callable[[int, Tensor], Any]
) -> list[list[int]]:
    """What each rank waited for each, in nanoseconds, when some come so many seconds late."""

    def work(rank: int) -> list[int]:
        waits = torch.full((R,), 1000, dtype=torch.int64)
        time.sleep(late.get(rank, 0.0))
        call(rank, waits)
        found: list[int] = (waits - 1000).tolist()
        return found

    return cluster.run(work)


def check_waits(waits: list[list[int]], late: int) -> None:
    for rank, waited in enumerate(waits):
        assert min(waited) >= 0
        others = max(w for p, w in enumerate(waited) if p != late)
        blamed = waited[late] >= LEAST and others < waited[late]
        if waited[rank] >= LEAST or (rank != late and not blamed):
            raise Disturbed(waits)  # a rank that paused was late, too


def dispatched(cluster: Cluster, **options: Any) -> list[Received]:
    x, ids = inputs()
    return cluster.run(lambda rank: cluster.buffers[rank].dispatch(x[rank], ids[rank], **options))


@pytest.mark.parametrize("late", range(R))
@three_tries
def test_dispatch_blames_the_rank_that_is_late(cluster: Cluster, late: int) -> None:
    x, ids = inputs()
    waits = arrive_late(
        cluster,
        {late: NAP},
        lambda rank, waits: cluster.buffers[rank].dispatch(x[rank], ids[rank], wait_stats=waits),
    )
    check_waits(waits, late)


@three_tries
def test_a_begun_and_a_cached_dispatch_blame_it_too(cluster: Cluster) -> None:
    x, ids = inputs()
    received = dispatched(cluster)

    def begin(rank: int, waits: Tensor) -> None:
        begun = cluster.buffers[rank].dispatch(x[rank], ids[rank], wait_stats=waits, wait=False)
        begun.wait()

    check_waits(arrive_late(cluster, {1: NAP}, begin), 1)

    def repeat(rank: int, waits: Tensor) -> None:
        cluster.buffers[rank].dispatch(x[rank], handle=received[rank].handle, wait_stats=waits)

    check_waits(arrive_late(cluster, {2: NAP}, repeat), 2)


@pytest.mark.parametrize("per_rank", [False, True], ids=["rows", "sums"])
@pytest.mark.parametrize("place", ["arena", "torch"])
@three_tries
def test_combine_blames_the_rank_that_is_late(cluster: Cluster, place: str, per_rank: bool) -> None:
    received = dispatched(cluster, layout="grouped")

    def combine(rank: int, waits: Tensor) -> None:
        recv = received[rank]
        y = recv.x if place == "arena" else recv.x.clone()
        cluster.buffers[rank].combine(y, recv.handle, per_rank=per_rank, wait_stats=waits)

    check_waits(arrive_late(cluster, {0: NAP}, combine), 0)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=["lower-first", "higher-first"])
@three_tries
def test_of_two_late_ranks_neither_hides_the_other(
    cluster: Cluster, order: tuple[int, int]
) -> None:
    """Waits are for one rank after the other, yet each costs what it took from the beginning."""
    x, ids = inputs()
    sooner, later = order
    waits = arrive_late(
        cluster,
        {sooner: NAP, later: 2 * NAP},
        lambda rank, waits: cluster.buffers[rank].dispatch(x[rank], ids[rank], wait_stats=waits),
    )
    first, second = waits[0], waits[sooner]
    in_order = LEAST <= first[sooner] < first[later] and second[0] < second[later]
    if not in_order or first[later] < 2 * LEAST or second[later] < LEAST:
        raise Disturbed(waits)  # a rank that paused was late, too


# ---- what is refused ----


def test_an_all_to_all_cannot_tell_ranks_apart() -> None:
    x, ids = inputs()
    with Cluster(1, R) as ranks:
        ranks.make_buffers(**SHAPE, backend="collective")

        def work(rank: int) -> None:
            buffer: Buffer = ranks.buffers[rank]
            waits = torch.zeros(R, dtype=torch.int64)
            with pytest.raises(EPError, match=r"E203.*wait_stats.*collective"):
                buffer.dispatch(x[rank], ids[rank], wait_stats=waits)
            recv = buffer.dispatch(x[rank], ids[rank])
            with pytest.raises(EPError, match=r"E203.*wait_stats.*collective"):
                buffer.combine(recv.x, recv.handle, wait_stats=waits)
            assert (waits == 0).all()

        ranks.run(work)


def test_a_repeated_call_counts_no_rows_again(any_cluster: Cluster) -> None:
    x, _ = inputs()
    received = dispatched(any_cluster)

    def work(rank: int) -> None:
        buffer: Buffer = any_cluster.buffers[rank]
        stats = torch.zeros(buffer.num_local_experts, dtype=torch.int32)
        with pytest.raises(EPError, match=r"E203.*recv_stats.*handle"):
            buffer.dispatch(x[rank], handle=received[rank].handle, recv_stats=stats)

    any_cluster.run(work)
    with pytest.raises(EPError, match=r"E203.*recv_stats.*handle"):
        reference.dispatch(
            x, handles=[r.handle for r in received], num_experts=E, max_tokens=T, recv_stats=[]
        )
