"""Bit-exact comparison of what a backend returned with what the reference returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Received

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTS[tensor.element_size()])


def same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal dtype, shape and bits: -0.0 is not 0.0, and a NaN is only itself."""
    assert got.dtype == want.dtype, (what, got.dtype, want.dtype)
    assert got.shape == want.shape, (what, list(got.shape), list(want.shape))
    _none(bits(got) != bits(want), got, want, what)


def _none(different: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    if different.any():
        first = different.nonzero()[:4]
        pairs = [(i.tolist(), got[tuple(i)].item(), want[tuple(i)].item()) for i in first]
        raise AssertionError(f"{what}: {int(different.sum())} differ, at (got, want): {pairs}")


def same_values(got: Tensor, want: Tensor, what: str = "") -> None:
    """As same_bits for results of arithmetic, where one NaN is as good as another."""
    assert got.dtype == want.dtype, (what, got.dtype, want.dtype)
    assert got.shape == want.shape, (what, list(got.shape), list(want.shape))
    got_nan, want_nan = got.float().isnan(), want.float().isnan()
    different = (got_nan != want_nan) | ((bits(got) != bits(want)) & ~want_nan)
    _none(different, got, want, what)


def same_received(
    got: Received, want: Received, *, generation: int = 0, computed: bool = False
) -> None:
    """All that is specified of a Received; computed: a NaN in x or scales may be any NaN."""
    same = same_values if computed else same_bits
    assert got.layout == want.layout
    assert got.status.tolist() == want.status.tolist()
    assert got.status.dtype == torch.int32
    same_bits(got.num_tokens_per_expert, want.num_tokens_per_expert, "num_tokens_per_expert")
    assert type(got.num_recv) is type(want.num_recv)
    assert int(got.num_recv) == int(want.num_recv)
    if isinstance(got.num_recv, Tensor):
        assert got.num_recv.dtype == torch.int32
        assert got.num_recv.shape == (1,)
    for name in ("offsets", "row_index", "topk_idx", "topk_weights"):
        _same_optional(getattr(got, name), getattr(want, name), name, same_bits)
    assert (got.origins is None) == (want.origins is None)
    if got.origins is not None and want.origins is not None:
        for name in ("rank_ends", "row_token", "source_range"):
            _same_optional(getattr(got.origins, name), getattr(want.origins, name), name, same_bits)
    assert got.x.shape == want.x.shape, ("x", got.x.shape, want.x.shape)
    assert got.x.dtype == want.x.dtype
    assert (got.scales is None) == (want.scales is None)
    for index in specified_rows(want):
        same(got.x[index], want.x[index], f"x {index}")
        if got.scales is not None and want.scales is not None:
            same(got.scales[index], want.scales[index], f"scales {index}")
    if got.scales is not None and want.scales is not None:
        assert got.scales.dtype == want.scales.dtype
        if min(got.scales.shape) > 0 and got.scales.shape[0] > 1:
            assert got.scales.stride() == want.scales.stride(), "strides of scales"
    same_handle(got.handle, want.handle, generation=generation)


def same_handle(got: Handle, want: Handle, *, generation: int = 0) -> None:
    assert type(got) is Handle
    meta = want.meta.clone()
    if generation:
        meta[1] = generation
    assert got.meta.tolist() == meta.tolist()
    for name, a, b in list(zip(Handle._fields, got, want, strict=True))[1:]:
        same_bits(a, b, f"handle.{name}")


def specified_rows(want: Received) -> list[Any]:
    """Indices of the rows whose content is specified: a static x goes on with anything."""
    if want.layout == "slab":
        return [(e, slice(0, n)) for e, n in enumerate(want.num_tokens_per_expert.tolist())]
    if HandleMeta.unpack(want.handle.meta).sync:
        return [slice(None)]
    if want.layout == "compact":
        return [slice(0, int(want.num_recv))]
    assert want.offsets is not None
    return [slice(0, int(want.offsets[-1]))]


def _same_optional(got: Tensor | None, want: Tensor | None, what: str, same: Any) -> None:
    assert (got is None) == (want is None), (what, got, want)
    if got is not None and want is not None:
        same(got, want, what)
