"""The protocol with one rule broken at a time, and the program that shows what then goes wrong.

Each class is a mistake somebody could make in the real code. `program` is a small one, so that the
counterexample reads well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .doorbell import Doorbell
from .explorer import BLOCKED, DEADLOCK, OVERWRITE, UNCOVERED, UNORDERED, Machine, Step, View
from .giveup import GiveUp, Leaving
from .gpu import GpuProtocol
from .programs import (
    D0,
    D1,
    actions,
    blocking,
    cached,
    combine,
    no_extent,
    refused,
    static,
)
from .protocol import (
    CREDIT,
    END,
    EXTENTS,
    OK,
    SKIPPED,
    VERDICTS,
    WRONG_CALL,
    WRONG_DATA,
    Base,
    Op,
    Program,
    Protocol,
    Turn,
)
from .stream import Stream


def small(ops: Sequence[Op], acts: str = "", **options: Any) -> Program:
    default = {"name": "small", "num_ranks": 2, "num_extents": len(ops)}
    return Program(ops=ops, actions=actions(acts) if acts else blocking(ops), **(default | options))


# ---- y and its extent


class NoPulledWord(Protocol):
    """The owner's combine ends without waiting for its pullers."""

    def await_pulled(self, t: Turn) -> Any:
        self.drop_y(t)
        self.succeed(t)


class StagingFreedAfterPublishing(Protocol):
    """The receiver frees y's staging as soon as its entry is out."""

    def combine(self, r: int) -> list[Step]:
        steps = super().combine(r)
        at = next(i for i, step in enumerate(steps) if "has all entries" in step.text)
        return [*steps[:at], self.step(r, "frees y", super().drop_y, local=False), *steps[at:]]

    def drop_y(self, t: Turn) -> None:
        pass


class TensorAloneHoldsY(Protocol):
    """A combine in flight has no hold of its own on y: the user's `del y` frees it."""

    def lend_y(self, v: View, r: int, k: int, extent: int) -> None:
        if extent != END:
            self.write_y(v, r, k, extent)

    def drop_y(self, t: Turn) -> None:
        pass


class PullsWithoutRowsUntold(Protocol):
    """A source that sent an owner nothing does not publish `pulled` there."""

    def pull(self, t: Turn, p: int) -> Any:
        if self.num_rows(t.v, t.r, t.k, t.r, p):
            super().pull(t, p)


class PullsBeforeAllEntries(Protocol):
    """A source pulls from an owner as soon as that owner's entry is in: another rank may still fail
    the call.
    """

    def combine(self, r: int) -> list[Step]:
        steps = super().combine(r)
        early = self.each_peer(r, "pulls early from", self.pull_early)
        at = next(i for i, step in enumerate(steps) if "has all entries" in step.text)
        return [*steps[:at], *early, *steps[at:]]

    def pull_early(self, t: Turn, p: int) -> Any:
        if t.v.peek(self.entry_seq[t.r, t.slot, p]) != t.seq:
            return BLOCKED
        if self.read_entry(t, p).code == "ok":
            self.pull_rows(t, p)
        return None


# ---- extents of outputs


class ExtentNotFree(Protocol):
    """The base is published while the user still holds what lies in the extent."""

    def grant(self, v: View, r: int) -> int:
        self.hold(v, r, 0)
        return 0


class FailedCallKeepsExtent(Protocol):
    """A call that fails after its grant does not give it back."""

    def give_back(self, t: Turn) -> None:
        t.v.put(self.output[t.r, t.k], END)


# ---- slots


class ReleasedIgnored(Protocol):
    """Entries are written without a look at `released`."""

    def slot_is_free(self, released: int, seq: int) -> bool:
        return True


class ReleasedEarly(Protocol):
    """The slot is released when the entries are out, before those of the peers are read."""

    def dispatch(self, r: int) -> list[Step]:
        steps = super().dispatch(r)
        at = next(i for i, step in enumerate(steps) if "has all entries" in step.text)
        return [*steps[:at], *self.each_peer(r, "releases the slot to", self.release), *steps[at:]]


class ReleasedEqual(Protocol):
    """`released == seq - num_slots`: a peer that refused this very call has already released it."""

    def slot_is_free(self, released: int, seq: int) -> bool:
        return released == max(0, seq - self.num_slots)


class ReleasedUnsigned(Protocol):
    """`released >= seq - num_slots` in unsigned arithmetic: no first operation."""

    def slot_is_free(self, released: int, seq: int) -> bool:
        return released >= (seq - self.num_slots) % 2**64


class RefusedWithoutRelease(Protocol):
    """A refused call returns at once, and forgets the slot."""

    def return_refused(self, t: Turn) -> Any:
        super().return_refused(t)
        return self.end(t)


class FirstSeqZero(Protocol):
    """The first operation has number 0, which zeroed memory already shows."""

    first_seq = 0


class EntryAnySeq(Protocol):
    """An entry counts as here when its word is not zero."""

    def entry_is_here(self, seq: int, wanted: int) -> bool:
        return seq != 0


# ---- arrival


class ArrivedBeforeStores(Protocol):
    """Rows are added to `arrived` before their stores."""

    def store_row(self, t: Turn, p: int, place: tuple[int, int, int], tag: tuple[Any, ...]) -> None:
        t.v.add(self.arrived[p, t.slot, t.r], 1)
        t.v.write(self.rows[place], tag)


class ArrivedOfFailedCalls(Protocol):
    """Announced rows count as expected before the verdict is known."""

    def place(self, t: Turn) -> Any:
        for src in self.ranks:
            t.v.put(self.expected[t.r, t.slot, src], self.total(t, src))
        super().place(t)

    def await_rows(self, t: Turn) -> Any:
        words = {src: self.arrived[t.r, t.slot, src] for src in self.ranks}
        if any(t.v.peek(w) < t.v.get(self.expected[t.r, t.slot, s]) for s, w in words.items()):
            return BLOCKED
        for word in words.values():
            t.v.acquire(word)
        return self.succeed(t)


# ---- verdicts


class NoBasePoison(Protocol):
    """A rank without an extent returns and publishes nothing."""

    def place(self, t: Turn) -> Any:
        super().place(t)
        code = t.v.get(self.placed[t.r])
        return None if code == "ok" else self.fail(t, code, t.r, returned=True)


class OwnBaseOnly(Protocol):
    """The verdict looks at this rank's own base."""

    def judge_bases(self, t: Turn, bases: Sequence[Base]) -> Any:
        failed = super().judge_bases(t, [bases[t.r]])
        t.v.put(self.first_row[t.r, t.k], tuple((base.extent, base.row) for base in bases))
        return failed

    def push_row(self, t: Turn, p: int, i: int) -> Any:
        if t.v.get(self.first_row[t.r, t.k])[p][0] != END:
            super().push_row(t, p, i)


class PushesOnFirstBase(Protocol):
    """A source pushes to a receiver as soon as that one's base is in: another one may still fail
    the call.
    """

    def dispatch(self, r: int) -> list[Step]:
        steps = super().dispatch(r)
        early = [
            *self.each_peer(r, "pushes row 0 early to", self.push_early, 0, when=self.has_row),
            *self.each_peer(r, "pushes row 1 early to", self.push_early, 1, when=self.has_row),
        ]
        at = next(i for i, step in enumerate(steps) if "has all bases" in step.text)
        rest = [step for step in steps[at:] if "pushes" not in step.text]
        return [*steps[:at], *early, *rest]

    def push_early(self, t: Turn, p: int, i: int) -> Any:
        if t.v.peek(self.base_seq[t.r, t.slot, p]) != t.seq:
            return BLOCKED
        base = self.read_base(t, p)
        if base.code == "ok":
            self.store_row(t, p, (p, base.extent, base.row + i), ("x", t.k, t.r, i))
        return None


class FirstPoisonDecides(Protocol):
    """A rank fails with the first poisoned entry it sees instead of reading all."""

    def await_entries(self, t: Turn) -> Any:
        for p in self.ranks:
            here = t.v.peek(self.entry_seq[t.r, t.slot, p]) == t.seq
            if here and (code := self.read_entry(t, p).code) != "ok":
                return self.fail(t, code, p)
        return super().await_entries(t)


class NoRoutingInDescriptor(Protocol):
    """Handles of different dispatches look alike."""

    def descriptor(self, t: Turn) -> tuple[Any, ...]:
        return (t.op.kind,)


# ---- order of operations


class RunsInOrderOfWaiting(Protocol):
    """A begun operation runs when the user waits for it."""

    def user_steps(self, r: int) -> list[Step]:
        acts = self.program.users.get(r, self.program.actions)
        begun = [k for verb, k in acts if verb in ("call", "begin")]
        steps = []
        for verb, k in acts:
            if verb in ("call", "wait"):
                job = (k, 1 + begun.index(k))
                steps.append(Step(f"runs call {k}", lambda v, job=job: self.enqueue(v, r, job)))
                steps.append(self.user_step(r, "wait", k, alone=True))
        return [*steps, Step("ends", lambda v: self.enqueue(v, r, END), local=True)]


class RefusalTakesNoNumber(Protocol):
    """A call that its rank refuses raises before it takes a sequence number."""

    def user_begin(self, v: View, r: int, k: int) -> Any:
        if self.ops[k].fails.get(r) != "invalid":
            return super().user_begin(v, r, k)
        v.put(self.verdict[r, k], ("E213", r, True))
        return v.release(self.done[r, k], 1)


class RefusalOvertakes(Protocol):
    """A refused call is told to the peers by the user's thread, ahead of operations begun before
    it.
    """

    def user_begin(self, v: View, r: int, k: int) -> Any:
        super().user_begin(v, r, k)
        if self.ops[k].fails.get(r) == "invalid":
            queue, taken = v.peek(self.queue[r]), v.get(self.taken[r])
            v.release(self.queue[r], (*queue[:taken], queue[-1], *queue[taken:-1]))


class NextCallRaises(Protocol):
    """After a static call failed, the next call raises at its start if the failure is already known
    here.
    """

    def user_step(self, r: int, verb: str, k: int, alone: bool) -> Step:
        step = super().user_step(r, verb, k, alone)
        return replace(step, local=False) if verb == "begin" else step

    def user_begin(self, v: View, r: int, k: int) -> Any:
        for earlier in range(k):
            known = self.ops[earlier].static and v.peek(self.done[r, earlier])
            failed = known and v.get(self.verdict[r, earlier]) not in (OK, SKIPPED)
            raised = any(v.get(self.verdict[r, j]) == SKIPPED for j in range(earlier, k))
            if failed and not raised:
                v.put(self.verdict[r, k], SKIPPED)
                return None
        return super().user_begin(v, r, k)


# ---- bulk copies


class StoresNotAwaited(GpuProtocol):
    """`red.release` without `wait_group 0` before it; on a CPU, a release without `sfence` after
    streaming stores.
    """

    def wait_stores(self, t: Turn) -> None:
        pass


class NoFenceBeforePull(GpuProtocol):
    """The puller acquires the entry and bulk-loads rows another proxy wrote."""

    def fence_before_pull(self, t: Turn) -> None:
        pass


class NoFenceBeforePush(GpuProtocol):
    """The source acquires the base and bulk-stores over what the last user of the extent read or
    wrote.
    """

    def fence_before_push(self, t: Turn) -> None:
        pass


class LoadsNotAwaited(GpuProtocol):
    """`pulled` is published while bulk loads are in flight."""

    def wait_loads(self, t: Turn) -> None:
        pass


# ---- giving up


class LatePullerBelieves(GiveUp):
    """A puller does not look whether an owner gave up meanwhile."""

    def look(self, t: Turn) -> Any:
        return None


class LeftIsLeft(Leaving):
    """A waiter that finds a peer gone blames it without asking again for what it waits for."""

    asks_again = False


# ---- the doorbell


class BellReadAfterLook(Doorbell):
    """The waiter reads the bell after it looked for the word."""

    waiter_order = ("look", "read", "name", "sleep")


class BellBeforeStore(Doorbell):
    """The writer bumps the bell before it stores the word."""

    writer_order = ("bump", "store", "wake")


class AwaitedBeforeBell(Doorbell):
    """The writer looks who is awaited before it bumps the bell; so does one whose two accesses are
    not seq_cst.
    """

    writer_order = ("store", "wake", "bump")

    def writer_steps(self, i: int) -> list[Step]:
        store, look, wake, bump, end = super().writer_steps(i)
        return [store, look, wake, bump, end]


class NamesTheWrongPeer(Doorbell):
    """The waiter says it waits for the first peer, whomever it waits for."""

    def name(self, v: View, awaited: int) -> None:
        super().name(v, min(awaited, 1))


class NamesAfterSleep(Doorbell):
    """The waiter says for whom it waits once it is asleep: a writer sees nobody to wake."""

    waiter_order = ("read", "look", "sleep", "name")


# ---- the stream


class RoomOnTrust(Stream):
    """The owner does not look whether a source has taken what lies in its ring."""

    def room(self, v: View, r: int, src: int, op: int) -> int:
        return self.ring_rows


class ToldBeforeRead(Stream):
    """The source tells of room before it has read the rows."""

    def take(self, v: View, r: int, owner: int, op: int) -> None:
        rows = self.tokens[v.get(self.token[r])]
        first = v.get(self.next[owner, r])
        v.put(self.next[owner, r], first + rows)
        self.tell(v, r, owner, op)
        v.put(self.next[owner, r], first)
        super().take(v, r, owner, op)


class StagedBeforeCopied(Stream):
    """The owner publishes a row before it has copied it."""

    def copy(self, v: View, r: int, src: int, op: int) -> None:
        if v.get(self.sent[r, src]) > 0:
            super().copy(v, r, src, op)

    def publish_staged(self, v: View, r: int, src: int, op: int) -> None:
        first = v.get(self.sent[r, src]) == 0
        super().publish_staged(v, r, src, op)
        if first:
            v.write(self.rows[r, src, 0], ("row", op, 0))


class RingTooSmall(Stream):
    """A ring holds less than twice the rows a token has at its owner: one that waits for the last
    of them may leave less room than the owner finds worth using.
    """

    def __init__(self) -> None:
        super().__init__(tokens=(1, 3, 1), ring_rows=3, part=2, num_ops=1)


class RoomKeptBack(Stream):
    """A source tells of room in large parts, also when it waits for the owner that lacks it."""

    def __init__(self) -> None:
        super().__init__(tokens=(1, 2, 2, 1), ring_rows=4, part=3, num_ops=1)

    def tell(self, v: View, r: int, owner: int, op: int) -> None:
        if v.get(self.next[owner, r]) - v.get(self.told[owner, r]) >= self.part:
            super().tell(v, r, owner, op)


class LastRowsUntold(Stream):
    """The last rows of an operation are never told: the next one counts from somewhere else."""

    def __init__(self) -> None:
        super().__init__(tokens=(2, 1), ring_rows=2, part=2)

    def tell_last(self, v: View, r: int, op: int) -> None:
        pass


@dataclass(frozen=True)
class Mistake:
    name: str
    protocol: type[Protocol] | type[Doorbell] | type[Leaving] | type[Stream]
    prop: str  # the property that is violated
    program: Program | None = None
    merge: bool = False  # a wait that can be undone is no local step

    def machine(self, right: bool = False) -> Machine:
        """The model with the mistake, or the right one on the same program."""
        kind: Any = self.protocol.__bases__[0] if right else self.protocol
        return (kind(self.program) if self.program else kind()).machine


DISPATCH_COMBINE = small([D0, combine(0)], "call 0, use 0, call 1, reuse 1, free 0")
REFUSED_THRICE = small([refused(D0, 0)] * 3)

MISTAKES = [
    Mistake("no-pulled-word", NoPulledWord, OVERWRITE, DISPATCH_COMBINE),
    Mistake(
        "y-staging-freed-after-publishing",
        StagingFreedAfterPublishing,
        OVERWRITE,
        small([D0, combine(0, staged=True)], "call 0, use 0, free 0, begin 1, empty 1, wait 1"),
    ),
    Mistake(
        "y-held-by-the-tensor-alone",
        TensorAloneHoldsY,
        OVERWRITE,
        small([D0, combine(0)], "call 0, use 0, begin 1, free 0, empty 1, wait 1"),
    ),
    Mistake(
        "no-pulled-from-a-source-without-rows", PullsWithoutRowsUntold, DEADLOCK, DISPATCH_COMBINE
    ),
    Mistake(
        "pull-before-all-entries",
        PullsBeforeAllEntries,
        OVERWRITE,
        small([D0, refused(combine(0), 2)], "call 0, use 0, call 1, reuse 1, free 0", num_ranks=3),
        merge=True,
    ),
    Mistake(
        "base-published-before-the-extent-is-free",
        ExtentNotFree,
        OVERWRITE,
        small([D0, D1], "call 0, begin 1, use 0, free 0, wait 1, use 1, free 1"),
    ),
    Mistake(
        "failed-call-keeps-its-extent", FailedCallKeepsExtent, EXTENTS, small([no_extent(D0, 0)])
    ),
    Mistake("released-not-awaited", ReleasedIgnored, OVERWRITE, REFUSED_THRICE),
    Mistake("released-before-the-last-read", ReleasedEarly, OVERWRITE, REFUSED_THRICE),
    Mistake("released-compared-with-==", ReleasedEqual, DEADLOCK, small([refused(D0, 0)])),
    Mistake("released-compared-unsigned", ReleasedUnsigned, DEADLOCK, small([D0])),
    Mistake(
        "refused-call-does-not-release", RefusedWithoutRelease, CREDIT, small([refused(D0, 0)])
    ),
    Mistake("sequence-starts-at-0", FirstSeqZero, UNCOVERED, small([D0])),
    Mistake("entry-taken-with-any-seq", EntryAnySeq, WRONG_CALL, small([D0, D1, D0])),
    Mistake("arrived-before-the-stores", ArrivedBeforeStores, UNCOVERED, small([D0])),
    Mistake(
        "failed-call-counts-as-arrived", ArrivedOfFailedCalls, CREDIT, small([no_extent(D0, 0)])
    ),
    Mistake("no-base-poison", NoBasePoison, DEADLOCK, small([no_extent(D0, 0)])),
    Mistake("verdict-by-own-base", OwnBaseOnly, VERDICTS, small([no_extent(D1, 0)])),
    Mistake(
        "push-on-the-first-base",
        PushesOnFirstBase,
        UNORDERED,
        small([no_extent(D0, 2)], "call 0, empty 0", num_ranks=3, num_extents=1),
    ),
    Mistake(
        "first-poison-decides",
        FirstPoisonDecides,
        VERDICTS,
        small([refused(D0, 0, 2)], num_ranks=4),
        merge=True,
    ),
    Mistake(
        "no-routing-in-the-descriptor",
        NoRoutingInDescriptor,
        DEADLOCK,
        small([D0, D1, cached((0, 1))], num_extents=3),
    ),
    Mistake(
        "runs-in-order-of-waiting",
        RunsInOrderOfWaiting,
        DEADLOCK,
        small(
            [D0, D1],
            "begin 0, begin 1, wait 0, wait 1, free 0, free 1",
            users={1: actions("begin 0, begin 1, wait 1, wait 0, free 1, free 0")},
        ),
    ),
    Mistake(
        "refused-call-takes-no-number",
        RefusalTakesNoNumber,
        WRONG_CALL,
        small([refused(D0, 0), D0]),
    ),
    Mistake(
        "refusal-overtakes-begun-operations",
        RefusalOvertakes,
        DEADLOCK,
        small([D0, refused(D0, 0)], "begin 0, begin 1, wait 0, wait 1, free 0", num_slots=1),
    ),
    Mistake(
        "next-call-raises-what-a-static-one-found",
        NextCallRaises,
        WRONG_CALL,
        small(
            [static(no_extent(D0, 0)), static(D0), static(D0)],
            "begin 0, begin 1, begin 2, wait 0, wait 1, wait 2, free 1, free 2",
        ),
        merge=True,
    ),
    Mistake("bulk-stores-not-awaited", StoresNotAwaited, UNCOVERED, small([D0])),
    Mistake("no-proxy-fence-before-pull", NoFenceBeforePull, UNCOVERED, DISPATCH_COMBINE),
    Mistake(
        "no-proxy-fence-before-push",
        NoFenceBeforePush,
        OVERWRITE,
        small([D0, D0], "call 0, use 0, free 0, call 1, use 1, free 1", num_extents=1),
    ),
    Mistake("bulk-loads-not-awaited", LoadsNotAwaited, OVERWRITE, DISPATCH_COMBINE),
    Mistake("late-puller-believes", LatePullerBelieves, WRONG_DATA, DISPATCH_COMBINE),
    Mistake("left-is-left", LeftIsLeft, VERDICTS),
    Mistake("bell-read-after-the-look", BellReadAfterLook, DEADLOCK),
    Mistake("bell-before-the-store", BellBeforeStore, DEADLOCK),
    Mistake("awaited-read-before-the-bell", AwaitedBeforeBell, DEADLOCK),
    Mistake("names-the-wrong-peer", NamesTheWrongPeer, DEADLOCK),
    Mistake("named-after-sleeping", NamesAfterSleep, DEADLOCK),
    Mistake("room-on-trust", RoomOnTrust, OVERWRITE),
    Mistake("told-before-read", ToldBeforeRead, OVERWRITE),
    Mistake("staged-before-copied", StagedBeforeCopied, UNCOVERED),
    Mistake("ring-too-small", RingTooSmall, DEADLOCK),
    Mistake("room-kept-back", RoomKeptBack, DEADLOCK),
    Mistake("last-rows-untold", LastRowsUntold, DEADLOCK),
]
