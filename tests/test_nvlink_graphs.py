"""A captured dispatch and combine, replayed as often as a server replays it in a minute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import test_nvlink_gpus as gpus
import test_nvlink_loopback as loopback
import torch
from test_nvlink_loopback import SLAB, STATIC, Case, make_cluster
from torch import Tensor

from ep_comm import Buffer, Received, reference
from ep_comm.testing import Cluster

__all__ = ["make_cluster"]

REPLAYS, LOOK_EVERY, DRAWS = 10_000, 500, 16
CASES = {
    "compact": Case(num_ranks=2, tokens=(32, 24), options=STATIC),
    "slab": Case(num_ranks=2, tokens=(32, 24), options={**SLAB, **STATIC}),
    "slab-weighted": Case(num_ranks=2, tokens=(40, 40), num_topk=8, options={**SLAB, **STATIC}),
}


@dataclass
class Draw:
    """What a rank sends in one replay, and what it must get, on the GPU."""

    given: list[Tensor]
    out: Tensor
    num_recv: Tensor
    counts: Tensor


def draws_of(case: Case, rank: int, weighted: bool) -> list[Draw]:
    draws = []
    for seed in range(DRAWS):
        inputs = dataclasses.replace(case, seed=seed).inputs()
        want = loopback.want_dispatch(case, inputs)
        y, handles = [w.x for w in want], [w.handle for w in want]
        sums = reference.combine(y, handles, weighted=weighted)
        assert inputs.topk_weights is not None
        given = [part[rank].cuda() for part in (inputs.x, inputs.topk_idx, inputs.topk_weights)]
        num_recv = torch.as_tensor(want[rank].num_recv).reshape(1).int().cuda()
        counts = want[rank].num_tokens_per_expert.cuda()
        draws.append(Draw(given, sums[rank].cuda(), num_recv, counts))
    return draws


class Replayed:
    """A rank's graph. Each replay is compared on its stream, behind it."""

    def __init__(self, buffer: Buffer, case: Case, draws: list[Draw], weighted: bool) -> None:
        self.buffer, self.draws = buffer, draws
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.given = [t.clone() for t in draws[0].given]
        self.wrong = torch.zeros(3, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.recv: Received = buffer.dispatch(*self.given, **case.options)
            self.out = buffer.combine(self.recv.x, self.recv.handle, weighted=weighted)
        self.compare(draws[0])  # loads what compares, while nobody waits
        torch.cuda.synchronize()
        self.wrong.zero_()

    def compare(self, draw: Draw) -> None:
        pairs = ((self.out, draw.out), (self.recv.num_recv, draw.num_recv),
                 (self.recv.num_tokens_per_expert, draw.counts))  # fmt: skip
        for i, (got, want) in enumerate(pairs):
            self.wrong[i] += (torch.as_tensor(got) != want).sum()

    def replay(self, n: int) -> None:
        draw = self.draws[n % DRAWS]
        with torch.cuda.stream(self.stream):
            for to, given in zip(self.given, draw.given, strict=True):
                to.copy_(given)
            self.graph.replay()
            self.compare(draw)

    def look(self, n: int) -> None:
        assert self.wrong.tolist() == [0, 0, 0], f"by replay {n}: out, num_recv, counts"


def replay_all(sides: list[Replayed]) -> None:
    for n in range(REPLAYS):
        for side in sides:
            side.replay(n)
        if (n + 1) % LOOK_EVERY == 0:
            torch.cuda.synchronize()
            for side in sides:
                side.look(n)
    for side in sides:
        side.buffer.check()


@pytest.mark.gpu
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_replays_with_changing_routing(
    make_cluster: Callable[..., Cluster], name: str
) -> None:
    case, weighted = CASES[name], name == "slab-weighted"
    cluster = make_cluster(2, **case.buffer_options())
    draws = [draws_of(case, rank, weighted) for rank in range(2)]
    replay_all([Replayed(cluster.buffers[r], case, draws[r], weighted) for r in range(2)])


def replay_between_gpus(me: ranks.Me, name: str) -> Any:
    case, weighted = CASES[name], name == "slab-weighted"
    buffer = gpus.buffer_of(me, case)
    side = Replayed(buffer, case, draws_of(case, me.rank, weighted), weighted)
    replay_all([side])


@pytest.mark.gpus(2)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_replays_between_gpus(name: str) -> None:
    ranks.run(replay_between_gpus, 2, name, limit_s=150.0)
