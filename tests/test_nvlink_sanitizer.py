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
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("program", sanitize.PROGRAMS)
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_kernels_are_clean_under(tool: str, program: str) -> None:
    record = sanitize.check(tool, program, seed=0, seconds=20.0, limit_s=240.0)
    assert record["correct"], record


# ---- what it makes of a tool's output, without the tool ----

CLEAN = """\
ok: 40 of 10000 dispatches in 21 rounds, 3.0 s (40 pair)
========= ERROR SUMMARY: 0 errors
"""
PASSES = "echo '========= ERROR SUMMARY: 0 errors'\n"
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


def test_the_suite_runs_in_parts_of_all_its_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(monkeypatch, tmp_path, 'echo "$@" >>"$0.calls"; echo "3 passed"\n' + PASSES)
    record = sanitize.check("memcheck", "suite", 0, 1.0, limit_s=20.0, parts=3)
    assert (record["correct"], record["summary"]) == (True, "3 x ERROR SUMMARY: 0 errors")
    calls = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    ran = [word.partition("::")[2] for call in calls for word in call.split() if "::" in word]
    assert len(calls) == 3
    assert len(set(ran)) == len(ran) > 90
    assert any("agree" in case for case in ran)


def test_a_part_is_run_again_when_the_tool_itself_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = f"if mkdir '{tmp_path}/once'; then echo '== {sanitize.TOOL_FAILED}: lost'; exit 7; fi\n"
    fake_tool(monkeypatch, tmp_path, lost + "echo 'ok: 1 of 1'\n" + PASSES)
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["tool_failed"]) == (True, 1)
    fake_tool(monkeypatch, tmp_path, f"echo 'ok: 1'; echo '== {sanitize.TOOL_FAILED}'; exit 7\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["exit"], record["tool_failed"]) == (False, 7, 2)


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tool(monkeypatch, tmp_path, "echo begun; sleep 60 & wait\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=0.5)
    assert (record["correct"], record["exit"]) == (False, None)


def fake_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
