"""Gradients of dispatch and combine, against the documented order and against the reference's.

Where a sum has one documented order the comparison is bit for bit with random numbers. Autograd
through the reference adds in an order of its own, so there numbers are small integers, whose sums
are exact in any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ep_comm import Buffer, EPError, Handle, reference
from ep_comm.autograd import combine, dispatch
from ep_comm.testing import Cluster

NUM_RANKS = 3
NUM_EXPERTS = 7
NUM_TOPK = 3
HIDDEN = 16
MAX_TOKENS = 6
TOKENS = (6, 0, 4)

STATIC = {"sync": False}
LAYOUTS = {
    "compact": {},
    "compact-static": {**STATIC, "capacity": 20},
    "grouped": {"layout": "grouped", "alignment": 4},
    "grouped-static": {"layout": "grouped", **STATIC},
    "slab": {"layout": "slab"},
    "slab-static": {"layout": "slab", **STATIC},
}


@pytest.fixture(scope="module", params=["cpu", "collective"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(ranks_per_node=NUM_RANKS) as ranks:
        ranks.make_buffers(
            num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, hidden=HIDDEN, max_tokens=MAX_TOKENS,
            backend=request.param,
        )  # fmt: skip
        yield ranks


@dataclass
class Numbers:
    """Tensors of all ranks: integers, or normally distributed."""

    integers: bool
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def like(self, shape: Any) -> Tensor:
        if self.integers:
            return torch.randint(-4, 5, tuple(shape), generator=self.generator).float()
        return torch.randn(tuple(shape), generator=self.generator)

    def per_rank(self, *shape: int) -> list[Tensor]:
        return [self.like((t, *shape)) for t in TOKENS]

    def ids(self) -> list[Tensor]:
        """With -1 and duplicates."""
        shapes = [(t, NUM_TOPK) for t in TOKENS]
        return [torch.randint(-1, NUM_EXPERTS, s, generator=self.generator) for s in shapes]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def reference_dispatch(x: Any, ids: Any, weights: Any, **options: Any) -> Any:
    return reference.dispatch(
        x, ids, weights, num_experts=NUM_EXPERTS, max_tokens=MAX_TOKENS, **options
    )


def equal(got: list[Any], want: list[Any]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def has_token(received: Any) -> Tensor:
    """Which rows hold one, as a factor."""
    idx = received.topk_idx
    return ((idx >= 0).any(-1) if received.layout == "compact" else idx >= 0).unsqueeze(-1)


# ---- in the documented order, bit for bit ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_dispatch_is_combine(cluster: Cluster, layout: str) -> None:
    numbers, options = Numbers(integers=False), LAYOUTS[layout]
    x, ids, weights = numbers.per_rank(HIDDEN), numbers.ids(), numbers.per_rank(NUM_TOPK)
    want = reference_dispatch(x, ids, weights, **options)
    grads = [numbers.like(w.x.shape) for w in want]
    weight_grads = [numbers.like(w.topk_weights.shape) for w in want]

    def work(rank: int, buffer: Buffer, x: Tensor, weights: Tensor) -> Any:
        received = dispatch(buffer, x, ids[rank], weights, **options)
        outputs = [received.x, received.topk_weights]
        return torch.autograd.grad(outputs, [x, weights], [grads[rank], weight_grads[rank]])

    got = cluster.run(work, cluster.buffers, leaves(x), leaves(weights))
    equal(got, reference.combine(grads, [w.handle for w in want], topk_weights=weight_grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_combine_is_cached_dispatch(cluster: Cluster, layout: str) -> None:
    numbers, options = Numbers(integers=False), LAYOUTS[layout]
    x, ids = numbers.per_rank(HIDDEN), numbers.ids()
    want = reference_dispatch(x, ids, None, **options)
    y = [numbers.like(w.x.shape) for w in want]
    values = [numbers.like(w.topk_idx.shape) for w in want]
    grads, home = numbers.per_rank(HIDDEN), numbers.per_rank(NUM_TOPK)

    def work(rank: int, buffer: Buffer, y: Tensor, values: Tensor, bias: Tensor) -> Any:
        handle = buffer.dispatch(x[rank], ids[rank], **options).handle
        outputs = combine(buffer, y, handle, topk_weights=values, bias=(None, bias))
        inputs = [y, values, bias]
        return torch.autograd.grad(list(outputs), inputs, [grads[rank], home[rank]])

    got = cluster.run(work, cluster.buffers, leaves(y), leaves(values), leaves(grads))
    handles = [w.handle for w in want]
    back = reference_dispatch(grads, None, home, handles=handles)
    empty = [torch.where(has_token(w), b.x, 0.0) for w, b in zip(want, back, strict=True)]
    equal(got, [(e, b.topk_weights, g) for e, b, g in zip(empty, back, grads, strict=True)])


# ---- a whole MoE layer against autograd through the reference ----


def layer(received: Any, back: Any, scale: Tensor, how: str) -> Any:
    """Experts that scale by their id, on one rank; their gradients show every row."""
    own = received.topk_idx.clamp(min=0)
    factor = torch.where(received.topk_idx >= 0, scale[own], 0.0)
    if how == "owner":
        factor = factor * received.topk_weights
    if received.layout == "compact":
        factor = factor.sum(-1)
    return back(received.x * factor.unsqueeze(-1))


WAYS = [(name, "owner") for name in LAYOUTS]
WAYS += [
    (name, how)
    for name in LAYOUTS
    for how in ("weighted", "per_rank")
    if not name.startswith("compact")
]


@pytest.mark.parametrize(("layout", "how"), WAYS)
def test_layer_agrees_with_autograd_through_the_reference(
    cluster: Cluster, layout: str, how: str
) -> None:
    numbers, options = Numbers(integers=True), LAYOUTS[layout]
    x, ids, weights = numbers.per_rank(HIDDEN), numbers.ids(), numbers.per_rank(NUM_TOPK)
    bias, probe = numbers.per_rank(HIDDEN), numbers.per_rank(HIDDEN)
    scale = torch.arange(1.0, NUM_EXPERTS + 1)
    scales = [scale.clone().requires_grad_() for _ in TOKENS]
    weighted, per_rank = how == "weighted", how == "per_rank"

    def work(rank: int, buffer: Buffer, x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Any:
        received = dispatch(buffer, x, ids[rank], w, **options)

        def back(y: Tensor) -> Any:
            return combine(
                buffer, y, received.handle, weighted=weighted, per_rank=per_rank,
                row_weights=received.topk_weights if per_rank else None, bias=b,
            )  # fmt: skip

        out = layer(received, back, s, how)
        return out.detach(), *torch.autograd.grad((out * probe[rank]).sum(), [x, w, b, s])

    got = cluster.run(work, cluster.buffers, leaves(x), leaves(weights), leaves(bias), scales)

    inputs = [
        leaves(x),
        leaves(weights),
        leaves(bias),
        [s.detach().clone().requires_grad_() for s in scales],
    ]
    everywhere = reference_dispatch(inputs[0], ids, inputs[1], **options)
    y = [layer(w, lambda y: y, inputs[3][r], how) for r, w in enumerate(everywhere)]
    outs = reference.combine(
        y, [w.handle for w in everywhere], weighted=weighted, per_rank=per_rank,
        row_weights=[w.topk_weights for w in everywhere] if per_rank else None, bias=inputs[2],
    )  # fmt: skip
    sum((o * p).sum() for o, p in zip(outs, probe, strict=True)).backward()  # type: ignore[union-attr]
    equal(got, [(outs[r].detach(), *(i[r].grad for i in inputs)) for r in range(NUM_RANKS)])


@pytest.mark.parametrize("layout", ["grouped", "grouped-static", "slab"])
def test_padding_of_sums_by_owners_has_no_gradient(cluster: Cluster, layout: str) -> None:
    numbers = Numbers(integers=True)
    x, ids, weights = numbers.per_rank(HIDDEN), numbers.ids(), numbers.per_rank(NUM_TOPK)

    def work(rank: int, buffer: Buffer) -> Any:
        received = buffer.dispatch(x[rank], ids[rank], weights[rank], **LAYOUTS[layout])
        there = has_token(received)
        y = torch.where(there, received.x, float("nan")).requires_grad_()
        factors = torch.where(there.squeeze(-1), received.topk_weights, float("nan"))
        out = combine(
            buffer, y, received.handle, per_rank=True, row_weights=factors.requires_grad_()
        )
        grads = torch.autograd.grad(out.sum(), [y, factors])
        for grad, used in zip(grads, (there.expand_as(y), there.squeeze(-1)), strict=True):
            assert grad.isfinite().all()
            assert (grad[~used] == 0).all()
            assert (grad[used] != 0).any() or not used.any()
        return out.isfinite().all()

    assert all(cluster.run(work, cluster.buffers))


def test_e6_second_derivative_agrees_with_the_reference(cluster: Cluster) -> None:
    numbers = Numbers(integers=True)
    x, ids, weights = numbers.per_rank(HIDDEN), numbers.ids(), numbers.per_rank(NUM_TOPK)

    def loss(received: Any, out: Tensor) -> Tensor:
        return (out * out).sum() + (received.topk_weights**2).sum()

    def work(rank: int, buffer: Buffer, x: Tensor, w: Tensor) -> Any:
        received = dispatch(buffer, x, ids[rank], w, layout="grouped")
        out = combine(buffer, received.x, received.handle, weighted=True)
        first = torch.autograd.grad(loss(received, out), [x, w], create_graph=True)
        return torch.autograd.grad(sum((f * f).sum() for f in first), [x, w])

    got = cluster.run(work, cluster.buffers, leaves(x), leaves(weights))

    x, weights = leaves(x), leaves(weights)
    everywhere = reference_dispatch(x, ids, weights, layout="grouped")
    outs = reference.combine(
        [w.x for w in everywhere], [w.handle for w in everywhere], weighted=True
    )
    total = sum(loss(w, o) for w, o in zip(everywhere, outs, strict=True))
    first = torch.autograd.grad(total, [*x, *weights], create_graph=True)
    second = torch.autograd.grad(sum((f * f).sum() for f in first), [*x, *weights])
    equal(got, [(second[r], second[NUM_RANKS + r]) for r in range(NUM_RANKS)])


# ---- what takes part ----


def test_order_changes_the_sum_and_not_the_gradient(cluster: Cluster) -> None:
    ids = torch.tensor([[NUM_EXPERTS - 1, 3, 0]])  # owners descend
    rows = torch.tensor([1.0, 2.0**24, -(2.0**24)])

    def work(rank: int, buffer: Buffer) -> Any:
        received = dispatch(buffer, torch.ones(1, HIDDEN), ids, rows.unsqueeze(0), layout="grouped")
        y = (received.x * received.topk_weights.unsqueeze(1)).requires_grad_()  # type: ignore[union-attr]
        sums = [combine(buffer, y, received.handle, order=order) for order in ("rank", "topk")]
        grads = [torch.autograd.grad(s.sum(), y)[0] for s in sums]
        assert torch.equal(*grads)
        return [float(s.detach()[0, 0]) for s in sums]

    ascending, slots = (rows[2] + rows[1]) + rows[0], (rows[0] + rows[1]) + rows[2]
    assert cluster.run(work, cluster.buffers) == [[float(ascending), float(slots)]] * NUM_RANKS
    assert ascending != slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_weights_alone_has_their_dtype(cluster: Cluster, dtype: torch.dtype) -> None:
    numbers = Numbers(integers=True)
    x, ids = numbers.per_rank(HIDDEN), numbers.ids()
    weights = [w.to(dtype) for w in numbers.per_rank(NUM_TOPK)]

    def work(rank: int, buffer: Buffer, w: Tensor) -> Tensor:
        received = dispatch(buffer, x[rank], ids[rank], w)
        assert not received.x.requires_grad
        received.topk_weights.square().sum().backward()
        assert w.grad is not None
        return w.grad

    got = cluster.run(work, cluster.buffers, leaves(weights))
    equal(got, [torch.where(i >= 0, 2 * w, 0) for i, w in zip(ids, weights, strict=True)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_without_token_are_zero(cluster: Cluster, layout: str) -> None:
    def work(rank: int, buffer: Buffer) -> None:
        for num_tokens in (6, 1):  # the second dispatch gets memory the first one has written
            idx = torch.arange(num_tokens * NUM_TOPK).view(num_tokens, NUM_TOPK) % NUM_EXPERTS
            x = torch.full((num_tokens, HIDDEN), float("nan"))
            received = dispatch(buffer, x, idx, **LAYOUTS[layout])
            empty = torch.where(has_token(received), 0.0, received.x)
            assert torch.equal(empty, torch.zeros_like(empty))
            del received, empty

    cluster.run(work, cluster.buffers)


def test_without_gradients_nothing_is_kept(cluster: Cluster) -> None:
    def work(rank: int, buffer: Buffer) -> None:
        received = dispatch(buffer, torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64))
        out = combine(buffer, received.x, received.handle)
        assert not received.x.requires_grad
        assert out.grad_fn is None
        assert torch.equal(out, torch.ones(2, HIDDEN))

    cluster.run(work, cluster.buffers)


WRONG: dict[str, dict[str, Any]] = {
    "begun": {"wait": False},
    "quantized": {"quantize": "fp8"},
    "layout": {"layout": 3},
    "no-layout": {"layout": None},
    "alignment": {"alignment": "4"},
    "no-alignment": {"alignment": None},
    "numpy-alignment": {"alignment": numpy.int64(4)},
    "true-alignment": {"alignment": True},
    "capacity": {"capacity": 1.5},
    "layer": {"layer": 0.0},
    "num-sms": {"num_sms": "all"},
    "scale-block": {"scale_block": "128"},
    "quantize": {"quantize": 8},
    "output": {"output": b"arena"},
    "transfer": {"transfer": None},
    "row-index": {"row_index": numpy.ones(2)},
    "sync": {"sync": torch.ones(2)},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG.keys())
def test_wrong_option_on_one_rank_is_refused_on_every_rank(
    cluster: Cluster, options: dict[str, Any]
) -> None:
    def work(rank: int, buffer: Buffer) -> str:
        x, idx = torch.ones(2, HIDDEN, requires_grad=True), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(EPError) as caught:
            dispatch(buffer, x, idx, **(options if rank == 1 else {}))
        received = dispatch(buffer, x, idx)
        assert torch.equal(combine(buffer, received.x, received.handle), x)
        return caught.value.code

    assert cluster.run(work, cluster.buffers) == ["E203"] * NUM_RANKS


COMBINE_WRONG: dict[str, dict[str, Any]] = {
    "order": {"order": None},
    "weighted": {"weighted": numpy.ones(2)},
    "num-sms": {"num_sms": 1.5},
}


@pytest.mark.parametrize("options", COMBINE_WRONG.values(), ids=COMBINE_WRONG.keys())
def test_wrong_option_of_combine_is_refused_on_every_rank(
    cluster: Cluster, options: dict[str, Any]
) -> None:
    def work(rank: int, buffer: Buffer) -> str:
        x, idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        received = dispatch(buffer, x, idx)
        with pytest.raises(EPError) as caught:
            combine(buffer, received.x, received.handle, **(options if rank == 1 else {}))
        assert torch.equal(combine(buffer, received.x, received.handle), x)
        return caught.value.code

    assert cluster.run(work, cluster.buffers) == ["E203"] * NUM_RANKS


def test_options_are_taken_as_the_native_calls_take_them(cluster: Cluster) -> None:
    def work(rank: int, buffer: Buffer) -> None:
        x, idx = torch.ones(2, HIDDEN, requires_grad=True), torch.zeros(2, 1, dtype=torch.int64)
        received = dispatch(buffer, x, idx, row_index=0, sync=numpy.True_, tag=7)  # type: ignore[arg-type]
        assert received.x.requires_grad
        total = combine(buffer, received.x, received.handle, weighted=0, tag=7)  # type: ignore[arg-type]
        assert total.requires_grad

    cluster.run(work, cluster.buffers)


SPOILED: dict[str, Callable[[Handle], Any]] = {
    "meta": lambda h: h._replace(meta=torch.zeros_like(h.meta)),
    "short-meta": lambda h: h._replace(meta=h.meta[:3]),
    "float-meta": lambda h: h._replace(meta=h.meta.float()),
    "no-weights": lambda h: h._replace(topk_weights=None),
    "no-rows": lambda h: h._replace(send_row=h.send_row.to("meta")),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_cached_dispatch_along_a_spoiled_handle_is_refused_on_every_rank(
    cluster: Cluster, spoil: Callable[[Handle], Any]
) -> None:
    def work(rank: int, buffer: Buffer) -> str:
        x, idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        handle = dispatch(buffer, x, idx).handle
        with pytest.raises(EPError) as caught:
            dispatch(buffer, x, None, handle=spoil(handle) if rank == 1 else handle)
        return caught.value.code

    assert cluster.run(work, cluster.buffers) == ["E320"] * NUM_RANKS


def _nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # a prototype, torch says
        return torch.nested.nested_tensor([torch.ones(HIDDEN)] * 2, layout=layout)


ODD_X: dict[str, Tensor] = {
    "sparse": torch.ones(2, HIDDEN).to_sparse(),
    "one-dimension": torch.ones(HIDDEN),
    "scalar": torch.ones(()),
    "meta": torch.ones(2, HIDDEN, device="meta"),
    "nested": _nested(torch.strided),
    "jagged": _nested(torch.jagged),
}


def check_refused_on_every_rank(
    cluster: Cluster,
    odd: Tensor,
    calls_of: Callable[[Buffer], list[tuple[Callable[[Tensor], Any], Tensor]]],
) -> None:
    """Calls of one tensor, each with one that is as it should be: rank 1 gives the odd one."""

    def work(rank: int, buffer: Buffer) -> list[str]:
        codes = []
        for call, good in calls_of(buffer):
            with pytest.raises(EPError) as caught:
                call(odd if rank == 1 else good)
            codes.append(caught.value.code)
        return codes

    found = cluster.run(work, cluster.buffers)
    assert found == [found[0]] * NUM_RANKS
    assert set(found[0]) <= {"E201", "E202"}


@pytest.mark.parametrize("odd", ODD_X.values(), ids=ODD_X.keys())
@pytest.mark.parametrize("cached", [False, True], ids=["routed", "cached"])
def test_odd_tensor_on_one_rank_is_refused_on_every_rank(
    cluster: Cluster, odd: Tensor, cached: bool
) -> None:
    def calls(buffer: Buffer) -> list[tuple[Callable[[Tensor], Any], Tensor]]:
        x, idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        received = dispatch(buffer, x, idx)
        routing: Any = (None, {"handle": received.handle}) if cached else (idx, {})
        return [
            (lambda given: dispatch(buffer, given, routing[0], **routing[1]), x),
            (lambda given: combine(buffer, given, received.handle), received.x),
        ]

    check_refused_on_every_rank(cluster, odd, calls)


@pytest.mark.parametrize("odd", ODD_X.values(), ids=ODD_X.keys())
def test_odd_weights_on_one_rank_are_refused_on_every_rank(cluster: Cluster, odd: Tensor) -> None:
    def calls(buffer: Buffer) -> list[tuple[Callable[[Tensor], Any], Tensor]]:
        x, idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        weights = torch.ones(2, 1)
        received = dispatch(buffer, x, idx, weights)
        assert received.topk_weights is not None
        return [
            (lambda given: dispatch(buffer, x, idx, given), weights),
            (
                lambda given: combine(buffer, received.x, received.handle, topk_weights=given),
                received.topk_weights,
            ),
        ]

    check_refused_on_every_rank(cluster, odd, calls)


def test_what_combine_cannot_take_is_refused_on_every_rank(cluster: Cluster) -> None:
    def work(rank: int, buffer: Buffer) -> str:
        received = dispatch(buffer, torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64))
        handle = received.handle if rank else received.handle[:5]
        with pytest.raises(EPError) as caught:
            combine(buffer, received.x, handle)
        return caught.value.code

    assert cluster.run(work, cluster.buffers) == ["E320"] * NUM_RANKS
