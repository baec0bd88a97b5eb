"""How checks look at this machine: all they read goes through here, so tests can replace it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

LIMIT_S: Final = 5.0  # of all checks together
_MARGIN_S: Final = 0.4  # to end helpers and to print

NVIDIA_VENDOR: Final = "0x10de"


class Unavailable(Exception):
    """A check cannot run; the text says why."""


class Helper:
    """A Python process of ours that does one thing and prints JSON; it may hang or die."""

    def __init__(self, module: str, *args: str, stdin: str = "") -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; import ep_comm.doctor.{module} as helper"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"{code}; helper.main()", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # it and its children end together
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(stdin)
            self._process.stdin.close()
        self._process.stdin = None

    def result(self, limit_s: float) -> dict[str, Any]:
        """What it printed. Unavailable when that is no JSON, or does not come in time."""
        try:
            out, errors = self._process.communicate(timeout=max(0.05, limit_s))
        except subprocess.TimeoutExpired:
            raise Unavailable(f"no answer in {max(0.0, limit_s):.1f} s") from None
        finally:
            self.end()
        try:
            found: dict[str, Any] = json.loads(out)
        except ValueError:
            last = errors.strip().splitlines()[-1:] or [f"exit code {self._process.returncode}"]
            raise Unavailable(f"the probe failed: {last[0]}") from None
        return found

    def end(self) -> None:
        """Kill what is left of it, descendants included."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@dataclass
class Machine:
    """One look at a machine.

    Args:
        root: where /proc, /sys and /dev are.
        environ: environment variables; read, never written.
        gpus: ordinals or UUIDs to look at; none = all visible ones.
        look_only: do not use GPUs, only ask NVML about them.
        driver: what `driver.facts` returns. None: ask the driver, in a process of its own.
        share, selftest: answers of those helpers; None: start them.
        build: what `build_info()` returns.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    gpus: tuple[str, ...] = ()
    look_only: bool = False
    driver: Callable[[], dict[str, Any]] | None = None
    share: Callable[[], dict[str, Any]] | None = None
    selftest: Callable[[], dict[str, Any]] | None = None
    build: Callable[[], Mapping[str, Any]] | None = None
    started: float = field(default_factory=time.monotonic)
    limit_s: float = LIMIT_S
    _helpers: dict[str, Helper] = field(default_factory=dict)
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    # ---- files ----

    def read(self, path: str) -> str | None:
        """Text of a file below root, stripped; None when it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None

    def list(self, path: str) -> list[str]:
        try:
            return sorted(p.name for p in (self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []

    def real(self, path: str) -> str:
        return str((self.root / path.lstrip("/")).resolve())

    def has_nvidia_device(self) -> bool:
        """Whether the PCI bus or the driver shows an NVIDIA GPU, even if nothing can use it."""
        classes = ("0x0300", "0x0302")
        on_bus = any(
            self.read(f"/sys/bus/pci/devices/{name}/vendor") == NVIDIA_VENDOR
            and (self.read(f"/sys/bus/pci/devices/{name}/class") or "").startswith(classes)
            for name in self.list("/sys/bus/pci/devices")
        )
        return on_bus or (self.root / "dev/nvidiactl").exists()

    # ---- helpers ----

    def left_s(self) -> float:
        return self.limit_s - _MARGIN_S - (time.monotonic() - self.started)

    def start(self, module: str, stdin: str = "") -> None:
        """Begin a helper now, so that it runs beside the other checks."""
        args = ("--nvml",) if self.look_only else self.gpus
        self._helpers[module] = Helper(module, *(args if module == "driver" else ()), stdin=stdin)

    def answer(self, module: str) -> dict[str, Any]:
        """What a helper found; asked once, kept."""
        replaced: Callable[[], dict[str, Any]] | None = getattr(self, module)
        if module not in self._facts:
            if replaced is not None:
                self._facts[module] = replaced()
            else:
                if module not in self._helpers:
                    self.start(module)
                self._facts[module] = self._helpers.pop(module).result(self.left_s())
        return self._facts[module]

    def build_info(self) -> Mapping[str, Any]:
        """ImportError when the core is missing."""
        if self.build is not None:
            return self.build()
        from ep_comm._build_info import build_info

        return build_info()

    def close(self) -> None:
        for helper in self._helpers.values():
            helper.end()
        self._helpers.clear()

    # ---- GPUs ----

    def nvml(self) -> dict[str, Any]:
        """NVML's facts; Unavailable says why there are none."""
        return self._library("nvml")

    def cuda(self) -> dict[str, Any]:
        return self._library("cuda")

    def _library(self, name: str) -> dict[str, Any]:
        if not self.has_nvidia_device() and self.driver is None:
            raise Unavailable("this machine has no NVIDIA GPU")
        found: dict[str, Any] = self.answer("driver")[name]
        if found["error"] is not None:
            title = {"nvml": "NVML", "cuda": "libcuda"}[name]
            raise Unavailable(f"{title}: {found['error']}")
        return found
