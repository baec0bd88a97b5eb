"""`ep-comm eplb`: a trace in; numbers, a table and heat maps out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_comm.cli.app import app
from ep_comm.eplb import Trace
from ep_comm.eplb.report import evaluate
from ep_comm.testing.skew import drifting_load, routing_trace

OPTIONS = ["--ranks", "8", "--nodes", "2", "--groups", "4"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    load = drifting_load(4, 3, 32, exponent=0.8, fraction=0.02, seed=1)
    return routing_trace(load, 300, 4, num_topics=4, seed=2)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_command_prints_numbers_and_draws(trace: Trace, tmp_path: Path, ending: str) -> None:
    trace.write(tmp_path / f"t.{ending}")
    picture = tmp_path / "map.png"
    command = ["eplb", str(tmp_path / f"t.{ending}"), *OPTIONS, "--picture", str(picture)]

    said = CliRunner().invoke(app, [*command, "--json"])
    assert said.exit_code == 0, said.output
    numbers = json.loads(said.stdout)
    report = evaluate(
        trace, num_ranks=8, num_nodes=2, num_slots=40, num_groups=4, expert_bytes=42 << 20
    )
    want = report.as_dict()
    for key in ("slots", "moved", "moved_bytes", "before", "after", "most_replicas"):
        assert numbers[key] == want[key]
    assert numbers["steps_seen"] == numbers["steps_measured"] == 2
    assert numbers["after"]["imbalance"] < 0.7 * numbers["before"]["imbalance"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000

    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0
    for word in (
        "32 experts, 40 slots",
        f"{want['before']['imbalance']:.3f}",
        f"{want['after']['imbalance']:.3f}",
        f"{want['after']['cross_node']:.3f}",
        f"{want['moved']} experts move",
    ):
        assert word in told.stdout


def test_report_measures_on_steps_the_plan_has_not_seen(trace: Trace) -> None:
    report = evaluate(trace, num_ranks=8, num_nodes=2, num_slots=40, num_groups=1)
    assert torch.equal(report.load, trace.steps(slice(2, 4)).load())
    assert torch.equal(report.seen.ids, trace.ids[:2])
    alone = evaluate(trace.steps(slice(0, 1)), num_ranks=8, num_nodes=2, num_slots=40, num_groups=1)
    assert alone.measured.num_steps == alone.seen.num_steps == 1
    rows = report.relative_load(report.after)
    torch.testing.assert_close(rows.mean(1), torch.ones(3, dtype=torch.float64))
    # Every selection of a token is counted once at most per node.
    traffic = torch.tensor(report.as_dict()["after"]["node_traffic"])
    tokens = trace.num_layers * 2 * 300
    assert tokens <= float(traffic.sum()) <= tokens * 2
    crossing = float(traffic.sum() - traffic.diagonal().sum())
    assert report.as_dict()["after"]["cross_node"] == pytest.approx(crossing / tokens)
    assert 0 < crossing / tokens < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "7", "--nodes", "2"], "multiple of 2 nodes"),
        (["--ranks", "8", "--nodes", "2", "--slots", "16"], "16 slots"),
        (["--ranks", "8", "--nodes", "2", "--policy", "hierarchical", "--groups", "3"], "groups=3"),
        (["--picture", "map.bmp"], "want a name ending in"),
        (["--experts", "8"], "ids outside"),
    ],
)
def test_what_cannot_be_is_said(
    trace: Trace, tmp_path: Path, options: list[str], words: str
) -> None:
    trace.write(tmp_path / "t.npz")
    picture = [] if "--picture" in options else ["--picture", str(tmp_path / "map.png")]
    said = CliRunner().invoke(app, ["eplb", str(tmp_path / "t.npz"), *options, *picture])
    assert said.exit_code == 2
    assert words in said.stderr
