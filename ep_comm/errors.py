"""Errors: one class per family, one code per cause, one sentence per fault.

The sentence always reads the same way, on one line, so that people and scripts can read it:

    <Class>[<code>]: rank <me> <what happened> in <op> #<seq> (tag "<tag>"): <details>.
    Fix: <action>.

What is not known is left out. Codes are never reused or renumbered; `docs/errors.md` has a
paragraph for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

MAX_SENTENCE: Final = 400

Scope = Literal["call", "comm", "init", "local"]


class EPError(Exception):
    """Base of everything ep_comm raises on purpose.

    Args:
        what: what happened, after "rank <me>"; text behind its first ": " follows the operation.
        code: "E101" and so on; must be in CODES.
        rank, peer: who raises, and who is to blame (None = not known, or nobody).
        op, seq, tag: the operation, its number on this buffer, and the caller's own name for it.
        fix: one action; the code's default when left out.

    The message is one line of at most MAX_SENTENCE characters. Errors pickle and copy whole.
    """

    def __init__(
        self,
        what: str,
        *,
        code: str,
        rank: int | None = None,
        peer: int | None = None,
        op: str | None = None,
        seq: int | None = None,
        tag: str = "",
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.code = code
        self.rank = rank
        self.peer = peer
        self.op = op
        self.seq = seq
        self.tag = tag
        self.fix = CODES[code].fix if fix is None else fix
        super().__init__(self._sentence())

    @property
    def scope(self) -> Scope:
        """What still works afterwards.

        "call": only this call failed, on all ranks alike; "comm": the communicator is dead, close
        and rebuild; "init": nothing was made; "local": only this process misused its buffer.
        """
        return CODES[self.code].scope

    def as_dict(self) -> dict[str, Any]:
        """The same facts for logs and monitoring; stable keys, values that JSON can hold."""
        keys = ("code", "rank", "peer", "op", "seq", "tag", "fix", "scope", "what")
        return {"class": type(self).__name__, **{key: getattr(self, key) for key in keys}}

    def _sentence(self) -> str:
        head, colon, details = self.what.partition(": ")
        if self.rank is not None:
            head = f"rank {self.rank} {head}"
        if self.op is not None:
            head += f" in {self.op}" + (f" #{self.seq}" if self.seq is not None else "")
        if self.tag:
            head += f' (tag "{self.tag}")'
        text = f"{type(self).__name__}[{self.code}]: {head}{colon}{details}"
        fix = f". Fix: {self.fix}." if self.fix else "."
        room = MAX_SENTENCE - len(fix)
        if len(text) > room:
            text = text[: room - 3] + "..."
        return text.replace("\n", " ") + fix.replace("\n", " ")

    def __reduce__(self) -> tuple[Any, ...]:
        fields = ("rank", "peer", "op", "seq", "tag", "fix")
        return (_rebuild, (self.code, self.what, {name: getattr(self, name) for name in fields}))


class EPTimeout(EPError):
    """A peer did not come, or stopped moving, within its limit (E101, E102, E120)."""


class EPPeerDied(EPError):
    """A peer's process ended without closing its buffer (E110)."""


class EPPeerLeft(EPError):
    """A peer closed its buffer, raised, or was interrupted while we still waited for it (E111)."""


class EPPeerFault(EPError):
    """A peer's CUDA context broke (E112)."""


class EPMasked(EPError):
    """The other ranks have masked this one and go on without it (E113)."""


class EPArgumentError(EPError):
    """An argument of this call, here or on the peer named, is not acceptable (E200 to E213)."""


class EPMismatch(EPError):
    """Ranks passed different arguments (E220) or were configured differently (E221, E222)."""


class EPCapacityError(EPError, ValueError):
    """More tokens than the buffer or the call allows (E230)."""


class EPMemoryError(EPError):
    """No memory for this operation (E231) or at construction (E232)."""


class EPCorruption(EPError):
    """A peer's counts, sequence numbers or checksums cannot be right (E240 to E242)."""


class EPUsageError(EPError):
    """Calls in an order, or with objects, that cannot work (E3xx)."""


class EPClosedError(EPUsageError):
    """The buffer was closed (E340)."""


class EPEnvironmentError(EPError):
    """This machine lacks something the buffer needs (E4xx)."""


class EPFabricError(EPError):
    """NVSHMEM, a network card or a link (E5xx)."""


# E200 is also a TypeError, E201 to E213 also a ValueError, as callers of tensor libraries expect.
# Both are called EPArgumentError: that is what users catch, and what the sentence says.
class _TypeArgument(EPArgumentError, TypeError): ...


class _ValueArgument(EPArgumentError, ValueError): ...


for _special in (_TypeArgument, _ValueArgument):
    _special.__name__ = _special.__qualname__ = "EPArgumentError"


@dataclass(frozen=True)
class CodeInfo:
    """What a code means to a program: its class, what still works afterwards, what to do."""

    cls: type[EPError]
    scope: Scope
    cause: str
    fix: str


# One line per code, however long: it is a table. Its columns are those of CodeInfo.
CODES: Final[dict[str, CodeInfo]] = {
    "E101": CodeInfo(EPTimeout, "comm", "peer never entered the op", "find out where that rank is"),
    "E102": CodeInfo(EPTimeout, "comm", "transfer stalled", "check that rank and its link"),
    "E110": CodeInfo(EPPeerDied, "comm", "process died", "read its log, close(), rebuild"),
    "E111": CodeInfo(EPPeerLeft, "comm", "peer closed or raised", "read its traceback"),
    "E112": CodeInfo(EPPeerFault, "comm", "peer's CUDA context broke", "run that rank's kernel under a sanitizer"),
    "E113": CodeInfo(EPMasked, "comm", "masked by the others", "find out why it was late, close(), rebuild on all ranks"),
    "E120": CodeInfo(EPTimeout, "init", "ranks absent", "start all ranks"),
    "E200": CodeInfo(_TypeArgument, "call", "dtype, type", "cast it"),
    "E201": CodeInfo(_ValueArgument, "call", "shape", "reshape it"),
    "E202": CodeInfo(_ValueArgument, "call", "device, stride, alignment", "pass .contiguous() on the buffer's device"),
    "E203": CodeInfo(_ValueArgument, "call", "bad option or variable", "correct it"),
    "E210": CodeInfo(_ValueArgument, "call", "top-k over limit", "see ep_comm.capabilities()"),
    "E211": CodeInfo(_ValueArgument, "call", "hidden breaks a rule", "pad it"),
    "E212": CodeInfo(_ValueArgument, "init", "bad expert map, rank count", "correct the map"),
    "E213": CodeInfo(_ValueArgument, "call", "expert id outside [-1, num_experts)", "fix the router; -1 = none"),
    "E220": CodeInfo(EPMismatch, "call", "per-call arguments differ", "pass the same on every rank"),
    "E221": CodeInfo(EPMismatch, "init", "configuration differs", "pass the same on every rank"),
    "E222": CodeInfo(EPMismatch, "init", "version, ABI differ", "install one wheel everywhere"),
    "E230": CodeInfo(EPCapacityError, "call", "batch over capacity", "raise the limit or send fewer tokens"),
    "E231": CodeInfo(EPMemoryError, "call", "allocation failed in op", "free received tensors or raise arena_bytes"),
    "E232": CodeInfo(EPMemoryError, "init", "allocation failed at start", "lower arena_bytes"),
    "E240": CodeInfo(EPCorruption, "comm", "count over capacity", "report this bug"),
    "E241": CodeInfo(EPCorruption, "comm", "stale epoch, checksum", "check the machine's memory; report this"),
    "E242": CodeInfo(EPCorruption, "comm", "sent differs from received", "report this bug"),
    "E301": CodeInfo(EPUsageError, "init", "built during capture", "construct before capturing"),
    "E302": CodeInfo(EPUsageError, "comm", "old graph replayed", "capture again"),
    "E310": CodeInfo(EPUsageError, "call", "slot busy, view reused, unordered stream", "wait for the earlier operation"),
    "E311": CodeInfo(EPUsageError, "call", "needs all ranks, some are masked", "make slab calls, unmask(), or rebuild without them"),
    "E320": CodeInfo(EPUsageError, "call", "foreign or stale handle", "pass the handle of a dispatch on this buffer"),
    "E330": CodeInfo(EPUsageError, "comm", "ranks in different ops", "make every rank call in the same order"),
    "E340": CodeInfo(EPClosedError, "local", "used after close()", "keep the buffer open"),
    "E341": CodeInfo(EPUsageError, "local", "used after fork", "use the spawn start method"),
    "E401": CodeInfo(EPEnvironmentError, "init", "no usable GPU", "check the driver and CUDA_VISIBLE_DEVICES"),
    "E402": CodeInfo(EPEnvironmentError, "init", "driver too old", "upgrade it"),
    "E403": CodeInfo(EPEnvironmentError, "init", "no kernel for this architecture", "install a matching wheel"),
    "E404": CodeInfo(EPEnvironmentError, "init", "required backend or NVLink absent", "allow a fallback: backend='auto'"),
    "E405": CodeInfo(EPEnvironmentError, "init", "memory sharing refused", "allow it in the container"),
    "E406": CodeInfo(EPEnvironmentError, "init", "bootstrap rejected", "check the launcher"),
    "E407": CodeInfo(EPEnvironmentError, "init", "OS limit", "raise the limit"),
    "E408": CodeInfo(EPEnvironmentError, "init", "unsafe path", "own it, mode 0700"),
    "E409": CodeInfo(EPEnvironmentError, "init", "MIG, unsupported sharing", "give each rank a whole GPU"),
    "E501": CodeInfo(EPFabricError, "init", "NVSHMEM absent, mismatched", "install ep-comm[nvshmem]"),
    "E502": CodeInfo(EPFabricError, "init", "NIC sets differ", "use the same rails on every rank"),
    "E503": CodeInfo(EPFabricError, "comm", "error completion", "check link and routing"),
    "E504": CodeInfo(EPFabricError, "comm", "Xid, NVLink error", "drain the node"),
    "E505": CodeInfo(EPFabricError, "init", "fabric handle refused", "start IMEX, or use POSIX descriptors"),
}  # fmt: skip


def shown(value: object) -> str:
    """repr, short, also of an object that cannot say what it is."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def make_error(code: str, what: str, **facts: Any) -> EPError:
    """The error of `code`, of its class; `facts` are the keyword arguments of EPError."""
    return CODES[code].cls(what, code=code, **facts)


def _rebuild(code: str, what: str, facts: dict[str, Any]) -> EPError:
    return make_error(code, what, **facts)
