"""D1, D2, D3, D6, D7 and D9: what the driver says, and what it really does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ep_comm.doctor.machine import Machine, Unavailable
from ep_comm.doctor.report import Finding

MIN_CUDA_DRIVER: Final = 12040  # cuDriverGetVersion: 12.4
_EXCLUSIVE: Final = {1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


def d1(machine: Machine) -> list[Finding]:
    """Driver, CUDA, and the GPUs this process may use."""
    need = f"a driver for CUDA {_dotted(MIN_CUDA_DRIVER)}"
    try:
        cuda = machine.cuda()
    except Unavailable as error:
        if not machine.has_nvidia_device() and not machine.gpus and machine.driver is None:
            return [Finding("D1", "skip", "GPUs", str(error), need, "backend cpu only")]
        fix = "install the driver, or start the container with its GPUs (docker run --gpus all)"
        return [Finding("D1", "fail", "GPUs", str(error), need, "backend cpu only", fix, "E401")]
    driver = _driver_version(machine)
    text = f"CUDA {_dotted(cuda['version'])}" + (f", driver {driver}" if driver else "")
    if cuda["version"] < MIN_CUDA_DRIVER:
        return [Finding("D1", "fail", "driver", text, need, "no GPU backend", "upgrade it", "E402")]
    findings = [Finding("D1", "ok", "driver", text, need)]
    details = {gpu["uuid"]: gpu for gpu in _nvml_gpus(machine)}
    for gpu in cuda["gpus"]:
        known = details.get(gpu["uuid"], {})
        name = known.get("name") or "GPU"
        text = f"{name}, {gpu['uuid']}, sm_{_arch(gpu)}" + (", MIG" if known.get("mig") else "")
        findings.append(Finding("D1", "ok", f"GPU {gpu['ordinal']}", text))
    missing = [w for w in machine.gpus if not any(_is(w, gpu) for gpu in cuda["gpus"])]
    if missing or not cuda["gpus"]:
        what = f"no GPU {', '.join(missing)}" if missing else "none is visible"
        fix = "correct --gpus or CUDA_VISIBLE_DEVICES"
        findings.append(Finding("D1", "fail", "GPUs", what, "", "backend cpu only", fix, "E401"))
    return findings


def d2(machine: Machine) -> list[Finding]:
    """Kernels for these GPUs."""
    try:
        info = machine.build_info()
    except ImportError as error:
        return [Finding("D2", "skip", "kernels", f"unknown, {error}")]
    if info["cuda"] is None:
        why = f"none in this build: {info['cuda_missing']}"
        return [Finding("D2", "skip", "kernels", why, effect="backend cpu or collective")]
    try:
        gpus = machine.cuda()["gpus"]
    except Unavailable as error:
        return [Finding("D2", "skip", "kernels", f"not compared, {error}")]
    built = info["cuda_archs"]
    if not built:
        why = f"built with CUDA {info['cuda']}, for architectures it does not name"
        return [Finding("D2", "skip", "kernels", why)]
    return [_kernel(gpu, built) for gpu in gpus]


def _kernel(gpu: dict[str, Any], built: Sequence[str]) -> Finding:
    major, minor = gpu["capability"]
    have, subject = 10 * major + minor, f"kernels for GPU {gpu['ordinal']}"
    need = f"sm_{have}"
    for arch in built:
        if _runs(arch, major, minor):
            return Finding("D2", "ok", subject, f"sm_{arch}", need)
    names = " ".join(built)
    if any(arch.endswith("+PTX") and _number(arch) <= have for arch in built):
        text, effect = f"PTX only, of {names}", "compiled by the driver at first use"
        return Finding("D2", "warn", subject, text, need, effect, "install a newer wheel")
    effect, fix = "no GPU backend", "install a matching wheel"
    return Finding("D2", "fail", subject, f"built for {names}", need, effect, fix, "E403")


def _runs(arch: str, major: int, minor: int) -> bool:
    """Code fits its major version from its minor on, with an "a" its own version only."""
    if arch.endswith("+PTX"):
        return False
    built_major, built_minor = divmod(_number(arch), 10)
    fits = minor == built_minor if arch.endswith("a") else minor >= built_minor
    return major == built_major and fits


def _number(arch: str) -> int:
    """90 of "90", "90a" or "90+PTX"; PTX with a letter is for no later GPU, so of none."""
    plain = arch.removesuffix("+PTX")
    if plain != arch and not plain.isdigit():
        return 1 << 30
    return int(plain.rstrip("af"))


def d3(machine: Machine) -> list[Finding]:
    """Every pair of GPUs: what the driver promises, and whether bytes come back."""
    need = "peer access, native atomics, bytes written and read back, both ways"
    try:
        cuda = machine.cuda()
    except Unavailable as error:
        return [Finding("D3", "skip", "pairs", f"not tried, {error}", need, "no NVLink backend")]
    if not cuda["pairs"]:
        why = f"not tried, {len(cuda['gpus'])} GPU is visible"
        return [Finding("D3", "skip", "pairs", why, need, "no NVLink backend")]
    linked = _nvlink_pairs(machine, cuda["gpus"])
    return [_pair(pair, linked.get(tuple(pair["gpus"])), need) for pair in cuda["pairs"]]


def _pair(pair: dict[str, Any], nvlink: bool | None, need: str) -> Finding:
    a, b = pair["gpus"]
    broken = [copy["detail"] for copy in pair["copied"] if not copy["ok"]]
    facts = [
        {True: "NVLink", False: "no NVLink", None: "NVLink unknown"}[nvlink],
        "peer access" if pair["access"] else "no peer access",
        "atomics" if pair["atomics"] else "no native atomics",
        f"write test failed ({broken[0]})" if broken else "write test passed",
    ]
    subject, text = f"GPUs {a}-{b}", ", ".join(facts)
    if nvlink is not False and pair["access"] and pair["atomics"] and not broken:
        return Finding("D3", "ok", subject, text, need)
    effect, fix = "a slower backend for groups with this pair", "nvidia-smi topo -m shows the links"
    return Finding("D3", "warn", subject, text, need, effect, fix, "E404")


def d6(machine: Machine) -> list[Finding]:
    """GPUs that are cut, shared or taken."""
    need = "one whole GPU for each rank"
    try:
        gpus = machine.nvml()["gpus"]
    except Unavailable as error:
        return [Finding("D6", "skip", "sharing", f"not looked at, {error}", need)]
    findings = [_sharing(gpu, need) for gpu in gpus]
    pipe = machine.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps").lstrip("/")
    if (machine.root / pipe / "control").exists():
        effect, fix = (
            "kernels of several processes run together",
            "echo quit | nvidia-cuda-mps-control",
        )
        findings.append(Finding("D6", "warn", "MPS", "its daemon runs", need, effect, fix))
    return findings


def _sharing(gpu: dict[str, Any], need: str) -> Finding:
    subject, fix = f"GPU {gpu['index']}", "give each rank a whole GPU"
    if gpu["mig"]:
        effect = "instances cannot reach each other's memory"
        return Finding("D6", "fail", subject, "MIG is on", need, effect, fix, "E409")
    mode = _EXCLUSIVE.get(gpu["compute_mode"])
    if mode == "prohibited":
        text, effect, fix = "compute mode prohibited", "nobody may compute there", "nvidia-smi -c 0"
        return Finding("D6", "fail", subject, text, need, effect, fix, "E409")
    if gpu["processes"]:
        text, effect = f"{gpu['processes']} processes compute there", "waits are longer"
        return Finding("D6", "warn", subject, text, need, effect, fix)
    return Finding("D6", "ok", subject, f"whole, {mode or 'default mode'}, idle", need)


def d7(machine: Machine) -> list[Finding]:
    """Fabric handles, by making one: attributes say yes where allocations fail."""
    need, effect = "a fabric handle of a real allocation", "NVLink ends at this host"
    try:
        probes = machine.cuda()["fabric"]
    except Unavailable as error:
        return [Finding("D7", "skip", "fabric", f"not tried, {error}", need, effect)]
    if not probes:
        return [Finding("D7", "skip", "fabric", "not tried, no GPU is visible", need, effect)]
    if probes[0]["ok"]:
        return [Finding("D7", "ok", "fabric", f"{probes[0]['detail']} exported", need)]
    channels = machine.list("/dev/nvidia-caps-imex-channels")
    if channels:
        fix = "start IMEX on every node of the domain, or use POSIX descriptors"
        return [Finding("D7", "warn", "fabric", probes[0]["detail"], need, effect, fix, "E505")]
    measured = f"{probes[0]['detail']}, and no IMEX channel"
    return [Finding("D7", "skip", "fabric", measured, need, effect)]


def d9(machine: Machine) -> list[Finding]:
    """Errors the hardware has counted."""
    need = "no error since the driver was loaded"
    try:
        gpus = machine.nvml()["gpus"]
    except Unavailable as error:
        return [Finding("D9", "skip", "counters", f"not read, {error}", need)]
    findings = [_counters(gpu, need) for gpu in gpus]
    return [*findings, _xids(machine)]


def _counters(gpu: dict[str, Any], need: str) -> Finding:
    subject, ecc, links = f"GPU {gpu['index']}", gpu["ecc_uncorrected"], gpu["nvlink"]
    facts = ["ECC unknown" if ecc is None else f"{ecc} uncorrected ECC errors"]
    facts += ["no NVLink"] if links is None else [
        f"{links['errors']} NVLink errors on {links['active']} active links"
    ]  # fmt: skip
    if (ecc or 0) + (links["errors"] if links else 0) == 0:
        return Finding("D9", "ok", subject, ", ".join(facts), need)
    effect, fix = "rows may stall or be lost", "drain the node and reset the GPU"
    return Finding("D9", "warn", subject, ", ".join(facts), need, effect, fix, "E504")


def _xids(machine: Machine) -> Finding:
    """The kernel log belongs to root on most machines, so this often stays unknown."""
    log = machine.read("/var/log/kern.log") or machine.read("/var/log/messages")
    if log is None:
        return Finding("D9", "skip", "Xid", "not read, the kernel log is not readable here")
    hits = [line for line in log.splitlines() if "NVRM: Xid" in line]
    if not hits:
        return Finding("D9", "ok", "Xid", "none in the kernel log")
    last = hits[-1].partition("NVRM: ")[2][:80].replace(";", ",")
    effect, fix = "a GPU reported a fault", "dmesg | grep Xid, then drain the node"
    return Finding("D9", "warn", "Xid", f"{len(hits)}, last {last}", "", effect, fix, "E504")


# ---- small ones ----


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _arch(gpu: dict[str, Any]) -> str:
    return "".join(map(str, gpu["capability"]))


def _is(asked: str, gpu: dict[str, Any]) -> bool:
    return asked == str(gpu["ordinal"]) or (len(asked) > 3 and gpu["uuid"].startswith(asked))


def _nvml_gpus(machine: Machine) -> list[dict[str, Any]]:
    try:
        gpus: list[dict[str, Any]] = machine.nvml()["gpus"]
    except Unavailable:
        return []
    return gpus


def _driver_version(machine: Machine) -> str | None:
    try:
        return str(machine.nvml()["driver"])
    except Unavailable:
        return None


def _nvlink_pairs(machine: Machine, gpus: list[dict[str, Any]]) -> dict[tuple[int, ...], bool]:
    """NVML counts all GPUs of the machine, CUDA the visible ones; the UUID joins them."""
    try:
        nvml = machine.nvml()
    except Unavailable:
        return {}
    ordinal = {gpu["uuid"]: gpu["ordinal"] for gpu in gpus}
    by_index = {gpu["index"]: ordinal.get(gpu["uuid"]) for gpu in nvml["gpus"]}
    found = {}
    for a, b, linked in nvml["nvlink_pairs"]:
        pair = (by_index.get(a), by_index.get(b))
        if pair[0] is not None and pair[1] is not None:
            found[tuple(sorted((pair[0], pair[1])))] = bool(linked)
    return found
