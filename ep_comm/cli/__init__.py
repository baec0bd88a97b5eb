"""The `ep-comm` command: doctor, demo, bench, eplb, plan.

This file needs nothing but Python, so that the command can say what is missing; the commands
themselves are in `ep_comm.cli.app`.
"""

import sys
from importlib.util import find_spec


def main() -> int:
    """Run the command line and return its exit status."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(
            f"ep-comm: the command line needs {' and '.join(missing)}, not installed here.\n"
            "Install it with: pip install 'ep-comm[cli]'",
            file=sys.stderr,
        )
        return 2
    from ep_comm.cli.app import app

    app()
    return 0
