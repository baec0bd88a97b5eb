"""Rails: dispatch and combine over two levels, as docs/protocol.md has them ("Rails").

Every rank has a thread that runs its operations one after the other (entries, relay, verdict, the
end), and threads for the roles of its kernels: *mover* (of a channel: own node and rails),
*forwarder* (one for each place of a ring), *puller* (one for each ring: pulls, adds, sends),
*reducer* (of a channel). NIC threads carry out the puts of a rail, one for each place of a ring, as
nothing orders two puts, and one for entries; they read what they send when they get to it. Bulk
copies are made by an agent of each role, in a proxy of its own.

What is abstracted, and why it loses nothing:

* A chunk holds one record. Records of a chunk are written, put, read and credited together.
* A role that serves several rings and never waits for one while another could advance (forwarder,
  puller) is as many threads: they can do what it can, in any order, and are ordered by less.
* Movers and reducers of a channel are one thread, which takes tokens in order and waits for each:
  more of them, if they take tokens in order, only wait less.
* The host's grant: a dispatch writes to the extent of the one before the last. Who grants, and why
  it is free, is the other model's concern (protocol.py).
* Arithmetic, rows in pieces, weights, scales: they travel with the record.

**One run for all interleavings.** Steps do only four things: wait until a word has reached a value
(never that it has not), release such a word, add to a word whose only reader waits for the sum of
all adds, and access cells. Releases of a word are ordered among themselves: it has one writer, or
writers that take turns (roles of one rank in different operations). Then any two steps of different
threads commute: a release can only enable a wait and never undo it; a wait acquires what the
*first* satisfying release published (`counter`), whatever came later, which is the least that any
execution acquires there; the sum of all adds has the clocks of all, in whatever order; and accesses
to a cell that clocks do not order are violations in either order, while those that they order have
one order. So all maximal runs take the same steps and end alike: one deadlocks or races exactly if
every one does. `reduced=True` makes all steps local, and the explorer walks a single run.

The premises are checked in every run (`View.advance`, `all_added`), the argument in the tests:
small clusters are also explored with ordinary words, in every interleaving, and say the same of the
protocol and of each mistake; larger ones are walked at random. A mistake that breaks a premise (two
transports that add to one word) has a model of its own, which is explored in full.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .explorer import BLOCKED, Machine, Place, Step, Thread, View, Violation

WRONG_DATA = "wrong data"
WRONG_CALL = "ranks paired in different calls"
CREDIT = "lost credit"

MAILBOXES = 2
EXTENTS = 2  # outputs alternate between two


@dataclass(frozen=True)
class Op:
    kind: str  # dispatch, combine (of the last dispatch that did not fail)
    refused: frozenset[int] = frozenset()  # ranks that reject their arguments

    @property
    def fails(self) -> bool:
        return bool(self.refused)


D, C = Op("dispatch"), Op("combine")


def refused(op: Op, *ranks: int) -> Op:
    return replace(op, refused=frozenset(ranks))


Tokens = tuple[frozenset[int], ...]  # of one channel: the ranks each token visits


@dataclass(frozen=True)
class Cluster:
    """Who sends what, and what is called."""

    num_nodes: int = 2
    ranks_per_node: int = 2
    num_channels: int = 2
    ring: int = 1  # chunks
    num_slots: int = 2
    ops: Sequence[Op] = (D, C, D, C)
    routes: dict[tuple[int, int], Tokens] = field(default_factory=dict)  # (rank, channel)

    @property
    def ranks(self) -> range:
        return range(self.num_nodes * self.ranks_per_node)

    @property
    def channels(self) -> range:
        return range(self.num_channels)

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def on_node(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    def near(self, rank: int) -> range:
        return self.on_node(self.node(rank))

    def peers(self, rank: int) -> list[int]:
        """Other nodes, each rank beginning with the next one."""
        n = self.num_nodes
        return [(self.node(rank) + i) % n for i in range(1, n)]

    def across(self, rank: int, node: int) -> int:
        """The rank of a node on this rank's rail."""
        return node * self.ranks_per_node + rank % self.ranks_per_node

    def tokens(self, rank: int, channel: int) -> Tokens:
        return self.routes.get((rank, channel), ())

    def records(self, rank: int, node: int, channel: int) -> list[int]:
        """Tokens of a channel that visit a node."""
        there = set(self.on_node(node))
        return [t for t, ranks in enumerate(self.tokens(rank, channel)) if ranks & there]

    def row(self, dst: int, src: int, channel: int, token: int) -> int:
        """Every rank computes all rows from the counts of all: by source, then token."""
        before = 0
        for r in self.ranks:
            for c in self.channels:
                for t, ranks in enumerate(self.tokens(r, c)):
                    if (r, c, t) == (src, channel, token):
                        return before
                    before += dst in ranks
        raise AssertionError("no such token")

    def arriving(self, dst: int, src: int) -> list[tuple[int, int]]:
        """(channel, token) of a source at dst."""
        return [
            (c, t)
            for c in self.channels
            for t, ranks in enumerate(self.tokens(src, c))
            if dst in ranks
        ]

    def num_rows(self, dst: int) -> int:
        return sum(len(self.arriving(dst, src)) for src in self.ranks)


def cluster(seed: int = 0, num_tokens: int = 2, **options: Any) -> Cluster:
    """Random routes: of a rank none to `num_tokens` tokens a channel, each to none to all ranks."""
    shape = Cluster(**options)
    draw = random.Random(seed)
    routes: dict[tuple[int, int], Tokens] = {}
    for r in shape.ranks:
        for c in shape.channels:
            count = draw.choice([0, num_tokens, num_tokens])
            routes[r, c] = tuple(
                frozenset(p for p in shape.ranks if draw.random() < 0.6) for _ in range(count)
            )
    return replace(shape, routes=routes)


def everywhere(num_tokens: int = 2, **options: Any) -> Cluster:
    """Every token visits every rank: most chunks, most waits."""
    shape = Cluster(**options)
    tokens = (frozenset(shape.ranks),) * num_tokens
    return replace(shape, routes={(r, c): tokens for r in shape.ranks for c in shape.channels})


Ring = tuple[int, int, int]  # rank, peer node, channel


class Role:
    """A role's thread, and the agent that makes its bulk copies; whoever runs a step of the role
    fences and waits.
    """

    def __init__(self, machine: Machine, name: str):
        self.thread: Thread = machine.thread(name)
        self.bulk = machine.thread(f"{name}, bulk").number
        self.steps: list[Step] = []

    def fence(self, v: View) -> None:
        """fence.proxy.async: what we have acquired comes before copies issued from now on."""
        v.pass_on(v.thread, self.bulk)

    def wait_copies(self, v: View) -> None:
        """wait_group 0, or the mbarrier: what was copied comes before what we do next."""
        v.pass_on(self.bulk, v.thread)


class Rails:
    """The machine that runs one cluster. Subclasses break single methods."""

    def __init__(self, shape: Cluster, *, reduced: bool = True):
        self.shape = s = shape
        self.reduced = reduced
        self.machine = Machine(describe)
        self.machine.check_final = self.check_final
        self.rings: list[Ring] = [
            (r, b, c) for r in s.ranks for b in s.peers(r) for c in s.channels
        ]
        self._threads()
        self._places()
        # Chunks ever put into and taken out of each ring, as the program unrolls.
        self.sent = dict.fromkeys(self.rings, 0)
        self.taken = dict.fromkeys(self.rings, 0)
        self.announced = {(r, p): [0] * s.num_slots for r in s.ranks for p in s.ranks}
        self.finished = dict.fromkeys(s.ranks, 0)
        self.output = -1  # extent of the last dispatch
        self.last = -1  # and which operation that was
        for k, op in enumerate(s.ops):
            self.unroll(k, op)
        for r in s.ranks:
            self.main[r].program(self.main_steps[r])
        for role in self.roles():
            role.thread.program(role.steps)
        for *ring, place in self.nic:
            self.nic[(*ring, place)].program(self.nic_steps((*ring,), place))
        for r in s.ranks:
            for b in s.peers(r):
                self.entry_nic[r, b].program(self.entry_nic_steps(r, b))

    # ---- memory

    def _threads(self) -> None:
        m, s = self.machine, self.shape
        self.main = {r: m.thread(f"rank {r}") for r in s.ranks}
        self.main_steps: dict[int, list[Step]] = {r: [] for r in s.ranks}
        self.mover = {(r, c): Role(m, f"rank {r} mover {c}") for r in s.ranks for c in s.channels}
        self.forwarder = {
            (*ring, i): Role(m, f"rank {ring[0]} forwarder {ring[2]} from node {ring[1]}, {i}")
            for ring in self.rings
            for i in range(s.ring)
        }
        self.puller = {
            ring: Role(m, f"rank {ring[0]} puller {ring[2]} for node {ring[1]}")
            for ring in self.rings
        }
        self.reducer = {
            (r, c): Role(m, f"rank {r} reducer {c}") for r in s.ranks for c in s.channels
        }
        self.nic = {
            (*ring, i): m.thread(f"NIC of rank {ring[0]}, channel {ring[2]} to node {ring[1]}, {i}")
            for ring in self.rings
            for i in range(s.ring)
        }
        self.entry_nic = {
            (r, b): m.thread(f"NIC of rank {r}, entries to node {b}")
            for r in s.ranks
            for b in s.peers(r)
        }

    def roles(self) -> Iterator[Role]:
        for group in (self.mover, self.forwarder, self.puller, self.reducer):
            yield from group.values()  # type: ignore[attr-defined]

    def word(self, *name: Any) -> Place:
        """Of one writer."""
        return self.machine.counter(*name) if self.reduced else self.machine.word(*name)

    def _places(self) -> None:
        m, s = self.machine, self.shape
        slots, boxes = range(s.num_slots), range(self.mailboxes())
        trio = [(at, slot, p) for at in s.ranks for slot in slots for p in s.ranks]
        near = [i for i in trio if i[2] in s.near(i[0])]
        self.entry = {i: m.cell("entry", *i) for i in trio}
        self.entry_seq = {i: self.word("entry.seq", *i) for i in trio}
        self.released = {i: self.word("released", *i) for i in near}
        self.pulled = {i: self.word("pulled", *i) for i in near}
        self.arrived = {i: m.word("arrived", *i) for i in trio}  # several add
        mail = [(r, box, b) for r in s.ranks for box in boxes for b in s.peers(r)]
        self.inbox = {i: m.cell("inbox", *i) for i in mail}
        self.outbox = {i: m.cell("outbox", *i) for i in mail}
        self.entered = {i: self.word("entered", *i) for i in mail}
        self.mailed = {(r, b): self.word("mailed", r, b) for r in s.ranks for b in s.peers(r)}
        places = [(*ring, place) for ring in self.rings for place in range(s.ring)]
        self.send = {i: m.cell("send", *i) for i in places}
        self.recv = {i: m.cell("recv", *i) for i in places}
        self.posted = {i: self.word("posted", *i) for i in places}
        self.tail = {i: self.word("tail", *i) for i in places}
        self.head = {i: self.word("head", *i) for i in places}
        self.rows = {
            (r, e, i): m.cell("row", r, e, i)
            for r in s.ranks
            for e in range(EXTENTS)
            for i in range(s.num_rows(r))
        }
        self.go = {r: self.word("go", r) for r in s.ranks}
        self.done = {r: m.word("done", r) for r in s.ranks}  # roles add

    def mailboxes(self) -> int:
        return MAILBOXES

    # ---- words

    def release(self, v: View, word: Place, value: int) -> None:
        if self.reduced:
            v.advance(word, value)
        else:
            v.release(word, value)

    def reached(self, v: View, word: Place, wanted: int) -> Any:
        """Acquires the word, or waits."""
        have = v.count(word) if self.reduced else v.peek(word)
        if have < wanted:
            return BLOCKED
        if self.reduced:
            v.acquire_first(word, wanted)
        else:
            v.acquire(word)
        return None

    def all_added(self, v: View, word: Place, wanted: int) -> Any:
        """For words that several add to: their sum, never more."""
        have = v.peek(word)
        if have > wanted:
            raise Violation(CREDIT, f"{describe(word.name)} counts {have}, not {wanted}")
        if have < wanted:
            return BLOCKED
        v.acquire(word)
        return None

    def wait(self, text: str, word: Place, wanted: int) -> Step:
        return Step(text, lambda v: self.reached(v, word, wanted), local=True)

    def do(self, text: str, act: Any, *, local: bool = False) -> Step:
        """What others may see the moment it happens; `local`: cells only, clocks tell the rest."""
        return Step(text, act, local=local or self.reduced)

    # ---- one operation, on all ranks

    def unroll(self, k: int, op: Op) -> None:
        s, seq = self.shape, k + 1
        source, extent = self.last, self.output
        if op.kind == "dispatch" and not op.fails:
            self.last, self.output = k, k % EXTENTS
            source, extent = k, self.output
        for r in s.ranks:
            if op.kind == "combine" and extent >= 0:
                self.main_steps[r].append(
                    self.do("writes y", lambda v, r=r: self.write_y(v, r, seq, extent), local=True)
                )
            self.main_steps[r] += self.enter(r, seq, op)
            if r in op.refused:
                self.main_steps[r] += self.leave(r, seq)
                continue
            self.main_steps[r].append(self.read_entries(r, seq, op))
            if op.fails:
                self.main_steps[r] += self.leave(r, seq)
                continue
            self.main_steps[r].append(
                self.do(f"starts the roles of #{seq}", lambda v, r=r: self.start(v, r, seq))
            )
            body = self.dispatch if op.kind == "dispatch" else self.combine
            self.main_steps[r] += body(r, seq, source, extent)
            self.main_steps[r] += self.leave(r, seq)
        if op.fails:
            return
        for r in s.ranks:
            (self.dispatch_roles if op.kind == "dispatch" else self.combine_roles)(
                r, seq, source, extent
            )

    def start(self, v: View, r: int, seq: int) -> None:
        self.release(v, self.go[r], seq)

    # ---- entries: told to the own node, put to the rail, relayed

    def enter(self, r: int, seq: int, op: Op) -> list[Step]:
        s, slot = self.shape, seq % self.shape.num_slots
        steps = [
            self.wait(
                f"finds slot of #{seq} released by rank {p}",
                self.released[r, slot, p],
                seq - s.num_slots,
            )
            for p in s.near(r)
        ]
        steps += [self.tell(r, r, p, seq, op) for p in s.near(r)]
        for b in s.peers(r):
            steps.append(
                self.do(
                    f"posts its entry #{seq} to node {b}",
                    lambda v, b=b: self.mail(v, r, b, seq, op),
                )
            )
        return steps + [step for b in s.peers(r) for step in self.relay(r, b, seq, op)]

    def tell(self, r: int, src: int, p: int, seq: int, op: Op) -> Step:
        slot = seq % self.shape.num_slots

        def act(v: View) -> None:
            v.write(self.entry[p, slot, src], ("entry", seq, src, src in op.refused))
            self.release(v, self.entry_seq[p, slot, src], seq)

        return self.do(f"writes the entry of rank {src} #{seq} to rank {p}", act)

    def mail(self, v: View, r: int, b: int, seq: int, op: Op) -> None:
        box = seq % self.mailboxes()
        v.write(self.outbox[r, box, b], ("entry", seq, r, r in op.refused))
        self.release(v, self.mailed[r, b], seq)

    def relay(self, r: int, b: int, seq: int, op: Op) -> list[Step]:
        """Also of a call that this rank refuses: its node hears of node b through it alone."""
        s, src, box = self.shape, self.shape.across(r, b), seq % self.mailboxes()
        uses = sum(1 for n in range(1, seq + 1) if n % self.mailboxes() == box)
        return [
            self.wait(f"has entry #{seq} of node {b}", self.entered[r, box, b], uses),
            self.do(f"reads entry #{seq}", lambda v: self.read_mail(v, r, b, seq), local=True),
            *(self.tell(r, src, p, seq, op) for p in s.near(r)),
        ]

    def read_mail(self, v: View, r: int, b: int, seq: int) -> None:
        tag = v.read(self.inbox[r, seq % self.mailboxes(), b], seq)
        if tag[1] != seq:
            raise Violation(WRONG_CALL, f"rank {r} relays entry #{tag[1]} in #{seq}")

    def entry_nic_steps(self, r: int, b: int) -> list[Step]:
        s, there = self.shape, self.shape.across(r, b)
        steps: list[Step] = []
        for seq in range(1, len(s.ops) + 1):
            box = seq % self.mailboxes()
            uses = sum(1 for n in range(1, seq + 1) if n % self.mailboxes() == box)

            def carry(v: View, box: int = box, seq: int = seq, uses: int = uses) -> None:
                tag = v.read(self.outbox[r, box, b], seq)
                v.write(self.inbox[there, box, s.node(r)], tag)
                self.release(v, self.entered[there, box, s.node(r)], uses)

            steps.append(self.wait(f"is given entry #{seq}", self.mailed[r, b], seq))
            steps.append(self.do(f"carries entry #{seq} to rank {there}", carry))
        return steps

    def read_entries(self, r: int, seq: int, op: Op) -> Step:
        s, slot = self.shape, seq % self.shape.num_slots

        def act(v: View) -> Any:
            have = [v.count(w) if self.reduced else v.peek(w) for w in words]
            if any(n < seq for n in have):
                return BLOCKED
            for src, word in zip(s.ranks, words, strict=True):
                self.reached(v, word, seq)
                tag = v.read(self.entry[r, slot, src], seq)
                if tag[1:] != (seq, src, src in op.refused):
                    raise Violation(WRONG_CALL, f"rank {r} in #{seq} reads {tag} of rank {src}")
            return None

        words = [self.entry_seq[r, slot, src] for src in s.ranks]
        return Step(f"has all entries of #{seq}", act, local=True)

    def leave(self, r: int, seq: int) -> list[Step]:
        slot = seq % self.shape.num_slots
        return [
            self.do(
                f"releases the slot of #{seq} to rank {p}",
                lambda v, p=p: self.release(v, self.released[p, slot, r], seq),
            )
            for p in self.shape.near(r)
        ]

    # ---- main of an operation that moves rows

    def dispatch(self, r: int, seq: int, k: int, extent: int) -> list[Step]:
        s, slot = self.shape, seq % self.shape.num_slots
        steps: list[Step] = []
        for src in s.ranks:
            self.announced[r, src][slot] += len(s.arriving(r, src))
            total, word = self.announced[r, src][slot], self.arrived[r, slot, src]
            steps.append(
                Step(
                    f"has all rows of rank {src}",
                    lambda v, w=word, n=total: self.all_added(v, w, n),
                    local=True,
                )
            )
        return [
            *steps,
            self.do("reads its rows", lambda v: self.use(v, r, k, extent), local=True),
            self.ended(r, seq),
        ]

    def combine(self, r: int, seq: int, k: int, extent: int) -> list[Step]:
        s, slot = self.shape, seq % self.shape.num_slots
        return [
            self.ended(r, seq),
            *(
                self.do(
                    f"tells rank {p} that its y is pulled",
                    lambda v, p=p: self.release(v, self.pulled[p, slot, r], seq),
                )
                for p in s.near(r)
            ),
            *(self.wait(f"is pulled by rank {p}", self.pulled[r, slot, p], seq) for p in s.near(r)),
            self.do("overwrites y", lambda v: self.scratch(v, r, seq, extent), local=True),
        ]

    def ended(self, r: int, seq: int) -> Step:
        """The end of the kernel: all its roles."""
        s = self.shape
        rings = (s.num_nodes - 1) * s.num_channels
        self.finished[r] += s.num_channels + rings * (s.ring if self.is_dispatch(seq) else 1)
        total = self.finished[r]
        return Step(
            f"sees the roles of #{seq} end",
            lambda v: self.all_added(v, self.done[r], total),
            local=True,
        )

    def is_dispatch(self, seq: int) -> bool:
        return self.shape.ops[seq - 1].kind == "dispatch"

    def use(self, v: View, r: int, k: int, extent: int) -> None:
        for src in self.shape.ranks:
            for c, t in self.shape.arriving(r, src):
                row = self.rows[r, extent, self.shape.row(r, src, c, t)]
                self.expect(v, row, ("x", k + 1, src, c, t), self.main[r].number)

    def write_y(self, v: View, r: int, seq: int, extent: int) -> None:
        for i in range(self.shape.num_rows(r)):
            v.write(self.rows[r, extent, i], ("y", seq, i))

    def scratch(self, v: View, r: int, seq: int, extent: int) -> None:
        for i in range(self.shape.num_rows(r)):
            v.write(self.rows[r, extent, i], ("scratch", seq, i))

    def expect(self, v: View, cell: Place, tag: tuple[Any, ...], by: int) -> None:
        got = v.read(cell, tag[1], by=by)
        if got != tag:
            raise Violation(WRONG_DATA, f"{describe(cell.name)} holds {got}, not {tag}")

    # ---- roles of dispatch

    def dispatch_roles(self, r: int, seq: int, k: int, extent: int) -> None:
        for c in self.shape.channels:
            self.move(r, c, seq, extent)
        for a in self.shape.peers(r):
            for c in self.shape.channels:
                self.forward_records(r, a, c, seq, extent)

    def move(self, r: int, c: int, seq: int, extent: int) -> None:
        """Tokens in order, each to ranks of its own node and onto the rail of every other one; none
        passes one that waits for a credit.
        """
        s, role = self.shape, self.mover[r, c]
        role.steps += self.begin(role, r, seq)
        for t, ranks in enumerate(s.tokens(r, c)):
            for p in [p for p in s.near(r) if p in ranks]:
                role.steps += self.store(role, r, c, t, p, seq, extent)
            for b in [b for b in s.peers(r) if t in s.records(r, b, c)]:
                role.steps += self.send_record(role, r, b, c, t, seq)
        role.steps += self.finish(r, seq)

    def send_record(self, role: Role, r: int, b: int, c: int, t: int, seq: int) -> list[Step]:
        return self.put(role, (r, b, c), ("record", seq, r, c, t), lambda v: None)

    def begin(self, role: Role, r: int, seq: int) -> list[Step]:
        """What the rank has acquired comes before what its roles copy."""
        return [
            self.wait(f"begins #{seq}", self.go[r], seq),
            self.do("fences", role.fence, local=True),
        ]

    def finish(self, r: int, seq: int) -> list[Step]:
        return [self.do(f"ends #{seq}", lambda v: v.add(self.done[r], 1))]

    def store(
        self, role: Role, src: int, c: int, t: int, p: int, seq: int, extent: int
    ) -> list[Step]:
        """A row to its final place, then its arrival."""
        row, slot = self.rows[p, extent, self.shape.row(p, src, c, t)], seq % self.shape.num_slots

        def copy(v: View) -> None:
            v.write(row, ("x", seq, src, c, t), by=role.bulk)
            self.drain_rows(v, role)

        return [
            self.do(f"stores token {t} at rank {p}", copy, local=True),
            self.do(
                f"adds it to what rank {p} has of rank {src}",
                lambda v: v.add(self.arrived[p, slot, src], 1),
            ),
        ]

    def drain_rows(self, v: View, role: Role) -> None:
        role.wait_copies(v)

    def put(self, role: Role, ring: Ring, tag: tuple[Any, ...], load: Any) -> list[Step]:
        """A chunk: a credit, staged, handed to the NIC."""
        n = self.sent[ring]
        self.sent[ring] += 1
        cell = self.send[(*ring, n % self.shape.ring)]

        def stage(v: View) -> None:
            role.fence(v)  # what the credit covers, before copies over it
            load(v)
            v.write(cell, tag, by=role.bulk)
            self.drain_stage(v, role)

        return [
            self.credit(ring, n),
            self.do(f"stages chunk {n}", stage, local=True),
            self.do(f"posts chunk {n}", lambda v: self.post(v, ring, n)),
        ]

    def credit(self, ring: Ring, n: int) -> Step:
        """The receiver has taken what lay there, so the put is complete, too."""
        word, count = self.of_place(self.head, ring, n)
        return self.wait(f"has room for chunk {n}", word, count - 1)

    def post(self, v: View, ring: Ring, n: int) -> None:
        self.release(v, *self.of_place(self.posted, ring, n))

    def of_place(self, words: dict[Any, Place], ring: Ring, n: int) -> tuple[Place, int]:
        """Words are of a place in a ring: which one, and what it counts with chunk n."""
        return words[(*ring, n % self.shape.ring)], n // self.shape.ring + 1

    def drain_stage(self, v: View, role: Role) -> None:
        """Bulk stores complete, then a system-scope fence, before the doorbell."""
        role.wait_copies(v)

    def nic_steps(self, ring: Ring, place: int) -> list[Step]:
        """Puts with signal: data first, then the count."""
        steps: list[Step] = []
        for n in range(place, self.sent[ring], self.shape.ring):
            steps.append(self.wait(f"is given chunk {n}", *self.of_place(self.posted, ring, n)))
            steps += self.carry(ring, n)
        return steps

    def carry(self, ring: Ring, n: int) -> list[Step]:
        return [
            self.do(f"copies chunk {n}", lambda v: self.copy_chunk(v, ring, n), local=True),
            self.do(f"counts chunk {n}", lambda v: self.count_chunk(v, ring, n)),
        ]

    def copy_chunk(self, v: View, ring: Ring, n: int) -> None:
        place = n % self.shape.ring
        tag = v.read(self.send[(*ring, place)], 1 << 30)
        v.write(self.recv[(*self.reverse(ring), place)], tag)

    def count_chunk(self, v: View, ring: Ring, n: int) -> None:
        self.release(v, *self.of_place(self.tail, self.reverse(ring), n))

    def reverse(self, ring: Ring) -> Ring:
        """The same rail and channel, seen from its other end."""
        r, b, c = ring
        return self.shape.across(r, b), self.shape.node(r), c

    def forward_records(self, r: int, a: int, c: int, seq: int, extent: int) -> None:
        """Side by side: a forwarder for each place of a ring."""
        s, ring, src = self.shape, (r, a, c), self.shape.across(r, a)
        roles = [self.forwarder[(*ring, i)] for i in range(s.ring)]
        for role in roles:
            role.steps += self.begin(role, r, seq)
        for t in s.records(src, s.node(r), c):
            role = roles[self.taken[ring] % s.ring]
            role.steps += self.take(role, ring, ("record", seq, src, c, t))
            for p in [p for p in s.near(r) if p in s.tokens(src, c)[t]]:
                role.steps += self.store(role, src, c, t, p, seq, extent)
        for role in roles:
            role.steps += self.finish(r, seq)

    def take(self, role: Role, ring: Ring, tag: tuple[Any, ...]) -> list[Step]:
        """A chunk out of a ring: acquired, read, and only then credited."""
        n = self.taken[ring]
        self.taken[ring] += 1
        return [
            self.arrival(ring, n),
            self.do(
                f"reads chunk {n}", lambda v: self.read_chunk(v, role, ring, n, tag), local=True
            ),
            self.do(f"credits chunk {n}", lambda v: self.give_credit(v, ring, n)),
        ]

    def arrival(self, ring: Ring, n: int) -> Step:
        return self.wait(f"has chunk {n}", *self.of_place(self.tail, ring, n))

    def read_chunk(self, v: View, role: Role, ring: Ring, n: int, tag: tuple[Any, ...]) -> None:
        self.fence_before_load(v, role)
        self.expect(v, self.recv[(*ring, n % self.shape.ring)], tag, role.bulk)
        self.wait_loads(v, role)

    def fence_before_load(self, v: View, role: Role) -> None:
        role.fence(v)

    def wait_loads(self, v: View, role: Role) -> None:
        role.wait_copies(v)

    def give_credit(self, v: View, ring: Ring, n: int) -> None:
        self.release(v, *self.of_place(self.head, self.reverse(ring), n))

    # ---- roles of combine

    def combine_roles(self, r: int, seq: int, k: int, extent: int) -> None:
        s = self.shape
        for a in s.peers(r):
            for c in s.channels:
                self.send_sums(r, a, c, seq, extent)
        for c in s.channels:
            self.reduce(r, c, seq, extent)

    def send_sums(self, r: int, a: int, c: int, seq: int, extent: int) -> None:
        """For each token of our rail that came here: pull its rows on this node, add, send."""
        s, src, role = self.shape, self.shape.across(r, a), self.puller[r, a, c]
        role.steps += self.begin(role, r, seq)
        for t in s.records(src, s.node(r), c):
            ranks = [p for p in s.near(r) if p in s.tokens(src, c)[t]]
            role.steps += self.put(
                role,
                (r, a, c),
                ("sum", seq, r, c, t),
                lambda v, ranks=ranks, t=t: self.pull(v, role, src, c, t, ranks, seq, extent),
            )
        role.steps += self.finish(r, seq)

    def pull(
        self, v: View, role: Role, src: int, c: int, t: int, ranks: list[int], seq: int, extent: int
    ) -> None:
        for p in ranks:
            i = self.shape.row(p, src, c, t)
            got = v.read(self.rows[p, extent, i], seq, by=role.bulk)
            if got != ("y", seq, i):
                raise Violation(WRONG_DATA, f"row {i} of rank {p} holds {got}")
        role.wait_copies(v)

    def reduce(self, r: int, c: int, seq: int, extent: int) -> None:
        """Own tokens in order; the nodes of a token ascending, our own among them."""
        role = self.reducer[r, c]
        role.steps += self.begin(role, r, seq)
        for t in range(len(self.shape.tokens(r, c))):
            role.steps += self.add_token(role, r, c, t, seq, extent)
        role.steps += self.finish(r, seq)

    def add_token(self, role: Role, r: int, c: int, t: int, seq: int, extent: int) -> list[Step]:
        """All its chunks are there before one is read, and are credited once all are added."""
        s = self.shape
        ranks = s.tokens(r, c)[t]
        arrivals: list[Step] = []
        adds: list[Step] = []
        credits: list[Step] = []
        for node in range(s.num_nodes):
            here = [p for p in s.on_node(node) if p in ranks]
            if node == s.node(r):
                adds.append(
                    self.do(
                        f"adds rows of token {t}",
                        lambda v, here=here: self.pull(v, role, r, c, t, here, seq, extent),
                        local=True,
                    )
                )
            elif here:
                tag = ("sum", seq, s.across(r, node), c, t)
                arrival, *reads, credit = self.take(role, (r, node, c), tag)
                arrivals.append(arrival)
                adds += reads
                credits.append(credit)
        return arrivals + adds + credits

    # ---- at the end

    def check_final(self, v: View) -> None:
        for ring in self.rings:
            back = self.reverse(ring)
            for words, where in ((self.posted, ring), (self.tail, back), (self.head, ring)):
                places = [words[(*where, i)] for i in range(self.shape.ring)]
                count = sum(v.count(w) if self.reduced else v.peek(w) for w in places)
                if count != self.sent[ring]:
                    text = f"{places[0].name[0]} of ring {ring} counts {count}"
                    raise Violation(CREDIT, f"{text}, {self.sent[ring]} were sent")


def describe(name: tuple[Any, ...]) -> str:
    kind, at, *rest = name
    if kind == "row":
        return f"row {rest[1]} of extent {rest[0]} at rank {at}"
    if kind in ("send", "recv"):
        return f"{kind} place {rest[2]} of channel {rest[1]} with node {rest[0]} at rank {at}"
    return f"{kind}{rest} at rank {at}"
