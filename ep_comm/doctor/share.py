"""D4's other process: it takes sealed memory by SCM_RIGHTS, as ranks of two processes do.

Reads the name of an abstract socket from stdin, connects, sends a sealed memfd and looks for the
answer in it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import socket
import struct
import sys
from typing import Any, Final

PAGE: Final = mmap.PAGESIZE
QUESTION: Final = b"ep_comm asks"
ANSWER: Final = b"ep_comm answers"
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def sealed_page() -> int:
    """A descriptor of one page that nobody can resize or find by name."""
    fd = os.memfd_create("ep_comm_doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def listen() -> tuple[socket.socket, bytes]:
    """A socket without a file, under a random name."""
    name = b"\0ep_comm-doctor-" + secrets.token_hex(16).encode()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(name)
    sock.listen(1)
    return sock, name


def peer_uid(sock: socket.socket) -> int:
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def serve(listener: socket.socket, limit_s: float) -> str | None:
    """Our side: take the descriptor, answer in the memory behind it. The reason if that failed."""
    listener.settimeout(limit_s)
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(limit_s)
        if peer_uid(sock) != os.getuid():
            return f"SO_PEERCRED says uid {peer_uid(sock)}, we are {os.getuid()}"
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        if not fds:
            return "the message came without its descriptor"
        try:
            if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                return "seals were lost"
            with mmap.mmap(fds[0], PAGE) as memory:
                if memory[: len(QUESTION)] != QUESTION:
                    return "the memory is not the same"
                memory[: len(ANSWER)] = ANSWER
        finally:
            os.close(fds[0])
        sock.sendall(b"!")
    return None


def ask(name: bytes, limit_s: float) -> dict[str, Any]:
    """The helper's side."""
    step = "memfd_create"
    try:
        fd = sealed_page()
        with mmap.mmap(fd, PAGE) as memory, socket.socket(socket.AF_UNIX) as sock:
            memory[: len(QUESTION)] = QUESTION
            step = "connect"
            sock.settimeout(limit_s)
            sock.connect(name)
            step = "sendmsg with SCM_RIGHTS"
            socket.send_fds(sock, [b"?"], [fd])
            sock.recv(1)
            same = memory[: len(ANSWER)] == ANSWER
        os.close(fd)
        return {"ok": same, "detail": "the answer is there" if same else "nothing was written back"}
    except OSError as error:
        return {"ok": False, "detail": f"{step}: {error.strerror or error}"}


def main() -> None:
    name, limit_s = json.loads(sys.stdin.read())
    print(json.dumps(ask(bytes.fromhex(name), float(limit_s))))
