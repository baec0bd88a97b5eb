"""Small batches of fixed shape on the nvlink backend, 1 to 1024 tokens of a rank: whole calls,
eager and in a CUDA graph, beside a plain peer copy of the same bytes.

    torchrun --nproc-per-node 2 bench/nvlink_latency.py COMMIT >> bench/results/nvlink_latency.jsonl

Times are those of bench/nvlink_gpus.py: L2 flushed, ranks aligned, slower rank; in a graph of ten
calls one after the other, per call. Compact rows travel as BF16. Slabs hold what experts of a
decoding model get: rows quantized to FP8 on the way; combine adds, at the owner, its weighted rows
of a token first. SMs are those the library computes (`sms` 0).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from nvlink_gpus import STANDARD, Bench
from torch import Tensor

from ep_comm.bench.cases import traffic

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024)
BLOCK = 128  # elements of a scale


def capacity(tokens: int) -> int:
    """Of an expert: four times what it gets on average, and some."""
    return STANDARD.ranks * tokens * STANDARD.topk * 4 // STANDARD.experts + 16


class SmallBatch(Bench):
    """Compact first, then slabs, on one buffer; `most`: tokens that it is built for."""

    def __init__(self, tokens: int, most: int | None = None) -> None:
        self.most = tokens if most is None else most
        super().__init__(replace(STANDARD, tokens=tokens, static=True), max_tokens=self.most)

    def slab(self, **options: Any) -> Any:
        room = capacity(self.most)
        return self.dispatch(layout="slab", capacity=room, sync=False, **options)

    def home(self, y: Tensor, slab: Any) -> Tensor:
        out: Tensor = self.buffer.combine(
            y, slab.handle, per_rank=True, row_weights=slab.topk_weights
        )
        return out

    def check_slab(self, compact: Any) -> Any:
        """Slabs against the rows of compact, which have been checked; the quantized slab."""
        slab, quantized = self.slab(), self.slab(quantize="fp8")
        n = compact.x.shape[0]
        rows = slab.handle.recv_row[:n].long()
        assert int(slab.num_recv) == n, "slab: tokens"
        assert torch.equal(rows >= 0, compact.topk_idx >= 0), "slab: selections"
        assert torch.equal(rows, quantized.handle.recv_row[:n].long()), "slab: rows, quantized"
        token, slot = (rows >= 0).nonzero(as_tuple=True)
        want, at = compact.x[token].float(), rows[token, slot]
        assert torch.equal(slab.x.flatten(0, 1)[at].float(), want), "slab: x"
        scales = quantized.scales.flatten(0, 1)[at].repeat_interleave(BLOCK, 1)
        wrong = (quantized.x.flatten(0, 1)[at].float() * scales - want).abs()
        assert bool((wrong <= want.abs() / 16 + scales / 512).all()), "slab: quantized x"
        assert torch.equal(self.home(slab.x, slab), self.sums()), "slab: sums"
        self.buffer.check()
        return quantized

    def sums(self) -> Tensor:
        """Of own rows that come back as they went: owners weigh, add and round, in slot order."""
        i, case = self.inputs, self.case
        owner = i.topk_idx // (case.experts // case.ranks)
        total = torch.zeros(i.x.shape, device=i.x.device)
        for rank in range(case.ranks):
            part = torch.zeros_like(total)
            for k in range(case.topk):
                weight = torch.where(owner[:, k] == rank, i.topk_weights[:, k], 0.0)
                part += i.x.float() * weight[:, None]
            total += part.to(i.x.dtype).float()
        return total.to(i.x.dtype)

    def peer_copies(self) -> None:
        """As many bytes as arrive from the other rank, to the next GPU by copy engine."""
        there = f"cuda:{(self.rank + 1) % torch.cuda.device_count()}"
        for op in ("dispatch", "combine"):
            here = torch.empty(traffic(self.case, op).recv_bytes, dtype=torch.uint8, device="cuda")
            to = torch.empty_like(here, device=there)
            self.measure(f"{op} as a peer copy", lambda to=to, here=here: to.copy_(here), 0)

    def calls(self, dispatch: Any, combine: Any) -> None:
        self.peer_copies()
        for op, work in (("dispatch", dispatch), ("combine", combine)):
            self.measure(op, work, 0)
            self.graphed(op, work, 0)
        self.buffer.check()


def small_batch(tokens: int) -> None:
    bench = SmallBatch(tokens)
    quantized = bench.check_slab(bench.check())
    static = bench.dispatch(sync=False)
    y = bench.buffer.empty(static.x.shape, static.x.dtype).zero_()
    bench.calls(lambda: bench.dispatch(sync=False), lambda: bench.buffer.combine(y, static.handle))
    bench.case = replace(bench.case, layout="slab", quantize="fp8")
    rows = torch.zeros(quantized.x.shape, dtype=torch.bfloat16, device="cuda")
    bench.calls(lambda: bench.slab(quantize="fp8"), lambda: bench.home(rows, quantized))
    bench.buffer.close()


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for tokens in TOKENS:
        small_batch(tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
