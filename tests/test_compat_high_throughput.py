"""`deep_ep` V1, layout to combine: the rows of the contract, against the reference, bit by bit."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same_bits
from compat_ranks import UNEVEN, E, H, Inputs, K, R, Ranks, dispatch
from torch import Tensor

from ep_comm import reference
from ep_comm.compat import deep_ep
from ep_comm.compat.deep_ep import handles
from ep_comm.errors import EPCapacityError, EPClosedError, EPError
from ep_comm.handle import Handle


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    four = Ranks()
    yield four
    four.close()


# ---- layout ----


def test_layout_counts_tokens_once_per_rank_and_selections_per_expert(ranks: Ranks) -> None:
    idx = torch.tensor([[0, 0, 1], [7, 2, -1], [-1, -1, -1]])
    per_rank, per_node, per_expert, in_rank, event = ranks.buffers[0].get_dispatch_layout(idx, E)

    assert (per_rank.dtype, per_rank.tolist()) == (torch.int32, [1, 1, 0, 1])
    assert per_node is None
    assert (per_expert.dtype, per_expert.tolist()) == (torch.int32, [2, 1, 1, 0, 0, 0, 0, 1])
    assert in_rank.dtype == torch.bool
    assert in_rank.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert isinstance(event, deep_ep.EventOverlap)
    assert event.event is None


def test_layout_of_no_tokens_is_zeros_of_the_right_shapes(ranks: Ranks) -> None:
    idx = torch.empty((0, K), dtype=torch.int64)
    per_rank, _, per_expert, in_rank, _ = ranks.buffers[0].get_dispatch_layout(idx, E)
    assert per_rank.tolist() == [0] * R
    assert per_expert.tolist() == [0] * E
    assert in_rank.shape == (0, R)


# ---- dispatch ----


@pytest.mark.parametrize("async_finish", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("tokens", [UNEVEN, (0, 0, 0, 0)], ids=["uneven", "empty"])
def test_dispatch_and_combine_are_those_of_the_reference(
    ranks: Ranks, tokens: tuple[int, ...], alignment: int, async_finish: bool
) -> None:
    data = Inputs(tokens)
    want = data.reference()

    def work(rank: int, buffer: deep_ep.Buffer) -> tuple[Tensor, Tensor]:
        x, idx, weights = data.x[rank], data.idx[rank], data.weights[rank]
        recv_x, recv_idx, recv_weights, counts, handle, event = dispatch(
            buffer, x, idx, weights, E, expert_alignment=alignment, async_finish=async_finish
        )
        assert (event.event is not None) == async_finish
        event.current_stream_wait()
        same_bits(recv_x, want[rank].x)
        same_bits(recv_idx, want[rank].topk_idx)
        same_bits(recv_weights, want[rank].topk_weights)
        assert type(counts) is list
        assert counts == [-(-n // alignment) * alignment for n in want[rank].counts]
        _check_handle(handle, rank, data, want)
        total, home, event = buffer.combine(
            recv_x, handle, topk_weights=recv_weights, async_finish=async_finish
        )
        assert (event.event is not None) == async_finish
        return total, home

    got = ranks.run(work)
    handles = [r.handle for r in want]
    held = [r.topk_weights for r in want]
    expected = reference.combine([r.x for r in want], handles, topk_weights=held)
    for (total, home), (want_total, want_home) in zip(got, expected, strict=True):
        same_bits(total, want_total)
        same_bits(home, want_home)


def _check_handle(handle: Any, rank: int, data: Inputs, want: Any) -> None:
    assert type(handle) is tuple
    assert len(handle) == 6
    assert all(isinstance(t, Tensor) for t in handle)
    sent = torch.stack([r.handle.rank_counts[0] for r in want])  # [src, dst]
    same_bits(handle[0], sent.cumsum(0).to(torch.int32), "rank_prefix_matrix")
    same_bits(handle[3], want[rank].handle.recv_src[:, 1].contiguous(), "recv_src_idx")
    num_tokens = data.tokens[rank]
    assert handle[4].shape[0] == handle[5].shape[0] == num_tokens  # sizes follow from tensors


def test_int32_ids_come_back_as_int32(ranks: Ranks) -> None:
    data = Inputs()
    want = data.reference()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank].int(), data.weights[rank], E)
        same_bits(out[1], want[rank].topk_idx.int())

    ranks.run(work)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(2, torch.float32), (1, torch.float32), (1, torch.int32)],
    ids=["blocks", "per-token", "packed"],
)
def test_fp8_rows_travel_with_scales_of_any_strides(
    ranks: Ranks, width: int, dtype: torch.dtype
) -> None:
    data = Inputs(hidden=256)
    rows = [x.to(torch.float8_e4m3fn) for x in data.x]
    scales = [torch.randint(1, 1 << 20, (width, t)).to(dtype).t() for t in data.tokens]
    want = data.reference(rows, scales=[s.contiguous() for s in scales])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        given = (rows[rank], scales[rank])
        out = dispatch(buffer, given, data.idx[rank], data.weights[rank], E)
        again = buffer.dispatch(given, handle=out[4])
        for recv_x, recv_scales in (out[0], again[0]):
            same_bits(recv_x, want[rank].x)
            same_bits(recv_scales, want[rank].scales)
            assert recv_scales.is_contiguous()
        assert again[1:5] == (None, None, None, None)

    ranks.run(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float64, torch.int64])
def test_other_dtypes_travel_verbatim(ranks: Ranks, dtype: torch.dtype) -> None:
    data = Inputs()
    rows = [(x.float() * 100).to(dtype) for x in data.x]
    want = data.reference(rows)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, rows[rank], data.idx[rank], data.weights[rank], E)
        same_bits(out[0], want[rank].x)
        combined, _, _ = buffer.combine(out[0].to(torch.bfloat16), out[4])  # H is not row bytes
        assert combined.shape == data.x[rank].shape

    ranks.run(work)


def test_cached_dispatch_takes_a_rebuilt_handle_and_explicit_none(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        x = data.x[rank]
        out = dispatch(buffer, x, data.idx[rank], data.weights[rank], E)
        for rebuilt in (tuple(t.clone() for t in out[4]), list(out[4])):
            again = buffer.dispatch(
                x + 1,
                handle=rebuilt,
                num_tokens_per_rank=None,
                is_token_in_rank=None,
                num_tokens_per_expert=None,
                topk_idx=None,
                topk_weights=None,
            )
            same_bits(again[0], out[0] + 1)
            assert again[1:5] == (None, None, None, None)
            assert isinstance(again[5], deep_ep.EventOverlap)

    ranks.run(work)


def test_ids_may_change_after_dispatch(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx = data.idx[rank].clone()
        out = dispatch(buffer, data.x[rank], idx, data.weights[rank], E)
        before = buffer.combine(out[0], out[4])[0]
        idx.fill_(-1)
        same_bits(buffer.combine(out[0], out[4])[0], before)

    ranks.run(work)


@pytest.mark.parametrize("worst", [40, 100])
def test_num_worst_tokens_gives_outputs_of_exactly_that_many_rows(ranks: Ranks, worst: int) -> None:
    data = Inputs()
    want = data.reference()
    expected = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        x, idx = data.x[rank], data.idx[rank]
        out = dispatch(buffer, x, idx, data.weights[rank], E, num_worst_tokens=worst)
        recv_x, recv_idx, recv_weights, counts, handle, _ = out
        num_recv = want[rank].x.shape[0]
        assert (recv_x.shape, recv_idx.shape) == ((worst, H), (worst, K))
        same_bits(recv_x[:num_recv], want[rank].x)
        same_bits(recv_idx[:num_recv], want[rank].topk_idx)
        assert (recv_idx[num_recv:] == -1).all()
        assert (recv_weights[num_recv:] == 0).all()
        assert counts == []
        total, home, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
        same_bits(total, expected[rank])
        same_bits(home, torch.where(idx >= 0, data.weights[rank], 0.0))
        assert buffer.dispatch(x, handle=handle)[0].shape == (worst, H)

    ranks.run(work)


def test_more_than_num_worst_tokens_raises_on_every_rank(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        with pytest.raises(EPCapacityError):
            dispatch(
                buffer, data.x[rank], data.idx[rank], data.weights[rank], E, num_worst_tokens=2
            )
        dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)  # goes on

    ranks.run(work)


def test_without_topk_the_routing_is_is_token_in_rank(ranks: Ranks) -> None:
    data = Inputs()
    want = data.reference()
    sums = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        x = data.x[rank]
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(data.idx[rank], E)
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            expert_alignment=4,
        )
        same_bits(recv_x, want[rank].x)
        assert (recv_idx, recv_weights) == (None, None)
        assert counts == [-(-n // 4) * 4 for n in want[rank].counts]
        same_bits(buffer.combine(recv_x, handle)[0], sums[rank])
        same_bits(buffer.dispatch(x, handle=handle)[0], recv_x)

    ranks.run(work)


# ---- combine ----


@pytest.mark.parametrize("which", ["one", "first", "second", "both", "none"])
def test_combine_adds_bias_first(ranks: Ranks, which: str) -> None:
    data = Inputs()
    want = data.reference()
    one = [torch.randn(t, H).bfloat16() for t in data.tokens]
    two = [torch.randn(t, H).bfloat16() for t in data.tokens]
    bias: list[Any] = {
        "one": one,
        "first": [(a, None) for a in one],
        "second": [(None, b) for b in two],
        "both": list(zip(one, two, strict=True)),
        "none": [None] * R,
    }[which]
    expected = reference.combine([r.x for r in want], [r.handle for r in want], bias=bias)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        total, home, _ = buffer.combine(out[0], out[4], bias=bias[rank])
        same_bits(total, expected[rank])
        assert home is None

    ranks.run(work)


def test_combine_sums_weights_over_all_ranks_of_the_token(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        held = torch.ones_like(out[2])  # also in slots of experts elsewhere
        _, home, _ = buffer.combine(out[0], out[4], topk_weights=held)
        layout = deep_ep.layout.dispatch_layout(data.idx[rank], E, R)
        num_ranks = layout.is_token_in_rank.sum(1, dtype=torch.float32)
        same_bits(home, num_ranks.unsqueeze(1).expand(-1, K).contiguous())

    ranks.run(work)


def test_token_sent_nowhere_combines_to_zero(ranks: Ranks) -> None:
    data = Inputs((2, 2, 2, 2))
    for idx in data.idx:
        idx[1] = -1

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        total, home, _ = buffer.combine(out[0], out[4], topk_weights=out[2])
        same_bits(total[1], torch.zeros(H, dtype=torch.bfloat16))
        same_bits(home[1], torch.zeros(K))

    ranks.run(work)


# ---- handles ----


def test_many_handles_live_together_and_are_used_backwards(ranks: Ranks) -> None:
    layers = [Inputs(seed=s) for s in range(12)]
    want = [data.reference() for data in layers]
    sums = [reference.combine([r.x for r in w], [r.handle for r in w]) for w in want]

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        saved = []
        for i, data in enumerate(layers):
            config = deep_ep.Config(num_sms=2 * (i + 1))
            args = (data.x[rank], data.idx[rank], data.weights[rank])
            saved.append(dispatch(buffer, *args, E, config=config))
        for i in reversed(range(len(layers))):
            recv_x, handle = saved[i][0], saved[i][4]
            same_bits(buffer.combine(recv_x, handle, config=deep_ep.Config(24))[0], sums[i][rank])
            same_bits(buffer.dispatch(layers[i].x[rank], handle=handle)[0], recv_x)

    ranks.run(work)


def test_old_handles_work_with_a_larger_buffer_made_later(ranks: Ranks) -> None:
    data = Inputs()
    want = data.reference()
    sums = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, _: deep_ep.Buffer) -> None:
        small = ranks.new(rank, 1 << 20, 0)
        out = dispatch(small, data.x[rank], data.idx[rank], data.weights[rank], E)
        recv_x = out[0].clone()
        small.destroy()
        same_bits(out[0], recv_x, "after destroy")
        with ranks.new(rank, 1 << 24, 0) as large:
            same_bits(large.combine(out[0], out[4])[0], sums[rank])
            same_bits(large.dispatch(data.x[rank], handle=out[4])[0], recv_x)

    ranks.run(work)


@pytest.mark.parametrize(
    "handle",
    [
        None,
        (),
        (1, 2, 3, 4, 5, 6),
        "handle",
        (torch.zeros(16, dtype=torch.int64),) * 6,
        (torch.zeros(16),) * 6,
        (torch.zeros(4, 4, dtype=torch.int64),) * 6,
        (torch.zeros(3, dtype=torch.int64),) * 6,
    ],
    ids=["none", "empty", "numbers", "text", "no-magic", "floats", "matrices", "short"],
)
def test_something_else_is_no_handle(ranks: Ranks, handle: Any) -> None:
    with pytest.raises(ValueError, match="handle"):
        ranks.buffers[0].combine(torch.zeros(1, H).bfloat16(), handle)


# ---- other numbers of ranks ----


def test_one_rank_sends_to_itself() -> None:
    alone = Ranks(1)
    data = Inputs((5,))
    want = data.reference()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[0], data.idx[0], data.weights[0], E)
        same_bits(out[0], want[0].x)
        assert out[3] == want[0].counts
        expected = reference.combine([want[0].x], [want[0].handle])
        same_bits(buffer.combine(out[0], out[4])[0], expected[0])

    alone.run(work)
    alone.close()


def test_nine_ranks_are_two_nodes_with_a_handle_of_ten() -> None:
    nine = Ranks(9)
    data = Inputs((2, 0, 1, 1, 2, 0, 1, 3, 1), num_experts=18)
    want = data.reference()
    sums = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx = data.idx[rank]
        per_node = buffer.get_dispatch_layout(idx, 18)[1]
        owner = torch.where(idx >= 0, idx // 2, -1)
        nodes = [((owner >= 0) & (owner < 8)).any(1).sum(), (owner == 8).any(1).sum()]
        assert (per_node.dtype, per_node.tolist()) == (torch.int32, [int(n) for n in nodes])
        out = dispatch(buffer, data.x[rank], idx, data.weights[rank], 18)
        same_bits(out[0], want[rank].x)
        handle = out[4]
        assert (type(handle), len(handle)) == (tuple, 10)
        assert all(t is None or isinstance(t, Tensor) for t in handle)
        received = want[rank].handle.rank_counts[1]
        same_bits(handle[-4], received.cumsum(0).to(torch.int32), "recv_gbl_rank_prefix_sum")
        assert (handle[7].dtype, handle[7].shape) == (torch.uint8, (out[0].shape[0], 8))
        rebuilt = tuple(None if t is None else t.clone() for t in handle)
        same_bits(buffer.combine(out[0], rebuilt)[0], sums[rank])
        same_bits(buffer.dispatch(data.x[rank], handle=rebuilt)[0], out[0])

    nine.run(work)
    nine.close()


def test_what_crossed_between_nodes_travels_in_a_handle_of_ten() -> None:
    """The native handle of a hybrid buffer holds it in recv_row."""
    data = Inputs((2, 0, 1, 1, 2, 0, 1, 3, 1), num_experts=18)
    nine = Ranks(9)
    log = torch.arange(3 * K * 4, dtype=torch.int32).view(12, K)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        native = buffer._natives.get(data.x[rank].shape[1], 18, data.x[rank].device)
        recv = native.dispatch(data.x[rank], data.idx[rank], data.weights[rank], origins=True)
        crossed = recv.handle._replace(recv_row=log)
        recv = dataclasses.replace(recv, handle=crossed)
        handle = handles.pack(recv, data.idx[rank], None, rank)
        rebuilt = tuple(None if t is None else t.clone() for t in handle)
        for given in (handle, rebuilt):
            _, restored = handles.restore(given, buffer._natives, native.hidden, log.device)
            same_bits(Handle(*restored).recv_row, log, "recv_row")

    nine.run(work)
    nine.close()


# ---- errors and the end ----


def test_a_bad_id_on_one_rank_raises_on_every_rank(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        per_expert = torch.zeros(E, dtype=torch.int32)
        idx = data.idx[rank].clone()
        if rank == 2:
            idx[0, 0] = E
        with pytest.raises(EPError) as raised:
            buffer.dispatch(
                data.x[rank],
                num_tokens_per_expert=per_expert,
                topk_idx=idx,
                topk_weights=data.weights[rank],
            )
        assert raised.value.code == "E213"

    ranks.run(work)


def test_arguments_that_do_not_go_together_are_refused(ranks: Ranks) -> None:
    buffer, data = ranks.buffers[0], Inputs()
    x, idx, weights = data.x[0], data.idx[0], data.weights[0]
    with pytest.raises(ValueError, match="num_tokens_per_expert"):
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights)
    with pytest.raises(ValueError, match="is_token_in_rank"):
        buffer.dispatch(x, num_tokens_per_expert=torch.zeros(E, dtype=torch.int32))
    with pytest.raises(ValueError, match="want None with handle"):
        buffer.dispatch(x, handle=(), topk_idx=idx)
    with pytest.raises(TypeError):
        buffer.dispatch(x, topk_idx=idx, use_nvfp4=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="previous_event"):
        buffer.get_dispatch_layout(idx, E, previous_event=3)


def test_destroy_is_local_idempotent_and_leaves_what_was_received(ranks: Ranks) -> None:
    data = Inputs()

    def work(rank: int, _: deep_ep.Buffer) -> None:
        buffer = ranks.new(rank)
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        kept = out[0].clone()
        buffer.destroy()
        buffer.destroy()
        same_bits(out[0], kept)
        with pytest.raises(EPClosedError):
            buffer.combine(out[0], out[4])

    ranks.run(work)


def test_a_dropped_buffer_is_collected(ranks: Ranks) -> None:
    def work(rank: int, _: deep_ep.Buffer) -> None:
        data = Inputs()
        buffer = ranks.new(rank)
        dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)

    ranks.run(work)
    gc.collect()


# ---- utilities ----


def test_construction_accepts_what_programs_pass(ranks: Ranks) -> None:
    group = ranks.cluster.group(0)
    buffer = deep_ep.Buffer(group, int(1e9), int(2e9), True, 12.5, use_fabric=True)
    assert buffer.group is group
    assert (buffer.rank, buffer.group_size) == (0, R)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (int(1e9), int(2e9))
    assert (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.enable_shrink) == (
        True,
        False,
        False,
    )
    assert buffer.runtime is not None
    with pytest.raises(ValueError, match="neither group nor comm"):
        deep_ep.Buffer(None)
    with pytest.raises(TypeError):
        deep_ep.Buffer(group, overlap=True)  # type: ignore[call-arg]
    assert not hasattr(deep_ep.Buffer, "get_low_latency_rdma_size_hint_m2n")


def test_static_utilities_work_without_a_group() -> None:
    before = deep_ep.Buffer.num_sms
    assert before == 20
    try:
        deep_ep.Buffer.set_num_sms(24)
        assert deep_ep.Buffer.num_sms == 24
        with pytest.raises(ValueError, match="even"):
            deep_ep.Buffer.set_num_sms(7)
    finally:
        deep_ep.Buffer.set_num_sms(before)
    for num_ranks in (1, 2, 3, 8, 16, 160, 1000):
        for config in (
            deep_ep.Buffer.get_dispatch_config(num_ranks),
            deep_ep.Buffer.get_combine_config(num_ranks),
        ):
            assert isinstance(config, deep_ep.Config)
            nvl = config.get_nvl_buffer_size_hint(7168 * 2, num_ranks)
            rdma = config.get_rdma_buffer_size_hint(7168 * 2, num_ranks)
            assert isinstance(nvl, int)
            assert nvl > 0
            assert (rdma == 0) == (num_ranks <= 8)
    assert isinstance(deep_ep.Buffer.capture(), deep_ep.EventOverlap)
    assert isinstance(deep_ep.Buffer.capture().event, deep_ep.EventHandle)
    assert isinstance(deep_ep.Buffer.is_sm90_compiled(), bool)
    assert deep_ep.topk_idx_t == torch.int64


def test_low_latency_size_hint_grows_with_each_argument() -> None:
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    base = (128, 7168, 8, 256)
    for i, size in enumerate(base):
        sizes = [hint(*base[:i], size * n, *base[i + 1 :]) for n in (1, 2, 4)]
        assert sizes == sorted(sizes)
        assert all(isinstance(s, int) and s > 0 and s % 128 == 0 for s in sizes)
    assert hint(
        num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256
    ) == hint(*base)


def test_local_buffer_tensor_may_be_written_at_any_time(ranks: Ranks) -> None:
    buffer = ranks.new(0, 4096, 1000)
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).shape == (1000,)
    view = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((4, 8)), offset=64)
    view.zero_()
    assert view.shape == (4, 8)
    buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_()
    with pytest.raises(ValueError, match="size"):
        buffer.get_local_buffer_tensor(torch.float32, torch.Size((2000,)))


def test_events_wait_run_their_hook_and_let_go() -> None:
    ran: list[int] = []
    for event in (deep_ep.EventOverlap(), deep_ep.EventOverlap(deep_ep.EventHandle(), (1,))):
        event.register_hook_after_wait(lambda: ran.append(1))
        assert event.hook_after_wait is not None
        event.current_stream_wait()
        event.current_stream_wait()  # the hook ran once
        assert event(release_handle=True) is event
        with event:
            pass
        assert (event.event, event.extra_tensors) == (None, None)
    assert len(ran) == 2
    late = deep_ep.EventOverlap()
    late.event = deep_ep.EventHandle()
    late.current_stream_wait()


def test_domain_sizes_are_one_host(ranks: Ranks) -> None:
    assert deep_ep.get_physical_domain_size(ranks.cluster.group(0)) == (1, R)
    assert deep_ep.get_logical_domain_size(ranks.cluster.group(0), False) == (1, R)
