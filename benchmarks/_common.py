"""What all benchmarks share: the table, the machine, the command line."""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.systems import KEYS

Row: TypeAlias = dict[str, Any]
# rows(small, repeat) or rows(small, repeat, systems)
Rows: TypeAlias = Callable[..., list[Row]]
Tables: TypeAlias = Sequence[tuple[str, list[Row]]]

_PACKAGES = ("forgepar", "numpy", "joblib", "distributed", "ray", "rustworkx")
_REPEAT = 5


@functools.cache
def machine() -> str:
    """Describe this machine, the date, what is installed and how busy it was when first asked, in one line."""
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    hardware = f"{cores()} cores of {_cpu()}{busy}"
    versions = ", ".join(f"{name} {version}" for name, version in _versions())
    return f"{today}, Python {platform.python_version()}, {platform.system()}, {hardware}; {versions}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def target(row: Row, name: str, wanted: float, *, at_least: bool = False) -> Row:
    """Return the row with what is wanted of one of its columns, and whether it is so."""
    value = row[name]
    sign = ">=" if at_least else "<="
    met = value >= wanted if at_least else value <= wanted
    return {**row, "target": f"{name} {sign} {wanted:g}", "met": met}


def misses(rows: Sequence[Row]) -> bool:
    """Tell whether a target is missed."""
    return not all(row.get("met", True) for row in rows)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Turn rows into cells, a header first; a column is there if any row has it, what is judged stands last."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns.sort(key=lambda column: ("target", "met", "note").index(column) if column in _LAST else -1)
    return [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]


_LAST = frozenset(("target", "met", "note"))


def as_text(title: str, rows: Sequence[Row]) -> str:
    """Lay out a table for a terminal: words to the left, numbers to the right."""
    cells = table(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    words = [any(isinstance(row.get(column), str) for row in rows) for column in cells[0]]
    lines = [
        "  ".join(
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in cells
    ]
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
    made.add_argument("--repeat", type=_count, default=None, metavar="N", help="runs of each figure (median is shown)")
    made.add_argument("--systems", type=_systems, metavar="A,B", help=f"of {', '.join(KEYS)}; default: all there are")
    made.add_argument("--traces", type=Path, metavar="DIR", help="folder of the workflow traces that replay replays")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    return made


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} runs give no figure; give 1 or more")
    return int(text)


def _systems(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(KEYS)):
        raise argparse.ArgumentTypeError(f"no system {', '.join(unknown)}; there are {', '.join(KEYS)}")
    return chosen


def measure(rows: Rows, arguments: argparse.Namespace) -> list[Row]:
    """Call a benchmark's ``rows`` with what the arguments say and what it takes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves by the blocks that end what was started
    if arguments.traces:
        os.environ["FORGEPAR_TRACES"] = str(arguments.traces)
    repeat = arguments.repeat or (1 if arguments.small else _REPEAT)
    takes_systems = "systems" in inspect.signature(rows).parameters
    return rows(arguments.small, repeat, arguments.systems) if takes_systems else rows(arguments.small, repeat)


def report(tables: Tables, arguments: argparse.Namespace) -> None:
    """Write the tables where the arguments ask for it."""
    if arguments.json:
        document = {"machine": machine(), "tables": dict(tables)}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown:
        parts = [as_markdown(title, rows) for title, rows in tables]
        arguments.markdown.write_text("\n".join([f"Measured {machine()}.", "", *parts]))


def main(title: str, rows: Rows, argv: Sequence[str] | None = None, *, must_meet: bool = False) -> int:
    """Run one benchmark as a program; the exit code is 1 where it must meet its targets and misses one."""
    arguments = parser(title).parse_args(argv)
    print(machine(), file=sys.stderr)
    found = measure(rows, arguments)
    print(as_text(title, found))
    report([(title, found)], arguments)
    return int(must_meet and misses(found))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
