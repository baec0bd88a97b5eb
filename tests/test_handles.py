"""Handles: many alive, rebuilt from their tensors, used in any order, refused when not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import compare
import pytest
import ranks
import torch
from compare import same_bits
from patience import PATIENT
from torch import Tensor

from ep_comm import Handle, Received
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

SHAPE: dict[str, Any] = {"num_experts": 6, "num_topk": 3, "hidden": 16, "max_tokens": 8}
LAYOUTS: list[dict[str, Any]] = [
    {"layout": "compact"},
    {"layout": "grouped", "alignment": 4},
    {"layout": "slab", "capacity": 48},
]


def inputs(rank: int, seed: int, tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, 16, generator=g)
    return x, torch.randint(-1, 6, (tokens, 3), generator=g), torch.rand(tokens, 3, generator=g)


def owners_chosen(topk_idx: Tensor, num_ranks: int = 2) -> Tensor:
    """[T, 1] how many ranks each token goes to: the factor of a compact combine of identities."""
    owner = torch.where(topk_idx >= 0, topk_idx // (6 // num_ranks), -1)
    return torch.stack([(owner == r).any(1) for r in range(num_ranks)]).sum(0).unsqueeze(1)


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    with Cluster(1, 2) as cluster:
        cluster.make_buffers(**SHAPE)
        yield cluster


# ---- many, in any order, in any shape ----


def test_hundreds_of_handles_live_at_once_and_answer_in_reverse_order(two: Cluster) -> None:
    many = 300

    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        alive: list[tuple[int, Received]] = []
        for seed in range(many):
            x, idx, weights = inputs(rank, seed)
            alive.append((seed, buffer.dispatch(x, idx, weights, **LAYOUTS[seed % 3])))
        for seed, recv in reversed(alive):
            x, idx, weights = inputs(rank, seed)
            if recv.layout == "compact":
                want = x * owners_chosen(idx)
                assert torch.equal(buffer.combine(recv.x, recv.handle), want), seed
            else:
                got = buffer.combine(recv.x, recv.handle, weighted=True)
                factor = torch.where(idx >= 0, weights, 0).sum(1, keepdim=True)
                torch.testing.assert_close(got, x * factor, rtol=1e-5, atol=1e-5)
        del alive, recv, got
        assert buffer.stats()["arena"]["in_use"] == 0

    two.run(work)


def test_rebuilt_handles_are_as_good_as_the_original(two: Cluster) -> None:
    class Context:  # what autograd keeps: the tensors, and nothing else
        saved: tuple[Tensor, ...]

        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved = tensors

    rebuild: dict[str, Callable[[Handle], Any]] = {
        "list": list,
        "tuple": tuple,
        "handle": lambda h: Handle(*h),
        "clones": lambda h: tuple(t.clone() for t in h),
        "replaced": lambda h: h._replace(),
        "generator": lambda h: Handle._make(t for t in h),
    }

    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        for seed, (name, again) in enumerate(rebuild.items()):
            for layout in LAYOUTS:
                x, idx, _ = inputs(rank, seed)
                recv = buffer.dispatch(x, idx, **layout)
                context = Context()
                context.save_for_backward(*recv.handle)
                want_x = recv.x.clone()
                want = buffer.combine(recv.x, recv.handle)
                del recv.handle
                handle = again(Handle(*context.saved))
                assert torch.equal(buffer.combine(want_x, handle), want), (name, layout)
                cached = buffer.dispatch(x, handle=handle)
                if recv.layout != "slab":
                    assert torch.equal(cached.x, want_x), (name, layout)
                assert torch.equal(buffer.combine(cached.x, cached.handle), want), (name, layout)

    two.run(work)


def test_handle_outlives_what_was_received(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx, _ = inputs(rank, 5)
        handle = buffer.dispatch(x, idx).handle
        assert buffer.stats()["arena"]["in_use"] == 0  # a handle costs no arena memory
        recv = buffer.dispatch(x, handle=handle)
        assert torch.equal(buffer.combine(recv.x, handle), x * owners_chosen(idx))

    two.run(work)


def test_a19_combine_twice_and_dispatch_twice_with_one_handle(two: Cluster) -> None:
    def work(rank: int) -> None:
        buffer = two.buffers[rank]
        x, idx, _ = inputs(rank, 6)
        recv = buffer.dispatch(x, idx)
        first = buffer.combine(recv.x, recv.handle)
        assert torch.equal(buffer.combine(recv.x, recv.handle), first)
        once, twice = (buffer.dispatch(x + i, handle=recv.handle) for i in range(2))
        assert torch.equal(once.x, recv.x)
        assert torch.equal(twice.x, recv.x + 1)

    two.run(work)


@pytest.mark.parametrize("begun", [False, True], ids=["at-once", "begun"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: options["layout"])
@pytest.mark.parametrize("backend", ["cpu", "collective"])
def test_arguments_overwritten_after_dispatch_leave_the_handle_alone(
    backend: str, layout: dict[str, Any], begun: bool
) -> None:
    weighted = layout["layout"] != "compact"

    def work(rank: int) -> None:
        buffer = cluster.buffers[rank]
        x, idx, weights = inputs(rank, 7)
        recv = buffer.dispatch(x, idx, weights, **layout)
        want = buffer.combine(recv.x, recv.handle, weighted=weighted)
        given = x.clone(), idx.clone(), weights.clone()
        if begun:
            recv = buffer.dispatch(*given, wait=False, **layout).wait()
        else:
            recv = buffer.dispatch(*given, **layout)
        given[0].fill_(7)
        given[1].copy_((idx + 3) % 6)  # other ranks
        given[2].fill_(7)
        same_bits(recv.handle.topk_idx, idx)
        same_bits(buffer.combine(recv.x, recv.handle, weighted=weighted), want)
        given = x.clone(), idx.clone(), weights.clone()
        again = buffer.dispatch(given[0], topk_weights=given[2], handle=recv.handle)
        given[2].fill_(7)
        same_bits(buffer.combine(again.x, again.handle, weighted=weighted), want)

    with Cluster(1, 2) as cluster:
        cluster.make_buffers(backend=backend, **SHAPE)
        cluster.run(work)


# ---- not ours ----


def codes(cluster: Cluster, work: Callable[[int], Any]) -> list[str]:
    """Codes of what every rank raised; "ok" where nothing was."""
    found = []
    for result in cluster.run_catching(work):
        if isinstance(result, BaseException) and not isinstance(result, EPError):
            raise result
        found.append(result.code if isinstance(result, EPError) else "ok")
    return found


def test_a17_handle_of_another_buffer_is_refused_on_every_rank(two: Cluster) -> None:
    with Cluster(1, 2) as others:
        others.make_buffers(**SHAPE)
        foreign = others.run(lambda r: others.buffers[r].dispatch(*inputs(r, 1)))
        own = two.run(lambda r: two.buffers[r].dispatch(*inputs(r, 1)))

        def combine(rank: int) -> Any:
            handle = foreign[1].handle if rank == 1 else own[0].handle
            return two.buffers[rank].combine(own[rank].x, handle)

        def cached(rank: int) -> Any:
            handle = foreign[1].handle if rank == 1 else own[0].handle
            return two.buffers[rank].dispatch(inputs(rank, 1)[0], handle=handle)

        for work in (combine, cached):
            mine, theirs = two.run_catching(work)
            assert isinstance(mine, EPError)
            assert isinstance(theirs, EPError)
            assert (mine.code, theirs.code) == ("E320", "E320")
            assert mine.peer == 1
            assert "rank 1" in str(mine)
            assert "generation" in str(theirs)
    two.run(lambda r: two.buffers[r].combine(own[r].x, own[r].handle))


def test_a17_handle_of_a_closed_and_rebuilt_buffer_is_refused() -> None:
    with Cluster(1, 2) as cluster:
        first = cluster.make_buffers(**SHAPE)
        old = cluster.run(lambda r: first[r].dispatch(*inputs(r, 2)))
        cluster.close()
        second = cluster.make_buffers(**SHAPE)
        assert codes(cluster, lambda r: second[r].combine(old[r].x, old[r].handle)) == ["E320"] * 2
        cluster.run(lambda r: second[r].dispatch(*inputs(r, 2)))


def test_handles_of_different_dispatches_are_e220_and_the_buffer_lives(two: Cluster) -> None:
    received = two.run(lambda r: [two.buffers[r].dispatch(*inputs(r, 3)) for _ in range(2)])
    for verb in ("combine", "dispatch"):

        def work(rank: int, verb: str = verb) -> Any:
            recv = received[rank][rank]  # rank 0 the first, rank 1 the second
            if verb == "combine":
                return two.buffers[rank].combine(recv.x, recv.handle)
            return two.buffers[rank].dispatch(inputs(rank, 3)[0], handle=recv.handle)

        errors = two.run_catching(work)
        assert [e.code for e in errors] == ["E220", "E220"]  # type: ignore[union-attr]
        assert "routing" in str(errors[0])
    for i in (1, 0):
        two.run(lambda r, i=i: two.buffers[r].combine(received[r][i].x, received[r][i].handle))


def _dtype(name: str) -> Callable[[Handle], Any]:
    return lambda h: h._replace(**{name: getattr(h, name).to(torch.float64)})


def _shape(name: str) -> Callable[[Handle], Any]:
    return lambda h: h._replace(**{name: torch.cat([getattr(h, name)] * 2)})


def _meta(index: int, value: int) -> Callable[[Handle], Any]:
    def change(h: Handle) -> Handle:
        meta = h.meta.clone()
        meta[index] = value
        return h._replace(meta=meta)

    return change


def _value(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Handle], Any]:
    return lambda h: h._replace(**{name: change(getattr(h, name).clone())})


def _set(rows: Tensor, row: int) -> Tensor:
    """Another row for the last selection that went anywhere."""
    at = (rows >= 0).nonzero()[-1]
    rows[at[0], at[1]] = row
    return rows


DAMAGE: dict[str, Callable[[Handle], Any]] = {
    "none": lambda h: None,
    "number": lambda h: 7,
    "string": lambda h: "12345678",
    "empty": lambda h: (),
    "short": lambda h: tuple(h)[:-1],
    "long": lambda h: (*h, h.meta),
    "dict": lambda h: dict(enumerate(h)),
    "nones": lambda h: (None,) * 8,
    "lists": lambda h: tuple(t.tolist() for t in h),
    "swapped": lambda h: Handle(h.meta, *h[:0:-1]),
    "strided": lambda h: h._replace(send_row=h.send_row.t().contiguous().t()),
    "other-device": lambda h: h._replace(send_row=h.send_row.to("meta")),
    **{f"dtype-{name}": _dtype(name) for name in Handle._fields},
    **{f"shape-{name}": _shape(name) for name in Handle._fields if name != "recv_row"},
    "magic": _meta(0, 1),
    "generation": _meta(1, 1),
    "layout": _meta(3, 3),
    "negative-layout": _meta(3, -1),
    "alignment-0": _meta(4, 0),
    "alignment-huge": _meta(4, 1 << 40),
    "tokens": _meta(5, 7),
    "unique": _meta(6, 1000),
    "topk": _meta(8, 33),
    "capacity-huge": _meta(9, 1 << 40),
    "weights-flag": _meta(11, 0),
    "ranks": _meta(12, 3),
    "experts": _meta(13, 8),
    "local-experts": _meta(14, 4),
    "hidden": _meta(15, 32),
    "counts-negative": _value("rank_counts", lambda t: t - 100),
    "counts-zeroed": _value("rank_counts", lambda t: t * 0),
    "counts-doubled": _value("rank_counts", lambda t: t * 2),
    "rows-swapped": _value("send_row", lambda t: t[:, [1, 0]]),
    "rows-reversed": _value("send_row", lambda t: t.flip(0)),
    "row-none": _value("send_row", lambda t: _set(t, -1)),
    "row-beyond": _value("send_row", lambda t: _set(t, 2**31 - 1)),
    "experts-negative": _value("num_tokens_per_expert", lambda t: t - 100),
    "experts-huge": _value("num_tokens_per_expert", lambda t: t + 2**30),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a17_damaged_handle_is_e320_everywhere_and_the_next_call_works(
    two: Cluster, damage: Callable[[Handle], Any]
) -> None:
    def work(rank: int) -> list[str]:
        buffer = two.buffers[rank]
        x, idx, weights = inputs(rank, 4)
        recv = buffer.dispatch(x, idx, weights)
        handle = damage(recv.handle) if rank == 1 else recv.handle
        out = torch.full((8, 16), -1.0)
        found = []
        for call in (
            lambda: buffer.combine(recv.x, handle, out=out),
            # handle=None is no cached dispatch: then its ids are wrong instead.
            lambda: buffer.dispatch(x, idx[:, :0] if handle is None else None, handle=handle),
        ):
            with pytest.raises(EPError) as caught:
                call()
            found.append(caught.value.code)
            assert caught.value.scope == "call"
            assert rank == 1 or caught.value.peer == 1
        assert (out == -1).all()
        got = buffer.combine(recv.x, recv.handle, out=out)
        assert torch.equal(got, x * owners_chosen(idx))
        return found

    results = two.run(work)
    assert results[0] == results[1]
    assert results[0][0] == "E320"
    assert results[0][1] in ("E320", "E210")


# ---- values changed in ways no check can see: any EPError or any numbers, nothing else ----


def test_changed_values_never_write_outside() -> None:
    """In a process of its own, which may crash alone."""
    finished = ranks.run(_fuzz_values, 1, 150, limit_s=250)
    assert finished == [150]


ODD = [-1, 0, 1, 2, 5, 7, 40, 2**31 - 1, -(2**31), 1000, 3]


def _fuzz_values(me: Any, rounds: int) -> int:
    shape = {**SHAPE, "config": PATIENT, "arena_bytes": 1 << 20}  # no change waits for a clock
    cluster = Cluster(1, 2)
    cluster.make_buffers(**shape)
    for seed in range(rounds):
        outcomes = cluster.run(lambda rank, s=seed: _use_changed(cluster, rank, s))
        if any(o.startswith(("E1", "E24", "E33")) for o in outcomes):  # that communicator is done
            cluster.close()
            cluster.make_buffers(**shape)
    cluster.close()
    return rounds


def _use_changed(cluster: Cluster, rank: int, seed: int) -> str:
    buffer = cluster.buffers[rank]
    both = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, 1 << 30, (4,), generator=both).tolist()
    layout, field = LAYOUTS[pick[0] % 3], Handle._fields[1 + pick[1] % 7]
    changes = pick[2] % 2 == 0 or rank == pick[3] % 2
    x, idx, weights = inputs(rank, seed)
    guards = [buffer.empty((1024,), torch.int32).fill_(0x55AA)]
    recv = buffer.dispatch(x, idx, weights, **layout)
    guards.append(buffer.empty((1024,), torch.int32).fill_(0x55AA))
    kept, handle = recv.x.clone(), recv.handle
    if changes:
        handle = handle._replace(**{field: _changed(getattr(handle, field), 2 * seed + rank)})
    out = torch.full((10, 16), 3.0)
    try:
        if seed % 2:
            buffer.dispatch(x, handle=handle, topk_weights=weights)
        else:
            weighted, back = recv.layout != "compact", recv.topk_weights
            buffer.combine(recv.x, handle, weighted=weighted, topk_weights=back, out=out[1:9])
        outcome = "ok"
    except EPError as error:
        outcome = error.code
    compare.same_bits(recv.x, kept)  # a slab's unused rows may hold NaN
    assert all((guard == 0x55AA).all() for guard in guards)
    assert (out[[0, 9]] == 3).all()
    return outcome


def _changed(tensor: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    flat = tensor.clone().view(-1)
    for _ in range(min(3, flat.numel())):
        at, value = torch.randint(0, 1 << 30, (2,), generator=g).tolist()
        flat[at % flat.numel()] = ODD[value % len(ODD)]
    return flat.view(tensor.shape)
