"""`ep-comm demo`: a small MoE language model, trained over several ranks and in one process."""

from __future__ import annotations

import json
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ep_comm.demo.train import Job, Report

BOUND = 1e-5  # largest difference of losses between the two runs


class Backend(StrEnum):
    auto = "auto"
    cpu = "cpu"
    collective = "collective"


def demo(
    text: Annotated[
        Path | None, typer.Option(help="File to learn. Default: the help topics of Python.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=16, help="Processes that share experts.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters and batches.")] = 0,
    backend: Annotated[Backend, typer.Option(help="Of the buffer.")] = Backend.auto,
    compare: Annotated[bool, typer.Option(help="Train again in one process.")] = True,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path(
        "ep_comm_demo.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a byte-level mixture-of-experts language model on this machine, without a GPU.

    Experts are spread over the ranks; every layer dispatches and combines. Then one process trains
    the same model with the same order of sums: the losses must agree to 1e-5 at every step, else
    the exit status is 1.
    """
    from rich.console import Console

    from ep_comm.demo.train import Job

    console = Console(stderr=as_json)  # stdout is for the object
    data = _read(text)
    job = Job(text=data, num_shards=ranks, steps=steps, seed=seed, backend=backend.value)
    if len(data) <= job.size.length:
        _fail(f"{text} has {len(data)} bytes, want more than {job.size.length}")
    _check_picture(picture)
    _introduce(console, job, text)
    with _progress(console) as progress:
        together = _run(progress, f"{ranks} ranks", ranks, job)
        single = _run(progress, "one process", 1, job)[0] if compare else None
    result = _result(job, together, single)
    _draw(job, together, single, picture)
    result["picture"] = str(picture)
    if as_json:
        print(json.dumps(result))
    else:
        _tell(console, result, together[0])
    if single is not None and not result["max_loss_difference"] <= BOUND:
        _fail(f"losses differ by {result['max_loss_difference']:.2e}, want <= {BOUND:.0e}", 1)


def _read(text: Path | None) -> bytes:
    if text is None:
        from importlib.util import find_spec

        # Real prose of half a megabyte that every Python has.
        spec = find_spec("pydoc_data.topics")
        if spec is None or spec.origin is None:
            _fail("this Python comes without pydoc_data; name a text with --text")
        text = Path(spec.origin)
    try:
        return text.read_bytes()
    except OSError as error:
        _fail(f"cannot read {text}: {error.strerror}")


def _check_picture(path: Path) -> None:
    """Before the training, not after it."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        _fail("the picture needs matplotlib; install it with: pip install 'ep-comm[cli]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        _fail(f"cannot draw {path}: want a name ending in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        _fail(f"cannot write {path}: there is no such folder")


def _introduce(console: Console, job: Job, text: Path | None) -> None:
    s = job.size
    console.print(
        f"[bold]ep-comm demo[/]  {s.num_layers} layers of attention and MoE, top-{s.num_topk} of "
        f"{s.num_experts} experts, hidden {s.hidden}; "
        f"{job.num_shards} x {s.tokens} tokens a step, {job.steps} steps\n"
        f"[dim]text: {text or 'pydoc_data/topics.py'}, {len(job.text) / 1e6:.2f} MB[/]",
        highlight=False,
    )


# ---- running ----


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )


def _run(progress: Progress, name: str, num_ranks: int, job: Job) -> list[Report]:
    """Train in fresh processes, showing how far they are."""
    import torch

    from ep_comm.demo.train import train
    from ep_comm.testing import run_processes

    queue: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    task = progress.add_task(name, total=job.steps, loss="starting")
    watcher = threading.Thread(target=_watch, args=(queue, progress, task), daemon=True)
    watcher.start()
    try:
        return run_processes(train, num_ranks, job, queue, limit_s=24 * 3600.0)
    except RuntimeError as error:  # the traceback of a rank
        _fail(str(error), 1)
    finally:
        queue.put(None)
        watcher.join()


def _watch(queue: Any, progress: Progress, task: Any) -> None:
    while (news := queue.get()) is not None:
        step, loss = news
        progress.update(task, completed=step + 1, loss=f"loss {loss:.3f}")


# ---- results ----


def _losses(reports: list[Report]) -> Any:
    """[steps, shards], whoever had the shards."""
    import torch

    return torch.cat([r.losses for r in reports], 1)


def _difference(together: list[Report], single: Report | None) -> float | None:
    """Largest of any step and shard; nan stays, and misses the bound."""
    if single is None:
        return None
    return float((_losses(together) - _losses([single])).abs().max())


def _result(job: Job, together: list[Report], single: Report | None) -> dict[str, Any]:
    loss = _losses(together).mean(1)
    tokens = job.steps * job.num_shards * job.size.tokens
    seconds = max(r.seconds for r in together)
    return {
        "ranks": job.num_shards,
        "steps": job.steps,
        "first_loss": float(loss[0]),
        "last_loss": float(loss[-10:].mean()),
        "tokens_per_s": tokens / seconds,
        "single_tokens_per_s": None if single is None else tokens / single.seconds,
        "exchange_share": _share(together, "exchange_seconds"),
        "gradient_share": _share(together, "gradient_seconds"),
        "dropped_share": sum(r.dropped for r in together) / sum(r.choices for r in together),
        "max_loss_difference": _difference(together, single),
        "bound": BOUND,
    }


def _share(reports: list[Report], name: str) -> float:
    return sum(float(getattr(r, name)) for r in reports) / sum(r.seconds for r in reports)


def _draw(job: Job, together: list[Report], single: Report | None, path: Path) -> None:
    import torch

    from ep_comm.demo.picture import Curves, draw, unigram_entropy

    load = torch.cat([r.load for r in together], 2)
    experts = [e for r in together for e in r.experts]
    owners = [rank for rank, r in enumerate(together) for _ in r.experts]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    caption = (
        f"A byte-level MoE language model, top-{job.size.num_topk} of {job.size.num_experts} "
        f"experts, over {job.num_shards} ranks with ep_comm"
    )
    draw(
        Curves(
            ranks=_losses(together).mean(1),
            single=None if single is None else _losses([single]).mean(1),
            difference=_difference(together, single),
            unigram=unigram_entropy(job.text),
            load=load[:, :, order],
            num_ranks=job.num_shards,
            owner=[owners[i] for i in order],
            caption=caption,
        ),
        path,
    )


def _tell(console: Console, result: dict[str, Any], report: Report) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "buffer": report.buffer,
        "loss": f"{result['first_loss']:.3f} at first, {result['last_loss']:.3f} at last, per byte",
        "speed": f"{result['tokens_per_s']:,.0f} tokens/s on {result['ranks']} ranks",
        "dispatch, combine": f"{result['exchange_share']:.0%} of the time, waiting for peers "
        "included",
        "gradients": f"{result['gradient_share']:.0%} of the time, of what all ranks have",
        "capacity": f"{result['dropped_share']:.1%} of the choices dropped",
    }
    difference = result["max_loss_difference"]
    if difference is not None:
        rows["speed"] += f", {result['single_tokens_per_s']:,.0f} in one process"
        good = difference <= BOUND
        verdict = "[green]agrees[/]" if good else "[red]differs[/]"
        rows["one process"] = (
            f"{verdict}: largest |Δloss| {difference:.1e} in {result['steps']} steps, "
            f"bound {BOUND:.0e}"
        )
    rows["picture"] = result["picture"]
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table, highlight=False)


def _fail(what: str, status: int = 2) -> NoReturn:
    print(f"ep-comm demo: {what}", file=sys.stderr)
    raise typer.Exit(status)
