"""The protocol of GPUs in all its interleavings: three ranks, two slots, four operations.

`pytest tests/test_notice_model.py -s -k mistake` prints a shortest counterexample for every rule
that is broken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from model.explorer import Report, explore, walk
from model.giveup import LatePull
from model.notice import Notices
from model.notice_mistakes import MISTAKES, Mistake, ReleasedIgnored
from model.programs import (
    FREES_RACE_GRANTS,
    SPLIT,
    TRICKS,
    all_failures,
    all_sequences,
    by_copies,
    failing,
    sequence,
)
from model.protocol import OK, Program

FAILING = ("DCDC", "DDDD", "DKCC", "DDKC", "DCKS", "DSDS", "DSCK", "DKKS")
# What a kernel finds, beside what all_failures has.
FOUND = ("bad ids", "overflow", "tampered")


def named(name: str) -> Program:
    return next(program for program in TRICKS if program.name == name)


REFUSES_THRICE = named("one-rank-refuses-thrice")


def holds(report: Report) -> Report:
    assert report.violation is None, f"\n{report.violation}"
    assert report.finals
    return report


def all_hold(programs: Iterable[Program], kind: type[Notices] = Notices) -> int:
    count = 0
    for program in programs:
        report = explore(kind(program).machine)
        assert report.violation is None, f"\n{program.name}: {report.violation}"
        count += 1
    return count


def both_ways(programs: Iterable[Program]) -> Iterator[Program]:
    for program in programs:
        yield program
        yield by_copies(program)


def failures_of(letters: str) -> Iterator[Program]:
    program = sequence(letters)
    yield from all_failures(program)
    for k, op in enumerate(program.ops):
        for i, reason in enumerate(FOUND):
            if op.kind == "cached" or (op.kind == "dispatch" and reason != "tampered"):
                yield failing(program, k, (k + i) % program.num_ranks, reason)


# ---- the protocol; one run stands for all, see the head of model/notice.py


def test_every_sequence_of_four_operations_holds() -> None:
    assert all_hold(both_ways(all_sequences())) == 128


@pytest.mark.parametrize("letters", FAILING)
def test_each_operation_failing_once_holds(letters: str) -> None:
    assert all_hold(both_ways(failures_of(letters))) >= 16


@pytest.mark.parametrize("num_slots", [1, 3])
def test_other_numbers_of_slots_hold(num_slots: int) -> None:
    programs = (sequence("DCKC"), SPLIT, named("split-one-refused"), REFUSES_THRICE)
    assert all_hold(replace(p, num_slots=num_slots) for p in both_ways(programs)) == 8


def test_more_ranks_and_more_operations_hold() -> None:
    programs = (
        sequence("DCKC", num_ranks=4),
        sequence("DCKSDCKS", num_slots=3),
        sequence("DCDCDCDC", num_ranks=2),
        replace(REFUSES_THRICE, num_ranks=4),
    )
    assert all_hold(both_ways(programs)) == 8


@pytest.mark.parametrize(
    ("reason", "code"), [("no extent", "E231"), ("overflow", "E230"), ("bad ids", "E213")]
)
def test_a_failed_call_has_one_verdict_on_all_ranks(reason: str, code: str) -> None:
    report = holds(explore(Notices(failing(sequence("DCDC"), 2, 1, reason)).machine))
    assert report.outcomes == {(OK, OK, (code, 1, False), ("skipped",)) * 3}


def test_a_changed_handle_fails_on_all_ranks() -> None:
    report = holds(explore(Notices(failing(sequence("DKCC"), 1, 2, "tampered")).machine))
    assert {outcome[1] for outcome in report.outcomes} == {("E320", 2, False)}


# ---- in every interleaving


@pytest.mark.parametrize(
    "program",
    [
        sequence("DCKS"),
        sequence("DDDD"),
        sequence("DSDS"),
        by_copies(sequence("DDCK")),
        by_copies(SPLIT),
        failing(sequence("DKDC"), 1, 2, "tampered"),
        *TRICKS,
        FREES_RACE_GRANTS,
    ],
    ids=lambda program: program.name,
)
def test_every_interleaving_holds(program: Program) -> None:
    """Each store that another rank may see is a step by itself."""
    report = holds(explore(Notices(program, reduced=False).machine))
    assert report.states > 100
    assert report.outcomes == explore(Notices(program).machine).outcomes


def test_random_interleavings_of_single_steps_hold() -> None:
    for seed in range(40):
        program = (sequence("DCKS"), by_copies(sequence("DDCK")), REFUSES_THRICE)[seed % 3]
        holds(walk(Notices(program, reduced=False).machine, seed))


def test_released_only_matters_after_a_refused_call() -> None:
    """With two slots. Our notice s + 2 follows everybody's s + 1, which follows their reading of s:
    kernels of a rank do not overlap. A refuser follows nobody.
    """
    fine = [sequence(letters) for letters in FAILING]
    fine += [p for letters in FAILING for p in failures_of(letters) if "invalid" not in p.name]
    assert all_hold(both_ways(fine), ReleasedIgnored) == 2 * len(fine)
    refused = failing(sequence("DDDD"), 1, 1, "invalid")
    for program in (refused, replace(sequence("DD"), num_slots=1)):
        assert explore(ReleasedIgnored(program).machine).violation is not None


def test_a_late_puller_returns_no_wrong_sums() -> None:
    holds(explore(LatePull().machine))


# ---- mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found(mistake: Mistake) -> None:
    holds(explore(mistake.machine(right=True, reduced=False), merge=mistake.merge))
    found = explore(mistake.machine(reduced=False), merge=mistake.merge).violation
    print(f"\n{mistake.name} ({mistake.model.__doc__})\n{found}")
    assert found is not None, "the model misses it"
    assert found.prop == mistake.prop


@pytest.mark.parametrize(
    "mistake", [m for m in MISTAKES if m.one_run and m.program], ids=lambda mistake: mistake.name
)
def test_one_run_says_what_every_interleaving_says(mistake: Mistake) -> None:
    holds(explore(mistake.machine(right=True)))
    found = explore(mistake.machine()).violation
    assert found is not None
    assert found.prop == mistake.prop


# ---- more of the same, slow


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_operation_of_every_sequence_failing_once_holds() -> None:
    programs = (p for program in all_sequences() for p in all_failures(program))
    assert all_hold(both_ways(programs)) == 928


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_single_step_interleaved_holds() -> None:
    """Nothing merged, hosts and blocks of one rank neither. Of a refusal, see the mistakes."""
    program = sequence("D", num_ranks=2)
    holds(explore(Notices(program, reduced=False).machine, merge=False))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("letters", FAILING)
def test_every_interleaving_of_failures_holds(letters: str) -> None:
    for program in failures_of(letters):
        holds(explore(Notices(program, reduced=False).machine))
