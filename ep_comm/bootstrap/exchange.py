"""The store: rounds in which every rank reads what all have published, or hears why it cannot."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from ep_comm.bootstrap.group import Group
from ep_comm.errors import EPError, make_error, shown

# No hello, and no sentence of a failure. The ranks that were missed stand behind it.
_GAVE_UP: Final = b"\0gave up"


class Exchange:
    """One construction: rounds in which every rank publishes bytes and reads everybody's."""

    def __init__(self, group: Group, limit_s: float | None) -> None:
        self.group = group
        self.deadline = None if limit_s is None else time.monotonic() + limit_s
        self.dead_ranks: Callable[[], list[int]] = list  # as far as we know
        self.missed: list[int] = []  # when we gave up
        # The store counts the constructions of each rank: any number of buffers share a group.
        self._number = group.store.add(f"count/{group.rank}", 1)
        self._keys: list[str] = []

    def publish(self, name: str, payload: bytes) -> None:
        """Our bytes of a round, without waiting for anybody else's."""
        key = f"{self._number}/{name}/{self.group.rank}"
        self.group.store.set(key, payload)
        self._keys.append(key)

    def gather(self, name: str, payload: bytes) -> list[bytes]:
        """Everybody's bytes, by rank. Collective.

        Raises:
            EPTimeout: E120, the deadline has passed; names all ranks that are missing.
            EPPeerDied: E110, a rank whose process we know ended without an answer.
        """
        group = self.group
        self.publish(name, payload)
        start = time.monotonic()
        answers: list[bytes] = []
        for rank in range(group.size):
            while (answer := self._wait_slice(name, rank)) is None:
                self.raise_failure()
                for dead in self.dead_ranks():
                    if self.heard(name, dead) is None:
                        raise died_early(group.rank, dead)
                self._check_deadline(name, rank, start)
            answers.append(answer)
        return answers

    def gather_living(
        self, name: str, payload: bytes, is_gone: Callable[[int], bool]
    ) -> dict[int, bytes]:
        """The bytes of all ranks but those that are gone and had not published any. Collective.

        All that are heard of in a round are the same for everybody: who is gone says no more.

        Raises:
            EPTimeout: E120, the deadline has passed; names all ranks that are missing.
        """
        self.publish(name, payload)
        start = time.monotonic()
        answers: dict[int, bytes] = {}
        for rank in range(self.group.size):
            while (answer := self._wait_slice(name, rank)) is None:
                if is_gone(rank) and (answer := self.heard(name, rank)) is None:
                    break
                self._check_deadline(name, rank, start)
            if answer is not None:
                answers[rank] = answer
        return answers

    def _check_deadline(self, name: str, rank: int, start: float) -> None:
        """E120 when we have waited for too long, now for this rank."""
        now = time.monotonic()
        if self.deadline is None or now <= self.deadline:
            return
        unheard = [r for r in range(rank, self.group.size) if self.heard(name, r) is None]
        # Who has given up on others a moment before us is none of those we both lack.
        self.missed = [r for r in unheard if not self._gave_up_on_others(name, r)] or [rank]
        what = f"waited {now - start:.1f} s: ranks {self.missed} missing"
        raise make_error("E120", what, rank=self.group.rank, peer=self.missed[0])

    def fail(self, error: BaseException) -> None:
        """Tell ranks that wait for us, in whatever round, that we will not come: we lost a rank, or
        raise what nobody foresaw. Other errors are found or told in the rounds."""
        culprit, what = self.group.rank, f"it raised {shown(error)}"
        if isinstance(error, EPError):
            if error.code not in ("E110", "E111") or error.peer is None:
                return
            culprit, what = error.peer, error.what.partition(": ")[2]
        code = error.code if isinstance(error, EPError) else "E111"
        with contextlib.suppress(Exception):  # the store may be what failed
            self.group.store.set(
                f"{self._number}/failed", f"{code} {culprit} {what}".encode()[:300]
            )

    def failure(self) -> EPError | None:
        """E110 or E111 when a peer has told that a rank is lost, itself or another."""
        key = f"{self._number}/failed"
        if not self.group.store.check([key]):
            return None
        text = bytes(self.group.store.get(key)).decode(errors="replace")
        code, _, rest = text.partition(" ")
        rank, _, what = rest.partition(" ")
        lost = int(rank) if rank.isdecimal() and len(rank) < 8 else -1
        if not 0 <= lost < self.group.size or lost == self.group.rank:
            return None
        code = code if code in ("E110", "E111") else "E111"
        return make_error(code, f"lost rank {lost}: {what}", rank=self.group.rank, peer=lost)

    def raise_failure(self) -> None:
        if (error := self.failure()) is not None:
            raise error

    def heard(self, name: str, rank: int) -> bytes | None:
        """What a rank has published in a round, if anything."""
        return self._read(f"{self._number}/{name}/{rank}")

    def leave_note(self, name: str) -> None:
        """What any rank may find from now on, of whoever left it; it stays."""
        self.group.store.set(f"{self._number}/{name}", b"note")

    def has_note(self, name: str) -> bool:
        return bool(self.group.store.check([f"{self._number}/{name}"]))

    def _read(self, key: str) -> bytes | None:
        """What is there now; None = nothing, or of a rank that gave up."""
        answer = self._stored(key)
        return None if answer.startswith(_GAVE_UP) else answer

    def _stored(self, key: str) -> bytes:
        store = self.group.store
        return bytes(store.get(key)) if store.check([key]) else _GAVE_UP

    def _gave_up_on_others(self, name: str, rank: int) -> bool:
        """Whether a rank was here together with us and is gone, for want of others."""
        missed = self._stored(f"{self._number}/{name}/{rank}").removeprefix(_GAVE_UP).split()
        return bool(missed) and str(self.group.rank).encode() not in missed

    def _wait_slice(self, name: str, rank: int) -> bytes | None:
        key = f"{self._number}/{name}/{rank}"
        answer = self._read(key)
        if answer is None:
            with contextlib.suppress(Exception):  # each kind of store raises its own timeout
                self.group.store.wait([key], timedelta(milliseconds=200))
            answer = self._read(key)
            if answer is None:
                time.sleep(0.01)  # a store does not wait for the next value of a key
        return answer

    def finish(self) -> None:
        """Take back what everybody has read: all rounds but the last."""
        for key in self._keys[:-1]:
            with contextlib.suppress(Exception):
                self.group.store.delete_key(key)

    def abandon(self) -> None:
        """Others never came: our next construction, their first, takes this number again.

        What we published is marked, or who comes later would take it for us. Nothing is deleted: a
        rank that has just seen a key would wait for it.
        """
        mark = _GAVE_UP + " ".join(map(str, self.missed)).encode()
        for key in self._keys:
            with contextlib.suppress(Exception):
                self.group.store.set(key, mark)
        with contextlib.suppress(Exception):
            self.group.store.add(f"count/{self.group.rank}", -1)


def died_early(me: int, dead: int) -> EPError:
    """E110 before there is a buffer."""
    what = f"lost rank {dead}: its process ended during construction"
    return make_error("E110", what, rank=me, peer=dead)
