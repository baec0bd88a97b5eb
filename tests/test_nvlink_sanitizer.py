"""The long random program and the loopback suite under compute-sanitizer: no bad access, no
race. `python tests/sanitize_nvlink.py` is the same without pytest.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import sanitize_nvlink as sanitize


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", sanitize.FEW)
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_kernels_are_clean_under(tool: str, program: str) -> None:
    record = sanitize.check(tool, program, seed=0, seconds=20.0, limit_s=240.0)
    assert record["correct"], record


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_whole_loopback_suite_is_clean_under(tool: str) -> None:
    record = sanitize.check(tool, sanitize.SUITE, seed=0, seconds=0.0, limit_s=1200.0)
    assert record["correct"], record


# ---- what it makes of a tool's output, without the tool ----

CLEAN = """\
ok: 40 of 10000 dispatches in 21 rounds, 3.0 s (40 pair)
========= ERROR SUMMARY: 0 errors
"""
RACE = """\
ok: 40 of 10000 dispatches in 21 rounds, 3.0 s (40 pair)
========= Error: Race reported between Write access at x and Read access at y
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "code", "correct", "summary"),
    [
        (CLEAN, 0, True, "ERROR SUMMARY: 0 errors"),
        (RACE, 7, False, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"),
        ("failed: Mismatch\n========= ERROR SUMMARY: 0 errors\n", 1, False, None),
        ("========= ERROR SUMMARY: 0 errors\n", 0, False, None),  # nothing has run
    ],
    ids=["clean", "race", "failed", "nothing-ran"],
)
def test_output_becomes_a_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, code: int, correct: bool,
    summary: str | None,
) -> None:  # fmt: skip
    fake_tool(monkeypatch, tmp_path, f"cat <<'END'\n{output}END\nexit {code}\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["exit"]) == (correct, code)
    assert summary is None or record["summary"] == summary


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tool(monkeypatch, tmp_path, "echo begun; sleep 60 & wait\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=0.5)
    assert (record["correct"], record["exit"]) == (False, None)


def fake_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
