#!/usr/bin/env python3
"""A long random program over GPUs, every result checked: layouts, dtypes, skew, begun operations in
any order, graph replays, copies, refusals.

    python tests/stress_nvlink.py                       2 processes, a GPU each, 10,000 dispatches
    python tests/stress_nvlink.py --loopback --ranks 4  threads on one GPU
    python tests/stress_nvlink.py --mps --ranks 8       processes that share GPUs under MPS
    python tests/stress_nvlink.py --device cpu          the same program on the CPU backend
    ... --seconds 40 --json bench/results/nvlink_stress.jsonl

All ranks draw the same program from a seed, and the tokens of all ranks. Rows, ids, weights and
scales are functions of (dispatch, rank, token), so a rank knows without asking what must arrive
where, and compares all of it on its device, every time. Sums are of whole numbers, exact in any
order. Now and then a call is also compared with ep_comm.reference, handles and quantized rows
included. A mismatch names its round; `--first N --rounds 1` plays that one again.

It ends after --dispatches, or after --seconds, and says how far it came. A record, also of a
failure, is one JSON line with `correct`, seed, counts, GPU and commit. The exit code is 1 unless
all was right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read when CUDA starts

import mps
from stress.draw import WORLDS
from stress.run import Plan, stress_processes, stress_threads


def record(o: argparse.Namespace, outcome: dict[str, Any]) -> dict[str, Any]:
    """What ran where, and what came of it."""
    import torch

    from ep_comm.bench.machine import git_state

    num_gpus = torch.cuda.device_count() if o.device == "cuda" else 0
    git = git_state() or {"commit": "", "dirty": None}
    shared = "one process" if o.loopback else "mps" if o.mps else "processes"
    return {
        "case": "stress",
        "ranks": o.ranks,
        "how": shared,
        "worlds": o.worlds.split(","),
        "seed": o.seed,
        "first": o.first,
        **outcome,
        "gpu": torch.cuda.get_device_name() if num_gpus else None,
        "gpus": num_gpus,
        "commit": o.commit or git["commit"][:7],
        "dirty": git["dirty"],
        "command": " ".join(["python", *sys.argv]),
    }


def play(o: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(
        o.dispatches, o.seed, o.first, o.rounds, tuple(o.worlds.split(",")), o.device, o.seconds,
        o.limit,
    )  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            environ = stack.enter_context(mps.daemon()) if o.mps else {}
            if o.loopback:
                done = stress_threads(plan, o.ranks)
            else:
                done = stress_processes(plan, o.ranks, environ)
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        return {"correct": False, "error": f"{type(error).__name__}: {error}"[:1000]}
    print(f"ok: {done}", flush=True)
    return {"correct": True, **asdict(done), "seconds": round(done.seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--loopback", action="store_true", help="threads on one GPU")
    parser.add_argument("--mps", action="store_true", help="processes share GPUs under MPS")
    parser.add_argument("--dispatches", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, help="then it ends, however far it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="round to begin with")
    parser.add_argument("--rounds", type=int, help="at most")
    parser.add_argument("--worlds", default=",".join(WORLDS), help=", ".join(WORLDS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds; longer is a failure")
    parser.add_argument("--json", type=Path, help="append a record to this file")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    o = parser.parse_args()
    outcome = play(o)
    if o.json is not None:
        with o.json.open("a") as file:
            file.write(json.dumps(record(o, outcome)) + "\n")
    sys.exit(0 if outcome["correct"] else 1)


if __name__ == "__main__":
    main()
