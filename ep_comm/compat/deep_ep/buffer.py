"""`deep_ep.Buffer` (V1): construction, utilities and the high-throughput calls."""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from ep_comm.compat.deep_ep.config import Config, round_up
from ep_comm.compat.deep_ep.events import EventHandle, EventOverlap, finished, wait_for
from ep_comm.compat.deep_ep.handles import pack, restore
from ep_comm.compat.deep_ep.layout import dispatch_layout, experts_of_ranks
from ep_comm.compat.deep_ep.low_latency import LowLatencyCalls
from ep_comm.compat.deep_ep.masks import Masks
from ep_comm.compat.deep_ep.natives import Natives, raise_static

topk_idx_t: Final = torch.int64

# Dtypes that travel as they are; rows of any other are sent as bytes.
_TRAVEL: Final = frozenset(
    (
        torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.uint8,
    )
)  # fmt: skip
_MAX_RANK_SLOTS: Final = 32

Rows = Tensor | tuple[Tensor, Tensor]


class Buffer(LowLatencyCalls):
    """Expert-parallel communication as `deep_ep` V1 has it, over native buffers.

    Args:
        group: a `torch.distributed` process group of any backend, or an `ep_comm.StoreGroup`.
        num_nvl_bytes, num_rdma_bytes: echoed; memory is taken as calls need it. GPUs of 8 ranks or
            fewer on several nodes want num_rdma_bytes > 0; with it, or on more ranks, a rank has
            at most 65,536 tokens in a call.
        low_latency_mode, explicitly_destroy: echoed. Every buffer serves both kinds of calls, and
            may always be destroyed.
        enable_shrink: allow the mask calls.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: no meaning.
        comm: an mpi4py communicator; not supported.
    Raises:
        ValueError: neither group nor comm. NotImplementedError: comm without group.
        TypeError: only for unknown arguments, as Python raises it.

    Collective: every rank makes it, and makes the same calls in the same order. A native buffer is
    made by the first call with a shape, see `natives`. Threads may share it; calls are serialized.
    On CPU tensors events are complete when a call returns. CUDA calls are queued on the current
    stream, behind `previous_event`; `async_finish` returns an event of it, and
    `allocate_on_comm_stream` changes nothing, since outputs belong to that stream anyway.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: float = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
    ) -> None:
        if group is None:
            if comm is None:
                raise ValueError("Buffer: got neither group nor comm, want one")
            raise NotImplementedError("Buffer(comm=): pass a torch.distributed group instead")
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._natives = Natives(group, num_rdma_bytes)
        self.rank = self._natives.resolved.rank
        self.group_size = self._natives.resolved.size
        self._masks = Masks(self.rank, self.group_size)
        self._scratch: dict[bool, Tensor] = {}

    @property
    def runtime(self) -> Natives:
        """Opaque."""
        return self._natives

    # ---- high throughput ----

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count tokens per rank, node and expert; see `layout.DispatchLayout`, then the event."""
        wait_for(previous_event)
        layout = dispatch_layout(topk_idx, num_experts, self.group_size)
        return (*layout, finished(async_finish))

    def dispatch(
        self,
        x: Rows,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """Send each token to the ranks of its experts: one row per (token, rank).

        Args:
            x: [T, H] of any dtype, or (x, scales): one byte per element, scales float32 or int32
                [T, S] of any strides.
            handle: of an earlier dispatch: the same rows again, nothing else comes back.
            num_tokens_per_expert: tells the number of experts; without topk_idx also the counts.
            is_token_in_rank: bool [T, R]; without topk_idx it is the routing.
            topk_idx: int64 or int32 [T, K], -1 = none. topk_weights: float32 [T, K].
            expert_alignment: counts in the list are rounded up to it; rows are not padded.
            num_worst_tokens: rows of all outputs, whatever arrives; ids past the real count are -1.
        Returns:
            recv_x [N, H] or (recv_x, recv_scales); recv_topk_idx [N, K] local or -1;
            recv_topk_weights [N, K]; list of counts ([] with num_worst_tokens); handle; event.
        Raises:
            ep_comm.EPError: as `ep_comm.Buffer.dispatch`; ValueError: arguments do not go together.

        Collective. Rows are ordered by (source rank, source token). The calls of ranks without
        topk_idx cost a second, small dispatch, which carries num_tokens_per_expert.
        """
        if previous_event is not None:
            wait_for(previous_event)
        given, scales = x if isinstance(x, tuple) else (x, None)
        rows = given if given.dtype in _TRAVEL else given.view(torch.uint8)
        block = 128 if scales is None else None  # None: S as given
        sms = self._sms(config)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx, topk_weights: want None with handle")
            native, ours = restore(handle, self._natives, rows.shape[1], rows.device)
            recv = native.dispatch(rows, handle=ours, scales=scales, scale_block=block, num_sms=sms)
            if not isinstance(recv.num_recv, int):
                raise_static(native, recv)
            out = recv.x if rows is given else recv.x.view(given.dtype)
            received = out if scales is None else (out, recv.scales)
            return received, None, None, None, None, finished(async_finish)

        if num_tokens_per_expert is None:
            raise ValueError("num_tokens_per_expert: want it in every dispatch without handle")
        native = self._natives.get(rows.shape[1], num_tokens_per_expert.shape[0], rows.device)
        if topk_idx is None:
            ids = self._route_by_rank(is_token_in_rank, num_tokens_per_expert, num_worst_tokens)
        else:
            ids = topk_idx
        static = num_worst_tokens > 0
        recv = native.dispatch(
            rows, ids, topk_weights, scales=scales, scale_block=block, origins=True, num_sms=sms,
            sync=not static, capacity=num_worst_tokens if static else None,
        )  # fmt: skip
        if static:
            raise_static(native, recv)
        given_back = pack(recv, ids, is_token_in_rank, self.rank)
        counts: list[int] = []
        if not static:
            counts = recv.num_tokens_per_expert.tolist()
            if topk_idx is None:
                counts = self._exchange_counts(num_tokens_per_expert)
            if expert_alignment != 1:
                counts = [-(-n // expert_alignment) * expert_alignment for n in counts]
        out = recv.x if rows is given else recv.x.view(given.dtype)
        return (
            out if scales is None else (out, recv.scales),
            None if topk_idx is None else recv.topk_idx,
            recv.topk_weights,
            counts,
            given_back,
            finished(async_finish),
        )

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Add the rows of each token over the ranks it went to, in ascending rank order, in fp32.

        Args:
            x: bfloat16 (or float16, float32) [N, H], contiguous, in the rows of the dispatch, whose
                H may be another.
            handle: of that dispatch, or the same tensors put together again.
            topk_weights: float32 [N, K]: summed slot by slot over the ranks the token went to.
            bias: [T, H] of x's dtype, or a tuple of two (either may be None), added first.
        Returns:
            [T, H], rounded once; float32 [T, K] or None; event.

        Collective.
        """
        if previous_event is not None:
            wait_for(previous_event)
        native, ours = restore(handle, self._natives, x.shape[1], x.device)
        combined = native.combine(
            x,
            ours,
            topk_weights=topk_weights,
            sum_weights=topk_weights is not None,
            bias=bias,
            num_sms=self._sms(config),
        )
        total, weights = (combined, None) if topk_weights is None else combined
        return total, weights, finished(async_finish)

    def _sms(self, config: Config | None) -> int:
        sms = self.num_sms if config is None else config.num_sms
        return sms if sms > 0 else 1

    def _route_by_rank(
        self, is_token_in_rank: Tensor | None, num_tokens_per_expert: Tensor, num_worst_tokens: int
    ) -> Tensor:
        if is_token_in_rank is None:
            raise ValueError("topk_idx, is_token_in_rank: got neither, want one")
        if num_worst_tokens > 0:
            raise ValueError(f"num_worst_tokens={num_worst_tokens}: want topk_idx with it")
        if self.group_size > _MAX_RANK_SLOTS:
            what = f"dispatch without topk_idx on more than {_MAX_RANK_SLOTS} ranks"
            raise NotImplementedError(what)
        return experts_of_ranks(is_token_in_rank, num_tokens_per_expert.shape[0])

    def _exchange_counts(self, num_tokens_per_expert: Tensor) -> list[int]:
        """Tokens for each expert here, from what every rank counted: one small row to each rank."""
        num_experts, device = num_tokens_per_expert.shape[0], num_tokens_per_expert.device
        local = num_experts // self.group_size
        table = torch.zeros((self.group_size, round_up(local, 4)), dtype=torch.int32, device=device)
        table[:, :local] = num_tokens_per_expert.view(self.group_size, local)
        first = torch.arange(0, num_experts, local, device=device).unsqueeze(1)
        rows = table.view(torch.uint8)
        native = self._natives.get(rows.shape[1], num_experts, device)
        told = native.dispatch(rows, first).x.view(torch.int32)
        counts: list[int] = told[:, :local].sum(0).tolist()
        return counts

    # ---- utilities ----

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        if new_num_sms % 2:
            raise ValueError(f"num_sms={new_num_sms}: want an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes two calls in flight would stage; grows with each argument. `Buffer` echoes it."""
        rows = max(num_experts, num_ranks, 1) * max(num_max_dispatch_tokens_per_rank, 1)
        row = round_up(2 * max(hidden, 1) + 4 * -(-hidden // 128) + 16)
        return 2 * (2 * rows * row + round_up(8 * num_ranks * max(num_experts, 1)))

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def is_sm90_compiled() -> bool:
        from ep_comm import build_info

        return build_info()["cuda"] is not None

    def get_comm_stream(self) -> Any:
        """A stream; calls here use the current one."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return torch.cuda.current_stream()
        return torch.cpu.current_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Memory of the size asked for at construction, from byte `offset` on: 1-D, or of `size`.

        No call uses it, so whatever is done to it is harmless.
        """
        if use_rdma_buffer not in self._scratch:
            num_bytes = int(self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes)
            self._scratch[use_rdma_buffer] = torch.empty(num_bytes, dtype=torch.uint8)
        memory = self._scratch[use_rdma_buffer][offset:]
        flat = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        if flat.numel() < size.numel():
            raise ValueError(f"size={list(size)}: want at most {flat.numel()} elements")
        return flat[: size.numel()].view(size)

    def destroy(self) -> None:
        """Leave: local, and may be called twice. Tensors and handles stay valid."""
        self._natives.close()
        self._scratch.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        return f"deep_ep.Buffer(rank {self.rank} of {self.group_size}, by ep_comm)"
