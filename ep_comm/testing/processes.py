"""Ranks as processes, spawned for one call, with a gloo group between them."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_processes(
    work: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    limit_s: float = 120.0,
    may_die: bool = False,
) -> list[Any]:
    """Call `work(rank, num_ranks, *args)` in `num_ranks` fresh processes; results by rank.

    Each process has the default gloo group. `work` must be importable (module level) and its result
    picklable.

    Args:
        limit_s: after this long what is left is killed and TimeoutError is raised.
        may_die: False: a rank that raises or dies makes this raise RuntimeError with its traceback.
            True: the place of such a rank holds the exception it raised, or its exit code as an int
            when it died.

    Cost: a fresh interpreter and an import of torch per rank, seconds rather than milliseconds.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ep_comm") as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(
                target=_main, args=(queue, work, r, num_ranks, os.path.join(folder, "store"), args)
            )
            for r in range(num_ranks)
        ]
        for process in processes:
            process.start()
        results = _collect(processes, queue, limit_s)
    if not may_die:
        for rank, result in enumerate(results):
            if isinstance(result, _Raised):
                raise RuntimeError(f"rank {rank} failed:\n{result.text}") from result.error
            if isinstance(result, _Died):
                raise RuntimeError(f"rank {rank} ended with exit code {result.code}")
    return [
        r.error if isinstance(r, _Raised) else r.code if isinstance(r, _Died) else r
        for r in results
    ]


class _Raised:
    def __init__(self, error: BaseException, text: str) -> None:
        self.error, self.text = error, text


class _Died:
    def __init__(self, code: int | None) -> None:
        self.code = code


def _collect(processes: list[Any], queue: Any, limit_s: float) -> list[Any]:
    import time

    deadline = time.monotonic() + limit_s
    results: dict[int, Any] = {}
    try:
        while True:
            while not queue.empty():
                rank, result = queue.get()
                results[rank] = pickle.loads(result)
            if (
                all(r in results or not p.is_alive() for r, p in enumerate(processes))
                and queue.empty()
            ):
                break
            if time.monotonic() > deadline:
                late = [r for r, p in enumerate(processes) if r not in results and p.is_alive()]
                raise TimeoutError(f"ranks {late} ran longer than {limit_s} s")
            time.sleep(0.005)
    finally:
        for process in processes:
            process.join(2.0 if len(results) == len(processes) else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [results.get(r, _Died(p.exitcode)) for r, p in enumerate(processes)]


def _main(
    queue: Any, work: Any, rank: int, num_ranks: int, path: str, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, num_ranks), rank=rank, world_size=num_ranks
    )
    try:
        _put(queue, rank, work(rank, num_ranks, *args))
    except BaseException as error:  # handed to the parent, whatever it is
        _put(queue, rank, _Raised(error, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def _put(queue: Any, rank: int, result: Any) -> None:
    # Pickled here: the queue would send a tensor as a descriptor to fetch from us, who end first.
    queue.put((rank, pickle.dumps(result)))
