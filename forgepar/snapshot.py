"""A run at one moment: immutable, made for whoever asks, from any thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from forgepar.backends.board import unmark
from forgepar.dispatch import Dispatcher
from forgepar.displays import Look, RunningTask
from forgepar.runstate import Status

_TRIES = 10_000  # the dispatcher is at rest far more often than not
_PAUSE_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run at one moment.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        n_tasks: how many there are by now.
        counts: how many tasks have each status that occurs; they sum to ``n_tasks``. "running" are those that were
            handed out, of which each worker is at one at a time.
        running: the tasks that workers are at.
        layer: the layer that runs, under the schedule "layers"; else the lowest that is not done.
        n_layers: how many there are by now.
        bytes_held: what large values take in shared memory, bytes.
        elapsed_seconds: how long the run has taken so far.
        seconds_left: how long it will take at least, by what tasks took so far; nan while too little is known.
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
    """Return how a run stands, from any thread.

    The dispatcher counts a version up whenever it comes to rest or goes on. A snapshot that was made within one rest is
    of one moment; another is thrown away and made again, and so is one that stumbled over a change.

    Raises:
        TimeoutError: the dispatcher was never at rest long enough.
    """
    for _ in range(_TRIES):
        version = dispatcher.version
        if not version % 2:
            try:
                found = _look(dispatcher)
            except Exception:
                if dispatcher.version == version:
                    raise
            else:
                if dispatcher.version == version:
                    return found
        time.sleep(_PAUSE_SECONDS)  # lets the dispatcher have the interpreter
    raise TimeoutError(f"the run was never at rest in {_TRIES} looks, so there is no snapshot of it. Look again later.")


def look(dispatcher: Dispatcher) -> Look:
    """Return how a run stands, from its own thread, between two waits: for what is shown ten times a second."""
    plan, ledger, now = dispatcher.plan, dispatcher.books.ledger, time.perf_counter()
    return Look(
        plan.workflow_name,
        dispatcher.state.status,
        plan.layers,
        plan.template_of,
        plan.callable_of,
        dispatcher.durations.seconds,
        dispatcher.state.layer is not None,
        list(_running(dispatcher, now)),
        dispatcher.pids,
        dispatcher.backend.arena.bytes_held,
        ledger.began or now,
        now,
        ledger.start,
    )


def _look(dispatcher: Dispatcher) -> RunSnapshot:
    plan, now = dispatcher.plan, time.perf_counter()
    status = bytes(dispatcher.state.status)
    counts = {kind.name.lower(): n for kind in Status if (n := status.count(kind))}
    began = dispatcher.books.ledger.began
    return RunSnapshot(
        dispatcher.run_id,
        plan.workflow_name,
        plan.n_tasks,
        counts,
        tuple(running for _, running in _running(dispatcher, now)),
        _layer(dispatcher, status),
        plan.n_layers,
        dispatcher.backend.arena.bytes_held,
        now - began if began else 0.0,
        _seconds_left(dispatcher, status),
    )


def _running(dispatcher: Dispatcher, now: float) -> Iterator[tuple[int, RunningTask]]:
    """Yield the number of each task that a worker is at, and what there is to tell of it."""
    backend, progress = dispatcher.backend, dispatcher.console.progress
    for slot, has in enumerate(dispatcher.flights):
        batch, at = unmark(backend.position(slot))
        for flight in has:
            if flight.id == batch and at < len(flight.tasks):
                task = int(flight.tasks[at])
                seconds = max(0.0, now - backend.started(slot))
                told = progress.get(task, (math.nan, ""))
                yield task, RunningTask(dispatcher.plan.name(task), slot, dispatcher.pids[slot], seconds, *told)


def _layer(dispatcher: Dispatcher, status: bytes) -> int:
    layer = dispatcher.state.layer
    if layer is not None:
        return layer
    column = np.frombuffer(status, np.int8)
    open_layers = dispatcher.plan.layers[column <= Status.RUNNING]
    return int(open_layers.min()) if len(open_layers) else dispatcher.plan.n_layers - 1


def _seconds_left(dispatcher: Dispatcher, status: bytes) -> float:
    """Estimate the time left: the work that is, shared evenly."""
    plan = dispatcher.plan
    means = np.array(dispatcher.durations.seconds)
    known = means[np.isfinite(means)]
    if not len(known):
        return math.nan
    means = np.where(np.isfinite(means), means, known.mean())
    left = plan.template_of[np.frombuffer(status, np.int8) <= Status.RUNNING]
    return float(means[np.array(plan.callable_of)[left]].sum()) / dispatcher.backend.n_slots
