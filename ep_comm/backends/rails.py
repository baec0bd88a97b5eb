"""Rails of a buffer that spans nodes: which rank stands where, and how bytes get to other nodes.

Ranks with equal index on their nodes form a rail; csrc/contract/rail.h says what lies in the memory
they share. Between processes the network is NVSHMEM's. Ranks that are threads of one process only
pretend to stand on several nodes: their segments are memory of the same GPU, and kernels copy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ep_comm import _core
from ep_comm.backends import nvshmem
from ep_comm.backends.mapping import agree
from ep_comm.backends.nodes import Nodes
from ep_comm.backends.nvlink_memory import refusal
from ep_comm.bootstrap import Exchange, Hello, group_token
from ep_comm.checks import BufferSpec
from ep_comm.errors import EPError, make_error

# Ranges of a rank's tokens, each with rings of its own and a block that serves them.
NUM_CHANNELS: Final = 20


def rail_shape(spec: BufferSpec, shape: _core.Shape, nodes: Nodes, direct: bool) -> _core.RailShape:
    """Rings for rows of 16 bits, and all that may go along; wider ones take more places.

    Args:
        shape: its `stage_bytes` become those of small batches.
        direct: whether these may go straight to their ranks on other nodes.
    """
    head = _core.RailHeadLayout(spec.num_topk, True, True, 4 * (spec.hidden // 32))
    record = int(head.bytes) + 2 * spec.hidden
    rails = _core.divide_staging(nodes.num_nodes, nodes.ranks_per_node, NUM_CHANNELS, record)
    if direct:
        shape.stage_bytes = _core.stage_bytes_for(shape, spec.hidden)
        rails.add_direct(shape, spec.hidden)
    if not rails.is_direct:
        shape.stage_bytes = 0
    notice = _core.RailNoticeLayout(shape, nodes.num_nodes, rails.num_channels)
    rails.notice_bytes = int(notice.bytes)
    return rails


class Rails(Protocol):
    """What a hybrid backend needs of its rails."""

    shape: _core.RailShape

    @property
    def transport(self) -> str:
        """For people: "loopback", or what NVSHMEM uses."""

    def setup(self) -> _core.RailSetup: ...
    def close(self, *, is_clean: bool) -> None:
        """Local. `is_clean`: all that was put has arrived."""


# ---- pretended nodes ----

# Where ranks that are threads of one process find each other's segments: (group token, rank).
_segments: Final[dict[tuple[bytes, int], _core.DeviceMemory]] = {}
_segments_lock: Final = threading.Lock()


class LoopbackRails:
    """All ranks in this process. Collective to construct."""

    transport = "loopback"

    def __init__(
        self, exchange: Exchange, hellos: Sequence[Hello], spec: BufferSpec,
        shape: _core.RailShape, max_blocks: int,
    ) -> None:  # fmt: skip
        self.shape = shape
        token, me = group_token(hellos), spec.rank
        self._key = (token, me)
        failure: EPError | None = None
        try:
            num_bytes = int(_core.RailLayout(shape).end)
            own = _core.DeviceMemory.create(spec.device.index or 0, num_bytes)
            with _segments_lock:
                _segments[self._key] = own
        except _core.DeviceCallError as error:
            failure = refusal(error, me, "E232", "is out of memory: {call}: {why}")
        agree(exchange, "rails/created", me, failure)
        try:
            with _segments_lock:
                segments = [_segments[token, rank] for rank in range(spec.num_ranks)]
            self.native = _core.LoopbackRails(shape, me, segments, max_blocks)
        except _core.DeviceCallError as error:
            failure = refusal(error, me, "E232", "is out of memory: {call}: {why}")
        try:
            agree(exchange, "rails/ready", me, failure)
        finally:
            with _segments_lock:
                _segments.pop(self._key, None)

    def setup(self) -> _core.RailSetup:
        return self.native.setup()

    def set_trouble(self, trouble: _core.Trouble) -> None:
        """What goes wrong on purpose with what this rank sends, from its next operation on."""
        self.native.set_trouble(trouble)

    def close(self, *, is_clean: bool) -> None:
        """Segments live as long as a rank that has them."""


# ---- NVSHMEM ----


@dataclass
class NvshmemRails:
    """One PE for each rank."""

    shape: _core.RailShape
    world: nvshmem.World
    segment: nvshmem.Segment
    native: Any  # _nvshmem.Rails
    has_network: bool

    @property
    def transport(self) -> str:
        return f"nvshmem, {self.world.describe(self.segment)}"

    def setup(self) -> _core.RailSetup:
        # Where puts are copies of our own warps, several share one.
        return _core.RailSetup(self.shape, self.native.kernels, self.native)

    def close(self, *, is_clean: bool) -> None:
        self.world.give(self.segment, is_clean=is_clean)


def open_nvshmem(exchange: Exchange, shape: _core.RailShape, me: int) -> NvshmemRails:
    """Join the world, take a segment, load kernels for it. Collective.

    Raises:
        EPFabricError: E501. EPMemoryError: E232. EPEnvironmentError: E406.
    """
    world = nvshmem.join(exchange)
    segment = world.take(exchange, int(_core.RailLayout(shape).end))
    has_network = not all(world.mapped(segment))
    failure: EPError | None = None
    native: Any = None
    try:
        native = world.plugin.Rails(segment.native, world.table, has_network)
    except world.plugin.NvshmemError as error:
        call, status = error.args
        what = f"is out of memory: {call}: status {status}"
        failure = make_error("E232", what, rank=me)
    try:
        agree(exchange, "rails/ready", me, failure)
    except BaseException:
        world.give(segment, is_clean=True)
        raise
    return NvshmemRails(shape, world, segment, native, has_network)


__all__ = [
    "NUM_CHANNELS", "LoopbackRails", "NvshmemRails", "Rails", "open_nvshmem", "rail_shape",
]  # fmt: skip
