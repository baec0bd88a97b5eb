"""Peers whose words cannot be trusted (H): checked before they are used."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from patience import LONGER_S, PATIENT
from verdicts import SHAPE, inputs, round_trip

from ep_comm import EPConfig, _core
from ep_comm.errors import EPError, EPTimeout
from ep_comm.testing import Cluster

# Words of an entry and of a base as contract/records.h has them, in bytes from the record's start.
_FIXED = 16 + 8 * len(_core.DESCRIPTOR_FIELDS)
ENTRY = {"seq": 0} | {
    name: _FIXED + 8 * i
    for i, name in enumerate(
        ("num_tokens", "num_rows", "y_offset", "streamed_rows", "ring_rows", "weights_offset")
    )
}
BASE = {"seq": 0, "x_offset": 16, "meta_offset": 24, "row": 32, "num_rows": 40}
ODD = [-1, -(2**63), 2**31, 2**60, 2**63 - 1, 1 << 20, 9, 4096]


# What becomes an address or a length: beyond its bound it is refused, whatever it is.
BOUNDED = {
    "dispatch": {("entry", "num_rows"), ("count", ""), ("base", "x_offset"), ("base", "row")}
    | {("base", "meta_offset"), ("base", "num_rows")},
    "combine": {("entry", "num_rows"), ("entry", "y_offset"), ("entry", "weights_offset")},
}


def _hostile(me: Any, verb: str, layout: str) -> int:
    """Rank 0 is the victim, on a thread of this process; the other rank's words are forged."""
    forgeries = [("entry", name) for name in list(ENTRY)[1:]]
    if verb == "dispatch":
        forgeries += [("count", ""), ("expert_row", "")]
        forgeries += [("base", name) for name in list(BASE)[1:]]
    for forgery in forgeries:
        for value in ODD:
            refused = forgery in BOUNDED[verb] and value not in (9, 4096)
            forger = Forger(verb, layout, PATIENT if refused else QUICK)
            outcome = forger.attack(*forgery, value)
            told = (verb, layout, *forgery, value, outcome)
            wanted = ("E240",) if refused else ("ok", "E101", "E102", "E240", "E242")
            assert outcome in wanted, told
    return len(forgeries)


QUICK = EPConfig(arrival_s=0.15, progress_s=0.15)  # where a wait for what never comes may end it


class Forger:
    """A buffer of two ranks of which one is played here, word by word."""

    def __init__(self, verb: str, layout: str, config: EPConfig = PATIENT) -> None:
        self.verb, self.layout = verb, layout
        self.limit_s = 0.4 if config == QUICK else 60.0
        self.cluster = Cluster(1, 2)
        self.buffers = self.cluster.make_buffers(**SHAPE, config=config, arena_bytes=1 << 18)
        shape = _core.Shape()
        shape.num_ranks, shape.num_slots, shape.num_experts = 2, 2, 6
        shape.max_local_experts, shape.num_topk, shape.max_tokens = 3, 2, 8
        self.at = {name: offset for name, offset, _ in _core.ControlLayout(shape).regions()}
        self.blocks = [b._backend._memory.own.control.address for b in self.buffers]
        self.arenas = [b._backend._memory.own.arena.address for b in self.buffers]

    def word(self, rank: int, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self.blocks[rank] + offset)

    def entry(self, slot: int, source: int) -> int:
        return self.at["entries"] + (2 * slot + source) * _core.STRUCT_SIZES[4]

    def base(self, slot: int, receiver: int) -> int:
        return self.at["bases"] + (2 * slot + receiver) * _core.STRUCT_SIZES[1]

    def attack(self, kind: str, name: str, value: int) -> str:
        buffer = self.buffers[0]
        guard = buffer.empty((4096,), torch.uint8).fill_(7)
        x, idx = inputs(0)
        seq = 1
        recv: Any = None
        if self.verb == "combine":
            try:
                recv, seq = self._receive(), 2
            except EPError as error:  # the clocks are so short that an honest call may meet them
                if self.limit_s > 1 or error.code not in ("E101", "E102"):
                    raise
                return error.code
        outcome: list[str] = []
        self.error: EPError | None = None

        def victim() -> None:
            try:
                if recv is not None:
                    buffer.combine(recv.x, recv.handle, topk_weights=recv.topk_weights)
                else:
                    buffer.dispatch(x, idx, layout=self.layout)
                outcome.append("ok")
            except EPError as error:
                self.error = error
                outcome.append(error.code)

        thread = threading.Thread(target=victim)
        thread.start()
        self._forge(seq, kind, name, value, outcome)
        thread.join(120)
        assert not thread.is_alive()
        assert (guard == 7).all()
        self.cluster.close()
        return outcome[0]

    def _receive(self) -> Any:
        weights = torch.ones(8, 2)
        return self.cluster.run(
            lambda r: self.buffers[r].dispatch(*inputs(r), weights, layout=self.layout)
        )[0]

    def _forge(self, seq: int, kind: str, name: str, value: int, outcome: list[str]) -> None:
        """Copy what the victim says of itself, change one word, publish it as rank 1."""
        slot = seq % 2
        theirs, ours = self.entry(slot, 0), self.entry(slot, 1)
        if not self._wait(lambda: self.word(1, theirs).value == seq):
            return
        size = _core.STRUCT_SIZES[0]
        record = ctypes.string_at(self.blocks[1] + theirs, size)
        ctypes.memmove(self.blocks[0] + ours + 8, record[8:], size - 8)
        counts = self.at["counts"] + (2 * slot + 1) * 3 * 4
        if self.verb == "dispatch":
            for i in range(3):
                ctypes.c_int32.from_address(self.blocks[0] + counts + 4 * i).value = 0
            self.word(0, ours + ENTRY["num_rows"]).value = 0
        if kind == "entry":
            self.word(0, ours + ENTRY[name]).value = value
        if kind == "count":
            ctypes.c_int64.from_address(self.blocks[0] + counts).value = value
        self.word(0, ours).value = value if kind == "seq" else seq
        if self.verb == "combine":
            pulled = self.at["pulled"] + (2 * slot + 1) * 64
            self.word(0, pulled).value = seq
            return
        base, mine = self.base(slot, 0), self.base(slot, 1)
        self._wait(lambda: bool(outcome) or self.word(1, base).value == seq)
        record = ctypes.string_at(self.blocks[1] + base, 64)
        ctypes.memmove(self.blocks[0] + mine + 8, record[8:], 56)
        for name_of, honest in (
            ("x_offset", 0),
            ("meta_offset", 1 << 16),
            ("row", 0),
            ("num_rows", 64),
        ):
            self.word(0, mine + BASE[name_of]).value = honest
        if kind == "base":
            self.word(0, mine + BASE[name]).value = value
        if kind == "expert_row":
            row = self.at["expert_rows"] + (6 * slot + 3) * 4
            ctypes.c_int64.from_address(self.blocks[0] + row).value = value
        self.word(0, mine).value = seq

    def _wait(self, ready: Callable[[], bool]) -> bool:
        end = time.monotonic() + self.limit_s
        while not ready():
            if time.monotonic() > end:
                return False
            time.sleep(0.0005)
        return True


@pytest.mark.parametrize("layout", ["compact", "grouped"])
@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_h2_forged_counts_and_offsets_are_refused_before_they_are_used(
    verb: str, layout: str
) -> None:
    """In a process of its own: a number that is believed kills it."""
    ranks.run(_hostile, 1, verb, layout, limit_s=250)


# ---- H3 to H5: order, loss, age ----


def _litmus(me: Any, rounds: int, hidden: int) -> int:
    """Every word of every row says which round it belongs to."""
    buffer = me.buffer(num_experts=2, num_topk=1, hidden=hidden, max_tokens=32, num_slots=2)
    idx = (torch.arange(32)[:, None] + me.rank) % 2
    x = torch.empty(32, hidden, dtype=torch.int8)
    wrong, word = 0, 0x0101010101010101
    for i in range(rounds):
        x.fill_(i % 127)
        recv = buffer.dispatch(x, idx)
        wrong += int((recv.x.view(torch.int64) != i % 127 * word).sum())
    return wrong


@pytest.mark.parametrize(("hidden", "rounds"), [(64, 1000), (1 << 17, 60)], ids=["cached", "nt"])
def test_h3_an_arrival_is_never_seen_before_its_rows(hidden: int, rounds: int) -> None:
    """Both ways rows are stored: through the cache, and past it (4 MiB a round)."""
    assert ranks.run(_litmus, 2, rounds, hidden) == [0, 0]


def test_h4_rows_that_never_arrive_are_told_with_both_numbers() -> None:
    forger = Forger("dispatch", "compact", EPConfig(arrival_s=60.0, progress_s=LONGER_S))
    assert forger.attack("entry", "num_rows", 1) == "E102"
    error = forger.error
    assert isinstance(error, EPTimeout)
    assert (error.rank, error.peer) == (0, 1)
    assert "got 0 of 1 rows" in str(error)


@pytest.mark.parametrize(("verb", "seq"), [("dispatch", 0), ("combine", 0), ("combine", 1)])
def test_h5_a_number_of_an_older_operation_is_ignored(verb: str, seq: int) -> None:
    forger = Forger(verb, "compact", EPConfig(arrival_s=LONGER_S))
    assert forger.attack("seq", "", seq) == "E101"
    assert forger.error is not None
    assert "for rank 1 to enter" in str(forger.error)


@pytest.mark.parametrize(("verb", "seq"), [("dispatch", 3), ("combine", 4), ("combine", 2**63 - 2)])
def test_h5_a_number_that_cannot_be_yet_is_e241(verb: str, seq: int) -> None:
    forger = Forger(verb, "compact")
    assert forger.attack("seq", "", seq) == "E241"
    assert forger.error is not None
    assert forger.error.peer == 1
    assert f": {seq}, want" in str(forger.error)


def test_h5_what_is_written_to_an_older_buffer_never_reaches_its_successor() -> None:
    with Cluster(1, 2) as cluster:
        old = cluster.make_buffers(**SHAPE, arena_bytes=1 << 18)
        cluster.run(lambda r: round_trip(old[r]))
        memory = [m for b in old for m in b._backend._memory.own]
        for buffer in old:
            buffer.close()
        new = cluster.make_buffers(**SHAPE, arena_bytes=1 << 18)
        cluster.run(lambda r: round_trip(new[r]))
        for region in memory:  # a slow peer's late stores, all of them
            ctypes.memset(region.address, 0x7F, region.bytes)
        for i in range(6):
            cluster.run(lambda r, i=i: round_trip(new[r], i))
