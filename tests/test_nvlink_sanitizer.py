"""The long random program and the loopback suite under compute-sanitizer: no bad access, no
race. `python tests/sanitize_nvlink.py` is the same without pytest.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import sanitize_nvlink as sanitize

from ep_comm import _core


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
WARNING = """\
ok: 40 of 10000 dispatches in 21 rounds, 3.0 s (40 pair)
========= Warning: Race reported between Read access at x and Write access at y
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
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
        (WARNING, 0, False, "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"),
        ("ok: 1 of 1\n", 0, False, None),  # under no tool
        ("failed: Mismatch\n========= ERROR SUMMARY: 0 errors\n", 1, False, None),
        ("========= ERROR SUMMARY: 0 errors\n", 0, False, None),  # nothing has run
    ],
    ids=["clean", "race", "warning", "no-tool", "failed", "nothing-ran"],
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
    count = "n=0; for a; do case $a in *::*) n=$((n+1));; esac; done\n"
    called = count + 'echo "$@" >>"$0.calls"\n'
    fake_tool(monkeypatch, tmp_path, called + 'echo "$n passed in 1.00s"\n' + PASSES)
    record = sanitize.check("memcheck", "suite", 0, 1.0, limit_s=20.0, parts=3)
    assert (record["correct"], record["summary"]) == (True, "3 x ERROR SUMMARY: 0 errors")
    calls = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    ran = [word.partition("::")[2] for call in calls for word in call.split() if "::" in word]
    assert len(calls) == 3
    assert len(set(ran)) == len(ran) > 90
    assert any("agree" in case for case in ran)
    fake_tool(
        monkeypatch, tmp_path, count + 'echo "$((n-1)) passed, 1 skipped in 1.00s"\n' + PASSES
    )
    record = sanitize.check("memcheck", "suite", 0, 1.0, limit_s=20.0, parts=3)
    assert not record["correct"]
    with pytest.raises(ValueError, match="0 parts"):
        sanitize.check("memcheck", "suite", 0, 1.0, limit_s=20.0, parts=0)


def test_a_part_is_run_again_when_the_tool_itself_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = f"if mkdir '{tmp_path}/once'; then echo '== {sanitize.TOOL_FAILED}: lost'; exit 7; fi\n"
    fake_tool(monkeypatch, tmp_path, lost + "echo 'ok: 1 of 1'\n" + PASSES)
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["tool_failed"]) == (True, 1)
    fake_tool(monkeypatch, tmp_path, f"echo 'ok: 1'; echo '== {sanitize.TOOL_FAILED}'; exit 7\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["exit"], record["tool_failed"]) == (False, 7, 3)
    # What it found besides is not lost in another run.
    race = RACE.replace("1 hazard", "2 hazards")
    lost_too = f"echo '== {sanitize.TOOL_FAILED}: lost'; cat <<'END'\n{race}END\nexit 7\n"
    fake_tool(monkeypatch, tmp_path, "echo x >>$0.calls\n" + lost_too)
    record = sanitize.check("racecheck", "pair", seed=0, seconds=1.0, limit_s=20.0)
    assert (record["correct"], record["tool_failed"]) == (False, 1)
    assert (tmp_path / "compute-sanitizer.calls").read_text() == "x\n"


@pytest.mark.skipif(_core.BUILD["cuda"] == "", reason="a build without kernels")
def test_racecheck_looks_at_every_kernel() -> None:
    names = set(re.findall(rb"\b_Z(?!Z)\w+_kernel\w*", Path(_core.__file__).read_bytes()))
    # But for the host's part, and functions that a kernel's own types are parameters of.
    names = {n for n in names if b"__device_stub__" not in n and b"_INTERNAL_" not in n}
    _, chosen = sanitize.TOOLS["racecheck"]
    meant = chosen.partition("=")[2].encode()
    assert len(names) > 20
    assert [name for name in names if not name.startswith(meant)] == []


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tool(monkeypatch, tmp_path, "echo begun; sleep 60 & wait\n")
    record = sanitize.check("memcheck", "pair", seed=0, seconds=1.0, limit_s=0.5)
    assert (record["correct"], record["exit"]) == (False, None)


def fake_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
