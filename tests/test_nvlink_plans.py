"""Calls that look like an earlier one: the same results unchecked, and the same refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import same_bits, same_values
from test_nvlink_loopback import (
    CASES,
    Case,
    check_received,
    dispatch_options,
    make_cluster,
    of_rank,
    on_gpu,
    on_streams,
    received_on_cpu,
    want_dispatch,
)

import ep_comm.buffer
from ep_comm import _core, reference
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _core.BUILD["cuda"] == "" or not _core.has_plans(),
        reason="torch has no Tensor.__dlpack_c_exchange_api__",
    ),
]
__all__ = ["make_cluster"]

ROUNDS = 3
ALIKE = (
    "one-rank", "ep2", "ep4", "no-weights", "nobody-sends", "fp32", "fp8-scales", "static",
    "static-capacity", "row-index", "static-row-index", "grouped", "grouped-static", "slab",
    "slab-static", "slab-scales", "origins", "origins-grouped-static", "quantize", "quantize-slab",
)  # fmt: skip


def later(case: Case, turn: int) -> Case:
    """Another routing, with other numbers of tokens within the same bounds."""
    tokens = case.num_tokens()
    return dataclasses.replace(
        case, seed=case.seed + turn, tokens=(*tokens[turn % len(tokens) :], *tokens)[: len(tokens)]
    )


class Calls:
    """The calls of a training or decode step, over and over."""

    def __init__(self, cluster: Cluster, case: Case) -> None:
        self.cluster, self.case = cluster, case
        self.per_rank = case.options.get("layout") in ("grouped", "slab") and case.weights

    def make(self, case: Case) -> None:
        inputs = case.inputs()
        want = want_dispatch(case, inputs)
        x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
        weights, scales = on_gpu(inputs.topk_weights), on_gpu(inputs.scales)
        assert x is not None
        assert idx is not None
        buffers = self.cluster.buffers
        got = on_streams(
            self.cluster,
            lambda r: buffers[r].dispatch(
                x[r], idx[r], of_rank(weights, r), scales=of_rank(scales, r),
                **dispatch_options(case),
            ),
        )  # fmt: skip
        for r in range(case.num_ranks):
            check_received(got[r], want[r], computed="quantize" in case.options)
        keep = ("quantize", "scale_block")
        cached = {k: v for k, v in case.options.items() if k in keep}
        again = on_streams(
            self.cluster,
            lambda r: buffers[r].dispatch(
                x[r], None, of_rank(weights, r), scales=of_rank(scales, r), handle=got[r].handle,
                **cached,
            ),
        )  # fmt: skip
        for r in range(case.num_ranks):
            counts = got[r].num_tokens_per_expert
            same_bits(again[r].num_tokens_per_expert.cpu(), counts.cpu(), "counts")
            if case.options.get("layout", "compact") == "compact":
                n = int(got[r].num_recv)
                first, second = received_on_cpu(got[r]), received_on_cpu(again[r])
                same_bits(second.x[:n], first.x[:n], "x of the cached call")
        if case.dtype.itemsize == 1:
            return
        g = torch.Generator().manual_seed(case.seed)
        y = [torch.randn(w.x.shape, generator=g).to(case.dtype) for w in want]
        on_device = on_gpu(y)
        assert on_device is not None
        sums = reference.combine(y, [w.handle for w in want], expert_map=case.expert_map)
        for handles in ([g.handle for g in got], [a.handle for a in again]):
            out = on_streams(
                self.cluster, lambda r, hs=handles: buffers[r].combine(on_device[r], hs[r])
            )
            for r in range(case.num_ranks):
                same_values(out[r].cpu(), sums[r], f"combine of rank {r}")


@pytest.mark.parametrize("name", ALIKE)
def test_calls_alike_give_what_the_reference_gives(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    cluster = make_cluster(case.num_ranks, **case.buffer_options())
    calls = Calls(cluster, case)
    calls.make(case)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a call like an earlier one was checked again")

    monkeypatch.setattr(ep_comm.buffer, "check_dispatch", refuse)
    monkeypatch.setattr(ep_comm.buffer, "check_combine", refuse)
    for turn in range(1, ROUNDS):
        calls.make(later(case, turn))
    for buffer in cluster.buffers:
        buffer.check()


def test_what_does_not_fit_is_refused_as_ever(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=1, tokens=(33,), options={"layout": "slab", "sync": False})
    buffer = make_cluster(1, **case.buffer_options()).buffers[0]
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    assert inputs.topk_weights is not None
    weights = inputs.topk_weights[0].cuda()
    options = dispatch_options(case)
    recv = buffer.dispatch(x, idx, weights, **options)
    y = torch.zeros_like(recv.x)
    for num_sms in (None, 1):
        buffer.dispatch(x, idx, weights, num_sms=num_sms, **options)
        buffer.combine(y, recv.handle, num_sms=num_sms)
    counts, waits = torch.zeros(case.num_experts).int().cuda(), torch.zeros(1).long().cuda()
    buffer.dispatch(x, idx, weights, recv_stats=counts, wait_stats=waits, **options)
    wide = torch.zeros((33, 2 * case.hidden), dtype=x.dtype).cuda()
    many = torch.zeros((34, case.hidden), dtype=x.dtype).cuda()
    dispatches: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("E200", (x.to(torch.float64), idx, weights), {}),
        ("E200", (x, idx.to(torch.int16), weights), {}),
        ("E201", (x, idx[:-1], weights), {}),
        ("E201", (x, idx, weights[:-1]), {}),
        ("E201", (x[:, :-8], idx, weights), {}),
        ("E202", (wide[:, ::2], idx, weights), {}),
        ("E202", (wide.view(-1)[4 : 4 + x.numel()].view(x.shape), idx, weights), {}),
        ("E203", (x, idx, weights), {"num_sms": True}),
        ("E203", (x, idx, weights), {"alignment": 1.0}),
        ("E230", (many, idx, weights), {}),
        ("E200", (x, idx, weights), {"recv_stats": counts.long(), "wait_stats": waits}),
        ("E201", (x, idx, weights), {"recv_stats": counts[1:], "wait_stats": waits}),
        ("E202", (x, idx, weights), {"recv_stats": counts, "wait_stats": waits.cpu()}),
    ]
    for code, args, changed in dispatches:
        with pytest.raises(EPError) as raised:
            buffer.dispatch(*args, **{**options, **changed})
        assert raised.value.code == code, (code, raised.value)
    combines: list[tuple[str, Any, dict[str, Any]]] = [
        ("E200", y.to(torch.float64), {}),
        ("E201", y[:, :-1], {}),
        ("E202", y.transpose(0, 1).contiguous().transpose(0, 1), {}),
        ("E203", y, {"num_sms": True}),
    ]
    for code, bad, changed in combines:
        with pytest.raises(EPError) as raised:
            buffer.combine(bad, recv.handle, **changed)
        assert raised.value.code == code, (code, raised.value)
    again = buffer.dispatch(x, idx, weights, **options)
    torch.cuda.synchronize()
    same_bits(again.num_tokens_per_expert.cpu(), recv.num_tokens_per_expert.cpu(), "counts")


def test_sizes_are_not_waited_for_in_a_capture(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=1, tokens=(9,))
    buffer = make_cluster(1, **case.buffer_options()).buffers[0]
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    buffer.dispatch(x, idx)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(EPError) as raised:
        buffer.dispatch(x, idx)
    assert raised.value.code == "E203"


def test_handles_of_another_buffer_are_refused(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=1, tokens=(9,), options={"sync": False})
    first = make_cluster(1, **case.buffer_options()).buffers[0]
    second = make_cluster(1, **case.buffer_options()).buffers[0]
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    received = [b.dispatch(x, idx, sync=False) for b in (first, second) for _ in range(2)]
    for buffer, recv in zip((first, first, second, second), received, strict=True):
        buffer.combine(recv.x, recv.handle)
    with pytest.raises(EPError) as raised:
        second.combine(received[1].x, received[1].handle)
    assert raised.value.code == "E320"


def test_fields_that_nobody_reads_keep_no_memory(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=1, tokens=(40,), options={"sync": False})
    buffer = make_cluster(1, **case.buffer_options()).buffers[0]
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    for _ in range(4):
        recv = buffer.dispatch(x, idx, sync=False)
    handle, rows = recv.handle, recv.x.numel() * recv.x.itemsize
    torch.cuda.synchronize()
    before = buffer.stats()["arena"]["in_use"]
    del recv
    buffer.empty((16,), torch.uint8)  # a grant takes back what has died
    assert buffer.stats()["arena"]["in_use"] <= before - rows
    assert handle.recv_src.shape == (40, 2)  # and what the handle needs is still there
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = buffer.dispatch(x, idx, sync=False).no_such_field  # type: ignore[attr-defined]
    torch.cuda.synchronize()
