"""The commands ``run``, ``check`` and ``layers``, which take a workflow."""

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
from forgepar.cli.base import (
    BAD_USAGE,
    DONE,
    TASK_FAILED,
    Commands,
    add_json,
    add_target_command,
    check_output,
    complain,
    path_of,
    print_json,
    print_value,
    shown,
    tried,
)
from forgepar.cli.watch import watching_display
from forgepar.engine.console import Escaping
from forgepar.engine.executor import WorkflowExecutor
from forgepar.errors import RunTimeout, WorkflowFailed, text_of
from forgepar.machine import available_cpus
from forgepar.records.display import Display
from forgepar.records.result import RunResult
from forgepar.records.sinks import Listener
from forgepar.report.export.writing import write_pieces
from forgepar.report.html.report import check_installed
from forgepar.report.simulate import expected_seconds, simulated_seconds
from forgepar.store.resume import Resume
from forgepar.system.escaping import escaped, escaped_line
from forgepar.workflow.workflow import Workflow

_MOST_VALUES = 20  # values that are printed; more are counted
_MOST_NAMES = 6  # names that are printed per layer


def add_to(commands: Commands) -> None:
    """Add the commands to the command line."""
    _add_run(commands)
    _add_check(commands)
    _add_layers(commands)


def _add_run(commands: Commands) -> None:
    command = add_target_command(
        commands,
        "run",
        run,
        "run a workflow and print the values of its leaves",
        ["pipeline.py:nightly -w 8 -p day=2024-05-01", "pipeline.py:nightly --watch", "forgepar.examples.census -q"],
    )
    command.add_argument("-w", "--workers", type=int, metavar="N", help="worker processes (default: one per CPU)")
    command.add_argument("--backend", choices=("process", "inline"), default="process")
    command.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="run on a Dask cluster, such as tcp://host:8786; local: start one of --workers processes for this run, "
        "secured by TLS",
    )
    command.add_argument("--start-method", choices=START_METHODS)
    command.add_argument("--schedule", choices=("layers", "eager"), default="layers")
    command.add_argument("--memory-budget", metavar="SIZE", help="limit of large values in memory, such as 8GiB")
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="time limit of the run")
    command.add_argument("--layer-timeout", type=float, metavar="SECONDS", help="time limit of each layer")
    command.add_argument(
        "--rollback-timeout", type=float, metavar="SECONDS", help="time limit of the rollback (default: as --timeout)"
    )
    command.add_argument("--keep-going", action="store_true", help="run all that does not depend on a failed task")
    command.add_argument(
        "--rollback", choices=("all", "upstream", "none"), default="all", help="which tasks to undo if one fails"
    )
    _add_output(command)
    _add_store(command)


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tag-output", action="store_true", help="prefix each line that a task prints with its name")
    command.add_argument("--audit", metavar="FILE", help="append each event of the run to a file, as a line of JSON")
    command.add_argument("--save-durations", type=path_of, metavar="FILE", help="write task durations, for layers")
    command.add_argument("--summary", action="store_true", help="print the wall time and longest task of each layer")
    command.add_argument("--report", type=path_of, metavar="FILE", help="write a report of the run as an HTML file")
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show the progress of the run (default: if standard error is a terminal)",
    )
    command.add_argument("--watch", action="store_true", help="show workers, layers and failures on the whole screen")


def _add_store(command: argparse.ArgumentParser) -> None:
    command.add_argument("--store", type=path_of, metavar="FILE", help="store the run and its values in this file")
    command.add_argument(
        "--resume",
        action="store_true",
        help="take values from earlier runs in the store, and do not run their tasks; "
        "unpickling a value runs the code of the store's owner",
    )
    command.add_argument(
        "--rerun", action="append", default=[], metavar="NAME", help="run this task again; load-* matches several"
    )
    command.add_argument(
        "--from",
        dest="start_from",
        action="append",
        default=[],
        metavar="NAME",
        help="run this task and all that depend on it again",
    )
    command.add_argument("--wait", action="store_true", help="wait for another run of the workflow in the store to end")


def _add_check(commands: Commands) -> None:
    command = add_target_command(
        commands,
        "check",
        check,
        "print likely problems of a workflow, without running it",
        ["pipeline.py:nightly", "pipeline.py:nightly -w 64 --available-memory 256GiB --json"],
    )
    add_json(command)
    command.add_argument("-w", "--workers", type=int, metavar="N", help="workers of the run (default: one per CPU)")
    command.add_argument("--layer-timeout", type=float, metavar="SECONDS", help="the run's time limit of each layer")
    command.add_argument(
        "--rollback", choices=("all", "upstream", "none"), default="all", help="which tasks the run undoes"
    )
    command.add_argument("--available-memory", metavar="SIZE", help="memory of the target machine, such as 64GiB")


def _add_layers(commands: Commands) -> None:
    command = add_target_command(
        commands,
        "layers",
        layers,
        "print which tasks run together",
        ["pipeline.py:nightly", "pipeline.py:nightly --durations durations.json -w 8", "pipeline.py:nightly --json"],
    )
    add_json(command)
    command.add_argument("--all", action="store_true", help="print all names")
    command.add_argument(
        "--durations",
        type=path_of,
        metavar="FILE",
        help="print how long a run would take, by the file that --save-durations wrote",
    )
    command.add_argument("-w", "--workers", type=int, metavar="N", help="workers of that run (default: one per CPU)")


def run(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Run a workflow and print the values of its leaves."""
    _check_outputs(arguments)
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
    code = DONE
    # Write files first: the reader of standard output may close it early.
    if arguments.save_durations:
        text = json.dumps(result.durations(), indent=1) + "\n"
        code = tried(lambda: write_pieces(arguments.save_durations, [text]), TASK_FAILED)
    code = _write_report(result, arguments.report) or code
    _print_values(workflow, result)
    if arguments.summary:
        print(result.summary(), file=sys.stderr)
    return code


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Check before the run that its output files can be written."""
    check_output("--save-durations", arguments.save_durations)
    check_output("--report", arguments.report)
    if arguments.report is not None:
        try:
            check_installed()
        except ModuleNotFoundError as error:
            raise ValueError(f"--report: {error}") from error


def _resume(arguments: argparse.Namespace) -> bool | Resume:
    """Return whether and how to resume. --rerun and --from imply --resume."""
    if arguments.store is None and (arguments.resume or arguments.rerun or arguments.start_from or arguments.wait):
        raise ValueError("--resume, --rerun, --from and --wait need a run store. Give --store FILE.")
    if not (arguments.resume or arguments.rerun or arguments.start_from):
        if arguments.wait:
            raise ValueError("--wait needs a run that resumes. Give --resume.")
        return False
    return Resume(arguments.rerun, arguments.start_from, arguments.wait)


def _listeners(arguments: argparse.Namespace) -> list[Listener]:
    """Return the sinks of the events: the file of --audit, and the log with -v."""
    listeners: list[Listener] = [arguments.audit] if arguments.audit else []
    return [*listeners, logging.getLogger("forgepar.run")] if arguments.verbose else listeners


def _progress(arguments: argparse.Namespace) -> bool | Display:
    """Return the ``progress`` argument of the run."""
    if arguments.watch:
        return watching_display()
    if arguments.progress is None:
        return not arguments.quiet and sys.stderr.isatty()
    return bool(arguments.progress)


@contextmanager
def _executor(arguments: argparse.Namespace) -> Iterator[WorkflowExecutor]:
    """Open the executor, and the Dask cluster if one is asked for."""
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
    from forgepar.backends.dask.backend import DaskBackend  # loaded only for --dask
    from forgepar.backends.dask.cluster import local_cluster

    try:
        if arguments.dask == "local":
            return DaskBackend(stack.enter_context(local_cluster(arguments.workers or available_cpus())))
        return DaskBackend(arguments.dask)
    except ImportError as error:  # its message says what to install
        raise ValueError(str(error)) from error


def check(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Print likely problems, one line per finding; the exit code is an error if a run could not begin."""
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
    """Print the layers of a workflow, and with --durations how long a run would take."""
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
    """Return the expected wall time of both schedules, by the durations of an earlier run."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Write it with forgepar run --save-durations.") from error
    plan = workflow.plan()
    seconds = expected_seconds(plan, known)
    layered, eager = (simulated_seconds(plan, seconds, workers, schedule) for schedule in ("layers", "eager"))
    return {"workers": workers, "layers_seconds": layered, "eager_seconds": eager}


def _estimate(workers: int, layers_seconds: float, eager_seconds: float) -> str:
    ratio = layers_seconds / eager_seconds if eager_seconds else 1.0
    return (
        f"expected with {workers} workers: {layers_seconds:.3g} s by layers, {eager_seconds:.3g} s with "
        f"--schedule eager (ratio {ratio:.2f})"
    )


def _write_report(result: Any, path: Path | None) -> int:
    """Write the report of a run if --report is given."""
    if path is None:
        return DONE
    code = tried(lambda: result.report(path), TASK_FAILED)
    if code == DONE:
        print(f"forgepar: report in {path}", file=sys.stderr)
    return code


def _print_values(workflow: Workflow, result: RunResult) -> None:
    """Print the values of the leaves: a single text unchanged, others with their names."""
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
