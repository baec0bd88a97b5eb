"""The driver calls of `ep-comm doctor`, for real, against a libcuda of two GPUs in host memory.

The stand-in is a shared library with the prototypes of the CUDA driver API, and doctor's helper
loads it as it loads the real one: a process of its own, ctypes, a second process that maps what it
is sent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_doctor import fake, only

from ep_comm.doctor import driver, gpu_checks, host_checks

SOURCE = Path(__file__).with_name("libcuda_stand_in.c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in lies as libcuda.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    place = tmp_path_factory.mktemp("libcuda")
    flags = ("-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run([compiler, *flags, "-o", place / "libcuda.so.1", SOURCE], check=True)
    return place


def probe(folder: Path, fault: str = "", *gpus: str) -> dict[str, Any]:
    """What the helper finds; it has to end clean, whatever fails."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA": fault}
    done = subprocess.run(
        [sys.executable, driver.__file__, *gpus],
        env=environ, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stderr == ""  # nothing was left behind
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["cuda"]["error"] is None
    return facts


def test_two_sound_gpus_pass(folder: Path, tmp_path: Path) -> None:
    facts = probe(folder)
    assert [gpu["capability"] for gpu in facts["cuda"]["gpus"]] == [[9, 0], [9, 0]]
    machine = fake(tmp_path, driver=lambda: facts)
    (pair,) = gpu_checks.d3(machine)
    assert (pair.status, "write test passed" in pair.measured) == ("ok", True)
    assert only(host_checks.d4(machine), "GPU memory").status == "ok"
    assert [f.status for f in gpu_checks.d7(machine)] == ["ok"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no_access", "write test failed (cuCtxEnablePeerAccess: CUDA_ERROR_NOT_PERMITTED)"),
        ("no_access", "no peer access"),
        ("no_atomics", "no native atomics"),
        ("corrupt", "write test failed (other bytes came back)"),
    ],
)
def test_pair_that_does_not_work_is_told(
    folder: Path, tmp_path: Path, fault: str, said: str
) -> None:
    facts = probe(folder, fault)
    (pair,) = gpu_checks.d3(fake(tmp_path, driver=lambda: facts))
    assert (pair.status, pair.code) == ("warn", "E404")
    assert said in pair.measured


def test_both_directions_are_tried(folder: Path) -> None:
    (pair,) = probe(folder, "corrupt")["cuda"]["pairs"]
    assert [copy["ok"] for copy in pair["copied"]] == [False, True]  # GPU 1 loses a bit


def test_memory_that_cannot_be_shared_is_told(folder: Path, tmp_path: Path) -> None:
    facts = probe(folder, "no_share no_fabric")
    assert facts["cuda"]["vmm"][0]["detail"] == (
        "cuMemExportToShareableHandle: CUDA_ERROR_NOT_PERMITTED"
    )
    assert facts["cuda"]["fabric"][0]["detail"] == "cuMemCreate: CUDA_ERROR_NOT_PERMITTED"
    machine = fake(tmp_path, driver=lambda: facts)
    memory = only(host_checks.d4(machine), "GPU memory")
    assert (memory.status, memory.code) == ("fail", "E405")


@pytest.mark.parametrize("which", ["1", "GPU-1111"])
def test_only_the_gpus_asked_for_are_touched(folder: Path, which: str) -> None:
    cuda = probe(folder, "", which)["cuda"]
    assert [gpu["ordinal"] for gpu in cuda["gpus"]] == [1]
    assert cuda["pairs"] == []
