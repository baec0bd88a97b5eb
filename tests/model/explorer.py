"""Explicit-state exploration of a few threads over shared memory: every interleaving, or a shortest
bad one.

A model is a set of threads. A thread is a list of steps; a step is a Python function that looks at
the state through a `View` and either waits (`BLOCKED`), or changes it and names the next step.
Breadth first, so a counterexample is shortest.

Memory has two kinds of places, as in C++ and PTX:

* a *word* is an atomic flag. Stores release, loads that pass a wait acquire.
* a *cell* is plain data (a record, a row). Which plain stores are visible where is not simulated
  store by store: every thread carries a vector clock, words carry the clock of their release, and
  an access to a cell that is not ordered after the accesses it conflicts with is a violation, in
  whatever order the two happened to run here. That is the weakest visibility there is: a store may
  become visible at any moment until an acquired release covers it, and whoever looks earlier is
  caught. Two facts make it enough to interleave words sequentially: programs without data races
  behave sequentially consistently, and nothing in the protocol branches on a word *not* being
  written, so a stale load of a word only waits longer.

A step marked `local` commutes with every step of every other thread: it touches only what is its
own thread's, or it is a wait whose condition no step undoes (once it can run, it can run first).
Clocks, and with them violations, do not depend on the order of steps that commute. So local steps
run at once, together with the step that let them. `merge=False` interleaves them like all others,
which the tests compare, and which is right also for waits that can be undone.

A *counter* is a word that remembers all its releases, so that a wait acquires the first one that
satisfies it, whenever it runs. With counters every step of a model may be local where no step looks
for anything but a value reached, and then one run stands for all (rail.py says why).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

BLOCKED = object()  # what a step returns while its condition does not hold

DEADLOCK = "deadlock"
OVERWRITE = "overwrite before read"
UNCOVERED = "read of data not covered by an acquire"
UNORDERED = "unordered writes"

Name = tuple[Any, ...]
Act = Callable[["View"], Any]


class Violation(Exception):
    """A property that does not hold, and the sentence that says where."""

    def __init__(self, prop: str, text: str):
        super().__init__(f"{prop}: {text}")
        self.prop = prop
        self.text = text


@dataclass(frozen=True)
class Step:
    """One atomic step. `act` returns None (go on), a label (go there) or BLOCKED. Skipped unless
    `when` holds.
    """

    text: str
    act: Act
    local: bool = False
    label: str = ""
    when: Callable[[View], bool] | None = None  # of what only this thread changes


class Thread:
    def __init__(self, number: int, name: str):
        self.number = number
        self.name = name
        self.program([])

    def program(self, steps: Iterable[Step]) -> None:
        self.steps: list[Step] = list(steps)
        self.labels = {step.label: at for at, step in enumerate(self.steps) if step.label}
        self._local = [step.local for step in self.steps] + [True]

    def stays(self, state: Sequence[int]) -> bool:
        """After `settle`: it is at its end, or waits in a local step."""
        return self._local[state[self.number]]


@dataclass(frozen=True)
class Place:
    """Where a named value lies in the flat state."""

    at: int
    name: Name


class Machine:
    """Threads, places and the initial state of one model.

    A state is a flat tuple of small integers: the step each thread stands at, then interned values
    (clocks, words, cells, variables), so that copying, hashing and comparing states stay cheap.
    """

    def __init__(self, describe: Callable[[Name], str] = str):
        self.threads: list[Thread] = []
        self.loads: list[Place] = []  # by thread, see View.is_over
        self.describe = describe
        self.context: Callable[[View], str] = lambda view: ""
        self.check_final: Callable[[View], None] = lambda view: None
        self.outcome: Callable[[View], Hashable] = lambda view: None
        self._values: list[Any] = []
        self._ids: dict[Any, int] = {}
        self._initial: list[tuple[Name, Any]] = []

    # ---- construction: threads first, then places

    def thread(self, name: str) -> Thread:
        assert not self._initial, "threads come before places"
        self.threads.append(Thread(len(self.threads), name))
        return self.threads[-1]

    def _place(self, name: Name, value: Hashable) -> Place:
        self._initial.append((name, value))
        return Place(2 * len(self.threads) + len(self._initial) - 1, name)

    def word(self, *name: Any, value: Hashable = 0) -> Place:
        return self._place(name, (value, (0,) * len(self.threads)))

    def counter(self, *name: Any) -> Place:
        return self._place(name, ((0, (0,) * len(self.threads)),))  # releases, oldest first

    def cell(self, *name: Any) -> Place:
        return self._place(name, (None, -1, 0, ()))  # tag, writer, its clock, reads since

    def var(self, *name: Any, value: Hashable = None) -> Place:
        return self._place(name, value)

    # ---- values and states

    def intern(self, value: Any) -> int:
        number = self._ids.get(value)
        if number is None:
            number = self._ids[value] = len(self._values)
            self._values.append(value)
        return number

    def initial(self) -> tuple[int, ...]:
        n = len(self.threads)
        clocks = [tuple(int(i == t) for i in range(n)) for t in range(n)]
        return (
            *([0] * n),
            *(self.intern(clock) for clock in clocks),
            *(self.intern(value) for _, value in self._initial),
        )

    def done(self, state: Sequence[int]) -> bool:
        return all(state[t.number] == len(t.steps) for t in self.threads)

    # ---- running

    def run(self, view: View, thread: Thread) -> bool:
        """One step of `thread`, without the local steps that follow. False when it cannot."""
        at = view.state[thread.number]
        if at == len(thread.steps):
            return False
        step = thread.steps[at]
        view.thread = thread.number
        if view.trace is not None:
            view.trace.append((thread.name, view.say(step.text)))
        target = step.act(view)
        if target is BLOCKED:
            if view.trace is not None:
                view.trace.pop()
            return False
        at = at + 1 if target is None else thread.labels[target]
        while at < len(thread.steps) and thread.steps[at].when and not thread.steps[at].when(view):
            at += 1
        view.own()[thread.number] = at
        return True

    def settle(self, view: View) -> None:
        """Runs local steps until none is left that can."""
        quiet = 0
        while quiet < len(self.threads):
            for thread in self.threads:
                quiet += 1
                while thread.stays(view.state) and self.run(view, thread):
                    quiet = 0


class View:
    """The state as one step sees it; copied at the first change."""

    __slots__ = ("_owned", "machine", "state", "thread", "trace")

    def __init__(self, machine: Machine, state: Any, trace: list[tuple[str, str]] | None = None):
        self.machine = machine
        self.state = state
        self.thread = -1
        self.trace = trace
        self._owned = False

    def own(self) -> list[int]:
        if not self._owned:
            self.state = list(self.state)
            self._owned = True
        return self.state

    def say(self, text: str) -> str:
        return f"{self.machine.context(self)}{text}"

    def note(self, text: str) -> None:
        """Adds to the line of the running step in a counterexample."""
        if self.trace is not None:
            name, line = self.trace[-1]
            self.trace[-1] = (name, f"{line}: {text}")

    def who(self, thread: int) -> str:
        return self.machine.threads[thread].name

    # ---- variables: seen by one thread, or by threads that are ordered anyway

    def get(self, place: Place) -> Any:
        return self.machine._values[self.state[place.at]]

    def put(self, place: Place, value: Hashable) -> None:
        self.own()[place.at] = self.machine.intern(value)

    # ---- clocks

    def clock(self, thread: int) -> tuple[int, ...]:
        return self.machine._values[self.state[len(self.machine.threads) + thread]]

    def _set_clock(self, thread: int, clock: tuple[int, ...]) -> None:
        self.own()[len(self.machine.threads) + thread] = self.machine.intern(clock)

    def join(self, thread: int, clock: tuple[int, ...]) -> None:
        """From here on `thread` comes after everything `clock` covers."""
        mine = self.clock(thread)
        joined = tuple(map(max, mine, clock))
        if joined != mine:
            self._set_clock(thread, joined)

    def pass_on(self, source: int, target: int) -> None:
        """What `source` has done so far comes before what `target` does next."""
        self.join(target, self.clock(source))
        self.tick(source)

    def tick(self, thread: int) -> None:
        clock = list(self.clock(thread))
        clock[thread] += 1
        self._set_clock(thread, tuple(clock))

    def is_over(self, thread: int) -> tuple[int, ...]:
        """Whose loads have returned, as `thread` knows: those its clock covers, and those that
        words without an order told of (`Machine.loads`). What was loaded may be overwritten.
        """
        clock = self.clock(thread)
        if not self.machine.loads:
            return clock
        return tuple(map(max, clock, self.get(self.machine.loads[thread])))

    # ---- words

    def peek(self, word: Place) -> Any:
        return self.get(word)[0]

    def acquire(self, word: Place) -> Any:
        value, clock = self.get(word)
        self.join(self.thread, clock)
        return value

    def release(self, word: Place, value: Hashable) -> None:
        self.put(word, (value, self.clock(self.thread)))
        self.tick(self.thread)

    def update(self, word: Place, value: Hashable) -> None:
        """Read-modify-write with release: whoever acquires it also has what earlier updates
        released.
        """
        self.put(word, (value, tuple(map(max, self.get(word)[1], self.clock(self.thread)))))
        self.tick(self.thread)

    def add(self, word: Place, amount: int) -> None:
        self.update(word, self.peek(word) + amount)

    # ---- counters

    def count(self, counter: Place) -> int:
        return int(self.get(counter)[-1][0])

    def advance(self, counter: Place, value: int) -> None:
        """A release; after the one before it, of this thread or of one that is ordered before."""
        before = self.get(counter)[-1][1]
        if any(old > new for old, new in zip(before, self.clock(self.thread), strict=True)):
            text = f"{self.says(self.thread, 'releases', counter)} beside another writer"
            raise Violation(UNORDERED, text)
        self.put(counter, (*self.get(counter), (value, self.clock(self.thread))))
        self.tick(self.thread)

    def acquire_first(self, counter: Place, wanted: int) -> None:
        """The earliest release of `wanted` or more, which there is."""
        self.join(self.thread, next(clock for n, clock in self.get(counter) if n >= wanted))

    # ---- cells

    def says(self, thread: int, verb: str, cell: Place) -> str:
        return f"{self.who(thread)} {verb} {self.machine.describe(cell.name)}"

    def scribble(self, cell: Place, tag: Hashable) -> None:
        """A store that may race: readers must find out by themselves."""
        self.put(cell, (tag, self.thread, self.clock(self.thread)[self.thread], ()))

    def write(self, cell: Place, tag: Hashable, by: int | None = None) -> None:
        thread = self.thread if by is None else by
        clock = self.clock(thread)
        old, writer, written, reads = self.get(cell)
        over = self.is_over(thread)
        late = [reader for reader, read in reads if over[reader] < read]
        if late:
            text = f"the read by {self.who(late[0])} is not ordered before it"
            raise Violation(OVERWRITE, f"{self.says(thread, 'writes', cell)} over {old}; {text}")
        if writer >= 0 and clock[writer] < written:
            text = f"{self.who(writer)} wrote {old} there, neither ordered before the other"
            raise Violation(UNORDERED, f"{self.says(thread, 'writes', cell)}; {text}")
        self.put(cell, (tag, thread, clock[thread], ()))

    def read(self, cell: Place, age: int, by: int | None = None) -> Any:
        """What the cell holds. Tags are (kind, age, ...): a newer one was written over ours."""
        thread = self.thread if by is None else by
        clock = self.clock(thread)
        tag, writer, written, reads = self.get(cell)
        if writer < 0:
            text = f"{self.says(thread, 'reads', cell)}, which nobody has written"
            raise Violation(UNCOVERED, text)
        if clock[writer] < written:
            text = f"{self.who(writer)} wrote {tag} there, which no acquire of the reader covers"
            prop = OVERWRITE if tag[1] > age else UNCOVERED
            raise Violation(prop, f"{self.says(thread, 'reads', cell)}; {text}")
        others = [r for r in reads if r[0] != thread]
        self.put(cell, (tag, writer, written, (*sorted([*others, (thread, clock[thread])]),)))
        return tag


@dataclass
class Counterexample:
    prop: str
    text: str
    trace: list[tuple[str, str]]

    def __str__(self) -> str:
        width = max((len(who) for who, _ in self.trace), default=0)
        lines = [f"{i + 1:4}  {who:{width}}  {what}" for i, (who, what) in enumerate(self.trace)]
        return "\n".join([f"{self.prop}: {self.text}", *lines])


@dataclass
class Report:
    states: int = 0
    transitions: int = 0
    finals: int = 0
    depth: int = 0
    seconds: float = 0.0
    outcomes: set[Any] = field(default_factory=set)  # `Machine.outcome` of the final states
    violation: Counterexample | None = None

    def __str__(self) -> str:
        verdict = self.violation.prop if self.violation else "holds"
        return (
            f"{self.states} states, {self.transitions} transitions, depth {self.depth}, "
            f"{self.finals} final, {self.seconds:.2f} s: {verdict}"
        )


def explore(machine: Machine, *, merge: bool = True, limit: int = 5_000_000) -> Report:
    """Walks every reachable state, breadth first; stops at the first violation."""
    started = time.perf_counter()
    report = Report()
    parents: list[tuple[int, int]] = [(-1, -1)]  # state it came from, thread that moved
    depths = [0]
    seen: dict[tuple[int, ...], int] = {}

    def fail(at: int, thread: int, error: Violation) -> Report:
        report.violation = Counterexample(
            error.prop, error.text, _replay(machine, parents, at, thread, merge)
        )
        report.states = len(seen)
        report.seconds = time.perf_counter() - started
        return report

    first = View(machine, machine.initial())
    if merge:
        try:
            machine.settle(first)
        except Violation as error:
            return fail(0, -1, error)
    start = tuple(first.state)
    seen[start] = 0
    queue = deque([start])
    while queue:
        state = queue.popleft()
        number = seen[state]
        stuck = True
        for thread in machine.threads:
            if merge and thread.stays(state):
                continue
            view = View(machine, state)
            try:
                if not machine.run(view, thread):
                    continue
                if merge:
                    machine.settle(view)
            except Violation as error:
                return fail(number, thread.number, error)
            stuck = False
            report.transitions += 1
            successor = tuple(view.state)
            if successor in seen:
                continue
            seen[successor] = len(parents)
            parents.append((number, thread.number))
            depths.append(depths[number] + 1)
            queue.append(successor)
            if len(seen) > limit:
                raise RuntimeError(f"more than {limit} states")
        if not stuck:
            continue
        try:
            if not machine.done(state):
                raise Violation(DEADLOCK, _stuck(machine, state))
            machine.check_final(View(machine, state))
        except Violation as error:
            return fail(number, -1, error)
        report.finals += 1
        report.outcomes.add(machine.outcome(View(machine, state)))
        report.depth = max(report.depth, depths[number])
    report.states = len(seen)
    report.seconds = time.perf_counter() - started
    return report


def walk(machine: Machine, seed: int) -> Report:
    """One run, the next step always of a thread drawn at random."""
    report, draw = Report(), random.Random(seed)
    trace: list[tuple[str, str]] = []
    view = View(machine, machine.initial(), trace)
    try:
        while not machine.done(view.state):
            threads = draw.sample(machine.threads, len(machine.threads))
            if not any(machine.run(view, thread) for thread in threads):
                raise Violation(DEADLOCK, _stuck(machine, view.state))
            report.transitions += 1
        machine.check_final(view)
        report.finals = 1
    except Violation as error:
        report.violation = Counterexample(error.prop, error.text, trace)
    return report


def _stuck(machine: Machine, state: Sequence[int]) -> str:
    view = View(machine, state)
    waits = []
    for thread in machine.threads:
        if state[thread.number] < len(thread.steps):
            view.thread = thread.number
            waits.append(
                f"{thread.name} stays at '{view.say(thread.steps[state[thread.number]].text)}'"
            )
    return "; ".join(waits)


def _replay(
    machine: Machine, parents: list[tuple[int, int]], at: int, thread: int, merge: bool
) -> list[tuple[str, str]]:
    path = [thread] if thread >= 0 else []
    while at > 0:
        at, moved = parents[at]
        path.append(moved)
    trace: list[tuple[str, str]] = []
    view = View(machine, machine.initial(), trace)
    try:
        if merge:
            machine.settle(view)
        for number in reversed(path):
            machine.run(view, machine.threads[number])
            if merge:
                machine.settle(view)
    except Violation:
        pass  # the step that failed is the last line below
    return trace
