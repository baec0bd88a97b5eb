"""`ep-comm doctor`: what it says of made-up machines, and of this one."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ep_comm import env_report
from ep_comm.doctor import CHECKS, Machine, driver, examine, gpu_checks, host_checks, launch_line
from ep_comm.doctor.report import Finding, Report
from ep_comm.errors import CODES

LINE = re.compile(r"^\[(ok|warn|skip|fail)\] D(1[01]|[1-9]) [^:]+: .+$")
BUILD = {
    "version": "0.1.0", "build_type": "Release", "compiler": "GNU 12", "simd": ("portable",),
    "cuda": None, "cuda_archs": (), "cuda_missing": "nvcc was not found", "nvshmem": None,
    "nvshmem_missing": "no",
}  # fmt: skip


def fine() -> dict[str, Any]:
    return {"ok": True, "detail": "every bit"}


def nvml_gpu(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index, "uuid": f"GPU-{index:04d}", "name": "H100", "mig": False, "compute_mode": 0,
        "processes": 0, "ecc_uncorrected": 0, "nvlink": {"active": 18, "errors": 0}, **changes,
    }  # fmt: skip


def two_gpus(**changes: Any) -> dict[str, Any]:
    """What the driver says of a healthy machine with two linked GPUs, with some facts changed."""
    copied = [{"ok": True, "detail": "4096 B"}] * 2
    facts: dict[str, Any] = {
        "nvml": {"error": None, "driver": "580.95", "gpus": [nvml_gpu(0), nvml_gpu(1)],
                 "nvlink_pairs": [[0, 1, True]]},
        "cuda": {
            "error": None, "version": 13000,
            "gpus": [{"ordinal": i, "uuid": f"GPU-{i:04d}", "capability": [9, 0]} for i in (0, 1)],
            "pairs": [{"gpus": [0, 1], "access": True, "atomics": True, "copied": copied}],
            "vmm": [{"ok": True, "detail": "2 MiB"}], "fabric": [{"ok": True, "detail": "2 MiB"}],
        },
    }  # fmt: skip
    for path, value in changes.items():
        library, _, key = path.partition("__")
        facts[library][key] = value
    return facts


def fake(tmp_path: Path, **changes: Any) -> Machine:
    """A machine below tmp_path that starts no process."""
    options: dict[str, Any] = {
        "root": tmp_path, "environ": {}, "share": fine, "selftest": fine, "build": lambda: BUILD,
        **changes,
    }  # fmt: skip
    return Machine(**options)


def put(root: Path, path: str, text: str = "") -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def only(findings: list[Finding], subject: str) -> Finding:
    (found,) = [f for f in findings if f.subject == subject]
    return found


# ---- lines, exit codes, JSON ----


def test_line_has_the_form_of_the_contract() -> None:
    finding = Finding("D5", "warn", "open files", "256", "1024", "too few", "ulimit -n", "E407")
    assert finding.line() == (
        "[warn] D5 open files: 256 (need 1024); E407 too few; ulimit -n"
    )  # fmt: skip
    assert Finding("D1", "ok", "GPU 0", "H100").line() == "[ok] D1 GPU 0: H100"
    assert "\n" not in Finding("D1", "ok", "GPU 0", "H\n100").line()


@pytest.mark.parametrize(
    ("statuses", "code"),
    [(("ok", "skip"), 0), (("ok", "warn", "skip"), 1), (("warn", "fail"), 2), ((), 0)],
    ids=["ok", "warning", "failure", "nothing"],
)
def test_exit_code_follows_the_worst_line(statuses: tuple[Any, ...], code: int) -> None:
    findings = tuple(Finding("D1", status, "s", "m") for status in statuses)
    assert Report(findings, 0.0, {}).exit_code == code


def test_json_keys_are_stable(tmp_path: Path) -> None:
    report = examine(fake(tmp_path)).as_dict()
    assert list(report) == ["json_version", "exit_code", "seconds", "findings", "environment"]
    keys = ["check", "status", "subject", "measured", "need", "effect", "fix", "code"]
    assert all(list(finding) == keys for finding in report["findings"])
    assert list(report["environment"]) == [
        "ep_comm", "build", "python", "packages", "system", "libc", "cores", "memory_bytes",
        "container", "limits", "nics", "variables", "visible_gpus", "driver", "gpus",
        "gpus_missing",
    ]  # fmt: skip
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report))


def test_every_check_speaks_on_a_bare_machine_and_none_fails(tmp_path: Path) -> None:
    report = examine(fake(tmp_path))
    assert {finding.check for finding in report.findings} == set(CHECKS)
    assert report.exit_code == 0
    assert not [f.line() for f in report.findings if not LINE.match(f.line())]
    assert all(f.measured for f in report.findings if f.status == "skip")


def test_codes_are_known_ones(tmp_path: Path) -> None:
    broken = two_gpus(cuda__error="cuInit: CUDA_ERROR_UNKNOWN", nvml__error="nvmlInit_v2: ?")
    for facts in (broken, two_gpus(cuda__version=11000)):
        report = examine(fake(tmp_path, driver=lambda facts=facts: facts))
        assert all(f.code in CODES for f in report.findings if f.code)


def test_check_that_raises_is_told_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(machine: Machine) -> list[Finding]:
        raise ZeroDivisionError("oops")

    monkeypatch.setitem(CHECKS, "D5", broken)
    report = examine(fake(tmp_path))
    (line,) = [f.line() for f in report.findings if f.check == "D5"]
    assert line.startswith("[skip] D5 check: this check failed: ZeroDivisionError: oops")
    assert {f.check for f in report.findings} == set(CHECKS)


# ---- GPUs, from made-up facts ----


def test_healthy_gpus_are_ok_everywhere(tmp_path: Path) -> None:
    report = examine(fake(tmp_path, driver=two_gpus), require=["nvlink"])
    assert {f.status for f in report.findings if f.check in ("D1", "D3", "D4", "D6", "D7")} == {
        "ok"
    }
    assert report.exit_code == 0
    assert any("GPU-0001, sm_90" in f.measured for f in report.findings if f.check == "D1")


@pytest.mark.parametrize(
    ("changes", "check", "status", "code"),
    [
        ({"cuda__error": "cuInit: CUDA_ERROR_NO_DEVICE"}, "D1", "fail", "E401"),
        ({"cuda__version": 11080}, "D1", "fail", "E402"),
        ({"cuda__gpus": [], "cuda__pairs": []}, "D1", "fail", "E401"),
        ({"cuda__vmm": [{"ok": False, "detail": "cuMemCreate: no"}]}, "D4", "fail", "E405"),
        ({"nvml__gpus": [nvml_gpu(0, mig=True)]}, "D6", "fail", "E409"),
        ({"nvml__gpus": [nvml_gpu(0, compute_mode=2)]}, "D6", "fail", "E409"),
        ({"nvml__gpus": [nvml_gpu(0, processes=3)]}, "D6", "warn", ""),
        ({"cuda__fabric": [{"ok": False, "detail": "NOT_PERMITTED"}]}, "D7", "skip", ""),
        ({"nvml__gpus": [nvml_gpu(0, ecc_uncorrected=1)]}, "D9", "warn", "E504"),
        ({"nvml__gpus": [nvml_gpu(0, nvlink={"active": 18, "errors": 7})]}, "D9", "warn", "E504"),
    ],
    ids=["no-device", "old", "none", "vmm", "mig", "prohibited", "busy", "fabric", "ecc", "nvlink"],
)  # fmt: skip
def test_each_gpu_fault_is_found_by_its_check(
    tmp_path: Path, changes: dict[str, Any], check: str, status: str, code: str
) -> None:
    report = examine(fake(tmp_path, driver=lambda: two_gpus(**changes)))
    found = [(f.status, f.code) for f in report.findings if f.check == check]
    assert (status, code) in found, [f.line() for f in report.findings]


@pytest.mark.parametrize(
    "change",
    [
        {"access": False},
        {"atomics": False},
        {"copied": [{"ok": True, "detail": ""}, {"ok": False, "detail": "other bytes came back"}]},
    ],
    ids=["access", "atomics", "write-test"],
)
def test_pair_of_gpus_that_cannot_share_warns_and_fails_when_required(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    pair = {**two_gpus()["cuda"]["pairs"][0], **change}
    machine = fake(tmp_path, driver=lambda: two_gpus(cuda__pairs=[pair]))
    assert [f.status for f in gpu_checks.d3(machine)] == ["warn"]
    report = examine(machine, require=["nvlink"])
    assert report.exit_code == 2
    assert only(list(report.findings), "GPUs 0-1").code == "E404"


def test_pair_without_nvlink_warns(tmp_path: Path) -> None:
    facts = two_gpus(nvml__nvlink_pairs=[[0, 1, False]])
    (finding,) = gpu_checks.d3(fake(tmp_path, driver=lambda: facts))
    assert finding.status == "warn"
    assert "no NVLink" in finding.measured


def test_fabric_that_should_work_warns(tmp_path: Path) -> None:
    put(tmp_path, "/dev/nvidia-caps-imex-channels/channel0")
    facts = two_gpus(cuda__fabric=[{"ok": False, "detail": "cuMemCreate: NOT_PERMITTED"}])
    (finding,) = gpu_checks.d7(fake(tmp_path, driver=lambda: facts))
    assert (finding.status, finding.code) == ("warn", "E505")


@pytest.mark.parametrize(
    ("built", "capability", "status"),
    [
        ("90 90+PTX", (9, 0), "ok"),  # what CMake makes of its default, 90
        ("90 90+PTX", (12, 0), "warn"),
        ("90 90+PTX", (8, 9), "fail"),
        ("90+PTX", (9, 0), "warn"),
        ("80 90", (8, 6), "ok"),
        ("90a", (9, 0), "ok"),
        ("80 90a", (9, 1), "fail"),  # code for sm_90a runs on sm_90 and nowhere else
        ("90a+PTX", (12, 0), "fail"),
        ("100f", (10, 3), "ok"),
        ("100", (9, 0), "fail"),
        ("", (9, 0), "skip"),
    ],
)
def test_kernels_are_compared_with_the_gpu(
    tmp_path: Path, built: str, capability: tuple[int, int], status: str
) -> None:
    build = {**BUILD, "cuda": "13.0", "cuda_archs": tuple(built.split())}
    facts = two_gpus()
    for gpu in facts["cuda"]["gpus"]:
        gpu["capability"] = list(capability)
    machine = fake(tmp_path, driver=lambda: facts, build=lambda: build)
    assert {f.status for f in gpu_checks.d2(machine)} == {status}


def test_mps_daemon_and_kernel_log_are_noticed(tmp_path: Path) -> None:
    put(tmp_path, "/tmp/nvidia-mps/control")
    put(tmp_path, "/var/log/kern.log", "NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off\n")
    machine = fake(tmp_path, driver=two_gpus)
    assert only(gpu_checks.d6(machine), "MPS").status == "warn"
    assert only(gpu_checks.d9(machine), "Xid").code == "E504"


def test_nvidia_device_without_a_driver_fails_and_no_device_does_not(tmp_path: Path) -> None:
    bus = "/sys/bus/pci/devices/0000:18:00.0"
    missing: dict[str, Any] = {"error": "not installed", "missing": True, "gpus": []}
    machine = fake(tmp_path, driver=lambda: {"cuda": missing, "nvml": missing})
    put(tmp_path, f"{bus}/vendor", "0x10de\n")
    put(tmp_path, f"{bus}/class", "0x030200\n")
    assert machine.has_nvidia_device()
    assert only(gpu_checks.d1(machine), "GPUs").code == "E401"


# ---- the host, from made-up files ----


def test_requirement_names_what_is_missing(tmp_path: Path) -> None:
    report = examine(fake(tmp_path), require=["nvlink", "rdma"])
    failed = [f.line() for f in report.findings if f.status == "fail"]
    assert report.exit_code == 2
    assert any("D3 pairs: not tried, this machine has no NVIDIA GPU" in line for line in failed)
    assert any("D8 NICs: no RDMA device" in line and "E404" in line for line in failed)


def add_nic(root: Path, name: str, bus: str, state: str) -> None:
    """A NIC below the bridges that `bus` names, as /sys shows it."""
    device = root / f"sys/devices/{bus}"
    device.mkdir(parents=True, exist_ok=True)
    base = f"/sys/class/infiniband/{name}"
    put(root, f"{base}/ports/1/state", f"4: {state}\n")
    put(root, f"{base}/ports/1/link_layer", "InfiniBand\n")
    put(root, f"{base}/ports/1/rate", "400 Gb/sec (4X NDR)\n")
    (root / base.lstrip("/") / "device").symlink_to(device)


def test_nics_are_listed_by_their_distance_from_a_gpu(tmp_path: Path) -> None:
    gpu = tmp_path / "sys/devices/pci0000:17/0000:17:01.0/0000:18:00.0"
    gpu.mkdir(parents=True)
    put(gpu, "vendor", "0x10de")
    link = tmp_path / "sys/bus/pci/devices/0000:18:00.0"
    link.parent.mkdir(parents=True)
    link.symlink_to(gpu)
    add_nic(tmp_path, "mlx5_0", "pci0000:a0/0000:a0:01.0/0000:a1:00.0", "ACTIVE")
    add_nic(tmp_path, "mlx5_1", "pci0000:17/0000:17:01.0/0000:19:00.0", "ACTIVE")
    finding = only(host_checks.d8(fake(tmp_path)), "NICs")
    assert finding.status == "ok"
    assert finding.measured.index("mlx5_1/1 ACTIVE") < finding.measured.index("mlx5_0/1 ACTIVE")
    assert "2 PCIe hops" in finding.measured
    assert "400 Gb/sec" in finding.measured


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95\n"


@pytest.mark.parametrize(
    ("modules", "version", "params", "status", "says"),
    [
        ((), OPEN, 'RegistryDwords: "PeerMappingOverride=1;"', "ok", "gpu (PeerMappingOverride=1)"),
        (("nvidia_peermem", "gdrdrv"), "NVRM version: 535", "", "ok", "cpu (gdrdrv)"),
        (("nvidia_peermem",), "NVRM version: 535", "", "warn", "cpu_host_memory only"),
        ((), "NVRM version: 535", "", "warn", "memory by nothing"),
    ],
)
def test_gpudirect_needs_a_way_to_memory_and_a_handler(
    tmp_path: Path, modules: tuple[str, ...], version: str, params: str, status: str, says: str
) -> None:
    add_nic(tmp_path, "mlx5_0", "pci0000:a0/0000:a0:01.0/0000:a1:00.0", "ACTIVE")
    put(tmp_path, "/proc/driver/nvidia/version", version)
    put(tmp_path, "/proc/driver/nvidia/params", params)
    for module in modules:
        (tmp_path / "sys/module" / module).mkdir(parents=True)
    finding = only(host_checks.d8(fake(tmp_path)), "GPUDirect RDMA")
    assert (finding.status, says in finding.measured) == (status, True)
    assert (not finding.fix) == (status == "ok")


def test_gpudirect_is_skipped_without_a_nic(tmp_path: Path) -> None:
    assert only(host_checks.d8(fake(tmp_path)), "GPUDirect RDMA").status == "skip"


def test_nic_whose_ports_are_down_warns(tmp_path: Path) -> None:
    add_nic(tmp_path, "mlx5_0", "pci0000:a0/0000:a1:00.0", "DOWN")
    assert only(host_checks.d8(fake(tmp_path)), "NICs").status == "warn"


def test_nvshmem_versions_that_do_not_fit_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fake(tmp_path, build=lambda: {**BUILD, "nvshmem": "3.4.5"})
    monkeypatch.setattr(host_checks, "_version", lambda name: "3.7.2")
    finding = only(host_checks.d8(machine), "NVSHMEM")
    assert (finding.status, finding.code) == ("fail", "E501")
    assert "host 3.7.2, device 3.4.5" in finding.measured
    assert "3.5.19" in finding.measured
    monkeypatch.setattr(host_checks, "_version", lambda name: "3.3.20")
    assert only(host_checks.d8(machine), "NVSHMEM").status == "ok"


def test_locked_memory_matters_with_a_nic_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda which: (65536, 65536))
    assert only(host_checks.d5(fake(tmp_path)), "locked memory").status == "ok"
    add_nic(tmp_path, "mlx5_0", "pci0000:a0/0000:a1:00.0", "ACTIVE")
    finding = only(host_checks.d5(fake(tmp_path)), "locked memory")
    assert finding.status == "warn"
    assert "--ulimit memlock=-1" in finding.fix


def test_few_open_files_and_strict_overcommit_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda which: (256, 256))
    put(tmp_path, "/proc/sys/vm/overcommit_memory", "2\n")
    findings = host_checks.d5(fake(tmp_path))
    assert only(findings, "open files").line() == (
        "[warn] D5 open files: 256 (need at least 1024); E407 a Buffer of many ranks cannot be "
        "built; docker run --ulimit nofile=1024"
    )
    assert only(findings, "memory").code == "E232"


@pytest.mark.parametrize("name", ["EP_COMM_BACKEND", "EP_COMM_", "EP_COMM_DEBUG", "ep_comm_sms"])
def test_g9_variable_named_like_ours_fails_without_showing_its_value(
    tmp_path: Path, name: str
) -> None:
    findings = host_checks.variables(fake(tmp_path, environ={name: "s3cret", "PATH": "/bin"}))
    assert [(f.status, f.code) for f in findings] == [("fail", "E203")]
    assert f"{name} is set" in findings[0].line()
    assert "s3cret" not in findings[0].line()
    report = examine(fake(tmp_path, environ={name: "s3cret"}))
    assert report.exit_code == 2
    assert "s3cret" not in json.dumps(report.as_dict())


def test_misspelt_variable_is_told_what_it_may_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks, "KNOWN_VARIABLES", ("EP_COMM_BACKEND",))
    environ = {"EP_COMM_BAKEND": "1", "EP_COMM_BACKEND": "cpu"}
    (finding,) = host_checks.variables(fake(tmp_path, environ=environ))
    assert "did you mean EP_COMM_BACKEND?" in finding.fix


def test_missing_core_fails_and_the_rest_still_speaks(tmp_path: Path) -> None:
    def missing() -> Any:
        raise ImportError("ep_comm._core cannot be imported")

    report = examine(fake(tmp_path, build=missing))
    assert report.exit_code == 2
    assert {f.check for f in report.findings} == set(CHECKS)


def test_failed_self_test_carries_its_code(tmp_path: Path) -> None:
    wrong = {"ok": False, "detail": "E242 rank 1 received 3 rows"}
    (finding,) = host_checks.d11(fake(tmp_path, selftest=lambda: wrong))
    assert (finding.status, finding.code) == ("fail", "E242")
    assert finding.measured == "rank 1 received 3 rows"


def test_refused_memory_passing_is_e405(tmp_path: Path) -> None:
    refused = {"ok": False, "detail": "memfd_create: Operation not permitted"}
    finding = only(host_checks.d4(fake(tmp_path, share=lambda: refused)), "shared memory")
    assert (finding.status, finding.code) == ("fail", "E405")
    assert "memfd_create" in finding.measured


# ---- the ctypes layer, over made-up libraries ----


class FakeNvml:
    """Two GPUs behind NVML's calling convention."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.shut = 0

    @staticmethod
    def nvmlErrorString(code: int) -> bytes:
        return b"Driver Not Loaded"

    def nvmlShutdown(self) -> int:
        self.shut += 1
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        numbers = {
            "nvmlDeviceGetCount_v2": 2, "nvmlDeviceGetComputeMode": 0, "nvmlDeviceGetP2PStatus": 0,
            "nvmlDeviceGetTotalEccErrors": 0, "nvmlDeviceGetNvLinkErrorCounter": 2,
            "nvmlDeviceGetNvLinkState": 1, "nvmlDeviceGetComputeRunningProcesses_v3": 3,
        }  # fmt: skip

        def call(*args: Any) -> int:
            if name == self.broken:
                return 9
            if name == "nvmlDeviceGetHandleByIndex_v2":
                args[1]._obj.value = 100 + args[0]
            elif name in ("nvmlSystemGetDriverVersion", "nvmlDeviceGetName"):
                args[-2].value = b"580.95"
            elif name == "nvmlDeviceGetUUID":
                args[1].value = b"GPU-%d" % args[0].value
            elif name == "nvmlDeviceGetComputeRunningProcesses_v3":
                args[1]._obj.value = numbers[name]
                return 7
            elif name == "nvmlDeviceGetMigMode":
                return 3  # not supported
            elif name in numbers:
                args[-1]._obj.value = numbers[name]
            return 0

        return call


def test_nvml_is_read_through_its_own_calls() -> None:
    nvml = FakeNvml()
    found = driver.facts(nvml, None)["nvml"]
    assert found["error"] is None
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-100", "GPU-101"]
    assert found["nvlink_pairs"] == [[0, 1, True]]
    assert found["gpus"][0]["processes"] == 3
    assert found["gpus"][0]["mig"] is False
    assert found["gpus"][0]["nvlink"] == {"active": 18, "errors": 18 * 3 * 2}
    assert nvml.shut == 1


def test_selection_limits_the_gpus_looked_at() -> None:
    gpus = driver.facts(FakeNvml(), None, ["1"])["nvml"]["gpus"]
    assert [gpu["index"] for gpu in gpus] == [1]
    gpus = driver.facts(FakeNvml(), None, ["GPU-100"])["nvml"]["gpus"]
    assert [gpu["index"] for gpu in gpus] == [0]


def test_g4_library_that_fails_or_lacks_a_symbol_says_so() -> None:
    assert driver.facts(FakeNvml("nvmlInit_v2"), None)["nvml"]["error"] == (
        "nvmlInit_v2: Driver Not Loaded"
    )
    assert driver.facts(None, None)["cuda"]["missing"] is True

    class Old:
        """A libcuda without anything newer than cuInit."""

        def cuInit(self, flags: int) -> int:
            return 0

    assert "cuDeviceGetCount" in driver.facts(None, Old())["cuda"]["error"]


def test_cuda_errors_have_the_drivers_own_names() -> None:
    class NoDevice:
        def cuInit(self, flags: int) -> int:
            return 100

        def cuGetErrorName(self, code: int, text: Any) -> int:
            text._obj.value = b"CUDA_ERROR_NO_DEVICE"
            return 0

    found = driver.facts(None, NoDevice())["cuda"]
    assert found["error"] == "cuInit: CUDA_ERROR_NO_DEVICE"
    assert ctypes.sizeof(driver._AllocationProp) == 32
    assert ctypes.sizeof(driver._AccessDesc) == 12


# ---- this machine ----


def run_doctor(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ep_comm", "doctor", *args],
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )


def test_command_prints_lines_within_its_limit_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_doctor(TMPDIR=str(tmp_path))
    *lines, summary = done.stdout.splitlines()
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert not [line for line in lines if not LINE.match(line)]
    assert "\x1b" not in done.stdout  # no colors for files and pipes
    match = re.search(r"(\d+\.\d) s; exit status (\d)$", summary)
    assert match is not None
    assert float(match[1]) <= 5.0
    assert int(match[2]) == done.returncode
    assert not [n for n in os.listdir("/dev/shm") if "ep_comm" in n]
    assert not [n for n in os.listdir("/tmp") if "ep_comm_doctor" in n]
    assert list(tmp_path.iterdir()) == []


def test_self_test_and_memory_passing_work_here() -> None:
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    by_subject = {f["subject"]: f for f in report["findings"]}
    assert by_subject["self-test"]["status"] == "ok", by_subject["self-test"]
    assert by_subject["shared memory"]["status"] == "ok", by_subject["shared memory"]
    assert report["exit_code"] == done.returncode


def test_command_exits_2_for_what_this_machine_lacks() -> None:
    done = run_doctor("--require", "rdma", "--no-selftest")
    assert done.returncode == 2
    assert "required: rdma" in done.stdout
    assert "[skip] D11 self-test: not run, --no-selftest" in done.stdout


def test_command_exits_2_for_a_variable_named_like_ours() -> None:
    done = run_doctor("--no-selftest", EP_COMM_SPEED="11")
    assert done.returncode == 2
    assert "[fail] D10 variables: EP_COMM_SPEED is set" in done.stdout


@pytest.mark.parametrize("text", ["a", "0;1", "-1", "0,,1", "GPU"])
def test_gpu_lists_that_are_none_are_refused(text: str) -> None:
    done = run_doctor(f"--gpus={text}")
    assert done.returncode == 2
    assert "E203" in done.stderr
    assert "Traceback" not in done.stderr


def test_asking_for_a_gpu_that_is_not_there_fails() -> None:
    done = run_doctor("--gpus", "99", "--no-selftest")
    assert done.returncode == 2
    assert "[fail] D1 GPUs" in done.stdout


def test_launch_prints_one_line_for_the_shell(tmp_path: Path) -> None:
    done = run_doctor("--launch")
    assert done.returncode == 0
    line = r"(OMP_NUM_THREADS=1 )?torchrun --standalone --nproc-per-node=\d+ PROGRAM\n"
    assert re.fullmatch(line, done.stdout)
    assert launch_line(fake(tmp_path, driver=two_gpus)).endswith("--nproc-per-node=2 PROGRAM")


def test_doctor_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ep_comm.doctor import examine\n"
        "print({f.check: f.status for f in examine().findings}['D11'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "ok", done.stderr


def test_helper_that_hangs_is_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    machine = Machine(root=tmp_path, environ={}, driver=lambda: two_gpus(), share=fine, limit_s=0.6)
    stuck = [sys.executable, "-c", "import time; time.sleep(60)"]
    popen = subprocess.Popen
    children: list[subprocess.Popen[str]] = []

    def hang(command: Any, **options: Any) -> Any:
        children.append(popen(stuck, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", hang)
    report = examine(machine)
    (finding,) = [f for f in report.findings if f.check == "D11"]
    assert finding.status == "skip"
    assert "no answer" in finding.measured
    assert time.monotonic() - started < 30
    assert all(child.poll() is not None for child in children)


def test_env_report_is_plain_and_quick() -> None:
    report = env_report()
    assert json.loads(json.dumps(report))["python"] == sys.version.split()[0]
    assert report["packages"]["torch"]
    assert isinstance(report["gpus"], list)
