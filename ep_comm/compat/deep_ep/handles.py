"""The handle of the high-throughput calls: a plain tuple of tensors, and nothing besides.

Programs save it for backward, rebuild it, keep dozens alive, and use it with another Buffer than
the one that made it (after growing, say). So everything a call needs lies in the tensors. Where the
contract names an element, it is that; in the other places is what the native handle consists of:

| at | six, up to 8 ranks                | ten, beyond, or where something crossed to here |
|----|-----------------------------------|-------------------------------------------------|
| 0  | rank_prefix_matrix int32 [R, R]   | is_token_in_rank bool [T, R]                    |
| 1  | meta int64 [16]                   | meta                                            |
| 2  | rank_counts int64 [2, R]          | rank_counts                                     |
| 3  | recv_src_idx int32 [N]            | topk_idx                                        |
| 4  | topk_idx int64 [T, K]             | send_row                                        |
| 5  | send_row int32 [T, K]             | recv_src_idx                                    |
| 6  |                                   | recv_gbl_rank_prefix_sum int32 [R], at -4       |
| 7  |                                   | recv_src_meta uint8 [N, 8]: source rank, token  |
| 8  |                                   | across nodes what crossed to here; else None    |
| 9  |                                   | None                                            |

Nothing here is copied: a call costs two tensors more than the native one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm.compat.deep_ep.layout import RANKS_PER_NODE, dispatch_layout
from ep_comm.compat.deep_ep.natives import Natives
from ep_comm.handle import MAGIC, META_SIZE, edit_meta, meta_index

_PLACES: Final = {  # number of tensors -> where meta, rank_counts, topk_idx and send_row are
    6: (1, 2, 4, 5),
    10: (1, 2, 3, 4),
}
_CROSSED: Final = 8
_GENERATION, _HIDDEN = meta_index("generation"), meta_index("hidden")
_NUM_TOKENS, _NUM_UNIQUE = meta_index("num_tokens"), meta_index("num_unique")
_NUM_TOPK, _HAS_WEIGHTS = meta_index("num_topk"), meta_index("has_weights")
_NOTHING: Final = (None,) * 7  # in place of what `pack` keeps
_NUM_EXPERTS, _NUM_LOCAL = meta_index("num_experts"), meta_index("num_local_experts")


def pack(
    recv: Any, topk_idx: Tensor, is_token_in_rank: Tensor | None, rank: int
) -> tuple[Any, ...]:
    """The tuple for a fresh dispatch.

    Args:
        recv: Received with origins.
        topk_idx: as passed in; a caller may change it later, so where the native handle has no ids
            of its own, they are copied.
        is_token_in_rank: as passed in, or None.
    """
    handle, origins = recv.handle, recv.origins
    ids = handle.topk_idx
    if ids is topk_idx:
        ids = ids.clone()
    handle.meta.ep_comm_kept = (ids, *handle[2:])  # a short cut for `restore`, nothing more
    prefix = origins.rank_ends
    crossed = handle.recv_row if handle.recv_row.shape[0] > 0 else None  # of compact rows
    if prefix.shape[0] <= RANKS_PER_NODE and crossed is None:
        return (prefix, handle.meta, handle.rank_counts, origins.row_token, ids, handle.send_row)
    if is_token_in_rank is None:
        num_experts, num_ranks = int(handle.meta[_NUM_EXPERTS]), prefix.shape[0]
        is_token_in_rank = dispatch_layout(ids, num_experts, num_ranks).is_token_in_rank
    ours = (handle.meta, handle.rank_counts, ids, handle.send_row)
    column, src_meta = prefix[:, rank].contiguous(), handle.recv_src.view(torch.uint8)
    return (is_token_in_rank, *ours, origins.row_token, column, src_meta, crossed, None)


def restore(
    handle: Sequence[Any], natives: Natives, hidden: int, device: torch.device
) -> tuple[Any, tuple[Tensor, ...]]:
    """The native buffer for a handle that a caller gives back, and the tensors of its own one.

    Args:
        handle: a tuple or list of the same tensors as `pack` made, or of equal ones.
        hidden: elements of a row in this call; rows do not depend on it.
    """
    places = _PLACES.get(len(handle)) if isinstance(handle, tuple | list) else None
    if places is None:
        raise ValueError(f"handle: got {_describe(handle)}, want what dispatch returned")
    at_meta, at_counts, at_idx, at_row = places
    meta, rank_counts, topk_idx = handle[at_meta], handle[at_counts], handle[at_idx]
    send_row = handle[at_row]
    fields = _fields(meta)
    native = natives.get(hidden, fields[_NUM_EXPERTS], device)
    generation = native._backend.generation
    kept = getattr(meta, "ep_comm_kept", _NOTHING)
    if kept[0] is not topk_idx or kept[2] is not send_row or kept[5] is not rank_counts:
        try:
            crossed = handle[_CROSSED] if len(handle) == 10 else None
            kept = _rebuild(fields, topk_idx, send_row, rank_counts, crossed)
        except (AttributeError, RuntimeError, TypeError) as error:  # no tensors, impossible sizes
            raise ValueError(f"handle: want what dispatch returned ({error})") from None
    if fields[_GENERATION] != generation or fields[_HIDDEN] != hidden:
        meta = edit_meta(meta, generation=generation, hidden=hidden)
    return native, (meta, *kept)


def _fields(meta: Any) -> list[int]:
    """The numbers of a native handle, once they are seen to be those of one."""
    if not isinstance(meta, Tensor) or meta.dtype is not torch.int64 or meta.dim() != 1:
        raise ValueError(f"handle: element 1 is {_describe(meta)}, want int64 [{META_SIZE}]")
    fields: list[int] = meta.tolist()
    if len(fields) != META_SIZE or fields[0] != MAGIC:
        got = f"{len(fields)} numbers" if len(fields) != META_SIZE else f"{fields[0]:#x}"
        raise ValueError(f"handle: element 1 holds {got}, want {META_SIZE} from {MAGIC:#x} on")
    return fields


def _rebuild(
    fields: Sequence[int],
    topk_idx: Tensor,
    send_row: Tensor,
    rank_counts: Tensor,
    crossed: Tensor | None,
) -> tuple[Tensor, ...]:
    """What follows meta in the native handle, from copies of the tensors we gave out."""
    num_weights = fields[_NUM_TOKENS] if fields[_HAS_WEIGHTS] else 0
    weights, recv_row, counts = _unread(
        num_weights, fields[_NUM_TOPK], fields[_NUM_LOCAL], send_row.device
    )
    # Compact rows are in the order of their sources, so nobody reads more than its size.
    recv_src = send_row.new_empty(fields[_NUM_UNIQUE], 2)
    rows = recv_row if crossed is None else crossed
    return (topk_idx, weights, send_row, recv_src, rows, rank_counts, counts)


@lru_cache(maxsize=16)
def _unread(
    num_weights: int, num_topk: int, num_local: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What combine and a cached dispatch of compact rows only measure: weights, rows, counts."""
    return (
        torch.empty((num_weights, num_topk), dtype=torch.float32, device=device),
        torch.empty((0, num_topk), dtype=torch.int32, device=device),
        torch.zeros(num_local, dtype=torch.int32, device=device),
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)
