"""pytest --emulator: tests marked gpu run on the emulator, the others not at all."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Generator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import ranks

from emulator import library
from emulator.lacks import LACKS, SLOW


class Emulator:
    """Puts it in place while pytest runs; what it lacks is the reason why a test is skipped."""

    def __init__(self, config: pytest.Config) -> None:
        # A signal waits until the core returns; what hangs there is ended from another thread.
        config.option.timeout_method = config.option.timeout_method or "thread"
        try:
            library.install(library.find())
        except FileNotFoundError as missing:
            raise pytest.UsageError(f"--emulator: {missing}") from missing
        tests, path = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, path)))  # of ranks' server
        ranks.preload("emulator.process")
        from emulator import torch_cuda

        self._torch_cuda = torch_cuda
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(torch_cuda.in_place())

    def pytest_sessionstart(self) -> None:
        # Stacks of all threads, as pytest has them, would hide the line that says what happened.
        faulthandler.enable(sys.__stderr__, all_threads=False)

    def pytest_unconfigure(self) -> None:
        self._stack.close()

    def pytest_report_header(self) -> str:
        return "emulator: runs tests marked gpu, and only those; what it lacks is why others skip"

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
        for item in items:
            if (reason := why_not(item)) is not None:
                item.add_marker(pytest.mark.skip(reason=f"emulator: {reason}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        try:
            return (yield)
        finally:
            self._torch_cuda.forget()


def why_not(item: pytest.Item) -> str | None:
    """What the emulator lacks for a test; None: nothing."""
    name = item.nodeid.removeprefix("tests/")
    for reason, patterns in LACKS.items():
        if any(is_meant(name, pattern) for pattern in patterns):
            return reason
    if not item.config.option.slow and any(is_meant(name, pattern) for pattern in SLOW):
        return "it takes long: runs with --slow"
    return None


def is_meant(name: str, pattern: str) -> bool:
    meant = name if "[" in pattern else name.partition("[")[0]
    return fnmatchcase(meant, pattern.replace("[", "[[]"))
