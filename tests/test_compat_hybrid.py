"""`deep_ep` V1 across pretended nodes: all ranks in one process on one GPU, bit for bit as the
reference.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same_bits, same_values
from compat_ranks import Inputs, dispatch
from patience import PATIENT
from test_nvlink_loopback import on_streams
from torch import Tensor

import ep_comm.buffer
from ep_comm import reference
from ep_comm.compat import deep_ep
from ep_comm.compat.deep_ep import layout
from ep_comm.reference import fp8
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu

MOST = 9  # tokens of a rank, of a low-latency call


class Nodes:
    """Ranks on nodes of two, each with a `deep_ep.Buffer`; `run(work)` calls work(rank, buffer) on
    all of them at once, each on a stream of its own."""

    def __init__(self, num_nodes: int) -> None:
        self.cluster = Cluster(num_nodes, 2, device="cuda")
        self.num_ranks = self.cluster.num_ranks
        self.buffers = [deep_ep.Buffer(self.cluster.group(r), 0, 1) for r in range(self.num_ranks)]

    def run(self, work: Callable[[int, deep_ep.Buffer], Any]) -> list[Any]:
        return on_streams(self.cluster, lambda rank: work(rank, self.buffers[rank]))

    def are_far(self) -> bool:
        """Whether all native buffers so far are of several nodes."""
        made = [b for buffer in self.buffers for b in buffer._natives._buffers.values()]
        return bool(made) and all(b.stats()["backend"] == "hybrid" for b in made)


def warm_up() -> None:
    """One rank by itself makes all calls: torch loads a kernel when it is first used, and that may
    wait for kernels of other ranks, which wait for it."""
    buffer = deep_ep.Buffer(Cluster(1, 1).group(0))
    data = Inputs((4,), hidden=512)
    x, idx, weights = data.x[0].cuda(), data.idx[0].cuda(), data.weights[0].cuda()
    recv_x, _, recv_weights, _, handle, _ = dispatch(buffer, x, idx, weights, data.num_experts)
    buffer.combine(recv_x, handle, topk_weights=recv_weights)
    layout.dispatch_layout(idx, 20, 10)
    for use_fp8 in (False, True):
        for hook in (False, True):
            layer(buffer, x, idx, weights, None, data.num_experts, use_fp8, hook)
    torch.cuda.synchronize()
    buffer.destroy()


def layer(
    buffer: deep_ep.Buffer, x: Tensor, idx: Tensor, weights: Tensor, y: Tensor | None,
    num_experts: int, use_fp8: bool, hook: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    """A low-latency pair; the experts' answer is y, or zeros."""
    recv, count, handle, _, finish = buffer.low_latency_dispatch(
        x, idx, MOST, num_experts, use_fp8=use_fp8, return_recv_hook=hook
    )
    if finish is not None:
        finish()
    if y is None:
        rows = recv[0] if use_fp8 else recv
        y = torch.zeros(rows.shape, dtype=torch.bfloat16, device="cuda")
    total, _, finish = buffer.low_latency_combine(y, idx, weights, handle, return_recv_hook=hook)
    if finish is not None:
        finish()
    return recv, count, total


@pytest.fixture
def make_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Nodes]]:
    """V1 has no word for nodes that are pretended: its native buffers are told here."""
    warm_up()
    pretend = functools.partial(
        ep_comm.buffer.Buffer, backend="hybrid", ranks_per_node=2, config=PATIENT
    )
    monkeypatch.setattr(ep_comm.buffer, "Buffer", pretend)
    made: list[Nodes] = []

    def make(num_nodes: int) -> Nodes:
        made.append(Nodes(num_nodes))
        return made[-1]

    gc.collect()  # memory freed later would wait for kernels of this test
    yield make
    for nodes in made:
        for buffer in nodes.buffers:
            buffer.destroy()
    torch.cuda.synchronize()


def on_gpu(values: list[Tensor]) -> list[Tensor]:
    return [v.cuda() for v in values]


@pytest.mark.parametrize("num_nodes", [2, 5])  # fewer ranks than a node of deep_ep, and more
def test_internode_calls_and_their_handle_of_ten(
    make_nodes: Callable[[int], Nodes], num_nodes: int
) -> None:
    nodes = make_nodes(num_nodes)
    experts = 4 * num_nodes
    data = Inputs((6, 0, 9, 3, 1, 7, 2, 0, 5, 4)[: nodes.num_ranks], num_experts=experts)
    want = data.reference()
    x, idx, weights = on_gpu(data.x), on_gpu(data.idx), on_gpu(data.weights)
    first = nodes.run(
        lambda r, b: dispatch(b, x[r], idx[r], weights[r], experts, expert_alignment=4)
    )
    assert nodes.are_far()
    for rank, (recv_x, recv_idx, recv_weights, counts, handle, _) in enumerate(first):
        same_bits(recv_x.cpu(), want[rank].x)
        same_bits(recv_idx.cpu(), want[rank].topk_idx)
        same_bits(recv_weights.cpu(), want[rank].topk_weights)
        assert counts == [-(-n // 4) * 4 for n in want[rank].counts]
        assert len(handle) == 10 or (len(handle) == 6 and nodes.num_ranks <= 8)
        if len(handle) == 6:
            continue  # nothing crossed to here
        received = want[rank].handle.rank_counts[1]
        same_bits(handle[-4].cpu(), received.cumsum(0).to(torch.int32), "recv_gbl_rank_prefix_sum")
    assert any(len(f[4]) == 10 for f in first)
    sums = reference.combine(
        [w.x for w in want], [w.handle for w in want], ranks_per_node=2, sum_weights=True,
        topk_weights=[w.topk_weights for w in want],
    )  # fmt: skip
    rebuilt = [tuple(None if t is None else t.clone() for t in f[4]) for f in first]
    torch.cuda.synchronize()
    for handles in ([f[4] for f in first], rebuilt):
        check_again(nodes, handles, x, first, want, sums)


def check_again(
    nodes: Nodes, handles: list[Any], x: list[Tensor], first: list[Any], want: list[Any],
    sums: list[Any],
) -> None:  # fmt: skip
    """A cached dispatch and a combine by these handles."""
    again = nodes.run(lambda r, b: b.dispatch(x[r], handle=handles[r]))
    total = nodes.run(lambda r, b: b.combine(first[r][0], handles[r], topk_weights=first[r][2]))
    for rank in range(nodes.num_ranks):
        same_bits(again[rank][0].cpu(), want[rank].x)
        same_values(total[rank][0].cpu(), sums[rank][0])
        same_bits(total[rank][1].cpu(), sums[rank][1])


@pytest.mark.parametrize("hook", [False, True], ids=["event", "hook"])
@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
def test_low_latency_calls_cross_nodes(
    make_nodes: Callable[[int], Nodes], use_fp8: bool, hook: bool
) -> None:
    nodes = make_nodes(2)
    data = Inputs((5, MOST, 0, 3), hidden=512)
    options = {"layout": "slab", "capacity": 4 * MOST}
    want = data.reference(**options, **({"quantize": "fp8"} if use_fp8 else {}))
    y = [fp8.dequantize(w.x, w.scales).bfloat16() if use_fp8 else w.x for w in want]
    sums = reference.combine(y, [w.handle for w in want], weighted=True, order="topk")
    x, idx, weights, answers = (on_gpu(v) for v in (data.x, data.idx, data.weights, y))

    def pair(rank: int, buffer: deep_ep.Buffer) -> tuple[Any, Tensor, Tensor]:
        args = (x[rank], idx[rank], weights[rank], answers[rank])
        return layer(buffer, *args, data.num_experts, use_fp8, hook)

    for _ in range(3):
        done = nodes.run(pair)
        for rank, (recv, count, total) in enumerate(done):
            same_bits(count.cpu(), want[rank].num_tokens_per_expert)
            rows, scales = (t.cpu() for t in recv) if use_fp8 else (recv.cpu(), None)
            for e, n in enumerate(want[rank].counts):
                same_bits(rows[e, :n], want[rank].x[e, :n], f"expert {e}")
                if scales is not None:
                    same_bits(scales[e, :n], want[rank].scales[e, :n])
            same_values(total.cpu(), sums[rank])
    assert nodes.are_far()
