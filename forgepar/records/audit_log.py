"""The audit log of a run: its events as lines of JSON, which can be read and replayed.

    run(audit="run.jsonl") ──> JsonLines ──> file ──> AuditLog.load ──> AuditLog.replay ──> RunStatus

A file may have several runs, one after the other or at the same time: each line has the id of its run, and is written
in one piece.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import fields
from json.encoder import encode_basestring_ascii
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from forgepar._validate import as_list, check_instance, check_path, shown
from forgepar.records import events as kinds
from forgepar.records.events import (
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
from forgepar.records.run_status import RunStatus, TaskStatus
from forgepar.system.trust import end_of_links
from forgepar.version import public

_KINDS = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, type) and issubclass(kind, Event)}
_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in _KINDS.values()}
# A format per kind and an encoder per type: `json.dumps` of a dict takes three times as long.
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

    A batch of events is one unbuffered write of whole lines: its events are in the file even if this process is killed,
    and runs that write to one file at the same time do not mix their lines.

    Args:
        path: the file. A new file is readable only by its owner.

    Raises:
        ValueError: the file cannot be written.

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
                f"The audit log {str(path)!r} cannot be written ({error.strerror}). "
                "Give the path of a writable file in an existing folder."
            ) from error
        if is_torn:
            self._append(b"\n")

    def write(self, events: Sequence[Event]) -> None:
        """Append the events.

        Raises:
            OSError: they cannot be written completely, such as when the disk is full.
        """
        self._append("".join([line_of(event) + "\n" for event in events]).encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __repr__(self) -> str:
        return f"JsonLines({str(self._path)!r})"

    def _append(self, data: bytes) -> None:
        while data:  # a short write means an error, which the next write raises
            data = data[os.write(self._file, data) :]


@public
class AuditLog:
    """The events of one run, in order.

    Args:
        events: all events of the run, or the first ones.

    Attributes:
        events: the same events.
        run_id: the id of the run.
        run_ids: the ids of all runs of the file that the events were loaded from, in the order in which the runs began.

    Raises:
        ValueError: there are no events, or events of several runs.

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
            check_instance("events", event, Event, "events, each a forgepar.Event")
        self.run_ids = tuple(dict.fromkeys(event.run_id for event in self.events))
        if len(self.run_ids) != 1:
            raise ValueError(f"events must be those of one run, got events of {len(self.run_ids)} runs.")
        self.run_id = self.run_ids[0]

    @classmethod
    def load(cls, path: str | os.PathLike[str], run_id: str | None = None) -> Self:
        """Read the events of one run from a file of JSON lines.

        Lines that their writer did not finish are left out: the last line of the file, and any line before the start of
        another run. An event of an unknown kind becomes an `UnknownEvent`.

        Args:
            path: the file.
            run_id: the id of the run; None is the last one that began.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file has no such run, or another line is not an event.
        """
        by_run: dict[str, list[Event]] = {}
        for event in _read(check_path("path", path)):
            by_run.setdefault(event.run_id, []).append(event)
        if not by_run:
            raise ValueError(f"{path} has no events. Write them with run(audit={str(path)!r}).")
        chosen = next(reversed(by_run)) if run_id is None else run_id
        if not isinstance(chosen, str) or chosen not in by_run:
            raise ValueError(f"run_id must be that of a run in {path} ({', '.join(by_run)}), got {shown(chosen)}.")
        log = cls(by_run[chosen])
        log.run_ids = tuple(by_run)
        return log

    def replay(self) -> RunStatus:
        """Replay the events, and return the status of the run after the last one.

        Once the run has ended, this equals `RunResult.standing`. If the log stops earlier, such as when the program was
        killed, the status is "running".

        Raises:
            ValueError: an event is missing, at the start or in between.
        """
        started = self._checked_start()
        tasks: dict[str, TaskStatus] = {}
        status = "running"
        for event in self.events:
            _apply(event, tasks)
            if isinstance(event, WorkflowCompleted):
                status = "completed" if event.succeeded else "failed" if event.failed else "cancelled"
        task_count = started.task_count
        task_count += sum(event.task_count for event in self.events if isinstance(event, WorkflowTasksAdded))
        without_events = "pending" if status == "running" else "cancelled"
        if status != "running":
            tasks = {name: _settled(task) for name, task in tasks.items()}
        counts = Counter(task.status for task in tasks.values())
        counts[without_events] += task_count - len(tasks)
        return RunStatus(self.run_id, started.workflow, status, task_count, dict(+counts), tasks)

    def __repr__(self) -> str:
        return f"<AuditLog of run {self.run_id}: {len(self.events)} events>"

    def _checked_start(self) -> WorkflowStarted:
        for number, event in enumerate(self.events):
            if event.seq != number:
                raise ValueError(
                    f"The log of run {self.run_id} lacks event {number}; event {event.seq} is in its place. "
                    "Give all events of the run from its start, in order."
                )
        started = self.events[0]
        if not isinstance(started, WorkflowStarted):
            raise ValueError(
                f"The log of run {self.run_id} begins with a {type(started).__name__}, not a WorkflowStarted. "
                "Give all events of the run from its start, in order."
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
    """Return the names of the fields of a kind of event."""
    return _FIELDS[kind]


def event_text(event: Event, but: Container[str] = _COMMON) -> str:
    """Return the name of an event and its fields, except those named in ``but``."""
    values = [f"{name}={getattr(event, name)!r}" for name in names_of(type(event)) if name not in but]
    return " ".join([type(event).__name__, *values])


def event_of(line: bytes) -> Event:
    """Return the event of a line that `line_of` made.

    Raises:
        ValueError: the line is not an event.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError("the field 'event' is missing")
    name = record.pop("event")
    kind = _KINDS.get(name)
    if missing := set(_COMMON if kind is None else names_of(kind)) - set(record):
        raise ValueError(f"the field {sorted(missing)[0]!r} is missing")
    if kind is None:
        common: dict[str, Any] = {name: record.pop(name) for name in _COMMON}
        return UnknownEvent(name=name, fields=record, **common)
    # Further fields, of a newer version, are left out.
    return kind(**{name: _frozen(record[name]) for name in names_of(kind)})


def _frozen(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def _read(path: Path) -> list[Event]:
    """Return the events of a file, except for lines that their writer did not finish."""
    events: list[Event] = []
    fault = ""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        found = _event_or_fault(line)
        if fault and not isinstance(found, WorkflowStarted):
            raise ValueError(f"{path}, {fault} Correct or remove that line.")
        if isinstance(found, Event):
            fault = ""
            events.append(found)
        else:
            fault = f"line {number} is not an event: {found}."
    return events


def _event_or_fault(line: bytes) -> Event | str:
    try:
        return event_of(line)
    except ValueError as error:
        return str(error)


def _is_torn(path: Path) -> bool:
    """Return whether a file ends within a line."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _apply(event: Event, tasks: dict[str, TaskStatus]) -> None:
    """Update the status of the task of an event."""
    match event:
        case WorkflowTaskStarted():
            tasks[event.task] = TaskStatus("running", event.attempt, event.worker)
        case WorkflowTaskCompleted():
            tasks[event.task] = TaskStatus("completed", event.attempt, event.worker)
        case WorkflowTaskRetried():
            tasks[event.task] = tasks[event.task]._replace(status="pending", attempt=event.attempt)
        case WorkflowTaskFailed():
            tasks[event.task] = tasks[event.task]._replace(status="failed", error=event.error)
        case WorkflowToolFallback():
            again = event.kind == "retry"
            tasks[event.task] = tasks[event.task]._replace(status="pending", attempt=event.attempt + again)
        case WorkflowTaskSkipped():
            tasks[event.task] = tasks.get(event.task, TaskStatus("skipped"))._replace(status="skipped")
        case WorkflowTaskCached():
            tasks[event.task] = TaskStatus("cached")
        case WorkflowTaskRolledBack(error=None):
            tasks[event.task] = tasks[event.task]._replace(status="compensated")


def _settled(task: TaskStatus) -> TaskStatus:
    """Return the status of a task once the run has ended."""
    return task._replace(status="cancelled") if task.status in ("running", "pending") else task
