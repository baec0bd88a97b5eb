"""`deep_ep` V1 on CUDA tensors between real processes, bit for bit as the reference.

They share a GPU where there is only one, and have one each where there are enough.
"""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from compare import same_bits, same_values
from compat_ranks import E, Inputs, dispatch
from torch import Tensor

from ep_comm import reference
from ep_comm.compat import deep_ep
from ep_comm.errors import EPArgumentError
from ep_comm.reference import fp8

pytestmark = pytest.mark.gpu

SIZE = 2
TOKENS = (17, 40)


class World:
    """This rank's buffer, and everybody's inputs as they are on the CPU."""

    def __init__(self, me: ranks.Me, **inputs: Any) -> None:
        torch.cuda.set_device(me.rank % torch.cuda.device_count())
        self.rank = me.rank
        self.buffer = deep_ep.Buffer(me.group(), 1 << 28, 0)
        me.kept.append(self.buffer)
        self.data = Inputs(TOKENS, **inputs)

    def mine(self, values: list[Tensor]) -> Tensor:
        return values[self.rank].cuda()

    def dispatch(self, x: Any = None, **more: Any) -> tuple[Any, ...]:
        data = self.data
        rows = self.mine(data.x) if x is None else x
        ids, weights = self.mine(data.idx), self.mine(data.weights)
        return dispatch(self.buffer, rows, ids, weights, E, **more)


def normal_calls(me: ranks.Me, async_finish: bool) -> None:
    world = World(me)
    want = world.data.reference()
    mine, rank = want[me.rank], me.rank
    previous = world.buffer.capture()
    recv_x, recv_idx, recv_weights, counts, handle, event = world.dispatch(
        expert_alignment=8, async_finish=async_finish, allocate_on_comm_stream=async_finish
    )
    assert (event.event is not None) == async_finish
    event.current_stream_wait()
    assert recv_x.is_cuda
    same_bits(recv_x.cpu(), mine.x)
    same_bits(recv_idx.cpu(), mine.topk_idx)
    same_bits(recv_weights.cpu(), mine.topk_weights)
    assert counts == [-(-n // 8) * 8 for n in mine.counts]
    assert len(handle) == 6
    sent = torch.stack([r.handle.rank_counts[0] for r in want])
    same_bits(handle[0].cpu(), sent.cumsum(0).to(torch.int32), "rank_prefix_matrix")
    same_bits(handle[3].cpu(), mine.handle.recv_src[:, 1].contiguous(), "recv_src_idx")

    g = torch.Generator().manual_seed(5)
    bias = [torch.randn(x.shape, generator=g).bfloat16() for x in world.data.x]
    total, home, event = world.buffer.combine(
        recv_x, handle, topk_weights=recv_weights, bias=(world.mine(bias), None),
        previous_event=previous, async_finish=async_finish,
    )  # fmt: skip
    with event:
        assert (event.event is not None) == async_finish
    expected = reference.combine(
        [r.x for r in want], [r.handle for r in want],
        topk_weights=[r.topk_weights for r in want], bias=bias,
    )  # fmt: skip
    same_bits(total.cpu(), expected[rank][0])
    same_bits(home.cpu(), expected[rank][1])

    # A cached dispatch, with the handle as it is and put together again.
    for again in (handle, tuple(t.clone() for t in handle), list(handle)):
        second = world.buffer.dispatch(world.mine(world.data.x) + 1, handle=again)
        same_bits(second[0], recv_x + 1)
        assert second[1:5] == (None, None, None, None)


@pytest.mark.parametrize("async_finish", [False, True], ids=["sync", "async"])
def test_normal_calls_are_those_of_the_reference(async_finish: bool) -> None:
    ranks.run(normal_calls, SIZE, async_finish)


def worst_tokens(me: ranks.Me) -> None:
    """No host waits: what is returned has as many rows as asked for, -1 past the real ones."""
    world, worst = World(me), 100
    want = world.data.reference()[me.rank]
    recv_x, recv_idx, recv_weights, counts, handle, _ = world.dispatch(num_worst_tokens=worst)
    assert counts == []
    assert recv_x.shape[0] == recv_idx.shape[0] == recv_weights.shape[0] == worst
    n = want.x.shape[0]
    same_bits(recv_x[:n].cpu(), want.x)
    same_bits(recv_idx[:n].cpu(), want.topk_idx)
    assert bool((recv_idx[n:] == -1).all())
    total, _, _ = world.buffer.combine(recv_x, handle)
    wants = world.data.reference()
    expected = reference.combine([r.x for r in wants], [r.handle for r in wants])
    same_bits(total.cpu(), expected[me.rank])


def test_num_worst_tokens_needs_no_host() -> None:
    ranks.run(worst_tokens, SIZE)


def scaled_rows(me: ranks.Me) -> None:
    world = World(me, hidden=256)
    rows = [x.to(torch.float8_e4m3fn) for x in world.data.x]
    scales = [torch.rand(2, t).t() for t in TOKENS]
    want = world.data.reference(rows, scales=[s.contiguous() for s in scales])[me.rank]
    given = (world.mine(rows), world.mine(scales))
    out = world.dispatch(given)
    again = world.buffer.dispatch(given, handle=out[4])
    for recv_x, recv_scales in (out[0], again[0]):
        same_bits(recv_x.cpu(), want.x)
        same_bits(recv_scales.cpu(), want.scales)


def test_fp8_rows_travel_with_their_scales() -> None:
    ranks.run(scaled_rows, SIZE)


def without_topk(me: ranks.Me) -> None:
    """Routing by is_token_in_rank: the counts come from a second, small dispatch."""
    world = World(me)
    want = world.data.reference()[me.rank]
    ids = world.mine(world.data.idx)
    per_rank, _, per_expert, in_rank, _ = world.buffer.get_dispatch_layout(ids, E)
    recv_x, recv_idx, recv_weights, counts, _, _ = world.buffer.dispatch(
        world.mine(world.data.x), num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )  # fmt: skip
    assert (recv_idx, recv_weights) == (None, None)
    same_bits(recv_x.cpu(), want.x)
    assert counts == want.counts


def test_dispatch_without_topk_routes_by_rank() -> None:
    ranks.run(without_topk, SIZE)


def low_latency(me: ranks.Me, use_fp8: bool, hook: bool) -> None:
    world = World(me, hidden=512)
    data, most = world.data, max(TOKENS)
    x, ids, weights = (world.mine(v) for v in (data.x, data.idx, data.weights))
    for _ in range(3):
        recv, count, handle, event, finish = world.buffer.low_latency_dispatch(
            x, ids, most, E, use_fp8=use_fp8, async_finish=not hook, return_recv_hook=hook
        )
        event.current_stream_wait()
        if finish is not None:
            finish()
        local = E // SIZE
        options = {"layout": "slab", "capacity": SIZE * most}
        want = data.reference(**options, **({"quantize": "fp8"} if use_fp8 else {}))
        same_bits(count.cpu(), want[me.rank].num_tokens_per_expert)
        rows, scales = recv if use_fp8 else (recv, None)
        assert rows.shape == (local, SIZE * most, 512)
        for e, n in enumerate(want[me.rank].counts):
            same_bits(rows[e, :n].cpu(), want[me.rank].x[e, :n], f"expert {e}")
            same_bits(handle[0][e, :n].cpu(), want[me.rank].origins.row_token[e, :n])
            if scales is not None:
                same_bits(scales[e, :n].cpu(), want[me.rank].scales[e, :n])
        y = [
            fp8.dequantize(r.x, r.scales).bfloat16() if use_fp8 else r.x for r in want
        ]  # what experts return
        out, event, finish = world.buffer.low_latency_combine(
            y[me.rank].cuda(), ids, weights, handle, async_finish=not hook, return_recv_hook=hook
        )
        event.current_stream_wait()
        if finish is not None:
            finish()
        sums = reference.combine(y, [r.handle for r in want], weighted=True, order="topk")
        same_values(out.cpu(), sums[me.rank])


@pytest.mark.parametrize("hook", [False, True], ids=["event", "hook"])
@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
def test_low_latency_calls_are_those_of_the_reference(use_fp8: bool, hook: bool) -> None:
    ranks.run(low_latency, SIZE, use_fp8, hook)


def captured_pair(me: ranks.Me) -> None:
    """A dispatch and a combine in a graph, which is replayed with other rows, ids and weights."""
    world, most = World(me, hidden=512), max(TOKENS)
    x, ids, weights = (world.mine(v) for v in (world.data.x, world.data.idx, world.data.weights))
    stats = torch.zeros(E // SIZE, dtype=torch.int32, device="cuda")

    def pair() -> tuple[Tensor, Tensor, Tensor]:
        recv, count, handle, _, hook = world.buffer.low_latency_dispatch(
            x, ids, most, E, stats, use_fp8=False, return_recv_hook=True
        )
        assert hook is not None
        hook()
        y = world.buffer.get_next_low_latency_combine_buffer(handle)
        y.copy_(recv)
        total, _, hook = world.buffer.low_latency_combine(
            y, ids, weights, handle, zero_copy=True, return_recv_hook=True
        )
        assert hook is not None
        hook()
        return recv, count, total

    pair()  # makes the native buffer
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv, count, total = pair()
    counted = stats.clone()
    for seed in range(1, 5):
        data = Inputs(TOKENS, hidden=512, seed=seed)
        for given, values in ((x, data.x), (ids, data.idx), (weights, data.weights)):
            given.copy_(values[me.rank])
        graph.replay()
        torch.cuda.synchronize()
        want = data.reference(layout="slab", capacity=SIZE * most)
        same_bits(count.cpu(), want[me.rank].num_tokens_per_expert)
        counted += count
        for e, n in enumerate(want[me.rank].counts):
            same_bits(recv[e, :n].cpu(), want[me.rank].x[e, :n], f"expert {e}")
        sums = reference.combine(
            [r.x for r in want], [r.handle for r in want], weighted=True, order="topk"
        )
        same_values(total.cpu(), sums[me.rank])
    same_bits(stats.cpu(), counted.cpu())
    me.kept.append((graph, recv, count, total))


def test_low_latency_calls_are_captured_and_replayed() -> None:
    ranks.run(captured_pair, SIZE)


def late_failure(me: ranks.Me) -> None:
    """Bad ids of one rank: nothing arrives anywhere, and every rank is told by a later call."""
    world, most = World(me), max(TOKENS)
    x, ids = world.mine(world.data.x), world.mine(world.data.idx)
    wrong = torch.full_like(ids, E) if me.rank == 1 else ids
    count = world.buffer.low_latency_dispatch(x, wrong, most, E, use_fp8=False)[1]
    assert count.tolist() == [0] * (E // SIZE)  # which waits for it
    with pytest.raises(EPArgumentError, match="E213"):
        world.buffer.low_latency_dispatch(x, ids, most, E, use_fp8=False)
    count = world.buffer.low_latency_dispatch(x, ids, most, E, use_fp8=False)[1]
    want = world.data.reference(layout="slab", capacity=SIZE * most)
    assert count.tolist() == want[me.rank].counts


def test_low_latency_calls_raise_what_earlier_ones_could_not() -> None:
    ranks.run(late_failure, SIZE)
