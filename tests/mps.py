"""The MPS daemon for tests: kernels of several processes run on one GPU at the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
_BESIDE_THE_DRIVER = ("/usr/local/nvidia/bin", "/usr/bin", "/usr/local/cuda/bin", "/opt/bin")


def control() -> str | None:
    """The program, which comes with the driver."""
    found = shutil.which(CONTROL)
    paths = (f"{folder}/{CONTROL}" for folder in _BESIDE_THE_DRIVER)
    return found or next((path for path in paths if os.access(path, os.X_OK)), None)


@contextlib.contextmanager
def daemon(limit_s: float = 30.0) -> Iterator[dict[str, str]]:
    """Runs one with a folder of its own; yields what clients need in their environment."""
    program = control()
    if program is None:
        raise RuntimeError(f"{CONTROL} was not found")
    with tempfile.TemporaryDirectory(prefix="ep_comm-mps") as folder:
        environ = {
            "CUDA_MPS_PIPE_DIRECTORY": str(Path(folder, "pipe")),
            "CUDA_MPS_LOG_DIRECTORY": str(Path(folder, "log")),
        }
        for path in environ.values():
            Path(path).mkdir()
        # Clients share the hardware's queues; where each takes 32, some find no room for a context.
        environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
        command = {"env": os.environ | environ, "timeout": limit_s, "check": True}
        subprocess.run([program, "-d"], **command)  # type: ignore[call-overload]
        try:
            yield environ
        finally:
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run([program], input="quit\n", text=True, **command)  # type: ignore[call-overload]
