"""Whatever an operation does not promise to write stays as it was: arenas, outputs, inputs."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import compare
import pytest
import ranks
import torch
from torch import Tensor

from ep_comm import Buffer, EPError, Handle, Received, _core
from ep_comm.testing import Cluster

POISON = 0xA5
ARENA = 1 << 20
PAGE = _core.EXTENT_ALIGN
RANKS, TOKENS, HIDDEN, TOPK, EXPERTS = 3, 7, 48, 3, 7
SHAPE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_topk": TOPK,
    "hidden": HIDDEN,
    "max_tokens": TOKENS,
    "arena_bytes": ARENA,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "compact": {"layout": "compact"},
    "compact-static": {"layout": "compact", "sync": False},
    "grouped": {"layout": "grouped", "alignment": 4},
    "grouped-static": {"layout": "grouped", "sync": False, "capacity": 96},
    "slab": {"layout": "slab", "capacity": 40},
    "slab-static": {"layout": "slab", "capacity": 40, "sync": False},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(1, RANKS) as three:
        three.make_buffers(**SHAPE)
        yield three


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    return x, torch.randint(-1, EXPERTS, (TOKENS, TOPK), generator=g), torch.rand(TOKENS, TOPK)


def whole_arena(buffer: Buffer) -> Tensor:
    """All bytes of a rank's arena, whoever holds them."""
    segment = buffer._backend._memory.own.arena
    array = (ctypes.c_uint8 * segment.bytes).from_address(segment.address)
    return torch.frombuffer(array, dtype=torch.uint8)


def poison(buffer: Buffer) -> None:
    assert buffer.stats()["arena"]["in_use"] == 0
    whole_arena(buffer).fill_(POISON)


def written(buffer: Buffer) -> Tensor:
    """bool [ARENA], which bytes are no longer poison."""
    return whole_arena(buffer) != POISON


def span(buffer: Buffer, tensor: Tensor) -> slice:
    start = tensor.data_ptr() - buffer._backend._memory.own.arena.address
    return slice(start, start + tensor.numel() * tensor.itemsize)


def meta_bytes(recv: Received) -> int:
    return (
        int(recv.num_recv) * _core.MetaLayout(TOPK, True, True, recv.layout != "compact", 0).bytes
    )


def meta_span(buffer: Buffer, recv: Received) -> slice:
    """Where the records lay: the first extent that fits behind x, returned since."""
    end = -(-span(buffer, recv.x).stop // PAGE) * PAGE
    return slice(end, end + meta_bytes(recv))


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_dispatch_writes_its_rows_and_nothing_else(cluster: Cluster, options: Any) -> None:
    received: list[Any] = [None] * RANKS

    def work(rank: int) -> None:
        poison(cluster.buffers[rank])
        ready.wait()
        received[rank] = cluster.buffers[rank].dispatch(*inputs(rank), **options)

    ready = threading.Barrier(RANKS)
    cluster.run(work)
    for rank, recv in enumerate(received):
        buffer = cluster.buffers[rank]
        stray = written(buffer)
        x = span(buffer, recv.x)
        row_bytes = HIDDEN * 4
        rows = stray[x].view(-1, row_bytes).any(1)
        used = recv.topk_idx >= 0
        used = (used.any(-1) if recv.layout == "compact" else used).flatten()
        if recv.layout == "grouped" and recv.offsets is not None:
            used[: int(recv.offsets[-1])] = True  # padding is written, with zeros
        assert torch.equal(rows, used), f"rank {rank}: rows {rows.nonzero().flatten().tolist()}"
        stray[x] = False
        stray[meta_span(buffer, recv)] = False
        assert not stray.any(), f"rank {rank}: bytes {stray.nonzero().flatten()[:8].tolist()}"


@pytest.mark.parametrize("place", ["torch", "arena"])
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_combine_writes_its_result_and_nothing_else(
    cluster: Cluster, options: Any, place: str
) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, idx, weights = inputs(rank)
        given = [x.clone(), idx.clone(), weights.clone()]
        recv = buffer.dispatch(x, idx, weights, **options)
        y = recv.x.clone() if place == "torch" else recv.x
        kept_y, kept_handle = y.clone(), [t.clone() for t in recv.handle]
        kept_weights = recv.topk_weights.clone()  # type: ignore[union-attr]
        guarded = torch.full((TOKENS + 2, HIDDEN), 77.0)
        biases = [torch.ones(TOKENS, HIDDEN), torch.ones(TOKENS, HIDDEN)]
        buffer.combine(
            y,
            recv.handle,
            weighted=recv.layout != "compact",
            topk_weights=recv.topk_weights,
            bias=(biases[0], biases[1]),
            out=guarded[1:-1],
        )
        assert (guarded[[0, -1]] == 77).all()
        compare.same_bits(y, kept_y, "y")
        compare.same_bits(recv.topk_weights, kept_weights, "weights")
        for name, now, before in zip(Handle._fields, recv.handle, kept_handle, strict=True):
            compare.same_bits(now, before, name)
        for now, before in zip((x, idx, weights), given, strict=True):
            compare.same_bits(now, before, "inputs")
        for bias in biases:
            assert (bias == 1).all()

    cluster.run(work)


def test_combine_leaves_the_arena_of_others_alone(cluster: Cluster) -> None:
    """Peers only read: what changes in an arena is what its own rank stages and returns."""
    ready = threading.Barrier(RANKS)

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        recv = buffer.dispatch(*inputs(rank), layout="grouped")
        y = recv.x.clone()
        handle, weights = recv.handle, recv.topk_weights
        del recv
        poison(buffer)
        ready.wait()
        out, home = buffer.combine(y, handle, topk_weights=weights)
        ready.wait()
        stray = written(buffer)
        extents = y.numel() * 4 + out.numel() * 4 + weights.numel() * 4 + 4 * PAGE
        assert int(stray.sum()) <= extents
        assert not stray[extents:].any()
        del out, home

    cluster.run(work)


def test_cached_dispatch_writes_its_rows_and_nothing_else(cluster: Cluster) -> None:
    ready = threading.Barrier(RANKS)

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, idx, _ = inputs(rank)
        handle = buffer.dispatch(x, idx, layout="slab", capacity=40).handle
        kept = [t.clone() for t in handle]
        poison(buffer)
        ready.wait()
        recv = buffer.dispatch(x, handle=handle)
        ready.wait()
        stray = written(buffer)
        at = span(buffer, recv.x)
        rows = stray[at].view(-1, HIDDEN * 4).any(1)
        used = torch.zeros(rows.numel(), dtype=torch.bool)
        used[handle.recv_row[handle.recv_row >= 0].long()] = True
        assert torch.equal(rows, used)
        stray[at] = False
        assert not stray.any()
        for now, before in zip(handle, kept, strict=True):
            compare.same_bits(now, before)

    cluster.run(work)


@pytest.mark.parametrize("bad", ["id", "capacity", "layout", "dtype"])
def test_failed_dispatch_writes_no_row_anywhere(cluster: Cluster, bad: str) -> None:
    ready = threading.Barrier(RANKS)

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, idx, weights = inputs(rank)
        options: dict[str, Any] = {"capacity": 1} if bad == "capacity" else {}
        if rank == 1 and bad == "id":
            idx[0, 0] = EXPERTS
        if rank == 1 and bad == "layout":
            options["layout"] = "grouped"
        if rank == 1 and bad == "dtype":
            x = x.double()
        poison(buffer)
        ready.wait()
        with pytest.raises(EPError) as caught:
            buffer.dispatch(x, idx, weights, **options)
        assert caught.value.scope == "call"
        ready.wait()
        assert not written(buffer).any()

    cluster.run(work)


def test_static_failure_shows_nothing_of_the_arena(cluster: Cluster) -> None:
    """What a failed static call returns is empty, not what lay there before."""

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        poison(buffer)
        x, idx, weights = inputs(rank)
        recv = buffer.dispatch(x, idx + EXPERTS, weights, sync=False)
        assert recv.status.item() == 213
        assert not (recv.x.view(torch.uint8) == POISON).any()
        del recv
        with pytest.raises(EPError):
            buffer.check()

    cluster.run(work)


def test_scales_and_ids_past_the_count_are_blank(cluster: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        poison(buffer)
        x, idx, weights = inputs(rank)
        one_byte = x.to(torch.float8_e4m3fn)
        scales = torch.full((TOKENS, 3), 2.0)
        for options in LAYOUTS.values():
            recv = buffer.dispatch(
                one_byte, idx, weights, scales=scales, scale_block=None, **options
            )
            unused = recv.topk_idx < 0
            assert (recv.topk_weights[unused] == 0).all()
            rows = unused.all(-1) if recv.layout == "compact" else unused
            assert (recv.scales[rows] == 0).all()
            assert (recv.scales[~rows] == 2).all()
            del recv

    cluster.run(work)


# ---- memory ----


def test_peak_memory_is_outputs_plus_a_quarter() -> None:
    """Arena pages ever touched and private memory, against the bytes of what is returned."""
    for rank, (dispatch, combine) in enumerate(ranks.run(_measure_memory, 2, limit_s=120)):
        assert dispatch <= 1.25, f"rank {rank}: dispatch used {dispatch:.2f} of its outputs"
        assert combine <= 1.25, f"rank {rank}: combine used {combine:.2f} of its outputs"


def _measure_memory(me: Any) -> tuple[float, float]:
    buffer = me.buffer(num_experts=64, num_topk=8, hidden=2048, max_tokens=1024)
    g = torch.Generator().manual_seed(me.rank)
    x = torch.randn(1024, 2048, generator=g).to(torch.bfloat16)
    idx = torch.rand(1024, 64, generator=g).topk(8).indices
    weights = torch.rand(1024, 8, generator=g)
    warm = buffer.dispatch(x[:1], idx[:1], weights[:1])  # lazily loaded code
    buffer.combine(warm.x, warm.handle)
    del warm
    buffer.release()
    peak = _Peak(buffer)
    with peak:
        recv = buffer.dispatch(x, idx, weights, layout="grouped", alignment=16)
    outputs = _bytes(recv.x, recv.topk_idx, recv.topk_weights, recv.offsets, *recv.handle)
    dispatch = peak.bytes / outputs
    y = buffer.empty(recv.x.shape, recv.x.dtype).copy_(recv.x)
    with peak:
        out = buffer.combine(y, recv.handle)
    return dispatch, peak.bytes / _bytes(out)


def _bytes(*tensors: Tensor | None) -> int:
    storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None}
    return sum(t.numel() * t.itemsize for t in storages.values())


class _Peak:
    """Growth of arena pages (they stay once touched) and of private memory (sampled)."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.bytes = 0

    def __enter__(self) -> None:
        self.done = False
        self.arena, self.private = self._arena(), self._private()
        self.most = self.private
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, self._private())
        self.done = True
        self.thread.join()
        self.bytes = self._arena() - self.arena + max(0, self.most - self.private)

    def _sample(self) -> None:
        while not self.done:
            self.most = max(self.most, self._private())
            time.sleep(0.0005)

    def _arena(self) -> int:
        committed: int = self.buffer.stats()["arena"]["committed"]
        return committed

    @staticmethod
    def _private() -> int:
        with open(f"/proc/{os.getpid()}/status") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024
