"""Descriptors: how they travel over a socket, and what it means that no more may be opened."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from collections.abc import Sequence

from ep_comm.errors import EPError, make_error


def send_fds(sock: socket.socket, fds: Sequence[int], sizes: Sequence[int], limit_s: float) -> None:
    """Hand descriptors to the peer, with the size of the memory behind each."""
    sock.settimeout(limit_s)
    socket.send_fds(sock, [struct.pack(f"<{len(sizes)}q", *sizes)], list(fds))


def receive_fds(sock: socket.socket, count: int, limit_s: float) -> tuple[list[int], list[int]]:
    """Descriptors of the peer, close-on-exec, and the size of the memory behind each."""
    sock.settimeout(limit_s)
    # Not socket.recv_fds, which drops its flags: another thread may exec before we mark them.
    data, ancillary, flags, _ = sock.recvmsg(
        8 * count, socket.CMSG_LEN(4 * count), socket.MSG_CMSG_CLOEXEC
    )
    fds = [
        fd
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("i", payload[: len(payload) // 4 * 4])
    ]
    if len(fds) != count or len(data) != 8 * count or flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        if flags & socket.MSG_CTRUNC and len(fds) < count:  # the kernel had no number for them
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise OSError(f"got {len(fds)} descriptors and {len(data)} bytes")
    return fds, list(struct.unpack(f"<{count}q", data))


def no_descriptors(error: OSError, me: int | None = None) -> EPError | None:
    """E407 when the reason is that no more files may be opened."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = os.strerror(error.errno)
    what = f"hit RLIMIT_NOFILE: {why}, limit {most}, need about 10 and 4 for each rank"
    return make_error("E407", what, rank=me)
