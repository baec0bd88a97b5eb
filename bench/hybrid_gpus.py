"""Whole calls of the hybrid backend, one GPU a rank: bytes over rails and over NVLink, told apart.

Timed as in bench/nvlink_gpus.py. On one host nodes are pretended: then rails are NVLink, too, and
the protocol is what limits them.

    torchrun --nproc-per-node 2 bench/hybrid_gpus.py COMMIT --ranks-per-node 1
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        bench/hybrid_gpus.py COMMIT
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import nvlink_gpus
import torch
import torch.distributed as dist
from nvlink_gpus import STANDARD, Work

from ep_comm.bench import rails


class Bench(nvlink_gpus.Bench):
    """As there, with the traffic of every call split."""

    def total(self) -> torch.Tensor:
        """Other nodes round their sums."""
        nodes = self.buffer.stats()["rails"]
        per_node, x = nodes["ranks_per_node"], self.inputs.x.float()
        total = torch.zeros_like(x)
        for node in range(nodes["num_nodes"]):
            part = x * self.ways(range(node * per_node, (node + 1) * per_node))
            own = node == self.rank // per_node
            total += part if own else part.to(torch.bfloat16).float()
        return total.to(torch.bfloat16)

    def measure_split(self, op: str, work: Work, sms: int, row_bytes: int, **more: Any) -> None:
        kind = "combine" if "combine" in op else "dispatch"
        self.moved = rails.split(self.case, self.rank, self.buffer, work, kind, row_bytes)
        self.measure(op, work, sms, **more)

    def report(self, op: str, gpu: list[float], host: list[float], sms: int, **more: Any) -> None:
        rates = rails.rates(self.moved, statistics.median(gpu))
        cluster = rails.describe(self.buffer)
        super().report(op, gpu, host, sms, **self.moved, **rates, **cluster, **more)


def throughput(ranks_per_node: int | None, sms: list[int], dtype: str) -> None:
    case = replace(STANDARD, ranks=dist.get_world_size(), backend="hybrid", dtype=dtype)
    bench = Bench(case, ranks_per_node=ranks_per_node)
    recv = bench.check()
    row = bench.inputs.x.shape[1] * bench.inputs.x.itemsize
    for n in sms:
        bench.measure_split("dispatch", lambda n=n: bench.dispatch(num_sms=n), n, row)
    if dtype == "bf16":
        quantized = lambda: bench.dispatch(num_sms=sms[-1], quantize="fp8")  # noqa: E731
        bench.measure_split("dispatch quantizing to fp8", quantized, sms[-1], row // 2)
        y = bench.buffer.empty(recv.x.shape, recv.x.dtype)
        y.copy_(recv.x)
        for n in sms:
            combine = lambda n=n: bench.buffer.combine(y, recv.handle, num_sms=n)  # noqa: E731
            bench.measure_split("combine", combine, n, row)
    bench.buffer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commit")
    parser.add_argument("--ranks-per-node", type=int, default=None)
    parser.add_argument("--sms", default="8,12,16,20")
    parser.add_argument("--fp8", action="store_true")
    asked = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    sms = [int(n) for n in asked.sms.split(",")]
    throughput(asked.ranks_per_node, sms, "bf16")
    if asked.fp8:
        throughput(asked.ranks_per_node, sms, "fp8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
