"""What plans cost and how good they are: beside the public greedy, random ones, and the optimum.

    python bench/eplb_plan.py [--json bench/results/eplb_plan.jsonl]

One thread. `cpu_ms` is processor time of this process for `eplb.plan` of 58 layers x 256 experts,
predictions included, `wall_ms` the time that passed, which others on the machine lengthen (min,
p10, p50, p90). `imbalance` is the heaviest rank over the mean, replicas sharing evenly: mean and
worst layer. `of_best_random` is ours over the best of 1000 randomized greedies, worst of the layers
tried. `moves` counts experts that a rank gets, all layers; drift moves 5 % of the load, and its
times are those with `current`; "another load" has nothing in common with that which is in force.
`cases` compares with the public greedy, `sharing` counts layers where replicas share a rank though
they need not. `routing_us` is what choosing replicas adds to a dispatch: one rank, the median over
turns of the difference to the call without a placement that follows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ep_comm import Buffer
from ep_comm.bench.machine import LoadMeter, facts
from ep_comm.eplb import Placement, initial_placement, plan
from ep_comm.testing.skew import drifted, zipf_load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from eplb_yardsticks import best_of_randomized, generated_cases, greedy, optimum

LAYERS, EXPERTS = 58, 256
WORLDS = {  # num_ranks, num_nodes, num_replicas, num_groups
    "32 ranks, 8 groups": (32, 4, 288, 8),
    "32 ranks, 256 groups": (32, 4, 288, 256),
    "32 ranks, global": (32, 4, 288, 1),
    "320 ranks, 320 slots": (320, 40, 320, 1),
    "320 ranks, 640 slots": (320, 40, 640, 1),
}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {name: round(ordered[int(len(ordered) * q)], 2) for name, q in at.items()}


class Clock:
    """Times of calls."""

    def __init__(self) -> None:
        self._cpu: list[float] = []
        self._wall: list[float] = []

    def time(self, work: Callable[[], Placement]) -> Placement:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self._wall.append((time.perf_counter() - wall) * 1e3)
        self._cpu.append((time.process_time() - cpu) * 1e3)
        return result

    def read(self) -> dict[str, dict[str, float]]:
        return {"cpu_ms": percentiles(self._cpu), "wall_ms": percentiles(self._wall)}


def plans(restarts: int) -> Iterator[dict[str, Any]]:
    load = zipf_load(LAYERS, EXPERTS, 1.0)
    for name, world in WORLDS.items():
        ranks, nodes, slots, groups = world
        clock = Clock()
        for _ in range(20):
            placement = clock.time(lambda w=world: plan(load, *w))
        mine = placement.imbalance(load)
        public = greedy(load, slots, groups, nodes, ranks)
        tried = 4 if ranks == 32 else 1
        best = [
            best_of_randomized(load[n], slots, groups, nodes, ranks, restarts) for n in range(tried)
        ]
        yield {
            "op": "plan",
            "world": name,
            **clock.read(),
            "imbalance": [round(float(mine.mean()), 5), round(float(mine.max()), 5)],
            "public_greedy": [round(float(public.mean()), 5), round(float(public.max()), 5)],
            "restarts": restarts,
            "of_best_random": round(max(float(mine[n]) / best[n] for n in range(tried)), 5),
        }


def drifts() -> Iterator[dict[str, Any]]:
    for name, world in WORLDS.items():
        ratios, moves, shares, clock = [], [0, 0], [], Clock()
        before = zipf_load(LAYERS, EXPERTS, 1.0)
        old = plan(before, *world)
        for seed in range(3):
            after = drifted(before, 0.05, seed=seed + 1)
            fresh = plan(after, *world)
            for _ in range(5):
                kept = clock.time(lambda w=world, o=old, a=after: plan(a, *w, current=o))
            ratios.append(float((kept.imbalance(after) / fresh.imbalance(after)).max()))
            mine, theirs = kept.moves_from(old), fresh.moves_from(old)
            moves = [moves[0] + int(mine.sum()), moves[1] + int(theirs.sum())]
            shares.append(mine / theirs)
        share = torch.cat(shares)
        yield {
            "op": "drift",
            "world": name,
            "moves": moves[0] // 3,
            "moves_of_fresh_plan": moves[1] // 3,
            "share": round(moves[0] / moves[1], 4),
            "share_worst_layer": round(float(share.max()), 4),
            "layers_above_a_quarter": [int((share > 0.25).sum()), len(share)],
            "imbalance_over_fresh_worst_layer": round(max(ratios), 5),
            **clock.read(),
        }


def another_load() -> Iterator[dict[str, Any]]:
    for name, world in WORLDS.items():
        old = plan(zipf_load(LAYERS, EXPERTS, 1.0), *world)
        load, clock = zipf_load(LAYERS, EXPERTS, 1.0, seed=77), Clock()
        for _ in range(5):
            kept = clock.time(lambda w=world, o=old, a=load: plan(a, *w, current=o))
        fresh = plan(load, *world)
        yield {
            "op": "another load",
            "world": name,
            "moves": int(kept.moves_from(old).sum()),
            "moves_of_fresh_plan": int(fresh.moves_from(old).sum()),
            **clock.read(),
        }


def cases() -> Iterator[dict[str, Any]]:
    for distinct in (True, "always", False):
        ratios, sharing = [], 0
        for _, load, (ranks, nodes, slots, groups) in generated_cases():
            placement = plan(load, ranks, nodes, slots, groups, distinct=distinct)  # type: ignore[arg-type]
            mine = placement.imbalance(load)
            ratios += [(mine / greedy(load, slots, groups, nodes, ranks)).max()]
            if slots // ranks <= load.shape[1] // (nodes if groups % nodes == 0 else 1):
                sharing += int((placement.hosted.amax((1, 2)) > 1).sum())
        over = torch.stack(ratios)
        yield {
            "op": "cases",
            "distinct": distinct,
            "cases": len(over),
            "worse": int((over > 1 + 1e-9).sum()),
            "mean_ratio": round(float(over.mean()), 5),
            "worst_ratio": round(float(over.max()), 5),
            "sharing": sharing,
        }


def gap() -> dict[str, Any]:
    gaps = []
    for seed in range(200):
        experts, slots, ranks = ((4, 6, 3), (5, 8, 4), (6, 8, 4), (5, 6, 2))[seed % 4]
        load = torch.rand(experts, generator=torch.Generator().manual_seed(seed)).double() ** 2
        mine = float(plan(load, ranks, 1, slots, distinct="always").rank_load.max())  # type: ignore[union-attr]
        gaps.append(mine / optimum(load.tolist(), slots, ranks) - 1)
    return {
        "op": "gap",
        "cases": len(gaps),
        "optimal": sum(g < 1e-9 for g in gaps),
        "mean": round(statistics.mean(gaps), 6),
        "worst": round(max(gaps), 6),
    }


def routing(tokens: int = 1024, turns: int = 400) -> dict[str, Any]:
    placement = initial_placement(1, 64, 72, 1)
    ids = torch.rand(tokens, 64).topk(8).indices
    x = torch.zeros(tokens, 128, dtype=torch.bfloat16)
    above, plain = [], []
    with Buffer(
        None, num_experts=72, num_topk=8, hidden=128, max_tokens=tokens, device="cpu"
    ) as buffer:
        buffer.set_placement(placement)
        for turn in range(turns + 20):
            start = time.perf_counter()
            buffer.dispatch(x, ids)
            middle = time.perf_counter()
            buffer.dispatch(x, ids, layer=None)
            end = time.perf_counter()
            if turn >= 20:
                above.append((middle - start - (end - middle)) * 1e6)
                plain.append((end - middle) * 1e6)
    return {
        "op": "routing",
        "tokens": tokens,
        "topk": 8,
        "routing_us": round(statistics.median(above), 1),
        "plain_us": round(statistics.median(plain), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--restarts", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    meter = LoadMeter()
    records = [*plans(options.restarts), *drifts(), *another_load(), *cases(), gap(), routing()]
    same = {"layers": LAYERS, "experts": EXPERTS, "load": meter.read(meter.own_s())}
    for record in records:
        print(json.dumps(record))
    if options.json:
        machine = facts()
        lines = [json.dumps({**record, **same, "machine": machine}) for record in records]
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
