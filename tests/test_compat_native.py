"""Options of the native API that the deep_ep surface needs, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same_bits

from ep_comm import Buffer, reference
from ep_comm.errors import EPArgumentError, EPCapacityError
from ep_comm.testing import Cluster

R, E, K, H = 3, 6, 3, 16
TOKENS = (5, 0, 7)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(1, R) as three:
        three.make_buffers(num_experts=E, num_topk=K, hidden=H, max_tokens=8)
        yield three


def _inputs() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(t, H, generator=generator).bfloat16() for t in TOKENS]
    idx = [torch.randint(-1, E, (t, K), generator=generator) for t in TOKENS]
    weights = [torch.rand(t, K, generator=generator) for t in TOKENS]
    return x, idx, weights


def _dispatch(cluster: Cluster, **options: Any) -> tuple[list[Any], list[Any]]:
    x, idx, weights = _inputs()
    want = reference.dispatch(x, idx, weights, num_experts=E, max_tokens=8, **options)
    got = cluster.run(lambda r: cluster.buffers[r].dispatch(x[r], idx[r], weights[r], **options))
    return got, want


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "static"])
@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_origins_tell_who_sent_each_row(cluster: Cluster, layout: str, sync: bool) -> None:
    options = {"layout": layout, "alignment": 4} if layout == "grouped" else {"layout": layout}
    got, want = _dispatch(cluster, origins=True, sync=sync, **options)
    for a, b in zip(got, want, strict=True):
        sent = torch.stack([r.handle.rank_counts[0] for r in want])  # [source, rank]
        if layout == "compact":
            assert torch.equal(a.origins.rank_ends, sent.cumsum(0))
            assert a.origins.rank_ends.dtype == torch.int32
        else:
            assert a.origins.rank_ends is None
        for name in ("row_token", "source_range"):
            mine, theirs = getattr(a.origins, name), getattr(b.origins, name)
            assert (mine is None) == (layout == "compact" and name == "source_range")
            if mine is not None:
                same_bits(mine, theirs, name)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("layout", ["grouped", "slab"])
def test_combine_in_topk_order_adds_slots_as_they_stand(
    cluster: Cluster, layout: str, weighted: bool
) -> None:
    got, want = _dispatch(cluster, layout=layout)
    y = [torch.randn(r.x.shape, generator=torch.Generator().manual_seed(7)) for r in got]
    handles = [r.handle for r in want]
    expected = reference.combine(y, handles, weighted=weighted, order="topk")
    by_rank = reference.combine(y, handles, weighted=weighted)
    sums = cluster.run(
        lambda r: cluster.buffers[r].combine(y[r], got[r].handle, weighted=weighted, order="topk")
    )
    for a, b in zip(sums, expected, strict=True):
        same_bits(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(expected, by_rank, strict=True))


def test_sum_weights_adds_what_all_ranks_of_the_token_hold(cluster: Cluster) -> None:
    got, want = _dispatch(cluster)
    generator = torch.Generator().manual_seed(9)
    y = [r.x for r in got]
    held = [torch.rand(r.x.shape[0], K, generator=generator) for r in got]
    expected = reference.combine(y, [r.handle for r in want], topk_weights=held, sum_weights=True)
    sums = cluster.run(
        lambda r: cluster.buffers[r].combine(
            y[r], got[r].handle, topk_weights=held[r], sum_weights=True
        )
    )
    for a, b in zip(sums, expected, strict=True):
        same_bits(a[0], b[0])
        same_bits(a[1], b[1])


def test_scales_of_any_width_travel_with_scale_block_none(cluster: Cluster) -> None:
    _, idx, _ = _inputs()
    x = [torch.randint(0, 255, (t, H), dtype=torch.uint8) for t in TOKENS]
    scales = [torch.rand(t, 3) for t in TOKENS]
    want = reference.dispatch(x, idx, num_experts=E, max_tokens=8, scales=scales)
    got = cluster.run(
        lambda r: cluster.buffers[r].dispatch(x[r], idx[r], scales=scales[r], scale_block=None)
    )
    for a, b in zip(got, want, strict=True):
        same_bits(a.x, b.x)
        same_bits(a.scales, b.scales)


def test_options_of_another_layout_are_refused() -> None:
    with Buffer(num_experts=E, num_topk=K, hidden=H, max_tokens=8, device="cpu") as buffer:
        x, idx, weights = (values[0] for values in _inputs())
        compact = buffer.dispatch(x, idx, weights)
        grouped = buffer.dispatch(x, idx, weights, layout="grouped")
        with pytest.raises(EPArgumentError, match="order='topk'"):
            buffer.combine(compact.x, compact.handle, order="topk")
        with pytest.raises(EPArgumentError, match="sum_weights"):
            buffer.combine(grouped.x, grouped.handle, sum_weights=True)
        with pytest.raises(EPArgumentError, match="order='slots'"):
            buffer.combine(grouped.x, grouped.handle, order="slots")
        with pytest.raises(EPArgumentError, match="origins"):
            buffer.dispatch(x, handle=compact.handle, origins=True)


@pytest.mark.parametrize("quantize", [None, "fp8"], ids=["plain", "fp8"])
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "static"])
def test_begun_slab_promises_the_tensors_it_returns(
    cluster: Cluster, sync: bool, quantize: str | None
) -> None:
    x, idx, weights = _inputs()
    x = [rows.repeat(1, 8) for rows in x]  # hidden 128
    options: dict[str, Any] = {"layout": "slab", "origins": True, "quantize": quantize}
    wide = cluster.run(
        lambda r: Buffer(cluster.group(r), num_experts=E, num_topk=K, hidden=8 * H, max_tokens=8)
    )

    def work(rank: int) -> None:
        args = (x[rank], idx[rank], weights[rank])
        at_once = wide[rank].dispatch(*args, sync=sync, **options)
        begun = wide[rank].dispatch(*args, sync=sync, wait=False, **options)
        promised = begun.promised
        assert promised is not None
        recv = begun.wait()
        for name in ("x", "topk_idx", "topk_weights", "scales", "num_tokens_per_expert"):
            assert getattr(promised, name) is getattr(recv, name), name
        assert promised.origins.row_token is recv.origins.row_token
        assert promised.origins.source_range is recv.origins.source_range
        for e, n in enumerate(at_once.counts):
            same_bits(recv.x[e, :n], at_once.x[e, :n])
            if quantize is not None:
                same_bits(recv.scales[e, :n], at_once.scales[e, :n])
        for name in ("topk_idx", "topk_weights", "num_tokens_per_expert"):
            same_bits(getattr(recv, name), getattr(at_once, name))
        y = torch.randn(recv.x.shape).bfloat16()
        same_bits(
            wide[rank].combine(y, recv.handle, weighted=True),
            wide[rank].combine(y, at_once.handle, weighted=True),
        )
        cached = wide[rank].dispatch(x[rank], handle=recv.handle, quantize=quantize, wait=False)
        assert cached.promised is not None
        assert cached.wait().x is cached.promised.x
        compact = wide[rank].dispatch(*args, wait=False)
        assert compact.promised is None
        compact.wait()

    cluster.run(work)
    for buffer in wide:
        buffer.close()


def test_promised_tensors_show_a_static_failure(cluster: Cluster) -> None:
    x, idx, weights = _inputs()

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        begun = buffer.dispatch(
            x[rank], idx[rank], weights[rank], layout="slab", capacity=1, sync=False, wait=False
        )
        recv = begun.wait()
        assert recv.status.item() == 230
        assert recv.x is begun.promised.x
        assert begun.promised.num_tokens_per_expert.tolist() == [0] * (E // R)
        assert (begun.promised.topk_idx == -1).all()
        with pytest.raises(EPCapacityError):
            buffer.check()

    cluster.run(work)
