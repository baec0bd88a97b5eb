"""`ep-comm eplb`: what load balancing would do for a recorded routing."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ep_comm.eplb.report import Report


class Policy(StrEnum):
    auto = "auto"
    hierarchical = "hierarchical"
    global_ = "global"


def eplb(
    trace: Annotated[
        Path,
        typer.Argument(
            help="Ids [steps, layers, tokens, top-k] in a .safetensors or .npz file.",
            exists=True, dir_okay=False, readable=True,
        ),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the deployment.")] = 32,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes they stand on.")] = 4,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts and replicas. Default: one spare per rank.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="In the trace, where the file does not say.")
    ] = None,
    groups: Annotated[
        int, typer.Option(min=1, help="Of experts, each kept on one node where that divides.")
    ] = 1,
    policy: Annotated[Policy, typer.Option(help="auto: by the number of groups.")] = Policy.auto,
    coactivation: Annotated[
        bool, typer.Option(help="Cut traffic by what tokens choose together.")
    ] = True,
    expert_mib: Annotated[
        float, typer.Option(min=0, help="Weights of one expert in one layer.")
    ] = 42.0,
    picture: Annotated[Path, typer.Option(help="Heat maps: .png, .svg or .pdf.")] = Path(
        "ep_comm_eplb.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:  # fmt: skip
    """Plan redundant experts for a trace, and say what that brings.

    The plan is made from the first half of the steps and measured on the second. Before: experts in
    order, spare slots with the first of them again. 42 MiB are an expert of DeepSeek-V3 in FP8.
    """
    from rich.console import Console

    from ep_comm.eplb.report import evaluate
    from ep_comm.eplb.trace import Trace
    from ep_comm.errors import EPError

    _check_picture(picture)
    try:
        recorded = Trace.read(trace, experts)
        num_slots = slots or (-(-recorded.num_experts // ranks) + 1) * ranks
        report = evaluate(
            recorded,
            num_ranks=ranks,
            num_nodes=nodes,
            num_slots=num_slots,
            num_groups=groups,
            policy=policy.value,
            coactivation=coactivation,
            expert_bytes=round(expert_mib * 2**20),
        )
    except (EPError, OSError) as error:
        _fail(str(error))
    draw(report, picture)
    numbers = {**report.as_dict(), "picture": str(picture)}
    if as_json:
        print(json.dumps(numbers))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 100
    _tell(console, numbers, report)


def _check_picture(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        _fail("the picture needs matplotlib; install it with: pip install 'ep-comm[cli]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        _fail(f"cannot draw {path}: want a name ending in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        _fail(f"cannot write {path}: there is no such folder")


def _tell(console: Console, numbers: dict[str, Any], report: Report) -> None:
    from rich.table import Table

    n = numbers
    console.print(
        f"[bold]ep-comm eplb[/]  {n['layers']} layers x {n['experts']} experts, {n['slots']} slots "
        f"on {n['ranks']} ranks / {n['nodes']} nodes; planned from {n['steps_seen']} steps in "
        f"{n['plan_ms']:.0f} ms, measured on {n['steps_measured']}",
        highlight=False,
    )
    table = Table("", "before", "after", title="heaviest rank over the mean, and what crosses")
    before, after = n["before"], n["after"]
    for label, key, form in (
        ("imbalance, mean of layers", "imbalance", "{:.3f}"),
        ("imbalance, worst layer", "worst_imbalance", "{:.3f}"),
        ("rows of a token to other nodes", "cross_node", "{:.3f}"),
    ):
        table.add_row(label, form.format(before[key]), form.format(after[key]))
    console.print(table)
    console.print(_traffic(after["node_traffic"]))
    console.print(_replicas(report))
    console.print(
        f"{n['replicated']} experts have replicas, {n['most_replicas']} at most; to get there "
        f"{n['moved']} experts move, {n['moved_bytes'] / 1e9:.2f} GB",
        highlight=False,
    )
    console.print(f"[dim]heat maps: {n['picture']}[/]")


def _traffic(rows: list[list[float]]) -> Any:
    from rich.table import Table

    nodes = [f"to {n}" for n in range(len(rows))]
    table = Table("from node", *nodes, title="rows between nodes after, all layers, in thousands")
    for node, row in enumerate(rows):
        table.add_row(str(node), *(f"{value / 1e3:.1f}" for value in row))
    return table


def _replicas(report: Report) -> Any:
    """The experts with most replicas, of all layers."""
    from rich.table import Table

    counts = report.after.num_replicas
    order = counts.flatten().argsort(descending=True, stable=True)[:8].tolist()
    table = Table("layer", "expert", "load / mean", "replicas", "ranks", title="most replicated")
    load = report.load
    for place in order:
        layer, expert = divmod(place, counts.shape[1])
        slots = report.after.logical_to_physical[layer, expert]
        ranks = slots[slots >= 0] * report.after.num_ranks // report.after.num_slots
        relative = float(load[layer, expert] / load[layer].mean().clamp(min=1e-30))
        names = " ".join(str(r) for r in ranks.tolist())
        table.add_row(
            str(layer), str(expert), f"{relative:.1f}", str(int(counts[layer, expert])), names
        )
    return table


def draw(report: Report, path: Path) -> None:
    """Load of every rank in every layer, before and after, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps = [report.relative_load(p) for p in (report.before, report.after)]
    top = max(float(m.max()) for m in maps)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    for axis, values, name in zip(axes, maps, ("before", "after"), strict=True):
        image = axis.imshow(
            values.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=top, interpolation="nearest"
        )
        worst = float(values.amax(1).mean())
        axis.set_title(f"{name}: heaviest rank {worst:.2f} x the mean")
        axis.set_xlabel("rank")
        per_node = report.after.num_ranks // report.after.num_nodes
        for node in range(1, report.after.num_nodes):
            axis.axvline(node * per_node - 0.5, color="white", linewidth=0.6)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load / mean of the layer")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _fail(text: str) -> NoReturn:
    typer.echo(f"ep-comm eplb: {text}", err=True)
    raise typer.Exit(2)
