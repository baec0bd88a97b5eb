"""Masks on the nvlink backend with all ranks in one process on one GPU; see test_masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_masks as masks
import torch
from patience import LONGER_S
from test_nvlink_loopback import make_cluster, on_streams  # noqa: F401

from ep_comm import EPConfig
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu

Make = Callable[..., Cluster]


def cluster_of(make: Make, **clocks: float) -> Cluster:
    limits = {"arrival_s": 60.0, "progress_s": 60.0, **clocks}
    cluster = make(
        masks.R, **masks.SHAPE, num_sms=4, arena_bytes=64 << 20,
        config=EPConfig(masking=True, **limits),
    )  # fmt: skip
    assert all(buffer.backend == "nvlink" for buffer in cluster.buffers)
    return cluster


def go_on(
    cluster: Cluster, first: int, steps: int, gone: tuple[int, ...],
    ranks_per_node: int | None = None,
) -> None:  # fmt: skip
    """Steps of the ranks left, each with all of them side by side; then they are checked."""

    def work(rank: int) -> Any:
        if rank in gone:
            return []
        buffer = cluster.buffers[rank]
        return [masks.step_of(buffer, first + i, begun=i % 2 == 1) for i in range(steps)]

    for rank, results in enumerate(on_streams(cluster, work)):
        for i, result in enumerate(results):
            masks.check_results(cluster.buffers[rank], first + i, gone, *result, ranks_per_node)


def test_a_rank_masked_by_one_is_left_out_by_all(make_cluster: Make) -> None:  # noqa: F811
    cluster = cluster_of(make_cluster)
    buffers = cluster.buffers
    go_on(cluster, 0, 3, ())
    buffers[3].mask(1)
    go_on(cluster, 10, 6, (1,))
    x = torch.zeros(2, masks.H, dtype=torch.bfloat16, device="cuda")
    idx = torch.zeros(2, masks.K, dtype=torch.int64, device="cuda")

    def compact(rank: int) -> str:
        return "" if rank == 1 else masks.code_of(lambda: buffers[rank].dispatch(x, idx))

    assert on_streams(cluster, compact) == ["E311", "", "E311", "E311"]
    go_on(cluster, 20, 3, (1,))
    assert masks.code_of(lambda: masks.step_of(buffers[1], 1)) == "E113"


def test_sums_that_may_be_made_twice_do_not_go_to_their_bias(
    make_cluster: Make,  # noqa: F811
) -> None:
    cluster = cluster_of(make_cluster)
    inputs = [[t.cuda() for t in of] for of in masks.inputs(0)]

    def work(rank: int) -> Any:
        buffer, (x, idx, weights) = cluster.buffers[rank], (of[rank] for of in inputs)
        recv = buffer.dispatch(x, idx, weights, layout="slab", capacity=masks.CAPACITY)
        bias = torch.ones_like(x)
        other = bias if rank == 1 else torch.empty_like(x)

        def call() -> None:
            buffer.combine(recv.x, recv.handle, bias=(None, bias), out=other)
            buffer.check()

        return masks.code_of(call)

    assert on_streams(cluster, work) == ["E202"] * masks.R
    go_on(cluster, 10, 3, ())


def test_unmasked_ranks_are_where_the_others_are(make_cluster: Make) -> None:  # noqa: F811
    cluster = cluster_of(make_cluster)
    for number, gone in enumerate(((2,), (0, 3))):
        go_on(cluster, 20 * number, 3, ())
        for rank in gone:
            cluster.buffers[1].mask(rank)
        go_on(cluster, 20 * number + 5, 5, gone)
        cluster.run(lambda rank: cluster.buffers[rank].unmask())
    go_on(cluster, 50, 4, ())


def test_a_rank_that_does_not_come_is_masked(make_cluster: Make) -> None:  # noqa: F811
    cluster = cluster_of(make_cluster, arrival_s=LONGER_S)
    go_on(cluster, 0, 1, ())
    go_on(cluster, 10, 4, (2,))
    assert masks.code_of(lambda: masks.step_of(cluster.buffers[2], 1)) == "E113"
