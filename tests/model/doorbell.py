"""The doorbell of the CPU backend: no wake-up is lost, and a waiter is woken only by the peer it
waits for.

One 32-bit word per rank, bumped by whoever published something there. The waiter reads the bell,
then looks at the word it waits for, says for whom it waits, and sleeps only if the bell still shows
what it read (futex). The writer stores the word, bumps the bell, and wakes the waiter if that waits
for it. All accesses to bell and name are sequentially consistent; leaving that out is the same as
swapping two steps of one thread, which is how mistakes.py writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .explorer import BLOCKED, Machine, Step, View


class Doorbell:
    """A rank that waits for one word of each of two peers, one after the other."""

    writer_order: Sequence[str] = ("store", "bump", "wake")
    waiter_order: Sequence[str] = ("read", "look", "name", "sleep")

    def __init__(self, num_writers: int = 2):
        self.machine = m = Machine()
        waiter = m.thread("waiter")
        writers = [m.thread(f"peer {i}") for i in range(num_writers)]
        self.flags = [m.word("flag", i) for i in range(num_writers)]
        self.bell = m.word("bell")
        self.awaited = m.word("awaited")  # the writer's number + 1; 0 = nobody sleeps
        self.asleep = m.var("asleep", value=False)
        self.seen = m.var("seen", value=0)
        steps: list[Step] = []
        for i in range(num_writers):
            steps += self.waiter_steps(i)
        waiter.program(
            [*steps, Step("has everything", lambda v: None, label=f"wait {num_writers}")]
        )
        for i, writer in enumerate(writers):
            writer.program(self.writer_steps(i))

    def waiter_steps(self, i: int) -> list[Step]:
        acts = {
            "read": Step("reads the bell", lambda v: v.put(self.seen, v.peek(self.bell))),
            "look": Step(f"looks for flag {i}", lambda v: self.look(v, i)),
            "name": Step(f"says it waits for {i}", lambda v: self.name(v, i + 1)),
            "sleep": Step("asks the kernel to sleep", self.futex_wait),
        }
        order = [acts[name] for name in self.waiter_order]
        first = Step(f"begins to wait for flag {i}", lambda v: None, label=f"wait {i}")
        return [
            first,
            *order,
            Step("sleeps", lambda v: BLOCKED if v.get(self.asleep) else None),
            Step("says it is awake", lambda v: self.name(v, 0)),
            Step("starts again", lambda v: f"wait {i}"),
        ]

    def look(self, v: View, i: int) -> Any:
        return f"wait {i + 1}" if v.peek(self.flags[i]) else None

    def name(self, v: View, awaited: int) -> None:
        v.release(self.awaited, awaited)

    def futex_wait(self, v: View) -> None:
        """Compares and sleeps as one step: the kernel's lock is also that of FUTEX_WAKE."""
        if v.peek(self.bell) == v.get(self.seen):
            v.put(self.asleep, True)

    def who(self, v: View, i: int) -> Any:
        return None if v.peek(self.awaited) == i + 1 else f"end {i}"

    def writer_steps(self, i: int) -> list[Step]:
        acts = {
            "store": [Step("stores its flag", lambda v: v.release(self.flags[i], 1))],
            "bump": [Step("bumps the bell", lambda v: v.add(self.bell, 1))],
            "wake": [
                Step("looks who is awaited", lambda v: self.who(v, i)),
                Step("wakes the waiter", lambda v: v.put(self.asleep, False)),
            ],
        }
        return [
            *(step for name in self.writer_order for step in acts[name]),
            Step("ends", lambda v: None, label=f"end {i}"),
        ]
