"""The protocol as GPUs run it (docs/protocol.md, "On a GPU"): one exchange of notices, then rows.

Ranks tell each other in packed words, which have no order among themselves, and give slots and y
back with relaxed stores. What that leaves is what this model looks at. A rank is several threads:
its host and the stream of its caller (notice_host.py); the kernels of its operations as two
blocks, *speaker* and *mover*, each with an agent for its bulk copies; and *copier*, the copy
engine. Kernels of a buffer run one after the other.

What is abstracted, beside what protocol.py says of rows, extents and sequence numbers:

* Two blocks stand for all: one that speaks, one that does not. The mover brings every second row.
* A notice is two packed words, a head and the numbers of rows. They are R + E words, of use only
  together.
* Sums, duplicates, padding, what is counted: one rank on its own memory, between its kernels.
* A host's extents are granted and freed by one thread, so who gets one is decided by the program.
  That a call lacks one on some rank is a failure of its own ("no extent").
* A host forgets what it lent to a begun combine when it waits for it.
* Waits end. The race that ended waits leave is `LatePull` in giveup.py.

**One run for all interleavings**, as in rail.py and for its reasons: steps only wait for a number
to be reached, store the next one, add to a word whose only reader waits for the sum, and access
cells. All such steps commute but for one: a packed word is read while a newer number stands there,
or is about to, and both orders of that are violations, found by the clocks. `reduced=False` makes
every store that another rank may see a step by itself, with words as they are; the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .explorer import BLOCKED, UNCOVERED, Place, Step, View, Violation
from .notice_host import MOVER, SPEAKER, HostSide
from .protocol import (
    CREDIT,
    END,
    EXTENT_ROWS,
    OK,
    SKIPPED,
    VERDICTS,
    WRONG_CALL,
    WRONG_DATA,
    Op,
    describe,
)


class Head(NamedTuple):
    op: int  # ghost: which call of the program this is
    src: int
    code: str
    descriptor: tuple[Any, ...]
    extent: int  # dispatch: granted here; combine: where y lies


class Numbers(NamedTuple):
    op: int
    src: int
    sent: tuple[int, ...]  # rows for every rank
    expected: tuple[int, ...]  # of a cached call: rows its handle expects from every rank


class Turn:
    """One step of a block of rank r: the state, and the operation its kernel belongs to."""

    __slots__ = ("block", "extent", "k", "op", "r", "seq", "slot", "v")

    def __init__(self, model: Notices, v: View, r: int, block: int):
        self.v, self.r, self.block = v, r, block
        self.k, self.seq, self.extent = v.get(model.job[r, block])
        self.op = model.ops[self.k]
        self.slot = self.seq % model.num_slots


class Notices(HostSide):
    """The kernels. Subclasses break single methods."""

    # ---- steps of kernels

    def step(
        self,
        r: int,
        block: int,
        text: str,
        act: Callable[..., Any],
        *args: Any,
        local: bool = True,
        label: str = "",
        when: Callable[..., bool] | None = None,
    ) -> Step:
        skip = None if when is None else lambda v: when(Turn(self, v, r, block), *args)
        local = local or self.reduced
        return Step(text, lambda v: act(Turn(self, v, r, block), *args), local, label, skip)

    def each_peer(
        self, r: int, block: int, text: str, act: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Step]:
        """One step per peer, the rank itself last: local, since only it reads those words."""
        peers = [(r + i) % self.num_ranks for i in range(1, self.num_ranks + 1)]
        local = options.pop("local", False)
        return [
            self.step(r, block, f"{text} rank {p}", act, p, *args, local=local or p == r, **options)
            for p in peers
        ]

    def next_job(self, r: int, block: int) -> Step:
        def act(v: View) -> Any:
            taken = v.get(self.taken[r, block])
            if not self.may_launch(v, r, taken):
                return BLOCKED
            queued = self.acquire(v, self.jobs[r], taken + 1)
            v.put(self.taken[r, block], taken + 1)
            if queued.content == END:
                return "stop"
            self.follow(v, r, taken)
            self.launch(v, r, block)
            v.put(self.job[r, block], queued.content)
            return self.kernel_of(r, queued.content[0])

        return Step("begins the next operation", act, local=True, label="next")

    def launch(self, v: View, r: int, block: int) -> None:
        """What has been done by now is visible with whatever the kernel stores."""
        v.put(self.launched[r, block], v.clock(v.thread))
        v.tick(v.thread)

    def may_launch(self, v: View, r: int, taken: int) -> bool:
        """Queued, allowed by the caller's stream, and behind all blocks of the one before."""
        if self.last(v, self.jobs[r]) <= taken:
            return False
        if v.get(self.jobs[r])[0][taken + 1].content == END:
            return True
        through = all(self.last(v, self.ended[r, b]) >= taken for b in (SPEAKER, MOVER))
        return through and self.last(v, self.reached[r]) > taken

    def follow(self, v: View, r: int, taken: int) -> None:
        self.acquire(v, self.reached[r], taken + 1)
        for b in (SPEAKER, MOVER):
            self.acquire(v, self.ended[r, b], taken)

    def kernel_of(self, r: int, k: int) -> str:
        op = self.ops[k]
        if op.fails.get(r) == "invalid":
            return "refuse"
        return "combine" if op.kind == "combine" else "copies" if op.copies else "dispatch"

    def end(self, t: Turn) -> str:
        t.v.put(self.job[t.r, t.block], (0, 0, END))
        word = self.ended[t.r, t.block]
        self.store(t.v, word, self.last(t.v, word) + 1)
        return "next"

    # ---- the block that speaks

    def speaker_steps(self, r: int) -> list[Step]:
        return [
            self.next_job(r, SPEAKER),
            *self.refuse(r),
            *self.dispatch(r),
            *self.by_copies(r),
            *self.combine(r),
            self.step(r, SPEAKER, "sees the mover through", self.await_mover, label="fail"),
            *self.each_peer(r, SPEAKER, "releases the slot to", self.release),
            self.step(r, SPEAKER, "reports the failure", self.report),
            self.step(r, SPEAKER, "ends", self.end),
            Step("stops", lambda v: None, local=True, label="stop"),
        ]

    def refuse(self, r: int) -> list[Step]:
        return [
            self.step(r, SPEAKER, "finds its slot released", self.await_released, label="refuse"),
            *self.each_peer(r, SPEAKER, "publishes its refusal to", self.publish_head),
            self.step(r, SPEAKER, "has refused", self.refused),
            *self.leave(r),
        ]

    def begin_dispatch(self, r: int, label: str) -> list[Step]:
        return [
            self.step(r, SPEAKER, "finds its slot released", self.await_released, label=label),
            *self.each_peer(r, SPEAKER, "publishes its head to", self.publish_head),
            *self.each_peer(r, SPEAKER, "publishes its numbers to", self.publish_numbers),
            self.step(r, SPEAKER, "has heard everybody", self.decide),
            self.step(r, SPEAKER, "reports", self.report),
        ]

    def dispatch(self, r: int) -> list[Step]:
        return [
            *self.begin_dispatch(r, "dispatch"),
            *self.push(r, SPEAKER),
            self.step(r, SPEAKER, "has all rows", self.await_rows),
            self.step(r, SPEAKER, "sees the mover through", self.await_mover),
            *self.leave(r),
        ]

    def by_copies(self, r: int) -> list[Step]:
        """One kernel decides; behind the copies, another one announces all rows."""
        return [
            *self.begin_dispatch(r, "copies"),
            self.step(r, SPEAKER, "sees the mover through", self.await_mover),
            self.step(r, SPEAKER, "sees the copies end", self.await_copies),
            *self.each_peer(
                r, SPEAKER, "announces all rows to", self.announce_all, when=self.sends_any
            ),
            self.step(r, SPEAKER, "has all rows", self.await_rows),
            *self.leave(r),
        ]

    def combine(self, r: int) -> list[Step]:
        return [
            self.step(r, SPEAKER, "finds its slot released", self.await_released, label="combine"),
            self.step(r, SPEAKER, "follows the copy of y", self.stage),
            *self.each_peer(r, SPEAKER, "publishes its head to", self.publish_head),
            self.step(r, SPEAKER, "has heard everybody", self.decide),
            self.step(r, SPEAKER, "pulls its rows", self.pull),
            self.step(r, SPEAKER, "sees the mover through", self.await_mover),
            *self.each_peer(r, SPEAKER, "tells that it has pulled", self.tell_pulled),
            self.step(r, SPEAKER, "is pulled by all", self.await_pulled),
            *self.leave(r),
        ]

    def leave(self, r: int) -> list[Step]:
        return [
            *self.each_peer(r, SPEAKER, "releases the slot to", self.release),
            self.step(r, SPEAKER, "ends", self.end),
        ]

    # ---- the other block

    def mover_steps(self, r: int) -> list[Step]:
        return [
            self.next_job(r, MOVER),
            self.step(r, MOVER, "has nothing to do", self.end, label="refuse"),
            self.step(r, MOVER, "has heard everybody", self.follow_verdict, label="dispatch"),
            *self.push(r, MOVER),
            self.step(r, MOVER, "goes to its end", lambda t: "count"),
            self.step(r, MOVER, "has heard everybody", self.follow_verdict, label="copies"),
            self.step(r, MOVER, "is through with the notices", self.count),
            self.step(r, MOVER, "hears everybody again", self.hear_again),
            *self.each_peer(r, MOVER, "packs rows for", self.pack_rows, local=True),
            self.step(r, MOVER, "has packed", self.tell_packed),
            self.step(r, MOVER, "ends", self.end),
            self.step(r, MOVER, "has heard everybody", self.follow_verdict, label="combine"),
            self.step(r, MOVER, "pulls its rows", self.pull),
            self.step(r, MOVER, "is through with the notices", self.count, label="count"),
            self.step(r, MOVER, "ends", self.end),
            Step("stops", lambda v: None, local=True, label="stop"),
        ]

    # ---- 0. the slot is ours again

    def await_released(self, t: Turn) -> Any:
        words = [self.released[t.r, t.slot, p] for p in self.ranks]
        if not all(self.slot_is_free(self.last(t.v, word), t.seq) for word in words):
            return BLOCKED
        for word in words:
            self.acquire(t.v, word, max(t.seq - self.num_slots, 0))
        return None

    def slot_is_free(self, released: int, seq: int) -> bool:
        return released + self.num_slots >= seq

    # ---- 1. tell every rank

    def publish_head(self, t: Turn, p: int) -> None:
        head = Head(t.k, t.r, self.refusal(t), (t.op.kind, t.op.handle_of(t.r)), t.extent)
        self.store(t.v, self.head[p, t.slot, t.r], t.seq, head, relaxed=True)

    def publish_numbers(self, t: Turn, p: int) -> None:
        sent = tuple(self.num_rows(t.v, t.r, t.k, t.r, dst) for dst in self.ranks)
        expected = tuple(self.num_rows(t.v, t.r, t.k, src, t.r) for src in self.ranks)
        if t.op.fails.get(t.r) == "tampered":
            expected = (expected[0] + 1, *expected[1:])
        numbers = Numbers(t.k, t.r, sent, expected)
        self.store(t.v, self.numbers[p, t.slot, t.r], t.seq, numbers, relaxed=True)

    def refusal(self, t: Turn) -> str:
        """Ids are found to be bad by the kernel, a tensor by the host; so is a lack of memory for a
        size that is known.
        """
        if t.op.fails.get(t.r) in ("invalid", "bad ids"):
            return "E213"
        known = t.op.kind == "cached" or t.op.staged
        return "E231" if known and t.extent == END else "ok"

    def refused(self, t: Turn) -> None:
        self.record(t, (self.refusal(t), t.r, True))

    # ---- 2. the verdict: every block of every rank, from the same words by the same function

    def hear(self, t: Turn) -> Any:
        """(heads, numbers by rank), or BLOCKED. Numbers only of heads that are fine."""
        words = [self.head[t.r, t.slot, p] for p in self.ranks]
        if not all(self.is_here(self.last(t.v, word), t.seq) for word in words):
            return BLOCKED
        fine = [p for p in self.ranks if self.is_fine(t, self.peek(t, words[p]))]
        others = {p: self.numbers[t.r, t.slot, p] for p in fine if t.op.kind != "combine"}
        if not self.numbers_here(t, list(others.values())):
            return BLOCKED
        heads = [self.listen(t, word) for word in words]
        numbers = {p: self.listen(t, word) for p, word in others.items()}
        self.fence(t)
        return heads, numbers

    def numbers_here(self, t: Turn, words: Sequence[Place]) -> bool:
        return all(self.is_here(self.last(t.v, word), t.seq) for word in words)

    def is_here(self, number: int, seq: int) -> bool:
        return number >= seq

    def peek(self, t: Turn, word: Place) -> Head:
        """Before it is read for good."""
        head = next(s for s in t.v.get(word)[0] if self.is_here(s.number, t.seq)).content
        if head is None:
            raise Violation(UNCOVERED, f"{t.v.says(t.v.thread, 'reads', word)}, which nobody told")
        assert isinstance(head, Head)
        return head

    def is_fine(self, t: Turn, head: Head) -> bool:
        return head.code == "ok" and head.descriptor == (t.op.kind, t.op.handle_of(t.r))

    def listen(self, t: Turn, word: Place) -> Any:
        return self.same_call(t, word, self.read(t.v, word, t.seq))

    def same_call(self, t: Turn, word: Place, content: Any) -> Any:
        if content.op != t.k:
            raise Violation(
                WRONG_CALL,
                f"rank {t.r} in call {t.k} takes {describe(word.name)}, which is of call "
                f"{content.op}",
            )
        return content

    def fence(self, t: Turn) -> None:
        """fence.proxy.async: what was heard comes before bulk copies issued from now on."""
        self.pass_on(t.v, self.blocks[t.r, t.block].number, self.bulk[t.r, t.block])

    def judge(self, t: Turn, heads: Sequence[Head], numbers: dict[int, Numbers]) -> Any:
        """(code, culprit), or None. An objection to a head counts before one to numbers."""
        for head in heads:
            if head.code != "ok":
                return head.code, head.src
        for head in heads:
            if not self.is_fine(t, head):
                return "E220", head.src
        if t.op.kind == "combine":
            return None
        for dst in self.ranks:
            if code := self.judge_size(t, dst, heads[dst], numbers):
                return code, dst
        return None

    def judge_size(self, t: Turn, dst: int, head: Head, numbers: dict[int, Numbers]) -> str:
        """Of what comes to `dst`."""
        coming = tuple(numbers[src].sent[dst] for src in self.ranks)
        if t.op.kind == "cached" and coming != numbers[dst].expected:
            return "E320"
        if sum(coming) > self.capacity(t.op, dst, sum(coming)):
            return "E230"
        return "E231" if head.extent == END else ""

    def capacity(self, op: Op, dst: int, needed: int) -> int:
        return needed - 1 if op.fails.get(dst) == "overflow" else EXTENT_ROWS

    def place(self, t: Turn, heads: Sequence[Head], numbers: dict[int, Numbers]) -> None:
        """Every rank owns placement: our first row at each, behind those of lower ranks."""
        before = range(t.r) if numbers else ()
        rows = [sum(numbers[src].sent[dst] for src in before) for dst in self.ranks]
        places = tuple((head.extent, row) for head, row in zip(heads, rows, strict=True))
        t.v.put(self.places[t.r, t.block], places)

    def hear_and_judge(self, t: Turn) -> Any:
        heard = self.hear(t)
        if heard is BLOCKED:
            return BLOCKED
        verdict = self.judge(t, *heard)
        if verdict is None:
            self.place(t, *heard)
        return verdict

    def decide(self, t: Turn) -> Any:
        heard = self.hear(t)
        if heard is BLOCKED:
            return BLOCKED
        heads, numbers = heard
        if verdict := self.judge(t, heads, numbers):
            t.v.note(f"the call fails, {verdict[0]} of rank {verdict[1]}")
            self.record(t, (*verdict, False))
            return "fail"
        self.place(t, heads, numbers)
        if t.op.kind != "combine":
            t.v.put(self.first_row[t.r, t.k], t.v.get(self.places[t.r, SPEAKER]))
            for src in self.ranks:
                total = self.total(t, src, numbers[src].sent[t.r])
                t.v.put(self.expected[t.r, t.slot, src], total)
        self.record(t, OK)
        return None

    def total(self, t: Turn, src: int, rows: int) -> int:
        """Rows this source ever announced in this slot. A failed call moves none, adds none."""
        return int(t.v.get(self.expected[t.r, t.slot, src])) + rows

    def follow_verdict(self, t: Turn) -> Any:
        """As the mover sees it: nobody tells it."""
        verdict = self.hear_and_judge(t)
        return "count" if isinstance(verdict, tuple) else verdict

    def hear_again(self, t: Turn) -> Any:
        verdict = self.hear_and_judge(t)
        if isinstance(verdict, tuple):
            raise Violation(VERDICTS, f"rank {t.r}: call {t.k} is good, then {verdict}")
        return verdict

    def record(self, t: Turn, verdict: tuple[Any, ...]) -> None:
        """All succeed or all fail, alike; of calls that differ each rank may name another one. A
        host has not been told anything else.
        """
        t.v.put(self.verdict[t.r, t.k], verdict)
        told = self.told(t.v, t.r, t.k)
        if told is not None and told != verdict:
            text = f"rank {t.r} tells its host {told[:2]} of call {t.k}, which is {verdict[:2]}"
            raise Violation(VERDICTS, text)
        for q in self.ranks:
            theirs = t.v.get(self.verdict[q, t.k])
            if q == t.r or theirs is None or theirs == SKIPPED:
                continue
            early = theirs[-1] is True or verdict[-1] is True
            if early or theirs[0] == "E220":
                same = (theirs == OK) == (verdict == OK)
            else:
                same = theirs == verdict
            if not same:
                raise Violation(
                    VERDICTS, f"call {t.k}: rank {t.r} {verdict[:2]}, rank {q} {theirs[:2]}"
                )

    def report(self, t: Turn) -> None:
        """To the host of a call that waits for it; before rows move."""
        if t.op.kind != "combine" and not t.op.static:
            self.store(t.v, self.reports[t.r], t.seq, t.v.get(self.verdict[t.r, t.k]))

    # ---- 3, 4. rows go to their final place; each block announces its own

    def push(self, r: int, block: int) -> list[Step]:
        return [
            *self.each_peer(
                r, block, "pushes a row to", self.push_row, when=self.sends, local=True
            ),
            *self.each_peer(r, block, "announces it to", self.announce, when=self.sends),
        ]

    def sends(self, t: Turn, p: int) -> bool:
        """The speaker brings the first row, the mover the second."""
        return t.block < self.num_rows(t.v, t.r, t.k, t.r, p)

    def sends_any(self, t: Turn, p: int) -> bool:
        return self.num_rows(t.v, t.r, t.k, t.r, p) > 0

    def push_row(self, t: Turn, p: int) -> None:
        extent, row = t.v.get(self.places[t.r, t.block])[p]
        place = self.rows[p, extent, row + t.block]
        t.v.write(place, ("x", t.k, t.r, t.block), by=self.bulk[t.r, t.block])
        self.wait_stores(t)

    def wait_stores(self, t: Turn) -> None:
        """cp.async.bulk.wait_group 0, then a barrier of the block."""
        self.pass_on(t.v, self.bulk[t.r, t.block], self.blocks[t.r, t.block].number)

    def announce(self, t: Turn, p: int) -> None:
        t.v.add(self.arrived[p, t.slot, t.r], 1)  # red.release

    def await_rows(self, t: Turn) -> Any:
        """Everything that was announced to us, ever, in this slot."""
        for src in self.ranks:
            have = t.v.peek(self.arrived[t.r, t.slot, src])
            want = t.v.get(self.expected[t.r, t.slot, src])
            if have > want:
                raise Violation(CREDIT, f"rank {t.r} counts {have} rows of rank {src}, not {want}")
            if have < want:
                return BLOCKED
        for src in self.ranks:
            t.v.acquire(self.arrived[t.r, t.slot, src])
        return None

    # ---- the copy engine

    def pack_rows(self, t: Turn, p: int) -> None:
        """Own rows go where they belong, those of others where the copies take them from."""
        for i in range(self.num_rows(t.v, t.r, t.k, t.r, p)):
            tag = ("x", t.k, t.r, i)
            extent, row = t.v.get(self.places[t.r, MOVER])[p]
            place = self.rows[p, extent, row + i] if p == t.r else self.pack[t.r, p, i]
            t.v.write(place, tag, by=self.bulk[t.r, MOVER])
        self.wait_stores(t)

    def tell_packed(self, t: Turn) -> None:
        self.store(t.v, self.packed[t.r], t.v.get(self.taken[t.r, MOVER]))

    def copier_steps(self, r: int) -> list[Step]:
        count = sum(op.copies for op in self.ops)
        one = [
            Step("is asked for copies", lambda v: self.take_half(v, r), local=True),
            Step("sees rows packed", lambda v: self.await_packed(v, r), local=True),
            Step("copies them", lambda v: self.copy_rows(v, r), local=True),
            Step("has copied", lambda v: self.tell_copied(v, r), local=True),
        ]
        return [*(one * count), Step("stops", lambda v: None, local=True, label="stop")]

    def take_half(self, v: View, r: int) -> Any:
        """Until the host has ended, and so asks for no more."""
        number, _ = v.get(self.carried[r])
        asked = self.acquire(v, self.halves[r], number + 1)
        if asked is BLOCKED:
            return "stop" if v.get(self.issued[r])[0][-1].content == END else BLOCKED
        v.put(self.carried[r], (asked.number, asked.content))
        return None

    def await_packed(self, v: View, r: int) -> Any:
        return self.wait(v, self.packed[r], v.get(self.carried[r])[0])

    def copy_rows(self, v: View, r: int) -> None:
        _, k = v.get(self.carried[r])
        for p in self.ranks:
            for i in range(self.num_rows(v, r, k, r, p) if p != r else 0):
                tag = v.read(self.pack[r, p, i], k)
                extent, row = v.get(self.first_row[r, k])[p]
                v.write(self.rows[p, extent, row + i], tag)

    def tell_copied(self, v: View, r: int) -> None:
        self.store(v, self.copied[r], v.get(self.carried[r])[0])

    def await_copies(self, t: Turn) -> Any:
        return self.wait(t.v, self.copied[t.r], t.v.get(self.taken[t.r, SPEAKER]))

    def announce_all(self, t: Turn, p: int) -> None:
        t.v.add(self.arrived[p, t.slot, t.r], self.num_rows(t.v, t.r, t.k, t.r, p))

    # ---- combine

    def stage(self, t: Turn) -> None:
        """A kernel before ours copies y into the arena; griddepcontrol.wait is its end."""
        if t.op.staged and t.extent != END:
            self.write_y(t.v, t.r, t.k, t.extent)
        self.launch(t.v, t.r, SPEAKER)

    def pull(self, t: Turn) -> None:
        """The speaker the first row at each owner, the mover the second."""
        origin = t.op.handle_of(t.r)
        for p in self.ranks:
            if not self.sends(t, p):
                continue
            y, _ = t.v.get(self.places[t.r, t.block])[p]
            row = t.v.get(self.first_row[t.r, origin])[p][1] + t.block
            tag = t.v.read(self.rows[p, y, row], t.k, by=self.bulk[t.r, t.block])
            if tag != ("y", t.k, row):
                raise Violation(WRONG_DATA, f"rank {t.r} pulls {tag}, wants {('y', t.k, row)}")
        self.wait_loads(t)

    def wait_loads(self, t: Turn) -> None:
        """The mbarrier on which they complete, and sums that are made of them."""
        self.pass_on(t.v, self.bulk[t.r, t.block], self.blocks[t.r, t.block].number)

    def tell_pulled(self, t: Turn, p: int) -> None:
        """Also where we had nothing to pull: every owner waits for every rank."""
        self.store(t.v, self.pulled[p, t.slot, t.r], t.seq, relaxed=True)

    def await_pulled(self, t: Turn) -> Any:
        words = [self.pulled[t.r, t.slot, p] for p in self.ranks]
        if any(self.last(t.v, word) < t.seq for word in words):
            return BLOCKED
        for word in words:
            self.acquire(t.v, word, t.seq)
        return None

    # ---- 5. nothing more is read in this slot

    def count(self, t: Turn) -> None:
        self.store(t.v, self.finished[t.r], t.v.get(self.taken[t.r, MOVER]))

    def await_mover(self, t: Turn) -> Any:
        return self.wait(t.v, self.finished[t.r], t.v.get(self.taken[t.r, SPEAKER]))

    def release(self, t: Turn, p: int) -> None:
        self.store(t.v, self.released[p, t.slot, t.r], t.seq, relaxed=True)
