"""What a decoding layer pays on the nvlink backend: a dispatch and a combine after each other in a
CUDA graph, a combine of rows that owners do not add up first (that of the `deep_ep` V1 surface),
and the host's time for a call. Slabs of FP8 rows, as in bench/nvlink_latency.py.

    torchrun --nproc-per-node 2 bench/nvlink_decode.py COMMIT >> bench/results/nvlink_decode.jsonl
    torchrun --nproc-per-node 1 bench/nvlink_decode.py COMMIT >> bench/results/nvlink_alone.jsonl

One rank on one GPU has no link to wait for, so it shows whether a change to these kernels pays. A
pair of one token took 15.4 us there (2d84225) and 15.3 us between two GPUs (2a013aa).

Times are those of bench/nvlink_gpus.py; in a graph of ten, per pair or call. `host_us`: from
entering the Python function until it returns, nothing queued before it; the slower rank's median,
after as many calls as a processor that has slept needs to be fast again, some 0.3 s.
`host_add_us`: the same of a torch.add right after, since one processor has needed 7 to 12 us for
that within minutes.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from nvlink_gpus import Work
from nvlink_latency import SmallBatch, capacity
from torch import Tensor

TOKENS = (1, 32, 128)
MOST = 128  # that a decoder which has one token now has made room for
CALLS, WARMUP = 1000, 5000


def host_us(work: Work) -> float:
    """Collective."""
    times = []
    dist.barrier()
    for _ in range(WARMUP + CALLS):
        entered = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - entered) * 1e6)
        del result
        torch.cuda.synchronize()
    slower = torch.tensor(statistics.median(times[WARMUP:]), device="cuda")
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    return float(slower)


def layer(tokens: int, most: int | None = None) -> None:
    bench = SmallBatch(tokens, most)
    where = "" if most is None else f" with room for {most} tokens"
    slab = bench.check_slab(bench.check())
    bench.case = replace(bench.case, layout="slab", quantize="fp8")
    rows = torch.zeros(slab.x.shape, dtype=torch.bfloat16, device="cuda")

    i, room = bench.inputs, capacity(bench.most)

    def dispatch() -> Any:
        return bench.buffer.dispatch(
            i.x, i.topk_idx, i.topk_weights, quantize="fp8", layout="slab", capacity=room,
            sync=False,
        )  # fmt: skip

    def combine() -> Tensor:
        out: Tensor = bench.buffer.combine(
            rows, slab.handle, per_rank=True, row_weights=slab.topk_weights
        )
        return out

    def unreduced() -> Tensor:
        out: Tensor = bench.buffer.combine(rows, slab.handle, weighted=True, order="topk")
        return out

    def pair() -> None:
        bench.home(rows, dispatch())

    one = torch.zeros(1, device="cuda")

    def add() -> None:
        torch.add(one, 1, out=one)

    bench.graphed(f"pair{where}", pair, 0)
    calls: dict[str, Work] = {
        "dispatch": dispatch,
        "combine": combine,
        "combine, unreduced": unreduced,
    }
    for op, work in calls.items():
        gpu, host = bench.times(work)
        ours, usual = round(host_us(work), 1), round(host_us(add), 1)
        bench.report(f"{op}{where}", gpu, host, 0, host_us=ours, host_add_us=usual)
        bench.graphed(f"{op}{where}", work, 0)
    bench.buffer.check()
    bench.buffer.close()


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for tokens in TOKENS:
        layer(tokens)
    layer(1, MOST)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
