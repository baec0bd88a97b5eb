"""The doorbell of the CPU backend: no wake-up is lost, and no system call is made when nobody
sleeps.

One 32-bit word per rank, bumped by whoever published something there. The waiter reads the bell,
then looks at the word it waits for, counts itself among the sleepers, and sleeps only if the bell
still shows what it read (futex). The writer stores the word, bumps the bell, and wakes the sleepers
if it counts any. All accesses to bell and count are sequentially consistent; leaving that out is
the same as swapping two steps of one thread, which is how mistakes.py writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .explorer import BLOCKED, Machine, Step, View


class Doorbell:
    """A rank that waits for one word of each of two peers, one after the other."""

    writer_order: Sequence[str] = ("store", "bump", "wake")
    waiter_order: Sequence[str] = ("read", "look", "count", "sleep")

    def __init__(self, num_writers: int = 2):
        self.machine = m = Machine()
        waiter = m.thread("waiter")
        writers = [m.thread(f"peer {i}") for i in range(num_writers)]
        self.flags = [m.word("flag", i) for i in range(num_writers)]
        self.bell = m.word("bell")
        self.sleepers = m.word("sleepers")
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
            "count": Step("counts itself a sleeper", lambda v: self.count(v, 1)),
            "sleep": Step("asks the kernel to sleep", self.futex_wait),
        }
        order = [acts[name] for name in self.waiter_order]
        first = Step(f"begins to wait for flag {i}", lambda v: None, label=f"wait {i}")
        return [
            first,
            *order,
            Step("sleeps", lambda v: BLOCKED if v.get(self.asleep) else None),
            Step("counts itself awake", lambda v: self.count(v, -1)),
            Step("starts again", lambda v: f"wait {i}"),
        ]

    def look(self, v: View, i: int) -> Any:
        return f"wait {i + 1}" if v.peek(self.flags[i]) else None

    def count(self, v: View, change: int) -> None:
        v.add(self.sleepers, change)

    def futex_wait(self, v: View) -> None:
        """Compares and sleeps as one step: the kernel's lock is also that of FUTEX_WAKE."""
        if v.peek(self.bell) == v.get(self.seen):
            v.put(self.asleep, True)

    def writer_steps(self, i: int) -> list[Step]:
        acts = {
            "store": [Step("stores its flag", lambda v: v.release(self.flags[i], 1))],
            "bump": [Step("bumps the bell", lambda v: v.add(self.bell, 1))],
            "wake": [
                Step("looks for sleepers", lambda v: None if v.peek(self.sleepers) else f"end {i}"),
                Step("wakes them", lambda v: v.put(self.asleep, False)),
            ],
        }
        return [
            *(step for name in self.writer_order for step in acts[name]),
            Step("ends", lambda v: None, label=f"end {i}"),
        ]
