"""Tests that need hardware skip with the reason: every run lists what it did not check."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Literal

import pytest
from hypothesis import settings

# Examples take what they take: a shared CI core is no reason to fail one. CI runs the same ones
# each time, so that a red run there is red here.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--emulator",
        action="store_true",
        help="run tests marked gpu, and only those, on kernels that a CPU runs",
    )
    parser.addoption(
        "--fault-matrix",
        action="store_true",
        help="run the fault matrix, record it, write the table in docs/reliability.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.emulator:
        from emulator.plugin import Emulator

        config.pluginmanager.register(Emulator(config))
    if config.option.fault_matrix:
        from fault_matrix import Recorder

        config.pluginmanager.register(Recorder())


def _missing(key: Literal["cuda_missing", "nvshmem_missing"]) -> str | None:
    from ep_comm import build_info

    try:
        return build_info()[key]
    except ImportError as error:
        return str(error)


@functools.cache
def no_gpus(num_gpus: int) -> str | None:
    """Why tests that need this many GPUs cannot run here; None when they can."""
    if (missing := _missing("cuda_missing")) is not None:
        return f"ep_comm has no CUDA kernels: {missing}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if have < num_gpus:
        return f"needs {num_gpus} CUDA GPU{'s' if num_gpus > 1 else ''}, this machine has {have}"
    return None


@functools.cache
def no_nvshmem() -> str | None:
    if (missing := _missing("nvshmem_missing")) is not None:
        return f"ep_comm has no NVSHMEM plugin: {missing}"
    if importlib.util.find_spec("nvidia") is None or not importlib.util.find_spec("nvidia.nvshmem"):
        return "NVSHMEM is not installed: pip install 'ep-comm[nvshmem]'"
    return None


def no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer was not found"
    return None


def reason_to_skip(item: pytest.Item) -> str | None:
    """The first thing this test needs and does not have."""
    slow = item.config.getoption("--slow")
    one_gpu = any(item.get_closest_marker(name) for name in ("gpu", "nvshmem", "sanitizer"))
    num_gpus = max([int(one_gpu), *(mark.args[0] for mark in item.iter_markers("gpus"))])
    if num_gpus > 0 and (reason := no_gpus(num_gpus)):
        return reason
    if item.get_closest_marker("nvshmem") and (reason := no_nvshmem()):
        return reason
    if item.get_closest_marker("sanitizer") and (reason := no_sanitizer()):
        return reason
    if not slow and (item.get_closest_marker("slow") or item.get_closest_marker("sanitizer")):
        return "slow: runs with --slow"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := reason_to_skip(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
