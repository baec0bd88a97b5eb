"""Experts on the move: statistics, the balancer, migration, and a layer that does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same_bits
from ranks import Me, Ranks
from torch import Tensor

from ep_comm import Buffer, EPError
from ep_comm.eplb import Balancer, LoadStats, Placement, initial_placement, migrate, plan, transfers
from ep_comm.eplb.transport import gather_bytes, reduce_sum
from ep_comm.testing import Cluster, run_processes
from ep_comm.testing.skew import bursty_load, drifted, shifting_load, zipf_load

RANKS, NODES, LOGICAL, SLOTS, LAYERS, TOPK, HIDDEN = 4, 2, 10, 16, 2, 3, 16
PER_RANK = SLOTS // RANKS
OPTIONS = {"num_experts": SLOTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens": 24}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ranks_per_node=RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def buffers(cluster: Cluster) -> list[Buffer]:
    return cluster.make_buffers(**OPTIONS, backend="cpu")


def two_placements() -> tuple[Placement, Placement]:
    before = zipf_load(LAYERS, LOGICAL, seed=1)
    old = plan(before, RANKS, NODES, SLOTS)
    new = plan(drifted(before, 0.5, seed=2), RANKS, NODES, SLOTS)
    assert (new.moves_from(old) > 0).all()
    return old, new


def weights_of(logical: list[list[Tensor]], placement: Placement, rank: int) -> list[list[Tensor]]:
    """The slots of a rank, filled as a placement says; logical: per layer, [E, ...] tensors."""
    return [
        [t[placement.per_rank[layer, rank]].clone() for t in tensors]
        for layer, tensors in enumerate(logical)
    ]


def logical_weights() -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        [
            torch.randn((LOGICAL, 8, HIDDEN), generator=g).to(torch.bfloat16),
            torch.randn((LOGICAL, HIDDEN, 8), generator=g).to(torch.bfloat16),
            torch.randint(0, 255, (LOGICAL, 7), generator=g, dtype=torch.uint8),
            torch.randn((LOGICAL,), generator=g, dtype=torch.float64),
        ]
        for _ in range(LAYERS)
    ]


# ---- bytes between ranks ----


def test_gathered_and_reduced_values_are_those_of_all_ranks(
    cluster: Cluster, buffers: list[Buffer]
) -> None:
    data = [torch.arange(3000, dtype=torch.float64) * (r + 1) for r in range(RANKS)]

    def work(rank: int) -> tuple[Tensor, Tensor]:
        bytes_of = data[rank].view(torch.uint8)[:2001]  # no whole number of rows
        return gather_bytes(buffers[rank], bytes_of, "t"), reduce_sum(
            buffers[rank], data[rank], "t"
        )

    for gathered, total in cluster.run(work):
        for rank in range(RANKS):
            same_bits(gathered[rank], data[rank].view(torch.uint8)[:2001])
        same_bits(total, torch.arange(3000, dtype=torch.float64) * 10)


# ---- statistics ----


def test_stats_count_windows_decay_and_all_ranks(cluster: Cluster, buffers: list[Buffer]) -> None:
    placement = initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES)
    g = torch.Generator().manual_seed(4)
    steps = [[torch.randint(-1, LOGICAL, (9, TOPK), generator=g) for _ in range(RANKS)]
             for _ in range(5)]  # fmt: skip

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        buffer = buffers[rank]
        buffer.set_placement(placement)
        stats = LoadStats(buffer, window=2, half_life=1.0)
        for ids in steps:
            buffer.dispatch(torch.zeros(9, HIDDEN), ids[rank], layer=1)
            stats.step()
        return stats.windowed, stats.decayed, stats.total()

    def count(ids: Tensor) -> Tensor:
        return torch.bincount(ids[ids >= 0], minlength=LOGICAL)

    everybody = sum(count(steps[s][r]) for s in (3, 4) for r in range(RANKS))
    for rank, (windowed, decayed, total) in enumerate(cluster.run(work)):
        counts = [count(ids[rank]) for ids in steps]
        assert windowed.tolist() == [[0] * LOGICAL, (counts[3] + counts[4]).tolist()]
        want = sum(c.double() * 0.5 ** (4 - s) for s, c in enumerate(counts))
        torch.testing.assert_close(decayed[1], want)
        assert total[1].tolist() == everybody.tolist()


def test_stats_go_on_over_changes_of_placement(cluster: Cluster, buffers: list[Buffer]) -> None:
    placement = initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES)
    other = plan(zipf_load(LAYERS, LOGICAL, seed=1), RANKS, NODES, SLOTS)
    ids = torch.tensor([[0, 1, 2], [0, -1, 5]])
    once = torch.bincount(ids[ids >= 0], minlength=LOGICAL)

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(placement)
        buffer.dispatch(torch.zeros(2, HIDDEN), ids)  # before there are statistics
        stats = LoadStats(buffer, window=8, half_life=1.0)

        def step() -> None:
            buffer.dispatch(torch.zeros(2, HIDDEN), ids, layer=1)
            stats.step()

        step()
        assert stats.windowed.tolist() == [[0] * LOGICAL, once.tolist()]
        buffer.set_placement(other)  # the same counters go on
        step()
        buffer.set_placement(None)  # these begin anew
        buffer.set_placement(other)
        step()
        assert stats.windowed.tolist() == [[0] * LOGICAL, (3 * once).tolist()]
        torch.testing.assert_close(stats.decayed[1], once.double() * 1.75)
        buffer.set_placement(initial_placement(LAYERS + 1, LOGICAL, SLOTS, RANKS, NODES))
        step()
        assert stats.windowed.tolist() == [[0] * LOGICAL, once.tolist(), [0] * LOGICAL]

    cluster.run(work)


# ---- when to move ----


def checks(loads: Tensor, **options: Any) -> list[int]:
    """At which of the loads, [steps, layers, experts], a balancer proposes; proposals are taken."""
    buffer = Buffer(None, num_experts=72, num_topk=1, hidden=16, max_tokens=1, device="cpu")
    # One rank in reality; the decision is local and for sixteen.
    placement = plan(loads[0], 16, 2, 72 * 2)
    buffer.set_placement = lambda *_: None  # type: ignore[method-assign]
    buffer._replicas = _some_tables(placement)
    proposals = []
    with buffer:
        balancer = Balancer(buffer, placement, **options)
        for step, load in enumerate(loads):
            new = balancer.check(load)
            if new is not None:
                proposals.append(step)
                balancer.adopt(new)
    return proposals


def _some_tables(placement: Placement) -> Any:
    from ep_comm.replicas import make_replicas

    return make_replicas(placement.physical_to_logical, placement.num_logical, 0, 16, 2)


def test_balancer_proposes_after_a_lasting_shift_only() -> None:
    domains = shifting_load(24, 4, 128, num_domains=3, steps_per_domain=8, seed=5)
    # A new domain at 8 and 16; the second check in a row that shows it proposes.
    assert checks(domains, patience=2, rest=2) == [9, 17]
    assert checks(domains, patience=4, rest=2) == [11, 19]
    assert checks(domains, patience=17) == []  # two domains' time
    steady = zipf_load(4, 128, seed=6).repeat(10, 1, 1)
    assert checks(steady, patience=1) == []


def test_balancer_ignores_bursts_and_rests_after_a_change() -> None:
    steady = zipf_load(4, 128, 0.7, seed=7)
    bursts = bursty_load(20, 4, 128, probability=0.0, seed=7)
    torch.testing.assert_close(bursts[0], steady / steady.sum(1, keepdim=True))
    bursts[5] = bursts[5] + 0.2 * torch.eye(128, dtype=torch.float64)[3]
    bursts[12] = bursts[12] + 0.2 * torch.eye(128, dtype=torch.float64)[9]
    assert checks(bursts, patience=2) == []
    assert checks(bursts, patience=1, rest=0) == [5, 6, 12, 13]  # there and back, twice
    assert checks(bursts, patience=1, rest=1) == [5, 7, 12, 14]


# ---- migration ----


def test_transfers_take_the_nearest_replica_and_no_expert_twice() -> None:
    old = Placement(torch.tensor([[0, 1, 2, 3, 0, 1, 4, 5]]), 6, 4, 2)
    new = Placement(torch.tensor([[0, 4, 2, 3, 4, 1, 0, 5]]), 6, 4, 2)
    got = [(t.expert, t.src, t.dst) for t in transfers(old, new)]
    # Rank 0 wants 4 from the other node; rank 2 wants 4 from its own; rank 3 wants 0 from rank 2.
    assert got == [(4, 6, 0), (4, 6, 2), (0, 4, 3)]
    assert transfers(old, old) == []


@pytest.mark.parametrize("piece_bytes", [1, 500, 1 << 20], ids=["rows", "pieces", "at-once"])
def test_migration_puts_every_expert_where_the_new_placement_has_it(
    cluster: Cluster, buffers: list[Buffer], piece_bytes: int
) -> None:
    old, new = two_placements()
    logical = logical_weights()

    def work(rank: int) -> tuple[int, int]:
        buffer = buffers[rank]
        buffer.set_placement(old)
        weights = weights_of(logical, old, rank)
        moving = migrate(buffer, old, new, weights, piece_bytes=piece_bytes)
        steps = 0
        while not moving.step():
            steps += 1
            assert buffer._replicas.digest != moving_digest(buffer, new)
            for mine, before in zip(weights, weights_of(logical, old, rank), strict=True):
                for got, want in zip(mine, before, strict=True):
                    same_bits(got, want, "a weight in use")
        assert moving.step()  # and again
        for mine, after in zip(weights, weights_of(logical, new, rank), strict=True):
            for got, want in zip(mine, after, strict=True):
                same_bits(got, want, "a weight")
        assert steps == moving.num_pieces
        return steps, moving.moved_bytes

    results = cluster.run(work)
    expert = 2 * 2 * 8 * HIDDEN + 7 + 8
    assert sum(moved for _, moved in results) == expert * len(transfers(old, new))
    assert len({steps for steps, _ in results}) == 1


def moving_digest(buffer: Buffer, placement: Placement) -> int:
    from ep_comm.replicas import make_replicas

    return make_replicas(placement.physical_to_logical, LOGICAL, buffer.rank, RANKS, NODES).digest


@pytest.mark.parametrize("stage", ["piece", "change"])
def test_rank_that_fails_midway_leaves_the_old_placement_in_force(
    cluster: Cluster, buffers: list[Buffer], stage: str
) -> None:
    old, new = two_placements()
    logical = logical_weights()

    def work(rank: int) -> str:
        buffer = buffers[rank]
        buffer.set_placement(old)
        weights = weights_of(logical, old, rank)
        moving = migrate(buffer, old, new, weights, piece_bytes=500)
        moving.step()
        if rank == 2 and stage == "piece":
            moving._weights = None  # type: ignore[assignment]  # it cannot read them any more
        for _ in range(moving.num_pieces - 1):
            moving.step()
        if rank == 2:
            moving._staged.clear()  # nor find what came
        with pytest.raises((EPError, TypeError, KeyError)) as error:  # rank 2 raises its own
            moving.step()
        for mine, before in zip(weights, weights_of(logical, old, rank), strict=True):
            for got, want in zip(mine, before, strict=True):
                same_bits(got, want, "a weight")
        buffer.dispatch(torch.zeros(2, HIDDEN), torch.zeros((2, 1), dtype=torch.int64))
        # And once more, now that all can.
        again = migrate(buffer, old, new, weights)
        while not again.step():
            pass
        return type(error.value).__name__ + str(error.value)

    told = cluster.run(work)
    assert told[2].startswith("TypeError" if stage == "piece" else "KeyError")
    for rank in (0, 1, 3):
        assert "E203" in told[rank]
        assert "abandoned migration" in told[rank]
        assert "rank 2" in told[rank]


def collective_rank(rank: int, num_ranks: int) -> int:
    before = zipf_load(LAYERS, LOGICAL, seed=1)
    old = plan(before, num_ranks, 1, SLOTS)
    new = plan(drifted(before, 0.5, seed=2), num_ranks, 1, SLOTS)
    g = torch.Generator().manual_seed(rank)
    x = torch.randn((16, HIDDEN), generator=g).to(torch.bfloat16)
    ids, scores = torch.randint(-1, LOGICAL, (16, TOPK), generator=g), torch.rand(16, TOPK)
    with Buffer(None, **OPTIONS, backend="collective", device="cpu") as buffer:
        buffer.set_placement(old)
        weights = weights_of(logical_weights(), old, rank)

        def outputs() -> list[Tensor]:
            return [moe(buffer, x, ids, scores, weights, layer) for layer in range(LAYERS)]

        first, over = outputs(), False
        moving = migrate(buffer, old, new, weights, piece_bytes=1500)
        while not over:
            over = moving.step()
            for got, want in zip(outputs(), first, strict=True):
                same_bits(got, want, "an output")
        for mine, after in zip(weights, weights_of(logical_weights(), new, rank), strict=True):
            for got, want in zip(mine, after, strict=True):
                same_bits(got, want)
        return len(transfers(old, new))


def test_layer_is_bit_identical_while_weights_migrate_over_the_collective_backend() -> None:
    moved = run_processes(collective_rank, 2)
    assert moved[0] == moved[1] > 0


def dies_midway(me: Me) -> str:
    old, new = two_placements()
    buffer = me.buffer(**OPTIONS)
    buffer.set_placement(old)
    weights = weights_of(logical_weights(), old, me.rank)
    kept = [[t.clone() for t in layer] for layer in weights]
    moving = migrate(buffer, old, new, weights, piece_bytes=500)
    moving.step()
    if me.rank == 1:
        me.say("now")
        me.wait_for_go()  # never comes
    try:
        while not moving.step():
            pass
    except EPError as error:
        for mine, before in zip(weights, kept, strict=True):
            for got, want in zip(mine, before, strict=True):
                same_bits(got, want)
        return error.code
    return "changed over"


def test_killed_rank_leaves_the_weights_of_the_others_as_they_were() -> None:
    with Ranks(dies_midway, RANKS) as ranks:
        assert ranks.hear(1) == "now"
        ranks.kill(1)
        assert {ranks.result(rank) for rank in (0, 2, 3)} == {"E110"}


def test_options_of_the_placement_are_refused_before_a_weight_is_touched(
    cluster: Cluster, buffers: list[Buffer]
) -> None:
    old, new = two_placements()

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(old)
        weights = weights_of(logical_weights(), old, rank)
        for options, code in (({"prefer": "far"}, "E203"), ({"capacity": torch.ones(3)}, "E201")):
            with pytest.raises(EPError) as error:
                migrate(buffer, old, new, weights, **options)
            assert error.value.code == code
        shares = torch.rand((LAYERS, SLOTS), generator=torch.Generator().manual_seed(1)) + 0.1
        moving = migrate(buffer, old, new, weights, capacity=shares, prefer="none")
        while not moving.step():
            pass
        got = buffer.dispatch(torch.zeros(9, HIDDEN), torch.arange(9).view(9, 1)).handle.topk_idx
        buffer.set_placement(new, capacity=shares, prefer="none")
        want = buffer.dispatch(torch.zeros(9, HIDDEN), torch.arange(9).view(9, 1)).handle.topk_idx
        same_bits(got, want)

    cluster.run(work)


@pytest.mark.parametrize("layers", [0, 1])
def test_weights_that_do_not_fit_are_refused(buffers: list[Buffer], layers: int) -> None:
    old, new = two_placements()
    wrong = [[torch.zeros(PER_RANK + 1, 3)]] * LAYERS if layers else []
    with pytest.raises(EPError) as error:
        migrate(buffers[0], old, new, wrong)
    assert error.value.code == "E201"


# ---- a layer that does not notice ----


def experts(x: Tensor, offsets: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each row alone: what comes out of a row must not depend on the rows beside it."""
    y = torch.zeros_like(x)
    for slot in range(up.shape[0]):
        for row in range(int(offsets[slot]), int(offsets[slot + 1])):
            inner = torch.relu(up[slot].float() @ x[row].float())
            y[row] = (down[slot].float() @ inner).to(x.dtype)
    return y


def moe(buffer: Buffer, x: Tensor, ids: Tensor, scores: Tensor, weights: Any, layer: int) -> Tensor:
    recv = buffer.dispatch(x, ids, scores, layout="grouped", layer=layer)
    y = experts(recv.x, recv.offsets, *weights[layer][:2])
    # Sums in top-k order do not depend on where the experts live.
    return buffer.combine(y, recv.handle, weighted=True, order="topk")


def test_layer_is_bit_identical_before_during_and_after_rebalancing(
    cluster: Cluster, buffers: list[Buffer]
) -> None:
    old, new = two_placements()
    logical = logical_weights()
    g = torch.Generator().manual_seed(8)
    x = [torch.randn((16, HIDDEN), generator=g).to(torch.bfloat16) for _ in range(RANKS)]
    ids = [torch.rand((16, LOGICAL), generator=g).topk(TOPK).indices for _ in range(RANKS)]
    scores = [torch.rand((16, TOPK), generator=g) for _ in range(RANKS)]

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(old)
        weights = weights_of(logical, old, rank)

        def outputs() -> list[Tensor]:
            call = (buffer, x[rank], ids[rank], scores[rank], weights)
            return [moe(*call, layer) for layer in range(LAYERS)]

        first = outputs()
        slots_before = buffer.dispatch(x[rank], ids[rank]).handle.topk_idx
        moving = migrate(buffer, old, new, weights, piece_bytes=500)
        over = False
        while not over:
            over = moving.step()
            for got, want in zip(outputs(), first, strict=True):
                same_bits(got, want)
        slots_after = buffer.dispatch(x[rank], ids[rank]).handle.topk_idx
        assert not torch.equal(slots_before, slots_after)  # it did go elsewhere

    cluster.run(work)


def test_shared_expert_is_chosen_by_every_token_and_found_on_its_node(
    cluster: Cluster, buffers: list[Buffer]
) -> None:
    routed, shared = 8, 8  # experts, and the id of the one behind them
    seed = torch.Generator().manual_seed(6)
    ids = [torch.rand((20, routed), generator=seed).topk(2).indices for _ in range(RANKS)]
    load = torch.stack([torch.bincount(torch.cat(ids).flatten(), minlength=routed)] * LAYERS)
    options = {"num_groups": routed, "num_shared": 1, "num_topk": 2}
    old = plan(load, RANKS, NODES, SLOTS, **options)
    assert old.rank_load.sum(1).tolist() == [20 * RANKS * 3] * LAYERS  # three experts per token
    logical = [[t[: routed + 1] for t in layer] for layer in logical_weights()]
    x = [torch.randn((20, HIDDEN), generator=seed).to(torch.bfloat16) for _ in range(RANKS)]

    def work(rank: int) -> None:
        buffer = buffers[rank]
        buffer.set_placement(None)
        balancer = Balancer(buffer, old, every=1, threshold=0.0, patience=1, window=1, **options)
        weights = weights_of(logical, old, rank)
        chosen = torch.cat([ids[rank], torch.full((20, 1), shared)], 1)
        scores = torch.ones(20, 3)
        outputs = [moe(buffer, x[rank], chosen, scores, weights, n) for n in range(LAYERS)]
        slots = buffer.dispatch(x[rank], chosen).handle.topk_idx[:, 2]
        assert (slots // PER_RANK // (RANKS // NODES)).eq(rank // (RANKS // NODES)).all()

        for layer, out in enumerate(outputs):  # one rank with all experts: sums in the same order
            up, down = logical[layer][:2]
            for token in range(20):
                want = torch.zeros(HIDDEN)
                for e in chosen[token].tolist():
                    inner = torch.relu(up[e].float() @ x[rank][token].float())
                    want += (down[e].float() @ inner).to(torch.bfloat16).float()
                same_bits(out[token], want.to(torch.bfloat16))
        balancer.stats.step()
        counted = balancer.stats.total()
        assert counted[:, shared].tolist() == [40 * RANKS, 20 * RANKS]  # layer 0 ran twice
        assert balancer.check(counted) is None  # an even load: nothing is gained
        assert abs(balancer.gain) < 0.02

    cluster.run(work)


def test_ten_lines_of_a_serving_engine(cluster: Cluster, buffers: list[Buffer]) -> None:
    placement = initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES)
    logical = logical_weights()
    hot = torch.tensor([8, 9, 8])  # experts with one replica each at first

    def work(rank: int) -> tuple[Placement, int]:
        buffer = buffers[rank]
        buffer.set_placement(None)
        weights = weights_of(logical, placement, rank)
        g = torch.Generator().manual_seed(rank)
        balancer = Balancer(buffer, placement, every=4, window=4)
        moving, changes = None, 0
        for _ in range(40):
            ids = torch.rand((16, LOGICAL), generator=g).topk(TOPK).indices
            ids[::2] = hot
            for layer in range(LAYERS):
                buffer.dispatch(torch.zeros(16, HIDDEN), ids, layer=layer)
            if moving is None:
                new = balancer.step()
                moving = new and migrate(buffer, balancer.placement, new, weights)
            elif moving.step():
                balancer.adopt(moving.new)
                moving, changes = None, changes + 1
        for mine, after in zip(weights, weights_of(logical, balancer.placement, rank), strict=True):
            for got, want in zip(mine, after, strict=True):
                same_bits(got, want)
        return balancer.placement, changes

    results = cluster.run(work)
    first = results[0][0]
    assert results[0][1] >= 1
    for other, changes in results:
        assert torch.equal(other.physical_to_logical, first.physical_to_logical)
        assert changes == results[0][1]
    load = torch.ones(1, LOGICAL, dtype=torch.float64)
    load[0, 8:] += 12
    assert (
        first.imbalance(load.expand(LAYERS, -1)).max()
        < placement.imbalance(load.expand(LAYERS, -1)).max()
    )
