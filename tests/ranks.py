"""Rank processes for tests: forked from a warm server in a tenth of a second, killed without mercy.

`run_processes` of the library is what users have. Here ranks also talk to the test while they run,
are stopped, continued and killed in the middle of things, and tell when each thing happened (the
clock of `time.monotonic` is the same in all processes of a host).
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

_context = multiprocessing.get_context("forkserver")


def preload(*first: str) -> None:
    """What the server imports when it starts, these modules first."""
    _context.set_forkserver_preload([*first, "torch", "ep_comm.buffer", "ep_comm.testing"])


preload()


@dataclass
class Me:
    """What a rank knows: who it is, where the others are, and how to tell the test something."""

    rank: int
    size: int
    store: str
    pipe: Connection
    kept: list[Any] = field(default_factory=list)

    def say(self, message: Any = None) -> None:
        self.pipe.send(("said", message))

    def wait_for_go(self) -> None:
        """Until the test calls `go(rank)`."""
        self.pipe.recv()

    def group(self, name: str = "default") -> Any:
        import torch.distributed as dist

        from ep_comm import StoreGroup

        # Without a number of users: with one, a store removes its file once so many have closed it.
        return StoreGroup(dist.FileStore(self.store), self.rank, self.size, name)

    def buffer(self, name: str = "default", **options: Any) -> Any:
        """A Buffer of all ranks; kept alive until the process ends."""
        from ep_comm import Buffer

        options = {"num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens": 8, **options}
        buffer = Buffer(self.group(name), device="cpu", **options)
        self.kept.append(buffer)
        return buffer


class Ranks:
    """`work(me, *args)` on num_ranks processes at once; leaving the `with` leaves none behind."""

    def __init__(self, work: Callable[..., Any], num_ranks: int, *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ep_comm-test")
        store = os.path.join(self._folder.name, "store")
        self._pipes: list[Connection] = []
        self._results: dict[int, Any] = {}
        self.processes: list[Any] = []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe()
            me = (rank, num_ranks, store, theirs)
            process = _context.Process(target=_main, args=(work, me, args, sys.path), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def pid(self, rank: int) -> int:
        pid: int = self.processes[rank].pid
        return pid

    def hear(self, rank: int, limit_s: float = 60.0) -> Any:
        """The next thing this rank says; what it raised instead is raised here."""
        pipe = self._pipes[rank]
        if not pipe.poll(limit_s):
            what = f"rank {rank} said nothing for {limit_s} s"
            raise TimeoutError(f"{what}\n{self.stacks()}")
        kind, value = pipe.recv()
        if kind != "said":
            where = "".join(getattr(value, "__notes__", ()))
            what = f"rank {rank} ended with {value!r} instead of saying something"
            raise RuntimeError(f"{what}\n{where}")
        return value

    def hears(self, rank: int) -> bool:
        """Whether it has said or ended with something that was not heard yet."""
        return self._pipes[rank].poll()

    def hear_all(self, limit_s: float = 60.0) -> list[Any]:
        return [self.hear(rank, limit_s) for rank in range(len(self.processes))]

    def go(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self._pipes[rank].send(None)

    def kill(self, rank: int, sig: signal.Signals = signal.SIGKILL) -> float:
        """Send the signal; returns when."""
        now = time.monotonic()
        os.kill(self.pid(rank), sig)
        return now

    def result(self, rank: int, limit_s: float = 60.0) -> Any:
        """What the rank returned, the exception it raised, or its exit code when it died."""
        if rank in self._results:
            return self._results[rank]
        deadline = time.monotonic() + limit_s
        pipe = self._pipes[rank]
        try:
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                kind, value = pipe.recv()
                if kind == "result":
                    self._results[rank] = value
                    return value
            raise TimeoutError(f"rank {rank} ran longer than {limit_s} s\n{self.stacks()}")
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(60)
            self._results[rank] = Died(self.processes[rank].exitcode)
            return self._results[rank]

    def results(self, limit_s: float = 60.0) -> list[Any]:
        deadline = time.monotonic() + limit_s
        return [
            self.result(rank, max(0.1, deadline - time.monotonic()))
            for rank in range(len(self.processes))
        ]

    def stacks(self) -> str:
        """What every rank that still runs is doing."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        found = []
        for rank, process in enumerate(self.processes):
            path = Path(self._folder.name, f"stack{rank}")
            text = path.read_text() if path.exists() else ""
            state = "runs" if process.is_alive() else f"ended with {process.exitcode}"
            found.append(f"rank {rank} {state}\n{text}")
        return "\n".join(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for rank, process in enumerate(self.processes):
            process.join(20.0)  # a driver may take its time over a broken context
            if process.is_alive():
                print(f"rank {rank} (pid {process.pid}) was killed and does not end")
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def run(work: Callable[..., Any], num_ranks: int, *args: Any, limit_s: float = 120.0) -> list[Any]:
    """Results of `work(me, *args)` on every rank; the first exception is raised."""
    with Ranks(work, num_ranks, *args) as ranks:
        results = ranks.results(limit_s)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise result
        if isinstance(result, Died):
            raise AssertionError(f"rank {rank} died: {result}")
    return results


class Died(int):
    """Exit code of a process that ended without a result; negative: the signal that killed it."""


def _main(work: Any, me: tuple[Any, ...], args: tuple[Any, ...], path: list[str]) -> None:
    import torch

    sys.path[:] = path
    torch.set_num_threads(1)
    rank = Me(*me)
    stack = Path(rank.store).with_name(f"stack{rank.rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)  # Ranks.stacks asks
    try:
        result = work(rank, *args)
    except BaseException as error:
        error.add_note("".join(traceback.format_tb(error.__traceback__)))  # which is not sent
        result = error
    try:
        rank.pipe.send(("result", result))
    except Exception as error:  # the result cannot be pickled
        rank.pipe.send(("result", RuntimeError(f"{result!r}: {error}")))
    atexit._run_exitfuncs()  # as any Python does at its end; a forked one leaves without
