"""The hybrid backend on pretended nodes: all ranks in one process on one GPU, bit for bit as the
reference, over rails that are slow, hold back what was put, and hand it out in another order.

As in test_nvlink_loopback.py nothing of torch's own runs between the calls of a test.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same_bits, same_values
from patience import LONGER_S, PATIENT
from test_nvlink_loopback import (
    CASES,
    GROUPED,
    NO_MEMORY,
    SLAB,
    STATIC,
    Case,
    check_call_without_memory,
    check_case,
    check_received,
    code_of,
    of_rank,
    on_gpu,
    on_streams,
    replay_graphs,
    run_catching,
    want_dispatch,
)
from torch import Tensor

from ep_comm import Buffer, EPConfig, _core, autograd, reference
from ep_comm.bench import cases as bench_cases
from ep_comm.bench import check
from ep_comm.bench.gpu import on_host
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu

SHAPES = [(2, 1), (3, 1), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2)]
MakeCluster = Callable[..., Cluster]


def disturb(cluster: Cluster, seed: int, max_delay_us: int = 20) -> None:
    """Every rank in its own way."""
    for rank in range(cluster.num_ranks):
        number = 5 * seed + rank
        cluster.disturb(
            rank, seed=number, max_held=number % 9, max_delay_ns=1000 * max_delay_us * (rank % 3)
        )


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    made: list[Cluster] = []

    def make(num_nodes: int, ranks_per_node: int, case: Case, **options: Any) -> Cluster:
        cluster = Cluster(num_nodes, ranks_per_node, device="cuda")
        made.append(cluster)
        options.setdefault("config", PATIENT)
        cluster.make_buffers(**{**case.buffer_options(), "arena_bytes": 32 << 20, **options})
        return cluster

    gc.collect()  # memory freed later would wait for kernels of this test
    yield make
    for cluster in made:
        cluster.close()
    torch.cuda.synchronize()


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), SHAPES)
def test_clusters_of_every_shape(
    make_cluster: MakeCluster, num_nodes: int, ranks_per_node: int
) -> None:
    num_ranks = num_nodes * ranks_per_node
    case = Case(num_ranks=num_ranks, num_experts=2 * num_ranks + 1)
    cluster = make_cluster(num_nodes, ranks_per_node, case)
    check_case(cluster, case, ranks_per_node)
    disturb(cluster, seed=num_ranks)
    for options in ({}, GROUPED, {**SLAB, **STATIC}):
        check_case(cluster, dataclasses.replace(case, options=options), ranks_per_node)


ON_FOUR = {name: case for name, case in CASES.items() if case.num_ranks == 4}


@pytest.mark.parametrize("case", ON_FOUR.values(), ids=ON_FOUR.keys())
def test_all_that_can_be_asked_of_a_call(make_cluster: MakeCluster, case: Case) -> None:
    cluster = make_cluster(2, 2, case)
    disturb(cluster, seed=len(case.options) + case.num_topk)
    check_case(cluster, case, ranks_per_node=2)


def test_nodes_whose_memory_is_mapped(make_cluster: MakeCluster) -> None:
    """Chunks are written in place, as in one NVLink domain of several nodes; or by some ranks."""
    case = Case(num_ranks=6, num_experts=13)
    cluster = make_cluster(3, 2, case)
    for ranks in (range(6), range(0, 6, 2)):
        for rank in range(6):
            cluster.disturb(rank, seed=rank, max_delay_ns=9000, is_mapped=rank in ranks)
        for options in ({}, GROUPED, {**SLAB, **STATIC}):
            check_case(cluster, dataclasses.replace(case, options=options), ranks_per_node=2)


def test_bench_knows_what_calls_across_nodes_return(make_cluster: MakeCluster) -> None:
    case = bench_cases.Case(
        4, tokens=40, hidden=256, topk=4, experts=8, backend="hybrid", ranks_per_node=2
    )
    sizes = Case(num_ranks=4, num_experts=8, num_topk=4, hidden=256, tokens=(40,) * 4)
    cluster = make_cluster(2, 2, sizes)
    inputs = [bench_cases.make_inputs(case, r) for r in range(4)]
    x, idx, weights = (on_gpu([i[n] for i in inputs]) for n in range(3))
    assert x is not None
    assert idx is not None
    buffers = cluster.buffers
    got = on_streams(cluster, lambda r: buffers[r].dispatch(x[r], idx[r], of_rank(weights, r)))
    answers = [check.expert_output(g.x, r, case) for r, g in enumerate(got)]
    sums = on_streams(cluster, lambda r: buffers[r].combine(answers[r], got[r].handle))
    for r in range(4):
        check.check_case(case, r, {"dispatch": on_host(got[r]), "combine": sums[r].cpu()})
    sums[3][7, 5] += 1
    with pytest.raises(check.Mismatch, match="combine"):
        check.check_case(case, 3, {"dispatch": on_host(got[3]), "combine": sums[3].cpu()})


def test_weights_are_summed_by_nodes(make_cluster: MakeCluster) -> None:
    case = Case()
    cluster = make_cluster(2, 2, case)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
    assert x is not None
    assert idx is not None
    got = on_streams(
        cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], of_rank(weights, r))
    )
    back = [torch.randn(w.topk_idx.shape) for w in want]
    back_gpu = on_gpu(back)
    assert back_gpu is not None
    sums = on_streams(
        cluster,
        lambda r: cluster.buffers[r].combine(
            got[r].x, got[r].handle, topk_weights=back_gpu[r], sum_weights=True
        ),
    )
    expected = reference.combine(
        [w.x for w in want], [w.handle for w in want], topk_weights=back, sum_weights=True,
        ranks_per_node=2,
    )  # fmt: skip
    for rank in range(4):
        same_values(sums[rank][0].cpu(), expected[rank][0])
        same_bits(sums[rank][1].cpu(), expected[rank][1])


def test_a_handle_gets_weights_later(make_cluster: MakeCluster) -> None:
    """Of a cached call with weights the handle has them for a weighted combine."""
    case = Case(weights=False, options=GROUPED)
    cluster = make_cluster(2, 2, case)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    given = [torch.randn(t.shape) for t in inputs.topk_idx]
    weights = on_gpu(given)
    assert weights is not None
    plain = on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], **GROUPED))
    later = on_streams(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r], None, weights[r], handle=plain[r].handle),
    )
    sums = on_streams(
        cluster, lambda r: cluster.buffers[r].combine(later[r].x, later[r].handle, weighted=True)
    )
    weighted = reference.dispatch(
        inputs.x, topk_weights=given, handles=[w.handle for w in want],
        num_experts=case.num_experts, max_tokens=max(case.num_tokens()),
    )  # fmt: skip
    expected = reference.combine(
        [w.x for w in weighted], [w.handle for w in weighted], weighted=True, ranks_per_node=2
    )
    for rank in range(4):
        same_values(sums[rank].cpu(), expected[rank])


def test_owners_add_up_their_rows_and_times_are_taken(make_cluster: MakeCluster) -> None:
    case = Case(options=GROUPED)
    cluster = make_cluster(2, 2, case)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
    assert x is not None
    assert idx is not None
    selections = [w.num_tokens_per_expert.cuda() for w in want]
    waited = [torch.zeros(4, dtype=torch.int64).cuda() for _ in range(4)]
    got = on_streams(
        cluster,
        lambda r: cluster.buffers[r].dispatch(
            x[r], idx[r], of_rank(weights, r), recv_stats=selections[r], wait_stats=waited[r],
            **GROUPED,
        ),
    )  # fmt: skip
    sums = on_streams(
        cluster,
        lambda r: cluster.buffers[r].combine(
            got[r].x, got[r].handle, per_rank=True, row_weights=got[r].topk_weights
        ),
    )
    factors = [w.topk_weights for w in want]
    expected = reference.combine(
        [w.x for w in want], [w.handle for w in want], per_rank=True,
        row_weights=[f for f in factors if f is not None], ranks_per_node=2,
    )  # fmt: skip
    for rank in range(4):
        same_values(sums[rank].cpu(), expected[rank])
        same_bits(selections[rank].cpu(), 2 * want[rank].num_tokens_per_expert)
        assert (waited[rank] >= 0).all()


def test_gradients_cross_nodes(make_cluster: MakeCluster) -> None:
    """A weighted combine's gradients take the handle's weights along, and bring some home."""
    tokens = (7, 0, 12, 3)
    case = Case(num_experts=8, hidden=64, tokens=tokens, dtype=torch.float32)
    cluster = make_cluster(2, 2, case)
    alone = Cluster(1, 1, device="cuda")
    inputs = case.inputs()
    given = inputs.topk_weights
    assert given is not None
    leaves = [
        [t.cuda().requires_grad_() for t in pair] for pair in zip(inputs.x, given, strict=True)
    ]
    idx = on_gpu(inputs.topk_idx)
    assert idx is not None

    def work(rank: int, buffers: list[Buffer] = cluster.buffers) -> Tensor:
        x, weights = leaves[rank]
        arrived = autograd.dispatch(buffers[rank], x, idx[rank], weights, **GROUPED)
        out = autograd.combine(buffers[rank], arrived.x * (rank + 1), arrived.handle, weighted=True)
        # In this thread: of a device torch has one thread for backward, and ranks wait for ranks.
        with torch.autograd.set_multithreading_enabled(False):
            out.square().sum().backward()
        return out.detach()

    # By itself first, so that torch loads its kernels while none of ours wait.
    with alone:
        alone.make_buffers(**case.buffer_options())
        work(0, alone.buffers)
        torch.cuda.synchronize()
        for leaf in leaves[0]:
            leaf.grad = None
    got = on_streams(cluster, work)
    for rank, (x, weights) in enumerate(zip(inputs.x, given, strict=True)):
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        ids = inputs.topk_idx[rank]
        factor = torch.where(ids >= 0, ids // 2 + 1, 0) * weights
        out = (x[:, None] * factor[:, :, None]).sum(1)
        out.square().sum().backward()
        torch.testing.assert_close(got[rank].cpu(), out.detach())
        for ours, want in zip(leaves[rank], (x, weights), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), want.grad, rtol=1e-4, atol=1e-4)


def test_begun_calls_in_a_row(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=6, num_experts=12)
    cluster = make_cluster(3, 2, case, num_slots=3)
    disturb(cluster, seed=7)
    rounds = [dataclasses.replace(case, seed=s).inputs() for s in range(3)]
    want = [want_dispatch(case, inputs) for inputs in rounds]
    x, idx = [on_gpu(i.x) for i in rounds], [on_gpu(i.topk_idx) for i in rounds]
    weights = [on_gpu(i.topk_weights) for i in rounds]

    def work(rank: int) -> list[Any]:
        buffer = cluster.buffers[rank]
        results = []
        for _ in range(4):
            begun = [
                buffer.dispatch(x[n][rank], idx[n][rank], of_rank(weights[n], rank), wait=False)
                for n in range(3)
            ]
            received = [b.wait() for b in begun]
            sums = [buffer.combine(r.x, r.handle, wait=False) for r in received]
            results.append((received, [s.wait() for s in sums]))
        return results

    expected = [
        reference.combine([w.x for w in ws], [w.handle for w in ws], ranks_per_node=2)
        for ws in want
    ]
    for rank, results in enumerate(on_streams(cluster, work)):
        for received, sums in results:
            for n in range(3):
                check_received(received[n], want[n][rank], computed=False)
                same_values(sums[n].cpu(), expected[n][rank])


def test_graph_replays_across_nodes(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=4, tokens=(24,) * 4, options=STATIC)
    replay_graphs(make_cluster(2, 2, case), case, ranks_per_node=2)


# ---- small batches ----

DIRECT = {"slab": SLAB, "slab static": {**SLAB, **STATIC}, "compact static": STATIC}


def sums_of(cluster: Cluster, case: Case) -> list[Tensor]:
    """What comes home of a case; weighted where that can be."""
    inputs = case.inputs()
    x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
    assert x is not None
    assert idx is not None
    dispatch = lambda r: cluster.buffers[r].dispatch(  # noqa: E731
        x[r], idx[r], of_rank(weights, r), **case.options
    )
    got = on_streams(cluster, dispatch)
    y = [torch.randn(g.x.shape, generator=torch.Generator().manual_seed(r)).to(case.dtype)
         for r, g in enumerate(got)]  # fmt: skip
    on_device = on_gpu(y)
    assert on_device is not None
    weighted = case.options.get("layout") == "slab"
    combine = lambda r: cluster.buffers[r].combine(  # noqa: E731
        on_device[r], got[r].handle, weighted=weighted
    )
    return [t.cpu() for t in on_streams(cluster, combine)]


@pytest.mark.parametrize("options", DIRECT.values(), ids=DIRECT.keys())
def test_direct_or_by_rails_the_results_are_the_same(
    make_cluster: MakeCluster, options: dict[str, Any]
) -> None:
    case = Case(num_experts=9, options=options)
    results = []
    for direct in (True, False):
        config = EPConfig(arrival_s=60.0, progress_s=60.0, direct=direct)
        cluster = make_cluster(2, 2, case, config=config)
        disturb(cluster, seed=5)
        check_case(cluster, case, ranks_per_node=2)
        results.append(sums_of(cluster, case))
        rails = [b.stats()["rails"] for b in cluster.buffers]
        assert all((r["direct_bytes"] > 0) == direct for r in rails)
        assert any(r["direct_out"] > 0 for r in rails) == direct
    for straight, by_rails in zip(*results, strict=True):
        same_bits(straight, by_rails)


@pytest.mark.parametrize("nodes", [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_come_straight_are_added_in_the_order_of_slots(
    make_cluster: MakeCluster, nodes: tuple[int, int], weighted: bool
) -> None:
    """As `deep_ep` V1 has it, also across nodes: no node rounds what its ranks send."""
    case = Case(num_ranks=nodes[0] * nodes[1], options={**SLAB, **STATIC}, seed=3)
    cluster = make_cluster(*nodes, case)
    disturb(cluster, seed=4)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
    assert x is not None
    assert idx is not None
    y = [torch.randn(w.x.shape, generator=torch.Generator().manual_seed(r)).to(case.dtype)
         for r, w in enumerate(want)]  # fmt: skip
    mine = on_gpu(y)
    assert mine is not None

    def work(rank: int) -> Any:
        buffer = cluster.buffers[rank]
        recv = buffer.dispatch(x[rank], idx[rank], of_rank(weights, rank), **case.options)
        return buffer.combine(mine[rank], recv.handle, order="topk", weighted=weighted)

    sums = reference.combine(y, [w.handle for w in want], order="topk", weighted=weighted)
    for rank, out in enumerate(on_streams(cluster, work)):
        same_values(out.cpu(), sums[rank], f"rank {rank}")


def test_halves_of_direct_calls_are_waited_for_in_any_order(make_cluster: MakeCluster) -> None:
    case = Case(options=SLAB)
    cluster = make_cluster(2, 2, case)
    disturb(cluster, seed=2)
    rounds = [dataclasses.replace(case, seed=s).inputs() for s in range(2)]
    want = [want_dispatch(case, inputs) for inputs in rounds]
    x, idx = [on_gpu(i.x) for i in rounds], [on_gpu(i.topk_idx) for i in rounds]
    weights = [on_gpu(i.topk_weights) for i in rounds]

    def work(rank: int) -> list[Any]:
        buffer, results = cluster.buffers[rank], []
        for turn in range(4):
            begun = [
                buffer.dispatch(
                    x[n][rank], idx[n][rank], of_rank(weights[n], rank), wait=False, **SLAB
                )
                for n in range(2)
            ]
            first = (rank + turn) % 2
            received = {n: begun[n].wait() for n in (first, 1 - first)}
            sums = [buffer.combine(r.x, r.handle, wait=False) for _, r in sorted(received.items())]
            out = {n: sums[n].wait() for n in (1 - first, first)}
            results.append((received, out))
        return results

    expected = [
        reference.combine([w.x for w in ws], [w.handle for w in ws], ranks_per_node=2)
        for ws in want
    ]
    for rank, results in enumerate(on_streams(cluster, work)):
        for received, sums in results:
            for n in range(2):
                check_received(received[n], want[n][rank], computed=False)
                same_values(sums[n].cpu(), expected[n][rank])


def test_rows_that_a_rail_loses_are_missed_at_their_rank(make_cluster: MakeCluster) -> None:
    case = Case(tokens=(40,) * 4, options=SLAB)
    config = EPConfig(arrival_s=LONGER_S + 2.0, progress_s=LONGER_S)
    cluster = make_cluster(2, 2, case, config=config)
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    dispatch = lambda r: cluster.buffers[r].dispatch(x[r], idx[r], **SLAB)  # noqa: E731
    on_streams(cluster, dispatch)
    # Notices still come; of rows of rank 3, which tell what has been put, those for rank 0 do not.
    shape = cluster.buffers[3]._backend.rails.shape
    came = next(start for name, start, _ in _core.RailLayout(shape).regions() if name == "came")
    cluster.disturb(3, stalled_peer=0, lost_from=came)
    run_catching(cluster, dispatch)
    torch.cuda.synchronize()
    errors = run_catching(cluster, dispatch)
    assert (code_of(errors[0]), errors[0].peer) == ("E102", 3)
    assert all(e is not None for e in errors)


def test_what_crosses_is_counted(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=6, num_experts=12)
    config = EPConfig(arrival_s=60.0, progress_s=60.0, direct=False)
    cluster = make_cluster(3, 2, case, config=config)
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    got = on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r]))
    on_streams(cluster, lambda r: cluster.buffers[r].combine(got[r].x, got[r].handle))
    for rank, ids in enumerate(inputs.topk_idx):
        node = torch.where(ids >= 0, ids // 4, -1)  # of 12 experts on 6 ranks
        visits = torch.stack([(node == n).any(dim=1) for n in range(3)], dim=1)
        home = int(visits[:, rank // 2].sum())
        rails = cluster.buffers[rank].stats()["rails"]
        assert rails["transport"] == "loopback"
        assert rails["tokens"] == len(ids)
        assert rails["home_visits"] == home
        assert rails["rows_out"] == rails["sums_in"] == int(visits.sum()) - home
        assert rails["nodes_per_token"] == int(visits.sum()) / max(len(ids), 1)
        assert rails["staging_bytes"] <= 128 << 20


# ---- what goes wrong ----


def test_bad_ids_fail_on_every_rank_and_the_next_call_works(make_cluster: MakeCluster) -> None:
    case = Case()
    cluster = make_cluster(2, 2, case)
    disturb(cluster, seed=3)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    bad = [t.clone() for t in idx]
    bad[2][3, 1] = case.num_experts
    errors = run_catching(cluster, lambda r: cluster.buffers[r].dispatch(x[r], bad[r]))
    assert [(code_of(e), e.peer) for e in errors] == [("E213", 2)] * 4
    weights = on_gpu(inputs.topk_weights)
    got = on_streams(
        cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], of_rank(weights, r))
    )
    for rank in range(4):
        check_received(got[rank], want[rank], computed=False)


@pytest.mark.parametrize("nodes", [(2, 1), (2, 2)])
@pytest.mark.parametrize("name", NO_MEMORY)
def test_static_call_that_finds_no_memory_gives_its_shapes_and_a_status(
    make_cluster: MakeCluster, nodes: tuple[int, int], name: str
) -> None:
    case = Case(num_ranks=nodes[0] * nodes[1], options=NO_MEMORY[name])
    check_call_without_memory(make_cluster(*nodes, case), case)


def test_what_kernels_of_nodes_cannot_do_is_refused(make_cluster: MakeCluster) -> None:
    case = Case(options=GROUPED)
    cluster = make_cluster(2, 2, case, config=dataclasses.replace(PATIENT, direct=False))
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    got = on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], **GROUPED))
    errors = run_catching(
        cluster, lambda r: cluster.buffers[r].combine(got[r].x, got[r].handle, order="topk")
    )
    assert [code_of(e) for e in errors] == ["E203"] * 4
    errors = run_catching(
        cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], transfer="copy_engine")
    )
    assert [code_of(e) for e in errors] == ["E203"] * 4


def test_a_stalled_rail_is_named_where_rows_are_missing(make_cluster: MakeCluster) -> None:
    case = Case(tokens=(40,) * 4)
    config = EPConfig(arrival_s=LONGER_S + 2.0, progress_s=LONGER_S)
    cluster = make_cluster(2, 2, case, config=config)
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r]))
    # Notices still come; rows that were announced do not.
    shape = cluster.buffers[1]._backend.rails.shape
    tails = next(start for name, start, _ in _core.RailLayout(shape).regions() if name == "tails")
    cluster.disturb(1, stalled_peer=3, lost_from=tails)
    run_catching(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r]))
    torch.cuda.synchronize()
    errors = run_catching(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r]))
    # The other node lacks rows of rank 1; its own has sent all, and waits for who stopped there.
    assert [(code_of(e), e.peer) for e in errors[2:]] == [("E102", 1)] * 2
    assert [code_of(e) for e in errors[:2]] == ["E101"] * 2
    assert {e.peer for e in errors[:2]} <= {2, 3}
    assert float(torch.ones(8, device="cuda").sum()) == 8.0  # the context works


def test_a_silent_rank_is_named_by_its_rail(make_cluster: MakeCluster) -> None:
    case = Case(num_ranks=3)
    cluster = make_cluster(3, 1, case, config=EPConfig(arrival_s=LONGER_S, progress_s=LONGER_S))
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    cluster.disturb(2, is_silent=True)
    errors = run_catching(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r]))
    for rank in (0, 1):
        assert (code_of(errors[rank]), errors[rank].peer) == ("E101", 2)
        assert "rank 2 to enter" in str(errors[rank])
        assert "is on another node" in str(errors[rank])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_random_calls(make_cluster: MakeCluster) -> None:
    """2 x 4: random shapes, delays and skewed routings."""
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=generator))

    case = Case(num_ranks=8, num_experts=24, tokens=(40,) * 8)
    cluster = make_cluster(2, 4, case)
    # Room for all tokens at one expert, by every slot.
    slab = {**SLAB, **STATIC, "capacity": 8 * 40 * case.num_topk}
    for n in range(250):
        disturb(cluster, seed=n, max_delay_us=draw(30))
        # One brings as many as there may be, on which shapes of static calls depend.
        tokens = (40, *(0 if draw(5) == 0 else draw(40) for _ in range(7)))
        options = ({}, GROUPED, STATIC, slab)[draw(3)]
        ids = ("random", "random", "one")[draw(2)]
        now = dataclasses.replace(case, tokens=tokens, seed=n, ids=ids, options=options)
        inputs, want = now.inputs(), want_dispatch(now, now.inputs())
        x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
        sums = reference.combine([w.x for w in want], [w.handle for w in want], ranks_per_node=4)

        def work(rank: int, x: Any = x, idx: Any = idx, weights: Any = weights,
                 options: Any = options) -> list[Any]:  # fmt: skip
            buffer, results = cluster.buffers[rank], []
            for _ in range(10):
                recv = buffer.dispatch(x[rank], idx[rank], weights[rank], **options)
                results.append((recv, buffer.combine(recv.x, recv.handle)))
            return results[::9]

        for rank, results in enumerate(on_streams(cluster, work)):
            for recv, out in results:
                check_received(recv, want[rank], computed=False)
                same_values(out.cpu(), sums[rank])
