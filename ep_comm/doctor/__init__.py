"""What this machine offers to ep_comm, found out in at most five seconds without leaving a trace.

One function for each check D1 to D11; what they read comes through `Machine`, so tests can lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ep_comm.doctor.gpu_checks import d1, d2, d3, d6, d7, d9
from ep_comm.doctor.host_checks import d4, d5, d8, d10, d11, static_facts
from ep_comm.doctor.machine import Machine, Unavailable
from ep_comm.doctor.report import Finding, Report, unmet

CHECKS: Final[dict[str, Callable[[Machine], list[Finding]]]] = {
    "D1": d1, "D2": d2, "D3": d3, "D4": d4, "D5": d5, "D6": d6, "D7": d7, "D8": d8, "D9": d9,
    "D10": d10, "D11": d11,
}  # fmt: skip

# What may be required, and the check that must then be ok.
REQUIREMENTS: Final = {"nvlink": "D3", "rdma": "D8"}


def examine(
    machine: Machine | None = None, *, require: Sequence[str] = (), selftest: bool = True
) -> Report:
    """Run all checks.

    Args:
        machine: where to look; None: here.
        require: of REQUIREMENTS; what is not there is a failure.
        selftest: False leaves D11 out.
    """
    machine = Machine() if machine is None else machine
    try:
        if selftest and machine.selftest is None:
            machine.start("selftest")
        if machine.driver is None and machine.has_nvidia_device():
            machine.start("driver")
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            if name == "D11" and not selftest:
                findings.append(Finding(name, "skip", "self-test", "not run, --no-selftest"))
                continue
            findings += _run(name, check, machine)
        environment = _environment(machine)
    finally:
        machine.close()
    for asked in require:
        findings = unmet(findings, REQUIREMENTS[asked], asked)
    return Report(tuple(findings), time.monotonic() - machine.started, environment)


def _run(name: str, check: Callable[[Machine], list[Finding]], machine: Machine) -> list[Finding]:
    try:
        return check(machine)
    except Exception as error:  # a broken check must not hide the others
        why = f"this check failed: {type(error).__name__}: {error}"
        return [Finding(name, "skip", "check", why, fix="report this")]


def env_report() -> dict[str, Any]:
    """Versions, limits, GPUs and NICs of this machine, for an issue; JSON-serializable.

    Nothing is tried or changed: no transfer, no GPU memory. Values of variables are left out,
    handles and tokens too. `ep-comm doctor` finds out more.

    Cost: a tenth of a second; more where a GPU driver has to be asked, at most five.
    """
    machine = Machine(look_only=True)
    try:
        return _environment(machine)
    finally:
        machine.close()


def _environment(machine: Machine) -> dict[str, Any]:
    try:
        nvml = machine.nvml()
    except Unavailable as error:
        return {**static_facts(machine), "driver": None, "gpus": [], "gpus_missing": str(error)}
    keys = ("index", "uuid", "name", "mig")
    gpus = [{key: gpu[key] for key in keys} for gpu in nvml["gpus"]]
    return {**static_facts(machine), "driver": nvml["driver"], "gpus": gpus, "gpus_missing": None}


def launch_line(machine: Machine | None = None) -> str:
    """The torchrun command: a rank for every GPU of this machine, or for every core without one."""
    machine = Machine() if machine is None else machine
    try:
        num_gpus = len(machine.cuda()["gpus"])
    except Unavailable:
        num_gpus = 0
    finally:
        machine.close()
    ranks, prefix = num_gpus, ""
    if num_gpus == 0:
        ranks, prefix = static_facts(machine)["cores"], "OMP_NUM_THREADS=1 "
    return f"{prefix}torchrun --standalone --nproc-per-node={ranks} PROGRAM"


__all__ = [
    "CHECKS",
    "REQUIREMENTS",
    "Finding",
    "Machine",
    "Report",
    "env_report",
    "examine",
    "launch_line",
]
