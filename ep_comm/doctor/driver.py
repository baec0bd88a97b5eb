"""GPU facts, straight from the driver by ctypes; a process of its own, because a driver may hang.

Reads NVML and libcuda where they are, prints one JSON object, and needs neither torch nor our core.
The libraries are arguments, so that tests bring their own. Every fact that cannot be had is None,
and `error` says why a library gave none.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

PROBE_BYTES: Final = 4096  # written to a peer and read back
_PATTERN: Final = bytes(range(256)) * (PROBE_BYTES // 256)
_POSIX_FD, _FABRIC = 1, 8  # CUmemAllocationHandleType


class DriverError(Exception):
    """A call that failed, as `function: reason`."""


def load(name: str) -> Any:
    """A library of the driver, or None when this machine has none."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def facts(nvml: Any, cuda: Any, only: Sequence[str] = ()) -> dict[str, Any]:
    """What both libraries say; `only` limits it to these ordinals or UUIDs."""
    found = {"cuda": _guarded(_cuda_facts, cuda, only)}  # first: it forks, and NVML has threads
    return {**found, "nvml": _guarded(_nvml_facts, nvml, only)}


def _guarded(read: Any, library: Any, only: Sequence[str]) -> dict[str, Any]:
    if library is None:
        return {"error": "not installed", "missing": True, "gpus": []}
    try:
        found: dict[str, Any] = {"error": None, "missing": False, **read(library, only)}
    except (DriverError, AttributeError) as error:  # AttributeError: a symbol an old driver lacks
        return {"error": str(error), "missing": False, "gpus": []}
    return found


def wanted(only: Sequence[str], index: int, uuid: str) -> bool:
    return not only or any(w == str(index) or (len(w) > 3 and uuid.startswith(w)) for w in only)


# ---- NVML: what needs no context, so no GPU memory is taken ----


def _nvml_facts(nvml: Any, only: Sequence[str]) -> dict[str, Any]:
    _nvml(nvml, "nvmlInit_v2")
    try:
        version = ctypes.create_string_buffer(96)
        _nvml(nvml, "nvmlSystemGetDriverVersion", version, 96)
        count = ctypes.c_uint()
        _nvml(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        handles = {}
        gpus = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            _nvml(nvml, "nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
            gpu = _nvml_gpu(nvml, device, index)
            if wanted(only, index, gpu["uuid"] or ""):
                gpus.append(gpu)
                handles[index] = device
        links = [
            [a, b, _nvml_value(nvml, "nvmlDeviceGetP2PStatus", handles[a], handles[b], 2) == 0]
            for a in handles
            for b in handles
            if a < b
        ]
        return {"driver": version.value.decode(), "gpus": gpus, "nvlink_pairs": links}
    finally:
        nvml.nvmlShutdown()


def _nvml_gpu(nvml: Any, device: Any, index: int) -> dict[str, Any]:
    def text(name: str, size: int = 96) -> str | None:
        buffer = ctypes.create_string_buffer(size)
        call = getattr(nvml, name, None)
        if call is None or call(device, buffer, size) != 0:
            return None
        return buffer.value.decode(errors="replace")

    mode, pending = ctypes.c_uint(), ctypes.c_uint()
    get_mig = getattr(nvml, "nvmlDeviceGetMigMode", None)
    known = get_mig is not None and (
        get_mig(device, ctypes.byref(mode), ctypes.byref(pending)) == 0
    )
    return {
        "index": index,
        "uuid": text("nvmlDeviceGetUUID"),
        "name": text("nvmlDeviceGetName"),
        "mig": bool(mode.value) if known else False,
        "compute_mode": _nvml_value(nvml, "nvmlDeviceGetComputeMode", device),
        "processes": _nvml_processes(nvml, device),
        "ecc_uncorrected": _nvml_value(
            nvml, "nvmlDeviceGetTotalEccErrors", device, 1, 0, kind=ctypes.c_ulonglong
        ),
        "nvlink": _nvml_links(nvml, device),
    }


def _nvml_processes(nvml: Any, device: Any) -> int | None:
    """How many processes compute on this GPU; who they are is nobody's business."""
    call = getattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", None)
    if call is None:
        return None
    count = ctypes.c_uint(0)
    code = call(device, ctypes.byref(count), None)
    return int(count.value) if code in (0, 7) else None  # 7: the list is longer than ours


def _nvml_links(nvml: Any, device: Any) -> dict[str, int] | None:
    """Active NVLinks, and their replay, recovery and CRC errors."""
    active = errors = seen = 0
    for link in range(18):
        state = _nvml_value(nvml, "nvmlDeviceGetNvLinkState", device, link)
        if state is None:
            break
        seen += 1
        if state != 1:
            continue
        active += 1
        for counter in range(3):  # replay, recovery, CRC of flits
            value = _nvml_value(
                nvml, "nvmlDeviceGetNvLinkErrorCounter", device, link, counter,
                kind=ctypes.c_ulonglong,
            )  # fmt: skip
            errors += value or 0
    return {"active": active, "errors": errors} if seen else None


def _nvml_value(nvml: Any, name: str, *args: Any, kind: Any = ctypes.c_uint) -> int | None:
    call = getattr(nvml, name, None)
    value = kind()
    if call is None or call(*args, ctypes.byref(value)) != 0:
        return None
    return int(value.value)


def _nvml(nvml: Any, name: str, *args: Any) -> None:
    code = getattr(nvml, name)(*args)
    if code != 0:
        describe = nvml.nvmlErrorString
        describe.restype = ctypes.c_char_p
        text = describe(code) or b"?"
        raise DriverError(f"{name}: {text.decode(errors='replace')}")


# ---- libcuda: what ranks will really do ----


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _AccessDesc(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Cuda:
    """The few driver calls needed, with errors as exceptions."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'?').decode()}")

    def number(self, name: str, *args: Any, kind: Any = ctypes.c_int) -> int:
        value = kind()
        self.call(name, ctypes.byref(value), *args)
        return int(value.value or 0)

    def attribute(self, which: int, device: int) -> int:
        return self.number("cuDeviceGetAttribute", which, device)

    def uuid(self, device: int) -> str:
        raw = (ctypes.c_ubyte * 16)()
        name = "cuDeviceGetUuid_v2" if hasattr(self._library, "cuDeviceGetUuid_v2") else None
        self.call(name or "cuDeviceGetUuid", ctypes.byref(raw), device)
        text = bytes(raw).hex()
        cuts = (0, 8, 12, 16, 20, 32)
        return "GPU-" + "-".join(text[a:b] for a, b in itertools.pairwise(cuts))

    @contextmanager
    def context(self, device: int) -> Iterator[ctypes.c_void_p]:
        """The primary context, current while inside."""
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxPushCurrent_v2", context)
            try:
                yield context
            finally:
                self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            self._library.cuDevicePrimaryCtxRelease_v2(device)

    @contextmanager
    def memory(self, size: int) -> Iterator[ctypes.c_ulonglong]:
        """Ordinary memory of the current context."""
        address = ctypes.c_ulonglong(
            self.number("cuMemAlloc_v2", ctypes.c_size_t(size), kind=ctypes.c_ulonglong)
        )
        try:
            yield address
        finally:
            self.call("cuMemFree_v2", address)

    @contextmanager
    def allocation(self, device: int, handle_type: int) -> Iterator[tuple[int, int]]:
        """Physical memory that can leave this process: its handle and size."""
        prop = _AllocationProp(1, handle_type, _Location(1, device), None)
        size = self.number(
            "cuMemGetAllocationGranularity", ctypes.byref(prop), 0, kind=ctypes.c_size_t
        )
        handle = self.number(
            "cuMemCreate", ctypes.c_size_t(size), ctypes.byref(prop), ctypes.c_ulonglong(0),
            kind=ctypes.c_ulonglong,
        )  # fmt: skip
        try:
            yield handle, size
        finally:
            self.release(handle)

    @contextmanager
    def mapped(self, device: int, handle: int, size: int) -> Iterator[ctypes.c_ulonglong]:
        address = ctypes.c_ulonglong(
            self.number(
                "cuMemAddressReserve", ctypes.c_size_t(size), ctypes.c_size_t(0),
                ctypes.c_ulonglong(0), ctypes.c_ulonglong(0), kind=ctypes.c_ulonglong,
            )
        )  # fmt: skip
        length = ctypes.c_size_t(size)
        self.call("cuMemMap", address, length, ctypes.c_size_t(0), ctypes.c_ulonglong(handle),
                  ctypes.c_ulonglong(0))  # fmt: skip
        access = _AccessDesc(_Location(1, device), 3)
        self.call("cuMemSetAccess", address, length, ctypes.byref(access), ctypes.c_size_t(1))
        try:
            yield address
        finally:
            self.call("cuMemUnmap", address, length)
            self.call("cuMemAddressFree", address, length)

    def release(self, handle: int) -> None:
        self._library.cuMemRelease(ctypes.c_ulonglong(handle))


def _cuda_facts(library: Any, only: Sequence[str]) -> dict[str, Any]:
    cuda = Cuda(library)
    with _import_helper(cuda) as helper:
        cuda.call("cuInit", 0)
        gpus: list[dict[str, Any]] = []
        for ordinal in range(cuda.number("cuDeviceGetCount")):
            device = cuda.number("cuDeviceGet", ordinal)
            uuid = cuda.uuid(device)
            if wanted(only, ordinal, uuid):
                capability = [cuda.attribute(75, device), cuda.attribute(76, device)]
                gpus.append({"ordinal": ordinal, "uuid": uuid, "capability": capability})
        ordinals = [gpu["ordinal"] for gpu in gpus]
        return {
            "version": cuda.number("cuDriverGetVersion"),
            "gpus": gpus,
            "pairs": [_pair(cuda, a, b) for a in ordinals for b in ordinals if a < b],
            "vmm": [_try(_share_memory, cuda, o, helper) for o in ordinals[:1]],
            "fabric": [_try(_export_fabric, cuda, o) for o in ordinals[:1]],
        }


def _try(probe: Any, *args: Any) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": probe(*args)}
    except (DriverError, OSError, AttributeError) as error:
        return {"ok": False, "detail": str(error)}


def _pair(cuda: Cuda, a: int, b: int) -> dict[str, Any]:
    """Both directions: does the driver allow it, atomics too, and do bytes come back."""

    def both(which: int) -> bool:
        name = "cuDeviceGetP2PAttribute"
        return all(cuda.number(name, which, x, y) == 1 for x, y in ((a, b), (b, a)))

    return {
        "gpus": [a, b],
        "access": both(2),
        "atomics": both(3),
        "copied": [_try(_write_and_read_back, cuda, x, y) for x, y in ((a, b), (b, a))],
    }


def _write_and_read_back(cuda: Cuda, a: int, b: int) -> str:
    """GPU a writes into memory of GPU b, which reads it."""
    size = ctypes.c_size_t(PROBE_BYTES)
    found = ctypes.create_string_buffer(PROBE_BYTES)
    with cuda.context(b) as peer, cuda.memory(PROBE_BYTES) as theirs:
        with cuda.context(a):
            cuda.call("cuCtxEnablePeerAccess", peer, 0)
            with cuda.memory(PROBE_BYTES) as ours:
                cuda.call("cuMemcpyHtoD_v2", ours, _PATTERN, size)
                cuda.call("cuMemcpyDtoD_v2", theirs, ours, size)
                cuda.call("cuCtxSynchronize")
            cuda.call("cuCtxDisablePeerAccess", peer)
        cuda.call("cuMemcpyDtoH_v2", found, theirs, size)
    if found.raw != _PATTERN:
        raise DriverError("other bytes came back")
    return f"{PROBE_BYTES} B"


@contextmanager
def _import_helper(cuda: Cuda) -> Iterator[socket.socket]:
    """A second process that maps what it is sent; forked before the driver is initialized."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _import_memory(cuda, theirs)
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # ends the helper, too
        os.waitpid(pid, 0)


def _import_memory(cuda: Cuda, sock: socket.socket) -> None:
    data, fds, _, _ = socket.recv_fds(sock, 64, 1)
    if not fds:
        return
    try:
        ordinal, size = (int(word) for word in data.split())
        cuda.call("cuInit", 0)
        with cuda.context(ordinal):
            handle = cuda.number(
                "cuMemImportFromShareableHandle", ctypes.c_void_p(fds[0]), _POSIX_FD,
                kind=ctypes.c_ulonglong,
            )  # fmt: skip
            with cuda.mapped(ordinal, handle, size) as address:
                cuda.call("cuMemcpyHtoD_v2", address, _PATTERN, ctypes.c_size_t(PROBE_BYTES))
                cuda.call("cuCtxSynchronize")
            cuda.release(handle)
        sock.sendall(b"ok")
    except (DriverError, AttributeError) as error:
        sock.sendall(str(error).encode()[:200])


def _share_memory(cuda: Cuda, ordinal: int, helper: socket.socket) -> str:
    """Memory made here, written by another process through a descriptor, read here."""
    found = ctypes.create_string_buffer(PROBE_BYTES)
    with (
        cuda.context(ordinal),
        cuda.allocation(ordinal, _POSIX_FD) as (handle, size),
        cuda.mapped(ordinal, handle, size) as address,
    ):
        fd = ctypes.c_int(-1)
        cuda.call("cuMemExportToShareableHandle", ctypes.byref(fd), ctypes.c_ulonglong(handle),
                  _POSIX_FD, ctypes.c_ulonglong(0))  # fmt: skip
        try:
            socket.send_fds(helper, [f"{ordinal} {size}".encode()], [fd.value])
        finally:
            os.close(fd.value)
        answer = helper.recv(256)
        if answer != b"ok":
            raise DriverError(answer.decode(errors="replace") or "the other process ended")
        cuda.call("cuMemcpyDtoH_v2", found, address, ctypes.c_size_t(PROBE_BYTES))
    if found.raw != _PATTERN:
        raise DriverError("other bytes came back")
    return f"{size >> 20} MiB"


def _export_fabric(cuda: Cuda, ordinal: int) -> str:
    """A real allocation and export; the handle itself is a credential and is dropped."""
    with cuda.context(ordinal), cuda.allocation(ordinal, _FABRIC) as (handle, size):
        exported = (ctypes.c_ubyte * 64)()
        cuda.call("cuMemExportToShareableHandle", ctypes.byref(exported),
                  ctypes.c_ulonglong(handle), _FABRIC, ctypes.c_ulonglong(0))  # fmt: skip
    return f"{size >> 20} MiB"


def main() -> None:
    """Ordinals or UUIDs as arguments, or --nvml to leave GPUs alone; facts as JSON on stdout."""
    only = sys.argv[1:]
    look_only = only == ["--nvml"]
    cuda = None if look_only else load("libcuda.so.1")
    print(json.dumps(facts(load("libnvidia-ml.so.1"), cuda, () if look_only else only)))


if __name__ == "__main__":
    main()
