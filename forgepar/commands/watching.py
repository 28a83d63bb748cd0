"""Looking at a run while it goes: ``top`` for one in another process, and the display of ``run --watch``."""

from __future__ import annotations

import argparse
import socket
import sys
from contextlib import suppress
from dataclasses import asdict

from forgepar.commands.base import DONE, Commands, add_json, note, print_json
from forgepar.commands.stores import add_run, store_command
from forgepar.displays import Display
from forgepar.report import wording
from forgepar.report.figures import Figures, Meter
from forgepar.report.plainprogress import line
from forgepar.report.progress import has_rich
from forgepar.report.terminal import is_terminal
from forgepar.store import Store, StoredRun


def add_to(commands: Commands) -> None:
    """Add this command to the command line."""
    command = store_command(
        commands, "top", top, "watch a run of another process, by its store", ["runs.db", "runs.db last --json"]
    )
    add_run(command)
    add_json(command)


def top(arguments: argparse.Namespace) -> int:
    """Watch a run until it ends; without a terminal, tell once how it stands."""
    with Store.open(arguments.store) as store:
        run = store.run(arguments.run)
        if arguments.json:
            print_json(_as_json(Meter().of_table(run.table()), run))
        elif run.facts.status != "running" or not is_terminal(sys.stdout):
            print(_told(Meter().of_table(run.table()), run))
        else:
            _need_rich("top")
            with suppress(KeyboardInterrupt):  # it ends the view, which is all that runs here
                _watch(run)
            note(arguments, _told(Meter().of_table(run.table()), run))
    return DONE


def watching_display() -> Display:
    """Return the display of ``run --watch``."""
    if not is_terminal(sys.stderr):
        raise ValueError("--watch needs a terminal, and standard error is none. Leave it out, or give --progress.")
    _need_rich("--watch")
    from forgepar.report.live import LiveProgress

    return LiveProgress()


def _watch(run: StoredRun) -> Figures:
    from forgepar.report.live import watch_table

    facts = run.facts
    return watch_table(run.table, facts.pid if facts.host == socket.gethostname() else None)


def _need_rich(what: str) -> None:
    if not has_rich():
        raise ValueError(f"{what} needs rich, which is not installed: pip install 'forgepar[cli]'")


def _told(figures: Figures, run: StoredRun) -> str:
    status = run.facts.status
    told = line(figures) if status == "running" else wording.ended(figures)
    return f"run {run.number} {'runs' if status == 'running' else status}: {told}"


def _as_json(figures: Figures, run: StoredRun) -> dict[str, object]:
    left_out = ("running", "pids", "bytes_held")  # of which a store knows nothing
    told = {name: value for name, value in asdict(figures).items() if name not in left_out}
    layers = [layer._asdict() for layer in figures.layers]
    return {"run": run.number, "status": run.facts.status, **told, "layers": layers}
