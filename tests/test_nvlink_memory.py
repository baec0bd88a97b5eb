"""GPU memory of a buffer: given back and taken again, shared by IPC handles, or not to be had."""

from __future__ import annotations

import gc
import time
import traceback
from typing import Any

import pytest
import ranks
import test_nvlink_gpus as gpus
import test_nvlink_loopback as loopback
import torch
from test_nvlink_loopback import make_cluster

from ep_comm import Buffer, _core
from ep_comm.errors import EPError
from ep_comm.testing import run_processes

pytestmark = pytest.mark.gpu
__all__ = ["make_cluster"]

ARENA = 512 << 20


def works(me: ranks.Me, buffer: Buffer, case: loopback.Case) -> None:
    """A dispatch and a combine, as the reference has them."""
    inputs = case.inputs()
    want = loopback.want_dispatch(case, inputs)
    x, idx, weights = (
        part[me.rank].cuda() for part in (inputs.x, inputs.topk_idx, inputs.topk_weights)
    )
    recv = buffer.dispatch(x, idx, weights)
    loopback.check_received(recv, want[me.rank], computed=False)
    buffer.combine(recv.x, recv.handle)
    buffer.check()


def give_back(me: ranks.Me) -> None:
    try:
        give_back_and_take_again(me)
    except AssertionError as error:  # which one, in a process whose asserts pytest did not rewrite
        raise AssertionError(traceback.format_exc()) from error


def give_back_and_take_again(me: ranks.Me) -> None:
    case = loopback.Case(num_ranks=me.size)
    buffer = gpus.buffer_of(me, case, arena_bytes=ARENA)
    works(me, buffer, case)
    held = buffer.empty((4,), torch.float32) if me.rank == 1 else None
    with pytest.raises(EPError, match=r"E310.* tensors hold"):
        buffer.release()
    works(me, buffer, case)  # nothing happened
    del held
    me.say()
    me.wait_for_go()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        buffer.release()
        buffer.release()  # twice is once
        me.say()
        me.wait_for_go()  # all have
        sharers = me.size // torch.cuda.device_count() or 1
        freed = torch.cuda.mem_get_info()[0] - before
        assert freed >= 0.9 * ARENA * sharers, f"{freed >> 20} MiB of {ARENA >> 20}"
        with pytest.raises(EPError, match=r"E310.*resume"):
            buffer.empty((4,), torch.float32)
        me.say()
        me.wait_for_go()
        buffer.resume()
        works(me, buffer, case)


def test_arena_is_given_back_and_taken_again() -> None:
    with ranks.Ranks(give_back, 2) as processes:
        for _ in range(7):
            processes.hear_all()
            processes.go()
        for result in processes.results(60.0):
            assert result is None, result


def test_arena_of_threads_is_given_back_and_taken_again(make_cluster: Any) -> None:
    case = loopback.Case(num_ranks=2)
    cluster = make_cluster(2, **{**case.buffer_options(), "arena_bytes": ARENA})
    address = cluster.buffers[0].empty((4,), torch.float32).data_ptr()
    before = torch.cuda.mem_get_info()[0]
    cluster.run(lambda r: cluster.buffers[r].release())
    assert torch.cuda.mem_get_info()[0] - before >= 2 * ARENA
    cluster.run(lambda r: cluster.buffers[r].resume())
    assert cluster.buffers[0].empty((4,), torch.float32).data_ptr() == address


def test_memory_of_a_closed_buffer_comes_back_with_its_last_graph(make_cluster: Any) -> None:
    case = loopback.Case(num_ranks=1, tokens=(8,))
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    cluster = make_cluster(1, **{**case.buffer_options(), "arena_bytes": ARENA})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cluster.buffers[0].dispatch(x, idx, sync=False)
    cluster.close()
    gc.collect()  # now only the graph holds it
    before = torch.cuda.mem_get_info()[0]
    del graph
    end = time.monotonic() + 10.0
    while torch.cuda.mem_get_info()[0] - before < 0.9 * ARENA:
        assert time.monotonic() < end
        time.sleep(0.01)


def by_ipc(me: ranks.Me) -> None:
    """As where descriptors of GPU memory are refused."""
    create = _core.DeviceMemory.create
    _core.DeviceMemory.create = lambda device, size: create(device, size, ipc=True)
    case = loopback.Case(num_ranks=me.size)
    buffer = gpus.buffer_of(me, case)
    assert buffer.stats()["memory"] == "ipc"
    works(me, buffer, case)
    buffer.release()  # does nothing: the addresses of such memory change
    buffer.resume()
    works(me, buffer, case)


def test_ipc_handles_serve_where_descriptors_are_refused() -> None:
    ranks.run(by_ipc, 2)


def unmappable(rank: int, num_ranks: int) -> tuple[str, str]:
    """One rank may not map its peer's memory."""

    def refuse(*_: Any) -> Any:
        raise _core.DeviceCallError("cuMemSetAccess", "operation not supported", 801)

    if rank == 1:
        _core.DeviceMemory.map = refuse  # type: ignore[method-assign]
    torch.cuda.set_device(rank % torch.cuda.device_count())
    options = loopback.Case(num_ranks=num_ranks).buffer_options()
    with pytest.raises(EPError, match=r"E405.*needs peer access"):
        Buffer(device="cuda", **{**options, "num_sms": None}, backend="nvlink")
    with Buffer(device="cuda", **{**options, "num_sms": None}) as buffer:
        x = torch.ones(4, 256, device="cuda", dtype=torch.bfloat16)
        recv = buffer.dispatch(x, torch.tensor([[0, 9, -1, -1]] * 4, device="cuda"))
        out = buffer.combine(recv.x, recv.handle)
        assert torch.equal(out, x * 2)
        return buffer.backend, buffer.backend_reason


def test_g2_fallback_is_collective_and_says_why() -> None:
    for backend, reason in run_processes(unmappable, 2):
        assert backend == "collective"
        assert "cuMemSetAccess" in reason


def out_of_memory(me: ranks.Me) -> int:
    """Bytes of the GPU that are gone after a construction that fails."""
    case = loopback.Case(num_ranks=me.size)
    torch.cuda.set_device(me.rank % torch.cuda.device_count())
    torch.zeros(1, device="cuda")  # a context takes some, also of a peer that shares the GPU
    me.say()
    me.wait_for_go()  # all have one
    free = torch.cuda.mem_get_info()[0]
    me.say()
    me.wait_for_go()
    gc.disable()
    with pytest.raises(EPError, match="E232") as raised:
        gpus.buffer_of(me, case, arena_bytes=1 << 45 if me.rank == 0 else ARENA)
    me.say()
    me.wait_for_go()  # all have given back what they had, though the error is kept
    assert raised.value.code == "E232"
    return free - torch.cuda.mem_get_info()[0]


def test_f1_no_memory_on_one_rank_is_told_on_all() -> None:
    with ranks.Ranks(out_of_memory, 2) as processes:
        for _ in range(3):
            processes.hear_all()
            processes.go()
        for gone in processes.results():
            assert isinstance(gone, int), gone
            assert gone < ARENA >> 1, f"{gone >> 20} MiB of {ARENA >> 20} did not come back"
