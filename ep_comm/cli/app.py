"""The commands. Each imports what it needs when it runs, so `ep-comm --help` is quick."""

import typer

from ep_comm.cli.bench import bench
from ep_comm.cli.demo import demo
from ep_comm.cli.doctor import doctor
from ep_comm.cli.eplb import eplb
from ep_comm.cli.plan import plan

app = typer.Typer(
    help="Expert-parallel dispatch and combine for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(demo)
app.command()(bench)
app.command()(eplb)
app.command()(plan)
