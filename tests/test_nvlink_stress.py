"""The long random program of tests/stress: on GPUs, and what of it the CPU backend can play.

`python tests/stress_nvlink.py --help` runs it without pytest, with a line of progress now and then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mps
import pytest
import torch
from stress.draw import WORLDS
from stress.rounds import Cached, Pair, Refused, Round
from stress.run import (
    Done,
    Plan,
    buffer_options,
    call_on_threads,
    play,
    rounds_of,
    stress_processes,
    stress_threads,
)
from stress.truth import Mismatch, Side

from ep_comm.testing import Cluster

SMALL = ("small", "few-experts", "many-experts")


# ---- on the CPU backend: the program itself ----


def test_program_holds_on_cpu_threads() -> None:
    done = stress_threads(Plan(120, seed=1, worlds=SMALL, device="cpu"), 3)
    assert done.dispatches >= 120
    assert str(done).startswith(f"{done.dispatches} of 120 dispatches in {done.rounds} rounds, ")


def test_program_holds_on_cpu_processes() -> None:
    assert stress_processes(Plan(60, seed=2, device="cpu"), 2).dispatches >= 60


@pytest.mark.parametrize("stress", [stress_processes, stress_threads])
def test_program_ends_when_its_time_is_over(stress: Callable[[Plan, int], Done]) -> None:
    done = stress(Plan(100_000, seed=3, worlds=("small",), device="cpu", seconds=1.0), 2)
    assert 0 < done.dispatches < 100_000


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    world = WORLDS["small"]
    with Cluster(1, 2) as cluster:
        buffers = cluster.make_buffers(**buffer_options(world, 2))
        yield [Side(world, buffer, torch.device("cpu")) for buffer in buffers]


def pair(side: Side, layout: str, kind: type[Pair] = Pair) -> Pair:
    """A round with tokens for everybody."""
    made = kind(side, random.Random(7), 70)
    made.drawn.options = {"layout": layout, "alignment": 4} if layout == "grouped" else {}
    made.drawn.options |= {"layout": layout, "row_index": layout == "compact"}
    made.drawn.options |= {"capacity": 2 * side.world.worst} if layout == "slab" else {}
    made.drawn.options |= {"alignment": 4} if layout != "slab" else {}
    made.drawn.tokens = [side.world.tokens] * 2
    g = torch.Generator().manual_seed(3)
    made.drawn.ids = torch.randint(-1, side.world.experts, made.drawn.ids.shape, generator=g)
    made.drawn.dtype, made.drawn.weights, made.place = torch.bfloat16, True, "there"
    return made


def spoil(made: Pair, name: str) -> None:
    got = made.got
    if name == "x":
        got.x.view(torch.int16).reshape(-1, made.side.world.hidden)[0, -1] ^= 1
    elif name == "order":
        rows = got.x.reshape(-1, made.side.world.hidden)
        rows[:12] = rows[:12].roll(6, 0)
    elif name == "counts":
        got.num_tokens_per_expert[0] += 1
    elif name == "sums":
        made.out[-1, -1] += 1
    else:
        tensor = getattr(got, name)
        tensor.view(-1)[-1] += 1


@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_right_results_pass(sides: list[Side], layout: str) -> None:
    calls = partial(call_on_threads, cluster_of(sides), 60.0)
    play([pair(side, layout) for side in sides], calls)
    play([pair(side, layout, Cached) for side in sides], calls)


WRONG = {
    "compact": ("x", "order", "topk_idx", "topk_weights", "row_index", "counts", "sums"),
    "grouped": ("x", "order", "topk_idx", "topk_weights", "offsets", "counts", "sums"),
    "slab": ("x", "order", "topk_idx", "topk_weights", "counts", "sums"),
}


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, names in WRONG.items() for name in names]
)
def test_a_wrong_result_is_found(sides: list[Side], layout: str, name: str) -> None:
    rounds: list[Round] = [pair(side, layout) for side in sides]
    for r in rounds:
        r.prepare()
    call_on_threads(cluster_of(sides), 60.0, rounds)
    assert isinstance(rounds[1], Pair)
    spoil(rounds[1], name)
    rounds[0].check()
    rounds[0].side.look()
    with pytest.raises(Mismatch):
        look(rounds[1])


def look(r: Round) -> None:
    r.check()
    r.side.look()


def cluster_of(sides: list[Side]) -> Any:
    """Runs something on all ranks at once; the buffers are there already."""
    return Cluster(1, len(sides))


def test_a_refusal_with_another_code_is_found(sides: list[Side]) -> None:
    rounds = [Refused(side, random.Random(1), 7) for side in sides]
    for r in rounds:
        r.prepare()
    call_on_threads(cluster_of(sides), 60.0, list(rounds))
    rounds[0].check()
    rounds[1].code = "E102"
    with pytest.raises(Mismatch, match="got E102"):
        rounds[1].check()


def test_a_round_is_the_same_again_by_itself(sides: list[Side]) -> None:
    everything = dict.fromkeys(WORLDS, sides)
    rounds = [many[0] for many in rounds_of(Plan(40, seed=5, device="cpu"), everything)]
    alone = next(rounds_of(Plan(1, seed=5, first=6, device="cpu"), everything))[0]
    assert type(alone) is type(rounds[6])
    assert {type(r) for r in rounds} > {Pair}
    assert alone.number == rounds[6].number
    if isinstance(alone, Pair) and isinstance(rounds[6], Pair):
        assert torch.equal(alone.drawn.ids, rounds[6].drawn.ids)


# ---- on GPUs ----


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_that_share_a_gpu(num_ranks: int) -> None:
    print(stress_threads(Plan(400, seed=num_ranks, seconds=20.0, limit_s=100.0), num_ranks))


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_capture_no_graphs(num_ranks: int) -> None:
    """What the emulator can play, too."""
    plan = Plan(400, seed=4 * num_ranks, seconds=10.0, limit_s=100.0, captures=False)
    print(stress_threads(plan, num_ranks))


@pytest.mark.gpus(2)
@pytest.mark.timeout(240)
def test_two_gpus() -> None:
    print(stress_processes(Plan(1500, seed=3, seconds=20.0, limit_s=100.0), 2))


@pytest.mark.gpus(2)
@pytest.mark.timeout(360)
@pytest.mark.parametrize("num_ranks", [4, 8])
def test_processes_that_share_gpus_under_mps(num_ranks: int) -> None:
    if mps.control() is None:
        pytest.skip(f"{mps.CONTROL} was not found: it comes with the driver")
    with mps.daemon() as environ:
        plan = Plan(500, seed=num_ranks, seconds=20.0, limit_s=100.0)
        print(stress_processes(plan, num_ranks, environ))


@pytest.mark.slow
@pytest.mark.gpus(2)
@pytest.mark.timeout(500)
@pytest.mark.parametrize("stress", [stress_processes, stress_threads], ids=["gpus", "loopback"])
def test_ten_thousand_dispatches(stress: Callable[[Plan, int], Done]) -> None:
    print(stress(Plan(10_000, seed=11, limit_s=420.0), 2))
