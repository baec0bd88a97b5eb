"""The Buffer: one object, two verbs.

It checks arguments, keeps the order of calls and leaves the work to a backend. A call that fails
before its backend begins is refused: the peers raise its error, too, instead of waiting.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends.base import Backend, Combined, Masking
from ep_comm.begun import Begun
from ep_comm.bootstrap import resolve_group
from ep_comm.checks import (
    DispatchCall,
    check_combine,
    check_dispatch,
    check_fills,
    check_memory,
    check_transfer,
    flag,
    one_of,
    positive,
    rejected,
)
from ep_comm.config import EPConfig
from ep_comm.construct import construct
from ep_comm.errors import EPError, make_error, shown
from ep_comm.handle import LAYOUTS
from ep_comm.received import Received
from ep_comm.replicas import (
    PREFER,
    LayerReplicas,
    Prefer,
    Replicas,
    check_placement,
    make_replicas,
)

if TYPE_CHECKING:
    from ep_comm.eplb.placement import Placement

_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Buffer:
    """Expert-parallel dispatch and combine between the ranks of a group.

    Args:
        group: a `torch.distributed` process group of any backend, a `StoreGroup`, or None: the
            default group if there is one, else a single rank.
        num_experts: experts in total.
        num_topk: largest top-k of any call, at most 32.
        hidden: elements of a row; a row is a multiple of 16 bytes.
        max_tokens: largest number of tokens of a rank in one call.
        num_slots: operations that may be in flight at once, from 2 to 16.
        expert_map: rank of each expert, int [num_experts]; None: contiguous blocks as even as
            possible. Local experts of a rank are its experts in ascending order.
        backend: "auto", or one of "cpu", "nvlink", "hybrid", "collective"; E404 when it cannot be
            had.
        device: of all tensors; None: "cuda" when there is a GPU, else "cpu".
        arena_bytes: memory for outputs, see `size_hint`; None: two worst cases on GPUs, on the CPU
            as much as the machine has (pages are taken when touched). The collective backend has
            no arena.
        num_sms: SMs the kernels of GPU backends may occupy; None: computed from the bytes to move.
            Kernels of others that wait for a peer, e.g. of NCCL, may run on other streams, and
            peers may issue them in another order, while they leave so many SMs: 32 with None. A
            small batch takes what is there and needs one.
        ranks_per_node: hybrid: how many ranks stand on a node, one after the other; None: those of
            a host. With fewer, nodes are pretended: over NVSHMEM between processes of one host, by
            copies between ranks that are threads of one process. The same on all ranks.
        config: the clocks.
    Raises:
        EPArgumentError: E203, E210 to E212, an option here or on another rank is not acceptable.
        EPMismatch: E221, E222, ranks were built for different things; names field, rank, values.
        EPTimeout: E120, ranks are missing. EPPeerDied: E110, one ended meanwhile.
        EPEnvironmentError: E404 no such backend, E405 no shared memory, E406 no such group.
        EPMemoryError: E232, no memory for the arena.

    Collective: every rank of the group constructs it; nothing is kept when one of them fails. Calls
    on one buffer are made in the same order on all ranks. Threads of a process may share a buffer;
    their calls are serialized. `ep_comm.capabilities()` has the limits as numbers.
    Cost: milliseconds; shared memory of about 1 KiB per peer and slot; one socket per peer process.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        max_tokens: int,
        num_slots: int = 2,
        expert_map: Any = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        arena_bytes: int | None = None,
        num_sms: int | None = None,
        ranks_per_node: int | None = None,
        config: EPConfig | None = None,
    ) -> None:
        self.config = config if isinstance(config, EPConfig) else EPConfig()
        self.group = group
        self._spec, self._backend, self.backend_reason = construct(
            resolve_group(group), config, backend=backend, device=device, arena_bytes=arena_bytes,
            num_sms=num_sms, ranks_per_node=ranks_per_node, num_experts=num_experts,
            num_topk=num_topk, hidden=hidden, max_tokens=max_tokens, num_slots=num_slots,
            expert_map=expert_map,
        )  # fmt: skip
        self._replicas: Replicas | None = None
        self._lock = _Turn(self._backend)
        self._pid, self._forks = os.getpid(), _forks
        self._closed: str | None = None
        self._finalizer = weakref.finalize(self, _close_backend, self._backend, self._pid)
        # For ep_comm.ops, which take scalars only: a name of this buffer, and what shapes follow
        # from: num_ranks, num_local_experts, max_tokens, nodes other than ours.
        self.number = next(_numbers)
        spec, nodes = self._spec, getattr(self._backend, "nodes", None)
        far_nodes = 0 if nodes is None else nodes.num_nodes - 1
        self.sizes = (spec.num_ranks, spec.num_local_experts, spec.max_tokens, far_nodes)
        _alive[self.number] = self

    # ---- the two verbs ----

    # What type checkers see: the result follows from `wait`. A test compares the parameters.
    # fmt: off
    @overload
    def dispatch(
        self, x: Any, topk_idx: Any = ..., topk_weights: Any = ..., *, scales: Any = ...,
        scale_block: int | None = ..., quantize: str | None = ..., handle: Any = ...,
        layout: str = ..., alignment: int = ..., row_index: bool = ..., origins: bool = ...,
        layer: int | None = ..., capacity: int | None = ..., sync: bool = ...,
        wait: Literal[True] = ..., output: str = ..., transfer: str = ..., recv_stats: Any = ...,
        wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> Received: ...
    @overload
    def dispatch(
        self, x: Any, topk_idx: Any = ..., topk_weights: Any = ..., *, scales: Any = ...,
        scale_block: int | None = ..., quantize: str | None = ..., handle: Any = ...,
        layout: str = ..., alignment: int = ..., row_index: bool = ..., origins: bool = ...,
        layer: int | None = ..., capacity: int | None = ..., sync: bool = ...,
        wait: Literal[False], output: str = ..., transfer: str = ..., recv_stats: Any = ...,
        wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> Begun[Received]: ...
    # fmt: on

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        *,
        scales: Any = None,
        scale_block: int | None = 128,
        quantize: str | None = None,
        handle: Any = None,
        layout: str = "compact",
        alignment: int = 1,
        row_index: bool = False,
        origins: bool = False,
        layer: int | None = 0,
        capacity: int | None = None,
        sync: bool = True,
        wait: bool = True,
        output: str = "auto",
        transfer: str = "sm",
        recv_stats: Any = None,
        wait_stats: Any = None,
        num_sms: int | None = None,
        tag: str = "",
    ) -> Any:
        """Send each token to the ranks that own its experts.

        A token crosses to a rank once, however many of its experts live there.

        Args:
            x: [num_tokens, hidden] bfloat16, float16, float32, or one-byte elements (float8_e4m3fn,
                float8_e5m2, int8, uint8); dense rows, each 16 bytes aligned; num_tokens <=
                max_tokens and may be 0, also on all ranks.
            topk_idx: int64 or int32 [num_tokens, num_topk], global expert, -1 = none, duplicates
                allowed; None with `handle`. num_topk is the same on all ranks.
            topk_weights: float32 [num_tokens, num_topk] (bfloat16 and float16 are converted); they
                travel along.
            scales: for x of one-byte elements; travel verbatim, any strides. float32 [num_tokens,
                hidden / scale_block], or int32 [num_tokens, hidden / (4 * scale_block)] of four
                ue8m0 exponents a word.
            scale_block: elements that share a scale, 128 or 32. None: scales of any width.
            quantize: "fp8" (float32 scales) or "fp8_ue8m0" (power-of-two scales, packed): quantize
                x of 16 or 32 bits on the way; hidden must be a multiple of scale_block (times 4).
            handle: routing of an earlier dispatch with as many tokens (cached dispatch): the same
                rows, no ids come back. The handle decides layout, alignment, capacity and sync.
            layout: "compact", "grouped" or "slab", see Received.
            alignment: grouped (and row_index): group sizes are multiples of it.
            row_index: compact: also return the expert-grouped index of rows, for a gathering GEMM.
            origins: also return who sent what, see `Origins`; not with `handle`.
            layer: with a placement: topk_idx names logical experts of this layer, see
                `set_placement`; None: physical ones. A handle has physical ones, whatever this is.
            capacity: most rows (slab: per expert, default num_ranks * max_tokens); beyond it the
                call fails everywhere.
            sync: True: sizes are exact. False: shapes are static, counts are tensors, failures
                found after the call began show in `status` and are raised by `check()` or the next
                dispatch with sync=True.
            wait: False: return a `Begun` at once.
            output: where x lies: "arena", "torch" (copied out), or "auto" (copied out when the
                arena runs short).
            transfer: how rows travel, nvlink. "sm": pushed by SMs. "copy_engine": packed by
                destination in a short step on all SMs, then copied, which holds no SM; compact,
                sync=True, not quantized. Takes arena memory for the rows that leave: as many as
                there may be, T * min(num_ranks - 1, num_topk), or as many as there are where
                that is too much.
            recv_stats: int32 [num_local_experts], contiguous; num_tokens_per_expert is added to it.
                Not with `handle`.
            wait_stats: int64 [num_ranks], contiguous; the nanoseconds for which each rank was
                waited for are added: until it had entered the call, and from then until its rows
                were here, each from when all were waited for; a rank of another node, from when the
                rank of this node had entered that relays for it. A rank that is there at once
                costs nothing. A small batch on GPUs looks no further once a rank has entered: its
                rows are on their way. Not on the collective backend, where ranks cannot be told
                apart.
            num_sms: SMs for this call, GPU backends.
            tag: your name for the call, quoted in errors.
        Returns:
            Received; Begun[Received] with wait=False. Its handle has ids and weights of its own:
            once the call (or `wait()`) has returned, all arguments may be written to. On nvlink it
            holds int64 ids and float32 weights themselves.
        Raises:
            EPArgumentError: E200 to E213, also when another rank's argument is bad.
            EPMismatch: E220, ranks passed different arguments.
            EPCapacityError: E230. EPMemoryError: E231. EPUsageError: E320 for a foreign handle.
            EPTimeout, EPPeerDied, EPPeerLeft: E101, E102, E110, E111; EPCorruption: E240 to E242;
                EPUsageError: E330. After these the buffer can only be closed.

        Stream: CPU tensors: none, the call returns when its rows are there. GPU tensors: the
            current stream; a begun one runs on a stream of the buffer's, behind what was launched
            before it, and `wait()` puts the current stream behind it.
        Collective: every rank calls it, in the same order.
        Cost: payload bytes * unique (token, rank) pairs, written once; grouped and slab copy a row
            again, locally, for each further selection of it.
        """
        self._enter()
        self._lock.acquire()
        try:
            # Whatever the two are: all ranks must agree on this before any check. A begun call
            # waits for nothing.
            if sync is not False and wait is not False:
                self._raise_deferred()
            plans, options = self._backend.plans, None
            if plans is not None and wait is True and self._is_physical(layer):
                options = (
                    scale_block, alignment, capacity, num_sms, quantize, layout, row_index, origins,
                    sync, output, transfer,
                )  # fmt: skip
            if plans is not None and options is not None:
                received = plans.dispatch(
                    x, topk_idx, topk_weights, scales, handle, (recv_stats, wait_stats), options,
                    tag,
                )  # fmt: skip
                if received is not None:
                    return received
            try:
                call = check_dispatch(
                    self._spec, self._backend.generation, x, topk_idx, topk_weights,
                    scales=scales, scale_block=scale_block, quantize=quantize, handle=handle,
                    layout=layout, alignment=alignment, row_index=row_index, origins=origins,
                    capacity=capacity, sync=sync, output=output, recv_stats=recv_stats,
                    wait_stats=wait_stats, num_sms=num_sms, tag=tag,
                )  # fmt: skip
                waits = flag("wait", wait)
                call.replicas = self._replicas_of(layer, call)
                call.transfer = check_transfer(transfer, call, self._backend.name)
                check_fills(call, self._backend.name, self._backend.fills)
                work = self._backend.prepare_dispatch(call)
            except EPError as error:
                raise self._refused("dispatch", error, tag) from None
            except Exception as error:
                self._refused("dispatch", _unexpected(error), tag)
                raise
            if not waits:
                return Begun[Received](work.begin())
            received = work.run()
            if plans is not None and options is not None:
                plans.learn_dispatch(options, work)
            return received
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise
        finally:
            self._lock.release()

    # fmt: off
    @overload
    def combine(
        self, x: Any, handle: Any, *, weighted: bool = ..., topk_weights: None = ...,
        order: str = ..., sum_weights: bool = ..., per_rank: bool = ..., row_weights: Any = ...,
        bias: Any = ..., out: Tensor | None = ...,
        wait: Literal[True] = ..., wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> Tensor: ...
    @overload
    def combine(
        self, x: Any, handle: Any, *, weighted: bool = ..., topk_weights: Tensor,
        order: str = ..., sum_weights: bool = ..., per_rank: bool = ..., row_weights: Any = ...,
        bias: Any = ..., out: Tensor | None = ...,
        wait: Literal[True] = ..., wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def combine(
        self, x: Any, handle: Any, *, weighted: bool = ..., topk_weights: None = ...,
        order: str = ..., sum_weights: bool = ..., per_rank: bool = ..., row_weights: Any = ...,
        bias: Any = ..., out: Tensor | None = ...,
        wait: Literal[False], wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> Begun[Tensor]: ...
    @overload
    def combine(
        self, x: Any, handle: Any, *, weighted: bool = ..., topk_weights: Tensor,
        order: str = ..., sum_weights: bool = ..., per_rank: bool = ..., row_weights: Any = ...,
        bias: Any = ..., out: Tensor | None = ...,
        wait: Literal[False], wait_stats: Any = ..., num_sms: int | None = ..., tag: str = ...,
    ) -> Begun[tuple[Tensor, Tensor]]: ...
    # fmt: on

    def combine(
        self,
        x: Any,
        handle: Any,
        *,
        weighted: bool = False,
        topk_weights: Any = None,
        order: str = "rank",
        sum_weights: bool = False,
        per_rank: bool = False,
        row_weights: Any = None,
        bias: Any = None,
        out: Tensor | None = None,
        wait: bool = True,
        wait_stats: Any = None,
        num_sms: int | None = None,
        tag: str = "",
    ) -> Any:
        """Bring expert outputs home and add them.

        out[t] = round(((0 or bias) + row + row ...) in float32), rows in ascending order of (owner
        rank, top-k slot) or, with order="topk", of top-k slots alone; one rounding at the end:
        results do not depend on timing. Compact adds one row per (token, rank), grouped and slab
        one per selection, or with per_rank per (token, rank). A token that went nowhere gets 0
        (plus bias).

        Args:
            x: expert output in the rows of the dispatch, shape of its `recv.x`; bfloat16, float16
                or float32, contiguous, 16 bytes aligned. Where it lies in the arena (`recv.x`,
                `buffer.empty()`) peers read it in place; otherwise rows of remote tokens are copied
                into the arena: piece by piece on the CPU, all at once on GPUs. With per_rank the
                sums are, wherever x lies.
            handle: `recv.handle`, or a tuple or list of the same tensors.
            weighted: multiply each row by the top-k weight given at dispatch, in float32, product
                rounded; grouped, slab.
            topk_weights: float32, compact [num_recv, num_topk], grouped [rows], slab [experts,
                capacity]: values to send back slot by slot (router gradients).
            order: "rank" or "topk" (grouped, slab).
            sum_weights: compact: a slot gets the sum over all ranks the token went to, in ascending
                order, of what they hold for it; False: what the owner of its expert holds.
            per_rank: grouped, slab: a rank first adds up its own rows of a token in float32, in the
                order of slots, and sends the sum rounded to x's dtype; the source adds these in
                ascending order. Fewer bytes for one more rounding for each rank of a token: an
                error of at most u * |its sum|, u = 2^-8 for bfloat16, 2^-11 for float16 (whose sums
                may also overflow), beside those of float32 sums and the last rounding.
            row_weights: with per_rank: float32 in the shape of x without hidden, as
                `recv.topk_weights`: each row is multiplied by its own at its owner, in float32,
                product rounded.
            bias: [num_tokens, hidden] of x's dtype, or a pair of them (either None, summed in
                float32), added first.
            out: [num_tokens, hidden] of x's dtype, no memory of x; written and returned. It may be
                bias itself, but not on GPUs with masks, where sums may be made twice.
            wait_stats: int64 [num_ranks], contiguous; the nanoseconds for which each rank's rows
                were waited for are added, see dispatch.
            wait, num_sms, tag: as in dispatch.
        Returns:
            [num_tokens, hidden] of x's dtype; with topk_weights a pair, the second float32
            [num_tokens, num_topk], 0 where the id is -1 (but see sum_weights). Begun of it with
            wait=False.
        Raises:
            As dispatch; no E213 and E230. E201: x is not what the handle's dispatch returned.

        Stream: as dispatch; on the CPU the call returns when every rank has read its rows of x.
        Collective: every rank calls it, in the same order.
        Cost: row bytes * unique (token, rank) pairs (compact, per_rank) or selections, read once.
        """
        self._enter()
        self._lock.acquire()
        try:
            plans, options = self._backend.plans, None
            if plans is not None and wait is True and topk_weights is bias is out is None:
                options = (num_sms, weighted, order, sum_weights, per_rank)
            if plans is not None and options is not None:
                combined = plans.combine(x, handle, row_weights, wait_stats, options)
                if combined is not None:
                    return combined
            try:
                call = check_combine(
                    self._spec, self._backend.generation, x, handle, weighted=weighted,
                    topk_weights=topk_weights, order=order, sum_weights=sum_weights,
                    per_rank=per_rank, row_weights=row_weights, bias=bias, out=out,
                    wait_stats=wait_stats, num_sms=num_sms, tag=tag,
                )  # fmt: skip
                waits = flag("wait", wait)
                check_fills(call, self._backend.name, self._backend.fills)
                work = self._backend.prepare_combine(call)
            except EPError as error:
                raise self._refused("combine", error, tag) from None
            except Exception as error:
                self._refused("combine", _unexpected(error), tag)
                raise
            if not waits:
                return Begun[Combined](work.begin())
            result = work.run()
            if plans is not None and options is not None:
                plans.learn_combine(options, work)
            return result
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise
        finally:
            self._lock.release()

    # ---- placement ----

    def set_placement(
        self, placement: Placement | None, *, capacity: Any = None, prefer: str = "node"
    ) -> None:
        """From the next dispatch on, route by logical experts over the replicas of a placement.

        A selection goes to a replica on its own rank, else to one on its own node, else to any;
        among equals tokens are spread evenly. The choice follows from (source rank, token) alone:
        csrc/contract/replicas.h. Experts of this buffer are then the placement's slots: received
        local ids count slots of this rank, and handles, cached ones too, name slots.

        Args:
            placement: slots = num_experts, its ranks and nodes those of this group, whose
                expert_map is the default; None: ids name physical experts again.
            capacity: [layers, slots], positive: spread in proportion to it instead of evenly.
            prefer: "node" as above; "rank": own rank, then any; "none": any. Global placements are
                as even as predicted with "none" only.
        Raises:
            EPArgumentError: E200, E201, E203.

        Local, at the same point of the program on all ranks: a dispatch whose ranks go by
        different placements or layers fails on all of them (E220). Operations begun before keep
        theirs. `load` starts at 0 when it is another number of layers or experts.
        Cost: host time in proportion to layers * slots; nothing is sent.
        """
        self._prepare_placement(placement, capacity=capacity, prefer=prefer)()

    def _prepare_placement(
        self, placement: Placement | None, *, capacity: Any = None, prefer: str = "node"
    ) -> Callable[[], None]:
        """The two halves of set_placement: what may fail is done now, the rest by the result."""
        self._enter()
        one_of("prefer", prefer, PREFER)
        tables: Replicas | None = None
        if placement is not None:
            shares = check_placement(self._spec, placement, capacity)
            tables = make_replicas(
                placement.physical_to_logical, placement.num_logical, self._spec.rank,
                placement.num_ranks, placement.num_nodes, capacity=shares,
                prefer=cast(Prefer, prefer), device=self._spec.device,
            )  # fmt: skip

        def put_in_force() -> None:
            with self._lock:
                old, new = self._replicas, tables
                if old is not None and new is not None and old.load.shape == new.load.shape:
                    new = replace(new, load=old.load)
                self._replicas = new

        return put_in_force

    @property
    def load(self) -> Tensor | None:
        """int64 [layers, logical experts] selections dispatched by this rank so far.

        On the buffer's device, counted by dispatch itself; None without a placement. It goes on
        changing: read it, do not write it.
        """
        return None if self._replicas is None else self._replicas.load

    def _is_physical(self, layer: Any) -> bool:
        """Whether ids of this layer name physical experts."""
        return layer is None or (self._replicas is None and type(layer) is int and layer == 0)

    def _replicas_of(self, layer: Any, call: DispatchCall) -> LayerReplicas | None:
        tables = self._replicas
        if self._is_physical(layer):
            return None
        if tables is None:
            raise make_error("E203", f"rejected layer={shown(layer)}: want set_placement() first")
        positive("layer", layer, 0, maximum=tables.num_layers - 1)
        return None if call.handle is not None else tables.of_layer(layer)

    # ---- masks ----

    @property
    def masked_ranks(self) -> tuple[int, ...]:
        """Ranks that slab calls go on without, with `EPConfig(masking=True)`; ascending.

        A rank that dies, closes its buffer, or does not come within the clocks of the config, is
        masked by whoever finds out first, and so for all. Calls among the ranks left stay exact:
        tokens of a masked rank count as none, and a choice of its experts as -1. Of a rank that is
        lost in the middle of a call each of the others may or may not have what it sent before: a
        dispatch that had counted on its rows has zeros there, of no source; a combine adds all of
        its rows of a token or none. A rank that was masked while it lives raises E113.

        As known without waiting for the device: of GPU calls, of those that are over.
        """
        self._enter()
        return self._masking().masked_ranks() if self.config.masking else ()

    def mask(self, rank: int) -> None:
        """From now on slab calls go on without this rank, on all ranks, also those under way.

        Args:
            rank: another one of the group.
        Raises:
            EPArgumentError: E203, no such rank, or the buffer has no masks.

        Local: one rank is enough, and any may. Calls that need all ranks raise E311 from now on:
        all that are not slab, cached ones, those of `transfer="copy_engine"`, those that bring back
        weights; on nvlink also those that are too large to go as small batches.
        """
        self._enter()
        backend = self._masking()
        positive("rank", rank, 0, maximum=self._spec.num_ranks - 1)
        if rank == self._spec.rank:
            raise make_error("E203", f"rejected rank={rank}: want another one, this is rank {rank}")
        with self._lock:
            backend.mask(rank)

    def unmask(self) -> None:
        """Take in again all masked ranks that live; those that died or closed stay masked.

        Raises:
            EPArgumentError: E203, the buffer has no masks. EPTimeout: E120, a rank that lives did
                not come; nothing has changed. EPError: the one that ended this communicator.

        Collective between all ranks that live, masked ones included: they agree on the number of
        the next operation. Waits for what is begun. A rank that raised E113 has failed: it closes.
        """
        self._enter()
        with self._lock:
            self._masking().unmask()

    def _masking(self) -> Masking:
        if not self.config.masking:
            what = "rejected this call: want a buffer with config=EPConfig(masking=True)"
            raise make_error("E203", what, rank=self._spec.rank)
        return cast(Masking, self._backend)

    # ---- memory, state, end ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory in the arena, for an expert output that combine reads in place.

        Args:
            shape: any; the memory is contiguous and starts on a page.
            dtype: any.
        Raises:
            EPMemoryError: E231, no free piece is long enough. EPArgumentError: E200, E201.

        Local, not collective. It belongs to the tensor: the arena has it back when that dies. The
        collective backend has no arena and returns ordinary memory.
        """
        self._enter()
        checked = check_memory(shape, dtype)
        try:
            return self._backend.empty(checked, dtype)
        except RuntimeError as error:
            self._backend.raise_fault(error)
            raise

    def check(self) -> None:
        """Raise what static calls (`sync=False`) could not: the first failure, once.

        Waits for operations begun with wait=False, not for rows of other dispatches that still
        come: a failure that stops these is raised by the first call that finds it. Local, but call
        it at the same point of the program on all ranks: then all raise, or none does.

        Raises:
            EPError: E213, E230 or E231 of an earlier dispatch; its operation and number say which.
        """
        self._enter()
        with self._lock:
            self._raise_deferred()

    def stats(self) -> dict[str, Any]:
        """Numbers about this rank since it was built; local.

        Always "backend" and "operations" (begun so far). cpu: "arena" (bytes: capacity, in_use,
        peak, committed, largest_free; num_extents) and "copied_out" (outputs that output="auto"
        moved out of the arena). collective: "bytes_sent" and "waited_s".
        """
        return {
            "backend": self._backend.name,
            "operations": self._backend.seq(),
            **self._backend.stats(),
        }

    def release(self) -> None:
        """Give the arena's memory back to the system, as far as no tensor holds it.

        cpu: local; the next operation takes it again. nvlink: collective, all of it, for processes
        that share a GPU in turns; no operation until `resume()`, which keeps all addresses.

        Raises:
            EPUsageError: E310, nvlink, on all ranks: a tensor of some rank lies in its arena.
        """
        self._enter()
        self._backend.release()

    def resume(self) -> None:
        """Take back what `release()` gave away. cpu: nothing to do. nvlink: collective.

        Raises:
            EPMemoryError: E232, on all ranks; still released.
        """
        self._enter()
        self._backend.resume()

    def close(self) -> None:
        """Leave: peers that still wait for this rank raise E111. Local, may be called twice.

        Bounded: waits for no peer, and operations under way are cut short. Tensors received stay
        valid; every other call raises EPClosedError E340. Garbage collection closes a buffer, too.
        """
        if self._closed is None:
            self._closed = "close()"
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        s = self._spec
        state = "closed" if self._closed else f"{self._backend.name}: {self.backend_reason}"
        sizes = f"num_experts={s.num_experts}, num_topk={s.num_topk}, hidden={s.hidden}, "
        sizes += f"max_tokens={s.max_tokens}, device={s.device}"
        return f"Buffer(rank {s.rank} of {s.num_ranks}, {state}; {sizes})"

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self._spec.rank

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self._spec.num_ranks

    @property
    def num_experts(self) -> int:
        """Experts of all ranks."""
        return self._spec.num_experts

    @property
    def hidden(self) -> int:
        """Elements of a row."""
        return self._spec.hidden

    @property
    def max_tokens(self) -> int:
        """Most tokens of a rank in one call."""
        return self._spec.max_tokens

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self._spec.device

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self._spec.num_local_experts

    @property
    def backend(self) -> str:
        """ "cpu", "nvlink", "hybrid" or "collective"; `backend_reason` says why."""
        return self._backend.name

    @property
    def local_experts(self) -> list[int]:
        """Global ids of this rank's experts, ascending; position = local id."""
        return [e for e, r in enumerate(self._spec.owner) if r == self._spec.rank]

    @staticmethod
    def size_hint(
        *,
        num_ranks: int,
        num_topk: int,
        hidden: int,
        max_tokens: int,
        num_local_experts: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "compact",
        alignment: int = 1,
        in_flight: int = 2,
    ) -> int:
        """Arena bytes for `in_flight` dispatches of the worst case and an expert output of each.

        The worst case is every rank sending max_tokens tokens to this rank: rarely needed, never
        exceeded. Local, needs no buffer. A control block comes on top, on GPUs with places for the
        rows of small batches: see `ep_comm.plan`.

        Args:
            num_local_experts: of the rank that owns most; grouped and slab.
            dtype: of x and of the expert output.
            in_flight: dispatches whose received tensors are alive at once.
        """
        worst = num_ranks * max_tokens
        rows = {
            "compact": worst,
            "grouped": worst * num_topk + num_local_experts * (alignment - 1),
            "slab": worst * num_local_experts,
        }[one_of("layout", layout, LAYOUTS)]
        page = _core.EXTENT_ALIGN
        scale_bytes = hidden // 8  # float32 for each block of 32
        meta = _core.MetaLayout(num_topk, True, True, True, scale_bytes).bytes * worst
        x = rows * hidden * dtype.itemsize
        return in_flight * sum(-(-size // page) * page for size in (x, x, meta))

    # ---- inside ----

    def _enter(self) -> None:
        """Refuse what cannot work at all."""
        if self._closed is not None:
            raise make_error("E340", f"is closed: at {self._closed}", rank=self._spec.rank)
        if self._forks != _forks:
            what = f"is a fork: made in pid {self._pid}, now {os.getpid()}"
            raise make_error("E341", what, rank=self._spec.rank)
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # every new tensor would have no memory
            want = "real ones; to trace a call, make it through ep_comm.autograd"
            raise rejected("E202", "call", "fake tensors", want)

    def _raise_deferred(self) -> None:
        """Raise what an earlier static call could not."""
        error = self._backend.take_deferred()
        if error is not None:
            raise error

    def _refused(self, op: str, error: EPError, tag: object) -> EPError:
        """Tell the peers that this call will not happen; returns the error to raise here."""
        self._backend.refuse(op, error)
        told = tag if isinstance(tag, str) else ""
        facts = {"rank": self._spec.rank, "op": op, "seq": self._backend.seq(), "tag": told}
        return make_error(error.code, error.what, fix=error.fix, **facts)


class _Turn:
    """Calls come one after the other. What torch or CUDA refuses in one, because our context broke
    before or meanwhile, is raised as E112.

    The two verbs do the same by hand: `with` would cost each call half a microsecond.
    """

    def __init__(self, backend: Backend) -> None:
        lock = threading.RLock()
        self.acquire, self.release, self._backend = lock.acquire, lock.release, backend

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, RuntimeError):
                self._backend.raise_fault(error)  # which tells peers, before anybody calls again
        finally:
            self.release()


# How often this process has become a fork: asking the system who we are costs more than a call may.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)

_numbers = itertools.count()
_alive: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()


def find_buffer(number: int) -> Buffer:
    """The buffer of this process with that `number`; E340 when it is gone. A closed one is found
    as long as it lives, and says itself that it is closed."""
    buffer = _alive.get(number)
    if buffer is None:
        raise make_error("E340", f"is closed: buffer {number} of this process is gone")
    return buffer


def _unexpected(error: Exception) -> EPError:
    """What peers are told when a call failed here in a way we did not foresee."""
    return make_error("E203", f"raised {shown(error)}")


def _close_backend(backend: Backend, pid: int) -> None:
    if os.getpid() == pid:  # a fork shares the memory, but it is not the rank
        backend.close()
