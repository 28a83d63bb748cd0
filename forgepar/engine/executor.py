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
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from forgepar._validate import (
    check_choice,
    check_instance,
    check_names,
    check_workers,
    is_count,
    names_checked,
    shown,
)
from forgepar.backends.base import Backend
from forgepar.backends.inline import InlineBackend
from forgepar.backends.open_backends import drop
from forgepar.backends.output_capture import rules_here
from forgepar.backends.process import ProcessBackend
from forgepar.backends.surroundings import Surroundings, here, pack
from forgepar.backends.worker import inside_worker
from forgepar.engine.batches import BatchWriter, PickledPlan
from forgepar.engine.cancellation import CancellationToken
from forgepar.engine.console import Console, Show
from forgepar.engine.dispatcher import Dispatcher
from forgepar.engine.memory import Memory, MemoryMonitor
from forgepar.engine.run_options import (
    RunOptions,
    checked_backend,
    checked_display,
    checked_policy,
    checked_resume,
    failure_of,
    not_a_backend,
)
from forgepar.engine.services import RunServices
from forgepar.engine.snapshot import RunSnapshot, look, snapshot
from forgepar.errors import WrongProcess
from forgepar.machine import as_bytes, available_cpus
from forgepar.records.display import Display, GuardedDisplay, NullDisplay
from forgepar.records.events import Sink
from forgepar.records.keeper import NullKeeper
from forgepar.records.result import RunResult
from forgepar.records.sinks import Audit, open_sinks
from forgepar.scheduling.rollback import Strategy
from forgepar.scheduling.run_state import RecycleLimits, RunPolicy
from forgepar.store.resume import Resume
from forgepar.store.writer import StoreWriter, store_writer
from forgepar.system.loading import loading
from forgepar.values.module_state import ModuleState
from forgepar.version import public
from forgepar.workflow.context import RunContext
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.plan import Plan
from forgepar.workflow.workflow import Workflow


@public
class WorkflowExecutor:
    """Owns workers and runs workflows on them, one at a time.

    Workers start with the first run and stay until `close`, so that later runs find them warm. In a worker (a task that
    runs a workflow) every executor runs tasks inline: workers do not start workers.

    Args:
        workers: number of worker processes; None for one per CPU that this process may use.
        backend: "process" or "inline" (in this process, one task after another, for debugging); or a backend such as
            `FuturesBackend` or `DaskBackend`, which has its own workers (so the other arguments must be left out) and
            is closed with the executor.
        start_method: "forkserver", "spawn" or "fork"; None for forkserver if there is one, else spawn.
        memory_budget: most bytes of large values in shared memory at once, or text such as "2GiB"; what does not fit
            goes to the temporary folder. None for half of the available memory.
        max_tasks_per_worker: replace each worker after so many tasks, for code that leaks; None for never.
        max_worker_memory: replace a worker between batches if it had so much memory, bytes or text; None for never.

    Raises:
        ValueError: an argument has a wrong value.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> doubled = wf.map(divmod, [7, 9], [2, 2])
        >>> with WorkflowExecutor(backend="inline") as executor:
        ...     executor.run(wf)[doubled]
        [(3, 1), (4, 1)]
    """

    @names_checked
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
        most_memory = None if max_worker_memory is None else as_bytes(max_worker_memory, "max_worker_memory")
        if max_tasks_per_worker is not None and not is_count(max_tasks_per_worker, 1):
            raise ValueError(
                f"max_tasks_per_worker must be a positive integer or None, got {shown(max_tasks_per_worker)}."
            )
        if start_method is not None and isinstance(backend, str):
            check_choice("start_method", start_method, multiprocessing.get_all_start_methods())
        self._backend: Backend
        if not isinstance(backend, str):
            self._backend = checked_backend(
                backend,
                workers=workers,
                start_method=start_method,
                memory_budget=memory_budget,
                max_tasks_per_worker=max_tasks_per_worker,
                max_worker_memory=max_worker_memory,
            )
        elif backend not in ("process", "inline"):
            raise ValueError(not_a_backend(backend))
        elif backend == "inline" or inside_worker():
            self._backend = InlineBackend(budget)
        else:
            self._backend = ProcessBackend(workers or available_cpus(), start_method, budget)
            weakref.finalize(self, drop, self._backend).atexit = False
        has_workers = not isinstance(self._backend, InlineBackend)  # this process cannot be replaced
        self._recycling = RecycleLimits(max_tasks_per_worker, most_memory) if has_workers else RecycleLimits()
        # The modules of forgepar's own workers are compared with this process; other workers have their own modules.
        self._module_state = ModuleState() if self._backend.name == ProcessBackend.name else None
        self._runs = itertools.count()
        self._batches = itertools.count(1)
        self._monitor = MemoryMonitor()
        # The end of the program waits for the run before it closes the backend; so does a run in another thread.
        self._lock = self._backend.lock
        self._owner: int | None = None  # the process that opened the backend
        self._runs_in: int | None = None  # the thread of the present run
        self._is_to_close = False
        self._dispatcher: Dispatcher | None = None

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self._backend.n_slots

    @property
    def state(self) -> RunSnapshot | None:
        """The state of the present run at one moment; None if there is no run. It can be read from any thread.

        The run waits meanwhile: 0.1 ms, and 1 us per thousand tasks.

        Raises:
            TimeoutError: the run was never at rest for long enough, for a second or more.
            WrongProcess: this process was forked from the one that owns the workers.
        """
        self._check_process()
        dispatcher = self._dispatcher
        return snapshot(dispatcher) if dispatcher is not None else None

    @names_checked
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
            workflow: what to run. It is not changed, and can be run again.
            outputs: the values that the result keeps: "leaves" (of tasks with a value that no other task takes),
                "all", or handles and names. Other values are freed after their last consumer.
            schedule: "layers": all of a layer is done before the next layer starts. "eager": a task starts as soon as
                its dependencies are done.
            fail_fast: end the run at the first failure: no task starts after it, and those that run get one second.
                If False, everything that does not depend on a failed task runs first.
            rollback: which tasks to undo with their ``compensate`` when the run fails or is cancelled: "all" that
                completed, "upstream" (those that a failed task depended on), "none", or a function of a task's name
                that returns whether to undo it. The last layer comes first. An interrupt or SIGTERM undoes nothing.
            timeout: seconds for the run; what runs then gets one second, and the run fails with `RunTimeout`.
            layer_timeout: the same for each layer, under the schedule "layers".
            rollback_timeout: seconds for the rollback; the result's ``rollback`` and the error name what was not undone
                by then. None for the same as ``timeout``.
            seed: seed of all randomness in the run, such as the jitter of retries.
            cancel: cancels the run: nothing more starts, and what runs continues to its end (or is ended, see
                `CancellationToken.cancel`).
            show: how to show what tasks print: "plain"; "tagged", with the task's name before each line; or a function
                of an `OutputLine`. Log records and warnings always go to `logging` and `warnings` of this process.
            audit: gets each `forgepar.Event` as it happens: the path of a file for one line of JSON per event
                (`AuditLog.load` reads it), a `logging.Logger`, a function of an event, a `forgepar.Sink`, or a list of
                these. The result has all events in any case.
            store: the file of a run store (`forgepar.Store` reads it), which is created if it does not exist. The run
                and the values of its tasks are written to it during the run. Values are pickles: use only a store of
                your own.
            resume: whether to take values of earlier runs from the store, instead of running tasks, if neither their
                code nor their arguments nor their dependencies have changed; or a `Resume` with details.
            progress: True shows the progress on standard error: bars on a terminal or in a notebook (with the extra
                ``cli``), else a line now and then. A `forgepar.Display` shows it in its own way.

        Returns:
            Values and records; of a run that was cancelled (``.status`` is "cancelled"), those there are.

        Raises:
            WorkflowError: the workflow cannot be run (it is empty or cyclic, or something cannot be pickled); nothing
                was started.
            StoreError: the store cannot be used, or (`StoreBusy`) another run of the workflow uses it.
            WorkflowFailed: a task failed; ``.exceptions`` are those of the tasks, ``.result`` has what was done.
            WorkerStartFailed: worker processes end before they take work, or the system allows this process none.
            OSError: an argument could not be read when it was pickled, or not be written to shared memory (`ArenaFull`:
                there is no room).
            WrongProcess: this process was forked from the one that owns the workers.
            KeyboardInterrupt: the workers were killed; the next run starts new ones.
            SystemExit: the same, after a SIGTERM that the program does not handle itself.
        """
        self._check_process()
        options: RunOptions = {
            "outputs": outputs,
            "schedule": schedule,
            "fail_fast": fail_fast,
            "rollback": rollback,
            "timeout": timeout,
            "layer_timeout": layer_timeout,
            "rollback_timeout": rollback_timeout,
            "seed": seed,
        }
        policy = checked_policy(workflow, options, self._recycling)
        check_choice("show", show, ("plain", "tagged"), or_callable=True)
        cancel = CancellationToken() if cancel is None else cancel
        check_instance("cancel", cancel, CancellationToken, "a CancellationToken, or None")
        taking_up, shown_by = checked_resume(store, resume), checked_display(progress)
        plan = workflow.plan()
        surroundings = pack(here() if self._backend.name == ProcessBackend.name else Surroundings(rules_here()))
        pickled_plan = PickledPlan(plan, self._module_state, workflow.refers_to, forgets=True)
        with (
            self._lock,
            self._alone(),
            open_sinks(audit) as sinks,
            store_writer(store, plan, policy, taking_up) as keeper,
        ):
            return self._run(
                plan, policy, pickled_plan, surroundings, cancel, Console(plan, show), sinks, keeper, shown_by
            )

    def close(self) -> None:
        """End the workers; the next run starts new ones. In a forked child, leave them to the parent.

        During a run, this waits for its end; called from a callback of the run or a signal handler, the workers end
        after the run. If an interrupt ends this call, the next one continues; the end of the program makes one.
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
        """Refuse a second run in the thread of the present run; runs of other threads wait for the lock."""
        if self._runs_in is not None:
            raise RuntimeError(
                "A callback or signal handler of a run cannot run a workflow on the same executor. "
                "Use another executor, or run the workflow after that."
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
        if self._owner == os.getpid():  # not in a child that a callback has forked
            self._backend.call_off()

    def _check_process(self) -> None:
        if self._owner not in (None, os.getpid()):
            raise WrongProcess.here(self._owner)

    def _run(
        self,
        plan: Plan,
        policy: RunPolicy,
        pickled_plan: PickledPlan,
        surroundings: bytes,
        cancel: CancellationToken,
        console: Console,
        sinks: Sequence[Sink],
        keeper: StoreWriter | None,
        progress: bool | Display,
    ) -> RunResult:
        backend = self._backend
        self._owner = os.getpid()
        memory = Memory(plan, backend, self._monitor, watches=backend.traits.ends_workers)
        try:
            backend.open(0 if keeper is not None and keeper.all_done else _n_useful(plan, policy))
        except BaseException:
            self._close()  # an interrupt may have left a worker half started
            raise
        display = _display(progress)  # what it loads, it loads while workers start
        services = RunServices(sinks, console, cancel, keeper or NullKeeper(), display)
        dispatcher = self._dispatcher_for(plan, policy, pickled_plan, surroundings, memory, services)
        forget = cancel.on_cancel(self._call_off)
        streams = console.replacing_streams() if backend.traits.may_run_here else nullcontext()
        try:
            with _exit_on_termination(), _showing(display, dispatcher), streams:
                self._dispatcher = dispatcher
                dispatcher.run()
            result = dispatcher.result()
        except BaseException:
            self._close()  # slots may still have work
            raise
        finally:
            self._dispatcher = None
            forget()
        if keeper is not None:
            keeper.finish(result.status)
            result.not_stored = keeper.not_stored()
        if not result.ok and (result.errors or not dispatcher.was_cancelled):
            raise failure_of(dispatcher.tasks.plan, result, dispatcher.ended_by)
        return result

    def _dispatcher_for(
        self,
        plan: Plan,
        policy: RunPolicy,
        pickled_plan: PickledPlan,
        surroundings: bytes,
        memory: Memory,
        services: RunServices,
    ) -> Dispatcher:
        backend, number = self._backend, next(self._runs)
        ends_at = math.inf if policy.timeout is None else time.perf_counter() + policy.timeout
        facts = RunContext(os.urandom(8).hex(), plan.workflow_name, policy.seed, ends_at)
        one_layer = policy.schedule == "layers"
        batch_writer = BatchWriter(
            pickled_plan, backend.arena, number, backend.n_slots, facts, surroundings, one_layer=one_layer
        )
        next_batch = self._batches.__next__
        return Dispatcher(plan, policy, backend, facts.run_id, batch_writer, next_batch, memory, services)


def _display(progress: bool | Display) -> Display:
    if progress is False:
        return NullDisplay()
    if progress is True:
        with loading:
            from forgepar.report.progress.display import progress_display

        # A forked worker of a notebook is not a notebook: what a task shows is printed.
        progress = progress_display(sys.stderr if inside_worker() else None)
    return GuardedDisplay(progress)


@contextmanager
def _showing(display: Display, dispatcher: Dispatcher) -> Iterator[None]:
    """Have a display show a run, and close it however the run ends."""
    display.begin(lambda: look(dispatcher))
    try:
        yield
    finally:
        display.close()


@contextmanager
def _exit_on_termination() -> Iterator[None]:
    """Have a SIGTERM end the program with its clean-up, if the program has no handler of its own."""
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
    raise SystemExit(128 + number)  # as shells report it


def _n_useful(plan: Plan, policy: RunPolicy) -> int:
    """Return how many workers a run can use at once: to start more would only take time and memory."""
    if policy.schedule == "eager":
        return plan.n_tasks
    return plan.widest_layer


def run_alone(workflow: Workflow, rules: RunOptions) -> RunResult:
    """Run a workflow with an executor of its own; ``rules`` are the arguments of both."""
    check_names("Workflow.run", rules, _RULES)
    given: dict[str, Any] = dict(rules)
    mine = {name: given.pop(name) for name in _EXECUTOR_RULES if name in given}
    with WorkflowExecutor(**mine) as executor:
        return executor.run(workflow, **given)


_EXECUTOR_RULES = frozenset(inspect.signature(WorkflowExecutor).parameters)
_RULES = _EXECUTOR_RULES | frozenset(inspect.signature(WorkflowExecutor.run).parameters) - {"self", "workflow"}
