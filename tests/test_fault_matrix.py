"""The matrix in docs/reliability.md is what ran, and covers what can run."""

from __future__ import annotations

import os
import subprocess
import sys

import fault_matrix
import pytest
from cases import CASES
from fault_matrix import ROOT, Record, document, key_of, merged, table

AGAIN = "run `pytest --fault-matrix` (add --slow for those) and commit what it writes"


@pytest.fixture(scope="module")
def collected() -> set[tuple[str, str]]:
    """File and name of every test that stands for a case."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--fault-matrix", "tests"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {key_of(line) for line in done.stdout.splitlines() if "::" in line}


def test_record_has_every_test_that_stands_for_a_case(collected: set[tuple[str, str]]) -> None:
    recorded = {(file, name) for file, tests in fault_matrix.read().items() for name in tests}
    assert collected - recorded == set(), AGAIN
    assert recorded - collected == set(), AGAIN


def test_document_is_written_from_the_record() -> None:
    text = fault_matrix.DOCUMENT.read_text()
    assert document(text, fault_matrix.read()) == text, AGAIN


def test_every_case_ran_or_says_what_it_needs() -> None:
    ran: set[str] = set()
    for tests in fault_matrix.read().values():
        for name, entry in tests.items():
            assert not entry.get("failed"), name
            if entry.get("passed"):
                ran.update(fault_matrix.ids_of(f"::{name}"))
    assert {case for case, row in CASES.items() if not row.needs} - ran == set()


# ---- the tool itself ----


@pytest.mark.parametrize(
    ("nodeid", "ids"),
    [
        ("a.py::test_c2_c3_a_rank_dies[compact-1]", ["C2", "C3"]),
        ("a.py::test_bad_argument[a5-weights-k-1]", ["A5"]),
        ("a.py::test_bad_argument[weights-k-1]", []),
        ("a.py::test_e4m3_rows", []),
        ("a.py::test_s7_9_cache", []),
        ("a.py::test_a99_no_such_case", []),
        ("tests/c1_x.py::test_other", []),
    ],
    ids=["two", "of-a-parameter", "none", "a-dtype", "security", "no-such-case", "of-a-file"],
)
def test_ids_stand_at_the_head_of_a_name(nodeid: str, ids: list[str]) -> None:
    assert fault_matrix.ids_of(nodeid) == ids
    file, name = key_of(nodeid)
    assert fault_matrix.ids_of(f"{file}::{name}") == ids


def test_what_another_machine_ran_is_kept_and_failures_are_shown() -> None:
    there = {"backend": "nvlink", "passed": 3}
    old: Record = {"t.py": {"test_e1_x": there, "test_c1_x": {"backend": "cpu", "passed": 2}}}
    new: Record = {
        "t.py": {
            "test_e1_x": {"backend": "nvlink", "skipped": 3, "why": "needs 1 CUDA GPU"},
            "test_c1_x": {"backend": "cpu", "passed": 1, "failed": 1},
        }
    }
    record = merged(new, old, whole=True)
    assert record["t.py"]["test_e1_x"] == there
    lines = {line.split(" | ")[0]: line for line in table(record).splitlines()}
    assert lines["| E1"].endswith("| nvlink | `t.py` | 3 passed |")
    assert lines["| C1"].endswith("| cpu | `t.py` | 1 failed, 1 passed |")
    assert lines["| G5"].endswith("| – | – | needs one GPU |")
    assert lines["| A5"].endswith("| – | – | no test |")
    part = {"t.py": {"test_c1_x": {"backend": "cpu", "passed": 3}}}
    assert merged(part, old, whole=False)["t.py"] == {**old["t.py"], **part["t.py"]}
    assert merged(part, old, whole=True)["t.py"] == part["t.py"]


def test_only_the_table_of_the_page_is_replaced() -> None:
    page = f"before\n{fault_matrix.BEGIN}stale words\n{fault_matrix.END}\nafter\n"
    once = document(page, {})
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "stale words" not in once
    assert document(once, {}) == once
