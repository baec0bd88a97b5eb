"""What a rank says of itself, in one fixed struct, and the verdict when ranks disagree."""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from ep_comm.bootstrap.descriptors import no_descriptors
from ep_comm.errors import EPError, make_error

MAGIC: Final = b"EPHELLO1"  # also opens the greeting over a socket
_HEAD: Final = struct.Struct("<8sII")  # magic, length of the body, crc32 of the body


def _blank(fmt: str) -> Any:
    return "" if fmt.endswith("s") else 0


def _free(fmt: str) -> Any:
    """A field that may differ between ranks."""
    return field(default=_blank(fmt), metadata={"fmt": fmt, "code": None})


def _same(fmt: str, code: str) -> Any:
    """A field all ranks must agree on, and the error when they don't."""
    return field(default=_blank(fmt), metadata={"fmt": fmt, "code": code})


@dataclass(frozen=True)
class Hello:
    """The construction handshake: one per rank, compared field by field.

    A string too long for its field is cut, on every rank alike.
    """

    protocol: int = _same("I", "E222")
    version: str = _same("24s", "E222")
    structs: int = _same("Q", "E222")  # hash of the sizes of all structs on the wire
    world_size: int = _same("i", "E406")
    members: int = _same("Q", "E406")  # hash of the ordered membership
    num_experts: int = _same("q", "E221")
    expert_map: int = _same("Q", "E221")  # hash
    hidden: int = _same("q", "E221")
    num_topk: int = _same("i", "E221")
    max_tokens: int = _same("q", "E221")
    num_slots: int = _same("i", "E221")
    paranoid: int = _same("i", "E221")
    masking: int = _same("i", "E221")
    direct: int = _same("i", "E221")
    backend: str = _same("16s", "E221")  # as asked for
    ranks_per_node: int = _same("i", "E221")  # as asked for, 0 = those of a host
    device: str = _same("16s", "E221")
    rank: int = _free("i")
    pid: int = _free("q")
    boot_id: bytes = field(default=bytes(16), metadata={"fmt": "16s", "code": None})
    pid_namespace: int = _free("Q")
    gpu: int = _free("Q")  # hash of its UUID, 0: none
    token: bytes = field(default=bytes(16), metadata={"fmt": "16s", "code": None})  # random
    refusal: str = _free("128s")  # why this rank cannot construct: "E203 rejected ..."; "" = it can

    @classmethod
    def _format(cls) -> struct.Struct:
        return struct.Struct("<" + "".join(f.metadata["fmt"] for f in fields(cls)))

    def pack(self) -> bytes:
        values = [
            v.encode("ascii", "replace") if isinstance(v, str) else v for v in vars(self).values()
        ]
        body = self._format().pack(*values)
        return _HEAD.pack(MAGIC, len(body), zlib.crc32(body)) + body

    @classmethod
    def unpack(cls, data: bytes, sender: int) -> Hello:
        """Parse what `sender` published.

        Raises:
            EPEnvironmentError: E406, anything but a whole, intact Hello of that rank.
            EPMismatch: E222, a Hello of another version, recognized by its length.
        """

        def reject(what: str) -> EPError:
            return make_error("E406", f"rejected bootstrap of rank {sender}: {what}")

        form = cls._format()
        if len(data) < _HEAD.size:
            raise reject(f"{len(data)} bytes")
        magic, length, crc = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise reject("magic")
        if length != form.size:  # another version: its own fields cannot be read, its existence can
            what = f"rank {sender} speaks another handshake, of {length} bytes, want {form.size}"
            raise make_error("E222", f"cannot construct: {what}")
        if len(data) != _HEAD.size + length:
            raise reject(f"length {len(data)}")
        body = data[_HEAD.size :]
        if zlib.crc32(body) != crc:
            raise reject("checksum")
        values: list[Any] = []
        for f, value in zip(fields(cls), form.unpack(body), strict=True):
            if f.type == "str":
                try:
                    value = value.rstrip(b"\0").decode("ascii")
                except UnicodeDecodeError:
                    raise reject(f.name) from None
            values.append(value)
        hello = cls(*values)
        if hello.rank != sender:
            raise reject(f"rank {hello.rank}")
        return hello

    def same_process(self, other: Hello) -> bool:
        """Whether two ranks are threads of one process."""
        mine = (self.boot_id, self.pid_namespace, self.pid)
        return mine == (other.boot_id, other.pid_namespace, other.pid)

    def same_gpu(self, other: Hello) -> bool:
        """Whether two ranks run on one GPU, as threads of a process or under MPS."""
        if self.gpu == 0:
            return self.same_process(other)
        return (self.boot_id, self.gpu) == (other.boot_id, other.gpu)

    def shares_processes(self, other: Hello) -> bool:
        """Whether two ranks are processes that see each other."""
        visible = (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)
        return visible and self.pid != other.pid


_REFUSALS: Final = ("E111", "E203", "E210", "E211", "E212", "E401", "E405", "E407")


def check_agreement(me: int, hellos: Sequence[Hello]) -> None:
    """Raise the same error on every rank when one refused or a field differs.

    Names one rank of the minority, its value, and the value of the majority.
    """
    for hello in hellos:
        if hello.refusal:
            code, _, what = hello.refusal.partition(" ")
            code = code if code in _REFUSALS else "E406"
            raise make_error(
                code, f"cannot construct: rank {hello.rank} {what}", rank=me, peer=hello.rank
            )
    for f in fields(Hello):
        code = f.metadata["code"]
        values = [getattr(h, f.name) for h in hellos]
        if code is None or len(set(values)) == 1:
            continue
        common = max(set(values), key=lambda v: (values.count(v), -values.index(v)))
        odd = next(r for r, v in enumerate(values) if v != common)
        others = _name_ranks([r for r, v in enumerate(values) if v == common])
        what = f"cannot construct: rank {odd} has {f.name}={values[odd]}, {others} {common}"
        raise make_error(code, what, rank=me, peer=odd)


def _name_ranks(ranks: list[int]) -> str:
    """ "rank 3 has" or "ranks 0,2-7 have"."""
    runs: list[str] = []
    for r in ranks:
        if runs and int(runs[-1].split("-")[-1]) == r - 1:
            runs[-1] = f"{runs[-1].split('-')[0]}-{r}"
        else:
            runs.append(str(r))
    return f"rank {runs[0]} has" if len(ranks) == 1 else f"ranks {','.join(runs)} have"


# Where the kernel tells no boot id, every process is a host of its own and shares no memory.
_NO_BOOT_ID: Final = secrets.token_bytes(16)


def host_identity() -> tuple[bytes, int]:
    """Boot id of the kernel and our PID namespace; hostnames lie, and containers share them."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and (limit := no_descriptors(error)):
            raise limit from error
        boot = _NO_BOOT_ID
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return boot, namespace


def group_token(hellos: Sequence[Hello]) -> bytes:
    """Sixteen bytes only the members know, the same on all of them."""
    return hashlib.sha256(b"".join(h.token for h in hellos)).digest()[:16]
