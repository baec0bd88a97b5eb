"""Ranks of the hybrid backend as processes over NVSHMEM, each compared with the reference, bit for
bit.

Nodes are hosts; or pretended, with fewer ranks to a node than a host has, and GPUs that several
ranks may share (under MPS, or each waits for the others' turns):

    torchrun --nproc-per-node 2 tests/hybrid_ranks.py --ranks-per-node 1
    torchrun --nproc-per-node 8 tests/hybrid_ranks.py --ranks-per-node 4   # under MPS
    torchrun --nproc-per-node 4 tests/hybrid_ranks.py --masks              # four ranks, under MPS
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import test_masks as masks
import torch
import torch.distributed as dist
from compare import same_values
from test_nvlink_loopback import (
    GROUPED,
    SLAB,
    STATIC,
    Case,
    check_received,
    of_rank,
    on_gpu,
    want_dispatch,
)

from ep_comm import Buffer, EPConfig, reference

FP8 = {"quantize": "fp8"}
CALLS: dict[str, dict[str, Any]] = {
    "compact": {},
    "grouped": GROUPED,
    "slab static": {**SLAB, **STATIC},
    "compact static": STATIC,
    "fp8": FP8,
    "fp8 grouped": {**FP8, **GROUPED},
}


class Rank:
    """This process: what every rank brings is known here, drawn from the same numbers."""

    def __init__(self, ranks_per_node: int | None, num_sms: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.per_node = ranks_per_node
        self.num_sms = num_sms

    def case(self, **changed: Any) -> Case:
        experts = 2 * self.size + 1
        base = Case(num_ranks=self.size, num_experts=experts, hidden=1024, num_sms=self.num_sms)
        return dataclasses.replace(base, **changed)

    def buffer(self, case: Case) -> Buffer:
        return Buffer(
            dist.group.WORLD, backend="hybrid", ranks_per_node=self.per_node,
            config=EPConfig(arrival_s=60.0, progress_s=20.0), **case.buffer_options(),
        )  # fmt: skip

    def check(self, buffer: Buffer, case: Case) -> None:
        """Dispatch, the same by its handle, combine; all of it against the reference."""
        inputs = case.inputs()
        want = want_dispatch(case, inputs)
        x, idx, weights = (on_gpu(t) for t in (inputs.x, inputs.topk_idx, inputs.topk_weights))
        assert x is not None
        assert idx is not None
        got = buffer.dispatch(x[self.rank], idx[self.rank], of_rank(weights, self.rank),
                              **case.options)  # fmt: skip
        torch.cuda.synchronize()
        check_received(got, want[self.rank], computed="quantize" in case.options)
        keep = {k: v for k, v in case.options.items() if k == "quantize"}
        again = buffer.dispatch(
            x[self.rank], None, of_rank(weights, self.rank), handle=got.handle, **keep
        )
        y = [torch.randn(w.x.shape, generator=torch.Generator().manual_seed(r)).to(case.dtype)
             for r, w in enumerate(want)]  # fmt: skip
        out = buffer.combine(y[self.rank].cuda(), again.handle)
        torch.cuda.synchronize()
        per_node = buffer.stats()["rails"]["ranks_per_node"]
        sums = reference.combine(y, [w.handle for w in want], ranks_per_node=per_node)
        same_values(out.cpu(), sums[self.rank], "combine")


def check_masks(ranks_per_node: int | None, num_sms: int) -> None:
    """One rank masks another, all go on without it, and with it once it is unmasked."""
    rank, lost = dist.get_rank(), 1
    config = EPConfig(masking=True, arrival_s=60.0, progress_s=20.0)
    buffer = Buffer(
        dist.group.WORLD, backend="hybrid", ranks_per_node=ranks_per_node, config=config,
        num_sms=num_sms, arena_bytes=64 << 20, **masks.SHAPE,
    )  # fmt: skip
    per_node = buffer.stats()["rails"]["ranks_per_node"]

    def go_on(first: int, steps: int, gone: tuple[int, ...]) -> None:
        for i in range(steps):
            results = masks.step_of(buffer, first + i, begun=i % 2 == 1)
            masks.check_results(buffer, first + i, gone, *results, per_node)

    for number in range(2):
        go_on(20 * number, 4, ())
        dist.barrier()
        if rank == 3:
            buffer.mask(lost)
        dist.barrier()
        if rank != lost:
            go_on(20 * number + 4, 8, (lost,))
        buffer.unmask()
        assert buffer.masked_ranks == ()
    go_on(50, 4, ())
    if rank == 0:
        buffer.mask(lost)
    dist.barrier()
    if rank == lost:  # it hears so from its next call, and has failed then
        code = masks.code_of(lambda: masks.step_of(buffer, 0))
        assert code == "E113", code
    else:
        go_on(60, 4, (lost,))
    buffer.close()


def check_calls(me: Rank, rounds: int) -> None:
    buffer = me.buffer(me.case())
    if me.rank == 0:
        print(buffer, buffer.stats()["rails"], flush=True)
    for name, options in CALLS.items():
        for seed in range(rounds):
            me.check(buffer, me.case(options=options, seed=seed))
        dist.barrier()
        if me.rank == 0:
            print(f"ok {name}", flush=True)
    # Several buffers over one rank set, and memory of a closed one in the next.
    second = me.buffer(me.case(hidden=64))
    me.check(second, me.case(hidden=64))
    me.check(buffer, me.case(seed=9))
    buffer.close()
    dist.barrier()
    third = me.buffer(me.case())
    me.check(third, me.case(seed=10))
    if me.rank == 0:
        print("ok three buffers", third.stats()["rails"], flush=True)
    second.close()
    third.close()
    # Rows that a block has little shared memory for.
    wide = me.case(hidden=7168, options=FP8)
    fourth = me.buffer(wide)
    me.check(fourth, wide)
    fourth.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks-per-node", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-sms", type=int, default=8)
    parser.add_argument("--masks", action="store_true")
    asked = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    if asked.masks:
        check_masks(asked.ranks_per_node, asked.num_sms)
    else:
        check_calls(Rank(asked.ranks_per_node, asked.num_sms), asked.rounds)
    dist.barrier()
    from ep_comm.backends import nvshmem

    nvshmem.finalize()
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print("ok finalized", flush=True)


if __name__ == "__main__":
    main()
