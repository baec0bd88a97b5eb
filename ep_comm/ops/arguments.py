"""Which arguments an op takes.

Others go to the native call, which says what is wrong, to all ranks: torch would raise on this rank
alone, and its peers would wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_comm.buffer import Buffer
from ep_comm.checks import flag
from ep_comm.errors import EPError, make_error, shown
from ep_comm.handle import Handle


def are_tensors(x: object, *others: object) -> bool:
    """Whether x is a tensor, and each other one, too, or left out."""
    if not _is_tensor(x):
        return False
    for other in others:  # noqa: SIM110  # all() of a generator takes three times as long
        if other is not None and not _is_tensor(other):
            return False
    return True


def _is_tensor(value: object) -> bool:
    """On the meta device there is none: an op would run its fake implementation, on this rank. For
    nested ones torch has no implementation at all.
    """
    return isinstance(value, Tensor) and not (value.is_meta or value.is_nested)


def are_flags(first: object, second: object = True, third: object = True) -> bool:
    return type(first) is type(second) is type(third) is bool


def are_ints(one: object, *optional: object) -> bool:
    """Whether an op takes them for numbers; the optional ones may be None."""
    if not _is_int(one):
        return False
    for value in optional:  # noqa: SIM110
        if value is not None and not _is_int(value):
            return False
    return True


def _is_int(value: object) -> bool:
    """One of 64 bits; symbols of compilers are no ints, and True is none."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, torch.SymInt)


def are_texts(one: object, two: object = "", three: object = "", optional: object = None) -> bool:
    return type(one) is type(two) is type(three) is str and (
        optional is None or type(optional) is str
    )


def is_routing(topk_idx: object, handle: object) -> bool:
    """Whether there are ids or a whole handle, and not both."""
    return is_whole(handle) if topk_idx is None else handle is None


def is_whole(handle: object) -> bool:
    if not isinstance(handle, tuple | list) or len(handle) != len(Handle._fields):
        return False
    for tensor in handle:  # noqa: SIM110
        if not _is_tensor(tensor):
            return False
    return True


def refusal(buffer: Buffer, op: str, error: EPError, tag: object) -> EPError:
    """The error to raise; peers raise it, too, unless this happens while a graph is made."""
    return error if torch.compiler.is_compiling() else buffer._refused(op, error, tag)


def flags(buffer: Buffer, op: str, tag: object, **values: Any) -> tuple[bool, ...]:
    """Each as True or False; ops take nothing else."""
    try:
        return tuple(flag(name, value) for name, value in values.items())
    except EPError as error:
        raise refusal(buffer, op, error, tag) from None


def text(buffer: Buffer, op: str, tag: object) -> str:
    """A tag as native calls take it."""
    if isinstance(tag, str):
        return tag
    try:
        return str(tag)
    except Exception as error:  # of an object of the caller's
        what = f"rejected tag: {shown(error)}, want a text"
        raise refusal(buffer, op, make_error("E203", what), "") from error
