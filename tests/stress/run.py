"""The program, on processes with a GPU each or under MPS, or on threads that share one."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ep_comm import Buffer, EPConfig
from ep_comm.errors import EPError

from .draw import WORLDS, World
from .rounds import KINDS, ONLY_GPU, Nothing, Replay, Round
from .truth import Mismatch, Side


@dataclass(frozen=True)
class Plan:
    """What to run."""

    dispatches: int = 10_000
    seed: int = 0
    first: int = 0  # round
    rounds: int | None = None  # at most
    worlds: tuple[str, ...] = tuple(WORLDS)
    device: str = "cuda"
    seconds: float | None = None  # ends well after so many, however far it is
    limit_s: float = 240.0  # ends badly
    every_s: float = 5.0  # a line about how far it is
    captures: bool = True  # on a GPU

    def kinds(self) -> dict[type[Round], int]:
        lacks = set(ONLY_GPU) if self.device == "cpu" else set() if self.captures else {Replay}
        return {k: n for k, n in KINDS.items() if k not in lacks}


def config() -> EPConfig:
    return EPConfig(arrival_s=100.0, progress_s=60.0)


RESIDENT_SMS = 96  # of a GPU that ranks share: their kernels wait for each other


def buffer_options(world: World, num_ranks: int, sharers: int = 1) -> dict[str, Any]:
    """`sharers`: ranks on a GPU whose kernels run at the same time."""
    rows = num_ranks * world.worst * world.topk
    return {
        "num_sms": max(1, RESIDENT_SMS // sharers) if sharers > 1 else None,
        "num_experts": world.experts,
        "num_topk": world.topk,
        "hidden": world.hidden,
        "max_tokens": world.tokens,
        "num_slots": world.slots,
        # Some begun slabs of the widest rows at once; not so much that memory never runs short.
        "arena_bytes": (64 << 20) + 10 * rows * world.hidden * 4,
        "config": config(),
    }


Calls = Callable[[list[Round]], None]  # makes the calls of all ranks of this process


@dataclass(frozen=True)
class Done:
    """How far a program came."""

    rounds: int
    dispatches: int
    wanted: int
    seconds: float
    kinds: dict[str, int]  # dispatches

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {name}" for name, n in sorted(self.kinds.items()))
        return (
            f"{self.dispatches} of {self.wanted} dispatches in {self.rounds} rounds, "
            f"{self.seconds:.1f} s ({kinds})"
        )


class Progress:
    """Lines for whoever waits, and the end of the time."""

    def __init__(self, plan: Plan, what: str) -> None:
        self.plan, self.what, self.rounds = plan, what, 0
        self.start = self.said = time.monotonic()
        self.kinds: dict[str, int] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def add(self, rounds: list[Round]) -> None:
        name = type(rounds[0]).__name__.lower()
        self.kinds[name] = self.kinds.get(name, 0) + rounds[0].dispatches
        self.rounds += 1
        now = time.monotonic()
        if now - self.said > self.plan.every_s:
            self.said = now
            print(f"{self.what}: {self.done()}", file=sys.stderr, flush=True)
        if now - self.start > self.plan.limit_s:
            raise TimeoutError(f"{self.what}: {self.done()}, the limit is {self.plan.limit_s} s")

    def done(self) -> Done:
        total = sum(self.kinds.values())
        return Done(self.rounds, total, self.plan.dispatches, self.elapsed, dict(self.kinds))


def rounds_of(plan: Plan, sides: dict[str, list[Side]]) -> Iterator[list[Round]]:
    """The program: each round for every rank that this process has."""
    kinds = plan.kinds()
    number, dispatched = plan.first, 0
    while dispatched < plan.dispatches and (
        plan.rounds is None or number - plan.first < plan.rounds
    ):
        world = random.Random(f"world {plan.seed} {number}").choice(plan.worlds)
        chooser = random.Random(f"{plan.seed} {number}")
        kind = chooser.choices(list(kinds), list(kinds.values()))[0]
        seed = chooser.getrandbits(60)
        rounds = [kind(side, random.Random(seed), 7 * number) for side in sides[world]]
        yield rounds
        dispatched += rounds[0].dispatches
        number += 1


IsOver = Callable[[int], bool]  # before round n: the same on all ranks


def run(
    plan: Plan, sides: dict[str, list[Side]], calls: Calls, progress: Progress, is_over: IsOver
) -> None:
    for number, rounds in enumerate(rounds_of(plan, sides), plan.first):
        if is_over(number):
            return
        try:
            play(rounds, calls)
        except (Mismatch, EPError, RuntimeError) as error:
            kind, world = type(rounds[0]).__name__, rounds[0].side.world.name
            rank = "" if len(rounds) > 1 else f"rank {rounds[0].side.rank}, "
            where = (
                f"{rank}{kind} (--seed {plan.seed} --worlds {world} --first {number} --rounds 1)"
            )
            raise Mismatch(f"{where}: {type(error).__name__}: {error}") from error
        progress.add(rounds)
        del rounds


def play(rounds: list[Round], calls: Calls) -> None:
    for r in rounds:
        with r.side.on_stream():
            r.prepare()
    calls(rounds)
    for r in rounds:
        with r.side.on_stream():
            r.check()
            r.side.look()


GRAPHS_END_S = 10.0  # CUDA tells the end of a graph later


def nothing_is_left(sides: dict[str, list[Side]], calls: Calls) -> None:
    """Every extent has come back, once the last operation is over."""
    for name, many in sides.items():
        for side in many:
            side.graph = None
        gc.collect()
        play([Nothing(side, random.Random(0), 0) for side in many], calls)
        gc.collect()
        for side in many:
            end = time.monotonic() + GRAPHS_END_S
            while (left := num_extents(side)) > 0:
                if time.monotonic() > end:
                    raise Mismatch(f"rank {side.rank}: {left} extents of {name} were never freed")
                time.sleep(0.01)


def num_extents(side: Side) -> int:
    """Of what somebody still holds."""
    if side.device.type == "cuda":
        torch.cuda.synchronize(side.device)
    with side.on_stream():
        spare = side.buffer.empty((1,), torch.uint8)  # a grant takes back what has died
    left: int = side.buffer.stats()["arena"]["num_extents"]
    del spare
    return left - 1


# ---- ranks: a process each, or threads of this one ----


def agree_on_the_end(me: Any, plan: Plan, progress: Progress) -> IsOver:
    """Rank 0 looks at the clock, now and then, and the others ask it."""
    import torch.distributed as dist

    store = dist.FileStore(f"{me.store}-end")

    def is_over(number: int) -> bool:
        if plan.seconds is None or number % 8 != 0:
            return False
        key = f"over {number}"
        if me.rank == 0:
            store.set(key, str(int(progress.elapsed > plan.seconds)))
        return bool(int(store.get(key)))

    return is_over


def rank_process(me: Any, plan: Plan, environ: dict[str, str]) -> Done:
    """One rank of real ones; see tests/ranks.py."""
    os.environ.update(environ)  # before CUDA starts
    device, sharers = torch.device(plan.device), 1
    if device.type == "cuda":
        num_gpus = torch.cuda.device_count()
        device = torch.device("cuda", me.rank % num_gpus)
        sharers = -(-me.size // num_gpus)
        torch.cuda.set_device(device)
    sides = {}
    for name in plan.worlds:
        options = buffer_options(WORLDS[name], me.size, sharers)
        buffer = Buffer(me.group(name), device=device, **options)
        me.kept.append(buffer)
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        sides[name] = [Side(WORLDS[name], buffer, device, stream)]
    quiet = plan if me.rank == 0 else replace(plan, every_s=float("inf"))
    progress = Progress(quiet, f"rank {me.rank} of {me.size}")

    def calls(rounds: list[Round]) -> None:
        with rounds[0].side.on_stream():
            rounds[0].call()

    run(plan, sides, calls, progress, agree_on_the_end(me, plan, progress))
    nothing_is_left(sides, calls)
    return progress.done()


def stress_processes(plan: Plan, num_ranks: int, environ: dict[str, str] | None = None) -> Done:
    import ranks

    limit = plan.limit_s + 60
    done: list[Done] = ranks.run(rank_process, num_ranks, plan, environ or {}, limit_s=limit)
    return done[0]


def stress_threads(plan: Plan, num_ranks: int) -> Done:
    """Loopback: all ranks on one GPU, or on the CPU. World after world, as streams of ranks that
    wait for each other must not share one of the GPU's queues.
    """
    from ep_comm.testing import Cluster

    on_gpu = plan.device == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in range(num_ranks)]
    progress = Progress(plan, f"{num_ranks} ranks in one process")
    for turn, name in enumerate(plan.worlds, 1):
        options = buffer_options(WORLDS[name], num_ranks, num_ranks if on_gpu else 1)
        end = None if plan.seconds is None else plan.seconds * turn / len(plan.worlds)

        def is_over(_: int, end: float | None = end) -> bool:
            return end is not None and progress.elapsed > end

        with Cluster(1, num_ranks, device=plan.device) as cluster:
            buffers = cluster.make_buffers(**options)
            device = torch.device(plan.device)
            ranks = [Side(WORLDS[name], buffers[r], device, streams[r]) for r in range(num_ranks)]
            calls = partial(call_on_threads, cluster, plan.limit_s)
            share = -(-plan.dispatches // len(plan.worlds))
            part = replace(plan, worlds=(name,), dispatches=share)
            run(part, {name: ranks}, calls, progress, is_over)
            nothing_is_left({name: ranks}, calls)
            del ranks, buffers
    return progress.done()


def call_on_threads(cluster: Any, limit_s: float, rounds: list[Round]) -> None:
    def one(rank: int) -> None:
        with rounds[rank].side.on_stream():
            rounds[rank].call()

    if cluster.device == "cuda":
        torch.cuda.synchronize()
    cluster.run(one, limit_s=limit_s)
    if cluster.device == "cuda":
        torch.cuda.synchronize()
