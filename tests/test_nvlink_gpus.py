"""The nvlink backend between real processes: one GPU each, bit for bit as the reference."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import pytest
import ranks
import test_nvlink_loopback as loopback
import torch

from ep_comm import Buffer, EPConfig, reference
from ep_comm.errors import EPError

CASES = ("ep2", "int32-ids", "top-32-of-64", "fp32", "fp8-scales", "row-of-64-kib", "static",
         "row-index", "grouped", "grouped-static", "slab", "slab-scales", "quantize",
         "quantize-fp16-ue8m0")  # fmt: skip


def buffer_of(me: ranks.Me, case: loopback.Case, **options: Any) -> Buffer:
    num_gpus = torch.cuda.device_count()
    torch.cuda.set_device(me.rank % num_gpus)
    options = {**case.buffer_options(), **options}
    buffer = Buffer(me.group(), device="cuda", **options)
    me.kept.append(buffer)
    assert buffer.backend == "nvlink"
    return buffer


def all_cases(me: ranks.Me) -> None:
    """Every case on one buffer each; this rank checks what it got."""
    for number, name in enumerate(CASES):
        base = loopback.CASES[name]
        tokens = None if base.tokens is None else base.tokens[: me.size]
        case = dataclasses.replace(base, num_ranks=me.size, tokens=tokens)
        inputs = case.inputs()
        want = loopback.want_dispatch(case, inputs)
        torch.cuda.set_device(me.rank % torch.cuda.device_count())
        group = dataclasses.replace(me.group(), name=f"case{number}")
        with Buffer(group, device="cuda", **case.buffer_options()) as buffer:
            r = me.rank
            x, idx = inputs.x[r].cuda(), inputs.topk_idx[r].cuda()
            weights = None if inputs.topk_weights is None else inputs.topk_weights[r].cuda()
            scales = None if inputs.scales is None else inputs.scales[r].cuda()
            options = loopback.dispatch_options(case)
            recv = buffer.dispatch(x, idx, weights, scales=scales, **options)
            loopback.check_received(recv, want[r], computed="quantize" in options)
            if case.dtype.itemsize == 1:
                continue
            g = torch.Generator().manual_seed(1)
            y = [torch.randn(w.x.shape, generator=g).to(case.dtype) for w in want]
            sums = reference.combine(y, [w.handle for w in want])
            out = buffer.combine(y[r].cuda(), recv.handle)
            loopback.same_values(out.cpu(), sums[r], f"{name}: combine of rank {r}")
            in_arena = buffer.empty(y[r].shape, case.dtype)
            in_arena.copy_(y[r])
            out = buffer.combine(in_arena, recv.handle)
            loopback.same_values(out.cpu(), sums[r], f"{name}: combine from the arena")
            buffer.check()


@pytest.mark.gpus(2)
def test_two_gpus_agree_with_the_reference() -> None:
    ranks.run(all_cases, 2, limit_s=200.0)


@pytest.mark.gpu
def test_two_processes_on_one_gpu_agree_with_the_reference() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"], before = "0", os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        ranks.run(all_cases, 2, limit_s=200.0)
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def many_rounds(me: ranks.Me) -> None:
    """Random sizes and routings, no pause between calls; each time all must come home."""
    case = loopback.Case(num_ranks=me.size, num_experts=16, num_topk=8, num_sms=8)
    buffer = buffer_of(me, case)
    g = torch.Generator(device="cuda").manual_seed(me.rank)
    for n in range(300):
        tokens = int(torch.randint(0, loopback.MAX_TOKENS + 1, (1,)).item())
        x = torch.randn(tokens, case.hidden, device="cuda", generator=g).to(torch.bfloat16)
        idx = torch.randint(-1, 16, (tokens, 8), device="cuda", generator=g)
        recv = buffer.dispatch(x, idx, layout=("compact", "grouped")[n % 2])
        out = buffer.combine(recv.x, recv.handle)
        owners = torch.where(idx >= 0, idx // (16 // me.size), -1)
        ways = torch.stack([(owners == r).any(1) for r in range(me.size)]).sum(0)
        if n % 2:
            ways = (idx >= 0).sum(1)
        want = torch.zeros_like(x, dtype=torch.float32)
        for way in range(8):
            want += torch.where((ways > way)[:, None], x.float(), 0.0)
        assert torch.equal(out, want.to(torch.bfloat16)), (n, tokens)


@pytest.mark.gpus(2)
def test_many_rounds_of_random_sizes_bring_every_token_home() -> None:
    ranks.run(many_rounds, 2, limit_s=120.0)


def outlive_a_peer(me: ranks.Me) -> list[str]:
    case = loopback.Case(num_ranks=me.size)
    buffer = buffer_of(me, case, config=EPConfig(arrival_s=2.0, progress_s=2.0))
    inputs = case.inputs()
    x, idx = inputs.x[me.rank].cuda(), inputs.topk_idx[me.rank].cuda()
    buffer.dispatch(x, idx)
    me.say("ready")
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    me.wait_for_go()
    codes = []
    for _ in range(2):
        try:
            buffer.dispatch(x, idx)
        except EPError as error:
            codes.append(error.code)
    assert float(torch.ones(8, device="cuda").sum()) == 8.0
    return codes


@pytest.mark.gpus(2)
def test_killed_peer_gives_an_error_and_the_context_lives_on() -> None:
    with ranks.Ranks(outlive_a_peer, 2) as processes:
        processes.hear(0)
        processes.result(1)
        processes.go(0)
        codes = processes.result(0, 30.0)
    assert codes in (["E101", "E101"], ["E110", "E110"])
