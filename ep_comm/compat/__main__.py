"""python -m ep_comm.compat PROGRAM ARGS...: run a program that imports deep_ep on ep_comm.

PROGRAM is what follows `python` (a file, -m MODULE, -c CODE) or the name of a command. It replaces
this process, so signals, exit codes and torchrun see it as if it had been started directly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from ep_comm.compat import python_path

_USAGE = "usage: python -m ep_comm.compat {FILE.py | -m MODULE | -c CODE | COMMAND} [ARGS...]"


def command_of(arguments: list[str]) -> list[str]:
    """What to execute for the arguments given; empty when there is nothing of that name."""
    program = arguments[0]
    if not program.startswith("-") and not os.path.exists(program):
        found = shutil.which(program)
        return [found, *arguments[1:]] if found else []
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, *arguments]


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(_USAGE)
    if arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    command = command_of(arguments)
    if not command:
        sys.exit(f"ep_comm.compat: no file and no command {arguments[0]!r}")
    environment = dict(os.environ, PYTHONPATH=python_path(os.environ.get("PYTHONPATH")))
    sys.stdout.flush()
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
