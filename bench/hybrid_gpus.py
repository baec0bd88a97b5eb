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
import sys
from dataclasses import replace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import nvlink_gpus
import torch
import torch.distributed as dist
from nvlink_gpus import STANDARD, Work

from ep_comm.bench.cases import make_inputs


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

    def moved(self, work: Work) -> dict[str, int]:
        """Rows over our rail in one call, out and in, by the kernels' own counters."""
        before = self.buffer.stats()["rails"]
        work()
        torch.cuda.synchronize()
        after = self.buffer.stats()["rails"]
        return {k: after[k] - before[k] for k in ("rows_out", "rows_in", "sums_out", "sums_in")}

    def near_rows(self) -> int:
        """Rows that this rank stores over NVLink in a dispatch: of its own tokens, and of those it
        forwards; the same number are pulled from here in a combine."""
        per_node = self.buffer.stats()["rails"]["ranks_per_node"]
        node, local = divmod(self.rank, per_node)
        rows = 0
        for src in range(local, self.case.ranks, per_node):
            owner = make_inputs(self.case, src).topk_idx // (self.case.experts // self.case.ranks)
            for dst in range(node * per_node, (node + 1) * per_node):
                rows += int((owner == dst).any(1).sum()) if dst != self.rank else 0
        return rows

    def measure_split(self, op: str, work: Work, sms: int, row_bytes: int, **more: Any) -> None:
        moved = self.moved(work)
        kind = "sums" if "combine" in op else "rows"
        out, back = moved[f"{kind}_out"] * row_bytes, moved[f"{kind}_in"] * row_bytes
        rail = torch.tensor([max(out, back), self.near_rows() * row_bytes], device="cuda")
        dist.all_reduce(rail, dist.ReduceOp.MAX)
        rail_bytes, near_bytes = rail.tolist()
        self.extra = {"rail_bytes": rail_bytes, "nvlink_bytes": near_bytes}
        self.measure(op, work, sms, **more)

    def report(self, op: str, gpu: list[float], host: list[float], sms: int, **more: Any) -> None:
        p50 = sorted(gpu)[len(gpu) // 2]
        rates = {k.replace("bytes", "gbps"): round(v / p50 / 1e3, 1) for k, v in self.extra.items()}
        rails = self.buffer.stats()["rails"]
        super().report(
            op, gpu, host, sms, **self.extra, **rates, transport=rails["transport"],
            nodes=rails["num_nodes"], nodes_per_token=round(rails["nodes_per_token"], 3), **more,
        )  # fmt: skip


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
