"""The share of branches that the suite takes: of coverage.py's JSON, to bench/results.

    python -m tests.reliability.coverage build/coverage/coverage.json

A branch is one way out of a line that has several. Exits with 1 below LEAST.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.results_file import write_results

FOLDERS = {"adarank_fast": "adarank_fast/", "adarank_kernels": "kernels/adarank_kernels/"}
LEAST = 92.0
SHOWN = 12


def main() -> None:
    files = json.loads(Path(sys.argv[1]).read_text())["files"]
    rows, missed = {}, []
    # not the copies that tests install elsewhere
    for package, folder in {**FOLDERS, "both": (*FOLDERS.values(),)}.items():
        found = {name: row["summary"] for name, row in files.items() if name.startswith(folder)}
        sums = {
            key: sum(row[key] for row in found.values())
            for key in ("num_branches", "covered_branches", "num_statements", "covered_lines")
        }
        share = 100 * sums["covered_branches"] / sums["num_branches"]
        lines = 100 * sums["covered_lines"] / sums["num_statements"]
        rows[package] = {**sums, "branches": round(share, 2), "lines": round(lines, 2)}
        missed = sorted(found.items(), key=lambda item: -item[1]["missing_branches"])
        print(f"{package}: {share:.2f}% of {sums['num_branches']} branches, {lines:.2f}% of lines")
    for name, row in missed[:SHOWN]:
        print(f"  {name}: {row['missing_branches']} of {row['num_branches']} branches missed")
    write_results("coverage", rows)
    if rows["both"]["branches"] < LEAST:
        sys.exit(f"below {LEAST}%")


if __name__ == "__main__":
    main()
