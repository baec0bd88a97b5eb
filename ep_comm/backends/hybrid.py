"""The hybrid backend: GPUs on several nodes. A token crosses the network once for each node it
visits, to the rank with its source's index there, which forwards it over NVLink; of a small batch
it goes straight to its ranks, once for each.

Within a node everything is as in the nvlink backend, whose calls these are; what lies between nodes
is the business of `ep_comm.backends.rails`, and kernels do not know which rails they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.backends import rails
from ep_comm.backends.nodes import Nodes, kind_of_rails
from ep_comm.backends.nvlink import NvlinkBackend, connect_backend
from ep_comm.backends.nvlink_calls import Combine, Dispatch
from ep_comm.backends.nvlink_memory import Memory
from ep_comm.backends.nvlink_plans import Plans
from ep_comm.backends.nvlink_results import Outputs, Piece
from ep_comm.bootstrap import Exchange, Group, Hello, Listener
from ep_comm.checks import BufferSpec, CombineCall, DispatchCall
from ep_comm.config import EPConfig
from ep_comm.errors import make_error
from ep_comm.handle import Handle, HandleMeta
from ep_comm.received import Received
from ep_comm.verdict import PeerState

# A rank's counters as the core numbers them (RailCounter in csrc/contract/rail.h).
COUNTERS: Final = (
    "tokens",
    "home_visits",
    "rows_out",
    "rows_in",
    "sums_out",
    "sums_in",
    "direct_out",
)


class HybridOutputs(Outputs):
    """Their handle also keeps what crossed to here, see `Handle.recv_row`."""

    _backend: HybridBackend

    def _make_handle(self) -> Handle:
        handle, look = super()._make_handle(), self.look
        if look.cached and not look.has_weights:
            return handle  # nothing of what it keeps is new
        spec, flight = self._backend.spec, self.flight
        meta = HandleMeta.unpack(handle.meta)
        logged = flight.num_logged
        if not look.sync:
            logged = (self._backend.nodes.num_nodes - 1) * spec.max_tokens
        shape = (logged * meta.log_words, look.num_topk)
        log = Piece(_core.Out.RAIL_LOG, shape, torch.int32).of(flight, spec.device)
        rows = handle.recv_row[: meta.recv_rows]
        return handle._replace(recv_row=_together(rows, log) if rows.shape[0] else log)


def _together(first: Tensor, second: Tensor) -> Tensor:
    """One behind the other, both contiguous. By copies: torch.cat is a kernel, which torch loads
    when it is first used, and that may wait for ranks of this process that wait for us."""
    out = first.new_empty((first.shape[0] + second.shape[0], *first.shape[1:]))
    out[: first.shape[0]].copy_(first)
    out[first.shape[0] :].copy_(second)
    return out


class HybridDispatch(Dispatch):
    """A dispatch across nodes."""

    backend: HybridBackend

    def __init__(self, backend: HybridBackend, call: DispatchCall) -> None:
        if (scales := 4 * call.scale_words) > backend.max_scale_bytes:
            what = f"rejected scales: of {scales} B a token, want <= {backend.max_scale_bytes} B"
            raise make_error("E201", f"{what} with backend 'hybrid'")
        super().__init__(backend, call)

    def _finish(self) -> Received:
        received = super()._finish()
        if self.call.layout != "compact":
            _ = received.handle  # parts of it are copied, on the stream of the call
        return received


class LongWay(Plans):
    """No call of theirs is short: the core's plans know nothing of what crosses."""

    def dispatch(self, *_: Any, **__: Any) -> Received | None:
        return None

    def learn_dispatch(self, options: Any, work: Dispatch) -> None: ...

    def combine(self, *_: Any, **__: Any) -> Tensor | None:
        return None

    def learn_combine(self, options: Any, work: Combine) -> None: ...


class HybridCombine(Combine):
    """A combine: what crossed by rails is added up where it did, and one sum goes back."""

    def __init__(self, backend: HybridBackend, call: CombineCall) -> None:
        super().__init__(backend, call)
        if call.order != "rank" and not backend.rank.stages_combine(self.args):
            what = f"rejected order={call.order!r}: want 'rank' with backend 'hybrid'"
            why = "each node adds up its rows of a token, but in direct mode, of small batches"
            raise make_error("E203", f"{what}: {why}")
        meta, recv_row = call.meta, call.handle.recv_row
        first, words = meta.recv_rows, meta.log_words
        self.args.rail_log = recv_row.data_ptr() + recv_row.itemsize * first * meta.num_topk
        self.args.num_logged = (recv_row.shape[0] - first) // words
        self.args.log_has_weights = meta.has_weights


class HybridBackend(NvlinkBackend):
    """One rank of a buffer on several nodes. Collective to construct; see `open_backend`."""

    name = "hybrid"
    outputs_type = HybridOutputs
    max_quantized_bytes = 64 << 10  # one that comes lies beside it

    def __init__(
        self, *args: Any, nodes: Nodes, own_rails: rails.Rails, arena_sizes: Sequence[int]
    ) -> None:
        self.nodes, self.rails = nodes, own_rails
        # The scales of a token stand whole before every piece of its row.
        self.max_scale_bytes = int(own_rails.shape.chunk_bytes) // 2
        super().__init__(*args, rails=own_rails.setup(), arena_sizes=arena_sizes)
        self.plans = LongWay(self)

    def prepare_dispatch(self, call: DispatchCall) -> HybridDispatch:
        work = HybridDispatch(self, call)
        self.check_masks(self.rank.stages_dispatch(work.args))
        return work

    def prepare_combine(self, call: CombineCall) -> HybridCombine:
        self.check_out(call)
        work = HybridCombine(self, call)
        self.check_masks(self.rank.stages_combine(work.args))
        return work

    def peer_state(self, peer: int) -> PeerState:
        is_far = peer >= 0 and peer not in self.nodes.near(self.spec.rank)
        return replace(super().peer_state(peer), is_far=is_far)

    def stats(self) -> dict[str, Any]:
        """Waits for the device. rails: transport, nodes, memory, and what has crossed so far."""
        moved = dict(zip(COUNTERS, self.rank.rail_counters(), strict=True))
        visits = moved["home_visits"] + moved["rows_out"]
        return {
            **super().stats(),
            "rails": {
                "transport": self.rails.transport,
                "num_nodes": self.nodes.num_nodes,
                "ranks_per_node": self.nodes.ranks_per_node,
                "staging_bytes": int(self.rails.shape.staging_bytes),
                "direct_bytes": int(self.rails.shape.direct_bytes),
                **moved,
                "nodes_per_token": visits / max(moved["tokens"], 1),
            },
        }

    def close(self) -> None:
        failed = self.rank.failed()
        super().close()
        self.rails.close(is_clean=not failed)


def open_backend(
    group: Group,
    hellos: Sequence[Hello],
    listener: Listener,
    exchange: Exchange,
    shape: _core.Shape,
    spec: BufferSpec,
    generation: int,
    config: EPConfig,
    arena_bytes: int | None,
    num_sms: int | None,
    nodes: Nodes,
) -> HybridBackend:
    """A backend that is ready on every rank, as `nvlink.open_backend`.

    Raises:
        EPFabricError: E501, no NVSHMEM, or one that does not fit. EPEnvironmentError: E404, masks
            without direct mode. Otherwise as there.
    """
    near, me = nodes.near(group.rank), group.rank
    rail_shape = rails.rail_shape(spec, shape, nodes, config.direct)
    if config.masking and not rail_shape.is_direct:
        why, fix = "which is off", "pass EPConfig(direct=True), or masking=False"
        if config.direct:
            why = "which max_tokens, num_experts or hidden are too large for"
            fix = "lower max_tokens, or pass EPConfig(masking=False)"
        what = f"cannot use backend 'hybrid': it has masks in direct mode alone, {why}"
        raise make_error("E404", what, rank=me, fix=fix)

    def make(memory: Memory, ranks_on_device: int) -> HybridBackend:
        sizes = exchange.gather("arena", str(memory.own.arena.bytes).encode())
        arena_sizes = [_size(data, rank, me) for rank, data in enumerate(sizes)]
        own_rails: rails.Rails
        if kind_of_rails(hellos) == "loopback":
            props = torch.cuda.get_device_properties(spec.device)
            own_rails = rails.LoopbackRails(
                exchange, hellos, spec, rail_shape, props.multi_processor_count
            )
        else:
            own_rails = rails.open_nvshmem(exchange, rail_shape, me)
        try:
            return HybridBackend(
                spec, generation, config, memory, exchange, shape, num_sms, ranks_on_device,
                nodes=nodes, own_rails=own_rails, arena_sizes=arena_sizes,
            )  # fmt: skip
        except BaseException:
            own_rails.close(is_clean=True)
            raise

    backend = connect_backend(
        make, group, hellos, listener, exchange, shape, spec, arena_bytes, near
    )
    assert isinstance(backend, HybridBackend)
    return backend


def _size(data: bytes, rank: int, me: int) -> int:
    if not data.isdigit():
        raise make_error("E406", f"rejected bootstrap of rank {rank}: no arena size", rank=me)
    return int(data)


__all__ = ["HybridBackend", "open_backend"]
