"""Load balancing over the nvlink backend: replicas, load, migration of weights in GPU memory.

Ranks are threads on one GPU, as in test_nvlink_loopback, or processes. Here torch computes between
the calls of a rank while kernels of others wait for it: kernels are loaded when CUDA starts, since
loading one lazily may wait for all that runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from compare import same_bits, specified_rows
from test_nvlink_loopback import (
    check_received,
    code_of,
    make_cluster,
    on_gpu,
    on_streams,
    run_catching,
)
from torch import Tensor

from ep_comm import Buffer, EPError, Received, reference
from ep_comm.eplb import Balancer, LoadStats, Migration, Placement, initial_placement, migrate, plan
from ep_comm.eplb.transport import gather_bytes, reduce_sum
from ep_comm.replicas import LayerReplicas, make_replicas
from ep_comm.testing import Cluster
from ep_comm.testing.skew import drifted, zipf_load

pytestmark = pytest.mark.gpu
__all__ = ["make_cluster"]

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read when CUDA starts

DEVICE = "cuda"
RANKS, NODES, LOGICAL, SLOTS, LAYERS, TOPK, HIDDEN = 4, 2, 10, 16, 2, 3, 64
PER_RANK, MAX_TOKENS = SLOTS // RANKS, 40
OPTIONS: dict[str, Any] = {
    "num_experts": SLOTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens": MAX_TOKENS,
    "num_sms": 4, "arena_bytes": 64 << 20,
}  # fmt: skip
MakeCluster = Callable[..., Cluster]
Layers = list[list[Tensor]]  # of each layer, the tensors of its experts


def two_placements(num_ranks: int = RANKS) -> tuple[Placement, Placement]:
    nodes = min(NODES, num_ranks // 2)
    before = zipf_load(LAYERS, LOGICAL, seed=1)
    old = plan(before, num_ranks, nodes, SLOTS)
    new = plan(drifted(before, 0.5, seed=2), num_ranks, nodes, SLOTS)
    assert (new.moves_from(old) > 0).all()
    return old, new


def tables(placement: Placement, layer: int) -> list[LayerReplicas]:
    """What the reference chooses by, of each rank."""
    return [
        make_replicas(
            placement.physical_to_logical, placement.num_logical, rank, placement.num_ranks,
            placement.num_nodes,
        ).of_layer(layer)
        for rank in range(placement.num_ranks)
    ]  # fmt: skip


def inputs(
    seed: int, sizes: tuple[int, ...] = (MAX_TOKENS, 0, 17, 5)
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, logical ids and weights of each rank."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn((t, HIDDEN), generator=g).to(torch.bfloat16) for t in sizes]
    ids = [torch.randint(-1, LOGICAL, (t, TOPK), generator=g) for t in sizes]
    return x, ids, [torch.rand((t, TOPK), generator=g) for t in sizes]


# ---- replicas ----

STATIC = {"sync": False}
GROUPED = {"layout": "grouped", "alignment": 4}
SLAB = {"layout": "slab"}
CASES: dict[str, dict[str, Any]] = {
    "compact": {},
    "row-index": {"row_index": True, "alignment": 4},
    "origins": {"origins": True},
    "copy-engine": {"transfer": "copy_engine"},
    "static": STATIC,
    "static-row-index": {**STATIC, "row_index": True, "alignment": 4},
    "grouped": GROUPED,
    "grouped-static": {**GROUPED, **STATIC},
    "grouped-origins": {**GROUPED, "origins": True},
    "slab": SLAB,
    "slab-static": {**SLAB, **STATIC},
    "begun": {"wait": False},
    "begun-grouped": {**GROUPED, "wait": False},
}


def reference_of(
    placement: Placement, layer: int, data: Any, options: dict[str, Any]
) -> tuple[list[Received], list[Tensor]]:
    """What every rank receives, and what each counts."""
    how = {k: v for k, v in options.items() if k not in ("transfer", "wait")}
    replicas = tables(placement, layer)
    received = reference.dispatch(
        *data, num_experts=SLOTS, max_tokens=MAX_TOKENS, replicas=replicas, **how
    )
    return received, [r.load for r in replicas]


@pytest.mark.parametrize("idx_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_replicas_and_load_are_those_of_the_reference(
    make_cluster: MakeCluster, options: dict[str, Any], idx_dtype: torch.dtype
) -> None:
    placement = plan(zipf_load(LAYERS, LOGICAL, seed=1), RANKS, NODES, SLOTS)
    cluster = make_cluster(RANKS, **OPTIONS)
    for layer in range(LAYERS):
        x, ids, weights = inputs(layer)
        ids = [i.to(idx_dtype) for i in ids]
        x_there, ids_there, weights_there = on_gpu(x), on_gpu(ids), on_gpu(weights)

        def work(rank: int, layer: int = layer, data: Any = (x_there, ids_there, weights_there)):
            buffer = cluster.buffers[rank]
            buffer.set_placement(None)
            buffer.set_placement(placement)
            mine = [part[rank] for part in data]
            recv = buffer.dispatch(*mine, layer=layer, **options)
            recv = recv if options.get("wait", True) else recv.wait()
            # A handle names slots: no placement is asked, nothing is counted again.
            buffer.set_placement(initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES))
            again = buffer.dispatch(mine[0], handle=recv.handle)
            out = buffer.combine(recv.x, recv.handle)
            return recv, again, out, buffer.load

        got = on_streams(cluster, work)
        want, load = reference_of(placement, layer, (x, ids, weights), options)
        sums = reference.combine([w.x for w in want], [w.handle for w in want])
        for rank, (recv, again, out, counted) in enumerate(got):
            check_received(recv, want[rank], computed=False)
            for rows in specified_rows(want[rank]):
                same_bits(again.x.cpu()[rows], want[rank].x[rows], "x of the cached call")
            same_bits(out.cpu(), sums[rank], "combine")
            assert counted.device.type == DEVICE
            same_bits(counted[layer].cpu(), load[rank], "load")
            assert counted[1 - layer].cpu().sum() == 0


def test_layer_none_names_slots_and_counts_nothing(make_cluster: MakeCluster) -> None:
    old, _ = two_placements()
    cluster = make_cluster(RANKS, **OPTIONS)
    x, ids, _ = (on_gpu(part) for part in inputs(7))

    def work(rank: int) -> Any:
        buffer = cluster.buffers[rank]
        buffer.set_placement(old)
        routed = buffer.dispatch(x[rank], ids[rank], layout="grouped")
        slots = routed.handle.topk_idx
        by_slot = buffer.dispatch(x[rank], slots, layer=None, layout="grouped")
        return routed.x, by_slot.x, buffer.load

    for rank, (routed, by_slot, load) in enumerate(on_streams(cluster, work)):
        same_bits(by_slot.cpu(), routed.cpu())
        assert int(load.sum()) == int((ids[rank] >= 0).sum())


def test_ids_that_are_no_logical_expert_are_refused_and_not_counted(
    make_cluster: MakeCluster,
) -> None:
    old, _ = two_placements()
    cluster = make_cluster(RANKS, **OPTIONS)
    x, ids, _ = inputs(8)
    ids[2][3, 1] = LOGICAL  # there is such a slot
    x_there, ids_there = on_gpu(x), on_gpu(ids)

    def dispatch(rank: int, **options: Any) -> Any:
        return cluster.buffers[rank].dispatch(x_there[rank], ids_there[rank], **options)

    def first(rank: int) -> Any:
        cluster.buffers[rank].set_placement(old)
        return dispatch(rank)

    errors = run_catching(cluster, first)
    assert [code_of(e) for e in errors] == ["E213"] * RANKS
    assert f"first token 3, k 1, id {LOGICAL}" in str(errors[0])
    results = run_catching(cluster, lambda r: dispatch(r, sync=False))
    assert all(isinstance(r, Received) for r in results)
    errors = run_catching(cluster, lambda r: cluster.buffers[r].check())
    assert [code_of(e) for e in errors] == ["E213"] * RANKS
    for rank, buffer in enumerate(cluster.buffers):
        valid = torch.bincount(ids[rank][ids[rank] >= 0], minlength=LOGICAL)[:LOGICAL]
        want = torch.zeros_like(valid) if rank == 2 else 2 * valid
        assert buffer.load[0].tolist() == want.tolist()


def test_ranks_with_different_placements_or_layers_are_told(make_cluster: MakeCluster) -> None:
    old, new = two_placements()
    cluster = make_cluster(RANKS, **OPTIONS)
    x, ids, _ = (on_gpu(part) for part in inputs(9))

    def work(rank: int, placements: list[Placement], layers: list[int]) -> Any:
        cluster.buffers[rank].set_placement(placements[rank])
        return cluster.buffers[rank].dispatch(x[rank], ids[rank], layer=layers[rank])

    for placements, layers in (([old, old, new, old], [0] * 4), ([old] * 4, [0, 1, 0, 0])):
        errors = run_catching(cluster, lambda r, p=placements, n=layers: work(r, p, n))
        assert [code_of(e) for e in errors] == ["E220"] * RANKS
    results = run_catching(cluster, lambda r: work(r, [old] * 4, [1] * 4))  # and it goes on
    assert all(isinstance(r, Received) for r in results)


def test_graph_replays_choose_replicas_and_count(make_cluster: MakeCluster) -> None:
    placement = plan(zipf_load(LAYERS, LOGICAL, seed=1), 2, 1, SLOTS)
    cluster = make_cluster(2, **OPTIONS)
    rounds = [inputs(seed, (24, 24)) for seed in range(5)]
    x, ids, weights = (on_gpu(part) for part in rounds[0])
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for buffer in cluster.buffers:
        buffer.set_placement(placement)
    held: list[Any] = []
    for rank, buffer in enumerate(cluster.buffers):  # nothing runs while a graph is captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            recv = buffer.dispatch(x[rank], ids[rank], weights[rank], layer=1, sync=False)
            held.append((recv, buffer.combine(recv.x, recv.handle)))
    total = [torch.zeros(LOGICAL, dtype=torch.int64) for _ in range(2)]
    start = [buffer.load[1].cpu() for buffer in cluster.buffers]
    for n in range(8):
        data = rounds[n % len(rounds)]
        want, load = reference_of(placement, 1, data, STATIC)
        sums = reference.combine([w.x for w in want], [w.handle for w in want])
        for rank in range(2):
            x[rank].copy_(data[0][rank])
            ids[rank].copy_(data[1][rank])
            weights[rank].copy_(data[2][rank])
        torch.cuda.synchronize()
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        for rank, (recv, out) in enumerate(held):
            check_received(recv, want[rank], computed=False)
            same_bits(out.cpu(), sums[rank])
            total[rank] += load[rank]
            same_bits(cluster.buffers[rank].load[1].cpu() - start[rank], total[rank], "load")


# ---- statistics ----


def test_statistics_are_those_of_the_cpu(make_cluster: MakeCluster) -> None:
    placement, _ = two_placements()
    g = torch.Generator().manual_seed(4)
    steps = [[torch.randint(-1, LOGICAL, (9, TOPK), generator=g) for _ in range(RANKS)]
             for _ in range(5)]  # fmt: skip

    def count(buffer: Buffer, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        device = buffer.device
        ids = [step[rank].to(device) for step in steps]
        x = torch.zeros(9, HIDDEN, device=device)
        buffer.set_placement(placement)
        stats = LoadStats(buffer, window=2, half_life=1.5)
        for n, chosen in enumerate(ids):
            buffer.dispatch(x, chosen, layer=n % LAYERS)
            stats.step()
        return stats.windowed, stats.decayed, stats.total(decayed=True)

    on_gpus = make_cluster(RANKS, **OPTIONS)
    got = on_streams(on_gpus, lambda rank: count(on_gpus.buffers[rank], rank))
    with Cluster(ranks_per_node=RANKS) as on_cpus:
        on_cpus.make_buffers(**{**OPTIONS, "num_sms": None})
        want = on_cpus.run(lambda rank: count(on_cpus.buffers[rank], rank))
    for mine, theirs in zip(got, want, strict=True):
        assert mine[0].device.type == mine[1].device.type == DEVICE
        for a, b in zip(mine, theirs, strict=True):
            same_bits(a.cpu(), b)


def test_gathered_and_reduced_values_are_those_of_all_ranks(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(RANKS, **OPTIONS)
    data = [torch.arange(5000, dtype=torch.float64) * (r + 1) for r in range(RANKS)]
    there = on_gpu(data)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        some = there[rank].view(torch.uint8)[:30001]  # no whole number of rows
        buffer = cluster.buffers[rank]
        return gather_bytes(buffer, some, "t"), reduce_sum(buffer, there[rank], "t")

    for gathered, total in on_streams(cluster, work):
        for rank in range(RANKS):
            same_bits(gathered[rank].cpu(), data[rank].view(torch.uint8)[:30001])
        same_bits(total.cpu(), torch.arange(5000, dtype=torch.float64) * 10)


# ---- migration ----


def logical_weights() -> Layers:
    """Of all dtypes; the first three make up an expert, the others only travel."""
    g = torch.Generator().manual_seed(3)
    return [
        [
            torch.randn((LOGICAL, HIDDEN), generator=g).to(torch.bfloat16),
            torch.randn((LOGICAL, HIDDEN), generator=g),
            torch.randn((LOGICAL,), generator=g, dtype=torch.float64),
            torch.randint(0, 255, (LOGICAL, 7), generator=g, dtype=torch.uint8),
            torch.randn((LOGICAL, 24, HIDDEN), generator=g).to(torch.float8_e4m3fn),
        ]
        for _ in range(LAYERS)
    ]


def weights_of(placement: Placement, rank: int, device: Any = DEVICE) -> Layers:
    """The slots of a rank, filled as a placement says."""
    return [
        [t.view(torch.uint8)[held].view(t.dtype).to(device) if t.itemsize == 1
         else t[held].to(device) for t in tensors]
        for tensors, held in (
            (tensors, placement.per_rank[layer, rank])
            for layer, tensors in enumerate(logical_weights())
        )
    ]  # fmt: skip


def expect_weights(got: Layers, placement: Placement, rank: int) -> None:
    for mine, theirs in zip(got, weights_of(placement, rank, "cpu"), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            same_bits(a.cpu(), b, "a weight")


def moe(buffer: Buffer, x: Tensor, ids: Tensor, scores: Tensor, weights: Layers, layer: int):
    """A layer whose experts compute every element alone, summed in top-k order."""
    recv = buffer.dispatch(x, ids, scores, layout="grouped", layer=layer)
    factor, shift, scale = weights[layer][:3]
    row = torch.arange(recv.x.shape[0], device=x.device)
    slot = torch.searchsorted(recv.offsets[1:].contiguous(), row, right=True)
    y = recv.x.float() * factor[slot].float() + shift[slot]
    y = (torch.relu(y) * scale[slot].float().unsqueeze(1)).to(x.dtype)
    return buffer.combine(y, recv.handle, weighted=True, order="topk")


def rebalance(buffer: Buffer, rank: int, num_ranks: int) -> int:
    """Serve, migrate piece by piece, serve: outputs do not change. Returns moved bytes."""
    old, new = two_placements(num_ranks)
    x, ids, scores = (part[rank].to(DEVICE) for part in inputs(11))
    weights = weights_of(old, rank)
    buffer.set_placement(old)

    def outputs() -> list[Tensor]:
        return [moe(buffer, x, ids, scores, weights, n).clone() for n in range(LAYERS)]

    first = outputs()
    slots = buffer.dispatch(x, ids).handle.topk_idx.clone()
    moving = migrate(buffer, old, new, weights, piece_bytes=3000)
    steps, over = 0, False
    while not over:
        over = moving.step()
        steps += 1
        if not over:
            expect_weights(weights, old, rank)
        for got, want in zip(outputs(), first, strict=True):
            same_bits(got.cpu(), want.cpu(), f"an output after step {steps}")
    assert steps == moving.num_pieces + 1 > 3
    expect_weights(weights, new, rank)
    slots_now = buffer.dispatch(x, ids).handle.topk_idx
    assert x.shape[0] == 0 or not torch.equal(slots_now, slots)  # it did go elsewhere
    buffer.check()
    return moving.moved_bytes


def test_layer_is_bit_identical_while_weights_in_gpu_memory_migrate(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(RANKS, **OPTIONS)
    moved = on_streams(cluster, lambda rank: rebalance(cluster.buffers[rank], rank, RANKS))
    old, new = two_placements()
    expert = sum(t[0].numel() * t.itemsize for t in logical_weights()[0])
    assert sum(moved) == new.moved_bytes(old, expert) > 0


def in_a_process(me: ranks.Me, work: Callable[[Buffer, int, int], Any]) -> Any:
    torch.cuda.set_device(me.rank % torch.cuda.device_count())
    buffer = Buffer(me.group(), device=DEVICE, **OPTIONS)
    me.kept.append(buffer)
    return work(buffer, me.rank, me.size)


def test_layer_is_bit_identical_while_weights_migrate_between_processes() -> None:
    moved = ranks.run(in_a_process, 2, rebalance, limit_s=120.0)
    assert sum(moved) > 0


def stays(buffer: Buffer, rank: int, weights: Layers, moving: Migration) -> list[Exception]:
    """Runs a migration that cannot succeed to its end; the old weights and placement are there.

    Returns what it raised, in a list: a rank that returns an exception counts as one that raised.
    """
    old, new = moving.old, moving.new
    x, ids, scores = (part[rank].to(DEVICE) for part in inputs(12))
    before = [moe(buffer, x, ids, scores, weights, n).clone() for n in range(LAYERS)]
    try:
        while not moving.step():
            pass
        raise AssertionError("it changed over")
    except (EPError, TypeError, KeyError) as error:
        told = error
    expect_weights(weights, old, rank)
    for layer in range(LAYERS):
        after = moe(buffer, x, ids, scores, weights, layer)
        same_bits(after.cpu(), before[layer].cpu(), "an output after a migration that failed")
    again = migrate(buffer, old, new, weights)  # and once more, now that all can
    while not again.step():
        pass
    expect_weights(weights, new, rank)
    return [told]


@pytest.mark.parametrize("stage", ["piece", "change"])
def test_rank_that_fails_midway_leaves_the_old_placement_in_force(
    make_cluster: MakeCluster, stage: str
) -> None:
    old, new = two_placements()
    cluster = make_cluster(RANKS, **OPTIONS)

    def work(rank: int) -> list[Exception]:
        buffer = cluster.buffers[rank]
        buffer.set_placement(old)
        weights = weights_of(old, rank)
        moving = migrate(buffer, old, new, weights, piece_bytes=3000)
        moving.step()
        if rank == 2:
            break_down(moving, stage)
        return stays(buffer, rank, weights, moving)

    told = [errors[0] for errors in on_streams(cluster, work)]
    assert isinstance(told[2], TypeError if stage == "piece" else KeyError)
    for rank in (0, 1, 3):
        assert code_of(told[rank]) == "E203"
        assert told[rank].peer == 2
        assert "abandoned migration" in str(told[rank])


def break_down(moving: Migration, stage: str) -> None:
    """This rank cannot read its weights any more, or not keep what comes."""
    if stage == "piece":
        moving._weights = None  # type: ignore[assignment]
        return
    prepare = moving._prepare

    def fails() -> Any:
        moving._staged.clear()
        return prepare()

    moving._prepare = fails  # type: ignore[method-assign]


def dies_midway(me: ranks.Me) -> str:
    torch.cuda.set_device(me.rank % torch.cuda.device_count())
    buffer = Buffer(me.group(), device=DEVICE, **OPTIONS)
    me.kept.append(buffer)
    old, new = two_placements(me.size)
    buffer.set_placement(old)
    weights = weights_of(old, me.rank)
    moving = migrate(buffer, old, new, weights, piece_bytes=3000)
    moving.step()
    me.say("midway")
    if me.rank == 1:
        me.wait_for_go()  # never comes
    try:
        while not moving.step():
            pass
    except EPError as error:
        expect_weights(weights, old, me.rank)
        return error.code
    return "changed over"


def test_killed_rank_leaves_the_weights_of_the_others_as_they_were() -> None:
    with ranks.Ranks(dies_midway, 2) as processes:
        processes.hear_all(60.0)
        processes.kill(1)
        assert processes.result(0, 60.0) == "E110"


def test_weights_in_other_memory_are_refused(make_cluster: MakeCluster) -> None:
    old, new = two_placements()
    cluster = make_cluster(RANKS, **OPTIONS)
    with pytest.raises(EPError, match="rejected weights: on cpu") as error:
        migrate(cluster.buffers[0], old, new, weights_of(old, 0, "cpu"))
    assert error.value.code == "E202"


# ---- the loop of an engine ----


def test_ten_lines_of_a_serving_engine_on_a_gpu(make_cluster: MakeCluster) -> None:
    placement = initial_placement(LAYERS, LOGICAL, SLOTS, RANKS, NODES)
    cluster = make_cluster(RANKS, **OPTIONS)
    hot = torch.tensor([8, 9, 8])  # experts with one replica each at first

    def work(rank: int) -> tuple[Placement, int]:
        buffer = cluster.buffers[rank]
        weights = weights_of(placement, rank)
        g = torch.Generator().manual_seed(rank)
        x = torch.zeros(16, HIDDEN, device=DEVICE)
        balancer = Balancer(buffer, placement, every=4, window=4)
        moving, changes = None, 0
        for _ in range(24):
            ids = torch.rand((16, LOGICAL), generator=g).topk(TOPK).indices
            ids[::2] = hot
            for layer in range(LAYERS):
                buffer.dispatch(x, ids.to(DEVICE), layer=layer)
            if moving is None:
                new = balancer.step()
                moving = new and migrate(buffer, balancer.placement, new, weights)
            elif moving.step():
                balancer.adopt(moving.new)
                moving, changes = None, changes + 1
        if moving is None:
            expect_weights(weights, balancer.placement, rank)
        return balancer.placement, changes

    results = on_streams(cluster, work)
    assert results[0][1] >= 1
    for other, changes in results:
        assert torch.equal(other.physical_to_logical, results[0][0].physical_to_logical)
        assert changes == results[0][1]
