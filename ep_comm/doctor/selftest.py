"""D11: two ranks, two processes, one dispatch and one combine through the native core, bit by bit.

Works without torch and without `torch.distributed`: the core takes addresses. Rank 1 is forked from
a fresh process that has no threads; memory crosses by SCM_RIGHTS, exactly as it does for a Buffer.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from typing import Any, Final

RANKS: Final = 2
EXPERTS: Final = 4
TOPK: Final = 2
HIDDEN: Final = 8
TOKENS: Final = 3
ARENA_BYTES: Final = 1 << 20
CLOCKS: Final = (60.0, 2.0, 2.0)  # arrival warning, arrival, progress

# Expert ids of each token; rank 0 owns experts 0 and 1. Tokens go to one, to both,
# twice to one, nowhere.
ROUTING: Final = (
    ((0, 2), (1, 0), (3, -1)),
    ((3, 1), (-1, -1), (2, 3)),
)


def value(rank: int, token: int) -> float:
    return float(rank * TOKENS + token + 1)


def expected_rows(rank: int) -> list[float]:
    """The first element of every compact row: by source rank, then token."""
    return [
        value(source, token)
        for source in range(RANKS)
        for token, ids in enumerate(ROUTING[source])
        if any(e >= 0 and e // (EXPERTS // RANKS) == rank for e in ids)
    ]


def expected_sums(rank: int) -> list[float]:
    """Each owner gives back the row times (owner + 1)."""
    return [
        sum(value(rank, token) * (owner + 1) for owner in range(RANKS) if _goes_to(ids, owner))
        for token, ids in enumerate(ROUTING[rank])
    ]


def _goes_to(ids: tuple[int, ...], owner: int) -> bool:
    return any(e >= 0 and e // (EXPERTS // RANKS) == owner for e in ids)


def run_rank(rank: int, sock: socket.socket, other_pid: int) -> str | None:
    """One rank. None when every bit is right, else what was wrong: a code and a sentence."""
    from ep_comm import _core
    from ep_comm.bootstrap import receive_fds, send_fds

    shape = _core.Shape()
    shape.num_ranks, shape.num_slots, shape.num_experts = RANKS, 2, EXPERTS
    shape.max_local_experts, shape.num_topk, shape.max_tokens = EXPERTS // RANKS, TOPK, TOKENS
    control_bytes = _core.ControlLayout(shape).end
    control = _core.Segment.create("ep_comm_doctor", control_bytes)
    memory = _core.Segment.create("ep_comm_doctor", ARENA_BYTES)
    send_fds(sock, [control.fd, memory.fd], [control_bytes, memory.bytes], CLOCKS[1])
    fds, sizes = receive_fds(sock, 2, CLOCKS[1])
    theirs = [_core.Segment.map(fd, size) for fd, size in zip(fds, sizes, strict=True)]
    for fd in fds:
        os.close(fd)
    arena = _core.Arena(memory)
    own, peer = (control, memory, -1, -1, 0), (theirs[0], theirs[1], -1, sock.fileno(), other_pid)
    comm = _core.CpuCommunicator(
        shape, rank, 1, [e // (EXPERTS // RANKS) for e in range(EXPERTS)],
        [own, peer] if rank == 0 else [peer, own], arena, CLOCKS,
    )  # fmt: skip
    try:
        return _dispatch_and_combine(comm, rank, memory.address)
    finally:
        comm.close()


def _dispatch_and_combine(comm: Any, rank: int, arena_address: int) -> str | None:
    from ep_comm import _core

    x = _floats(value(rank, t) for t in range(TOKENS) for _ in range(HIDDEN))
    ids = (ctypes.c_int64 * (TOKENS * TOPK))(*(e for row in ROUTING[rank] for e in row))
    send_row, rank_counts = (ctypes.c_int32 * len(ids))(), (ctypes.c_int64 * (2 * RANKS))()
    expert_counts = (ctypes.c_int32 * (EXPERTS // RANKS))()
    a = _core.DispatchArgs()
    a.x, a.topk_idx, a.send_row = (ctypes.addressof(v) for v in (x, ids, send_row))
    a.rank_counts, a.expert_counts = ctypes.addressof(rank_counts), ctypes.addressof(expert_counts)
    a.num_tokens, a.hidden, a.x_stride, a.num_topk = TOKENS, HIDDEN, 4 * HIDDEN, TOPK
    a.dtype = _core.DType.F32
    got = comm.dispatch(a)
    if got.outcome.code != 0:
        return f"E{got.outcome.code} dispatch failed on rank {rank}"
    rows = expected_rows(rank)
    if got.num_recv != len(rows):
        return f"E242 rank {rank} received {got.num_recv} rows"
    recv_src = (ctypes.c_int32 * (2 * len(rows)))()
    out = _core.UnpackArgs()
    out.recv_src, out.max_recv, out.max_rows = ctypes.addressof(recv_src), len(rows), len(rows)
    if not comm.unpack(got, a, out):
        return f"E240 rank {rank} refused the metadata of its peer"
    # The one extent ever granted for rows is the arena's first.
    received = (ctypes.c_float * (len(rows) * HIDDEN)).from_address(arena_address)
    if list(received) != [v for v in rows for _ in range(HIDDEN)]:
        return f"E241 rank {rank} received other rows than were sent"
    return _combine(comm, rank, received, ids, send_row, rank_counts, recv_src, got)


def _combine(
    comm: Any, rank: int, received: Any, ids: Any, send_row: Any, rank_counts: Any, recv_src: Any,
    got: Any,
) -> str | None:  # fmt: skip
    from ep_comm import _core

    y, out = _floats(v * (rank + 1) for v in received), _floats([-1.0] * (TOKENS * HIDDEN))
    a = _core.CombineArgs()
    a.x, a.topk_idx, a.send_row, a.rank_counts, a.recv_src, a.out = (
        ctypes.addressof(v) for v in (y, ids, send_row, rank_counts, recv_src, out)
    )
    a.num_tokens, a.num_recv, a.num_rows = TOKENS, got.num_recv, got.num_recv
    a.hidden, a.num_topk, a.dtype, a.routing = HIDDEN, TOPK, _core.DType.F32, got.seq
    outcome = comm.combine(a)
    if outcome.code != 0:
        return f"E{outcome.code} combine failed on rank {rank}"
    if list(out) != [v for v in expected_sums(rank) for _ in range(HIDDEN)]:
        return f"E241 combine on rank {rank} gave another sum"
    return None


def _floats(values: Any) -> Any:
    listed = list(values)
    return (ctypes.c_float * len(listed))(*listed)


def run() -> dict[str, Any]:
    """Both ranks; what rank 1 found comes back through its pipe."""
    ours, theirs = socket.socketpair()
    parent, (reader, writer) = os.getpid(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.write(writer, (_guarded(1, theirs, parent) or "").encode())
        finally:
            os._exit(0)
    theirs.close()
    os.close(writer)
    found = _guarded(0, ours, pid)
    with os.fdopen(reader) as pipe:
        found = found or pipe.read() or None
    os.waitpid(pid, 0)
    return {"ok": found is None, "detail": found or "every bit as it should be"}


def _guarded(rank: int, sock: socket.socket, other_pid: int) -> str | None:
    try:
        return run_rank(rank, sock, other_pid)
    except Exception as error:  # whatever it is, a user wants to read it here
        return f"E405 rank {rank}: {type(error).__name__}: {error}"[:300]


def main() -> None:
    sys.stdout.write(json.dumps(run()))
