"""What is planned: ranks on nodes, experts on ranks, tokens and how they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ep_comm import _core
from ep_comm.errors import EPError, make_error

Mode = Literal["throughput", "direct"]
Rail = Literal["nic", "nvlink"]
XDtype = Literal["bf16", "fp8"]
Partials = Literal["bf16", "fp32"]
Layout = Literal["compact", "grouped", "slab"]

IN_FLIGHT: Final = 2  # dispatches with tensors alive at once; operations with slots of their own
_SCALE_BLOCK: Final = 128  # elements of x that share a float32 scale, with fp8


@dataclass(frozen=True)
class Deployment:
    """A cluster and the calls made on it; sizes as in `Buffer`.

    Args:
        num_tokens: of each rank, in one call.
        num_experts, num_topk: routed experts, and how many of them a token chooses.
        num_shared: further experts that every token chooses and that are dispatched to.
        num_slots: physical experts over all ranks; more than experts: replicas, placed by
            `ep_comm.eplb` for the load that the routing has. None: one slot for each expert.
        num_groups, top_groups: a token's experts come from its `top_groups` best groups of
            consecutive experts, a group scored by its two best. Groups that are nodes give
            node-limited routing. top_groups=None: no limit.
        zipf: popularity of the i-th expert is 1 / i ** zipf; 0 = uniform. Which expert is the i-th
            is drawn with the seed of the prediction.
        x_dtype: of rows in dispatch; fp8 brings float32 scales for blocks of 128.
        partials: what crosses between nodes in combine: sums of a node, in fp32 or rounded to bf16.
        mode: "throughput": once per node along rails, then over NVLink; "direct": every token
            straight to each rank it visits, for small batches; the library does so for up to 64
            ranks. Inside one node small batches go straight whatever the mode: see `is_small`.
        sync: as in `Buffer.dispatch`. It matters to small batches of compact rows: shapes that the
            host waits for need the kernels of large ones. False: as in a CUDA graph.
        rail: "nvlink" is for nodes that are pretended on one host.
        num_channels: ranges of tokens with rings of their own; see `csrc/contract/rail.h`.
    """

    num_nodes: int = 1
    ranks_per_node: int = 8
    num_tokens: int = 4096
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    num_shared: int = 0
    num_slots: int | None = None
    num_groups: int = 1
    top_groups: int | None = None
    zipf: float = 0.0
    x_dtype: XDtype = "fp8"
    partials: Partials = "bf16"
    layout: Layout = "compact"
    mode: Mode = "throughput"
    sync: bool = False
    rail: Rail = "nic"
    num_channels: int = 10

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise _rejected(name, value, f"an int >= {least}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _rejected(name, getattr(self, name), " or ".join(map(repr, choices)))
        if not 0 <= self.zipf < float("inf"):
            raise _rejected("zipf", self.zipf, "a number >= 0")
        if self.num_ranks > _core.MAX_RANKS:
            raise _rejected("num_nodes", self.num_nodes, f"at most {_core.MAX_RANKS} ranks")
        if self.topk > _core.MAX_TOPK:
            raise _rejected("num_topk", self.num_topk, f"at most {_core.MAX_TOPK}, shared included")
        if self.num_channels > _core.MAX_CHANNELS:
            raise _rejected("num_channels", self.num_channels, f"at most {_core.MAX_CHANNELS}")
        if self.hidden % _SCALE_BLOCK:
            raise _rejected("hidden", self.hidden, f"a multiple of {_SCALE_BLOCK}")
        self._check_groups()
        self._check_slots()

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise _rejected("num_groups", self.num_groups, f"a divisor of {self.num_experts}")
        limit = self.num_groups if self.top_groups is None else self.top_groups
        if limit > self.num_groups:
            raise _rejected("top_groups", limit, f"at most num_groups={self.num_groups}")
        if self.num_topk > limit * self.num_experts // self.num_groups:
            raise _rejected("num_topk", self.num_topk, "as many experts in the groups of a token")

    def _check_slots(self) -> None:
        if self.num_slots is None:
            return
        if self.num_slots < self.num_logical:
            raise _rejected("num_slots", self.num_slots, f"one for each of {self.num_logical}")
        if self.has_replicas and self.num_slots % self.num_ranks:
            raise _rejected("num_slots", self.num_slots, f"a multiple of {self.num_ranks} ranks")

    # ---- what follows ----

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_logical(self) -> int:
        """Experts that are dispatched to, shared ones behind the others."""
        return self.num_experts + self.num_shared

    @property
    def slots(self) -> int:
        return self.num_logical if self.num_slots is None else self.num_slots

    @property
    def has_replicas(self) -> bool:
        return self.slots > self.num_logical

    @property
    def local_experts(self) -> int:
        """Of the rank that holds most."""
        return -(-self.slots // self.num_ranks)

    @property
    def topk(self) -> int:
        """Selections of a token, shared experts included."""
        return self.num_topk + self.num_shared

    def shape(self) -> _core.Shape:
        """Of a buffer for just these calls, IN_FLIGHT of them at once."""
        shape = _core.Shape()
        shape.num_ranks, shape.num_slots = self.num_ranks, IN_FLIGHT
        shape.num_experts, shape.max_local_experts = self.slots, self.local_experts
        shape.num_topk, shape.max_tokens = self.topk, self.num_tokens
        if self.num_nodes == 1:
            shape.stage_bytes = _core.stage_bytes_for(shape, self.hidden)
        return shape

    def is_small(self, op: str) -> bool:
        """Whether "dispatch", "dispatch_cached" or "combine" goes as a small batch.

        That is, its rows as lines, before anybody's counts (`is_staged` of csrc/contract/stage.h).
        Inside one node: up to 1024 tokens and 64 ranks, as far as there is room for the places of
        IN_FLIGHT operations; a dispatch without handle whose outputs have a fixed shape, and any
        combine. Across nodes: what is planned in direct mode, whether or not a buffer could.
        """
        if self.num_nodes > 1:
            return self.mode == "direct"
        if self.shape().stage_bytes == 0:
            return False
        has_shape = self.layout == "slab" or (self.layout == "compact" and not self.sync)
        return op == "combine" or (op == "dispatch" and has_shape)

    @property
    def name(self) -> str:
        """Words that tell this deployment from others."""
        replicas = f" on {self.slots} slots" if self.has_replicas else ""
        shared = f"+{self.num_shared}" if self.num_shared else ""
        return (
            f"{self.num_nodes} x {self.ranks_per_node} ranks, {self.num_tokens} tokens of "
            f"{self.hidden}, top-{self.num_topk}{shared} of {self.num_experts}{shared}{replicas}"
        )

    # ---- bytes ----

    @property
    def row_bytes(self) -> int:
        """A row of x as it travels."""
        return self.hidden * (1 if self.x_dtype == "fp8" else 2)

    @property
    def scale_bytes(self) -> int:
        return 4 * self.hidden // _SCALE_BLOCK if self.x_dtype == "fp8" else 0

    @property
    def y_bytes(self) -> int:
        """A row of expert output, and of a result."""
        return 2 * self.hidden

    @property
    def partial_bytes(self) -> int:
        """A node's sum for one token, on a rail."""
        return self.hidden * (2 if self.partials == "bf16" else 4)

    def payload_bytes(self, *, cached: bool = False) -> int:
        """Of one token over NVLink: row, scales, metadata."""
        with_rows = not cached and self.layout != "compact"
        meta = _core.MetaLayout(self.topk, not cached, not cached, with_rows, self.scale_bytes)
        return self.row_bytes + int(meta.bytes)

    def rail_head_bytes(self, *, cached: bool = False) -> int:
        """What stands before the row of a token that crosses to another node."""
        with_rows = self.layout != "compact"
        head = _core.RailHeadLayout(self.topk, not cached, with_rows, self.scale_bytes)
        return int(head.bytes)


_LEAST: Final = {
    "num_nodes": 1,
    "ranks_per_node": 1,
    "num_tokens": 1,
    "hidden": 1,
    "num_experts": 1,
    "num_topk": 1,
    "num_shared": 0,
    "num_slots": 1,
    "num_groups": 1,
    "top_groups": 1,
    "num_channels": 1,
}
_CHOICES: Final = {
    "x_dtype": ("bf16", "fp8"),
    "partials": ("bf16", "fp32"),
    "layout": ("compact", "grouped", "slab"),
    "mode": ("throughput", "direct"),
    "sync": (False, True),
    "rail": ("nic", "nvlink"),
}


def _rejected(name: str, got: object, want: str) -> EPError:
    return make_error("E203", f"rejected {name}={got!r}: want {want}")


# DeepSeek-V3 as its report describes it, arXiv 2412.19437 section 3.4. Prefill: 4 nodes, 8 experts
# and a redundant one on each GPU; the shared expert is not dispatched to. Decode: 40 nodes, one
# expert on each GPU, 64 GPUs for redundant and shared ones, the shared expert chosen by every
# token. Not in the report: how the 64 divide (the balancer decides), and the tokens of a call. For
# decode these follow from "usually within 256 tokens" per expert: 28 tokens, 9 selections each, on
# 320 slots.
PRESETS: Final[dict[str, Deployment]] = {
    "node": Deployment(),
    "prefill": Deployment(num_nodes=4, ranks_per_node=8, num_slots=288, num_groups=8, top_groups=4),
    "decode": Deployment(
        num_nodes=40,
        ranks_per_node=8,
        num_tokens=28,
        num_shared=1,
        num_slots=320,
        num_groups=8,
        top_groups=4,
        layout="slab",
        mode="direct",
    ),
    "two-gpus": Deployment(
        num_nodes=2, ranks_per_node=1, x_dtype="bf16", rail="nvlink", num_channels=10
    ),
}
