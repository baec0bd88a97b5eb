"""Plans: properties, the greedies and the optimum they are measured against, drift, invariances."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eplb_yardsticks import (
    best_of_randomized,
    generated_cases,
    greedy,
    optimum,
    optimum_of_layer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_comm.eplb import Placement, Trace, initial_placement, plan, rebalance_experts
from ep_comm.errors import EPError
from ep_comm.testing.skew import (
    bursty_load,
    drifted,
    drifting_load,
    routing_trace,
    shifting_load,
    zipf_load,
)

# num_ranks, num_nodes, num_replicas, num_groups, as `plan` takes them
PREFILL_GROUPS = (32, 4, 288, 8)
PREFILL_GLOBAL = (32, 4, 288, 1)
PREFILL_FREE = (32, 4, 288, 256)
DECODE = (320, 40, 320, 1)
DECODE_TWO_SLOTS = (320, 40, 640, 1)


@st.composite
def worlds(draw: Any) -> tuple[torch.Tensor, int, int, int, int]:
    nodes = draw(st.sampled_from([1, 2, 4]))
    ranks = nodes * draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, nodes, 2 * nodes]))
    experts = groups * draw(st.integers(1, 6))
    per_node = -(-experts // nodes) if groups % nodes == 0 else 0
    least = max(-(-experts // ranks), -(-per_node * nodes // ranks))
    slots = ranks * (least + draw(st.integers(0, 3)))
    kind = draw(st.sampled_from(["zeros", "ints", "reals", "one"]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    load = {
        "zeros": torch.zeros(2, experts),
        "ints": torch.randint(0, 9, (2, experts), generator=seed),
        "reals": torch.rand((2, experts), generator=seed) ** 4,
        "one": torch.eye(experts)[:1].repeat(2, 1),
    }[kind]
    return load, ranks, nodes, slots, groups


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_every_slot_is_filled_and_replicas_are_on_different_ranks(
    world: tuple[torch.Tensor, int, int, int, int],
) -> None:
    load, ranks, nodes, slots, groups = world
    placement = plan(load, ranks, nodes, slots, groups, distinct="always")

    experts = load.shape[1]
    assert placement.physical_to_logical.shape == (2, slots)
    assert int(placement.num_replicas.min()) >= 1  # every expert is placed
    assert placement.num_replicas.sum(1).tolist() == [slots, slots]
    hierarchical = groups % nodes == 0
    different = experts // nodes if hierarchical else experts  # that a rank can hold
    if slots // ranks <= different:
        assert int(placement.hosted.max()) == 1
    if hierarchical:  # a group lives on one node
        on_node = placement.on_nodes.view(2, nodes, groups, -1).sum(3) > 0
        assert on_node.sum(1).eq(1).all()
    torch.testing.assert_close(
        placement.rank_load.sum(1), load.to(torch.float64).sum(1), rtol=1e-9, atol=1e-12
    )


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_convention_tables_agree_with_each_other(
    world: tuple[torch.Tensor, int, int, int, int],
) -> None:
    load, ranks, nodes, slots, groups = world
    phy2log, log2phy, logcnt = rebalance_experts(load, slots, groups, nodes, ranks)

    experts = load.shape[1]
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    assert phy2log.shape == (2, slots)
    assert log2phy.shape == (2, experts, slots - experts + 1)
    assert logcnt.shape == (2, experts)
    for layer in range(2):
        for expert in range(experts):
            count = int(logcnt[layer, expert])
            mine = log2phy[layer, expert]
            assert mine[:count].tolist() == (phy2log[layer] == expert).nonzero().flatten().tolist()
            assert mine[count:].eq(-1).all()


# ---- invariances ----


@pytest.mark.parametrize("world", [PREFILL_GROUPS, PREFILL_GLOBAL, PREFILL_FREE])
def test_equal_input_gives_equal_output_layer_by_layer(world: tuple[int, ...]) -> None:
    load = zipf_load(3, 256, seed=1)
    together = plan(load, *world).physical_to_logical

    assert torch.equal(together, plan(load.clone(), *world).physical_to_logical)
    assert torch.equal(together[1], plan(load[1], *world).physical_to_logical[0])
    assert torch.equal(together, plan(load * 1024, *world).physical_to_logical)


def test_renaming_experts_renames_the_plan() -> None:
    load = zipf_load(1, 64, 0.8, seed=2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    plain = plan(load, 8, 2, 80).physical_to_logical
    renamed = plan(load[:, order], 8, 2, 80).physical_to_logical

    by_rank = order[renamed].view(8, -1).sort(1).values  # slots of a rank are in expert order
    assert torch.equal(by_rank, plain.view(8, -1))


def test_equal_loads_are_even() -> None:
    assert plan(torch.ones(2, 256), *PREFILL_GLOBAL).imbalance(torch.ones(2, 256)).max() == 1.0


# ---- yardsticks ----


@pytest.mark.parametrize("distinct", [True, False])
def test_no_plan_is_worse_than_the_public_greedy_and_the_mean_is_better(distinct: bool) -> None:
    ours, theirs = [], []
    for name, load, (ranks, nodes, slots, groups) in generated_cases():
        mine = plan(load, ranks, nodes, slots, groups, distinct=distinct).imbalance(load)
        public = greedy(load, slots, groups, nodes, ranks)
        assert (mine <= public * (1 + 1e-9)).all(), (name, mine, public)
        ours.append(mine.mean())
        theirs.append(public.mean())

    assert torch.stack(ours).mean() < 0.99 * torch.stack(theirs).mean()


def test_replicas_share_a_rank_only_where_all_else_is_worse_than_the_public_greedy() -> None:
    shared = 0
    for name, load, (ranks, nodes, slots, groups) in generated_cases():
        hosted = plan(load, ranks, nodes, slots, groups).hosted
        within = load.shape[1] // (nodes if groups % nodes == 0 else 1)
        if slots // ranks > within:
            continue  # there is no other way
        public = greedy(load, slots, groups, nodes, ranks) * load.sum(1) / ranks
        for layer in (hosted.amax((1, 2)) > 1).nonzero().flatten().tolist():
            best = optimum_of_layer(load[layer].tolist(), slots, groups, nodes, ranks)
            assert best > float(public[layer]) * (1 + 1e-9), (name, layer)
            shared += 1
    assert 0 < shared < 20  # of 400 layers


def test_distinct_always_keeps_replicas_on_different_ranks_and_costs_little() -> None:
    over = []
    for _, load, (ranks, nodes, slots, groups) in generated_cases():
        placement = plan(load, ranks, nodes, slots, groups, distinct="always")
        within = load.shape[1] // (nodes if groups % nodes == 0 else 1)
        if slots // ranks <= within:
            assert placement.hosted.max() == 1
        over.append((placement.imbalance(load) / greedy(load, slots, groups, nodes, ranks)).max())
    assert torch.stack(over).max() < 1.05
    assert torch.stack(over).mean() < 0.99


@pytest.mark.parametrize(
    "world", [PREFILL_GROUPS, PREFILL_GLOBAL, PREFILL_FREE], ids=["groups8", "global", "groups256"]
)
def test_zipf_plan_is_within_two_percent_of_the_best_of_1000_randomized_greedies(
    world: tuple[int, int, int, int],
) -> None:
    ranks, nodes, slots, groups = world
    load = zipf_load(2, 256, 1.0, seed=4)
    mine = plan(load, *world).imbalance(load)
    for layer in range(2):
        best = best_of_randomized(load[layer], slots, groups, nodes, ranks, 1000)
        assert float(mine[layer]) <= 1.02 * best


@pytest.mark.parametrize("distinct", ["always", False])
def test_gap_to_the_optimum_is_small_on_small_cases(distinct: Any) -> None:
    gaps = []
    for seed in range(40):
        experts, slots, ranks = ((4, 6, 3), (5, 8, 4), (6, 8, 4), (5, 6, 2))[seed % 4]
        load = torch.rand(experts, generator=torch.Generator().manual_seed(seed)).double() ** 2
        mine = float(plan(load, ranks, 1, slots, distinct=distinct).rank_load.max())
        best = optimum(load.tolist(), slots, ranks, distinct=bool(distinct))
        gaps.append(mine / best - 1)

    assert min(gaps) > -1e-12  # nothing beats the optimum: the yardstick is one
    assert max(gaps) < 0.01
    assert sum(gaps) / len(gaps) < 1e-3


# In yardsticks: machines differ by more than plans do. The longest plans take 3.0 of them for 32
# ranks and 9.4 for 320. The records of docs/eplb.md have 91 and 265 ms for these, so that one is
# about 0.03 s there, and the limits, once 0.15 and 0.6 s, are 0.14 and 0.5 s.
TIMED = pytest.mark.parametrize(
    ("world", "limit"),
    [(PREFILL_GROUPS, 4.8), (PREFILL_GLOBAL, 4.8), (PREFILL_FREE, 4.8), (DECODE, 18.0),
     (DECODE_TWO_SLOTS, 18.0)],
    ids=["32ranks-groups8", "32ranks-global", "32ranks-groups256", "320ranks", "320ranks-640slots"],
)  # fmt: skip


def yardsticks(work: Callable[[], Any]) -> float:
    """Processor time of one thread, as a multiple of that of compressing 250 kB (branches and small
    tables, as in a plan). The least of five each, in turn, since others use the machine, too."""
    text = bytes(random.Random(0).choices(b"abcdefgh", (20, 9, 7, 5, 3, 2, 1, 1), k=250_000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(seconds(work), seconds(lambda: zlib.compress(text))) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@TIMED
def test_plan_of_58_layers_is_quick(world: tuple[int, int, int, int], limit: float) -> None:
    load = zipf_load(58, 256)
    assert yardsticks(lambda: plan(load, *world)) <= limit


@TIMED
def test_plan_of_58_layers_with_current_is_quick(
    world: tuple[int, int, int, int], limit: float
) -> None:
    before = zipf_load(58, 256)
    old, after = plan(before, *world), drifted(before, 0.05, seed=1)
    assert yardsticks(lambda: plan(after, *world, current=old)) <= limit


# ---- staying close to what is in force ----


@pytest.mark.parametrize(
    "world",
    [PREFILL_GROUPS, PREFILL_GLOBAL, PREFILL_FREE, DECODE, DECODE_TWO_SLOTS, (320, 40, 960, 1),
     (128, 16, 384, 1), (64, 8, 320, 8), (8, 1, 320, 1)],
    ids=["groups8", "global", "groups256", "320ranks", "320ranks-640slots", "320ranks-960slots",
         "128ranks", "64ranks-groups8", "8ranks"],
)  # fmt: skip
def test_drift_of_five_percent_moves_a_quarter_of_a_fresh_plan_at_most(
    world: tuple[int, int, int, int],
) -> None:
    before = zipf_load(16, 256, seed=5)
    after = drifted(before, 0.05, seed=6)
    torch.testing.assert_close(after.sum(1), before.sum(1))
    torch.testing.assert_close(
        (after - before).clamp(min=0).sum(1), 0.05 * before.sum(1), rtol=1e-9, atol=0
    )
    old = plan(before, *world)
    fresh = plan(after, *world)
    kept = plan(after, *world, current=old)

    assert (kept.imbalance(after) <= 1.02 * fresh.imbalance(after) + 1e-12).all()
    assert int(kept.moves_from(old).sum()) <= int(fresh.moves_from(old).sum()) / 4


def test_node_that_must_be_filled_anew_leaves_the_others_as_they_are() -> None:
    load = zipf_load(1, 64, 1.0, seed=5)
    old = plan(load, 8, 4, 80, 4)
    after = load.clone()
    after[0, :16] = after[0, :16].flip(0) ** 2 * 40  # the experts of one group
    new = plan(after, 8, 4, 80, 4, current=old)

    node = int(old.on_nodes[0, :, 0].argmax())
    changed = (new.physical_to_logical != old.physical_to_logical).view(4, -1).sum(1)
    assert changed[node] > 0
    assert changed.sum() == changed[node]


def test_current_of_another_policy_is_left_with_few_moves_at_all() -> None:
    load = zipf_load(2, 64, 0.5, seed=7)
    spread = plan(load, 8, 4, 80, 1)  # groups all over the nodes
    new = plan(load, 8, 4, 80, 8, current=spread)
    by_group = new.on_nodes.view(2, 4, 8, 8).sum(3) > 0
    assert by_group.sum(1).eq(1).all()
    assert (new.moves_from(spread) < plan(load, 8, 4, 80, 8).moves_from(spread)).all()


def test_load_with_nothing_in_common_still_moves_less_than_a_fresh_plan() -> None:
    old = plan(zipf_load(58, 256, seed=1), *DECODE_TWO_SLOTS)
    load = zipf_load(58, 256, seed=2)
    fresh = plan(load, *DECODE_TWO_SLOTS)
    new = plan(load, *DECODE_TWO_SLOTS, current=old)
    assert (new.imbalance(load) <= 1.02 * fresh.imbalance(load) + 1e-12).all()
    assert (new.moves_from(old) < fresh.moves_from(old)).all()


def test_current_that_is_good_enough_stays() -> None:
    load = zipf_load(2, 64, 0.5, seed=7)
    old = plan(load, 8, 2, 80, 8)
    kept = plan(load, 8, 2, 80, 8, current=old)
    assert torch.equal(kept.physical_to_logical, old.physical_to_logical)


def test_slots_that_keep_their_expert_keep_their_place() -> None:
    before = zipf_load(4, 64, 0.8, seed=8)
    after = drifted(before, 0.3, seed=9)
    for groups in (1, 8):
        old = plan(before, 8, 2, 80, groups)
        new = plan(after, 8, 2, 80, groups, current=old, slack=0.0)
        changed = (new.physical_to_logical != old.physical_to_logical).sum(1)
        moves = new.moves_from(old)
        assert (changed <= moves).all()
        assert (moves > 0).any()


# ---- shared experts, traces, traffic ----


@pytest.mark.parametrize("groups", [1, 8], ids=["global", "hierarchical"])
def test_shared_expert_is_one_that_every_token_chooses(groups: int) -> None:
    load = zipf_load(2, 64, 0.5, seed=10) * 8000
    placement = plan(load, 8, 2, 88, groups, num_shared=1, num_topk=8)

    assert placement.num_logical == 65
    # 1000 tokens against 8000 selections: it has the load of an expert, nine per token.
    torch.testing.assert_close(placement.rank_load.sum(1), load.sum(1) * 9 / 8)
    if groups == 8:
        assert placement.on_nodes[:, :, 64].min() >= 1  # on every node


def test_coactivation_cuts_traffic_between_nodes() -> None:
    load = zipf_load(2, 64, 0.3, seed=11)
    trace = routing_trace(load, 2000, 4, num_topics=4, seed=12)
    for groups in (64, 1):  # single experts move; whole ranks move
        blind = plan(trace.load(), 8, 4, 72, groups)
        seeing = plan(trace, 8, 4, 72, groups)
        far = [crossing(p.predict_traffic(trace)) for p in (blind, seeing)]
        assert far[1] < (0.8 if groups == 64 else 1.0) * far[0]
        ratio = seeing.imbalance(trace.load()) / blind.imbalance(trace.load())
        assert ratio.max() < 1.015  # node_slack, and what it costs inside nodes


def crossing(traffic: torch.Tensor) -> float:
    return float(traffic.sum() - torch.diagonal(traffic, dim1=1, dim2=2).sum())


def test_traffic_is_counted_by_hand() -> None:
    # 2 nodes of 1 rank; expert 0 on both, 1 on node 0, 2 on node 1.
    placement = Placement(torch.tensor([[0, 1, 0, 2]]), 3, 2, 2)
    load = torch.tensor([[4.0, 2.0, 6.0]])
    # Half of each load comes from each node. Node 0 keeps 4/2 + 2/2 and sends 6/2.
    assert placement.predict_traffic(load).tolist() == [[[3.0, 3.0], [1.0, 5.0]]]
    assert placement.predict_load(load).tolist() == [[4.0, 8.0]]
    # Tokens (0, 1), (1, 2), (2, 2): from node 0 they reach {0}, {0, 1}, {1}.
    trace = Trace(torch.tensor([[[[0, 1], [1, 2], [2, 2]]]]), 3)
    assert placement.predict_traffic(trace).tolist() == [[[1.0, 1.0], [1.0, 1.5]]]


def test_trace_counts_loads_and_pairs() -> None:
    trace = Trace(torch.tensor([[[[0, 1], [1, -1]]], [[[0, 1], [2, 2]]]]), 3)
    assert trace.load().tolist() == [[2.0, 3.0, 2.0]]
    assert trace.step_load()[1].tolist() == [[1.0, 1.0, 2.0]]
    assert trace.together()[0].tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_trace_survives_a_file(tmp_path: Any, ending: str) -> None:
    trace = routing_trace(zipf_load(2, 32, seed=1), 20, 4)
    trace.write(tmp_path / f"trace.{ending}")
    again = Trace.read(tmp_path / f"trace.{ending}")
    assert torch.equal(again.ids, trace.ids)
    assert again.num_experts == 32


def safetensors(dtype: str, size: int) -> bytes:
    """A file with one word of data, whatever its header says."""
    header = (
        f'{{"a":{{"dtype":"{dtype}","shape":[{size}],"data_offsets":[0,{4 * size}]}}}}'.encode()
    )
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "empty": ("a.safetensors", b""),
        "huge-header": ("b.safetensors", b"\xff" * 16),
        "no-json": ("c.safetensors", (4).to_bytes(8, "little") + b"abcd"),
        "floats": ("d.safetensors", safetensors("F32", 1)),
        "outside": ("e.safetensors", safetensors("I32", 9)),
        "no-zip": ("f.npz", b"PK\x03\x04 no"),
        "other": ("g.bin", b""),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_files_that_are_no_trace_are_refused(tmp_path: Any, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EPError) as error:
        Trace.read(tmp_path / name)
    assert error.value.code in ("E203", "E201")


# ---- generators ----


def test_generators_make_the_skew_they_are_named_after() -> None:
    zipf = zipf_load(2, 100, 1.0, seed=1)
    assert zipf.sort(1, descending=True).values[0, :4].div(zipf.max()).tolist() == pytest.approx(
        [1, 1 / 2, 1 / 3, 1 / 4]
    )
    drift = drifting_load(5, 2, 100, fraction=0.05)
    moved = (drift[1:] - drift[:-1]).abs().sum(2) / 2
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05))
    bursts = bursty_load(200, 1, 50, probability=0.2, height=8.0)
    share = (bursts.amax(2) > 0.13).double().mean()  # 8 / 50, normalized
    assert 0.1 < share < 0.3
    shift = shifting_load(12, 1, 50, steps_per_domain=4)
    same = [torch.equal(shift[i], shift[i + 1]) for i in range(11)]
    assert same == [True, True, True, False, True, True, True, False, True, True, True]
    trace = routing_trace(zipf_load(1, 64, 0.5), 3000, 4)
    assert (trace.ids.sort(3).values.diff(dim=3) > 0).all()  # different experts
    measured = trace.load()[0] / trace.load().sum()
    assert (measured - zipf_load(1, 64, 0.5)[0]).abs().max() < 0.01


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"load": torch.full((2, 8), -1.0)}, "E203"),
        ({"load": torch.full((2, 8), float("nan"))}, "E203"),
        ({"load": torch.ones(2, 2, 8)}, "E201"),
        ({"load": "no"}, "E200"),
        ({"num_replicas": 11}, "E203"),
        ({"num_replicas": 4}, "E203"),
        ({"num_nodes": 3}, "E203"),
        ({"num_groups": 3, "policy": "hierarchical"}, "E203"),
        ({"policy": "best"}, "E203"),
        ({"num_shared": 1}, "E203"),
        ({"slack": -1}, "E203"),
        ({"distinct": "sometimes"}, "E203"),
        ({"current": initial_placement(1, 8, 12, 4, 2)}, "E203"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], code: str) -> None:
    good = {"load": torch.ones(2, 8), "num_ranks": 4, "num_nodes": 2, "num_replicas": 12}
    plan(**good)
    with pytest.raises(EPError) as error:
        plan(**{**good, **change})
    assert error.value.code == code


def test_placement_without_a_slot_for_an_expert_is_refused() -> None:
    with pytest.raises(EPError, match="expert 2 of layer 0 is nowhere"):
        Placement(torch.tensor([[0, 1, 0, 1]]), 3, 2)
