"""The native buffers behind one `deep_ep.Buffer`.

A `deep_ep.Buffer` is built before anybody knows a shape: hidden and the number of experts come with
the calls. A native buffer is therefore made by the first call that needs another (hidden, number of
experts). Both are equal on all ranks in every call, so all ranks make it in the same call and
nothing needs to be agreed upon. Numbers of tokens differ between ranks; native buffers are built
for as many as rows can be numbered, which costs nothing: memory is granted for what arrives, and
the control block does not depend on it. So no buffer ever has to grow.

Low-latency calls on GPUs, where the host never waits, are for a bounded batch: outputs have room
for all that may come, and rows of small ones travel another way. They have a native buffer for each
(most tokens, top-k), which are equal on all ranks, too.

Cost: the first call with a shape takes milliseconds longer on every rank; later ones, one look-up.
"""

from __future__ import annotations

import threading
from typing import Any, Final, NamedTuple, NoReturn

import torch

from ep_comm.bootstrap import Group, StoreGroup, resolve_group
from ep_comm.compat.deep_ep.layout import RANKS_PER_NODE
from ep_comm.compat.deep_ep.masks import Rest
from ep_comm.errors import EPError, make_error

# A process maps one arena of every rank for each native buffer, and an address has 47 bits.
_ADDRESS_SPACE: Final = 1 << 46
_MOST_BUFFERS: Final = 64
_SMALLEST_ARENA: Final = 1 << 30
# On a GPU memory is taken, not touched: room for an output and an expert output of so many rows of
# two bytes an element. What does not fit beside others leaves the arena (output="auto").
_GPU_ROWS: Final = 1 << 17
_GPU_SHARE: Final = 4  # of what is free, at most one part in so many
# Across nodes a call is granted a place for all tokens that may cross, before it is known how many.
# Buffers may be such with num_rdma_bytes, or with more ranks than `deep_ep` has on a node.
_MOST_TOKENS_OF_NODES: Final = 1 << 16

# Of a bounded batch: two outputs at once, and as many expert outputs.
_SLABS: Final = 4


class Batch(NamedTuple):
    """What calls for a bounded batch are built for."""

    max_tokens: int  # of a rank
    num_topk: int


_Key = tuple[int, int, torch.device, Rest | None, Batch | None]


class Natives:
    """Native buffers by (hidden, number of experts, device), made when first needed.

    Collective where it makes one. Threads may share it.
    """

    def __init__(self, group: Any, num_rdma_bytes: int = 0) -> None:
        self.group = group
        self.resolved: Group = resolve_group(group)
        self._is_internode = num_rdma_bytes > 0 or self.resolved.size > RANKS_PER_NODE
        self._buffers: dict[_Key, Any] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(
        self,
        hidden: int,
        num_experts: int,
        device: torch.device,
        rest: Rest | None = None,
        batch: Batch | None = None,
    ) -> Any:
        """The ep_comm.Buffer for rows of `hidden` elements and so many experts.

        With `rest` it is that of the ranks that are left, and of their experts.
        """
        key = (hidden, num_experts, device, rest, batch)
        buffer = self._buffers.get(key)
        return self._make(key) if buffer is None else buffer

    def _make(self, key: _Key) -> Any:
        from ep_comm.buffer import Buffer  # loads native code; importing deep_ep must not
        from ep_comm.checks import MAX_TOPK

        hidden, num_experts, device, rest, batch = key
        group, size = self.group, self.resolved.size
        if rest is not None:
            num_experts, size = rest.experts(num_experts), len(rest.ranks)
            name = f"only {rest.ranks}"
            place = rest.ranks.index(self.resolved.rank)
            group = StoreGroup(self.resolved.store, place, size, name)
        with self._lock:
            if self._closed:
                what = "is closed: at destroy()"
                raise make_error("E340", what, rank=self.resolved.rank, fix="make another Buffer")
            if key not in self._buffers:
                self._buffers[key] = Buffer(
                    group,
                    num_experts=num_experts,
                    num_topk=MAX_TOPK if batch is None else batch.num_topk,
                    hidden=hidden,
                    max_tokens=self._max_tokens(size, device, batch),
                    device=device,
                    arena_bytes=self._arena_bytes(hidden, num_experts, device, batch),
                )
            return self._buffers[key]

    def _max_tokens(self, size: int, device: torch.device, batch: Batch | None) -> int:
        if batch is not None:
            return batch.max_tokens
        if device.type == "cuda" and self._is_internode:
            return _MOST_TOKENS_OF_NODES
        from ep_comm.checks import MAX_COUNT

        return MAX_COUNT // size

    def _arena_bytes(
        self, hidden: int, num_experts: int, device: torch.device, batch: Batch | None
    ) -> int:
        """On the CPU as much as there is, as long as many buffers fit into the address space."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            rows = 2 * _GPU_ROWS
            if batch is not None:  # rows of a slab: of local experts * ranks * most tokens
                rows = _SLABS * (num_experts + self.resolved.size) * batch.max_tokens
            return min(rows * 2 * hidden + (64 << 20), free // _GPU_SHARE)
        from ep_comm.backends.cpu import default_arena_bytes

        most = _ADDRESS_SPACE // (_MOST_BUFFERS * self.resolved.size)
        return min(default_arena_bytes(), max(most, _SMALLEST_ARENA))

    def close(self) -> None:
        """Local; may be called twice. Tensors received and handles stay valid."""
        with self._lock:
            self._closed = True
            buffers, self._buffers = self._buffers, {}
        for buffer in buffers.values():
            buffer.close()


def raise_static(native: Any, recv: Any) -> None:
    """A static call does not raise; where the host has its verdict anyway, we do: on all ranks."""
    if native._spec.device.type == "cpu" and recv.status.item() != 0:
        native.check()


def raise_known(native: Any) -> None:
    """Where it has not, a later call does: what is known by then."""
    error: EPError | None = native._backend.known_failure()
    if error is not None:
        raise error


def refuse(native: Any, op: str, code: str, what: str) -> NoReturn:
    """Raise an error of an adapter; peers in this call raise it, too, instead of waiting."""
    error: EPError = native._refused(op, make_error(code, what), "")
    raise error
