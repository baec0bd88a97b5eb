"""Begun operations: waited for in any order, several at once, among ordinary calls, dropped."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
from patience import is_waiting, three_tries, until, within
from torch import Tensor

from ep_comm import Begun, Buffer, EPConfig
from ep_comm.errors import EPArgumentError, EPError, EPPeerLeft, EPTimeout
from ep_comm.testing import Cluster

SHAPE: dict[str, Any] = {"num_experts": 6, "num_topk": 2, "hidden": 32, "max_tokens": 8}
LAYOUTS: list[dict[str, Any]] = [
    {"layout": "compact"},
    {"layout": "grouped", "alignment": 4},
    {"layout": "slab", "capacity": 48},
]


def inputs(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each token chooses two experts of different ranks (0 and 3, 1 and 4 ...), of 2 or 3 ranks."""
    g = torch.Generator().manual_seed(1000 * rank + seed)
    x = torch.randint(-8, 8, (8, 32), generator=g).float()
    first = torch.randint(0, 3, (8, 1), generator=g)
    return x, torch.cat([first, first + 3], 1)


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_s=60.0, progress_s=60.0))
        yield cluster


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_dispatches_and_combines_waited_for_in_any_order(
    two: Cluster, order: tuple[int, ...]
) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        mine = order if rank == 0 else order[::-1]  # the ranks wait in different orders
        begun = [buffer.dispatch(*inputs(rank, i), wait=False, **LAYOUTS[i % 3]) for i in range(3)]
        received: dict[int, Any] = {i: begun[i].wait() for i in mine}
        combines = [buffer.combine(received[i].x, received[i].handle, wait=False) for i in range(3)]
        for i in mine:
            assert torch.equal(combines[i].wait(), inputs(rank, i)[0] * 2)

    two.run(work)


@pytest.mark.parametrize("num_slots", [2, 4])
def test_more_operations_outstanding_than_slots(num_slots: int) -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, num_slots=num_slots)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            time.sleep(0.05 * rank)
            begun = [buffer.dispatch(*inputs(rank, i), wait=False) for i in range(12)]
            received = [b.wait() for b in reversed(begun)][::-1]
            combines = [buffer.combine(r.x, r.handle, wait=False) for r in received]
            for i in reversed(range(12)):
                assert torch.equal(combines[i].wait(), inputs(rank, i)[0] * 2)

        cluster.run(work)


def test_one_rank_begins_what_another_waits_for_at_once(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        for i in range(6):
            begins = (rank + i) % 2 == 0
            recv = buffer.dispatch(*inputs(rank, i), wait=not begins)
            recv = recv.wait() if begins else recv
            out = buffer.combine(recv.x, recv.handle, wait=begins)
            out = out if begins else out.wait()
            assert torch.equal(out, inputs(rank, i)[0] * 2)

    two.run(work)


def test_an_ordinary_call_takes_its_turn_behind_begun_ones(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx = inputs(rank, 1)
        begun = [buffer.dispatch(x + i, idx, wait=False) for i in range(3)]
        now = buffer.dispatch(x + 3, idx)
        assert all(b.done() for b in begun)
        out = buffer.combine(now.x, now.handle)
        assert torch.equal(out, (x + 3) * 2)
        for i in (1, 0, 2):
            recv = begun[i].wait()
            assert torch.equal(buffer.combine(recv.x, recv.handle), (x + i) * 2)

    two.run(work)


def test_a_begun_operation_overlaps_with_its_caller(two: Cluster) -> None:
    """The late rank finds everything there: its peer's dispatch went on without its caller."""
    began = threading.Event()

    def work(rank: int) -> bool:
        buffer = two.buffers[rank]
        if rank == 0:
            begun = buffer.dispatch(*inputs(rank, 1), wait=False)
            early = begun.done()
            began.set()
            until(begun.done)
            recv = begun.wait()
        else:
            began.wait(60)
            early = False
            recv = buffer.dispatch(*inputs(rank, 1))
        buffer.combine(recv.x, recv.handle)
        return early

    assert two.run(work) == [False, False]


def test_wait_returns_the_same_result_again(two: Cluster) -> None:
    def work(rank: int) -> None:
        begun = two.buffers[rank].dispatch(*inputs(rank, 1), wait=False)
        assert begun.wait() is begun.wait()
        assert begun.done()

    two.run(work)


def test_begun_static_and_cached_operations(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx = inputs(rank, 3)
        static = buffer.dispatch(x, idx, sync=False, wait=False).wait()
        cached = buffer.dispatch(x + 1, handle=static.handle, wait=False)
        out = buffer.combine(static.x, static.handle, wait=False)
        again = cached.wait()
        assert torch.equal(out.wait(), x * 2)
        assert torch.equal(buffer.combine(again.x, static.handle), (x + 1) * 2)

    two.run(work)


# ---- failures ----


def test_failed_begun_operation_raises_at_wait_every_time_and_the_next_works(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx = inputs(rank, 1)
        bad = buffer.dispatch(x, idx + (100 if rank else 0), wait=False)
        good = buffer.dispatch(x, idx, wait=False)
        recv = good.wait()
        for _ in range(2):
            with pytest.raises(EPArgumentError) as caught:
                bad.wait()
            assert (caught.value.code, caught.value.peer) == ("E213", 1)
        assert bad.done()
        assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)

    two.run(work)


def test_failed_begun_static_operation_is_raised_by_check(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx = inputs(rank, 1)
        begun = buffer.dispatch(x, idx + 100 * rank, sync=False, wait=False)
        with pytest.raises(EPArgumentError) as caught:
            buffer.check()  # waits for what is begun
        assert caught.value.code == "E213"
        assert begun.wait().status.item() == 213
        buffer.check()

    two.run(work)


def test_refused_call_between_begun_ones_keeps_its_place(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx = inputs(rank, 1)
        first = buffer.dispatch(x, idx, wait=False)
        second: Any = None
        error = None
        try:
            second = buffer.dispatch(x, idx, layout="rows" if rank else "compact", wait=False)
        except EPError as refused:
            error = refused
        third = buffer.dispatch(x + 1, idx, wait=False)
        if second is not None:
            with pytest.raises(EPError) as caught:
                second.wait()
            error = caught.value
        assert error is not None
        assert error.code == "E203"
        for begun, want in ((third, x + 1), (first, x)):
            recv = begun.wait()
            assert torch.equal(buffer.combine(recv.x, recv.handle), want * 2)

    two.run(work)


def test_begun_operations_fail_when_the_peer_leaves() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)
        first = [cluster.buffers[0].dispatch(*inputs(0, i), wait=False) for i in range(3)]
        until(lambda: is_waiting(cluster.buffers[0]))
        assert not any(b.done() for b in first)
        cluster.buffers[1].close()
        for begun in first:
            with pytest.raises(EPPeerLeft) as caught:
                begun.wait()
            assert (caught.value.code, caught.value.peer) == ("E111", 1)
        with pytest.raises(EPPeerLeft):
            cluster.buffers[0].dispatch(*inputs(0, 0))


def test_begun_operation_times_out_like_any_other() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_s=0.2))
        begun = cluster.buffers[0].dispatch(*inputs(0, 1), wait=False)
        with pytest.raises(EPTimeout) as caught:
            begun.wait()
        assert (caught.value.code, caught.value.peer) == ("E101", 1)


@three_tries
def test_close_with_operations_outstanding_is_quick_and_fails_them() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)
        begun = [cluster.buffers[0].dispatch(*inputs(0, i), wait=False) for i in range(3)]
        until(lambda: is_waiting(cluster.buffers[0]))
        start = time.monotonic()
        cluster.buffers[0].close()
        took = time.monotonic() - start
        for b in begun:
            with pytest.raises(EPError) as caught:
                b.wait()
            assert caught.value.code == "E340"
        with pytest.raises(EPPeerLeft) as left:
            cluster.buffers[1].dispatch(*inputs(1, 0))
        assert left.value.peer == 0
        within(0.5, took)


# ---- dropped ----


def test_dropped_operations_finish_and_return_their_memory(two: Cluster) -> None:
    dropped: list[int] = []

    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        if rank == 0:
            until(lambda: dropped)  # the peer's operations are still waiting
        for i in range(4):
            buffer.dispatch(*inputs(rank, i), wait=False)
        dropped.append(rank)
        junk = [torch.full((8, 2), -1, dtype=torch.int32) for _ in range(400)]
        recv = buffer.dispatch(*inputs(rank, 9))
        assert all((j == -1).all() for j in junk)
        for _ in range(3):
            buffer.combine(recv.x.clone(), recv.handle, wait=False)
        assert torch.equal(buffer.combine(recv.x, recv.handle), inputs(rank, 9)[0] * 2)
        del recv

    two.run(work)
    gc.collect()
    for buffer in two.buffers:
        # What was begun last is let go when the next operation begins.
        assert buffer.stats()["arena"]["in_use"] <= 4 * 3 * 4096


def test_dropped_operations_do_not_crash_a_process() -> None:
    assert ranks.run(_drop_and_go, 2) == [True, True]


def _drop_and_go(me: Any) -> bool:
    buffer = me.buffer(**SHAPE)
    for i in range(50):
        buffer.dispatch(*(t.clone() for t in inputs(me.rank, i)), wait=False)
        junk = [torch.full((8, 2), -1, dtype=torch.int32) for _ in range(20)]
        assert all((j == -1).all() for j in junk)
    recv = buffer.dispatch(*inputs(me.rank, 0))
    assert torch.equal(buffer.combine(recv.x, recv.handle), inputs(me.rank, 0)[0] * 2)
    buffer.dispatch(*inputs(me.rank, 0), wait=False)  # left to the end of the process
    return True


def test_buffer_dropped_with_operations_outstanding() -> None:
    """Nobody holds the buffer: it ends, and its peer learns that it left."""
    cluster = Cluster(1, 2)
    buffers: list[Buffer] = cluster.make_buffers(**SHAPE)
    cluster.buffers = []
    buffers[0].dispatch(*inputs(0, 0), wait=False)
    other = buffers.pop()
    buffers.clear()
    gc.collect()
    answers = []
    for i in range(3):
        try:
            answers.append(other.dispatch(*inputs(1, i)))
        except EPPeerLeft as left:
            answers.append(left.code)
    assert answers[1:] == ["E111", "E111"]  # the first may have come through
    other.close()


def test_begun_alone_keeps_its_operation_alive() -> None:
    cluster = Cluster(1, 2)
    buffers: list[Buffer] = cluster.make_buffers(**SHAPE)
    cluster.buffers = []
    begun: Begun[Any] = buffers[0].dispatch(*inputs(0, 0), wait=False)
    recv = buffers[1].dispatch(*inputs(1, 0))
    want = begun.wait().x.clone()
    del buffers
    gc.collect()
    assert torch.equal(begun.wait().x, want)
    del recv


# ---- threads ----


def test_d6_threads_of_a_rank_share_its_buffer(two: Cluster) -> None:
    """Calls are serialized; which thread comes first is up to them, so all do the same here."""

    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        failures: list[BaseException] = []

        def body() -> None:
            try:
                for i in range(5):
                    recv = buffer.dispatch(*inputs(rank, 7), wait=False).wait()
                    assert recv.x.shape[0] > 0, i
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=body) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures

    two.run(work)
