"""Calls that look like an earlier one: what was checked then is not checked again.

A call in a loop differs from the last one in addresses, in its number of tokens and in nothing
else. Its options are a key; behind it lie the arguments of the call that was checked in full, and
the core compares the tensors, and types of options: 1 is equal to True and to 1.0. What does not
fit, for whatever reason, goes the long way, which says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import calls
from ep_comm.backends.base import are_plain
from ep_comm.backends.nvlink_calls import Combine, Dispatch
from ep_comm.backends.nvlink_results import ArenaReceived, OwnHandle, pieces_of
from ep_comm.checks import DispatchCall
from ep_comm.received import Received

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NvlinkBackend

# Of each verb; a program has few kinds of calls.
_MOST_PLANS: Final = 64
_SUMMED: Final = (torch.bfloat16, torch.float16, torch.float32)
_OF_COMPLEX: Final = frozenset({torch.float16, torch.float32})


class Plans:
    """Of one buffer, whose lock is held."""

    def __init__(self, backend: NvlinkBackend) -> None:
        self._backend = backend
        self._looks: dict[calls.Look, calls.Look] = {}
        self._dispatches: dict[Any, tuple[_core.DispatchPlan, calls.Look, Any]] = {}
        self._combines: dict[Any, _core.CombinePlan] = {}
        # An element of each type, and that element seen as sums of so many tokens: an empty tensor
        # that is like another one costs a third less than one that is described.
        device = backend.spec.device
        self._one = {dtype: torch.empty(1, dtype=dtype, device=device) for dtype in _SUMMED}
        self._sums: dict[Any, Tensor] = {}

    def look_of(self, call: DispatchCall) -> calls.Look:
        """The same object for calls that look alike."""
        look = calls.Look.of(self._backend.spec, call)
        if look not in self._looks:
            _put(self._looks, look, look)
        return self._looks[look]

    # ---- dispatch ----

    def dispatch(
        self, x: Any, topk_idx: Any, topk_weights: Any, scales: Any, handle: Any,
        stats: tuple[Any, Any], options: tuple[Any, ...], tag: Any,
    ) -> Received | None:  # fmt: skip
        """The call, if it looks like an earlier one; else None, and nothing has happened.

        Args:
            stats: recv_stats and wait_stats.
            options: everything else that a caller may pass, hashable when it is sensible.
        """
        backend = self._backend
        if type(x) is not Tensor:
            return None
        routing, serial = None, -1
        if handle is not None:
            is_odd = topk_idx is not None or stats[0] is not None  # which is refused
            if is_odd or type(handle) is not OwnHandle or handle.routing is None:
                return None
            routing, serial = handle.routing, handle.look.serial
            topk_idx = handle.topk_idx
        known = _get(self._dispatches, (options, x.dtype, serial, backend.num_warps))
        if known is None or not self._is_free() or _are_negated(x, topk_weights, scales):
            return None
        plan, look, pieces = known
        backend.forget_finished()
        flight = plan.run(backend.rank, options, x, topk_idx, topk_weights, scales, *stats, routing)
        if flight is None:
            return None
        if look.sync:
            self._await(flight, tag)
        else:
            backend.will_look_at(flight.stream)
        made_of = (backend, look, flight, topk_idx, topk_weights, handle, None, pieces)
        return ArenaReceived.later(look, flight, made_of)

    def _await(self, flight: _core.Flight, tag: Any) -> None:
        backend = self._backend
        backend.rank.await_report(flight)
        if flight.outcome.code != 0:
            raise backend.error(flight.outcome, str(tag))
        backend.rank.settle(flight)

    def learn_dispatch(self, options: tuple[Any, ...], work: Dispatch) -> None:
        """The next call with these options may look like this one, which has been made."""
        call = work.call
        is_usual = call.transfer == "sm" and call.replicas is None and call.output != "torch"
        if not self._backend.may_repeat(self._backend.rank.stages_dispatch(work.args)):
            return
        if not is_usual or call.idx_dtype is not torch.int64 or work.given:
            return
        if not are_plain(options):
            return
        handle, serial = call.handle, -1
        if handle is not None:
            if type(handle) is not OwnHandle or handle.routing is None:
                return
            serial = handle.look.serial
        look = work.outputs.look
        pieces = None if look.sync else pieces_of(self._backend.spec, look, 0, 0, 0)
        plan = _core.DispatchPlan(work.args, work.wants(), options, call.x, call.scales)
        key = (options, call.x.dtype, serial, self._backend.num_warps)
        _put(self._dispatches, key, (plan, look, pieces))

    # ---- combine ----

    def combine(
        self, x: Any, handle: Any, row_weights: Any, wait_stats: Any, options: tuple[Any, ...]
    ) -> Tensor | None:
        """As dispatch."""
        if type(x) is not Tensor or type(handle) is not OwnHandle or handle.routing is None:
            return None
        stages = self._backend.num_stages
        key = (options, x.dtype, row_weights is None, handle.look.serial, stages)
        plan = _get(self._combines, key)
        if plan is None or not self._is_free() or _are_negated(x, row_weights):
            return None
        backend = self._backend
        like = self._like_sums(handle.routing.num_tokens, x.dtype)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        stream = plan.run(
            backend.rank, options, handle.routing, x, handle.topk_idx, handle.topk_weights,
            row_weights, wait_stats, out,
        )  # fmt: skip
        if stream is None:
            return None
        backend.will_look_at(stream)
        return out

    def learn_combine(self, options: tuple[Any, ...], work: Combine) -> None:
        """As learn_dispatch."""
        call, handle = work.call, work.call.handle
        if type(handle) is not OwnHandle or handle.routing is None:
            return
        if not self._backend.may_repeat(self._backend.rank.stages_combine(work.args)):
            return
        if not are_plain(options):
            return
        stages = self._backend.num_stages
        key = (options, call.x.dtype, call.row_weights is None, handle.look.serial, stages)
        plan = _core.CombinePlan(work.args, work.wants(), options, call.x)
        _put(self._combines, key, plan)

    def _like_sums(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Of the shape of a result; not to be looked into."""
        like = self._sums.get((num_tokens, dtype))
        if like is None:
            like = self._one[dtype].expand(num_tokens, self._backend.spec.hidden)
            _put(self._sums, (num_tokens, dtype), like)
        return like

    # ---- both ----

    def _is_free(self) -> bool:
        """Whether nothing stands before the call that the long way has to see to; the core sees for
        itself whether the communicator has ended."""
        backend = self._backend
        return not (backend.is_released() or backend.unfinished) and backend.halves.is_idle()


def _get(plans: dict[Any, Any], key: Any) -> Any:
    try:
        return plans.get(key)
    except TypeError:  # of no hash: no sensible options
        return None


def _put(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan


def _are_negated(x: Tensor, weights: Any, scales: Any = None) -> bool:
    """Whether the bytes of a tensor are not its values, as in the imaginary part of a conjugate.

    What is no tensor is refused later.
    """
    return (
        (x.dtype in _OF_COMPLEX and x.is_neg())
        or (type(weights) is Tensor and weights.is_neg())
        or (type(scales) is Tensor and scales.is_neg())
    )
