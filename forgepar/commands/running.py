"""The commands that run a workflow or look at one: ``run``, ``check`` and ``layers``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgepar.backends.base import Backend
from forgepar.backends.process import START_METHODS
from forgepar.commands.base import (
    BAD_USAGE,
    DONE,
    TASK_FAILED,
    Commands,
    add_json,
    add_target_command,
    complain,
    print_json,
    print_value,
    shown,
    tried,
)
from forgepar.commands.watching import watching_display
from forgepar.console import Escaping
from forgepar.displays import Display
from forgepar.errors import RunTimeout, WorkflowFailed, text_of
from forgepar.escaping import escaped, escaped_line
from forgepar.executor import WorkflowExecutor
from forgepar.machine import available_cpus
from forgepar.priors import Resume
from forgepar.report.html import check_report
from forgepar.report.writing import check_target, write_pieces
from forgepar.result import RunResult
from forgepar.simulate import expected_seconds, simulated_seconds
from forgepar.sinks import Listener
from forgepar.workflow import Workflow

_MOST_VALUES = 20  # printed one a line; more are counted
_MOST_NAMES = 6  # of a layer


def add_to(commands: Commands) -> None:
    """Add these commands to the command line."""
    command = add_target_command(
        commands,
        "run",
        run,
        "run a workflow and print the values of its leaves",
        ["pipeline.py:nightly -w 8 -p day=2024-05-01", "pipeline.py:nightly --watch", "forgepar.examples.census -q"],
    )
    command.add_argument("-w", "--workers", type=int, metavar="N", help="worker processes (default: one a CPU)")
    command.add_argument("--backend", choices=("process", "inline"), default="process")
    command.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="run on a Dask cluster, such as tcp://host:8786; local: on one of --workers processes, made for the run, "
        "and secured by TLS",
    )
    command.add_argument("--start-method", choices=START_METHODS)
    command.add_argument("--schedule", choices=("layers", "eager"), default="layers")
    command.add_argument("--memory-budget", metavar="SIZE", help="most large values to hold in memory, such as 8GiB")
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="end the run after so long")
    command.add_argument("--layer-timeout", type=float, metavar="SECONDS", help="end it if a layer takes longer")
    command.add_argument(
        "--rollback-timeout", type=float, metavar="SECONDS", help="end undoing after so long (default: as --timeout)"
    )
    command.add_argument("--keep-going", action="store_true", help="run all that does not depend on a failed task")
    command.add_argument(
        "--rollback", choices=("all", "upstream", "none"), default="all", help="what to undo if a task fails"
    )
    command.add_argument("--tag-output", action="store_true", help="begin each line that a task prints with its name")
    command.add_argument("--audit", metavar="FILE", help="append what happens to a file, a line of JSON an event")
    command.add_argument("--store", type=Path, metavar="FILE", help="keep the run and its values in a run store")
    command.add_argument(
        "--resume",
        action="store_true",
        help="do not run tasks whose values the store has from earlier runs; "
        "to unpickle these runs the code of the store's owner",
    )
    command.add_argument(
        "--rerun", action="append", default=[], metavar="NAME", help="run this task again, or those like load-*"
    )
    command.add_argument(
        "--from", dest="start_from", action="append", default=[], metavar="NAME", help="and all that follows it, too"
    )
    command.add_argument("--wait", action="store_true", help="wait for a run of the same workflow in the store to end")
    command.add_argument("--save-durations", type=Path, metavar="FILE", help="write how long tasks took, for layers")
    command.add_argument("--summary", action="store_true", help="print each layer's wall time beside its longest task")
    command.add_argument("--report", type=Path, metavar="FILE", help="write what ran where and when as an HTML file")
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show how the run goes (default: if standard error is a terminal)",
    )
    command.add_argument("--watch", action="store_true", help="show workers, layers and failures on the whole screen")
    command = add_target_command(
        commands,
        "check",
        check,
        "print what is likely to go wrong in a workflow, without running it",
        ["pipeline.py:nightly", "pipeline.py:nightly -w 64 --available-memory 256GiB --json"],
    )
    add_json(command)
    command.add_argument("-w", "--workers", type=int, metavar="N", help="workers of the run (default: one a CPU)")
    command.add_argument("--layer-timeout", type=float, metavar="SECONDS", help="that of the run")
    command.add_argument("--rollback", choices=("all", "upstream", "none"), default="all", help="that of the run")
    command.add_argument("--available-memory", metavar="SIZE", help="of the machine it is to run on, such as 64GiB")
    command = add_target_command(
        commands,
        "layers",
        layers,
        "print which tasks run together",
        ["pipeline.py:nightly", "pipeline.py:nightly --durations durations.json -w 8", "pipeline.py:nightly --json"],
    )
    add_json(command)
    command.add_argument("--all", action="store_true", help="print every name")
    command.add_argument(
        "--durations", type=Path, metavar="FILE", help="what --save-durations wrote: print what a run would take"
    )
    command.add_argument("-w", "--workers", type=int, metavar="N", help="workers of that run (default: one a CPU)")


def run(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Run a workflow; print the values of its leaves."""
    if (code := tried(lambda: _check_targets(arguments))) != DONE:
        return code
    with _executor(arguments) as executor:
        try:
            result = executor.run(
                workflow,
                schedule=arguments.schedule,
                fail_fast=not arguments.keep_going,
                rollback=arguments.rollback,
                timeout=arguments.timeout,
                layer_timeout=arguments.layer_timeout,
                rollback_timeout=arguments.rollback_timeout,
                show=Escaping(has_tags=arguments.tag_output),
                audit=_listeners(arguments),
                store=arguments.store,
                resume=_resume(arguments),
                progress=_progress(arguments),
            )
        except WorkflowFailed as failure:
            _write_report(failure.result, arguments.report)
            _print_failure(failure, with_summary=arguments.summary)
            return TASK_FAILED
    # Files first: the reader of standard output may close it before the end.
    if arguments.save_durations:
        text = json.dumps(result.durations(), indent=1) + "\n"
        code = tried(lambda: write_pieces(arguments.save_durations, [text]))
    code = _write_report(result, arguments.report) or code
    _print_values(workflow, result)
    if arguments.summary:
        print(result.summary(), file=sys.stderr)
    return code


def _check_targets(arguments: argparse.Namespace) -> None:
    """See to it before the run that what is to be written of it can be."""
    if arguments.report:
        check_report(arguments.report)
    if arguments.save_durations:
        check_target(arguments.save_durations)


def _resume(arguments: argparse.Namespace) -> bool | Resume:
    """Return how to take up earlier runs; to name tasks that are to run again says that the others need not."""
    if arguments.store is None and (arguments.resume or arguments.rerun or arguments.start_from or arguments.wait):
        raise ValueError("--resume, --rerun, --from and --wait need a run store. Give --store FILE as well.")
    if not (arguments.resume or arguments.rerun or arguments.start_from):
        if arguments.wait:
            raise ValueError("--wait is about runs that take up earlier ones. Give --resume as well.")
        return False
    return Resume(arguments.rerun, arguments.start_from, arguments.wait)


def _listeners(arguments: argparse.Namespace) -> list[Listener]:
    """Return who is told what happens: a file where one is named, and the log if that is to be shown."""
    listeners: list[Listener] = [arguments.audit] if arguments.audit else []
    return [*listeners, logging.getLogger("forgepar.run")] if arguments.verbose else listeners


def _progress(arguments: argparse.Namespace) -> bool | Display:
    """Return how the run is to be shown while it goes."""
    if arguments.watch:
        return watching_display()
    if arguments.progress is None:
        return not arguments.quiet and sys.stderr.isatty()
    return bool(arguments.progress)


@contextmanager
def _executor(arguments: argparse.Namespace) -> Iterator[WorkflowExecutor]:
    """Start what a run is to run on."""
    with ExitStack() as stack:
        workers, backend = arguments.workers, arguments.backend
        if arguments.dask:
            workers = None if arguments.dask == "local" else workers
            backend = _dask_backend(arguments, stack)
        executor = WorkflowExecutor(
            workers, backend=backend, start_method=arguments.start_method, memory_budget=arguments.memory_budget
        )
        yield stack.enter_context(executor)


def _dask_backend(arguments: argparse.Namespace, stack: ExitStack) -> Backend:
    from forgepar.backends.dask import DaskBackend  # with all that it loads, for those who want it
    from forgepar.backends.daskcluster import local_cluster

    try:
        if arguments.dask == "local":
            return DaskBackend(stack.enter_context(local_cluster(arguments.workers or available_cpus())))
        return DaskBackend(arguments.dask)
    except ImportError as error:  # it says what to install
        raise ValueError(str(error)) from error


def check(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Print what is likely to go wrong, one line a finding; the code tells whether a run could begin."""
    findings = workflow.check(
        workers=arguments.workers,
        layer_timeout=arguments.layer_timeout,
        rollback=arguments.rollback,
        available_memory=arguments.available_memory,
    )
    if arguments.json:
        print_json([{**asdict(finding), "is_fatal": finding.is_fatal} for finding in findings])
    else:
        for finding in findings:
            print(escaped(str(finding)))
    return BAD_USAGE if any(finding.is_fatal for finding in findings) else DONE


def layers(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Print the layers of a workflow, and what a run would take where durations are known."""
    found = workflow.execution_layers()
    workers = arguments.workers or available_cpus()
    expected = _expected(workflow, arguments.durations, workers) if arguments.durations else None
    if arguments.json:
        print_json({"workflow": workflow.name, "layers": found, "expected": expected})
        return DONE
    for number, names in enumerate(found):
        shown = names if arguments.all else names[:_MOST_NAMES]
        more = f" ... and {len(names) - len(shown)} more (--all)" if len(names) > len(shown) else ""
        print(
            f"layer {number}: {len(names)} task{'s' * (len(names) != 1)}: {', '.join(map(escaped_line, shown))}{more}"
        )
    if expected is not None:
        print(_estimate(**expected))
    return DONE


def _expected(workflow: Workflow, path: Path, workers: int) -> dict[str, Any]:
    """Return what both schedules would take, by the durations of an earlier run."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Make it with forgepar run --save-durations.") from error
    plan = workflow.plan()
    seconds = expected_seconds(plan, known)
    layered, eager = (simulated_seconds(plan, seconds, workers, schedule) for schedule in ("layers", "eager"))
    return {"workers": workers, "layers_seconds": layered, "eager_seconds": eager}


def _estimate(workers: int, layers_seconds: float, eager_seconds: float) -> str:
    ratio = layers_seconds / eager_seconds if eager_seconds else 1.0
    return (
        f"expected with {workers} workers: {layers_seconds:.3g} s by layers, {eager_seconds:.3g} s with "
        f"--schedule eager (the barriers cost {ratio:.2f} times)"
    )


def _write_report(result: Any, path: Path | None) -> int:
    """Write a run's report where one is wanted, and say where it is."""
    if path is None:
        return DONE
    code = tried(lambda: result.report(path))
    if code == DONE:
        print(f"forgepar: report in {path}", file=sys.stderr)
    return code


def _print_values(workflow: Workflow, result: RunResult) -> None:
    """Print the leaves' values: a lone text as it is, others by name."""
    leaves = [workflow.task_name(i) for i in workflow.plan().leaves[:_MOST_VALUES].tolist()]
    if len(leaves) == 1 and isinstance(result[leaves[0]], str):
        print_value(result[leaves[0]])
        return
    for name in leaves:
        print(escaped(f"{escaped_line(name)} = {shown(result[name])}"))
    if (rest := len(workflow.plan().leaves) - len(leaves)) > 0:
        print(f"... and {rest} more")


def _print_failure(failure: WorkflowFailed, *, with_summary: bool) -> None:
    result = failure.result
    assert isinstance(result, RunResult)
    for name, error in result.errors.items():
        complain(f"task {name!r} failed: {type(error).__name__}: {text_of(error)}")
        for note in getattr(error, "__notes__", ()):
            print(escaped("  " + note.replace("\n", "\n  ")), file=sys.stderr)
    for error in failure.exceptions:
        if isinstance(error, RunTimeout):
            complain(error)
    counts = ", ".join(f"{n} {status}" for status, n in result.status_counts().items())
    complain(counts)
    if with_summary:
        print(result.summary(), file=sys.stderr)
