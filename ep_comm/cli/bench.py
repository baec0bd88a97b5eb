"""`ep-comm bench`: dispatch and combine, checked, then timed beside a plain copy and a baseline."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from ep_comm.bench.cases import Case


class Backend(StrEnum):
    auto = "auto"
    cpu = "cpu"
    nvlink = "nvlink"
    hybrid = "hybrid"
    collective = "collective"


class DType(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp8 = "fp8"


class Layout(StrEnum):
    compact = "compact"
    grouped = "grouped"
    slab = "slab"


class Quantize(StrEnum):
    none = "none"
    fp8 = "fp8"
    fp8_ue8m0 = "fp8_ue8m0"


class Routing(StrEnum):
    uniform = "uniform"
    zipf = "zipf"
    onehot = "onehot"


class Transfer(StrEnum):
    sm = "sm"
    copy_engine = "copy_engine"


class Malloc(StrEnum):
    keep = "keep"
    default = "default"


class Baseline(StrEnum):
    none = "none"
    gloo = "gloo"
    nccl = "nccl"


def bench(
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start; under torchrun, its. Default 4.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens of each rank; several: 64,256,1024.")
    ] = "1024",
    hidden: Annotated[int, typer.Option(min=1, help="Elements of a row.")] = 2048,
    topk: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of all ranks.")] = 64,
    dtype: Annotated[DType, typer.Option(help="Of x; fp8 brings float32 scales.")] = DType.bf16,
    layout: Annotated[Layout, typer.Option(help="Of what dispatch returns.")] = Layout.compact,
    quantize: Annotated[Quantize, typer.Option(help="On the way out.")] = Quantize.none,
    alignment: Annotated[int, typer.Option(min=1, help="Of groups; grouped layout.")] = 1,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Rows; slab: of each expert. Default: enough.")
    ] = None,
    static: Annotated[bool, typer.Option(help="Static shapes, sync=False.")] = False,
    routing: Annotated[
        Routing, typer.Option(help="zipf: popular experts; onehot: all to experts 0..K-1.")
    ] = Routing.uniform,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and routing.")] = 0,
    ops: Annotated[
        str, typer.Option(help="Of dispatch,dispatch_cached,combine,combine_tensor,pair.")
    ] = "dispatch,combine",
    iterations: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before them.")] = 3,
    backend: Annotated[
        Backend, typer.Option(help="Of the Buffer; nvlink and hybrid: on GPUs.")
    ] = Backend.auto,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="hybrid: ranks of a node. Default: those of a host.")
    ] = None,
    transfer: Annotated[Transfer, typer.Option(help="GPUs: who moves the rows.")] = Transfer.sm,
    sms: Annotated[
        str, typer.Option(help="GPUs: SMs to measure with; several: 8,12,16. Default: computed.")
    ] = "",
    baseline: Annotated[Baseline, typer.Option(help="Measured in the same run.")] = Baseline.none,
    json: Annotated[Path | None, typer.Option(help="Write one JSON line per result.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture, .png, .svg or .pdf.")] = None,
    malloc: Annotated[
        Malloc, typer.Option(help="keep: freed memory stays with the process, without page faults.")
    ] = Malloc.keep,
    bind: Annotated[
        bool, typer.Option(help="Each rank keeps to one core; not under torchrun, not on GPUs.")
    ] = True,
    limit_s: Annotated[float, typer.Option(help="End ranks that run longer.")] = 1800.0,
) -> None:
    """Time dispatch and combine; first check every result against the oracle, bit by bit.

    The check cannot be switched off. What each number means: bench/README.md.
    """
    from ep_comm.bench import launch
    from ep_comm.bench.cases import OPS, Case
    from ep_comm.bench.measure import Options

    world = launch.torchrun_world()
    if world is not None and ranks not in (None, world[1]):
        raise typer.BadParameter(f"torchrun started {world[1]} ranks, not {ranks}")
    num_ranks = world[1] if world is not None else ranks or 4
    chosen = [name.strip() for name in ops.split(",")]
    if unknown := [name for name in chosen if name not in OPS]:
        raise typer.BadParameter(f"no such operation: {unknown[0]}; there are {', '.join(OPS)}")
    if topk > experts:
        raise typer.BadParameter(f"{topk} different experts per token of {experts}")
    cases = [
        Case(
            num_ranks, count, hidden, topk, experts, dtype.value, layout.value,
            None if quantize is Quantize.none else quantize.value, alignment, capacity, static,
            routing.value, seed, backend.value, transfer.value, ranks_per_node,
        )
        for count in _numbers(tokens)
    ]  # fmt: skip
    on_gpus = backend in (Backend.nvlink, Backend.hybrid)
    if (baseline is Baseline.gloo and on_gpus) or (baseline is Baseline.nccl and not on_gpus):
        raise typer.BadParameter(f"no baseline {baseline.value} with backend {backend.value}")
    if transfer is not Transfer.sm and backend is not Backend.nvlink:
        raise typer.BadParameter("--transfer needs --backend nvlink")
    if sms and not on_gpus:
        raise typer.BadParameter("--sms needs --backend nvlink or hybrid")
    if ranks_per_node is not None and backend is not Backend.hybrid:
        raise typer.BadParameter("--ranks-per-node needs --backend hybrid")
    options = Options(
        ops=tuple(op for op in OPS if op in chosen),
        iterations=iterations,
        warmup=warmup,
        baseline=None if baseline is Baseline.none else baseline.value,
        malloc=malloc.value,
        bind=bind and world is None and not on_gpus,
        sms=tuple(_numbers(sms)) if sms else (None,),
        command=shlex.join(["ep-comm", *sys.argv[1:]]),
    )
    try:
        records = launch.run(cases, options, limit_s)
    except (RuntimeError, TimeoutError) as error:
        _fail(str(error), cases)
    if world is None or world[0] == 0:
        _show(records, json, plot)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"want numbers between commas, got {text!r}") from None
    if min(numbers) < 1:
        raise typer.BadParameter(f"want numbers from 1, got {text!r}")
    return numbers


def _show(records: list[dict[str, Any]], json: Path | None, plot: Path | None) -> None:
    from rich.console import Console

    from ep_comm.bench import report

    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(report.tables(records))
    if json is not None:
        report.write_jsonl(records, json)
    if plot is not None:
        report.plot(records, plot)


def _fail(text: str, cases: list[Case]) -> NoReturn:
    typer.echo(f"ep-comm bench: {cases[0].name} and {len(cases) - 1} more: {text}", err=True)
    raise typer.Exit(1)
