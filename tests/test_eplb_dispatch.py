"""Replicas inside dispatch: every backend chooses as the rule says, as the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same_bits, same_received, specified_rows
from torch import Tensor

from ep_comm import Buffer, EPError, reference
from ep_comm.eplb import Placement, initial_placement, plan
from ep_comm.replicas import Replicas, make_replicas
from ep_comm.testing import Cluster, run_processes
from ep_comm.testing.skew import zipf_load

RANKS, NODES, LOGICAL, SLOTS, LAYERS, TOPK, HIDDEN = 4, 2, 6, 12, 2, 3, 16
OPTIONS = {"num_experts": SLOTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens": 32}
CASES: dict[str, dict[str, Any]] = {
    "compact": {},
    "compact-row-index": {"row_index": True, "alignment": 4},
    "compact-static": {"sync": False},
    "compact-static-row-index": {"sync": False, "row_index": True, "alignment": 4},
    "grouped": {"layout": "grouped", "alignment": 2},
    "grouped-static": {"layout": "grouped", "sync": False},
    "slab": {"layout": "slab"},
    "slab-static": {"layout": "slab", "sync": False, "capacity": 100},
    "origins": {"layout": "grouped", "origins": True},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ranks_per_node=RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def buffers(cluster: Cluster) -> list[Buffer]:
    return cluster.make_buffers(**OPTIONS, backend="cpu")


@pytest.fixture(scope="module")
def placement() -> Placement:
    return plan(zipf_load(LAYERS, LOGICAL, seed=1), RANKS, NODES, SLOTS)


def tables(placement: Placement, rank: int, **options: Any) -> Replicas:
    return make_replicas(
        placement.physical_to_logical, placement.num_logical, rank, placement.num_ranks,
        placement.num_nodes, **options,
    )  # fmt: skip


def inputs(seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    sizes = (20, 0, 32, 7)
    x = [torch.randn((t, HIDDEN), generator=g).to(torch.bfloat16) for t in sizes]
    idx = [torch.randint(-1, LOGICAL, (t, TOPK), generator=g) for t in sizes]
    return x, idx, [torch.rand((t, TOPK), generator=g) for t in sizes]


# ---- the rule ----


def test_choice_is_worked_by_hand() -> None:
    # 2 nodes x 2 ranks x 2 slots; expert 0 on ranks 0 and 2, expert 1 on 1 and 3, 2 on 0, 3 on 3.
    slots = torch.tensor([[0, 2, 1, 1, 0, 2, 1, 3]])
    placement = Placement(slots, 4, 4, 2)
    ids = torch.tensor([[0, 1, 3], [0, 1, -1]])
    # Rank 0 has expert 0 in slot 0; expert 1 is on its node twice, slots 2 and 3; 3 only in slot 7.
    # Tokens 0 and 1 spread to 0 and 0x9e3779b9: the lower and the upper half.
    assert tables(placement, 0).of_layer(0).route(ids, 0).tolist() == [[0, 2, 7], [0, 3, -1]]
    # Rank 3 has expert 1 in slot 6; expert 0 is on its node in slot 4.
    assert tables(placement, 3).of_layer(0).route(ids, 3).tolist() == [[4, 6, 7], [4, 6, -1]]
    # Without preference, expert 0 in slots 0 and 4, expert 1 in 2, 3, 6: thirds of the range.
    table = tables(placement, 0, prefer="none").of_layer(0)
    assert table.route(ids, 0).tolist() == [[0, 2, 7], [4, 3, -1]]


def test_tokens_spread_in_proportion_to_capacity() -> None:
    slots = torch.tensor([[0, 1, 0, 1]])
    placement = Placement(slots, 2, 4, 1)
    capacity = torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    ids = torch.tensor([[0, 1]]).expand(4000, -1)
    table = tables(placement, 1, prefer="none", capacity=capacity).of_layer(0)
    count = torch.bincount(table.route(ids, 1).flatten(), minlength=4)
    # Golden-ratio steps leave at most a few tokens to chance.
    assert (count - torch.tensor([3000, 2000, 1000, 2000])).abs().max() < 8


@pytest.mark.parametrize("prefer", ["node", "rank", "none"])
def test_tables_hold_the_nearest_replicas_only(placement: Placement, prefer: str) -> None:
    for rank in range(RANKS):
        made = tables(placement, rank, prefer=prefer)
        for layer in range(LAYERS):
            one = made.of_layer(layer)
            for expert in range(LOGICAL):
                start, end = one.first[expert : expert + 2].tolist()
                row = placement.logical_to_physical[layer, expert]
                all_slots = row[row >= 0].tolist()
                own = [s for s in all_slots if s // 3 == rank]
                node = [s for s in all_slots if s // 6 == rank // 2]
                want = {"node": own or node or all_slots, "rank": own or all_slots}
                assert one.slot[start:end].tolist() == want.get(prefer, all_slots)
                assert int(one.until[end - 1]) == -1  # all 32 bits


# ---- backends ----


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_cpu_agrees_with_the_reference(
    cluster: Cluster, buffers: list[Buffer], placement: Placement, options: dict[str, Any]
) -> None:
    for layer in range(LAYERS):
        x, idx, weights = inputs(layer)
        replicas = [tables(placement, r).of_layer(layer) for r in range(RANKS)]

        def work(rank: int, layer: int = layer, data: Any = (x, idx, weights)) -> Any:
            buffer = buffers[rank]
            buffer.set_placement(None)
            buffer.set_placement(placement)
            mine = [part[rank] for part in data]
            recv = buffer.dispatch(*mine, layer=layer, **options)
            cached = buffer.dispatch(mine[0], handle=recv.handle)
            y = recv.x.clone()
            out = buffer.combine(y, recv.handle)
            return recv, cached.x, out, buffer.load

        got = cluster.run(work)
        want = reference.dispatch(
            x, idx, weights, num_experts=SLOTS, max_tokens=32, replicas=replicas,
            generation=buffers[0]._backend.generation,
            routing_number=int(got[0][0].handle.meta[2]), **options,
        )  # fmt: skip
        handles = [w.handle for w in want]
        again = reference.dispatch(x, handles=handles, num_experts=SLOTS, max_tokens=32)
        back = reference.combine([w.x for w in want], handles)
        for rank, (recv, cached, out, load) in enumerate(got):
            same_received(recv, want[rank])
            for index in specified_rows(want[rank]):
                same_bits(cached[index], again[rank].x[index], "cached")
            same_bits(out, back[rank], "combine")
            same_bits(load[layer], replicas[rank].load, "load")
            assert load[1 - layer].sum() == 0


def collective_rank(rank: int, num_ranks: int) -> list[str]:
    placed = plan(zipf_load(LAYERS, LOGICAL, seed=1), num_ranks, 1, SLOTS)
    x, idx, weights = (part[:num_ranks] for part in inputs(5))
    wrong = []
    with Buffer(None, **OPTIONS, backend="collective", device="cpu") as buffer:
        for name, options in CASES.items():
            buffer.set_placement(None)
            buffer.set_placement(placed)
            replicas = [tables(placed, r).of_layer(1) for r in range(num_ranks)]
            recv = buffer.dispatch(x[rank], idx[rank], weights[rank], layer=1, **options)
            want = reference.dispatch(
                x, idx, weights, num_experts=SLOTS, max_tokens=32, replicas=replicas,
                generation=buffer._backend.generation,
                routing_number=int(recv.handle.meta[2]), **options,
            )  # fmt: skip
            try:
                same_received(recv, want[rank])
                same_bits(buffer.load[1], replicas[rank].load, "load")
                out = buffer.combine(recv.x.clone(), recv.handle)
                back = reference.combine([w.x for w in want], [w.handle for w in want])
                same_bits(out, back[rank], "combine")
                cached = buffer.dispatch(x[rank], handle=recv.handle)
                handles = [w.handle for w in want]
                again = reference.dispatch(x, handles=handles, num_experts=SLOTS, max_tokens=32)
                for index in specified_rows(want[rank]):
                    same_bits(cached.x[index], again[rank].x[index], "cached")
                same_bits(buffer.load[1], replicas[rank].load, "load of a cached call")
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
        for bad in (LOGICAL, SLOTS):  # the first is a physical expert, but no logical one
            try:
                buffer.dispatch(x[rank], torch.full_like(idx[rank], bad))
                wrong.append(f"id {bad} was taken")
            except EPError as error:
                if error.code != "E213" or f"id {bad}" not in str(error):
                    wrong.append(str(error))
    return wrong


def test_collective_agrees_with_the_reference() -> None:
    assert run_processes(collective_rank, 2) == [[], []]


# ---- agreement, refusals, what is counted ----


def test_ranks_with_different_placements_or_layers_are_told(
    cluster: Cluster, buffers: list[Buffer], placement: Placement
) -> None:
    other = initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES)
    x, idx, _ = inputs()

    def work(rank: int, placements: list[Placement], layers: list[int]) -> None:
        buffers[rank].set_placement(placements[rank])
        buffers[rank].dispatch(x[rank], idx[rank], layer=layers[rank])

    for placements, layers in (
        ([placement, placement, other, placement], [0] * 4),
        ([placement] * 4, [0, 1, 0, 0]),
    ):
        errors = cluster.run_catching(lambda r, p=placements, n=layers: work(r, p, n))
        assert [e.code for e in errors if isinstance(e, EPError)] == ["E220"] * 4
        assert "placement" in str(errors[0])
        assert "layer" in str(errors[0])
    cluster.run(lambda r: work(r, [placement] * 4, [1] * 4))  # and it goes on


def test_ids_that_are_no_logical_expert_are_refused_and_not_counted(
    cluster: Cluster, buffers: list[Buffer], placement: Placement
) -> None:
    x, idx, _ = inputs()
    idx[2] = idx[2].clone()
    idx[2][3, 1] = LOGICAL  # there is such a slot

    def work(rank: int) -> tuple[Tensor, Tensor, Any]:
        buffer = buffers[rank]
        buffer.set_placement(None)
        buffer.set_placement(placement)
        with pytest.raises(EPError) as error:
            buffer.dispatch(x[rank], idx[rank])
        assert error.value.code == "E213"
        assert "first token 3, k 1, id 6" in str(error.value)
        load = buffer.load.clone()
        failed = buffer.dispatch(x[rank], idx[rank], sync=False)
        with pytest.raises(EPError):
            buffer.check()
        return load, idx[rank], failed

    replicas = [tables(placement, r).of_layer(0) for r in range(RANKS)]
    want = reference.dispatch(
        x, idx, num_experts=SLOTS, max_tokens=32, replicas=replicas, sync=False
    )
    for rank, (load, ids, failed) in enumerate(cluster.run(work)):
        valid = torch.bincount(ids[ids >= 0], minlength=LOGICAL)[:LOGICAL]
        assert load[0].tolist() == ([0] * LOGICAL if rank == 2 else valid.tolist())
        same_bits(failed.handle.topk_idx, want[rank].handle.topk_idx, "handle.topk_idx")


def test_layer_none_names_slots_and_handles_outlive_the_placement(
    cluster: Cluster, buffers: list[Buffer], placement: Placement
) -> None:
    x, idx, _ = inputs()

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(placement)
        routed = buffer.dispatch(x[rank], idx[rank], layout="grouped")
        by_slot = buffer.dispatch(x[rank], routed.handle.topk_idx, layer=None, layout="grouped")
        same_bits(by_slot.x, routed.x)
        buffer.set_placement(initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES))
        cached = buffer.dispatch(x[rank], handle=routed.handle)
        same_bits(cached.x, routed.x)
        same_bits(buffer.combine(routed.x, routed.handle), buffer.combine(cached.x, cached.handle))

    cluster.run(work)


def test_begun_dispatches_are_routed_and_counted(
    cluster: Cluster, buffers: list[Buffer], placement: Placement
) -> None:
    x, idx, weights = inputs(3)

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(None)
        buffer.set_placement(placement)
        mine = x[rank], idx[rank], weights[rank]
        begun = [buffer.dispatch(*mine, layer=n % 2, layout="slab", wait=False) for n in range(4)]
        plain = [buffer.dispatch(*mine, layer=n, layout="slab") for n in range(2)]
        for n, op in enumerate(begun):
            same_bits(op.wait().handle.topk_idx, plain[n % 2].handle.topk_idx)
        once = torch.bincount(idx[rank][idx[rank] >= 0], minlength=LOGICAL)
        assert buffer.load.tolist() == [(3 * once).tolist()] * 2

    cluster.run(work)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda b: b.set_placement("no"), "E200"),
        (lambda b: b.set_placement(initial_placement(1, 4, 8, RANKS)), "E203"),
        (lambda b: b.set_placement(initial_placement(1, 6, 12, 6)), "E203"),
        (lambda b: b.set_placement(initial_placement(1, 6, 12, 4), prefer="far"), "E203"),
        (lambda b: b.set_placement(initial_placement(1, 6, 12, 4), capacity=[1.0]), "E201"),
        (
            lambda b: b.set_placement(initial_placement(1, 6, 12, 4), capacity=torch.zeros(1, 12)),
            "E203",
        ),
    ],
)
def test_placements_that_do_not_fit_are_refused(
    buffers: list[Buffer], make: Any, code: str
) -> None:
    with pytest.raises(EPError) as error:
        make(buffers[0])
    assert error.value.code == code


def test_layer_that_does_not_exist_is_refused_on_all_ranks(
    cluster: Cluster, buffers: list[Buffer], placement: Placement
) -> None:
    x, idx, _ = inputs()

    def work(rank: int) -> None:
        buffers[rank].set_placement(placement)
        buffers[rank].dispatch(x[rank], idx[rank], layer=LAYERS if rank == 1 else 0)

    errors = cluster.run_catching(work)
    assert [e.code for e in errors if isinstance(e, EPError)] == ["E203"] * RANKS


def test_placement_needs_the_default_expert_map(cluster: Cluster) -> None:
    with Buffer(
        None, num_experts=4, num_topk=1, hidden=16, max_tokens=4, expert_map=[0] * 4, device="cpu"
    ) as one:  # one rank: every map is the default
        one.set_placement(initial_placement(1, 2, 4, 1))
    made = cluster.run(
        lambda r: Buffer(
            cluster.group(r), **OPTIONS, expert_map=[e % 4 for e in range(12)], device="cpu"
        )
    )
    with pytest.raises(EPError, match="default expert_map"):
        made[0].set_placement(initial_placement(1, 6, 12, 4))
    for buffer in made:
        buffer.close()
