"""What a dispatch returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ep_comm.handle import Handle


@dataclass
class Origins:
    """Who sent what, with `origins=True`: R ranks, El local experts here."""

    rank_ends: Tensor | None  # int32 [R, R] where the tokens of each source (row) end among those
    #   a rank (column) receives: inclusive prefix sums; the last row is everybody's num_recv;
    #   only in compact
    row_token: Tensor  # int32 [rows] or [El, capacity]: source token of each row, -1 in padding
    source_range: Tensor | None  # int64 [El, R] rows of each source in each group: first << 32 | n,
    #   first counted from the start of the group; not in compact


@dataclass
class Promised:
    """Tensors that a begun dispatch will return and fill, already there; fields as in Received."""

    x: Tensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    scales: Tensor | None
    num_tokens_per_expert: Tensor
    origins: Origins | None


@dataclass
class Received:
    """Tokens that arrived at one rank, in one of three layouts, and the handle to answer with.

    N unique tokens arrived here (each at most once per rank), El local experts, K top-k, H hidden,
    S scale words per token. Expert ids in here are LOCAL ids; -1 means "not here" or padding.

    | field        | compact     | grouped           | slab                                  |
    |--------------|-------------|-------------------|---------------------------------------|
    | x            | [N, H]      | [rows, H]         | [El, capacity, H]                     |
    | topk_idx     | [N, K]      | [rows]            | [El, capacity]                        |
    | topk_weights | [N, K]      | [rows]            | [El, capacity]                        |
    | scales       | [N, S]      | [rows, S]         | [El, capacity, S], column-major       |
    | offsets      | [El + 1] *  | [El + 1]          | None                                  |
    | row_index    | [rows] *    | None              | None                                  |

    (*) only with `row_index=True`. Compact rows are ordered by (source rank, source token); grouped
    rows by local expert, then (source rank, source token, slot), each group padded to a multiple of
    the alignment, padding zero in x and scales; slab rows as grouped, from 0 in each expert. With
    `sync=False` shapes are static: rows past the real count have id -1 and weight 0, their x is
    unspecified, as is slab x past an expert's count.
    """

    x: Tensor  # as sent, or float8_e4m3fn when quantized on the way
    topk_idx: Tensor | None  # dtype of the topk_idx given; None for a cached dispatch
    topk_weights: Tensor | None  # float32, 0 where topk_idx is -1; None when none were given
    scales: Tensor | None  # float32, or int32 of four ue8m0 exponents
    #   slab: strides (S * capA, 1, capA), capA = capacity rounded up to 4
    num_tokens_per_expert: Tensor  # int32 [El], selections; a duplicate counts twice
    num_recv: int | Tensor  # N; int32 [1] with sync=False
    offsets: Tensor | None  # int32 [El + 1] group starts; offsets[El] = rows, padding included
    row_index: Tensor | None  # int32 [rows] compact row of every grouped row, -1 in padding
    status: Tensor  # int32 [1], 0 = ok, else the number of the error code (213, 230, ...)
    handle: Handle
    layout: str  # "compact", "grouped" or "slab"
    origins: Origins | None = None  # only with origins=True

    @property
    def counts(self) -> list[int]:
        """`num_tokens_per_expert` on the host; waits for the device that holds it."""
        counts: list[int] = self.num_tokens_per_expert.tolist()
        return counts

    def use_on(self, stream: Any) -> None:
        """Declare that `stream`, too, uses these tensors: their memory is reused only after it.

        Nothing to do for tensors on the CPU. A backend whose outputs are not ordinary torch memory
        returns a subclass that does what `record_stream` cannot.
        """
        for field in (*vars(self).values(), *self.handle):
            if isinstance(field, Tensor) and field.is_cuda:
                field.record_stream(stream)
