"""``python -m benchmarks [WORKLOAD ...]``: one table a workload, measured in one run.

python -m benchmarks overhead metg --repeat 5 --systems forgepar,joblib --markdown tables.md
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._common import Row, as_text, machine, measure, misses, parser, report

WORKLOADS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/run.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run workloads and print a table each; the exit code is 1 where one misses a target that it must meet."""
    arguments_of = parser("Run benchmarks.")
    arguments_of.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"{', '.join(WORKLOADS)}; default: all")
    arguments = arguments_of.parse_args(argv)
    if unknown := set(arguments.workloads) - set(WORKLOADS):
        arguments_of.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    print(machine(), end="\n\n", flush=True)
    tables: list[tuple[str, list[Row]]] = []
    exit_code = 0
    for name in arguments.workloads or WORKLOADS:
        module = importlib.import_module(f"benchmarks.{name}.run")
        rows = measure(module.rows, arguments)
        print(as_text(module.TITLE, rows), flush=True)
        tables.append((module.TITLE, rows))
        if getattr(module, "MUST_MEET", False) and misses(rows):
            exit_code = 1
    report(tables, arguments)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
