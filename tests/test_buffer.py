"""The native API on the CPU backend answers to the worked example and to its own docstrings."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch
import worked_example as example

import ep_comm.buffer
from ep_comm import Begun, Buffer, EPConfig, Received
from ep_comm.errors import EPClosedError, EPError
from ep_comm.testing import Cluster

LAYOUTS = ("compact", "grouped", "slab")
SHAPE = {
    "num_experts": example.NUM_EXPERTS,
    "num_topk": example.NUM_TOPK,
    "hidden": 16,
    "max_tokens": example.NUM_TOKENS,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(1, example.NUM_RANKS) as four:
        four.make_buffers(**SHAPE)
        yield four


# ---- the worked example ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("idx_dtype", [torch.int64, torch.int32], ids=["idx64", "idx32"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
def test_round_trip_gives_the_worked_example(
    cluster: Cluster, layout: str, dtype: torch.dtype, idx_dtype: torch.dtype
) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, topk_idx, weights = example.inputs(rank, dtype=dtype, idx_dtype=idx_dtype)
        recv = buffer.dispatch(x, topk_idx, weights, **example.OPTIONS[layout])
        assert recv.x.dtype == dtype
        example.check_received(recv, rank, idx_dtype=idx_dtype)
        out = buffer.combine(example.experts(recv, rank), recv.handle)
        example.check_combined(out, rank, layout)

    cluster.run(work)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_static_shapes_hold_the_worked_example(cluster: Cluster, layout: str) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        options = {**example.OPTIONS[layout], "row_index": False, "sync": False}
        if layout == "compact":
            options["alignment"] = 1
        recv = buffer.dispatch(*example.inputs(rank), **options)
        rows = {"compact": 16, "grouped": 34, "slab": example.CAPACITY}[layout]
        assert recv.x.shape[-2] == rows
        assert recv.num_recv.tolist() == [len(example.RECV_SRC[rank])]
        assert recv.counts == example.COUNTS[rank]
        example.check_handle(recv.handle, rank, layout)
        if layout != "compact":  # with its row index, which a static call does not have
            example.check_received(recv, rank)
        out = buffer.combine(example.experts(recv, rank), recv.handle)
        example.check_combined(out, rank, layout)
        buffer.check()

    cluster.run(work)


@pytest.mark.parametrize("layout", ["grouped", "slab"])
def test_weighted_combine_with_bias_and_weights_back_gives_the_worked_example(
    cluster: Cluster, layout: str
) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, topk_idx, weights = example.inputs(rank)
        recv = buffer.dispatch(x, topk_idx, weights, **example.OPTIONS[layout])
        out = torch.full_like(x, float("nan"))
        bias = torch.full_like(x, 0.5)
        got, home = buffer.combine(
            example.experts(recv, rank),
            recv.handle,
            weighted=True,
            topk_weights=recv.topk_weights,
            bias=(bias, bias),
            out=out,
        )
        assert got is out
        example.check_combined(out, rank, layout, weighted=True, bias=1.0)
        example.check_weights_home(home, rank)

    cluster.run(work)


def test_compact_combine_brings_weights_back(cluster: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        recv = buffer.dispatch(*example.inputs(rank))
        out, home = buffer.combine(
            example.experts(recv, rank), recv.handle, topk_weights=recv.topk_weights
        )
        example.check_combined(out, rank, "compact")
        example.check_weights_home(home, rank)

    cluster.run(work)


def test_cached_dispatch_puts_rows_where_the_first_one_did(cluster: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, topk_idx, weights = example.inputs(rank)
        first = {
            layout: buffer.dispatch(x, topk_idx, weights, **options)
            for layout, options in example.OPTIONS.items()
        }
        for layout, recv in first.items():
            again = buffer.dispatch(x * 2, handle=recv.handle)
            assert again.topk_idx is None
            assert again.topk_weights is None
            assert again.row_index is None
            assert again.layout == layout
            rows = recv.topk_idx >= 0  # a slab's rest may hold anything
            rows = rows.any(-1) if layout == "compact" else rows
            assert torch.equal(again.x[rows], recv.x[rows] * 2)
            doubled = example.experts(recv, rank) * 2
            out = buffer.combine(doubled, again.handle)
            example.check_combined(out / 2, rank, layout)

    cluster.run(work)


def test_everything_in_one_process_per_rank() -> None:
    ranks.run(_worked_example_in_a_process, example.NUM_RANKS)


def _worked_example_in_a_process(me: Any) -> None:
    buffer = me.buffer(**SHAPE)
    for layout, options in example.OPTIONS.items():
        recv = buffer.dispatch(*example.inputs(me.rank), **options)
        example.check_received(recv, me.rank)
        y = buffer.empty(recv.x.shape, recv.x.dtype)
        y.copy_(example.experts(recv, me.rank))
        example.check_combined(buffer.combine(y, recv.handle), me.rank, layout)
        recv = buffer.dispatch(*example.inputs(me.rank), **options, wait=False).wait()
        example.check_received(recv, me.rank)
        out = buffer.combine(example.experts(recv, me.rank), recv.handle, wait=False).wait()
        example.check_combined(out, me.rank, layout)
    assert buffer.stats()["arena"]["peak"] > 0


# ---- groups ----


def test_one_rank_without_any_group_talks_to_itself() -> None:
    with Buffer(num_experts=4, num_topk=2, hidden=16, max_tokens=8, device="cpu") as buffer:
        x = torch.randn(5, 16)
        topk_idx = torch.tensor([[0, 1], [3, 3], [-1, -1], [2, -1], [1, 0]])
        recv = buffer.dispatch(x, topk_idx)
        assert torch.equal(recv.x, x[[0, 1, 3, 4]])
        out = buffer.combine(recv.x, recv.handle)
        assert torch.equal(out, x * (topk_idx >= 0).any(1, keepdim=True))
        assert (buffer.rank, buffer.num_ranks, buffer.num_local_experts) == (0, 1, 4)


def test_default_group_and_subgroups_of_torch_distributed() -> None:
    ranks.run(_dist_groups, 3)


def _dist_groups(me: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", store=dist.FileStore(me.store, me.size), rank=me.rank, world_size=me.size
    )
    pair = dist.new_group([0, 2])
    shape = {"num_experts": 6, "num_topk": 1, "hidden": 16, "max_tokens": 4, "device": "cpu"}
    whole = Buffer(**shape)
    assert (whole.rank, whole.num_ranks, whole.backend) == (me.rank, 3, "cpu")
    assert whole.local_experts == [2 * me.rank, 2 * me.rank + 1]
    buffers = [(whole, 3)]
    if me.rank != 1:
        part = Buffer(pair, **shape)
        assert (part.rank, part.num_ranks) == (me.rank // 2, 2)
        assert part.local_experts == [3 * part.rank, 3 * part.rank + 1, 3 * part.rank + 2]
        buffers.append((part, 2))
    # Two overlapping groups, used in turn by one process.
    for buffer, size in [*buffers, *buffers[::-1]]:
        x = torch.full((2, 16), float(me.rank + 1))
        recv = buffer.dispatch(x, torch.tensor([[0], [5]]))
        assert recv.num_recv == (size if buffer.rank in (0, size - 1) else 0)
        assert torch.equal(buffer.combine(recv.x, recv.handle), x)
    for buffer, _ in buffers:
        buffer.close()
    dist.destroy_process_group()


# ---- the object ----


def test_repr_and_properties_tell_what_was_built(cluster: Cluster) -> None:
    buffer = cluster.buffers[1]
    assert repr(buffer).startswith("Buffer(rank 1 of 4, cpu: ")
    assert buffer.backend_reason in repr(buffer)
    assert buffer.backend == "cpu"
    assert buffer.local_experts == [2, 3]
    assert buffer.num_experts == 8


def test_stats_count_operations_and_arena_bytes() -> None:
    with Cluster(1, 2) as two:
        two.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = two.buffers[rank]
            assert buffer.stats()["operations"] == 0
            recv = buffer.dispatch(torch.ones(4, 16), torch.full((4, 2), 4 * rank))
            stats = buffer.stats()
            assert stats["operations"] == 1
            assert stats["arena"]["num_extents"] == 1  # x; metadata has been unpacked
            assert stats["arena"]["peak"] >= stats["arena"]["in_use"] > 0
            del recv
            assert buffer.stats()["arena"]["in_use"] == 0

        two.run(work)


def test_received_tensors_outlive_the_buffer() -> None:
    x = torch.arange(64.0).reshape(4, 16)
    with Cluster(1, 2) as two:
        buffers = two.make_buffers(**SHAPE)

        def work(rank: int) -> Received:
            recv: Received = buffers[rank].dispatch(x, torch.full((4, 2), 4 * rank))
            return recv

        received = two.run(work)
    two.buffers, buffers = [], []
    for recv in received:
        assert torch.equal(recv.x, x)
        recv.x.fill_(7)
        assert torch.equal(copy.deepcopy(recv).x, torch.full((4, 16), 7.0))


def test_use_after_close_raises_e340_and_close_twice_is_fine() -> None:
    with Buffer(num_experts=2, num_topk=1, hidden=16, max_tokens=2, device="cpu") as buffer:
        recv = buffer.dispatch(torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int64))
    buffer.close()
    calls = [
        lambda: buffer.dispatch(torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int64)),
        lambda: buffer.combine(recv.x, recv.handle),
        lambda: buffer.empty((1,), torch.float32),
        buffer.check,
        buffer.release,
        buffer.resume,
    ]
    for call in calls:
        with pytest.raises(EPClosedError) as caught:
            call()
        assert caught.value.code == "E340"
    assert "close" in repr(buffer)


def test_empty_lies_in_the_arena_and_says_when_there_is_no_room() -> None:
    with Buffer(
        num_experts=2, num_topk=1, hidden=16, max_tokens=2, device="cpu", arena_bytes=1 << 16
    ) as buffer:
        y = buffer.empty((4, 16), torch.bfloat16)
        assert y.shape == (4, 16)
        assert y.dtype == torch.bfloat16
        assert y.data_ptr() % 4096 == 0
        assert buffer.stats()["arena"]["in_use"] == 4096
        assert buffer.empty((0, 16), torch.float32).shape == (0, 16)
        with pytest.raises(EPError) as caught:
            buffer.empty((1 << 16,), torch.uint8)
        assert caught.value.code == "E231"
        assert "need 65536 B" in str(caught.value)


def test_release_gives_free_pages_back_and_work_goes_on() -> None:
    with Cluster(1, 2) as two:
        two.make_buffers(**{**SHAPE, "hidden": 4096, "max_tokens": 64})

        def work(rank: int) -> None:
            buffer = two.buffers[rank]
            x, topk_idx = torch.randn(64, 4096), torch.randint(0, 8, (64, 2))
            kept = buffer.dispatch(x, topk_idx)
            want = kept.x.clone()
            buffer.dispatch(x, topk_idx)
            two_outputs = buffer.stats()["arena"]["committed"]
            buffer.release()
            one_output = buffer.stats()["arena"]["committed"]
            assert one_output < two_outputs
            assert one_output >= want.numel() * 4
            assert torch.equal(kept.x, want)
            buffer.resume()
            again = buffer.dispatch(x, topk_idx)
            assert torch.equal(again.x, want)

        two.run(work)


def test_release_takes_nothing_from_what_is_begun() -> None:
    with Cluster(1, 2) as two:
        two.make_buffers(**{**SHAPE, "hidden": 40, "max_tokens": 8, "num_slots": 3})

        def work(rank: int) -> int:
            buffer, wrong = two.buffers[rank], 0
            x = torch.arange(1, 9)[:, None].expand(8, 40).to(torch.bfloat16).contiguous()
            topk_idx = torch.tensor([[0, 7]]).expand(8, 2).contiguous()
            for step in range(1000):
                begun = buffer.dispatch(x, topk_idx, wait=False)
                for _ in range(1 + step % 5):
                    buffer.release()
                wrong += not torch.equal(begun.wait().x, torch.cat([x, x]))
            return wrong

        assert two.run(work) == [0, 0]


def test_begun_is_returned_by_wait_false(cluster: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        begun = buffer.dispatch(*example.inputs(rank), wait=False)
        assert isinstance(begun, Begun)
        recv = begun.wait()
        assert begun.done()
        assert begun.wait() is recv
        combined = buffer.combine(example.experts(recv, rank), recv.handle, wait=False)
        example.check_combined(combined.wait(), rank, "compact")

    cluster.run(work)


def test_size_hint_covers_the_worst_case_of_every_layout() -> None:
    for layout in LAYOUTS:
        hint = Buffer.size_hint(
            num_ranks=2,
            num_topk=2,
            hidden=64,
            max_tokens=32,
            num_local_experts=2,
            layout=layout,
            alignment=8 if layout == "grouped" else 1,
            in_flight=1,
        )
        with Cluster(1, 2) as two:
            two.make_buffers(
                num_experts=4, num_topk=2, hidden=64, max_tokens=32, arena_bytes=int(hint)
            )

            def work(rank: int, two: Cluster = two, layout: str = layout) -> None:
                buffer = two.buffers[rank]
                x = torch.randn(32, 64).to(torch.bfloat16)
                topk_idx = torch.tensor([[0, 1]]).expand(32, 2)  # all to rank 0
                options = {"alignment": 8} if layout == "grouped" else {}
                recv = buffer.dispatch(x, topk_idx, torch.ones(32, 2), layout=layout, **options)
                y = buffer.empty(recv.x.shape, recv.x.dtype)
                buffer.combine(y.copy_(recv.x), recv.handle)

            two.run(work)


def test_config_of_ranks_may_differ() -> None:
    with Cluster(1, 2) as two:
        buffers = two.run(
            lambda rank: Buffer(
                two.group(rank),
                **SHAPE,
                device="cpu",
                arena_bytes=1 << (20 + rank),
                config=EPConfig(progress_s=50.0 + rank),
            )
        )
        two.buffers += buffers
        x = torch.randn(4, 16)
        two.run(lambda rank: buffers[rank].dispatch(x, torch.full((4, 2), 4)))


@pytest.mark.parametrize("verb", ["dispatch", "combine", "another"])
def test_what_ends_a_buffer_is_told_before_another_thread_calls(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    with Cluster(1, 1) as cluster:
        (buffer,) = cluster.make_buffers(num_experts=2, num_topk=1, hidden=32, max_tokens=4)
        turns: list[bool] = []

        def other_thread_gets_its_turn() -> None:
            turns.append(buffer._lock.acquire(blocking=False))

        def raise_fault(error: RuntimeError) -> None:
            thread = threading.Thread(target=other_thread_gets_its_turn)
            thread.start()
            thread.join()

        def breaks(*args: Any, **options: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(buffer._backend, "raise_fault", raise_fault)
        monkeypatch.setattr(ep_comm.buffer, "check_dispatch", breaks)
        monkeypatch.setattr(ep_comm.buffer, "check_combine", breaks)
        x: Any = torch.zeros(1, 32)

        def another() -> None:
            with buffer._lock:
                breaks()

        calls: dict[str, Callable[[], Any]] = {
            "dispatch": lambda: buffer.dispatch(x, torch.zeros((1, 1), dtype=torch.int64)),
            "combine": lambda: buffer.combine(x, x),
            "another": another,
        }
        with pytest.raises(RuntimeError, match="CUDA"):
            calls[verb]()
        other_thread_gets_its_turn()
        assert turns == [False, True]
        buffer._lock.release()
