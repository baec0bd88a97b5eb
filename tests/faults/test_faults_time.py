"""Time (D): late ranks, absent ranks, numbers that wrap."""

from __future__ import annotations

import logging
import random
import time

import pytest
import torch
from patience import is_waiting, three_tries, until, within
from verdicts import (
    SHAPE,
    check_verdict,
    inputs,
    raised,
    round_trip,
)

from ep_comm import EPConfig
from ep_comm.errors import (
    EPError,
)
from ep_comm.testing import Cluster


def test_d1_jitter_changes_nothing() -> None:
    _jitter(300, 0.006)


@pytest.mark.slow
def test_d1_jitter_changes_nothing_for_long() -> None:
    _jitter(10_000, 0.05)


def _jitter(rounds: int, most_s: float) -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            rng = random.Random(rank)
            for i in range(rounds):
                time.sleep(rng.uniform(0, most_s) if rng.random() < 0.5 else 0)
                round_trip(cluster.buffers[rank], i)

        cluster.run(work, limit_s=60 + rounds * most_s)


def test_d2_a_late_rank_costs_a_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    with Cluster(1, 3) as cluster, caplog.at_level(logging.WARNING, "ep_comm"):
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_warn_s=0.2))
        seen: list[str] = []

        def said() -> list[str]:
            texts = [record.getMessage() for record in caplog.records]
            return [text for text in texts if "W101" in text and "for rank 2 in" in text]

        def work(rank: int) -> None:
            if rank == 2:
                until(lambda: len(said()) == 2)
                time.sleep(0.6)  # and not again after another 0.2 s, nor after that
                seen.extend(said())
            x, idx = inputs(rank)
            recv = cluster.buffers[rank].dispatch(x, idx, tag="first layer")
            assert torch.equal(cluster.buffers[rank].combine(recv.x, recv.handle), x * 2)

        cluster.run(work)
    assert len(seen) == 2, seen  # once per waiting rank
    for text in seen:
        assert "for rank 2 in dispatch" in text
        assert '(tag "first layer")' in text


def test_a_logger_that_raises_does_not_break_the_call(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("log server down")

    logger, broken = logging.getLogger("ep_comm"), Broken()
    logger.addHandler(broken)
    try:
        with Cluster(1, 2) as cluster:
            cluster.make_buffers(**SHAPE, config=EPConfig(arrival_warn_s=0.05))

            def work(rank: int) -> None:
                time.sleep(0.3 * rank)
                round_trip(cluster.buffers[rank])
                round_trip(cluster.buffers[rank])

            results = cluster.run_catching(work)
        # Whatever the handler's error does to its own rank, nobody hangs or gets wrong numbers.
        assert all(r is None or isinstance(r, RuntimeError | EPError) for r in results), results
    finally:
        logger.removeHandler(broken)


@three_tries
def test_absent_rank_is_e101_for_all_and_told_so_when_it_comes() -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_s=1.0))
        gave_up: list[int] = []

        def work(rank: int) -> tuple[EPError, float]:
            if rank == 2:  # whose clock is for rank 1 alone
                until(lambda: is_waiting(cluster.buffers[0]))
            if rank == 1:
                until(lambda: len(gave_up) == 2)
            start = time.monotonic()
            error = raised(lambda: cluster.buffers[rank].dispatch(*inputs(rank), tag="L17"))
            gave_up.append(rank)
            return error, time.monotonic() - start

        results = cluster.run(work)
        errors = [error for error, _ in results]
        for rank, error in enumerate(errors):
            check_verdict(error, rank, "E101", 1)
            assert '(tag "L17")' in str(error)
        for rank in (0, 2):
            assert "for rank 1 to enter" in str(errors[rank])
        assert "given up" in str(errors[1])
        for (error, took), limit_s in zip(results, (1.5, 0.5, 1.5), strict=True):
            within(limit_s, took, error)  # rank 1 waits for nobody


@three_tries
def test_verdict_is_given_once_and_stays() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE, config=EPConfig(arrival_s=1.0))
        buffer = cluster.buffers[0]
        first = raised(lambda: buffer.dispatch(*inputs(0)))
        for _ in range(3):
            start = time.monotonic()
            again = raised(lambda: buffer.dispatch(*inputs(0)))
            within(0.1, time.monotonic() - start)
            assert (again.code, again.peer) == (first.code, first.peer) == ("E101", 1)
        assert raised(lambda: buffer.dispatch(*inputs(0), wait=False).wait()).code == "E101"
        # Memory that a late peer may still write to is never given out again.
        in_use = buffer.stats()["arena"]["in_use"]
        assert in_use >= 0
        buffer.close()


@pytest.mark.parametrize("num_slots", [2, 4])
@pytest.mark.parametrize("micro_batches", [2, 3, 4])
def test_d7_micro_batches_in_flight(micro_batches: int, num_slots: int) -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE, num_slots=num_slots)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            for layer in range(5):
                seeds = [layer * 10 + i for i in range(micro_batches)]
                xs = [inputs(rank, seed) for seed in seeds]
                begun = [buffer.dispatch(*x, wait=False) for x in xs]
                outs = []
                for b in begun:  # each micro-batch combines as soon as it arrived
                    recv = b.wait()
                    outs.append(buffer.combine(recv.x, recv.handle, wait=False))
                for (x, _), out in zip(xs, outs, strict=True):
                    assert torch.equal(out.wait(), x * 2)

        cluster.run(work)


def test_d8_sequence_numbers_pass_every_width() -> None:
    for start in (2**31 - 5, 2**32 - 5, 2**62):
        with Cluster(1, 3) as cluster:
            cluster.make_buffers(**SHAPE, num_slots=3)

            def seed(rank: int, start: int = start, cluster: Cluster = cluster) -> None:
                cluster.buffers[rank]._backend.comm.seed_seq(start)

            def work(rank: int, cluster: Cluster = cluster) -> None:
                for i in range(8):
                    round_trip(cluster.buffers[rank], i)

            cluster.run(seed)
            cluster.run(work)
