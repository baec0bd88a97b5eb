"""The hybrid backend over NVSHMEM: real processes and the real device API, nodes pretended on GPUs
of one host. NVSHMEM then stores over NVLink; what only a network shows, this cannot.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mps
import pytest

pytestmark = [pytest.mark.gpus(2), pytest.mark.nvshmem]

HERE = Path(__file__).parent


def run_ranks(num_ranks: int, ranks_per_node: int, more: dict[str, str] | None = None,
              *options: str) -> str:  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks),
        "--master-port", str(29600 + os.getpid() % 300), str(HERE / "hybrid_ranks.py"),
        "--ranks-per-node", str(ranks_per_node), *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=HERE.parent, check=False,
        env=os.environ | (more or {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_nodes_of_one_rank() -> None:
    told = run_ranks(2, 1)
    assert "2 ranks mapped" in told
    assert "ok finalized" in told


@pytest.mark.skipif(mps.control() is None, reason=f"{mps.CONTROL} was not found")
@pytest.mark.parametrize("ranks_per_node", [4, 2])
def test_eight_ranks_share_two_gpus(ranks_per_node: int) -> None:
    with mps.daemon() as environ:
        told = run_ranks(8, ranks_per_node, environ)
    assert "ok finalized" in told


@pytest.mark.skipif(mps.control() is None, reason=f"{mps.CONTROL} was not found")
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_masked_ranks_are_left_out(ranks_per_node: int) -> None:
    with mps.daemon() as environ:
        told = run_ranks(4, ranks_per_node, environ, "--masks")
    assert "ok finalized" in told
