"""The handle of the high-throughput calls: a plain tuple of tensors, and nothing besides.

Programs save it for backward, rebuild it, keep dozens alive, and use it with another Buffer than
the one that made it (after growing, say). So everything a call needs lies in the tensors. Where the
contract names an element, it is that; in the other places is what the native handle consists of:

| at | six, up to 8 ranks               | ten, beyond                                     |
|----|----------------------------------|-------------------------------------------------|
| 0  | rank_prefix_matrix int32 [R, R]  | is_token_in_rank                                |
| 1  | numbers int64, see `pack`        | numbers                                         |
| 2  | topk_idx int64 [T, K]            | topk_idx                                        |
| 3  | recv_src_idx int32 [N]           | send_row                                        |
| 4  | is_token_in_rank bool [T, R]     | rank_prefix_matrix                              |
| 5  | send_row int32 [T, K]            | recv_src_idx                                    |
| 6  |                                  | recv_gbl_rank_prefix_sum int32 [R], at -4       |
| 7  |                                  | recv_src_meta uint8 [N, 8]: source rank, token  |
| 8  |                                  | None                                            |
| 9  |                                  | None                                            |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm.compat.deep_ep.layout import RANKS_PER_NODE
from ep_comm.handle import META_SIZE, Handle, edit_meta, meta_index

_PLACES: Final = {  # number of tensors -> where numbers, topk_idx, send_row and recv_src_idx are
    6: (1, 2, 5, 3),
    10: (1, 2, 3, 5),
}
_GENERATION, _HIDDEN = meta_index("generation"), meta_index("hidden")
_NUM_RANKS, _NUM_EXPERTS = meta_index("num_ranks"), meta_index("num_experts")
_HAS_WEIGHTS = meta_index("has_weights")
_NUM_TOPK, _NUM_UNIQUE = meta_index("num_topk"), meta_index("num_unique")


def pack(recv: Any, topk_idx: Tensor, is_token_in_rank: Tensor, rank: int) -> tuple[Any, ...]:
    """The tuple for a fresh dispatch.

    `numbers` is meta [16], rank_counts [2 * R] and num_tokens_per_expert [El] of the native handle.

    Args:
        recv: Received with origins.
        topk_idx: as passed in; a caller may change it later, so it is copied.
    """
    handle: Handle = recv.handle
    prefix = recv.origins.rank_rows.cumsum(0, dtype=torch.int32)
    counts = handle.num_tokens_per_expert.to("cpu", torch.int64)
    numbers = torch.cat((handle.meta, handle.rank_counts.view(-1).cpu(), counts))
    numbers[_HAS_WEIGHTS] = 0  # they are not kept: nobody asks for them again
    ids = handle.topk_idx.clone() if handle.topk_idx is topk_idx else handle.topk_idx
    src_idx = handle.recv_src[:, 1].contiguous()
    if prefix.shape[0] <= RANKS_PER_NODE:
        return (prefix, numbers, ids, src_idx, is_token_in_rank, handle.send_row)
    src_meta = handle.recv_src.view(torch.uint8)
    column = prefix[:, rank].contiguous()
    ours = (numbers, ids, handle.send_row)
    return (is_token_in_rank, *ours, prefix, src_idx, column, src_meta, None, None)


class SavedRouting:
    """A handle as a caller gives it back: a tuple or list of the same tensors, old or rebuilt."""

    def __init__(self, handle: Sequence[Any]) -> None:
        places = _PLACES.get(len(handle)) if isinstance(handle, tuple | list) else None
        if places is None:
            raise ValueError(f"handle: got {_describe(handle)}, want what dispatch returned")
        self._numbers, self._topk_idx, self._send_row, self._src_idx = (handle[i] for i in places)
        if not isinstance(self._numbers, Tensor) or self._numbers.numel() < META_SIZE:
            raise ValueError(f"handle: element 1 is {_describe(self._numbers)}, want our numbers")
        self._fields: list[int] = self._numbers.tolist()
        self.num_experts = self._fields[_NUM_EXPERTS]

    def native(self, buffer: Any, hidden: int) -> Handle:
        """As a handle of `buffer`, with rows of `hidden` elements: rows do not depend on either."""
        fields, numbers = self._fields, self._numbers
        device = self._topk_idx.device
        meta, end = numbers[:META_SIZE], META_SIZE + 2 * fields[_NUM_RANKS]
        generation = buffer._backend.generation
        if fields[_GENERATION] != generation or fields[_HIDDEN] != hidden:
            meta = edit_meta(meta, generation=generation, hidden=hidden)
        weights, recv_row = _nothing(fields[_NUM_TOPK], device)
        return Handle(
            meta=meta,
            topk_idx=self._topk_idx,
            topk_weights=weights,
            send_row=self._send_row,
            # Compact rows are in the order of their sources, so nobody reads more than its size.
            recv_src=torch.empty((fields[_NUM_UNIQUE], 2), dtype=torch.int32, device=device),
            recv_row=recv_row,
            rank_counts=numbers[META_SIZE:end].view(2, -1).to(device),
            num_tokens_per_expert=numbers[end:].to(device, torch.int32),
        )


@cache
def _nothing(num_topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What compact handles hold of weights and of rows of selections."""
    return (
        torch.empty((0, num_topk), dtype=torch.float32, device=device),
        torch.empty((0, num_topk), dtype=torch.int32, device=device),
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)
