"""Combine of a y that lies outside the arena: rows stream through a ring for each source.

Every rank has one thread for both of its sides. As an owner it copies rows into the rings while
they have room; as a source it adds a token once all its rows have come, and tells owners of the
room it made. It waits only when it can do neither. Two words for each pair of ranks count rows for
good: `staged` (owner to source) and `taken` (source to owner). Room is made and used in parts, so
that a rank is not woken for a single row; a source that lacks a row tells its owner everything.
"""

from __future__ import annotations

from typing import Any

from .explorer import BLOCKED, OVERWRITE, Machine, Step, View, Violation


class Stream:
    """`tokens[i]` is how many rows the i-th token of every source has at each other rank."""

    def __init__(
        self,
        num_ranks: int = 2,
        tokens: tuple[int, ...] = (1, 2, 1),
        ring_rows: int = 2,
        part: int = 1,
        num_ops: int = 2,
    ):
        self.tokens, self.ring_rows, self.part = tokens, ring_rows, part
        self.ranks = range(num_ranks)
        self.num_rows = sum(tokens)
        self.machine = m = Machine()
        threads = [m.thread(f"rank {r}") for r in self.ranks]
        pairs = [(a, b) for a in self.ranks for b in self.ranks if a != b]
        self.staged = {p: m.word("staged", *p) for p in pairs}  # owner, source
        self.taken = {p: m.word("taken", *p) for p in pairs}
        self.pulled = {p: m.word("pulled", *p) for p in pairs}  # source, owner
        self.rows = {(*p, i): m.cell("row", *p, i) for p in pairs for i in range(ring_rows)}
        # What each side counts for itself, in this operation.
        self.sent = {p: m.var("sent", *p, value=0) for p in pairs}
        self.next = {p: m.var("next", *p, value=0) for p in pairs}
        self.told = {p: m.var("told", *p, value=0) for p in pairs}
        self.token = [m.var("token", r, value=0) for r in self.ranks]
        self.moved = [m.var("moved", r, value=False) for r in self.ranks]
        for r, thread in zip(self.ranks, threads, strict=True):
            thread.program([step for op in range(num_ops) for step in self.operation(r, op)])

    def others(self, r: int) -> list[int]:
        return [p for p in self.ranks if p != r]

    def operation(self, r: int, op: int) -> list[Step]:
        def step(text: str, act: Any, *, local: bool = False, label: str = "") -> Step:
            return Step(text, lambda v: act(v, r, op), local=local, label=label)

        return [
            *(
                Step(
                    f"stages a row for {src}, if there is room",
                    lambda v, src=src: self.stage(v, r, src, op),
                    label=f"stage {src} {op}",
                )
                for src in self.others(r)
            ),
            step("adds a token, if its rows have come", self.add),
            step("goes on, or waits", self.go_on, local=True),
            step("tells the last rows taken", self.tell_last, label=f"all {op}"),
            step("has pulled", self.publish_pulled),
            step("waits until all have pulled", self.await_pulled, local=True),
            step("forgets the operation", self.forget, local=True),
        ]

    # ---- as an owner

    def base(self, op: int) -> int:
        """Rows that went between two ranks before this operation."""
        return op * self.num_rows

    def room(self, v: View, r: int, src: int, op: int) -> int:
        return self.ring_rows - (
            v.get(self.sent[r, src]) - (self.taken_by(v, r, src) - self.base(op))
        )

    def taken_by(self, v: View, r: int, src: int) -> int:
        return int(v.acquire(self.taken[r, src]))

    def can_stage(self, v: View, r: int, src: int, op: int) -> bool:
        left = self.num_rows - v.get(self.sent[r, src])
        room = self.room(v, r, src, op)
        return left > 0 and 0 < room <= self.ring_rows and (room >= self.part or room >= left)

    def stage(self, v: View, r: int, src: int, op: int) -> None:
        if self.can_stage(v, r, src, op):
            self.copy(v, r, src, op)
            self.publish_staged(v, r, src, op)
            v.put(self.moved[r], True)

    def copy(self, v: View, r: int, src: int, op: int) -> None:
        i = v.get(self.sent[r, src])
        v.write(self.rows[r, src, i % self.ring_rows], ("row", op, i))

    def publish_staged(self, v: View, r: int, src: int, op: int) -> None:
        v.put(self.sent[r, src], v.get(self.sent[r, src]) + 1)
        v.release(self.staged[r, src], self.base(op) + v.get(self.sent[r, src]))

    # ---- as a source

    def come(self, v: View, r: int, owner: int, op: int) -> int:
        return int(v.acquire(self.staged[owner, r])) - self.base(op)

    def lacks(self, v: View, r: int, op: int) -> int | None:
        """The first owner whose rows of the next token have not come."""
        wanted = self.tokens[v.get(self.token[r])]
        for owner in self.others(r):
            if self.come(v, r, owner, op) < v.get(self.next[owner, r]) + wanted:
                return owner
        return None

    def add(self, v: View, r: int, op: int) -> None:
        if v.get(self.token[r]) == len(self.tokens):
            return
        owner = self.lacks(v, r, op)
        if owner is not None:
            self.tell(v, r, owner, op)
            return
        for owner in self.others(r):
            self.take(v, r, owner, op)
        v.put(self.token[r], v.get(self.token[r]) + 1)
        v.put(self.moved[r], True)

    def take(self, v: View, r: int, owner: int, op: int) -> None:
        first = v.get(self.next[owner, r])
        last = first + self.tokens[v.get(self.token[r])]
        for i in range(first, last):
            tag = v.read(self.rows[owner, r, i % self.ring_rows], op)
            if tag != ("row", op, i):
                raise Violation(OVERWRITE, f"rank {r} wants row {i} of {owner}, reads {tag}")
        v.put(self.next[owner, r], last)
        if last - v.get(self.told[owner, r]) >= self.part:
            self.tell(v, r, owner, op)

    def tell(self, v: View, r: int, owner: int, op: int) -> None:
        if v.get(self.told[owner, r]) == v.get(self.next[owner, r]):
            return
        v.put(self.told[owner, r], v.get(self.next[owner, r]))
        v.release(self.taken[owner, r], self.base(op) + v.get(self.next[owner, r]))

    def go_on(self, v: View, r: int, op: int) -> Any:
        added = v.get(self.token[r]) == len(self.tokens)
        if added and all(v.get(self.sent[r, p]) == self.num_rows for p in self.others(r)):
            return f"all {op}"
        ready = (
            v.get(self.moved[r])
            or any(self.can_stage(v, r, p, op) for p in self.others(r))
            or (not added and self.lacks(v, r, op) is None)
        )
        if not ready:
            return BLOCKED
        v.put(self.moved[r], False)
        return f"stage {self.others(r)[0]} {op}"

    def tell_last(self, v: View, r: int, op: int) -> None:
        for owner in self.others(r):
            self.tell(v, r, owner, op)

    def publish_pulled(self, v: View, r: int, op: int) -> None:
        for owner in self.others(r):
            v.release(self.pulled[r, owner], op + 1)

    def await_pulled(self, v: View, r: int, op: int) -> Any:
        return None if all(v.acquire(self.pulled[p, r]) > op for p in self.others(r)) else BLOCKED

    def forget(self, v: View, r: int, op: int) -> None:
        """The next operation counts from 0, in rings that the arena may have put anywhere."""
        v.put(self.token[r], 0)
        for p in self.others(r):
            v.put(self.sent[r, p], 0)
            v.put(self.next[p, r], 0)
            v.put(self.told[p, r], 0)
