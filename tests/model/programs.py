"""Programs the model runs: every sequence of four operations, then those with a trick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from .protocol import Action, Op, Program

KINDS = {"D": "dispatch", "K": "cached", "C": "combine", "S": "combine"}  # S: y outside the arena


def sequence(letters: str, **options: object) -> Program:
    """Blocking calls: use every output, reuse every y, free an output when the next one comes."""
    ops: list[Op] = []
    actions: list[Action] = []
    fresh = latest = -1  # the last dispatch; the last operation with an output
    for k, letter in enumerate(letters):
        actions.append(("call", k))
        if letter == "D":
            ops.append(Op("dispatch", routing=k // 2 % 2))
            fresh = k
        elif letter == "K":
            ops.append(Op("cached", handle=fresh))
        else:
            ops.append(Op("combine", handle=latest, staged=letter == "S"))
            actions.append(("reuse", k))
            continue
        actions.append(("use", k))
        if latest >= 0:
            actions.append(("free", latest))
        latest = k
    actions.append(("free", latest))
    return replace(Program(letters, ops, actions, num_extents=3), **options)  # type: ignore[arg-type]


def failing(program: Program, k: int, rank: int, reason: str) -> Program:
    ops = list(program.ops)
    ops[k] = replace(ops[k], fails={rank: reason})
    return replace(program, name=f"{program.name}-{reason}-{k}-rank{rank}", ops=ops)


def all_sequences(length: int = 4) -> Iterator[Program]:
    for rest in product("DKCS", repeat=length - 1):
        yield sequence("D" + "".join(rest))


def all_failures(program: Program) -> Iterator[Program]:
    """Each operation fails once, in each way it can; the culprit goes round, ranks being alike."""
    for k, op in enumerate(program.ops):
        reasons = ["invalid"]
        if op.kind != "combine" or op.staged:
            reasons.append("no extent")
        for i, reason in enumerate(reasons):
            yield failing(program, k, (k + i) % program.num_ranks, reason)


D0, D1 = Op("dispatch"), Op("dispatch", routing=1)


def cached(handle: int | tuple[int, ...]) -> Op:
    return Op("cached", handle=handle)


def combine(handle: int, *, staged: bool = False) -> Op:
    return Op("combine", handle=handle, staged=staged)


def refused(op: Op, *ranks: int) -> Op:
    return replace(op, fails=dict.fromkeys(ranks, "invalid"))


def no_extent(op: Op, *ranks: int) -> Op:
    return replace(op, fails=dict.fromkeys(ranks, "no extent"))


def overflow(op: Op, *ranks: int) -> Op:
    return replace(op, fails=dict.fromkeys(ranks, "overflow"))


def static(op: Op) -> Op:
    return replace(op, static=True)


def copies(op: Op) -> Op:
    return replace(op, copies=op.kind != "combine" and not op.static)


def by_copies(program: Program) -> Program:
    """Every dispatch that may moves its rows by copy engine."""
    ops = [copies(op) for op in program.ops]
    return replace(program, name=f"{program.name}-by-copies", ops=ops)


def actions(text: str) -> list[Action]:
    """ "call 0, use 0" as [("call", 0), ("use", 0)]."""
    pairs = (part.split() for part in text.split(","))
    return [(verb, int(k)) for verb, k in pairs]


def blocking(ops: Sequence[Op]) -> list[Action]:
    outputs = [k for k, op in enumerate(ops) if op.kind != "combine"]
    return [
        *(("call", k) for k in range(len(ops))),
        *((verb, k) for k in outputs for verb in ("use", "free")),
    ]


def failures(name: str, *ops: Op) -> Program:
    return Program(name, ops, blocking(ops))


# Two micro-batches in flight; ranks wait for them in different orders.
SPLIT = Program(
    "split-waited-in-another-order",
    [D0, D1, combine(0), combine(1)],
    actions(
        "begin 0, begin 1, wait 1, wait 0, use 0, use 1,"
        "begin 2, begin 3, wait 3, reuse 3, wait 2, reuse 2, free 0, free 1"
    ),
    users={
        1: actions(
            "begin 0, begin 1, wait 0, use 0, wait 1, use 1,"
            "begin 2, begin 3, wait 2, reuse 2, wait 3, reuse 3, free 1, free 0"
        )
    },
)

# Tensors die while their combine is in flight; staging comes from the same arena.
FREED_IN_FLIGHT = Program(
    "y-freed-in-flight",
    [D0, combine(0), combine(0, staged=True), D1],
    actions(
        "call 0, use 0, begin 1, free 0, empty 1, begin 2, wait 1,"
        "begin 3, wait 2, wait 3, use 3, free 3"
    ),
    users={1: actions("call 0, use 0, call 1, free 0, call 2, begin 3, empty 3, wait 3, free 3")},
)

# Outputs die while the next dispatch asks for an extent: it gets theirs, another one, or none.
FREES_RACE_GRANTS = Program(
    "frees-race-grants",
    [D0, D1, D0, D1],
    actions(
        "call 0, begin 1, use 0, free 0, wait 1,"
        "call 2, use 1, free 1, call 3, use 2, free 2, use 3, free 3"
    ),
    users={
        2: actions(
            "call 0, use 0, free 0, call 1,"
            "begin 2, use 1, free 1, wait 2, begin 3, use 2, free 2, wait 3, use 3, free 3"
        )
    },
)

# One extent only: whether a dispatch gets it depends on how fast a user was. All ranks still agree.
ONE_EXTENT = replace(FREES_RACE_GRANTS, name="one-extent", num_extents=1)

TRICKS = [
    SPLIT,
    FREED_IN_FLIGHT,
    ONE_EXTENT,
    Program(
        "split-one-refused",
        [D0, refused(D1, 0), combine(0), D0],
        actions(
            "begin 0, begin 1, wait 1, wait 0, use 0,"
            "begin 2, begin 3, wait 3, use 3, wait 2, reuse 2, free 0, free 3"
        ),
    ),
    failures("one-rank-refuses-thrice", refused(D0, 0), refused(D0, 0), refused(D1, 0), D1),
    failures("ranks-refuse-in-turn", refused(D0, 0), refused(D1, 1), refused(D0, 2), D1),
    failures("two-culprits", refused(D0, 0, 2), no_extent(D1, 1, 2), overflow(D0, 0), D1),
    Program(
        "handles-differ",
        [D0, D1, cached((0, 1, 1)), combine(1)],
        actions("call 0, use 0, call 1, use 1, call 2, use 2, call 3, reuse 3, free 0, free 1"),
        num_extents=3,
    ),
    Program(
        "static-dispatch-fails",
        [static(no_extent(D0, 1)), combine(0), static(D1), combine(2)],
        actions("call 0, use 0, call 1, call 2, use 2, call 3, reuse 3, free 0, free 2"),
    ),
    Program(
        "combine-refused",
        [D0, refused(combine(0), 2), combine(0), D1],
        actions("call 0, use 0, call 1, reuse 1, call 2, reuse 2, free 0, call 3, use 3, free 3"),
    ),
    Program(
        "staging-not-granted",
        [
            D0,
            no_extent(combine(0, staged=True), 1),
            combine(0, staged=True),
            combine(0, staged=True),
        ],
        actions("call 0, use 0, call 1, empty 1, call 2, empty 2, call 3, free 0"),
    ),
]
