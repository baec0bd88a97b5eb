"""Part of D8: whether a NIC reaches GPU memory, and how GPUs may drive it."""

from __future__ import annotations

from typing import Final

from ep_comm.doctor.machine import Machine
from ep_comm.doctor.report import Finding

_NEED: Final = "a NIC that reads and writes GPU memory, driven by the GPU"
_EFFECT: Final = "no IBGDA between hosts"


def gpudirect(machine: Machine) -> Finding:
    """GPUDirect RDMA, and what the handlers of IBGDA ask of the driver."""
    if not machine.list("/sys/class/infiniband"):
        return Finding("D8", "skip", "GPUDirect RDMA", "no RDMA device", _NEED, _EFFECT)
    modules = machine.list("/sys/module")
    version = machine.read("/proc/driver/nvidia/version")
    if version is None:
        return Finding("D8", "skip", "GPUDirect RDMA", "no NVIDIA driver", _NEED, _EFFECT)
    ways = ["nvidia_peermem"] if "nvidia_peermem" in modules else []
    if "Open Kernel Module" in version:
        ways.append("DMA-BUF of the open driver")
    params = machine.read("/proc/driver/nvidia/params") or ""
    handlers = ["gpu (PeerMappingOverride=1)"] if "PeerMappingOverride=1" in params else []
    if "gdrdrv" in modules:
        handlers.append("cpu (gdrdrv)")
    measured = (
        f"memory by {' or '.join(ways) or 'nothing'}, "
        f"IBGDA handlers: {', '.join(handlers) or 'cpu_host_memory only'}"
    )
    if not ways:
        fix = "modprobe nvidia_peermem, or install the open kernel modules"
        return Finding("D8", "warn", "GPUDirect RDMA", measured, _NEED, _EFFECT, fix)
    if not handlers:
        fix = (
            'options nvidia NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d, '
            "or load gdrdrv of GDRCopy"
        )
        return Finding("D8", "warn", "GPUDirect RDMA", measured, _NEED, "slower doorbells", fix)
    return Finding("D8", "ok", "GPUDirect RDMA", measured, _NEED)
