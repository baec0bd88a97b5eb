"""Ranks on several nodes, as far as no GPU is needed: who stands where, which backend that makes,
sums by nodes, and what a handle keeps of tokens that crossed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import same_received, same_values
from test_nvlink_loopback import Case, want_dispatch

from ep_comm import _core, reference
from ep_comm.backends.choose import choose
from ep_comm.backends.nodes import Nodes, find_nodes, kind_of_rails
from ep_comm.bootstrap import Group, Hello
from ep_comm.errors import EPError
from ep_comm.handle import HandleMeta, parse_handle
from ep_comm.testing import Cluster

SHAPES = [(2, 1), (3, 1), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2)]


def hellos(hosts: str, pids: str = "") -> list[Hello]:
    """A letter for the host of each rank, and one for its process there."""
    pids = pids or "abcdefghijklmnopqrstuvwxyz"[: len(hosts)]
    return [
        Hello(rank=r, boot_id=h.encode() * 16, pid=ord(p), device="cuda")
        for r, (h, p) in enumerate(zip(hosts, pids, strict=True))
    ]


@pytest.mark.parametrize(
    ("hosts", "asked", "found"),
    [
        ("aabb", None, Nodes(2, 2)),
        ("abcd", None, Nodes(4, 1)),
        ("aaaa", None, Nodes(1, 4)),
        ("aaaa", 2, Nodes(2, 2)),
        ("aabb", 1, Nodes(4, 1)),
        ("aab", None, "hosts have [2, 1] ranks, want equally many"),
        ("abab", None, "ranks of a host are not numbered one after the other"),
        ("aaaa", 3, "ranks_per_node=3 does not divide 4 ranks"),
    ],
)
def test_nodes_follow_from_hosts_or_from_what_was_asked(
    hosts: str, asked: int | None, found: Nodes | str
) -> None:
    assert find_nodes(asked, hellos(hosts)) == found


def test_near_ranks_are_those_of_the_node() -> None:
    assert list(Nodes(3, 2).near(3)) == [2, 3]


@pytest.mark.parametrize(
    ("hosts", "pids", "kind"),
    [("aaaa", "xxxx", "loopback"), ("aabb", "xyxy", "nvshmem"), ("aabb", "xxyy", "")],
)
def test_rails_follow_from_processes(hosts: str, pids: str, kind: str) -> None:
    assert kind_of_rails(hellos(hosts, pids)) == kind


def test_ranks_that_share_a_gpu_are_told_by_its_uuid() -> None:
    threads = hellos("aaab", "xxyx")  # no GPU is known: threads share what there is
    assert [h.same_gpu(threads[0]) for h in threads] == [True, True, False, False]
    known = [replace(h, gpu=g) for h, g in zip(threads, (5, 6, 5, 5), strict=True)]
    assert [h.same_gpu(known[0]) for h in known] == [True, False, True, False]


def chosen(monkeypatch: pytest.MonkeyPatch, asked: str, hosts: str, **more: Any) -> tuple[str, str]:
    build = {"cuda": "13.0", "cuda_missing": None, "nvshmem_missing": None, **more.pop("build", {})}
    monkeypatch.setattr(_core, "BUILD", {**_core.BUILD, **build})
    pids, per_node = more.pop("pids", ""), more.pop("ranks_per_node", None)
    group = Group(torch.distributed.HashStore(), 0, len(hosts), tuple(range(len(hosts))))
    return choose(asked, more.pop("device", "cuda"), group, hellos(hosts, pids), per_node)


def test_several_hosts_get_the_hybrid_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto", "aabb") == ("hybrid", "CUDA tensors, ranks on several hosts")
    assert chosen(monkeypatch, "auto", "aaaa")[0] == "nvlink"
    assert chosen(monkeypatch, "hybrid", "aaaa", ranks_per_node=2)[0] == "hybrid"
    name, why = chosen(monkeypatch, "auto", "aab")
    assert name == "collective"
    assert "want equally many" in why
    name, why = chosen(monkeypatch, "auto", "aabb", build={"nvshmem_missing": "not found"})
    assert name == "collective"
    assert "no NVSHMEM (not found)" in why


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "all ranks are on one node"),
        ({"ranks_per_node": 3}, "does not divide"),
        ({"ranks_per_node": 2, "device": "cpu"}, "tensors are on cpu"),
        ({"ranks_per_node": 2, "pids": "xxyy"}, "some ranks share a process"),
        ({"ranks_per_node": 2, "build": {"cuda": "", "cuda_missing": "no nvcc"}}, "no nvcc"),
        ({"ranks_per_node": 2, "build": {"nvshmem_missing": "not found"}}, "not found"),
    ],
)
def test_a_hybrid_backend_that_cannot_be_had_says_why(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], why: str
) -> None:
    with pytest.raises(EPError, match=why) as raised:
        chosen(monkeypatch, "hybrid", "aaaa", **more)
    assert raised.value.code == "E404"


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), SHAPES)
def test_clusters_on_threads_agree_with_the_reference(num_nodes: int, ranks_per_node: int) -> None:
    num_ranks = num_nodes * ranks_per_node
    case = Case(num_ranks=num_ranks, num_experts=2 * num_ranks + 1, hidden=64)
    inputs, want = case.inputs(), want_dispatch(case, case.inputs())
    assert inputs.topk_weights is not None
    weights = inputs.topk_weights
    options = {**case.buffer_options(), "num_sms": None, "arena_bytes": 4 << 20}
    with Cluster(num_nodes, ranks_per_node, device="cpu") as cluster:
        buffers = cluster.make_buffers(**options)
        got = cluster.run(
            lambda r: buffers[r].dispatch(inputs.x[r], inputs.topk_idx[r], weights[r])
        )
        sums = cluster.run(lambda r: buffers[r].combine(got[r].x, got[r].handle))
    expected = reference.combine([w.x for w in want], [w.handle for w in want])
    for rank in range(num_ranks):
        meta = want[rank].handle.meta.clone()
        meta[1:3] = got[rank].handle.meta[1:3]
        handle = want[rank].handle._replace(meta=meta)
        same_received(got[rank], replace(want[rank], handle=handle))
        same_values(sums[rank], expected[rank])


@pytest.mark.parametrize("layout", ["compact", "grouped"])
def test_other_nodes_round_their_sums(layout: str) -> None:
    """Token by token: rows of the own node one by one, of another node as one rounded sum."""
    case = Case(num_ranks=6, num_experts=12, hidden=8, options={"layout": layout})
    want = want_dispatch(case, case.inputs())
    handles = [w.handle for w in want]
    y = [torch.randn(w.x.shape).bfloat16() for w in want]
    weighted = layout == "grouped"
    bias = [torch.randn(t, 8).bfloat16() for t in case.num_tokens()]
    got = reference.combine(y, handles, weighted=weighted, bias=bias, ranks_per_node=2)
    for rank, handle in enumerate(handles):
        for t in range(handle.topk_idx.shape[0]):
            total = bias[rank][t].float()
            for node in range(3):
                part, visited = torch.zeros(8), False
                for owner in (2 * node, 2 * node + 1):
                    seen: set[int] = set()
                    for k, expert in enumerate(handle.topk_idx[t].tolist()):
                        row = int(handle.send_row[t, k])
                        if row < 0 or expert // 2 != owner or (layout == "compact" and seen):
                            continue
                        seen.add(row)
                        value = y[owner][row].float()
                        value = handle.topk_weights[t, k] * value if weighted else value
                        if node == rank // 2:
                            total = total + value
                        else:
                            part, visited = part + value, True
                if visited:
                    total = total + part.bfloat16().float()
            same_values(got[rank][t], total.bfloat16())


@pytest.mark.parametrize("layout", ["compact", "grouped"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_handle_holds_what_crossed_behind_its_rows(layout: str, weights: bool) -> None:
    case = Case(weights=weights, options={"layout": layout})
    handle = want_dispatch(case, case.inputs())[0].handle
    meta = HandleMeta.unpack(handle.meta)
    words = 3 if weights else 2
    assert (meta.log_words, meta.recv_rows) == (words, handle.recv_row.shape[0])

    def with_log(rows: int, columns: int = case.num_topk, dtype: torch.dtype = torch.int32) -> Any:
        log = torch.zeros(rows, columns, dtype=dtype)
        if columns != case.num_topk or dtype != torch.int32:
            return handle._replace(recv_row=log)
        return handle._replace(recv_row=torch.cat((handle.recv_row, log)))

    parsed, _ = parse_handle(with_log(5 * words))
    assert parsed.recv_row.shape[0] == meta.recv_rows + 5 * words
    for damaged in (
        with_log(5 * words + 1),
        with_log(words, 1),
        with_log(words, dtype=torch.int64),
    ):
        with pytest.raises(EPError) as raised:
            parse_handle(damaged)
        assert raised.value.code == "E320"
