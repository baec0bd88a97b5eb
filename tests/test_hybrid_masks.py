"""Masks on the hybrid backend, on pretended nodes in one process on one GPU; see test_masks. What a
rank had sent when it died is the business of tests/emulator/direct_masks_test.cc.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_masks as masks
import torch
from patience import LONGER_S
from test_hybrid_loopback import MakeCluster, disturb, make_cluster  # noqa: F401
from test_nvlink_loopback import Case, on_streams
from test_nvlink_masks import go_on

from ep_comm import EPConfig
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu

NODES = [(2, 2), (4, 1)]


def cluster_of(make: MakeCluster, nodes: tuple[int, int], **options: Any) -> Cluster:
    limits = {"arrival_s": 60.0, "progress_s": 60.0, **options}
    cluster = make(
        *nodes, Case(), **masks.SHAPE, num_sms=4, arena_bytes=64 << 20,
        config=EPConfig(masking=True, **limits),
    )  # fmt: skip
    assert all(buffer.backend == "hybrid" for buffer in cluster.buffers)
    disturb(cluster, seed=sum(nodes))
    return cluster


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("lost", [1, 2])
def test_a_rank_masked_by_one_is_left_out_by_all(
    make_cluster: MakeCluster,  # noqa: F811
    nodes: tuple[int, int],
    lost: int,
) -> None:
    cluster = cluster_of(make_cluster, nodes)
    buffers = cluster.buffers
    go_on(cluster, 0, 3, (), nodes[1])
    buffers[3].mask(lost)
    go_on(cluster, 10, 6, (lost,), nodes[1])
    x = torch.zeros(2, masks.H, dtype=torch.bfloat16, device="cuda")
    idx = torch.zeros(2, masks.K, dtype=torch.int64, device="cuda")

    def compact(rank: int) -> str:
        return "" if rank == lost else masks.code_of(lambda: buffers[rank].dispatch(x, idx))

    def in_bias(rank: int) -> str:
        recv, out = masks.step_of(buffers[rank], 30)
        sums = {"bias": out, "out": out}
        return masks.code_of(lambda: buffers[rank].combine(recv.x, recv.handle, **sums))

    assert on_streams(cluster, compact) == ["" if r == lost else "E311" for r in range(4)]
    left = on_streams(cluster, lambda rank: "" if rank == lost else in_bias(rank))
    assert left == ["" if r == lost else "E202" for r in range(4)]
    go_on(cluster, 20, 3, (lost,), nodes[1])
    assert masks.code_of(lambda: masks.step_of(buffers[lost], 1)) == "E113"


@pytest.mark.parametrize("nodes", NODES)
def test_unmasked_ranks_are_where_the_others_are(
    make_cluster: MakeCluster,  # noqa: F811
    nodes: tuple[int, int],
) -> None:
    cluster = cluster_of(make_cluster, nodes)
    x = torch.ones(2, masks.H, dtype=torch.bfloat16, device="cuda")
    idx = torch.arange(2 * masks.K, dtype=torch.int64, device="cuda").reshape(2, masks.K)

    def by_rails(rank: int) -> Any:
        recv = cluster.buffers[rank].dispatch(x, idx)
        return cluster.buffers[rank].combine(recv.x, recv.handle)

    for number, gone in enumerate(((2,), (0, 3))):
        go_on(cluster, 20 * number, 3, (), nodes[1])
        for rank in gone:
            cluster.buffers[1].mask(rank)
        go_on(cluster, 20 * number + 5, 5, gone, nodes[1])
        cluster.run(lambda rank: cluster.buffers[rank].unmask())
        assert all(buffer.masked_ranks == () for buffer in cluster.buffers)
        want = [len({expert // 2 for expert in row}) for row in idx.tolist()]  # a row a rank
        for out in on_streams(cluster, by_rails):
            assert out.tolist() == [[float(n)] * masks.H for n in want]
    go_on(cluster, 50, 4, (), nodes[1])


@pytest.mark.parametrize("nodes", NODES)
def test_a_rank_that_does_not_come_is_masked(
    make_cluster: MakeCluster,  # noqa: F811
    nodes: tuple[int, int],
) -> None:
    cluster = cluster_of(make_cluster, nodes, arrival_s=LONGER_S)
    go_on(cluster, 0, 1, (), nodes[1])
    go_on(cluster, 10, 4, (2,), nodes[1])
    assert masks.code_of(lambda: masks.step_of(cluster.buffers[2], 1)) == "E113"


def test_there_are_no_masks_without_direct_mode(
    make_cluster: MakeCluster,  # noqa: F811
) -> None:
    config = EPConfig(masking=True, direct=False)
    assert masks.code_of(lambda: make_cluster(2, 2, Case(), config=config)) == "E404"
