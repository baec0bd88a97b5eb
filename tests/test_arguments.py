"""Every bad argument: one coded sentence with argument, got and want; peers raise the same code and
name the culprit; nothing is written; the next call works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from patience import PATIENT
from torch import Tensor

from ep_comm import Buffer, EPConfig, Received
from ep_comm.errors import (
    EPArgumentError,
    EPCapacityError,
    EPError,
    EPMismatch,
    EPUsageError,
)
from ep_comm.testing import Cluster

TOKENS, HIDDEN, TOPK, EXPERTS, RANKS = 4, 512, 2, 6, 3
SHAPE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_topk": TOPK,
    "hidden": HIDDEN,
    "max_tokens": TOKENS,
}
CULPRIT = 1


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    with Cluster(1, RANKS) as cluster:
        cluster.make_buffers(**SHAPE, config=PATIENT)
        yield cluster


def x_of(rank: int, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.arange(tokens * HIDDEN) % 64 + rank
    return values.reshape(tokens, HIDDEN).to(dtype)


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.tensor([[0, 2], [4, -1], [5, 3], [1, 1]])[:tokens]


def arena_bytes(buffer: Buffer) -> int:
    in_use: int = buffer.stats()["arena"]["in_use"]
    return in_use


# ---- one rank's bad argument ----


@dataclass
class Bad:
    """What rank 1 changes in an otherwise good call, and what must come of it."""

    code: str
    says: tuple[str, ...]  # all in the culprit's sentence
    change: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., dict[str, Any]] | None = None  # changes computed from the good arguments
    base: dict[str, Any] = field(default_factory=dict)  # options that every rank passes


def wide(tensor: Tensor) -> Tensor:
    """The same shape, with holes between elements."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def shifted(tensor: Tensor, num_bytes: int) -> Tensor:
    """The same values at an address that is a multiple of 16 plus num_bytes."""
    space = torch.zeros(tensor.numel() * tensor.itemsize + 32, dtype=torch.uint8)
    start = -space.data_ptr() % 16 + num_bytes
    moved = space[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype)
    return moved.view(tensor.shape).copy_(tensor)


class Uncopyable:
    """Looks like an array until it is asked."""

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise BufferError("read-only")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


BYTES = torch.zeros(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
COUNTS = torch.zeros(EXPERTS // RANKS, dtype=torch.int32)
WAITS = torch.zeros(RANKS, dtype=torch.int64)
DISPATCH: dict[str, Bad] = {
    # x
    "x-none": Bad("E200", ("x", "NoneType", "tensor"), {"x": None}),
    "x-list": Bad("E200", ("x", "list", "tensor"), {"x": [[1.0]]}),
    "x-dlpack-refused": Bad("E200", ("x", "Uncopyable", "read-only"), {"x": Uncopyable()}),
    "a1-x-float64": Bad("E200", ("x", "float64", "bfloat16"), make=lambda x: {"x": x.double()}),
    "a1-x-int16": Bad("E200", ("x", "int16"), make=lambda x: {"x": x.short()}),
    "a1-x-complex": Bad("E200", ("x", "complex64"), make=lambda x: {"x": x.to(torch.complex64)}),
    "a1-x-bool": Bad("E200", ("x", "bool"), make=lambda x: {"x": x.bool()}),
    "x-1d": Bad("E201", ("x", "[512]", "num_tokens, 512"), make=lambda x: {"x": x[0]}),
    "x-3d": Bad("E201", ("x", "[1, 4, 512]"), make=lambda x: {"x": x[None]}),
    "x-scalar": Bad("E201", ("x", "[]"), make=lambda x: {"x": x[0, 0]}),
    "x-narrow": Bad("E201", ("x", "[4, 504]"), make=lambda x: {"x": x[:, :504]}),
    "a2-x-meta": Bad("E202", ("x", "meta", "cpu"), make=lambda x: {"x": x.to("meta")}),
    "x-sparse": Bad("E202", ("x", "sparse_coo", "strided"), make=lambda x: {"x": x.to_sparse()}),
    "a2-x-transposed": Bad("E202", ("x", "strides"), make=lambda x: {"x": x.t().contiguous().t()}),
    "a2-x-wide": Bad("E202", ("x", "strides"), make=lambda x: {"x": wide(x)}),
    "a22-x-misaligned": Bad("E202", ("x", "16"), make=lambda x: {"x": shifted(x, 2)}),
    "a2-x-odd-rows": Bad(
        "E202",
        ("x", "strides", "516"),
        make=lambda x: {"x": torch.zeros(TOKENS, 516, dtype=x.dtype)[:, :512]},
    ),
    "x-too-many": Bad(
        "E230",
        ("got 5", "want <= 4"),
        make=lambda x: {"x": x_of(1, 5), "topk_idx": torch.zeros(5, 2, dtype=torch.int64)},
    ),
    # topk_idx
    "ids-none": Bad("E201", ("topk_idx", "None"), {"topk_idx": None}),
    "a4-ids-int16": Bad(
        "E200", ("topk_idx", "int16", "int64 or int32"), {"topk_idx": ids().short()}
    ),
    "a4-ids-uint8": Bad("E200", ("topk_idx", "uint8"), {"topk_idx": ids().to(torch.uint8)}),
    "ids-float": Bad("E200", ("topk_idx", "float32"), {"topk_idx": ids().float()}),
    "ids-rows": Bad("E201", ("topk_idx", "[3, 2]", "[4, num_topk]"), {"topk_idx": ids(3)}),
    "ids-1d": Bad("E201", ("topk_idx", "[8]"), {"topk_idx": ids().flatten()}),
    "ids-meta": Bad("E202", ("topk_idx", "meta"), {"topk_idx": ids().to("meta")}),
    "topk-0": Bad("E210", ("top_k=0", "limit 2"), {"topk_idx": ids()[:, :0]}),
    "a9-topk-3": Bad("E210", ("top_k=3", "limit 2"), {"topk_idx": torch.zeros(4, 3).long()}),
    # topk_weights
    "a6-weights-fp64": Bad("E200", ("topk_weights", "float64"), {"topk_weights": ids().double()}),
    "weights-int": Bad("E200", ("topk_weights", "int64"), {"topk_weights": ids()}),
    "a5-weights-k-1": Bad(
        "E201", ("topk_weights", "[4, 1]", "[4, 2]"), {"topk_weights": ids().float()[:, :1]}
    ),
    "weights-rows": Bad("E201", ("topk_weights", "[3, 2]"), {"topk_weights": ids(3).float()}),
    # options
    "layout": Bad("E203", ("layout='rows'", "'compact'"), {"layout": "rows"}),
    "layout-tensor": Bad("E203", ("layout=",), {"layout": torch.ones(2)}),
    "layout-list": Bad("E203", ("layout=",), {"layout": ["compact"]}),
    "output": Bad("E203", ("output='gpu'", "'arena'"), {"output": "gpu"}),
    "alignment-0": Bad("E203", ("alignment=0",), {"alignment": 0}),
    "alignment-float": Bad("E203", ("alignment=2.0",), {"alignment": 2.0}),
    "alignment-bool": Bad("E203", ("alignment=True",), {"alignment": True}),
    "alignment-huge": Bad("E203", ("alignment=1073741824",), {"alignment": 1 << 30}),
    "alignment-2^31": Bad("E203", ("alignment=2147483648",), {"alignment": 1 << 31}),
    "alignment-2^64": Bad("E203", ("alignment=1844",), {"alignment": 1 << 64}),
    "alignment-slab": Bad("E203", ("alignment=2", "slab"), {"alignment": 2, "layout": "slab"}),
    "capacity-negative": Bad("E203", ("capacity=-1",), {"capacity": -1}),
    "capacity-str": Bad("E203", ("capacity='9'",), {"capacity": "9"}),
    "capacity-2^62": Bad("E203", ("capacity=",), {"capacity": 1 << 62, "layout": "slab"}),
    "capacity-slab": Bad("E203", ("2 times",), {"capacity": 1 << 30, "layout": "slab"}),
    "row-index-grouped": Bad(
        "E203", ("row_index", "compact"), {"row_index": True, "layout": "grouped"}
    ),
    "row-index-array": Bad("E203", ("row_index",), {"row_index": torch.ones(2)}),
    "sync-array": Bad("E203", ("sync",), {"sync": torch.ones(2)}),
    "origins-array": Bad("E203", ("origins",), {"origins": torch.ones(2)}),
    "transfer": Bad("E203", ("transfer='dma'", "'copy_engine'"), {"transfer": "dma"}),
    "transfer-cpu": Bad("E203", ("'copy_engine'", "nvlink"), {"transfer": "copy_engine"}),
    "num-sms-0": Bad("E203", ("num_sms=0",), {"num_sms": 0}),
    # scales and quantization
    "quantize": Bad("E203", ("quantize='int4'", "fp8_ue8m0"), {"quantize": "int4"}),
    "quantize-true": Bad("E203", ("quantize=True",), {"quantize": True}),
    "quantize-bytes": Bad(
        "E200", ("x", "float8_e4m3fn", "quantize="), {"x": BYTES, "quantize": "fp8"}
    ),
    "scale-block": Bad(
        "E203", ("scale_block=64", "128, 32"), {"quantize": "fp8", "scale_block": 64}
    ),
    "scale-block-float": Bad(
        "E203", ("scale_block=128.0",), {"quantize": "fp8", "scale_block": 128.0}
    ),
    "scale-block-none": Bad(
        "E203", ("scale_block=None",), {"quantize": "fp8", "scale_block": None}
    ),
    "both-scales": Bad(
        "E203", ("quantize='fp8'", "given scales"), {"x": BYTES, "quantize": "fp8", "scales": BYTES}
    ),
    "scales-of-bf16": Bad("E200", ("x", "bfloat16", "scales="), {"scales": torch.ones(4, 4)}),
    "a16-scales-fp16": Bad(
        "E200", ("scales", "float16"), {"x": BYTES, "scales": torch.ones(4, 4).half()}
    ),
    "a16-scales-shape": Bad(
        "E201", ("scales", "[4, 3]", "[4, 4]"), {"x": BYTES, "scales": torch.ones(4, 3)}
    ),
    "a16-scales-int-shape": Bad(
        "E201", ("scales", "[4, 4]", "[4, 1]"), {"x": BYTES, "scales": torch.ones(4, 4).int()}
    ),
    "a16-scales-rows": Bad("E201", ("scales", "[3, 4]"), {"x": BYTES, "scales": torch.ones(3, 4)}),
    # handle together with what it replaces
    "handle-junk": Bad("E320", ("handle", "int"), {"handle": 5, "topk_idx": None}),
    "handle-and-ids": Bad("E203", ("topk_idx", "handle="), {"handle": ()}),
    # statistics
    "recv-stats-list": Bad("E200", ("recv_stats", "list"), {"recv_stats": [0, 0]}),
    "recv-stats-dtype": Bad("E200", ("recv_stats", "int64"), {"recv_stats": COUNTS.long()}),
    "recv-stats-shape": Bad("E201", ("recv_stats", "[1]"), {"recv_stats": COUNTS[:1]}),
    "recv-stats-strided": Bad("E202", ("recv_stats", "strides"), {"recv_stats": wide(COUNTS)}),
    "recv-stats-meta": Bad("E202", ("recv_stats", "meta"), {"recv_stats": COUNTS.to("meta")}),
    "wait-stats-dtype": Bad("E200", ("wait_stats", "float32"), {"wait_stats": WAITS.float()}),
    "wait-stats-matrix": Bad("E201", ("wait_stats", "[3, 3]"), {"wait_stats": WAITS.expand(3, 3)}),
    "wait-stats-strided": Bad("E202", ("wait_stats", "strides"), {"wait_stats": wide(WAITS)}),
}  # fmt: skip


def good_dispatch(rank: int) -> dict[str, Any]:
    return {"x": x_of(rank), "topk_idx": ids()}


def expect_refusal(
    cluster: Cluster,
    bad: Bad,
    call: Callable[[int, dict[str, Any]], Any],
    good: Callable[[int], dict[str, Any]],
) -> None:
    def work(rank: int) -> Any:
        arguments = {**good(rank), **bad.base}
        if rank == CULPRIT:
            change = dict(bad.change)
            if bad.make is not None:
                change |= bad.make(arguments["x"])
            arguments |= change
        return call(rank, arguments)

    before = [arena_bytes(buffer) for buffer in cluster.buffers]
    errors = cluster.run_catching(work)
    for rank, error in enumerate(errors):
        assert isinstance(error, EPError), (rank, error)
        check_sentence(error, rank, bad.code)
        if rank != CULPRIT:
            assert error.peer == CULPRIT
            assert f"rank {CULPRIT}" in str(error)
    for words in bad.says:
        assert words in str(errors[CULPRIT]), (words, str(errors[CULPRIT]))
    assert len({e.seq for e in errors}) == 1  # type: ignore[union-attr]
    del errors
    after = [arena_bytes(buffer) for buffer in cluster.buffers]
    assert all(a <= b for a, b in zip(after, before, strict=True))


def check_sentence(error: EPError, rank: int, code: str) -> None:
    text = str(error)
    assert error.code == code, text
    assert error.rank == rank
    assert error.scope == "call"
    assert "\n" not in text
    assert len(text) <= 400
    assert text.startswith(f"{type(error).__name__}[{code}]: rank {rank} ")
    assert ". Fix: " in text
    assert text.endswith(".")
    if code == "E230":
        assert isinstance(error, EPCapacityError)
        assert isinstance(error, ValueError)
    elif code.startswith("E3"):
        assert isinstance(error, EPUsageError)
    else:
        assert type(error).__name__ == "EPArgumentError"
        assert isinstance(error, EPArgumentError)
        assert isinstance(error, TypeError if code == "E200" else ValueError)


def in_half_of_bias(x: Tensor) -> dict[str, Any]:
    rows = torch.zeros(TOKENS + 1, HIDDEN, dtype=x.dtype)
    return {"out": rows[1:], "bias": (None, rows[:-1])}


def works(cluster: Cluster) -> None:
    """A whole round trip on every rank."""

    def work(rank: int) -> None:
        recv = cluster.buffers[rank].dispatch(x_of(rank), ids())
        out = cluster.buffers[rank].combine(recv.x, recv.handle)
        assert torch.equal(out, x_of(rank) * torch.tensor([[2], [1], [2], [1]]))

    cluster.run(work)


@pytest.mark.parametrize("bad", DISPATCH.values(), ids=DISPATCH.keys())
def test_bad_dispatch_argument_is_refused_everywhere(three: Cluster, bad: Bad) -> None:
    def call(rank: int, arguments: dict[str, Any]) -> Any:
        return three.buffers[rank].dispatch(**arguments, tag="here")

    expect_refusal(three, bad, call, good_dispatch)
    works(three)


def test_begun_dispatch_is_refused_before_it_begins(three: Cluster) -> None:
    bad = Bad("E203", ("layout='rows'",), {"layout": "rows"})

    def call(rank: int, arguments: dict[str, Any]) -> Any:
        begun = three.buffers[rank].dispatch(**arguments, wait=False)
        assert rank != CULPRIT
        return begun.wait()

    expect_refusal(three, bad, call, good_dispatch)
    works(three)


def test_static_dispatch_raises_refusals_of_others_at_once(three: Cluster) -> None:
    bad = Bad("E201", ("topk_idx",), {"topk_idx": ids(3)}, base={"sync": False})
    expect_refusal(three, bad, lambda r, a: three.buffers[r].dispatch(**a), good_dispatch)
    works(three)


# ---- combine ----

COMBINE: dict[str, Bad] = {
    "x-none": Bad("E200", ("x", "NoneType"), {"x": None}),
    "x-fp8": Bad("E200", ("x", "float8_e4m3fn"), make=lambda x: {"x": x.to(torch.float8_e4m3fn)}),
    "x-int32": Bad("E200", ("x", "int32"), make=lambda x: {"x": x.int()}),
    "a18-x-rows-missing": Bad("E201", ("x", "want ["), make=lambda x: {"x": x[1:]}),
    "a18-x-rows-extra": Bad("E201", ("x", "want ["), make=lambda x: {"x": torch.cat([x, x])}),
    "x-narrow": Bad("E201", ("x", "504"), make=lambda x: {"x": x[:, :504]}),
    "x-strided": Bad("E202", ("x", "contiguous"), make=lambda x: {"x": wide(x)}),
    "a22-x-misaligned": Bad("E202", ("x", "16"), make=lambda x: {"x": shifted(x, 4)}),
    "x-meta": Bad("E202", ("x", "meta"), make=lambda x: {"x": x.to("meta")}),
    "handle-none": Bad("E320", ("handle", "NoneType"), {"handle": None}),
    "bias-dtype": Bad("E200", ("bias", "float32", "bfloat16"), {"bias": torch.ones(4, 512)}),
    "bias-shape": Bad("E201", ("bias", "[3, 512]", "[4, 512]"), {"bias": x_of(0, 3)}),
    "bias-three": Bad("E201", ("bias", "3 tensors"), {"bias": (None, None, None)}),
    "bias-second": Bad("E201", ("bias", "[3, 512]"), {"bias": (x_of(0), x_of(0, 3))}),
    "bias-strided": Bad("E202", ("bias", "contiguous"), {"bias": wide(x_of(0))}),
    "out-dtype": Bad("E200", ("out", "float32"), {"out": torch.ones(4, 512)}),
    "out-shape": Bad("E201", ("out", "[3, 512]"), {"out": x_of(0, 3)}),
    "out-strided": Bad("E202", ("out", "contiguous"), {"out": wide(x_of(0))}),
    "out-expanded": Bad("E202", ("out", "contiguous"), {"out": x_of(0, 1).expand(4, 512)}),
    "out-is-x": Bad("E202", ("out", "memory of x"), make=lambda x: {"out": x[:4]}),
    "out-is-half-bias": Bad("E202", ("out", "part of bias"), make=lambda x: in_half_of_bias(x)),
    "weights-dtype": Bad(
        "E200",
        ("topk_weights", "float16"),
        make=lambda x: {"topk_weights": torch.ones(x.shape[0], 2).half()},
    ),
    "weights-shape": Bad(
        "E201", ("topk_weights",), make=lambda x: {"topk_weights": torch.ones(x.shape[0], 1)}
    ),
    "weighted-compact": Bad("E203", ("weighted", "grouped or slab"), {"weighted": True}),
    "weighted-array": Bad("E203", ("weighted",), {"weighted": torch.ones(2)}),
    "order": Bad("E203", ("order='any'",), {"order": "any"}),
    "order-compact": Bad("E203", ("order='topk'", "grouped or slab"), {"order": "topk"}),
    "per-rank-compact": Bad("E203", ("per_rank", "grouped or slab"), {"per_rank": True}),
    "per-rank-array": Bad("E203", ("per_rank",), {"per_rank": torch.ones(2)}),
    "row-weights-alone": Bad(
        "E203",
        ("row_weights", "per_rank=True"),
        make=lambda x: {"row_weights": torch.ones(x.shape[0])},
    ),
    "wait-stats-dtype": Bad("E200", ("wait_stats", "int32"), {"wait_stats": WAITS.int()}),
    "wait-stats-matrix": Bad("E201", ("wait_stats", "[3, 3]"), {"wait_stats": WAITS.expand(3, 3)}),
    "wait-stats-strided": Bad("E202", ("wait_stats", "strides"), {"wait_stats": wide(WAITS)}),
    "num-sms": Bad("E203", ("num_sms=-3",), {"num_sms": -3}),
}  # fmt: skip


@pytest.mark.parametrize("bad", COMBINE.values(), ids=COMBINE.keys())
def test_bad_combine_argument_is_refused_everywhere_and_writes_nothing(
    three: Cluster, bad: Bad
) -> None:
    received = three.run(lambda r: three.buffers[r].dispatch(x_of(r), ids()))
    outs = [torch.full((TOKENS, HIDDEN), -7.0, dtype=torch.bfloat16) for _ in range(RANKS)]
    xs = [recv.x.clone() for recv in received]

    def call(rank: int, arguments: dict[str, Any]) -> Any:
        return three.buffers[rank].combine(**arguments)

    def good(rank: int) -> dict[str, Any]:
        return {"x": received[rank].x, "handle": received[rank].handle, "out": outs[rank]}

    expect_refusal(three, bad, call, good)
    for recv, x, out in zip(received, xs, outs, strict=True):
        assert torch.equal(recv.x, x)
        assert (out == -7).all()

    # The same handles still answer.
    def again(rank: int) -> None:
        out = three.buffers[rank].combine(received[rank].x, received[rank].handle)
        assert torch.equal(out, x_of(rank) * torch.tensor([[2], [1], [2], [1]]))

    three.run(again)


SLAB_WEIGHTS = torch.ones(EXPERTS // RANKS, 8)
PER_RANK: dict[str, Bad] = {
    "weighted": Bad("E203", ("per_rank", "row_weights="), {"weighted": True}),
    "order": Bad("E203", ("per_rank", "order='rank'", "'topk'"), {"order": "topk"}),
    "weights-back": Bad("E203", ("per_rank", "topk_weights"), {"topk_weights": SLAB_WEIGHTS}),
    "weights-type": Bad("E200", ("row_weights", "list"), {"row_weights": [1.0]}),
    "weights-dtype": Bad("E200", ("row_weights", "float16"), {"row_weights": SLAB_WEIGHTS.half()}),
    "weights-shape": Bad("E201", ("row_weights", "[2, 8]"), {"row_weights": SLAB_WEIGHTS[:1]}),
    "weights-strided": Bad("E202", ("row_weights",), {"row_weights": wide(SLAB_WEIGHTS)}),
    "weights-misaligned": Bad("E202", ("row_weights",), {"row_weights": shifted(SLAB_WEIGHTS, 4)}),
    "weights-meta": Bad("E202", ("row_weights", "meta"), {"row_weights": SLAB_WEIGHTS.to("meta")}),
}  # fmt: skip


@pytest.mark.parametrize("bad", PER_RANK.values(), ids=PER_RANK.keys())
def test_bad_option_of_sums_by_owners_is_refused_everywhere(three: Cluster, bad: Bad) -> None:
    def dispatch(rank: int) -> Received:
        weights = torch.ones(TOKENS, TOPK)
        return three.buffers[rank].dispatch(x_of(rank), ids(), weights, layout="slab", capacity=8)

    received = three.run(dispatch)
    outs = [torch.full((TOKENS, HIDDEN), -7.0, dtype=torch.bfloat16) for _ in range(RANKS)]

    def good(rank: int) -> dict[str, Any]:
        recv = received[rank]
        return {"x": recv.x, "handle": recv.handle, "per_rank": True, "out": outs[rank]}

    expect_refusal(
        three, bad, lambda rank, arguments: three.buffers[rank].combine(**arguments), good
    )
    assert all((out == -7).all() for out in outs)
    works(three)


def test_weighted_combine_needs_weights_at_dispatch(three: Cluster) -> None:
    def work(rank: int) -> None:
        recv = three.buffers[rank].dispatch(x_of(rank), ids(), layout="grouped")
        with pytest.raises(EPArgumentError) as caught:
            three.buffers[rank].combine(recv.x, recv.handle, weighted=True)
        assert caught.value.code == "E203"
        assert "topk_weights" in str(caught.value)
        three.buffers[rank].combine(recv.x, recv.handle)

    three.run(work)


# ---- expert ids that are none ----


@pytest.mark.parametrize("value", [EXPERTS, EXPERTS + 10**6, 2**31 - 1, 2**40, -2, -(2**31)])
@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_a10_bad_ids_are_counted_and_named_everywhere(
    three: Cluster, layout: str, value: int
) -> None:
    def work(rank: int) -> None:
        bad = ids().clone()
        if rank == CULPRIT:
            bad[2, 1] = bad[3, 0] = value
        with pytest.raises(EPArgumentError) as caught:
            three.buffers[rank].dispatch(x_of(rank), bad, layout=layout)
        error = caught.value
        check_sentence(error, rank, "E213")
        assert f"got 2 bad ids from rank 1 in dispatch #{error.seq}" in str(error)
        assert f"first token 2, k 1, id {value}" in str(error)
        assert error.peer == CULPRIT

    three.run(work)
    works(three)


def test_many_refusals_in_a_row_reach_slow_peers_one_by_one(three: Cluster) -> None:
    """The refusing rank runs ahead of its peers by more calls than there are slots."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("E203", {"layout": "rows"}),
        ("E201", {"topk_idx": ids(3)}),
        ("E200", {"topk_idx": ids().float()}),
    ] * 3

    def work(rank: int) -> list[str]:
        codes = []
        for _, change in changes:
            time.sleep(0 if rank == CULPRIT else 0.01)
            arguments = good_dispatch(rank) | (change if rank == CULPRIT else {})
            with pytest.raises(EPError) as caught:
                three.buffers[rank].dispatch(**arguments)
            codes.append(caught.value.code)
        return codes

    assert three.run(work) == [[code for code, _ in changes]] * RANKS
    works(three)


def test_bad_ids_of_several_ranks_blame_the_lowest(three: Cluster) -> None:
    def work(rank: int) -> None:
        with pytest.raises(EPArgumentError) as caught:
            three.buffers[rank].dispatch(x_of(rank), ids() + 100 * rank)
        assert (caught.value.code, caught.value.peer) == ("E213", 1)

    three.run(work)


def test_static_call_with_bad_ids_says_so_in_status_and_in_check(three: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = three.buffers[rank]
        for layout in ("compact", "grouped", "slab"):
            bad = ids() + (EXPERTS if rank == CULPRIT else 0)
            weights = torch.ones(TOKENS, TOPK)
            recv: Received = buffer.dispatch(x_of(rank), bad, weights, layout=layout, sync=False)
            assert recv.status.tolist() == [213]
            assert recv.num_recv.tolist() == [0]  # type: ignore[union-attr]
            assert not recv.num_tokens_per_expert.any()
            assert (recv.topk_idx == -1).all()  # type: ignore[union-attr, operator]
            assert not recv.topk_weights.any()  # type: ignore[union-attr]
            with pytest.raises(EPArgumentError) as caught:
                buffer.check()
            assert caught.value.code == "E213"
            buffer.check()

    three.run(work)
    works(three)


# ---- arguments that differ between ranks ----

DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # everybody, rank 1 instead, words of the sentence
    "layout": ({}, {"layout": "grouped"}, ("layout", "compact", "grouped")),
    "dtype": ({}, {"x": x_of(1, dtype=torch.float32)}, ("dtype", "bfloat16", "float32")),
    "topk": ({}, {"topk_idx": ids()[:, :1]}, ("top_k", "2", "1")),
    "alignment": ({"layout": "grouped"}, {"alignment": 4}, ("alignment", "4", "1")),
    "capacity": ({}, {"capacity": 100}, ("capacity", "100", "none")),
    "weights": ({}, {"topk_weights": torch.ones(4, 2)}, ("flags", "weights", "none")),
    "static": ({}, {"sync": False}, ("flags", "static")),
    "quantize": ({"quantize": "fp8"}, {"quantize": "fp8_ue8m0"}, ("quantize", "fp8", "fp8_ue8m0")),
    "quantize-none": ({}, {"quantize": "fp8"}, ("quantize", "fp8", "None")),
    "scale-block": ({"quantize": "fp8"}, {"scale_block": 32}, ("scale_block", "128", "32")),
    "scales": ({"x": BYTES}, {"scales": torch.ones(4, 4)}, ("scale",)),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_b5_dispatch_arguments_that_differ_are_e220_everywhere(
    three: Cluster, case: tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]
) -> None:
    base, change, words = case

    def work(rank: int) -> None:
        arguments = {**good_dispatch(rank), **base, **(change if rank == CULPRIT else {})}
        with pytest.raises(EPMismatch) as caught:
            three.buffers[rank].dispatch(**arguments)
        error = caught.value
        assert error.code == "E220"
        assert error.peer == (0 if rank == CULPRIT else CULPRIT)
        for word in words:
            assert word in str(error), (word, str(error))
        assert "here" in str(error)
        assert "there" in str(error)

    three.run(work)
    works(three)


def test_b5_combine_arguments_that_differ_are_e220_everywhere(three: Cluster) -> None:
    changes: list[dict[str, Any]] = [
        {"weighted": True},
        {"topk_weights": None},
        {"topk_weights": None, "per_rank": True},
        {"x": torch.float32},
    ]
    for change in changes:

        def work(rank: int, change: dict[str, Any] = change) -> None:
            buffer = three.buffers[rank]
            recv = buffer.dispatch(x_of(rank), ids(), torch.ones(4, 2), layout="grouped")
            arguments = {"x": recv.x, "handle": recv.handle, "topk_weights": recv.topk_weights}
            if rank == CULPRIT:
                arguments |= change
                if "x" in change:
                    arguments["x"] = recv.x.to(change["x"])
            out = torch.full((4, 512), 9.0, dtype=arguments["x"].dtype)
            with pytest.raises(EPMismatch) as caught:
                buffer.combine(**arguments, out=out)
            assert caught.value.code == "E220"
            assert (out == 9).all()

        three.run(work)
        works(three)


def test_local_options_may_differ(three: Cluster) -> None:
    """Token counts, ids of another width, tags, where outputs go: nobody else's business."""

    def work(rank: int) -> None:
        tokens = (4, 0, 1)[rank]
        recv = three.buffers[rank].dispatch(
            x_of(rank, tokens),
            ids(tokens).to((torch.int64, torch.int32, torch.int32)[rank]),
            row_index=rank == 0,
            output=("auto", "torch", "arena")[rank],
            tag=f"rank {rank}",
        )
        out = three.buffers[rank].combine(
            recv.x, recv.handle, bias=x_of(rank, tokens) if rank else None
        )
        want = x_of(rank, tokens) * torch.tensor([[2], [1], [2], [1]])[:tokens]
        assert torch.equal(out, want + x_of(rank, tokens) if rank else want)

    three.run(work)


# ---- options of the Buffer ----

OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts-0": ("E203", {"num_experts": 0}, "num_experts=0"),
    "experts-str": ("E203", {"num_experts": "8"}, "num_experts='8'"),
    "experts-2^40": ("E203", {"num_experts": 1 << 40}, "num_experts="),
    "tokens-0": ("E203", {"max_tokens": 0}, "max_tokens=0"),
    "tokens-2^64": ("E203", {"max_tokens": 1 << 64}, "max_tokens="),
    "tokens-float": ("E203", {"max_tokens": 4.0}, "max_tokens=4.0"),
    "topk-0": ("E210", {"num_topk": 0}, "num_topk=0"),
    "topk-33": ("E210", {"num_topk": 33}, "top_k=33"),
    "hidden-0": ("E203", {"hidden": 0}, "hidden=0"),
    "hidden-odd": ("E211", {"hidden": 513}, "hidden=513"),
    "hidden-huge": ("E211", {"hidden": 1 << 30}, "hidden=1073741824"),
    "slots-1": ("E203", {"num_slots": 1}, "num_slots=1"),
    "slots-17": ("E203", {"num_slots": 17}, "num_slots=17"),
    "map-short": ("E212", {"expert_map": [0, 1]}, "2 entries, want 6"),
    "map-rank": ("E212", {"expert_map": [0, 1, 2, 3, 0, 1]}, "expert 3 on rank 3 of 3"),
    "map-negative": ("E212", {"expert_map": [0, 1, 2, -1, 0, 1]}, "expert 3 on rank -1 of 3"),
    "map-float": ("E212", {"expert_map": [0.0, 1.0, 1.5, 0.0, 0.0, 0.0]}, "map"),
    "map-number": ("E212", {"expert_map": 5}, "map"),
    "map-2d": ("E212", {"expert_map": torch.zeros(3, 2).int()}, "map"),
    "backend": ("E203", {"backend": "nccl"}, "backend='nccl'"),
    "backend-none": ("E203", {"backend": None}, "backend=None"),
    "device": ("E203", {"device": "abacus"}, "device='abacus'"),
    "arena-0": ("E203", {"arena_bytes": 0}, "arena_bytes=0"),
    "arena-2^70": ("E203", {"arena_bytes": 1 << 70}, "arena_bytes="),
    "sms-bool": ("E203", {"num_sms": True}, "num_sms=True"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_buffer_option_on_one_rank_is_refused_everywhere_and_leaves_nothing(
    case: tuple[str, dict[str, Any], str],
) -> None:
    code, change, words = case
    with Cluster(1, RANKS) as cluster:

        def work(rank: int) -> Buffer:
            options = {"device": "cpu", **SHAPE, **(change if rank == CULPRIT else {})}
            return Buffer(cluster.group(rank), **options)

        errors = cluster.run_catching(work)
        for rank, error in enumerate(errors):
            assert isinstance(error, EPArgumentError), error
            assert error.code == code
            assert error.rank == rank
            assert words in str(error), str(error)
            assert rank == CULPRIT or error.peer == CULPRIT
        cluster.make_buffers(**SHAPE)  # the same store is good for the next try
        works(cluster)


@pytest.mark.parametrize("name", ["arrival_warn_s", "arrival_s", "progress_s"])
@pytest.mark.parametrize("value", [0, -1.0, "5", True, float("nan")])
def test_g9_clocks_are_positive_seconds(name: str, value: Any) -> None:
    with pytest.raises(EPArgumentError) as caught:
        EPConfig(**{name: value})
    assert caught.value.code == "E203"
    assert name in str(caught.value)
    assert EPConfig(arrival_s=None).arrival_s is None


def test_unforeseen_exceptions_reach_the_caller_and_the_peers(three: Cluster) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no name")

    def work(rank: int) -> Any:
        return three.buffers[rank].dispatch(
            x_of(rank), ids(), tag=Hostile() if rank == CULPRIT else "fine"
        )

    errors = three.run_catching(work)
    assert isinstance(errors[CULPRIT], RuntimeError)
    for rank in (0, 2):
        error = errors[rank]
        assert isinstance(error, EPError)
        assert (error.code, error.peer) == ("E203", CULPRIT)
        assert "RuntimeError" in str(error)
    works(three)
