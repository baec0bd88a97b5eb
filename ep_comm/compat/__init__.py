"""Programs written for other libraries, run on ep_comm without a change.

`deep_ep` is what exists. A program gets it in one of three ways:

- `python -m ep_comm.compat PROGRAM ARGS...` runs PROGRAM with `deep_ep` importable, also in every
  process it starts: that is an entry of PYTHONPATH, the only variable written.
- `ep_comm.compat.install()` makes it importable in this process and in those that multiprocessing
  spawns or forks from it; no variable is written.
- the wheel in compat/deep_ep_wheel installs it for good.

All three put the same few files on the path, in `top_level`: they name what
`ep_comm.compat.deep_ep` has. A real `deep_ep` in the environment is hidden by the first two.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

TOP_LEVEL: Final = Path(__file__).parent / "top_level"
MODULES: Final = ("deep_ep", "deep_ep_cpp")


def install() -> None:
    """Make `import deep_ep` and `import deep_ep_cpp` mean ours; may be called again.

    Raises:
        RuntimeError: another one is imported already.
    """
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None and not _is_ours(module):
            file = getattr(module, "__file__", None)
            raise RuntimeError(f"{name} is imported already, from {file}: call install() before")
    if str(TOP_LEVEL) not in sys.path:
        sys.path.insert(0, str(TOP_LEVEL))


def _is_ours(module: Any) -> bool:
    from ep_comm.compat.deep_ep import Config

    return getattr(module, "Config", None) is Config


def python_path(current: str | None) -> str:
    """PYTHONPATH with which a new interpreter finds `deep_ep`, and ep_comm itself."""
    folders = [str(TOP_LEVEL)]
    home = TOP_LEVEL.parents[2]  # where the package ep_comm lies
    if home.name not in ("site-packages", "dist-packages"):  # else it is found without our help
        folders.append(str(home))
    known = [] if not current else current.split(os.pathsep)
    return os.pathsep.join([*folders, *(f for f in known if f not in folders)])


__all__ = ["install", "python_path"]
