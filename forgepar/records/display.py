"""The protocol between the dispatcher of a run and what displays the run.

    Dispatcher ──> Display.beat      when `look_at` has passed
               ──> Display.failed    at once
    Display    ──> look() ──> RunView  the run's own columns, not copied

The dispatcher knows only this protocol; the progress bars are in `forgepar.report.progress.display`. They are not drawn
in a thread: a thread that wakes while batches are sent delays them by up to 5 ms, the interpreter's switch interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import report, text_of
from forgepar.version import public
from forgepar.workflow.plan import IntArray


@public
class RunningTask(NamedTuple):
    """A running task.

    Attributes:
        task: its name.
        worker: the slot that it runs on.
        pid: the process id of the worker.
        seconds: how long it has been running.
        fraction: how much of its work is done, as it reported with `TaskContext.progress`; nan if it did not.
        text: what it is doing, as it reported.
    """

    task: str
    worker: int
    pid: int
    seconds: float
    fraction: float
    text: str


class RunView(NamedTuple):
    """A run at this moment. The columns are the run's own: read them before the dispatcher continues.

    Attributes:
        workflow: the workflow's name.
        status: (n,) int8, the `forgepar.Status` of each task.
        layer: (n,) int32, the layer of each task.
        template: (n,) int32, the template of each task.
        callable_of: by template, the number of the callable of its tasks.
        seconds: by callable, the mean duration of its tasks; nan if none has completed.
        by_layers: whether layers wait for each other.
        running: the running tasks, as pairs of number and task.
        pids: by slot, the process id of the worker; 0 if there is none.
        bytes_held: shared memory used by large values, in bytes.
        began: when the run began, in `time.perf_counter` seconds.
        now: this moment, likewise.
        start: (n,) float64, when the last attempt of each task began, likewise; nan if it has not run yet.
    """

    workflow: str
    status: NDArray[np.int8]
    layer: IntArray
    template: IntArray
    callable_of: Sequence[int]
    seconds: Sequence[float]
    by_layers: bool
    running: Sequence[tuple[int, RunningTask]]
    pids: Sequence[int]
    bytes_held: int
    began: float
    now: float
    start: NDArray[np.float64]


class FailedTask(NamedTuple):
    """A failed attempt, as a display gets it.

    Attributes:
        task: the task's name.
        attempt: the number of the attempt.
        error: class and text of the exception.
        goes_on: whether the task is retried or takes its fallback.
    """

    task: str
    attempt: int
    error: str
    goes_on: bool


@public
class Display(Protocol):
    """Display of a run while it runs. All calls come from the thread of the run; an exception ends the run.

    Attributes:
        look_at: the latest time to call `beat`, in `time.perf_counter` seconds; inf: never.
    """

    look_at: float

    def begin(self, look: Callable[[], RunView]) -> None:
        """Start to display a run; ``look`` returns its current state, and may be called only in `beat` and `close`."""

    def beat(self, now: float) -> None:
        """Show the current state of the run if `look_at` has passed, and set `look_at` to the next time."""

    def failed(self, failure: FailedTask) -> None:
        """Show that an attempt failed."""

    def close(self) -> None:
        """Remove what should not remain on the screen, however the run ended. May be called twice."""


class GuardedDisplay:
    """A display that never raises: when the display that it wraps raises, it warns and closes that display.

    Args:
        display: the display to call.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._owner = os.getpid()
        self.look_at = math.inf
        self._is_off = False

    def begin(self, look: Callable[[], RunView]) -> None:
        """Start to display a run."""
        self._try(lambda: self._display.begin(look))

    def beat(self, now: float) -> None:
        """Show the current state of the run, if it is time."""
        if now >= self.look_at:
            self._try(lambda: self._display.beat(now))

    def failed(self, failure: FailedTask) -> None:
        """Show that an attempt failed."""
        self._try(lambda: self._display.failed(failure))

    def close(self) -> None:
        """Close the display."""
        self._try(self._display.close)
        self.look_at = math.inf

    def _try(self, call: Callable[[], None]) -> None:
        if self._is_off or os.getpid() != self._owner:
            return
        try:
            call()
            self.look_at = self._display.look_at
        except Exception as error:
            if os.getpid() != self._owner:  # the call forked this process: the display belongs to the parent
                return
            self._is_off = True
            self.look_at = math.inf
            with suppress(Exception):
                self._display.close()
            report(
                f"The progress display raised {type(error).__name__}: {text_of(error)}. "
                "It is disabled; the run continues.",
                logger="forgepar.report",
            )


class NullDisplay:
    """A `Display` that shows nothing."""

    look_at = math.inf

    def begin(self, look: Callable[[], RunView]) -> None:
        """Do nothing."""

    def beat(self, now: float) -> None:
        """Do nothing."""

    def failed(self, failure: FailedTask) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
