"""close() while calls wait (C11): from another thread, a signal handler, the end of the program."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
from patience import is_inside, is_waiting, three_tries, until, within
from verdicts import SHAPE, check_verdict, inputs, raised, round_trip

from ep_comm.errors import EPClosedError, EPError
from ep_comm.testing import Cluster


def check_closed(error: EPError, rank: int) -> None:
    assert isinstance(error, EPClosedError), error
    assert (error.code, error.rank, error.peer) == ("E340", rank, None)
    assert "close()" in str(error)


@pytest.mark.parametrize("where", ["dispatch", "combine", "begun", "check", "behind-begun"])
@three_tries
def test_c11_close_in_another_thread_ends_a_wait(where: str) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)
        received = cluster.run(lambda r: cluster.buffers[r].dispatch(*inputs(r)))
        buffer = cluster.buffers[0]

        def enter(rank: int, wait: bool = True) -> Any:
            buffer, recv = cluster.buffers[rank], received[rank]
            if where == "combine":
                return buffer.combine(recv.x, recv.handle)
            return buffer.dispatch(*inputs(rank), sync=where != "check", wait=wait)

        begun = enter(0, wait=False) if where in ("begun", "check", "behind-begun") else None

        def waits() -> None:
            if where == "check":
                buffer.check()  # waits for what began, and has nothing to tell
            if begun is not None and where != "behind-begun":
                begun.wait()
            enter(0)

        results: list[EPError] = []
        thread = threading.Thread(target=lambda: results.append(raised(waits)), daemon=True)
        thread.start()
        until(lambda: is_inside(thread) and is_waiting(buffer))
        start = time.monotonic()
        buffer.close()
        thread.join(60.0)
        took = time.monotonic() - start
        assert not thread.is_alive(), "the call went on waiting in a closed buffer"
        check_closed(results[0], 0)
        check_closed(raised(lambda: buffer.dispatch(*inputs(0))), 0)
        check_verdict(raised(lambda: enter(1)), 1, "E111", 0)
        within(0.5, took)


def test_c11_close_at_any_moment_of_another_threads_work() -> None:
    rng = random.Random(5)
    for _ in range(15):
        with Cluster(1, 3) as cluster:
            cluster.make_buffers(**SHAPE)

            def work(rank: int, cluster: Cluster = cluster) -> Any:
                if rank == 3:
                    time.sleep(rng.uniform(0.0, 0.03))
                    return cluster.buffers[0].close()
                for i in range(100_000):
                    round_trip(cluster.buffers[rank], i)
                return "finished"

            outcomes: list[Any] = [None] * 4

            def catch(rank: int, work: Any = work, outcomes: list[Any] = outcomes) -> None:
                try:
                    outcomes[rank] = work(rank)
                except EPError as error:
                    outcomes[rank] = error

            threads = [threading.Thread(target=catch, args=(r,), daemon=True) for r in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)
            check_closed(outcomes[0], 0)
            for rank in (1, 2):
                check_verdict(outcomes[rank], rank, "E111", 0)


def test_c11_threads_that_queue_for_the_buffer_are_told_as_well() -> None:
    with Cluster(1, 2) as cluster:
        buffer = cluster.make_buffers(**SHAPE)[0]
        results: list[EPError] = []

        def waits() -> None:
            results.append(raised(lambda: buffer.dispatch(*inputs(0))))

        threads = [threading.Thread(target=waits, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: all(is_inside(thread) for thread in threads))
        buffer.close()
        for thread in threads:
            thread.join(60.0)
        assert len(results) == 4
        for error in results:
            check_closed(error, 0)


def _closes_in_a_handler(me: Any) -> tuple[float, EPError]:
    buffer = me.buffer(**SHAPE)
    signal.signal(signal.SIGTERM, lambda *_: buffer.close())
    round_trip(buffer)
    if me.rank == 0:
        until(lambda: is_waiting(buffer, 1, seq=3))
        me.say("it waits")
        me.wait_for_go()
    error = raised(lambda: buffer.dispatch(*inputs(me.rank)))
    return time.monotonic(), error


@three_tries
def test_c11_a_signal_handler_may_close_the_buffer_its_thread_waits_in() -> None:
    with ranks.Ranks(_closes_in_a_handler, 2) as two:
        two.hear(0)
        told = two.kill(1, signal.SIGTERM)
        when, error = two.result(1)
        check_closed(error, 1)
        two.go(0)
        check_verdict(two.result(0)[1], 0, "E111", 1)
        within(0.5, when - told)


PROGRAM = """
import sys, threading
import torch
from ep_comm.testing import Cluster

cluster = Cluster(1, 2)
buffers = cluster.make_buffers(num_experts=4, num_topk=1, hidden=32, max_tokens=8)

def waits():
    try:
        buffers[0].dispatch(torch.ones(8, 32), torch.zeros(8, 1, dtype=torch.int64))
    except Exception as error:
        print(error, flush=True)

threading.Thread(target=waits, daemon=True).start()
sys.path.append(sys.argv[1])
from patience import is_waiting, until
until(lambda: is_waiting(buffers[0]))
print("ends", flush=True)
"""


def test_c11_the_end_of_the_program_ends_a_wait_in_a_daemon_thread() -> None:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ends\n")
    assert "E340" in done.stdout
