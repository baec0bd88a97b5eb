"""dispatch and combine for all ranks in one process: what every backend must reproduce bit for bit.

Tensors of the ranks stand in lists, one entry per rank. Each function walks the steps a rank really
takes (plan, announce counts, receive bases, send rows, lay out), with every exchange replaced by
indexing a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, overload

import torch
from torch import Tensor

from ep_comm.checks import check_per_rank
from ep_comm.errors import make_error
from ep_comm.handle import LAYOUTS, Handle, HandleMeta, parse_handle, reject_handle
from ep_comm.received import Received
from ep_comm.reference import fp8
from ep_comm.reference.routing import (
    BadIds,
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
    NodesOfSource,
    add_in_order,
    parts_for_source,
    plan_from_handle,
    rows_for_source,
    weights_home,
)
from ep_comm.replicas import LayerReplicas

Bias = Tensor | tuple[Tensor | None, Tensor | None] | None


def dispatch(
    x: Sequence[Tensor],
    topk_idx: Sequence[Tensor] | None = None,
    topk_weights: Sequence[Tensor] | None = None,
    *,
    num_experts: int,
    max_tokens: int,
    expert_map: Sequence[int] | Tensor | None = None,
    layout: str = "compact",
    alignment: int = 1,
    capacity: int | None = None,
    scales: Sequence[Tensor] | None = None,
    quantize: str | None = None,
    scale_block: int = 128,
    row_index: bool = False,
    origins: bool = False,
    sync: bool = True,
    handles: Sequence[Handle | Sequence[Tensor]] | None = None,
    replicas: Sequence[LayerReplicas] | None = None,
    recv_stats: Sequence[Tensor] | None = None,
    generation: int = 0,
    routing_number: int = 0,
) -> list[Received]:
    """Send each token to the ranks that own its experts, for all R ranks at once.

    Every list has one tensor per rank; T may differ between ranks and be 0, K and H may not.

    Args:
        x: [T, H] per rank; any dtype (the oracle also takes float64).
        topk_idx: int64 or int32 [T, K] global expert ids, -1 = none.
        topk_weights: float32, bfloat16 or float16 [T, K]; travel as float32 (float64 as float64).
        expert_map: int [E] owner of each expert; None = contiguous blocks.
        layout, alignment, capacity, row_index, origins, sync: as `Buffer.dispatch`; capacity None =
            no limit for compact and grouped with sync=True, else the worst case.
        scales: [T, S] per rank, any strides; travel verbatim.
        quantize: "fp8" or "fp8_ue8m0", see `quantize`; scales are made then.
        handles: of an earlier dispatch, one per rank, instead of topk_idx: same rows as before.
            Layout, alignment, capacity and sync are the handle's; those passed are ignored.
        replicas: of each rank: topk_idx names logical experts, and each selection goes to one of
            num_experts physical ones; handles hold those. Adds to `load` of each rank.
        recv_stats: int32 [El] per rank; num_tokens_per_expert is added to it. Not with handles.
        generation, routing_number: written into the handles.
    Returns:
        One Received per rank. With handles: topk_idx and row_index are None, the handle is the one
        given, carrying the new topk_weights if there are any.
    Raises:
        EPArgumentError: E200, E201, E203, E211, E212 on bad arguments; E213 on ids outside [-1, E).
        EPCapacityError: E230, more than max_tokens, or more rows than capacity on any rank.
        With sync=False, E213 and E230 of the routing do not raise: every rank's Received then has
        status = 213 or 230, counts 0 and ids -1.
    """
    if quantize is not None:
        pairs = [fp8.quantize(rows, kind=quantize, scale_block=scale_block) for rows in x]
        x, scales = [q for q, _ in pairs], [s for _, s in pairs]
    weights = _float_weights(topk_weights)
    if handles is not None:
        if topk_idx is not None:
            _reject("E203", "rejected topk_idx: the handle has the routing, want None with handle=")
        if recv_stats is not None:
            _reject("E203", "rejected recv_stats: want None with handle=")
        return _dispatch_cached(x, scales, weights, handles, expert_map)
    if topk_idx is None:
        _reject("E200", "rejected topk_idx: got None, want int64 or int32 [T, K]")
    _check_inputs(x, topk_idx, topk_weights, layout, alignment, capacity, max_tokens)
    experts = expert_owner(num_experts, len(x), expert_map)
    options = Options(
        layout=layout,
        num_ranks=len(x),
        max_tokens=max_tokens,
        num_topk=topk_idx[0].shape[1],
        hidden=x[0].shape[1],
        alignment=alignment,
        capacity=capacity,
        sync=sync,
        row_index=row_index,
        generation=generation,
        routing_number=routing_number,
    )
    received = _dispatch_fresh(x, scales, topk_idx, weights, experts, options, replicas)
    if origins:
        rank_rows = torch.stack([r.handle.rank_counts[0] for r in received])
        for r in received:
            r.origins = trace_origins(rank_rows, r.handle, HandleMeta.unpack(r.handle.meta))
    for stats, r in zip(recv_stats or [], received, strict=recv_stats is not None):
        stats += r.num_tokens_per_expert
    return received


def _dispatch_fresh(
    x: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    experts: ExpertOwner,
    options: Options,
    replicas: Sequence[LayerReplicas] | None,
) -> list[Received]:
    ids = [idx.long() for idx in topk_idx]
    if replicas is None:
        bad = [find_bad_ids(idx, len(experts.owner)) for idx in ids]
    else:
        tables = list(zip(replicas, ids, strict=True))
        bad = [find_bad_ids(idx, table.num_logical) for table, idx in tables]
        for (table, idx), found in zip(tables, bad, strict=True):
            if found is None:
                table.add_load(idx)
        ids = [table.route(idx, rank) for rank, (table, idx) in enumerate(tables)]
    status = 213 if any(bad) else 0
    if status and options.sync:
        _raise_bad_ids(bad)
    valid = [torch.full_like(i, -1) if status else i for i in ids]  # a failed call sends nothing
    sends = [plan_sends(i, experts) for i in valid]
    receives = _exchange_counts(sends, experts, options)
    overflows = [find_overflow(plan, options) for plan in receives]
    if any(overflows):
        if options.sync:
            _raise_overflow(overflows)
        status = 230
        sends = [plan_sends(torch.full_like(i, -1), experts) for i in ids]
        receives = _exchange_counts(sends, experts, options)

    received = []
    for rank, (plan, grant) in enumerate(zip(sends, receives, strict=True)):
        # What the receivers publish to this rank: its first row at each, and for each expert.
        token_base = torch.stack([r.token_base[rank] for r in receives])  # [R]
        expert_base = _expert_base(receives, experts, rank)  # [E]
        arrived = _exchange_rows(rank, sends, x, scales, topk_weights)
        handle = make_handle(
            options,
            plan._replace(topk_idx=ids[rank]),
            None if topk_weights is None else topk_weights[rank],
            send_rows(plan, options.layout, token_base, expert_base),
            grant,
            arrived,
        )
        meta = HandleMeta.unpack(handle.meta)
        received.append(
            arrange(
                arrived,
                handle,
                meta,
                idx_dtype=topk_idx[rank].dtype,
                row_index_rows=row_index_length(grant, options),
                status=status,
            )
        )
    return received


def _dispatch_cached(
    x: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    topk_weights: Sequence[Tensor] | None,
    handles: Sequence[Handle | Sequence[Tensor]],
    expert_map: Sequence[int] | Tensor | None,
) -> list[Received]:
    parsed, metas, experts = _parse_handles(handles, expert_map)
    for rank, (rows, meta) in enumerate(zip(x, metas, strict=True)):
        _check_shape("x", rank, rows, (meta.num_tokens, rows.shape[-1]))
    sends = [plan_from_handle(handle, experts) for handle in parsed]
    received = []
    for rank, (handle, meta) in enumerate(zip(parsed, metas, strict=True)):
        arrived = _exchange_rows(rank, sends, x, scales, topk_weights)
        arrived = arrived._replace(token=None, local_id=None)
        result = arrange(arrived, handle, meta)
        if topk_weights is not None:
            result.handle = _with_weights(handle, meta, topk_weights[rank])
        received.append(result)
    return received


@overload
def combine(
    x: Sequence[Tensor],
    handles: Sequence[Handle | Sequence[Tensor]],
    *,
    weighted: bool = ...,
    topk_weights: None = ...,
    order: str = ...,
    sum_weights: bool = ...,
    per_rank: bool = ...,
    row_weights: Sequence[Tensor] | None = ...,
    bias: Sequence[Bias] | None = ...,
    ranks_per_node: int | None = ...,
    expert_map: Sequence[int] | Tensor | None = ...,
) -> list[Tensor]: ...


@overload
def combine(
    x: Sequence[Tensor],
    handles: Sequence[Handle | Sequence[Tensor]],
    *,
    weighted: bool = ...,
    topk_weights: Sequence[Tensor],
    order: str = ...,
    sum_weights: bool = ...,
    per_rank: bool = ...,
    row_weights: Sequence[Tensor] | None = ...,
    bias: Sequence[Bias] | None = ...,
    ranks_per_node: int | None = ...,
    expert_map: Sequence[int] | Tensor | None = ...,
) -> list[tuple[Tensor, Tensor]]: ...


def combine(
    x: Sequence[Tensor],
    handles: Sequence[Handle | Sequence[Tensor]],
    *,
    weighted: bool = False,
    topk_weights: Sequence[Tensor] | None = None,
    order: str = "rank",
    sum_weights: bool = False,
    per_rank: bool = False,
    row_weights: Sequence[Tensor] | None = None,
    bias: Sequence[Bias] | None = None,
    ranks_per_node: int | None = None,
    expert_map: Sequence[int] | Tensor | None = None,
) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
    """Return expert results to the tokens' sources and add them there, for all R ranks at once.

    Args:
        x: per rank, shape of the dispatched x (E201): [N, H], [rows, H] or [El, capacity, H];
            bfloat16, float16, float32 or float64.
        weighted: multiply each contribution by the topk_weights given at dispatch (grouped, slab).
        topk_weights: float32 per rank, one number per selection in the layout of the dispatched
            ones; each goes home to its (token, slot).
        order: "rank", or (grouped, slab) "topk": slots as they stand, whoever owns the expert.
        sum_weights: (compact) a slot gets the sum over all ranks of the token instead.
        per_rank: (grouped, slab) owners add up their rows of a token, slots as they stand, and
            round; the source adds what the ranks send.
        row_weights: float32 per rank, one for each row of x: multiplied there, per_rank.
        bias: per rank [T, H], a pair of them (either None), or None; the sum starts there.
        ranks_per_node: of several nodes: each adds up its rows of a token and rounds; the source
            adds these sums of other nodes where their ranks stand in the order. Not with "topk".
        expert_map: as given to dispatch.
    Returns:
        Per rank [T, H] in the dtype of x; with topk_weights, pairs of it and float32 [T, K]. The
        sum is fp32 (float64 for float64) in the order asked for, rounded once.
    Raises:
        EPArgumentError: E201 wrong shape, E203 weighted without weights or in the compact layout,
            per_rank with another option that asks for single rows.
        EPUsageError: E320, not handles of one dispatch.
    """
    parsed, metas, experts = _parse_handles(handles, expert_map)
    layout, num_ranks = metas[0].layout, len(parsed)
    if weighted and (layout == "compact" or not metas[0].has_weights):
        want = "layout grouped or slab, and topk_weights given at dispatch"
        _reject("E203", f"rejected weighted=True: want {want}")
    if per_rank:
        check_per_rank(metas[0], weighted=weighted, order=order, topk_weights=topk_weights)
    elif row_weights is not None:
        _reject("E203", "rejected row_weights: want per_rank=True with them")
    for rank, meta in enumerate(metas):
        shape = (*meta.x_shape[:-1], x[rank].shape[-1])
        _check_shape("x", rank, x[rank], shape)
        if row_weights is not None:
            _check_shape("row_weights", rank, row_weights[rank], shape[:-1])
        if topk_weights is not None:
            per_row = (*shape[:-1], meta.num_topk) if layout == "compact" else shape[:-1]
            _check_shape("topk_weights", rank, topk_weights[rank], per_row)

    # What every owner returns to every source, and each source's concatenation of it.
    flat = [_row_list(rows, layout) for rows in x]
    back = [
        [rows_for_source(handle, meta, source) for source in range(num_ranks)]
        for handle, meta in zip(parsed, metas, strict=True)
    ]

    def returned(owner: int, source: int) -> Tensor:
        if not per_rank:
            return flat[owner][back[owner][source]]
        factors = None if row_weights is None else row_weights[owner].flatten()
        return parts_for_source(flat[owner], parsed[owner], metas[owner], source, factors)

    plans = [plan_from_handle(handle, experts) for handle in parsed]
    nodes = [
        None if ranks_per_node is None else NodesOfSource(ranks_per_node, r // ranks_per_node)
        for r in range(num_ranks)
    ]
    sums = []
    for source, plan in enumerate(plans):
        sums.append(
            add_in_order(
                torch.cat([returned(owner, source) for owner in range(num_ranks)]),
                plan,
                "compact" if per_rank else layout,  # one contribution for each rank
                topk_weights=parsed[source].topk_weights if weighted else None,
                bias=None if bias is None else bias[source],
                order=order,
                nodes=nodes[source],
            )
        )
    if topk_weights is None:
        return sums
    values = _float_weights(topk_weights)
    assert values is not None
    home = []
    for source, plan in enumerate(plans):
        rows = [_row_list(values[owner], layout)[back[owner][source]] for owner in range(num_ranks)]
        all_rows = torch.cat(rows)
        if sum_weights:
            home.append(add_in_order(all_rows, plan, layout, nodes=nodes[source]))
        else:
            home.append(weights_home(all_rows, plan, layout))
    return list(zip(sums, home, strict=True))


# ---- The exchanges, as indexing ----


def _exchange_counts(
    sends: Sequence[SendPlan], experts: ExpertOwner, options: Options
) -> list[ReceivePlan]:
    """Every receiver sees the counts of every source."""
    receives = []
    for rank in range(options.num_ranks):
        local = (experts.owner == rank).nonzero().squeeze(1).to(sends[0].dst.device)  # [El]
        tokens_from = torch.stack([plan.tokens_per_rank[rank] for plan in sends])
        selections_from = torch.stack([plan.selections_per_expert[local] for plan in sends])
        receives.append(plan_receive(tokens_from, selections_from, options))
    return receives


def _expert_base(receives: Sequence[ReceivePlan], experts: ExpertOwner, source: int) -> Tensor:
    """int64 [E]: first row of this source's selections of every expert, at its owner."""
    owners, local_ids = experts.owner.tolist(), experts.local_id.tolist()
    bases = [receives[r].expert_base[source, i] for r, i in zip(owners, local_ids, strict=True)]
    return torch.stack(bases)


def _exchange_rows(
    rank: int,
    sends: Sequence[SendPlan],
    x: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    topk_weights: Sequence[Tensor] | None,
) -> Arrived:
    """Everything that reaches `rank`, source by source: this concatenation is the compact order."""
    sent = [
        metadata_to(plan, rank, None if topk_weights is None else topk_weights[source])
        for source, plan in enumerate(sends)
    ]
    tokens = [s.tokens for s in sent]
    weights = [s.topk_weights for s in sent if s.topk_weights is not None]
    return Arrived(
        x=_gather(x, tokens),
        scales=None if scales is None else _gather(scales, tokens),
        topk_weights=torch.cat(weights) if weights else None,
        token=torch.cat(tokens),
        local_id=torch.cat([s.local_id for s in sent]),
    )


def _gather(rows: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Rows `tokens[s]` of every source s, concatenated; 8-bit dtypes move as bytes."""
    dtype = rows[0].dtype
    if dtype.itemsize == 1:  # a view cuts the autograd graph, so the others go without
        return _gather_any([r.view(torch.uint8) for r in rows], tokens).view(dtype)
    return _gather_any(rows, tokens)


def _gather_any(rows: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    return torch.cat([r[t] for r, t in zip(rows, tokens, strict=True)])


def _row_list(x: Tensor, layout: str) -> Tensor:
    """Slab [El, capacity, ...] as rows [El * capacity, ...]."""
    return x.flatten(0, 1) if layout == "slab" else x


# ---- Arguments ----


def _float_weights(weights: Sequence[Tensor] | None) -> list[Tensor] | None:
    if weights is None:
        return None
    return [w if w.dtype == torch.float64 else w.to(torch.float32) for w in weights]


def _with_weights(handle: Handle, meta: HandleMeta, weights: Tensor) -> Handle:
    _check_shape("topk_weights", None, weights, (meta.num_tokens, meta.num_topk))
    return handle._replace(meta=meta._replace(has_weights=True).pack(), topk_weights=weights)


def _parse_handles(
    handles: Sequence[Handle | Sequence[Tensor]], expert_map: Sequence[int] | Tensor | None
) -> tuple[list[Handle], list[HandleMeta], ExpertOwner]:
    """The handles of one dispatch, one per rank."""
    pairs = [parse_handle(handle) for handle in handles]
    metas = [meta for _, meta in pairs]
    experts = expert_owner(metas[0].num_experts, len(pairs), expert_map)
    for rank, meta in enumerate(metas):
        if meta.num_ranks != len(pairs):
            reject_handle(f"{len(pairs)} handles", f"{meta.num_ranks}, one per rank")
        if meta.num_local_experts != experts.num_local[rank]:
            got = f"{meta.num_local_experts} local experts on rank {rank}"
            reject_handle(got, f"{experts.num_local[rank]}, as expert_map says")
        if (meta.layout, meta.routing_number) != (metas[0].layout, metas[0].routing_number):
            reject_handle(f"another dispatch on rank {rank}", "handles of one dispatch")
    return [handle for handle, _ in pairs], metas, experts


def _check_inputs(
    x: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    layout: str,
    alignment: int,
    capacity: int | None,
    max_tokens: int,
) -> None:
    if layout not in LAYOUTS:
        _reject("E203", f"rejected layout={layout}: want one of {LAYOUTS}")
    if alignment < 1:
        _reject("E203", f"rejected alignment={alignment}: want >= 1")
    if capacity is not None and capacity < 0:
        _reject("E203", f"rejected capacity={capacity}: want >= 0")
    num_topk = topk_idx[0].shape[-1]
    for rank, (rows, idx) in enumerate(zip(x, topk_idx, strict=True)):
        num_tokens = rows.shape[0]
        _check_shape("x", rank, rows, (num_tokens, x[0].shape[-1]))
        _check_shape("topk_idx", rank, idx, (num_tokens, num_topk))
        if idx.dtype not in (torch.int64, torch.int32):
            _reject("E200", f"rejected topk_idx: got {idx.dtype}, want int64 or int32", rank)
        if topk_weights is not None:
            _check_shape("topk_weights", rank, topk_weights[rank], (num_tokens, num_topk))
        if num_tokens > max_tokens:
            _raise_overflow([None] * rank + [(num_tokens, max_tokens)])


def _check_shape(name: str, rank: int | None, tensor: Tensor, want: tuple[int, ...]) -> None:
    if tensor.shape != want:
        _reject("E201", f"rejected {name}: got {list(tensor.shape)}, want {list(want)}", rank)


def _reject(code: str, what: str, rank: int | None = None) -> NoReturn:
    raise make_error(code, what, rank=rank)


def _raise_bad_ids(bad: Sequence[BadIds | None]) -> NoReturn:
    rank, first = next((r, b) for r, b in enumerate(bad) if b is not None)
    where = f"first token {first.token}, k {first.slot}, id {first.expert}"
    what = f"got {first.num_bad} bad ids from rank {rank}: {where}"
    raise make_error("E213", what, peer=rank, op="dispatch")


def _raise_overflow(overflows: Sequence[tuple[int, int] | None]) -> NoReturn:
    rank, (got, limit) = next((r, o) for r, o in enumerate(overflows) if o is not None)
    what = f"has too many tokens: got {got}, want <= {limit}"
    raise make_error("E230", what, rank=rank, op="dispatch")
