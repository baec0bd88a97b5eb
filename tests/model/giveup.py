"""When a rank gives up: its wait expires, its communicator is dead, and it raises while peers still
run.

Nothing it lent to the operation may be granted again before close. One thing it cannot hold back: y
is the user's own tensor, and the user may write to it once combine has raised, while a late peer
still pulls. The peer's sums would be wrong and its call would return them. So a puller, after its
last load and before it believes them, looks at the life word of every rank it pulled from. The rank
that gives up sets that word before it raises; the loads come before the look (an acquire fence
between them), so a load that saw what the user wrote later is followed by a look that sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .explorer import BLOCKED, Machine, Step, View, Violation
from .protocol import END, EXTENT_ROWS, OK, VERDICTS, WRONG_DATA, Program, Protocol, Turn

FAILED = ("failed",)


class GiveUp(Protocol):
    """Every rank has a clock that may expire at any moment, or never (it expires after everything
    else).
    """

    def __init__(self, program: Program):
        super().__init__(program)
        for r in self.ranks:
            self.clock[r].program([Step("runs out", lambda v, r=r: v.put(self.expired[r], True))])

    def _threads(self) -> None:
        super()._threads()
        self.clock = [self.machine.thread(f"clock {r}") for r in self.ranks]

    def _places(self) -> None:
        super()._places()
        self.expired = [self.machine.var("expired", r, value=False) for r in self.ranks]
        self.life = [self.machine.word("life", r, value="alive") for r in self.ranks]
        self.spoiled = [self.machine.var("spoiled", r, value=False) for r in self.ranks]

    def step(self, r: int, text: str, act: Any, *args: Any, **options: Any) -> Step:
        """Every wait is bounded: by the clock, and by a look at the peers. Now waits can end in two
        ways: not local.
        """

        def bounded(t: Turn, *args: Any) -> Any:
            target = act(t, *args)
            if target is not BLOCKED:
                return target
            over = t.v.get(self.expired[r]) or self.any_failed(t)
            return self.give_up(t) if over else BLOCKED

        return super().step(r, text, bounded, *args, **(options | {"local": False}))

    def give_up(self, t: Turn) -> str:
        """Extents stay held for good: a late peer may still push there."""
        t.v.note("gives up")
        t.v.put(self.verdict[t.r, t.k], FAILED)
        t.v.release(self.life[t.r], "failed")
        t.v.release(self.done[t.r, t.k], 1)
        return "stop"

    def load_row(self, t: Turn, place: tuple[int, int, int], by: int | None = None) -> None:
        """May race with an owner's user. What it read only counts once the call returns it as a
        result.
        """
        try:
            super().load_row(t, place, by)
        except Violation:
            t.v.put(self.spoiled[t.r], True)

    def combine(self, r: int) -> list[Step]:
        steps = super().combine(r)
        at = next(i for i, step in enumerate(steps) if "is pulled by all" in step.text)
        return [*steps[:at], self.step(r, "looks whether an owner gave up", self.look), *steps[at:]]

    def look(self, t: Turn) -> Any:
        return self.give_up(t) if self.any_failed(t) else None

    def any_failed(self, t: Turn) -> bool:
        return any(t.v.peek(self.life[p]) == "failed" for p in self.ranks)

    def succeed(self, t: Turn) -> None:
        if t.v.get(self.spoiled[t.r]):
            raise Violation(WRONG_DATA, f"rank {t.r} returns sums of rows their owner had given up")
        super().succeed(t)

    def record(self, t: Turn, verdict: tuple[Any, ...]) -> None:
        """A rank may finish an operation in which another one gave up."""
        t.v.put(self.verdict[t.r, t.k], verdict)

    def has_handle(self, v: View, r: int, k: int) -> bool:
        return v.peek(self.life[r]) == "alive" and super().has_handle(v, r, k)

    def user_begin(self, v: View, r: int, k: int) -> Any:
        if v.peek(self.life[r]) == "failed":
            v.put(self.verdict[r, k], FAILED)
            return None
        return super().user_begin(v, r, k)

    def user_wait(self, v: View, r: int, k: int) -> Any:
        if v.get(self.verdict[r, k]) == FAILED or v.peek(self.life[r]) == "failed":
            return None
        return super().user_wait(v, r, k)

    def scratch(self, v: View, r: int, k: int, extent: int) -> None:
        for row in range(EXTENT_ROWS if extent != END else 0):
            v.scribble(self.rows[r, extent, row], ("scratch", k + 1, row))

    def check_final(self, v: View) -> None:
        """Nobody hangs, which reaching the end shows; a rank that finished everything gave
        everything back.
        """
        for r in self.ranks:
            if all(v.get(self.verdict[r, k]) == OK for k in range(len(self.ops))):
                assert not any(v.peek(self.pool[r]))


class Leaving:
    """A peer does its part and leaves at once; its partner must not take that for a failure.

    A waiter looks for the word, then at the life of the peer. Between the two looks the peer may
    have done both.
    """

    asks_again = True

    def __init__(self) -> None:
        self.machine = m = Machine()
        waiter, peer = m.thread("waiter"), m.thread("peer")
        self.flag, self.life = m.word("flag"), m.word("life", value="alive")
        waiter.program(
            [
                Step("looks for the word", lambda v: self.found(v), label="again"),
                Step("looks at the peer's life", self.look),
                Step(
                    "asks again for the word",
                    lambda v: self.found(v),
                    when=lambda v: self.asks_again,
                ),
                Step("blames the peer", self.blame),
                Step("goes on", lambda v: None, label="found"),
            ]
        )
        peer.program(
            [
                Step("stores the word", lambda v: v.release(self.flag, 1)),
                Step("leaves", lambda v: v.release(self.life, "left")),
            ]
        )

    def found(self, v: View) -> str | None:
        return "found" if v.peek(self.flag) else None

    def look(self, v: View) -> str | None:
        return "again" if v.peek(self.life) == "alive" else None

    def blame(self, v: View) -> None:
        raise Violation(VERDICTS, "the waiter reports E111 for a peer that did its part")


class LatePull:
    """A combine on GPUs in which the owner of y gives up while a source pulls.

    The source's kernel is two blocks; one of them looks, once the other is through with its loads,
    and believes what was loaded if the owner has not failed. The owner that gives up tells every
    peer, in a word of that peer's block, then its host; its user, whose call has ended, writes to
    y.
    """

    order: Sequence[str] = ("peer", "host")
    looks_last = True

    def __init__(self) -> None:
        self.machine = m = Machine()
        speaker, mover = m.thread("source speaker"), m.thread("source mover")
        owner, user = m.thread("owner"), m.thread("owner's user")
        self.rows = [m.cell("row", 0, 0, row) for row in range(2)]
        self.notice, self.pulled = m.word("notice"), m.word("pulled")
        self.finished = m.word("finished")
        self.told = {"peer": m.word("life told"), "host": m.word("failure told")}
        self.spoiled = m.var("spoiled", value=False)
        look = Step("looks at the owner's life", self.look)
        loads = [
            Step("loads a row", lambda v: self.load(v, 0)),
            Step("sees the mover through", lambda v: self.until(v, self.finished)),
        ]
        speaker.program(
            [
                Step("hears the owner", lambda v: self.until(v, self.notice)),
                *([*loads, look] if self.looks_last else [look, *loads]),
                Step("believes its sums", self.believe),
                Step("tells that it has pulled", lambda v: v.release(self.pulled, 1)),
                Step("gives up", lambda v: None, label="gives up"),
            ]
        )
        mover.program(
            [
                Step("hears the owner", lambda v: self.until(v, self.notice)),
                Step("loads a row", lambda v: self.load(v, 1)),
                Step("is through", lambda v: v.release(self.finished, 1)),
            ]
        )
        owner.program(
            [
                Step("publishes y", self.publish),
                Step("is pulled, or its clock runs out", self.is_pulled),
                *(Step(f"tells its {who}", lambda v, w=who: self.tell(v, w)) for who in self.order),
                Step("ends", lambda v: "end"),
                Step("tells its host that all is well", self.succeed, label="pulled"),
                Step("has ended", lambda v: None, label="end"),
            ]
        )
        user.program(
            [
                Step("sees its call end", lambda v: self.until(v, self.told["host"])),
                *(
                    Step("writes to y", lambda v, row=row: v.scribble(row, ("scratch", 1)))
                    for row in self.rows
                ),
            ]
        )

    def until(self, v: View, word: Any) -> Any:
        return None if v.acquire(word) else BLOCKED

    def publish(self, v: View) -> None:
        for row in self.rows:
            v.write(row, ("y", 0))
        v.release(self.notice, 1)

    def is_pulled(self, v: View) -> str | None:
        """Whether the clock is over when it is not depends on when this runs."""
        return "pulled" if v.acquire(self.pulled) else None

    def succeed(self, v: View) -> None:
        self.tell(v, "host")

    def tell(self, v: View, who: str) -> None:
        v.release(self.told[who], 1)

    def load(self, v: View, row: int) -> None:
        """May race with the owner's user."""
        if v.get(self.rows[row])[0] != ("y", 0):
            v.put(self.spoiled, True)

    def look(self, v: View) -> str | None:
        return "gives up" if v.acquire(self.told["peer"]) else None

    def believe(self, v: View) -> None:
        if v.get(self.spoiled):
            raise Violation(WRONG_DATA, "the source returns sums of rows their owner had given up")
