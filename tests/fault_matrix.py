"""The table in docs/reliability.md, written from what ran.

    pytest --fault-matrix          run every test that stands for a case; record; write the table
    python tests/fault_matrix.py   write the table again from the record

The record, tests/faults/record.json, keeps for each test and backend how its runs ended. Tests that
this machine skips keep what another machine recorded.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/faults"))

from cases import CASES, ids_of  # noqa: E402

RECORD: Final = ROOT / "tests/faults/record.json"
DOCUMENT: Final = ROOT / "docs/reliability.md"
NO_GPU: Final = "no GPU where it was recorded"
BEGIN: Final = "<!-- matrix: written by pytest --fault-matrix -->\n"
END: Final = "<!-- end of the matrix -->"

# file -> name -> {"backend": ..., "passed": how many, ...}; a name without its parameters, but with
# the head of one that names a case.
Record = dict[str, dict[str, dict[str, Any]]]


def key_of(nodeid: str) -> tuple[str, str]:
    """File and name under which a test is recorded: its cases, and who it is without parameters."""
    file, _, name = nodeid.partition("::")
    function, _, parameters = name.partition("[")
    head = parameters.partition("-")[0] if ids_of(f"[{parameters}") else ""
    return file, f"{function}[{head}]" if head else function


def backend_of(item: pytest.Item) -> str:
    gpu = any(item.get_closest_marker(name) for name in ("gpu", "gpus", "sanitizer"))
    if gpu:
        return "nvlink"
    return "collective" if "collective" in item.path.name else "cpu"


class Recorder:
    """Plugin: keeps only tests with an id, and writes down how they end."""

    def __init__(self) -> None:
        self.record: Record = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if not ids_of(item.nodeid)]
        items[:] = [item for item in items if ids_of(item.nodeid)]
        config.hook.pytest_deselected(items=others)
        for item in items:
            file, name = key_of(item.nodeid)
            entry = self.record.setdefault(file, {}).setdefault(name, {})
            entry["backend"] = backend_of(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        file, name = key_of(report.nodeid)
        entry = self.record[file][name]
        entry[report.outcome] = entry.get(report.outcome, 0) + 1
        if report.skipped:
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")  # type: ignore[index]
            entry["why"] = NO_GPU if entry["backend"] == "nvlink" else reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        option = session.config.option
        if option.collectonly:
            return
        whole = session.config.args == ["tests"] and not (option.keyword or option.markexpr)
        record = merged(self.record, read(), whole=whole)
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        write_document()


def merged(new: Record, old: Record, whole: bool) -> Record:
    """What ran now; where nothing of a test could run, what ran elsewhere before.

    Args:
        whole: every test was looked at, so what is only in the old record is no more.
    """
    result: Record = {} if whole else {file: dict(tests) for file, tests in old.items()}
    for file, tests in new.items():
        for name, entry in tests.items():
            before = old.get(file, {}).get(name, {})
            keep = before.get("passed") and not entry.get("passed") and not entry.get("failed")
            result.setdefault(file, {})[name] = before if keep else entry
    return result


def read() -> Record:
    record: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record


def table(record: Record) -> str:
    """The matrix as Markdown."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {case: [] for case in CASES}
    for file, tests in sorted(record.items()):
        for name, entry in tests.items():
            for case in ids_of(f"::{name}"):
                found[case].append((file, entry))
    lines = ["| id | case | expected | backends | tests | outcome |", "|---|---|---|---|---|---|"]
    for case, row in CASES.items():
        entries = [entry for _, entry in found[case]]
        backends = ", ".join(sorted({e["backend"] for e in entries if e.get("passed")})) or "–"
        files = ", ".join(f"`{file}`" for file in sorted({file for file, _ in found[case]})) or "–"
        cells = (case, row.what, row.expected, backends, files, outcome(case, entries))
        lines.append(f"| {' | '.join(cells)} |")
    ran = [c for c in CASES if any(e.get("passed") for _, e in found[c])]
    summary = f"{len(ran)} of {len(CASES)} cases ran."
    return "\n".join([*lines, "", summary, ""])


def outcome(case: str, entries: list[dict[str, Any]]) -> str:
    """What came of all tests of a case."""
    total = Counter[str]()
    for entry in entries:
        total.update({how: entry.get(how, 0) for how in ("failed", "passed", "skipped")})
    parts = [f"{number} {how}" for how, number in total.items() if number]
    skipped = {entry["why"] for entry in entries if entry.get("skipped")}
    text = ", ".join(parts)
    if skipped:
        text += f" ({'; '.join(sorted(skipped))})"
    if not total["passed"] and CASES[case].needs:
        return f"needs {CASES[case].needs}" + (f"; {text}" if text else "")
    return text or "no test"


def document(text: str, record: Record) -> str:
    """The page with its table in place of the old one."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n" + table(record) + "\n" + END + tail


def write_document() -> None:
    DOCUMENT.write_text(document(DOCUMENT.read_text(), read()))


if __name__ == "__main__":
    write_document()
