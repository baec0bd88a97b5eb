"""`ep-comm bench` on GPUs: checked, timed, swept over SMs, recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_comm.bench.cases import OPS

SMALL = ("--tokens 96 --hidden 512 --experts 8 --topk 4 --iterations 3 "
         "--ops " + ",".join(OPS)).split()  # fmt: skip


def bench(launcher: list[str], *args: str, backend: str = "nvlink") -> list[dict[str, Any]]:
    program = [sys.executable, *launcher, "-m", "ep_comm", "bench", "--backend", backend]
    command = [*program, *SMALL, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(args[args.index("--json") + 1])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.gpu
def test_bench_sweeps_sms_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "sms.png"
    records = bench(
        [], "--ranks", "2", "--sms", "2,4", "--json", str(tmp_path / "r"), "--plot", str(picture)
    )
    assert [(r["op"], r["sms"]) for r in records] == [(op, n) for op in OPS for n in (2, 4)]
    for r in records:
        assert r["correct"]
        assert r["device"] == "cuda"
        assert r["time_us"]["n"] == 3
        assert 0 < r["time_us"]["min"] <= r["time_us"]["p50"]
        assert r["call_us"]["min"] > 0
        assert r["scaleup_recv_bytes"] > 0
        assert r["copy_us"] > 0
    assert picture.stat().st_size > 0


@pytest.mark.gpu
def test_bench_refuses_a_baseline_without_the_gpus_for_it(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "ep_comm", "bench", "--backend", "nvlink", *SMALL,
        "--baseline", "nccl",
    ]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert "every rank needs a GPU of its own" in done.stderr


@pytest.mark.gpus(2)
def test_bench_under_torchrun_beside_nccl(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    records = bench(launcher, "--baseline", "nccl", "--json", str(tmp_path / "r"))
    assert [r["op"] for r in records] == list(OPS)
    for r in records:
        assert r["aligned_by"] == "nccl all-reduce"
        assert r["baseline"] == "nccl"
        assert r["baseline_time_us"]["p50"] > 0
        assert r["speedup"] > 0


@pytest.mark.gpus(2)
@pytest.mark.nvshmem
def test_bench_across_nodes_tells_rails_from_nvlink(tmp_path: Path) -> None:
    records = bench(
        [], "--ranks", "2", "--ranks-per-node", "1", "--json", str(tmp_path / "r"),
        backend="hybrid",
    )  # fmt: skip
    assert [r["op"] for r in records] == list(OPS)
    for r in records:
        assert r["correct"]
        assert (r["num_nodes"], r["ranks_per_node"]) == (2, 1)
        assert r["rail_bytes"] > 0 == r["nvlink_bytes"]
        assert r["rail_gbps"] > 0
