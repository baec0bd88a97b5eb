"""A rank on a GPU from outside its kernels: words whose stores have no order, its host, the stream
of its caller. The kernels are in notice.py.

**Stores without order.** A relaxed store tells what kernels before its own have done, since the end
of a kernel is seen by all; and it tells that loads are over, since a store that depends on what was
loaded cannot pass the load. It does not tell what its own kernel has stored. So a word here brings
two clocks: of what is visible with it, and of loads that are over (`View.is_over`), which is all
that is needed to overwrite what was loaded.

**Packed words** carry the number of their operation. Who waits for an operation and finds a newer
number has come too late: the word was overwritten before it was read. That is a violation, as is a
store over a word whose reading is not over.

**The host** runs ahead of the kernels and learns only what is reported. It grants memory before
anybody knows what comes, and takes it back behind the work that is queued on it: who is granted it
next is ordered by streams. Operations run on the caller's stream, or beside it when they are begun.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .explorer import BLOCKED, OVERWRITE, Machine, Place, Step, View, Violation
from .protocol import (
    CREDIT,
    END,
    EXTENT_ROWS,
    EXTENTS,
    OK,
    ROUTINGS,
    SKIPPED,
    WRONG_CALL,
    WRONG_DATA,
    Action,
    Program,
    describe,
)

SPEAKER, MOVER = 0, 1  # blocks


class Store(NamedTuple):
    """One store to a word."""

    number: int
    content: Any
    clock: tuple[int, ...]  # what is visible with it
    loads: tuple[int, ...]  # whose loads are over


class HostSide:
    """The machine that runs one program; its kernels are those of the subclass."""

    first_seq = 1  # zeroed memory must not look like a notice

    def __init__(self, program: Program, *, reduced: bool = True):
        self.program, self.reduced = program, reduced
        self.ops, self.num_ranks, self.num_slots = program.ops, program.num_ranks, program.num_slots
        self.ranks = range(program.num_ranks)
        self.machine = Machine(describe)
        self.machine.context = self.context
        self.machine.check_final = self.check_final
        self.machine.outcome = self.outcome
        self.actions = {r: self.actions_of(r) for r in self.ranks}
        self._threads()
        self._places()
        for r in self.ranks:
            self.host[r].program(self.host_steps(r))
            self.caller[r].program(self.caller_steps(r))
            self.blocks[r, SPEAKER].program(self.speaker_steps(r))
            self.blocks[r, MOVER].program(self.mover_steps(r))
            self.copier[r].program(self.copier_steps(r))

    def speaker_steps(self, r: int) -> list[Step]:
        raise NotImplementedError

    def mover_steps(self, r: int) -> list[Step]:
        raise NotImplementedError

    def copier_steps(self, r: int) -> list[Step]:
        raise NotImplementedError

    def actions_of(self, r: int) -> list[Action]:
        """A call is begun and waited for; one by copies also has a second half."""
        actions: list[Action] = []
        for verb, k in self.program.users.get(r, self.program.actions):
            if verb not in ("call", "begin"):
                actions.append((verb, k))
                continue
            actions.append(("begin", k))
            if self.ops[k].copies and self.ops[k].fails.get(r) != "invalid":
                actions.append(("settle", k))
            if verb == "call":
                actions.append(("wait", k))
        return actions

    # ---- memory

    def _threads(self) -> None:
        m = self.machine
        self.host = [m.thread(f"rank {r} host") for r in self.ranks]
        self.caller = [m.thread(f"rank {r} caller") for r in self.ranks]
        names = {SPEAKER: "speaker", MOVER: "mover"}
        self.blocks = {(r, b): m.thread(f"rank {r} {names[b]}") for r in self.ranks for b in names}
        self.bulk = {
            (r, b): m.thread(f"rank {r} {names[b]}, bulk").number for r in self.ranks for b in names
        }
        self.copier = [m.thread(f"rank {r} copier") for r in self.ranks]
        self.of_thread = {thread.number: r_b for r_b, thread in self.blocks.items()}

    def _places(self) -> None:
        m, nothing = self.machine, (0,) * len(self.machine.threads)
        m.loads = [m.var("loads", thread.name, value=nothing) for thread in m.threads]
        slots, count = range(self.num_slots), len(self.ops)
        trio = [(at, slot, peer) for at in self.ranks for slot in slots for peer in self.ranks]
        # Between ranks.
        self.head = {i: self.word("head", *i) for i in trio}
        self.numbers = {i: self.word("numbers", *i) for i in trio}
        self.released = {i: self.word("released", *i) for i in trio}
        self.pulled = {i: self.word("pulled", *i) for i in trio}
        self.arrived = {i: m.word("arrived", *i) for i in trio}  # both blocks add
        self.rows = {
            (r, e, row): m.cell("row", r, e, row)
            for r in self.ranks
            for e in range(self.program.num_extents)
            for row in range(EXTENT_ROWS)
        }
        # Of one rank: how its host, its streams and its blocks follow each other.
        self.issued = [self.word("issued", r) for r in self.ranks]  # actions of its host
        self.jobs = [self.word("jobs", r) for r in self.ranks]  # operations it has queued
        self.reached = [self.word("reached", r) for r in self.ranks]  # and its caller allows
        self.halves = [self.word("halves", r) for r in self.ranks]  # second halves it has queued
        self.packed = [self.word("packed", r) for r in self.ranks]
        self.copied = [self.word("copied", r) for r in self.ranks]
        self.finished = [self.word("finished", r) for r in self.ranks]  # movers that have read all
        self.ended = {i: self.word("ended", *i) for i in self.blocks}
        self.reports = [self.word("reports", r) for r in self.ranks]
        self.pack = {
            (r, p, i): m.cell("packed", r, p, i)
            for r in self.ranks
            for p in self.ranks
            for i in range(2)
        }
        free = ((0, False),) * self.program.num_extents  # who holds it; used beside the caller
        self.pool = [m.var("extents", r, value=free) for r in self.ranks]
        self.job = {i: m.var("job", *i, value=(0, 0, END)) for i in self.blocks}
        self.taken = {i: m.var("taken", *i, value=0) for i in self.blocks}
        self.launched = {i: m.var("launched", *i, value=nothing) for i in self.blocks}
        self.places = {i: m.var("places", *i, value=()) for i in self.blocks}
        self.carried = [m.var("carried", r, value=(0, 0)) for r in self.ranks]
        self.expected = {i: m.var("expected", *i, value=0) for i in trio}
        calls = [(r, k) for r in self.ranks for k in range(count)]
        self.verdict = {i: m.var("verdict", *i) for i in calls}
        self.number = {i: m.var("number", *i, value=0) for i in calls}  # of its job
        self.output = {i: m.var("output", *i, value=END) for i in calls}  # extent, if any
        self.held = {i: m.var("held", *i, value=False) for i in calls}
        self.spare = {i: m.var("spare", *i) for i in calls}
        self.first_row = {i: m.var("rows", *i, value=()) for i in calls}

    # ---- words

    def word(self, *name: Any) -> Place:
        """Every store to it, oldest first, and who has read the last one."""
        zero = (0,) * len(self.machine.threads)
        return self.machine.var(*name, value=((Store(0, None, zero, zero),), ()))

    def store(
        self, v: View, word: Place, number: int, content: Any = None, *, relaxed: bool = False
    ) -> None:
        """With release; `relaxed`: visible is only what kernels before ours have done."""
        stores, reads = v.get(word)
        over = v.is_over(v.thread)
        late = [who for who, when in reads if over[who] < when]
        if late:
            name, who = describe(word.name), v.who(late[0])
            text = f"{v.who(v.thread)} overwrites {name}; the read by {who} is not over"
            raise Violation(OVERWRITE, text)
        clock = v.get(self.launched[self.of_thread[v.thread]]) if relaxed else v.clock(v.thread)
        kept = stores if self.remembers(word) else ()
        v.put(word, ((*kept, Store(number, content, clock, over)), ()))
        v.tick(v.thread)

    def remembers(self, word: Place) -> bool:
        return self.reduced or word.name[0] not in ("head", "numbers", "released", "pulled")

    def last(self, v: View, word: Place) -> int:
        return int(v.get(word)[0][-1].number)

    def acquire(self, v: View, word: Place, wanted: int) -> Any:
        """The first store that reaches the number; BLOCKED until there is one."""
        found = next((s for s in v.get(word)[0] if s.number >= wanted), None)
        if found is None:
            return BLOCKED
        v.join(v.thread, found.clock)
        self.learn(v, v.thread, found.loads)
        return found

    def wait(self, v: View, word: Place, wanted: int) -> Any:
        return BLOCKED if self.acquire(v, word, wanted) is BLOCKED else None

    def learn(self, v: View, thread: int, loads: tuple[int, ...]) -> None:
        place = self.machine.loads[thread]
        v.put(place, tuple(map(max, v.get(place), loads)))

    def read(self, v: View, word: Place, seq: int) -> Any:
        """What a packed word says of operation `seq`, which it has reached."""
        if self.last(v, word) > seq:
            text = f"{v.says(v.thread, 'looks for #' + str(seq) + ' in', word)}"
            raise Violation(OVERWRITE, f"{text}, where #{self.last(v, word)} stands")
        content = self.acquire(v, word, seq).content
        stores, reads = v.get(word)
        mine = (v.thread, v.clock(v.thread)[v.thread])
        others = [r for r in reads if r[0] != v.thread]
        v.put(word, (stores, (*sorted([*others, mine]),)))
        return content

    def pass_on(self, v: View, source: int, target: int) -> None:
        """A fence of the proxy, or copies that are complete."""
        self.learn(v, target, v.is_over(source))
        v.pass_on(source, target)

    # ---- the host: what it begins, waits for, lends and frees

    def host_steps(self, r: int) -> list[Step]:
        steps: list[Step] = []
        for i, (verb, k) in enumerate(self.actions[r]):
            steps.append(
                Step(f"{verb}s call {k}", lambda v, i=i: self.host_acts(v, r, i), local=True)
            )
        return [*steps, Step("ends", lambda v: self.host_ends(v, r), local=True)]

    def host_acts(self, v: View, r: int, i: int) -> Any:
        verb, k = self.actions[r][i]
        act = getattr(self, f"host_{verb}", None)
        if act is not None and act(v, r, k) is BLOCKED:
            return BLOCKED
        self.store(v, self.issued[r], i + 1)
        return None

    def host_ends(self, v: View, r: int) -> None:
        self.store(v, self.jobs[r], self.last(v, self.jobs[r]) + 1, END)
        self.store(v, self.issued[r], self.last(v, self.issued[r]) + 1, END)

    def host_begin(self, v: View, r: int, k: int) -> None:
        op = self.ops[k]
        origin = op.handle_of(r)
        if origin != END and not self.has_handle(v, r, origin):
            v.put(self.verdict[r, k], SKIPPED)
            return
        if op.fails.get(r) != "invalid":
            v.put(self.output[r, k], self.lend(v, r, k))
        number = self.last(v, self.jobs[r]) + 1
        v.put(self.number[r, k], number)
        self.store(v, self.jobs[r], number, (k, self.seq_of(number), v.get(self.output[r, k])))

    def seq_of(self, number: int) -> int:
        return self.first_seq + number - 1

    def has_handle(self, v: View, r: int, k: int) -> bool:
        """The call returned, which a static one does in any case."""
        if self.ops[k].static:
            return bool(v.get(self.number[r, k]))
        return bool(self.told(v, r, k) == OK)

    def told(self, v: View, r: int, k: int) -> Any:
        """What the report said of a call the host has waited for."""
        seq = self.seq_of(v.get(self.number[r, k]))
        return next((s.content for s in v.get(self.reports[r])[0][1:] if s.number == seq), None)

    def lend(self, v: View, r: int, k: int) -> int:
        """The extent a kernel is told of, granted before anybody knows what comes."""
        op, beside = self.ops[k], self.is_begun(r, k)
        if op.kind == "combine" and not op.staged:
            extent: int = v.get(self.output[r, op.handle_of(r)])
            self.keep(v, r, k, extent, beside)
            return extent
        extent = END if op.fails.get(r) == "no extent" else self.grant(v, r, beside)
        if op.staged and extent != END:
            self.hold(v, r, extent, -1)  # it returns behind the kernels that read it
        elif extent != END:
            v.put(self.held[r, k], True)
        return extent

    def keep(self, v: View, r: int, k: int, extent: int, begun: bool) -> None:
        """A begun combine holds y: its user may free the tensor meanwhile."""
        if begun and extent != END:
            self.hold(v, r, extent)
            v.put(self.held[r, k], True)

    def is_begun(self, r: int, k: int) -> bool:
        """On a stream beside the caller's."""
        return ("begin", k) in self.program.users.get(r, self.program.actions)

    def host_settle(self, v: View, r: int, k: int) -> Any:
        """Copies are queued once the report says where rows go."""
        if v.get(self.verdict[r, k]) == SKIPPED:
            return None
        if self.host_wait(v, r, k) is BLOCKED:
            return BLOCKED
        if self.told(v, r, k) == OK:
            self.store(v, self.halves[r], v.get(self.number[r, k]), k)
        return None

    def host_wait(self, v: View, r: int, k: int) -> Any:
        """For the report, if there is one. A call that failed gives its extent back."""
        op = self.ops[k]
        if not v.get(self.number[r, k]) or op.fails.get(r) == "invalid":
            return None
        if op.kind == "combine":
            self.give_back(v, r, k)
        elif not op.static:
            if self.wait(v, self.reports[r], self.seq_of(v.get(self.number[r, k]))) is BLOCKED:
                return BLOCKED
            if self.told(v, r, k) != OK:
                self.give_back(v, r, k)
        return None

    def give_back(self, v: View, r: int, k: int) -> None:
        if v.get(self.held[r, k]):
            self.hold(v, r, v.get(self.output[r, k]), -1)
            v.put(self.held[r, k], False)

    def host_free(self, v: View, r: int, k: int) -> None:
        if self.has_handle(v, r, k):
            self.give_back(v, r, k)

    def host_empty(self, v: View, r: int, k: int) -> None:
        """Memory of the arena for the user itself (Buffer.empty), written to and given back."""
        beside = [used for holders, used in v.get(self.pool[r]) if holders == 0][:1]
        extent = self.grant(v, r, False)
        v.put(self.spare[r, k], (extent, self.last(v, self.jobs[r]) if beside == [True] else 0))
        if extent != END:
            self.hold(v, r, extent, -1)

    def grant(self, v: View, r: int, beside: bool) -> int:
        """The lowest extent that nobody holds, for work on the caller's stream or beside it."""
        extents = v.get(self.pool[r])
        for extent, (holders, _) in enumerate(extents):
            if holders == 0:
                v.put(self.pool[r], (*extents[:extent], (1, beside), *extents[extent + 1 :]))
                return extent
        return END

    def hold(self, v: View, r: int, extent: int, change: int = 1) -> None:
        extents = v.get(self.pool[r])
        holders, beside = extents[extent]
        if holders + change < 0:
            raise Violation(EXTENTS, f"extent {extent} of rank {r} is given back twice")
        changed = (holders + change, beside)
        v.put(self.pool[r], (*extents[:extent], changed, *extents[extent + 1 :]))

    # ---- the caller's stream: launches, and what the user's own kernels do with outputs and y

    def caller_steps(self, r: int) -> list[Step]:
        return [
            Step(self.says(verb, k), lambda v, i=i: self.caller_acts(v, r, i), local=True)
            for i, (verb, k) in enumerate(self.actions[r])
        ]

    def says(self, verb: str, k: int) -> str:
        words = {"begin": "allows", "wait": "follows", "empty": "writes for itself beside"}
        return f"{words.get(verb, verb + 's')} call {k}"

    def caller_acts(self, v: View, r: int, i: int) -> Any:
        """As far as the host has issued it."""
        verb, k = self.actions[r][i]
        act = getattr(self, f"caller_{verb}", None)
        if self.wait(v, self.issued[r], i + 1) is BLOCKED:
            return BLOCKED
        return None if act is None else act(v, r, k)

    def caller_begin(self, v: View, r: int, k: int) -> None:
        """Writes y, then lets the kernels go."""
        op = self.ops[k]
        if not (number := v.get(self.number[r, k])):
            return
        if op.kind == "combine" and not op.staged and v.get(self.output[r, k]) != END:
            self.write_y(v, r, k, v.get(self.output[r, k]))
        self.store(v, self.reached[r], number)

    def caller_wait(self, v: View, r: int, k: int) -> Any:
        """What follows comes after the operation; a refusal raises, and nothing waits for it."""
        raised = self.is_begun(r, k) and self.ops[k].fails.get(r) == "invalid"
        return None if raised else self.join(v, r, v.get(self.number[r, k]))

    def join(self, v: View, r: int, number: int) -> Any:
        words = [self.ended[r, b] for b in (SPEAKER, MOVER)]
        if any(self.last(v, word) < number for word in words):
            return BLOCKED
        for word in words:
            self.acquire(v, word, number)
        return None

    def caller_use(self, v: View, r: int, k: int) -> None:
        if v.get(self.verdict[r, k]) != OK:
            return
        extent, row = v.get(self.output[r, k]), 0
        for src in self.ranks:
            for i in range(self.num_rows(v, r, k, src, r)):
                tag, want = v.read(self.rows[r, extent, row], k), ("x", k, src, i)
                if tag != want:
                    raise Violation(WRONG_DATA, f"rank {r} reads {tag}, wants {want}")
                row += 1

    def caller_reuse(self, v: View, r: int, k: int) -> None:
        """Overwrites the y it gave to combine k."""
        if v.get(self.number[r, k]) and not self.ops[k].staged:
            self.scratch(v, r, k, v.get(self.output[r, k]))

    def caller_empty(self, v: View, r: int, k: int) -> Any:
        """Behind the other streams that used the extent."""
        extent, number = v.get(self.spare[r, k])
        if self.join(v, r, number) is BLOCKED:
            return BLOCKED
        self.scratch(v, r, k, extent)
        return None

    def scratch(self, v: View, r: int, k: int, extent: int) -> None:
        for row in range(EXTENT_ROWS if extent != END else 0):
            v.write(self.rows[r, extent, row], ("scratch", k + 1, row))

    # ---- rows

    def num_rows(self, v: View, rank: int, k: int, src: int, dst: int) -> int:
        """As `rank` knows it: a handle of a static call that failed has no rows."""
        while self.ops[k].kind != "dispatch":
            k = self.ops[k].handle_of(rank)
            if v.get(self.verdict[rank, k]) != OK:
                return 0
        return ROUTINGS[self.ops[k].routing][src][dst]

    def write_y(self, v: View, r: int, k: int, extent: int) -> None:
        for row in range(self.num_received(v, r, k)):
            v.write(self.rows[r, extent, row], ("y", k, row))

    def num_received(self, v: View, r: int, k: int) -> int:
        return sum(self.num_rows(v, r, k, src, r) for src in self.ranks)

    # ---- at the end

    def check_final(self, v: View) -> None:
        queues = [[s.content[:2] for s in v.get(self.jobs[r])[0][1:-1]] for r in self.ranks]
        for r in self.ranks:
            if queues[r] != queues[0]:
                raise Violation(WRONG_CALL, f"rank {r} made other calls than rank 0")
            if held := [extent for extent, (n, _) in enumerate(v.get(self.pool[r])) if n]:
                raise Violation(EXTENTS, f"rank {r} still holds {held}")
            for slot in range(self.num_slots):
                last = max((seq for _, seq in queues[r] if seq % self.num_slots == slot), default=0)
                self.check_slot(v, r, slot, last)

    def check_slot(self, v: View, r: int, slot: int, last: int) -> None:
        for p in self.ranks:
            if (released := self.last(v, self.released[r, slot, p])) != last:
                text = f"rank {p} left slot {slot} of rank {r} released up to {released}"
                raise Violation(CREDIT, text)
            arrived, expected = v.peek(self.arrived[r, slot, p]), self.expected[r, slot, p]
            if arrived != v.get(expected):
                text = f"rank {r} counts {arrived} rows of rank {p} in slot {slot}"
                raise Violation(CREDIT, text)

    def outcome(self, v: View) -> tuple[Any, ...]:
        return tuple(v.get(self.verdict[r, k]) for r in self.ranks for k in range(len(self.ops)))

    def context(self, v: View) -> str:
        if v.thread not in self.of_thread:
            return ""
        k, seq, _ = v.get(self.job[self.of_thread[v.thread]])
        return f"{self.ops[k].kind} #{seq} " if seq else ""
