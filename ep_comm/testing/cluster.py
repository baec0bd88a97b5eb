"""Ranks as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch

from ep_comm.bootstrap import StoreGroup
from ep_comm.buffer import Buffer

T = TypeVar("T")


class _Late(TimeoutError):
    """Stands for what a rank has not returned."""


class Cluster:
    """num_nodes * ranks_per_node ranks in this process, one thread each while something runs.

    Args:
        num_nodes, ranks_per_node: the cluster to pretend. CPU ranks reach each other's memory,
            whatever the nodes; GPU ranks only within a node (backend "hybrid").
        device: of the buffers that `make_buffers` makes. "cuda": all ranks on one GPU, their
            kernels side by side; set CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA starts, or
            streams of ranks that wait for each other share a hardware queue.

    Cost: a thread per rank and call of `run`. Threads share memory without descriptors (loopback).
    """

    def __init__(self, num_nodes: int = 1, ranks_per_node: int = 2, device: str = "cpu") -> None:
        import torch.distributed as dist

        self.num_nodes, self.ranks_per_node, self.device = num_nodes, ranks_per_node, device
        self.num_ranks = num_nodes * ranks_per_node
        self._store = dist.HashStore()
        self.buffers: list[Buffer] = []

    def group(self, rank: int) -> StoreGroup:
        """What to pass to Buffer as this rank."""
        return StoreGroup(self._store, rank, self.num_ranks, "cluster")

    def run(self, work: Callable[..., T], *per_rank: Any, limit_s: float = 120.0) -> list[T]:
        """Call `work(rank, *values of that rank)` on every rank at once; results by rank.

        Raises:
            BaseException: that of the rank that raised first, which is why others raised; once all
                ranks have ended. `run_catching` shows them all.
            TimeoutError: no rank raised, and one ran longer than limit_s; its thread goes on.
        """
        results, raised = self._run(work, per_rank, limit_s)
        for rank in raised:
            results[rank].add_note(f"raised by rank {rank}; ranks that raised, in order: {raised}")
            raise results[rank]
        for result in results:
            if isinstance(result, _Late):
                raise result
        return results

    def run_catching(
        self, work: Callable[..., T], *per_rank: Any, limit_s: float = 120.0
    ) -> list[T | BaseException]:
        """As run; a rank's exception stands in its place."""
        return self._run(work, per_rank, limit_s)[0]

    def _run(
        self, work: Callable[..., Any], per_rank: tuple[Any, ...], limit_s: float
    ) -> tuple[list[Any], list[int]]:
        """What each rank returned or raised, and the ranks that raised, first to last."""
        results: list[Any] = [_Late(f"rank ran longer than {limit_s} s")] * self.num_ranks
        raised: list[int] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(rank, *(values[rank] for values in per_rank))
            except BaseException as error:  # handed to the caller, whatever it is
                results[rank] = error
                raised.append(rank)

        threads = [
            threading.Thread(target=body, args=(r,), daemon=True) for r in range(self.num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(limit_s)
        return results, list(raised)

    def make_buffers(self, **options: Any) -> list[Buffer]:
        """A Buffer on every rank; closed with the cluster."""
        options.setdefault("device", self.device)
        if self.num_nodes > 1 and torch.device(options["device"]).type == "cuda":
            options.setdefault("backend", "hybrid")
            options.setdefault("ranks_per_node", self.ranks_per_node)
        buffers = self.run(lambda rank: Buffer(self.group(rank), **options))
        self.buffers += buffers
        return buffers

    def disturb(self, rank: int, **trouble: int | bool) -> None:
        """Let rails between pretended nodes go wrong, in what `rank` sends from its next call on.

        Args:
            trouble: fields of `Trouble` in csrc/contract/loopback.h; none: all is well again. E.g.
                seed=1, max_held=8 and max_delay_ns=20000: puts are held back, reordered and slow;
                stalled_peer=3: nothing arrives there; is_silent=True: nothing arrives anywhere;
                is_mapped=True: its stores reach other nodes, as in one NVLink domain.
        Raises:
            TypeError: its buffer has no rails that are pretended.
        """
        from ep_comm import _core
        from ep_comm.backends.rails import LoopbackRails

        rails = getattr(self.buffers[rank]._backend, "rails", None)
        if not isinstance(rails, LoopbackRails):
            raise TypeError("want a buffer of ranks on pretended nodes, device='cuda'")
        native = _core.Trouble()
        for name, value in trouble.items():
            if not hasattr(native, name):
                raise TypeError(f"no trouble is named {name}")
            setattr(native, name, value)
        rails.set_trouble(native)

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
