"""Shapes and values at their edges (A): exact everywhere, or refused everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import compare
import pytest
import torch
from verdicts import (
    SHAPE,
    inputs,
    raised,
    round_trip,
)

from ep_comm import Buffer, reference
from ep_comm.errors import (
    EPArgumentError,
    EPCapacityError,
)
from ep_comm.testing import Cluster


@pytest.mark.parametrize("hidden", [8, 2880, 3584, 6656])
@pytest.mark.parametrize("layout", ["compact", "grouped"])
def test_a3_any_hidden_of_whole_16_bytes_is_exact(hidden: int, layout: str) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(num_experts=6, num_topk=2, hidden=hidden, max_tokens=8)

        def work(rank: int) -> None:
            g = torch.Generator().manual_seed(rank)
            x = torch.randint(-8, 8, (8, hidden), generator=g).to(torch.bfloat16)
            recv = cluster.buffers[rank].dispatch(x, inputs(rank)[1], layout=layout)
            assert torch.equal(cluster.buffers[rank].combine(recv.x, recv.handle), x * 2)

        cluster.run(work)


@pytest.mark.parametrize("hidden", [1, 12, 2881])
def test_a3_rows_that_are_no_multiple_of_16_bytes_are_e211(hidden: int) -> None:
    with Cluster(1, 2) as cluster:
        options = {**SHAPE, "hidden": hidden}
        errors = cluster.run_catching(
            lambda r: Buffer(cluster.group(r), **options, device="cpu").dispatch(
                torch.zeros(4, hidden, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
            )
        )
        for error in errors:
            assert isinstance(error, EPArgumentError), error
            assert error.code == "E211"
            assert f"hidden={hidden}" in str(error)
            assert "multiple of" in str(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a4_ids_of_both_widths_are_exact_and_come_back_as_they_were(dtype: torch.dtype) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            x, idx = inputs(rank)
            recv = cluster.buffers[rank].dispatch(x, idx.to(dtype))
            assert recv.topk_idx is not None
            assert recv.topk_idx.dtype == dtype
            assert torch.equal(cluster.buffers[rank].combine(recv.x, recv.handle), x * 2)

        cluster.run(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a6_weights_of_16_bits_are_converted(dtype: torch.dtype) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            x, idx = inputs(rank)
            weights = (torch.arange(16.0).view(8, 2) / 8).to(dtype)
            recv = cluster.buffers[rank].dispatch(x, idx, weights, layout="grouped")
            assert recv.topk_weights is not None
            assert recv.topk_weights.dtype == torch.float32
            out = cluster.buffers[rank].combine(recv.x, recv.handle, weighted=True)
            first, second = weights.float().unbind(1)
            assert torch.equal(out, x * first[:, None] + x * second[:, None])

        cluster.run(work)


@pytest.mark.parametrize("empty", ["one", "all", "all-but-one"])
@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_a7_ranks_without_tokens(empty: str, layout: str) -> None:
    tokens = {"one": (8, 0, 8), "all": (0, 0, 0), "all-but-one": (0, 8, 0)}[empty]
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank, 0, tokens[rank])
            for sync in (True, False):
                recv = buffer.dispatch(x, idx, layout=layout, sync=sync)
                assert torch.equal(buffer.combine(recv.x, recv.handle), x * 2)
                again = buffer.dispatch(x, handle=recv.handle)
                assert torch.equal(buffer.combine(again.x, again.handle), x * 2)

        cluster.run(work)


def test_a8_exactly_max_tokens_works_and_one_more_is_e230_everywhere() -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            round_trip(buffer, tokens=8)
            too_many = 9 if rank == 2 else 8
            x, idx = inputs(rank, 1, too_many)
            error = raised(lambda: buffer.dispatch(x, idx))
            assert isinstance(error, EPCapacityError)
            assert error.code == "E230"
            assert "got 9, want <= 8" in str(error)
            assert rank == 2 or error.peer == 2
            round_trip(buffer, 2)

        cluster.run(work)


@pytest.mark.parametrize("num_topk", [1, 32])
def test_a9_smallest_and_largest_topk_also_beyond_the_number_of_experts(num_topk: int) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(num_experts=3, num_topk=num_topk, hidden=32, max_tokens=8)

        def work(rank: int) -> None:
            idx = (torch.arange(8)[:, None] + torch.arange(num_topk)) % 3
            x = inputs(rank)[0]
            recv = cluster.buffers[rank].dispatch(x, idx, layout="grouped")
            assert torch.equal(cluster.buffers[rank].combine(recv.x, recv.handle), x * num_topk)

        cluster.run(work)


def test_a9_topk_33_is_e210() -> None:
    error = raised(lambda: Buffer(num_experts=64, num_topk=33, hidden=32, max_tokens=8))
    assert isinstance(error, EPArgumentError)
    assert error.code == "E210"
    assert "limit 32" in str(error)


@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_a11_tokens_that_go_nowhere_get_zeros(layout: str) -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank)
            nowhere = torch.full_like(idx, -1)
            recv = buffer.dispatch(x, nowhere, layout=layout)
            assert int(recv.num_recv) == 0
            assert not recv.num_tokens_per_expert.any()
            assert not buffer.combine(recv.x, recv.handle).any()
            some = torch.where(torch.arange(8)[:, None] % 3 == rank, -1, idx)
            some[1, 0] = -1
            recv = buffer.dispatch(x, some, layout=layout)
            want = x * (some >= 0).sum(1, keepdim=True)
            assert torch.equal(buffer.combine(recv.x, recv.handle), want)

        cluster.run(work)


def test_a12_duplicate_experts_count_every_slot() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, _ = inputs(rank)
            idx = torch.full((8, 2), 4)
            for layout, copies in (("compact", 1), ("grouped", 2), ("slab", 2)):
                options = {"capacity": 32} if layout == "slab" else {}
                recv = buffer.dispatch(x, idx, layout=layout, **options)
                assert sum(recv.counts) == (32 if rank == 1 else 0)
                assert torch.equal(buffer.combine(recv.x, recv.handle), x * copies)

        cluster.run(work)


@pytest.mark.parametrize("target", ["expert", "rank"])
@pytest.mark.parametrize("num_slots", [2, 4])
def test_a13_everything_to_one_expert_or_rank(target: str, num_slots: int) -> None:
    with Cluster(1, 4) as cluster:
        cluster.make_buffers(
            num_experts=8, num_topk=2, hidden=1024, max_tokens=64, num_slots=num_slots
        )

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            g = torch.Generator().manual_seed(rank)
            x = torch.randn(64, 1024, generator=g).to(torch.bfloat16)
            for i in range(8):
                to = (3 * i) % 8
                idx = torch.full((64, 2), to)
                if target == "rank":
                    idx[:, 1] ^= 1  # the other expert of that rank
                recv = buffer.dispatch(x, idx)
                assert recv.num_recv == (256 if rank == to // 2 else 0)
                assert torch.equal(buffer.combine(recv.x, recv.handle), x)

        cluster.run(work)


@pytest.mark.parametrize(
    ("num_experts", "expert_map"),
    [
        (7, None),
        (2, None),
        (5, [2, 2, 2, 2, 2]),
        (6, [2, 0, 2, 0, 2, 0]),
        (4, torch.tensor([1, 0, 2, 1], dtype=torch.int32)),
    ],
    ids=["uneven", "fewer-than-ranks", "all-on-one", "scattered", "tensor"],
)
def test_a14_any_map_of_experts_to_ranks(num_experts: int, expert_map: Any) -> None:
    listed = None if expert_map is None else [int(r) for r in expert_map]
    owner = reference.expert_owner(num_experts, 3, listed).owner.tolist()
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(
            num_experts=num_experts, num_topk=1, hidden=32, max_tokens=8, expert_map=expert_map
        )

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            assert buffer.local_experts == [e for e, r in enumerate(owner) if r == rank]
            x, _ = inputs(rank)
            idx = (torch.arange(8) % num_experts)[:, None]
            recv = buffer.dispatch(x, idx, layout="grouped")
            here = [e for e in range(num_experts) if owner[e] == rank]
            per_expert = [3 * sum(t % num_experts == e for t in range(8)) for e in here]
            assert recv.counts == per_expert
            assert torch.equal(buffer.combine(recv.x, recv.handle), x)

        cluster.run(work)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a15_special_values_travel_bit_exact_and_stay_in_their_token(dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, -6e-8, 65504.0])
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = inputs(rank)
            x[3] = special.repeat(5)[:32]
            x = x.to(dtype)
            weights = torch.ones(8, 2)
            weights[5, 1] = float("nan")
            recv = buffer.dispatch(x, idx, weights, layout="grouped")
            source, token = recv.handle.recv_src.unbind(1)
            for i, rows in enumerate(recv.handle.recv_row):
                sent = inputs(int(source[i]))[0]
                sent[3] = special.repeat(5)[:32]
                for row in rows[rows >= 0]:
                    compare.same_bits(recv.x[row], sent.to(dtype)[token[i]])
            plain = buffer.combine(recv.x, recv.handle)
            weighted = buffer.combine(recv.x, recv.handle, weighted=True)
            ordinary = [t for t in range(8) if t != 3]
            assert torch.equal(plain[ordinary], x[ordinary] * 2)
            assert plain[3].isnan().any()
            assert weighted[5].isnan().all()
            ordinary.remove(5)
            assert torch.equal(weighted[ordinary], x[ordinary] * 2)

        cluster.run(work)


@pytest.mark.parametrize("strides", ["rows", "columns", "every-other"])
def test_a16_scales_of_any_strides_travel_verbatim(strides: str) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(num_experts=6, num_topk=2, hidden=512, max_tokens=8)

        def work(rank: int) -> None:
            g = torch.Generator().manual_seed(rank)
            x = torch.randint(-100, 100, (8, 512), generator=g, dtype=torch.int8)
            scales = torch.rand(8, 4, generator=g)
            laid = {
                "rows": scales,
                "columns": scales.t().contiguous().t(),
                "every-other": torch.stack([scales, -scales], -1)[..., 0],
            }[strides]
            recv = cluster.buffers[rank].dispatch(x, inputs(rank)[1], scales=laid)
            assert recv.scales is not None
            for row, (source, token) in enumerate(recv.handle.recv_src.tolist()):
                theirs = torch.Generator().manual_seed(source)
                sent = torch.randint(-100, 100, (8, 512), generator=theirs, dtype=torch.int8)
                assert torch.equal(recv.x[row], sent[token])
                assert torch.equal(recv.scales[row], torch.rand(8, 4, generator=theirs)[token])

        cluster.run(work)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch fills what it calls uninitialized with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_a20_deterministic_mode_that_fills_memory_changes_nothing(
    layout: str, deterministic: None
) -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)

        def work(rank: int) -> None:
            x, idx = inputs(rank)
            for sync in (True, False):
                recv = cluster.buffers[rank].dispatch(x, idx, layout=layout, sync=sync)
                out = cluster.buffers[rank].combine(recv.x, recv.handle)
                assert torch.equal(out, x * 2)

        cluster.run(work)


@pytest.mark.slow
def test_a21_offsets_beyond_2_31_and_2_32_bytes_are_exact() -> None:
    """4.6 GB of rows, every one different: they overlap where they come from."""
    tokens, hidden = 4400, 1 << 20
    buffer = Buffer(
        num_experts=2, num_topk=1, hidden=hidden, max_tokens=tokens, device="cpu",
        arena_bytes=tokens * hidden + (1 << 26),
    )  # fmt: skip
    source = torch.randint(0, 256, (hidden + 16 * tokens,), dtype=torch.uint8)
    x = source.as_strided((tokens, hidden), (16, 1))
    recv = buffer.dispatch(x, torch.ones(tokens, 1, dtype=torch.int64))
    assert recv.x.numel() > 2**32
    for token in range(tokens):
        assert torch.equal(recv.x[token], x[token])
