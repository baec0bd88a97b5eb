"""Masks on the cpu backend: slab calls go on without ranks that died or are late, and those that
are left get exact results among themselves. Real processes.
"""

from __future__ import annotations

import signal
import time
from functools import partial
from typing import Any

import pytest
import ranks
import torch
from patience import LONGER_S
from torch import Tensor

from ep_comm import Buffer, EPConfig, reference
from ep_comm.bootstrap import Exchange, resolve_group
from ep_comm.errors import EPError, EPMasked
from ep_comm.masks import Unmasking
from ep_comm.testing import Cluster

R, E, K, H, T = 4, 8, 3, 32, 6
CAPACITY = R * T
SHAPE: dict[str, Any] = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens": T}


def inputs(step: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, ids and weights of every rank."""
    g = torch.Generator().manual_seed(step)
    x = [torch.randn(T - r, H, generator=g).bfloat16() for r in range(R)]
    idx = [torch.randint(-1, E, (T - r, K), generator=g) for r in range(R)]
    return x, idx, [torch.rand(T - r, K, generator=g) for r in range(R)]


def biases(step: int) -> list[Tensor]:
    return [torch.full((T - r, H), float(step % 7 - 3), dtype=torch.bfloat16) for r in range(R)]


def expected(
    step: int, gone: tuple[int, ...], ranks_per_node: int | None = None
) -> tuple[list[Any], list[Tensor]]:
    """Received and combined of every rank when these have no tokens and own no expert."""
    (x, idx, weights), bias = inputs(step), biases(step)
    owner = torch.arange(E) // (E // R)
    lost = torch.isin(owner, torch.tensor(gone))
    for r in range(R):
        idx[r] = torch.where((idx[r] >= 0) & lost[idx[r]], -1, idx[r])
        if r in gone:
            x[r], idx[r], weights[r], bias[r] = x[r][:0], idx[r][:0], weights[r][:0], bias[r][:0]
    want = reference.dispatch(
        x, idx, weights, num_experts=E, max_tokens=T, layout="slab", capacity=CAPACITY
    )
    handles, y = [recv.handle for recv in want], [recv.x for recv in want]
    sums = reference.combine(y, handles, weighted=True, bias=bias, ranks_per_node=ranks_per_node)
    return want, list(sums)


def step_of(buffer: Buffer, step: int, begun: bool = False) -> tuple[Any, Tensor]:
    """On the cpu, where it may be, in the memory of bias."""
    x, idx, weights = (of[buffer.rank].to(buffer.device) for of in inputs(step))
    bias = biases(step)[buffer.rank].to(buffer.device)
    options: dict[str, Any] = {"layout": "slab", "capacity": CAPACITY}
    sums = {"weighted": True, "bias": bias, "out": bias if buffer.backend == "cpu" else None}
    if begun:
        recv = buffer.dispatch(x, idx, weights, wait=False, **options).wait()
        return recv, buffer.combine(recv.x, recv.handle, wait=False, **sums).wait()
    recv = buffer.dispatch(x, idx, weights, **options)
    return recv, buffer.combine(recv.x, recv.handle, **sums)


def check_step(buffer: Buffer, step: int, gone: tuple[int, ...], begun: bool = False) -> None:
    """A step among the ranks left, bit for bit."""
    check_results(buffer, step, gone, *step_of(buffer, step, begun))


def check_results(
    buffer: Buffer, step: int, gone: tuple[int, ...], recv: Any, out: Tensor,
    ranks_per_node: int | None = None,
) -> None:  # fmt: skip
    want, sums = expected(step, gone, ranks_per_node)
    mine = want[buffer.rank]
    assert torch.equal(recv.num_tokens_per_expert.cpu(), mine.num_tokens_per_expert), step
    for e, n in enumerate(mine.num_tokens_per_expert.tolist()):
        assert torch.equal(recv.x[e, :n].cpu(), mine.x[e, :n]), (step, e)
        assert torch.equal(recv.topk_weights[e, :n].cpu(), mine.topk_weights[e, :n]), (step, e)
    assert torch.equal(out.cpu(), sums[buffer.rank]), step
    assert buffer.masked_ranks == gone


def masking(me: ranks.Me, **clocks: float) -> Buffer:
    buffer: Buffer = me.buffer(**SHAPE, config=EPConfig(masking=True, **clocks))
    return buffer


def code_of(call: Any) -> str:
    with pytest.raises(EPError) as raised:
        call()
    return raised.value.code


# ---- masked by hand ----


def _mask_one(me: ranks.Me) -> str:
    buffer = masking(me)
    check_step(buffer, 0, ())
    me.say("ready")
    me.wait_for_go()
    if me.rank == 3:
        buffer.mask(1)
    me.say("masked")
    me.wait_for_go()
    if me.rank == 1:
        with pytest.raises(EPMasked) as raised:
            step_of(buffer, 1)
        assert (raised.value.code, raised.value.peer) == ("E113", 1)
        return "masked"
    for step in range(1, 8):
        check_step(buffer, step, (1,), begun=step % 2 == 0)
    x, idx, _ = (of[me.rank] for of in inputs(0))
    assert code_of(lambda: buffer.dispatch(x, idx)) == "E311"
    assert code_of(lambda: buffer.dispatch(x, idx, layout="grouped")) == "E311"
    check_step(buffer, 9, (1,))
    return "went on"


def test_a_rank_masked_by_one_is_left_out_by_all() -> None:
    with ranks.Ranks(_mask_one, R) as four:
        four.hear_all()
        four.go()
        four.hear_all()
        four.go()
        assert four.results() == ["went on", "masked", "went on", "went on"]


def _mask_and_unmask(me: ranks.Me) -> list[tuple[int, ...]]:
    buffer = masking(me)
    check_step(buffer, 0, ())
    seen = []
    for number, gone in enumerate(((2,), (0, 3), ())):
        me.say("ready")
        me.wait_for_go()
        for rank in gone:
            if me.rank not in gone:
                buffer.mask(rank)
        me.say("masked")
        me.wait_for_go()
        for step in range(4):
            if me.rank not in gone:
                check_step(buffer, 10 * number + step, gone)
        buffer.unmask()
        seen.append(buffer.masked_ranks)
        for step in range(4):
            check_step(buffer, 10 * number + 5 + step, ())
        x, idx, _ = (of[me.rank] for of in inputs(0))
        recv = buffer.dispatch(x, idx)
        buffer.combine(recv.x, recv.handle)
    return seen


def test_unmasked_ranks_are_where_the_others_are() -> None:
    with ranks.Ranks(_mask_and_unmask, R) as four:
        for _ in range(6):
            four.hear_all()
            four.go()
        assert four.results() == [[()] * 3] * R


def _options_are_checked(me: ranks.Me) -> list[str]:
    plain, own = me.buffer("plain", **SHAPE), masking(me)
    codes = [code_of(lambda: plain.mask(1 - me.rank)), code_of(plain.unmask)]
    codes += [code_of(partial(own.mask, rank)) for rank in (me.rank, -1, 2, True)]
    assert plain.masked_ranks == own.masked_ranks == ()
    assert code_of(lambda: EPConfig(masking=1)) == "E203"  # type: ignore[arg-type]
    differ = EPConfig(masking=me.rank == 0)
    codes.append(code_of(lambda: me.buffer("differ", **SHAPE, config=differ)))
    return codes


def test_masks_are_asked_for_and_name_another_rank() -> None:
    with ranks.Ranks(_options_are_checked, 2) as two:
        assert two.results() == [["E203"] * 6 + ["E221"]] * 2


# ---- masked by themselves ----


def is_either(out: Tensor, step: int, rank: int, lost: tuple[int, ...]) -> bool:
    """Each token with all rows of each lost rank or with none."""
    sums = [expected(step, ())[1][rank], expected(step, lost)[1][rank]]
    sums += [expected(step, (one,))[1][rank] for one in lost]
    return bool(torch.stack([(out == s).all(1) for s in sums]).any(0).all())


def _traffic(me: ranks.Me, lost: tuple[int, ...], begun: bool) -> tuple[int, ...] | None:
    """Steps without a pause; some ranks are killed meanwhile, and then come forty more."""
    buffer, store = masking(me), me.group().store
    check_step(buffer, 0, ())
    me.say("busy")
    step, last = 1, None
    while step != last:
        if buffer.masked_ranks == lost:
            # The others know it as well, or will before they are a step further.
            if last is None and me.rank == min({*range(R)} - {*lost}):
                store.set("last", str(step + 40))
            check_step(buffer, step, lost, begun)
            last = int(store.get("last")) if store.check(["last"]) else last
        else:
            _, out = step_of(buffer, step, begun)
            assert me.rank in lost or is_either(out, step, me.rank, lost), step
        step += 1
    return buffer.masked_ranks


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "begun"])
@pytest.mark.parametrize("lost", [(2,), (0, 3)], ids=["one", "two"])
def test_survivors_of_a_killed_rank_go_on(lost: tuple[int, ...], begun: bool) -> None:
    for attempt in range(2):
        with ranks.Ranks(_traffic, R, lost, begun) as four:
            four.hear_all()
            time.sleep(0.05 + 0.07 * attempt)  # any moment is one
            for rank in lost:
                four.kill(rank)
            died = ranks.Died(-signal.SIGKILL)
            want = [died if rank in lost else lost for rank in range(R)]
            assert four.results(60) == want


def _late(me: ranks.Me) -> Any:
    buffer = masking(me, arrival_s=LONGER_S, progress_s=LONGER_S)
    check_step(buffer, 0, ())
    me.say("ready")
    if me.rank == 1:
        me.wait_for_go()
        return code_of(lambda: step_of(buffer, 1))
    for step in range(1, 6):
        check_step(buffer, step, (1,))
    me.say("over")
    me.wait_for_go()
    buffer.unmask()  # the late one has closed
    check_step(buffer, 7, (1,))
    return buffer.masked_ranks


def test_a_late_rank_learns_that_the_others_went_on() -> None:
    with ranks.Ranks(_late, R) as four:
        four.hear_all()
        for rank in (0, 2, 3):
            assert four.hear(rank) == "over"
        four.go(1)
        assert four.result(1) == "E113"
        four.go(0, 2, 3)
        assert four.results() == [(1,), "E113", (1,), (1,)]


# ---- unmasking where ranks do not see each other ----


class Host:
    """What a rank knows of masks, and of the others."""

    def __init__(self, seq: int, sees_end_of: int | None) -> None:
        self.seq, self.sees_end_of = seq, sees_end_of
        self.unmasked: tuple[int, int] | None = None

    def mask(self, rank: int) -> None: ...

    def masked(self) -> int:
        return 0b1000

    def masked_and_seq(self) -> tuple[int, int]:
        return 0b1000, self.seq

    def unmask(self, seq: int, masked: int) -> None:
        self.unmasked = (seq, masked)

    def is_gone(self, peer: int) -> bool:
        return peer == self.sees_end_of


def unmask_three(witness: int | None, limit_s: float) -> tuple[list[Host], list[Any]]:
    """Of ranks 0 to 2; rank 3 is gone, as only the witness sees."""
    cluster = Cluster(2, 2)
    hosts = [Host(10 + r, 3 if r == witness else None) for r in range(3)]

    def run(rank: int) -> None:
        exchange = Exchange(resolve_group(cluster.group(rank)), None)
        if rank < 3:
            Unmasking(exchange, limit_s, sees_all=False).run(hosts[rank], lambda: None)

    return hosts, cluster.run_catching(run)


def test_who_sees_the_end_of_a_rank_tells_all_others() -> None:
    hosts, results = unmask_three(2, 60.0)
    assert results == [None] * 4
    assert [host.unmasked for host in hosts] == [(12, 0b1000)] * 3


def test_nobody_unmasks_when_the_end_of_a_rank_is_seen_by_none() -> None:
    hosts, results = unmask_three(None, 1.0)
    assert [error.code for error in results[:3]] == ["E120"] * 3
    assert all(error.peer == 3 for error in results[:3])
    assert [host.unmasked for host in hosts] == [None] * 3
