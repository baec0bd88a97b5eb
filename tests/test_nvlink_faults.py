"""Ranks on GPUs that die, leave, stop or break: named at once, and the others' context lives on.

Real processes. They share one GPU where there is only one, and one each where there are enough.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import test_nvlink_gpus as gpus
import test_nvlink_loopback as loopback
import torch
from patience import LONGER_S, three_tries, within
from test_nvlink_loopback import make_cluster
from torch import Tensor

from ep_comm import Buffer, EPConfig, _core
from ep_comm.errors import EPError
from ep_comm.testing import Cluster

pytestmark = pytest.mark.gpu
__all__ = ["make_cluster"]


def begin(me: ranks.Me, **clocks: float) -> tuple[Buffer, Any, Any]:
    """A buffer that has worked once, and a call's inputs."""
    case = loopback.Case(num_ranks=me.size)
    buffer = gpus.buffer_of(me, case, config=EPConfig(**clocks))
    inputs = case.inputs()
    x, idx = inputs.x[me.rank].cuda(), inputs.topk_idx[me.rank].cuda()
    recv = buffer.dispatch(x, idx)
    buffer.combine(recv.x, recv.handle)
    buffer.check()
    me.say("ready")
    return buffer, x, idx


def failure(buffer: Buffer, call: Any) -> tuple[str, int | None, float, str]:
    """Code, culprit, when, sentence of a call that fails; then the GPU still computes.

    A peer may have told what it brings before it failed: then the call returns with its sizes, and
    rows that never come are missed by the kernel alone.
    """
    try:
        call()
        torch.cuda.synchronize()
        buffer.check()
    except EPError as error:
        when = time.monotonic()
        assert float(torch.ones(8, device="cuda").sum()) == 8.0
        return error.code, error.peer, when, str(error)
    raise AssertionError("nothing was raised")


def dispatch_twice(me: ranks.Me, call: str) -> Any:
    """The last rank leaves out the second call; the others find out why."""
    buffer, x, idx = begin(me)
    if me.rank == me.size - 1:
        me.wait_for_go()
        return None
    calls = {
        "dispatch": lambda: buffer.dispatch(x, idx),
        "static": lambda: buffer.dispatch(x, idx, sync=False),
        "begun": lambda: buffer.dispatch(x, idx, wait=False).wait(),
    }
    told = failure(buffer, calls[call])
    again = failure(buffer, lambda: buffer.dispatch(x, idx))
    assert again[0] == told[0]
    return told


@pytest.mark.parametrize("call", ["dispatch", "static", "begun"])
@three_tries
def test_c2_killed_peer_is_named_by_all(call: str) -> None:
    with ranks.Ranks(dispatch_twice, 3, call) as processes:
        processes.hear_all()
        time.sleep(0.3)  # the others wait in a kernel by now
        killed = processes.kill(2)
        results = [processes.result(r) for r in (0, 1)]
    for code, peer, when, sentence in results:
        assert (code, peer) == ("E110", 2), sentence
        # A GPU that the dead rank shared stands still for a second, while the driver clears it.
        within(3.0, when - killed, sentence)


@pytest.mark.gpus(2)
@three_tries
def test_c2_killed_peer_with_a_gpu_of_its_own_is_named_within_a_second() -> None:
    with ranks.Ranks(dispatch_twice, 2, "dispatch") as processes:
        processes.hear_all()
        time.sleep(0.3)
        killed = processes.kill(1)
        code, peer, when, sentence = processes.result(0)
    assert (code, peer) == ("E110", 1), sentence
    within(1.0, when - killed, sentence)


def test_c11_peer_that_closes_is_reported_as_left() -> None:
    with ranks.Ranks(dispatch_twice, 3, "dispatch") as processes:
        processes.hear_all()
        processes.go(2)  # ends its process in order
        results = [processes.result(r) for r in (0, 1)]
    for code, peer, _, sentence in results:
        assert (code, peer) == ("E111", 2), sentence


def late_once(me: ranks.Me) -> list[str]:
    """Warnings of a rank whose peer comes late; they are told at once."""
    warnings: list[str] = []

    def tell(record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())
        me.say(warnings[-1])

    handler = logging.Handler()
    handler.emit = tell  # type: ignore[method-assign]
    buffer, x, idx = begin(me, arrival_warn_s=0.5)
    logging.getLogger("ep_comm").addHandler(handler)
    if me.rank == 1:
        me.wait_for_go()
    recv = buffer.dispatch(x, idx)
    out = buffer.combine(recv.x, recv.handle)
    buffer.check()
    assert out.shape == x.shape
    return warnings


def test_d2_late_peer_gives_one_warning() -> None:
    with ranks.Ranks(late_once, 2) as two:
        two.hear_all()
        told = two.hear(0)
        time.sleep(1.2)  # another half second, and one more
        assert not two.hears(0), two.hear(0)
        two.go(1)
        results = two.results()
    assert re.fullmatch(r"W101: rank 0 has waited \d+\.\d s for rank 1 in dispatch", told)
    assert results[0][0] == told
    assert all(text.startswith("W101") for warnings in results for text in warnings)


def stopped_peer(me: ranks.Me) -> Any:
    buffer, x, idx = begin(me, arrival_warn_s=0.2, arrival_s=60.0, progress_s=LONGER_S)
    if me.rank == 1:
        me.wait_for_go()
        return None
    return failure(buffer, lambda: buffer.dispatch(x, idx))


def test_c5_stopped_peer_is_given_up_after_the_progress_limit() -> None:
    with ranks.Ranks(stopped_peer, 2) as processes:
        processes.hear_all()
        stopped = processes.kill(1, signal.SIGSTOP)
        code, peer, when, sentence = processes.result(0)
        processes.kill(1, signal.SIGCONT)
    assert (code, peer) == ("E101", 1)
    assert "alive but stopped" in sentence
    assert 0.5 * LONGER_S < when - stopped < 50.0  # not after the arrival clock


def fail_an_assertion() -> None:
    """A kernel of torch's: an index that is out of range."""
    torch.zeros(4, device="cuda")[torch.full((4,), 1000, device="cuda")] += 1


def write_nowhere() -> None:
    cupy = pytest.importorskip("cupy")
    kernel = cupy.RawKernel('extern "C" __global__ void f(int* p) { *p = 1; }', "f")
    kernel((1,), (1,), (0x10,))


def broken_context(me: ranks.Me, fault: Callable[[], None]) -> Any:
    """The last rank's own code breaks its context."""
    buffer, x, idx = begin(me)
    if me.rank < me.size - 1:
        return failure(buffer, lambda: buffer.dispatch(x, idx))
    with contextlib.suppress(RuntimeError):  # what is launched behind the kernel may see it fail
        fault()
    me.say("the kernel was launched")
    try:
        for _ in range(50):
            time.sleep(0.1)
            buffer.dispatch(x, idx)
    except EPError as error:
        return error.code, error.peer
    raise AssertionError("nothing was raised")


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "fault",
    [
        fail_an_assertion,
        # On a GPU of its own: on one that ranks share this once did not end within a minute.
        pytest.param(write_nowhere, marks=pytest.mark.gpus(2)),
    ],
)
def test_c7_broken_context_is_blamed_on_its_rank(fault: Callable[[], None]) -> None:
    if fault is write_nowhere:
        pytest.importorskip("cupy")
    with ranks.Ranks(broken_context, 2, fault) as processes:
        processes.hear_all()
        processes.hear(1, 20.0)
        own = processes.result(1, 15.0)
        blamed = processes.result(0, 15.0)
    assert own == ("E112", 1)
    assert isinstance(blamed, tuple), blamed
    code, peer, _, sentence = blamed
    assert (code, peer) == ("E112", 1), sentence


CALLS: dict[str, Callable[[Buffer, Any, Any, Any], object]] = {
    "dispatch": lambda buffer, x, idx, recv: buffer.dispatch(x, idx),
    "static": lambda buffer, x, idx, recv: buffer.dispatch(x, idx, sync=False),
    "weights that are converted": lambda buffer, x, idx, recv: buffer.dispatch(
        x, idx, torch.empty_like(idx, dtype=torch.bfloat16)
    ),
    "combine": lambda buffer, x, idx, recv: buffer.combine(recv.x, recv.handle),
    "begun combine": lambda buffer, x, idx, recv: buffer.combine(
        recv.x, recv.handle, wait=False
    ).wait(),
    "begun slab": lambda buffer, x, idx, recv: buffer.dispatch(
        x, idx, layout="slab", wait=False
    ).wait(),
    "check": lambda buffer, x, idx, recv: buffer.check(),
}


def call_with_a_broken_context(me: ranks.Me, name: str) -> Any:
    """As above, but by now torch knows it, too."""
    buffer, x, idx = begin(me)
    recv = buffer.dispatch(x, idx)
    buffer.combine(recv.x, recv.handle)  # which check() has to look at
    if me.rank < me.size - 1:
        return failure(buffer, lambda: buffer.dispatch(x, idx))
    with contextlib.suppress(RuntimeError):
        fail_an_assertion()
        torch.cuda.synchronize()
    codes = []
    for _ in range(2):
        try:
            CALLS[name](buffer, x, idx, recv)
        except EPError as error:
            codes.append((error.code, error.peer))
    return codes


@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", CALLS)
def test_c7_any_call_with_a_broken_context_says_so(name: str) -> None:
    with ranks.Ranks(call_with_a_broken_context, 2, name) as processes:
        processes.hear_all()
        own = processes.result(1, 30.0)
        blamed = processes.result(0, 15.0)
    assert own[:1] == [("E112", 1)]
    assert own[1:] == own[:1] or name == "check"  # which raises a failure once
    assert isinstance(blamed, tuple), blamed
    code, peer, _, sentence = blamed
    assert (code, peer) == ("E112", 1), sentence


REFUSED = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"
MEETS = {  # what torch is asked for, and by then what has been begun
    "dispatch": (torch.cuda.Stream, "record_event", None),
    "check": (torch.cuda.Stream, "record_event", None),
    "weights that are converted": (Tensor, "to", None),
    "combine": (torch, "empty_like", None),  # made as an earlier one was
    "begun combine": (torch, "empty", None),
    "a begun dispatch is waited for": (torch.cuda.Stream, "wait_stream", {}),
    "the second half": (torch.cuda, "current_stream", {"layout": "slab"}),
}


@pytest.mark.parametrize(("fault", "want"), [(0, RuntimeError), (710, EPError)])
@pytest.mark.parametrize("name", MEETS)
def test_what_torch_refuses_is_told_as_our_own_fault(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, name: str, fault: int,
    want: type[Exception],
) -> None:  # fmt: skip
    """The same without one: torch refuses something in the middle of a call. It may do so with a
    context that works, too."""
    case = loopback.Case(num_ranks=1)
    (buffer,) = make_cluster(1, **case.buffer_options()).buffers
    inputs = case.inputs()
    x, idx = inputs.x[0].cuda(), inputs.topk_idx[0].cuda()
    recv = buffer.dispatch(x, idx)
    buffer.combine(recv.x, recv.handle)
    where, what, begun = MEETS[name]
    if what == "empty_like" and not _core.has_plans():
        what = "empty"
    call: Callable[[], object] = lambda: CALLS[name](buffer, x, idx, recv)  # noqa: E731
    if begun is not None:
        call = buffer.dispatch(x, idx, wait=False, **begun).wait
    refused = []

    def refuse(*_: object, **__: object) -> Any:
        refused.append(what)
        raise RuntimeError(REFUSED)

    with monkeypatch.context() as patch:
        patch.setattr(_core.DeviceRank, "fault", lambda _: fault)
        patch.setattr(where, what, refuse)
        with pytest.raises(want) as raised:
            call()
    assert refused
    error = raised.value
    if isinstance(error, EPError):
        assert (error.code, error.peer) == ("E112", 0)
        assert "lost its CUDA context: CUDA error: device-side assert triggered." in str(error)
    else:
        assert str(error) == REFUSED


def interrupted(me: ranks.Me) -> Any:
    buffer, x, idx = begin(me)
    if me.rank == 1:
        me.wait_for_go()
        return failure(buffer, lambda: buffer.dispatch(x, idx))[:2]
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        buffer.dispatch(x, idx)
    except KeyboardInterrupt:
        torch.cuda.synchronize()  # the kernel gives up soon, unless rank 1 comes before
        me.say("interrupted")
        return failure(buffer, lambda: buffer.dispatch(x, idx))[:1]
    raise AssertionError("nothing was raised")


def test_interrupt_ends_a_wait_and_the_communicator() -> None:
    with ranks.Ranks(interrupted, 2) as processes:
        processes.hear_all()
        assert processes.hear(0) == "interrupted"
        processes.go(1)
        assert processes.result(1) == ("E111", 0)
        assert processes.result(0) == ("E111",)
