"""The loopback suite's core again, under compute-sanitizer: no bad access, no race."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = "(ep2 or grouped-scales or quantize-slab) and agree"


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_loopback_is_clean_under(tool: str) -> None:
    suite = Path(__file__).with_name("test_nvlink_loopback.py")
    command = [
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "7"),
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite), "-k", CASES),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-4000:]
