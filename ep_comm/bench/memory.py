"""Peak memory of one call on one rank: private memory of the process plus its arena's pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import Tensor

from ep_comm.buffer import Buffer

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_EVERY_S: Final = 0.0005
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h: never shrink the heap; never map a block alone


def used_bytes(buffer: Buffer) -> int:
    """Private pages of this process (RssAnon) and pages of its arena, whoever wrote them."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = file.read().split()
    committed = buffer.stats().get("arena", {}).get("committed", 0)
    return (int(resident) - int(shared)) * _PAGE + int(committed)


def trim(buffer: Buffer) -> None:
    """Give back what is free, so that growth is what a call really takes."""
    gc.collect()
    buffer.release()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed, as the caching allocators of GPUs and of servers do.

    By default glibc returns every large tensor to the system at once, and the next one costs a page
    fault per 4 KiB. That is several times what the baseline spends on communication, and says
    nothing about it. False where malloc has no such switch.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):
        return False


def measure_peak(buffer: Buffer, call: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes above the start while `call` ran, sampled twice a millisecond; and its result."""
    start = used_bytes(buffer)
    most = [start]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY_S):
            most.append(max(most.pop(), used_bytes(buffer)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        result = call()
    finally:
        over.set()
        thread.join()
    return max(most[0], used_bytes(buffer)) - start, result


def storage_bytes(outputs: Iterable[Any], inputs: Iterable[Any]) -> int:
    """Bytes of the storages behind `outputs` that are not those of `inputs`; each counts once."""
    given = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in outputs
        if isinstance(t, Tensor)
    }
    return sum(size for address, size in found.items() if address not in given)
