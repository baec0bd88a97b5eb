#!/usr/bin/env python3
"""Kernels of ours under compute-sanitizer: no bad access, no race in shared memory.

    python tests/sanitize_nvlink.py                 every tool, one after the other, but for `suite`
    python tests/sanitize_nvlink.py --tools racecheck --programs alone --seconds 20
    python tests/sanitize_nvlink.py --programs suite --parts 20 --at-once 4 --limit 120

Programs are the long random one of tests/stress with a rank alone, which waits for nobody but
itself, and with two that wait for each other; cases of the loopback suite; and all of that suite.
The random ones end well after --seconds of rounds, and each is ended after --limit. The suite may
run in several parts, some of them side by side: the tool loses a launch now and then, says so, and
the ranks that wait for that kernel fail. Then that part, or program, is run once more, or twice.
A record is one JSON line. The exit code is 1 unless all was clean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# Tools and their options. Calls that CUDA refuses are ours to handle, not bad accesses.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
# Not of the host: what the tool keeps for them holds Python's frames, whose tensors then never die.
BACKTRACES = ("--show-backtrace", "device")
# A kernel that is loaded at its first launch waits until none runs. Where ranks are threads of one
# process, one runs that waits for the rank of this launch.
LOADING = {"CUDA_MODULE_LOADING": "EAGER"}
CASES = "(ep2 or grouped-scales or quantize-slab or slab-static) and agree"

FEW = ("alone", "pair", "loopback")  # programs of seconds
SUITE = "suite"  # and one of minutes

FOUND = 7  # exit code when something was found
TOOL_FAILED = "Internal Sanitizer Error"
REPEATS = 2
_SUMMARY = re.compile(r"^=+ +((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)


def stress(ranks: int, seed: int, seconds: float) -> list[str]:
    return [
        *(str(TESTS / "stress_nvlink.py"), "--loopback", "--ranks", str(ranks)),
        *("--worlds", "small,few-experts", "--seed", str(seed)),
        *("--seconds", str(seconds), "--limit", str(10 * seconds + 60)),
    ]


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
LOOPBACK = TESTS / "test_nvlink_loopback.py"


def programs(seed: int, seconds: float) -> dict[str, list[str]]:
    return {
        "alone": stress(1, seed, seconds),
        "pair": stress(2, seed, seconds),
        "loopback": [*PYTEST, str(LOOPBACK), "-k", CASES],
        SUITE: [*PYTEST, str(LOOPBACK)],
    }


def parts_of_suite(parts: int) -> list[list[str]]:
    """All cases of the suite, dealt out in turn."""
    command = [sys.executable, *PYTEST, "--collect-only", str(LOOPBACK)]
    listed = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True).stdout
    cases = [line.partition("::")[2] for line in listed.splitlines() if "::" in line]
    return [[*PYTEST, *(f"{LOOPBACK}::{c}" for c in cases[i::parts])] for i in range(parts)]


def said(program: str, output: str) -> str | None:
    """How the program itself says that all went well."""
    ends_well = r"^.*\d passed.*$" if program in ("loopback", SUITE) else "^ok: .*$"
    line = re.search(ends_well, output, re.MULTILINE)
    return line[0] if line else None


def run(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: ended by us) and output."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, **LOADING},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool, and what runs under it
        output, _ = process.communicate()
        return None, output


def run_again(command: list[str], limit_s: float) -> tuple[int | None, str, int]:
    """The same, and how often the tool itself had failed before."""
    failed = 0
    while True:
        code, output = run(command, limit_s)
        if TOOL_FAILED not in output or failed == REPEATS:
            return code, output, failed
        failed += 1


def check(
    tool: str, program: str, seed: int, seconds: float, limit_s: float,
    parts: int = 1, at_once: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """A record. What the program and the tool print goes to our stdout."""
    command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *BACKTRACES]
    command += ["--error-exitcode", str(FOUND), sys.executable]
    programs_run = [programs(seed, seconds)[program]]
    if program == SUITE and parts > 1:
        programs_run = parts_of_suite(parts)
    begun = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(lambda p: run_again([*command, *p], limit_s), programs_run))
    for _, output, _ in ended:
        print(output, flush=True)
    summaries = Counter(s for _, output, _ in ended for s in _SUMMARY.findall(output)[-1:])
    done = [said(program, output) for _, output, _ in ended]
    bad = [code for code, _, _ in ended if code != 0]
    return {
        "case": "sanitizer",
        "tool": tool,
        "program": program,
        "seed": seed,
        "correct": not bad and all(done),
        "exit": bad[0] if bad else 0,  # null: it took longer than it may
        "summary": "; ".join(s if n == 1 else f"{n} x {s}" for s, n in summaries.items()) or None,
        "tool_failed": sum(failed for _, _, failed in ended),
        "done": "; ".join(line for line in done if line) or None,
        "seconds": round(time.monotonic() - begun, 1),
        "command": f"python tests/sanitize_nvlink.py --tools {tool} --programs {program}"
        + (f" --parts {parts} --at-once {at_once}" if parts > 1 else ""),
    }


def main() -> None:
    names = list(programs(0, 1.0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--programs", nargs="+", choices=names, default=FEW)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, each")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds, each")
    parser.add_argument("--parts", type=int, default=1, help="of the suite")
    parser.add_argument("--at-once", type=int, default=1, help="so many of them")
    parser.add_argument("--json", type=Path, help="append records to this file")
    o = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer was not found")
    records = []
    for tool in o.tools:
        for program in o.programs:
            record = check(tool, program, o.seed, o.seconds, o.limit, o.parts, o.at_once)
            print(json.dumps(record), flush=True)
            if o.json is not None:
                with o.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            records.append(record)
    sys.exit(0 if all(r["correct"] for r in records) else 1)


if __name__ == "__main__":
    main()
