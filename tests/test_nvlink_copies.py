"""Dispatch by copy engine on GPUs: the same rows at the same places, no SM held meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import test_nvlink_gpus as gpus
import test_nvlink_loopback as loopback
import torch
from compare import same_bits, same_values
from test_nvlink_loopback import Case, check_received, make_cluster, of_rank, on_gpu, on_streams

from ep_comm import Received, reference
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu
__all__ = ["make_cluster"]

CASES = {
    name: loopback.CASES[name]
    for name in ("one-rank", "ep2", "ep4", "ep8", "top-32-of-64", "int32-ids", "no-weights",
                 "nobody-sends", "all-minus-one", "all-to-one-expert", "map-of-experts",
                 "fp8-scales", "row-of-64-kib", "row-index", "origins")
}  # fmt: skip
# So many tokens that they are counted, packed and copied in several pieces.
CASES["pieces"] = Case(num_ranks=2, num_topk=2, tokens=(3000, 2999))


@pytest.mark.parametrize("wait", [True, False], ids=["waited", "begun"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_are_those_of_the_reference(
    make_cluster: Callable[..., Cluster], case: Case, wait: bool
) -> None:
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    cluster = make_cluster(case.num_ranks, **case.buffer_options())
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    weights, scales = on_gpu(inputs.topk_weights), on_gpu(inputs.scales)

    def dispatch(rank: int, ids: Any, **options: Any) -> Received:
        done = cluster.buffers[rank].dispatch(
            x[rank], ids, of_rank(weights, rank), scales=of_rank(scales, rank), wait=wait,
            transfer="copy_engine", **options,
        )  # fmt: skip
        recv: Received = done if wait else done.wait()
        return recv

    got = on_streams(cluster, lambda r: dispatch(r, idx[r], **case.options))
    again = on_streams(cluster, lambda r: dispatch(r, None, handle=got[r].handle))
    for rank in range(case.num_ranks):
        check_received(got[rank], want[rank], computed=False)
        same_bits(again[rank].x, got[rank].x, "x of the cached call")
    if case.dtype.itemsize > 1:
        out = on_streams(cluster, lambda r: cluster.buffers[r].combine(got[r].x, got[r].handle))
        sums = reference.combine(
            [w.x for w in want], [w.handle for w in want], expert_map=case.expert_map
        )
        for rank in range(case.num_ranks):
            same_values(out[rank].cpu(), sums[rank])


def test_without_room_to_pack_rows_are_pushed(make_cluster: Callable[..., Cluster]) -> None:
    """The worst case of what arrives fills the arena, whatever really arrives."""
    case = Case(num_ranks=2, tokens=(40, 40), weights=False)
    options = {**case.buffer_options(), "arena_bytes": 2 << 20}
    cluster = make_cluster(2, **options)
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    held = []
    for buffer in cluster.buffers:  # all but what one dispatch needs
        free = buffer.stats()["arena"]["largest_free"]
        held.append(buffer.empty((free - (80 * 512 + 2 * 4096 + 80 * 64),), torch.uint8))
    got = on_streams(
        cluster, lambda r: cluster.buffers[r].dispatch(x[r], idx[r], transfer="copy_engine")
    )
    for rank in range(2):
        check_received(got[rank], want[rank], computed=False)


def test_calls_that_cannot_be_copied_are_refused(make_cluster: Callable[..., Cluster]) -> None:
    case = Case(num_ranks=2)
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    x, idx = on_gpu(inputs.x), on_gpu(inputs.topk_idx)
    for options in ({"sync": False}, {"layout": "grouped"}, {"quantize": "fp8"}):

        def dispatch(rank: int, options: dict[str, Any] = options) -> Any:
            with pytest.raises(EPError, match=r"E203.*copy_engine"):
                cluster.buffers[rank].dispatch(
                    x[rank], idx[rank], transfer="copy_engine", **options
                )

        on_streams(cluster, dispatch)


def test_what_is_packed_for_a_call_that_fails_goes_nowhere(
    make_cluster: Callable[..., Cluster],
) -> None:
    """Rows are packed before the host knows whether the call is good."""
    case = CASES["pieces"]
    cluster = make_cluster(2, **case.buffer_options())
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    x, idx, weights = on_gpu(inputs.x), on_gpu(inputs.topk_idx), on_gpu(inputs.topk_weights)
    bad = idx[1].clone()
    bad[1234, 1] = case.num_experts

    def dispatch(rank: int, ids: list[Any]) -> Received:
        return cluster.buffers[rank].dispatch(
            x[rank], ids[rank], of_rank(weights, rank), transfer="copy_engine"
        )

    def fail(rank: int) -> EPError:
        with pytest.raises(EPError, match="E213") as caught:
            dispatch(rank, [idx[0], bad])
        return caught.value

    for _ in range(2):
        assert [error.peer for error in on_streams(cluster, fail)] == [1, 1]
        got = on_streams(cluster, lambda r: dispatch(r, idx))
        for rank in range(2):
            check_received(got[rank], want[rank], computed=False)


def between_gpus(me: ranks.Me) -> None:
    case = dataclasses.replace(CASES["pieces"], num_ranks=me.size)
    buffer = gpus.buffer_of(me, case)
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    x, idx, weights = (
        part[me.rank].cuda() for part in (inputs.x, inputs.topk_idx, inputs.topk_weights)
    )
    for n in range(20):  # among calls that push by SMs
        transfer = "copy_engine" if n % 3 else "sm"
        recv = buffer.dispatch(x, idx, weights, transfer=transfer)
        check_received(recv, want[me.rank], computed=False)
    buffer.check()


def test_processes_copy_to_each_other() -> None:
    ranks.run(between_gpus, 2)
