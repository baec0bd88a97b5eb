"""The `ep-comm` command: doctor, demo, bench, plan.

This file needs nothing but Python, so that the command can say what is missing; the commands
themselves are in `ep_comm.cli.app`.
"""

import sys

# What the extra [cli] installs. A missing module of any other name is a bug, not a missing extra.
_EXTRA = ("typer", "rich", "matplotlib")


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from ep_comm.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        print(
            f"ep-comm: the command line needs {error.name}, which is not installed.\n"
            "Install it with: pip install 'ep-comm[cli]'",
            file=sys.stderr,
        )
        return 2
    app()
    return 0
