"""What a running task can ask for: who it is, whether it was called off, random numbers, a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from forgepar.current import Current
from forgepar.errors import NotInTask

if TYPE_CHECKING:
    import logging
    from pathlib import Path

    import numpy as np


class RunFacts(NamedTuple):
    """What all tasks of a run share, as it travels.

    Attributes:
        run_id: the run's id, text of its own.
        workflow: the workflow's name.
        seed: what chance derives from.
        ends_at: when the run's time is over, `time.perf_counter` seconds; infinite if never.
    """

    run_id: str
    workflow: str
    seed: int
    ends_at: float


class RunProgress(NamedTuple):
    """How a run stands, as its dispatcher last told: some tenths of a millisecond ago.

    Attributes:
        n_tasks: how many tasks there are by now.
        n_settled: how many of them will not run again.
        n_out: how many are handed out to workers.
        layer: the layer that runs; -1 under the schedule "eager".
    """

    n_tasks: int
    n_settled: int
    n_out: int
    layer: int


class TaskContext:
    """One attempt of one task, as seen from inside; `context` returns it.

    Attributes:
        run_id: the run's id, text of its own.
        workflow: the workflow's name.
        task: the task's name.
        layer: its layer.
        attempt: which attempt this is, from 1.
        worker: the slot it runs on.
        seed: the run's seed.
        deadline: when its time is over, its own or the run's, in seconds of `time.monotonic`; None: never.
    """

    def __init__(
        self,
        facts: RunFacts,
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
        """Tell whether the run was called off or has failed, so that what this task still does is of no use.

        It costs a tenth of a microsecond: ask as often as you like.
        """
        return self._is_cancelled()

    def rng(self) -> np.random.Generator:
        """Return this attempt's source of random numbers, the same one at each call.

        It derives from the run's seed and the task's name alone, so that a task draws the same numbers whatever the
        schedule, the workers or the attempt; tasks of other names draw independent ones (numpy's `SeedSequence`, fed
        with 128 bits of the name's BLAKE2).
        """
        return self._rng

    @property
    def scratch(self) -> Path:
        """A folder of this attempt's own, made at the first look, removed with all in it soon after the attempt."""
        if self._scratch is None:
            from pathlib import Path

            self._scratch = Path(tempfile.mkdtemp(prefix=f"scratch-{self.worker}-", dir=self._folder))
        return self._scratch

    @cached_property
    def log(self) -> logging.Logger:
        """A logger, named as the workflow below "forgepar.tasks"; what tasks log arrives in the parent."""
        import logging

        return logging.getLogger(f"forgepar.tasks.{self.workflow}")

    def progress(self, fraction: float, text: str = "") -> None:
        """Tell how far this task is.

        Args:
            fraction: of its work, 0 to 1.
            text: what it is at.

        Raises:
            ValueError: a fraction outside of that.
        """
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction!r} is no share of the work. Give a number from 0 to 1.")
        self._say(float(fraction), str(text))

    @property
    def run(self) -> RunProgress:
        """How the run stands at this moment."""
        return self._look()

    def close(self) -> None:
        """Remove the scratch folder; a forked child that ends does not."""
        if self._scratch is not None and os.getpid() == self._pid:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    @cached_property
    def _rng(self) -> np.random.Generator:
        import hashlib

        import numpy as np

        digest = hashlib.blake2b(self.task.encode(), digest_size=16).digest()
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4)]
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=words))


_current: Current[Callable[[], TaskContext | None]] = Current()
here = _current.here  # set by a thread while it runs tasks: the function that returns the context of the current one


def use(ask: Callable[[], TaskContext | None] | None) -> None:
    """Say who knows the task that runs in this process; None: no task runs."""
    _current.of_process = ask


def inside() -> TaskContext | None:
    """Return the context of the task that runs in this thread or process, None where none does, or several do."""
    ask = _current.get()
    return ask() if ask is not None else None


def context() -> TaskContext:
    """Return the context of the task that calls this, from any of its threads.

    Raises:
        NotInTask: no task runs in this process, or this is a thread of a task while other threads run tasks, too.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> name = wf.add(lambda: context().task)
        >>> wf.run(backend="inline")[name]
        'lambda'
    """
    found = inside()
    if found is None:
        raise NotInTask(
            "context() was called outside of a task. Call it inside of a function that a workflow runs as a task."
        )
    return found
