"""How programs use `deep_ep`, restated: trainers differentiate through it, servers mix calls."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import ranks as processes
import torch
from compare import same_bits
from compat_ranks import EL, E, H, Inputs, M, R, Ranks, dispatch
from torch import Tensor

from ep_comm import reference
from ep_comm.compat import deep_ep


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    four = Ranks()
    yield four
    four.close()


# ---- a pair of autograd functions, the handle kept by the context (Megatron-style) ----


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, weights: Tensor, buffer: Any) -> Any:
        before = buffer.capture()
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            idx,
            E,
            previous_event=before,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        recv_x, recv_idx, recv_weights, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        after.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, _i: Any, grad_weights: Tensor, *_: Any) -> Any:
        dx, dw, event = ctx.buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_weights.float(),
            previous_event=ctx.buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return dx, None, dw, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Any, buffer: Any) -> Tensor:
        total, _, event = buffer.combine(y, handle=handle, async_finish=True)
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dy, _, _, _, _, event = ctx.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, async_finish=True
        )
        event.current_stream_wait()
        return dy, None, None


def _experts(recv_x: Tensor, recv_idx: Tensor, recv_weights: Tensor, rank: int) -> Tensor:
    """Expert e multiplies by e + 1; each row is the weighted sum of its experts here."""
    factor = torch.where(recv_idx >= 0, recv_idx + rank * EL + 1, 0) * recv_weights  # [N, K]
    return (recv_x.float() * factor.sum(1, keepdim=True)).to(recv_x.dtype)


def test_gradients_flow_through_a_pair_of_autograd_functions(ranks: Ranks) -> None:
    layers = [_whole_numbers(seed) for seed in range(3)]

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        outputs, leaves = [], []
        for data in layers:  # all handles are alive when backward begins
            x = data.x[rank].clone().requires_grad_()
            weights = data.weights[rank].clone().requires_grad_()
            recv_x, recv_idx, recv_weights, _, handle = Dispatch.apply(
                x, data.idx[rank], weights, buffer
            )
            y = _experts(recv_x, recv_idx, recv_weights, rank)
            outputs.append(Combine.apply(y, handle, buffer))
            leaves.append((x, weights))
        for data, (x, weights), out in reversed(list(zip(layers, leaves, outputs, strict=True))):
            out.backward(torch.ones_like(out))
            want_x = data.x[rank].float().requires_grad_()
            want_weights = data.weights[rank].clone().requires_grad_()
            factor = torch.where(data.idx[rank] >= 0, data.idx[rank] + 1, 0) * want_weights
            want = want_x * factor.sum(1, keepdim=True)
            want.sum().backward()
            assert x.grad is not None
            assert weights.grad is not None
            assert torch.equal(out, want.bfloat16())
            assert torch.equal(x.grad, want_x.grad.bfloat16())  # type: ignore[union-attr]
            assert torch.equal(weights.grad, want_weights.grad)  # type: ignore[arg-type]

    ranks.run(work)


def _whole_numbers(seed: int) -> Inputs:
    """Inputs whose sums and products below stay under 256, so that bfloat16 is exact."""
    data = Inputs(seed=seed)
    for x, weights in zip(data.x, data.weights, strict=True):
        x.copy_(x.float().mul(2).round().clamp(-4, 4))
        weights.copy_(weights.round() + 1)
    return data


# ---- the handle goes through save_for_backward and comes back as another tuple (xtuner-style) ----


class SavingDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, weights: Tensor, buffer: Any) -> Any:
        event = deep_ep.EventOverlap()
        event.event = deep_ep.EventHandle()  # filled in later than it was made
        out = dispatch(buffer, x, idx, weights, E, async_finish=True)
        event.current_stream_wait()
        ctx.save_for_backward(*out[4])
        ctx.buffer = buffer
        return (out[0], *out[4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        assert type(ctx.saved_tensors) is tuple
        return ctx.buffer.combine(grad.contiguous(), ctx.saved_tensors)[0], None, None, None


class SavingCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Any, *handle: Tensor) -> Any:
        ctx.save_for_backward(*handle)
        ctx.buffer = buffer
        return buffer.combine(y, handle)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dy = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.saved_tensors)[0]
        return dy, None, *([None] * len(ctx.saved_tensors))


def test_handle_survives_save_for_backward(ranks: Ranks) -> None:
    data = Inputs((6, 6, 6, 6))
    want = data.reference()
    expected = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        def pack(saved: Tensor) -> Tensor:  # some programs offload, and so get copies back
            return saved.clone() if rank % 2 else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            x = data.x[rank].clone().requires_grad_()
            recv_x, *handle = SavingDispatch.apply(x, data.idx[rank], data.weights[rank], buffer)
            out = SavingCombine.apply(recv_x, buffer, *handle)
        same_bits(out.detach(), expected[rank])
        in_rank = deep_ep.layout.dispatch_layout(data.idx[rank], E, R).is_token_in_rank
        num_ranks = in_rank.sum(1, keepdim=True).bfloat16()
        del handle, recv_x
        gc.collect()
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        same_bits(x.grad, num_ranks.expand(-1, H).contiguous())

    ranks.run(work)


# ---- capacity with -1 (torchtitan-, Megatron-style) ----


def test_capacity_drops_selections_to_minus_one(ranks: Ranks) -> None:
    data = Inputs((8, 8, 0, 8))
    for idx, weights in zip(data.idx, data.weights, strict=True):
        for expert in range(E):  # an expert takes two selections of a rank, the first ones
            dropped = (idx == expert).nonzero()[2:]
            idx[dropped[:, 0], dropped[:, 1]] = -1
        idx[5:] = -1  # padding of the batch
        weights[idx < 0] = 0
    want = data.reference()

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        same_bits(out[0], want[rank].x)
        assert max(out[3]) <= 2 * R
        total, home, _ = buffer.combine(out[0], out[4], topk_weights=out[2])
        same_bits(home, data.weights[rank])
        assert (total[5:] == 0).all()

    ranks.run(work)


@pytest.mark.parametrize(
    "tokens",
    [(0, 0, 0, 4), (4, 0, 0, 0), (0, 0, 0, 0), (0, 8, 1, 0)],
    ids=["last", "first", "none", "middle"],
)
def test_some_ranks_idle(ranks: Ranks, tokens: tuple[int, ...]) -> None:
    data = Inputs(tokens)
    want = data.reference()
    sums = reference.combine([r.x for r in want], [r.handle for r in want])

    def work(rank: int, buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, data.x[rank], data.idx[rank], data.weights[rank], E)
        same_bits(out[0], want[rank].x)
        same_bits(out[1], want[rank].topk_idx)
        same_bits(buffer.combine(out[0], out[4])[0], sums[rank])

    ranks.run(work)


# ---- real processes: a gloo group, subgroups, several buffers (vLLM-, SGLang-style) ----


def _serve(me: processes.Me) -> list[str]:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", store=dist.FileStore(me.store, me.size), rank=me.rank, world_size=me.size
    )
    done = []
    num_experts = 12
    data = Inputs((3, 5, 0), num_experts=num_experts)
    want = data.reference()
    sums = reference.combine([r.x for r in want], [r.handle for r in want])
    slabs = data.reference(layout="slab", capacity=me.size * M)
    weighted = reference.combine(
        [r.x for r in slabs], [r.handle for r in slabs], weighted=True, order="topk"
    )
    x, idx, weights = data.x[me.rank], data.idx[me.rank], data.weights[me.rank]
    group = dist.new_group(list(range(me.size)), backend="gloo")  # never ran a collective

    def high(buffer: deep_ep.Buffer) -> None:
        out = dispatch(buffer, x, idx, weights, num_experts, expert_alignment=128)
        same_bits(out[0], want[me.rank].x)
        same_bits(buffer.combine(out[0], out[4], async_finish=True)[0], sums[me.rank])

    def low(buffer: deep_ep.Buffer) -> None:
        got = buffer.low_latency_dispatch(
            x, idx, M, num_experts, use_fp8=False, return_recv_hook=True
        )
        assert got[4] is not None
        got[4]()
        place = torch.empty_like(x)
        back = buffer.low_latency_combine(
            got[0], idx, weights, got[2], return_recv_hook=True, out=place
        )
        assert back[2] is not None
        back[2]()
        same_bits(place, weighted[me.rank])

    serving = [
        deep_ep.Buffer(group=group, num_nvl_bytes=int(1e9), num_rdma_bytes=0),
        deep_ep.Buffer(
            group=group, num_nvl_bytes=0, num_rdma_bytes=1 << 20, low_latency_mode=True,
            num_qps_per_rank=num_experts // me.size, allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False, explicitly_destroy=True,
        ),
    ]  # fmt: skip
    high(serving[0])
    low(serving[1])
    high(serving[1])
    serving[0].destroy()
    low(serving[1])
    done.append("several buffers over one gloo group")

    both = deep_ep.Buffer(group, int(1e9), int(2e9), True, 1.5)
    for _ in range(3):
        high(both)
        both.clean_low_latency_buffer(M, H, num_experts)
        low(both)
    done.append("both kinds of calls in turn")

    pairs = [dist.new_group([0, 2]), dist.new_group([1])]
    mine = pairs[me.rank % 2]
    buffer = deep_ep.Buffer(mine)
    assert buffer.group is mine
    assert (buffer.rank, buffer.group_size) == ((0, 2), (0, 1), (1, 2))[me.rank]
    out = dispatch(buffer, x, idx, weights, num_experts)
    total = buffer.combine(out[0], out[4])[0]
    assert total.shape == x.shape
    done.append("subgroups")

    kept, handle = out[0].clone(), out[4]
    dist.destroy_process_group()
    same_bits(buffer.combine(out[0], handle)[0], total)
    buffer.destroy()
    del both, serving
    gc.collect()
    same_bits(out[0], kept)
    done.append("after destroy_process_group")
    return done


def test_processes_with_a_gloo_group_serve_with_several_buffers() -> None:
    for done in processes.run(_serve, 3):
        assert done == [
            "several buffers over one gloo group",
            "both kinds of calls in turn",
            "subgroups",
            "after destroy_process_group",
        ]
