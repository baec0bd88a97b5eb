#!/usr/bin/env python3
"""Print what `ep-comm bench --json` wrote, for people.

python bench/compare.py bench/results/*.jsonl                  every record, a table per case
python bench/compare.py after.jsonl --before before.jsonl      the same cases in two runs
"""

import argparse
from pathlib import Path

from rich.console import Console

from ep_comm.bench.report import comparison, read_jsonl, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of ep-comm bench")
    parser.add_argument("--before", type=Path, help="compare with this earlier run")
    options = parser.parse_args()

    console = Console()
    if not console.is_terminal:
        console.width = 140
    if options.before is not None:
        after = [record for path in options.files for record in read_jsonl(path)]
        console.print(comparison(read_jsonl(options.before), after))
        return
    for path in options.files:
        console.rule(str(path), align="left")
        console.print(tables(read_jsonl(path)))


if __name__ == "__main__":
    main()
