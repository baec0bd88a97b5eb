"""torch.cuda over the emulator: a torch for CPUs that says it has one GPU.

Tensors "on the GPU" lie in host memory. Their storage is marked, and then they say that they are on
cuda:0; what is computed from them is marked in turn. Streams are the emulator's, and torch's own
operations on such a tensor wait for the current one instead of queueing there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from emulator import _device
from ep_comm import _core

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
OURS = "ep_comm"  # the library of ops
MEMORY = 8 << 30  # bytes, as torch.cuda.mem_get_info has them


# ---- streams ----


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._place: _device.Event | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._place = _device.Event((stream or current_stream()).cuda_stream)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return self._place is None or self._place.query()

    def synchronize(self) -> None:
        if self._place is not None:
            self._place.synchronize()


@functools.cache
def _pool(priority: int) -> Iterator[int]:
    """Streams are handed out in turn, as by torch: after 32 comes the first again."""
    return itertools.cycle([_device.make_stream() for _ in range(32)])


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = next(_pool(priority))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def query(self) -> bool:
        return _device.is_idle(self.cuda_stream)

    def synchronize(self) -> None:
        _device.await_stream(self.cuda_stream)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event._place is not None:
            event._place.hold_up(self.cuda_stream)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class _Default(Stream):
    """The one that every thread begins with."""

    def __init__(self) -> None:
        self.cuda_stream = 0


_default = _Default()
_of_thread = threading.local()


def current_stream(device: Any = None) -> Stream:
    return getattr(_of_thread, "stream", _default)


@contextlib.contextmanager
def stream(entered: Stream) -> Iterator[None]:
    left = current_stream()
    _of_thread.stream = entered
    try:
        yield
    finally:
        _of_thread.stream = left


class CUDAGraph:
    def __init__(self) -> None:
        raise NotImplementedError("the emulator captures no graphs")


# ---- tensors ----

# What torch frees would be used again behind what is queued; here it is kept until a test ends.
_kept: list[torch.UntypedStorage] = []


def forget() -> None:
    """Wait for all that is queued, and let go of what it may have needed."""
    _device.await_all()
    _kept.clear()


def is_there(tensor: Tensor) -> bool:
    """Whether this tensor counts as one on the GPU."""
    return hasattr(tensor.untyped_storage(), "on_gpu")


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.device == HOST and value.layout == torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def put_there(value: Any, sources: Sequence[Tensor] = (), *, keep: bool = True) -> None:
    """Mark what is new in a result."""
    for tensor in _new(value, sources):
        if not is_there(tensor):
            storage = tensor.untyped_storage()
            storage.on_gpu = True  # type: ignore[attr-defined]
            if keep:
                _kept.append(storage)


def take_back(value: Any, sources: Sequence[Tensor] = ()) -> None:
    """The opposite: what is new in a result counts as on the host."""
    for tensor in _new(value, sources):
        if is_there(tensor):
            del tensor.untyped_storage().on_gpu  # type: ignore[attr-defined]


def _new(value: Any, sources: Sequence[Tensor]) -> list[Tensor]:
    known = {id(tensor) for tensor in sources}
    return [tensor for tensor in tensors_of(value) if id(tensor) not in known]


def _device_of(tensor: Tensor) -> torch.device:
    return GPU if is_there(tensor) else tensor.device


def _moved(tensor: Tensor, to: torch.device, dtype: torch.dtype, copy: bool = False) -> Tensor:
    moved = tensor.to(dtype)
    if moved is tensor and (copy or to.type != _device_of(tensor).type):
        moved = tensor.to(to if to.type == "meta" else HOST, copy=True)
    (put_there if to.type == "cuda" else take_back)(moved, [tensor])
    return moved


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    to, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in (*args, kwargs.get("other")):
        if isinstance(value, Tensor):
            to, dtype = _device_of(value), value.dtype
        elif isinstance(value, torch.device | str):
            to = value
        elif isinstance(value, torch.dtype):
            dtype = value
    to = _device_of(tensor) if to is None else torch.device(to)
    return _moved(tensor, to, dtype or tensor.dtype, bool(kwargs.get("copy")))


def _read(method: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What looks into memory without an operation that InOrder sees."""

    def after_the_stream(tensor: Tensor) -> Any:
        if is_there(tensor):
            current_stream().synchronize()
        return method(tensor)

    return after_the_stream


_OTHERWISE: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device_of,
    Tensor.is_cuda.__get__: is_there,
    Tensor.is_cpu.__get__: lambda t: _device_of(t).type == "cpu",
    Tensor.cuda: lambda t, *_, **__: _moved(t, GPU, t.dtype),
    Tensor.cpu: lambda t, *_, **__: _moved(t, HOST, t.dtype),
    Tensor.to: _to,
    Tensor.tolist: _read(Tensor.tolist),
    Tensor.numpy: _read(Tensor.numpy),
}


class Pretend(TorchFunctionMode):
    """Functions of torch, with tensors that are on the GPU or not."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OTHERWISE:
            return _OTHERWISE[func](*args, **kwargs)
        if (device := kwargs.get("device")) is None:
            return func(*args, **kwargs)
        there = torch.device(device).type == "cuda"
        kwargs["device"] = HOST if there else device
        result = func(*args, **kwargs)
        (put_there if there else take_back)(result, list(tensors_of(args)))
        return result


class InOrder(TorchDispatchMode):
    """Operations of torch, run where they would be queued: after the work of the current stream.

    What they make of a tensor on the GPU is there, too; of nothing, where `made_there` says so.
    """

    def __init__(self, made_there: bool = False) -> None:
        super().__init__()
        self._made_there = made_there

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and to import it takes long
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OURS:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            sources = list(tensors_of([args, kwargs]))
            there = any(map(is_there, sources))
            if there and not _only_makes(func):
                current_stream().synchronize()
        result = func(*args, **kwargs)
        if there or (self._made_there and not sources):
            with torch._C.DisableTorchFunction():
                put_there(result, sources)
        return result


def _only_makes(func: Any) -> bool:
    """Whether an operation reads nothing: a view, or new memory for a tensor like another."""
    name = func.overloadpacket.__name__
    return func.is_view or name.startswith("new_") or name.endswith("_like")


# ---- in place ----


# What the core makes tensors with, of memory of an arena, which has streams of its own.
_MAKERS = (
    (_core.DeviceArena, "tensor"),
    (_core.Flight, "tensor"),
    (_core.Flight, "routing_tensors"),
)


def _made_there(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = make(*args, **kwargs)
            put_there(result, keep=False)
        return result

    return made


def _there(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs in the modes, which torch has taken out of the way or not put there."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with Pretend(), InOrder():
            return run(*args, **kwargs)

    return inside


def _backward(run: Callable[..., Any]) -> Callable[..., Any]:
    """The engine of autograd, which calls functions of ours and makes gradients of nothing."""

    def inside(roots: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            there = any(map(is_there, tensors_of(roots)))
        with Pretend(), InOrder(there):
            return run(roots, *args, **kwargs)

    return inside


def _define_there(define: Callable[..., None]) -> Callable[..., None]:
    """Library.impl, for operations of ours, which are written in Python."""

    def defined(library: Any, name: Any, run: Any, key: str = "", **kwargs: Any) -> None:
        define(library, name, _there(run) if library.ns == OURS else run, key, **kwargs)

    return defined


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Until left, torch has a GPU, in this thread and those begun meanwhile."""
    stands_in = {
        "CUDAGraph": CUDAGraph,
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": current_stream,
        "default_stream": lambda device=None: _default,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "emulated GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="emulated GPU", uuid="emulated", multi_processor_count=_device.num_sms()
        ),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "set_device": lambda device: None,
        "stream": stream,
        "synchronize": lambda device=None: _device.await_all(),
    }
    torch.set_num_threads(1)  # more of them spin while kernels want the processors
    with pytest.MonkeyPatch.context() as patch, Pretend(), InOrder():
        for name, value in stands_in.items():
            patch.setattr(torch.cuda, name, value)
        for kind, name in _MAKERS:
            patch.setattr(kind, name, _made_there(getattr(kind, name)))
        # See _kept. No mode sees this call: torch first looks whether the stream is one of its own.
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(torch.version, "cuda", "emulated")
        engine = _backward(torch.autograd._engine_run_backward)
        patch.setattr(torch.autograd, "_engine_run_backward", engine)
        patch.setattr(torch.library.Library, "impl", _define_there(torch.library.Library.impl))
        patch.setattr(threading.Thread, "run", _there(threading.Thread.run))
        yield
