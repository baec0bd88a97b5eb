"""The low-latency calls of `deep_ep.Buffer`: slabs, split into a sending and a receiving half.

On the CPU a half that was sent goes on by itself, on the native buffer's thread; a hook only waits
for it, so any number of them may be outstanding, and be called in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm.compat.deep_ep.events import EventOverlap, finished
from ep_comm.compat.deep_ep.masks import Masks, Rest, without_masked
from ep_comm.compat.deep_ep.natives import (
    Batch,
    Natives,
    raise_known,
    raise_static,
    refuse,
)
from ep_comm.errors import EPError
from ep_comm.handle import META_SIZE, Handle, edit_meta
from ep_comm.received import Origins, Promised, Received

SCALE_BLOCK: Final = 128
_WORD_BLOCK: Final = 4 * SCALE_BLOCK  # elements whose exponents share an int32

# Added to the meta of a handle without weights: one operation, where setting the field takes three.
_WEIGHTS_COME_LATER: Final = edit_meta(torch.zeros(META_SIZE, dtype=torch.int64), has_weights=1)

Hook = Callable[[], None]
LowLatencyHandle = tuple[Tensor, Tensor, int, int, int]


class LowLatencyCalls:
    """What `Buffer` inherits; it provides these."""

    _natives: Natives
    _masks: Masks
    group_size: int
    enable_shrink: bool

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send each selection to its expert's slab.

        Args:
            x: bfloat16 [T, H], T <= num_max_dispatch_tokens_per_rank = M.
            topk_idx: int64 or int32 [T, K], -1 = none.
            cumulative_local_expert_recv_stats: int32 [El], the counts are added to it.
            dispatch_wait_recv_cost_stats: int64 [R], nanoseconds (upstream: cycles) that each rank
                was waited for are added to it; where ranks cannot be told apart (backend
                "collective") it stays as it is.
            use_fp8, round_scale, use_ue8m0: quantize on the way; scales that are powers of two;
                four of their exponents in an int32.
        Returns:
            recv_x [El, R * M, H] bfloat16, or (float8_e4m3fn, scales column-major [El, R * M, S]);
            recv_count int32 [El], rows past it are undefined; handle; event; hook.
            With return_recv_hook all tensors are filled by hook(), which may be called again; x and
            topk_idx may be written to before it.

        Collective. The handle is (src_info int32 [El, R * M], layout_range int64 [El, R], M, H, E);
        what combine needs besides is kept by its two tensors as an attribute: a rebuilt tuple
        works, copies of the tensors don't.
        """
        _exclusive(async_finish, return_recv_hook)
        if use_ue8m0 and not round_scale:
            raise ValueError("use_ue8m0=True: want round_scale=True with it")
        rest = self._masks.rest
        most, static = num_max_dispatch_tokens_per_rank, _is_static(x.device)
        batch = Batch(most, topk_idx.shape[-1]) if static else None
        native = self._natives.get(x.shape[-1], num_experts, x.device, rest, batch)
        if static:
            raise_known(native)
        if x.shape[0] > most:
            what = f"has too many tokens: got {x.shape[0]}, want <= {most}"
            refuse(native, "dispatch", "E230", what)
        rows, options = x, _quantization(use_fp8, round_scale, use_ue8m0)
        if use_fp8 and round_scale and not use_ue8m0:
            rows, options["scales"] = quantize_rounded(x)
        ids = topk_idx if rest is None else rest.renumber(topk_idx, num_experts)
        splits = return_recv_hook and rest is None
        cost = _measured(native, dispatch_wait_recv_cost_stats)
        waits = cost if rest is None else rest.waits(cost)
        if splits:  # sending goes on while the caller may already write to its tensors
            ids, rows = ids.clone(), _snapshot(rows, x)
        work = native.dispatch(
            rows, ids, layout="slab", capacity=self.group_size * most, origins=True,
            sync=not static, wait=not splits, wait_stats=waits,
            recv_stats=cumulative_local_expert_recv_stats, **options,
        )  # fmt: skip
        sizes = (most, x.shape[1], num_experts)
        if splits:
            form = _form(x.shape[1], use_fp8, use_ue8m0)
            pending = _PendingDispatch(native, work, sizes, form, topk_idx)
            return (*pending.results, EventOverlap(), pending.finish)
        raise_static(native, work)
        received = work.x if work.scales is None else (work.x, work.scales)
        native_handle = work.handle
        if native_handle.topk_idx is topk_idx:  # it has no ids of its own
            native_handle = native_handle._replace(topk_idx=topk_idx.clone())
        origins, routing = work.origins, _Routing(native, topk_idx, native_handle)
        source_range = origins.source_range
        if rest is not None:
            rest.move_waits(waits, cost)
            source_range = rest.spread(source_range)
            routing.rest, routing.num_experts = rest, num_experts
        handle = _handle(origins.row_token, source_range, sizes, routing)
        hook = _nothing if return_recv_hook else None
        return received, work.num_tokens_per_expert, handle, finished(async_finish), hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Add the rows of each token, times their weights, slot by slot, in fp32.

        Args:
            x: bfloat16 [El, R * M, H], contiguous; with zero_copy only its shape counts.
            topk_idx: [T, K] of the dispatch; slots may have become -1: their weight is 0 then.
            topk_weights: float32 [T, K].
            use_logfmt: rows stay as they are.
            zero_copy: the rows are those of `get_next_low_latency_combine_buffer(handle)`.
            out: bfloat16 [T, H]; written and returned.
            combine_wait_recv_cost_stats: as in dispatch.
        Returns:
            [T, H], 0 where all ids are -1; event; hook, after which the result is there. Before it
            x (but with zero_copy), topk_idx and topk_weights may be written to.

        Collective.
        """
        _exclusive(async_finish, return_recv_hook)
        if use_logfmt and zero_copy:
            raise ValueError("zero_copy=True: want use_logfmt=False with it")
        routing = _routing_of(handle)
        native, y = routing.native, x
        if _is_static(x.device):
            raise_known(native)
        ours = routing.weighted(topk_idx, topk_weights)
        if zero_copy:
            y = routing.taken_buffer()
        elif return_recv_hook:
            y, ours = routing.snapshot(x, ours, topk_weights)
        rest = routing.rest
        if self._masks.is_smaller(rest) and not _is_static(x.device):  # since dispatch
            former, rest = self._masks.former(rest), self._masks.rest
            native = self._natives.get(handle[3], handle[4], x.device, rest)
            kept = [former.index(rank) for rank in self._masks.former(rest)]
            local = handle[4] // self.group_size
            ours = without_masked(ours, kept, local, native._backend.generation)
        cost = _measured(native, combine_wait_recv_cost_stats)
        waits = cost if rest is None else rest.waits(cost)
        total = out
        if (out is None and return_recv_hook) or (out is not None and not out.is_contiguous()):
            total = torch.empty((topk_idx.shape[0], y.shape[-1]), dtype=y.dtype, device=y.device)
        work = native.combine(
            y,
            ours,
            weighted=True,
            order="topk",
            out=total,
            wait=not return_recv_hook,
            wait_stats=waits,
        )
        if total is None:
            total = work

        def finish() -> None:
            if return_recv_hook:
                work.wait()
            if rest is not None:
                rest.move_waits(waits, cost)
            if out is not None and out is not total:
                out.copy_(total)

        if not return_recv_hook:
            finish()
        return (
            out if out is not None else total,
            finished(async_finish),
            (finish if return_recv_hook else None),
        )

    def get_next_low_latency_combine_buffer(self, handle: Any) -> Tensor:
        """bfloat16 [El, R * M, H] that peers read in place: fill it, combine with zero_copy."""
        routing = _routing_of(handle)
        local, capacity = handle[0].shape
        routing.combine_buffer = routing.native.empty((local, capacity, handle[3]), torch.bfloat16)
        return routing.combine_buffer

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to clean: numbers in shared memory only ever grow."""

    # ---- masks ----

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of the low-latency calls from now on, or take it in again.

        All ranks that are left do so before the same call; the next one makes a native buffer, in
        milliseconds. Dispatch then sends nothing to the rank's experts and receives nothing from
        it, also with a hook, which has nothing left to do. On the CPU a combine after a dispatch
        with the rank adds what the ranks that are left hold. A call that had begun with a rank that
        died raises: nobody is masked but here.

        Raises:
            ValueError: there is no such rank, or it is this one.
        """
        self._needs_shrink()
        self._masks.update(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write which ranks are masked into int32 [R]: 1 = masked."""
        self._needs_shrink()
        self._masks.query(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask all ranks."""
        self._needs_shrink()
        self._masks.clear()

    def _needs_shrink(self) -> None:
        if not self.enable_shrink:
            raise RuntimeError("mask calls want Buffer(enable_shrink=True)")


class _Routing:
    """What combine needs that the documented handle does not hold."""

    def __init__(
        self, native: Any, given: Tensor, handle: Handle | None, finish: Hook | None = None
    ) -> None:
        self.native = native
        self.handle = handle  # None until the receiving half is over
        self.combine_buffer: Tensor | None = None
        self._finish = finish
        self._has_weights = False  # as the handle's meta says
        self._given, self._version = given, _version(given)  # of its ids the handle has a copy
        # The ranks left, when some are masked: the handle's ids are among their experts.
        self.rest: Rest | None = None
        self.num_experts = 0

    def arrived(self, handle: Handle) -> None:
        self.handle, self._finish = handle, None  # `finish` holds what holds us

    def weighted(self, topk_idx: Tensor, topk_weights: Tensor) -> Handle:
        """The handle with weights that came only now."""
        if self.handle is None and self._finish is not None:
            self._finish()
        handle = self.handle
        assert handle is not None
        if not self._has_weights:
            handle.meta.add_(_WEIGHTS_COME_LATER)
            self._has_weights = True
        weights, want = topk_weights, handle.topk_idx.shape
        for name, given in (("topk_weights", weights), ("topk_idx", topk_idx)):
            if given.shape != want:
                what = f"rejected {name}: got {list(given.shape)}, want {list(want)}"
                refuse(self.native, "combine", "E201", what)
        unchanged = topk_idx is self._given and 0 <= self._version == _version(topk_idx)
        if not unchanged:
            ids = topk_idx.to(torch.int64)
            if self.rest is not None:
                ids = self.rest.renumber(ids, self.num_experts)
            if _is_static(ids.device):
                weights = weights.masked_fill(ids == -1, 0.0)
            elif not torch.equal(ids, handle.topk_idx):
                weights = weights.masked_fill(self._left_out(ids, handle.topk_idx), 0.0)
        if weights.dtype != torch.float32 or not weights.is_contiguous():
            weights = weights.to(torch.float32).contiguous()
        return Handle(handle.meta, handle.topk_idx, weights, *handle[3:])

    def _left_out(self, ids: Tensor, sent: Tensor) -> Tensor:
        """Which slots became -1 since dispatch; nothing else may have changed."""
        left_out = ids == -1
        if (~left_out & (ids != sent)).any():
            what = "rejected topk_idx: got other experts than at dispatch, want the same or -1"
            refuse(self.native, "combine", "E203", what)
        return left_out

    def snapshot(self, x: Tensor, handle: Handle, given: Tensor) -> tuple[Tensor, Handle]:
        """Rows and weights as they are now: the caller may write to them before its hook.

        Rows in use only, and where peers read them in place, so that none is copied again.
        """
        counts = handle.num_tokens_per_expert
        if x.device.type != "cpu" or x.dim() != 3 or x.shape[0] != counts.shape[0]:
            return x, handle
        if handle.topk_weights is given:
            handle = handle._replace(topk_weights=given.clone())
        try:
            rows = self.native.empty(x.shape, x.dtype)
        except EPError:
            rows = torch.empty_like(x)
        for expert, count in enumerate(counts.tolist()):
            rows[expert, :count].copy_(x[expert, :count])
        return rows, handle

    def taken_buffer(self) -> Tensor:
        if self.combine_buffer is None:
            want = "want get_next_low_latency_combine_buffer(handle) before it"
            refuse(self.native, "combine", "E203", f"rejected zero_copy=True: {want}")
        return self.combine_buffer


def _snapshot(rows: Tensor, given: Tensor) -> Tensor:
    """The rows as they are now, if they are those of the caller.

    On a GPU they are not copied: that would cost the launch of a kernel.
    """
    return rows.clone() if rows is given and rows.device.type == "cpu" else rows


def _is_static(device: torch.device) -> bool:
    """On GPUs the host waits for nothing, so that calls can be captured in graphs."""
    return device.type == "cuda"


def _nothing() -> None:
    """The hook of a call that is over already."""


def _version(ids: Tensor) -> int:
    """A number that changes when somebody changes them; inference tensors have none: -1."""
    return -1 if ids.is_inference() else ids._version


class _PendingDispatch:
    """A dispatch whose rows still come: tensors to return now, and what fills them."""

    def __init__(
        self,
        native: Any,
        begun: Any,
        sizes: tuple[int, int, int],
        form: tuple[torch.dtype, torch.dtype | None, int],
        topk_idx: Tensor,
    ) -> None:
        self._begun = begun
        self._promised: Promised | None = begun.promised
        self._out = self._promised or _make_outputs(native, sizes, form)
        origins = self._out.origins
        assert origins is not None
        assert origins.source_range is not None
        self._routing = _Routing(native, topk_idx, None, self.finish)
        self._handle = _handle(origins.row_token, origins.source_range, sizes, self._routing)

    @property
    def results(self) -> tuple[Any, Tensor, LowLatencyHandle]:
        out = self._out
        received = out.x if out.scales is None else (out.x, out.scales)
        return received, out.num_tokens_per_expert, self._handle

    def finish(self) -> None:
        """Wait until what was returned is filled; rows past the counts are left as they are."""
        if self._routing.handle is not None:
            return
        recv = self._begun.wait()
        raise_static(self._routing.native, recv)
        if self._promised is None:
            _copy_outputs(self._out, recv)
        self._routing.arrived(recv.handle)


# Where a backend cannot promise its outputs, they are made here, and filled with copies.


def _make_outputs(
    native: Any, sizes: tuple[int, int, int], form: tuple[torch.dtype, torch.dtype | None, int]
) -> Promised:
    (most, hidden, _), (dtype, scale_dtype, words) = sizes, form
    local, capacity = native.num_local_experts, native.num_ranks * most
    empty = partial(torch.empty, device=native._spec.device)
    scales = None
    if scale_dtype is not None:
        scales = empty((local, words, capacity), dtype=scale_dtype).transpose(1, 2)
    return Promised(
        x=empty((local, capacity, hidden), dtype=dtype),
        topk_idx=None,
        topk_weights=None,
        scales=scales,
        num_tokens_per_expert=empty(local, dtype=torch.int32),
        origins=Origins(
            rank_ends=None,
            row_token=empty((local, capacity), dtype=torch.int32),
            source_range=empty((local, native.num_ranks), dtype=torch.int64),
        ),
    )


def _copy_outputs(out: Promised, recv: Received) -> None:
    mine, theirs = out.x.view(torch.uint8), recv.x.view(torch.uint8)
    if _is_static(out.x.device):  # counts would make the host wait
        mine.copy_(theirs)
    else:
        for expert, count in enumerate(recv.counts):
            mine[expert, :count].copy_(theirs[expert, :count])
    pairs = [(out.scales, recv.scales), (out.num_tokens_per_expert, recv.num_tokens_per_expert)]
    assert out.origins is not None
    assert recv.origins is not None
    pairs += [
        (out.origins.row_token, recv.origins.row_token),
        (out.origins.source_range, recv.origins.source_range),
    ]
    for ours, given in pairs:
        if ours is not None and given is not None:
            ours.copy_(given)


def _form(
    hidden: int, use_fp8: bool, use_ue8m0: bool
) -> tuple[torch.dtype, torch.dtype | None, int]:
    """Dtype of the rows, and dtype and number of their scales."""
    if not use_fp8:
        return torch.bfloat16, None, 0
    if use_ue8m0:
        return torch.float8_e4m3fn, torch.int32, hidden // _WORD_BLOCK
    return torch.float8_e4m3fn, torch.float32, hidden // SCALE_BLOCK


def quantize_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [T, H] and float32 [T, H / 128]: power-of-two scales, spelled out.

    Only this form is not made on the way: it is the native "fp8_ue8m0", its exponents unpacked.
    """
    from ep_comm.reference import fp8

    hidden = x.shape[1]
    if hidden % SCALE_BLOCK:
        raise ValueError(f"hidden={hidden}: want a multiple of {SCALE_BLOCK} with use_fp8")
    padded = torch.nn.functional.pad(x, (0, -hidden % _WORD_BLOCK))
    q, words = fp8.quantize(padded, kind="fp8_ue8m0", scale_block=SCALE_BLOCK)
    exponents = words.view(torch.uint8)[:, : hidden // SCALE_BLOCK].to(torch.int32)
    return q[:, :hidden].contiguous(), (exponents << 23).view(torch.float32)


def _quantization(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> dict[str, Any]:
    if not use_fp8 or (round_scale and not use_ue8m0):
        return {}
    return {"quantize": "fp8_ue8m0" if use_ue8m0 else "fp8"}


def _exclusive(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("async_finish, return_recv_hook: got both, want at most one")


def _measured(native: Any, stats: Tensor | None) -> Tensor | None:
    """Where waits are added up, if the backend measures them."""
    return stats if "wait_stats" in native._backend.fills else None


def _handle(
    src_info: Tensor, layout_range: Tensor, sizes: tuple[int, int, int], routing: _Routing
) -> LowLatencyHandle:
    for tensor in (src_info, layout_range):
        tensor.ep_comm_routing = routing  # type: ignore[attr-defined]
    return (src_info, layout_range, *sizes)


def _routing_of(handle: Any) -> _Routing:
    for tensor in handle[:2] if isinstance(handle, tuple | list) else ():
        routing = getattr(tensor, "ep_comm_routing", None)
        if isinstance(routing, _Routing):
            return routing
    what = "want the one low_latency_dispatch returned, or a tuple of its tensors"
    raise ValueError(f"handle: got {type(handle).__name__}, {what}")
