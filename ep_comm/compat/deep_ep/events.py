"""Events: on the CPU a call that has returned is over, so they are complete from the start."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch


class EventHandle:
    """What the current stream holds now; `current_stream_wait` waits for it.

    Without a CUDA context nothing can be pending, and none is made to find out.
    """

    def __init__(self) -> None:
        self._event: Any = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def current_stream_wait(self) -> None:
        if self._event is not None:
            self._event.wait()


class EventOverlap:
    """An event, maybe, with the tensors it protects and a hook to run once it was waited for.

    Args:
        event: None = nothing to wait for; waiting is then no error, but done at once. May be set
            later.
        extra_tensors: kept alive with this object.
    """

    hook_after_wait: Callable[[], Any] | None = None

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait, then run the hook, once.

        Args:
            release_handle: also let go of the event and the tensors.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def register_hook_after_wait(self, fn: Callable[[], Any]) -> None:
        self.hook_after_wait = fn

    def __call__(self, release_handle: bool = False) -> Self:
        self._release_handle = release_handle
        return self

    _release_handle = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        release_handle, self._release_handle = self._release_handle, False
        self.current_stream_wait(release_handle)


def wait_for(previous_event: Any) -> None:
    """Wait for what a caller passes as `previous_event`: None, EventHandle or EventOverlap."""
    if previous_event is None:
        return
    event = previous_event
    if isinstance(event, EventOverlap):  # its event may be None, or filled in later
        event = event.event
    if event is None:
        return
    if not isinstance(event, EventHandle):
        kind = type(previous_event).__name__
        raise TypeError(f"previous_event: got {kind}, want EventHandle, EventOverlap or None")
    event.current_stream_wait()


def finished(async_finish: bool) -> EventOverlap:
    """What a call returns as its event: none unless it was asked for."""
    return EventOverlap(EventHandle() if async_finish else None)
