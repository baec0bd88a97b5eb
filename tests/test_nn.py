"""The MoE layer: the same bits on any number of ranks, against a loop over tokens, its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ep_comm import Buffer
from ep_comm.nn import MoE, over_shards
from ep_comm.testing import Cluster

HIDDEN, FFN, NUM_EXPERTS, NUM_TOPK = 16, 24, 7, 3
TOKENS = (5, 0, 8)
NUM_RANKS = len(TOKENS)
OPTIONS = {
    "plain": {},
    "shared": {"shared_hidden": 8},
    "capacity": {"capacity_factor": 0.7, "shared_hidden": 8},
}


def make_layer(buffer: Buffer, **options: Any) -> MoE:
    """The same router and experts wherever they live."""
    layer = MoE(buffer, HIDDEN, FFN, NUM_TOPK, **options)
    shared = [p for n, p in layer.named_parameters() if not n.startswith("experts.")]
    fill(shared, torch.Generator().manual_seed(1))
    for expert, module in zip(buffer.local_experts, layer.experts, strict=True):
        fill(list(module.parameters()), torch.Generator().manual_seed(100 + expert))
    return layer


def fill(parameters: list[Any], generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) / 4)


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(t, HIDDEN, generator=g).requires_grad_() for t in TOKENS]


def buffer_options() -> dict[str, Any]:
    return {
        "num_experts": NUM_EXPERTS, "num_topk": NUM_TOPK, "hidden": HIDDEN,
        "max_tokens": sum(TOKENS), "device": "cpu",
    }  # fmt: skip


def loss(out: Tensor, layer: MoE) -> Tensor:
    return out.square().sum() + 0.01 * layer.balance_loss


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_and_one_process_agree_bit_for_bit(name: str) -> None:
    options = OPTIONS[name]
    x = inputs()
    torch.set_num_threads(1)

    def work(rank: int, buffer: Buffer) -> Any:
        layer = make_layer(buffer, **options)
        out = layer(x[rank])
        loss(out, layer).backward()
        grads = {n: p.grad for n, p in layer.named_parameters()}
        return out.detach(), x[rank].grad, layer.load, grads, buffer.local_experts

    with Cluster(ranks_per_node=NUM_RANKS) as cluster:
        ranks = cluster.run(work, cluster.make_buffers(**buffer_options()))

    single = inputs()
    with Buffer(**buffer_options()) as buffer:
        layers = [make_layer(buffer, **options) for _ in TOKENS]
        outs = over_shards(layers, single)
        sum(loss(o, m) for o, m in zip(outs, layers, strict=True)).backward()  # type: ignore[union-attr]
    load = []
    for rank, (out, grad, counts, grads, experts) in enumerate(ranks):
        assert torch.equal(out, outs[rank].detach())
        assert torch.equal(grad, single[rank].grad)
        load += counts.tolist()
        ours = dict(layers[rank].named_parameters())
        everybodys = dict(layers[0].named_parameters())
        for key, value in grads.items():
            if key.startswith("experts."):
                _, local, rest = key.split(".", 2)
                assert torch.equal(value, everybodys[f"experts.{experts[int(local)]}.{rest}"].grad)
            else:
                assert torch.equal(value, ours[key].grad)
    assert load == layers[0].load.tolist()


def test_layer_is_the_weighted_sum_of_its_experts() -> None:
    with Buffer(**buffer_options()) as buffer, torch.no_grad():
        layer = make_layer(buffer, shared_hidden=8)
        x = inputs()[2]
        idx, weights = layer.route(x)
        assert torch.equal(idx, idx.sort(-1).values)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(x)))
        assert layer.shared is not None
        want = torch.stack(
            [
                layer.shared(row)
                + sum(w * layer.experts[int(e)](row) for e, w in zip(i, v, strict=True))
                for row, i, v in zip(x, idx, weights, strict=True)
            ]
        )
        torch.testing.assert_close(layer(x), want)
        assert torch.equal(layer(x.view(2, 4, HIDDEN)).flatten(0, 1), layer(x))


def test_capacity_drops_the_latest_choices() -> None:
    with Buffer(**buffer_options()) as buffer, torch.no_grad():
        layer = make_layer(buffer, capacity_factor=0.5)
        x = torch.ones(8, HIDDEN)  # all tokens choose the same experts
        idx, weights = layer.route(x)
        capacity = 2  # ceil(0.5 * 8 * 3 / 7)
        assert (idx[:capacity] >= 0).all()
        assert (idx[capacity:] == -1).all()
        assert (weights[capacity:] == 0).all()
        assert layer.dropped == 6 * NUM_TOPK
        assert torch.equal(layer(x)[capacity:], torch.zeros(6, HIDDEN))
        assert int(layer.load.sum()) == capacity * NUM_TOPK
