"""Puts the emulator in place for good: imported by the server that forks rank processes."""

from __future__ import annotations

from emulator import library

library.install(library.find())

from emulator import torch_cuda  # noqa: E402

_in_place = torch_cuda.in_place()
_in_place.__enter__()
