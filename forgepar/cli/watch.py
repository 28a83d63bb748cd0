"""The command ``top``, which watches a run of another process, and the display of ``run --watch``."""

from __future__ import annotations

import argparse
import socket
import sys
from contextlib import suppress
from dataclasses import asdict

from forgepar.cli.base import DONE, Commands, add_json, note, print_json
from forgepar.cli.store import add_run, store_command
from forgepar.records.display import Display
from forgepar.report.progress import wording
from forgepar.report.progress.display import has_rich
from forgepar.report.progress.figures import Figures, RunMeter
from forgepar.report.progress.plain import line
from forgepar.report.progress.terminal import is_terminal
from forgepar.store.reader import Store, StoredRun


def add_to(commands: Commands) -> None:
    """Add the command to the command line."""
    command = store_command(
        commands, "top", top, "watch a run of another process through its store", ["runs.db", "runs.db last --json"]
    )
    add_run(command)
    add_json(command)


def top(arguments: argparse.Namespace) -> int:
    """Watch a run until it ends. Without a terminal, print its state once."""
    with Store.open(arguments.store) as store:
        run = store.run(arguments.run)
        if arguments.json:
            print_json(_as_json(RunMeter().of_table(run.table()), run))
        elif run.facts.status != "running" or not is_terminal(sys.stdout):
            print(_state(RunMeter().of_table(run.table()), run))
        else:
            _need_rich("top")
            with suppress(KeyboardInterrupt):  # it ends the view only
                _watch(run)
            note(arguments, _state(RunMeter().of_table(run.table()), run))
    return DONE


def watching_display() -> Display:
    """Return the display of ``run --watch``."""
    if not is_terminal(sys.stderr):
        raise ValueError("--watch needs a terminal on standard error. Remove it, or give --progress.")
    _need_rich("--watch")
    from forgepar.report.progress.live import LiveProgress

    return LiveProgress()


def _watch(run: StoredRun) -> Figures:
    from forgepar.report.progress.live import watch_table

    facts = run.facts
    return watch_table(run.table, facts.pid if facts.host == socket.gethostname() else None)


def _need_rich(what: str) -> None:
    if not has_rich():
        raise ValueError(f"{what} needs rich. Install it: pip install 'forgepar[cli]'")


def _state(figures: Figures, run: StoredRun) -> str:
    status = run.facts.status
    text = line(figures) if status == "running" else wording.ended(figures)
    return f"run {run.number} {status}: {text}"


def _as_json(figures: Figures, run: StoredRun) -> dict[str, object]:
    left_out = ("running", "pids", "bytes_held")  # not in a store
    known = {name: value for name, value in asdict(figures).items() if name not in left_out}
    layers = [layer._asdict() for layer in figures.layers]
    return {"run": run.number, "status": run.facts.status, **known, "layers": layers}
