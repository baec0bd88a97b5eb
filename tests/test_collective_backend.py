"""The collective backend against the reference, and how it fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from patience import LONGER_S, three_tries, until, within
from test_buffer_properties import Call, Pair, World, bounded, calls, worlds
from torch import Tensor

from ep_comm import Buffer, EPConfig, EPError, Handle, Received, reference
from ep_comm.backends.wire import _Peers
from ep_comm.bootstrap import Hello
from ep_comm.testing import Cluster, run_processes

NUM_RANKS = 3
HIDDEN = 128
MAX_TOKENS = 9


# ---- results: one spawn of three processes goes through all cases ----


@dataclass(frozen=True)
class Case:
    """A dispatch with these options, then everything that can be done with its handle."""

    num_experts: int = 7
    num_topk: int = 3
    dtype: torch.dtype = torch.bfloat16
    idx_dtype: torch.dtype = torch.int64
    tokens: tuple[int, ...] = (9, 4, 6)
    ids: str = "random"
    weights: bool = True
    expert_map: tuple[int, ...] | None = None
    hidden: int = HIDDEN
    options: dict[str, Any] = field(default_factory=dict)
    scales: torch.dtype | None = None

    def inputs(self) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor] | None]:
        """Of all ranks, the same on every rank."""
        g = torch.Generator().manual_seed(self.num_experts * 100 + self.num_topk)
        x, idx, weights, scales = [], [], [], []
        for num_tokens in self.tokens:
            x.append(rows_of(self.dtype, (num_tokens, self.hidden), g))
            shape = (num_tokens, self.num_topk)
            ids = torch.randint(-1, self.num_experts, shape, generator=g)  # with duplicates
            if self.ids == "none":
                ids.fill_(-1)
            if self.ids == "one":
                ids.fill_(self.num_experts - 1)
            idx.append(ids.to(self.idx_dtype))
            weights.append(torch.randn(shape, generator=g))
            if self.scales is not None:
                words = self.hidden // (128 if self.scales == torch.float32 else 512)
                bits = torch.randint(-(2**31), 2**31, (num_tokens, words), generator=g)
                scales.append(bits.to(torch.int32).view(self.scales))
        return x, idx, weights if self.weights else None, scales or None


def rows_of(dtype: torch.dtype, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    if dtype.itemsize == 1:
        return torch.randint(0, 120, shape, generator=g, dtype=torch.uint8).view(dtype)
    rows = torch.randn(shape, generator=g) * torch.randn((*shape[:-1], 1), generator=g).exp()
    if rows.numel() > 8:
        rows.flatten()[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return rows.to(dtype)


STATIC = {"sync": False}
CASES = {
    "compact": Case(),
    "compact-int32-fp32": Case(idx_dtype=torch.int32, dtype=torch.float32, weights=False),
    "compact-fp16-hidden-8": Case(dtype=torch.float16, hidden=8),
    "compact-row-index": Case(options={"row_index": True, "alignment": 4}),
    "compact-static": Case(options=STATIC),
    "compact-static-capacity": Case(options={**STATIC, "capacity": 20}),
    "compact-static-row-index": Case(options={**STATIC, "row_index": True, "alignment": 2}),
    "compact-top1-of-2": Case(num_experts=2, num_topk=1),
    "compact-top32": Case(num_experts=40, num_topk=32),
    "compact-map": Case(expert_map=(2, 0, 2, 2, 0, 2, 2)),
    "compact-none": Case(ids="none"),
    "compact-zero-tokens": Case(tokens=(0, 0, 0)),
    "compact-zero-on-two": Case(tokens=(0, 9, 0)),
    "compact-int8": Case(dtype=torch.int8, weights=False),
    "compact-e4m3-scales": Case(dtype=torch.float8_e4m3fn, scales=torch.float32),
    "compact-e5m2-ue8m0": Case(dtype=torch.float8_e5m2, scales=torch.int32, hidden=512),
    "compact-quantize": Case(options={"quantize": "fp8"}),
    "compact-quantize-32": Case(
        dtype=torch.float32, options={"quantize": "fp8", "scale_block": 32}
    ),
    "grouped": Case(options={"layout": "grouped"}),
    "grouped-aligned": Case(options={"layout": "grouped", "alignment": 8}),
    "grouped-one": Case(ids="one", options={"layout": "grouped"}),
    "grouped-static": Case(options={"layout": "grouped", **STATIC, "alignment": 2}),
    "grouped-quantize": Case(options={"layout": "grouped", "quantize": "fp8", "alignment": 4}),
    "grouped-few-experts": Case(num_experts=2, options={"layout": "grouped", "alignment": 4}),
    "slab": Case(options={"layout": "slab"}),
    "slab-static-capacity": Case(options={"layout": "slab", "capacity": 22, **STATIC}),
    "slab-ue8m0": Case(options={"layout": "slab", "quantize": "fp8_ue8m0"}, hidden=512),
    "slab-map": Case(
        options={"layout": "slab", "quantize": "fp8"}, expert_map=(1, 1, 0, 1, 1, 1, 1), hidden=256
    ),
}


def check_all_cases(rank: int, num_ranks: int) -> dict[str, list[str]]:
    return {name: check_case(case, rank, num_ranks) for name, case in CASES.items()}


def check_case(
    case: Case, rank: int, num_ranks: int, group: Any = None, device: str = "cpu"
) -> list[str]:
    """What differs on this rank, over every operation there is."""
    x, idx, weights, scales = (t and [one.to(device) for one in t] for t in case.inputs())
    assert x is not None
    assert idx is not None
    wrong: list[str] = []
    placed: dict[str, Any] = {"expert_map": case.expert_map}
    with Buffer(
        group, num_experts=case.num_experts, num_topk=case.num_topk, hidden=case.hidden,
        max_tokens=MAX_TOKENS, expert_map=case.expert_map, backend="collective", device=device,
    ) as buffer:  # fmt: skip
        want = reference.dispatch(
            x, idx, weights, num_experts=case.num_experts, max_tokens=MAX_TOKENS, scales=scales,
            generation=buffer._backend.generation, routing_number=1, **placed, **case.options,
        )  # fmt: skip
        got = buffer.dispatch(
            x[rank], idx[rank], weights and weights[rank], scales=scales and scales[rank],
            **case.options,
        )  # fmt: skip
        wrong += [f"dispatch {w}" for w in differences(got, want[rank])]

        handles = [w.handle for w in want]
        cached = buffer.dispatch(
            x[rank], handle=list(got.handle), topk_weights=weights and weights[rank]
        )
        want_cached = reference.dispatch(
            x,
            None,
            weights,
            handles=handles,
            num_experts=case.num_experts,
            max_tokens=MAX_TOKENS,
            **placed,
        )
        wrong += [f"cached {w}" for w in differences(cached, want_cached[rank])]

        g = torch.Generator().manual_seed(1)
        y = [rows_of(torch.bfloat16, w.x.shape, g).to(device) for w in want]
        tokens = [rows_of(torch.bfloat16, (t, case.hidden), g).to(device) for t in case.tokens]
        back = [torch.randn(shape_of(w), generator=g).to(device) for w in want]
        weighted = case.weights and got.layout != "compact"
        for name, options in {
            "combine": {},
            "combine weights": {"topk_weights": back},
            "combine bias": {"bias": tokens, "weighted": weighted},
            "combine two biases": {"bias": [(t, t) for t in tokens], "topk_weights": back},
        }.items():
            mine = {k: v[rank] if isinstance(v, list) else v for k, v in options.items()}
            sums = buffer.combine(y[rank], Handle(*got.handle), **mine)
            want_sums = reference.combine(y, handles, **placed, **options)[rank]  # type: ignore[call-overload]
            if isinstance(want_sums, tuple):  # of the reference, the second is a view
                want_sums = (want_sums[0], want_sums[1].contiguous())
            if not same(sums, want_sums):
                wrong.append(name)
        begun = buffer.dispatch(x[rank], handle=got.handle, wait=False)
        if not same(begun.wait().x, want_cached[rank].x):
            wrong.append("begun")
        out = torch.empty_like(tokens[rank])
        if buffer.combine(y[rank], got.handle, out=out).data_ptr() != out.data_ptr():
            wrong.append("combine out")
        if not same(out, reference.combine(y, handles, **placed)[rank]):
            wrong.append("combine out")
    return wrong


def shape_of(received: Received) -> tuple[int, ...]:
    """Of one number per selection."""
    topk = received.handle.topk_idx.shape[1]
    rows = received.x.shape[:-1]
    return (*rows, topk) if received.layout == "compact" else rows


def differences(got: Received, want: Received) -> list[str]:
    wrong = [
        f.name
        for f in fields(Received)
        if f.name != "handle" and not same(getattr(got, f.name), getattr(want, f.name))
    ]
    pairs = zip(Handle._fields, got.handle, want.handle, strict=True)
    wrong += [f"handle.{n}" for n, a, b in pairs if n != "meta" and not same(a, b)]
    mine, theirs = got.handle.meta.tolist(), want.handle.meta.tolist()
    return wrong + [f"meta[{i}]" for i in range(16) if mine[i] != theirs[i]]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, strides included."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, Tensor):
        return bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape) or a.numel() == 0:
        return (a.dtype, a.shape) == (b.dtype, b.shape)
    strides = [(i, j) for i, j, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1]
    if any(i != j for i, j in strides):
        return False
    a, b = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.fixture(scope="module")
def checked() -> list[dict[str, list[str]]]:
    return run_processes(check_all_cases, NUM_RANKS)


@pytest.mark.parametrize("name", CASES)
def test_results_equal_the_reference(name: str, checked: list[dict[str, list[str]]]) -> None:
    assert [rank[name] for rank in checked] == [[]] * NUM_RANKS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_on_a_gpu_pass_through_the_host() -> None:
    for name, case in CASES.items():
        with Cluster(ranks_per_node=NUM_RANKS) as cluster:
            groups = [cluster.group(rank) for rank in range(NUM_RANKS)]
            wrong = cluster.run(
                lambda rank, group: check_case(case, rank, NUM_RANKS, group, "cuda:0"),  # noqa: B023
                groups,
            )
        assert wrong == [[]] * NUM_RANKS, name


class CollectiveCluster(Cluster):
    def make_buffers(self, **options: Any) -> list[Buffer]:
        return super().make_buffers(backend="collective", **options)


@settings(bounded, max_examples=20)
@given(worlds(), calls("plain"))
def test_random_calls_equal_the_reference(world: World, call: Call) -> None:
    multiple = 16 // min(call.dtype.itemsize, call.y_dtype.itemsize)
    if world.hidden % multiple:
        world = World(**{**vars(world), "hidden": world.hidden * 2})
    with CollectiveCluster(1, world.num_ranks) as cluster:
        pair = Pair(world, cluster)
        got, want = pair.dispatch(call, 0)
        if want:
            pair.combine(call, got, want, 20, call.weighted)
            got, want = pair.dispatch_cached(call, got, want, 40)
            weighted = call.weighted and (call.cached_weights or call.weights is not None)
            pair.combine(call, got, want, 60, weighted)


# ---- failures of one call: the same on every rank, and the buffer lives on ----


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(ranks_per_node=NUM_RANKS) as ranks:
        yield ranks


def make(cluster: Cluster, **options: Any) -> list[Buffer]:
    defaults = {"num_experts": 6, "num_topk": 2, "hidden": 16, "max_tokens": 4}
    return cluster.make_buffers(backend="collective", **{**defaults, **options})


def tokens(num_tokens: int = 2, expert: int = 0) -> tuple[Tensor, Tensor]:
    return torch.ones(num_tokens, 16), torch.full((num_tokens, 2), expert)


def errors(cluster: Cluster, work: Any) -> list[EPError]:
    """What `work(rank, buffer)` raises on every rank."""
    caught = cluster.run_catching(work, cluster.buffers, limit_s=30)
    for error in caught:
        assert isinstance(error, EPError), error
    return caught  # type: ignore[return-value]


def check_alive(cluster: Cluster) -> None:
    got = cluster.run(lambda rank, buffer: buffer.dispatch(*tokens()).num_recv, cluster.buffers)
    assert got == [2 * NUM_RANKS, 0, 0]


def test_a10_bad_id_on_one_rank_fails_the_call_everywhere(cluster: Cluster) -> None:
    make(cluster)
    found = errors(cluster, lambda rank, b: b.dispatch(*tokens(2, 6 if rank == 1 else 0), tag="L3"))
    assert [(e.code, e.rank, e.peer, e.seq, e.tag) for e in found] == [
        ("E213", r, 1, 1, "L3") for r in range(NUM_RANKS)
    ]
    assert "got 4 bad ids from rank 1: first token 0, k 0, id 6" in found[0].what
    check_alive(cluster)


def test_refused_call_raises_on_its_peers(cluster: Cluster) -> None:
    make(cluster)
    wrong = [torch.ones(2, 16), torch.ones(2, 8), torch.ones(2, 16)]
    found = errors(cluster, lambda rank, b: b.dispatch(wrong[rank], tokens()[1]))
    assert [e.code for e in found] == ["E201"] * NUM_RANKS
    assert all("rank 1 rejected x: got [2, 8]" in found[r].what for r in (0, 2))
    check_alive(cluster)


def test_a8_capacity_exceeded_on_one_rank_raises_everywhere(cluster: Cluster) -> None:
    make(cluster)
    found = errors(cluster, lambda rank, b: b.dispatch(*tokens(), capacity=5))
    assert [(e.code, e.peer) for e in found] == [("E230", 0)] * NUM_RANKS
    assert "got 6 rows, want <= 5" in found[2].what
    check_alive(cluster)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layout", {"layout": "grouped"}),
        ("alignment", {"alignment": 4}),
        ("capacity", {"capacity": 100}),
        ("flags", {"sync": False}),
        ("flags", {"topk_weights": torch.ones(2, 2)}),
    ],
)
def test_b5_differing_argument_is_named_with_both_values(
    cluster: Cluster, name: str, options: dict[str, Any]
) -> None:
    make(cluster)
    per_rank = [{}, {}, options]
    found = errors(cluster, lambda rank, b: b.dispatch(*tokens(), **per_rank[rank]))
    assert [(e.code, e.peer) for e in found] == [("E220", 2), ("E220", 2), ("E220", 0)]
    assert all(f": {name} " in e.what for e in found)
    check_alive(cluster)


def test_b5_differing_dtype_is_named(cluster: Cluster) -> None:
    make(cluster)
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    found = errors(cluster, lambda rank, b: b.dispatch(tokens()[0].to(dtypes[rank]), tokens()[1]))
    assert "dtype float32 here, bfloat16 there" in found[0].what
    check_alive(cluster)


def test_b6_ranks_out_of_step_are_named_and_the_buffer_ends(cluster: Cluster) -> None:
    make(cluster)

    def work(rank: int, buffer: Buffer) -> None:
        received = buffer.dispatch(*tokens())
        if rank == 2:
            buffer.combine(received.x, received.handle)
        else:
            buffer.dispatch(*tokens())

    found = errors(cluster, work)
    assert [(e.code, e.seq) for e in found] == [("E330", 2)] * NUM_RANKS
    assert "rank 2 in combine #2, rank 0 in dispatch #2" in found[0].what
    again = errors(cluster, lambda rank, b: b.dispatch(*tokens()))
    assert [e.code for e in again] == ["E330"] * NUM_RANKS


def test_a17_edited_handle_is_refused_everywhere(cluster: Cluster) -> None:
    make(cluster)

    def work(rank: int, buffer: Buffer) -> None:
        received = buffer.dispatch(*tokens(), layout="grouped")
        if rank == 0:
            received.handle.recv_row[0, 0] = 10**6
        buffer.combine(received.x, received.handle)

    found = errors(cluster, work)
    assert [e.code for e in found] == ["E320"] * NUM_RANKS
    assert all("recv_row changed" in e.what for e in found)
    check_alive(cluster)


def test_static_call_that_fails_shows_its_code_and_raises_later(cluster: Cluster) -> None:
    make(cluster)
    ids = [0, 0, -7]
    got = cluster.run(
        lambda rank, b: b.dispatch(
            *tokens(2, ids[rank]), layout="grouped", alignment=2, sync=False
        ),
        cluster.buffers,
    )
    want = reference.dispatch(
        [tokens()[0]] * 3, [tokens(2, i)[1] for i in ids], num_experts=6, max_tokens=4,
        layout="grouped", alignment=2, sync=False, routing_number=1,
        generation=cluster.buffers[0]._backend.generation,
    )  # fmt: skip
    assert [differences(g, w) for g, w in zip(got, want, strict=True)] == [[]] * NUM_RANKS
    assert [int(g.status) for g in got] == [213] * NUM_RANKS
    found = errors(cluster, lambda rank, b: b.check())
    assert [e.code for e in found] == ["E213"] * NUM_RANKS
    check_alive(cluster)


# ---- begun operations ----


def test_begun_operations_keep_their_order_in_any_order_of_waiting(cluster: Cluster) -> None:
    make(cluster)

    def work(rank: int, buffer: Buffer) -> list[Tensor]:
        begun = [
            buffer.dispatch(torch.full((2, 16), 10.0 * i + rank), tokens(2, i)[1], wait=False)
            for i in range(3)
        ]
        direct = buffer.dispatch(torch.full((2, 16), 30.0 + rank), tokens(2, 3)[1])
        received = [*[op.wait() for op in reversed(begun)][::-1], direct]
        assert [r.handle.meta[2] for r in received] == [1, 2, 3, 4]
        back = [buffer.combine(r.x, r.handle, wait=False) for r in received]
        return [back[i].wait()[:, 0] for i in (2, 0, 3, 1)]

    for rank, sums in enumerate(cluster.run(work, cluster.buffers)):
        assert [s.tolist() for s in sums] == [[10.0 * i + rank] * 2 for i in (2, 0, 3, 1)]


def test_begun_operation_raises_when_waited_for(cluster: Cluster) -> None:
    make(cluster)

    def work(rank: int, buffer: Buffer) -> None:
        bad = buffer.dispatch(*tokens(2, 9 if rank == 0 else 0), wait=False)
        good = buffer.dispatch(*tokens(), wait=False)
        assert good.wait().num_recv == (6 if rank == 0 else 0)
        bad.wait()

    assert [e.code for e in errors(cluster, work)] == ["E213"] * NUM_RANKS


# ---- failures of the communicator: everybody raises, in bounded time ----


def test_b7_rank_that_never_calls_is_named(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    make(cluster, config=EPConfig(arrival_warn_s=0.2, arrival_s=LONGER_S, progress_s=60.0))
    gave_up = [threading.Event() for _ in range(NUM_RANKS)]

    def work(rank: int, buffer: Buffer) -> None:
        if rank != 1:
            try:
                buffer.dispatch(*tokens())
            finally:
                gave_up[rank].set()
        else:
            assert all(gave_up[r].wait(60) for r in (0, 2))
            raise EPError("was late", code="E101")

    found = errors(cluster, work)
    assert [(e.code, e.peer) for e in found] == [("E101", 1), ("E101", None), ("E101", 1)]
    assert "for rank 1 to enter" in found[0].what
    warned = re.search(r"W101: rank 0 has waited (\S+) s for rank 1 in dispatch", caplog.text)
    assert warned is not None
    assert 0.2 <= float(warned[1]) < LONGER_S
    assert errors(cluster, lambda rank, b: b.dispatch(*tokens()))[1].code in ("E101", "E111")


def test_c11_rank_that_closes_is_named(cluster: Cluster) -> None:
    make(cluster)

    def work(rank: int, buffer: Buffer) -> None:
        if rank == 2:
            time.sleep(0.3)
            buffer.close()
        buffer.dispatch(*tokens())

    found = errors(cluster, work)
    assert [(e.code, e.peer) for e in found[:2]] == [("E111", 2)] * 2
    assert found[2].code == "E340"


def test_c11_close_ends_a_begun_operation_that_waits(cluster: Cluster) -> None:
    make(cluster)
    closed = threading.Event()

    def work(rank: int, buffer: Buffer) -> None:
        if rank == 0:
            begun = buffer.dispatch(*tokens(), wait=False)
            time.sleep(0.2)
            buffer.close()
            closed.set()
            begun.wait()
        else:
            assert closed.wait(60)
            buffer.dispatch(*tokens())

    found = errors(cluster, work)
    assert [(e.code, e.peer) for e in found] == [("E111", 0)] * NUM_RANKS


def test_peers_learn_why_a_rank_refused_that_closed_at_once(cluster: Cluster) -> None:
    make(cluster)
    closed = threading.Event()

    def work(rank: int, buffer: Buffer) -> None:
        if rank == 0:
            try:
                buffer.dispatch(torch.ones(2, 8), tokens()[1])
            finally:
                buffer.close()
                closed.set()
        assert closed.wait(60)
        buffer.dispatch(*tokens())

    found = errors(cluster, work)
    assert [e.code for e in found] == ["E201"] * NUM_RANKS
    assert "rank 0 rejected x" in found[1].what


def test_c6_exception_inside_an_operation_ends_it_for_the_peers(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = make(cluster)

    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(buffers[1]._backend.wire, "_limit", broken)
    caught = cluster.run_catching(lambda rank, b: b.dispatch(*tokens()), buffers, limit_s=30)
    assert isinstance(caught[1], MemoryError)
    assert [(e.code, e.peer) for e in (caught[0], caught[2])] == [("E111", 1)] * 2  # type: ignore[union-attr]


def die(rank: int, num_ranks: int, how: str, folder: str) -> Any:
    progress_s = LONGER_S if how == "stop" else 60.0
    config = EPConfig(arrival_warn_s=0.5, arrival_s=60.0, progress_s=progress_s)
    buffer = Buffer(
        num_experts=6, num_topk=2, hidden=16, max_tokens=4, config=config,
        backend="collective", device="cpu",
    )  # fmt: skip
    buffer.dispatch(*tokens())
    if rank == 1 and how == "kill":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "stop":
        pid = os.getpid()
        if os.fork() == 0:  # wakes us after the others gave up, so that the test can end
            until(lambda: len(os.listdir(folder)) == num_ranks - 1, 100.0)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)
        return None
    start = time.monotonic()
    with pytest.raises(EPError) as caught:
        buffer.dispatch(*tokens())
    took = time.monotonic() - start
    Path(folder, str(rank)).touch()
    return caught.value.code, caught.value.peer, str(caught.value), took


@three_tries
def test_c2_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    results = run_processes(die, NUM_RANKS, "kill", str(tmp_path), may_die=True)
    assert results[1] == -signal.SIGKILL
    for code, peer, text, seconds in (results[0], results[2]):
        assert (code, peer) == ("E110", 1)
        assert "lost rank 1 in dispatch #2: its process ended; it last entered #1" in text
        within(2.0, seconds)


def test_c5_stopped_rank_is_given_up_after_the_progress_clock(tmp_path: Path) -> None:
    results = run_processes(die, NUM_RANKS, "stop", str(tmp_path))
    for code, peer, text, seconds in (results[0], results[2]):
        assert (code, peer) == ("E101", 1)
        assert "alive but stopped" in text
        assert 0.5 * LONGER_S < seconds < 50.0  # not after the arrival clock


def test_a_rank_that_ended_before_it_could_be_watched_is_dead() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    hellos = [
        Hello(rank=r, boot_id=b"h" * 16, pid=p) for r, p in enumerate((os.getpid(), ended.pid))
    ]
    peers = _Peers.of(0, hellos)
    assert peers.dead() == 1
    peers.close()
