"""A prediction for people: tables, and bandwidth against EP size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ep_comm.plan.deployment import Deployment
from ep_comm.plan.hardware import Hardware
from ep_comm.plan.model import Operation, Plan, predict


def tables(plan: Plan) -> Any:
    """A rich renderable."""
    from rich.console import Group

    return Group(_head(plan), _operations(plan), _memory(plan))


def _head(plan: Plan) -> Any:
    from rich.text import Text

    v, d = plan.visits, plan.deployment
    how = "exact" if v.drawn == 0 else f"{v.drawn} tokens drawn"
    return Text(
        f"{d.name}; {d.x_dtype} dispatch, bf16 combine, {d.layout}, {d.mode}\n"
        f"a token visits {v.ranks_per_token:.2f} ranks on {v.nodes_per_token:.2f} nodes, "
        f"{v.remote_nodes_per_token:.2f} of them not its own ({how}); "
        f"busiest rank {v.imbalance:.2f} x the mean"
    )


def _operations(plan: Plan) -> Any:
    from rich.table import Table

    columns = ("", "dispatch", "cached", "combine")
    table = Table(*columns, title="busiest rank; MB = 10⁶ bytes, GB/s over the whole call")
    ops = (plan.dispatch, plan.dispatch_cached, plan.combine)

    def row(label: str, *values: object) -> None:
        table.add_row(label, *map(str, values))

    row("time, µs", *(f"{o.time_us:.0f}" for o in ops))
    row("  overhead + latency, µs", *(f"{o.overhead_us:.0f} + {o.latency_us:.0f}" for o in ops))
    row("bound by", *(o.bound for o in ops))
    if any(o.is_small for o in ops):
        row("as a small batch", *("yes" if o.is_small else "no" for o in ops))
    row("SMs used / needed", *(f"{o.sms} / {o.sms_needed}" for o in ops))
    for label, name in (
        ("NVLink out, MB", "nvlink_out"),
        ("NVLink in, MB", "nvlink_in"),
        ("NIC out, MB", "nic_out"),
        ("NIC in, MB", "nic_in"),
    ):
        row(label, *(f"{o.link_bytes[name] / 1e6:.2f}" for o in ops))
    row("NVLink in, GB/s", *(f"{o.scaleup_gbps:.0f}" for o in ops))
    row("NIC in, GB/s", *(f"{o.scaleout_gbps:.1f}" for o in ops))
    if plan.memory.staging_bytes:
        row("tokens in a chunk", *(f"{o.chunk_tokens:.3g}" for o in ops))
    return table


def _memory(plan: Plan) -> Any:
    from rich.table import Table

    m = plan.memory
    table = Table("memory of a rank", "", title="two dispatches alive")
    rows = {
        "arena, as routed": m.arena_bytes,
        "arena, if every token came here": m.arena_worst_bytes,
        "control block": m.control_bytes,
        "rails: words and mailboxes": m.mailbox_bytes,
        f"rails: staging, {m.num_channels} channels x {m.ring_chunks} chunks": m.staging_bytes,
        "direct receive slots": m.direct_bytes,
    }
    for label, size in rows.items():
        if size:
            table.add_row(label, _size(size))
    return table


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.1f} KiB"
    return f"{num_bytes / 2**20:,.1f} MiB"


# ---- against EP size ----


def curve(
    deployment: Deployment, hardware: Hardware | None = None, *, num_sms: int | None = None,
    seed: int = 0, most_nodes: int = 128,
) -> list[Plan]:  # fmt: skip
    """The same calls on 1, 2, 4, ... nodes, as long as every rank has an expert; no replicas."""
    plans: list[Plan] = []
    nodes = 1
    while nodes <= most_nodes and nodes * deployment.ranks_per_node <= deployment.num_logical:
        at = replace(deployment, num_nodes=nodes, num_slots=None)
        plans.append(predict(at, hardware, num_sms=num_sms, seed=seed))
        nodes *= 2
    return plans


def draw(plans: Sequence[Plan], path: Path, mark: Plan | None = None) -> None:
    """Bandwidth and time over EP size, a line per operation; `mark` is a plan to point at."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, op in enumerate(("dispatch", "combine")):
        color = f"C{number}"
        _line(left, plans, op, "scaleout_gbps", color, "-", f"{op}, NIC")
        _line(left, plans, op, "scaleup_gbps", color, "--", f"{op}, NVLink")
        _line(right, plans, op, "time_us", color, "-", op)
        if mark is not None:
            chosen: Operation = getattr(mark, op)
            ranks = mark.deployment.num_ranks
            left.plot(ranks, chosen.scaleout_gbps, "*", color=color, markersize=11)
            right.plot(ranks, chosen.time_us, "*", color=color, markersize=11)
    left.set_ylabel("GB/s arriving at the busiest rank")
    right.set_ylabel("µs")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("EP size, ranks (star: the plan)")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    d = plans[0].deployment
    figure.suptitle(
        f"{d.num_tokens} tokens of {d.hidden}, top-{d.topk}, {d.x_dtype} dispatch, bf16 combine, "
        f"{d.ranks_per_node} ranks a node, {d.mode}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _line(
    axes: Any, plans: Sequence[Plan], op: str, what: str, color: str, style: str, label: str
) -> None:
    points = [(p.deployment.num_ranks, getattr(getattr(p, op), what)) for p in plans]
    shown = [(x, y) for x, y in points if y > 0]
    if shown:
        axes.plot(*zip(*shown, strict=True), style, color=color, marker=".", label=label)
