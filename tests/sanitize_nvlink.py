#!/usr/bin/env python3
"""Kernels of ours under compute-sanitizer: no bad access, no race in shared memory.

    python tests/sanitize_nvlink.py                 every tool, one after the other, but for `suite`
    python tests/sanitize_nvlink.py --tools racecheck --programs alone --seconds 20
    python tests/sanitize_nvlink.py --programs suite --limit 600

Programs are the long random one of tests/stress with a rank alone, which waits for nobody but
itself, and with two that wait for each other; cases of the loopback suite; and all of that suite.
The random ones end well after --seconds of rounds, and each is ended after --limit. A record is one
JSON line. The exit code is 1 unless all was clean.
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
_SUMMARY = re.compile(r"^=+ +((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)


def stress(ranks: int, seed: int, seconds: float) -> list[str]:
    return [
        *(str(TESTS / "stress_nvlink.py"), "--loopback", "--ranks", str(ranks)),
        *("--worlds", "small,few-experts", "--seed", str(seed)),
        *("--seconds", str(seconds), "--limit", str(10 * seconds + 60)),
    ]


def programs(seed: int, seconds: float) -> dict[str, list[str]]:
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest.append(str(TESTS / "test_nvlink_loopback.py"))
    return {
        "alone": stress(1, seed, seconds),
        "pair": stress(2, seed, seconds),
        "loopback": [*pytest, "-k", CASES],
        SUITE: pytest,
    }


def said(program: str, output: str) -> bool:
    """Whether the program itself says that all went well."""
    ends_well = r"\d passed" if program in ("loopback", SUITE) else "^ok: "
    return bool(re.search(ends_well, output, re.MULTILINE))


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


def check(tool: str, program: str, seed: int, seconds: float, limit_s: float) -> dict[str, Any]:
    """A record. What the program and the tool print goes to our stdout."""
    command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *BACKTRACES]
    command += ["--error-exitcode", str(FOUND), sys.executable]
    begun = time.monotonic()
    code, output = run([*command, *programs(seed, seconds)[program]], limit_s)
    print(output, flush=True)
    summary = _SUMMARY.findall(output)
    ok = re.search(r"^ok: .*$", output, re.MULTILINE)
    return {
        "case": "sanitizer",
        "tool": tool,
        "program": program,
        "seed": seed,
        "correct": code == 0 and said(program, output),
        "exit": code,  # null: it took longer than it may
        "summary": summary[-1] if summary else None,
        "done": ok[0] if ok else None,
        "seconds": round(time.monotonic() - begun, 1),
        "command": f"python tests/sanitize_nvlink.py --tools {tool} --programs {program}",
    }


def main() -> None:
    names = list(programs(0, 1.0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--programs", nargs="+", choices=names, default=FEW)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, each")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds, each")
    parser.add_argument("--json", type=Path, help="append records to this file")
    o = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer was not found")
    records = []
    for tool in o.tools:
        for program in o.programs:
            record = check(tool, program, o.seed, o.seconds, o.limit)
            print(json.dumps(record), flush=True)
            if o.json is not None:
                with o.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            records.append(record)
    sys.exit(0 if all(r["correct"] for r in records) else 1)


if __name__ == "__main__":
    main()
