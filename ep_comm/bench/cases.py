"""What is measured: shapes, routing, inputs, and the bytes that must move for them.

Inputs are functions of (seed, rank), so any rank can make those of every rank and check itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ep_comm import _core
from ep_comm.reference.routing import ExpertOwner, expert_owner, plan_sends

DTYPES: Final = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,  # with given float32 scales
}
ROUTINGS: Final = ("uniform", "zipf", "onehot")
OPS: Final = ("dispatch", "dispatch_cached", "combine", "combine_tensor", "pair")
SCALE_BLOCK: Final = 128


@dataclass(frozen=True)
class Case:
    """One routing problem; the same for every operation and every contestant."""

    ranks: int
    tokens: int  # of each rank
    hidden: int
    topk: int
    experts: int
    dtype: str = "bf16"
    layout: str = "compact"
    quantize: str | None = None
    alignment: int = 1
    capacity: int | None = None
    static: bool = False  # sync=False
    routing: str = "uniform"
    seed: int = 0
    backend: str = "auto"
    transfer: str = "sm"
    ranks_per_node: int | None = None  # hybrid; None: those of a host

    @property
    def name(self) -> str:
        """Words that tell this case from others: ep4-t1024-h2048-top8of64-bf16."""
        parts = [
            f"ep{self.ranks}-t{self.tokens}-h{self.hidden}-top{self.topk}of{self.experts}-{self.dtype}",
            *([self.quantize] if self.quantize else []),
            *([self.layout] if self.layout != "compact" else []),
            *([f"align{self.alignment}"] if self.alignment != 1 else []),
            *(["static"] if self.static else []),
            *([self.transfer] if self.transfer != "sm" else []),
            *([f"nodes_of_{self.ranks_per_node}"] if self.ranks_per_node is not None else []),
            *([self.routing] if self.routing != "uniform" else []),
        ]
        return "-".join(parts)

    @property
    def device(self) -> str:
        return "cuda" if self.backend in ("nvlink", "hybrid") else "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def wire_dtype(self) -> torch.dtype:
        """What a dispatched row travels as."""
        return torch.float8_e4m3fn if self.quantize else self.torch_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """What experts answer with, and combine adds."""
        return torch.bfloat16 if self.torch_dtype.itemsize == 1 else self.torch_dtype

    @property
    def scale_words(self) -> int:
        """4-byte words of scales of a token, S."""
        if self.quantize == "fp8_ue8m0":
            return self.hidden // (4 * SCALE_BLOCK)
        return self.hidden // SCALE_BLOCK if self.wire_dtype.itemsize == 1 else 0

    def owners(self) -> ExpertOwner:
        return expert_owner(self.experts, self.ranks)


class Inputs(NamedTuple):
    """What one rank dispatches."""

    x: Tensor  # [T, H]
    topk_idx: Tensor  # int64 [T, K]
    topk_weights: Tensor  # float32 [T, K]
    scales: Tensor | None  # float32 [T, H / 128], with one-byte x


def make_inputs(case: Case, rank: int) -> Inputs:
    random = _generator(case.seed, rank, 0)
    shape = (case.tokens, case.hidden)
    x = torch.randn(shape, generator=random).to(case.torch_dtype)
    scales = None
    if case.torch_dtype.itemsize == 1:
        scales = torch.rand((case.tokens, case.scale_words), generator=random)
    weights = torch.rand((case.tokens, case.topk), generator=random)
    return Inputs(x, choose_experts(case, rank), weights / weights.sum(1, keepdim=True), scales)


def choose_experts(case: Case, rank: int) -> Tensor:
    """Top-k of every token of a rank, int64 [T, K], experts of a token distinct.

    uniform: every expert is as likely. zipf: the i-th most popular expert has weight 1/i; which
    expert that is, is drawn once for all ranks. onehot: all tokens of all ranks choose experts
    0 .. K-1, the worst case: with K <= E/R every row goes to rank 0.
    """
    shape = (case.tokens, case.experts)
    if case.routing == "onehot":
        return torch.arange(case.topk).expand(case.tokens, -1).contiguous()
    scores = torch.rand(shape, generator=_generator(case.seed, rank, 1))
    if case.routing == "zipf":
        order = torch.randperm(case.experts, generator=_generator(case.seed, 0, 2))
        log_weight = -(order + 1.0).log()
        # Largest of log(weight) plus Gumbel noise: a draw by weight without replacement.
        scores = log_weight - (-scores.clamp(min=1e-12).log()).log()
    return scores.topk(case.topk, dim=1).indices


def _generator(seed: int, rank: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 4096 + rank) * 16 + purpose)


class Traffic(NamedTuple):
    """Bytes of one operation, the same whoever moves them."""

    payload_bytes: int  # of one token on its way, metadata included
    row_bytes: int  # of them the row of x or y
    rows: list[int]  # by rank: unique (token, rank) pairs it sends, those to itself included
    recv_bytes: int  # payload that arrives from other ranks at the busiest rank


def traffic(case: Case, op: str) -> Traffic:
    """Bytes of a dispatch, dispatch_cached or combine."""
    owners = case.owners()
    pairs = torch.stack(
        [plan_sends(choose_experts(case, r), owners).tokens_per_rank for r in range(case.ranks)]
    )  # [source, owner]
    remote = pairs - torch.diag(pairs.diag())
    if op.startswith("combine"):  # rows come home: the source receives
        row_bytes = payload = case.hidden * case.result_dtype.itemsize
        busiest = int(remote.sum(1).max())
    else:
        row_bytes = case.hidden * case.wire_dtype.itemsize
        payload = row_bytes + _metadata_bytes(case, pairs, cached=op == "dispatch_cached")
        busiest = int(remote.sum(0).max())
    return Traffic(payload, row_bytes, pairs.sum(1).tolist(), busiest * payload)


def _metadata_bytes(case: Case, pairs: Tensor, cached: bool) -> int:
    """What goes beside each row. CPU: the record, as the core lays it out. GPU: scales, and of a
    fresh call source, ids and weights; grouped and slab: those of the slots that are there, and
    the rows of all slots.
    """
    if case.device == "cuda":
        compact = case.layout == "compact"
        slots = case.topk if compact else case.tokens * case.ranks * case.topk / int(pairs.sum())
        fresh = 8 + (8 + 4) * slots + (0 if compact else 4 * case.topk)
        return 4 * case.scale_words + (0 if cached else round(fresh))
    with_rows = not cached and case.layout != "compact"
    layout = _core.MetaLayout(case.topk, not cached, not cached, with_rows, 4 * case.scale_words)
    return int(layout.bytes)
