"""Rails with one rule broken at a time, on the smallest cluster that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .explorer import BLOCKED, DEADLOCK, OVERWRITE, UNCOVERED, Machine, Place, Step, View
from .rail import CREDIT, WRONG_DATA, C, Cluster, D, Op, Rails, Ring, Role, everywhere, refused

# ---- credits


class CreditBeforeRead(Rails):
    """The forwarder credits a chunk as soon as it sees it."""

    def take(self, role: Role, ring: Ring, tag: tuple[Any, ...]) -> list[Step]:
        wait, read, credit = super().take(role, ring, tag)
        return [wait, credit, read]


class CreditBeforeLoadsAreDone(Rails):
    """The forwarder credits a chunk while its bulk loads of it are in flight."""

    def wait_loads(self, v: View, role: Role) -> None:
        pass


class CreditOfAnotherChannel(Rails):
    """All channels to a node look at the credits of the first."""

    def credit(self, ring: Ring, n: int) -> Step:
        return super().credit((*ring[:2], 0), n)


class CreditOfAnotherPeer(Rails):
    """All peers of a rank share the credits of one."""

    def credit(self, ring: Ring, n: int) -> Step:
        r, _, c = ring
        return super().credit((r, min(self.shape.peers(r)), c), n)


class ReusedWhenPosted(Rails):
    """A place is staged again once its put was handed to the NIC, which may not have read it."""

    def credit(self, ring: Ring, n: int) -> Step:
        word, count = self.of_place(self.posted, ring, n)
        return self.wait(f"has room for chunk {n}", word, count - 1)


class LastCreditKept(Rails):
    """The last chunk of an operation is not credited: nobody needs its place any more."""

    def forward_records(self, r: int, a: int, c: int, seq: int, extent: int) -> None:
        super().forward_records(r, a, c, seq, extent)
        if not (n := self.taken[r, a, c]):
            return
        role = self.forwarder[r, a, c, (n - 1) % self.shape.ring]
        last = f"credits chunk {n - 1}"
        role.steps = [step for step in role.steps if step.text != last]


class CreditOfTheRing(Rails):
    """One word counts the chunks that forwarders take from a ring, side by side."""

    def of_place(self, words: dict[Any, Place], ring: Ring, n: int) -> tuple[Place, int]:
        if words is not self.head:
            return super().of_place(words, ring, n)
        return words[(*ring, 0)], n + 2 - self.shape.ring

    def give_credit(self, v: View, ring: Ring, n: int) -> None:
        v.add(self.head[(*self.reverse(ring), 0)], 1)


# ---- tails


class TailBeforeData(Rails):
    """The signal is sent ahead of what it announces."""

    def carry(self, ring: Ring, n: int) -> list[Step]:
        return super().carry(ring, n)[::-1]


class SignalOnAnotherQueue(Rails):
    """put and signal_op are two calls on two queue pairs: nothing orders them."""

    def _threads(self) -> None:
        super()._threads()
        self.queue = {ring: self.machine.thread("another queue").number for ring in self.rings}

    def copy_chunk(self, v: View, ring: Ring, n: int) -> None:
        place = n % self.shape.ring
        other = self.queue[ring]
        v.pass_on(v.thread, other)
        tag = v.read(self.send[(*ring, place)], 1 << 30, by=other)
        v.write(self.recv[(*self.reverse(ring), place)], tag, by=other)


class TailNotAcquired(Rails):
    """The forwarder sees the tail with a relaxed load."""

    def arrival(self, ring: Ring, n: int) -> Step:
        word, wanted = self.of_place(self.tail, ring, n)

        def look(v: View) -> Any:
            have = v.count(word) if self.reduced else v.peek(word)
            return None if have >= wanted else BLOCKED

        return Step(f"sees chunk {n}", look, local=True)


class TailFromZero(Rails):
    """Each operation counts the chunks of a ring from 0."""

    def unroll(self, k: int, op: Op) -> None:
        self.base = dict(self.taken)
        super().unroll(k, op)

    def arrival(self, ring: Ring, n: int) -> Step:
        return super().arrival(ring, n - self.base[ring])


class ArrivedCountedBySource(Rails):
    """The source counts a row as arrived when it has put it on the rail."""

    def send_record(self, role: Role, r: int, b: int, c: int, t: int, seq: int) -> list[Step]:
        slot = seq % self.shape.num_slots
        adds = [
            self.do("counts", lambda v, p=p: v.add(self.arrived[p, slot, r], 1))
            for p in self.shape.on_node(b)
            if p in self.shape.tokens(r, c)[t]
        ]
        return super().send_record(role, r, b, c, t, seq) + adds

    def store(
        self, role: Role, src: int, c: int, t: int, p: int, seq: int, extent: int
    ) -> list[Step]:
        steps = super().store(role, src, c, t, p, seq, extent)
        return steps if role is self.mover.get((src, c)) else steps[:1]


class TailOfTheRing(Rails):
    """One word counts the puts of a ring, which may arrive in another order."""

    def of_place(self, words: dict[Any, Place], ring: Ring, n: int) -> tuple[Place, int]:
        if words is not self.tail:
            return super().of_place(words, ring, n)
        return words[(*ring, 0)], n + 1

    def count_chunk(self, v: View, ring: Ring, n: int) -> None:
        v.add(self.tail[(*self.reverse(ring), 0)], 1)


# ---- proxies


class StageNotDrained(Rails):
    """The doorbell rings while bulk stores into the staging are in flight."""

    def drain_stage(self, v: View, role: Role) -> None:
        pass


class NoFenceBeforeLoad(Rails):
    """The forwarder bulk-loads what another proxy wrote, without fence.proxy.async."""

    def fence_before_load(self, v: View, role: Role) -> None:
        pass


class RowsNotDrained(Rails):
    """Rows are added to `arrived` while their stores are in flight."""

    def drain_rows(self, v: View, role: Role) -> None:
        pass


# ---- roles


class SendsThenForwards(Rails):
    """One role sends all it has before it forwards what comes."""

    def forward_records(self, r: int, a: int, c: int, seq: int, extent: int) -> None:
        roles = [self.forwarder[r, a, c, i] for i in range(self.shape.ring)]
        before = [len(role.steps) for role in roles]
        super().forward_records(r, a, c, seq, extent)
        for role, begin in zip(roles, before, strict=True):
            self.mover[r, c].steps += role.steps[begin:]
            del role.steps[begin:]


class ChannelsTakeTurns(Rails):
    """One role pulls for both channels, a chunk of each in turn; the other end adds up one channel
    after the other.
    """

    def combine_roles(self, r: int, seq: int, k: int, extent: int) -> None:
        for a in self.shape.peers(r):
            parts = []
            for c in self.shape.channels:
                role = self.puller[r, a, c]
                before = len(role.steps)
                self.send_sums(r, a, c, seq, extent)
                parts.append(role.steps[before:])
                del role.steps[before:]
            self.puller[r, a, 0].steps += take_turns(parts)
        for c in self.shape.channels:
            self.reduce(r, c, seq, extent)
            if c > 0:
                role = self.reducer[r, c]
                self.reducer[r, 0].steps += role.steps
                role.steps = []


def take_turns(parts: Sequence[list[Step]]) -> list[Step]:
    """Two steps to begin, then three for each chunk, of each part in turn, then the ends."""
    merged = [step for part in parts for step in part[:2]]
    bodies = [part[2:-1] for part in parts]
    for at in range(0, max(map(len, bodies)), 3):
        merged += [step for body in bodies for step in body[at : at + 3]]
    return merged + [part[-1] for part in parts]


class PeerAfterPeer(Rails):
    """One role pulls for all peers, and finishes one before it turns to the next."""

    def combine_roles(self, r: int, seq: int, k: int, extent: int) -> None:
        first = self.shape.peers(r)[0]
        for c in self.shape.channels:
            for a in self.shape.peers(r):
                role = self.puller[r, a, c]
                before = len(role.steps)
                self.send_sums(r, a, c, seq, extent)
                steps = role.steps[before:]
                del role.steps[before:]
                self.puller[r, first, c].steps += steps
            self.reduce(r, c, seq, extent)


class PulledBeforeRails(Rails):
    """A rank says it has pulled when its own tokens are added up; those of its rail may not be."""

    def _places(self) -> None:
        super()._places()
        self.late = {r: self.machine.word("late", r) for r in self.shape.ranks}

    def send_sums(self, r: int, a: int, c: int, seq: int, extent: int) -> None:
        super().send_sums(r, a, c, seq, extent)
        self.puller[r, a, c].steps[-1] = self.do("ends", lambda v: v.add(self.late[r], 1))

    def ended(self, r: int, seq: int) -> Step:
        if not self.is_dispatch(seq):
            self.finished[r] -= (self.shape.num_nodes - 1) * self.shape.num_channels
        return super().ended(r, seq)


# ---- entries


class RefuserDoesNotRelay(Rails):
    """A rank that refuses its call leaves without passing on what comes along its rail."""

    def relay(self, r: int, b: int, seq: int, op: Op) -> list[Step]:
        return [] if r in op.refused else super().relay(r, b, seq, op)


class OneMailbox(Rails):
    """Entries of all operations go through one mailbox."""

    def mailboxes(self) -> int:
        return 1


class SlotNotAwaited(Rails):
    """A relay writes entries without a look at `released`."""

    def enter(self, r: int, seq: int, op: Op) -> list[Step]:
        return super().enter(r, seq, op)[len(self.shape.near(r)) :]


# ---- two transports to one word: a choice, so a model of its own


class OneTransport:
    """Two rails credit through one word, each with an atomic add of the same transport."""

    def __init__(self) -> None:
        self.machine = m = Machine()
        adders = [m.thread("NIC"), m.thread("GPU")]
        waiter = m.thread("sender")
        self.word = m.word("credit")
        self.seen = [m.var("seen", i, value=0) for i in range(2)]
        for i, adder in enumerate(adders):
            adder.program(self.add(i))
        waiter.program([Step("waits", lambda v: None if v.peek(self.word) == 2 else BLOCKED)])

    def add(self, i: int) -> list[Step]:
        return [Step("adds", lambda v: v.add(self.word, 1))]


class TwoTransports(OneTransport):
    """One adds over the NIC, the other over NVLink: neither's atomics know of the other's."""

    def add(self, i: int) -> list[Step]:
        return [
            Step("reads", lambda v: v.put(self.seen[i], v.peek(self.word))),
            Step("writes", lambda v: v.update(self.word, v.get(self.seen[i]) + 1)),
        ]


@dataclass(frozen=True)
class Mistake:
    """`small`: 2 nodes x 1 rank x 1 channel show it, too, and are explored in full."""

    name: str
    rails: type[Rails]
    prop: str
    shape: Cluster
    small: bool = True

    def tiny(self) -> Cluster:
        return replace(TINY, ops=self.shape.ops)


TINY = everywhere(ranks_per_node=1, num_channels=1)
FULL = everywhere(ops=(D, C))
ONE_RANK_REFUSES = everywhere(ops=(refused(D, 1),) * 3)

MISTAKES = [
    Mistake("credit-before-read", CreditBeforeRead, OVERWRITE, FULL),
    Mistake("credit-before-loads-are-done", CreditBeforeLoadsAreDone, OVERWRITE, FULL),
    Mistake("credit-of-another-channel", CreditOfAnotherChannel, OVERWRITE, FULL, small=False),
    Mistake(
        "credit-of-another-peer",
        CreditOfAnotherPeer,
        OVERWRITE,
        everywhere(num_nodes=3, ranks_per_node=1, num_channels=1, ops=(D,)),
        small=False,
    ),
    Mistake("reused-when-posted", ReusedWhenPosted, UNCOVERED, FULL),
    Mistake("last-credit-kept", LastCreditKept, CREDIT, everywhere(ops=(D,))),
    Mistake("tail-before-data", TailBeforeData, UNCOVERED, FULL),
    Mistake("signal-on-another-queue", SignalOnAnotherQueue, UNCOVERED, FULL),
    Mistake("tail-not-acquired", TailNotAcquired, UNCOVERED, FULL),
    Mistake("tail-from-zero", TailFromZero, WRONG_DATA, everywhere(ops=(D, D))),
    Mistake("arrived-counted-by-the-source", ArrivedCountedBySource, UNCOVERED, FULL),
    Mistake("stage-not-drained", StageNotDrained, UNCOVERED, FULL),
    Mistake("no-fence-before-load", NoFenceBeforeLoad, UNCOVERED, FULL),
    Mistake("rows-not-drained", RowsNotDrained, UNCOVERED, FULL),
    Mistake("sends-then-forwards", SendsThenForwards, DEADLOCK, FULL),
    Mistake(
        "channels-take-turns", ChannelsTakeTurns, DEADLOCK, everywhere(3, ops=(D, C)), small=False
    ),
    Mistake(
        "peer-after-peer",
        PeerAfterPeer,
        DEADLOCK,
        everywhere(3, num_nodes=3, ranks_per_node=1, num_channels=1, ops=(D, C)),
        small=False,
    ),
    Mistake("pulled-before-rails", PulledBeforeRails, OVERWRITE, FULL, small=False),
    Mistake("refuser-does-not-relay", RefuserDoesNotRelay, DEADLOCK, ONE_RANK_REFUSES, small=False),
    Mistake("one-mailbox", OneMailbox, OVERWRITE, ONE_RANK_REFUSES),
    Mistake("slot-not-awaited", SlotNotAwaited, OVERWRITE, ONE_RANK_REFUSES, small=False),
]
