"""`ep-comm plan`: what dispatch and combine would do on a cluster that is not there yet."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


class Preset(StrEnum):
    node = "node"
    prefill = "prefill"
    decode = "decode"
    two_gpus = "two-gpus"


class XDtype(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"


class Partials(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class Layout(StrEnum):
    compact = "compact"
    grouped = "grouped"
    slab = "slab"


class Mode(StrEnum):
    throughput = "throughput"
    direct = "direct"


class Rail(StrEnum):
    nic = "nic"
    nvlink = "nvlink"


def plan(
    preset: Annotated[
        Preset,
        typer.Option(help="Start from it; prefill and decode: DeepSeek-V3 on 4 x 8, 40 x 8 GPUs."),
    ] = Preset.prefill,
    nodes: Annotated[int | None, typer.Option(min=1)] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1)] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of each rank in a call.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1)] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed ones.")] = None,
    topk: Annotated[int | None, typer.Option(min=1)] = None,
    shared: Annotated[int | None, typer.Option(min=0, help="Experts all tokens choose.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=0, help="Experts and replicas; 0: no replicas.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of experts: nodes, or parts of nodes.")
    ] = None,
    top_groups: Annotated[
        int | None, typer.Option(min=0, help="Groups a token keeps to; 0: no limit.")
    ] = None,
    zipf: Annotated[float | None, typer.Option(min=0, help="Popularity 1 / place ** zipf.")] = None,
    dtype: Annotated[XDtype | None, typer.Option(help="Of dispatch.")] = None,
    partials: Annotated[
        Partials | None, typer.Option(help="Of a node's sums on their way back.")
    ] = None,
    layout: Annotated[Layout | None, typer.Option()] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="direct: to each rank by itself, for decode.")
    ] = None,
    sync: Annotated[
        bool | None, typer.Option(help="Shapes that the host waits for, or fixed ones.")
    ] = None,
    rail: Annotated[Rail | None, typer.Option(help="nvlink: nodes pretended on one host.")] = None,
    channels: Annotated[int | None, typer.Option(min=1)] = None,
    sms: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as needed; small batches: all.")
    ] = None,
    nic_gbps: Annotated[
        float | None, typer.Option(min=0, help="Of a rank's NICs, GB/s each way; 400 Gb/s: 50.")
    ] = None,
    nvlink_push_gbps: Annotated[float | None, typer.Option(min=0, help="GB/s each way.")] = None,
    nvlink_pull_gbps: Annotated[float | None, typer.Option(min=0, help="GB/s each way.")] = None,
    sm_push_gbps: Annotated[
        float | None, typer.Option(min=0, help="GB/s one SM stores into peers.")
    ] = None,
    sm_store_gbps: Annotated[
        float | None, typer.Option(min=0, help="GB/s one SM stores into its own memory.")
    ] = None,
    sm_load_gbps: Annotated[float | None, typer.Option(min=0, help="GB/s one SM loads.")] = None,
    flag_us: Annotated[
        float | None, typer.Option(min=0, help="A flag over NVLink, one way.")
    ] = None,
    nic_us: Annotated[
        float | None, typer.Option(min=0, help="A put with its signal, one way.")
    ] = None,
    put_us: Annotated[
        float | None, typer.Option(min=0, help="A warp's time to hand over a put.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Bandwidth against EP size: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Predict time, bytes per link, SMs and memory of dispatch and combine; needs no GPU.

    Bytes follow from the routing, times from measured rates: the slowest link's, plus what a call
    costs without bytes. The model, and how far it has been checked: docs/plan.md.
    """
    from ep_comm.errors import EPError
    from ep_comm.plan import PRESETS, Hardware, predict, tables

    changes: dict[str, Any] = {
        "num_nodes": nodes, "ranks_per_node": ranks_per_node, "num_tokens": tokens,
        "hidden": hidden, "num_experts": experts, "num_topk": topk, "num_shared": shared,
        "num_groups": groups, "zipf": zipf, "x_dtype": dtype, "partials": partials,
        "layout": layout, "mode": mode, "sync": sync, "rail": rail, "num_channels": channels,
    }  # fmt: skip
    rates: dict[str, Any] = {
        "nic_gbps": nic_gbps, "nvlink_push_gbps": nvlink_push_gbps,
        "nvlink_pull_gbps": nvlink_pull_gbps, "sm_push_gbps": sm_push_gbps,
        "sm_store_gbps": sm_store_gbps, "sm_load_gbps": sm_load_gbps, "flag_us": flag_us,
        "nic_us": nic_us, "put_us": put_us,
    }  # fmt: skip
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, StrEnum) else value
        for name, value in changes.items()
        if value is not None
    }
    for name, count in (("num_slots", slots), ("top_groups", top_groups)):
        if count is not None:
            given[name] = count or None
    if plot is not None:
        _check_picture(plot)
    try:
        deployment = replace(PRESETS[preset.value], **given)
        hardware = Hardware(**{name: rate for name, rate in rates.items() if rate is not None})
        predicted = predict(deployment, hardware, num_sms=sms, seed=seed)
        if plot is not None:
            _draw(predicted, plot, sms, seed)
    except EPError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(predicted.as_dict()))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    console.print(tables(predicted))


def _draw(predicted: Any, path: Path, sms: int | None, seed: int) -> None:
    from ep_comm.plan import curve, draw

    plans = curve(predicted.deployment, predicted.hardware, num_sms=sms, seed=seed)
    if not plans:
        _fail(f"nothing to draw: {predicted.deployment.ranks_per_node} ranks need as many experts")
    draw(plans, path, mark=predicted)


def _check_picture(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        _fail("the picture needs matplotlib; install it with: pip install 'ep-comm[cli]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        _fail(f"cannot draw {path}: want a name ending in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        _fail(f"cannot write {path}: there is no such folder")


def _fail(text: str) -> NoReturn:
    typer.echo(f"ep-comm plan: {text}", err=True)
    raise typer.Exit(2)
