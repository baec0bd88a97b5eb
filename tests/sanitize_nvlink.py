#!/usr/bin/env python3
"""Kernels of ours under compute-sanitizer: no bad access, no race in shared memory.

    python tests/sanitize_nvlink.py                 every tool and program, one after the other
    python tests/sanitize_nvlink.py --tools racecheck --programs alone --seconds 20

Programs are the long random one of tests/stress with a rank alone, which waits for nobody but
itself, and with two that wait for each other; and the loopback suite, all of it, in some parts. The
random ones end well after --seconds of rounds, and each program, or part, is ended after --limit.

The tool may lose a launch, says so, and the ranks that wait for that kernel fail. Then that program
is run once more, or twice, unless the tool found something besides. A record is one JSON line. The
exit code is 1 unless all was clean: every program ended well, and each summary counts nothing.
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
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# Tools and their options. Calls that CUDA refuses are ours to handle, not bad accesses.
# Of torch's kernels racecheck would only be slow.
TOOLS = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--kernel-name", "kernel_substring=_ZN2ep7kernels"),
}
# Not of the host: what the tool keeps for them holds Python's frames, whose tensors then never die.
BACKTRACES = ("--show-backtrace", "device")
# A kernel that is loaded at its first launch waits until none runs. Where ranks are threads of one
# process, one runs that waits for the rank of this launch.
LOADING = {"CUDA_MODULE_LOADING": "EAGER"}
SLOWED = {"EP_TESTS_SLOWED": "5"}
SUITE = "suite"

FOUND = 7  # exit code when something was found
TOOL_FAILED = "Internal Sanitizer Error"
REPEATS = 2
PARTS = 4
_SUMMARY = re.compile(r"^=+ +((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)$", re.MULTILINE)


def stress(ranks: int, seed: int, seconds: float) -> list[str]:
    return [
        *(str(TESTS / "stress_nvlink.py"), "--loopback", "--ranks", str(ranks)),
        *("--worlds", "small,few-experts", "--seed", str(seed)),
        *("--seconds", str(seconds), "--limit", str(10 * seconds + 60)),
    ]


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "launch_turns")
LOOPBACK = TESTS / "test_nvlink_loopback.py"


PROGRAMS = ("alone", "pair", SUITE)


def commands(program: str, seed: int, seconds: float, parts: int) -> list[list[str]]:
    """What Python is to run, one after the other."""
    if program == SUITE:
        return parts_of_suite(parts)
    return [stress(1 if program == "alone" else 2, seed, seconds)]


def parts_of_suite(parts: int) -> list[list[str]]:
    """All cases of the suite, dealt out in turn."""
    if parts < 1:
        raise ValueError(f"{parts} parts")
    command = [sys.executable, *PYTEST, "--collect-only", str(LOOPBACK)]
    listed = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True).stdout
    cases = [line.partition("::")[2] for line in listed.splitlines() if "::" in line]
    if len(cases) < parts:
        raise ValueError(f"{len(cases)} cases for {parts} parts; pytest said: {listed}")
    return [[*PYTEST, *(f"{LOOPBACK}::{c}" for c in cases[i::parts])] for i in range(parts)]


def said(program: str, arguments: list[str], output: str) -> str | None:
    """How the program itself says that all went well, and that all of it ran."""
    if program != SUITE:
        line = re.search("^ok: .*$", output, re.MULTILINE)
        return line[0] if line else None
    cases = sum("::" in argument for argument in arguments)
    line = re.search(rf"^{cases} passed in .*$", output, re.MULTILINE)
    return line[0] if line else None


def found(output: str) -> int | None:
    """What the tool counted, hazards or errors, but for failures of its own; None: it did not."""
    summaries = _SUMMARY.findall(output)
    return int(summaries[-1][1]) - output.count(TOOL_FAILED) if summaries else None


def run(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: ended by us) and output, which goes to our stdout, too."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, **LOADING, **SLOWED, "PYTHONPATH": path},
    )  # fmt: skip
    code: int | None = None
    try:
        output, _ = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
    except BaseException:
        end(process)
        raise
    print(output, flush=True)
    return code, output


def end(process: subprocess.Popen[str]) -> None:
    """The tool, and what runs under it."""
    os.killpg(process.pid, signal.SIGKILL)


def run_again(command: list[str], limit_s: float) -> tuple[int | None, str, int]:
    """The same, and how often the tool itself had failed."""
    for failed in range(REPEATS + 1):
        code, output = run(command, limit_s)
        if TOOL_FAILED not in output:
            return code, output, failed
        if (found(output) or 0) > 0:
            break
    return code, output, failed + 1


def check(
    tool: str, program: str, seed: int, seconds: float, limit_s: float, parts: int = PARTS
) -> dict[str, Any]:
    """A record. What the program and the tool print goes to our stdout."""
    command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *BACKTRACES]
    command += ["--error-exitcode", str(FOUND), sys.executable]
    begun, lost, clean = time.monotonic(), 0, True
    codes: list[int | None] = []
    summaries: Counter[str] = Counter()
    done: list[str | None] = []
    for arguments in commands(program, seed, seconds, parts):
        code, output, failed = run_again([*command, *arguments], limit_s)
        codes.append(code)
        summaries.update([_SUMMARY.findall(output)[-1][0]] if found(output) is not None else [])
        done.append(said(program, arguments, output))
        clean = clean and found(output) == 0 and TOOL_FAILED not in output
        lost += failed
    bad = [code for code in codes if code != 0]
    return {
        "case": "sanitizer",
        "tool": tool,
        "program": program,
        "seed": seed,
        "correct": clean and not bad and all(done),
        "exit": bad[0] if bad else 0,  # null: it took longer than it may
        "summary": "; ".join(s if n == 1 else f"{n} x {s}" for s, n in summaries.items()) or None,
        "tool_failed": lost,
        "done": "; ".join(line for line in done if line) or None,
        "seconds": round(time.monotonic() - begun, 1),
        "command": f"python tests/sanitize_nvlink.py --tools {tool} --programs {program}"
        + (f" --parts {parts}" if program == SUITE else f" --seconds {seconds:g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, each")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds, each")
    parser.add_argument("--parts", type=int, default=PARTS, help="of the suite")
    parser.add_argument("--json", type=Path, help="append records to this file")
    o = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer was not found")
    records = []
    for tool in o.tools:
        for program in o.programs:
            record = check(tool, program, o.seed, o.seconds, o.limit, o.parts)
            print(json.dumps(record), flush=True)
            if o.json is not None:
                with o.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            records.append(record)
    sys.exit(0 if all(r["correct"] for r in records) else 1)


if __name__ == "__main__":
    main()
