"""The denominator: plain copies of as many rows of as many bytes as an operation moves.

A copy reads each of `rows` different source rows once and writes each of `rows` different
destination rows once; both lie in this rank's own touched memory. Nothing is routed, counted,
announced or added. The fastest of the row-by-row copies is the one that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

PER_ROUND: Final = 3  # with five rounds the best of 15
ROW_BY_ROW: Final = ("index_select", "memmove")
# Beside them, for information: one call for all rows, which no routing can use.
METHODS: Final = (*ROW_BY_ROW, "block")


def make_copies(rows: int, row_bytes: int) -> dict[str, Callable[[], object]]:
    """A function per method. index_select: torch. memmove: numpy's take, a C memmove per row."""
    assert row_bytes % 8 == 0
    src = torch.randint(0, 255, (rows, row_bytes // 8), dtype=torch.int64)  # written: touched
    dst = torch.full_like(src, 1)
    index = torch.arange(rows)
    src_np, dst_np, index_np = src.numpy(), dst.numpy(), index.numpy()
    return {
        "index_select": lambda: torch.index_select(src, 0, index, out=dst),
        # mode="clip" writes straight into `out`; the default goes through a temporary.
        "memmove": lambda: np.take(src_np, index_np, axis=0, out=dst_np, mode="clip"),
        "block": lambda: np.copyto(dst_np, src_np),
    }


def fastest(times_us: dict[str, float]) -> tuple[str, float]:
    """Of the row-by-row copies."""
    method = min(ROW_BY_ROW, key=times_us.__getitem__)
    return method, times_us[method]
