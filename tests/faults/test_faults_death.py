"""Ranks that die, stop or leave (C): who is blamed, how soon, and what still works."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import time
from typing import Any

import pytest
import ranks
import torch
from patience import LONGER_S, is_waiting, three_tries, until, within
from verdicts import (
    SHAPE,
    Survivor,
    check_survivor,
    check_verdict,
    inputs,
    raised,
    round_trip,
    round_trip_of,
    survive,
)

from ep_comm import Buffer, EPConfig, StoreGroup
from ep_comm.errors import (
    EPError,
    EPPeerDied,
    EPPeerLeft,
    EPTimeout,
)

BIG: dict[str, Any] = {"num_experts": 6, "num_topk": 2, "hidden": 4096, "max_tokens": 128}


def _traffic(me: Any, verb: str) -> Survivor:
    """One verb over and over, most of the time inside it."""
    buffer = me.buffer(**BIG, arena_bytes=1 << 27)
    x = torch.full((128, 4096), float(me.rank), dtype=torch.bfloat16)
    recv = buffer.dispatch(x, inputs(me.rank, tokens=128)[1])
    kept = recv.x.clone()
    me.say("busy")
    if verb == "combine":
        seen = survive(buffer, lambda i: buffer.combine(recv.x, recv.handle))
    elif verb == "cached":
        seen = survive(buffer, lambda i: buffer.dispatch(x, handle=recv.handle))
    else:
        seen = survive(buffer, lambda i: buffer.dispatch(x, inputs(me.rank, i, 128)[1]))
    assert torch.equal(recv.x, kept)  # received before, still ours
    return seen


@pytest.mark.parametrize("verb", ["dispatch", "cached", "combine"])
@pytest.mark.parametrize("attempt", range(3))
@three_tries
def test_c2_c3_a_rank_killed_at_work_is_named_by_all_within_a_second(
    verb: str, attempt: int
) -> None:
    with ranks.Ranks(_traffic, 3, verb) as three:
        three.hear_all()
        time.sleep(random.Random(attempt).uniform(0.01, 0.12))
        died = three.kill(1)
        results = three.results()
    assert results[1] == -signal.SIGKILL
    for rank in (0, 2):
        check_survivor(results[rank], rank, "E110", 1, died)
        assert isinstance(results[rank].error, EPPeerDied)


def _wait_for_rank_0(me: Any) -> Survivor:
    buffer = me.buffer(**SHAPE)
    round_trip(buffer)
    if me.rank == 0:
        until(lambda: all(is_waiting(buffer, rank, seq=3) for rank in (1, 2, 3)))
        me.say("they wait")
        me.wait_for_go()
    return survive(buffer, lambda i: round_trip(buffer, i))


@three_tries
def test_c2_a_rank_killed_while_all_wait_for_another_is_found_by_the_waiting_and_the_late() -> None:
    with ranks.Ranks(_wait_for_rank_0, 4) as four:
        four.hear(0)
        died = four.kill(2)
        for rank in (1, 3):
            check_survivor(four.result(rank), rank, "E110", 2, died)
        late = time.monotonic()
        four.go(0)  # nobody waits for rank 0 any more
        check_survivor(four.result(0), 0, "E110", 2, late)


def _killed_in_bootstrap(me: Any, where: str) -> tuple[EPError, float]:
    from ep_comm import bootstrap
    from ep_comm.backends import mapping

    def die(*_: Any, **__: Any) -> None:
        me.say(time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)

    if me.rank == 1:
        real = bootstrap.Exchange.gather

        def gather(self: Any, name: str, payload: bytes) -> Any:
            if where == f"before-{name}":
                until(lambda: all(self.heard("hello", rank) for rank in (0, 2)))
                die()
            if where == f"after-{name}":
                self.publish(name, payload)
                die()
            return real(self, name, payload)

        bootstrap.Exchange.gather = gather  # type: ignore[method-assign]
        if where == "connecting":
            bootstrap.Listener.connect_all = die  # type: ignore[method-assign, assignment]
        if where == "sharing":
            mapping._share = die  # type: ignore[assignment]
    me.say("starts")
    me.wait_for_go()
    try:
        me.buffer(**SHAPE, config=EPConfig(arrival_s=LONGER_S if where == "before-hello" else 60.0))
    except EPError as error:
        return error, time.monotonic()
    raise AssertionError("constructed")


@pytest.mark.parametrize(
    "where",
    ["before-hello", "after-hello", "connecting", "before-created", "after-created", "sharing",
     "before-mapped"],
)  # fmt: skip
@three_tries
def test_c1_a_rank_killed_during_construction_fails_it_everywhere_in_two_seconds(
    where: str,
) -> None:
    with ranks.Ranks(_killed_in_bootstrap, 3, where) as three:
        three.hear_all()
        three.go()
        died = three.hear(1)
        results = three.results()
    assert results[1] == -signal.SIGKILL
    for rank in (0, 2):
        error, when = results[rank]
        if where == "before-hello":  # nobody can know that it ever lived
            assert error.code == "E120"
            assert "ranks [1] missing" in str(error)
        else:
            check_verdict(error, rank, "E110", 1)
            assert "construction" in str(error)
            within(2.0, when - died, error)


def _paused(me: Any) -> tuple[int, list[str]]:
    """Rounds until rank 1 says, when it is told so, that this one or the next is the last."""
    logs = _Logs(me)
    logging.getLogger("ep_comm").addHandler(logs)
    buffer = me.buffer(**SHAPE, config=EPConfig(arrival_warn_s=0.3, progress_s=60.0))
    store = me.group().store
    round_trip(buffer)
    me.say("ready")
    rounds = last = 0
    while not last or rounds < last:
        if not last and me.rank == 1 and me.pipe.poll():
            store.set("last", str(rounds + 5))  # nobody is further ahead than a round
        round_trip(buffer, rounds)
        rounds += 1
        if not last and store.check(["last"]):
            last = int(store.get("last"))
    return rounds, logs.told


class _Logs(logging.Handler):
    def __init__(self, me: Any) -> None:
        super().__init__()
        self.me, self.told = me, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        self.me.say(self.told[-1])


def test_c4_a_rank_stopped_and_continued_costs_a_warning_at_most() -> None:
    with ranks.Ranks(_paused, 3) as three:
        three.hear_all()
        time.sleep(0.2)  # any moment is one
        three.kill(1, signal.SIGSTOP)
        first = [three.hear(rank) for rank in (0, 2)]
        assert any("for rank 1 in" in text for text in first), first
        three.kill(1, signal.SIGCONT)
        three.go(1)
        results = three.results(60)
    assert len({rounds for rounds, _ in results}) == 1
    assert all(text.startswith("W101") for _, told in results for text in told), results


def _stopped(me: Any, busy: bool) -> Survivor:
    buffer = me.buffer(**SHAPE, config=EPConfig(arrival_warn_s=60.0, progress_s=LONGER_S))
    round_trip(buffer)
    me.say("ready")
    if me.rank == 1 and not busy:
        me.wait_for_go()
    return survive(buffer, lambda i: round_trip(buffer, i))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@three_tries
def test_c5_a_rank_stopped_for_ever_is_e101_or_e102_and_said_to_be_stopped(busy: bool) -> None:
    with ranks.Ranks(_stopped, 3, busy) as three:
        three.hear_all()
        time.sleep(0.1)  # any moment is one
        stopped = three.kill(1, signal.SIGSTOP)
        seen = [three.result(rank) for rank in (0, 2)]
        three.kill(1, signal.SIGKILL)
    for rank, survivor in zip((0, 2), seen, strict=True):
        assert survivor.error.code in ("E101", "E102")
        check_survivor(survivor, rank, survivor.error.code, 1, stopped, LONGER_S + 2.0)
        assert isinstance(survivor.error, EPTimeout)
    assert len({s.error.code for s in seen}) == 1
    assert any("alive but stopped" in str(s.error) for s in seen), [str(s.error) for s in seen]


def _leaves(me: Any, how: str) -> Any:
    buffer = me.buffer(**SHAPE)
    for i in range(3):
        round_trip(buffer, i)
    me.say(time.monotonic())
    if me.rank == 1:
        if how == "exception":
            raise ValueError("user code")
        if how == "sys.exit":
            raise SystemExit(3)
        if how == "_exit":
            os._exit(3)
        if how == "close":
            buffer.close()
            return time.monotonic()
        if how == "interrupt":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in jobs
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    return survive(buffer, lambda i: round_trip(buffer, i))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("exception", "E111"),
        ("sys.exit", "E111"),
        ("close", "E111"),
        ("interrupt", "E111"),
        ("_exit", "E110"),
    ],
)
@three_tries
def test_c6_c8_c11_a_rank_that_leaves_is_named_with_its_last_operation(how: str, code: str) -> None:
    with ranks.Ranks(_leaves, 3, how) as three:
        left = three.hear_all()[1]
        results = three.results()
    kinds: dict[str, Any] = {
        "exception": ValueError,
        "sys.exit": SystemExit,
        "close": float,
        "interrupt": KeyboardInterrupt,
        "_exit": ranks.Died,
    }
    assert isinstance(results[1], kinds[how]), results[1]
    for rank in (0, 2):
        check_survivor(results[rank], rank, code, 1, left, limit_s=1.5)
        assert isinstance(results[rank].error, EPPeerLeft if code == "E111" else EPPeerDied)
        assert "#6" in str(results[rank].error)  # three round trips


def _interrupted(me: Any) -> Any:
    buffer = me.buffer(**SHAPE)
    round_trip(buffer)
    if me.rank == 0:
        until(lambda: is_waiting(buffer, 1, seq=3))
        me.say("it waits")
        me.wait_for_go()
        return survive(buffer, lambda i: round_trip(buffer, i))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        buffer.dispatch(*inputs(me.rank))
    except KeyboardInterrupt:
        now = time.monotonic()
        return now, raised(lambda: buffer.dispatch(*inputs(me.rank)))
    raise AssertionError("not interrupted")


@three_tries
def test_c8_ctrl_c_ends_a_wait_at_once_and_the_others_are_told() -> None:
    with ranks.Ranks(_interrupted, 2) as two:
        two.hear(0)
        pressed = two.kill(1, signal.SIGINT)
        now, again = two.result(1)
        within(0.5, now - pressed)
        assert again.code == "E111"
        two.go(0)
        survivor = two.result(0)
        check_verdict(survivor.error, 0, "E111", 1)


def _shrinks(me: Any, rounds: int) -> list[tuple[int, int]]:
    """Of each generation the last rank dies; the others close and build the next."""
    footprints = []
    for generation in range(rounds):
        size = me.size - generation
        group = StoreGroup(
            me.group(f"generation {generation}").store, me.rank, size, str(generation)
        )
        buffer = Buffer(group, **SHAPE, device="cpu")
        round_trip_of(buffer, generation)
        if me.rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        survivor = survive(buffer, lambda i, b=buffer: round_trip_of(b, i))
        check_verdict(survivor.error, me.rank, "E110", size - 1)
        del buffer, survivor
        gc.collect()
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:ep_comm" in line for line in maps)
        footprints.append((mapped, len(os.listdir("/proc/self/fd"))))
    return footprints


@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_c10_survivors_rebuild_again_and_again_without_a_leak(rounds: int) -> None:
    with ranks.Ranks(_shrinks, rounds + 1, rounds) as group:
        results = group.results(60.0 * rounds / 5)
    assert results[1:] == [-signal.SIGKILL] * rounds
    footprints = results[0]
    assert [mapped for mapped, _ in footprints] == [0] * rounds
    assert len({fds for _, fds in footprints}) == 1, footprints
