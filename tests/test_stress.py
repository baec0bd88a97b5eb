"""A long random program on every rank: operations of all kinds in any mixture, exact to the end.

Every rank draws the same program from the seed and its own tokens; results are checked against
sums that are exact in any order. The short versions run always, the long ones with --slow.
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

from ep_comm import Begun, Buffer, EPConfig, Received
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

EXPERTS, TOPK, TOKENS = 10, 3, 24


@dataclass
class Alive:
    """A dispatch whose results are still used, or one that is not waited for yet."""

    x: Tensor
    idx: Tensor
    weights: Tensor
    received: Received | Begun[Any]

    def get(self) -> Received:
        if isinstance(self.received, Begun):
            self.received = self.received.wait()
        return self.received


@dataclass
class Soak:
    """One rank's side of the program."""

    buffer: Buffer
    seed: int
    hidden: int
    jitter_s: float = 0.0
    alive: list[Alive] = field(default_factory=list)
    pending: list[tuple[Begun[Any], Tensor]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    def run(self, steps: int) -> dict[str, int]:
        program = random.Random(self.seed)  # the same on all ranks
        mine = random.Random(1000 * self.seed + self.buffer.rank)
        verbs = ["dispatch"] * 6 + ["combine"] * 6 + ["cached"] * 3 + ["drop"] * 3
        verbs += ["wait"] * 3 + ["fail", "refuse", "overflow", "release", "weighted", "static_fail"]
        for step in range(steps):
            if self.jitter_s and mine.random() < 0.2:
                time.sleep(mine.uniform(0, self.jitter_s))
            verb = program.choice(verbs)
            if verb in ("combine", "cached", "drop", "weighted") and not self.alive:
                verb = "dispatch"
            if len(self.alive) > 12:
                verb = "drop"
            getattr(self, verb)(program, step)
            self.done[verb] = self.done.get(verb, 0) + 1
        self.wait(program, 0)
        self.alive.clear()
        nothing = torch.empty(0, self.hidden, dtype=torch.bfloat16)
        # What was begun last is let go when the next operation begins.
        self.buffer.dispatch(nothing, torch.empty(0, TOPK, dtype=torch.int64), wait=False).wait()
        return self.done

    # ---- what a step does ----

    def tokens(self, program: random.Random, step: int) -> tuple[Tensor, Tensor, Tensor]:
        most = program.choice([0, 1, TOKENS // 2, TOKENS])
        g = torch.Generator().manual_seed((self.seed * 7919 + step) * 64 + self.buffer.rank)
        n = int(torch.randint(0, most + 1, (1,), generator=g))
        x = torch.randint(-4, 5, (n, self.hidden), generator=g).to(torch.bfloat16)
        idx = torch.randint(-1, EXPERTS, (n, TOPK), generator=g)
        weights = torch.randint(-2, 3, (n, TOPK), generator=g).float()
        return x, idx, weights

    def layout(self, program: random.Random) -> dict[str, Any]:
        options: dict[str, Any] = {"layout": program.choice(["compact", "grouped", "slab"])}
        ample = self.buffer.num_ranks * TOKENS * TOPK + 8 * EXPERTS
        if options["layout"] == "slab":
            options["capacity"] = ample
        else:
            options["alignment"] = program.choice([1, 4, 8])
        if program.random() < 0.3:
            options |= {"sync": False, "capacity": ample}
        return options

    def dispatch(self, program: random.Random, step: int) -> None:
        options = self.layout(program)
        begins = program.random() < 0.4
        x, idx, weights = self.tokens(program, step)
        received = self.buffer.dispatch(x, idx, weights, wait=not begins, **options)
        self.alive.append(Alive(x, idx, weights, received))

    def combine(self, program: random.Random, step: int, weighted: bool = False) -> None:
        use = program.choice(self.alive)
        factor = program.choice([1, 2, 4])
        begins, place = program.random() < 0.4, program.choice(["own", "arena", "recv"])
        recv = use.get()
        weighted = weighted and recv.layout != "compact"
        y = recv.x * factor
        if place == "arena":
            y = self.buffer.empty(y.shape, y.dtype).copy_(y)
        elif place == "recv" and factor == 1:
            y = recv.x
        out = self.buffer.combine(y, recv.handle, weighted=weighted, wait=not begins)
        want = self.expected(use, recv.layout, weighted) * factor
        if isinstance(out, Begun):
            self.pending.append((out, want))
        else:
            assert torch.equal(out, want), (step, recv.layout)

    def weighted(self, program: random.Random, step: int) -> None:
        self.combine(program, step, weighted=True)

    def expected(self, use: Alive, layout: str, weighted: bool) -> Tensor:
        there = use.idx >= 0
        if layout == "compact":
            owner = torch.tensor(self.buffer._spec.owner)[use.idx.clamp(min=0)]
            owner[~there] = -1
            ranks_of = [(owner == r).any(1) for r in range(self.buffer.num_ranks)]
            copies = torch.stack(ranks_of).sum(0).float()
        else:
            copies = torch.where(there, use.weights if weighted else 1.0, 0.0).sum(1)
        return (use.x.float() * copies[:, None]).to(use.x.dtype) + 0.0

    def cached(self, program: random.Random, step: int) -> None:
        use = program.choice(self.alive)
        recv = use.get()
        again = self.buffer.dispatch(use.x * 2, handle=tuple(recv.handle))
        self.alive.append(Alive(use.x * 2, use.idx, use.weights, again))

    def drop(self, program: random.Random, step: int) -> None:
        if self.alive:
            self.alive.pop(program.randrange(len(self.alive)))
        elif self.pending:
            self.pending.pop()

    def wait(self, program: random.Random, step: int) -> None:
        program.shuffle(self.pending)
        while self.pending:
            begun, want = self.pending.pop()
            assert torch.equal(begun.wait(), want), step

    def release(self, program: random.Random, step: int) -> None:
        self.buffer.release()

    def failing(self, code: str, **change: Any) -> None:
        x, idx, weights = self.tokens(random.Random(1), 1)
        arguments = {"x": x, "topk_idx": idx, "topk_weights": weights, **change}
        with pytest.raises(EPError) as caught:
            self.buffer.dispatch(**arguments)
        assert caught.value.code == code, caught.value

    def fail(self, program: random.Random, step: int) -> None:
        culprit = program.randrange(self.buffer.num_ranks)
        x = torch.ones(2, self.hidden).to(torch.bfloat16)
        idx = torch.zeros(2, TOPK, dtype=torch.int64)
        bad = EXPERTS if culprit == self.buffer.rank else 0
        self.failing("E213", x=x, topk_idx=idx + bad, topk_weights=None)

    def static_fail(self, program: random.Random, step: int) -> None:
        culprit = program.randrange(self.buffer.num_ranks)
        x = torch.ones(2, self.hidden).to(torch.bfloat16)
        idx = torch.zeros(2, TOPK, dtype=torch.int64)
        bad = EXPERTS if culprit == self.buffer.rank else 0
        recv = self.buffer.dispatch(x, idx + bad, sync=False)
        assert recv.status.item() == 213
        with pytest.raises(EPError):
            self.buffer.check()

    def refuse(self, program: random.Random, step: int) -> None:
        culprit = program.randrange(self.buffer.num_ranks)
        layout = "rows" if culprit == self.buffer.rank else "compact"
        self.failing("E203", layout=layout)

    def overflow(self, program: random.Random, step: int) -> None:
        x = torch.ones(4, self.hidden).to(torch.bfloat16)
        idx = torch.zeros(4, TOPK, dtype=torch.int64)
        self.failing("E230", x=x, topk_idx=idx, topk_weights=None, capacity=1)


def shape(hidden: int, **options: Any) -> dict[str, Any]:
    return {
        "num_experts": EXPERTS, "num_topk": TOPK, "hidden": hidden, "max_tokens": TOKENS, **options
    }  # fmt: skip


def soak_threads(num_ranks: int, num_slots: int, steps: int, seed: int) -> None:
    with Cluster(1, num_ranks) as cluster:
        config = EPConfig(arrival_s=60.0)
        cluster.make_buffers(**shape(40, num_slots=num_slots, config=config))

        def work(rank: int) -> dict[str, int]:
            return Soak(cluster.buffers[rank], seed, 40, jitter_s=0.001).run(steps)

        done = cluster.run(work, limit_s=60 + steps / 10)
        assert all(d == done[0] for d in done)
        gc.collect()
        for buffer in cluster.buffers:
            assert buffer.stats()["arena"]["num_extents"] <= 1


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(2, 2), (3, 2), (4, 3)])
def test_d9_random_program_on_threads(num_ranks: int, num_slots: int) -> None:
    soak_threads(num_ranks, num_slots, 1000, seed=num_ranks)


def test_d9_random_program_on_processes() -> None:
    ranks.run(_soak_process, 3, 800, 48, limit_s=120)


def _soak_process(me: Any, steps: int, hidden: int) -> tuple[int, int]:
    buffer = me.buffer(**shape(hidden))
    soak = Soak(buffer, 77, hidden)
    soak.run(steps // 2)
    gc.collect()
    first = _private_kib()
    Soak(buffer, 78, hidden).run(steps)
    gc.collect()
    return first, _private_kib()


def _private_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_d9_random_program_on_threads_for_long(seed: int) -> None:
    soak_threads(2 + seed % 4, 2 + seed % 3, 3000, seed=100 + seed)


@pytest.mark.slow
def test_d9_random_program_on_processes_for_long_keeps_memory_flat() -> None:
    for first, last in ranks.run(_soak_process, 4, 6000, 2048, limit_s=280):
        assert last - first < 32 << 10, f"private memory grew from {first} to {last} KiB"
