"""`ep-comm bench`: routing and bytes by hand, a check that finds mistakes, and short real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ep_comm import reference
from ep_comm.bench import check, launch, memory, report, timing
from ep_comm.bench.cases import OPS, Case, choose_experts, make_inputs, traffic
from ep_comm.bench.measure import Options
from ep_comm.cli.app import app
from ep_comm.testing import run_processes

ROOT = Path(__file__).resolve().parents[1]
SMALL = Case(ranks=2, tokens=12, hidden=1152, topk=3, experts=6)


# ---- cases ----


@pytest.mark.parametrize("routing", ["uniform", "zipf", "onehot"])
def test_routing_gives_each_token_different_experts(routing: str) -> None:
    ids = choose_experts(Case(2, 200, 128, 4, 10, routing=routing), rank=1)

    assert ids.shape == (200, 4)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 10
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_routing_zipf_prefers_the_same_experts_on_all_ranks() -> None:
    case = Case(2, 500, 128, 1, 16, routing="zipf")
    counts = [choose_experts(case, rank).flatten().bincount(minlength=16) for rank in range(2)]

    favourite = int(counts[0].argmax())
    assert int(counts[1].argmax()) == favourite
    assert int(counts[0][favourite]) > 500 / 16 * 3


def test_inputs_depend_on_seed_and_rank_only() -> None:
    again = make_inputs(SMALL, 1)

    assert torch.equal(make_inputs(SMALL, 1).x, again.x)
    assert not torch.equal(make_inputs(SMALL, 0).x, again.x)


def test_traffic_counts_a_token_once_per_other_rank() -> None:
    # All tokens choose experts 0, 1, 2, which rank 0 owns: 12 tokens of rank 1 arrive there.
    case = Case(ranks=2, tokens=12, hidden=64, topk=3, experts=6, routing="onehot")

    sent, home = traffic(case, "dispatch"), traffic(case, "combine")

    assert sent.row_bytes == 64 * 2
    assert sent.payload_bytes > sent.row_bytes  # ids and weights travel, too
    assert sent.rows == [12, 12]
    assert sent.recv_bytes == 12 * sent.payload_bytes
    assert home.payload_bytes == 64 * 2
    assert home.recv_bytes == 12 * 128


def test_traffic_of_quantized_rows_counts_scales() -> None:
    plain = traffic(Case(2, 4, 256, 2, 4), "dispatch_cached")
    fp8 = traffic(Case(2, 4, 256, 2, 4, quantize="fp8"), "dispatch_cached")

    assert plain.payload_bytes >= 512
    assert fp8.row_bytes == 256
    assert fp8.payload_bytes >= 256 + 2 * 4


def test_traffic_of_gpus_counts_what_is_stored_beside_a_row() -> None:
    compact = traffic(Case(2, 6, 256, 2, 4, backend="nvlink"), "dispatch")
    cached = traffic(Case(2, 6, 256, 2, 4, backend="nvlink"), "dispatch_cached")
    scaled = traffic(Case(2, 6, 256, 2, 4, dtype="fp8", backend="nvlink"), "dispatch_cached")
    # All tokens have both experts on rank 0: two slots a pair, and the rows of both.
    slots = Case(2, 6, 256, 2, 4, layout="grouped", routing="onehot", backend="nvlink")

    assert compact.payload_bytes == 512 + 2 * 8 + 2 * 4 + 8
    assert cached.payload_bytes == 512
    assert scaled.payload_bytes == 256 + 2 * 4
    assert traffic(slots, "dispatch").payload_bytes == 512 + 2 * 12 + 8 + 2 * 4


# ---- the check ----


def _right_results(case: Case, rank: int) -> dict[str, Any]:
    inputs = [make_inputs(case, r) for r in range(case.ranks)]
    received = reference.dispatch(
        [i.x for i in inputs],
        [i.topk_idx for i in inputs],
        [i.topk_weights for i in inputs],
        num_experts=case.experts,
        max_tokens=case.tokens,
        layout=case.layout,
        quantize=case.quantize,
    )
    answers = [check.expert_output(r.x, rank, case) for rank, r in enumerate(received)]
    sums = reference.combine(answers, [r.handle for r in received])
    return {"dispatch": received[rank], "combine": sums[rank]}


@pytest.mark.parametrize("layout", ["compact", "grouped", "slab"])
def test_check_right_results_pass(layout: str) -> None:
    case = Case(2, 12, 1152, 3, 6, layout=layout, quantize="fp8")

    check.check_case(case, 1, _right_results(case, 1))


def _flip(x: torch.Tensor, *index: int) -> None:
    check.as_bits(x)[index] ^= 1


MISTAKES = {
    "x-first-slice": lambda got: _flip(got["dispatch"].x, 0, 0),
    "x-last-column": lambda got: _flip(got["dispatch"].x, -1, -1),
    "rows-swapped": lambda got: got["dispatch"].x[:2].copy_(got["dispatch"].x[:2].flip(0).clone()),
    "id": lambda got: got["dispatch"].topk_idx[0, 0].add_(1),
    "weight": lambda got: got["dispatch"].topk_weights.mul_(1.0001),
    "handle": lambda got: got["dispatch"].handle.send_row[0].add_(1),
    "sum-last-column": lambda got: _flip(got["combine"], 3, -1),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_check_wrong_result_is_found(mistake: Any) -> None:
    got = _right_results(SMALL, 0)
    mistake(got)

    with pytest.raises(check.Mismatch):
        check.check_case(SMALL, 0, got)


# ---- numbers ----


def test_storage_bytes_counts_each_storage_once_and_no_inputs() -> None:
    given, made = torch.zeros(100), torch.zeros(6, dtype=torch.int64)

    found = memory.storage_bytes([made, made[2:], given[:5], 7, None], [given])

    assert found == 48


def _times_of_two_ranks(rank: int, num_ranks: int) -> timing.Times:
    # Rank 0 works from 100 to 110, rank 1 got its core late and works from 108 to 120.
    sample = timing.Sample(100, 110, -1) if rank == 0 else timing.Sample(108, 120, -1)
    on_device = timing.Sample(100, 101, 40 + rank)
    return timing.Stopwatch("cpu").times([sample, on_device])


def test_time_reaches_from_first_entry_to_last_return() -> None:
    times = run_processes(_times_of_two_ranks, 2)[0]

    assert times.done == [20, 41]
    assert times.call == [12, 1]
    assert times.skew == [8, 0]


# ---- runs ----


def _bench(*args: str, program: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, "-m", "ep_comm", "bench", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)


TINY = ("--tokens", "8", "--hidden", "64", "--topk", "2", "--experts", "4", "--iterations", "3")


def test_run_with_baseline_writes_table_records_and_picture(tmp_path: Path) -> None:
    lines, picture = tmp_path / "out.jsonl", tmp_path / "out.png"

    run = _bench("--ranks", "2", "--ops", ",".join(OPS), "--baseline", "gloo", *TINY,
                 "--json", str(lines), "--plot", str(picture))  # fmt: skip

    assert run.returncode == 0, run.stderr
    records = report.read_jsonl(lines)
    assert [r["op"] for r in records] == list(OPS)
    for r in records:
        assert r["correct"] is True
        assert r["time_us"]["n"] == 3
        assert r["time_us"]["min"] <= r["time_us"]["p50"]
        assert r["copy_ratio"] == pytest.approx(r["copy_us"] / r["time_us"]["p50"], abs=1e-3)
        assert r["speedup"] > 0
        assert r["backend"] == "cpu"
        assert r["seed"] == 0
    assert "dispatch_cached" in run.stdout
    assert picture.stat().st_size > 1000

    shown = subprocess.run(
        [sys.executable, "bench/compare.py", str(lines), "--before", str(lines)],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "+0.0 %" in shown.stdout


def test_run_of_every_layout_dtype_and_routing_is_correct() -> None:
    shape: dict[str, Any] = {"ranks": 2, "tokens": 8, "hidden": 512, "topk": 2, "experts": 4}
    cases = [
        Case(**shape, layout="grouped", alignment=8),
        Case(**shape, layout="slab", static=True, quantize="fp8"),
        Case(**shape, layout="grouped", static=True, dtype="fp32", routing="zipf"),
        Case(**shape, quantize="fp8_ue8m0"),
        Case(**shape, dtype="fp8", layout="slab", capacity=16),
        Case(**shape, dtype="fp16", static=True, routing="onehot"),
    ]
    options = Options(ops=OPS, iterations=1, warmup=0, baseline="gloo")

    records = launch.run(cases, options, limit_s=150.0)

    assert [(r["case"], r["op"]) for r in records] == [(c.name, op) for c in cases for op in OPS]
    assert all(r["correct"] for r in records)


def test_run_under_torchrun_joins_its_ranks(tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"

    run = _bench(*TINY, "--json", str(lines), program=(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    ))  # fmt: skip

    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["ranks"] for r in records] == [2, 2]


def test_run_with_unknown_operation_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "--ops", "gather"])

    assert result.exit_code == 2
    assert "gather" in result.output
