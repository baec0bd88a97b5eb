"""`ep-comm demo`: a short run for real, and what it does when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

typer = pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from ep_comm.cli import demo as command  # noqa: E402
from ep_comm.demo.model import Size  # noqa: E402
from ep_comm.demo.picture import Curves, draw, unigram_entropy  # noqa: E402
from ep_comm.demo.train import Report  # noqa: E402

APP = typer.Typer()
APP.command()(command.demo)


def colours(picture: Path) -> int:
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 600
    return len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])})


def test_two_ranks_and_one_process_have_the_same_losses(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    code = "import typer; from ep_comm.cli.demo import demo; typer.run(demo)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--ranks",
            "2",
            "--steps",
            "3",
            "--json",
            "--picture",
            picture,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["max_loss_difference"] == 0.0
    assert (result["ranks"], result["steps"]) == (2, 3)
    assert 3.0 < result["last_loss"] < result["first_loss"] < 6.0
    assert 0 < result["exchange_share"] < 1
    assert result["tokens_per_s"] > 0
    assert "2 ranks" in done.stderr
    assert "one process" in done.stderr
    assert colours(picture) > 50


def report(loss: float, experts: range) -> Report:
    size = Size()
    return Report(
        losses=torch.full((4, 1), loss),
        load=torch.arange(4 * size.num_layers * len(experts)).view(4, size.num_layers, -1),
        experts=list(experts),
        dropped=1,
        choices=100,
        seconds=2.0,
        exchange_seconds=0.5,
        gradient_seconds=0.1,
        num_parameters=1,
        buffer="Buffer()",
    )


def run_with(monkeypatch: pytest.MonkeyPatch, single_loss: float, *options: Any) -> Any:
    """The command with training left out."""

    def fake(progress: Any, name: str, num_ranks: int, job: Any) -> list[Report]:
        if num_ranks == 1:
            both = report(single_loss, range(16))
            both.losses = torch.tensor([[2.0, 2.0]] * 3 + [[2.0, single_loss]])
            return [both]
        return [report(2.0, range(8)), report(2.0, range(8, 16))]

    monkeypatch.setattr(command, "_run", fake)
    return CliRunner().invoke(APP, ["--ranks", "2", "--steps", "4", *map(str, options)])


@pytest.mark.parametrize(
    ("loss", "status"), [(2.0, 0), (2.0 + 5e-6, 0), (2.0 + 5e-5, 1), (float("nan"), 1)]
)
def test_status_says_whether_the_losses_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, status: int
) -> None:
    done = run_with(monkeypatch, loss, "--picture", tmp_path / "a.png")
    assert done.exit_code == status, done.output
    assert ("agrees" in done.output) == (status == 0)
    assert "25% of the time" in done.output
    assert (tmp_path / "a.png").exists()


def test_what_cannot_work_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"too short")
    for options in (
        ["--text", short],
        ["--text", tmp_path / "none.txt"],
        ["--picture", tmp_path / "a.docx"],
        ["--picture", tmp_path / "nowhere" / "a.png"],
        ["--ranks", 0],
    ):
        assert run_with(monkeypatch, 2.0, *options).exit_code == 2, options


def test_picture_shows_curves_and_load(tmp_path: Path) -> None:
    steps = torch.arange(50.0)
    curves = Curves(
        ranks=5 - steps / 20,
        single=None,
        difference=None,
        unigram=unigram_entropy(bytes(range(256))),
        load=torch.randint(0, 90, (50, 2, 16), generator=torch.Generator().manual_seed(0)),
        num_ranks=4,
        owner=[e // 4 for e in range(16)],
        caption="a caption",
    )
    assert curves.unigram == pytest.approx(5.545, abs=1e-3)
    draw(curves, tmp_path / "a.png")
    assert colours(tmp_path / "a.png") > 50
