"""Begun operations: one thread that runs them in the order in which they began."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ep_comm.received import Received


@dataclass
class BegunWork:
    """An operation in the queue of the worker, under way, or over."""

    work: Callable[[], Any]
    over: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None

    def done(self) -> bool:
        return self.over.is_set()

    def finish(self) -> Any:
        self.over.wait()
        if self.error is not None:
            raise self.error
        return self.result

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()


class Worker:
    """The thread starts with the first operation that is begun.

    Args:
        device: of the tensors; on a GPU an operation runs on a stream of its own, behind what the
            caller had launched when it began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[BegunWork | None] = queue.SimpleQueue()
        self._last: BegunWork | None = None
        self._thread: threading.Thread | None = None

    def begin(self, work: Callable[[], Any]) -> BegunWork:
        """Queue an operation."""
        if self._device.type == "cuda":
            work = self._behind_caller(work)
        begun = self._last = BegunWork(work)
        self._queue.put(begun)
        if self._thread is None:
            # A daemon: a process that ends must not wait for peers that never come.
            self._thread = threading.Thread(target=self._work, name="ep_comm", daemon=True)
            self._thread.start()
        return begun

    def drain(self, limit_s: float | None = None) -> None:
        """Wait for everything begun, so that what comes next keeps its turn."""
        if self._last is not None and self._last.over.wait(limit_s):
            self._last = None

    def close(self) -> None:
        """End the thread after what is queued; does not wait for it."""
        self._queue.put(None)

    def _work(self) -> None:
        while (begun := self._queue.get()) is not None:
            begun.run()
            del begun  # its tensors belong to whoever began it

    def _behind_caller(self, work: Callable[[], Any]) -> Callable[[], Any]:
        caller = torch.cuda.current_stream(self._device)
        before = caller.record_event()

        def run() -> Any:
            stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                stream.wait_event(before)
                result = work()
            stream.synchronize()  # over means over on the GPU, too
            for tensor in _tensors_of(result):
                tensor.record_stream(caller)
            return result

        return run


def _tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Received):
        result = (*vars(result).values(), *result.handle)
    parts = result if isinstance(result, list | tuple) else (result,)
    return [p for p in parts if isinstance(p, Tensor) and p.is_cuda]
