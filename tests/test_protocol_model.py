"""The protocol of docs/protocol.md in all its interleavings: three ranks, two slots, four
operations.

`pytest tests/test_protocol_model.py -s -k mistake` prints a shortest counterexample for every rule
that is broken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from model.doorbell import Doorbell
from model.explorer import (
    BLOCKED,
    DEADLOCK,
    OVERWRITE,
    UNCOVERED,
    UNORDERED,
    Machine,
    Report,
    Step,
    explore,
)
from model.giveup import GiveUp, Leaving
from model.gpu import GpuProtocol
from model.mistakes import MISTAKES, Mistake, ReleasedIgnored
from model.programs import (
    FREES_RACE_GRANTS,
    SPLIT,
    TRICKS,
    all_failures,
    all_sequences,
    failing,
    sequence,
)
from model.protocol import OK, Program, Protocol
from model.stream import Stream

FAILING = ("DCDC", "DDDD", "DKCC", "DDKC", "DCKS", "DSDS", "DSCK", "DKKS")


def named(name: str) -> Program:
    return next(program for program in TRICKS if program.name == name)


REFUSES_THRICE = named("one-rank-refuses-thrice")


def holds(report: Report) -> Report:
    assert report.violation is None, f"\n{report.violation}"
    assert report.finals
    return report


def all_hold(programs: Iterable[Program], kind: type[Protocol] = Protocol) -> int:
    count = 0
    for program in programs:
        report = explore(kind(program).machine)
        assert report.violation is None, f"\n{program.name}: {report.violation}"
        count += 1
    return count


# ---- the protocol


def test_every_sequence_of_four_operations_holds() -> None:
    assert all_hold(all_sequences()) == 64


@pytest.mark.parametrize("letters", FAILING)
def test_each_operation_failing_once_holds(letters: str) -> None:
    assert all_hold(all_failures(sequence(letters))) >= 4


@pytest.mark.parametrize("program", [*TRICKS, FREES_RACE_GRANTS], ids=lambda program: program.name)
def test_program_holds(program: Program) -> None:
    holds(explore(Protocol(program).machine))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_other_numbers_of_slots_hold(num_slots: int) -> None:
    for program in (sequence("DCKC"), SPLIT, named("split-one-refused"), REFUSES_THRICE):
        holds(explore(Protocol(replace(program, num_slots=num_slots)).machine))


@pytest.mark.parametrize(
    "program", [sequence("DCDC"), sequence("DSKC"), SPLIT], ids=lambda p: p.name
)
def test_bulk_copies_of_another_proxy_hold(program: Program) -> None:
    holds(explore(GpuProtocol(program).machine))


def test_a_failed_call_has_one_verdict_on_all_ranks() -> None:
    for reason, code in (("no extent", "E231"), ("overflow", "E230")):
        report = holds(explore(Protocol(failing(sequence("DCDC"), 2, 1, reason)).machine))
        assert report.outcomes == {(OK, OK, (code, 1, False), ("skipped",)) * 3}


def test_a_rank_that_refuses_returns_early_and_the_others_name_it() -> None:
    report = holds(explore(Protocol(failing(sequence("DCDC"), 0, 2, "invalid")).machine))
    assert {outcome[0] for outcome in report.outcomes} == {("E213", 2, False)}
    assert {outcome[8] for outcome in report.outcomes} == {("E213", 2, True)}


def test_whether_an_extent_is_free_may_depend_on_timing_but_not_the_verdict() -> None:
    report = holds(explore(Protocol(named("one-extent")).machine))
    assert len(report.outcomes) > 1  # every final state passed the check that ranks agree


def test_ranks_that_give_up_neither_hang_nor_return_wrong_sums() -> None:
    report = holds(explore(GiveUp(sequence("DCDC", num_ranks=2)).machine))
    assert any(all(v == OK for v in outcome) for outcome in report.outcomes)
    assert any(all(v == ("failed",) for v in outcome[2:4]) for outcome in report.outcomes)


def test_a_peer_that_did_its_part_may_leave() -> None:
    holds(explore(Leaving().machine))


def test_the_doorbell_loses_no_wake_up() -> None:
    holds(explore(Doorbell().machine))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tokens": (1, 2, 2, 1), "ring_rows": 4, "part": 2, "num_ops": 1},
        {"num_ranks": 3, "tokens": (1,), "ring_rows": 1, "num_ops": 1},
    ],
)
def test_streams_neither_stall_nor_overwrite(sizes: dict[str, Any]) -> None:
    holds(explore(Stream(**sizes).machine))


def test_released_only_matters_after_a_refused_call() -> None:
    """A call that ran to its end everywhere needs no credit: its all-to-alls order the next use of
    the slot.
    """
    programs = [sequence(letters) for letters in FAILING]
    programs.append(failing(sequence("DDDD"), 1, 0, "no extent"))
    assert all_hold(programs, ReleasedIgnored) == len(programs)


# ---- mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found(mistake: Mistake) -> None:
    holds(explore(mistake.machine(right=True), merge=mistake.merge))
    found = explore(mistake.machine(), merge=mistake.merge).violation
    print(f"\n{mistake.name} ({mistake.protocol.__doc__})\n{found}")
    assert found is not None, "the model misses it"
    assert found.prop == mistake.prop


# ---- the explorer itself


def test_every_single_step_of_four_operations_interleaved_holds() -> None:
    holds(explore(Protocol(sequence("DCKS")).machine, merge=False))


def test_merging_local_steps_changes_no_outcome() -> None:
    for name in ("one-extent", "combine-refused", "one-rank-refuses-thrice"):
        program = replace(named(name), num_ranks=2, users={})
        merged = holds(explore(Protocol(program).machine))
        single = holds(explore(Protocol(program).machine, merge=False))
        assert merged.outcomes == single.outcomes, program.name
        assert single.states > 5 * merged.states


def toy() -> tuple[Machine, dict[str, Step]]:
    """Two threads, a cell and a flag: write, write something newer, publish, wait, read."""
    machine = Machine()
    machine.thread("writer")
    machine.thread("reader")
    cell, flag = machine.cell("cell", 0), machine.word("flag", 0)
    steps = (
        Step("writes", lambda v: v.write(cell, ("data", 1))),
        Step("writes again", lambda v: v.write(cell, ("data", 2))),
        Step("publishes", lambda v: v.release(flag, 1)),
        Step("waits", lambda v: v.acquire(flag) and None if v.peek(flag) else BLOCKED),
        Step("reads", lambda v: v.read(cell, 1) and None),
    )
    return machine, dict(zip(("write", "again", "publish", "wait", "read"), steps, strict=True))


def two_threads(*programs: str) -> Report:
    machine, steps = toy()
    for thread, names in zip(machine.threads, programs, strict=True):
        thread.program(steps[name] for name in names.split())
    return explore(machine)


def test_explorer_accepts_a_published_record() -> None:
    holds(two_threads("write publish", "wait read"))


@pytest.mark.parametrize(
    ("writer", "reader", "prop"),
    [
        ("publish write", "wait read", UNCOVERED),
        ("write publish", "read", UNCOVERED),
        ("write publish again", "wait read", OVERWRITE),
        ("write publish", "wait read again publish wait", None),
        ("write publish again", "wait write", UNORDERED),
        ("write", "wait read", DEADLOCK),
    ],
)
def test_explorer_finds(writer: str, reader: str, prop: str | None) -> None:
    found = two_threads(writer, reader).violation
    assert (found and found.prop) == prop


def test_counterexample_is_shortest_and_ends_with_the_violation() -> None:
    found = two_threads("publish write", "wait read").violation
    assert found is not None
    assert [what for _, what in found.trace] == ["publishes", "waits", "reads"]
    assert "nobody has written" in str(found).splitlines()[0]


# ---- more of the same, slow


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_operation_of_every_sequence_failing_once_holds() -> None:
    assert all_hold(p for program in all_sequences() for p in all_failures(program)) == 464


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "program", [sequence("DDDD"), failing(sequence("DCKC"), 1, 0, "invalid")], ids=lambda p: p.name
)
def test_every_single_step_interleaved_holds(program: Program) -> None:
    holds(explore(Protocol(program).machine, merge=False))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "program",
    [
        sequence("DCKC", num_ranks=4),
        sequence("DCKSDC"),
        sequence("DCKSDCKS", num_slots=3),
        sequence("DCDCDCDC", num_ranks=2),
        replace(REFUSES_THRICE, num_ranks=4),
    ],
    ids=[
        "four-ranks",
        "six-operations",
        "eight-operations",
        "eight-on-two-ranks",
        "four-ranks-refused",
    ],
)
def test_larger_program_holds(program: Program) -> None:
    holds(explore(Protocol(program).machine))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_ranks_that_give_up_neither_hang_nor_return_wrong_sums() -> None:
    holds(explore(GiveUp(sequence("DC")).machine))
