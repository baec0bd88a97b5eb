"""`ep-comm doctor`: what this machine can do for ep_comm, and what is in the way."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ep_comm.doctor import Report


class Requirement(StrEnum):
    nvlink = "nvlink"
    rdma = "rdma"


_STYLES = {"ok": "green", "warn": "yellow", "skip": "dim", "fail": "bold red"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
    gpus: Annotated[str, typer.Option(help="Ordinals or UUIDs: 0,1 or GPU-29d4.")] = "",
    require: Annotated[
        list[Requirement] | None, typer.Option(help="Fail when it is not there; may be repeated.")
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest/--no-selftest", help="Two ranks, bit by bit.")
    ] = True,
    launch: Annotated[
        bool, typer.Option("--launch", help="Only print the torchrun line for this machine.")
    ] = False,
) -> None:
    """Look at this machine in at most 5 s; nothing is left behind, no privilege is needed.

    A line has status, check, subject: measured (need ...); effect; fix. Exit status: 0 ok or
    skipped, 1 a warning, 2 a failure or something required that is not there.
    """
    from ep_comm.doctor import Machine, examine, launch_line

    machine = Machine(gpus=_parse_gpus(gpus))
    if launch:
        line = launch_line(machine)
        typer.echo(_dump({"launch": line}) if json else line)
        return
    report = examine(machine, require=[r.value for r in require or ()], selftest=selftest)
    if json:
        typer.echo(_dump(report.as_dict()))
    else:
        _show(report)
    raise typer.Exit(report.exit_code)


def _parse_gpus(text: str) -> tuple[str, ...]:
    """Ordinals or UUIDs between commas; anything else is refused, not ignored."""
    if not text:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            raise typer.BadParameter(f"E203: rejected --gpus={text}: want ordinals or UUIDs")
    return names


def _dump(value: object) -> str:
    import json

    return json.dumps(value, indent=2)


def _show(report: Report) -> None:
    """Colored for people, plain lines for everything else."""
    counts = dict.fromkeys(_STYLES, 0)
    for finding in report.findings:
        counts[finding.status] += 1
    total = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    summary = f"{total}; {report.seconds:.1f} s; exit status {report.exit_code}"
    if not sys.stdout.isatty():
        for finding in report.findings:
            typer.echo(finding.line())
        typer.echo(summary)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for finding in report.findings:
        head, _, rest = finding.line().partition("] ")
        text = Text(f"{head}] ", style=_STYLES[finding.status])
        console.print(
            text + Text(rest, style="dim" if finding.status == "skip" else ""), soft_wrap=True
        )
    console.print(summary, style="bold")
