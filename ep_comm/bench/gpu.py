"""One case on one rank with a GPU: check on the host, then every operation at every SM count.

A call is timed by events around it on its stream, so every kernel and every copy of it counts.
Before it the GPU sleeps while the host queues what follows, its L2 cache is overwritten, and an
all-reduce makes the ranks start together; the slowest rank of each iteration counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.bench import check, machine, rails, timing
from ep_comm.bench.cases import OPS, Case, Inputs, choose_experts, make_inputs, traffic
from ep_comm.bench.measure import SCHEMA, Options, Ours, parts_of
from ep_comm.buffer import Buffer
from ep_comm.handle import Handle
from ep_comm.received import Received
from ep_comm.reference.routing import plan_sends

Call = Callable[[], Any]

_FLUSH_BYTES: Final = 256 << 20  # several times any L2
_SLEEP_CYCLES: Final = 3_000_000  # one to two milliseconds: all of a call is queued by then
_PROFILED: Final = 10  # calls behind kernel_us


def measure_case(
    case: Case, rank: int, options: Options, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Check and time one case. Collective over the default group; rank 0's records are whole.

    Raises:
        check.Mismatch: a result differs from the oracle's; nothing was timed.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise RuntimeError("no GPU is visible here")
    torch.cuda.set_device(rank % num_gpus)
    if options.baseline is not None and num_gpus < case.ranks:
        raise RuntimeError("--baseline nccl: every rank needs a GPU of its own")
    watch = _Watch(one_each=num_gpus >= case.ranks)
    host = make_inputs(case, rank)
    inputs = Inputs(*(None if t is None else t.cuda() for t in host))  # type: ignore[arg-type]
    with Buffer(
        num_experts=case.experts,
        num_topk=case.topk,
        hidden=case.hidden,
        max_tokens=case.tokens,
        backend=case.backend,
        ranks_per_node=case.ranks_per_node,
        device="cuda",
    ) as buffer:
        nodes: dict[str, Any] = {}
        if buffer.backend == "hybrid":
            nodes = rails.describe(buffer)
            case = replace(case, ranks_per_node=nodes["ranks_per_node"])
        ours = GpuOurs(case, rank, buffer, inputs)
        ours.check(options.ops)
        meter = machine.LoadMeter()
        plain = {op: watch.run(_peer_copy(case, op), options, advance=None) for op in options.ops}
        rivals = {}
        if options.baseline is not None:
            rivals = {
                op: watch.run(_all_to_all(case, rank, op, watch), options) for op in options.ops
            }
        records = []
        for op in options.ops:
            for sms in options.sms:
                ours.sms = sms
                call = ours.call(op)
                found = watch.run(call, options, advance)
                ours.look_again(op, found.result)
                records.append(
                    {
                        "op": op,
                        "sms": sms or ours.default_sms(op),
                        **_numbers(case, op, found, plain[op]),
                        **(ours.rail_numbers(op, found) if nodes else {}),
                        "kernels_us": _kernels_us(call),
                        **_baseline(options.baseline, rivals.get(op), found),
                    }
                )
        used = meter.own_s()
        load = meter.read(used * case.ranks)
        backend = {"backend": buffer.backend, "backend_reason": buffer.backend_reason}
    where = {**machine.facts(), "gpus": num_gpus, "gpu": torch.cuda.get_device_name()}
    common = {
        "schema": SCHEMA,
        "case": case.name,
        **asdict(case),
        **backend,
        **nodes,
        "device": "cuda",
        "ranks_share_gpus": num_gpus < case.ranks,
        "aligned_by": watch.aligned_by,
    }
    rest = {"correct": True, "checked": check.WHAT, "warmup": options.warmup, "rounds": 1,
            "malloc": options.malloc, "peak_ratio": None, **load, **where,
            "command": options.command}  # fmt: skip
    return [{**common, **record, **rest} for record in records]


class GpuOurs(Ours):
    """The operations on CUDA tensors."""

    def check(self, ops: Sequence[str]) -> dict[str, bytes]:  # type: ignore[override]
        """Compare each operation with the oracle, on the host; results to look at again."""
        got = {op: self.call(op)() for op in OPS if op in ops or op == "dispatch"}
        self._checked = {
            op: kept for op, r in got.items() if (kept := self.comparable(r)) is not None
        }
        failure = ""
        try:
            check.check_case(self.case, self.rank, {op: on_host(r) for op, r in got.items()})
        except check.Mismatch as error:
            failure = f"rank {self.rank}: {error}"
        failures = [""] * self.case.ranks
        dist.all_gather_object(failures, failure)
        if any(failures):
            raise check.Mismatch(f"{self.case.name}: {next(f for f in failures if f)}")
        return {}

    def look_again(self, op: str, result: Any) -> None:
        """The last timed result is still the one that was checked."""
        kept = self._checked.get(op)
        if kept is None:
            return
        last = self.comparable(result)
        assert last is not None
        if not torch.equal(check.as_bits(last), check.as_bits(kept)):
            raise check.Mismatch(f"{op}: a timed call returned something else than the checked one")

    def default_sms(self, op: str) -> int:
        both: dict[str, int] = self.buffer.stats()["num_sms"]
        if op == "pair":
            return max(both.values())
        return both["combine" if op.startswith("combine") else "dispatch"]

    def rail_numbers(self, op: str, found: Found) -> dict[str, Any]:
        """Bytes and rates over rails and over NVLink, told apart. Collective."""
        moved = {"rail_bytes": 0, "nvlink_bytes": 0}
        for part in _parts(op):
            kind, row_bytes = part.partition("_")[0], traffic(self.case, part).row_bytes
            call = self.call(part)
            bytes_of_part = rails.split(self.case, self.rank, self.buffer, call, kind, row_bytes)
            moved = {name: moved[name] + n for name, n in bytes_of_part.items()}
        return {**moved, **rails.rates(moved, timing.summary(found.device)["p50"])}


def on_host(result: Any) -> Any:
    """A Received or sums of a call, to compare."""
    if isinstance(result, Tensor):
        return result.cpu()
    assert isinstance(result, Received)
    values = {f.name: getattr(result, f.name) for f in fields(Received)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.cpu()
    values["handle"] = Handle(*(t.cpu() for t in result.handle))
    return Received(**values)


# ---- time ----


@dataclass
class Found:
    """Over all ranks, in nanoseconds, and this rank's last result."""

    device: list[int]  # the slowest rank of each iteration
    call: list[int]  # host, of calls that nothing delays
    result: Any


class _Watch:
    """Aligned, timed runs on every rank. Collective to make and to use.

    Args:
        one_each: every rank has a GPU of its own, as NCCL demands. Else nothing aligns the ranks
            but their hosts.
    """

    def __init__(self, one_each: bool) -> None:
        self.nccl: Any = dist.new_group(backend="nccl") if one_each else None
        self.aligned_by = "nccl all-reduce" if one_each else "host barrier"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._one = torch.zeros(1, device="cuda")

    def run(
        self, call: Call, options: Options, advance: Callable[[int], None] | None = None
    ) -> Found:
        for _ in range(options.warmup):
            self._once(call)
        device, result = [], None
        for _ in range(options.iterations):
            result = None  # its memory is free before the next call asks for some
            elapsed, result = self._once(call)
            device.append(elapsed)
            if advance is not None:
                advance(1)
        hosts = [self._host(call) for _ in range(options.iterations)]
        both = torch.tensor([device, hosts], dtype=torch.int64)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return Found(both[0].tolist(), both[1].tolist(), result)

    def _once(self, call: Call) -> tuple[int, Any]:
        events: Any = torch.cuda.Event
        start, end = events(enable_timing=True), events(enable_timing=True)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        self._flush.zero_()
        if self.nccl is not None:
            dist.all_reduce(self._one, group=self.nccl)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return int(start.elapsed_time(end) * 1e6), result

    def _host(self, call: Call) -> int:
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter_ns()
        result = call()
        took = time.perf_counter_ns() - start
        del result
        return took


def _kernels_us(call: Call) -> dict[str, float] | None:
    """Mean time of each kernel of a call on this rank, waiting for peers included; None where the
    profiler does not work."""
    try:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(_PROFILED):
                call()
            torch.cuda.synchronize()
        events = profile.key_averages()
    except RuntimeError:
        return None
    spent = {e.key: e.device_time_total / _PROFILED for e in events if e.device_time_total > 0}
    return {_short(name): round(us, 2) for name, us in spent.items()}


def _short(kernel: str) -> str:
    """`push_kernel<...>` of its full signature."""
    name = kernel.replace("(anonymous namespace)::", "").partition("(")[0]
    return name.removeprefix("void ").replace("ep::kernels::", "").replace("ep::", "")


# ---- what it is compared with ----


def _peer_copy(case: Case, op: str) -> Call:
    """As many bytes as arrive at the busiest rank, to the next GPU by copy engine, all at once."""
    num_bytes = sum(m.recv_bytes for m in parts_of(case, op))
    here = torch.cuda.current_device()
    there = (here + 1) % torch.cuda.device_count()
    source = torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=here)
    target = torch.empty_like(source, device=there)
    return lambda: target.copy_(source)


def _all_to_all(case: Case, rank: int, op: str, watch: _Watch) -> Call:
    """NCCL's all-to-all of the rows alone: they lie sorted by rank, all counts are known."""
    calls = [_rows_to_all(case, rank, part, watch) for part in _parts(op)]

    def exchange() -> None:
        for call in calls:
            call()

    return exchange


def _parts(op: str) -> tuple[str, ...]:
    return ("dispatch", "combine") if op == "pair" else (op,)


def _rows_to_all(case: Case, rank: int, op: str, watch: _Watch) -> Call:
    row_bytes = traffic(case, op).row_bytes
    pairs = torch.stack([_rows_sent(case, r) for r in range(case.ranks)])  # [source, owner]
    if op.startswith("combine"):
        pairs = pairs.t()
    send, recv = (pairs[rank] * row_bytes).tolist(), (pairs[:, rank] * row_bytes).tolist()
    rows = torch.empty(sum(send), dtype=torch.uint8, device="cuda")
    out = torch.empty(sum(recv), dtype=torch.uint8, device="cuda")
    return lambda: dist.all_to_all_single(out, rows, recv, send, group=watch.nccl)


def _rows_sent(case: Case, rank: int) -> Tensor:
    return plan_sends(choose_experts(case, rank), case.owners()).tokens_per_rank


# ---- numbers ----


def _numbers(case: Case, op: str, found: Found, plain: Found) -> dict[str, Any]:
    """Times and rates of one operation, as bench/README.md defines them."""
    moved = parts_of(case, op)
    time_us, copy_us = timing.summary(found.device), timing.summary(plain.device)["p50"]
    recv_bytes = sum(m.recv_bytes for m in moved)
    payload = sum(m.payload_bytes for m in moved)
    local_bytes = sum(max(m.rows) * m.payload_bytes for m in moved)
    us = time_us["p50"]
    return {
        "time_us": time_us,
        "call_us": timing.summary(found.call),
        "payload_bytes": payload,
        "scaleup_recv_bytes": recv_bytes,
        "scaleup_gbps": round(recv_bytes / us / 1e3, 2),
        "stored_gbps": round(local_bytes / us / 1e3, 2),
        "useful_gbps": round(case.tokens * case.topk * payload / us / 1e3, 2),
        "copy_us": copy_us,
        "copy_gbps": round(recv_bytes / copy_us / 1e3, 2),
        "copy_ratio": round(copy_us / us, 3),
        "copy_ratio_of_min": round(copy_us / time_us["min"], 3),
        "copy_method": "copy engine, to the next GPU",
    }


def _baseline(name: str | None, rival: Found | None, found: Found) -> dict[str, Any]:
    if name is None or rival is None:
        return {"baseline": None}
    theirs, mine = timing.summary(rival.device), timing.summary(found.device)
    speedup = round(theirs["p50"] / mine["p50"], 2)
    return {"baseline": name, "baseline_time_us": theirs, "speedup": speedup}
