"""Ranks that take part in no small call any more, and how those that are left take them in again.

Who is masked, and that calls go on without it, is the business of the backends: docs/protocol.md.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ep_comm.bootstrap import Exchange
from ep_comm.errors import make_error

if TYPE_CHECKING:
    from ep_comm.errors import EPError

MOST_RANKS: Final = 64  # a bit for each in one word

_STATE: Final = struct.Struct("<QQ")  # whom we had masked, number of our last operation


class Maskable(Protocol):
    """The native end of a rank, `_core.DeviceRank` or `_core.CpuCommunicator`."""

    def mask(self, rank: int) -> None: ...
    def masked(self) -> int: ...
    def masked_and_seq(self) -> tuple[int, int]: ...
    def unmask(self, seq: int, masked: int) -> None: ...
    def is_gone(self, peer: int) -> bool: ...


def ranks_in(bits: int) -> tuple[int, ...]:
    """Of a word with a bit for each rank."""
    return tuple(rank for rank in range(bits.bit_length()) if bits >> rank & 1)


def needs_all(masked: int, rank: int) -> EPError:
    """Why a call that is no small one cannot be made."""
    what = f"cannot make this call: ranks {list(ranks_in(masked))} are masked"
    return make_error("E311", what, rank=rank)


class Unmasking:
    """Rounds in which all ranks that live agree on where they are, and begin anew from there.

    Args:
        exchange: of the construction, whose rounds go on here.
        limit_s: how long a rank may take to come; None = for ever.
        sees_all: whether every rank sees by itself that another is gone. If not, who sees it
            leaves a note for the others.
    """

    def __init__(self, exchange: Exchange, limit_s: float | None, *, sees_all: bool = True) -> None:
        self._exchange, self._limit_s, self._sees_all = exchange, limit_s, sees_all
        self._rounds = 0

    def run(self, native: Maskable, synchronize: Callable[[], None]) -> None:
        """Collective between all ranks that live; see `Buffer.unmask`.

        Operations of a rank are over before it says how many there were, so all are over when all
        have been heard; and nobody begins another before all have taken up the number.
        """
        self._rounds += 1
        exchange, size = self._exchange, self._exchange.group.size
        if self._limit_s is not None:
            exchange.deadline = time.monotonic() + self._limit_s
        synchronize()
        state = _STATE.pack(*native.masked_and_seq())
        is_gone = native.is_gone if self._sees_all else partial(self._is_gone, native)
        heard = exchange.gather_living(f"unmask{self._rounds}", state, is_gone)
        gone = sum(1 << rank for rank in range(size) if rank not in heard)
        native.unmask(max(_STATE.unpack(said)[1] for said in heard.values()), gone)
        exchange.gather_living(f"unmasked{self._rounds}", b"", is_gone)
        exchange.finish()

    def _is_gone(self, native: Maskable, peer: int) -> bool:
        note = f"gone{peer}"
        if not native.is_gone(peer):
            return self._exchange.has_note(note)
        self._exchange.leave_note(note)
        return True
