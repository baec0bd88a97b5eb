"""Records for people: a table and a picture; and for machines: JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    """One line per (case, operation)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def read_jsonl(path: Path) -> list[Record]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def tables(records: Sequence[Record]) -> Group:
    """A table per case, and below them how to read them."""
    cases = dict.fromkeys(r["case"] for r in records)
    parts = [_table(case, [r for r in records if r["case"] == case]) for case in cases]
    return Group(*parts, Text(caption(records)))


def _table(case: str, records: Sequence[Record]) -> Table:
    out = Table(title=case, title_justify="left", title_style="bold")
    out.add_column("op")
    rival = records[0]["baseline"] or "baseline"
    rates = _rates(records[0])
    for name in ("p50 µs", "p10–p90", "min", "GB/s", "copy µs", "of copy", "min of copy"):
        out.add_column(name, justify="right")
    for name in rates:
        out.add_column(name, justify="right")
    for name in (f"{rival} µs", f"vs {rival}", "peak/out"):
        out.add_column(name, justify="right")
    out.add_column("exact")
    for r in records:
        out.add_row(*_cells(r))
    return out


def _cells(r: Record) -> list[str]:
    t, rival = r["time_us"], r.get("baseline_time_us")
    return [
        _op(r),
        us(t["p50"]),
        f"{us(t['p10'])}–{us(t['p90'])}",
        us(t["min"]),
        f"{r['scaleup_gbps']:.3g}",
        us(r["copy_us"]),
        f"{100 * r['copy_ratio']:.0f} %",
        f"{100 * r['copy_ratio_of_min']:.0f} %",
        *_rates(r).values(),
        us(rival["p50"]) if rival else "–",
        f"{r['speedup']:.1f}×" if rival else "–",
        "–" if r["peak_ratio"] is None else f"{r['peak_ratio']:.2f}",
        "yes" if r["correct"] else "NO",
    ]


def _rates(record: Record) -> dict[str, str]:
    """Of calls across nodes, by column."""
    if "rail_gbps" not in record:
        return {}
    return {
        "rail GB/s": f"{record['rail_gbps']:.3g}",
        "NVLink GB/s": f"{record['nvlink_gbps']:.3g}",
    }


def _op(record: Record) -> str:
    """The operation, with its SMs on a GPU."""
    sms = record.get("sms")
    return str(record["op"]) if sms is None else f"{record['op']}, {sms} SMs"


def us(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def caption(records: Sequence[Record]) -> str:
    """Where and on what it ran; how to read the columns."""
    if not records:
        return ""
    r = records[0]
    git = r["git"]
    commit = (
        "no commit" if git is None else git["commit"][:10] + (" + changes" if git["dirty"] else "")
    )
    others = max(x["others_cpu_share"] for x in records)
    if "gpu" in r:
        return (
            f"{r['gpus']} x {r['gpu']}, torch {r['torch']}, {commit}.\n"
            "Times: events around the whole call, L2 flushed, ranks aligned by "
            f"{r['aligned_by']}, slowest rank, p50 of {r['time_us']['n']}.\n"
            "GB/s: bytes from other ranks at the busiest rank / p50. of copy: a copy of as many "
            "bytes to the next GPU by copy engine, all ranks at once / p50." + _rails(r)
        )
    return (
        f"{r['cpu']}, {r['cores']} cores, {r['simd']}, torch {r['torch']}, "
        f"backend {r['backend']}, malloc {r['malloc']}, {commit}; "
        f"others took up to {100 * others:.0f} % of the CPU time.\n"
        "Times: from the common start until the slowest rank has returned, p50 of "
        f"{r['time_us']['n']}. GB/s: bytes from other ranks at the busiest rank / p50.\n"
        "of copy: fastest plain copy of the same rows / p50; min of copy: / min. "
        "peak/out: peak memory of one call / bytes it returns."
    )


def _rails(record: Record) -> str:
    """How a cluster was cut, where rows went over rails."""
    if "rail_gbps" not in record:
        return ""
    return (
        f"\n{record['num_nodes']} nodes x {record['ranks_per_node']} ranks, {record['transport']}. "
        "rail, NVLink: rows that the busiest rank moves over each / p50."
    )


def comparison(before: Sequence[Record], after: Sequence[Record]) -> Group:
    """p50 of the same (case, operation) in two runs, and how each stood against its own copy."""
    out = Table(title="before and after, p50 in µs", title_justify="left")
    for name in ("case", "op"):
        out.add_column(name)
    for name in ("before", "after", "change", "of copy before", "of copy after"):
        out.add_column(name, justify="right")
    old = {(r["case"], r["op"]): r for r in before}
    for r in after:
        was = old.get((r["case"], r["op"]))
        if was is None:
            continue
        ratio = r["time_us"]["p50"] / was["time_us"]["p50"]
        out.add_row(
            r["case"],
            r["op"],
            us(was["time_us"]["p50"]),
            us(r["time_us"]["p50"]),
            f"{100 * (ratio - 1):+.1f} %",
            f"{100 * was['copy_ratio']:.0f} %",
            f"{100 * r['copy_ratio']:.0f} %",
        )
    return Group(out, Text(caption(after)))


def plot(records: Sequence[Record], path: Path) -> None:
    """Bars of time per operation; time over tokens when there are several token counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = sorted({r["tokens"] for r in records})
    sweep = len({r.get("sms") for r in records}) > 1
    panels = 2 if len(tokens) > 1 and not sweep else 1
    figure, axes = plt.subplots(1, panels, figsize=(6.5 * panels, 4.5), squeeze=False)
    if sweep:
        _over_sms(axes[0][0], [r for r in records if r["tokens"] == tokens[-1]])
    else:
        _bars(axes[0][0], [r for r in records if r["tokens"] == tokens[-1]])
    if panels == 2:
        _over_tokens(axes[0][1], records)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


_COLORS = {"ep_comm": "#2f6f9f", "baseline": "#c98b4b", "plain copy": "#9a9a9a"}


def _bars(axes: Any, records: Sequence[Record]) -> None:
    """One group of bars per record; whiskers reach from p10 to p90."""
    names = ["ep_comm", "plain copy"]
    if any(r.get("baseline_time_us") for r in records):
        names.insert(1, "baseline")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for i, r in enumerate(records):
            if (times := _time(r, name)) is None:
                continue
            middle, low, high = times
            at = i + (place - (len(names) - 1) / 2) * width
            label = _label(r, name) if i == 0 else None
            axes.bar(at, middle / 1e3, width, color=_COLORS[name], label=label)
            whisker = [[(middle - low) / 1e3], [(high - middle) / 1e3]]
            axes.errorbar(at, middle / 1e3, whisker, color="black", linewidth=0.8, capsize=2)
            axes.annotate(
                f"{middle / 1e3:.3g}", (at, high / 1e3), ha="center", va="bottom", fontsize=7
            )
    several = len({r["case"] for r in records}) > 1
    labels = [f"{r['op']}\n{r['case']}" if several else r["op"] for r in records]
    axes.set_xticks(range(len(records)), labels, fontsize=7 if several else 9)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("ms, slowest rank, p50 (p10–p90)")
    axes.set_title(records[0]["case"] if not several else "time per operation", fontsize=10)
    axes.legend(fontsize=8)


def _over_sms(axes: Any, records: Sequence[Record]) -> None:
    """A line per operation, and its plain copy and baseline, which use the SMs they like."""
    for number, op in enumerate(dict.fromkeys(r["op"] for r in records)):
        mine = sorted((r for r in records if r["op"] == op), key=lambda r: int(r["sms"]))
        times = [r["time_us"]["p50"] for r in mine]
        axes.plot([r["sms"] for r in mine], times, color=f"C{number}", marker=".", label=op)
        axes.axhline(mine[0]["copy_us"], color=f"C{number}", linestyle=":", linewidth=1)
        if rival := mine[0].get("baseline_time_us"):
            axes.axhline(rival["p50"], color=f"C{number}", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("SMs")
    axes.set_ylabel("µs, slowest rank, p50 (dotted: plain copy; dashed: baseline)")
    axes.set_title(records[0]["case"], fontsize=10)
    axes.legend(fontsize=8)


def _over_tokens(axes: Any, records: Sequence[Record]) -> None:
    styles = {"ep_comm": "-", "baseline": "--", "plain copy": ":"}
    for number, op in enumerate(dict.fromkeys(r["op"] for r in records)):
        mine = sorted((r for r in records if r["op"] == op), key=lambda r: int(r["tokens"]))
        for name, style in styles.items():
            points = [(r["tokens"], m[0] / 1e3) for r in mine if (m := _time(r, name))]
            if points:
                label = f"{op}, {_label(mine[0], name)}"
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{number}", marker=".", label=label
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per rank")
    axes.set_xticks(sorted({r["tokens"] for r in records}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_ylabel("ms, slowest rank, p50")
    axes.legend(fontsize=7, handlelength=4, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _label(record: Record, name: str) -> str:
    return f"baseline: {record['baseline']}" if name == "baseline" else name


def _time(record: Record, name: str) -> tuple[float, float, float] | None:
    """p50, p10, p90 in µs."""
    if name == "plain copy":
        return record["copy_us"], record["copy_us"], record["copy_us"]
    times = record["time_us"] if name == "ep_comm" else record.get("baseline_time_us")
    return (times["p50"], times["p10"], times["p90"]) if times else None
