"""Whole calls of the nvlink backend, one GPU a rank: every kernel and copy of a call counts.

Before each iteration the L2 cache is overwritten, and an all-reduce makes the ranks start together;
events around the call then time it on its stream. The slower rank of each iteration counts. The
device sleeps first, so that the host has queued the call, as it has behind any layer of a model.

    torchrun --nproc-per-node 2 bench/nvlink_gpus.py COMMIT >> bench/results/nvlink_gpus.jsonl
    torchrun --nproc-per-node 8 bench/nvlink_gpus.py COMMIT --sweep --tokens 4096,8192

Without --sweep the cases that have goals; with it every combination of --tokens, --dtype, --routing
and --sms, BF16 by copy engine, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import Buffer, build_info
from ep_comm.bench.cases import Case, Inputs, make_inputs, traffic

ROUNDS = 20
STANDARD = Case(
    ranks=int(os.environ.get("WORLD_SIZE", "2")),
    tokens=4096,
    hidden=7168,
    topk=8,
    experts=256,
    backend="nvlink",
)
Work = Callable[[], Any]
COMMIT = next((a for a in sys.argv[1:] if not a.startswith("-")), "")  # also of who imports this


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.cuda() for t in inputs))  # type: ignore[arg-type]


class Bench:
    """One rank's buffer and inputs for one case."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.case, self.rank = case, dist.get_rank()
        self.inputs = on_gpu(make_inputs(case, self.rank))
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.one = torch.zeros(1, device="cuda")
        self.buffer = Buffer(
            dist.group.WORLD,
            num_experts=case.experts,
            num_topk=case.topk,
            hidden=case.hidden,
            backend=case.backend,
            arena_bytes=8 << 30,
            **{"max_tokens": case.tokens, **options},
        )

    def dispatch(self, **options: Any) -> Any:
        i = self.inputs
        return self.buffer.dispatch(i.x, i.topk_idx, i.topk_weights, scales=i.scales, **options)

    def check(self) -> Any:
        """A dispatch and a combine of what it brought, against the rows they must return."""
        recv = self.dispatch()
        want = []
        for src in range(self.case.ranks):
            inputs = on_gpu(make_inputs(self.case, src))
            here = (inputs.topk_idx // (self.case.experts // self.case.ranks) == self.rank).any(1)
            want.append(inputs.x.view(torch.uint8)[here])
        assert torch.equal(recv.x.view(torch.uint8), torch.cat(want)), "dispatch"
        if recv.x.dtype == torch.bfloat16:
            total = self.total()
            for y in (recv.x, recv.x.clone()):
                assert torch.equal(self.buffer.combine(y, recv.handle), total), "combine"
        return recv

    def ways(self, ranks: range) -> Tensor:
        """How many of these ranks each token of ours goes to, float32 [tokens, 1]."""
        owners = self.inputs.topk_idx // (self.case.experts // self.case.ranks)
        return torch.stack([(owners == r).any(1).float() for r in ranks]).sum(0)[:, None]

    def total(self) -> Tensor:
        """What combine returns when every rank sends back the rows it got."""
        everywhere = self.ways(range(self.case.ranks))
        return (self.inputs.x.float() * everywhere).to(torch.bfloat16)

    def once(self, work: Work) -> tuple[float, float]:
        """GPU and host time of one call, in microseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(3_000_000)
        self.flush.zero_()
        dist.all_reduce(self.one)
        start.record()
        entered = time.perf_counter()
        result = work()
        call_us = (time.perf_counter() - entered) * 1e6
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) * 1e3, call_us

    def times(
        self, work: Work, rounds: int = ROUNDS, warmup: int = 3
    ) -> tuple[list[float], list[float]]:
        """GPU and host times of the slower rank of each round."""
        for _ in range(warmup):
            self.once(work)
        samples = torch.tensor([self.once(work) for _ in range(rounds)], device="cuda")
        dist.all_reduce(samples, dist.ReduceOp.MAX)
        return samples[:, 0].tolist(), samples[:, 1].tolist()

    def measure(self, op: str, work: Work, sms: int, **more: Any) -> None:
        self.report(op, *self.times(work), sms, **more)

    def report(self, op: str, gpu: list[float], host: list[float], sms: int, **more: Any) -> None:
        if self.rank != 0:
            return
        gpu = sorted(gpu)
        p50 = statistics.median(gpu)
        verbs = ["combine" if "combine" in op else op.partition(" ")[0]]
        if op.startswith("pair"):
            verbs = ["dispatch", "combine"]
        moved = [traffic(self.case, verb) for verb in verbs]
        recv_bytes = sum(m.recv_bytes for m in moved)
        line = {
            "case": self.case.name,
            "op": op,
            "sms": sms,
            "time_us": {
                "p10": round(gpu[len(gpu) // 10], 1),
                "p50": round(p50, 1),
                "p90": round(gpu[len(gpu) * 9 // 10], 1),
                "min": round(gpu[0], 1),
                "n": len(gpu),
            },
            "call_us": round(statistics.median(host), 1),
            "payload_bytes": sum(m.payload_bytes for m in moved),
            "scaleup_recv_bytes": recv_bytes,
            "scaleup_gbps": round(recv_bytes / p50 / 1e3, 1),
            "correct": True,
            "gpu": torch.cuda.get_device_name(),
            "commit": COMMIT,
            "nvcc": build_info()["cuda"],
            **more,
        }
        print(json.dumps(line), flush=True)

    def graphed(self, op: str, work: Work, sms: int, calls: int = 10) -> None:
        """The same inside a captured graph of several calls; times are per call."""
        work()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        dist.barrier()
        gpu, _ = self.times(graph.replay)
        self.report(f"{op} in a graph", [us / calls for us in gpu], [0.0], sms)


def peer_copy(bench: Bench) -> None:
    """The bytes of x to the next GPU by copy engine, all ranks at once."""
    there = torch.empty_like(
        bench.inputs.x, device=f"cuda:{(bench.rank + 1) % torch.cuda.device_count()}"
    )
    bench.measure("dispatch as a peer copy", lambda: there.copy_(bench.inputs.x), 0)


def throughput() -> None:
    bench = Bench(STANDARD)
    recv = bench.check()
    peer_copy(bench)
    handle, x = recv.handle, bench.inputs.x
    for sms in (8, 12, 14, 15, 16, 18, 20):
        bench.measure("dispatch", lambda n=sms: bench.dispatch(num_sms=n), sms)
        cached = lambda n=sms: bench.buffer.dispatch(x, handle=handle, num_sms=n)  # noqa: E731
        bench.measure("dispatch_cached", cached, sms)
    quantized = lambda: bench.dispatch(num_sms=16, quantize="fp8")  # noqa: E731
    bench.measure("dispatch quantizing to fp8", quantized, 16)
    y = bench.buffer.empty(recv.x.shape, recv.x.dtype)
    y.copy_(recv.x)
    plain = recv.x.clone()
    for sms in (8, 12, 16, 20, 24):
        bench.measure("combine", lambda n=sms: bench.buffer.combine(y, handle, num_sms=n), sms)
    for sms in (16, 20):
        bench.measure(
            "combine_tensor", lambda n=sms: bench.buffer.combine(plain, handle, num_sms=n), sms
        )
    bench.buffer.close()


def throughput_fp8() -> None:
    bench = Bench(replace(STANDARD, dtype="fp8"))
    handle = bench.check().handle
    i = bench.inputs
    for sms in (8, 12, 14, 15, 16, 20):
        bench.measure("dispatch", lambda n=sms: bench.dispatch(num_sms=n), sms)
        cached = lambda n=sms: bench.buffer.dispatch(  # noqa: E731
            i.x, scales=i.scales, handle=handle, num_sms=n
        )
        bench.measure("dispatch_cached", cached, sms)
    bench.buffer.close()


def few_tokens(tokens: int) -> None:
    bench = Bench(replace(STANDARD, tokens=tokens, static=True))
    recv = bench.check()
    y = bench.buffer.empty((tokens * 2, STANDARD.hidden), recv.x.dtype)
    static = bench.dispatch(sync=False)
    for sms in (16, 32, 64):
        dispatch = lambda n=sms: bench.dispatch(sync=False, num_sms=n)  # noqa: E731
        combine = lambda n=sms: bench.buffer.combine(y, static.handle, num_sms=n)  # noqa: E731
        bench.measure("dispatch", dispatch, sms)
        bench.measure("combine", combine, sms)
        bench.graphed("dispatch", dispatch, sms)
        bench.graphed("combine", combine, sms)
    bench.buffer.close()


def sweep(case: Case, sms: list[int]) -> None:
    bench = Bench(case)
    recv = bench.check()
    peer_copy(bench)
    handle, i = recv.handle, bench.inputs
    y = None
    if case.dtype == "bf16":
        y = bench.buffer.empty(recv.x.shape, recv.x.dtype).copy_(recv.x)
        by_copies = lambda: bench.dispatch(transfer="copy_engine")  # noqa: E731
        bench.measure("dispatch by copy engine", by_copies, 0)
    del recv
    for n in sms:
        cached = lambda n=n: bench.buffer.dispatch(  # noqa: E731
            i.x, scales=i.scales, handle=handle, num_sms=n
        )
        bench.measure("dispatch", lambda n=n: bench.dispatch(num_sms=n), n)
        bench.measure("dispatch_cached", cached, n)
        if y is not None:
            combine = lambda n=n: bench.buffer.combine(y, handle, num_sms=n)  # noqa: E731
            bench.measure("combine", combine, n)
    bench.buffer.close()


def options() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default="")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=several, default=["4096"])
    parser.add_argument("--dtype", type=several, default=["bf16", "fp8"])
    parser.add_argument("--routing", type=several, default=["uniform"])
    parser.add_argument("--sms", type=several, default=["8", "12", "16", "20", "24"])
    return parser.parse_args()


def main() -> None:
    a = options()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    if a.sweep:
        for tokens, dtype, routing in itertools.product(a.tokens, a.dtype, a.routing):
            case = replace(STANDARD, tokens=int(tokens), dtype=dtype, routing=routing)
            sweep(case, [int(n) for n in a.sms])
    else:
        throughput()
        throughput_fp8()
        few_tokens(128)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
