"""Ranks for a run: fresh processes on this machine, or those torchrun has started."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ep_comm.bench import gpu, machine, memory
from ep_comm.bench.cases import Case
from ep_comm.bench.measure import Options, measure_case, steps
from ep_comm.testing import run_processes


def torchrun_world() -> tuple[int, int] | None:
    """Rank and number of ranks when torchrun, or something like it, started this process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def run(cases: Sequence[Case], options: Options, limit_s: float) -> list[dict[str, Any]]:
    """Measure every case; all cases have the same number of ranks.

    Raises:
        RuntimeError: a rank failed; the text ends with its traceback.
        TimeoutError: `limit_s` is over.
    """
    world = torchrun_world()
    if world is None:
        ranks = cases[0].ranks
        results = run_processes(_rank_main, ranks, list(cases), options, limit_s=limit_s)
        records: list[dict[str, Any]] = results[0]
        return records
    dist.init_process_group("gloo")
    try:
        return _rank_main(*world, cases, options)
    finally:
        dist.destroy_process_group()


def _rank_main(
    rank: int, num_ranks: int, cases: Sequence[Case], options: Options
) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    torch.set_num_threads(1)
    if options.bind:
        machine.keep_to_core(rank)
    if options.malloc == "keep" and not memory.keep_freed_memory():
        raise RuntimeError("this malloc cannot keep freed memory; run with --malloc default")
    measure = gpu.measure_case if cases[0].device == "cuda" else measure_case
    records = []
    hidden = rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        for case in cases:
            task = progress.add_task(case.name, total=steps(options))
            records += measure(case, rank, options, partial(progress.advance, task))
            progress.remove_task(task)
    return records
