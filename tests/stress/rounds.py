"""Kinds of rounds. All ranks play the same ones, and differ only in the order in which they wait.

A round prepares, calls, checks. Calls run nothing of torch's own: ranks that are threads of a
process wait for each other on the GPU, and a kernel that torch loads lazily would wait for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from compare import same_received, same_values
from torch import Tensor

from ep_comm import Handle, Received, reference
from ep_comm.errors import EPError

from .draw import BF16, Draw, draw, draw_tokens
from .truth import Mismatch, Side, Truth


class Round:
    """One of a kind. `prepare` and `check` run while no rank waits for another."""

    def __init__(self, side: Side, program: random.Random, number: int) -> None:
        self.side, self.number = side, number
        self.mine = random.Random(f"{number} {side.rank}")
        self.plan(program)

    dispatches = 1

    def draw(self, program: random.Random, k: int = 0, **fixed: Any) -> Draw:
        return draw(program, self.side.world, self.side.num_ranks, self.number + k, **fixed)

    def plan(self, program: random.Random) -> None: ...
    def prepare(self) -> None: ...
    def call(self) -> None: ...
    def check(self) -> None: ...


class Pair(Round):
    """Dispatch, and combine of what came: as it lies, from other arena memory, from a tensor."""

    def plan(self, program: random.Random) -> None:
        self.drawn = self.draw(program)
        self.place = program.choice(["there", "there", "arena", "tensor"])
        self.weighted = program.random() < 0.5
        self.per_rank = program.random() < 0.3  # owners add up their rows of a token

    def prepare(self) -> None:
        self.given = self.side.inputs(self.drawn, self.number)
        self.weighted &= self.drawn.weights and self.drawn.layout != "compact"
        self.per_rank &= self.drawn.layout != "compact" and self.side.adds_per_rank(self.drawn)

    def dispatch(self) -> Received:
        received: Received = self.side.buffer.dispatch(**self.given, **self.drawn.options)
        return received

    def combine(self, received: Received, **options: Any) -> Any:
        y = received.x
        if self.place == "arena":
            y = self.side.buffer.empty(y.shape, y.dtype).copy_(y)
        elif self.place == "tensor":
            y = y.clone()
        if not self.per_rank:
            options["weighted"] = self.weighted
        else:
            options |= {"per_rank": True}
            options |= {"row_weights": received.topk_weights} if self.weighted else {}
        return self.side.buffer.combine(y, received.handle, **options)

    def call(self) -> None:
        self.got = self.dispatch()
        self.out = None if self.drawn.dtype.itemsize == 1 else self.combine(self.got)

    def check(self) -> None:
        truth = Truth(self.side, self.drawn)
        truth.check(self.got, self.number)
        if self.out is not None:
            sums = truth.sums(self.number, self.weighted, self.per_rank)
            self.side.same("sums", self.out, sums)
        del self.got, self.out


class Cached(Pair):
    """Other rows on the same way, and their sums."""

    dispatches = 2

    def prepare(self) -> None:
        super().prepare()
        again = self.side.inputs(self.drawn, self.number + 1)
        del again["topk_idx"]
        self.again = again

    def call(self) -> None:
        self.first = self.dispatch()
        self.got = self.side.buffer.dispatch(**self.again, handle=self.first.handle)
        self.out = None if self.drawn.dtype.itemsize == 1 else self.combine(self.got)

    def check(self) -> None:
        truth = Truth(self.side, self.drawn)
        truth.check(self.first, self.number)
        truth.check(self.got, self.number + 1, cached=True)
        if self.out is not None:
            sums = truth.sums(self.number + 1, self.weighted, self.per_rank)
            self.side.same("sums", self.out, sums)
        del self.first, self.got, self.out


class Copies(Cached):
    """Rows travel by copy engine, twice the same way."""

    def plan(self, program: random.Random) -> None:
        self.drawn = self.draw(program, layout="compact", sync=True, transfer="copy_engine")
        self.place, self.weighted, self.per_rank = "there", False, False

    def prepare(self) -> None:
        super().prepare()
        self.again["transfer"] = "copy_engine"


class Nothing(Round):
    """Nobody sends anything; and what was begun before is let go."""

    def plan(self, program: random.Random) -> None:
        tokens = [0] * self.side.num_ranks
        self.drawn = self.draw(program, tokens=tokens, layout="compact", sync=True)
        self.drawn = replace(self.drawn, options={"layout": "compact"})

    def prepare(self) -> None:
        self.given = self.side.inputs(self.drawn, self.number)

    def call(self) -> None:
        got = self.side.buffer.dispatch(**self.given, wait=False).wait()
        self.num_recv = got.num_recv

    def check(self) -> None:
        if self.num_recv != 0:
            raise Mismatch(f"{self.num_recv} tokens came, and nobody sent any")


class Begun(Round):
    """Several at once, waited for in an order of each rank's own."""

    def plan(self, program: random.Random) -> None:
        self.dispatches = program.randint(2, 4)
        self.pairs = []
        for k in range(self.dispatches):
            pair = Pair(self.side, program, self.number + k)
            pair.place = program.choice(["there", "arena"])
            self.pairs.append(pair)

    def prepare(self) -> None:
        for pair in self.pairs:
            pair.prepare()

    def call(self) -> None:
        buffer = self.side.buffer
        begun = [buffer.dispatch(**p.given, **p.drawn.options, wait=False) for p in self.pairs]
        for k in self.order():
            self.pairs[k].got = begun[k].wait()
        sums = [
            None if p.drawn.dtype.itemsize == 1 else p.combine(p.got, wait=False)
            for p in self.pairs
        ]
        for k in self.order():
            self.pairs[k].out = None if sums[k] is None else sums[k].wait()

    def order(self) -> list[int]:
        return self.mine.sample(range(self.dispatches), self.dispatches)

    def check(self) -> None:
        for pair in self.pairs:
            pair.check()


class Replay(Round):
    """A captured dispatch and combine, replayed with other tokens."""

    def plan(self, program: random.Random) -> None:
        world, ranks = self.side.world, self.side.num_ranks
        full = {"tokens": [world.tokens] * ranks, "layout": "compact", "sync": False}
        self.drawn = self.draw(program, **full, output="arena", num_sms=4)
        self.drawn = replace(self.drawn, dtype=BF16, weights=True, narrow=False)
        self.fresh = program.random() < 0.05

    def prepare(self) -> None:
        given = self.side.inputs(self.drawn, self.number)
        if self.side.graph is None or self.fresh:
            self.side.graph = None
            self.side.graph = captured(self.side, given, self.drawn.options)
        for name, tensor in self.side.graph.given.items():
            tensor.copy_(given[name])

    def call(self) -> None:
        self.side.graph.replay()

    def check(self) -> None:
        truth, graph = Truth(self.side, self.drawn), self.side.graph
        truth.check(graph.received, self.number)
        self.side.same("sums", graph.out, truth.sums(self.number))


@dataclass
class Captured:
    given: dict[str, Tensor]
    received: Received
    out: Tensor
    replay: Callable[[], None]


def captured(side: Side, given: dict[str, Tensor], options: dict[str, Any]) -> Captured:
    given = {name: tensor.clone() for name, tensor in given.items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side.stream, capture_error_mode="thread_local"):
        received = side.buffer.dispatch(**given, **options)
        out = side.buffer.combine(received.x, received.handle)
    return Captured(given, received, out, graph.replay)


class Refused(Round):
    """A call that fails, everywhere alike; the next one must work."""

    CODES: Final = {
        "a bad id": "E213",
        "a bad shape": "E201",
        "too many rows": "E230",
        "layouts differ": "E220",
        "a bad id, static": "E213",
        "no memory": "E231",
        "no memory, static": "E231",
    }

    def plan(self, program: random.Random) -> None:
        world, ranks = self.side.world, self.side.num_ranks
        self.kind = program.choice([k for k in self.CODES if ranks > 1 or k != "layouts differ"])
        self.culprit = program.randrange(ranks)
        tokens = [program.randint(2, world.tokens) for _ in range(ranks)]
        fixed: dict[str, Any] = {"layout": "compact", "sync": True, "output": "auto"}
        if self.kind == "no memory, static":
            fixed |= {"layout": program.choice(["compact", "grouped", "slab"]), "sync": False}
        self.drawn = self.draw(program, tokens=tokens, **fixed)
        self.drawn.ids[:, :2] = 0  # somebody comes to rank 0 in any case
        self.drawn.options.pop("row_index", None)
        if self.drawn.layout == "compact":
            self.drawn.options.pop("alignment", None)

    def prepare(self) -> None:
        self.given = self.side.inputs(self.drawn, self.number)
        self.options, ours = dict(self.drawn.options), self.side.rank == self.culprit
        if "bad id" in self.kind and ours:
            self.given["topk_idx"][1, 0] = self.side.world.experts + 3
        if self.kind == "a bad shape" and ours:
            self.given["x"] = self.given["x"][:, : self.side.world.hidden // 2]
        if self.kind == "too many rows":
            self.options["capacity"] = 1
        if self.kind == "layouts differ" and ours:
            self.options["layout"] = "grouped"
        if "static" in self.kind:
            self.options["sync"] = False
        self.held = self.all_memory() if "no memory" in self.kind and ours else []

    def all_memory(self) -> list[Tensor]:
        """Every free piece of the arena."""
        buffer = self.side.buffer
        if self.side.device.type == "cuda":  # nothing comes back later
            torch.cuda.synchronize(self.side.device)
        held = [buffer.empty((1,), torch.uint8)]  # a grant takes back what has died
        while free := buffer.stats()["arena"]["largest_free"]:
            held.append(buffer.empty((free,), torch.uint8))
        return held

    def call(self) -> None:
        self.code, self.status = None, None
        try:
            received = self.side.buffer.dispatch(**self.given, **self.options)
            self.status = received.status
            if received.x.dtype.itemsize > 1:
                self.side.buffer.combine(received.x, received.handle)
            self.side.buffer.check()
        except EPError as error:
            self.code = error.code
        self.held.clear()

    def check(self) -> None:
        want = self.CODES[self.kind]
        if self.code != want:
            raise Mismatch(f"{self.kind} of rank {self.culprit}: got {self.code}, want {want}")
        if "static" in self.kind:
            code = torch.full_like(self.status, int(want[1:]))
            self.side.same("status", self.status, code)


class Oracle(Round):
    """A call beside ep_comm.reference: all of it, handles and quantized rows, too."""

    def plan(self, program: random.Random) -> None:
        world = self.side.world
        tokens = [min(n, 40) for n in draw_tokens(program, world, self.side.num_ranks)]
        self.drawn = self.draw(program, tokens=tokens)
        kinds = [k for k, of in (("fp8", 128), ("fp8_ue8m0", 512)) if world.hidden % of == 0]
        if kinds and self.drawn.dtype.itemsize > 1 and program.random() < 0.7:
            self.drawn.options["quantize"] = program.choice(kinds)
        self.seed = program.getrandbits(40)

    def prepare(self) -> None:
        side, drawn = self.side, self.drawn
        others = [replace_rank(side, r) for r in range(side.num_ranks)]
        every = [other.inputs(drawn, self.number) for other in others]
        host = [{k: v.cpu() for k, v in given.items() if k != "scale_block"} for given in every]
        lists = {name: [h[name] for h in host] for name in host[0]}
        block = {"scale_block": 32} if drawn.dtype.itemsize == 1 else {}
        options = {k: v for k, v in drawn.options.items() if k not in ("num_sms", "output")}
        self.want = reference.dispatch(
            lists.pop("x"), lists.pop("topk_idx"), lists.pop("topk_weights", None), **lists,
            **options, **block, num_experts=side.world.experts, max_tokens=side.world.tokens,
        )  # fmt: skip
        g = torch.Generator().manual_seed(self.seed)
        self.y = [torch.randn(w.x.shape, generator=g).to(BF16) for w in self.want]
        self.given, self.answer = every[side.rank], self.y[side.rank].to(side.device)

    def call(self) -> None:
        self.got = self.side.buffer.dispatch(**self.given, **self.drawn.options)
        self.out = self.side.buffer.combine(self.answer, self.got.handle)

    def check(self) -> None:
        want, rank = self.want[self.side.rank], self.side.rank
        meta = want.handle.meta.clone()
        meta[1:3] = self.got.handle.meta[1:3].cpu()  # the buffer's generation, the number
        want = replace(want, handle=want.handle._replace(meta=meta))
        computed = "quantize" in self.drawn.options
        sums = reference.combine(self.y, [w.handle for w in self.want])
        try:
            same_received(on_host(self.got), want, computed=computed)
            same_values(self.out.cpu(), sums[rank], "sums")
        except AssertionError as error:
            raise Mismatch(f"beside the reference: {error}") from None
        del self.got, self.out


def replace_rank(side: Side, rank: int) -> Side:
    """To make the inputs of another rank."""
    other = object.__new__(Side)
    other.__dict__.update(side.__dict__, rank=rank)
    return other


def on_host(got: Received) -> Received:
    values = {f.name: getattr(got, f.name) for f in fields(Received)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.cpu()
    if got.scales is not None and got.layout == "slab":  # its strides are part of it
        there = torch.empty_strided(got.scales.shape, got.scales.stride(), dtype=got.scales.dtype)
        values["scales"] = there.copy_(got.scales)
    values["handle"] = Handle(*(t.cpu() for t in got.handle))
    return Received(**values)


KINDS: dict[type[Round], int] = {
    Pair: 8, Cached: 3, Begun: 5, Replay: 4, Copies: 2, Refused: 2, Oracle: 1
}  # fmt: skip
ONLY_GPU = (Replay, Copies)
