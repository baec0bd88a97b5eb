"""The torch ops: what torch.compile, checkpoints and fake tensors make of dispatch and combine."""

from __future__ import annotations

import functools
import gc
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ep_comm import Buffer, EPError, StoreGroup, autograd
from ep_comm.autograd import combine, dispatch
from ep_comm.nn import MoE
from ep_comm.received import Received
from ep_comm.testing import Cluster, run_processes

NUM_EXPERTS, NUM_TOPK, HIDDEN, MAX_TOKENS, TOKENS = 5, 2, 16, 8, 6
SIZES = {
    "num_experts": NUM_EXPERTS, "num_topk": NUM_TOPK, "hidden": HIDDEN, "max_tokens": MAX_TOKENS,
    "device": "cpu",
}  # fmt: skip
OPS = torch.ops.ep_comm
SHAPES_ONLY = ("test_schema", "test_autograd_registration", "test_faketensor")

WAYS: dict[str, dict[str, Any]] = {
    "compact": {},
    "compact-index": {"row_index": True, "alignment": 4},
    "compact-static": {"sync": False, "capacity": 12},
    "compact-static-index": {"sync": False, "row_index": True},
    "grouped": {"layout": "grouped", "alignment": 4},
    "grouped-static": {"layout": "grouped", "sync": False},
    "slab": {"layout": "slab"},
    "slab-static": {"layout": "slab", "sync": False, "capacity": 24},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "fp8-compact": {"quantize": "fp8", "scale_block": 32},
    "fp8-slab": {"quantize": "fp8", "scale_block": 32, "layout": "slab", "capacity": 6},
    "ue8m0-grouped": {"quantize": "fp8_ue8m0", "scale_block": 32, "layout": "grouped"},
}


@pytest.fixture(scope="module")
def buffer() -> Iterator[Buffer]:
    """One rank: fake implementations and real ones can be compared without company."""
    torch.set_num_threads(1)
    with Buffer(StoreGroup(torch.distributed.HashStore(), 0, 1), **SIZES) as one:
        yield one


def make_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g).requires_grad_()
    idx = torch.randint(-1, NUM_EXPERTS, (TOKENS, NUM_TOPK), generator=g)
    return x, idx, torch.rand(TOKENS, NUM_TOPK, generator=g).requires_grad_()


def dispatch_args(buffer: Buffer, x: Tensor, idx: Tensor, w: Tensor | None, **o: Any) -> Any:
    return (
        None, x, idx, w, o.get("scales"), buffer.number, *buffer.sizes, o.get("layout", "compact"),
        o.get("alignment", 1), o.get("row_index", False), 0, o.get("capacity"), o.get("sync", True),
        o.get("scale_block", 128), o.get("quantize"), "auto", "sm", None, "",
    )  # fmt: skip


# ---- what an op owes to torch ----


@pytest.mark.parametrize("way", WAYS)
def test_dispatch_passes_opcheck(buffer: Buffer, way: str) -> None:
    args = dispatch_args(buffer, *make_inputs(), **WAYS[way])
    # Not compared twice in full: `meta` holds the number of the call, which never repeats.
    torch.library.opcheck(OPS.dispatch.default, args, test_utils=SHAPES_ONLY)


@pytest.mark.parametrize("way", ["compact", "grouped-static", "slab"])
def test_combine_and_redispatch_pass_opcheck(buffer: Buffer, way: str) -> None:
    x, idx, w = make_inputs()
    received = buffer.dispatch(x.detach(), idx, w.detach(), **WAYS[way])
    assert received.topk_weights is not None
    y, values = torch.randn(received.x.shape), torch.rand(received.topk_weights.shape)
    y.requires_grad_()
    values.requires_grad_()
    tail = (*received.handle, buffer.number)
    torch.library.opcheck(
        OPS.combine.default,
        (None, y, values, None, x, None, *tail, False, "rank", False, None, ""),
    )
    shape = list(received.x.shape)
    for crosses in (False, True):
        last = (*tail, shape, received.layout, crosses, 128, None, "auto", "sm", None, "")
        torch.library.opcheck(OPS.redispatch.default, (None, x, w, None, *last))


@pytest.mark.parametrize("way", QUANTIZED)
def test_scales_have_the_shapes_and_strides_promised(way: str) -> None:
    options = {**SIZES, "hidden": 256}
    with Buffer(StoreGroup(torch.distributed.HashStore(), 0, 1), **options) as wide:
        _, idx, w = make_inputs()
        x = torch.randn(TOKENS, 256)
        args = dispatch_args(wide, x, idx, w.detach(), **QUANTIZED[way])
        torch.library.opcheck(OPS.dispatch.default, args, test_utils=SHAPES_ONLY)
        given = {**QUANTIZED[way], "quantize": None, "scales": torch.randn(TOKENS, 8)}
        args = dispatch_args(wide, x.to(torch.int8), idx, None, **given)
        torch.library.opcheck(OPS.dispatch.default, args, test_utils=SHAPES_ONLY)


def test_sizes_are_symbols_with_sync_and_numbers_without(buffer: Buffer) -> None:
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, idx, w = (mode.from_tensor(t.detach()) for t in make_inputs())
        exact = dispatch(buffer, x, idx, w, layout="grouped")
        assert free_unbacked_symbols(exact.x.shape[0])
        assert free_unbacked_symbols(exact.num_recv)
        assert combine(buffer, exact.x, exact.handle).shape == x.shape
        static = dispatch(buffer, x, idx, w, layout="grouped", sync=False)
        worst = MAX_TOKENS * NUM_TOPK
        assert tuple(static.x.shape) == (worst, HIDDEN)
        assert tuple(static.handle.recv_src.shape) == (MAX_TOKENS, 2)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_e6_native_calls_refuse_fake_tensors(buffer: Buffer) -> None:
    x, idx, _ = make_inputs()
    real = x.detach()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        with pytest.raises(EPError, match=r"E202.*through ep_comm\.autograd"):
            buffer.dispatch(real, idx)
    with pytest.raises(EPError, match=r"E202.*rejected x.*: got a fake tensor"):
        buffer.dispatch(fake, idx)
    assert buffer.dispatch(real, idx).num_recv > 0


def test_native_calls_do_not_go_through_ops() -> None:
    program = (
        "import sys, torch, ep_comm\n"
        "b = ep_comm.Buffer(num_experts=2, num_topk=1, hidden=8, max_tokens=4, device='cpu')\n"
        "r = b.dispatch(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64))\n"
        "b.combine(r.x, r.handle)\n"
        "assert not [m for m in sys.modules if m.startswith('ep_comm.ops')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_differentiable_calls_have_the_options_of_native_ones() -> None:
    def lacks(ours: Any, native: Any) -> set[str]:
        return {*inspect.signature(native).parameters} - {*inspect.signature(ours).parameters}

    stats = {"recv_stats", "wait_stats"}
    assert lacks(dispatch, Buffer.dispatch) == {"self", "origins", *stats}
    assert lacks(combine, Buffer.combine) == {"self", "sum_weights", "out", "wait", "wait_stats"}


# ---- gradients of what compilers and views hand in ----


def test_views_are_copied_and_so_are_their_gradients(buffer: Buffer) -> None:
    _, idx, w = make_inputs()
    padded = torch.randn(TOKENS, 2 * HIDDEN + 1)
    view = padded[:, 1 : 2 * HIDDEN : 2]  # neither dense nor aligned
    leaf = view.clone().requires_grad_()
    grads = []
    for source in (view.requires_grad_(), leaf):
        received = dispatch(buffer, source, idx, w, layout="grouped")
        out = combine(buffer, received.x.T.contiguous().T, received.handle, weighted=True)
        grads.append(torch.autograd.grad(out.sum(), [source, w]))  # its gradient has stride 0
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    with pytest.raises(EPError, match="E202"):
        buffer.dispatch(view.detach(), idx)  # what the native call says


def test_int32_ids_come_back_as_int32(buffer: Buffer) -> None:
    x, idx, w = make_inputs()
    received = dispatch(buffer, x, idx.to(torch.int32), w)
    assert received.topk_idx is not None
    assert received.topk_idx.dtype == torch.int32
    assert received.handle.topk_idx.dtype == torch.int64
    assert torch.equal(combine(buffer, received.x, received.handle).detach(), alone(buffer, x, idx))


def alone(buffer: Buffer, x: Tensor, idx: Tensor) -> Tensor:
    """One rank owns all experts: a token comes back as it was, or as zero when it went nowhere."""
    return torch.where((idx >= 0).any(1, keepdim=True), x.detach(), 0.0)


# ---- buffers that are gone ----


def test_closed_buffer_is_refused() -> None:
    x, idx, w = make_inputs()
    one = Buffer(StoreGroup(torch.distributed.HashStore(), 0, 1), **SIZES)
    received = dispatch(one, x, idx, w)
    out = combine(one, received.x, received.handle)
    number, args = one.number, dispatch_args(one, x, idx, w)
    one.close()
    with pytest.raises(EPError, match="E340"):
        dispatch(one, x, idx, w)
    with pytest.raises(EPError, match="E340"):
        out.sum().backward()
    del one, received, out
    gc.collect()
    with pytest.raises(EPError, match=rf"E340.*buffer {number} of this process is gone"):
        OPS.dispatch(*args)


def test_ops_do_not_keep_a_buffer() -> None:
    one = Buffer(StoreGroup(torch.distributed.HashStore(), 0, 1), **SIZES)
    received = dispatch(one, *make_inputs())
    finalizer = one._finalizer
    del one
    gc.collect()
    assert not finalizer.alive
    assert received.x.requires_grad


# ---- GPU arena memory ----


def test_hold_of_arena_memory_reaches_the_caller(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    @dataclass
    class ArenaReceived(Received):  # as that of the nvlink backend
        hold: Any = None

        def use_on(self, stream: str) -> None:
            used.append(f"{self.hold} on {stream}")

    native = buffer.dispatch

    def from_arena(*args: Any, **options: Any) -> Received:
        return ArenaReceived(**vars(native(*args, **options)), hold="x")

    monkeypatch.setattr(buffer, "dispatch", from_arena)
    x, idx, w = make_inputs()
    for source in (x, x.detach()):
        received = dispatch(buffer, source, idx, w)
        received.use_on("side")
        again = dispatch(buffer, source, None, w, handle=received.handle)
        again.use_on("side")
    assert used == ["x on side"] * 4


# ---- checkpoints: two ranks ----


def layer(buffer: Buffer, scale: Tensor, x: Tensor, idx: Tensor, w: Tensor, **o: Any) -> Tensor:
    """Experts are one elementwise function, the same bits in whatever compiler."""
    received = dispatch(buffer, x, idx, w, **o)
    assert received.topk_weights is not None
    weight = received.topk_weights
    weight = weight.sum(-1, keepdim=True) if received.layout == "compact" else weight.unsqueeze(-1)
    out: Tensor = combine(buffer, torch.relu(received.x * scale) * weight, received.handle, bias=x)
    return out


def keep_communication() -> Any:
    return create_selective_checkpoint_contexts(autograd.OPS)


# How to run a layer -> operations of forward and backward; without a checkpoint it is four.
CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "recomputed": ({"use_reentrant": False}, 6),
    "reentrant": ({"use_reentrant": True}, 6),
    "selective": ({"use_reentrant": False, "context_fn": keep_communication}, 4),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("cached", [False, True], ids=["routed", "cached"])
def test_checkpoint_recomputes_on_all_ranks_or_keeps(how: str, cached: bool) -> None:
    options, num_operations = CHECKPOINTS[how]

    def work(rank: int, buffer: Buffer) -> None:
        x, idx, w = make_inputs(rank)
        scale = torch.linspace(-1, 2, HIDDEN).requires_grad_()
        routing: Any = (idx, {})
        if cached:
            handle = buffer.dispatch(x.detach(), idx, layout="grouped").handle
            routing = (None, {"handle": handle})

        def run(x: Tensor, w: Tensor) -> Tensor:
            return layer(buffer, scale, x, routing[0], w, layout="grouped", **routing[1])

        def gradients(out: Tensor) -> list[Tensor]:
            x.grad = w.grad = scale.grad = None
            out.square().sum().backward()
            return [x.grad, w.grad, scale.grad]  # type: ignore[list-item]

        want = gradients(run(x, w))
        before = buffer.stats()["operations"]
        got = gradients(checkpoint(run, x, w, **options))  # type: ignore[arg-type]
        assert buffer.stats()["operations"] - before == num_operations
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)

    with Cluster(ranks_per_node=2) as cluster:
        cluster.run(work, cluster.make_buffers(**SIZES))


# ---- compiled, two ranks; they are processes, as compilers are not made for threads ----


def step(function: Any, inputs: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> list[Tensor]:
    x, idx, w = inputs
    out = function(x, idx, w)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, w, scale])]


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


def compile_on_two_ranks(rank: int, num_ranks: int) -> dict[str, bool]:
    """What each check found; names are those of the tests below."""
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, bool] = {}
    scale = torch.linspace(-1, 2, HIDDEN).requires_grad_()
    with Buffer(**SIZES) as buffer:
        for way, options in WAYS.items():
            plain = functools.partial(layer, buffer, scale, **options)
            compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
            found[way] = True
            for seed in range(3):  # other sizes arrive: the graph has to be one for all
                inputs = make_inputs(10 * seed + rank)
                fresh = torch.compiler.set_stance("fail_on_recompile" if seed else "default")
                with fresh:
                    got = step(compiled, inputs, scale)
                found[way] &= equal(got, step(plain, inputs, scale))
        found |= compile_cached(rank, buffer, scale)
        found |= compile_checkpoints(rank, buffer, scale)
        found |= compile_moe(rank, buffer)
        found |= compile_unused(rank, buffer, "aot_eager")
    plain = functools.partial(layer, buffer, scale, layout="grouped")
    closed = torch.compile(plain, fullgraph=True, backend="aot_eager")
    found["closed"] = code_of(lambda: step(closed, inputs, scale)) == "E340"
    return found


def use_inductor_on_two_ranks(rank: int, num_ranks: int) -> dict[str, bool]:
    with Buffer(**SIZES) as buffer:
        scale = torch.linspace(-1, 2, HIDDEN).requires_grad_()
        grouped = functools.partial(layer, buffer, scale, layout="grouped")
        inputs = make_inputs(rank)
        got = step(torch.compile(grouped, fullgraph=True), inputs, scale)
        want = step(grouped, inputs, scale)
        # Inductor sums the gradients of weights and scale in an order of its own.
        sums = all(
            torch.allclose(*pair, 1e-4, 1e-4) for pair in zip(got[2:], want[2:], strict=True)
        )
        found = {"inductor": equal(got[:2], want[:2]) and sums}
        found |= compile_unused(rank, buffer, "inductor")
    return found | compile_independent(rank)


def compile_cached(rank: int, buffer: Buffer, scale: Tensor) -> dict[str, bool]:
    """Along a handle made outside of the graph; the layout has to be told, and right."""
    x, idx, w = make_inputs(rank)
    found = {}
    for way in ("compact", "grouped", "slab"):
        handle = buffer.dispatch(x.detach(), idx, **WAYS[way]).handle
        plain = functools.partial(layer, buffer, scale, handle=handle, layout=way)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        inputs: Any = (x, None, w)
        found[f"cached-{way}"] = equal(step(compiled, inputs, scale), step(plain, inputs, scale))
    wrong = functools.partial(layer, buffer, scale, handle=handle, layout="grouped")
    refused = torch.compile(wrong, fullgraph=True, backend="aot_eager")
    found["cached-wrong-layout"] = code_of(lambda: refused(x, None, w)) == "E203"
    return found


def compile_checkpoints(rank: int, buffer: Buffer, scale: Tensor) -> dict[str, bool]:
    inputs, found = make_inputs(rank), {}
    plain = functools.partial(layer, buffer, scale, layout="grouped")
    want = step(plain, inputs, scale)
    for how in ("recomputed", "selective"):
        run = functools.partial(checkpoint, plain, **CHECKPOINTS[how][0])
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        found[f"checkpoint-{how}"] = equal(step(compiled, inputs, scale), want)
    before = buffer.stats()["operations"]
    step(compiled, inputs, scale)
    found["checkpoint-selective-keeps"] = buffer.stats()["operations"] - before == 4
    return found


def compile_moe(rank: int, buffer: Buffer) -> dict[str, bool]:
    found = {}
    for name, options in {
        "plain": {},
        "capacity": {"capacity_factor": 0.7, "shared_hidden": 8},
    }.items():
        torch.manual_seed(1)
        moe = MoE(buffer, HIDDEN, 24, NUM_TOPK, **options)  # type: ignore[arg-type]
        results = []
        for forward in (moe, torch.compile(moe, fullgraph=True, backend="aot_eager")):
            x, _, _ = make_inputs(rank)
            moe.zero_grad()
            out = forward(x)
            (out.square().sum() + moe.balance_loss).backward()
            grads = [p.grad for p in moe.parameters()]
            results.append([out.detach(), x.grad, moe.load, torch.tensor(moe.dropped), *grads])
        found[f"moe-{name}"] = equal(*results)
    return found


def compile_unused(rank: int, buffer: Buffer, compiler: str) -> dict[str, bool]:
    """A dispatch whose results nobody uses is as collective as any other."""
    x, idx, _ = make_inputs(rank)

    def twice(x: Tensor) -> Tensor:
        dispatch(buffer, x, idx)
        return x + 1

    before = buffer.stats()["operations"]
    with torch.no_grad():
        torch.compile(twice, fullgraph=True, backend=compiler)(x)
    return {f"unused-{compiler}": buffer.stats()["operations"] - before == 1}


def compile_independent(rank: int) -> dict[str, bool]:
    """Three batches, or recomputed layers, that share nothing, and far more tokens on one rank:
    inductor goes by sizes, which must not show in the order of calls."""
    num_tokens = (2048, 4)[rank]
    g = torch.Generator().manual_seed(rank)
    x = [torch.randn(num_tokens, HIDDEN, generator=g).requires_grad_() for _ in range(3)]
    idx = torch.randint(0, NUM_EXPERTS, (num_tokens, NUM_TOPK), generator=g)
    order: list[str] = []

    def run(x: list[Tensor]) -> Tensor:
        sent = [dispatch(buffer, b.relu(), idx, tag=str(i)) for i, b in enumerate(x)]
        sums = [combine(buffer, sent[i].x * (2 + i), sent[i].handle) for i in (2, 0, 1)]
        return torch.stack([s.square().sum() for s in sums]).sum()

    def recompute(x: list[Tensor]) -> Tensor:
        y = x[0]
        for i in range(3):
            y = checkpoint(deeper, y, i, use_reentrant=False)  # type: ignore[assignment]
        return y.square().sum()

    def deeper(y: Tensor, i: int) -> Tensor:
        sent = dispatch(buffer, y.relu(), idx, tag=str(i))
        out: Tensor = combine(buffer, sent.x * (2 + i), sent.handle, bias=y)
        return out

    found = {}
    with Buffer(**{**SIZES, "max_tokens": 2048}) as buffer:
        native: Any = buffer.dispatch
        recorded = lambda *a, **o: (order.append(o["tag"]), native(*a, **o))[1]  # noqa: E731
        buffer.dispatch = recorded  # type: ignore[method-assign]
        for name, function, leaves in (("independent", run, x), ("recomputed", recompute, x[:1])):
            orders, grads = [], []
            for way in (function, torch.compile(function, fullgraph=True, dynamic=True)):
                order.clear()
                grads.append(torch.autograd.grad(way(x), leaves))
                orders.append(list(order))
            same = sorted(orders[0]) == sorted(orders[1])
            if name == "independent":
                same = orders[0] == orders[1]
            found[name] = same and equal(*map(list, grads))
        del buffer.dispatch
    return found


def code_of(call: Any) -> str:
    try:
        call()
    except EPError as error:
        return error.code
    return "none"


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, bool]]:
    """Findings of both ranks."""
    return run_processes(compile_on_two_ranks, 2, limit_s=280)


@pytest.fixture(scope="module")
def by_inductor() -> list[dict[str, bool]]:
    return run_processes(use_inductor_on_two_ranks, 2, limit_s=280)


CHECKS = [
    *WAYS,
    *("cached-compact", "cached-grouped", "cached-slab", "cached-wrong-layout"),
    *("checkpoint-recomputed", "checkpoint-selective", "checkpoint-selective-keeps"),
    *("moe-plain", "moe-capacity", "unused-aot_eager", "closed"),
]
INDUCTOR_CHECKS = ["inductor", "unused-inductor", "independent", "recomputed"]


@pytest.mark.parametrize("check", CHECKS)
def test_e6_compiled_layer_agrees_with_eager(compiled: list[dict[str, bool]], check: str) -> None:
    assert [found[check] for found in compiled] == [True, True]


@pytest.mark.parametrize("check", INDUCTOR_CHECKS)
def test_e6_inductor_agrees_with_eager(by_inductor: list[dict[str, bool]], check: str) -> None:
    assert [found[check] for found in by_inductor] == [True, True]


def test_every_compiled_check_is_a_test(
    compiled: list[dict[str, bool]], by_inductor: list[dict[str, bool]]
) -> None:
    assert sorted(compiled[0]) == sorted(CHECKS)
    assert sorted(by_inductor[0]) == sorted(INDUCTOR_CHECKS)
