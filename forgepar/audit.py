"""The audit log of a run: its events as lines of JSON, read back, and gone through again to where they led.

    run(audit="run.jsonl") ──> JsonLines ──> file ──> AuditLog.load ──> AuditLog.replay ──> Standing

A file may have several runs, one behind the other or at once: each line has its run's id, and is written whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from json.encoder import encode_basestring_ascii
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from forgepar import events as kinds
from forgepar.events import (
    Event,
    UnknownEvent,
    WorkflowCompleted,
    WorkflowStarted,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskRetried,
    WorkflowTaskRolledBack,
    WorkflowTasksAdded,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
    WorkflowToolFallback,
)
from forgepar.standing import Standing, TaskStanding
from forgepar.trust import end_of_links
from forgepar.validation import as_list, check_instance, check_path, shown

_KINDS = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, type) and issubclass(kind, Event)}
_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in _KINDS.values()}
# A form for each kind and a function for each type, as `json.dumps` of a dict takes three times as long.
_VALUES = {kind: attrgetter(*names) for kind, names in _FIELDS.items()}
_FORMS = {
    kind: f'{{"event": "{kind.__name__}", ' + ", ".join(f'"{name}": %s' for name in names) + "}"
    for kind, names in _FIELDS.items()
}
_AS_JSON: dict[type, Callable[[Any], str]] = {
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: lambda value: repr(value) if isfinite(value) else json.dumps(value),
}
_COMMON = ("at", "seq", "run_id")


class JsonLines:
    """A sink that appends a line of JSON for each event to a file.

    A batch of events is one write of whole lines straight to the system: what was told is in the file even if this
    process is killed, and runs that write to one file at once do not mix within a line.

    Args:
        path: the file. If there is none it is made, for its owner alone to read.

    Raises:
        ValueError: it cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sink = JsonLines(f"{folder}/run.jsonl")
        ...     sink.write([WorkflowStarted(0.0, "nightly", 3, 1, seq=0, run_id="7f")])
        ...     sink.close()
        ...     print(Path(f"{folder}/run.jsonl").read_text().strip())
        {"event": "WorkflowStarted", "at": 0.0, "seq": 0, "run_id": "7f", "workflow": "nightly", "task_count": 3, \
"layer_count": 1}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            place = end_of_links(path)
            is_torn = _is_torn(place)
            self._file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ValueError(
                f"the audit log {str(path)!r} cannot be written ({error.strerror}). "
                "Give a file that you may write, in a folder that is there."
            ) from error
        if is_torn:
            self._append(b"\n")

    def write(self, events: Sequence[Event]) -> None:
        """Append the events.

        Raises:
            OSError: they cannot be written, or not whole; a disk is full.
        """
        self._append("".join([line_of(event) + "\n" for event in events]).encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __repr__(self) -> str:
        return f"JsonLines({str(self._path)!r})"

    def _append(self, data: bytes) -> None:
        while data:  # a system writes less than asked only where something is wrong, which the next attempt tells
            data = data[os.write(self._file, data) :]


class AuditLog:
    """The events of one run, in order.

    Args:
        events: all of them, or the first ones.

    Attributes:
        events: the same.
        run_id: the id of the run.
        run_ids: of all runs of the file that they were loaded from, in the order in which these began.

    Raises:
        ValueError: no events, or those of several runs.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow("small")
        >>> _ = wf.map(abs, range(3))
        >>> log = AuditLog(wf.run(backend="inline").events)
        >>> log.replay().counts, log.replay().tasks["abs-0"].status
        ({'completed': 3}, 'completed')
    """

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = tuple(as_list("events", events))
        for event in self.events:
            check_instance("events", event, Event, "events, each a forgepar.events.Event")
        self.run_ids = tuple(dict.fromkeys(event.run_id for event in self.events))
        if len(self.run_ids) != 1:
            raise ValueError(f"these are events of {len(self.run_ids)} runs. Give as events those of one.")
        self.run_id = self.run_ids[0]

    @classmethod
    def load(cls, path: str | os.PathLike[str], run_id: str | None = None) -> Self:
        """Read the events of one run from a file of JSON lines.

        A line that a writer did not live to finish is left out: the last one of the file, and any before the start of
        another run. Events of kinds that this version does not know become an `UnknownEvent`.

        Args:
            path: the file.
            run_id: the run; None: the last one that began.

        Raises:
            OSError: the file cannot be read.
            ValueError: it has no such run, or a line elsewhere is no event.
        """
        by_run: dict[str, list[Event]] = {}
        for event in _read(check_path("path", path)):
            by_run.setdefault(event.run_id, []).append(event)
        if not by_run:
            raise ValueError(f"{path} has no events. run(audit={str(path)!r}) writes some.")
        chosen = next(reversed(by_run)) if run_id is None else run_id
        if not isinstance(chosen, str) or chosen not in by_run:
            raise ValueError(f"{path} has no run of run_id={shown(chosen)}. Those it has are {', '.join(by_run)}.")
        log = cls(by_run[chosen])
        log.run_ids = tuple(by_run)
        return log

    def replay(self) -> Standing:
        """Go through the events again, and return where the run stands behind the last.

        It is where the run's own `RunResult.standing` says, once the run is over. A log that stops before the end
        (the program was killed) tells of a "running" run.

        Raises:
            ValueError: an event is missing, the first or one in between.
        """
        started = self._checked_start()
        tasks: dict[str, TaskStanding] = {}
        status = "running"
        for event in self.events:
            _take(event, tasks)
            if isinstance(event, WorkflowCompleted):
                status = "completed" if event.succeeded else "failed" if event.failed else "cancelled"
        task_count = started.task_count
        task_count += sum(event.task_count for event in self.events if isinstance(event, WorkflowTasksAdded))
        untold = "pending" if status == "running" else "cancelled"
        if status != "running":
            tasks = {name: _settled(task) for name, task in tasks.items()}
        counts = Counter(task.status for task in tasks.values())
        counts[untold] += task_count - len(tasks)
        return Standing(self.run_id, started.workflow, status, task_count, dict(+counts), tasks)

    def __repr__(self) -> str:
        return f"<AuditLog of run {self.run_id}: {len(self.events)} events>"

    def _checked_start(self) -> WorkflowStarted:
        for number, event in enumerate(self.events):
            if event.seq != number:
                raise ValueError(
                    f"the log of run {self.run_id} lacks event {number}: event {event.seq} stands in its place. "
                    "Give all events of the run from its start on, in order."
                )
        started = self.events[0]
        if not isinstance(started, WorkflowStarted):
            raise ValueError(
                f"the log of run {self.run_id} begins with a {type(started).__name__}. "
                "Give the events of a run, which begin with a WorkflowStarted."
            )
        return started


def line_of(event: Event) -> str:
    """Return an event as a line of JSON."""
    if isinstance(event, UnknownEvent):
        common = {name: getattr(event, name) for name in _COMMON}
        return json.dumps({"event": event.name, **common, **event.fields})
    kind = type(event)
    return _FORMS[kind] % tuple([_AS_JSON.get(type(value), json.dumps)(value) for value in _VALUES[kind](event)])


def names_of(kind: type[Event]) -> tuple[str, ...]:
    """Return the names of a kind's fields."""
    return _FIELDS[kind]


def event_of(line: bytes) -> Event:
    """Turn back what `line_of` made.

    Raises:
        ValueError: it is no event.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError("it has no field 'event'")
    name = record.pop("event")
    kind = _KINDS.get(name)
    if missing := set(_COMMON if kind is None else names_of(kind)) - set(record):
        raise ValueError(f"it has no field {sorted(missing)[0]!r}")
    if kind is None:
        common: dict[str, Any] = {name: record.pop(name) for name in _COMMON}
        return UnknownEvent(name=name, fields=record, **common)
    # What a newer version tells besides is left out.
    return kind(**{name: _frozen(record[name]) for name in names_of(kind)})


def _frozen(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def _read(path: Path) -> list[Event]:
    """Return a file's events, less the lines that their writer did not finish."""
    events: list[Event] = []
    fault = ""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        found = _event_or_fault(line)
        if fault and not isinstance(found, WorkflowStarted):
            raise ValueError(f"{path}, {fault} Mend or remove that line.")
        if isinstance(found, Event):
            fault = ""
            events.append(found)
        else:
            fault = f"line {number} is no event: {found}."
    return events


def _event_or_fault(line: bytes) -> Event | str:
    try:
        return event_of(line)
    except ValueError as error:
        return str(error)


def _is_torn(path: Path) -> bool:
    """Tell whether a file ends within a line."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _take(event: Event, tasks: dict[str, TaskStanding]) -> None:
    """Note what an event tells of a task."""
    match event:
        case WorkflowTaskStarted():
            tasks[event.task] = TaskStanding("running", event.attempt, event.worker)
        case WorkflowTaskCompleted():
            tasks[event.task] = TaskStanding("completed", event.attempt, event.worker)
        case WorkflowTaskRetried():
            tasks[event.task] = tasks[event.task]._replace(status="pending", attempt=event.attempt)
        case WorkflowTaskFailed():
            tasks[event.task] = tasks[event.task]._replace(status="failed", error=event.error)
        case WorkflowToolFallback():
            again = event.kind == "retry"
            tasks[event.task] = tasks[event.task]._replace(status="pending", attempt=event.attempt + again)
        case WorkflowTaskSkipped():
            tasks[event.task] = tasks.get(event.task, TaskStanding("skipped"))._replace(status="skipped")
        case WorkflowTaskCached():
            tasks[event.task] = TaskStanding("cached")
        case WorkflowTaskRolledBack(error=None):
            tasks[event.task] = tasks[event.task]._replace(status="compensated")


def _settled(task: TaskStanding) -> TaskStanding:
    """Return where a task stands once the run has ended."""
    return task._replace(status="cancelled") if task.status in ("running", "pending") else task
