"""The library of ops, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm.checks import ROW_ALIGN

_lib: Final[Any] = torch.library.Library("ep_comm", "DEF")  # type: ignore[no-untyped-call]

# A handle as arguments; `weights` is its topk_weights.
HANDLE: Final = (
    "Tensor meta, Tensor idx, Tensor weights, Tensor send_row, Tensor recv_src, Tensor recv_row, "
    "Tensor rank_counts, Tensor num_tokens_per_expert"
)


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Make an op of these: what it does, its shapes, what its gradient keeps and is."""
    name = schema.partition("(")[0]
    _lib.define(schema)
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ep_comm::{name}", fake, lib=_lib)
    op = getattr(torch.ops.ep_comm, name).default
    _lib.impl(name, _differentiable(name, op, keep, gradient), "Autograd")


def _differentiable(
    name: str,
    op: Callable[..., Any],
    keep: Callable[..., None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes, too, with the same arguments. That one reads the
    schema again on every call: 222 us to record 17 arguments (torch 2.13), with this 48."""

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        results = below(*args)
        keep(ctx, args, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function: Any = type(f"ep_comm_{name}", (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return below(*args)

    return call


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy that dispatch takes: gradients, and what a compiler makes, may be any view."""
    if x.dim() == 2 and (x.stride(1) != 1 or x.stride(0) * x.itemsize % ROW_ALIGN):
        x = x.contiguous()
    return aligned(x)


def dense(x: Tensor) -> Tensor:
    """x, or a copy that combine takes."""
    return aligned(x.contiguous())


def aligned(x: Tensor) -> Tensor:
    return x if x.numel() == 0 or x.data_ptr() % ROW_ALIGN == 0 else x.clone()


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A result that an option may leave out."""
    return like.new_empty(0) if tensor is None else tensor


def count(number: int | Tensor, like: Tensor) -> Tensor:
    """Received.num_recv as int32 [1], whatever the mode."""
    if isinstance(number, Tensor):
        return number
    return torch.full((1,), number, dtype=torch.int32, device=like.device)


def new_size(most: int | None = None) -> int:
    """In a fake implementation: a size that depends on what arrives. It acts like an int."""
    size: Any = torch.library.get_ctx().new_dynamic_size(max=most)
    return size  # type: ignore[no-any-return]
