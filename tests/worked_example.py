"""One small dispatch and combine, worked by hand; the reference and every backend answer to it.

4 ranks with 2 experts each, 4 tokens per rank, top-2. A token is a row filled with its value
rank * 4 + token + 1, so a misrouted row shows which one it is. Every number below was written down
from the routing, none was computed by the code it checks.

    rank, its experts    value: chosen experts (- = none)
    rank 0, 0 and 1       1: 0 2      2: 3 2      3: - 7      4: 4 1
    rank 1, 2 and 3       5: 2 2      6: 0 7      7: - -      8: 3 4
    rank 2, 4 and 5       9: 1 0     10: 7 3     11: 4 -     12: 2 7
    rank 3, 6 and 7      13: 0 4     14: 1 3     15: 6 7     16: 2 4

Edges in it: value 5 chooses expert 2 twice, value 7 goes nowhere, expert 5 receives nothing, values
2, 9 and 15 choose two experts of one rank, and expert 2 fills a slab of capacity 6 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_RANKS = 4
NUM_EXPERTS = 8
NUM_TOPK = 2
NUM_TOKENS = 4  # of every rank; also max_tokens
CAPACITY = 6  # of the slab

# Arguments of dispatch that go with the numbers below.
OPTIONS: dict[str, dict[str, Any]] = {
    "compact": {"layout": "compact", "row_index": True, "alignment": 2},
    "grouped": {"layout": "grouped", "alignment": 2},
    "slab": {"layout": "slab", "capacity": CAPACITY},
}

TOPK_IDX = [  # [rank][token][slot] global expert
    [[0, 2], [3, 2], [-1, 7], [4, 1]],
    [[2, 2], [0, 7], [-1, -1], [3, 4]],
    [[1, 0], [7, 3], [4, -1], [2, 7]],
    [[0, 4], [1, 3], [6, 7], [2, 4]],
]
WEIGHTS = [  # [rank][token][slot] in 1/32: the value in slot 0, the value + 16 in slot 1
    [[1, 17], [2, 18], [3, 19], [4, 20]],
    [[5, 21], [6, 22], [7, 23], [8, 24]],
    [[9, 25], [10, 26], [11, 27], [12, 28]],
    [[13, 29], [14, 30], [15, 31], [16, 32]],
]
WEIGHT_UNIT = 1 / 32


@dataclass(frozen=True)
class Rows:
    """What one rank receives in one layout, and the part of its handle that depends on the layout.

    Weights are in WEIGHT_UNIT. Slab rows are written per expert, without what lies past the count.
    """

    values: list[Any]  # compact [N], grouped [rows], slab [El][count]
    topk_idx: list[Any]  # local ids; compact [N][K], grouped [rows], slab [El][count]
    topk_weights: list[Any]  # like topk_idx
    send_row: list[list[int]]  # [T][K] rows of this rank's tokens at their owners
    recv_row: list[list[int]]  # [N][K], compact: empty
    offsets: list[int] | None = None
    row_index: list[int] | None = None


COMPACT = [
    Rows(  # rank 0, experts 0 and 1
        values=[1, 4, 6, 9, 13, 14],
        topk_idx=[[0, -1], [-1, 1], [0, -1], [1, 0], [0, -1], [1, -1]],
        topk_weights=[[1, 0], [0, 20], [6, 0], [9, 25], [13, 0], [14, 0]],
        send_row=[[0, 0], [1, 1], [-1, 0], [0, 1]],
        recv_row=[],
        offsets=[0, 4, 8],
        row_index=[0, 2, 3, 4, 1, 3, 5, -1],
    ),
    Rows(  # rank 1, experts 2 and 3
        values=[1, 2, 5, 8, 10, 12, 14, 16],
        topk_idx=[[-1, 0], [1, 0], [0, 0], [1, -1], [-1, 1], [0, -1], [-1, 1], [0, -1]],
        topk_weights=[[0, 17], [2, 18], [5, 21], [8, 0], [0, 26], [12, 0], [0, 30], [16, 0]],
        send_row=[[2, 2], [2, 1], [-1, -1], [3, 1]],
        recv_row=[],
        offsets=[0, 6, 10],
        row_index=[0, 1, 2, 2, 5, 7, 1, 3, 4, 6],
    ),
    Rows(  # rank 2, experts 4 and 5
        values=[4, 8, 11, 13, 16],
        topk_idx=[[0, -1], [-1, 0], [0, -1], [-1, 0], [-1, 0]],
        topk_weights=[[4, 0], [0, 24], [11, 0], [0, 29], [0, 32]],
        send_row=[[3, 3], [2, 4], [2, -1], [5, 3]],
        recv_row=[],
        offsets=[0, 6, 6],
        row_index=[0, 1, 2, 3, 4, -1],
    ),
    Rows(  # rank 3, experts 6 and 7
        values=[3, 6, 10, 12, 15],
        topk_idx=[[-1, 1], [-1, 1], [1, -1], [-1, 1], [0, 1]],
        topk_weights=[[0, 19], [0, 22], [10, 0], [0, 28], [15, 31]],
        send_row=[[4, 3], [5, 6], [4, 4], [7, 4]],
        recv_row=[],
        offsets=[0, 2, 8],
        row_index=[4, -1, 0, 1, 2, 3, 4, -1],
    ),
]

GROUPED = [
    Rows(
        values=[1, 6, 9, 13, 4, 9, 14, 0],
        topk_idx=[0, 0, 0, 0, 1, 1, 1, -1],
        topk_weights=[1, 6, 25, 13, 20, 9, 14, 0],
        send_row=[[0, 0], [6, 1], [-1, 2], [0, 4]],
        recv_row=[[0, -1], [-1, 4], [1, -1], [5, 2], [3, -1], [6, -1]],
        offsets=[0, 4, 8],
    ),
    Rows(
        values=[1, 2, 5, 5, 12, 16, 2, 8, 10, 14],
        topk_idx=[0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        topk_weights=[17, 18, 5, 21, 12, 16, 2, 8, 26, 30],
        send_row=[[2, 3], [1, 3], [-1, -1], [7, 1]],
        recv_row=[[-1, 0], [6, 1], [2, 3], [7, -1], [-1, 8], [4, -1], [-1, 9], [5, -1]],
        offsets=[0, 6, 10],
    ),
    Rows(
        values=[4, 8, 11, 13, 16, 0],
        topk_idx=[0, 0, 0, 0, 0, -1],
        topk_weights=[4, 24, 11, 29, 32, 0],
        send_row=[[5, 2], [4, 8], [2, -1], [4, 5]],
        recv_row=[[0, -1], [-1, 1], [2, -1], [-1, 3], [-1, 4]],
        offsets=[0, 6, 6],
    ),
    Rows(
        values=[15, 0, 3, 6, 10, 12, 15, 0],
        topk_idx=[0, -1, 1, 1, 1, 1, 1, -1],
        topk_weights=[15, 0, 19, 22, 10, 28, 31, 0],
        send_row=[[3, 3], [6, 9], [0, 6], [5, 4]],
        recv_row=[[-1, 2], [-1, 3], [4, -1], [-1, 5], [0, 6]],
        offsets=[0, 2, 8],
    ),
]

SLAB = [
    Rows(
        values=[[1, 6, 9, 13], [4, 9, 14]],
        topk_idx=[[0, 0, 0, 0], [1, 1, 1]],
        topk_weights=[[1, 6, 25, 13], [20, 9, 14]],
        send_row=[[0, 0], [6, 1], [-1, 6], [0, 6]],
        recv_row=[[0, -1], [-1, 6], [1, -1], [7, 2], [3, -1], [8, -1]],
    ),
    Rows(
        values=[[1, 2, 5, 5, 12, 16], [2, 8, 10, 14]],
        topk_idx=[[0, 0, 0, 0, 0, 0], [1, 1, 1, 1]],
        topk_weights=[[17, 18, 5, 21, 12, 16], [2, 8, 26, 30]],
        send_row=[[2, 3], [1, 7], [-1, -1], [7, 1]],
        recv_row=[[-1, 0], [6, 1], [2, 3], [7, -1], [-1, 8], [4, -1], [-1, 9], [5, -1]],
    ),
    Rows(
        values=[[4, 8, 11, 13, 16], []],
        topk_idx=[[0, 0, 0, 0, 0], []],
        topk_weights=[[4, 24, 11, 29, 32], []],
        send_row=[[7, 2], [8, 8], [2, -1], [4, 9]],
        recv_row=[[0, -1], [-1, 1], [2, -1], [-1, 3], [-1, 4]],
    ),
    Rows(
        values=[[15], [3, 6, 10, 12, 15]],
        topk_idx=[[0], [1, 1, 1, 1, 1]],
        topk_weights=[[15], [19, 22, 10, 28, 31]],
        send_row=[[3, 3], [8, 9], [0, 10], [5, 4]],
        recv_row=[[-1, 6], [-1, 7], [8, -1], [-1, 9], [0, 10]],
    ),
]
ROWS = {"compact": COMPACT, "grouped": GROUPED, "slab": SLAB}

# The rest of the handles is the same in all layouts.
COUNTS = [[4, 3], [6, 4], [5, 0], [1, 5]]  # [rank][local expert]
RECV_SRC = [  # [rank][row] source rank, source token
    [[0, 0], [0, 3], [1, 1], [2, 0], [3, 0], [3, 1]],
    [[0, 0], [0, 1], [1, 0], [1, 3], [2, 1], [2, 3], [3, 1], [3, 3]],
    [[0, 3], [1, 3], [2, 2], [3, 0], [3, 3]],
    [[0, 2], [1, 1], [2, 1], [2, 3], [3, 2]],
]
RANK_COUNTS = [  # [rank] tokens sent to, received from each rank
    [[2, 2, 1, 1], [2, 1, 1, 2]],
    [[1, 2, 1, 1], [2, 2, 2, 2]],
    [[1, 2, 1, 2], [1, 1, 1, 2]],
    [[2, 2, 2, 1], [1, 1, 2, 1]],
]

# Combine, after `experts` below: [rank][token].
COMBINED_COMPACT = [  # rank r returned r + 1 times the token
    [3, 4, 12, 16],  # 1 * (1 + 2), 2 * 2, 3 * 4, 4 * (1 + 3)
    [10, 30, 0, 40],  # 5 * 2 once: one row per rank; 6 * (1 + 4), nothing, 8 * (2 + 3)
    [9, 60, 33, 72],  # 9 * 1, 10 * (2 + 4), 11 * 3, 12 * (2 + 4)
    [52, 42, 60, 80],  # 13 * (1 + 3), 14 * (1 + 2), 15 * 4, 16 * (2 + 3)
]
COMBINED = [  # grouped, slab: expert e returned e + 1 times the token
    [4, 14, 24, 28],  # 1 * (1 + 3), 2 * (4 + 3), 3 * 8, 4 * (5 + 2)
    [30, 54, 0, 72],  # 5 * (3 + 3), 6 * (1 + 8), nothing, 8 * (4 + 5)
    [27, 120, 55, 132],  # 9 * (2 + 1), 10 * (8 + 4), 11 * 5, 12 * (3 + 8)
    [78, 84, 225, 128],  # 13 * (1 + 5), 14 * (2 + 4), 15 * (7 + 8), 16 * (3 + 5)
]
COMBINED_WEIGHTED = [  # in WEIGHT_UNIT
    [52, 124, 456, 240],  # 1 * (1 + 17*3), 2 * (2*4 + 18*3), 3 * 19*8, 4 * (4*5 + 20*2)
    [390, 1092, 0, 1216],  # 5 * (5*3 + 21*3), 6 * (6 + 22*8), nothing, 8 * (8*4 + 24*5)
    [387, 1840, 605, 3120],  # 9 * (9*2 + 25), 10 * (10*8 + 26*4), 11 * 11*5, 12 * (12*3 + 28*8)
    [2054, 2072, 5295, 3328],  # 13 * (13 + 29*5), 14 * (14*2 + 30*4), 15 * (15*7 + 31*8),
    #   16 * (16*3 + 32*5)
]
WEIGHTS_HOME = [  # what combine(topk_weights=recv.topk_weights) brings back, in WEIGHT_UNIT
    [[1, 17], [2, 18], [0, 19], [4, 20]],
    [[5, 21], [6, 22], [0, 0], [8, 24]],
    [[9, 25], [10, 26], [11, 0], [12, 28]],
    [[13, 29], [14, 30], [15, 31], [16, 32]],
]


def inputs(
    rank: int,
    *,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    idx_dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """x [4, hidden], topk_idx [4, 2] and topk_weights float32 [4, 2] of one rank."""
    values = [rank * 4 + token + 1 for token in range(NUM_TOKENS)]
    x = _filled(values, hidden, dtype, device)
    topk_idx = torch.tensor(TOPK_IDX[rank], dtype=idx_dtype, device=device)
    return x, topk_idx, torch.tensor(WEIGHTS[rank], device=device) * WEIGHT_UNIT


def experts(received: Any, rank: int) -> Tensor:
    """Expert results: compact x * (rank + 1); grouped, slab x * (global expert + 1)."""
    factor: Tensor | int = rank + 1
    if received.layout != "compact":
        factor = (2 * rank + received.topk_idx + 1).unsqueeze(-1)
    y: Tensor = (received.x.float() * factor).to(received.x.dtype)
    return y


def check_received(received: Any, rank: int, *, idx_dtype: torch.dtype = torch.int64) -> None:
    """Assert that a Received (of either sync mode) of this rank is what is written above."""
    layout = received.layout
    rows: Rows = ROWS[layout][rank]
    x = received.x
    hidden, device = x.shape[-1], x.device
    parts = [(x, received.topk_idx, received.topk_weights, rows.values, rows.topk_idx)]
    weights = [rows.topk_weights]
    if layout == "slab":
        assert x.shape == (2, CAPACITY, hidden)
        parts = [
            (x[e], received.topk_idx[e], received.topk_weights[e], rows.values[e], rows.topk_idx[e])
            for e in range(2)
        ]
        weights = rows.topk_weights
    for (got_x, got_idx, got_weights, values, idx), want_weights in zip(
        parts, weights, strict=True
    ):
        n = len(values)
        if layout != "slab" and not isinstance(received.num_recv, Tensor):
            assert got_x.shape[0] == n, (rank, got_x.shape, n)
        assert torch.equal(got_x[:n].float(), _filled(values, hidden, torch.float32, device)), rank
        assert got_idx.dtype == idx_dtype
        assert got_idx[:n].tolist() == idx, rank
        assert (got_idx[n:] == -1).all(), rank
        assert got_weights.dtype == torch.float32
        assert (got_weights[:n] / WEIGHT_UNIT).tolist() == want_weights, rank
        assert (got_weights[n:] == 0).all(), rank
    assert received.num_tokens_per_expert.dtype == torch.int32
    assert received.num_tokens_per_expert.tolist() == COUNTS[rank]
    assert int(received.num_recv) == len(RECV_SRC[rank])
    assert received.status.tolist() == [0]
    _check_list(received.offsets, rows.offsets)
    _check_list(received.row_index, rows.row_index)
    check_handle(received.handle, rank, layout)


def check_handle(handle: Sequence[Tensor], rank: int, layout: str) -> None:
    """Assert the handle of this rank; rows past the real count, in static mode, must be -1."""
    rows: Rows = ROWS[layout][rank]
    meta, topk_idx, topk_weights, send_row, recv_src, recv_row, rank_counts, counts = handle
    assert meta.tolist()[3] == ["compact", "grouped", "slab"].index(layout)
    assert topk_idx.dtype == torch.int64
    assert topk_idx.tolist() == TOPK_IDX[rank]
    assert (topk_weights / WEIGHT_UNIT).tolist() == WEIGHTS[rank]
    assert send_row.tolist() == rows.send_row
    assert rank_counts.tolist() == RANK_COUNTS[rank]
    assert counts.tolist() == COUNTS[rank]
    for tensor, want in ((recv_src, RECV_SRC[rank]), (recv_row, rows.recv_row)):
        assert tensor[: len(want)].tolist() == want, rank
        assert (tensor[len(want) :] == -1).all(), rank
    for tensor in (send_row, recv_src, recv_row, counts):
        assert tensor.dtype == torch.int32


def check_combined(
    out: Tensor, rank: int, layout: str, *, weighted: bool = False, bias: float = 0.0
) -> None:
    """Assert the result of combine(experts(...)) of this rank, with a bias filled with one number.

    Exact in every dtype: all sums are exact in fp32, and what is expected is rounded like them.
    """
    plain = COMBINED_COMPACT if layout == "compact" else COMBINED
    values: list[Any] = list(plain[rank])
    if weighted:
        values = [value * WEIGHT_UNIT for value in COMBINED_WEIGHTED[rank]]
    want = _filled([value + bias for value in values], out.shape[1], out.dtype, out.device)
    assert torch.equal(out, want), (rank, out[:, 0].tolist(), values)


def check_weights_home(weights: Tensor, rank: int) -> None:
    """Assert what combine(topk_weights=recv.topk_weights) returned to this rank."""
    assert weights.dtype == torch.float32
    assert (weights / WEIGHT_UNIT).tolist() == WEIGHTS_HOME[rank]


def _filled(
    values: Sequence[float], hidden: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """[len(values), hidden] with each row filled with its value."""
    column = torch.tensor(list(values), dtype=torch.float32, device=device).reshape(-1, 1)
    return column.expand(-1, hidden).to(dtype).contiguous()


def _check_list(tensor: Tensor | None, want: list[int] | None) -> None:
    """Assert an int32 list; a static one may go on with -1."""
    if want is None:
        assert tensor is None
        return
    assert tensor is not None
    assert tensor.dtype == torch.int32
    assert tensor[: len(want)].tolist() == want
    assert (tensor[len(want) :] == -1).all()
