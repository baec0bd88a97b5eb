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
from verdicts import (
    SHAPE,
    inputs,
)

from ep_comm import EPConfig, _core
from ep_comm.errors import (
    EPError,
)
from ep_comm.testing import Cluster

# Words of an entry and of a base as contract/records.h has them, in bytes from the record's start.
ENTRY = {"seq": 0, "num_tokens": 104, "num_rows": 112, "y_offset": 120, "weights_offset": 128}
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
            outcome = Forger(verb, layout).attack(*forgery, value)
            told = (verb, layout, *forgery, value, outcome)
            assert outcome in ("ok", "E101", "E102", "E240", "E242"), told
            if forgery in BOUNDED[verb] and value not in (9, 4096):
                assert outcome == "E240", told
    return len(forgeries)


class Forger:
    """A buffer of two ranks of which one is played here, word by word."""

    def __init__(self, verb: str, layout: str) -> None:
        self.verb, self.layout = verb, layout
        self.cluster = Cluster(1, 2)
        config = EPConfig(arrival_s=0.15, progress_s=0.15)
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
            weights = torch.ones(8, 2)
            both = self.cluster.run(
                lambda r: self.buffers[r].dispatch(*inputs(r), weights, layout=self.layout)
            )
            recv, seq = both[0], 2
        outcome: list[str] = []

        def victim() -> None:
            try:
                if recv is not None:
                    buffer.combine(recv.x, recv.handle, topk_weights=recv.topk_weights)
                else:
                    buffer.dispatch(x, idx, layout=self.layout)
                outcome.append("ok")
            except EPError as error:
                outcome.append(error.code)

        thread = threading.Thread(target=victim)
        thread.start()
        self._forge(seq, kind, name, value, outcome)
        thread.join(10)
        assert not thread.is_alive()
        assert (guard == 7).all()
        self.cluster.close()
        return outcome[0]

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
        self.word(0, ours).value = seq
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

    @staticmethod
    def _wait(ready: Callable[[], bool], limit_s: float = 0.4) -> bool:
        end = time.monotonic() + limit_s
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
    ranks.run(_hostile, 1, verb, layout, limit_s=120)
