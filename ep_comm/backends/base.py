"""What a backend is: the operations on checked calls, and the memory its results live in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from ep_comm.checks import CombineCall, DispatchCall
from ep_comm.errors import EPError
from ep_comm.received import Received

Combined = Tensor | tuple[Tensor, Tensor]  # the second: top-k weights brought home
R_co = TypeVar("R_co", covariant=True)


class BegunOp(Protocol):
    """An operation in flight; `finish` is called once."""

    def done(self) -> bool: ...
    def finish(self) -> Any: ...


class Work(Protocol[R_co]):
    """An operation with everything it needs, not yet visible to anybody.

    One of the two is called, once: `run` returns the result, `begin` returns at once.
    """

    def run(self) -> R_co: ...
    def begin(self) -> BegunOp: ...


_PLAIN: Final = frozenset({int, bool, str, type(None)})


def are_plain(options: tuple[Any, ...]) -> bool:
    """Whether what is equal to these options, and of the same types, means the same."""
    return _PLAIN.issuperset(map(type, options))


class Plans(Protocol):
    """Calls that look like an earlier one and need not be checked again, see nvlink_plans.py.

    `options`: all that a caller may pass but tensors, always in the same order.
    """

    def dispatch(
        self, x: Any, topk_idx: Any, topk_weights: Any, scales: Any, handle: Any,
        stats: tuple[Any, Any], options: tuple[Any, ...], tag: Any,
    ) -> Received | None: ...  # fmt: skip
    def learn_dispatch(self, options: tuple[Any, ...], work: Any) -> None: ...
    def combine(
        self, x: Any, handle: Any, row_weights: Any, wait_stats: Any, options: tuple[Any, ...]
    ) -> Tensor | None: ...
    def learn_combine(self, options: tuple[Any, ...], work: Any) -> None: ...


class Masking(Protocol):
    """What a backend has beside, that can go on without ranks; see `Buffer.masked_ranks`."""

    def masked_ranks(self) -> tuple[int, ...]: ...
    def mask(self, rank: int) -> None: ...
    def unmask(self) -> None: ...


class Backend(Protocol):
    """One rank's end of a buffer. Calls are checked before they come here.

    A call that fails raises EPError; with scope "call" the backend stays usable, on every rank
    alike. `prepare_*` has no effect on peers: when it raises, the caller refuses the call.
    """

    name: str
    generation: int  # id of the buffer, the same on all ranks
    fills: frozenset[str]  # which of recv_stats and wait_stats

    @property
    def plans(self) -> Plans | None: ...

    def prepare_dispatch(self, call: DispatchCall) -> Work[Received]: ...
    def prepare_combine(self, call: CombineCall) -> Work[Combined]: ...
    def take_deferred(self) -> EPError | None:
        """The first failure of static calls not yet told, after everything begun so far is over.

        All ranks asked at the same point of their programs answer alike.
        """

    def known_failure(self) -> EPError | None:
        """The same as far as it is known by now: waits for nothing, and ranks may answer at
        different points."""

    def refuse(self, op: str, error: EPError) -> None:
        """Make every peer raise `error`'s code for this operation instead of waiting for us."""

    def raise_fault(self, error: RuntimeError) -> None:
        """Raise E112 when `error`, of our calls or of torch's, means that our context broke."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...
    def seq(self) -> int:
        """Number of the last operation begun here."""

    def stats(self) -> dict[str, Any]: ...
    def release(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...
