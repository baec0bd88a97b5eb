"""The nvlink backend beside kernels of others: collectives of NCCL that peers issue in the opposite
order, and a kernel that runs while calls are made for the first time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import Buffer, EPConfig

CLOCKS = EPConfig(arrival_s=60.0, progress_s=60.0)
NUM_EXPERTS, NUM_TOPK = 16, 4


@dataclass(frozen=True)
class Size:
    """Of a batch. Few tokens go as a small batch, whose blocks want every SM."""

    tokens: int
    hidden: int
    options: dict[str, Any]
    rounds: int = 24


SIZES = {
    "throughput": Size(4096, 4096, {}),
    "throughput-grouped": Size(2048, 2048, {"layout": "grouped", "alignment": 16}),
    "small-static": Size(128, 7168, {"sync": False}),
    "small-slab": Size(256, 7168, {"layout": "slab", "sync": False}),
    "small-slab-many": Size(1024, 2048, {"layout": "slab"}),
}
AT_ONCE = 4  # rounds that are issued before anybody looks
REDUCED = (
    1 << 10,
    1 << 24,
)  # floats: of a collective that takes one SM, and of one that takes many


def draw(size: Size, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Rows of small whole numbers, whose sums are exact, and where they go."""
    g = torch.Generator().manual_seed(1000 * number + rank)
    x = torch.randint(-16, 17, (size.tokens, size.hidden), generator=g).to(torch.bfloat16)
    return x, torch.randint(-1, NUM_EXPERTS, (size.tokens, NUM_TOPK), generator=g)


def sums_of(size: Size, num_ranks: int, x: Tensor, idx: Tensor) -> Tensor:
    """What comes home of rows that are sent back as they came."""
    owner = torch.where(idx >= 0, idx // (NUM_EXPERTS // num_ranks), -1)
    if "layout" in size.options:  # a row for each selection
        times = (owner >= 0).sum(1)
    else:
        times = torch.stack([(owner == r).any(1) for r in range(num_ranks)]).sum(0)
    return (x.float() * times[:, None]).to(x.dtype)


class Side:
    """A rank, its inputs, and what it must get."""

    def __init__(self, me: ranks.Me, size: Size) -> None:
        self.size, device = size, torch.device("cuda", me.rank)
        torch.cuda.set_device(device)
        self.buffer = Buffer(
            me.group("beside"), device=device, config=CLOCKS, num_experts=NUM_EXPERTS,
            num_topk=NUM_TOPK, hidden=size.hidden, max_tokens=size.tokens, arena_bytes=2 << 30,
        )  # fmt: skip
        me.kept.append(self.buffer)
        drawn = [draw(size, me.rank, n) for n in range(AT_ONCE)]
        self.given = [(x.to(device), idx.to(device)) for x, idx in drawn]
        self.sums = [sums_of(size, me.size, x, idx).to(device) for x, idx in drawn]
        self.mine = [torch.full((n,), me.rank + 1.0, device=device) for n in REDUCED]
        self.reduced = [[t.clone() for t in self.mine] for _ in range(AT_ONCE)]
        self.total = sum(range(1, me.size + 1))
        self.stream, self.aside = torch.cuda.Stream(), torch.cuda.Stream()

    def exchange(self, n: int) -> Tensor:
        x, idx = self.given[n]
        with torch.cuda.stream(self.stream):
            recv = self.buffer.dispatch(x, idx, **self.size.options)
            out: Tensor = self.buffer.combine(recv.x, recv.handle)
        return out

    def reduce(self, n: int, which: int, group: Any = None) -> None:
        with torch.cuda.stream(self.aside):
            self.reduced[n][which].copy_(self.mine[which])
            dist.all_reduce(self.reduced[n][which], group=group)

    def check(self, outs: list[Tensor]) -> None:
        torch.cuda.synchronize()
        for n, out in enumerate(outs):
            assert torch.equal(out, self.sums[n]), f"sums of round {n}"
            for reduced in self.reduced[n]:
                assert bool((reduced == self.total).all()), f"what NCCL makes of round {n}"


def start(me: ranks.Me, connections: int) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)  # read when CUDA starts
    torch.cuda.set_device(me.rank)
    store = dist.FileStore(f"{me.store}-nccl")
    dist.init_process_group("nccl", store=store, rank=me.rank, world_size=me.size)


def in_opposite_order(me: ranks.Me, connections: int, size: Size) -> None:
    """Rank 0 reduces, then exchanges; the others exchange first."""
    start(me, connections)
    side = Side(me, size)
    for which in range(len(REDUCED)):  # connects, and loads what is NCCL's and torch's
        for n in range(AT_ONCE):
            side.reduce(n, which)
    side.check([side.exchange(n) for n in range(AT_ONCE)])
    for _ in range(size.rounds // AT_ONCE):
        outs = []
        for n in range(AT_ONCE):
            for which in range(len(REDUCED)):
                if me.rank == 0:
                    side.reduce(n, which)
                    time.sleep(2e-3)  # it holds its SMs before the others get theirs
                    outs[n:] = [side.exchange(n)]
                else:
                    outs[n:] = [side.exchange(n)]
                    side.reduce(n, which)
        side.check(outs)
    side.buffer.check()
    dist.destroy_process_group()


needs_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason="torch has no NCCL")


@needs_nccl
@pytest.mark.gpus(2)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("connections", [1, 32])
@pytest.mark.parametrize("name", SIZES)
def test_collectives_in_the_opposite_order(name: str, connections: int) -> None:
    ranks.run(in_opposite_order, 2, connections, SIZES[name], limit_s=150.0)


def between_crossed_collectives(me: ranks.Me, connections: int, size: Size) -> None:
    """Each rank first issues the collective that the other one issues last."""
    start(me, connections)
    side = Side(me, size)
    groups = [dist.new_group(list(range(me.size))) for _ in range(2)]
    big = len(REDUCED) - 1
    for group in groups:
        for n in range(AT_ONCE):
            side.reduce(n, 0)
            side.reduce(n, big, group)
            torch.cuda.synchronize()
    side.check([side.exchange(n) for n in range(AT_ONCE)])
    others = [torch.cuda.Stream() for _ in groups]
    for _ in range(size.rounds // AT_ONCE):
        outs = []
        for n in range(AT_ONCE):
            first = me.rank % 2
            side.aside = others[first]
            side.reduce((n + first) % AT_ONCE, big, groups[first])
            time.sleep(2e-3)
            outs.append(side.exchange(n))
            side.aside = others[1 - first]
            side.reduce((n + 1 - first) % AT_ONCE, big, groups[1 - first])
            torch.cuda.synchronize()
        side.check(outs)
    side.buffer.check()
    dist.destroy_process_group()


@needs_nccl
@pytest.mark.gpus(2)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["throughput", "small-static", "small-slab"])
def test_each_rank_has_a_collective_that_the_other_has_yet_to_issue(name: str) -> None:
    ranks.run(between_crossed_collectives, 2, 32, SIZES[name], limit_s=150.0)


# ---- kernels are loaded when a buffer is made ----

ASLEEP_CYCLES = 12_000_000_000  # more than 5 s
SLAB_ROWS = 64


def buffer_of(me: ranks.Me, name: str, max_tokens: int) -> Buffer:
    buffer = Buffer(
        me.group(name), device="cuda", backend="nvlink", config=CLOCKS, num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK, hidden=512, max_tokens=max_tokens, arena_bytes=1 << 30,
    )  # fmt: skip
    me.kept.append(buffer)
    return buffer


def first_calls(me: ranks.Me) -> list[tuple[str, Callable[[], object]]]:
    """Each kind of call once. Whatever torch itself has to run has run when this returns."""
    large, small = buffer_of(me, "large", 2048), buffer_of(me, "small", SLAB_ROWS)
    g = torch.Generator().manual_seed(me.rank)
    x = torch.randn((SLAB_ROWS, 512), generator=g).to(torch.bfloat16).cuda()
    idx = torch.randint(0, NUM_EXPERTS, (SLAB_ROWS, NUM_TOPK), generator=g).cuda()
    weights = torch.rand((SLAB_ROWS, NUM_TOPK), generator=g).cuda()
    half, narrow, rough = x.to(torch.float16), idx.int(), weights.bfloat16()
    rows = me.size * SLAB_ROWS
    y = torch.zeros((NUM_EXPERTS // me.size, rows, 512), dtype=torch.bfloat16, device="cuda")
    slab = {"layout": "slab", "capacity": rows}

    def pair(buffer: Buffer, x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
        combine = options.pop("combine", {})
        recv = buffer.dispatch(x, idx, *weights, **options)
        answer = combine.pop("x", recv.x)
        out: Tensor = buffer.combine(answer, recv.handle, **combine)
        return out

    def begun(buffer: Buffer, **options: Any) -> object:
        recv = buffer.dispatch(x, idx, wait=False, **options).wait()
        return buffer.combine(recv.x, recv.handle, wait=False).wait()

    def again(**options: Any) -> object:
        recv = large.dispatch(x, idx, weights, **options)
        del options["layout"]
        return large.dispatch(x, handle=recv.handle)

    def home() -> object:
        recv = large.dispatch(x, idx, weights)
        return large.combine(recv.x, recv.handle, topk_weights=recv.topk_weights)

    calls: list[tuple[str, Callable[[], object]]] = []
    for name, buffer in (("large", large), ("small", small)):
        calls += [
            (f"{name} compact", lambda b=buffer: pair(b, x)),
            (f"{name} fp16", lambda b=buffer: pair(b, half)),
            (f"{name} grouped", lambda b=buffer: pair(b, x, weights, layout="grouped",
                                                      combine={"weighted": True})),
            (f"{name} slab", lambda b=buffer: pair(b, x, weights, **slab)),
            (f"{name} slab, y of torch", lambda b=buffer: pair(b, x, **slab, combine={"x": y})),
            (f"{name} per rank", lambda b=buffer: pair(b, x, **slab, combine={"per_rank": True})),
            (f"{name} static", lambda b=buffer: pair(b, x, sync=False)),
            (f"{name} static grouped", lambda b=buffer: pair(b, x, sync=False, layout="grouped")),
            (f"{name} fp8", lambda b=buffer: b.dispatch(x, idx, quantize="fp8")),
            (f"{name} fp8 slab", lambda b=buffer: b.dispatch(x, idx, quantize="fp8", **slab)),
            (f"{name} ue8m0", lambda b=buffer: b.dispatch(half, idx, quantize="fp8_ue8m0")),
            (f"{name} origins, row index",
             lambda b=buffer: b.dispatch(x, idx, origins=True, row_index=True)),
            (f"{name} begun", lambda b=buffer: begun(b)),
            (f"{name} begun slab", lambda b=buffer: begun(b, **slab)),
        ]  # fmt: skip
    calls += [
        ("cached", lambda: again(layout="compact")),
        ("cached grouped", lambda: again(layout="grouped")),
        ("copies", lambda: large.dispatch(x, idx, transfer="copy_engine")),
        ("narrow ids", lambda: large.dispatch(x, narrow)),
        ("bfloat16 weights", lambda: large.dispatch(x, idx, rough)),
        ("weights home", home),
        ("check", large.check),
    ]
    return calls


def beside_a_sleeper(me: ranks.Me) -> list[str]:
    """The call that waited until the other kernel of this GPU had ended, if one did."""
    os.environ["CUDA_MODULE_LOADING"] = "LAZY"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    torch.cuda.set_device(me.rank)
    calls = first_calls(me)
    for bytes_ in (1 << 10, 64 << 20):  # torch's allocator asks CUDA for memory now
        spare = [torch.empty(bytes_, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del spare
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(1000)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    me.say("ready")
    me.wait_for_go()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(ASLEEP_CYCLES)  # type: ignore[no-untyped-call]
        over = aside.record_event()
    kept, late = [], []
    for name, call in calls:
        kept.append(call())  # nothing is freed meanwhile
        torch.cuda.current_stream().synchronize()
        if over.query():
            late.append(name)
            break
    torch.cuda.synchronize()
    return late


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "num_ranks",
    [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpus(2))],
)
def test_no_first_call_waits_for_a_kernel_that_runs(num_ranks: int) -> None:
    """A module that is loaded, and memory that is freed, wait for every kernel of the GPU."""
    with ranks.Ranks(beside_a_sleeper, num_ranks) as processes:
        processes.hear_all(60.0)
        processes.go()
        results = processes.results(60.0)
    assert results == [[]] * num_ranks
