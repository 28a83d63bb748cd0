"""The commands ``runs``, ``show``, ``values``, ``export`` and ``gc``, which take a run store."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgepar.cli.base import DONE, Commands, add_command, add_json, check_output, path_of, print_json, print_value
from forgepar.machine import as_bytes, as_text
from forgepar.records.audit_log import line_of
from forgepar.records.table import RunTable
from forgepar.report.export.trace import trace_pieces
from forgepar.report.export.wfformat import wfformat_pieces
from forgepar.report.export.writing import write_pieces
from forgepar.store.gc import collect
from forgepar.store.reader import Store, StoredRun
from forgepar.store.run_facts import RunFacts
from forgepar.system.escaping import escaped
from forgepar.values.pickling import dumps_by_value

_STORE_HELP = "the file that run --store wrote; its folder must not be writable by other users"
_RUN_HELP = "number or id of a run, or a prefix of its id; last: the last run (default: last)"
_MOST_FAILURES = 10  # failures that are shown with their tracebacks
_MOST_SLOWEST = 10
_SHORT_ID = 8
_MOST_DIGITS = 18  # fits an integer of SQLite


def add_to(commands: Commands) -> None:
    """Add the commands to the command line."""
    command = store_command(commands, "runs", runs, "list the runs in a store", ["runs.db", "runs.db --json"])
    add_json(command)
    command = store_command(
        commands, "show", show, "print layers, slowest tasks and failures of a run", ["runs.db", "runs.db 3 --json"]
    )
    add_run(command)
    command.add_argument("--all", action="store_true", help="show every failure")
    add_json(command)
    _add_values(commands)
    _add_export(commands)
    command = store_command(
        commands, "gc", gc, "remove old runs and values from a store", ["runs.db --keep 10", "runs.db --max-bytes 2GiB"]
    )
    command.add_argument("--keep", type=_count, metavar="N", help="keep only the newest N runs")
    command.add_argument(
        "--max-bytes", type=_size, metavar="SIZE", help="remove values of the oldest runs until at most SIZE remains"
    )
    add_json(command)


def _add_values(commands: Commands) -> None:
    command = store_command(
        commands,
        "values",
        values,
        "print the value of a task, or list the stored values of a run",
        ["runs.db last", "runs.db last report"],
    )
    add_run(command)
    command.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="the task; its value is unpickled, which runs the code of the store's owner (default: list the values)",
    )
    command.add_argument("-o", "--output", type=path_of, metavar="FILE", help="write the value to a file, pickled")
    add_json(command)


def _add_export(commands: Commands) -> None:
    command = store_command(
        commands,
        "export",
        export,
        "write a run in a format of other programs",
        ["runs.db last -o run.jsonl", "runs.db 3 --format wfformat -o run.json"],
    )
    add_run(command)
    command.add_argument(
        "--format",
        choices=tuple(_FORMATS),
        default="jsonl",
        help="jsonl: one event per line (default); wfformat: WfFormat 1.5; chrome: a trace",
    )
    command.add_argument("-o", "--output", type=path_of, metavar="FILE", help="write here (default: standard output)")


def runs(arguments: argparse.Namespace) -> int:
    """Print one line per run."""
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
    """Print the layers, slowest tasks and failures of a run."""
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
    """Print a value, or list the values of a run."""
    check_output("-o", arguments.output)
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
    """Write a run in another format."""
    check_output("-o", arguments.output)
    with Store.open(arguments.store) as store:
        pieces = _FORMATS[arguments.format](store.run(arguments.run))
        if arguments.output is None:
            sys.stdout.writelines(pieces)
        else:
            with _writing(arguments.output):
                write_pieces(arguments.output, pieces)
    return DONE


def gc(arguments: argparse.Namespace) -> int:
    """Remove old runs and values, and print how much was removed."""
    if arguments.keep is None and arguments.max_bytes is None:
        raise ValueError("gc needs a limit. Give --keep N, --max-bytes SIZE, or both.")
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
    """Yield the lines that describe a run."""
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
        yield f"failed attempts that were retried: {n_again}"
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
    yield from _failure_lines(table, most)


def _failure_lines(table: RunTable, most: int) -> Iterator[str]:
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
    """Turn the error of a file that cannot be written into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Give another -o.") from error


def _in_columns(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = ()) -> list[str]:
    """Align rows below a head, right-justified except for the columns ``left``. Without rows, return []."""
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
    """Return a text for one cell, with unprintable characters escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"expected an integer of at most {_MOST_DIGITS} digits, 0 or more, got {text!r}."
        )
    return int(text)


def _size(text: str) -> int:
    try:
        return as_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def store_command(
    commands: Commands, name: str, function: Any, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a command with a store as its first argument."""
    command = add_command(commands, name, function, text, examples)
    command.add_argument("store", metavar="STORE", type=path_of, help=_STORE_HELP)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    """Add the argument RUN to a command."""
    command.add_argument("run", metavar="RUN", nargs="?", help=_RUN_HELP)
