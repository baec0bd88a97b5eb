"""The protocol of docs/protocol.md as threads of the explorer: what every rank writes, waits for
and reads, in order.

Each rank has two threads. *comm* runs the begun operations one after the other; *user* begins
operations, waits for them, reads outputs, reuses and frees them. Ranks talk only through the words
of the control block, and every datum (entry, base, row of x, row of y) is a cell whose accesses
must be ordered by those words.

What is abstracted, and why it loses nothing:

* A routing is a matrix of 0 to 2 rows per (source, receiver): none, one, and two rows stored by two
  movers that add to `arrived` separately. More rows repeat the second case. Metadata lies beside
  the row and is one cell with it.
* Duplicated rows of grouped and slab, sums of combine, quantization: one rank computing on its own
  memory.
* Records are one cell and one word; torn records are stores that no acquire covers.
* An extent holds 4 rows; a grant takes the lowest free extent. Which extent does not matter, that
  it is free does.
* A wait is a step that is not enabled. That a sleeper is woken is the other model, doorbell.py.
  Deadlines end the communicator and are not here; the one race they leave (a late puller) is
  giveup.py.
* Programs are finite. All words are compared with differences of sequence numbers only, so
  operation 5 behaves as operation 1 did once its slot came back; four operations on two slots use
  every slot twice.
* The order in which a rank serves its peers is fixed (next higher first, itself last): stores to
  different words by one thread commute, since no wait is ever undone by a store.

Every rule a mistake could break is one method, so tests/model/mistakes.py can break it. Rails
between nodes, with what they change here, have a model of their own: rail.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .explorer import BLOCKED, Machine, Step, View, Violation

WRONG_DATA = "wrong data"
WRONG_CALL = "ranks paired in different calls"
VERDICTS = "verdicts differ"
CREDIT = "lost credit"
EXTENTS = "extents not conserved"

# Rows per (source, receiver); the upper left corner for fewer ranks. In the second, rank 0 has no
# tokens.
ROUTINGS = (
    ((1, 0, 2, 1), (2, 1, 0, 1), (0, 2, 1, 0), (1, 0, 1, 2)),
    ((0, 0, 0, 0), (1, 1, 2, 0), (2, 1, 0, 1), (1, 0, 1, 1)),
)
EXTENT_ROWS = 4

OK = ("ok",)
SKIPPED = ("skipped",)  # the user never made this call: the one it depends on had raised

END = -1


@dataclass(frozen=True)
class Op:
    """One operation of a program, the same on all ranks but for `handle` and `fails`."""

    kind: str  # dispatch, cached, combine
    handle: int | tuple[int, ...] = END  # whose routing it uses; a tuple when ranks disagree
    routing: int = 0  # of a dispatch
    fails: Mapping[int, str] = field(default_factory=dict)  # rank -> invalid | no extent | overflow
    static: bool = False  # the call does not raise; its handle is empty when it failed
    staged: bool = False  # combine: y lies outside the arena
    copies: bool = False  # dispatch on GPUs: rows travel by copy engine

    def handle_of(self, rank: int) -> int:
        return self.handle if isinstance(self.handle, int) else self.handle[rank]


Action = tuple[str, int]  # call | begin | wait | use | reuse | free | empty, and the operation


@dataclass(frozen=True)
class Program:
    """What the ranks do. `users` gives ranks with actions of their own."""

    name: str
    ops: Sequence[Op]
    actions: Sequence[Action]
    users: Mapping[int, Sequence[Action]] = field(default_factory=dict)
    num_ranks: int = 3
    num_slots: int = 2
    num_extents: int = 2


class Entry(NamedTuple):
    kind: str
    op: int  # ghost: which call of the program this is
    src: int
    code: str
    descriptor: tuple[Any, ...]
    num_rows: int
    y: int


class Base(NamedTuple):
    kind: str
    op: int
    dst: int
    code: str
    extent: int
    row: int


class Turn:
    """One step of a rank's comm thread: the state, the rank, its operation and slot."""

    __slots__ = ("k", "op", "r", "seq", "slot", "v")

    def __init__(self, protocol: Protocol, v: View, r: int):
        self.v = v
        self.r = r
        self.k, self.seq = v.get(protocol.job[r])
        self.op = protocol.ops[self.k]
        self.slot = self.seq % protocol.num_slots


class Protocol:
    """The machine that runs one program. Subclasses break, or extend, single methods."""

    first_seq = 1  # zeroed memory must not look like a published record

    def __init__(self, program: Program):
        self.program = program
        self.ops = program.ops
        self.num_ranks = program.num_ranks
        self.num_slots = program.num_slots
        self.ranks = range(program.num_ranks)
        self.machine = Machine(describe)
        self.machine.context = self.context
        self.machine.check_final = self.check_final
        self.machine.outcome = self.outcome
        self._threads()
        self._places()
        for r in self.ranks:
            self.comm[r].program(self.comm_steps(r))
            self.user[r].program(self.user_steps(r))

    # ---- memory

    def _threads(self) -> None:
        self.comm = [self.machine.thread(f"rank {r}") for r in self.ranks]
        self.user = [self.machine.thread(f"rank {r} user") for r in self.ranks]

    def _places(self) -> None:
        m = self.machine
        slots = range(self.num_slots)
        trio = [(at, slot, peer) for at in self.ranks for slot in slots for peer in self.ranks]
        self.entry_seq = {i: m.word("entry.seq", *i) for i in trio}
        self.entry = {i: m.cell("entry", *i) for i in trio}
        self.base_seq = {i: m.word("base.seq", *i) for i in trio}
        self.base = {i: m.cell("base", *i) for i in trio}
        self.arrived = {i: m.word("arrived", *i) for i in trio}
        self.pulled = {i: m.word("pulled", *i) for i in trio}
        self.released = {i: m.word("released", *i) for i in trio}
        self.rows = {
            (r, e, row): m.cell("row", r, e, row)
            for r in self.ranks
            for e in range(self.program.num_extents)
            for row in range(EXTENT_ROWS)
        }
        # Of one rank: begun operations, finished ones, how many hold each extent of the arena.
        count = len(self.ops)
        self.queue = [m.word("queue", r, value=()) for r in self.ranks]
        self.done = {(r, k): m.word("done", r, k) for r in self.ranks for k in range(count)}
        self.pool = [
            m.word("extents", r, value=(0,) * self.program.num_extents) for r in self.ranks
        ]
        self.taken = [m.var("taken", r, value=0) for r in self.ranks]
        self.job = [m.var("job", r, value=(0, 0)) for r in self.ranks]
        self.placed = [m.var("placed", r, value="ok") for r in self.ranks]
        self.expected = {i: m.var("expected", *i, value=0) for i in trio}
        self.verdict = {(r, k): m.var("verdict", r, k) for r in self.ranks for k in range(count)}
        # What a handle keeps: the extent of the output here, our first row at each receiver.
        self.output = {
            (r, k): m.var("output", r, k, value=END) for r in self.ranks for k in range(count)
        }
        self.first_row = {
            (r, k): m.var("rows", r, k, value=()) for r in self.ranks for k in range(count)
        }

    # ---- the comm thread

    def comm_steps(self, r: int) -> list[Step]:
        return [
            Step(
                "takes the next operation", lambda v: self.next_op(v, r), local=True, label="next"
            ),
            *self.dispatch(r),
            *self.combine(r),
            Step("stops", lambda v: None, local=True, label="stop"),
        ]

    def dispatch(self, r: int) -> list[Step]:
        return [
            self.step(r, "finds its slot released by all", self.await_released, label="dispatch"),
            *self.each_peer(r, "writes its entry to", self.write_entry),
            self.step(r, "returns at once", self.return_refused, when=self.is_refused),
            self.step(r, "has all entries", self.await_entries),
            self.step(r, "grants an extent", self.place, local=self.grants_alone(r)),
            *self.each_peer(r, "publishes the base to", self.publish_base),
            self.step(r, "has all bases", self.await_bases),
            *self.each_peer(r, "pushes row 0 to", self.push_row, 0, when=self.has_row),
            *self.each_peer(r, "pushes row 1 to", self.push_row, 1, when=self.has_row),
            self.step(r, "has all rows", self.await_rows),
            *self.release_steps(r, "release dispatch"),
        ]

    def combine(self, r: int) -> list[Step]:
        return [
            self.step(r, "finds its slot released by all", self.await_released, label="combine"),
            self.step(r, "stages y", self.stage, local=self.grants_alone(r)),
            *self.each_peer(r, "writes its entry to", self.write_entry),
            self.step(r, "returns at once", self.return_refused, when=self.is_refused),
            self.step(r, "has all entries", self.await_entries),
            *self.each_peer(r, "pulls its rows from", self.pull),
            self.step(r, "is pulled by all", self.await_pulled),
            *self.release_steps(r, "release combine"),
        ]

    def grants_alone(self, r: int) -> bool:
        """No step of this rank's user takes or frees memory while an operation runs."""
        return all(step.local for step in self.user_steps(r))

    def release_steps(self, r: int, label: str) -> list[Step]:
        first, *others = self.each_peer(r, "releases the slot to", self.release)
        return [
            replace(first, label=label),
            *others,
            self.step(r, "ends the operation", self.end),
        ]

    def step(
        self,
        r: int,
        text: str,
        act: Callable[..., Any],
        *args: Any,
        local: bool = True,
        label: str = "",
        when: Callable[..., bool] | None = None,
    ) -> Step:
        """Waits are local: they read words of our own block, and what they wait for is never
        undone.
        """
        skip = None if when is None else lambda v: when(Turn(self, v, r), *args)
        return Step(text, lambda v: act(Turn(self, v, r), *args), local, label, skip)

    def each_peer(
        self, r: int, text: str, act: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Step]:
        """One step per peer, the rank itself last: local, since only it reads those words."""
        peers = [(r + i) % self.num_ranks for i in range(1, self.num_ranks + 1)]
        return [
            self.step(r, f"{text} rank {p}", act, p, *args, local=p == r, **options) for p in peers
        ]

    def end(self, t: Turn) -> str:
        t.v.put(self.job[t.r], (0, 0))
        return "next"

    def next_op(self, v: View, r: int) -> Any:
        queue, taken = v.peek(self.queue[r]), v.get(self.taken[r])
        if len(queue) == taken:
            return BLOCKED
        v.acquire(self.queue[r])
        v.put(self.taken[r], taken + 1)
        if queue[taken] == END:
            return "stop"
        k, _ = job = queue[taken]
        v.put(self.job[r], job)
        return "combine" if self.ops[k].kind == "combine" else "dispatch"

    # 0. The slot is ours again at every peer.

    def await_released(self, t: Turn) -> Any:
        words = [self.released[t.r, t.slot, p] for p in self.ranks]
        if not all(self.slot_is_free(t.v.peek(word), t.seq) for word in words):
            return BLOCKED
        for word in words:
            t.v.acquire(word)
        return None

    def slot_is_free(self, released: int, seq: int) -> bool:
        return released + self.num_slots >= seq

    # 1. Tell every rank what comes, or that we refuse.

    def write_entry(self, t: Turn, p: int) -> Any:
        code = self.refusal(t)
        y = t.v.get(self.output[t.r, t.k]) if t.op.kind == "combine" else END
        rows = self.num_rows(t.v, t.r, t.k, t.r, p)
        t.v.write(
            self.entry[p, t.slot, t.r], Entry("entry", t.k, t.r, code, self.descriptor(t), rows, y)
        )
        t.v.release(self.entry_seq[p, t.slot, t.r], t.seq)

    def refusal(self, t: Turn) -> str:
        verdict = t.v.get(self.verdict[t.r, t.k])
        if verdict is not None:
            return verdict[0]  # staging failed
        return "E213" if t.op.fails.get(t.r) == "invalid" else "ok"

    def descriptor(self, t: Turn) -> tuple[Any, ...]:
        return (t.op.kind, t.op.handle_of(t.r))

    def is_refused(self, t: Turn) -> bool:
        return self.refusal(t) != "ok"

    def return_refused(self, t: Turn) -> Any:
        """Nobody will push to us or pull from us: every rank reads our entry first."""
        return self.fail(t, self.refusal(t), t.r, returned=True)

    # 2. The verdict on what all ranks said, the same function of the same records everywhere.

    def await_entries(self, t: Turn) -> Any:
        words = [self.entry_seq[t.r, t.slot, p] for p in self.ranks]
        if not all(self.entry_is_here(t.v.peek(word), t.seq) for word in words):
            return BLOCKED
        entries = [self.read_entry(t, p) for p in self.ranks]
        for entry in entries:
            if entry.code != "ok":
                return self.fail(t, entry.code, entry.src)
        for entry in entries:
            if entry.descriptor != entries[0].descriptor:
                return self.fail(t, "E220", entry.src)
        return None

    def entry_is_here(self, seq: int, wanted: int) -> bool:
        return seq == wanted

    def read_entry(self, t: Turn, p: int) -> Entry:
        t.v.acquire(self.entry_seq[t.r, t.slot, p])
        entry: Entry = t.v.read(self.entry[t.r, t.slot, p], t.k)
        if entry.op != t.k:
            raise Violation(
                WRONG_CALL, f"rank {t.r} in call {t.k} reads rank {p}'s entry of call {entry.op}"
            )
        return entry

    def place(self, t: Turn) -> Any:
        """The receiver owns placement: an extent nobody holds, a first row for every source."""
        code = {"no extent": "E231", "overflow": "E230"}.get(t.op.fails.get(t.r, ""), "ok")
        extent = self.grant(t.v, t.r) if code == "ok" else END
        if extent == END and code == "ok":
            code = "E231"
        t.v.put(self.output[t.r, t.k], extent)
        t.v.put(self.placed[t.r], code)
        t.v.note(code if extent == END else f"extent {extent}")

    def num_rows(self, v: View, rank: int, k: int, src: int, dst: int) -> int:
        """As `rank` knows it: a handle of a static call that failed has no rows."""
        while self.ops[k].kind != "dispatch":
            k = self.ops[k].handle_of(rank)
            if v.get(self.verdict[rank, k]) != OK:
                return 0
        return ROUTINGS[self.ops[k].routing][src][dst]

    def publish_base(self, t: Turn, p: int) -> Any:
        before = range(p)
        row = sum(self.num_rows(t.v, t.r, t.k, src, t.r) for src in before)
        code, extent = t.v.get(self.placed[t.r]), t.v.get(self.output[t.r, t.k])
        t.v.write(self.base[p, t.slot, t.r], Base("base", t.k, t.r, code, extent, row))
        t.v.release(self.base_seq[p, t.slot, t.r], t.seq)

    # 3. All bases, also of ranks we send nothing to: so all know of a refusal before any row moves.

    def await_bases(self, t: Turn) -> Any:
        words = [self.base_seq[t.r, t.slot, p] for p in self.ranks]
        if not all(t.v.peek(word) == t.seq for word in words):
            return BLOCKED
        return self.judge_bases(t, [self.read_base(t, p) for p in self.ranks])

    def read_base(self, t: Turn, p: int) -> Base:
        t.v.acquire(self.base_seq[t.r, t.slot, p])
        base: Base = t.v.read(self.base[t.r, t.slot, p], t.k)
        if base.op != t.k:
            raise Violation(
                WRONG_CALL, f"rank {t.r} in call {t.k} reads rank {p}'s base of call {base.op}"
            )
        return base

    def judge_bases(self, t: Turn, bases: Sequence[Base]) -> Any:
        for base in bases:
            if base.code != "ok":
                return self.fail(t, base.code, base.dst)
        t.v.put(self.first_row[t.r, t.k], tuple((base.extent, base.row) for base in bases))
        return None

    # 4, 5. Rows go to their final place; whoever stored them adds them to `arrived`.

    def has_row(self, t: Turn, p: int, i: int) -> bool:
        return i < self.num_rows(t.v, t.r, t.k, t.r, p)

    def push_row(self, t: Turn, p: int, i: int) -> Any:
        extent, row = t.v.get(self.first_row[t.r, t.k])[p]
        self.store_row(t, p, (p, extent, row + i), ("x", t.k, t.r, i))

    def store_row(self, t: Turn, p: int, place: tuple[int, int, int], tag: tuple[Any, ...]) -> None:
        t.v.write(self.rows[place], tag)
        t.v.add(self.arrived[p, t.slot, t.r], 1)

    # 6, 7. Everything announced has arrived; unpack it, hand it to the user.

    def await_rows(self, t: Turn) -> Any:
        for src in self.ranks:
            if t.v.peek(self.arrived[t.r, t.slot, src]) < self.total(t, src):
                return BLOCKED
        for src in self.ranks:
            t.v.acquire(self.arrived[t.r, t.slot, src])
            t.v.put(self.expected[t.r, t.slot, src], self.total(t, src))
        self.read_output(t.v, t.r, t.k)
        self.succeed(t)
        return None

    def total(self, t: Turn, src: int) -> int:
        """Rows this source ever announced in this slot. A failed call moves none, adds none."""
        return t.v.get(self.expected[t.r, t.slot, src]) + self.num_rows(t.v, t.r, t.k, src, t.r)

    def output_rows(self, v: View, r: int, k: int) -> Iterator[tuple[int, int, int]]:
        """(row, source, i) of everything operation k received at rank r."""
        row = 0
        for src in self.ranks:
            for i in range(self.num_rows(v, r, k, src, r)):
                yield row, src, i
                row += 1

    def read_output(self, v: View, r: int, k: int) -> None:
        extent = v.get(self.output[r, k])
        for row, src, i in self.output_rows(v, r, k):
            tag = v.read(self.rows[r, extent, row], k)
            if tag != ("x", k, src, i):
                raise Violation(
                    WRONG_DATA,
                    f"rank {r} reads {tag} in {describe(('row', r, extent, row))}, "
                    f"wants {('x', k, src, i)}",
                )

    # Combine: y in place, or remote rows copied into an extent of our own first.

    def stage(self, t: Turn) -> Any:
        if t.op.fails.get(t.r) == "invalid":
            return
        if not t.op.staged:
            origin = t.op.handle_of(t.r)
            t.v.put(self.output[t.r, t.k], t.v.get(self.output[t.r, origin]))
            return
        failed = t.op.fails.get(t.r) == "no extent"
        extent = END if failed else self.grant(t.v, t.r)
        t.v.put(self.output[t.r, t.k], extent)
        if extent == END:
            t.v.put(self.verdict[t.r, t.k], ("E231", t.r, True))
            return
        t.v.note(f"extent {extent}")
        self.write_y(t.v, t.r, t.k, extent)

    def write_y(self, v: View, r: int, k: int, extent: int) -> None:
        for row, _, _ in self.output_rows(v, r, k):
            v.write(self.rows[r, extent, row], ("y", k, row))

    def pull(self, t: Turn, p: int) -> Any:
        """A rank that sent nothing to p pulls nothing, and says so all the same: p waits for every
        rank.
        """
        self.pull_rows(t, p)
        t.v.release(self.pulled[p, t.slot, t.r], t.seq)

    def pull_rows(self, t: Turn, p: int) -> None:
        origin = t.op.handle_of(t.r)
        count = self.num_rows(t.v, t.r, t.k, t.r, p)
        if count:
            _, first = t.v.get(self.first_row[t.r, origin])[p]
            y = t.v.read(self.entry[t.r, t.slot, p], t.k).y
            for row in range(first, first + count):
                self.load_row(t, (p, y, row))

    def load_row(self, t: Turn, place: tuple[int, int, int], by: int | None = None) -> None:
        tag = t.v.read(self.rows[place], t.k, by)
        if tag != ("y", t.k, place[2]):
            raise Violation(WRONG_DATA, f"rank {t.r} pulls {tag}, wants {('y', t.k, place[2])}")

    def await_pulled(self, t: Turn) -> Any:
        words = [self.pulled[t.r, t.slot, p] for p in self.ranks]
        if not all(t.v.peek(word) >= t.seq for word in words):
            return BLOCKED
        for word in words:
            t.v.acquire(word)
        self.drop_y(t)
        self.succeed(t)
        return None

    def drop_y(self, t: Turn) -> None:
        """The operation's own hold on y: its staging, or the user's extent."""
        extent = t.v.get(self.output[t.r, t.k])
        if extent != END:
            self.drop(t.v, t.r, extent)

    # 8. We shall read nothing more in this slot.

    def release(self, t: Turn, p: int) -> Any:
        t.v.release(self.released[p, t.slot, t.r], t.seq)

    # ---- verdicts

    def succeed(self, t: Turn) -> None:
        self.record(t, OK)
        t.v.release(self.done[t.r, t.k], 1)

    def fail(self, t: Turn, code: str, culprit: int, returned: bool = False) -> str:
        """Nothing was pushed or pulled, so what this rank granted or lent returns at once."""
        t.v.note(f"the call fails, {code} of rank {culprit}")
        self.record(t, (code, culprit, returned))
        if t.op.kind == "combine":
            self.drop_y(t)
        else:
            self.give_back(t)
        t.v.release(self.done[t.r, t.k], 1)
        return "release combine" if t.op.kind == "combine" else "release dispatch"

    def give_back(self, t: Turn) -> None:
        extent = t.v.get(self.output[t.r, t.k])
        if extent != END:
            self.drop(t.v, t.r, extent)
            t.v.put(self.output[t.r, t.k], END)

    def record(self, t: Turn, verdict: tuple[Any, ...]) -> None:
        """All succeed or all fail; all who read the records name the same code and rank."""
        t.v.put(self.verdict[t.r, t.k], verdict)
        for q in self.ranks:
            theirs = t.v.get(self.verdict[q, t.k])
            if q == t.r or theirs is None or theirs == SKIPPED:
                continue
            early = theirs[-1] is True or verdict[-1] is True
            same = (theirs == OK) == (verdict == OK) if early else theirs == verdict
            if not same:
                raise Violation(
                    VERDICTS, f"call {t.k}: rank {t.r} {verdict[:2]}, rank {q} {theirs[:2]}"
                )

    # ---- extents: held by the user's tensor, by operations in flight

    def grant(self, v: View, r: int) -> int:
        holders = v.acquire(self.pool[r])
        extent = holders.index(0) if 0 in holders else END
        if extent != END:
            self.hold(v, r, extent)
        return extent

    def hold(self, v: View, r: int, extent: int, change: int = 1) -> None:
        """Releases what its caller did with the extent; only `grant` acquires."""
        holders = v.peek(self.pool[r])
        if holders[extent] + change < 0:
            raise Violation(EXTENTS, f"extent {extent} of rank {r} is given back twice")
        count = holders[extent] + change
        v.update(self.pool[r], (*holders[:extent], count, *holders[extent + 1 :]))

    def drop(self, v: View, r: int, extent: int) -> None:
        self.hold(v, r, extent, -1)

    # ---- the user thread

    def user_steps(self, r: int) -> list[Step]:
        steps: list[Step] = []
        begun: set[int] = set()
        for verb, k in self.program.users.get(r, self.program.actions):
            for name in ("begin", "wait") if verb == "call" else (verb,):
                steps.append(self.user_step(r, name, k, alone=not begun))
                if name == "begin":
                    begun.add(k)
                elif name == "wait":
                    begun.discard(k)
        return [*steps, Step("ends", lambda v: self.enqueue(v, r, END), local=True)]

    def user_step(self, r: int, verb: str, k: int, alone: bool) -> Step:
        """Only taking and freeing memory meets the comm thread, when that is about to ask for an
        extent itself.
        """
        act = getattr(self, f"user_{verb}")
        text = "takes and frees memory" if verb == "empty" else f"{verb}s call {k}"
        return Step(text, lambda v: act(v, r, k), local=alone or verb not in ("free", "empty"))

    def user_begin(self, v: View, r: int, k: int) -> Any:
        op = self.ops[k]
        origin = op.handle_of(r)
        if origin != END and not self.has_handle(v, r, origin):
            v.put(self.verdict[r, k], SKIPPED)
            return
        if op.kind == "combine" and not op.staged and op.fails.get(r) != "invalid":
            self.lend_y(v, r, k, v.get(self.output[r, origin]))
        self.enqueue(v, r, (k, self.take_seq(v, r)))

    def has_handle(self, v: View, r: int, k: int) -> bool:
        """The call returned. A static one also does when it failed, with counts of zero."""
        verdict = v.get(self.verdict[r, k])
        return verdict == OK or (self.ops[k].static and verdict is not None and verdict != SKIPPED)

    def lend_y(self, v: View, r: int, k: int, extent: int) -> None:
        if extent != END:
            self.write_y(v, r, k, extent)
            self.hold(v, r, extent)

    def take_seq(self, v: View, r: int) -> int:
        return self.first_seq + len(v.peek(self.queue[r]))

    def enqueue(self, v: View, r: int, job: Any) -> None:
        v.release(self.queue[r], (*v.peek(self.queue[r]), job))

    def is_begun(self, v: View, r: int, k: int) -> bool:
        return v.get(self.verdict[r, k]) != SKIPPED

    def user_wait(self, v: View, r: int, k: int) -> Any:
        if not self.is_begun(v, r, k):
            return None
        if not v.peek(self.done[r, k]):
            return BLOCKED
        v.acquire(self.done[r, k])
        return None

    def user_use(self, v: View, r: int, k: int) -> None:
        if v.get(self.verdict[r, k]) == OK:
            self.read_output(v, r, k)

    def user_reuse(self, v: View, r: int, k: int) -> None:
        """Overwrites the y it gave to combine k, as soon as that has returned or raised."""
        origin = self.ops[k].handle_of(r)
        if v.get(self.verdict[r, origin]) == OK:
            self.scratch(v, r, k, v.get(self.output[r, origin]))

    def scratch(self, v: View, r: int, k: int, extent: int) -> None:
        for row in range(EXTENT_ROWS if extent != END else 0):
            v.write(self.rows[r, extent, row], ("scratch", k + 1, row))

    def user_empty(self, v: View, r: int, k: int) -> None:
        """Takes memory of the arena for itself (Buffer.empty), writes to it and gives it back."""
        extent = self.grant(v, r)
        if extent != END:
            self.scratch(v, r, k, extent)
            self.drop(v, r, extent)

    def user_free(self, v: View, r: int, k: int) -> None:
        if v.get(self.verdict[r, k]) == OK:
            self.drop(v, r, v.get(self.output[r, k]))

    # ---- at the end

    def check_final(self, v: View) -> None:
        for r in self.ranks:
            queue = v.peek(self.queue[r])
            if queue != v.peek(self.queue[0]):
                raise Violation(WRONG_CALL, f"rank {r} made other calls than rank 0")
            if any(v.peek(self.pool[r])):
                raise Violation(EXTENTS, f"rank {r} still holds {v.peek(self.pool[r])}")
            for _, seq in queue[:-1]:
                self.check_slot(v, r, seq, max(s for _, s in queue[:-1] if self.same_slot(s, seq)))

    def outcome(self, v: View) -> tuple[Any, ...]:
        return tuple(v.get(self.verdict[r, k]) for r in self.ranks for k in range(len(self.ops)))

    def same_slot(self, a: int, b: int) -> bool:
        return a % self.num_slots == b % self.num_slots

    def check_slot(self, v: View, r: int, seq: int, last: int) -> None:
        slot = seq % self.num_slots
        for p in self.ranks:
            if v.peek(self.released[r, slot, p]) != last:
                raise Violation(
                    CREDIT,
                    f"rank {p} left slot {slot} of rank {r} released up to "
                    f"{v.peek(self.released[r, slot, p])}, not {last}",
                )
            arrived = v.peek(self.arrived[r, slot, p])
            if arrived != v.get(self.expected[r, slot, p]):
                raise Violation(
                    CREDIT, f"rank {r} counts {arrived} rows of rank {p} in slot {slot}"
                )

    def context(self, v: View) -> str:
        r = v.thread
        if r >= self.num_ranks:
            return ""
        k, seq = v.get(self.job[r])
        return f"{self.ops[k].kind} #{seq} " if seq else ""


def describe(name: tuple[Any, ...]) -> str:
    kind, at, *rest = name
    if kind == "row":
        return f"row {rest[1]} of extent {rest[0]} at rank {at}"
    if kind in ("entry", "base"):
        return f"{kind}[slot {rest[0]}][rank {rest[1]}] at rank {at}"
    return f"{kind}{rest} at rank {at}"
