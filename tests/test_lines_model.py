"""Small batches in all their interleavings: lines with many writers, halves, calls that fail.

`pytest tests/test_lines_model.py -s -k mistake` prints a shortest counterexample for every rule
that is broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
from model.explorer import BLOCKED, DEADLOCK, OVERWRITE, Report, Step, View, explore, walk
from model.lines import LEFT, LOST, RECEIVE, SEND, WRONG_CALL, Lines, Small, late, program, whole

Fails = dict[int, dict[int, str]]


def holds(report: Report, small: Small) -> None:
    assert report.violation is None, f"\n{small.name}: {report.violation}"
    assert report.finals


def some_fail(num_ranks: int, num_ops: int, most: int) -> Iterator[Fails]:
    """Every way in which at most so many calls fail, each on one rank."""
    ways = [None, *product(range(num_ranks), ("refused", "found"))]
    for choice in product(ways, repeat=num_ops):
        if sum(way is not None for way in choice) <= most:
            yield {k: {way[0]: way[1]} for k, way in enumerate(choice) if way is not None}


def schedules(num_ranks: int, num_ops: int) -> Iterator[tuple[str, Sequence[object]]]:
    """Each rank whole, or with its second halves as late as they may be."""
    for behind in product((0, 1, 2), repeat=num_ranks):
        pieces = [late(num_ops, b) if b else whole(num_ops) for b in behind]
        yield "".join(map(str, behind)), pieces


def test_two_ranks_hold_whoever_fails_and_however_late_they_are() -> None:
    count = 0
    for name, pieces in schedules(2, 4):
        for fails in some_fail(2, 4, most=2):
            small = program(f"{name} {fails}", pieces, fails)  # type: ignore[arg-type]
            holds(explore(Lines(small).machine), small)
            count += 1
    assert count == 9 * (1 + 16 + 96)


@pytest.mark.parametrize("fails", [{}, {0: {0: "refused"}}, {0: {1: "found"}, 1: {0: "refused"}}])
def test_three_ranks_hold(fails: Fails) -> None:
    small = program("three", [whole(4), late(4, 1), late(4, 2)], fails)
    holds(explore(Lines(small).machine), small)


@pytest.mark.slow
def test_three_ranks_hold_whoever_fails_and_however_late_they_are() -> None:
    for name, pieces in schedules(3, 4):
        for fails in some_fail(3, 4, most=1):
            small = program(f"{name} {fails}", pieces, fails)  # type: ignore[arg-type]
            holds(explore(Lines(small).machine), small)


def test_local_steps_change_no_verdict() -> None:
    for fails in some_fail(2, 3, most=1):
        small = program(f"{fails}", [whole(3), late(3, 2)], fails)
        holds(explore(Lines(small).machine, merge=False), small)


def test_random_runs_hold_with_more_ranks() -> None:
    for seed, fails in enumerate([{}, {1: {2: "refused"}}, {2: {4: "found"}, 3: {0: "refused"}}]):
        ranks = [whole(8), late(8, 1), late(8, 2), whole(8), late(8, 2)]
        small = program("five", ranks, fails)
        for again in range(10):
            holds(walk(Lines(small).machine, 100 * seed + again), small)


# ---- every rule has a mistake that only it prevents ----


class NoFence(Lines):
    """A failed call releases as a good one does."""

    def fences(self, v: View, r: int) -> bool:
        return False


class EarlyRelease(Lines):
    """The slot is released once everybody was heard, lines not loaded."""

    def receiving(self, r: int, k: int) -> list[Step]:
        early = [self.releasing(f"[{k}] releases early to {p}", p, r, k) for p in self.ranks]
        return [self.hearing(r, k), *early, *self.loading(r, k)]


class SlotNotAwaited(Lines):
    def slot_steps(self, r: int, k: int) -> list[Step]:
        return []


class OnlyOwnSlotAwaited(Lines):
    """Who waits only for the receivers of its lines overtakes who wrote there before."""

    def await_released(self, v: View, r: int, k: int) -> object:
        want = self.seq(k) - self.program.num_slots
        mine = {p for p in self.ranks for i in (0, 1) if self.writer(k, p, i) == r}
        words = [self.released[r, self.slot(k), p] for p in mine]
        if any(v.get(word).number < want for word in words):
            return BLOCKED
        for word in words:
            self.see(v, v.get(word))
        return None


class AnyNumber(Lines):
    """A line counts as there, whatever its number."""

    def is_here(self, number: int, seq: int) -> bool:
        return number > 0


class LoadsBeforeVerdict(Lines):
    """Lines are waited for before it is known whether they come."""

    def receiving(self, r: int, k: int) -> list[Step]:
        return [*self.loading(r, k), self.hearing(r, k)]


class OwnNumber(Lines):
    """A second half takes the number that is next when it runs, not that of the first."""

    def receiving(self, r: int, k: int) -> list[Step]:
        pieces = self.program.pieces[r]
        if (RECEIVE, k) not in pieces:
            return super().receiving(r, k)
        ahead = pieces[: pieces.index((RECEIVE, k))]
        return super().receiving(r, max(op for kind, op in ahead if kind == SEND))


FOUND: Fails = {0: {0: "found"}, 1: {1: "refused"}}
MISTAKES = {
    NoFence: ({LOST}, program("a", [whole(4), whole(4), whole(4)], FOUND)),
    EarlyRelease: ({OVERWRITE}, program("b", [whole(4), late(4, 2)], {})),
    SlotNotAwaited: ({OVERWRITE, LOST}, program("c", [whole(4), late(4, 2)], {})),
    OnlyOwnSlotAwaited: ({OVERWRITE}, program("d", [whole(4), late(4, 2), whole(4)], {})),
    AnyNumber: ({WRONG_CALL}, program("e", [whole(3), whole(3)], {})),
    LoadsBeforeVerdict: ({DEADLOCK}, program("f", [whole(2), whole(2)], {0: {0: "refused"}})),
    OwnNumber: ({LEFT}, program("g", [late(3, 2), whole(3)], {})),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_mistake_is_found(mistake: type[Lines]) -> None:
    props, small = MISTAKES[mistake]
    report = explore(mistake(small).machine)
    assert report.violation is not None, report
    print(f"\n{mistake.__name__}: {report.violation}")
    assert report.violation.prop in props, report.violation
    right = explore(Lines(small).machine)
    holds(right, small)


def test_a_second_half_behind_who_needs_its_slot_hangs() -> None:
    """What hosts make room for: it must be queued before."""
    report = explore(Lines(program("h", [late(4, 3), whole(4)], {})).machine)
    assert report.violation is not None
    assert report.violation.prop == DEADLOCK
