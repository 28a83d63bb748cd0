"""`WorkflowExecutor`: wires a backend and sinks to runs, and keeps the workers warm between them."""

from __future__ import annotations

import inspect
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import forgepar.fromgraph  # noqa: F401  (it lends `Workflow.from_graph` what it needs)
from forgepar.backends.base import Backend
from forgepar.backends.inline import InlineBackend
from forgepar.backends.output import rules_here
from forgepar.backends.process import ProcessBackend
from forgepar.backends.surroundings import Surroundings, here, pack
from forgepar.backends.worker import inside_worker
from forgepar.cancellation import CancellationToken
from forgepar.checks import Finding  # noqa: F401  (it lends `Workflow.check` what it needs)
from forgepar.combinators import Included  # noqa: F401  (it lends `Workflow.include` what it needs)
from forgepar.console import Console, Show
from forgepar.contexts import RunFacts
from forgepar.dispatch import Dispatcher
from forgepar.displays import Display, Shielded
from forgepar.errors import RunTimeout, WorkflowError, WorkflowFailed, WrongProcess
from forgepar.events import Sink
from forgepar.forking import fork_safe
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.machine import as_bytes, available_cpus
from forgepar.memory import Guard, Memory
from forgepar.plan import Plan
from forgepar.priors import Resume
from forgepar.recording import Recording, recording
from forgepar.result import RunResult, Writers
from forgepar.rollback import RollbackReport, Strategy
from forgepar.runstate import RunPolicy, Wear
from forgepar.runtable import RunTable
from forgepar.shipping import Cargo, Shipment
from forgepar.sinks import Audit, open_sinks
from forgepar.snapshot import RunSnapshot, look, snapshot
from forgepar.standing import error_text
from forgepar.subflow import Subflow  # noqa: F401  (it lends `Workflow.map` what it needs)
from forgepar.validation import (
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_seconds,
    check_workers,
    is_count,
    is_flag,
    shown,
)
from forgepar.values.modulestate import ModuleState
from forgepar.workflow import Engine, Workflow

_MOST_NAMES = 5  # of tasks in a message
_MAY_RUN_HERE = (InlineBackend.name, "futures")  # backends whose tasks print to this process's own streams


class WorkflowExecutor:
    """Owns workers and runs workflows on them, one at a time.

    Workers start at the first run and stay until `close`, so that later runs find them warm. In a worker (a task that
    runs a workflow) every executor works inline: workers do not start workers.

    Args:
        workers: how many worker processes; None: one for each CPU this process may use.
        backend: "process" or "inline" (in this process, one task after the other, for debugging); or a backend made
            for the purpose, such as `FuturesBackend` or `DaskBackend`, which has its own workers (then none of the
            other arguments) and is closed with the executor.
        start_method: "forkserver", "spawn" or "fork"; None: forkserver where there is one, else spawn.
        memory_budget: most bytes of large values to hold in shared memory at once, or text such as "2GiB"; what does
            not fit goes to the temporary folder. None: half of the memory that is available.
        max_tasks_per_worker: replace a worker by a new one after so many tasks; for code that leaks.
        max_worker_memory: replace a worker that had so much memory, bytes or text, once it is between batches.

    Raises:
        ValueError: an argument that cannot be.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> doubled = wf.map(divmod, [7, 9], [2, 2])
        >>> with WorkflowExecutor(backend="inline") as executor:
        ...     executor.run(wf)[doubled]
        [(3, 1), (4, 1)]
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        backend: Literal["process", "inline"] | Backend = "process",
        start_method: str | None = None,
        memory_budget: int | str | None = None,
        max_tasks_per_worker: int | None = None,
        max_worker_memory: int | str | None = None,
    ) -> None:
        check_workers("workers", workers)
        budget = None if memory_budget is None else as_bytes(memory_budget, "memory_budget")
        worn_bytes = None if max_worker_memory is None else as_bytes(max_worker_memory, "max_worker_memory")
        if max_tasks_per_worker is not None and not is_count(max_tasks_per_worker, 1):
            raise ValueError(
                f"max_tasks_per_worker={shown(max_tasks_per_worker)} is no count. Give 1 or more, or None."
            )
        if start_method is not None and isinstance(backend, str):
            check_choice("start_method", start_method, multiprocessing.get_all_start_methods())
        self._backend: Backend
        if not isinstance(backend, str):
            self._backend = _checked_backend(
                backend,
                workers=workers,
                start_method=start_method,
                memory_budget=memory_budget,
                max_tasks_per_worker=max_tasks_per_worker,
                max_worker_memory=max_worker_memory,
            )
        elif backend not in ("process", "inline"):
            raise ValueError(f"backend={shown(backend)} is not known. Give 'process', 'inline', or a backend.")
        elif backend == "inline" or inside_worker():
            self._backend = InlineBackend(budget)
        else:
            self._backend = ProcessBackend(workers or available_cpus(), start_method, budget)
        has_workers = not isinstance(self._backend, InlineBackend)  # this process cannot be replaced
        self._wear = Wear(max_tasks_per_worker, worn_bytes) if has_workers else Wear()
        # Workers of forgepar's own are compared with this process; those of others have their own modules.
        self._module_state = ModuleState() if self._backend.name == ProcessBackend.name else None
        self._runs = itertools.count()
        self._batches = itertools.count(1)
        self._guard = Guard()
        # Closing the backend, at the end of the program, waits for the run; so does a run in another thread.
        self._lock = getattr(self._backend, "lock", None) or fork_safe(threading.RLock())
        self._owner: int | None = None  # the process that opened the backend
        self._runs_in: int | None = None  # the thread that a run goes in
        self._is_to_close = False
        self._dispatcher: Dispatcher | None = None

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return self._backend.n_slots

    @property
    def state(self) -> RunSnapshot | None:
        """How the run that goes stands at this moment, as a whole; None where none does. To be asked from any thread.

        To ask costs the run the time that it takes, 0.1 ms and 1 us for every thousand tasks; now and then is free.

        Raises:
            TimeoutError: the run was not at rest long enough for a look, for a second or more.
            WrongProcess: this process was forked from the one that the workers belong to.
        """
        self._check_process()
        dispatcher = self._dispatcher
        return snapshot(dispatcher) if dispatcher is not None else None

    def run(
        self,
        workflow: Workflow,
        *,
        outputs: Literal["leaves", "all"] | TaskHandle | TaskHandles | Iterable[Any] = "leaves",
        schedule: Literal["layers", "eager"] = "layers",
        fail_fast: bool = True,
        rollback: Strategy = "all",
        timeout: float | None = None,
        layer_timeout: float | None = None,
        rollback_timeout: float | None = None,
        seed: int = 0,
        cancel: CancellationToken | None = None,
        show: Show = "plain",
        audit: Audit = None,
        store: str | os.PathLike[str] | None = None,
        resume: bool | Resume = False,
        progress: bool | Display | None = None,
    ) -> RunResult:
        """Run a workflow and wait for it.

        Args:
            workflow: what to run. It is not changed, and may be run again.
            outputs: whose values the result keeps: "leaves" (tasks whose value no other takes), "all", or handles and
                names. Other values are freed as soon as nobody is to take them.
            schedule: "layers": all of a layer is done before the next starts. "eager": a task starts as soon as
                what it waits for is done.
            fail_fast: end at the first failure: no task starts after it, running ones get a second. Otherwise all
                that does not depend on a failed task runs first.
            rollback: which tasks to undo by their ``compensate`` when the run fails or is called off: "all" that were
                done, "upstream": those that a failed one depended on, "none", or those whose name a function accepts.
                The last layer goes first. Nothing is undone at an interrupt or a SIGTERM.
            timeout: seconds that the run may take; what runs then gets a second, and the run fails with `RunTimeout`.
            layer_timeout: the same for each layer, under the schedule "layers".
            rollback_timeout: seconds that undoing may take after that; what is not undone by then is told in the
                result's ``rollback`` and in the error. None: as many again as ``timeout``, any number without one.
            seed: what chance in the run derives from, such as the jitter of retries.
            cancel: calls the run off: nothing more is started, what runs comes to its end (or is ended, if so told).
            show: how to show what tasks print: "plain", as it is; "tagged", each line behind its task's name; or what
                is to be called with each `OutputLine`. What they log and warn of always goes to `logging` and
                `warnings` of this process.
            audit: who is told of each `forgepar.events.Event` as it happens: the path of a file that gets a line of
                JSON for each (`AuditLog.load` reads it), a `logging.Logger`, a function of an event, a
                `forgepar.events.Sink`, or a list of these. The result has them all in any case.
            store: the file of a run store (`forgepar.Store` reads it): the run is kept in it as it goes, with what its
                tasks returned. It is made where there is none. Its values are pickles, so use only one of your own.
            resume: whether tasks need not run whose values the store has from earlier runs, as neither their code, nor
                their arguments, nor what they depend on has changed since; or a `Resume`, which says more.
            progress: True shows on standard error how the run goes: bars on a terminal or in a notebook (with the
                extra ``cli``), else a line now and then. A `forgepar.displays.Display` shows it its own way.

        Returns:
            Values and records; of a run that was called off (``.status`` is "cancelled"), those there are.

        Raises:
            WorkflowError: the workflow cannot be run as it is (empty, cyclic, something that cannot be pickled);
                nothing was started.
            StoreError: the store cannot be used as it is, or (`StoreBusy`) another run of the workflow goes in it.
            WorkflowFailed: a task failed; ``.exceptions`` are the tasks' own, ``.result`` has what was done.
            WorkerStartFailed: worker processes end before they take work, or the system lets this process have none.
            OSError: an argument could not be read when it was pickled, or be written to shared memory (`ArenaFull`:
                for want of room).
            WrongProcess: this process was forked from the one that the workers belong to.
            KeyboardInterrupt: the workers are killed; the next run starts new ones.
            SystemExit: the same, at a SIGTERM that the program does not handle itself.
        """
        self._check_process()
        check_instance("workflow", workflow, Workflow, "a Workflow")
        check_choice("schedule", schedule, ("layers", "eager"))
        check_flag("fail_fast", fail_fast)
        check_choice("rollback", rollback, ("all", "upstream", "none"), or_callable=True)
        check_choice("show", show, ("plain", "tagged"), or_callable=True)
        check_count("seed", seed, 0)
        if cancel is not None:
            check_instance("cancel", cancel, CancellationToken, "a CancellationToken, or None")
        timeout, layer_timeout = check_seconds("timeout", timeout), check_seconds("layer_timeout", layer_timeout)
        rollback_timeout = check_seconds("rollback_timeout", rollback_timeout)
        taking_up = _as_resume(store, resume)
        if not (progress is None or is_flag(progress) or _is_display(progress)):
            raise ValueError(
                f"progress={shown(progress)} is not known. Give True, False, or a forgepar.displays.Display."
            )
        workflow.check_runnable()
        plan: Plan = workflow.plan()
        policy = RunPolicy(
            _output_tasks(workflow, outputs),
            schedule,
            fail_fast,
            rollback=rollback,
            timeout=timeout,
            layer_timeout=layer_timeout,
            rollback_seconds=timeout if rollback_timeout is None else rollback_timeout,
            seed=seed,
            wear=self._wear,
        )
        surroundings = pack(here() if self._backend.name == ProcessBackend.name else Surroundings(rules_here()))
        cargo = Cargo(plan, self._module_state, workflow.refers_to, forgets=True)
        with self._lock, self._alone(), open_sinks(audit) as sinks, recording(store, plan, policy, taking_up) as keeper:
            return self._run(plan, policy, cargo, surroundings, cancel, Console(plan, show), sinks, keeper, progress)

    def close(self) -> None:
        """End the workers. The next run would start new ones. In a forked child, leave them to the parent.

        While a run goes, it waits for its end; from a callback of the run, or a signal handler, they end behind it.
        An interrupt may end it anywhere; the next call goes on from there, and the end of the program makes one.
        """
        if self._runs_in == threading.get_ident():
            self._is_to_close = True
            return
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._is_to_close = False
        if self._owner in (None, os.getpid()):
            self._backend.close()
            self._owner = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second run by the thread that a run goes in; those of other threads wait for the lock."""
        if self._runs_in is not None:
            raise RuntimeError(
                "A callback of a run, or a signal handler amid one, cannot run a workflow on the same executor. "
                "Use another one, or run it after that."
            )
        try:
            self._runs_in = threading.get_ident()
            yield
        finally:
            self._runs_in = None
            if self._is_to_close:
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call_off(self) -> None:
        if self._owner == os.getpid():  # a child that a callback has forked calls nothing off
            self._backend.call_off()

    def _check_process(self) -> None:
        if self._owner not in (None, os.getpid()):
            raise WrongProcess.here(self._owner)

    def _run(
        self,
        plan: Plan,
        policy: RunPolicy,
        cargo: Cargo,
        surroundings: bytes,
        cancel: CancellationToken | None,
        console: Console,
        sinks: Sequence[Sink],
        keeper: Recording | None,
        progress: bool | Display | None,
    ) -> RunResult:
        backend = self._backend
        self._owner = os.getpid()
        memory = Memory(plan, backend, self._guard, watches=backend.ends_workers)
        try:
            backend.open(0 if keeper is not None and keeper.all_done else _n_useful(plan, policy))
        except BaseException:
            self._close()  # an interrupt may have left a worker that was half started
            raise
        display = _display(progress)  # what it loads, it loads while workers start
        facts = RunFacts(
            os.urandom(8).hex(),
            plan.workflow_name,
            policy.seed,
            math.inf if policy.timeout is None else time.perf_counter() + policy.timeout,
        )
        one_layer = policy.schedule == "layers"
        number = next(self._runs)
        shipment = Shipment(cargo, backend.arena, number, backend.n_slots, facts, surroundings, one_layer=one_layer)
        dispatcher = Dispatcher(
            plan,
            policy,
            backend,
            facts.run_id,
            shipment,
            sinks,
            self._batches.__next__,
            memory,
            console,
            cancel,
            keeper,
            display,
        )
        forget = cancel.on_cancel(self._call_off) if cancel is not None else None
        streams = console.replacing_streams() if backend.name in _MAY_RUN_HERE else nullcontext()
        try:
            with _exit_on_termination(), _showing(display, dispatcher), streams:
                self._dispatcher = dispatcher
                dispatcher.run()
            outputs = dispatcher.outputs()
        except BaseException:
            self._close()  # slots may have work left over
            raise
        finally:
            self._dispatcher = None
            if forget is not None:
                forget()
        undone = dispatcher.rollback.report() if dispatcher.rollback is not None else RollbackReport()
        plan = dispatcher.plan
        books = dispatcher.books
        result = RunResult(plan, dispatcher.state.status, books.ledger, outputs, books.events, undone)
        if keeper is not None:
            keeper.finish(result.status)
            result.not_stored = keeper.not_stored()
        if not result.ok and (result.errors or not dispatcher.was_cancelled):
            raise _failure(plan, result, dispatcher.ended_by)
        return result


def _display(progress: bool | Display | None) -> Display | None:
    if progress is None or progress is False:
        return None
    if progress is True:
        from forgepar.report.progress import progress_display

        # A forked worker of a notebook is none itself: what a task shows is printed.
        progress = progress_display(sys.stderr if inside_worker() else None)
    return Shielded(progress)


@contextmanager
def _showing(display: Display | None, dispatcher: Dispatcher) -> Iterator[None]:
    """Have a display show a run, and go however that ends."""
    if display is None:
        yield
        return
    display.begin(lambda: look(dispatcher))
    try:
        yield
    finally:
        display.close()


@contextmanager
def _exit_on_termination() -> Iterator[None]:
    """Have a SIGTERM end the program by way of its own clean-up, if nothing else is to be done at one."""
    is_default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # as shells tell it


def _output_tasks(workflow: Workflow, outputs: Any) -> Literal["leaves", "all"] | tuple[int, ...]:
    if isinstance(outputs, str) and outputs in ("leaves", "all"):
        return "leaves" if outputs == "leaves" else "all"
    return tuple(_named_tasks(workflow, outputs))


def _checked_backend(backend: Any, **others: Any) -> Backend:
    if isinstance(backend, type) or not all(hasattr(backend, name) for name in _OF_BACKENDS):
        raise ValueError(
            f"backend={shown(backend)} is no backend. Give 'process', 'inline', or one such as "
            "FuturesBackend(executor)."
        )
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"{given[0]}= is for workers that forgepar starts, and {backend.name!r} has its own. "
            f"Leave it out, or say it to what was given as backend="
        )
    found: Backend = backend
    return found


def _n_useful(plan: Plan, policy: RunPolicy) -> int:
    """Tell how many workers a run can use at once at most: to start more would only take time and memory."""
    if policy.schedule == "eager":
        return plan.n_tasks
    return max(end - begin for begin, end in pairwise(plan.layer_start))


def _named_tasks(workflow: Workflow, outputs: Any) -> Iterable[int]:
    if isinstance(outputs, (str, TaskHandle)):
        return (workflow.index_of(outputs),)
    if isinstance(outputs, TaskHandles):
        workflow.refuse_foreign([outputs])
        return outputs.indices
    if isinstance(outputs, Mapping) or not isinstance(outputs, Iterable):
        raise WorkflowError(
            f"outputs={shown(outputs)} names no tasks. Give 'leaves', 'all', handles, or names of tasks."
        )
    return (index for part in outputs for index in _named_tasks(workflow, part))


def _as_resume(store: object, resume: bool | Resume) -> Resume | None:
    if not isinstance(resume, (bool, Resume)):
        raise ValueError(f"resume={shown(resume)} is not known. Give True, False, or a forgepar.Resume.")
    if resume and store is None:
        raise ValueError(f"resume={resume!r} needs a store to take values from. Give store='runs.db' as well.")
    return resume if isinstance(resume, Resume) else Resume() if resume else None


def _is_display(progress: object) -> bool:
    return not isinstance(progress, type) and all(hasattr(progress, name) for name in ("begin", "beat", "close"))


def _failure(plan: Plan, result: RunResult, ended_by: RunTimeout | None) -> WorkflowFailed:
    told = [f"{name!r} ({error_text(error)})" for name, error in list(result.errors.items())[:3]]
    if len(result.errors) > len(told):
        told.append(f"and {len(result.errors) - len(told)} more")
    message = (
        f"{len(result.errors)} of {plan.n_tasks} tasks of workflow {plan.workflow_name!r} failed: {', '.join(told)}; "
        ".result has what was done"
    )
    if ended_by is not None:
        message = f"{ended_by}; {message}"
    undone = result.rollback
    if undone.compensated or undone.failed:
        message += f"; rolled back {len(undone.compensated)} tasks"
        if undone.failed:
            names = ", ".join(map(repr, list(undone.failed)[:_MOST_NAMES]))
            more = len(undone.failed) - _MOST_NAMES
            message += f", but not {names}" + (f" and {more} more (.result.rollback.failed)" if more > 0 else "")
    failure = WorkflowFailed(message, [*([ended_by] if ended_by else []), *result.errors.values()])
    failure.result = result
    return failure


def _run_alone(workflow: Workflow, rules: dict[str, Any]) -> RunResult:
    """Run a workflow with an executor of its own; ``rules`` are the arguments of both."""
    for name in rules:
        if name not in _RULES:
            raise TypeError(f"{name}= is no argument of a run. Give one of {', '.join(sorted(_RULES))}.")
    mine = [name for name in inspect.signature(WorkflowExecutor).parameters if name in rules]
    with WorkflowExecutor(**{name: rules.pop(name) for name in mine}) as executor:
        return executor.run(workflow, **rules)


def _draw(workflow: Workflow, form: str, rules: dict[str, Any]) -> str:
    from forgepar.report.diagram import draw  # few programs draw: what it takes to load is theirs to wait for

    return draw(workflow, form, **rules)


def _write_trace(table: RunTable, path: Path | str) -> None:
    from forgepar.report.trace import write_trace  # as above

    write_trace(table, path)


def _write_report(table: RunTable, path: Path | str) -> None:
    from forgepar.report.html import write_report  # as above

    write_report(table, path)


_OF_BACKENDS = ("open", "send", "wait", "close", "n_slots")
_RULES = frozenset(
    name
    for call in (WorkflowExecutor, WorkflowExecutor.run)
    for name in inspect.signature(call).parameters
    if name not in ("self", "workflow")
)
Engine.run = _run_alone
Engine.draw = _draw
Writers.trace = _write_trace
Writers.report = _write_report
