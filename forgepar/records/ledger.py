"""The columns of a run, which results, event logs and stores read: numpy arrays with one entry per task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgepar.values.exceptions import PicklableException


class Ledger:
    """The columns of a run, filled while it runs; one row per task.

    Attributes:
        start: float64, `time.perf_counter` seconds; nan until the task ran.
        duration: float64, seconds; nan until the task ran.
        worker: int16, the slot; -1 until the task ran.
        bytes: int64, size of the serialized value; 0 for scalars.
        skipped_for: int32, the task because of which this one was skipped, -1 for none; None while no task was skipped.
        began: when the run began, in `time.perf_counter` seconds.
        began_at: the same, in seconds since the epoch (UTC).
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
        return {**self.__dict__, "errors": {task: PicklableException(error) for task, error in self.errors.items()}}

    def grow(self, n_tasks: int) -> None:
        """Add rows, so that there are ``n_tasks``."""
        more = Ledger(n_tasks - len(self.start))
        for name in ("start", "duration", "worker", "bytes"):
            setattr(self, name, np.append(getattr(self, name), getattr(more, name)))
        if self.skipped_for is not None:
            self.skipped_for = np.append(self.skipped_for, np.full(len(more.start), -1, np.int32))
