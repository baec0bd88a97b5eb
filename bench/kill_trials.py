"""How soon a killed rank is named: kill one at a random moment of its work, ask all others.

    python bench/kill_trials.py [--trials 100] [--ranks 4] [--json FILE]

Every trial has fresh processes. They dispatch and combine without a pause, partly begun and waited
for later; after 0 to 100 ms a random rank gets SIGKILL. `named_ms` is the time from the signal to
the error in the hands of the last survivor's caller. A trial is `named` when every survivor raised
E110 with the killed rank as its peer. The command exits with 1 unless all trials are, within
--limit-ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # rank processes that talk and die

import ranks
import torch

from ep_comm import Buffer
from ep_comm.bench.machine import facts
from ep_comm.errors import EPError

SHAPE = {"num_experts": 16, "num_topk": 4, "hidden": 1024, "max_tokens": 64}


@dataclass
class Seen:
    """What a survivor raised, and when (`time.monotonic`)."""

    code: str
    peer: int | None
    op: str
    when: float


def work(me: Any, seed: int) -> Seen:
    """A program of all kinds of calls, the same on all ranks, until one of them raises."""
    buffer = me.buffer(**SHAPE)
    rng, own = random.Random(seed), torch.Generator().manual_seed(seed * 100 + me.rank)
    x = torch.randn(SHAPE["max_tokens"], SHAPE["hidden"], generator=own).bfloat16()
    scores = torch.rand(SHAPE["max_tokens"], SHAPE["num_experts"], generator=own)
    topk_idx = scores.topk(SHAPE["num_topk"]).indices
    me.say("ready")
    try:
        while True:
            step(buffer, rng, x, topk_idx)
    except EPError as error:
        return Seen(error.code, error.peer, error.op or "", time.monotonic())


def step(buffer: Buffer, rng: random.Random, x: torch.Tensor, topk_idx: torch.Tensor) -> None:
    kind = rng.choice(["plain", "begun", "two", "cached"])
    layout = rng.choice(["compact", "grouped"])
    if kind == "two":
        first, second = (buffer.dispatch(x, topk_idx, layout=layout, wait=False) for _ in range(2))
        later, sooner = second.wait(), first.wait()
        home = [buffer.combine(r.x, r.handle, wait=False) for r in (sooner, later)]
        for out in home:
            out.wait()
        return
    begun = buffer.dispatch(x, topk_idx, layout=layout, wait=False) if kind == "begun" else None
    recv = buffer.dispatch(x, topk_idx, layout=layout) if begun is None else begun.wait()
    if kind == "cached":
        recv = buffer.dispatch(x, handle=recv.handle)
    buffer.combine(recv.x, recv.handle)


def trial(seed: int, num_ranks: int = 4) -> tuple[int, list[Seen], float]:
    """One killed rank: which, what the others saw, milliseconds until the last one had it."""
    rng = random.Random(seed)
    victim = rng.randrange(num_ranks)
    with ranks.Ranks(work, num_ranks, seed) as group:
        group.hear_all()
        time.sleep(rng.uniform(0.0, 0.1))
        killed = group.kill(victim)
        seen = [group.result(r, 30.0) for r in range(num_ranks) if r != victim]
    for what in seen:
        if isinstance(what, BaseException):
            raise what
    return victim, seen, 1e3 * (max(s.when for s in seen) - killed)


def named(victim: int, seen: list[Seen]) -> bool:
    """Whether every survivor blamed the rank that was killed, and for its death."""
    return all((s.code, s.peer) == ("E110", victim) for s in seen)


def run(trials: int, num_ranks: int, limit_ms: float) -> dict[str, Any]:
    """The record of a run."""
    times: list[float] = []
    right, ops = 0, Counter[str]()
    load = os.getloadavg()[0]
    for seed in range(trials):
        victim, seen, ms = trial(seed, num_ranks)
        right += named(victim, seen)
        times.append(ms)
        ops.update(s.op for s in seen)
        print(f"\r{seed + 1} of {trials}: {right} named, slowest {max(times):.0f} ms", end="")
    print()
    cuts = statistics.quantiles(times, n=100, method="inclusive") if trials > 1 else times * 99
    return {
        "case": "kill_trials",
        "backend": "cpu",
        "ranks": num_ranks,
        "trials": trials,
        "named": right,
        "within_limit": sum(ms < limit_ms for ms in times),
        "limit_ms": limit_ms,
        "named_ms": {
            "p10": round(cuts[9], 1),
            "p50": round(cuts[49], 1),
            "p90": round(cuts[89], 1),
            "p99": round(cuts[98], 1),
            "max": round(max(times), 1),
        },
        "survivors_were_in": dict(ops),
        "shape": SHAPE,
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--limit-ms", type=float, default=1000.0)
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    record = run(options.trials, options.ranks, options.limit_ms)
    print(json.dumps(record, indent=2))
    if options.json is not None:
        command = " ".join(["python", *sys.argv])
        line = json.dumps({**record, "command": command, "machine": facts()})
        options.json.write_text(line + "\n")
    return 0 if record["named"] == record["within_limit"] == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
