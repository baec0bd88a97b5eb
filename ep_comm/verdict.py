"""From a backend's verdict on an operation to the exception a user reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ep_comm import _core
from ep_comm.errors import EPError, make_error
from ep_comm.handle import LAYOUTS
from ep_comm.replicas import KEY_MARK

_SITES = {
    _core.Site.SLOT: "to finish its earlier operation",
    _core.Site.ENTRY: "to enter",
    _core.Site.BASE: "to place our rows",
    _core.Site.ROWS: "to send its rows",
    _core.Site.PULLED: "to read our rows",
    _core.Site.LINE: "to send its rows",
    _core.Site.RAIL_NOTICE: "to enter, over the rail",
    _core.Site.RAIL_CHUNK: "to send over the rail",
    _core.Site.RAIL_CREDIT: "to make room on the rail",
}
_OPS = {int(_core.OpKind.DISPATCH): "dispatch", int(_core.OpKind.COMBINE): "combine"}
_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
_QUANTIZE = ("None", "fp8", "fp8_ue8m0")


class Outcome(Protocol):
    """What a sentence is made of; `_core.Outcome` is one."""

    @property
    def code(self) -> int: ...
    @property
    def site(self) -> _core.Site: ...
    @property
    def rank(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def seq(self) -> int: ...
    @property
    def peer_seq(self) -> int: ...
    @property
    def waited_s(self) -> float: ...
    @property
    def want(self) -> int: ...
    @property
    def have(self) -> int: ...
    @property
    def detail(self) -> Sequence[int]: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class PeerState:
    """What can be found out about a peer's process from here."""

    pid: int  # 0 = not visible
    is_far: bool = False  # on another node, whose memory we do not reach

    def describe(self) -> str:
        """Part of a sentence: its process is alive, stopped or gone; "" when it is not visible."""
        if self.pid <= 0:
            return ""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:
            return "its process is gone"
        if state in "Tt":
            return "its process is alive but stopped"
        return "its process is gone" if state in "ZX" else "its process is alive, outside ep_comm"


def error_of(outcome: Outcome, *, op: str, tag: str, peer: PeerState) -> EPError:
    """The exception for a failed outcome of this rank's operation `op`."""
    code, p = outcome.code, outcome.peer
    facts: dict[str, Any] = {"rank": outcome.rank, "peer": p, "op": op, "tag": tag}
    facts["seq"] = outcome.seq or None  # not every call got as far as a number
    if code == 1:  # a signal ended the wait; the exception it raised has already been seen
        return make_error("E111", "was interrupted: the communicator stopped there", **facts)
    if code == 340:  # nobody is to blame
        facts["peer"] = None
        return make_error("E340", "is closed: at close(), while this call waited", **facts)
    return make_error(f"E{code}", _sentence(outcome, peer), **facts)


def _sentence(o: Outcome, peer: PeerState) -> str:
    """What `EPError` takes as `what`; the rows of docs/errors.md, with numbers."""
    p, detail = o.peer, o.detail
    if o.code < 200:
        return _liveness(o, peer)
    if o.code == 213:
        count, token, slot, expert = detail
        return f"got {count} bad ids from rank {p}: first token {token}, k {slot}, id {expert}"
    if o.code == 220:
        field = _core.DESCRIPTOR_FIELDS[detail[0]]
        mine, theirs = _name(field, o.want), _name(field, o.have)
        return f"disagrees with rank {p}: {field} {mine} here, {theirs} there"
    if o.code == 230 and not o.reason:
        where = "" if p == o.rank else f" for rank {p}"
        return f"has too many tokens{where}: got {o.have} rows, want <= {o.want}"
    if o.code == 231:
        whose = "" if p == o.rank else f" on rank {p}"
        need, free = (detail[0], detail[1]) if detail[0] else (o.want, o.have)
        return f"is out of arena memory{whose}: need {need} B in one piece, free {free} B"
    if o.code == 240:
        return f"refused count of rank {p}: {o.have}, limit {o.want}"
    if o.code == 241 and o.want == _core.BAD_SEAL:
        who = f"knows from rank {detail[0] - 1} of" if detail[0] else "read"
        return f"{who} a damaged row from rank {p}: token {o.have} does not fit its checksum"
    if o.code == 241:
        return f"read a bad sequence number from rank {p}: {o.have}, want {o.want}"
    if o.code == 242 and detail[2]:
        return f"miscounts with rank {p}: expert {detail[2] - 1} here, sent {o.want}, got {o.have}"
    if o.code == 242:
        return f"miscounts with rank {p}: want {o.want} rows, got {o.have}"
    if o.code == 330:
        mine = _OPS.get(o.want, "?")
        theirs = _OPS.get(o.have, "?")
        if detail[0]:  # somebody else found out and told us
            other = f"rank {detail[0] - 1} in {mine} #{detail[1]}"
            return f"is out of step: rank {p} in {theirs} #{detail[1]}, {other}"
        return f"is out of step: rank {p} in {theirs} #{o.seq}, rank {o.rank} in {mine} #{o.seq}"
    reason = o.reason or "rejected its arguments"
    return f"cannot go on: rank {p} {reason}"


def _liveness(o: Outcome, peer: PeerState) -> str:
    """E101 to E113: who, how long, where, and what the peer was last seen doing."""
    p = o.peer
    last = f"last entered #{o.peer_seq}" if o.peer_seq else "entered nothing yet"
    if peer.is_far:
        last = "is on another node"
    found = (
        f"; rank {o.detail[0] - 1} found out" if o.detail[0] and o.detail[0] - 1 != o.rank else ""
    )
    if o.code == 113:
        return "is masked: the others go on without it"
    if o.code == 110:
        return f"lost rank {p}: its process ended; it {last}{found}"
    if o.code == 112:
        return f"lost rank {p}: its CUDA context broke; it {last}{found}"
    if o.code == 111:
        return f"lost rank {p}: it closed its buffer or raised; it {last}{found}"
    state = peer.describe()
    known = f"it {last}" + (f", {state}" if state else "") + found
    if p == o.rank:
        return f"was given up by rank {o.detail[0] - 1}: it {last}"
    if o.code == 101:
        return f"waited {o.waited_s:.1f} s for rank {p} {_SITES.get(o.site, '')}: {known}"
    counted = o.site == _core.Site.ROWS and o.have >= 0
    moved = f"got {o.have} of {o.want} rows, " if counted else ""
    return f"stalled on rank {p}, {o.waited_s:.1f} s {_SITES.get(o.site, '')}: {moved}{known}"


def _name(field: str, value: int) -> str:
    """A value of a field of the call's descriptor, as the caller spelled it."""
    names: dict[str, tuple[str, ...]] = {"layout": LAYOUTS, "dtype": _DTYPES, "quantize": _QUANTIZE}
    table = names.get(field, ())
    if 0 <= value < len(table):
        return table[value]
    if field == "routing" and value & KEY_MARK:
        return f"placement {value >> 16 & (1 << 45) - 1:x} layer {value & 0xFFFF}"
    if field == "flags":
        bits = ("weights", "static", "cached", "weighted", "per_rank")
        return "+".join(name for i, name in enumerate(bits) if value >> i & 1) or "none"
    return "none" if field == "capacity" and value < 0 else str(value)
