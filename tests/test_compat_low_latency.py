"""`deep_ep` V1, low-latency calls: the rows of the contract, against the reference, bit by bit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same_bits
from compat_ranks import EL, E, Inputs, K, M, R, Ranks, dispatch
from patience import Disturbed, three_tries
from torch import Tensor

from ep_comm import Begun, reference
from ep_comm.compat import deep_ep
from ep_comm.compat.deep_ep import low_latency
from ep_comm.errors import EPArgumentError, EPCapacityError, EPError
from ep_comm.testing import run_processes

H = 512
CAPACITY = R * M
FORMS: dict[str, dict[str, bool]] = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "rounded": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@pytest.fixture(scope="module", autouse=True, params=[True, False], ids=["waits", "static"])
def host_waits(request: pytest.FixtureRequest) -> Iterator[bool]:
    """All of it twice: as on the CPU, and as on a GPU, whose host waits for nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr(low_latency, "_is_static", lambda _: True)
        yield request.param


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    four = Ranks()
    yield four
    four.close()


def _inputs(tokens: tuple[int, ...] = (5, 0, 8, 3), hidden: int = H, seed: int = 0) -> Inputs:
    return Inputs(tokens, hidden=hidden, seed=seed)


def _expected(data: Inputs, form: str) -> list[Any]:
    options: dict[str, Any] = {"layout": "slab", "capacity": CAPACITY}
    kind = {"bf16": None, "fp8": "fp8"}.get(form, "fp8_ue8m0")
    return data.reference(quantize=kind, **options)


def _rounded_scales(words: Tensor) -> Tensor:
    """Exponents of four blocks in an int32, as the float32 powers of two they stand for."""
    dense = words.clone(memory_format=torch.contiguous_format)
    exponents = dense.view(torch.uint8).to(torch.int32)
    return torch.ldexp(torch.ones(exponents.shape), exponents - 127)


def _check(got: Any, want: Any, form: str) -> None:
    recv_x, count, handle = got[:3]
    x, scales = recv_x if form != "bf16" else (recv_x, None)
    assert (count.dtype, count.tolist()) == (torch.int32, want.counts)
    assert x.shape == (EL, CAPACITY, H)
    src_info, layout_range, *sizes = handle
    assert (type(handle), len(handle), sizes) == (tuple, 5, [M, H, E])
    assert (src_info.dtype, src_info.shape) == (torch.int32, (EL, CAPACITY))
    same_bits(layout_range, want.origins.source_range, "layout_range")
    for e, n in enumerate(want.counts):
        same_bits(x[e, :n], want.x[e, :n], "x")
        same_bits(src_info[e, :n], want.origins.row_token[e, :n], "src_info")
        if scales is not None:
            expected = want.scales[e, :n]
            if form == "rounded":
                expected = _rounded_scales(expected)
            same_bits(scales[e, :n], expected, "scales")
    if scales is not None:
        words = H // (512 if form == "ue8m0" else 128)
        assert scales.shape == (EL, CAPACITY, words)
        assert scales.transpose(1, 2).is_contiguous()


# ---- dispatch and combine ----


@pytest.mark.parametrize("hook", [False, True], ids=["at-once", "hook"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [(5, 0, 8, 3), (0, 0, 0, 0)], ids=["uneven", "empty"])
def test_dispatch_and_combine_are_those_of_the_reference(
    ranks: Ranks, tokens: tuple[int, ...], form: str, hook: bool
) -> None:
    data = _inputs(tokens)
    want = _expected(data, form)
    y = [torch.randn(EL, CAPACITY, H).bfloat16() for _ in range(R)]
    sums = reference.combine(y, [r.handle for r in want], weighted=True, order="topk")

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx, weights = data.idx[rank], data.weights[rank]
        got = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, return_recv_hook=hook, **FORMS[form]
        )
        assert got[3].event is None
        assert (got[4] is not None) == hook
        if got[4] is not None:
            got[4]()
            got[4]()
        _check(got, want[rank], form)
        out = torch.full((data.tokens[rank], H), 7.0).bfloat16()
        total, event, wait = buffer.low_latency_combine(
            y[rank], idx, weights, got[2], return_recv_hook=hook, out=out
        )
        assert (wait is not None) == hook
        if wait is not None:
            wait()
            wait()
        assert total is out
        assert event.event is None
        same_bits(total, sums[rank])

    ranks.run(work)


@pytest.mark.parametrize("hidden", [128, 384, 2880])
def test_hidden_has_no_list(ranks: Ranks, hidden: int) -> None:
    data = _inputs(hidden=hidden)
    form = "fp8" if hidden % 128 == 0 else "bf16"
    want = _expected(data, form)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        got = buffer.low_latency_dispatch(data.x[rank], data.idx[rank], M, E, **FORMS[form])
        x = got[0] if form == "bf16" else got[0][0]
        for e, n in enumerate(want[rank].counts):
            same_bits(x[e, :n], want[rank].x[e, :n])
        if form == "fp8":  # power-of-two scales without the packing that needs 512
            rounded = buffer.low_latency_dispatch(
                data.x[rank], data.idx[rank], M, E, **FORMS["rounded"]
            )
            for e, n in enumerate(want[rank].counts):
                same, scale = rounded[0][0][e, :n], rounded[0][1][e, :n]
                back = reference.dequantize(same, scale)
                near = reference.dequantize(x[e, :n], got[0][1][e, :n])
                assert torch.allclose(back, near, rtol=0.13, atol=0.02)
                assert (torch.frexp(scale).mantissa == 0.5).all()

    ranks.run(work)


def test_async_finish_returns_an_event(ranks: Ranks) -> None:
    data = _inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        got = buffer.low_latency_dispatch(
            data.x[rank], data.idx[rank], M, E, use_fp8=False, async_finish=True
        )
        got[3].current_stream_wait()
        assert isinstance(got[3].event, deep_ep.EventHandle)
        done = buffer.low_latency_combine(
            got[0], data.idx[rank], data.weights[rank], got[2], async_finish=True
        )
        assert isinstance(done[1].event, deep_ep.EventHandle)

    ranks.run(work)


@pytest.mark.parametrize("hooked", [False, True], ids=["whole", "hook"])
@three_tries
def test_statistics_are_added_to(ranks: Ranks, hooked: bool) -> None:
    data = _inputs()
    want = _expected(data, "bf16")
    late, nap = 2, 0.2

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        stats = torch.full((EL,), 100, dtype=torch.int32)
        costs = torch.full((2, R), 100, dtype=torch.int64)
        for _ in range(2):
            time.sleep(nap if rank == late else 0)
            recv, _, handle, _, hook = buffer.low_latency_dispatch(
                data.x[rank], data.idx[rank], M, E, stats, costs[0], use_fp8=False,
                return_recv_hook=hooked,
            )  # fmt: skip
            if hook is not None:
                hook()
            time.sleep(nap if rank == late else 0)
            _, _, hook = buffer.low_latency_combine(
                recv, data.idx[rank], data.weights[rank], handle, return_recv_hook=hooked,
                combine_wait_recv_cost_stats=costs[1],
            )  # fmt: skip
            if hook is not None:
                hook()
                hook()
        assert stats.tolist() == [100 + 2 * n for n in want[rank].counts]
        assert (costs >= 100).all()
        # Others wait twice for it, in both calls.
        blamed = (costs[:, late] >= 1.5 * nap * 1e9).all() and (costs.argmax(1) == late).all()
        if rank != late and not blamed:
            raise Disturbed(costs)  # a rank that paused was late, too

    ranks.run(work)


def test_slots_masked_before_combine_are_left_out(ranks: Ranks, host_waits: bool) -> None:
    data = _inputs((4, 4, 4, 4))

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx, weights = data.idx[rank].clone(), data.weights[rank]
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, use_fp8=False
        )
        idx[0] = -1  # the ids of the dispatch, changed in place
        idx[1, 1:] = -1
        total, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        same_bits(total[0], torch.zeros(H).bfloat16())
        one = torch.where(idx[1, 0] >= 0, weights[1, 0], 0.0) * data.x[rank][1].float()
        assert torch.equal(total[1], one.bfloat16())
        if host_waits:  # else nobody looks
            with pytest.raises(EPArgumentError, match="other experts"):
                buffer.low_latency_combine(recv_x, (data.idx[rank] + 2) % E, weights, handle)

    ranks.run(work)


@pytest.mark.parametrize("mode", ["plain", "inference", "int32", "hook"])
def test_ids_may_change_after_dispatch(ranks: Ranks, mode: str, host_waits: bool) -> None:
    data = _inputs((4, 4, 4, 4))

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        kept, weights = data.idx[rank].clone(), data.weights[rank]
        idx = kept.to(torch.int32) if mode == "int32" else kept.clone()
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, use_fp8=False, return_recv_hook=mode == "hook"
        )
        if hook is not None:
            hook()
        want, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        idx.fill_(-1)
        got, _, _ = buffer.low_latency_combine(recv_x, kept, weights, handle)
        same_bits(got, want)
        none, _, _ = buffer.low_latency_combine(recv_x, idx, weights, handle)
        same_bits(none, torch.zeros_like(want))
        for wrong in ((kept + 1) % E, torch.full_like(kept, E), torch.full_like(kept, -2)):
            if host_waits:
                with pytest.raises(EPArgumentError, match="other experts"):
                    buffer.low_latency_combine(recv_x, wrong, weights, handle)
        with pytest.raises(EPArgumentError, match="rejected topk_idx"):
            buffer.low_latency_combine(recv_x, kept[:, :1], weights, handle)

    def inferring(rank: int, buffer: deep_ep.Buffer) -> None:
        with torch.inference_mode(mode == "inference"):
            work(rank, buffer)

    ranks.run(inferring)


def test_zero_copy_combines_what_was_written_to_the_buffer(ranks: Ranks) -> None:
    data = _inputs()
    want = _expected(data, "bf16")
    sums = reference.combine(
        [r.x for r in want], [r.handle for r in want], weighted=True, order="topk"
    )

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx, weights = data.idx[rank], data.weights[rank]
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, use_fp8=False
        )
        with pytest.raises(EPArgumentError, match="get_next"):
            buffer.low_latency_combine(recv_x, idx, weights, handle, zero_copy=True)
        place = buffer.get_next_low_latency_combine_buffer(handle)
        assert (place.dtype, place.shape) == (torch.bfloat16, recv_x.shape)
        place.copy_(recv_x)
        shape_only = torch.empty(1).bfloat16().expand(recv_x.shape)
        total, _, _ = buffer.low_latency_combine(shape_only, idx, weights, handle, zero_copy=True)
        same_bits(total, sums[rank])

    ranks.run(work)


def test_a_handle_put_together_again_works(ranks: Ranks) -> None:
    data = _inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx, weights = data.idx[rank], data.weights[rank]
        got = buffer.low_latency_dispatch(data.x[rank], idx, M, E, use_fp8=False)
        a, b, *rest = got[2]
        once = buffer.low_latency_combine(got[0], idx, weights, got[2])[0]
        again = buffer.low_latency_combine(got[0], idx, weights, [a, b, *rest])[0]
        same_bits(once, again)

    ranks.run(work)
    with pytest.raises(ValueError, match="handle"):
        ranks.buffers[0].low_latency_combine(data.x[0], data.idx[0], data.weights[0], (1, 2))


# ---- overlap ----


@pytest.mark.parametrize("reverse", [False, True], ids=["in-order", "reverse"])
def test_two_batches_overlap_with_two_outstanding_hooks(ranks: Ranks, reverse: bool) -> None:
    batches = [_inputs(seed=1), _inputs(seed=2)]
    want = [_expected(data, "fp8") for data in batches]
    y = [[torch.randn(EL, CAPACITY, H).bfloat16() for _ in range(R)] for _ in batches]
    sums = [
        reference.combine(rows, [r.handle for r in w], weighted=True, order="topk")
        for rows, w in zip(y, want, strict=True)
    ]

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        order = [1, 0] if reverse else [0, 1]
        sent = [
            buffer.low_latency_dispatch(d.x[rank], d.idx[rank], M, E, return_recv_hook=True)
            for d in batches
        ]
        for i in order:
            hook = sent[i][4]
            assert hook is not None
            hook()
            _check(sent[i], want[i][rank], "fp8")
        back = [
            buffer.low_latency_combine(
                y[i][rank], d.idx[rank], d.weights[rank], sent[i][2], return_recv_hook=True
            )
            for i, d in enumerate(batches)
        ]
        for i in order:
            hook = back[i][2]
            assert hook is not None
            hook()
            same_bits(back[i][0], sums[i][rank])

    ranks.run(work)


def test_arguments_overwritten_before_the_hook_change_nothing(ranks: Ranks) -> None:
    data = _inputs((4, 4, 4, 4))
    want = _expected(data, "bf16")
    y = [torch.randn(EL, CAPACITY, H).bfloat16() for _ in range(R)]
    sums = reference.combine(y, [r.handle for r in want], weighted=True, order="topk")

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        x, idx, weights = data.x[rank].clone(), data.idx[rank].clone(), data.weights[rank].clone()
        rows = y[rank].clone()
        time.sleep(0.1 * (rank == R - 1))  # so that the others have sent nothing yet
        sent = buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False, return_recv_hook=True)
        x.fill_(7)
        idx.fill_(-1)
        assert sent[4] is not None
        sent[4]()
        _check(sent, want[rank], "bf16")
        time.sleep(0.1 * (rank == R - 1))
        idx.copy_(data.idx[rank])
        back = buffer.low_latency_combine(rows, idx, weights, sent[2], return_recv_hook=True)
        rows.fill_(7)
        idx.fill_(-1)
        weights.fill_(7)
        assert back[2] is not None
        back[2]()
        same_bits(back[0], sums[rank])

    ranks.run(work)


def test_combine_with_a_hook_when_the_arena_is_nearly_full_is_exact(ranks: Ranks) -> None:
    data = _inputs()
    want = _expected(data, "bf16")
    sums = reference.combine(
        [r.x for r in want], [r.handle for r in want], weighted=True, order="topk"
    )

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        sent = buffer.low_latency_dispatch(data.x[rank], data.idx[rank], M, E, use_fp8=False)
        native = buffer.runtime.get(H, E, data.x[rank].device)
        free = native.stats()["arena"]["largest_free"]
        taken = native.empty((free - (1 << 15),), torch.uint8)  # rings fit, all rows do not
        back = buffer.low_latency_combine(
            sent[0], data.idx[rank], data.weights[rank], sent[2], return_recv_hook=True
        )
        del taken
        assert back[2] is not None
        back[2]()
        same_bits(back[0], sums[rank])

    ranks.run(work)


def test_combine_may_come_before_the_dispatch_hook_was_called(ranks: Ranks) -> None:
    data = _inputs()
    want = _expected(data, "bf16")
    y = [torch.randn(EL, CAPACITY, H).bfloat16() for _ in range(R)]
    sums = reference.combine(y, [r.handle for r in want], weighted=True, order="topk")

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx, weights = data.idx[rank], data.weights[rank]
        sent = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, use_fp8=False, return_recv_hook=True
        )
        same_bits(buffer.low_latency_combine(y[rank], idx, weights, sent[2])[0], sums[rank])

    ranks.run(work)


def test_two_host_threads_drive_one_buffer_with_handles_interleaved(ranks: Ranks) -> None:
    batches = [_inputs(seed=1), _inputs(seed=2)]
    want = [_expected(data, "bf16") for data in batches]
    sums = [
        reference.combine([r.x for r in w], [r.handle for r in w], weighted=True, order="topk")
        for w in want
    ]

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        turn = [threading.Semaphore(1), threading.Semaphore(0)]
        failed: list[BaseException] = []

        def batch(i: int) -> None:
            data = batches[i]

            def in_turn(call: Callable[[], Any]) -> Any:
                turn[i].acquire()  # the order of calls is the program's, and equal on all ranks
                try:
                    return call()
                finally:
                    turn[1 - i].release()

            try:
                for _ in range(3):
                    args = (data.x[rank], data.idx[rank], M, E)
                    sent = in_turn(
                        lambda args=args: buffer.low_latency_dispatch(
                            *args, use_fp8=False, return_recv_hook=True
                        )
                    )
                    sent[4]()
                    home = (sent[0], data.idx[rank], data.weights[rank], sent[2])
                    back = in_turn(
                        lambda home=home: buffer.low_latency_combine(*home, return_recv_hook=True)
                    )
                    back[2]()
                    same_bits(back[0], sums[i][rank])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=batch, args=(i,), daemon=True) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failed, failed
        assert not any(thread.is_alive() for thread in threads)

    ranks.run(work)


# ---- beside the high-throughput calls ----


def test_both_kinds_of_calls_alternate_on_one_buffer(ranks: Ranks) -> None:
    data = _inputs()
    slabs = _expected(data, "fp8")
    compact = data.reference()
    sums = reference.combine([r.x for r in compact], [r.handle for r in compact])

    def work(rank: int, _: deep_ep.Buffer) -> None:
        buffer = ranks.new(rank, int(1e9), int(1e9), low_latency_mode=True, num_qps_per_rank=E // R)
        x, idx, weights = data.x[rank], data.idx[rank], data.weights[rank]
        for _ in range(2):
            out = dispatch(buffer, x, idx, weights, E, expert_alignment=128)
            buffer.clean_low_latency_buffer(M, H, E)
            got = buffer.low_latency_dispatch(x, idx, M, E, return_recv_hook=True)
            total = buffer.combine(out[0], out[4])[0]  # while the other half is under way
            same_bits(total, sums[rank])
            assert got[4] is not None
            got[4]()
            _check(got, slabs[rank], "fp8")
        buffer.destroy()

    ranks.run(work)


def test_max_tokens_may_change_from_call_to_call(ranks: Ranks) -> None:
    data = _inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        for most in (8, 1500, 9):
            got = buffer.low_latency_dispatch(data.x[rank], data.idx[rank], most, E, use_fp8=False)
            assert got[0].shape == (EL, R * most, H)
            same_bits(got[1], _expected(data, "bf16")[rank].num_tokens_per_expert)

    ranks.run(work)


# ---- errors ----


def test_more_tokens_than_promised_raise_on_every_rank(ranks: Ranks) -> None:
    data = _inputs()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        def send(hook: bool) -> None:
            args = (data.x[rank], data.idx[rank], 6, E)
            wait = buffer.low_latency_dispatch(*args, return_recv_hook=hook)[4]
            assert wait is not None
            wait()

        for hook in (False, True):
            with pytest.raises(EPCapacityError, match="too many tokens"):
                send(hook)
        buffer.low_latency_dispatch(data.x[rank], data.idx[rank], M, E)  # goes on

    ranks.run(work)


def test_options_that_exclude_each_other_are_refused(ranks: Ranks) -> None:
    buffer, data = ranks.buffers[0], _inputs()
    x, idx, weights = data.x[0], data.idx[0], data.weights[0]
    with pytest.raises(ValueError, match="round_scale"):
        buffer.low_latency_dispatch(x, idx, M, E, use_ue8m0=True)
    with pytest.raises(ValueError, match="at most one"):
        buffer.low_latency_dispatch(x, idx, M, E, async_finish=True, return_recv_hook=True)
    with pytest.raises(ValueError, match="use_logfmt"):
        buffer.low_latency_combine(x, idx, weights, None, use_logfmt=True, zero_copy=True)
    with pytest.raises(TypeError):
        buffer.low_latency_combine(x, idx, weights, None, overlap=True)  # type: ignore[call-arg]


def test_masks_are_told_and_need_enable_shrink(ranks: Ranks) -> None:
    buffer = ranks.new(0, enable_shrink=True)
    status = torch.full((R,), 5, dtype=torch.int32)

    def masked() -> list[int]:
        buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    assert masked() == [0, 0, 0, 0]
    for rank in (3, 1, 3):
        buffer.low_latency_update_mask_buffer(rank, True)
    assert masked() == [0, 1, 0, 1]
    buffer.low_latency_update_mask_buffer(3)
    assert masked() == [0, 1, 0, 0]
    buffer.low_latency_clean_mask_buffer()
    assert masked() == [0, 0, 0, 0]
    for nobody in (0, -1, R):  # 0 is the rank that asks
        with pytest.raises(ValueError, match=f"rank_to_mask: got {nobody}"):
            buffer.low_latency_update_mask_buffer(nobody, True)
    with pytest.raises(RuntimeError, match="enable_shrink"):
        ranks.buffers[0].low_latency_query_mask_buffer(status)


@pytest.mark.parametrize("hooked", [False, True], ids=["whole", "hook"])
@pytest.mark.parametrize("masked", [(2,), (0, 3)], ids=["one", "two"])
def test_masked_ranks_are_left_out(masked: tuple[int, ...], hooked: bool) -> None:
    """As if nobody chose their experts and they had no tokens; they do not take part at all."""
    four = Ranks()
    data = _inputs(tuple(0 if r in masked else t for r, t in enumerate((5, 2, 8, 3))))
    gone = torch.tensor(masked)

    def both_halves(buffer: deep_ep.Buffer, rank: int, idx: torch.Tensor) -> Any:
        recv, counts, handle, _, hook = buffer.low_latency_dispatch(
            data.x[rank], idx, M, E, use_fp8=True, return_recv_hook=hooked
        )
        assert (hook is not None) == hooked
        if hook is not None:
            hook()
        y = recv[0].bfloat16() * recv[1].repeat_interleave(128, -1)[..., :H].bfloat16()
        total, _, hook = buffer.low_latency_combine(
            y, idx, data.weights[rank], handle, return_recv_hook=hooked
        )
        if hook is not None:
            hook()
        rows = [(recv[0][e, :n], recv[1][e, :n], handle[0][e, :n]) for e, n in enumerate(counts)]
        return rows, counts.clone(), handle[1].clone(), total

    def work(rank: int, _: deep_ep.Buffer) -> None:
        buffer = four.new(rank, enable_shrink=True)
        idx = data.idx[rank]
        chosen = torch.where(torch.isin(idx // EL, gone), -1, idx)
        want = both_halves(buffer, rank, chosen)
        if rank in masked:
            return
        for other in masked:
            buffer.low_latency_update_mask_buffer(other, True)
        got = both_halves(buffer, rank, idx)
        for mine, theirs in zip(got[0], want[0], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                same_bits(a, b)
        for a, b in zip(got[1:], want[1:], strict=True):
            same_bits(a, b)
        with pytest.raises(EPArgumentError, match="E213"):
            both_halves(buffer, rank, torch.full_like(idx, E) if rank == 1 else idx)
        again = both_halves(buffer, rank, idx)
        same_bits(again[3], want[3])
        costs, late = torch.zeros(2, R, dtype=torch.int64), max({*range(R)} - {*masked})
        time.sleep(0.1 if rank == late else 0)
        sent = buffer.low_latency_dispatch(data.x[rank], idx, M, E, None, costs[0], use_fp8=False)
        assert sent[0].shape[1] == R * M
        time.sleep(0.1 if rank == late else 0)
        back = buffer.low_latency_combine(
            sent[0], idx, data.weights[rank], sent[2], return_recv_hook=hooked,
            combine_wait_recv_cost_stats=costs[1],
        )[2]  # fmt: skip
        if back is not None:
            back()
        assert (costs[:, gone] == 0).all()
        buffer.destroy()
        if rank != late and not (costs[:, late] > 75_000_000).all():
            raise Disturbed(costs)  # a rank that paused was late, too

    four.run(work)
    four.close()


def _go_on_without_the_dead(rank: int, num_ranks: int, hooked: bool) -> Any:
    """The code of the call that finds out, and what is wrong with the sums of those left."""
    buffer = deep_ep.Buffer(torch.distributed.group.WORLD, enable_shrink=True)
    num_experts = 2 * num_ranks
    x = (torch.arange(3 * 128).view(3, 128) % 64 + rank).bfloat16()
    idx = torch.arange(3 * num_ranks).view(3, num_ranks) % num_experts  # all experts
    weights = torch.rand(3, num_ranks, generator=torch.Generator().manual_seed(rank))
    dead = [1, 3]

    def done(result: tuple[Any, ...]) -> tuple[Any, ...]:
        if hooked:
            result[-1]()
        return result

    def dispatch() -> Any:
        return done(
            buffer.low_latency_dispatch(
                x, idx, 3, num_experts, use_fp8=False, return_recv_hook=hooked
            )
        )

    def combine(sent: Any) -> torch.Tensor:
        total: torch.Tensor = done(
            buffer.low_latency_combine(sent[0], idx, weights, sent[2], return_recv_hook=hooked)
        )[0]
        return total

    def is_wrong(total: torch.Tensor, gone: list[int]) -> bool:
        left = ~torch.isin(idx // 2, torch.tensor(gone))
        want = torch.zeros(3, 128)
        for slot in range(num_ranks):  # in this order, products rounded
            term = weights[:, slot : slot + 1] * x.float()
            want += torch.where(left[:, slot : slot + 1], term, 0.0)
        return not torch.equal(total, want.bfloat16())

    first, second = dispatch(), dispatch()
    wrong = [is_wrong(combine(second), [])]
    if rank in dead:
        os._exit(3)
    code = ""
    try:
        combine(second)
    except EPError as error:
        code = error.code
    buffer.low_latency_update_mask_buffer(1, True)
    buffer.low_latency_update_mask_buffer(3, True)
    wrong += [is_wrong(combine(sent), dead) for sent in (second, first, second)]
    third = dispatch()
    wrong += [third[2][1][:, dead].any().item(), is_wrong(combine(third), dead)]
    return code, wrong


@pytest.mark.parametrize("hooked", [False, True], ids=["whole", "hook"])
def test_masked_ranks_that_died_are_in_no_call_any_more(hooked: bool, host_waits: bool) -> None:
    if not host_waits:
        pytest.skip("new processes do not get the patch that makes calls static")
    results = run_processes(_go_on_without_the_dead, 5, hooked, may_die=True)
    left = ("E110", [False] * 6)
    assert results == [left, 3, left, 3, left]


def test_a_rank_masked_since_dispatch_adds_nothing(host_waits: bool) -> None:
    """First one rank, then another one: the last dispatch was with one of them, or with both."""
    if not host_waits:
        pytest.skip(
            "a static combine is one of the ranks of its dispatch, which waits for them all"
        )
    four, data = Ranks(), _inputs((5, 2, 8, 3))

    def work(rank: int, _: deep_ep.Buffer) -> None:
        buffer = four.new(rank, enable_shrink=True)
        idx, weights = data.idx[rank], data.weights[rank]
        sent = []
        for masked in (None, 2, 0):
            if masked is not None:
                if rank == masked:
                    return
                buffer.low_latency_update_mask_buffer(masked, True)
            sent.append(buffer.low_latency_dispatch(data.x[rank], idx, M, E, use_fp8=False))
            gone = {None: [], 2: [2], 0: [0, 2]}[masked]
            left = torch.where(torch.isin(idx // EL, torch.tensor(gone)), 0.0, weights)
            left = torch.where(idx < 0, 0.0, left)
            want = torch.zeros(idx.shape[0], H)
            for slot in range(K):
                want += left[:, slot : slot + 1] * data.x[rank].float()
            for recv_x, _, handle, *_ in sent:
                costs = torch.zeros(R, dtype=torch.int64)
                total = buffer.low_latency_combine(
                    recv_x, idx, weights, handle, combine_wait_recv_cost_stats=costs
                )[0]
                same_bits(total, want.bfloat16())
                assert (costs[gone] == 0).all()
        buffer.destroy()

    four.run(work)
    four.close()


def test_top_k_may_be_32() -> None:
    two = Ranks(2)
    data = Inputs((3, 4), num_experts=64, num_topk=32)
    want = data.reference(layout="slab", capacity=2 * M * K)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        idx = data.idx[rank]
        got = buffer.low_latency_dispatch(data.x[rank], idx, M * K, 64, use_fp8=False)
        for e, n in enumerate(want[rank].counts):
            same_bits(got[0][e, :n], want[rank].x[e, :n])

    two.run(work)
    two.close()


@pytest.mark.parametrize("form", FORMS)
def test_hooks_work_where_the_backend_promises_no_tensors(
    ranks: Ranks, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Begun, "promised", None)
    data = _inputs()
    want = _expected(data, form)

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        got = buffer.low_latency_dispatch(
            data.x[rank], data.idx[rank], M, E, return_recv_hook=True, **FORMS[form]
        )
        assert got[4] is not None
        got[4]()
        _check(got, want[rank], form)

    ranks.run(work)
