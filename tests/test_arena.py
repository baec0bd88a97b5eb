"""The arena: extents never overlap, return in any order on any thread, and keep memory alive.

tests/cpp checks the allocator and the layout of the control block from within.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import threading
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_comm import _core
from ep_comm.testing import Cluster

PAGE = _core.EXTENT_ALIGN


def arena_of(num_pages: int) -> tuple[_core.Segment, _core.Arena]:
    segment = _core.Segment.create("test", num_pages * PAGE)
    return segment, _core.Arena(segment)


def take(arena: _core.Arena, num_bytes: int) -> Tensor | None:
    capsule = arena.array([num_bytes])
    return None if capsule is None else torch.from_dlpack(capsule)


# ---- extents ----


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9 * PAGE), st.integers(0, 99)), max_size=60)
)
def test_extents_are_disjoint_aligned_and_inside(steps: list[tuple[bool, int, int]]) -> None:
    segment, arena = arena_of(32)
    held: list[Tensor] = []
    for grants, size, which in steps:
        if grants:
            largest = arena.stats()["largest_free"]
            tensor = take(arena, size)
            assert (tensor is None) == (-(-size // PAGE) * PAGE > largest)
            if tensor is not None:
                assert (tensor.data_ptr() - segment.address) % PAGE == 0
                held.append(tensor)
        elif held:
            held.pop(which % len(held))
        ends = 0
        for tensor in sorted(held, key=Tensor.data_ptr):
            start = tensor.data_ptr() - segment.address
            assert start >= ends
            ends = start + -(-tensor.numel() // PAGE) * PAGE
            assert ends <= segment.bytes
        tensor = None  # only `held` holds
        in_use = sum(-(-t.numel() // PAGE) * PAGE for t in held)
        assert arena.stats()["in_use"] == in_use
        assert arena.stats()["num_extents"] == len(held)
        assert arena.stats()["peak"] >= in_use
    held.clear()
    assert arena.stats()["largest_free"] == 32 * PAGE


def test_lowest_free_extent_is_used_again() -> None:
    _, arena = arena_of(8)
    tensors = [take(arena, PAGE) for _ in range(8)]
    assert take(arena, 1) is None
    address = tensors[2].data_ptr()  # type: ignore[union-attr]
    tensors[5] = tensors[2] = None
    again = take(arena, 100)
    assert again is not None
    assert again.data_ptr() == address


def test_memory_is_zero_and_readable_by_its_last_view() -> None:
    segment, arena = arena_of(16)
    tensor = take(arena, 3 * PAGE)
    assert tensor is not None
    assert not tensor.any()
    view = tensor.view(torch.float32)[7:9]
    view.fill_(3)
    del tensor
    assert arena.stats()["num_extents"] == 1
    del arena, segment  # the view holds the extent, the extent the memory
    gc.collect()
    assert view.tolist() == [3, 3]


def test_capsule_that_no_array_takes_returns_its_extent() -> None:
    _, arena = arena_of(4)
    capsule = arena.array([PAGE])
    assert arena.stats()["in_use"] == PAGE
    del capsule
    assert arena.stats()["in_use"] == 0


def test_offset_is_known_for_granted_memory_only() -> None:
    segment, arena = arena_of(8)
    first, second = take(arena, 2 * PAGE), take(arena, PAGE)
    assert first is not None
    assert second is not None
    assert arena.offset_of(first.data_ptr(), 2 * PAGE) == 0
    assert arena.offset_of(first.data_ptr() + 100, 10) == 100
    assert arena.offset_of(second.data_ptr(), PAGE) == 2 * PAGE
    assert arena.offset_of(first.data_ptr(), 2 * PAGE + 1) == -1  # runs into the next extent
    assert arena.offset_of(second.data_ptr() + PAGE, 1) == -1  # free
    assert arena.offset_of(segment.address - 1, 1) == -1
    assert arena.offset_of(segment.address + segment.bytes, 1) == -1
    assert arena.offset_of(torch.zeros(4).data_ptr(), 16) == -1


def test_extents_return_from_any_thread() -> None:
    _, arena = arena_of(256)
    failures: list[str] = []

    def body(seed: int) -> None:
        rng = random.Random(seed)
        held: list[Tensor] = []
        for _ in range(300):
            tensor = take(arena, rng.randrange(1, 5 * PAGE))
            if tensor is not None:
                tensor.fill_(seed)
                held.append(tensor)
            if len(held) > 8:
                gone = held.pop(rng.randrange(len(held)))
                if not (gone == seed).all():
                    failures.append(f"thread {seed} lost its memory")

    threads = [threading.Thread(target=body, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert arena.stats()["in_use"] == 0


# ---- segments ----


def test_s4_segments_cannot_be_resized_or_unsealed() -> None:
    segment = _core.Segment.create("test", 4 * PAGE)
    for size in (0, PAGE, 8 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    import fcntl

    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(segment.fd).st_size == 4 * PAGE
    assert os.get_inheritable(segment.fd) is False


def test_s4_unsealed_or_short_memory_of_a_peer_is_refused() -> None:
    import fcntl

    fd = os.memfd_create("evil", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    with pytest.raises(_core.SystemCallError):
        _core.Segment.map(fd, 4 * PAGE)  # may be truncated while we read: SIGBUS
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(_core.SystemCallError):
        _core.Segment.map(fd, 4 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(_core.SystemCallError):
        _core.Segment.map(fd, 5 * PAGE)
    assert _core.Segment.map(fd, 4 * PAGE).bytes == 4 * PAGE
    os.close(fd)
    with open("/proc/self/exe", "rb") as file, pytest.raises(_core.SystemCallError):
        _core.Segment.map(file.fileno(), PAGE)
    with pytest.raises(_core.SystemCallError):
        _core.Segment.map(-1, PAGE)


def test_segment_lies_between_guard_pages() -> None:
    """In a process of its own: touching a guard page kills it."""
    with ranks.Ranks(_touch_guard, 2) as two:
        assert two.results() == [-11, -11]  # SIGSEGV


def _touch_guard(me: Any) -> None:
    import ctypes
    import faulthandler

    faulthandler.disable()
    segment = _core.Segment.create("test", 2 * PAGE)
    ctypes.c_char.from_address(segment.address).value = b"x"
    ctypes.c_char.from_address(segment.address + 2 * PAGE - 1).value = b"x"
    outside = segment.address - 1 if me.rank == 0 else segment.address + 2 * PAGE
    ctypes.c_char.from_address(outside).value = b"x"


def test_two_mappings_see_the_same_memory_and_only_touched_pages_count() -> None:
    segment = _core.Segment.create("test", 1 << 40)  # far more than there is
    assert segment.committed_bytes() == 0
    other = _core.Segment.map(segment.fd, 1 << 40)
    arena = _core.Arena(segment)
    tensor = take(arena, 1 << 20)
    assert tensor is not None
    tensor[:PAGE].fill_(9)
    import ctypes

    assert ctypes.c_ubyte.from_address(other.address + 5).value == 9
    assert segment.committed_bytes() <= 8 * PAGE
    del tensor
    arena.discard_free()
    assert segment.committed_bytes() == 0
    assert ctypes.c_ubyte.from_address(other.address + 5).value == 0


def test_segment_that_cannot_be_had_names_the_call() -> None:
    with pytest.raises(_core.SystemCallError) as caught:
        _core.Segment.create("test", 1 << 62)
    assert caught.value.args[1] in ("ftruncate", "mmap")
    assert isinstance(caught.value, OSError)
    assert mmap.PAGESIZE == PAGE


# ---- layouts, as Python sees them ----


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 64), st.integers(2, 16), st.integers(1, 300), st.integers(1, 32), st.data())
def test_regions_of_the_control_block_are_disjoint_and_aligned(
    num_ranks: int, num_slots: int, num_experts: int, num_topk: int, data: st.DataObject
) -> None:
    shape = _core.Shape()
    shape.num_ranks, shape.num_slots, shape.num_experts = num_ranks, num_slots, num_experts
    shape.max_local_experts = data.draw(st.integers(-(-num_experts // num_ranks), num_experts))
    shape.num_topk, shape.max_tokens = num_topk, 8
    layout = _core.ControlLayout(shape)
    regions = sorted(layout.regions(), key=lambda r: r[1])
    at = 0
    for name, offset, size in regions:
        assert offset >= at, name
        assert offset % 128 == 0, name
        at = offset + size
    assert at <= layout.end
    assert regions[0][0] == "header"


@given(st.integers(1, 32), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 400))
def test_metadata_record_is_as_long_as_what_it_holds(
    num_topk: int, routing: bool, weights: bool, rows: bool, words: int
) -> None:
    layout = _core.MetaLayout(num_topk, routing, weights, rows, 4 * words)
    ints = routing * (1 + num_topk) + weights * num_topk + (routing and rows) * num_topk
    units = -(-4 * ints // 16) + -(-4 * words // 16)  # scales start on a unit of their own
    assert layout.bytes == 16 * units


# ---- what operations hold ----


def test_nothing_is_held_between_operations() -> None:
    with Cluster(1, 3) as cluster:
        cluster.make_buffers(num_experts=6, num_topk=2, hidden=64, max_tokens=16)

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            g = torch.Generator().manual_seed(rank)
            for i in range(20):
                x = torch.randn(16, 64, generator=g)
                idx = torch.randint(0, 6, (16, 2), generator=g)
                layout = ("compact", "grouped", "slab")[i % 3]
                options = {"capacity": 96} if layout == "slab" else {}
                recv = buffer.dispatch(x, idx, torch.rand(16, 2), layout=layout, **options)
                assert buffer.stats()["arena"]["num_extents"] == 1
                out = buffer.combine(recv.x.clone(), recv.handle, topk_weights=recv.topk_weights)
                assert buffer.stats()["arena"]["num_extents"] <= 2  # x, and the result
                copied = buffer.dispatch(x, handle=recv.handle, output="torch")
                assert buffer.stats()["arena"]["num_extents"] <= 2
                del recv, out, copied
                assert buffer.stats()["arena"]["num_extents"] == 0

        cluster.run(work)


def test_output_auto_leaves_a_crowded_arena() -> None:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(
            num_experts=2, num_topk=1, hidden=4096, max_tokens=16, arena_bytes=3 << 20
        )

        def work(rank: int) -> None:
            buffer = cluster.buffers[rank]
            x, idx = torch.randn(16, 4096), torch.full((16, 1), rank)
            kept = [buffer.dispatch(x + i, idx, output="auto") for i in range(40)]
            assert buffer.stats()["copied_out"] > 0
            assert buffer.stats()["arena"]["in_use"] <= 3 << 20
            for i, recv in enumerate(kept):
                assert torch.equal(recv.x, x + i)
                assert torch.equal(buffer.combine(recv.x, recv.handle), x + i)

        cluster.run(work)
