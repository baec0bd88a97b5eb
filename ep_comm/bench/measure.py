"""One case on one rank: check, memory, then rounds of copy, ours and baseline side by side.

Rounds interleave the contestants, so that load on the machine that comes and goes meets all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.bench import check, copies, machine, memory, timing
from ep_comm.bench.cases import OPS, Case, Inputs, Traffic, make_inputs, traffic
from ep_comm.bench.gloo import GlooBaseline
from ep_comm.buffer import Buffer
from ep_comm.received import Received

ROUNDS: Final = 5
DEVICE: Final = "cpu"
SCHEMA: Final = 1  # of a record; bench/README.md lists the fields

Call = Callable[[], Any]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How to measure; the same for every case of a run."""

    ops: tuple[str, ...] = ("dispatch", "combine")
    iterations: int = 30
    warmup: int = 3
    baseline: str | None = None  # "gloo"; on GPUs "nccl"
    sms: tuple[int | None, ...] = (None,)  # GPUs: SM counts to sweep; None = the buffer's choice
    malloc: str = "keep"  # "default": freed memory goes back to the system
    bind: bool = True  # ranks we start on this host keep to a core each
    command: str = ""


@dataclass
class Samples:
    """This rank's samples, by operation or copy."""

    ours: dict[str, list[timing.Sample]] = field(default_factory=dict)
    baseline: dict[str, list[timing.Sample]] = field(default_factory=dict)
    copies: dict[tuple[int, str], list[timing.Sample]] = field(default_factory=dict)


def steps(options: Options) -> int:
    """Steps of progress one case makes."""
    contestants = 1 if options.baseline in (None, "nccl") else 2
    return contestants * len(options.ops) * len(options.sms) * options.iterations


def measure_case(case: Case, rank: int, options: Options, advance: Advance) -> list[dict[str, Any]]:
    """Check and time one case. Collective over the default group; rank 0's records are whole.

    Raises:
        check.Mismatch: a result differs from the oracle's; nothing was timed.
    """
    inputs, watch = make_inputs(case, rank), timing.Stopwatch(DEVICE)
    with Buffer(
        num_experts=case.experts,
        num_topk=case.topk,
        hidden=case.hidden,
        max_tokens=case.tokens,
        backend=case.backend,
    ) as buffer:
        ours = Ours(case, rank, buffer, inputs)
        digests = ours.check(options.ops)
        peaks = {op: ours.peak(op) for op in options.ops}
        calls = {op: ours.call(op) for op in options.ops}
        rivals = _rivals(case, rank, ours, options) if options.baseline else {}
        meter = machine.LoadMeter()
        times = _run_rounds(case, rank, watch, calls, rivals, digests, options, advance)
        load = meter.read(_sum(meter.own_s()))
        facts = {
            "schema": SCHEMA,
            "case": case.name,
            **asdict(case),
            "backend": buffer.backend,
            "backend_reason": buffer.backend_reason,
            "device": DEVICE,
        }
        where = machine.facts() if rank == 0 else {}
    return [
        {
            **facts,
            "op": op,
            **_numbers(case, op, times, watch),
            "correct": True,
            "checked": check.WHAT,
            **_baseline(op, times, options, watch),
            **_peak_numbers(peaks[op]),
            "warmup": options.warmup,
            "rounds": ROUNDS,
            "malloc": options.malloc,
            "bound": options.bind,
            **load,
            **where,
            "command": options.command,
        }
        for op in options.ops
    ]


class Ours:
    """The operations of ep_comm on one rank, ready to be called again and again."""

    def __init__(self, case: Case, rank: int, buffer: Buffer, inputs: Inputs) -> None:
        self.case, self.rank, self.buffer, self.inputs = case, rank, buffer, inputs
        self.sms: int | None = None
        received = self.dispatch()
        self.handle = received.handle
        answer = check.expert_output(received.x, rank, case)
        self.in_arena = buffer.empty(answer.shape, answer.dtype).copy_(answer)
        self.ordinary = answer

    def dispatch(self) -> Received:
        i, c = self.inputs, self.case
        received: Received = self.buffer.dispatch(
            i.x, i.topk_idx, i.topk_weights, scales=i.scales, quantize=c.quantize,
            layout=c.layout, alignment=c.alignment, capacity=c.capacity, sync=not c.static,
            num_sms=self.sms, transfer=c.transfer,
        )  # fmt: skip
        return received

    def dispatch_cached(self) -> Received:
        i, c = self.inputs, self.case
        received: Received = self.buffer.dispatch(
            i.x, handle=self.handle, scales=i.scales, quantize=c.quantize, num_sms=self.sms,
            transfer=c.transfer,
        )  # fmt: skip
        return received

    def combine(self) -> Tensor:
        out: Tensor = self.buffer.combine(self.in_arena, self.handle, num_sms=self.sms)
        return out

    def combine_tensor(self) -> Tensor:
        out: Tensor = self.buffer.combine(self.ordinary, self.handle, num_sms=self.sms)
        return out

    def pair(self) -> Tensor:
        """Dispatch, experts that do nothing (or are done already, where dtypes differ), combine."""
        received = self.dispatch()
        same = received.x.dtype == self.case.result_dtype
        y = received.x if same else self.in_arena
        out: Tensor = self.buffer.combine(y, received.handle, num_sms=self.sms)
        return out

    def call(self, op: str) -> Call:
        assert op in OPS
        call: Call = getattr(self, op)
        return call

    def check(self, ops: Iterable[str]) -> dict[str, bytes]:
        """Compare each operation with the oracle; digests of the results that have one."""
        got = {op: self.call(op)() for op in OPS if op in ops or op == "dispatch"}
        failure = ""
        try:
            check.check_case(self.case, self.rank, got)
        except check.Mismatch as error:
            failure = f"rank {self.rank}: {error}"
        failures = [""] * self.case.ranks
        dist.all_gather_object(failures, failure)
        if any(failures):
            raise check.Mismatch(f"{self.case.name}: {next(f for f in failures if f)}")
        return {
            op: check.digest(x) for op, r in got.items() if (x := self.comparable(r)) is not None
        }

    def comparable(self, result: Received | Tensor) -> Tensor | None:
        """The part of a result that every call must repeat; None where rows are unspecified."""
        if isinstance(result, Tensor):
            return result
        exact = self.case.layout != "slab" and not self.case.static
        return result.x if exact else None

    def peak(self, op: str) -> tuple[int, int]:
        """Peak bytes of one call, and bytes of what it returns."""
        call = self.call(op)
        call()
        memory.trim(self.buffer)
        dist.barrier()
        peak, result = memory.measure_peak(self.buffer, call)
        given = [*self.inputs, *(self.handle if op == "dispatch_cached" else ())]
        output = memory.storage_bytes(_tensors(result), given)
        if op == "pair":  # what it dispatched is gone again
            output += memory.storage_bytes(_tensors(self.dispatch()), given)
        return peak, output


def _tensors(result: Received | Tensor) -> list[Any]:
    if isinstance(result, Tensor):
        return [result]
    return [*vars(result).values(), *result.handle]


def _rivals(case: Case, rank: int, ours: Ours, options: Options) -> dict[str, Call]:
    """The baseline's calls by operation, after a look that it does the same work."""
    base, inputs = GlooBaseline(case, rank), ours.inputs
    got, want = base.dispatch(inputs), ours.dispatch()
    length = got.x.shape[0]  # a static result of ours is longer
    rows = check.specified_rows(want, want.x.shape)[:length]
    if not torch.equal(check.as_bits(got.x)[rows], check.as_bits(want.x[:length])[rows]):
        raise check.Mismatch("the baseline received other rows than we did")
    route, answer = got.route, ours.ordinary[:length]
    mine, theirs = ours.combine().to(torch.float32), base.combine(answer, route).to(torch.float32)
    if not torch.allclose(mine, theirs, rtol=2e-2, atol=2e-2 * float(mine.abs().max())):
        raise check.Mismatch("the baseline combined to other sums than we did")
    identity = answer.dtype == got.x.dtype

    def pair() -> Tensor:
        arrived = base.dispatch(inputs)
        return base.combine(arrived.x if identity else answer, arrived.route)

    calls: dict[str, Call] = {
        "dispatch": lambda: base.dispatch(inputs),
        "dispatch_cached": lambda: base.dispatch_cached(inputs, route),
        "combine": lambda: base.combine(answer, route),
        "combine_tensor": lambda: base.combine(answer, route),
        "pair": pair,
    }
    return {op: calls[op] for op in options.ops}


def _run_rounds(
    case: Case,
    rank: int,
    watch: timing.Stopwatch,
    ours: dict[str, Call],
    rivals: dict[str, Call],
    digests: dict[str, bytes],
    options: Options,
    advance: Advance,
) -> Samples:
    times = Samples()
    moves = [moved for op in ours for moved in parts_of(case, op)]
    rows = {moved.row_bytes: moved.rows[rank] for moved in moves}
    plain = {
        (row_bytes, method): call
        for row_bytes, num_rows in rows.items()
        for method, call in copies.make_copies(num_rows, row_bytes).items()
    }
    for number in range(ROUNDS):
        iterations = options.iterations // ROUNDS + (number < options.iterations % ROUNDS)
        for key, copy in plain.items():
            copy()
            found = watch.run(copy, copies.PER_ROUND)[0]
            times.copies.setdefault(key, []).extend(found)
        for kept, calls in ((times.ours, ours), (times.baseline, rivals)):
            for op, call in calls.items():
                watch.run(call, options.warmup if number == 0 else 1)
                samples, result = watch.run(call, iterations, advance)
                kept.setdefault(op, []).extend(samples)
                if kept is times.ours and op in digests and iterations > 0:
                    _look_again(op, result, digests[op])
                del result
    return times


def _look_again(op: str, result: Received | Tensor, digest: bytes) -> None:
    """The last timed result is still the one that was checked."""
    x = result if isinstance(result, Tensor) else result.x
    if check.digest(x) != digest:
        raise check.Mismatch(f"{op}: a timed call returned something else than the checked one")


# ---- numbers ----


def _numbers(case: Case, op: str, times: Samples, watch: timing.Stopwatch) -> dict[str, Any]:
    """Times and rates of one operation, as bench/README.md defines them."""
    moved = parts_of(case, op)
    found = watch.times(times.ours[op])
    time_us = timing.summary(found.done)
    seconds = time_us["p50"] / 1e6
    recv_bytes = sum(m.recv_bytes for m in moved)
    payload = sum(m.payload_bytes for m in moved)
    copy_us: dict[str, float] = {}
    for method in copies.METHODS:
        best = [min(watch.times(times.copies[m.row_bytes, method]).done) for m in moved]
        copy_us[method] = round(sum(best) / 1e3, 2)
    method, fastest_us = copies.fastest(copy_us)
    return {
        "time_us": time_us,
        "call_us": timing.summary(found.call),
        "start_skew_us": timing.summary(found.skew)["p50"],
        "payload_bytes": payload,
        "scaleup_recv_bytes": recv_bytes,
        "scaleup_gbps": round(recv_bytes / seconds / 1e9, 3),
        "useful_gbps": round(case.tokens * case.topk * payload / seconds / 1e9, 3),
        "copy_gbps": round(recv_bytes / fastest_us / 1e3, 3),
        "copy_ratio": round(fastest_us / time_us["p50"], 3),
        "copy_ratio_of_min": round(fastest_us / time_us["min"], 3),
        "copy_us": fastest_us,
        "copy_method": method,
        "copies_us": copy_us,
        "copy_rows": max(moved[0].rows),
        "copy_row_bytes": [m.row_bytes for m in moved],
    }


def parts_of(case: Case, op: str) -> list[Traffic]:
    """What an operation moves: one thing, or two in a pair."""
    return [traffic(case, part) for part in (("dispatch", "combine") if op == "pair" else (op,))]


def _baseline(op: str, times: Samples, options: Options, watch: timing.Stopwatch) -> dict[str, Any]:
    if options.baseline is None:
        return {"baseline": None}
    rival = timing.summary(watch.times(times.baseline[op]).done)
    mine = timing.summary(watch.times(times.ours[op]).done)
    return {
        "baseline": options.baseline,
        "baseline_time_us": rival,
        "speedup": round(rival["p50"] / mine["p50"], 2),
    }


def _peak_numbers(peak_and_output: tuple[int, int]) -> dict[str, Any]:
    """Of the rank where the ratio is worst."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, peak_and_output)
    peak, output = max(everyone, key=lambda both: both[0] / max(both[1], 1))
    ratio = round(peak / output, 3) if output else None
    return {"peak_bytes": peak, "output_bytes": output, "peak_ratio": ratio}


def _sum(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
