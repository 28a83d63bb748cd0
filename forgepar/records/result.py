"""The result of a run: the values of its tasks, and a record of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import check_path
from forgepar.errors import MissingResult, ResultReleased, WorkflowError, error_text
from forgepar.machine import as_text
from forgepar.records.audit_log import event_text
from forgepar.records.events import Event
from forgepar.records.failures import failed_attempts
from forgepar.records.ledger import Ledger
from forgepar.records.outputs import Outputs
from forgepar.records.run_status import RunStatus, TaskStatus
from forgepar.records.summary import counts_text, summary_text
from forgepar.records.table import LayerRow, RunTable, counts_by_status
from forgepar.scheduling.rollback import RollbackReport
from forgepar.scheduling.run_state import Status
from forgepar.system.escaping import escaped
from forgepar.system.loading import loading
from forgepar.version import public
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.plan import Plan

R = TypeVar("R")
_MOST_NAMED = 100_000  # tasks; the durations of more are returned by callable only
_STORY_OMITS = ("at", "seq", "run_id", "task")


@public
@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What happened to one task.

    Attributes:
        name: the task's name.
        layer: its layer.
        status: "completed", "failed", "skipped", "cancelled", "compensated" (it completed and was then undone), or
            "cached" (an earlier run completed it, and the run store has its value).
        start: when its last attempt began, in seconds since the run began; nan if it never ran.
        duration: how long that attempt took on the worker, in seconds; nan if it never ran.
        worker: the slot it ran on, -1 if it never ran.
        attempt: the number of its last attempt, from 1; 0 if it never ran.
        bytes: size of its serialized value, 0 for None, a number or short text.
        error: the exception if it failed, else None.
        skipped_for: if it was skipped, the name of the task because of which: a dependency that failed or was skipped,
            or the condition that chose the other branch. Else None.
        fallback: the last step of its fallback that was taken, None if none was.
    """

    name: str
    layer: int
    status: str
    start: float
    duration: float
    worker: int
    attempt: int
    bytes: int
    error: Exception | None
    skipped_for: str | None = None
    fallback: str | None = None


@public
class BytesUsed(NamedTuple):
    """Memory used by the values of a run, in bytes.

    Attributes:
        written: total size of the serialized values, except None, numbers and short text.
        recycled: how much of that was written to shared memory that an earlier value had used.
        spilled: how much of that was written to disk.
        peak: the most shared memory in use at once, including segments that are kept for later values.
    """

    written: int
    recycled: int
    spilled: int
    peak: int

    def __str__(self) -> str:
        return (
            f"{as_text(self.written)} written, {as_text(self.recycled)} of it to recycled memory and "
            f"{as_text(self.spilled)} to disk; at most {as_text(self.peak)} in use at once"
        )


@public
class RunResult:
    """Values and records of one run.

    Look up values by handle or name; a list of handles, or the return value of `Workflow.map`, gives a list. A result
    has only the outputs of the run: by default the values that no other task consumed. Handles are those of the
    workflow that was run; tasks may have been added to it since.

    A result can be pickled and copied. A loaded result has its values in its own memory, accepts the same handles, and
    has the names of functions instead of the functions.

    Attributes:
        run_id: the unique id of the run.
        events: the events of the run, in order; those of tasks are made on access.
        errors: the exception of each failed task, by name.
        wall_seconds: how long the run took.
        cpu_seconds: CPU time of the workers during the run.
        peak_rss: largest resident memory of a worker so far, in bytes.
        addresses: the address of each worker that may have been on another machine, by its number.
        rollback: what was undone after the run failed or was cancelled.
        not_stored: by task name, why the run store has no value of the task; empty without a store.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> total = wf.add(sum, wf.map(abs, [-1, 2]))
        >>> result = wf.run(backend="inline")
        >>> result[total], result["sum"], result.ok
        (3, 3, True)
    """

    def __init__(
        self,
        plan: Plan,
        status: NDArray[np.int8],
        ledger: Ledger,
        values: Outputs,
        events: Sequence[Event],
        rollback: RollbackReport = RollbackReport(),  # noqa: B008  (it never changes)
    ) -> None:
        self._plan = plan
        self._status = status
        self._ledger = ledger
        self._values = values
        self.rollback = rollback
        self.events = events
        self.run_id = ledger.run_id
        self.errors = {plan.name(task): error for task, error in ledger.errors.items()}
        self.wall_seconds = ledger.wall_seconds
        self.cpu_seconds = ledger.cpu_seconds
        self.peak_rss = ledger.peak_rss
        self.not_stored: Mapping[str, str] = {}
        self.addresses = ledger.addresses

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_plan": self._plan.outline}
        del state["errors"]  # the ledger has them
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.errors = {self._plan.name(task): error for task, error in self._ledger.errors.items()}

    @property
    def ok(self) -> bool:
        """Whether every task completed, is cached, or was skipped because of a branch or a fallback."""
        status = self._status
        good = (status == Status.COMPLETED) | (status == Status.SKIPPED) | (status == Status.CACHED)
        return bool(good.all())

    @property
    def status(self) -> Literal["completed", "failed", "cancelled"]:
        """How the run ended: "cancelled" if it ended early and no task failed."""
        if self.ok:
            return "completed"
        return "failed" if self.errors else "cancelled"

    @property
    def bytes(self) -> BytesUsed:
        """The memory that the values of the run used."""
        ledger = self._ledger
        written = int(ledger.bytes.sum())
        return BytesUsed(written, ledger.bytes_recycled, ledger.bytes_spilled, ledger.bytes_peak)

    def detach(self) -> Self:
        """Copy large values out of shared memory, which makes them writable, and free the memory; return this result.

        Values that were looked up before do not change: look them up again.

        Example:
            >>> from forgepar import Workflow
            >>> import numpy
            >>> wf = Workflow()
            >>> zeros = wf.add(numpy.zeros, 100_000)
            >>> array = wf.run(backend="inline").detach()[zeros]
            >>> array[0] = 1.0
        """
        self._values.detach()
        return self

    @property
    def records(self) -> Sequence[TaskRecord]:
        """One `TaskRecord` per task, in the order of declaration; each is made on access."""
        return _Records(self)

    @overload
    def __getitem__(self, key: TaskHandle[R]) -> R: ...
    @overload
    def __getitem__(self, key: TaskHandles[R]) -> list[R]: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...
    @overload
    def __getitem__(self, key: list[Any]) -> list[Any]: ...
    def __getitem__(self, key: TaskHandle | str | list[Any] | TaskHandles) -> Any:
        """Return a task's value.

        Raises:
            MissingResult: the task did not complete.
            ResultReleased: it completed, but its value is not an output of the run.
            UnknownTask: there is no task of that name, or the task was declared after the run began.
            ForeignHandle: the handle is of another workflow: an included one, a copy, or the original of a copy.
            WorkflowError: the key is neither a handle nor a name.
        """
        if isinstance(key, TaskHandles):
            return [self._value(index) for index in self._plan.indices_of(key)]
        if isinstance(key, list):
            try:
                return [self[part] for part in key]
            except RecursionError:
                raise WorkflowError("key is nested too deeply. Give a handle, a name, or a list of these.") from None
        return self._value(self._plan.index_of(key))

    def record(self, key: TaskHandle | str) -> TaskRecord:
        """Return the record of one task.

        Raises:
            UnknownTask: there is no task of that name, or the task was declared after the run began.
            ForeignHandle: the handle is of another workflow.
            WorkflowError: the key is neither a handle nor a name.
        """
        return self._record(self._plan.index_of(key))

    def story(self, key: TaskHandle | str) -> str:
        """Return the events of one task, and of the start and end of its layer, as text; for debugging.

        Returns:
            One line for the task, and one per event: seconds since the run began, the event's name, its fields.

        Raises:
            UnknownTask: there is no task of that name, or the task was declared after the run began.
            ForeignHandle: the handle is of another workflow.
            WorkflowError: the key is neither a handle nor a name.

        Example:
            >>> from forgepar import Workflow
            >>> wf = Workflow()
            >>> total = wf.add(sum, [wf.add(abs, -3)])
            >>> result = wf.run(backend="inline")
            >>> for line in result.story(total).splitlines():
            ...     print(line.partition("WorkflowTask")[2] or line)
            task 'sum', layer 1, completed, after 'abs'
            ParallelStarted layer_index=1 task_count=1
            Started layer=1 attempt=1 worker=0
            Completed attempt=1 worker=0 seconds=... bytes=0
            ParallelCompleted layer_index=1 task_count=1
        """
        index = self._plan.index_of(key)
        name, record = self._plan.name(index), self._record(index)
        sources, targets = self._plan.graph.edges()
        after = ", ".join(repr(self._plan.name(int(task))) for task in sources[targets == index])
        lines = [f"task {name!r}, layer {record.layer}, {record.status}" + (f", after {after}" if after else "")]
        lines += [
            f"{event.at - self._ledger.began_at:10.4f} s  {event_text(event, but=_STORY_OMITS)}"
            for event in self.events
            if getattr(event, "task", None) == name or getattr(event, "layer_index", None) == record.layer
        ]
        return escaped("\n".join(lines))

    def status_counts(self) -> dict[str, int]:
        """Count the tasks of each status that occurs."""
        return counts_by_status(self._status)

    def standing(self) -> RunStatus:
        """Return the status of the run and its tasks, in the form that `AuditLog.replay` restores from events.

        Example:
            >>> from forgepar import AuditLog, Workflow
            >>> wf = Workflow()
            >>> _ = wf.map(abs, range(3))
            >>> result = wf.run(backend="inline")
            >>> AuditLog(result.events).replay() == result.standing()
            True
        """
        plan, ledger = self._plan, self._ledger
        not_run = (self._status == Status.SKIPPED) | (self._status == Status.CACHED)
        known = np.flatnonzero((ledger.worker >= 0) | not_run).tolist()
        return RunStatus(
            self.run_id,
            plan.workflow_name,
            self.status,
            plan.n_tasks,
            self.status_counts(),
            {plan.name(task): self._task_status(task) for task in known},
        )

    def layer_table(self) -> list[LayerRow]:
        """Return one row per layer in which a task ran, with its wall time and its longest task."""
        return self.table().layer_table()

    def table(self) -> RunTable:
        """Return the run and its tasks as columns; a run store returns the same of it.

        Example:
            >>> from forgepar import Workflow
            >>> wf = Workflow()
            >>> _ = wf.map(abs, range(3))
            >>> table = wf.run(backend="inline").table()
            >>> len(table), table.layer.tolist(), table.status_counts()
            (3, [0, 0, 0], {'completed': 3})
        """
        plan, ledger = self._plan, self._ledger
        ran = ledger.worker >= 0
        attempt = ran.astype(np.int32)
        attempt[list(ledger.attempts)] = list(ledger.attempts.values())
        callables, callable_of = plan.called()
        sources, targets = plan.graph.edges()
        return RunTable(
            run_id=self.run_id,
            workflow=plan.workflow_name,
            status=self.status,
            schedule=ledger.schedule,
            n_workers=ledger.n_slots,
            began_at=ledger.began_at,
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.cpu_seconds,
            peak_rss=self.peak_rss,
            names=_Names(plan),
            callables=callables,
            callable_of=callable_of,
            layer=plan.layers,
            status_of=self._status,
            start=ledger.start - ledger.began,
            seconds=ledger.duration,
            worker=ledger.worker.astype(np.int32),
            attempt=attempt * ran,
            bytes=ledger.bytes,
            sources=sources,
            targets=targets,
            failures=failed_attempts(plan, ledger, self.events),
            errors={task: error_text(error) for task, error in ledger.errors.items()},
        )

    def trace(self, path: Path | str) -> None:
        """Write a trace of the run that https://ui.perfetto.dev and chrome://tracing open.

        Raises:
            OSError: the file cannot be written.
        """
        with loading:
            from forgepar.report.export.trace import write_trace

        write_trace(self.table(), check_path("path", path))

    def report(self, path: Path | str) -> None:
        """Write a report of the run as one HTML file, which opens without a network: what ran when and where, failures.

        Args:
            path: the file, such as "run.html"; an existing file is replaced. Its folder must exist.

        Raises:
            ModuleNotFoundError: bokeh is not installed; the extra ``report`` installs it.
            OSError: the file cannot be written.
        """
        with loading:
            from forgepar.report.html.report import write_report

        write_report(self.table(), check_path("path", path))

    def durations(self) -> dict[str, dict[str, float]]:
        """Return the durations of tasks, in seconds: of each by its name, and the mean by the name of the callable.

        With more than 100,000 tasks, only the means are returned. `forgepar layers --durations` and the simulator read
        this.
        """
        plan, seconds = self._plan, self._ledger.duration
        ran = np.flatnonzero(np.isfinite(seconds))
        of_template = [plan.specs[template.spec].base for template in plan.templates]
        bases = {base: number for number, base in enumerate(dict.fromkeys(of_template))}
        base_of = np.array([bases[base] for base in of_template])[plan.template_of[ran]]
        counts = np.bincount(base_of, minlength=len(bases))
        means = np.bincount(base_of, seconds[ran], minlength=len(bases)) / np.maximum(counts, 1)
        callables = {base: float(means[number]) for base, number in bases.items() if counts[number]}
        named = ran.tolist() if len(ran) <= _MOST_NAMED else []
        return {"tasks": {plan.name(task): float(seconds[task]) for task in named}, "callables": callables}

    def summary(self) -> str:
        """Return the run in a few lines: counts, times, each layer with its longest task, failures."""
        notes = [f"values: {self.bytes}"] if self.bytes.written else []
        if self.rollback.compensated or self.rollback.failed:
            notes.append(f"rolled back: {self.rollback}")
        return summary_text(self.table(), notes)

    def __repr__(self) -> str:
        return f"<RunResult of {self._plan.workflow_name!r}: {counts_text(self.status_counts())}>"

    def _value(self, index: int) -> Any:
        index = self._plan.alias.get(index, index)
        if index in self._values:
            return self._values[index]
        name, status = self._plan.name(index), Status(int(self._status[index]))
        if status in (Status.COMPLETED, Status.COMPENSATED, Status.CACHED):
            raise ResultReleased(
                f"the value of task {name!r} was released when its last consumer completed. "
                f"Keep it with run(outputs=[{name!r}]) or run(outputs='all')."
            )
        failed = self._skipped_for(index)
        cause = self._ledger.errors.get(index if failed is None else failed)
        why = f" with {error_text(cause)}" if cause is not None else ""
        if failed is not None:
            what = "failed" if cause is not None else "was skipped"
            why = f" because its dependency {self._plan.name(failed)!r} {what}{why}"
            if self._status[failed] in (Status.COMPLETED, Status.CACHED):
                why = f" because {self._plan.name(failed)!r} chose the other branch"
        ended = "failed" if status == Status.FAILED else f"was {status.name.lower()}"
        raise MissingResult(f"task {name!r} has no value: it {ended}{why}.")

    def _skipped_for(self, index: int) -> int | None:
        column = self._ledger.skipped_for
        return None if column is None or column[index] < 0 else int(column[index])

    def _record(self, index: int) -> TaskRecord:
        ledger, ran = self._ledger, bool(self._ledger.worker[index] >= 0)
        return TaskRecord(
            self._plan.name(index),
            int(self._plan.layers[index]),
            Status(int(self._status[index])).name.lower(),
            float(ledger.start[index] - ledger.began),
            float(ledger.duration[index]),
            int(ledger.worker[index]),
            ledger.attempts.get(index, 1) if ran else 0,
            int(ledger.bytes[index]),
            ledger.errors.get(index),
            None if (failed := self._skipped_for(index)) is None else self._plan.name(failed),
            ledger.fallbacks.get(index),
        )

    def _task_status(self, index: int) -> TaskStatus:
        record = self._record(index)
        error = None if record.error is None else error_text(record.error)
        return TaskStatus(record.status, record.attempt, record.worker, error)


class _Names(Sequence[str]):
    """Names of a plan's tasks, each made on access."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __reduce__(self) -> Any:
        return _Names, (self._plan.outline,)

    def __len__(self) -> int:
        return self._plan.n_tasks

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(len(self))[index]
        return self._plan.name(numbers) if isinstance(numbers, int) else [self._plan.name(task) for task in numbers]


class _Records(Sequence[TaskRecord]):
    def __init__(self, result: RunResult) -> None:
        self._result = result

    def __len__(self) -> int:
        return self._result._plan.n_tasks

    @overload
    def __getitem__(self, index: int) -> TaskRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TaskRecord]: ...
    def __getitem__(self, index: int | slice) -> TaskRecord | list[TaskRecord]:
        if isinstance(index, slice):
            return [self._result._record(i) for i in range(len(self))[index]]
        return self._result._record(range(len(self))[index])

    def __iter__(self) -> Iterator[TaskRecord]:
        return map(self._result._record, range(len(self)))
