"""The library of ops: how one is made of a table of its arguments and one of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from ep_comm.checks import ROW_ALIGN
from ep_comm.handle import Handle

# What the fields of a table may be, and what a schema calls it.
Size = int  # or a symbol, in a graph
Sizes = list[int]
_SCHEMA_TYPES: Final = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "int": "int",
    "int | None": "int?",
    "str": "str",
    "str | None": "str?",
    "Size | None": "SymInt?",
    "Sizes": "SymInt[]",
}

_lib: Final[Any] = torch.library.Library("ep_comm", "DEF")  # type: ignore[no-untyped-call]


def _make_turn() -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int64)


# In a graph every op reads it, and something that claims to write to it comes between two ops: so
# compilers keep them in the order of the program. Left to itself, inductor orders ops that share no
# data by the sizes of tensors, which differ between ranks. Outside of graphs ops get None.
TURN: Final = _make_turn()
_lib.define("pass_turn(Tensor(a!) turn, Tensor after) -> ()")
_lib.impl("pass_turn", lambda turn, after: None, "CompositeExplicitAutograd")
torch.library.register_fake("ep_comm::pass_turn", lambda turn, after: None, lib=_lib)


def in_turn(op: Any, turn: Tensor | None, *args: Any) -> Any:
    """Call an op; what comes later with the same `turn` comes after it, in a graph, too."""
    results = op(turn, *args)
    if turn is not None:
        torch.ops.ep_comm.pass_turn(turn, results[-1].detach())
    return results


def handle_of(args: Any) -> Handle:
    """The handle among the arguments of an op: eight fields; `weights` is its topk_weights."""
    first = args._fields.index("meta")
    return Handle(*args[first : first + len(Handle._fields)])


A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R", bound=tuple[Any, ...])
Gradients = dict[str, Tensor | None]


def define(
    name: str,
    arguments: type[A],
    results: type[R],
    *,
    run: Callable[[A], R],
    fake: Callable[[A], R],
    keep: Callable[[Any, A, R], None],
    gradient: Callable[[Any, set[str], R], Gradients],
) -> None:
    """Make an op of these tables and functions.

    Args:
        arguments, results: what it takes and returns; its schema is made of them.
        run: what it does. fake: the shapes of that.
        keep: takes what `gradient` needs into a context. gradient: by name of an argument, from
            the names of those that need one and the gradients of the results.
    """
    fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
    made: Any = arguments._make  # type: ignore[attr-defined]
    made_results: Any = results._make  # type: ignore[attr-defined]
    _lib.define(f"{name}({_listed(arguments)}) -> ({_listed(results)})")
    _lib.impl(name, lambda *given: run(made(given)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ep_comm::{name}", lambda *given: fake(made(given)), lib=_lib)
    op = getattr(torch.ops.ep_comm, name).default

    def of_arguments(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = {field for field, n in zip(fields, ctx.needs_input_grad, strict=True) if n}
        found = gradient(ctx, needed, made_results(grads))
        return tuple(found.get(field) if field in needed else None for field in fields)

    def remember(ctx: Any, given: tuple[Any, ...], returned: Any) -> None:
        keep(ctx, made(given), made_results(returned))

    _lib.impl(name, _differentiable(name, op, remember, of_arguments), "Autograd")


def _listed(table: type[Any]) -> str:
    """The fields of a NamedTuple as a schema lists them."""
    hints: dict[str, Any] = table.__annotations__  # as they are written, or wrapped once
    types = (_SCHEMA_TYPES[getattr(hint, "__forward_arg__", hint)] for hint in hints.values())
    return ", ".join(f"{kind} {field}" for kind, field in zip(types, hints, strict=True))


def _differentiable(
    name: str,
    op: Callable[..., Any],
    keep: Callable[[Any, tuple[Any, ...], Any], None],
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
    if not _is_plain(x):
        return x
    if x.dim() == 2 and (x.stride(1) != 1 or x.stride(0) * x.itemsize % ROW_ALIGN):
        x = x.contiguous()
    return aligned(x)


def dense(x: Tensor) -> Tensor:
    """x, or a copy that combine takes."""
    return aligned(x.contiguous()) if _is_plain(x) else x


def aligned(x: Tensor) -> Tensor:
    return x if x.numel() == 0 or x.data_ptr() % ROW_ALIGN == 0 else x.clone()


def _is_plain(x: Tensor) -> bool:
    """Whether it has strides and an address; what has none is left to the checks of the buffer."""
    return x.layout is torch.strided and not x.is_nested


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
