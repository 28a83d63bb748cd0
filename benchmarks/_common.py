"""What all benchmarks share: the table, the machine, the command line."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Callable[[bool, int], list[Row]]


def machine() -> str:
    """Describe this machine and the date in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    return f"{today}, Python {platform.python_version()}, {platform.system()}, {cores} cores of {model}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Turn rows into cells, a header first; a column is there if any row has it."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]


def as_text(title: str, rows: Sequence[Row]) -> str:
    """Lay out a table for a terminal."""
    cells = table(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([title, *lines, ""])


def as_markdown(title: str, rows: Sequence[Row]) -> str:
    """Lay out a table as Markdown."""
    header, *body = table(rows)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def parser(description: str) -> argparse.ArgumentParser:
    """Make the arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--small", action="store_true", help="the smallest form: it shows that it works, not how fast")
    made.add_argument("--repeat", type=int, default=None, metavar="N", help="runs of each figure (median is shown)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    return made


def report(tables: Sequence[tuple[str, list[Row]]], arguments: argparse.Namespace) -> None:
    """Write the tables where the arguments ask for it."""
    if arguments.json:
        document = {"machine": machine(), "tables": dict(tables)}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown:
        parts = [as_markdown(title, rows) for title, rows in tables]
        arguments.markdown.write_text("\n".join([f"Measured {machine()}.", "", *parts]))


def main(title: str, rows: Rows, argv: Sequence[str] | None = None) -> int:
    """Run one benchmark as a program."""
    arguments = parser(title).parse_args(argv)
    print(machine(), file=sys.stderr)
    found = rows(arguments.small, arguments.repeat or (1 if arguments.small else 5))
    print(as_text(title, found))
    report([(title, found)], arguments)
    return 0


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
