"""Rails in the model: two and more nodes, staging of one chunk, every rule broken once.

`pytest tests/test_rail_model.py -s -k mistake` prints what goes wrong for each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from model.explorer import DEADLOCK, OVERWRITE, UNCOVERED, Report, explore, walk
from model.rail import C, Cluster, D, Rails, cluster, everywhere, refused
from model.rail_mistakes import (
    MISTAKES,
    CreditOfTheRing,
    Mistake,
    OneTransport,
    TailOfTheRing,
    TwoTransports,
)

# Every operation after every other, failing on one rank, on several, and several times in a row.
PROGRAM = (D, C, D, refused(C, 1), C, refused(D, 0, 2), refused(D, 0), refused(D, 0), D, D, C, C)

SHAPES: dict[str, dict[str, Any]] = {
    "2x2-2-channels": {},
    "2x2-ring-of-two": {"ring": 2},
    "2x2-one-slot": {"num_slots": 1},
    "1x4": {"num_nodes": 1, "ranks_per_node": 4},
    "4x1": {"num_nodes": 4, "ranks_per_node": 1},
    "3x2": {"num_nodes": 3, "num_channels": 1},
    "2x4": {"ranks_per_node": 4, "num_channels": 1},
}


def holds(report: Report) -> Report:
    assert report.violation is None, f"\n{report.violation}"
    assert report.finals
    return report


@cache
def in_full(shape: str) -> Report:
    """The right protocol on the smallest cluster, in every interleaving, with ordinary words."""
    return explore(Rails(TINY_SHAPES[shape], reduced=False).machine)


TINY_SHAPES = {repr(m.tiny().ops): m.tiny() for m in MISTAKES if m.small}


# ---- the protocol


@pytest.mark.parametrize("name", SHAPES)
def test_rails_with_staging_of_a_chunk_hold(name: str) -> None:
    """No deadlock, no overwrite before read, no read without acquire, no lost credit."""
    options = {"ops": PROGRAM, **SHAPES[name]}
    holds(explore(Rails(everywhere(**options)).machine))
    for seed in range(8):
        holds(explore(Rails(cluster(seed, 3, **options)).machine))


def test_a_rank_without_tokens_and_a_node_nobody_visits_hold() -> None:
    shape = Cluster(ops=PROGRAM)
    only = {(r, c): (frozenset({0, 1}),) * 3 for r in (0, 2) for c in (0, 1)}
    holds(explore(Rails(Cluster(ops=PROGRAM, routes=only)).machine))
    holds(explore(Rails(shape).machine))  # nobody sends anything


def test_refusals_in_a_row_by_all_ranks_need_no_third_mailbox() -> None:
    everybody = tuple(refused(D, k % 4) for k in range(8))
    holds(explore(Rails(everywhere(ops=everybody)).machine))
    holds(explore(Rails(everywhere(ops=(refused(D, 0, 1, 2, 3),) * 6)).machine))


# ---- mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found(mistake: Mistake) -> None:
    holds(explore(Rails(mistake.shape).machine))
    found = explore(mistake.rails(mistake.shape).machine).violation
    assert found is not None, "the model misses it"
    print(f"\n{mistake.name} ({mistake.rails.__doc__})\n{found.prop}: {found.text}")
    assert found.prop == mistake.prop


def test_two_transports_to_one_word_lose_a_credit() -> None:
    holds(explore(OneTransport().machine))
    found = explore(TwoTransports().machine, merge=False).violation
    assert found is not None
    assert found.prop == DEADLOCK


@pytest.mark.parametrize(
    ("mistake", "tokens", "prop"),
    [(TailOfTheRing, 2, UNCOVERED), (CreditOfTheRing, 3, OVERWRITE)],
    ids=["tail", "credit"],
)
def test_one_word_for_a_ring_is_not_enough(mistake: type[Rails], tokens: int, prop: str) -> None:
    """Two adds to one word: which of them it counts is a choice, so all orders are walked."""
    shape = everywhere(tokens, ranks_per_node=1, num_channels=1, ring=2, ops=(D,))
    found = explore(mistake(shape, reduced=False).machine).violation
    assert found is not None
    assert found.prop == prop


def test_places_of_a_ring_side_by_side_hold_in_every_interleaving() -> None:
    shape = everywhere(2, ranks_per_node=1, num_channels=1, ring=2, ops=(D,))
    holds(explore(Rails(shape, reduced=False).machine))


# ---- one run stands for all: the argument in the head of model/rail.py, checked


@pytest.mark.parametrize(
    "mistake", [m for m in MISTAKES if m.small], ids=lambda mistake: mistake.name
)
def test_every_interleaving_says_what_one_run_says(mistake: Mistake) -> None:
    """2 nodes x 1 rank x 1 channel: thousands of states, each store to a word by itself."""
    assert holds(in_full(repr(mistake.tiny().ops))).states > 5
    found = explore(mistake.rails(mistake.tiny(), reduced=False).machine).violation
    alone = explore(mistake.rails(mistake.tiny()).machine).violation
    assert found is not None
    assert alone is not None
    # Which of two unordered accesses comes second gives the violation its name.
    races = {OVERWRITE, UNCOVERED}
    assert found.prop == alone.prop or {found.prop, alone.prop} == races


WALKED: dict[str, dict[str, Any]] = {  # and states there are
    "2x1-four-operations": {"ranks_per_node": 1, "num_channels": 1},  # 2 thousand
    "2x1-2-channels": {"num_tokens": 1, "ranks_per_node": 1, "ops": (D, C)},  # 29 thousand
    "2x2-1-channel": {"num_tokens": 1, "num_channels": 1, "ops": (D,)},  # 73 thousand
}


@pytest.mark.parametrize("name", WALKED)
def test_every_interleaving_holds(name: str) -> None:
    """Ordinary words, each store to one by itself."""
    holds(explore(Rails(everywhere(**WALKED[name]), reduced=False).machine))


def test_random_interleavings_of_two_by_two_ranks_hold() -> None:
    for seed in range(20):
        holds(
            walk(Rails(cluster(seed, ops=(D, C, refused(D, 1), D, C)), reduced=False).machine, seed)
        )


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_shows_in_a_random_interleaving(mistake: Mistake) -> None:
    """Some are found in whatever order things happen, some only when they go wrong."""
    seeds = range(40)
    machines = (mistake.rails(mistake.shape, reduced=False).machine for _ in seeds)
    assert any(walk(m, seed).violation for m, seed in zip(machines, seeds, strict=True))


# ---- more, slow


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [{"num_tokens": 2}, {"num_tokens": 1, "num_nodes": 3, "num_channels": 1}],
    ids=["2x1-2-channels", "3x1"],
)
def test_every_interleaving_of_more_holds(options: dict[str, Any]) -> None:
    """Hundreds of thousands of states, a minute or two."""
    holds(explore(Rails(everywhere(ranks_per_node=1, ops=(D,), **options), reduced=False).machine))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_larger_clusters_hold() -> None:
    for seed in range(2):
        for options in (
            {"num_nodes": 4, "ranks_per_node": 4},
            {"num_nodes": 6, "ranks_per_node": 2},
        ):
            holds(explore(Rails(cluster(seed, 3, ops=PROGRAM, **options)).machine))
