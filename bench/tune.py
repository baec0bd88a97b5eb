"""How many SMs, warps and stages: measured, and the table of csrc/kernels/tuned.h that follows.

    torchrun --nproc-per-node 2 bench/tune.py COMMIT [--json bench/results/tune.jsonl]
    python bench/tune.py --write [--json bench/results/tune.jsonl]

The first measures whole calls as bench/nvlink_gpus.py does, one GPU a rank, every count of a grid.
The second needs no GPU: it writes the table and says what the records say.

*Warps* of a block move rows of a dispatch, one row in flight each; *stages* are the places of a
ring that a combine pulls into. As many as fit into shared memory are used, unless fewer are faster
by more than 2 % at the SMs the library computes. `sms` 0 and `count` 0 are its own choice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc/kernels/tuned.h"
RESULTS = ROOT / "bench/results/tune.jsonl"
COMMAND = "torchrun --nproc-per-node {ranks} bench/tune.py"

WORTH = 0.98  # of the time with all that fit; what is less may be noise
ROUNDS, WARMUP = 10, 2

# Names of arrays in the table, and which records decide them.
ARRAYS = {
    "kMovers": ("dispatch", "of dispatch"),
    "kQuantizers": ("dispatch quantizing", "of dispatch that quantizes"),
    "kPullStages": ("combine", "of combine"),
}
Record = dict[str, Any]


# ---- measuring: torchrun, GPUs ----


def measure(commit: str) -> list[Record]:
    """Collective. Every point of the grid; on rank 0, elsewhere nothing."""
    import torch
    import torch.distributed as dist
    from nvlink_gpus import STANDARD

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    standard = replace(STANDARD, ranks=dist.get_world_size())
    facts = {
        "ranks": standard.ranks,
        "gpu": torch.cuda.get_device_name(),
        "commit": commit,
        "command": COMMAND.format(ranks=standard.ranks),
    }
    found = [
        {**record, **facts}
        for case in (standard, replace(standard, dtype="fp8"))
        for record in many_tokens(case)
    ]
    found += [{**record, **facts} for record in few_tokens(replace(standard, tokens=128))]
    dist.destroy_process_group()
    return found if int(os.environ["RANK"]) == 0 else []


def many_tokens(case: Any) -> Iterator[Record]:
    from nvlink_gpus import Bench

    bench = Bench(case)
    recv = bench.check()
    sms = (0, 8, 12, 14, 16, 20, 24)
    warps = (0, 7, 9, 11, 13) if case.dtype == "bf16" else (0, 9, 12, 15, 17)
    yield from sweep(bench, "dispatch", sms, warps, lambda n: bench.dispatch(num_sms=n))
    if case.dtype == "bf16":
        quantize = lambda n: bench.dispatch(num_sms=n, quantize="fp8")  # noqa: E731
        yield from sweep(bench, "dispatch quantizing", sms, warps, quantize)
        y = bench.buffer.empty(recv.x.shape, recv.x.dtype).copy_(recv.x)
        combine = lambda n: bench.buffer.combine(y, recv.handle, num_sms=n)  # noqa: E731
        yield from sweep(bench, "combine", sms, (0, 2, 3, 4, 6), combine)
    bench.buffer.close()


def few_tokens(case: Any) -> Iterator[Record]:
    """Bound by latency: what wide kernels cost when there is little to move."""
    from nvlink_gpus import Bench

    bench = Bench(replace(case, static=True))
    recv = bench.check()
    static = bench.dispatch(sync=False)
    y = bench.buffer.empty(static.x.shape, recv.x.dtype)
    y[: len(recv.x)].copy_(recv.x)
    dispatch = lambda n: bench.dispatch(sync=False, num_sms=n)  # noqa: E731
    combine = lambda n: bench.buffer.combine(y, static.handle, num_sms=n)  # noqa: E731
    yield from sweep(bench, "dispatch", (0, 16, 64), (0, 3, 5), dispatch)
    yield from sweep(bench, "combine", (0, 16, 32, 64), (0, 1, 2, 4), combine)
    bench.buffer.close()


def sweep(
    bench: Any, op: str, sms: Sequence[int], counts: Sequence[int], call: Any
) -> Iterator[Record]:
    """Warps of a dispatch, stages of a combine."""
    backend = bench.buffer._backend
    what = "num_stages" if op == "combine" else "num_warps"
    for count in counts:
        setattr(backend, what, count)
        for n in sms:
            gpu, _ = bench.times(lambda n=n: call(n or None), ROUNDS, WARMUP)
            yield {
                "case": bench.case.name,
                "op": op,
                "stage_bytes": stage_bytes(bench.case, op),
                "sms": n,
                "count": count,
                "time_us": {"p50": round(statistics.median(gpu), 1), "min": round(min(gpu), 1)},
                "n": len(gpu),
            }
    setattr(backend, what, 0)


def stage_bytes(case: Any, op: str) -> int:
    """What a warp, or a place of a ring, holds of these rows, which are whole in one."""
    row = case.hidden * (case.result_dtype if op == "combine" else case.torch_dtype).itemsize
    scales = 4 * (case.hidden // 128) if op == "dispatch quantizing" else 0
    return row if op == "combine" else -(-(row + scales) // 128) * 128


# ---- what follows: no GPU ----


def choose(records: Sequence[Record]) -> int:
    """The count that is faster than all that fit, at the library's own SMs; 0 = none."""
    times = {r["count"]: r["time_us"]["p50"] for r in records if r["sms"] == 0}
    best = min(times, key=times.__getitem__)
    return best if times[best] < WORTH * times[0] else 0


def tables(records: Sequence[Record]) -> str:
    """The lines of csrc/kernels/tuned.h that come from measurements."""
    if not records:
        head, command = "not measured yet: as many as fit", COMMAND.format(ranks="N")
        rows = {name: [(0, 0)] for name in ARRAYS}
    else:
        r = records[0]
        head, command = f"{r['ranks']} x {r['gpu']}, commit {r['commit']}", r["command"]
        rows = {name: entries(records, op) for name, (op, _) in ARRAYS.items()}
    bodies = {name: ", ".join(f"{{{s}, {n}}}" for s, n in pairs) for name, pairs in rows.items()}
    arrays = [f"inline constexpr Tuned {name}[] = {{{body}}};" for name, body in bodies.items()]
    width = max(map(len, arrays))  # as clang-format has it
    texts = (of_what for _, of_what in ARRAYS.values())
    aligned = [f"{a:{width}}  // {text}" for a, text in zip(arrays, texts, strict=True)]
    return "\n".join([f"// {command}", f"// {head}", *aligned])


def entries(records: Sequence[Record], op: str) -> list[tuple[int, int]]:
    """Of batches that are bound by what they move."""
    most = max(tokens_of(r) for r in records)
    ours = [r for r in records if r["op"] == op and tokens_of(r) == most]
    stages = sorted({r["stage_bytes"] for r in ours})
    return [(0, 0), *((s, choose([r for r in ours if r["stage_bytes"] == s])) for s in stages)]


def tokens_of(record: Record) -> int:
    match = re.search(r"-t(\d+)-", record["case"])
    assert match is not None
    return int(match[1])


_MEASURED = re.compile(r"// torchrun .*?(?=\n\n// The entry)", re.DOTALL)


def with_tables(source: str, records: Sequence[Record]) -> str:
    assert _MEASURED.search(source), f"{TABLE} has lost its tables"
    return _MEASURED.sub(lambda _: tables(records), source)


def read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def summary(records: Sequence[Record]) -> Iterator[str]:
    """For each case and operation: the library's choice, and the best of the grid beside it."""
    for case, op in dict.fromkeys((r["case"], r["op"]) for r in records):
        ours = [r for r in records if (r["case"], r["op"]) == (case, op)]
        own = next(r for r in ours if r["sms"] == r["count"] == 0)
        best = min(ours, key=lambda r: r["time_us"]["p50"])
        now, least = own["time_us"]["p50"], best["time_us"]["p50"]
        what = "stages" if op == "combine" else "warps"
        yield (
            f"{case} {op}: {now} us; least {least} us ({100 * (least / now - 1):+.1f} %) with "
            f"{best['sms'] or 'its own'} SMs, {best['count'] or 'all'} {what}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", nargs="?", default="", help="under torchrun: what is measured")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="the table, from the records")
    options = parser.parse_args()
    if not options.write:
        if "RANK" not in os.environ:
            parser.error("measuring needs torchrun; --write needs none")
        found = measure(options.commit)
        if not found:
            return
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(record) + "\n" for record in found))
    records = read(options.json)
    if options.write:
        TABLE.write_text(with_tables(TABLE.read_text(), records))
    print("\n".join(summary(records)), file=sys.stderr)
    print(tables(records))


if __name__ == "__main__":
    main()
