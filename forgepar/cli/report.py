"""The commands ``report`` and ``plan``: an HTML report, and forecasts, of a stored run."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgepar.cli.base import DONE, Commands, add_json, check_output, path_of, print_json, tried
from forgepar.cli.store import add_run, store_command
from forgepar.report.forecast import parse_workers, plan_table, plan_text
from forgepar.report.html.report import write_report
from forgepar.store.reader import Store
from forgepar.system.escaping import escaped

_WORKERS = "1..128"


def add_to(commands: Commands) -> None:
    """Add the commands to the command line."""
    command = store_command(
        commands,
        "report",
        report,
        "write a report of a run as one HTML file",
        ["runs.db", "runs.db 3 -o run.html"],
    )
    add_run(command)
    command.add_argument(
        "-o",
        "--output",
        type=path_of,
        metavar="FILE",
        default=Path("run.html"),
        help="write here (default: run.html)",
    )
    command = store_command(
        commands,
        "plan",
        plan,
        "print how long a run would take with other numbers of workers",
        ["runs.db", "runs.db last -w 1..64 --json"],
    )
    add_run(command)
    command.add_argument(
        "-w",
        "--workers",
        default=_WORKERS,
        metavar="N",
        help=f"numbers such as 8, 1,2,4 or 1..64 (default: {_WORKERS})",
    )
    add_json(command)


def report(arguments: argparse.Namespace) -> int:
    """Write the report of a run."""
    check_output("-o", arguments.output)
    with Store.open(arguments.store) as store:
        table = store.run(arguments.run).table()
    code = tried(lambda: write_report(table, arguments.output))
    if code == DONE:
        print(f"report in {arguments.output}")
    return code


def plan(arguments: argparse.Namespace) -> int:
    """Print how long a run would take."""
    workers = parse_workers(arguments.workers)
    with Store.open(arguments.store) as store:
        table = store.run(arguments.run).table()
    rows = plan_table(table, workers)
    if arguments.json:
        print_json([row._asdict() for row in rows])
    else:
        print(escaped(plan_text(table, rows)))
    return DONE
