"""Ranks as threads: what comes back of what they return and raise."""

from __future__ import annotations

import threading

import pytest

from ep_comm.testing import Cluster


def test_results_stand_by_rank() -> None:
    with Cluster(1, 3) as cluster:
        assert cluster.run(lambda rank, value: rank * value, [5, 6, 7]) == [0, 6, 14]


def test_run_raises_what_was_raised_first_and_names_the_others() -> None:
    """The first error is why the others wait in vain; theirs would hide it."""
    with Cluster(1, 3) as cluster:
        first: list[threading.Thread] = []

        def work(rank: int) -> None:
            if rank == 2:
                first.append(threading.current_thread())
                raise ValueError("the cause")
            while not first or first[0].is_alive():
                pass
            if rank == 0:
                raise KeyError("a consequence")

        with pytest.raises(ValueError, match="the cause") as caught:
            cluster.run(work)
        assert caught.value.__notes__ == ["raised by rank 2; ranks that raised, in order: [2, 0]"]


def test_an_error_that_is_returned_is_a_result() -> None:
    with Cluster(1, 2) as cluster:
        errors = cluster.run(lambda rank: ValueError(rank))
        assert [error.args for error in errors] == [(0,), (1,)]


def test_run_catching_shows_every_rank() -> None:
    with Cluster(1, 2) as cluster:

        def work(rank: int) -> int:
            if rank == 0:
                raise ValueError("no")
            return 7

        error, value = cluster.run_catching(work)
        assert isinstance(error, ValueError)
        assert value == 7


def test_a_rank_that_does_not_end_is_a_timeout_unless_another_raised() -> None:
    go_on = threading.Event()
    try:
        with Cluster(1, 2) as cluster:
            with pytest.raises(TimeoutError, match="longer than"):
                cluster.run(lambda rank: rank == 0 or go_on.wait(), limit_s=0.05)

            def work(rank: int) -> None:
                if rank == 0:
                    go_on.wait()
                raise ValueError("the cause")

            with pytest.raises(ValueError, match="the cause"):
                cluster.run(work, limit_s=0.05)
    finally:
        go_on.set()
