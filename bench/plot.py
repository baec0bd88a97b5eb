#!/usr/bin/env python3
"""Figures of what GPUs of one node take, from records in bench/results; nothing is measured here.

    python bench/plot.py sms latency            writes bench/results/nvlink_{sms,latency}.{svg,png}

`sms`: time of a whole call over the SMs it may use, beside a plain peer copy of the same bytes;
records of bench/nvlink_gpus.py. `latency`: time over tokens of a rank, 1 to 1024, eager and in a
CUDA graph, beside the peer copy, which is the floor; records of bench/nvlink_latency.py.

A figure is of one commit and one GPU: those of the last record of its case. What it needs and does
not find there ends the program, with a list: no line is left out in silence.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

PREFILL = "ep2-t4096-h7168-top8of256-bf16"  # as DECODE, of 2 ranks
# Fewest counts of SMs that make a line.
SMS_OPS = {"dispatch": 4, "dispatch_cached": 4, "combine": 4}
COPY = "dispatch as a peer copy"

DECODE = re.compile(r"ep2-t(\d+)-h7168-top8of256-bf16(-fp8-slab)?-static")
LAYOUTS = ("compact BF16", "slab FP8")
TOKENS = (1, 16, 64, 128, 256, 512, 1024)  # at least
COPIES = ("dispatch as a peer copy", "combine as a peer copy")
DECODE_OPS = ("dispatch", "combine", "dispatch in a graph", "combine in a graph")


class Missing(Exception):
    """Records that a figure needs."""


def read(path: Path, ranks: int = 2) -> list[Record]:
    """Records of that many ranks, under the names that cases of two have."""
    if not path.exists():
        raise Missing(f"{path} is not there")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    ours = [r for r in lines if r["case"].startswith(f"ep{ranks}-")]
    return [{**r, "ranks": ranks, "case": f"ep2-{r['case'].partition('-')[2]}"} for r in ours]


def of_one_run(
    records: Sequence[Record], wanted: Callable[[Record], bool], what: str
) -> list[Record]:
    """Those wanted, of the commit and GPU of the last one; of several of a kind the last."""
    found = [r for r in records if wanted(r)]
    if not found:
        raise Missing(f"no record of {what}")
    run = (found[-1]["commit"], found[-1]["gpu"])
    mine = [r for r in found if (r["commit"], r["gpu"]) == run]
    wrong = [f"{r['op']} of {r['case']}" for r in mine if not r["correct"]]
    if wrong:
        raise Missing(f"wrong results: {', '.join(wrong)}")
    return list({(r["case"], r["op"], r["sms"]): r for r in mine}.values())


def refuse(missing: Sequence[str], records: Sequence[Record]) -> None:
    if missing:
        where = f"commit {records[0]['commit'] or '(none)'} on {records[0]['gpu']}"
        raise Missing(f"{where} lacks\n" + "\n".join(f"  {line}" for line in missing))


# ---- time over SMs ----

Line = list[tuple[int, float, float, float]]  # (x, p10, p50, p90), ascending


def line_of(records: Sequence[Record], x: Callable[[Record], int]) -> Line:
    return sorted((x(r), *(r["time_us"][p] for p in ("p10", "p50", "p90"))) for r in records)


def sms_lines(records: Sequence[Record]) -> tuple[dict[str, Line], float, list[Record]]:
    """A line for each operation, the time of the plain copy, the records."""
    mine = of_one_run(records, lambda r: r["case"] == PREFILL, PREFILL)
    lines = {
        op: line_of([r for r in mine if r["op"] == op and r["sms"] > 0], lambda r: r["sms"])
        for op in SMS_OPS
    }
    missing = [
        f"{op} of {PREFILL}: {len(lines[op])} counts of SMs, want {n}"
        for op, n in SMS_OPS.items()
        if len(lines[op]) < n
    ]
    copies = [r["time_us"]["p50"] for r in mine if r["op"] == COPY]
    refuse(missing + ([] if copies else [f"{COPY} of {PREFILL}"]), mine)
    return lines, copies[-1], mine


def plot_sms(axes: Any, records: Sequence[Record]) -> None:
    lines, copy_us, mine = sms_lines(records)
    for color, (op, line) in enumerate(lines.items()):
        draw(axes, line, op.replace("_", ", "), f"C{color}")
    axes.axhline(copy_us, color="black", linestyle=":", linewidth=1, label="plain peer copy")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("SMs")
    title(axes, f"whole calls, 4096 × 7168 BF16, top-8 of 256, {gpus_of(mine)}", mine)


# ---- time over tokens ----


def tokens_of(record: Record) -> int:
    return int(DECODE.sub(r"\1", record["case"]))


def is_slab(record: Record) -> bool:
    return "-slab-" in record["case"]


def latency_lines(records: Sequence[Record]) -> tuple[dict[str, Line], list[Record]]:
    """By figure label: the floors, and each operation of compact and slab."""
    what = "small batches (ep2-t*-h7168-top8of256-bf16[-fp8-slab]-static)"
    mine = of_one_run(records, lambda r: DECODE.fullmatch(r["case"]) is not None, what)
    lines, missing = {}, []
    for slab, name in enumerate(LAYOUTS):
        for op in (*COPIES, *DECODE_OPS):
            of_op = [r for r in mine if r["op"] == op and r["sms"] == 0 and is_slab(r) == slab]
            line = lines[f"{name}: {op}"] = line_of(of_op, tokens_of)
            lacks = [str(t) for t in TOKENS if t not in [x for x, *_ in line]]
            if lacks:
                missing.append(f"{op} of {name}, at the SMs it computes: {', '.join(lacks)} tokens")
    refuse(missing, mine)
    return lines, mine


def plot_latency(axes: Any, records: Sequence[Record], name: str) -> None:
    lines, mine = latency_lines(records)
    for color, op in enumerate(("dispatch", "combine")):
        draw(axes, lines[f"{name}: {op}"], op, f"C{color}")
        graph = lines[f"{name}: {op} in a graph"]
        draw(axes, graph, f"{op}, in a graph", f"C{color}", linestyle="--")
        floor = lines[f"{name}: {op} as a peer copy"]
        draw(axes, floor, f"{op}, plain peer copy", f"C{color}", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(TOKENS, [str(t) for t in TOKENS])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_yticks([2, 5, 10, 20, 50, 100, 200, 500])
    axes.set_xlabel("tokens of a rank")
    title(axes, f"{name}, fixed shape, 7168, top-8 of 256, {gpus_of(mine)}", mine)
    axes.legend(fontsize=8, loc="upper left")


# ---- both ----


def draw(axes: Any, line: Line, label: str, color: str, **style: Any) -> None:
    x, low, middle, high = zip(*line, strict=True)
    axes.plot(x, middle, marker=".", label=label, color=color, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def gpus_of(records: Sequence[Record]) -> str:
    return f"{records[-1].get('ranks', 2)} GPUs"


def title(axes: Any, text: str, records: Sequence[Record]) -> None:
    r = records[-1]
    axes.set_ylabel("µs, slower rank, p50 (band: p10 to p90)")
    axes.set_title(f"{text}\n{r['gpu']}, commit {r['commit']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def figure(name: str, records: Sequence[Record], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 if name == "latency" else 1
    made, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.5), squeeze=False)
    if name == "sms":
        plot_sms(axes[0][0], records)
    else:
        for panel, layout in enumerate(LAYOUTS):
            plot_latency(axes[0][panel], records, layout)
    made.tight_layout()
    paths = [folder / f"nvlink_{name}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        made.savefig(path, dpi=150)
    plt.close(made)
    return paths


FILES = {"sms": "nvlink_gpus.jsonl", "latency": "nvlink_latency.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("figures", nargs="+", choices=list(FILES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ranks", type=int, default=2, help="of the records, one GPU each")
    o = parser.parse_args()
    for name in o.figures:
        try:
            paths = figure(name, read(o.results / FILES[name], o.ranks), o.out)
        except Missing as error:
            sys.exit(f"{name}, {o.results / FILES[name]}: {error}")
        print(*paths, sep="\n")


if __name__ == "__main__":
    main()
