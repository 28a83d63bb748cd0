"""`TaskContext`: what a running task can ask for. Its identity, cancellation, random numbers, a scratch folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from forgepar._validate import refusal
from forgepar.errors import NotInTask, text_of
from forgepar.system.thread_scope import ThreadScope
from forgepar.version import public

if TYPE_CHECKING:
    import logging
    from pathlib import Path

    import numpy as np


class RunContext(NamedTuple):
    """Facts of a run that are sent to every worker.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        seed: the seed of random numbers.
        ends_at: when the run's timeout ends, in seconds of `time.perf_counter`; infinite without a timeout.
    """

    run_id: str
    workflow: str
    seed: int
    ends_at: float


@public
class RunProgress(NamedTuple):
    """Progress of a run, at most some tenths of a millisecond old.

    Attributes:
        n_tasks: number of tasks so far.
        n_settled: number of tasks that will not run again.
        n_out: number of tasks that are with workers.
        layer: the layer that runs; -1 with the schedule "eager".
    """

    n_tasks: int
    n_settled: int
    n_out: int
    layer: int


@public
class TaskContext:
    """One attempt of one task, seen from inside; returned by `context`.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        task: the task's name.
        layer: the task's layer.
        attempt: the number of this attempt, from 1.
        worker: the worker slot that the attempt runs on.
        seed: the run's seed.
        deadline: when the task's or the run's timeout ends, in seconds of `time.monotonic`; None without a timeout.
    """

    def __init__(
        self,
        facts: RunContext,
        task: str,
        layer: int,
        attempt: int,
        worker: int,
        *,
        ends_at: float,
        is_cancelled: Callable[[], bool],
        say: Callable[[float, str], None],
        look: Callable[[], RunProgress],
        folder: str | None,
    ) -> None:
        self.run_id, self.workflow, self.seed = facts.run_id, facts.workflow, facts.seed
        self.task = task
        self.layer = layer
        self.attempt = attempt
        self.worker = worker
        ends_at = min(ends_at, facts.ends_at)
        self.deadline = None if ends_at == float("inf") else ends_at - time.perf_counter() + time.monotonic()
        self._is_cancelled = is_cancelled
        self._say = say
        self._look = look
        self._folder = folder
        self._scratch: Path | None = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<TaskContext of {self.task!r}, layer {self.layer}, attempt {self.attempt}>"

    def cancelled(self) -> bool:
        """Return whether the run was cancelled or has failed, so that the task's result will not be used.

        A call takes 0.1 us.
        """
        return self._is_cancelled()

    def rng(self) -> np.random.Generator:
        """Return this attempt's random number generator, the same one at each call.

        It is seeded with the run's seed and the task's name (numpy's `SeedSequence` with 128 bits of the name's
        BLAKE2), so a task draws the same numbers with any schedule, workers and attempt. Tasks with other names draw
        independent numbers.
        """
        return self._rng

    @property
    def scratch(self) -> Path:
        """A folder of this attempt, created on first access and removed with its contents after the attempt."""
        if self._scratch is None:
            from pathlib import Path

            self._scratch = Path(tempfile.mkdtemp(prefix=f"scratch-{self.worker}-", dir=self._folder))
        return self._scratch

    @cached_property
    def log(self) -> logging.Logger:
        """A logger named "forgepar.tasks." and the workflow's name; its records are sent to the parent."""
        import logging

        return logging.getLogger(f"forgepar.tasks.{self.workflow}")

    def progress(self, fraction: float, text: str = "") -> None:
        """Report the progress of this task.

        Args:
            fraction: the part of the work that is done, 0 to 1.
            text: what the task is doing.

        Raises:
            ValueError: the fraction is out of range.
        """
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise refusal("fraction", "between 0 and 1", fraction)
        self._say(float(fraction), text_of(text))

    @property
    def run(self) -> RunProgress:
        """The progress of the run at this moment."""
        return self._look()

    def close(self) -> None:
        """Remove the scratch folder, except in a forked child."""
        if self._scratch is not None and os.getpid() == self._pid:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    @cached_property
    def _rng(self) -> np.random.Generator:
        import hashlib

        import numpy as np

        digest = hashlib.blake2b(self.task.encode(errors="surrogatepass"), digest_size=16).digest()
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4)]
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=words))


_current: ThreadScope[Callable[[], TaskContext | None]] = ThreadScope()
here = _current.here  # a thread that runs tasks sets it to the function that returns the current context


def use(ask: Callable[[], TaskContext | None] | None) -> None:
    """Set the function that returns the context of this process's current task; None if no task runs."""
    _current.of_process = ask


def inside() -> TaskContext | None:
    """Return the context of this thread's or process's task; None if there is none, or more than one."""
    ask = _current.get()
    return ask() if ask is not None else None


@public
def context() -> TaskContext:
    """Return the context of the task that calls this, in any of its threads.

    Raises:
        NotInTask: no task runs in this process, or the caller is a task's own thread while other threads run tasks.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> name = wf.add(lambda: context().task)
        >>> wf.run(backend="inline")[name]
        'lambda'
    """
    found = inside()
    if found is None:
        raise NotInTask("context() was called outside of a task. Call it in a function that runs as a task.")
    return found
