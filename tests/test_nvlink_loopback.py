"""The nvlink backend with all ranks in one process on one GPU, bit for bit as the reference.

Kernels of all ranks run at the same time and wait for each other. So nothing of torch's own runs
between the calls of a test: a kernel that torch loads lazily would wait for ours, and ours for it.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from compare import same_bits, same_received, same_values
from patience import LONGER_S, PATIENT, SLOWED, Disturbed, three_tries
from torch import Tensor

from ep_comm import Buffer, EPConfig, Handle, Received, reference
from ep_comm.errors import EPError, EPTimeout
from ep_comm.received import Origins
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu

# Streams that share a hardware queue wait for each other; read when CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

HIDDEN = 256
MAX_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """One routing and what dispatch is asked to do with it."""

    num_ranks: int = 4
    num_experts: int = 10
    num_topk: int = 4
    hidden: int = HIDDEN
    tokens: tuple[int, ...] | None = None  # of the ranks; None: uneven, the second has none
    dtype: torch.dtype = torch.bfloat16
    idx_dtype: torch.dtype = torch.int64
    ids: str = "random"
    weights: bool = True
    scales: torch.dtype | None = None
    expert_map: tuple[int, ...] | None = None
    num_sms: int | None = 4
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def num_tokens(self) -> tuple[int, ...]:
        if self.tokens is not None:
            return self.tokens
        return tuple((MAX_TOKENS, 0, 17, 1)[r % 4] for r in range(self.num_ranks))

    def inputs(self) -> Inputs:
        g = torch.Generator().manual_seed(self.seed)
        result = Inputs([], [], [] if self.weights else None, [] if self.scales else None)
        for rank, tokens in enumerate(self.num_tokens()):
            shape = (tokens, self.num_topk)
            ids = torch.randint(-1, self.num_experts, shape, generator=g)  # with duplicates
            if self.ids == "one":
                ids.fill_(self.num_experts - 1)
            if self.ids == "none":
                ids.fill_(-1)
            result.x.append(rows_of(self.dtype, rank, tokens, self.hidden, g))
            result.topk_idx.append(ids.to(self.idx_dtype))
            if result.topk_weights is not None:
                result.topk_weights.append(torch.randn(shape, generator=g))
            if result.scales is not None:
                words = self.hidden // (128 if self.scales == torch.float32 else 512)
                bits = torch.randint(0, 2**30, (tokens, words), generator=g, dtype=torch.int32)
                result.scales.append(bits.view(self.scales))
        return result

    def buffer_options(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
            "hidden": self.hidden,
            "max_tokens": max(1, *self.num_tokens()),
            "expert_map": self.expert_map,
            "num_sms": self.num_sms,
            "arena_bytes": 64 << 20,
        }


@dataclass
class Inputs:
    """Per rank."""

    x: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor] | None
    scales: list[Tensor] | None


def rows_of(dtype: torch.dtype, rank: int, tokens: int, hidden: int, g: torch.Generator) -> Tensor:
    """Rows that tell where they come from in their first element, the rest random."""
    if dtype.itemsize == 1:
        rows = torch.randint(0, 120, (tokens, hidden), generator=g, dtype=torch.uint8)
        return rows.view(dtype)
    rows = torch.randn((tokens, hidden), generator=g)
    rows[:, 0] = torch.arange(tokens) + 64 * rank
    return rows.to(dtype)


def on_gpu(tensors: list[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else [t.cuda() for t in tensors]


def on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Handle):
        return Handle(*(t.cpu() for t in value))
    if isinstance(value, Origins):
        return Origins(*(on_cpu(t) for t in vars(value).values()))
    return value


def received_on_cpu(recv: Received) -> Received:
    values = {f.name: on_cpu(getattr(recv, f.name)) for f in dataclasses.fields(Received)}
    if recv.scales is not None and recv.layout == "slab":
        values["scales"] = torch.empty_strided(
            recv.scales.shape, recv.scales.stride(), dtype=recv.scales.dtype
        ).copy_(recv.scales)
    return Received(**values)


def of_rank(values: list[Tensor] | None, rank: int) -> Tensor | None:
    return None if values is None else values[rank]


def on_streams(cluster: Cluster, work: Callable[[int], Any]) -> list[Any]:
    """Every rank on a stream of its own, all work done when this returns."""
    streams = [torch.cuda.Stream() for _ in range(cluster.num_ranks)]
    torch.cuda.synchronize()

    def body(rank: int) -> Any:
        with torch.cuda.stream(streams[rank]):
            result = work(rank)
        streams[rank].synchronize()
        return result

    return cluster.run(body)


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(num_ranks: int, **options: Any) -> Cluster:
        cluster = Cluster(1, num_ranks, device="cuda")
        made.append(cluster)
        options.setdefault("config", PATIENT)
        cluster.make_buffers(**options)
        return cluster

    gc.collect()  # memory freed later would wait for kernels of this test
    yield make
    for cluster in made:
        cluster.close()
    torch.cuda.synchronize()


def dispatch_options(case: Case) -> dict[str, Any]:
    return {"layout": "compact", **case.options}


def want_dispatch(case: Case, inputs: Inputs) -> list[Received]:
    return reference.dispatch(
        inputs.x, inputs.topk_idx, inputs.topk_weights, scales=inputs.scales,
        num_experts=case.num_experts, max_tokens=max(1, *case.num_tokens()),
        expert_map=case.expert_map, **dispatch_options(case),
    )  # fmt: skip


def check_received(got: Received, want: Received, *, computed: bool) -> None:
    meta = want.handle.meta.clone()
    meta[1:3] = got.handle.meta[1:3]  # the buffer's generation, the number of the operation
    want = dataclasses.replace(want, handle=want.handle._replace(meta=meta))
    # Across nodes what crossed stands behind the rows of selections.
    rows = got.handle.recv_row[: want.handle.recv_row.shape[0]]
    got = dataclasses.replace(got, handle=got.handle._replace(recv_row=rows))
    same_received(received_on_cpu(got), want, computed=computed)


# ---- dispatch ----

STATIC = {"sync": False}
GROUPED = {"layout": "grouped", "alignment": 4}
SLAB = {"layout": "slab"}
RUNS: dict[str, Any] = {"num_ranks": 2, "tokens": (MAX_TOKENS, 17), "hidden": 3584, "num_sms": 1}
USUAL: dict[str, Any] = {"num_ranks": 2, "tokens": (17, 9), "hidden": 3584, "num_sms": None}
ROOM: dict[str, Any] = {"num_ranks": 2, "tokens": (2, 11), "hidden": 3584, "num_sms": None}
CASES = {
    "one-rank": Case(num_ranks=1, tokens=(33,)),
    "ep2": Case(num_ranks=2),
    "ep3": Case(num_ranks=3),
    "ep4": Case(),
    "ep8": Case(num_ranks=8),
    "ep4-fewer-experts-than-ranks": Case(num_experts=2),
    "one-sm": Case(num_sms=1),
    "top-1": Case(num_topk=1),
    "top-6": Case(num_topk=6, tokens=(37, 40, 5, 12)),
    "top-32-of-64": Case(num_topk=32, num_experts=64),
    "int32-ids": Case(idx_dtype=torch.int32),
    "no-weights": Case(weights=False),
    "nobody-sends": Case(tokens=(0, 0, 0, 0)),
    "all-minus-one": Case(ids="none"),
    "all-to-one-expert": Case(ids="one"),
    "all-to-one-expert-grouped": Case(ids="one", tokens=(40,) * 4, options=GROUPED),
    "all-to-one-expert-row-index": Case(
        ids="one", tokens=(40,) * 4, options={"row_index": True, "alignment": 8}
    ),
    "map-of-experts": Case(expert_map=(3, 1, 0, 0, 3, 1, 1, 3, 0, 3)),
    "fp32": Case(dtype=torch.float32),
    "fp16-hidden-8": Case(dtype=torch.float16, hidden=8),
    "fp8": Case(dtype=torch.float8_e4m3fn),
    "fp8-scales": Case(dtype=torch.float8_e4m3fn, scales=torch.float32),
    "fp8-packed-scales": Case(dtype=torch.float8_e5m2, scales=torch.int32, hidden=1024),
    "row-of-64-kib": Case(dtype=torch.float32, hidden=16384, tokens=(3, 2, 0, 1)),
    "static": Case(options=STATIC),
    "static-capacity": Case(options={**STATIC, "capacity": 60}),
    "row-index": Case(options={"row_index": True, "alignment": 8}),
    "static-row-index": Case(options={**STATIC, "row_index": True, "alignment": 8}),
    "grouped": Case(options=GROUPED),
    "grouped-static": Case(options={**GROUPED, **STATIC}),
    "grouped-top-32": Case(num_topk=32, num_experts=64, options=GROUPED),
    "grouped-scales": Case(dtype=torch.float8_e4m3fn, scales=torch.float32, options=GROUPED),
    "slab": Case(options=SLAB),
    "slab-capacity": Case(options={**SLAB, "capacity": 50}),
    "slab-static": Case(options={**SLAB, **STATIC}),
    "slab-scales": Case(dtype=torch.float8_e4m3fn, scales=torch.float32, options=SLAB),
    "origins": Case(options={"origins": True}),
    "origins-static": Case(options={"origins": True, **STATIC}),
    "origins-grouped": Case(options={"origins": True, **GROUPED}),
    "origins-grouped-static": Case(options={"origins": True, **GROUPED, **STATIC}),
    "origins-slab": Case(options={"origins": True, **SLAB}),
    "quantize": Case(options={"quantize": "fp8"}),
    "quantize-fp32-block-32": Case(
        dtype=torch.float32, hidden=96, options={"quantize": "fp8", "scale_block": 32}
    ),
    "quantize-fp16-ue8m0": Case(
        dtype=torch.float16, hidden=1024, options={"quantize": "fp8_ue8m0", **GROUPED}
    ),
    "quantize-slab": Case(options={"quantize": "fp8", **SLAB}),
    # So many pieces that a warp of a small batch takes several of a row, and loads ahead.
    "runs-static": Case(**RUNS, options=STATIC),
    "runs-static-fp32": Case(**RUNS, dtype=torch.float32, options=STATIC),
    "runs-slab": Case(**RUNS, options=SLAB),
    "runs-slab-uneven": Case(**{**RUNS, "hidden": 3880}, options=SLAB),  # pieces of other lengths
    "runs-slab-scales": Case(**RUNS, dtype=torch.float8_e4m3fn, scales=torch.float32, options=SLAB),
    "runs-quantize-slab": Case(**RUNS, options={"quantize": "fp8", **SLAB}),
    "quantize-slab-7168": Case(
        num_ranks=2, tokens=(1, 3), hidden=7168, options={"quantize": "fp8", **SLAB}
    ),
    # A block for every token: kernels for usual calls (csrc/kernels/usual.cuh).
    "usual-static": Case(**USUAL, options=STATIC),
    "usual-static-quantize": Case(**USUAL, options={"quantize": "fp8", **STATIC}),
    "usual-static-int32-ids": Case(**USUAL, idx_dtype=torch.int32, options=STATIC),
    "usual-slab": Case(**USUAL, options=SLAB),
    "usual-slab-no-weights": Case(**USUAL, weights=False, options=SLAB),
    "usual-slab-fp16": Case(**USUAL, dtype=torch.float16, options=SLAB),
    "usual-slab-scales": Case(
        **USUAL, dtype=torch.float8_e4m3fn, scales=torch.float32, options=SLAB
    ),
    "usual-slab-quantize": Case(**USUAL, options={"quantize": "fp8", **SLAB}),
    "usual-slab-quantize-ue8m0": Case(**USUAL, options={"quantize": "fp8_ue8m0", **SLAB}),
    "usual-slab-quantize-short": Case(
        **{**USUAL, "hidden": 384}, options={"quantize": "fp8", **SLAB}
    ),
    "usual-slab-top-32-of-64": Case(
        **USUAL, num_topk=32, num_experts=64, options={"quantize": "fp8", **SLAB}
    ),
    "usual-slab-every-block-has-a-token": Case(
        **{**USUAL, "tokens": (4, 4), "num_sms": 4}, options={"quantize": "fp8", **SLAB}
    ),
    "usual-slab-all-to-one-expert": Case(**USUAL, ids="one", options={**SLAB, "capacity": 104}),
    "usual-slab-nobody-sends": Case(**{**USUAL, "tokens": (0, 0)}, options=SLAB),
    "usual-slab-one-brings-nothing": Case(**{**USUAL, "tokens": (0, 9)}, options=SLAB),
    "usual-slab-one-token-each": Case(
        **{**USUAL, "tokens": (1, 1)}, options={"quantize": "fp8", **SLAB}
    ),
    "usual-slab-ep8": Case(
        num_ranks=8, tokens=(3, 1, 0, 2, 4, 1, 1, 0), num_experts=16, num_sms=None, options=SLAB
    ),
    "usual-slab-ep9": Case(  # more ranks than a usual call has
        num_ranks=9, tokens=(3, 1, 0, 2, 4, 1, 1, 0, 2), num_experts=18, num_sms=None, options=SLAB
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dispatch_and_combine_agree_with_the_reference(
    make_cluster: Callable[..., Cluster], case: Case
) -> None:
    check_case(make_cluster(case.num_ranks, **case.buffer_options()), case)


def check_case(cluster: Cluster, case: Case, ranks_per_node: int | None = None) -> None:
    """Dispatch, the same by its handle, and combine; `ranks_per_node`: of several nodes."""
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    weights, scales = on_gpu(inputs.topk_weights), on_gpu(inputs.scales)
    assert x is not None
    assert idx is not None

    def dispatch(rank: int, **changed: Any) -> Received:
        options = {**dispatch_options(case), **changed}
        recv: Received = cluster.buffers[rank].dispatch(
            x[rank], options.pop("topk_idx", idx[rank]), of_rank(weights, rank),
            scales=of_rank(scales, rank), **options,
        )  # fmt: skip
        return recv

    got = on_streams(cluster, dispatch)

    computed = "quantize" in case.options
    for rank in range(case.num_ranks):
        check_received(got[rank], want[rank], computed=computed)

    # The same routing again, by its handle.
    keep = ("quantize", "scale_block")
    cached = {k: v for k, v in case.options.items() if k in keep}
    again = on_streams(
        cluster,
        lambda rank: cluster.buffers[rank].dispatch(
            x[rank], None, of_rank(weights, rank), scales=of_rank(scales, rank),
            handle=got[rank].handle, **cached,
        ),
    )  # fmt: skip
    for rank in range(case.num_ranks):
        assert again[rank].topk_idx is None
        first, second = received_on_cpu(got[rank]), received_on_cpu(again[rank])
        n = int(first.num_recv) if case.options.get("layout", "compact") == "compact" else None
        if n is not None:
            same_bits(second.x[:n], first.x[:n], "x of the cached call")
        elif case.options["layout"] == "grouped":
            end = int(first.offsets[-1])
            same_bits(second.x[:end], first.x[:end], "x of the cached call")
        else:
            for e, count in enumerate(first.num_tokens_per_expert.tolist()):
                same_bits(second.x[e, :count], first.x[e, :count], "x of the cached call")
        if weights is not None:
            same_bits(second.topk_weights, first.topk_weights, "weights of the cached call")

    if case.dtype.itemsize > 1:
        check_combine(cluster, case, want, got, ranks_per_node)


def check_combine(
    cluster: Cluster,
    case: Case,
    want: list[Received],
    got: list[Received],
    ranks_per_node: int | None,
) -> None:
    """Combine what experts would return: an ordinary tensor, then arena memory, all options."""
    g = torch.Generator().manual_seed(1)
    layout = case.options.get("layout", "compact")
    y = [torch.randn(w.x.shape, generator=g).to(case.dtype) for w in want]
    on_device = [t.cuda() for t in y]
    plain = on_streams(cluster, lambda r: cluster.buffers[r].combine(on_device[r], got[r].handle))
    sums = reference.combine(
        y, [w.handle for w in want], expert_map=case.expert_map, ranks_per_node=ranks_per_node
    )
    for rank in range(case.num_ranks):
        same_values(plain[rank].cpu(), sums[rank], f"combine of rank {rank}")

    tokens = case.num_tokens()
    shapes = [w.x.shape[:-1] if layout != "compact" else (len(w.x), case.num_topk) for w in want]
    back = [torch.randn(shape, generator=g) for shape in shapes]
    bias = [torch.randn((t, case.hidden), generator=g).to(case.dtype) for t in tokens]
    weighted = layout != "compact" and case.weights
    in_arena = [cluster.buffers[r].empty(t.shape, t.dtype) for r, t in enumerate(on_device)]
    for there, t in zip(in_arena, on_device, strict=True):
        there.copy_(t)
    back_gpu, bias_gpu = on_gpu(back), on_gpu(bias)
    assert back_gpu is not None
    assert bias_gpu is not None
    full = on_streams(
        cluster,
        lambda r: cluster.buffers[r].combine(
            in_arena[r], got[r].handle, weighted=weighted, topk_weights=back_gpu[r],
            bias=(bias_gpu[r], None),
        ),
    )  # fmt: skip
    sums_and_weights = reference.combine(
        y, [w.handle for w in want], weighted=weighted, topk_weights=back, bias=bias,
        expert_map=case.expert_map, ranks_per_node=ranks_per_node,
    )  # fmt: skip
    for rank in range(case.num_ranks):
        same_values(full[rank][0].cpu(), sums_and_weights[rank][0], f"full combine of {rank}")
        same_bits(full[rank][1].cpu(), sums_and_weights[rank][1], f"weights home to {rank}")


# ---- sums by owners ----


@pytest.mark.parametrize("max_tokens", [40, 1100], ids=["small-batches", "pulled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [GROUPED, {**SLAB, "capacity": 80}], ids=["grouped", "slab"])
@pytest.mark.parametrize(
    "shape",
    [{"hidden": 1032}, RUNS, ROOM, {**ROOM, "num_ranks": 1, "tokens": (MAX_TOKENS,)}],
    ids=["short-rows", "runs", "room", "one-rank"],
)
def test_sums_by_owners_agree_with_the_reference(
    make_cluster: Callable[..., Cluster],
    shape: dict[str, Any],
    options: dict[str, Any],
    dtype: torch.dtype,
    max_tokens: int,
) -> None:
    case = Case(**shape, num_topk=8, dtype=dtype, options=options)
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    cluster = make_cluster(case.num_ranks, **{**case.buffer_options(), "max_tokens": max_tokens})
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    assert x is not None
    assert idx is not None
    assert weights is not None
    got = on_streams(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r], idx[r], weights[r], **dispatch_options(case)),
    )

    g = torch.Generator().manual_seed(2)
    y = [torch.randn(w.x.shape, generator=g).to(dtype) for w in want]
    factors = [torch.randn(w.x.shape[:-1], generator=g) for w in want]
    bias = [torch.randn((t, case.hidden), generator=g).to(dtype) for t in case.num_tokens()]
    ordinary, factors_gpu, bias_gpu = on_gpu(y), on_gpu(factors), on_gpu(bias)
    assert ordinary is not None
    in_arena = [cluster.buffers[r].empty(t.shape, t.dtype) for r, t in enumerate(y)]
    for there, t in zip(in_arena, y, strict=True):
        there.copy_(t)
    for rows, weighted, biased in itertools.product((ordinary, in_arena), *2 * ((False, True),)):
        sums = reference.combine(
            y, [w.handle for w in want], per_rank=True,
            row_weights=factors if weighted else None, bias=bias if biased else None,
        )  # fmt: skip

        def combine(
            r: int, rows: list[Tensor] = rows, weighted: bool = weighted, biased: bool = biased
        ) -> Tensor:
            total: Tensor = cluster.buffers[r].combine(
                rows[r], got[r].handle, per_rank=True,
                row_weights=of_rank(factors_gpu, r) if weighted else None,
                bias=of_rank(bias_gpu, r) if biased else None,
            )  # fmt: skip
            return total

        for rank, total in enumerate(on_streams(cluster, combine)):
            same_values(
                total.cpu(), sums[rank], f"weighted {weighted}, biased {biased}, rank {rank}"
            )


@pytest.mark.parametrize("max_tokens", [40, 1100], ids=["small-batches", "pulled"])
def test_sums_may_go_to_the_memory_of_bias(
    make_cluster: Callable[..., Cluster], max_tokens: int
) -> None:
    case = Case(options={**SLAB, "capacity": 50})
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    cluster = make_cluster(case.num_ranks, **{**case.buffer_options(), "max_tokens": max_tokens})
    x, idx, bias = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.x)
    assert x is not None
    assert idx is not None
    assert bias is not None

    def work(rank: int) -> Tensor:
        buffer = cluster.buffers[rank]
        recv = buffer.dispatch(x[rank], idx[rank], **dispatch_options(case))
        return buffer.combine(recv.x, recv.handle, bias=(bias[rank], None), out=bias[rank])

    sums = reference.combine([w.x for w in want], [w.handle for w in want], bias=inputs.x)
    for rank, total in enumerate(on_streams(cluster, work)):
        assert total is bias[rank]
        same_values(total.cpu(), sums[rank], f"rank {rank}")


# ---- statistics ----


@pytest.mark.parametrize("max_tokens", [40, 1100], ids=["small-batches", "pulled"])
@pytest.mark.parametrize("options", [STATIC, {**SLAB, "capacity": 50}], ids=["compact", "slab"])
@three_tries
def test_statistics_are_added_to_what_there_was(
    make_cluster: Callable[..., Cluster], options: dict[str, Any], max_tokens: int
) -> None:
    case, rounds, nap = Case(options=options), 3, 0.2 * SLOWED
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    cluster = make_cluster(case.num_ranks, **{**case.buffer_options(), "max_tokens": max_tokens})
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    assert x is not None
    assert idx is not None
    late = case.num_ranks - 1
    counts = [torch.full_like(w.num_tokens_per_expert, 7).cuda() for w in want]
    waits = [torch.full((2, case.num_ranks), 7, device="cuda") for _ in want]

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        for _ in range(rounds):  # the second goes a shorter way than the first
            time.sleep(nap if rank == late else 0.0)
            recv = buffer.dispatch(
                x[rank], idx[rank], recv_stats=counts[rank], wait_stats=waits[rank][0],
                **dispatch_options(case),
            )  # fmt: skip
            time.sleep(nap if rank == late else 0.0)
            buffer.combine(recv.x, recv.handle, wait_stats=waits[rank][1])

    on_streams(cluster, work)
    for rank in range(case.num_ranks):
        assert torch.equal(counts[rank].cpu(), 7 + rounds * want[rank].num_tokens_per_expert)
        waited = waits[rank].cpu() - 7
        assert (waited >= 0).all()
        waited_long = (waited[:, late] >= 0.75 * rounds * nap * 1e9).all()
        if rank != late and not (waited_long and (waited.argmax(1) == late).all()):
            raise Disturbed(waited)  # a rank that paused was late, too


# ---- one call after the other ----


def test_many_calls_in_a_row_reuse_slots_and_arena(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=4)
    cluster = make_cluster(4, **case.buffer_options())
    rounds = [dataclasses.replace(case, seed=s).inputs() for s in range(6)]
    want = [want_dispatch(case, i) for i in rounds]
    x = [on_gpu(i.x) for i in rounds]
    idx = [on_gpu(i.topk_idx) for i in rounds]
    weights = [on_gpu(i.topk_weights) for i in rounds]

    def work(rank: int) -> list[Any]:
        results = []
        for n in range(18):
            i = n % len(rounds)
            recv = cluster.buffers[rank].dispatch(x[i][rank], idx[i][rank], weights[i][rank])
            out = cluster.buffers[rank].combine(recv.x, recv.handle)
            results.append((i, recv, out))
        return results

    for rank, results in enumerate(on_streams(cluster, work)):
        for i, recv, _ in results:
            check_received(recv, want[i][rank], computed=False)
    sums = [reference.combine([w.x for w in ws], [w.handle for w in ws]) for ws in want]
    del results
    for rank, results in enumerate(on_streams(cluster, work)):
        for i, _, out in results:
            same_values(out.cpu(), sums[i][rank])


def test_graph_replays_with_changing_routing(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=2, tokens=(24, 24), options=STATIC)
    replay_graphs(make_cluster(2, **case.buffer_options()), case)


def replay_graphs(cluster: Cluster, case: Case, ranks_per_node: int | None = None) -> None:
    """A dispatch and a combine of each rank in a graph, replayed with other tokens each time."""
    ranks = range(case.num_ranks)
    rounds = [dataclasses.replace(case, seed=s).inputs() for s in range(5)]
    first = rounds[0]
    x, idx, weights = (on_gpu(t) for t in (first.x, first.topk_idx, first.topk_weights))
    streams = [torch.cuda.Stream() for _ in ranks]
    graphs = [torch.cuda.CUDAGraph() for _ in ranks]
    held: list[Any] = []
    for rank in ranks:  # nothing runs while a graph is captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            recv = cluster.buffers[rank].dispatch(x[rank], idx[rank], weights[rank], sync=False)
            out = cluster.buffers[rank].combine(recv.x, recv.handle)
        held.append((recv, out))
    for n in range(12):
        inputs = rounds[n % len(rounds)]
        want = want_dispatch(case, inputs)
        sums = reference.combine(
            [w.x for w in want], [w.handle for w in want], ranks_per_node=ranks_per_node
        )
        for rank in ranks:
            x[rank].copy_(inputs.x[rank])
            idx[rank].copy_(inputs.topk_idx[rank])
            weights[rank].copy_(inputs.topk_weights[rank])
        torch.cuda.synchronize()
        for rank in ranks:
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        for rank in ranks:
            check_received(held[rank][0], want[rank], computed=False)
            same_values(held[rank][1].cpu(), sums[rank])


# ---- what goes wrong ----


def code_of(result: Any) -> str:
    assert isinstance(result, EPError), result
    return str(result.code)


def test_no_call_waits_for_a_stream_that_has_used_memory_while_there_is_other_memory(
    make_cluster: Callable[..., Cluster],
) -> None:
    """What is queued there by now may wait for that very call: here it is of the other rank."""
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()

    def dispatch(rank: int, stream: int) -> Any:
        with torch.cuda.stream(streams[stream]):
            return cluster.buffers[rank].dispatch(x[rank], idx[rank], sync=False)

    first = [dispatch(0, 0), dispatch(1, 1)]
    torch.cuda.synchronize()
    kept = [recv.num_recv.clone() for recv in first]
    last = [dispatch(0, 2), dispatch(1, 3)]  # on streams that the next ones come behind
    torch.cuda.synchronize()
    del first, last
    second = [dispatch(1, 0), dispatch(0, 2)]
    torch.cuda.synchronize()
    for rank in (0, 1):
        cluster.buffers[rank].check()
        assert torch.equal(second[1 - rank].num_recv, kept[rank])


def run_catching(cluster: Cluster, work: Callable[[int], Any]) -> list[Any]:
    streams = [torch.cuda.Stream() for _ in range(cluster.num_ranks)]
    torch.cuda.synchronize()

    def body(rank: int) -> Any:
        with torch.cuda.stream(streams[rank]):
            return work(rank)

    results = cluster.run_catching(body)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize(
    "case",
    [Case(num_ranks=3), Case(num_ranks=3, num_sms=None, options=SLAB)],
    ids=["compact", "usual-slab"],
)
def test_bad_ids_fail_on_every_rank_and_the_next_call_works(
    make_cluster: Callable[..., Cluster], case: Case
) -> None:
    cluster = make_cluster(3, **case.buffer_options())
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    bad = idx[2].clone()
    bad[5, 1] = case.num_experts
    results = run_catching(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r], bad if r == 2 else idx[r], **case.options),
    )
    assert [code_of(e) for e in results] == ["E213"] * 3
    assert all(f"token 5, k 1, id {case.num_experts}" in str(e) for e in results)

    results = run_catching(
        cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], **case.options)
    )
    assert all(isinstance(r, Received) for r in results)


def test_overflow_and_disagreement_fail_on_every_rank(
    make_cluster: Callable[..., Cluster],
) -> None:
    case = Case(num_ranks=3)
    cluster = make_cluster(3, **case.buffer_options())
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)

    def dispatch(**options: Any) -> list[Any]:
        return run_catching(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], **options))

    assert [code_of(e) for e in dispatch(capacity=3)] == ["E230"] * 3
    results = run_catching(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r], idx[r], layout="compact" if r else "grouped"),
    )
    assert [code_of(e) for e in results] == ["E220"] * 3
    results = run_catching(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r][:, : 8 if r == 1 else None], idx[r]),
    )
    assert [code_of(e) for e in results] == ["E201"] * 3
    assert all(isinstance(r, Received) for r in dispatch())


@pytest.mark.parametrize("options", [STATIC, {**STATIC, **SLAB}], ids=["compact", "slab"])
@pytest.mark.parametrize("num_sms", [4, None], ids=["any", "usual"])
def test_static_overflow_shows_in_status_and_is_raised_by_check(
    make_cluster: Callable[..., Cluster], options: dict[str, Any], num_sms: int | None
) -> None:
    case = Case(num_ranks=2, num_sms=num_sms, options={**options, "capacity": 5})
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    got = on_streams(
        cluster,
        lambda r: cluster.buffers[r].dispatch(x[r], idx[r], weights[r], **dispatch_options(case)),
    )
    for rank in range(2):
        assert got[rank].status.tolist() == [230]
        check_received(got[rank], want[rank], computed=False)
    errors = run_catching(cluster, lambda r: cluster.buffers[r].check())
    assert [code_of(e) for e in errors] == ["E230"] * 2


NO_MEMORY: dict[str, dict[str, Any]] = {
    "compact": {**STATIC, "origins": True},
    "grouped": {**GROUPED, **STATIC},
    "slab": {**SLAB, **STATIC},
    "slab-fp8": {**SLAB, **STATIC, "quantize": "fp8"},
    "compact-fp8": {**STATIC, "quantize": "fp8"},
}


def check_call_without_memory(cluster: Cluster, case: Case) -> None:
    """Of static shapes: they are there, nothing is in them, and the next call works."""
    inputs = case.inputs()
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    assert x is not None
    assert idx is not None
    assert weights is not None
    call = lambda r: cluster.buffers[r].dispatch(  # noqa: E731
        x[r], idx[r], weights[r], **case.options
    )
    fine = on_streams(cluster, call)
    rest = []
    while free := cluster.buffers[0].stats()["arena"]["largest_free"]:
        rest.append(cluster.buffers[0].empty((free,), torch.uint8))
    got = on_streams(cluster, call)
    for rank, recv in enumerate(got):
        assert recv.status.tolist() == [231]
        for f in dataclasses.fields(Received):
            now, before = getattr(recv, f.name), getattr(fine[rank], f.name)
            if isinstance(before, Tensor):
                assert (now.shape, now.stride()) == (before.shape, before.stride()), f.name
        assert recv.num_tokens_per_expert.tolist() == [0] * len(recv.num_tokens_per_expert)
        assert int(recv.num_recv) == 0
        assert bool((recv.topk_idx == -1).all())
    y = [recv.x.bfloat16() for recv in got]
    out = on_streams(cluster, lambda r: cluster.buffers[r].combine(y[r], got[r].handle))
    for sums in out:
        assert not sums.any()
    del rest
    errors = run_catching(cluster, lambda r: cluster.buffers[r].check())
    assert [code_of(e) for e in errors] == ["E231"] * len(errors)
    want = want_dispatch(case, inputs)
    for rank, recv in enumerate(on_streams(cluster, call)):
        check_received(recv, want[rank], computed="quantize" in case.options)


@pytest.mark.parametrize("num_sms", [4, None], ids=["any", "usual"])
@pytest.mark.parametrize("name", NO_MEMORY)
def test_static_call_that_finds_no_memory_gives_its_shapes_and_a_status(
    make_cluster: Callable[..., Cluster], name: str, num_sms: int | None
) -> None:
    case = Case(num_ranks=2, num_sms=num_sms, options=NO_MEMORY[name])
    check_call_without_memory(make_cluster(2, **case.buffer_options()), case)


def test_combine_that_finds_no_memory_says_how_much_it_needs(
    make_cluster: Callable[..., Cluster],
) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    got = on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], weights[r]))
    rows = [recv.x.clone() for recv in got]
    rest = []
    while free := cluster.buffers[0].stats()["arena"]["largest_free"]:
        rest.append(cluster.buffers[0].empty((free,), torch.uint8))
    call = lambda r: cluster.buffers[r].combine(  # noqa: E731
        rows[r], got[r].handle, topk_weights=got[r].topk_weights
    )
    on_streams(cluster, call)
    errors = run_catching(cluster, lambda r: cluster.buffers[r].check())
    need = rows[0].numel() * rows[0].element_size()
    for error in errors:
        assert code_of(error) == "E231"
        assert f"need {need} B in one piece, free 0 B" in str(error)
    del rest
    on_streams(cluster, call)
    run_catching(cluster, lambda r: cluster.buffers[r].check())


def test_missing_rank_gives_a_timeout_and_the_context_lives_on(
    make_cluster: Callable[..., Cluster],
) -> None:
    case = Case(num_ranks=3)
    config = EPConfig(arrival_s=LONGER_S, progress_s=LONGER_S)
    cluster = make_cluster(3, **case.buffer_options(), config=config)
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    results = run_catching(
        cluster, lambda r: None if r == 1 else cluster.buffers[r].dispatch(x[r], idx[r])
    )
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, EPTimeout)
        assert code_of(error) == "E101"
        assert error.peer == 1
    again = run_catching(
        cluster, lambda r: None if r == 1 else cluster.buffers[r].dispatch(x[r], idx[r])
    )
    assert [code_of(again[r]) for r in (0, 2)] == ["E101", "E101"]
    assert float(torch.ones(8, device="cuda").sum()) == 8.0  # the context works


def test_closed_rank_is_reported_as_left(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    cluster.buffers[1].close()
    results = run_catching(
        cluster, lambda r: None if r == 1 else cluster.buffers[0].dispatch(x[0], idx[0])
    )
    assert code_of(results[0]) == "E111"


def test_poison_shows_that_nothing_else_is_written(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=4, num_sms=2)
    cluster = make_cluster(4, **case.buffer_options())
    # The whole arena is filled through one extent, which goes back before the call.
    poison = 0x5A
    for buffer in cluster.buffers:
        free = buffer.stats()["arena"]["largest_free"]
        buffer.empty((free,), torch.uint8).fill_(poison)
    torch.cuda.synchronize()
    inputs = case.inputs()
    want = want_dispatch(case, inputs)
    x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
    got = on_streams(cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], weights[r]))
    for rank, buffer in enumerate(cluster.buffers):
        check_received(got[rank], want[rank], computed=False)
        written = got[rank].x.numel() * got[rank].x.itemsize
        record = -(-4 * (1 + 2 * case.num_topk) // 16) * 16 * len(want[rank].x)
        rest = buffer.empty((buffer.stats()["arena"]["largest_free"],), torch.uint8)
        touched = int((rest != poison).sum())
        assert touched <= record, (rank, written, record, touched)


@pytest.mark.parametrize("kind", ["fp8", "fp8_ue8m0"])
def test_every_magnitude_has_its_scale(make_cluster: Callable[..., Cluster], kind: str) -> None:
    """Kernels of usual calls look scales of BF16 up; here each block has another magnitude."""
    tokens, blocks = 32, 56
    options = {"num_topk": 1, "num_experts": 1, "hidden": 128 * blocks, "max_tokens": tokens}
    (buffer,) = make_cluster(1, **options).buffers
    idx = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda")
    g = torch.Generator().manual_seed(0)
    magnitudes = torch.randperm(1 << 15, generator=g).to(torch.int16).view(torch.bfloat16)
    for largest in magnitudes.split(tokens * blocks):
        x = torch.zeros(tokens * blocks, 128)
        x[: len(largest)] = torch.rand(len(largest), 128, generator=g) * 2 - 1
        x[: len(largest)] *= largest[:, None].float().nan_to_num(1.0, 1.0)
        x = x.to(torch.bfloat16)
        x[: len(largest), 77] = largest
        x = x.view(tokens, 128 * blocks)
        got = buffer.dispatch(x.cuda(), idx, quantize=kind, layout="slab", capacity=tokens)
        rows, scales = reference.quantize(x, kind=kind)
        assert got.scales is not None
        same_values(got.x[0].cpu().float(), rows.float(), "rows")
        same_values(got.scales[0].cpu(), scales, "scales")


def test_repr_names_backend_and_reason(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(2, **Case(num_ranks=2).buffer_options())
    assert "nvlink: CUDA tensors, all ranks in one process" in repr(cluster.buffers[0])


def test_one_rank_alone() -> None:
    with Buffer(num_experts=4, num_topk=2, hidden=64, max_tokens=8, device="cuda") as buffer:
        x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
        idx = torch.tensor([[0, 3], [1, -1], [2, 2], [-1, -1], [3, 0]], device="cuda")
        recv = buffer.dispatch(x, idx)
        assert recv.num_recv == 4
        out = buffer.combine(recv.x, recv.handle)
        want = x.clone()
        want[3] = 0
        assert torch.equal(out, want)
