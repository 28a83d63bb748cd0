"""The commands that ask a run store, or clear it: ``runs``, ``show``, ``values``, ``export`` and ``gc``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgepar.audit import line_of
from forgepar.collecting import collect
from forgepar.commands.base import DONE, Commands, add_command, add_json, print_json, print_value
from forgepar.escaping import escaped
from forgepar.machine import as_bytes, as_text
from forgepar.pickling import dumps_by_value
from forgepar.report.trace import trace_pieces
from forgepar.report.wfformat import wfformat_pieces
from forgepar.report.writing import write_pieces
from forgepar.runtable import RunTable
from forgepar.store import RunFacts, Store, StoredRun

_STORE_HELP = "the file of a run store, as run --store makes it, in a folder that no other user may write to"
_RUN_HELP = "number or id of a run, or the beginning of its id; the last one if left out, or if it is 'last'"
_MOST_FAILURES = 10  # whose tracebacks are shown
_MOST_SLOWEST = 10
_SHORT_ID = 8


def add_to(commands: Commands) -> None:
    """Add these commands to the command line."""
    command = store_command(commands, "runs", runs, "list the runs in a store", ["runs.db", "runs.db --json"])
    add_json(command)
    command = store_command(
        commands,
        "show",
        show,
        "tell what a run did: layers, slowest tasks, failures, bytes",
        ["runs.db", "runs.db 3 --json"],
    )
    add_run(command)
    command.add_argument("--all", action="store_true", help="show every failure")
    add_json(command)
    command = store_command(
        commands,
        "values",
        values,
        "print the value of a task, or list those that a run has",
        ["runs.db last", "runs.db last report"],
    )
    command.add_argument("run", metavar="RUN", nargs="?", help=_RUN_HELP)
    command.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="of a task: its value is unpickled, which runs the code of the store's owner; "
        "the values are listed if it is left out",
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the value there, as a pickle")
    add_json(command)
    command = store_command(
        commands,
        "export",
        export,
        "write a run in a form that other programs read",
        ["runs.db last -o run.jsonl", "runs.db 3 --format wfformat -o run.json"],
    )
    add_run(command)
    command.add_argument(
        "--format",
        choices=tuple(_FORMATS),
        default="jsonl",
        help="a line of JSON an event (default), WfFormat 1.5, or a trace",
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to; standard output if left out")
    command = store_command(
        commands, "gc", gc, "remove old runs and values from a store", ["runs.db --keep 10", "runs.db --max-bytes 2GiB"]
    )
    command.add_argument("--keep", type=_count, metavar="N", help="keep only the newest N runs")
    command.add_argument(
        "--max-bytes", type=_size, metavar="SIZE", help="remove values of the oldest runs, until the rest is no larger"
    )
    add_json(command)


def runs(arguments: argparse.Namespace) -> int:
    """Print a line a run."""
    with Store.open(arguments.store) as store:
        found = store.runs()
    if arguments.json:
        print_json([asdict(facts) for facts in found])
        return DONE
    if not found:
        print(f"{arguments.store} has no runs")
    for line in _in_columns(
        ["run", "id", "workflow", "status", "began", "took", "tasks", "layers", "workers"],
        [
            (
                facts.number,
                facts.run_id[:_SHORT_ID],
                facts.workflow,
                facts.status + (" (resumed)" if facts.is_resumed else ""),
                _date(facts.began_at),
                _seconds(facts.wall_seconds),
                facts.n_tasks,
                facts.n_layers,
                facts.n_workers,
            )
            for facts in found
        ],
        left=(1, 2, 3, 4),
    ):
        print(line)
    return DONE


def show(arguments: argparse.Namespace) -> int:
    """Print what a run did."""
    with Store.open(arguments.store) as store:
        run = store.run(arguments.run)
        facts, table = run.facts, run.table()
    if arguments.json:
        print_json(_as_json(facts, table))
        return DONE
    for line in _description(facts, table, most=len(table.failures) if arguments.all else _MOST_FAILURES):
        print(escaped(line))
    return DONE


def values(arguments: argparse.Namespace) -> int:
    """Print a value, or list those there are."""
    with Store.open(arguments.store) as store:
        run = store.run(arguments.run)
        if arguments.name is None:
            return _list_values(run, as_json=arguments.json)
        value = run.value(arguments.name)
    if arguments.output is not None:
        with _writing(arguments.output):
            write_pieces(arguments.output, [dumps_by_value(value)])
    elif arguments.json:
        print_json(value)
    else:
        print_value(value)
    return DONE


def export(arguments: argparse.Namespace) -> int:
    """Write a run in another form."""
    with Store.open(arguments.store) as store:
        pieces = _FORMATS[arguments.format](store.run(arguments.run))
        if arguments.output is None:
            sys.stdout.writelines(pieces)
        else:
            with _writing(arguments.output):
                write_pieces(arguments.output, pieces)
    return DONE


def gc(arguments: argparse.Namespace) -> int:
    """Remove what is old, and tell how much that was."""
    if arguments.keep is None and arguments.max_bytes is None:
        raise ValueError("gc removes nothing unless told what may stay. Give --keep N, --max-bytes SIZE, or both.")
    collected = collect(arguments.store, keep=arguments.keep, max_bytes=arguments.max_bytes)
    if arguments.json:
        print_json(asdict(collected))
    else:
        print(collected)
    return DONE


_FORMATS: dict[str, Callable[[StoredRun], Iterable[str]]] = {
    "jsonl": lambda run: (line_of(event) + "\n" for event in run.events()),
    "wfformat": lambda run: wfformat_pieces(run.table()),
    "chrome": lambda run: trace_pieces(run.table()),
}


def _list_values(run: StoredRun, *, as_json: bool) -> int:
    found = run.stored_values()
    if as_json:
        print_json([value._asdict() for value in found])
        return DONE
    rows = [(value.name, as_text(value.n_bytes), value.made_by) for value in found]
    for line in _in_columns(["task", "size", "made by run"], rows, left=(0,)):
        print(line)
    return DONE


def _description(facts: RunFacts, table: RunTable, most: int) -> Iterator[str]:
    """Yield the lines that tell of a run."""
    counts = ", ".join(f"{n} {status}" for status, n in table.status_counts().items())
    yield f"run {facts.number} ({facts.run_id}) of {facts.workflow!r}: {facts.status}{' (resumed)' * facts.is_resumed}"
    took = f"took {_seconds(facts.wall_seconds)} on {facts.n_workers} workers"
    yield f"began {_date(facts.began_at)}, {took}, schedule {facts.schedule}"
    yield f"on {facts.host}, pid {facts.pid}, Python {facts.python}, forgepar {facts.forgepar}"
    yield f"tasks: {counts}"
    yield (
        f"CPU {_seconds(facts.cpu_seconds)}, largest worker {as_text(facts.peak_rss)}, "
        f"values {as_text(int(table.bytes.sum()))}"
    )
    if n_again := len(table.failures) - len(table.errors):
        yield f"attempts that failed and were made again: {n_again}"
    yield ""
    yield from _in_columns(
        ["layer", "tasks", "wall", "longest", "work", "longest task"],
        [
            (
                row.layer,
                row.n_tasks,
                _seconds(row.wall_seconds),
                _seconds(row.longest_seconds),
                _seconds(row.work_seconds),
                row.longest_task,
            )
            for row in table.layer_table()
        ],
        left=(5,),
    )
    yield ""
    yield from _in_columns(
        ["slowest task", "layer", "took", "worker", "attempt", "bytes"],
        [
            (
                table.names[task],
                int(table.layer[task]),
                _seconds(float(table.seconds[task])),
                int(table.worker[task]),
                int(table.attempt[task]),
                as_text(int(table.bytes[task])),
            )
            for task in table.slowest(_MOST_SLOWEST).tolist()
        ],
        left=(0,),
    )
    yield from _told_failures(table, most)


def _told_failures(table: RunTable, most: int) -> Iterator[str]:
    for failure in table.failures[:most]:
        yield ""
        yield f"task {table.names[failure.task]!r} failed at attempt {failure.attempt}: {failure.error}"
        yield from ("  " + line for line in failure.traceback.splitlines())
    if len(table.failures) > most:
        yield f"... and {len(table.failures) - most} more failed attempts (--all)"


def _as_json(facts: RunFacts, table: RunTable) -> dict[str, Any]:
    return {
        **asdict(facts),
        "counts": table.status_counts(),
        "bytes": int(table.bytes.sum()),
        "layers": [asdict(row) for row in table.layer_table()],
        "tasks": list(table),
        "failures": [{**failure._asdict(), "task": table.names[failure.task]} for failure in table.failures],
    }


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Give another -o.") from error


def _in_columns(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = ()) -> list[str]:
    """Lay rows out below their heads, numbers to the right and the columns ``left`` to the left; [] where none are."""
    if not rows:
        return []
    texts = [list(head), *([_shown(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]


def _shown(text: str) -> str:
    """Return a text as it fits a line: names may hold whatever a terminal would obey."""
    return text if text.isprintable() else repr(text)[1:-1]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no count. Give 0 or more.")
    return int(text)


def _size(text: str) -> int:
    try:
        return as_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def store_command(
    commands: Commands, name: str, function: Any, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a command about a store, which is its first argument."""
    command = add_command(commands, name, function, text, examples)
    command.add_argument("store", metavar="STORE", type=Path, help=_STORE_HELP)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    """Have a command take a run of its store."""
    command.add_argument("run", metavar="RUN", nargs="?", help=_RUN_HELP)
