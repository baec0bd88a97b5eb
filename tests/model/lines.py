"""Small batches as GPUs run them (docs/protocol.md, "Small batches on a GPU"): rows leave as lines
before anybody was heard, and a call may run in two halves.

A rank is one thread, the stream of its kernels. Its program is a list of pieces, each a kernel: the
sending half of an operation, the receiving one, both, or a refusal. Numbers are given in the order
in which operations begin, the same on all ranks; where the second halves come is each rank's own.

Stores are relaxed, as in notice.py: whoever sees one knows what kernels before that of the storer
have done, and which loads of the storer are over, and nothing else. `fenced` ones bring all that
was done before them. A *line* holds a number and its payload, and has many writers, one after the
other: who stores over another's line must know that the old store is in place, from its writer, or
because somebody's load of it is over. Else the old one may land last, and the new line is lost.

Every rank has two places for lines in each slot. Who writes them changes from one operation to the
next, as records of dispatch and combine are of different lengths and owners.

What is abstracted: blocks of a kernel (they meet at its ends, `finished`), what a row means, and
waits that end without their word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .explorer import BLOCKED, OVERWRITE, Machine, Place, Step, Thread, View, Violation

LOST = "an old line may land on a new one"
WRONG_CALL = "a line or notice of another call"
LEFT = "a line that nobody loaded"
NUM_PLACES = 2

SEND, RECEIVE, WHOLE, REFUSE = "send", "receive", "whole", "refuse"


class Word(NamedTuple):
    """A notice, a line or a `released`: the newest store."""

    number: int
    op: int  # ghost: index of the operation in the program
    poisoned: bool
    writer: int
    written: int  # the writer's clock
    brings: tuple[int, ...]  # what whoever sees it comes after
    over: tuple[int, ...]  # loads that are over, as the writer knew
    reads: tuple[tuple[int, int], ...]  # reader, its clock


@dataclass(frozen=True)
class Small:
    """A program. `fails[k]` by rank: "refused" by its host, or "found" by its kernel."""

    name: str
    pieces: tuple[tuple[tuple[str, int], ...], ...]  # by rank: (kind, operation)
    num_ops: int
    fails: dict[int, dict[int, str]] = field(default_factory=dict)
    num_slots: int = 2

    @property
    def num_ranks(self) -> int:
        return len(self.pieces)


class Lines:
    """The machine of a program. Subclasses break single rules."""

    def __init__(self, program: Small):
        self.program = program
        self.machine = m = Machine()
        ranks = self.ranks = range(program.num_ranks)
        threads = [m.thread(f"rank {r}") for r in ranks]
        zero = (0,) * len(threads)
        nothing = Word(0, -1, False, -1, 0, zero, zero, ())
        slots = range(program.num_slots)
        m.loads = [m.var("loads", r, value=zero) for r in ranks]
        self.launched = [m.var("launched", r, value=zero) for r in ranks]
        self.good = [m.var("good", r, value=True) for r in ranks]
        ops = range(program.num_ops)
        self.loaded = {(r, k): m.var("loaded", r, k, value=0) for r in ranks for k in ops}
        m.check_final = self.check_loaded

        def words(name: str, count: int) -> dict[tuple[int, int, int], Place]:
            return {
                (r, s, i): m.var(name, r, s, i, value=nothing)
                for r in ranks
                for s in slots
                for i in range(count)
            }

        self.notice = words("notice", len(ranks))
        self.released = words("released", len(ranks))
        self.line = words("line", NUM_PLACES)
        for r, thread in enumerate(threads):
            self.write_program(r, thread)

    # ---- a rank's kernels, one after the other

    def write_program(self, r: int, thread: Thread) -> None:
        steps: list[Step] = []
        for kind, k in self.program.pieces[r]:
            steps += self.piece(r, kind, k)
        thread.program(steps)

    def piece(self, r: int, kind: str, k: int) -> list[Step]:
        said = f"[{k}] "
        steps = [Step(f"{said}begins to {kind}", lambda v: self.launch(v, r), local=True)]
        if kind != RECEIVE:
            steps += self.slot_steps(r, k)
        if kind in (SEND, WHOLE):
            for p in self.ranks:
                for i in range(NUM_PLACES):
                    if self.writer(k, p, i) == r:
                        steps.append(self.storing(f"{said}puts line {i} to {p}", p, r, k, i))
        if kind != RECEIVE:
            steps += [self.telling(f"{said}tells {p}", p, r, k) for p in self.ranks]
        if kind in (RECEIVE, WHOLE):
            steps += self.receiving(r, k)
        if kind != SEND:
            steps += [self.releasing(f"{said}releases to {p}", p, r, k) for p in self.ranks]
        return steps

    def slot_steps(self, r: int, k: int) -> list[Step]:
        text = f"[{k}] finds its slot released"
        return [Step(text, lambda v: self.await_released(v, r, k), local=True)]

    def storing(self, text: str, p: int, r: int, k: int, i: int) -> Step:
        return Step(text, lambda v: self.put_line(v, p, r, k, i))

    def telling(self, text: str, p: int, r: int, k: int) -> Step:
        return Step(text, lambda v: self.tell(v, p, r, k), local=p == r)

    def releasing(self, text: str, p: int, r: int, k: int) -> Step:
        return Step(text, lambda v: self.release(v, p, r, k), local=p == r)

    def receiving(self, r: int, k: int) -> list[Step]:
        return [self.hearing(r, k), *self.loading(r, k)]

    def hearing(self, r: int, k: int) -> Step:
        return Step(f"[{k}] hears everybody", lambda v: self.hear(v, r, k), local=True)

    def loading(self, r: int, k: int) -> list[Step]:
        good = self.good[r]
        return [
            Step(
                f"[{k}] loads line {i}",
                lambda v, i=i: self.load_line(v, r, k, i),
                local=True,
                when=lambda v: bool(v.get(good)),
            )
            for i in range(NUM_PLACES)
        ]

    # ---- what an operation is

    def seq(self, k: int) -> int:
        return k + 1

    def slot(self, k: int) -> int:
        return self.seq(k) % self.program.num_slots

    def writer(self, k: int, p: int, i: int) -> int:
        return (k + p + i) % self.program.num_ranks

    def fate(self, r: int, k: int) -> str:
        return self.program.fails.get(k, {}).get(r, "")

    # ---- steps

    def launch(self, v: View, r: int) -> None:
        """The kernel before has ended, and what it stored is seen with all that we store."""
        v.put(self.launched[r], v.clock(r))
        v.tick(r)
        v.put(self.good[r], True)

    def await_released(self, v: View, r: int, k: int) -> Any:
        want = self.seq(k) - self.program.num_slots
        words = [self.released[r, self.slot(k), p] for p in self.ranks]
        if any(v.get(word).number < want for word in words):
            return BLOCKED
        for word in words:
            self.see(v, v.get(word))
        return None

    def store(self, v: View, place: Place, number: int, k: int, **how: bool) -> None:
        t = v.thread
        clock = v.clock(t)
        brings = clock if how.get("fenced") else v.get(self.launched[t])
        poisoned = how.get("poisoned", False)
        v.put(place, Word(number, k, poisoned, t, clock[t], brings, v.is_over(t), ()))
        v.tick(t)

    def see(self, v: View, word: Word) -> None:
        v.join(v.thread, word.brings)
        loads = self.machine.loads[v.thread]
        v.put(loads, tuple(map(max, v.get(loads), word.over)))

    def check_store(self, v: View, place: Place, number: int) -> None:
        """That nobody needs what stands there, and that it cannot come later than we."""
        old: Word = v.get(place)
        if old.writer < 0:
            return
        over, clock, me = v.is_over(v.thread), v.clock(v.thread), v.who(v.thread)
        late = [q for q, read in old.reads if over[q] < read]
        if late:
            text = f"{me} stores {number} over {old.number}, which {v.who(late[0])} may still load"
            raise Violation(OVERWRITE, f"{place.name}: {text}")
        landed = any(over[q] >= read for q, read in old.reads)
        if old.writer != v.thread and clock[old.writer] < old.written and not landed:
            text = f"{me} stores {number}, and {old.number} of {v.who(old.writer)} may be under way"
            raise Violation(LOST, f"{place.name}: {text}")

    def put_line(self, v: View, p: int, r: int, k: int, i: int) -> None:
        place = self.line[p, self.slot(k), i]
        self.check_store(v, place, self.seq(k))
        self.store(v, place, self.seq(k), k)

    def tell(self, v: View, p: int, r: int, k: int) -> None:
        place = self.notice[p, self.slot(k), r]
        self.check_store(v, place, self.seq(k))
        self.store(v, place, self.seq(k), k, poisoned=bool(self.fate(r, k)))

    def load(self, v: View, place: Place, k: int) -> Word | object:
        word: Word = v.get(place)
        if not self.is_here(word.number, self.seq(k)):
            return BLOCKED
        if word.number > self.seq(k):
            text = f"{v.who(v.thread)} wants {self.seq(k)}, and {word.number} stands there"
            raise Violation(OVERWRITE, f"{place.name}: {text}")
        if word.op != k:
            raise Violation(WRONG_CALL, f"{place.name}: of call {word.op}, not {k}")
        others = [read for read in word.reads if read[0] != v.thread]
        reads = tuple(sorted([*others, (v.thread, v.clock(v.thread)[v.thread])]))
        v.put(place, word._replace(reads=reads))
        return word

    def is_here(self, number: int, seq: int) -> bool:
        return number >= seq

    def hear(self, v: View, r: int, k: int) -> Any:
        places = [self.notice[r, self.slot(k), p] for p in self.ranks]
        if not all(self.is_here(v.get(place).number, self.seq(k)) for place in places):
            return BLOCKED
        words = [self.load(v, place, k) for place in places]
        for word in words:
            assert isinstance(word, Word)
            self.see(v, word)
        v.put(self.good[r], not any(isinstance(w, Word) and w.poisoned for w in words))
        return None

    def load_line(self, v: View, r: int, k: int, i: int) -> Any:
        if self.load(v, self.line[r, self.slot(k), i], k) is BLOCKED:
            return BLOCKED
        v.put(self.loaded[r, k], v.get(self.loaded[r, k]) + 1)
        return None

    def check_loaded(self, v: View) -> None:
        """At the end: of calls that did not fail, every line once, of others none."""
        for (r, k), place in self.loaded.items():
            want = 0 if self.program.fails.get(k) else NUM_PLACES
            if v.get(place) != want:
                text = f"rank {r} has loaded {v.get(place)} lines of call {k}, not {want}"
                raise Violation(LEFT, text)

    def release(self, v: View, p: int, r: int, k: int) -> None:
        """Of a good call every line stored for us has been loaded. Of another one nobody loads
        ours, and whoever stores there next has to know that they are in place.
        """
        fenced = self.fences(v, r)
        self.store(v, self.released[p, self.slot(k), r], self.seq(k), k, fenced=fenced)

    def fences(self, v: View, r: int) -> bool:
        return not v.get(self.good[r])


# ---- programs


def whole(num_ops: int) -> tuple[tuple[str, int], ...]:
    return tuple((WHOLE, k) for k in range(num_ops))


def late(num_ops: int, behind: int) -> tuple[tuple[str, int], ...]:
    """Second halves come `behind` operations later, or at the end."""
    pieces: list[tuple[str, int]] = []
    for k in range(num_ops):
        if k >= behind:
            pieces.append((RECEIVE, k - behind))
        pieces.append((SEND, k))
    return (*pieces, *((RECEIVE, k) for k in range(max(0, num_ops - behind), num_ops)))


def refusing(
    pieces: Sequence[tuple[str, int]], r: int, fails: dict[int, dict[int, str]]
) -> tuple[tuple[str, int], ...]:
    """A host that refuses queues that instead of the first half, and no second one."""
    found: list[tuple[str, int]] = []
    for kind, k in pieces:
        refuses = fails.get(k, {}).get(r) == "refused"
        if not refuses:
            found.append((kind, k))
        elif kind != RECEIVE:
            found.append((REFUSE, k))
    return tuple(found)


def program(
    name: str, ranks: Sequence[Sequence[tuple[str, int]]], fails: dict[int, dict[int, str]]
) -> Small:
    num_ops = 1 + max(k for _, k in ranks[0])
    pieces = tuple(refusing(p, r, fails) for r, p in enumerate(ranks))
    return Small(name, pieces, num_ops, fails)
