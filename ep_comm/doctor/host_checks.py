"""D4, D5, D8, D10 and D11: what needs no GPU."""

from __future__ import annotations

import difflib
import json
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from ep_comm.backends import nvshmem_versions
from ep_comm.doctor import share
from ep_comm.doctor.machine import Machine, Unavailable
from ep_comm.doctor.rail_checks import gpudirect
from ep_comm.doctor.report import Finding, Status

# Variables the library reads. None: every option is an argument, so a variable named like ours is a
# typo or a wish, and wishes that are silently ignored cost days.
KNOWN_VARIABLES: Final[tuple[str, ...]] = ()
PREFIX: Final = "EP_COMM_"

MIN_PYTHON: Final = (3, 11)
MIN_TORCH: Final = (2, 11)
MIN_OPEN_FILES: Final = 1024  # about four per rank of this host while they find each other
_INITIAL_NAMESPACES: Final = {"pid": 4026531836, "ipc": 4026531839}
_UNLIMITED: Final = resource.RLIM_INFINITY


def d4(machine: Machine) -> list[Finding]:
    """Memory crosses between two processes, as a descriptor over a Unix socket."""
    need = "a sealed memfd sent by SCM_RIGHTS arrives mapped and shared"
    fix = "allow memfd_create and abstract Unix sockets (seccomp, AppArmor); one network namespace"
    try:
        problem = _pass_memory(machine)
    except Unavailable as error:
        return [Finding("D4", "skip", "shared memory", f"not tried, {error}", need)]
    if problem is None:
        measured = "memfd passed between two processes and back"
        return [Finding("D4", "ok", "shared memory", measured, need), *_cuda_memory(machine)]
    effect = "ranks of different processes cannot share memory"
    return [Finding("D4", "fail", "shared memory", problem, need, effect, fix, "E405")]


def _pass_memory(machine: Machine) -> str | None:
    if machine.share is not None:
        found = machine.answer("share")
        return None if found["ok"] else str(found["detail"])
    try:
        listener, name = share.listen()
    except OSError as error:
        return f"bind of an abstract Unix socket: {error.strerror}"
    limit_s = min(2.0, machine.left_s())
    if limit_s <= 0:
        listener.close()
        raise Unavailable("no time was left")
    with listener:
        machine.start("share", stdin=json.dumps([name.hex(), limit_s]))
        try:
            problem = share.serve(listener, limit_s)
        except OSError as error:  # a timeout, too: then the other side knows more
            problem = f"{error}"
    found = machine.answer("share")
    return problem if found["ok"] else str(found["detail"])


def _cuda_memory(machine: Machine) -> list[Finding]:
    need = "memory made by cuMemCreate arrives mapped in another process"
    try:
        probes = machine.cuda()["vmm"]
    except Unavailable as error:
        return [Finding("D4", "skip", "GPU memory", f"not tried, {error}", need)]
    if not probes:
        return [Finding("D4", "skip", "GPU memory", "not tried, no GPU is visible", need)]
    if probes[0]["ok"]:
        measured = f"{probes[0]['detail']} passed as a descriptor"
        return [Finding("D4", "ok", "GPU memory", measured, need)]
    fix = "run all ranks of a host in one container, with every GPU visible to each"
    effect = "ranks cannot share GPU memory"
    return [Finding("D4", "fail", "GPU memory", probes[0]["detail"], need, effect, fix, "E405")]


# ---- D5 ----


def d5(machine: Machine) -> list[Finding]:
    """Limits and walls of the operating system or the container."""
    return [*_limits(machine), _memory(machine), *_namespaces(machine), _pidfd()]


def _limits(machine: Machine) -> Iterator[Finding]:
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if memlock == _UNLIMITED else f"{memlock >> 10} KiB"
    if not machine.list("/sys/class/infiniband"):
        yield Finding("D5", "ok", "locked memory", text, "nothing without RDMA")
    elif memlock == _UNLIMITED:
        yield Finding("D5", "ok", "locked memory", text, "unlimited for RDMA")
    else:
        effect, fix = "NICs cannot register GPU memory", "docker run --ulimit memlock=-1"
        yield Finding(
            "D5", "warn", "locked memory", text, "unlimited for RDMA", effect, fix, "E407"
        )

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == _UNLIMITED or files >= MIN_OPEN_FILES
    text = "unlimited" if files == _UNLIMITED else str(files)
    if enough:
        yield Finding("D5", "ok", "open files", text, f"at least {MIN_OPEN_FILES}")
        return
    fix = f"ulimit -n {MIN_OPEN_FILES}" if hard == _UNLIMITED or hard >= MIN_OPEN_FILES else ""
    yield Finding(
        "D5", "warn", "open files", text, f"at least {MIN_OPEN_FILES}",
        "a Buffer of many ranks cannot be built",
        fix or f"docker run --ulimit nofile={MIN_OPEN_FILES}", "E407",
    )  # fmt: skip


def _memory(machine: Machine) -> Finding:
    subject, need = "memory", "address space beyond what is in use; no /dev/shm, no name"
    if machine.read("/proc/sys/vm/overcommit_memory") == "2":
        effect = "the arena, as large as the machine's memory, cannot be reserved"
        fix = "pass arena_bytes=, or sysctl vm.overcommit_memory=0"
        measured = "vm.overcommit_memory = 2"
        return Finding("D5", "warn", subject, measured, need, effect, fix, "E232")
    limit = machine.read("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    measured = f"{total >> 30} GiB"
    if limit is not None and limit.isdigit() and int(limit) < total:
        measured += f", {int(limit) >> 30} GiB of it for this container"
    return Finding("D5", "ok", subject, measured, need)


def _namespaces(machine: Machine) -> Iterator[Finding]:
    for kind, initial in _INITIAL_NAMESPACES.items():
        need = "one for all ranks of a host" if kind == "pid" else "any, we use none"
        try:
            number = os.stat(machine.root / f"proc/self/ns/{kind}").st_ino
        except OSError as error:
            why = f"not found, {error.strerror}"
            yield Finding("D5", "skip", f"{kind.upper()} namespace", why, need)
            continue
        measured = "the host's" if number == initial else "of this container"
        yield Finding("D5", "ok", f"{kind.upper()} namespace", measured, need)


def _pidfd() -> Finding:
    need = "pidfd_open, to notice the death of a rank"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        effect = "a death is noticed by its socket only"
        fix = "allow pidfd_open in the seccomp profile, or a newer kernel"
        return Finding("D5", "warn", "process watch", str(error), need, effect, fix)
    return Finding("D5", "ok", "process watch", "pidfd_open works", need)


# ---- D8 ----


def d8(machine: Machine) -> list[Finding]:
    """Every rung between hosts: NICs, the library, a real transfer."""
    return [_nics(machine), gpudirect(machine), _nvshmem(machine), _put(machine)]


def _nics(machine: Machine) -> Finding:
    need, effect = "a port that is active, for ranks on several hosts", "intranode only"
    devices = machine.list("/sys/class/infiniband")
    if not devices:
        return Finding("D8", "skip", "NICs", "no RDMA device", need, effect)
    gpus = [_pci_path(machine, f"/sys/bus/pci/devices/{name}") for name in _gpu_addresses(machine)]
    ports = []
    for device in devices:
        base = f"/sys/class/infiniband/{device}"
        hops = min((_distance(_pci_path(machine, f"{base}/device"), g) for g in gpus), default=None)
        near = "" if hops is None else f", {hops} PCIe hops from a GPU"
        for port in machine.list(f"{base}/ports"):
            state = (machine.read(f"{base}/ports/{port}/state") or "?").rpartition(": ")[2]
            kind = machine.read(f"{base}/ports/{port}/link_layer") or "?"
            rate = machine.read(f"{base}/ports/{port}/rate") or "?"
            ports.append(
                (hops or 0, state == "ACTIVE", f"{device}/{port} {state} {kind} {rate}{near}")
            )
    text = "; ".join(name for _, _, name in sorted(ports)).replace(";", ",")
    if any(active for _, active, _ in ports):
        return Finding("D8", "ok", "NICs", text, need)
    fix = "docker run --device=/dev/infiniband, or bring a port up"
    return Finding("D8", "warn", "NICs", text or "no port", need, effect, fix)


def _gpu_addresses(machine: Machine) -> list[str]:
    return [
        name
        for name in machine.list("/sys/bus/pci/devices")
        if machine.read(f"/sys/bus/pci/devices/{name}/vendor") == "0x10de"
    ]


def _pci_path(machine: Machine, path: str) -> list[str]:
    return [part for part in machine.real(path).split("/") if part.count(":") >= 1]


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Bridges between two devices: what their paths do not share."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return len(a) + len(b) - 2 * shared


def _nvshmem(machine: Machine) -> Finding:
    need, effect = "host and device code that fit together", "intranode only"
    try:
        info = machine.build_info()
    except ImportError as error:
        return Finding("D8", "skip", "NVSHMEM", f"unknown, {error}", need, effect)
    host = next((v for n in ("cu13", "cu12") if (v := _version(f"nvidia-nvshmem-{n}"))), None)
    if info["nvshmem"] is None:
        measured = f"not built: {info['nvshmem_missing']}" + (f"; host {host}" if host else "")
        return Finding("D8", "skip", "NVSHMEM", measured.replace(";", ","), need, effect)
    if host is None:
        measured, fix = (
            f"device {info['nvshmem']}, host not installed",
            "pip install 'ep-comm[nvshmem]'",
        )
        return Finding("D8", "skip", "NVSHMEM", measured, need, effect, fix)
    measured = f"host {host}, device {info['nvshmem']}"
    why = nvshmem_versions.why_apart(
        nvshmem_versions.parse(host), nvshmem_versions.parse(str(info["nvshmem"]))
    )
    if why is not None:
        fix = f"install the other host library, or build ep_comm again beside {host}"
        measured = f"{measured}, {why}"
        return Finding("D8", "fail", "NVSHMEM", measured, need, effect, fix, "E501")
    return Finding("D8", "ok", "NVSHMEM", measured, need)


def _put(machine: Machine) -> Finding:
    why = (
        "no NIC"
        if not machine.list("/sys/class/infiniband")
        else "this version has no probe for it"
    )
    return Finding("D8", "skip", "one-byte put", f"not tried, {why}", effect="intranode only")


# ---- D10 ----


def d10(machine: Machine) -> list[Finding]:
    """What this Python has, and what the environment asks for."""
    return [_python(), _torch(), _core(machine), *variables(machine)]


def _python() -> Finding:
    have, want = sys.version_info[:2], ".".join(map(str, MIN_PYTHON))
    status: Status = "ok" if have >= MIN_PYTHON else "fail"
    return Finding("D10", status, "Python", platform.python_version(), f">= {want}")


def _torch() -> Finding:
    want = ".".join(map(str, MIN_TORCH))
    found = _version("torch")
    if found is None:
        fix = "pip install torch"
        return Finding("D10", "fail", "torch", "not installed", f">= {want}", "no Buffer", fix)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < MIN_TORCH:
        return Finding("D10", "fail", "torch", found, f">= {want}", "untested", "upgrade torch")
    return Finding("D10", "ok", "torch", found, f">= {want}")


def _core(machine: Machine) -> Finding:
    try:
        info = machine.build_info()
    except ImportError as error:
        need, fix = "the native core", "pip install . in a checkout, or install the wheel"
        return Finding("D10", "fail", "ep_comm", str(error), need, "nothing works", fix)
    cuda = info["cuda"] or f"none, {info['cuda_missing']}"
    measured = f"{info['version']} ({info['compiler']}; simd {' '.join(info['simd'])}; CUDA {cuda})"
    return Finding("D10", "ok", "ep_comm", measured.replace(";", ","))


def variables(machine: Machine) -> list[Finding]:
    """Variables named like ours; values are not shown, for they may be secrets."""
    ours = sorted(name for name in machine.environ if name.upper().startswith(PREFIX))
    unknown = [name for name in ours if name not in KNOWN_VARIABLES]
    need = (
        f"one of {', '.join(KNOWN_VARIABLES)}"
        if KNOWN_VARIABLES
        else "none, there are no such options"
    )
    findings = []
    for name in unknown:
        near = difflib.get_close_matches(name, KNOWN_VARIABLES, 1)
        fix = f"unset {name}" + (f", or did you mean {near[0]}?" if near else "")
        findings.append(
            Finding(
                "D10", "fail", "variables", f"{name} is set", need, "it has no effect", fix, "E203"
            )
        )
    if not findings:
        text = ", ".join(ours) or f"no {PREFIX}* is set"
        findings.append(Finding("D10", "ok", "variables", text, need))
    return findings


# ---- D11 ----


def d11(machine: Machine) -> list[Finding]:
    """Two ranks, one dispatch, one combine."""
    need = "two processes, one dispatch and one combine, bit-exact"
    try:
        found = machine.answer("selftest")
    except Unavailable as error:
        return [Finding("D11", "skip", "self-test", f"not finished, {error}", need)]
    if found["ok"]:
        return [Finding("D11", "ok", "self-test", found["detail"], need)]
    code, _, what = str(found["detail"]).partition(" ")
    effect, fix = "results cannot be trusted here", "report this, with ep-comm doctor --json"
    return [Finding("D11", "fail", "self-test", what, need, effect, fix, code)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def static_facts(machine: Machine) -> dict[str, Any]:
    """What an issue needs to say about software and host; nothing is probed."""
    try:
        build: dict[str, Any] | str = dict(machine.build_info())
    except ImportError as error:
        build = str(error)
    soft = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
    return {
        "ep_comm": _version("ep-comm"),
        "build": build,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "container": _container(machine),
        "limits": {name: None if value == _UNLIMITED else value for name, value in soft.items()},
        "nics": machine.list("/sys/class/infiniband"),
        "variables": sorted(n for n in machine.environ if n.upper().startswith(PREFIX)),
        "visible_gpus": machine.environ.get("CUDA_VISIBLE_DEVICES"),
    }


_LIMITS: Final = {"memlock": resource.RLIMIT_MEMLOCK, "open_files": resource.RLIMIT_NOFILE}
_PACKAGES: Final = ("torch", "numpy", "nvidia-nvshmem-cu13", "nvidia-nccl-cu13", "deep_ep")


def _container(machine: Machine) -> str | None:
    """The kind of container, by its usual marks."""
    if (machine.root / ".dockerenv").exists():
        return "docker"
    if (machine.root / "run/.containerenv").exists():
        return "podman"
    if machine.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    return "apptainer" if machine.environ.get("APPTAINER_CONTAINER") else None
