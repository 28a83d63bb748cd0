"""A run at one moment: immutable, made on request, from any thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgepar.backends.worker_board import unmark
from forgepar.engine.dispatcher import Dispatcher
from forgepar.records import time_left
from forgepar.records.display import RunningTask, RunView
from forgepar.records.time_left import Groups
from forgepar.scheduling.run_state import Status
from forgepar.version import public

_TRIES = 10_000  # the dispatcher is at rest most of the time
_PAUSE_SECONDS = 1e-4


@public
@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run at one moment.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        n_tasks: how many tasks there are so far.
        counts: how many tasks have each status that occurs; they sum to ``n_tasks``. "running" are those that were
            handed out; each worker runs one of them at a time.
        running: the tasks that workers run.
        layer: the layer that runs, under the schedule "layers"; else the lowest that is not done.
        n_layers: how many layers there are so far.
        bytes_held: what large values take in shared memory, bytes.
        elapsed_seconds: how long the run has taken so far.
        seconds_left: the estimated time until all tasks are done, by the durations so far; nan until a task has ended.
    """

    run_id: str
    workflow: str
    n_tasks: int
    counts: Mapping[str, int]
    running: tuple[RunningTask, ...]
    layer: int
    n_layers: int
    bytes_held: int
    elapsed_seconds: float
    seconds_left: float

    @property
    def fraction(self) -> float:
        """How much of the run is settled, 0 to 1."""
        left = self.counts.get("pending", 0) + self.counts.get("running", 0)
        return 1.0 - left / self.n_tasks


def snapshot(dispatcher: Dispatcher) -> RunSnapshot:
    """Return a run's state, from any thread.

    The dispatcher increments its version when it comes to rest and when it continues. A snapshot that was made within
    one rest is of one moment; any other is discarded and made again, also if a change made it fail.

    Raises:
        TimeoutError: the dispatcher was never at rest long enough.
    """
    for _ in range(_TRIES):
        version = dispatcher.version
        if not version % 2:
            try:
                view = look(dispatcher)
                view = view._replace(status=view.status.copy(), start=view.start.copy())
                where = _layer(dispatcher, view.status), dispatcher.tasks.plan.n_layers
            except Exception:
                if dispatcher.version == version:
                    raise
            else:
                if dispatcher.version == version:
                    return _of_view(dispatcher.run_id, view, *where)
        time.sleep(_PAUSE_SECONDS)  # lets the dispatcher have the interpreter
    raise TimeoutError(f"The run was never at rest in {_TRIES} tries, so no snapshot of it was made. Try again later.")


def look(dispatcher: Dispatcher) -> RunView:
    """Return a run's state, from its own thread, between two waits: for displays, ten times a second."""
    tasks, slots, now = dispatcher.tasks, dispatcher.slots, time.perf_counter()
    plan, ledger = tasks.plan, tasks.recorder.ledger
    return RunView(
        plan.workflow_name,
        tasks.state.status,
        plan.layers,
        plan.template_of,
        plan.callable_of,
        slots.durations.seconds,
        tasks.state.layer is not None,
        list(_running(dispatcher, now)),
        slots.pids,
        dispatcher.backend.arena.bytes_held,
        ledger.began or now,
        now,
        ledger.start,
    )


def _of_view(run_id: str, view: RunView, layer: int, n_layers: int) -> RunSnapshot:
    groups = Groups(view.layer, view.template)
    counts = groups.counts(view.status)
    numbers = counts.sum(axis=0).tolist()
    return RunSnapshot(
        run_id,
        view.workflow,
        len(view.status),
        {kind.name.lower(): n for kind, n in zip(Status, numbers, strict=True) if n},
        tuple(task for _, task in view.running),
        layer,
        n_layers,
        view.bytes_held,
        view.now - view.began,
        time_left.of_view(view, groups, counts, time_left.first_start(view.start)),
    )


def _running(dispatcher: Dispatcher, now: float) -> Iterator[tuple[int, RunningTask]]:
    """Yield the number of each task that a worker runs, and its state."""
    slots, plan = dispatcher.slots, dispatcher.tasks.plan
    backend, progress = slots.backend, slots.console.progress
    for slot, has in enumerate(slots.flights):
        batch, at = unmark(backend.position(slot))
        for flight in has:
            if flight.id == batch and at < len(flight.tasks):
                task = int(flight.tasks[at])
                seconds = max(0.0, now - backend.started(slot))
                told = progress.get(task, (math.nan, ""))
                yield task, RunningTask(plan.name(task), slot, slots.pids[slot], seconds, *told)


def _layer(dispatcher: Dispatcher, status: NDArray[np.int8]) -> int:
    layer = dispatcher.tasks.state.layer
    if layer is not None:
        return layer
    open_layers = dispatcher.tasks.plan.layers[status <= Status.RUNNING]
    return int(open_layers.min()) if len(open_layers) else dispatcher.tasks.plan.n_layers - 1
