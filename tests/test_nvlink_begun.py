"""Begun operations on GPUs: several at once, in any order, dropped, captured; ranks are threads."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import test_nvlink_loopback as loopback
import torch
from compare import same_bits, same_values
from test_nvlink_loopback import Case, check_received, make_cluster, on_gpu, on_streams

from ep_comm import Received, reference
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu
__all__ = ["make_cluster"]

MakeCluster = Callable[..., Cluster]
LAYOUTS: list[dict[str, Any]] = [{}, {"layout": "grouped", "alignment": 4}, {"layout": "slab"}]


@dataclasses.dataclass
class Rounds:
    """Several routings, their inputs on the GPU and what the reference makes of them."""

    cases: list[Case]
    x: list[Any]
    idx: list[Any]
    weights: list[Any]
    want: list[list[Received]]

    def sums(self, i: int) -> list[torch.Tensor]:
        return reference.combine([w.x for w in self.want[i]], [w.handle for w in self.want[i]])

    def begin(self, cluster: Cluster, rank: int, i: int, **options: Any) -> Any:
        return cluster.buffers[rank].dispatch(
            self.x[i][rank], self.idx[i][rank], self.weights[i][rank], wait=False,
            **{**self.cases[i].options, **options},
        )  # fmt: skip


def rounds_of(case: Case, number: int, layouts: list[dict[str, Any]] | None = None) -> Rounds:
    layouts = layouts or [{}]
    cases = [
        dataclasses.replace(case, seed=i, options={**case.options, **layouts[i % len(layouts)]})
        for i in range(number)
    ]
    inputs = [c.inputs() for c in cases]
    return Rounds(
        cases,
        [on_gpu(i.x) for i in inputs],
        [on_gpu(i.topk_idx) for i in inputs],
        [on_gpu(i.topk_weights) for i in inputs],
        [loopback.want_dispatch(c, i) for c, i in zip(cases, inputs, strict=True)],
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_dispatches_and_combines_waited_for_in_any_order(
    make_cluster: MakeCluster, order: tuple[int, ...]
) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options(), num_slots=3)
    rounds = rounds_of(case, 3, LAYOUTS)

    def work(rank: int) -> Any:
        mine = order if rank == 0 else order[::-1]  # the ranks wait in different orders
        begun = [rounds.begin(cluster, rank, i) for i in range(3)]
        received = {i: begun[i].wait() for i in mine}
        buffer = cluster.buffers[rank]
        combines = [buffer.combine(received[i].x, received[i].handle, wait=False) for i in range(3)]
        return received, {i: combines[i].wait() for i in mine}

    results = on_streams(cluster, work)
    for i in range(3):
        sums = rounds.sums(i)
        for rank, (received, combined) in enumerate(results):
            check_received(received[i], rounds.want[i][rank], computed=False)
            same_values(combined[i].cpu(), sums[rank])


@pytest.mark.parametrize("num_slots", [2, 4])
def test_more_operations_begun_than_slots(make_cluster: MakeCluster, num_slots: int) -> None:
    case = Case(num_ranks=3)
    cluster = make_cluster(3, **case.buffer_options(), num_slots=num_slots)
    rounds = rounds_of(case, 9)

    def work(rank: int) -> Any:
        time.sleep(0.02 * rank)
        begun = [rounds.begin(cluster, rank, i) for i in range(9)]
        return [b.wait() for b in reversed(begun)][::-1]

    for rank, received in enumerate(on_streams(cluster, work)):
        for i in range(9):
            check_received(received[i], rounds.want[i][rank], computed=False)


def test_begin_does_not_wait_for_a_late_peer(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)
    began = threading.Event()

    def work(rank: int) -> Any:
        assert rank == 0 or began.wait(10)  # which rank 0 does not wait for, or it would for ever
        begun = rounds.begin(cluster, rank, 0)
        done = begun.done()
        began.set()
        recv = begun.wait()
        assert begun.done()
        return done, recv

    results = on_streams(cluster, work)
    assert not results[0][0]
    for rank in range(2):
        check_received(results[rank][1], rounds.want[0][rank], computed=False)


def test_ordinary_calls_and_refusals_take_their_turn_among_begun_ones(
    make_cluster: MakeCluster,
) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 4)

    def work(rank: int) -> Any:
        buffer = cluster.buffers[rank]
        first = [rounds.begin(cluster, rank, i) for i in range(2)]
        with pytest.raises(ValueError, match="E201"):
            buffer.dispatch(rounds.x[0][rank][:, :8], rounds.idx[0][rank])
        now = buffer.dispatch(rounds.x[2][rank], rounds.idx[2][rank], rounds.weights[2][rank])
        last = rounds.begin(cluster, rank, 3)
        return [first[0].wait(), first[1].wait(), now, last.wait()]

    for rank, received in enumerate(on_streams(cluster, work)):
        for i in range(4):
            check_received(received[i], rounds.want[i][rank], computed=False)


def test_dropped_operations_go_on(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 4)

    def work(rank: int) -> Any:
        for i in range(3):
            begun = rounds.begin(cluster, rank, i)
            if rank == 0:
                begun.wait()
            del begun
        return rounds.begin(cluster, rank, 3).wait()

    for rank, recv in enumerate(on_streams(cluster, work)):
        check_received(recv, rounds.want[3][rank], computed=False)
    for buffer in cluster.buffers:
        buffer.check()


def test_failures_are_raised_where_they_are_waited_for(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 3)

    def work(rank: int) -> Any:
        good = rounds.begin(cluster, rank, 0)
        bad = rounds.begin(cluster, rank, 1, capacity=3)
        with pytest.raises(ValueError, match="E230"):
            bad.wait()
        with pytest.raises(ValueError, match="E230"):
            bad.wait()
        return good.wait(), rounds.begin(cluster, rank, 2).wait()

    for rank, (first, last) in enumerate(on_streams(cluster, work)):
        check_received(first, rounds.want[0][rank], computed=False)
        check_received(last, rounds.want[2][rank], computed=False)


@pytest.mark.parametrize("sync", [True, False])
def test_a_slab_is_promised_and_filled(make_cluster: MakeCluster, sync: bool) -> None:
    options = {"layout": "slab", "capacity": 50, "sync": sync, "origins": True}
    case = Case(num_ranks=2, options=options, tokens=(17, 20))
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)

    def work(rank: int) -> Any:
        begun = rounds.begin(cluster, rank, 0)
        promised = begun.promised
        assert promised is not None
        return promised, begun.wait()

    for rank, (promised, recv) in enumerate(on_streams(cluster, work)):
        check_received(recv, rounds.want[0][rank], computed=False)
        assert promised.x.data_ptr() == recv.x.data_ptr()
        same_bits(promised.topk_idx.cpu(), recv.topk_idx.cpu())
        same_bits(promised.origins.row_token.cpu(), recv.origins.row_token.cpu())


def test_begun_operation_of_a_closed_buffer_says_so(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)
    begun = on_streams(cluster, lambda r: rounds.begin(cluster, r, 0))
    cluster.run(lambda r: cluster.buffers[r].close())
    for operation in begun:
        assert operation.done()
        with pytest.raises(EPError, match="E340"):
            operation.wait()


def test_inputs_may_be_dropped_once_begun(make_cluster: MakeCluster) -> None:
    """The operation holds what it reads, also arena memory, until the GPU is through with it."""
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)
    torch.empty(8, dtype=torch.bfloat16, device="cuda").fill_(7.0)  # loads the kernel

    def work(rank: int) -> Any:
        buffer = cluster.buffers[rank]
        recv = rounds.begin(cluster, rank, 0).wait()
        begun = buffer.combine(recv.x, recv.handle, wait=False)
        size = recv.x.numel()
        del recv
        # What was freed would be handed out again here, and overwritten.
        buffer.empty((size,), torch.bfloat16).fill_(7.0)
        return begun.wait()

    sums = rounds.sums(0)
    for rank, out in enumerate(on_streams(cluster, work)):
        same_values(out.cpu(), sums[rank])


def test_e1_begun_operations_are_captured(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2, tokens=(24, 24), options={"sync": False})
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 3)
    x, idx, weights = (
        [t.clone() for t in part[0]] for part in (rounds.x, rounds.idx, rounds.weights)
    )
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    held: list[Any] = []
    for rank in range(2):
        torch.cuda.synchronize()
        buffer = cluster.buffers[rank]
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            recv = buffer.dispatch(x[rank], idx[rank], weights[rank], sync=False, wait=False).wait()
            out = buffer.combine(recv.x, recv.handle, wait=False).wait()
        held.append((recv, out))
    for i in (0, 1, 2, 0):
        for rank in range(2):
            x[rank].copy_(rounds.x[i][rank])
            idx[rank].copy_(rounds.idx[i][rank])
            weights[rank].copy_(rounds.weights[i][rank])
        torch.cuda.synchronize()
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        sums = rounds.sums(i)
        for rank in range(2):
            check_received(held[rank][0], rounds.want[i][rank], computed=False)
            same_values(held[rank][1].cpu(), sums[rank])


def test_e5_replay_after_close_touches_nothing(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2, tokens=(24, 24), options={"sync": False})
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv = cluster.buffers[0].dispatch(
            rounds.x[0][0], rounds.idx[0][0], rounds.weights[0][0], sync=False
        )
    recv.x.fill_(3.0)
    cluster.close()
    graph.replay()
    torch.cuda.synchronize()  # the context works
    assert bool((recv.x == 3.0).all())
    del graph


def test_graph_of_a_closed_buffer_ends_and_the_next_capture_begins(
    make_cluster: MakeCluster,
) -> None:
    """What it kept is freed soon after, whoever captures by then."""
    case = Case(num_ranks=1, tokens=(33,), options={"sync": False})
    rounds = rounds_of(case, 1)
    x, idx, weights = rounds.x[0][0], rounds.idx[0][0], rounds.weights[0][0]
    stays = make_cluster(1, **case.buffer_options()).buffers[0]

    def captured(buffer: Any, times: int) -> tuple[Any, Any, Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                recv = buffer.dispatch(x, idx, weights, sync=False)
                out = buffer.combine(recv.x, recv.handle)
                time.sleep(0.02)
        return graph, recv, out

    for _ in range(3):
        goes = make_cluster(1, **case.buffer_options())
        last = captured(goes.buffers[0], 1)
        goes.close()
        del last
        graph, recv, out = captured(stays, 5)
        graph.replay()
        torch.cuda.synchronize()
        check_received(recv, rounds.want[0][0], computed=False)
        same_values(out.cpu(), rounds.sums(0)[0])
        del graph, recv, out


def test_memory_of_what_was_begun_comes_back_when_it_is_over(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    rounds = rounds_of(case, 1)
    on_streams(cluster, lambda rank: rounds.begin(cluster, rank, 0).wait().num_recv)
    gc.collect()
    for buffer in cluster.buffers:
        spare = buffer.empty((1,), torch.uint8)  # a grant takes back what has died
        assert buffer.stats()["arena"]["num_extents"] == 1
        del spare
