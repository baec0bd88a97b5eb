"""NVSHMEM under a buffer that spans nodes: the plugin, the process's one world, memory from it.

Nothing here is imported before such a buffer is made. The library has one world per process, in
which ranks of a buffer are PEs under numbers of their own; memory is taken in it by all PEs
together. So a buffer's ranks are all PEs of the world, and segments of closed buffers are kept for
the next: giving them back would be a barrier, and a close must not wait for anybody. A world that
has lost a PE is lost, too: its barriers would wait for that PE.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ep_comm._build_info import build_info
from ep_comm.backends import nvshmem_versions as versions
from ep_comm.backends.mapping import agree
from ep_comm.bootstrap import Exchange
from ep_comm.errors import EPError, make_error

ID_BYTES: Final = 128
PACKAGE: Final = "nvidia-nvshmem-cu13"
_STATE: Final = struct.Struct("<8s?3x128s")  # magic, whether there is a world, rank 0's id for one
_PLACE: Final = struct.Struct("<8sii")  # magic, PE, PEs of the world
_HELD: Final = struct.Struct("<q?")  # bytes, free
_MAGIC: Final = b"EPNVSHM1"


# ---- the libraries ----


def load() -> Any:
    """The module `ep_comm._nvshmem`.

    Raises:
        EPFabricError: E501, it was not built, the host library is not installed, or does not fit.
    """
    missing = build_info()["nvshmem_missing"]
    if missing is not None:
        what = f"cannot load NVSHMEM: this build has no plugin for it: {missing}"
        raise make_error("E501", what, fix=f"pip install {PACKAGE}, then build ep_comm again")
    library = host_library()
    if library is None:
        raise make_error("E501", f"cannot load NVSHMEM: {PACKAGE} is not installed")
    try:
        # By its path: an editable install does not lie beside the wheel. One that torch has loaded
        # already has the same name, and is the one the plugin gets.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        plugin = _import_plugin()
    except (ImportError, OSError) as error:
        raise make_error("E501", f"cannot load NVSHMEM: {error}") from error
    check_versions(plugin, library)
    return plugin


def _import_plugin() -> ModuleType:
    from ep_comm import _nvshmem

    return _nvshmem


def host_library() -> Path | None:
    """Of the wheel; the system's where it is installed otherwise."""
    spec = find_spec("nvidia.nvshmem") if find_spec("nvidia") else None
    folders = [Path(f) / "lib" for f in (spec.submodule_search_locations or ())] if spec else []
    if "NVSHMEM_HOME" in os.environ:
        folders.append(Path(os.environ["NVSHMEM_HOME"]) / "lib")
    found = (folder / "libnvshmem_host.so.3" for folder in folders)
    return next((path for path in found if path.exists()), None)


def check_versions(plugin: Any, library: Path) -> None:
    """E501 unless the host library that is loaded and the plugin's device library fit."""
    host, device = tuple(plugin.host_version()), tuple(plugin.compiled_version())
    why = versions.why_apart(host, device)
    if why is not None:
        pair = f"host {versions.text(host)} at {library}, device {versions.text(device)}"
        fix = f"install {PACKAGE}=={versions.text(device)}, or build ep_comm beside this one"
        raise make_error("E501", f"cannot load NVSHMEM: {pair}: {why}", fix=fix)


# ---- settings, read by the library from its environment while it initializes ----


def has_nic(root: Path = Path("/sys/class/infiniband")) -> bool:
    try:
        return any(root.iterdir())
    except OSError:
        return False


def settings(nic: bool) -> list[tuple[str, str]]:
    """What we ask for where the user has not asked: IBGDA with a NIC; no multicast, unused here."""
    asked = [("NVSHMEM_DISABLE_NVLS", "1")]
    return [*asked, ("NVSHMEM_IB_ENABLE_IBGDA", "1")] if nic else asked


def transports(maps: str) -> list[str]:
    """Names of the library's transports that stayed loaded, from the text of /proc/self/maps."""
    marks = (line.rpartition("nvshmem_transport_")[2] for line in maps.splitlines()
             if "nvshmem_transport_" in line)  # fmt: skip
    return sorted({mark.partition(".")[0] for mark in marks})


# ---- who is who: pure, the same judgement on every rank ----


def judge_states(me: int, initialized: Sequence[bool]) -> bool:
    """Whether the ranks bring a world of the application; E501 when only some do."""
    if len(set(initialized)) > 1:
        odd = initialized.index(not initialized[0])
        here = "has" if initialized[odd] else "has no"
        what = f"cannot construct: rank {odd} {here} NVSHMEM world, rank 0 differs"
        fix = "initialize NVSHMEM on all ranks or on none"
        raise make_error("E501", what, rank=me, peer=odd, fix=fix)
    return initialized[0]


def pe_table(me: int, places: Sequence[tuple[int, int]]) -> list[int]:
    """The PE of each rank; E501 unless ranks and PEs are the same processes.

    Args:
        places: of each rank, its PE and the number of PEs.
    """
    size = len(places)
    for rank, (_, num_pes) in enumerate(places):
        if num_pes != size:
            what = f"cannot construct: rank {rank}'s NVSHMEM world has {num_pes} PEs, want {size}"
            fix = "make the buffer over all PEs: memory is taken by all of them together"
            raise make_error("E501", what, rank=me, peer=rank, fix=fix)
    table = [pe for pe, _ in places]
    for rank, pe in enumerate(table):
        if not 0 <= pe < size or pe in table[:rank]:
            what = f"cannot construct: rank {rank} is PE {pe} of a world that is not ours"
            raise make_error("E501", what, rank=me, peer=rank)
    return table


def free_everywhere(held: Sequence[Sequence[tuple[int, bool]]], num_bytes: int) -> int | None:
    """The first segment that no rank uses and that is large enough, by its number.

    Args:
        held: of each rank, bytes and freedom of all segments in the order in which they were taken.
    """
    for number, (size, _) in enumerate(held[0]):
        if size >= num_bytes and all(segments[number][1] for segments in held):
            return number
    return None


def _pack(record: struct.Struct, *values: object) -> bytes:
    return record.pack(_MAGIC, *values)


def _unpack(record: struct.Struct, data: bytes, sender: int) -> tuple[Any, ...]:
    if len(data) != record.size or not data.startswith(_MAGIC):
        raise make_error("E406", f"rejected bootstrap of rank {sender}: {len(data)} bytes")
    return record.unpack(data)[1:]


# ---- the world ----


@dataclass
class Segment:
    """Symmetric memory: the same offsets on every rank."""

    native: Any
    number: int
    is_free: bool = False

    @property
    def address(self) -> int:
        return int(self.native.address)

    @property
    def num_bytes(self) -> int:
        return int(self.native.bytes)


class World:
    """The NVSHMEM world of this process, seen by one rank set."""

    def __init__(self, plugin: Any, native: Any, table: list[int]) -> None:
        self.plugin, self.native, self.table = plugin, native, table
        self.segments: list[Segment] = []
        self.lost: str | None = None  # why it cannot be used again

    def take(self, exchange: Exchange, num_bytes: int) -> Segment:
        """Zeroed symmetric memory, ready on every rank. Collective.

        Raises:
            EPMemoryError: E232, on all ranks.
        """
        me = exchange.group.rank
        mine = b"".join(_HELD.pack(s.num_bytes, s.is_free) for s in self.segments)
        held = [list(_HELD.iter_unpack(data)) if len(data) == len(mine) else None
                for data in exchange.gather("nvshmem/held", mine)]  # fmt: skip
        for rank, segments in enumerate(held):
            sizes = None if segments is None else [size for size, _ in segments]
            if sizes != [s.num_bytes for s in self.segments]:
                what = f"rejected bootstrap of rank {rank}: it holds other segments"
                raise make_error("E406", what, rank=me, peer=rank)
        number = free_everywhere([s for s in held if s is not None], num_bytes)
        failure: EPError | None = None
        segment: Segment | None = None
        try:
            segment = self._reuse(number) if number is not None else self._allocate(num_bytes, me)
        except EPError as error:
            failure = error
        agree(exchange, "nvshmem/segment", me, failure)  # and zeroed everywhere
        assert segment is not None
        return segment

    def _reuse(self, number: int) -> Segment:
        segment = self.segments[number]
        self.native.clear(segment.native)
        segment.is_free = False
        return segment

    def _allocate(self, num_bytes: int, me: int) -> Segment:
        try:
            native = self.native.allocate(num_bytes)
        except self.plugin.NvshmemError as error:
            call, status = error.args
            what = f"is out of memory: {call} of {num_bytes} B: status {status}"
            raise make_error("E232", what, rank=me) from error
        if native.address == 0:
            what = f"is out of memory: nvshmem_align of {num_bytes} B: no memory on some PE"
            raise make_error("E232", what, rank=me)
        segment = Segment(native, len(self.segments))
        self.segments.append(segment)
        return segment

    def give(self, segment: Segment, *, is_clean: bool) -> None:
        """Keep it for the next buffer. Local.

        Args:
            is_clean: every put into it has arrived; otherwise a late one may still land there, and
                it is never used again.
        """
        segment.is_free = is_clean

    def lose(self, why: str) -> None:
        """A PE is gone. Local: buffers of this world may only close, and none is made again."""
        self.lost = why

    def mapped(self, segment: Segment) -> list[bool]:
        """Of each rank: whether its memory is reached by loads and stores, without a NIC."""
        return [self.native.is_mapped(segment.native, pe) for pe in self.table]

    def describe(self, segment: Segment) -> str:
        """The transport in use, for repr(buffer): "8 ranks mapped", "1 mapped, 7 by ibgda"."""
        mapped = self.mapped(segment)
        near, far = sum(mapped), len(mapped) - sum(mapped)
        if far == 0:
            return f"{near} ranks mapped"
        try:
            names = transports(Path("/proc/self/maps").read_text())
        except OSError:
            names = []
        return f"{near} mapped, {far} by {', '.join(names) or 'an unknown transport'}"


_lock: Final = threading.Lock()
_worlds: Final[dict[Any, World]] = {}  # by plugin; a process has one


def join(exchange: Exchange, *, nic: bool | None = None, plugin: Any = None) -> World:
    """The world of this process: the application's, that of an earlier buffer, or a new one.

    Args:
        exchange: over the ranks of the buffer, which are all PEs of the world.
        nic: whether to ask for IBGDA; None: look for a NIC.
        plugin: instead of `load()`.
    Raises:
        EPFabricError: E501, on all ranks alike. EPEnvironmentError: E406.

    Collective. The unique id of a new world goes from rank 0 through the exchange, 128 raw bytes.
    """
    me = exchange.group.rank
    failure: EPError | None = None
    known: World | None = None
    try:
        plugin = load() if plugin is None else plugin
        with _lock:
            known = _worlds.get(plugin)
        if known is not None and known.lost is not None:
            what = f"cannot load NVSHMEM: the world of this process is lost: {known.lost}"
            failure = make_error("E501", what, rank=me, fix="start all processes again")
    except EPError as error:
        failure = make_error(error.code, error.what, rank=me, fix=error.fix)
    agree(exchange, "nvshmem/plugin", me, failure)
    native = known.native if known is not None else _enter(exchange, plugin, nic)
    place = _pack(_PLACE, native.my_pe(), native.num_pes())
    answers = exchange.gather("nvshmem/place", place)
    places = [_unpack(_PLACE, data, rank) for rank, data in enumerate(answers)]
    table = pe_table(me, [(pe, num_pes) for pe, num_pes in places])
    if known is not None and known.table == table:
        return known
    world = World(plugin, native, table)
    if known is not None:
        world.segments = known.segments  # the same memory under another numbering of ranks
    with _lock:
        _worlds[plugin] = world
    return world


def _enter(exchange: Exchange, plugin: Any, nic: bool | None) -> Any:
    """This process's share of the world, made or found."""
    group = exchange.group
    there = bool(plugin.is_initialized())
    unique = plugin.new_id() if group.rank == 0 and not there else bytes(ID_BYTES)
    answers = exchange.gather("nvshmem/state", _pack(_STATE, there, unique))
    states = [_unpack(_STATE, data, r) for r, data in enumerate(answers)]
    judge_states(group.rank, [s[0] for s in states])
    failure: EPError | None = None
    native: Any = None
    try:
        asked = settings(has_nic() if nic is None else nic)
        native = plugin.World.join(states[0][1], group.rank, group.size, asked)
    except plugin.NvshmemError as error:
        call, status = error.args
        what = f"cannot load NVSHMEM: {call} failed with status {status}"
        failure = make_error("E501", what, rank=group.rank, fix="see NVSHMEM_DEBUG=INFO")
    agree(exchange, "nvshmem/joined", group.rank, failure)
    return native


def finalize() -> None:
    """End our share of the world. Collective over all PEs, after all buffers over them are closed.

    Nobody has to: a process that ends leaves everything to the system. The library waits here for
    all PEs, without a bound, so it is for programs that go on without NVSHMEM, not for close().
    """
    with _lock:
        worlds = list(_worlds.values())
        _worlds.clear()
    for world in worlds:
        world.native.leave()
