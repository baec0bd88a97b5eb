"""The protocol of GPUs with one rule broken at a time, and a small program that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .explorer import BLOCKED, DEADLOCK, OVERWRITE, UNCOVERED, UNORDERED, Machine, Place, Step, View
from .giveup import LatePull
from .mistakes import small
from .notice import Head, Notices, Numbers, Turn
from .notice_host import MOVER, SPEAKER
from .programs import D0, D1, cached, combine, copies, no_extent, overflow, refused, sequence
from .protocol import (
    CREDIT,
    END,
    EXTENTS,
    OK,
    VERDICTS,
    WRONG_CALL,
    WRONG_DATA,
    Program,
)


def without(steps: Sequence[Step], text: str) -> list[Step]:
    """Steps but for those that say so."""
    return [step for step in steps if text not in step.text]


# ---- notices and slots


class ReleasedIgnored(Notices):
    """A notice is published without a look at `released`."""

    def await_released(self, t: Turn) -> Any:
        return None


class ReleasedEqual(Notices):
    """`released == seq - num_slots`: a peer that refused this very call has already released it."""

    def slot_is_free(self, released: int, seq: int) -> bool:
        return released == max(0, seq - self.num_slots)


class LeavesBeforeTheMover(Notices):
    """The block that speaks leaves the slot when it has read the notices itself."""

    def await_mover(self, t: Turn) -> Any:
        return None


class RefusedWithoutRelease(Notices):
    """A refused call tells, and forgets the slot."""

    def refuse(self, r: int) -> list[Step]:
        return without(super().refuse(r), "releases")


class PlanLeavesTheSlot(Notices):
    """The kernel that decides a call by copies also leaves it; another one places its rows."""

    def by_copies(self, r: int) -> list[Step]:
        steps = super().by_copies(r)
        at = next(i for i, step in enumerate(steps) if "copies end" in step.text)
        early = self.each_peer(r, SPEAKER, "releases the slot early to", self.release)
        return [*steps[:at], *early, *steps[at:]]


class NumbersTakenWithTheHead(Notices):
    """The numbers of rows are taken as they stand when the head is there."""

    def listen(self, t: Turn, word: Place) -> Any:
        if word.name[0] != "numbers":
            return super().listen(t, word)
        content = t.v.get(word)[0][-1].content or Numbers(END, END, (0,) * self.num_ranks, ())
        return self.same_call(t, word, content)

    def numbers_here(self, t: Turn, words: Sequence[Place]) -> bool:
        return True


class AnyNumber(Notices):
    """A packed word counts as here when it is not zero."""

    def is_here(self, number: int, seq: int) -> bool:
        return number > 0

    def listen(self, t: Turn, word: Place) -> Any:
        return self.same_call(t, word, t.v.get(word)[0][-1].content)


class FirstNumberZero(Notices):
    """The first operation has number 0, which zeroed memory already shows."""

    first_seq = 0


# ---- the verdict


class ReportBeforeTheVerdict(Notices):
    """The host is told that all is well once our own notice is out."""

    def begin_dispatch(self, r: int, label: str) -> list[Step]:
        *steps, heard, report = super().begin_dispatch(r, label)
        return [*steps, report, heard]

    def report(self, t: Turn) -> None:
        known = t.v.get(self.verdict[t.r, t.k])
        if known is None:
            self.store(t.v, self.reports[t.r], t.seq, OK)


class FirstPoisonDecides(Notices):
    """A rank fails with the first poisoned head it sees instead of hearing all."""

    def decide(self, t: Turn) -> Any:
        for p in self.ranks:
            word = self.head[t.r, t.slot, p]
            if self.last(t.v, word) >= t.seq and (code := self.peek(t, word).code) != "ok":
                self.record(t, (code, p, False))
                return "fail"
        return super().decide(t)


class JudgesWhatComesHere(Notices):
    """A rank looks only at the numbers of what comes to itself."""

    def judge(self, t: Turn, heads: Sequence[Head], numbers: dict[int, Numbers]) -> Any:
        if objection := super().judge(t, heads, numbers):
            code, culprit = objection
            return objection if code in ("E213", "E220") or culprit == t.r else None
        return None


class PushesOnTheFirstNotice(Notices):
    """Rows go to a rank as soon as its notice is there: another one may still fail the call."""

    def push(self, r: int, block: int) -> list[Step]:
        return []

    def begin_dispatch(self, r: int, label: str) -> list[Step]:
        steps = super().begin_dispatch(r, label)
        early = self.each_peer(r, SPEAKER, "pushes a row early to", self.push_early, local=True)
        at = next(i for i, step in enumerate(steps) if "has heard" in step.text)
        return [*steps[:at], *early, *steps[at:]]

    def push_early(self, t: Turn, p: int) -> Any:
        word = self.head[t.r, t.slot, p]
        if self.last(t.v, word) < t.seq:
            return BLOCKED
        head = self.listen(t, word)
        if self.sends(t, p) and head.extent != END:
            t.v.write(self.rows[p, head.extent, 0], ("x", t.k, t.r, 0))
        return None

    def await_rows(self, t: Turn) -> Any:
        return None

    def caller_use(self, v: View, r: int, k: int) -> None:
        pass

    def check_slot(self, v: View, r: int, slot: int, last: int) -> None:
        pass


class NoRoutingInDescriptor(Notices):
    """Handles of different dispatches look alike, and expected rows are not compared."""

    def is_fine(self, t: Turn, head: Head) -> bool:
        return head.code == "ok"

    def judge_size(self, t: Turn, dst: int, head: Head, numbers: dict[int, Numbers]) -> str:
        code = super().judge_size(t, dst, head, numbers)
        return "" if code == "E320" else code


# ---- arrival


class ArrivedBeforeTheStores(Notices):
    """Rows are announced while bulk stores are under way: no `wait_group 0`."""

    def wait_stores(self, t: Turn) -> None:
        pass


class ArrivedRelaxed(Notices):
    """`red.relaxed`: rows are what the kernel itself has stored."""

    def announce(self, t: Turn, p: int) -> None:
        word = self.arrived[p, t.slot, t.r]
        t.v.put(word, (t.v.peek(word) + 1, t.v.get(word)[1]))


class SpeakerAnnouncesAll(Notices):
    """The block that speaks announces the rows of all blocks when its own are stored."""

    def push(self, r: int, block: int) -> list[Step]:
        steps = without(super().push(r, block), "announces")
        if block == MOVER:
            return steps
        announce = self.announce_all
        return [
            *steps,
            *self.each_peer(r, block, "announces all rows to", announce, when=self.sends_any),
        ]


class ArrivedOfThisCall(Notices):
    """The rows of this call are waited for, where the word counts all there ever were."""

    def total(self, t: Turn, src: int, rows: int) -> int:
        return rows

    def await_rows(self, t: Turn) -> Any:
        words = {src: self.arrived[t.r, t.slot, src] for src in self.ranks}
        wanted = {src: t.v.get(self.expected[t.r, t.slot, src]) for src in self.ranks}
        if any(t.v.peek(word) < wanted[src] for src, word in words.items()):
            return BLOCKED
        for word in words.values():
            t.v.acquire(word)
        return None


class ArrivedOfFailedCalls(Notices):
    """Announced rows count as expected before the verdict is known."""

    def judge(self, t: Turn, heads: Sequence[Head], numbers: dict[int, Numbers]) -> Any:
        objection = super().judge(t, heads, numbers)
        if objection and t.block == SPEAKER:
            for src, told in numbers.items():
                total = self.total(t, src, told.sent[t.r])
                t.v.put(self.expected[t.r, t.slot, src], total)
        return objection


class NoFenceAfterHearing(Notices):
    """Bulk copies are issued with no `fence.proxy.async` behind what was heard."""

    def fence(self, t: Turn) -> None:
        pass


class ArriveBeforeTheCopies(Notices):
    """The kernel that announces copied rows does not stand behind the copies."""

    def await_copies(self, t: Turn) -> Any:
        return None


# ---- y


class NoPulledWord(Notices):
    """The owner's combine ends without waiting for its pullers."""

    def await_pulled(self, t: Turn) -> Any:
        return None


class PulledWithoutRowsUntold(Notices):
    """A source that sent an owner nothing does not tell it that it has pulled."""

    def combine(self, r: int) -> list[Step]:
        def some(t: Turn, p: int) -> bool:
            return self.num_rows(t.v, t.r, t.k, t.r, p) > 0

        told = self.each_peer(r, SPEAKER, "tells that it has pulled", self.tell_pulled, when=some)
        steps = super().combine(r)
        at = next(i for i, step in enumerate(steps) if "tells that" in step.text)
        return [*steps[:at], *told, *steps[at + self.num_ranks :]]


class PulledBeforeTheMover(Notices):
    """The block that speaks tells `pulled` when it has pulled its own rows."""

    def combine(self, r: int) -> list[Step]:
        steps = super().combine(r)
        at = next(i for i, step in enumerate(steps) if "sees the mover" in step.text)
        end = next(i for i, step in enumerate(steps) if "is pulled by all" in step.text) + 1
        return [*steps[:at], *steps[at + 1 : end], steps[at], *steps[end:]]


class LoadsNotAwaited(Notices):
    """`pulled` is told while bulk loads are under way."""

    def wait_loads(self, t: Turn) -> None:
        pass


class ToldBeforeStaged(Notices):
    """The notice gives y away before the kernel that copies it ends: no `griddepcontrol.wait`."""

    def stage(self, t: Turn) -> None:
        launched = t.v.get(self.launched[t.r, SPEAKER])
        super().stage(t)
        t.v.put(self.launched[t.r, SPEAKER], launched)


class TensorAloneHoldsY(Notices):
    """A begun combine has no hold of its own on y: the user's `del y` frees it."""

    def keep(self, v: View, r: int, k: int, extent: int, begun: bool) -> None:
        pass


# ---- extents


class ExtentNotFree(Notices):
    """The host grants an extent that a tensor still holds."""

    def grant(self, v: View, r: int, beside: bool) -> int:
        self.hold(v, r, 0)
        return 0


class OtherStreamsForgotten(Notices):
    """Memory that was used beside the caller's stream is granted to it at once."""

    def caller_empty(self, v: View, r: int, k: int) -> Any:
        self.scratch(v, r, k, v.get(self.spare[r, k])[0])


class FailedCallKeepsItsExtent(Notices):
    """The extent of a call that failed stays with nobody."""

    def give_back(self, v: View, r: int, k: int) -> None:
        if v.get(self.verdict[r, k]) == OK or self.ops[k].kind == "combine":
            super().give_back(v, r, k)


# ---- giving up


class LifeNotTold(LatePull):
    """Who gives up tells its host only."""

    order = ("host",)


class LifeToldAfterTheHost(LatePull):
    """Who gives up tells its host, then its peers: the user may be quicker."""

    order = ("host", "peer")


class LooksBeforeItsLoads(LatePull):
    """The puller looks at the lives of owners before the last of its loads."""

    looks_last = False


@dataclass(frozen=True)
class Mistake:
    """`one_run`: it shows in the single run, too, as its steps commute. `merge`: a wait that can be
    undone is no local step.
    """

    name: str
    model: type[Notices] | type[LatePull]
    prop: str
    program: Program | None = None
    one_run: bool = True
    merge: bool = True

    def machine(self, *, right: bool = False, reduced: bool = True) -> Machine:
        """The model with the mistake, or the right one on the same program."""
        kind: Any = self.model.__bases__[0] if right else self.model
        return (kind(self.program, reduced=reduced) if self.program else kind()).machine


DISPATCH = small([D0])
DISPATCH_COMBINE = small([D0, combine(0)], "call 0, use 0, call 1, reuse 1, free 0")
REFUSED_THRICE = small([refused(D0, 0)] * 3)

MISTAKES = [
    Mistake("released-not-awaited", ReleasedIgnored, OVERWRITE, REFUSED_THRICE),
    Mistake(
        "released-compared-with-==",
        ReleasedEqual,
        DEADLOCK,
        small([refused(D0, 0)]),
        merge=False,
    ),
    Mistake(
        "released-before-all-blocks-have-read", LeavesBeforeTheMover, OVERWRITE, REFUSED_THRICE
    ),
    Mistake(
        "refused-call-does-not-release", RefusedWithoutRelease, CREDIT, small([refused(D0, 0)])
    ),
    Mistake(
        "plan-leaves-the-slot",
        PlanLeavesTheSlot,
        OVERWRITE,
        small([copies(D1), refused(D0, 1), refused(D0, 1)]),
    ),
    Mistake(
        "numbers-taken-with-the-head",
        NumbersTakenWithTheHead,
        WRONG_CALL,
        small([D0, D1]),
        one_run=False,
    ),
    Mistake("packed-word-taken-with-any-number", AnyNumber, WRONG_CALL, small([D0, D1, D0])),
    Mistake("numbers-start-at-0", FirstNumberZero, UNCOVERED, DISPATCH),
    Mistake(
        "report-before-the-verdict", ReportBeforeTheVerdict, VERDICTS, small([no_extent(D0, 0)])
    ),
    Mistake(
        "first-poison-decides",
        FirstPoisonDecides,
        VERDICTS,
        small([refused(D0, 0, 2)], num_ranks=4),
        one_run=False,
    ),
    Mistake("judged-by-what-comes-here", JudgesWhatComesHere, VERDICTS, small([overflow(D0, 0)])),
    Mistake(
        "push-on-the-first-notice",
        PushesOnTheFirstNotice,
        UNORDERED,
        small([no_extent(D0, 2)], "call 0, empty 0", num_ranks=3, num_extents=1),
    ),
    Mistake(
        "handles-not-compared",
        NoRoutingInDescriptor,
        UNCOVERED,
        small([D0, D1, cached((0, 1))], num_extents=3),
    ),
    Mistake("bulk-stores-not-awaited", ArrivedBeforeTheStores, UNCOVERED, DISPATCH),
    Mistake("arrived-relaxed", ArrivedRelaxed, UNCOVERED, DISPATCH),
    Mistake("one-block-announces-all", SpeakerAnnouncesAll, UNCOVERED, DISPATCH),
    Mistake("arrived-of-this-call", ArrivedOfThisCall, UNCOVERED, small([D0, D0], num_slots=1)),
    Mistake(
        "failed-call-counts-as-arrived", ArrivedOfFailedCalls, CREDIT, small([no_extent(D0, 0)])
    ),
    Mistake("no-proxy-fence-before-pull", NoFenceAfterHearing, UNCOVERED, DISPATCH_COMBINE),
    Mistake(
        "no-proxy-fence-before-push",
        NoFenceAfterHearing,
        OVERWRITE,
        small([D0, D0], "call 0, use 0, free 0, call 1, use 1, free 1", num_extents=1),
    ),
    Mistake("arrive-before-the-copies", ArriveBeforeTheCopies, UNCOVERED, small([copies(D0)])),
    Mistake("no-pulled-word", NoPulledWord, OVERWRITE, DISPATCH_COMBINE),
    Mistake(
        "no-pulled-from-a-source-without-rows", PulledWithoutRowsUntold, DEADLOCK, DISPATCH_COMBINE
    ),
    Mistake("pulled-before-all-blocks-have", PulledBeforeTheMover, OVERWRITE, DISPATCH_COMBINE),
    Mistake("bulk-loads-not-awaited", LoadsNotAwaited, OVERWRITE, DISPATCH_COMBINE),
    Mistake("y-told-before-it-is-staged", ToldBeforeStaged, UNCOVERED, sequence("DS", num_ranks=2)),
    Mistake(
        "y-held-by-the-tensor-alone",
        TensorAloneHoldsY,
        OVERWRITE,
        small([D0, combine(0)], "call 0, use 0, begin 1, free 0, empty 1, wait 1"),
    ),
    Mistake(
        "extent-not-free",
        ExtentNotFree,
        OVERWRITE,
        small([D0, D1], "call 0, begin 1, use 0, free 0, wait 1, use 1, free 1"),
    ),
    Mistake(
        "other-streams-forgotten",
        OtherStreamsForgotten,
        UNORDERED,
        small(
            [D0, combine(0, staged=True)],
            "call 0, use 0, begin 1, empty 1, wait 1, free 0",
        ),
    ),
    Mistake(
        "failed-call-keeps-its-extent",
        FailedCallKeepsItsExtent,
        EXTENTS,
        small([overflow(D0, 0)]),
    ),
    Mistake("life-not-told", LifeNotTold, WRONG_DATA),
    Mistake("life-told-after-the-host", LifeToldAfterTheHost, WRONG_DATA),
    Mistake("looks-before-its-loads", LooksBeforeItsLoads, WRONG_DATA),
]
