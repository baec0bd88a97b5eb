"""Finds ep_comm._core, and emulator._device, in the library that the build made for tests."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = ("ep_comm._core", "emulator._device")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / str(sys.implementation.cache_tag) / "tests" / "emulator"


def find() -> Path:
    """The one of this Python.

    Raises:
        FileNotFoundError: it has not been built.
    """
    files = (FOLDER / f"_core{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no emulator in {FOLDER}: `make emulator-test` builds it")
    return found


class Finder:
    def __init__(self, library: Path) -> None:
        self._library = library

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES:
            return None
        return importlib.util.spec_from_file_location(name, self._library)


def install(library: Path) -> None:
    """Let the modules be found there.

    Raises:
        RuntimeError: ep_comm has been imported with another core.
    """
    if "ep_comm._core" in sys.modules:
        raise RuntimeError("ep_comm has been imported before the emulator was put in place")
    sys.meta_path.insert(0, Finder(library))  # type: ignore[arg-type]
