"""The collective backend: the same operations over any process group, with one all-to-all.

The rules (who gets which row, in which order sums run) are those of ep_comm.reference, with real
exchanges in between. Every operation starts with one of equal records, so each rank sees every
rank's call and counts, and all come to the same verdict before a row moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor

from ep_comm.backends.base import Combined, Plans
from ep_comm.backends.record import (
    CACHED,
    KINDS,
    PER_RANK,
    STATIC,
    WEIGHTED,
    WEIGHTS,
    Record,
    counts_of,
    describe,
    judge,
)
from ep_comm.backends.wire import Finding, Step, Wire
from ep_comm.backends.worker import BegunWork, Worker
from ep_comm.bootstrap import Exchange, Group, Hello
from ep_comm.checks import DISPATCHABLE, BufferSpec, CombineCall, DispatchCall
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, make_error
from ep_comm.handle import LAYOUTS, Handle, HandleMeta, reject_handle
from ep_comm.received import Received
from ep_comm.reference import fp8
from ep_comm.reference.routing import (
    ExpertOwner,
    SendPlan,
    expert_owner,
    find_bad_ids,
    metadata_to,
    plan_sends,
    send_rows,
)
from ep_comm.reference.rows import (
    Arrived,
    Options,
    ReceivePlan,
    arrange,
    find_overflow,
    make_handle,
    plan_receive,
    row_index_length,
    trace_origins,
)
from ep_comm.reference.sums import (
    add_in_order,
    parts_for_source,
    rows_for_source,
    weights_home,
)

R = TypeVar("R")

_QUANTIZE: Final = (None, *fp8.KINDS)
_DEFERRABLE: Final = (213, 230)  # failures a static call keeps for the next one


class CollectiveBackend:
    """One rank of a buffer over a process group. Collective to construct.

    Raises:
        EPTimeout: E120, not every rank came. EPPeerDied, EPPeerLeft: E110, E111.
    """

    name = "collective"
    plans: Plans | None = None
    fills = frozenset({"recv_stats"})  # an all-to-all does not say whose rows came when

    def __init__(
        self,
        spec: BufferSpec,
        generation: int,
        config: EPConfig,
        group: Group,
        hellos: Sequence[Hello],
        construction: Exchange,
    ) -> None:
        self.spec = spec
        self.generation = generation
        self._deferred: EPError | None = None
        self.experts = expert_owner(spec.num_experts, spec.num_ranks, spec.owner)
        self.local = [(self.experts.owner == r).nonzero().squeeze(1) for r in range(spec.num_ranks)]
        self._seq = 0
        self._verdict: EPError | None = None  # why the communicator is dead
        self._refusal: tuple[int, EPError] | None = None  # not yet known to all peers
        self.worker = Worker(spec.device)
        self.wire = Wire(group, generation, config, spec.device, hellos, construction)

    # ---- operations ----

    def prepare_dispatch(self, call: DispatchCall) -> _Dispatch:
        return _Dispatch(self, call)

    def prepare_combine(self, call: CombineCall) -> _Combine:
        return _Combine(self, call)

    def defer(self, error: EPError) -> None:
        """Remember a static call's failure until somebody may be told."""
        self._deferred = self._deferred or error

    def take_deferred(self) -> EPError | None:
        self.worker.drain()
        error, self._deferred = self._deferred, None
        return error

    def known_failure(self) -> EPError | None:
        error, self._deferred = self._deferred, None
        return error

    def raise_fault(self, error: RuntimeError) -> None:
        """Nothing: peers hear of a failure from torch.distributed alone."""

    def refuse(self, op: str, error: EPError) -> None:
        step = self.next_step(op, "")
        code = int(error.code[1:])
        record = Record(kind=KINDS.index(op), code=code, reason=error.what)
        self._refusal = (step.seq, error)

        def tell() -> None:
            try:
                self.announce(record, step)
            finally:
                self._refusal = None

        # Returns at once; a peer may come much later.
        self.worker.begin(lambda: self.guarded(tell, step))

    def next_step(self, op: str, tag: str) -> Step:
        self._seq += 1
        return Step(op, self._seq, tag, announced=False)

    def guarded(self, work: Callable[[], Any], step: Step) -> Any:
        """Run an operation; whatever stops it half-way ends the communicator, so nobody waits."""
        if self._verdict is not None:
            raise copy.copy(self._verdict)
        try:
            with torch.no_grad():
                return work()
        except EPError as error:
            if error.scope == "comm":
                self._verdict = error
                peer = self.spec.rank if error.peer is None else error.peer
                self.wire.fail(Finding(int(error.code[1:]), peer), step)
            raise
        except BaseException:
            self._verdict = self.wire.fail(Finding(1, self.spec.rank), step)
            raise

    # ---- the exchange that starts every operation ----

    def announce(self, mine: Record, step: Step) -> list[Record]:
        """Everybody's record, by rank; raises what they amount to."""
        mine.seq = step.seq
        words = mine.pack(self.spec.num_ranks, self.spec.num_experts)
        ones = [1] * self.spec.num_ranks
        copies = words.expand(self.spec.num_ranks, -1).contiguous()
        told = self.wire.exchange(copies, ones, ones, step)
        records = [Record.unpack(row, self.spec.num_ranks) for row in told]
        finding = judge(self.spec, mine, records)
        if finding is not None:
            raise self.wire.error(finding, step)
        return records

    # ---- memory ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.spec.device)

    def seq(self) -> int:
        return self._seq

    def stats(self) -> dict[str, Any]:
        return {"bytes_sent": self.wire.bytes_sent, "waited_s": self.wire.waited_s}

    def release(self) -> None:
        """There is no arena: torch's allocator has the memory."""

    def resume(self) -> None:
        """Nothing was given away."""

    def close(self) -> None:
        if self._refusal is not None:
            self.worker.drain(0.2)  # mostly all peers are there
        if self._refusal is not None:
            self.wire.refused(*self._refusal)
        self.wire.leave()
        self.worker.close()


# ---- operations ----


class _Operation(Generic[R]):
    """What dispatch and combine share: now, or begun; `go` is the operation itself."""

    op: str

    def __init__(self, backend: CollectiveBackend, call: DispatchCall | CombineCall) -> None:
        self.backend, self.spec, self.wire = backend, backend.spec, backend.wire
        self.tag = call.tag

    def run(self) -> R:
        self.backend.worker.drain()
        return self._start()()

    def begin(self) -> BegunWork:
        return self.backend.worker.begin(self._start())

    def _start(self) -> Callable[[], R]:
        step = self.backend.next_step(self.op, self.tag)
        return lambda: self.backend.guarded(lambda: self.go(step), step)

    def go(self, step: Step) -> R:
        raise NotImplementedError


class _Dispatch(_Operation[Received]):
    """One dispatch of one rank: plan; announce, send, lay out."""

    op = "dispatch"

    def __init__(self, backend: CollectiveBackend, call: DispatchCall) -> None:
        super().__init__(backend, call)
        self.call, self.device = call, call.x.device
        self.record = Record(
            kind=KINDS.index(self.op), descriptor=self._descriptor(), num_tokens=call.x.shape[0]
        )
        self.plan = self._plan_fresh() if call.handle is None else self._plan_cached(call.handle)

    def go(self, step: Step) -> Received:
        self.options = self._options(step.seq)
        try:
            records = self.backend.announce(self.record, step)
            if self.call.handle is not None:
                return self._cached(records, step)
            receives = self._receives(records)
            self._check_capacity(receives, step)
        except EPError as error:
            if not self._may_defer(error):
                raise
            self.backend.defer(error)
            return self._failed(int(error.code[1:]))
        arrived = self._exchange_rows(receives[self.spec.rank].tokens_from.tolist(), step)
        received = self._received(self.plan, receives, arrived, status=0)
        if self.call.recv_stats is not None:
            with torch.inference_mode():  # where tensors made in it may be written to, too
                self.call.recv_stats += received.num_tokens_per_expert
        return self._with_origins(received, [r.rows_to for r in records])

    def _options(self, routing_number: int) -> Options:
        call, spec = self.call, self.spec
        return Options(
            layout=call.layout,
            num_ranks=spec.num_ranks,
            max_tokens=spec.max_tokens,
            num_topk=call.num_topk,
            hidden=spec.hidden,
            alignment=call.alignment,
            capacity=call.given_capacity,
            sync=call.sync,
            row_index=call.row_index,
            generation=self.backend.generation,
            routing_number=routing_number,
        )

    # 1. What we send, before anybody is asked.

    def _descriptor(self) -> list[int]:
        call = self.call
        meta, flags = call.meta, 0
        flags |= WEIGHTS if call.topk_weights is not None else 0
        flags |= 0 if call.sync else STATIC
        flags |= 0 if meta is None else CACHED
        return describe(
            layout=LAYOUTS.index(call.layout),
            dtype=DISPATCHABLE.index(call.x.dtype),
            hidden=self.spec.hidden,
            quantize=_QUANTIZE.index(call.quantize),
            scale_block=call.scale_block if call.scale_words > 0 else 0,
            scale_bytes=4 * call.scale_words,
            top_k=call.num_topk,
            alignment=call.alignment,
            capacity=-1 if call.given_capacity is None else call.given_capacity,
            flags=flags,
            routing=meta.routing_number if meta is not None else self._placement_key(),
        )

    def _placement_key(self) -> int:
        return 0 if self.call.replicas is None else self.call.replicas.key

    def _plan_fresh(self) -> SendPlan:
        ids, replicas = self.call.topk_idx, self.call.replicas
        limit = self.spec.num_experts if replicas is None else replicas.num_logical
        bad = find_bad_ids(ids, limit)
        if replicas is not None:
            if bad is None:
                replicas.add_load(ids)
            ids = self.call.topk_idx = replicas.route(ids, self.spec.rank)
        if bad is not None:
            self.record.code, self.record.detail = 213, bad
            ids = torch.full_like(ids, -1)
        plan = plan_sends(ids, self.backend.experts)
        self.record.rows_to = plan.tokens_per_rank
        self.record.selections = plan.selections_per_expert
        return plan

    def _plan_cached(self, handle: Handle) -> SendPlan:
        assert self.call.meta is not None
        self.record.rows_to, self.record.rows_from = handle.rank_counts
        return _plan_of(handle, self.call.meta, self.backend.experts)

    # 2. Where everything will lie, for every rank: all know all counts.

    def _receives(self, records: Sequence[Record]) -> list[ReceivePlan]:
        tokens = torch.stack([counts_of(r.rows_to) for r in records])  # [source, owner]
        selections = torch.stack([counts_of(r.selections) for r in records])  # [source, E]
        return [
            plan_receive(tokens[:, r], selections[:, local], self.options)
            for r, local in enumerate(self.backend.local)
        ]

    def _check_capacity(self, receives: Sequence[ReceivePlan], step: Step) -> None:
        for p, plan in enumerate(receives):
            overflow = find_overflow(plan, self.options)
            if overflow is not None:
                got, limit = overflow
                raise self.wire.error(Finding(230, p, want=limit, have=got), step)

    # 3. Rows, then what travels beside them.

    def _exchange_rows(self, recv: Sequence[int], step: Step) -> Arrived:
        call, plan, step = self.call, self.plan, step.moving()
        x, scales = call.x, call.scales
        if call.quantize is not None:
            x, scales = fp8.quantize(x, kind=call.quantize, scale_block=call.scale_block)
        ranks = range(self.spec.num_ranks)
        sent = [metadata_to(plan, r, call.topk_weights) for r in ranks]
        send = plan.tokens_per_rank.tolist()
        tokens = torch.cat([s.tokens for s in sent])
        words: list[Tensor] = []  # of every row, as int32 [n, columns]
        if call.handle is None:
            words += [tokens.to(torch.int32).unsqueeze(1)]
            words += [torch.cat([s.local_id for s in sent]).to(torch.int32)]
        if call.topk_weights is not None:
            weights = torch.cat([s.topk_weights for s in sent if s.topk_weights is not None])
            words += [weights.view(torch.int32)]
        if scales is not None:
            words += [scales[tokens].view(torch.int32)]
        x = self.wire.exchange(_words(x).index_select(0, tokens), send, recv, step)
        if not words:
            return Arrived(x, None, None, None, None)
        beside = self.wire.exchange(torch.cat(words, 1), send, recv, step)
        return self._unpack(x, beside, step)

    def _unpack(self, x: Tensor, beside: Tensor, step: Step) -> Arrived:
        call, topk = self.call, self.call.num_topk
        token = local_id = weights = scales = None
        widths = [1, topk] if call.handle is None else []
        widths += [topk] if call.topk_weights is not None else []
        widths += [call.scale_words] if call.scale_dtype is not None else []
        columns = iter(torch.split(beside, widths, 1))
        if call.handle is None:
            token = next(columns).squeeze(1).long()
            local_id = next(columns).long()
            limit = self.spec.num_local_experts
            if (
                local_id.numel() > 0
                and not -1 <= int(local_id.min()) <= int(local_id.max()) < limit
            ):
                what = "refused metadata of a peer: an expert or row that does not exist"
                raise make_error("E240", what, rank=self.spec.rank, op="dispatch", seq=step.seq)
        if call.topk_weights is not None:
            weights = next(columns).contiguous().view(torch.float32)
        if call.scale_dtype is not None:
            scales = next(columns).contiguous().view(call.scale_dtype)
        return Arrived(x, scales, weights, token, local_id)

    # 4. The layout asked for.

    def _received(
        self, plan: SendPlan, receives: Sequence[ReceivePlan], arrived: Arrived, status: int
    ) -> Received:
        call, me = self.call, self.spec.rank
        token_base = torch.stack([r.token_base[me] for r in receives])  # [R]
        expert_base = torch.zeros(self.spec.num_experts, dtype=torch.int64)
        for local, receive in zip(self.backend.local, receives, strict=True):
            expert_base[local] = receive.expert_base[me]
        grant = receives[me]._replace(
            tokens_from=receives[me].tokens_from.to(self.device),
            num_tokens_per_expert=receives[me].num_tokens_per_expert.to(self.device),
            offsets=receives[me].offsets.to(self.device),
        )
        rows = send_rows(plan, call.layout, token_base.to(self.device), expert_base.to(self.device))
        # Copies: the caller may write to its own.
        plan = plan._replace(topk_idx=call.topk_idx.clone())
        weights = None if call.topk_weights is None else call.topk_weights.clone()
        handle = make_handle(self.options, plan, weights, rows, grant, arrived)
        received = arrange(
            arrived,
            handle,
            HandleMeta.unpack(handle.meta),
            idx_dtype=call.idx_dtype,
            row_index_rows=row_index_length(grant, self.options),
            status=status,
        )
        return replace(received, x=received.x.view(call.wire_dtype))

    def _with_origins(self, received: Received, rows_to: Sequence[Tensor | None]) -> Received:
        if self.call.origins:
            rank_rows = torch.stack([counts_of(r) for r in rows_to]).to(self.device)
            meta = HandleMeta.unpack(received.handle.meta)
            received.origins = trace_origins(rank_rows, received.handle, meta)
        return received

    def _cached(self, records: Sequence[Record], step: Step) -> Received:
        call = self.call
        assert call.handle is not None
        assert call.meta is not None
        recv = [int(counts_of(r.rows_to)[self.spec.rank]) for r in records]
        handle, meta = call.handle, call.meta
        if call.topk_weights is not None:
            meta = meta._replace(has_weights=True)
            weights = call.topk_weights.clone()
            handle = handle._replace(meta=meta.pack(), topk_weights=weights)
        received = arrange(self._exchange_rows(recv, step), handle, meta)
        return replace(received, x=received.x.view(call.wire_dtype))

    # A static call that failed: its shapes, nothing in them, and the code.

    def _may_defer(self, error: EPError) -> bool:
        ours = int(error.code[1:]) in _DEFERRABLE and not error.what.startswith("cannot go on")
        return ours and not self.call.sync

    def _failed(self, code: int) -> Received:
        call, ranks = self.call, self.spec.num_ranks
        plan = plan_sends(torch.full_like(call.topk_idx, -1), self.backend.experts)
        receives = [
            plan_receive(
                torch.zeros(ranks, dtype=torch.int64),
                torch.zeros((ranks, mine.numel()), dtype=torch.int64),
                self.options,
            )
            for mine in self.backend.local
        ]
        x = _words(call.x.new_empty((0, self.spec.hidden), dtype=call.wire_dtype))
        words, topk = call.scale_words, call.num_topk
        scales = None
        if call.scale_dtype is not None:
            scales = call.x.new_empty((0, words), dtype=call.scale_dtype)
        weights = None
        if call.topk_weights is not None:
            weights = call.topk_weights.new_empty((0, topk))
        ids = call.topk_idx.new_empty((0, topk))
        arrived = Arrived(x, scales, weights, ids.new_empty(0), ids)
        none = torch.zeros(ranks, dtype=torch.int64)
        received = self._received(plan, receives, arrived, code)
        return self._with_origins(received, [none] * ranks)


class _Combine(_Operation[Combined]):
    """One combine of one rank: plan; announce, send rows back, add."""

    op = "combine"

    def __init__(self, backend: CollectiveBackend, call: CombineCall) -> None:
        super().__init__(backend, call)
        self.call, self.layout = call, call.meta.layout
        self.plan = plan = _plan_of(call.handle, call.meta, backend.experts)
        ranks = range(self.spec.num_ranks)
        if call.per_rank:  # one contribution for each rank, like those of compact
            self.layout = "compact"
            self.send = call.handle.rank_counts[1].tolist()
        else:
            self.back = [rows_for_source(call.handle, call.meta, r) for r in ranks]
            self.send = [rows.numel() for rows in self.back]
        per_rank = plan.tokens_per_rank
        if self.layout != "compact":
            per_rank = torch.bincount(plan.dst[plan.dst >= 0], minlength=self.spec.num_ranks)
        self.recv = per_rank.tolist()
        self.record = Record(
            kind=KINDS.index(self.op),
            descriptor=self._descriptor(),
            num_tokens=call.meta.num_tokens,
            rows_to=torch.tensor(self.send),
            rows_from=per_rank,
        )

    def go(self, step: Step) -> Combined:
        call, plan, layout = self.call, self.plan, self.layout
        self.backend.announce(self.record, step)
        step = step.moving()
        rows = self.wire.exchange(self._outgoing(), self.send, self.recv, step).view(call.x.dtype)
        weights = call.handle.topk_weights if call.weighted else None
        total = add_in_order(
            rows, plan, layout, topk_weights=weights, bias=call.bias, order=call.order
        )
        if call.out is not None:
            total = call.out.copy_(total)
        if call.topk_weights is None:
            return total
        values = call.topk_weights if layout == "compact" else call.topk_weights.flatten()
        values = values[torch.cat(self.back)]
        home = self.wire.exchange(values, self.send, self.recv, step)
        bring = add_in_order if call.sum_weights else weights_home
        return total, torch.clone(bring(home, plan, layout), memory_format=torch.contiguous_format)

    def _outgoing(self) -> Tensor:
        """Rows for every source, one source behind the other, as words."""
        call, rows = self.call, self.call.x.flatten(0, -2)
        if call.per_rank:
            factors = None if call.row_weights is None else call.row_weights.flatten()
            parts = [
                parts_for_source(rows, call.handle, call.meta, r, factors)
                for r in range(self.spec.num_ranks)
            ]
            return _words(torch.cat(parts))
        index = torch.cat(self.back)
        # Compact rows travel as they lie.
        words = _words(rows)
        return words[: index.numel()] if self.layout == "compact" else words.index_select(0, index)

    def _descriptor(self) -> list[int]:
        call, meta = self.call, self.call.meta
        flags = WEIGHTS if call.topk_weights is not None else 0
        flags |= WEIGHTED if call.weighted or call.row_weights is not None else 0
        flags |= PER_RANK if call.per_rank else 0
        return describe(
            layout=LAYOUTS.index(meta.layout),
            dtype=DISPATCHABLE.index(call.x.dtype),
            hidden=meta.hidden,
            top_k=meta.num_topk,
            flags=flags,
            routing=meta.routing_number,
        )


def _words(rows: Tensor) -> Tensor:
    """Rows as int64 words: all dtypes move alike, bit for bit, and few operations know them all."""
    if rows.numel() == 0:  # strides of nothing may be anything
        num_words = rows.shape[1] * rows.itemsize // 8
        return rows.new_empty((rows.shape[0], num_words), dtype=torch.int64)
    return rows.view(torch.int64)


def _plan_of(handle: Handle, meta: HandleMeta, experts: ExpertOwner) -> SendPlan:
    """The source's plan again; E320 when the handle is not whole: anybody may have edited it."""
    sent = torch.where(handle.send_row >= 0, handle.topk_idx, -1)
    if find_bad_ids(sent, experts.owner.numel()) is not None:
        reject_handle("topk_idx changed", "the ids dispatched")
    plan = plan_sends(sent, experts)
    counts, row = handle.rank_counts, handle.recv_row
    num_recv = int(counts[1].sum())
    rows = meta.num_rows * (meta.num_local_experts if meta.layout == "slab" else 1)
    limit = min(meta.num_unique, rows) if meta.layout == "compact" else meta.num_unique
    if not torch.equal(plan.tokens_per_rank, counts[0]):
        reject_handle("send_row or rank_counts changed", "those of the dispatch")
    if int(counts.min()) < 0 or num_recv > limit or (meta.sync and num_recv != meta.num_unique):
        reject_handle(f"{num_recv} received rows", str(meta.num_unique))
    if row.numel() > 0 and not -1 <= int(row.min()) <= int(row.max()) < rows:
        reject_handle("recv_row changed", f"rows below {rows}")
    return plan
