"""The commands that make something of a stored run: ``report`` and ``plan``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgepar.commands.base import DONE, Commands, add_json, print_json, tried
from forgepar.commands.stores import add_run, store_command
from forgepar.escaping import escaped
from forgepar.forecast import parse_workers, plan_table, plan_text
from forgepar.report.html import write_report
from forgepar.store import Store

_WORKERS = "1..128"


def add_to(commands: Commands) -> None:
    """Add these commands to the command line."""
    command = store_command(
        commands,
        "report",
        report,
        "write a run as an HTML file that opens anywhere",
        ["runs.db", "runs.db 3 -o run.html"],
    )
    add_run(command)
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", default=Path("run.html"), help="default: run.html"
    )
    command = store_command(
        commands,
        "plan",
        plan,
        "tell what a run would take with other numbers of workers",
        ["runs.db", "runs.db last -w 1..64 --json"],
    )
    add_run(command)
    command.add_argument(
        "-w", "--workers", default=_WORKERS, metavar="N", help=f"such as 8, 1,2,4 or 1..64 (default: {_WORKERS})"
    )
    add_json(command)


def report(arguments: argparse.Namespace) -> int:
    """Write a run's report."""
    with Store.open(arguments.store) as store:
        table = store.run(arguments.run).table()
    code = tried(lambda: write_report(table, arguments.output))
    if code == DONE:
        print(f"report in {arguments.output}")
    return code


def plan(arguments: argparse.Namespace) -> int:
    """Print what a run would take."""
    workers = parse_workers(arguments.workers)
    with Store.open(arguments.store) as store:
        table = store.run(arguments.run).table()
    rows = plan_table(table, workers)
    if arguments.json:
        print_json([row._asdict() for row in rows])
    else:
        print(escaped(plan_text(table, rows)))
    return DONE
