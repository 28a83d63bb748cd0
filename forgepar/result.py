"""What a run leaves: values, and a record of every task."""

from __future__ import annotations

import math
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from forgepar.backends.exceptions import Portable
from forgepar.errors import MissingResult, ResultReleased
from forgepar.escaping import escaped, escaped_line
from forgepar.events import Event, WorkflowTaskFailed, WorkflowTaskRetried, WorkflowToolFallback
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.machine import as_text
from forgepar.pickling import loads_own
from forgepar.plan import Plan
from forgepar.rollback import RollbackReport
from forgepar.runstate import Status
from forgepar.runtable import FailedAttempt, LayerRow, RunTable
from forgepar.standing import Standing, TaskStanding, error_text
from forgepar.validation import check_path
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, dumps, is_segment

_MOST_NAMED = 100_000  # tasks whose durations are told one by one


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What happened to one task.

    Attributes:
        name: the task's name.
        layer: its layer.
        status: "completed", "failed", "skipped", "cancelled", "compensated" (it was done, and undone), or "cached" (an
            earlier run did it, and its value was kept).
        start: when its last attempt began, seconds since the run did; nan if it never ran.
        duration: how long that took on the worker, seconds; nan if it never ran.
        worker: the slot it ran on, -1 if it never ran.
        attempt: which attempt the record is about, from 1; 0 if it never ran.
        bytes: size of its value as it travelled, 0 for None, a number or short text.
        error: what it failed with, None if it did not.
        skipped_for: where it was skipped, name of the task that it waited for and that failed or was left out, or that
            decided for the other branch; else None.
        fallback: what the last step of its fallback was, where it came to that; else None.
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


class BytesUsed(NamedTuple):
    """What the values of a run took, bytes.

    Attributes:
        written: size of all values as they travelled, but for None, numbers and short text.
        recycled: how much of that went to shared memory that an earlier value had.
        spilled: how much of that went to disk.
        peak: most that was held in shared memory at once, that kept for later values included.
    """

    written: int
    recycled: int
    spilled: int
    peak: int

    def __str__(self) -> str:
        return (
            f"{as_text(self.written)} written, {as_text(self.recycled)} of it to recycled memory and "
            f"{as_text(self.spilled)} to disk; at most {as_text(self.peak)} held at once"
        )


class Ledger:
    """The columns of a run, filled while it goes; a row a task.

    Attributes:
        start: float64, `time.perf_counter` seconds; nan until it ran.
        duration: float64, seconds; nan until it ran.
        worker: int16, -1 until it ran.
        bytes: int64, size of the value as it travelled; 0 for scalars.
        skipped_for: int32, the failed task that one waited for, -1 for none; None as long as no task was skipped.
        began: when the run did, `time.perf_counter` seconds.
        began_at: the same in seconds since the epoch (UTC).
    """

    def __init__(self, n_tasks: int) -> None:
        self.start = np.full(n_tasks, np.nan)
        self.duration = np.full(n_tasks, np.nan)
        self.worker = np.full(n_tasks, -1, np.int16)
        self.bytes = np.zeros(n_tasks, np.int64)
        self.skipped_for: NDArray[np.int32] | None = None
        self.bytes_recycled = 0
        self.bytes_spilled = 0
        self.bytes_peak = 0
        self.attempts: dict[int, int] = {}
        self.errors: dict[int, Exception] = {}
        self.fallbacks: dict[int, str] = {}
        self.run_id = ""
        self.began = 0.0
        self.began_at = 0.0
        self.wall_seconds = 0.0
        self.n_slots = 0
        self.addresses: dict[int, str] = {}
        self.schedule = "layers"
        self.cpu_seconds = 0.0
        self.peak_rss = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "errors": {task: Portable(error) for task, error in self.errors.items()}}

    def grow(self, n_tasks: int) -> None:
        """Make room for more tasks."""
        more = Ledger(n_tasks - len(self.start))
        for name in ("start", "duration", "worker", "bytes"):
            setattr(self, name, np.append(getattr(self, name), getattr(more, name)))
        if self.skipped_for is not None:
            self.skipped_for = np.append(self.skipped_for, np.full(len(more.start), -1, np.int32))


class Outputs:
    """The values that a result keeps, as they travelled; each is decoded when it is first asked for.

    Args:
        values: every task's value, as it travels.
        kept: bool, which of them to keep.
        arena: where the large ones are; they are mapped here, so that they outlive it.
    """

    def __init__(self, values: list[Wire], kept: NDArray[np.bool_], arena: Arena) -> None:
        self._kept = kept
        self._decoded: dict[int, Any] = {}
        large = [task for task in np.flatnonzero(kept).tolist() if is_segment(values[task])]
        arena.expect([values[task] for task in large])
        self._mapped = {task: arena.read(values[task]) for task in large}
        all_kept = bool(kept.all())
        self._values = values if all_kept else [v if k else None for v, k in zip(values, kept.tolist(), strict=True)]

    def __contains__(self, task: int) -> bool:
        return bool(self._kept[task])

    def __getitem__(self, task: int) -> Any:
        value = self._values[task]
        if type(value) is not tuple:
            return value
        if task not in self._decoded:
            stream, *buffers = self._mapped.get(task) or value
            self._decoded[task] = pickle.loads(stream, buffers=buffers)
        return self._decoded[task]

    def __getstate__(self) -> dict[str, Any]:
        """Return the values as pickles that need no arena. What was looked up is pickled as it is now."""
        held = {task: [bytes(part) for part in parts] for task, parts in self._mapped.items()}
        for task, value in self._decoded.items():
            try:
                held[task] = _pickled(value)
            except Exception:
                if task not in held and is_segment(self._values[task]):
                    raise  # it was detached, so this was all there is
        return {"_kept": self._kept, "_values": self._values, "_mapped": held, "_decoded": {}}

    def detach(self) -> None:
        """Decode all large values anew, into memory of their own that can be written."""
        for task, (stream, *buffers) in self._mapped.items():
            self._decoded[task] = loads_own(stream, buffers)
        self._mapped.clear()


def _pickled(value: Any) -> list[Any]:
    """Return a pickle of a value, and behind it the buffers beside it; those that can be written stay so."""
    buffers: list[pickle.PickleBuffer] = []
    stream = dumps(value, buffers)
    return [stream, *((bytes if raw.readonly else bytearray)(raw) for raw in (buffer.raw() for buffer in buffers))]


class Writers:
    """What `RunResult` needs of rooms that rank above it: they put it here when they are imported."""

    trace: Callable[[RunTable, Path | str], None]
    report: Callable[[RunTable, Path | str], None]


class RunResult:
    """Values and records of one run.

    Values are looked up by handle or name; a list of handles, or what `Workflow.map` returned, gives a list. Only
    outputs are there: by default the values that no other task took. Handles are those of the workflow that was run,
    which may have grown since.

    A result can be pickled and copied. What is loaded has its values in memory of its own, knows the same handles, and
    holds the names of functions in place of the functions.

    Attributes:
        run_id: the run's id, text of its own.
        events: what happened, in order; those of tasks are made when they are looked at.
        errors: the exception of each failed task, by name.
        wall_seconds: how long the run took.
        cpu_seconds: CPU time that workers spent in it.
        peak_rss: largest resident memory of a worker so far, bytes.
        addresses: where each worker was, by its number, of those that other machines may have had.
        rollback: what was undone after the run failed or was called off.
        not_stored: why the run store keeps no value of some tasks, by name; empty where there is no store.

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
        """Whether every task is done, but for those that were left out because a branch or a fallback said so."""
        status = self._status
        good = (status == Status.COMPLETED) | (status == Status.SKIPPED) | (status == Status.CACHED)
        return bool(good.all())

    @property
    def status(self) -> Literal["completed", "failed", "cancelled"]:
        """What became of the run: all done, something failed, or called off before all was done."""
        if self.ok:
            return "completed"
        return "failed" if self.errors else "cancelled"

    @property
    def bytes(self) -> BytesUsed:
        """How many bytes the values of the run took."""
        ledger = self._ledger
        written = int(ledger.bytes.sum())
        return BytesUsed(written, ledger.bytes_recycled, ledger.bytes_spilled, ledger.bytes_peak)

    def detach(self) -> Self:
        """Copy large values out of shared memory, so that they can be written, and free that; return this result.

        What was looked up before stays as it was: look it up again.

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
        """A `TaskRecord` a task, in the order of declaration, each made when it is looked at."""
        return _Records(self)

    @overload
    def __getitem__(self, key: TaskHandle | str) -> Any: ...
    @overload
    def __getitem__(self, key: list[Any] | TaskHandles) -> list[Any]: ...
    def __getitem__(self, key: TaskHandle | str | list[Any] | TaskHandles) -> Any:
        """Return a task's value.

        Raises:
            MissingResult: the task did not complete.
            ResultReleased: it did, but its value was no output of the run.
            UnknownTask: no task of that name, or the task was declared after the run had begun.
            ForeignHandle: a handle of another workflow: of one that was included, of a copy, or of the original of a
                copy.
            WorkflowError: the key is neither a handle nor a name.
        """
        if isinstance(key, TaskHandles):
            return [self._value(index) for index in self._plan.indices_of(key)]
        if isinstance(key, list):
            return [self[part] for part in key]
        return self._value(self._plan.index_of(key))

    def record(self, key: TaskHandle | str) -> TaskRecord:
        """Return the record of one task.

        Raises:
            UnknownTask: no task of that name, or the task was declared after the run had begun.
            ForeignHandle: a handle of another workflow.
            WorkflowError: the key is neither a handle nor a name.
        """
        return self._record(self._plan.index_of(key))

    def status_counts(self) -> dict[str, int]:
        """Count the tasks of each status that occurs."""
        counts = np.bincount(self._status, minlength=len(Status)).tolist()
        return {status.name.lower(): n for status, n in zip(Status, counts, strict=True) if n}

    def standing(self) -> Standing:
        """Return where the run and its tasks stand, in the form in which `AuditLog.replay` tells it from events.

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
        told = np.flatnonzero((ledger.worker >= 0) | not_run).tolist()
        return Standing(
            self.run_id,
            plan.workflow_name,
            self.status,
            plan.n_tasks,
            self.status_counts(),
            {plan.name(task): self._task_standing(task) for task in told},
        )

    def layer_table(self) -> list[LayerRow]:
        """Return a row a layer in which a task ran: its wall time beside its longest task."""
        return self.table().layer_table()

    def table(self) -> RunTable:
        """Return what is known of the run and its tasks as columns, the same as a run store gives of it.

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
            failures=self._failures(),
            errors={task: error_text(error) for task, error in ledger.errors.items()},
        )

    def trace(self, path: Path | str) -> None:
        """Write the run to a file that https://ui.perfetto.dev and chrome://tracing open: who did what when.

        Raises:
            OSError: it cannot be written.
        """
        Writers.trace(self.table(), check_path("path", path))

    def report(self, path: Path | str) -> None:
        """Write the run as one HTML file that opens anywhere, without a network: what ran where and when, and failures.

        Args:
            path: the file, such as "run.html"; one that is there is replaced. Its folder must be there.

        Raises:
            ModuleNotFoundError: bokeh is not installed, the extra ``report``.
            OSError: the file cannot be written.
        """
        Writers.report(self.table(), check_path("path", path))

    def _failures(self) -> list[FailedAttempt]:
        """Return every attempt that failed; when those began that were tried again is known by their event."""
        plan, ledger = self._plan, self._ledger
        found: list[FailedAttempt] = []
        for event in self.events:
            match event:
                case WorkflowTaskRetried():
                    attempt, error = event.attempt - 1, None
                case WorkflowToolFallback():
                    attempt, error = event.attempt, None
                case WorkflowTaskFailed():
                    attempt, error = event.attempt, self.errors.get(event.task)
                case _:
                    continue
            task = plan.find(event.task)
            start, seconds, worker = math.nan, math.nan, -1
            if error is not None:
                start, seconds = float(ledger.start[task] - ledger.began), float(ledger.duration[task])
                worker = int(ledger.worker[task])
            trace = "" if error is None else "".join(traceback.format_exception(error))
            found.append(FailedAttempt(task, attempt, start, seconds, worker, event.error, trace))
        return found

    def durations(self) -> dict[str, dict[str, float]]:
        """Return how long tasks took, in seconds: by task name, and the mean by the name of their callable.

        Above 100,000 tasks the names are left out. `forgepar layers --durations` and the simulator read this.
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
        """Describe the run in a few lines: counts, times, each layer's wall beside its longest task, failures."""
        counts = ", ".join(f"{n} {status}" for status, n in self.status_counts().items())
        times = f"{_seconds(self.wall_seconds)} on {self._ledger.n_slots} workers, {_seconds(self.cpu_seconds)} of CPU"
        lines = [
            f"workflow {self._plan.workflow_name!r}: {counts}; {times}",
            f"{'layer':>5} {'tasks':>8} {'wall':>10} {'longest':>10} {'work':>10}  longest task",
        ]
        lines += [
            f"{row.layer:>5} {row.n_tasks:>8} {_seconds(row.wall_seconds):>10} {_seconds(row.longest_seconds):>10} "
            f"{_seconds(row.work_seconds):>10}  {escaped_line(row.longest_task)}"
            for row in self.layer_table()
        ]
        if self.bytes.written:
            lines.append(f"values: {self.bytes}")
        if self.rollback.compensated or self.rollback.failed:
            lines.append(f"rolled back: {self.rollback}")
        lines += [f"failed: {escaped_line(name)}: {escaped(error_text(error))}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.status_counts().items())
        return f"<RunResult of {self._plan.workflow_name!r}: {counts}>"

    def _value(self, index: int) -> Any:
        index = self._plan.alias.get(index, index)
        if index in self._values:
            return self._values[index]
        name, status = self._plan.name(index), Status(int(self._status[index]))
        if status in (Status.COMPLETED, Status.COMPENSATED, Status.CACHED):
            raise ResultReleased(
                f"the value of task {name!r} was released after its last consumer was done. "
                f"Keep it with run(outputs=[{name!r}]) or run(outputs='all')."
            )
        failed = self._skipped_for(index)
        cause = self._ledger.errors.get(index if failed is None else failed)
        why = f" with {error_text(cause)}" if cause is not None else ""
        if failed is not None:
            what = "failed" if cause is not None else "was left out"
            why = f", as it waited for {self._plan.name(failed)!r}, which {what}{why}"
            if self._status[failed] in (Status.COMPLETED, Status.CACHED):
                why = f", as {self._plan.name(failed)!r} decided for the other branch"
        raise MissingResult(f"task {name!r} has no value: it is {status.name.lower()}{why}.")

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

    def _task_standing(self, index: int) -> TaskStanding:
        record = self._record(index)
        error = None if record.error is None else error_text(record.error)
        return TaskStanding(record.status, record.attempt, record.worker, error)


class _Names(Sequence[str]):
    """Names of a plan's tasks, each made when it is looked at."""

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


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
