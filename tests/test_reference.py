"""The reference against numbers worked by hand and against first principles."""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import worked_example
from torch import Tensor

from ep_comm import reference
from ep_comm.errors import EPArgumentError, EPCapacityError, EPError, EPUsageError
from ep_comm.handle import MAGIC, Handle, HandleMeta, parse_handle
from ep_comm.received import Received
from ep_comm.reference.routing import plan_sends, rank_in_group

LAYOUTS = ("compact", "grouped", "slab")
SYNC = pytest.mark.parametrize("sync", [True, False], ids=["sync", "static"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
RANKS = range(worked_example.NUM_RANKS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dispatch_example(layout: str, *, sync: bool = True, **inputs: Any) -> list[Received]:
    x, topk_idx, weights = zip(
        *(worked_example.inputs(rank, **inputs) for rank in RANKS), strict=True
    )
    options = {**worked_example.OPTIONS[layout], "num_experts": 8, "max_tokens": 4, "sync": sync}
    return reference.dispatch(x, topk_idx, weights, **options)


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def error_of(code: str, call: Any, *args: Any, **kwargs: Any) -> EPError:
    with pytest.raises(EPError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value


# ---- The worked example ----


@SYNC
@LAYOUT
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8],
    ids=str,
)
def test_dispatch_worked_example_gives_rows_written_by_hand(
    layout: str, dtype: torch.dtype, sync: bool
) -> None:
    received = dispatch_example(layout, dtype=dtype, idx_dtype=torch.int32, sync=sync)
    for rank in RANKS:
        assert received[rank].x.dtype == dtype
        worked_example.check_received(received[rank], rank, idx_dtype=torch.int32)


@SYNC
@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_combine_worked_example_gives_sums_written_by_hand(
    layout: str, dtype: torch.dtype, sync: bool
) -> None:
    received = dispatch_example(layout, dtype=dtype, sync=sync)
    y = [worked_example.experts(received[rank], rank) for rank in RANKS]
    handles = [r.handle for r in received]
    for rank, out in enumerate(reference.combine(y, handles)):
        assert out.dtype == dtype
        worked_example.check_combined(out, rank, layout)
    bias = [torch.full((4, 16), 0.25, dtype=dtype) for _ in RANKS]
    for given in (bias, [(None, b) for b in bias], [(b / 2, b / 2) for b in bias]):
        for rank, out in enumerate(reference.combine(y, handles, bias=given)):
            worked_example.check_combined(out, rank, layout, bias=0.25)


@SYNC
@pytest.mark.parametrize("layout", ["grouped", "slab"])
def test_combine_weighted_worked_example_gives_sums_written_by_hand(
    layout: str, sync: bool
) -> None:
    received = dispatch_example(layout, dtype=torch.bfloat16, sync=sync)
    y = [worked_example.experts(received[rank], rank) for rank in RANKS]
    for rank, out in enumerate(reference.combine(y, [r.handle for r in received], weighted=True)):
        worked_example.check_combined(out, rank, layout, weighted=True)


@SYNC
@LAYOUT
def test_combine_topk_weights_worked_example_come_home(layout: str, sync: bool) -> None:
    received = dispatch_example(layout, sync=sync)
    weights = [present(r.topk_weights) for r in received]
    both = reference.combine(
        [r.x for r in received], [r.handle for r in received], topk_weights=weights
    )
    for rank, (_, home) in enumerate(both):
        worked_example.check_weights_home(home, rank)


@SYNC
@LAYOUT
def test_dispatch_cached_worked_example_gives_the_same_rows(layout: str, sync: bool) -> None:
    fresh = dispatch_example(layout, sync=sync)
    x, _, weights = zip(*(worked_example.inputs(rank) for rank in RANKS), strict=True)
    handles = [list(r.handle) for r in fresh]
    again = reference.dispatch(x, None, weights, num_experts=8, max_tokens=4, handles=handles)
    for before, after in zip(fresh, again, strict=True):
        assert torch.equal(before.x, after.x)
        assert torch.equal(present(before.topk_weights), present(after.topk_weights))
        assert after.topk_idx is None
        assert after.layout == layout
        assert all(torch.equal(a, b) for a, b in zip(before.handle, after.handle, strict=True))
    plain = reference.dispatch(x, num_experts=8, max_tokens=4, handles=handles)
    assert all(r.topk_weights is None for r in plain)


def test_dispatch_cached_with_new_weights_makes_a_handle_that_weighs() -> None:
    x, topk_idx, weights = zip(*(worked_example.inputs(rank) for rank in RANKS), strict=True)
    where: dict[str, Any] = {"num_experts": 8, "max_tokens": 4}
    first = reference.dispatch(x, topk_idx, layout="grouped", alignment=2, **where)
    handles = [r.handle for r in first]
    again = reference.dispatch(x, None, weights, handles=handles, **where)
    y = [worked_example.experts(recv, rank) for rank, recv in enumerate(first)]
    error_of("E203", reference.combine, y, handles, weighted=True)
    for rank, out in enumerate(reference.combine(y, [r.handle for r in again], weighted=True)):
        worked_example.check_combined(out, rank, "grouped", weighted=True)


def test_dispatch_static_has_the_documented_shapes() -> None:
    shapes = {
        name: [tuple(received.x.shape) for received in dispatch_example(name, sync=False)]
        for name in LAYOUTS
    }
    assert shapes["compact"] == [(16, 16)] * 4  # R * M
    assert shapes["grouped"] == [(34, 16)] * 4  # R * M * min(K, El) + El * (alignment - 1)
    assert shapes["slab"] == [(2, 6, 16)] * 4
    compact = dispatch_example("compact", sync=False)[0]
    assert compact.handle.recv_src.shape == (16, 2)
    assert compact.handle.recv_row.shape == (0, 2)
    assert present(compact.row_index).shape == (34,)
    assert isinstance(compact.num_recv, Tensor)
    assert compact.num_recv.dtype == torch.int32
    assert compact.num_recv.shape == (1,)
    assert dispatch_example("slab", sync=False)[0].handle.recv_row.shape == (16, 2)


@pytest.mark.parametrize(
    ("layout", "num_topk", "options", "x_rows", "unique_rows"),
    [
        ("compact", 2, {}, [12, 12, 12], 12),  # R * M
        ("compact", 2, {"capacity": 5}, [5, 5, 5], 5),
        ("compact", 2, {"capacity": 20}, [20, 20, 20], 12),  # no more than R * M can arrive
        ("grouped", 2, {}, [24, 12, 0], 12),  # R * M * min(K, El)
        ("grouped", 5, {}, [24, 12, 0], 12),
        ("grouped", 1, {"alignment": 8}, [32, 24, 0], 12),  # 12 + 2 * 7 and 12 + 7, rounded up
        ("grouped", 2, {"alignment": 8, "capacity": 16}, [16, 16, 16], 12),
        ("slab", 2, {}, [12, 12, 12], 12),
        ("slab", 2, {"capacity": 3}, [3, 3, 3], 12),
    ],
)
def test_dispatch_static_sizes_follow_from_the_options_alone(
    layout: str, num_topk: int, options: dict[str, Any], x_rows: list[int], unique_rows: int
) -> None:
    x = [torch.zeros(0, 16) for _ in range(3)]
    ids = [torch.zeros(0, num_topk).long() for _ in range(3)]
    where: dict[str, Any] = {"num_experts": 3, "max_tokens": 4, "expert_map": [0, 1, 0]}
    for rank, recv in enumerate(
        reference.dispatch(x, ids, layout=layout, sync=False, **where, **options)
    ):
        num_local = [2, 1, 0][rank]
        slab = (num_local,) if layout == "slab" else ()
        assert recv.x.shape == (*slab, x_rows[rank], 16)
        assert recv.handle.recv_src.shape == (unique_rows, 2)
        assert recv.handle.recv_row.shape == (0 if layout == "compact" else unique_rows, num_topk)
        assert HandleMeta.unpack(recv.handle.meta).x_shape == recv.x.shape


def test_dispatch_static_duplicates_beyond_the_default_size_fail_with_230() -> None:
    x, ids = [torch.ones(2, 16)], [torch.tensor([[0, 0], [0, 0]])]
    for options in ({"layout": "grouped"}, {"layout": "slab"}, {"row_index": True}):
        one: dict[str, Any] = {"num_experts": 1, "max_tokens": 2, **options}
        (recv,) = reference.dispatch(
            x, ids, sync=False, **one
        )  # 4 selections, 1 * 2 * min(2, 1) rows
        assert recv.status.tolist() == [230]
        if options.get("layout") == "slab":
            error_of("E230", reference.dispatch, x, ids, **one)
        else:
            (recv,) = reference.dispatch(x, ids, **one)  # sync mode has no limit of its own
            assert recv.counts == [4]


# ---- Owners ----


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "owner", "local_id", "num_local"),
    [
        (8, 4, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1, 0, 1], [2, 2, 2, 2]),
        (5, 2, [0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [3, 2]),
        (2, 4, [0, 1], [0, 0], [1, 1, 0, 0]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 0, 1], [3, 2, 2]),
    ],
    ids=["even", "one-more", "fewer-experts-than-ranks", "three-ranks"],
)
def test_expert_owner_default_is_contiguous_blocks(
    num_experts: int, num_ranks: int, owner: list[int], local_id: list[int], num_local: list[int]
) -> None:
    experts = reference.expert_owner(num_experts, num_ranks)
    assert experts.owner.tolist() == owner
    assert experts.local_id.tolist() == local_id
    assert experts.num_local == num_local


def test_expert_owner_map_numbers_local_experts_by_global_id() -> None:
    experts = reference.expert_owner(5, 3, [2, 0, 2, 0, 2])
    assert experts.owner.tolist() == [2, 0, 2, 0, 2]
    assert experts.local_id.tolist() == [0, 0, 1, 1, 2]
    assert experts.num_local == [2, 0, 3]


def test_expert_owner_bad_map_raises_e212() -> None:
    assert "expert 1 on rank 3 of 3" in str(error_of("E212", reference.expert_owner, 2, 3, [0, 3]))
    assert "expert 0 on rank -1" in str(error_of("E212", reference.expert_owner, 1, 3, [-1]))
    error_of("E212", reference.expert_owner, 3, 2, [0, 1])


def test_rank_in_group_numbers_members_in_reading_order() -> None:
    place, sizes = rank_in_group(torch.tensor([[2, 0], [2, -1], [0, 2]]), 4)
    assert place.tolist() == [[0, 0], [1, -1], [1, 2]]
    assert sizes.tolist() == [2, 0, 3, 0]


def test_plan_sends_announces_each_token_once_per_rank() -> None:
    plan = plan_sends(torch.tensor([[0, 1], [3, 1], [2, 2]]), reference.expert_owner(4, 2))
    assert plan.tokens_per_rank.tolist() == [2, 2]
    assert plan.selections_per_expert.tolist() == [1, 2, 2, 1]
    assert plan.tokens_to(0).tolist() == [0, 1]
    assert plan.tokens_to(1).tolist() == [1, 2]


# ---- Order and rounding of the sum ----


def combine_one(
    contributions: dict[int, float],
    topk_idx: list[int],
    *,
    num_ranks: int = 3,
    experts_per_rank: int = 2,
    weights: list[float] | None = None,
    bias: Any = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Combine (grouped) one token of rank 0, to which expert e returns contributions[e]."""
    x = [torch.zeros(1 if rank == 0 else 0, 8, dtype=dtype) for rank in range(num_ranks)]
    idx = [torch.tensor([topk_idx]), *([torch.empty(0, len(topk_idx)).long()] * (num_ranks - 1))]
    given = None
    if weights is not None:
        given = [torch.tensor([weights]), *([torch.empty(0, len(weights))] * (num_ranks - 1))]
    num_experts = num_ranks * experts_per_rank
    received = reference.dispatch(
        x, idx, given, num_experts=num_experts, max_tokens=1, layout="grouped"
    )
    y = []
    for rank, recv in enumerate(received):
        local = present(recv.topk_idx).tolist()
        values = [contributions[experts_per_rank * rank + e] for e in local]
        y.append(torch.tensor(values, dtype=dtype).reshape(-1, 1).expand(-1, 8).contiguous())
    out = reference.combine(
        y, [r.handle for r in received], weighted=weights is not None, bias=bias
    )[0]
    assert out.shape == (1, 8)
    assert (out == out[0, 0]).all()
    return out[0, 0].item()


@pytest.mark.parametrize(
    ("topk_idx", "total"),
    [
        ([0, 2, 4], 1.0),  # (1e8 - 1e8) + 1
        ([4, 2, 0], 1.0),  # the same: ranks ascend, whatever the slots
        ([0, 4, 2], 1.0),
    ],
)
def test_combine_adds_in_ascending_rank_order(topk_idx: list[int], total: float) -> None:
    assert combine_one({0: 1e8, 2: -1e8, 4: 1.0}, topk_idx) == total
    assert combine_one({0: 1.0, 2: 1e8, 4: -1e8}, topk_idx) == 0.0  # (1 + 1e8) - 1e8


def test_combine_adds_slots_of_one_rank_in_slot_order() -> None:
    values = {0: 1e8, 1: -1e8, 2: 1.0}
    same_rank: dict[str, Any] = {"num_ranks": 1, "experts_per_rank": 3}
    assert combine_one(values, [0, 1, 2], **same_rank) == 1.0
    assert combine_one(values, [0, 2, 1], **same_rank) == 0.0
    assert combine_one(values, [2, 0, 1], **same_rank) == 0.0
    assert combine_one(values, [1, 0, 2], **same_rank) == 1.0


def test_combine_starts_at_the_bias() -> None:
    big, minus_big = torch.full((1, 8), 1e8), torch.full((1, 8), -1e8)
    none = [None, None]
    assert combine_one({0: 1.0, 2: -1e8}, [0, 2], bias=[big, *none]) == 0.0  # (1e8 + 1) - 1e8
    one = torch.full((1, 8), 1.0)
    pair = (big, minus_big)
    assert combine_one({0: 1.0}, [0], bias=[pair, *none]) == 1.0  # (1e8 - 1e8) + 1
    assert combine_one({0: -1e8}, [0], bias=[(one, big), *none]) == 0.0  # (1 + 1e8) - 1e8


def test_combine_rounds_the_product_before_adding() -> None:
    factor = 1 + 2.0**-12  # its square needs one bit more than fp32 has
    rounded = 1 + 2.0**-11
    total = combine_one({0: -rounded, 2: factor}, [0, 2], weights=[1.0, factor])
    assert total == 0.0  # an fma would leave 2^-24


def test_combine_bfloat16_rounds_once() -> None:
    values = {0: 256.0, 2: 1.0, 4: 1.0}
    assert combine_one(values, [0, 2, 4], dtype=torch.bfloat16) == 258.0  # not 256: 257 rounds down
    # 257 is a tie between 256 and 258: the even mantissa wins.
    assert combine_one({0: 256.0, 2: 1.0}, [0, 2], dtype=torch.bfloat16) == 256.0
    assert combine_one({0: 258.0, 2: 1.0}, [0, 2], dtype=torch.bfloat16) == 260.0


def test_combine_token_sent_nowhere_keeps_the_bias_bits() -> None:
    bias = [torch.full((1, 8), -0.0), None, None]
    assert combine_one({}, [-1, -1]) == 0.0
    assert math.copysign(1, combine_one({}, [-1, -1], bias=bias)) == -1
    # One real slot: the sum starts at 0, and the empty slot adds nothing to -0.0 from the bias.
    assert math.copysign(1, combine_one({0: -0.0}, [-1, 0])) == 1
    assert math.copysign(1, combine_one({0: -0.0}, [-1, 0], bias=bias)) == -1


@SYNC
@LAYOUT
def test_combine_never_reads_padding(layout: str, sync: bool) -> None:
    received = dispatch_example(layout, sync=sync)
    y = []
    for rank, recv in enumerate(received):
        rows = worked_example.experts(recv, rank)
        padding = present(recv.topk_idx) < 0
        if layout == "compact":
            padding = padding.all(1)
        rows[padding] = float("nan")
        y.append(rows)
    for rank, out in enumerate(reference.combine(y, [r.handle for r in received])):
        worked_example.check_combined(out, rank, layout)


def test_combine_weighted_ignores_the_weight_of_an_empty_slot() -> None:
    nan = float("nan")
    assert combine_one({0: 3.0}, [-1, 0], weights=[nan, 2.0]) == 6.0


def test_combine_result_does_not_alias_the_bias() -> None:
    bias = torch.ones(1, 8)
    received = reference.dispatch(
        [torch.ones(1, 8)], [torch.tensor([[-1]])], num_experts=1, max_tokens=1
    )
    (out,) = reference.combine([received[0].x], [received[0].handle], bias=[bias])
    out += 1
    assert (bias == 1).all()


# ---- What a caller can get wrong ----


def two_ranks(**options: Any) -> list[Received]:
    """Rank 0 sends tokens to experts 0, 1, 1 and rank 1 one to expert 0; one expert per rank."""
    x = [torch.ones(3, 16), torch.ones(1, 16)]
    topk_idx = options.pop("topk_idx", [torch.tensor([[0], [1], [1]]), torch.tensor([[0]])])
    return reference.dispatch(x, topk_idx, **{"num_experts": 2, "max_tokens": 3, **options})


@pytest.mark.parametrize("bad_id", [2, -2, 2**40])
def test_dispatch_id_out_of_range_raises_e213_with_the_first(bad_id: int) -> None:
    topk_idx = [torch.tensor([[0], [1], [1]]), torch.tensor([[bad_id]])]
    error = error_of("E213", two_ranks, topk_idx=topk_idx)
    assert isinstance(error, EPArgumentError)
    assert isinstance(error, ValueError)
    assert error.peer == 1
    assert f"got 1 bad ids from rank 1 in dispatch: first token 0, k 0, id {bad_id}" in str(error)


def test_dispatch_more_than_max_tokens_raises_e230_in_both_modes() -> None:
    for sync in (True, False):
        error = error_of("E230", two_ranks, max_tokens=2, sync=sync)
        assert isinstance(error, EPCapacityError)
        assert error.rank == 0
        assert "got 3, want <= 2" in str(error)


def test_dispatch_over_capacity_names_the_rank_that_overflows() -> None:
    topk_idx = [torch.tensor([[1], [1], [1]]), torch.tensor([[0]])]
    error = error_of("E230", two_ranks, topk_idx=topk_idx, capacity=2)
    assert error.rank == 1
    assert "got 3, want <= 2" in str(error)


@LAYOUT
@pytest.mark.parametrize("status", [213, 230])
def test_dispatch_static_failure_returns_an_empty_result_with_status(
    layout: str, status: int
) -> None:
    options: dict[str, Any] = {"capacity": 1}
    if status == 213:
        options = {"topk_idx": [torch.tensor([[0], [7], [1]]), torch.tensor([[0]])]}
    received = two_ranks(layout=layout, sync=False, **options)
    for recv in received:
        assert recv.status.tolist() == [status]
        assert recv.counts == [0]
        assert isinstance(recv.num_recv, Tensor)
        assert recv.num_recv.tolist() == [0]
        assert present(recv.topk_idx).eq(-1).all()
        assert recv.handle.recv_src.eq(-1).all()
        assert recv.handle.send_row.eq(-1).all()
        assert recv.handle.rank_counts.eq(0).all()
    # Its handle is usable and moves nothing.
    for out in reference.combine([r.x for r in received], [r.handle for r in received]):
        assert (out == 0).all()


def test_dispatch_bad_option_raises_e203() -> None:
    error_of("E203", two_ranks, layout="dense")
    error_of("E203", two_ranks, alignment=0)
    error_of("E203", two_ranks, capacity=-1)
    error_of("E203", two_ranks, quantize="int4")
    error_of("E203", two_ranks, quantize="fp8", scale_block=64)
    error_of("E211", two_ranks, quantize="fp8")  # 16 columns, blocks of 128


def test_dispatch_bad_topk_idx_raises_e200_or_e201() -> None:
    error = error_of("E200", two_ranks, topk_idx=[torch.zeros(3, 1), torch.zeros(1, 1).long()])
    assert isinstance(error, TypeError)
    error_of("E200", two_ranks, topk_idx=None)
    error_of("E201", two_ranks, topk_idx=[torch.zeros(3, 1).long(), torch.zeros(2, 1).long()])
    error_of("E201", two_ranks, topk_idx=[torch.zeros(3, 1).long(), torch.zeros(1, 2).long()])


def test_combine_rows_that_do_not_match_raise_e201() -> None:
    for layout in LAYOUTS:
        received = two_ranks(layout=layout)
        y = [r.x for r in received]
        y[1] = torch.cat([y[1], y[1]])
        error_of("E201", reference.combine, y, [r.handle for r in received])


def test_combine_weighted_without_weights_or_compact_raises_e203() -> None:
    for received in (two_ranks(layout="grouped"), dispatch_example("compact")):
        y, handles = [r.x for r in received], [r.handle for r in received]
        error_of("E203", reference.combine, y, handles, weighted=True)


# ---- Handles ----


def example_handle() -> Handle:
    return dispatch_example("grouped")[1].handle


def test_handle_meta_has_the_documented_numbers() -> None:
    x, topk_idx, _ = zip(*(worked_example.inputs(rank) for rank in RANKS), strict=True)
    received = reference.dispatch(
        x,
        topk_idx,
        num_experts=8,
        max_tokens=4,
        layout="slab",
        capacity=7,
        sync=False,
        generation=11,
        routing_number=5,
    )
    meta = [MAGIC, 11, 5, 2, 1, 4, 16, 7, 2, 7, 0, 0, 4, 8, 2, 16]
    assert received[1].handle.meta.tolist() == meta
    assert received[1].handle.meta.dtype == torch.int64
    assert received[1].handle.topk_weights.shape == (0, 2)
    meta = [MAGIC, 0, 0, 1, 2, 4, 8, 10, 2, -1, 1, 1, 4, 8, 2, 16]
    assert example_handle().meta.tolist() == meta


def test_handle_meta_unpack_returns_what_was_packed() -> None:
    for layout in LAYOUTS:
        _, meta = parse_handle(dispatch_example(layout)[2].handle)
        assert HandleMeta.unpack(meta.pack()) == meta
        assert meta.layout == layout


def test_handle_rebuilt_from_its_tensors_is_accepted() -> None:
    handle = example_handle()
    for rebuilt in (tuple(handle), list(handle), Handle(*handle)):
        parsed, meta = parse_handle(rebuilt, generation=0)
        assert isinstance(parsed, Handle)
        assert meta.num_unique == 8


def damaged_handles() -> dict[str, Any]:
    handle = example_handle()

    def numbers(**changes: int) -> Handle:
        meta = handle.meta.clone()
        for index, value in changes.items():
            meta[int(index[1:])] = value
        return handle._replace(meta=meta)

    return {
        "not a sequence": 3,
        "a tensor": handle.meta,
        "too short": tuple(handle)[:-1],
        "meta dtype": handle._replace(meta=handle.meta.int()),
        "meta size": handle._replace(meta=handle.meta[:-1]),
        "meta type": handle._replace(meta=None),  # type: ignore[arg-type]
        "magic": numbers(_0=1),
        "layout": numbers(_3=3),
        "negative": numbers(_5=-1),
        "ranks": numbers(_12=0),
        "rows": numbers(_6=9),
        "send_row": handle._replace(send_row=handle.send_row.long()),
        "recv_row": handle._replace(recv_row=handle.recv_row[1:]),
        "rank_counts": handle._replace(rank_counts=handle.rank_counts.t()),
        "weights": handle._replace(topk_weights=handle.topk_weights.half()),
        "swapped": Handle(handle.meta, *reversed(handle[1:])),
    }


@pytest.mark.parametrize("damage", damaged_handles())
def test_handle_damaged_raises_e320(damage: str) -> None:
    error = error_of("E320", parse_handle, damaged_handles()[damage])
    assert isinstance(error, EPUsageError)


def test_handle_of_another_buffer_raises_e320() -> None:
    error = error_of("E320", parse_handle, example_handle(), generation=4)
    assert "got generation 0, want 4" in str(error)


def test_combine_handles_of_different_dispatches_raise_e320() -> None:
    received, other = dispatch_example("grouped"), dispatch_example("slab")
    handles = [other[0].handle, *(r.handle for r in received[1:])]
    error_of("E320", reference.combine, [r.x for r in received], handles)
    error_of("E320", reference.combine, [r.x for r in received[:2]], handles[1:3])
    handles[0] = received[0].handle
    other_map = [3, 3, 3, 2, 2, 1, 1, 0]
    y = [r.x for r in received]
    error_of("E320", reference.combine, y, handles, expert_map=other_map)


def test_received_use_on_is_a_no_op_on_the_cpu() -> None:
    dispatch_example("grouped")[0].use_on(None)


# ---- FP8 from first principles ----
#
# float8_e4m3fn as the OCP specification defines it: sign, 4 bits of exponent with bias 7, 3 of
# mantissa; no infinity, and 0x7F, 0xFF are NaN. Exact rationals, no torch.


def decode_e4m3(code: int) -> Fraction:
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0:
        magnitude = Fraction(mantissa, 8) * Fraction(1, 2**6)
    else:
        magnitude = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


POSITIVE = [decode_e4m3(code) for code in range(0x7F)]  # 0 to 448; index = code


def encode_e4m3(value: float) -> int:
    """Nearest code, ties to the even one; |value| <= 448."""
    magnitude = Fraction(abs(value))
    above = bisect.bisect_left(POSITIVE, magnitude, hi=0x7E)
    candidates = range(max(above - 1, 0), above + 1)
    nearest = min(candidates, key=lambda code: (abs(POSITIVE[code] - magnitude), code & 1))
    return nearest | (0x80 if math.copysign(1, value) < 0 else 0)


def fp32(value: float) -> float:
    """Round a double to fp32; exact for a product or quotient of two fp32 numbers."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def quantize_block(block: Sequence[float]) -> tuple[list[int], float]:
    amax = max(max(abs(v) for v in block), fp32(1e-4))
    inverse = fp32(448 / amax)
    return [encode_e4m3(fp32(v * inverse)) for v in block], fp32(amax / 448)


def quantize_block_ue8m0(block: Sequence[float]) -> tuple[list[int], int]:
    amax = max(max(abs(v) for v in block), fp32(1e-4))
    mantissa, exponent = math.frexp(fp32(amax / 448))  # mantissa * 2^exponent, 0.5 <= mantissa < 1
    if mantissa == 0.5:
        exponent -= 1
    return [encode_e4m3(v * 2.0**-exponent) for v in block], exponent + 127


def codes(q: Tensor) -> list[int]:
    flat: list[int] = q.view(torch.uint8).flatten().tolist()
    return flat


def test_quantize_every_finite_code_survives_at_scale_one() -> None:
    positive = [float(v) for v in POSITIVE] + [448.0]
    x = torch.tensor([positive, [-v for v in positive]])  # [2, 128], amax = 448 in both
    q, scales = reference.quantize(x)
    assert scales.tolist() == [[1.0], [1.0]]
    assert codes(q) == [*range(0x7F), 0x7E, *range(0x80, 0xFF), 0xFE]
    assert torch.equal(reference.dequantize(q, scales), x)


def test_quantize_decodes_all_256_codes_as_specified() -> None:
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    values = reference.dequantize(q, torch.ones(2, 1)).flatten().tolist()
    for code, value in enumerate(values):
        if code & 0x7F == 0x7F:
            assert math.isnan(value)
        else:
            assert Fraction(value) == decode_e4m3(code)
            assert math.copysign(1, value) == (-1 if code & 0x80 else 1)


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_quantize_between_two_codes_rounds_to_nearest_even(nudge: int) -> None:
    middles = [float((a + b) / 2) for a, b in itertools.pairwise(POSITIVE)]
    x = torch.tensor(middles)
    if nudge:
        x = torch.nextafter(x, torch.tensor(nudge * float("inf")))
    x = torch.cat([x, torch.tensor([448.0, 448.0])]).view(1, 128)
    q, _ = reference.quantize(x)
    lower = range(len(middles))
    want = [code + (nudge > 0 or (nudge == 0 and code & 1)) for code in lower]
    assert codes(q)[:126] == want
    assert codes(reference.quantize(-x)[0])[:126] == [code | 0x80 for code in want]


def test_quantize_zero_block_is_clamped() -> None:
    x = torch.zeros(1, 256)
    x[0, 128] = 1e-5  # below the clamp as well
    q, scales = reference.quantize(x)
    assert scales.tolist() == [[fp32(fp32(1e-4) / 448)] * 2]
    assert codes(q)[:128] == [0] * 128
    assert codes(q)[128] == encode_e4m3(fp32(fp32(1e-5) * fp32(448 / fp32(1e-4))))
    tiny = torch.full((1, 128), 1e-40)  # denormal in fp32
    assert codes(reference.quantize(tiny)[0]) == [0] * 128


@pytest.mark.parametrize("scale_block", [128, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_random_blocks_match_exact_arithmetic(
    dtype: torch.dtype, scale_block: int
) -> None:
    generator = torch.Generator().manual_seed(7)
    spread = torch.logspace(-4, 3, 4).repeat_interleave(scale_block)
    x = (torch.randn(3, 4 * scale_block, generator=generator) * spread).to(dtype)
    q, scales = reference.quantize(x, scale_block=scale_block)
    q8, words = reference.quantize(x, kind="fp8_ue8m0", scale_block=scale_block)
    assert words.shape == (3, 1)
    for row in range(3):
        for block in range(4):
            part = slice(block * scale_block, (block + 1) * scale_block)
            values = x[row, part].float().tolist()
            want_codes, want_scale = quantize_block(values)
            assert codes(q[row, part]) == want_codes
            assert scales[row, block].item() == want_scale
            want_codes, want_exponent = quantize_block_ue8m0(values)
            assert codes(q8[row, part]) == want_codes
            assert int(words[row, 0]) >> (8 * block) & 0xFF == want_exponent


def test_quantize_at_every_rounding_boundary_uses_the_rounded_quotient() -> None:
    # A value that is scaled to just about the middle of two codes shows the last bit of 448 / amax:
    # 448 * (1 / amax) and 1 / (amax / 448) round twice and give other codes here.
    middles = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(POSITIVE)])  # [126]
    generator = torch.Generator().manual_seed(0)
    blocks, differ = [], [False, False]
    for amax in torch.rand(6, generator=generator) + 0.5:
        at = (middles.double() * amax.double() / 448).float()
        for values in (at, torch.nextafter(at, amax), torch.nextafter(at, -amax)):
            blocks.append(torch.cat([values, amax.reshape(1), amax.reshape(1)]))
    q, _ = reference.quantize(torch.stack(blocks))  # [18, 128]
    for got, block in zip(q, blocks, strict=True):
        values = block.tolist()
        want, scale = quantize_block(values)
        assert codes(got) == want
        amax_value = values[-1]
        for i, inverse in enumerate((fp32(448 * fp32(1 / amax_value)), fp32(1 / scale))):
            differ[i] |= want != [encode_e4m3(min(fp32(v * inverse), 448.0)) for v in values]
    assert all(differ)  # the boundaries are sharp enough to tell


def test_quantize_ue8m0_rounds_the_scale_up_to_a_power_of_two() -> None:
    above = float(torch.nextafter(torch.tensor(448.0), torch.tensor(1e9)))
    amaxes = [448.0, above, 300.0, 224.0]  # scale 1, just above 1, 0.67, 0.5
    x = torch.zeros(1, 4 * 128)
    x[0, ::128] = torch.tensor(amaxes)
    q, words = reference.quantize(x, kind="fp8_ue8m0")
    # 448 * (1 + 2^-23 * 8 / 7) / 448 rounds to 1 + 2^-23: above 1, so the next power of two.
    assert words.tolist() == [[127 | 128 << 8 | 127 << 16 | 126 << 24]]
    want = [encode_e4m3(v) for v in (448.0, above / 2, 300.0, 448.0)]
    assert codes(q[0, ::128]) == want
    assert words.dtype == torch.int32


def test_quantize_ue8m0_dequantizes_through_the_exponents() -> None:
    x = torch.zeros(2, 512)
    x[:, ::128] = torch.tensor([[448.0, 896.0, 3.5, 7.0], [1.0, 2.0**-20, 2.0**60, 0.0]])
    q, words = reference.quantize(x, kind="fp8_ue8m0")
    back = reference.dequantize(q, words)
    assert torch.equal(back[:, ::128], x[:, ::128])  # all of them a code times a power of two
    assert reference.dequantize(q, words, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["fp8", "fp8_ue8m0"])
def test_quantize_nan_spoils_its_block_and_no_other(kind: str) -> None:
    x = torch.ones(1, 512)
    x[0, 130] = float("nan")
    clean, _ = reference.quantize(torch.ones(1, 512), kind=kind)
    q, scales = reference.quantize(x, kind=kind)
    spoiled = [code & 0x7F == 0x7F for code in codes(q)]
    assert spoiled == [128 <= i < 256 for i in range(512)]
    assert codes(q[:, :128]) == codes(clean[:, :128])
    if kind == "fp8":
        assert scales.isnan().tolist() == [[False, True, False, False]]
    else:
        assert (int(scales) >> 8) & 0xFF == 255
    assert reference.dequantize(q, scales).isnan().flatten().tolist() == spoiled


def test_quantize_infinity_becomes_nan_and_its_block_zero() -> None:
    x = torch.ones(1, 256)
    x[0, 3] = float("-inf")
    q, scales = reference.quantize(x)
    assert scales.tolist() == [[float("inf"), fp32(1 / 448)]]
    assert codes(q)[3] & 0x7F == 0x7F
    assert codes(q)[:3] + codes(q)[4:128] == [0] * 127  # 1 * (448 / inf)
    x = torch.ones(1, 512)
    x[0, 3] = float("inf")
    q, words = reference.quantize(x, kind="fp8_ue8m0")
    assert int(words) & 0xFF == 255
    assert all(code & 0x7F == 0x7F for code in codes(q)[:128])


def test_quantize_no_rows_gives_no_rows() -> None:
    for kind, words in (("fp8", 8), ("fp8_ue8m0", 2)):
        q, scales = reference.quantize(torch.empty(0, 1024), kind=kind)
        assert q.shape == (0, 1024)
        assert scales.shape == (0, words)


def test_quantize_hidden_that_is_no_multiple_raises_e211() -> None:
    error_of("E211", reference.quantize, torch.zeros(1, 120))
    error_of("E211", reference.quantize, torch.zeros(1, 128), kind="fp8_ue8m0")


# ---- Scales on the way ----


@SYNC
@LAYOUT
@pytest.mark.parametrize("kind", ["fp8", "fp8_ue8m0"])
def test_dispatch_quantize_equals_quantizing_first(layout: str, kind: str, sync: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(4, 1024, generator=generator).bfloat16() for _ in RANKS]
    topk_idx = [worked_example.inputs(rank)[1] for rank in RANKS]
    options = {**worked_example.OPTIONS[layout], "num_experts": 8, "max_tokens": 4, "sync": sync}
    inside = reference.dispatch(x, topk_idx, quantize=kind, **options)
    q, scales = zip(*(reference.quantize(rows, kind=kind) for rows in x), strict=True)
    strided = [s.t().contiguous().t() for s in scales]
    outside = reference.dispatch(q, topk_idx, scales=strided, **options)
    for rank in RANKS:
        a, b = inside[rank], outside[rank]
        assert a.x.dtype == torch.float8_e4m3fn
        assert torch.equal(a.x.view(torch.uint8), b.x.view(torch.uint8))
        got = present(a.scales)
        assert got.dtype == scales[0].dtype
        assert torch.equal(got, present(b.scales))
        assert got.shape[:-1] == a.x.shape[:-1]
        for row, source, token in tokens_behind_rows(a, rank):
            assert torch.equal(got.flatten(0, -2)[row], scales[source][token]), (rank, row)


def tokens_behind_rows(received: Received, rank: int) -> list[tuple[int, int, int]]:
    """(flat row, source rank, source token) of the rows in use, by the worked example."""
    sources = worked_example.RECV_SRC[rank]
    if received.layout == "compact":
        return [(row, *src) for row, src in enumerate(sources)]  # type: ignore[misc]
    recv_row = worked_example.ROWS[received.layout][rank].recv_row
    return [
        (row, src[0], src[1])
        for rows, src in zip(recv_row, sources, strict=True)
        for row in rows
        if row >= 0
    ]


@pytest.mark.parametrize(("capacity", "column"), [(6, 8), (8, 8), (9, 12)])
def test_dispatch_slab_scales_are_column_major(capacity: int, column: int) -> None:
    x = [torch.zeros(4, 512, dtype=torch.int8) for _ in RANKS]
    scales = [torch.ones(4, 4) for _ in RANKS]
    topk_idx = [worked_example.inputs(rank)[1] for rank in RANKS]
    received = reference.dispatch(
        x, topk_idx, scales=scales, num_experts=8, max_tokens=4, layout="slab", capacity=capacity
    )
    got = present(received[0].scales)
    assert got.shape == (2, capacity, 4)
    assert got.stride() == (4 * column, 1, column)


def test_dispatch_grouped_padding_is_zero_in_x_and_scales() -> None:
    x = [torch.ones(4, 128, dtype=torch.int8) for _ in RANKS]
    scales = [torch.ones(4, 1) for _ in RANKS]
    topk_idx = [worked_example.inputs(rank)[1] for rank in RANKS]
    options = {**worked_example.OPTIONS["grouped"], "num_experts": 8, "max_tokens": 4}
    for recv in reference.dispatch(x, topk_idx, scales=scales, **options):
        real = present(recv.topk_idx).ge(0).unsqueeze(1)
        assert torch.equal(recv.x, real.expand(-1, 128).to(torch.int8))
        assert torch.equal(present(recv.scales), real.float())
