"""The commands. Each imports what it needs when it runs, so `ep-comm --help` is quick."""

import typer

from ep_comm.cli.bench import bench

app = typer.Typer(
    help="Expert-parallel dispatch and combine for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(bench)


@app.callback()
def _commands() -> None:
    """Keeps `bench` a command of its own name while it is the only one."""
