"""What jobs of a `ForgeExecutor` fail with: errors of forgepar that are also those that users of other pools catch.

    WorkerDied         + BrokenProcessPool   PoolWorkerDied     the job's worker ended under it
    WorkerStartFailed  + BrokenProcessPool   PoolBroken         nothing more can be run
    TaskError          + BrokenProcessPool   PoolUnreadable     an argument or a result cannot be unpickled
    UnpicklableResult  + PicklingError       PoolUnpicklable    it returned what cannot be pickled
    TaskExited         + SystemExit          PoolExited         it called sys.exit

Only `PoolBroken` means that the executor is of no more use.
"""

from __future__ import annotations

import pickle
from concurrent.futures import process
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from forgepar.errors import TaskError, TaskExited, UnpicklableResult, WorkerDied, WorkerStartFailed

# What users of the standard library's pool find behind an error: the traceback in the worker.
_RemoteTraceback: Any = getattr(process, "_RemoteTraceback", RuntimeError)


class PoolWorkerDied(WorkerDied, BrokenProcessPool):
    """The worker of one job ended under it; the executor goes on. Code that catches `BrokenProcessPool` catches it."""


class PoolBroken(WorkerStartFailed, BrokenProcessPool):
    """An executor can run nothing more: its workers end before they take work, or its own thread has failed."""


class PoolUnreadable(TaskError, BrokenProcessPool):
    """An argument or a result was pickled but cannot be unpickled; the executor goes on."""


class PoolUnpicklable(UnpicklableResult, pickle.PicklingError):
    """A job returned what cannot be pickled."""


class PoolExited(TaskExited, SystemExit):  # type: ignore[misc]  # both have a code, of any type
    """A job called ``sys.exit``; its worker goes on."""


def in_pool(error: Exception, traceback: str = "", *, is_unread: bool = False) -> Exception:
    """Return what a job fails with.

    Args:
        error: what it would fail with as a task.
        traceback: as it was printed in the worker; empty for none.
        is_unread: whether the error is that of an argument that cannot be unpickled.
    """
    if is_unread:
        unread = PoolUnreadable(
            f"an argument cannot be unpickled in the worker ({type(error).__name__}: {error}). "
            "Give plain data, or what workers can import."
        )
        unread.__cause__ = error
        return unread
    kind = _IN_POOL.get(type(error))
    made = error if kind is None else kind(str(error))
    if made is not error:
        made.__dict__.update(error.__dict__)
        made.__cause__ = error.__cause__
    if isinstance(error, TaskExited):
        made.code = error.code  # type: ignore[attr-defined]  # SystemExit's own is no entry of its __dict__
    if traceback:
        made.__cause__ = _RemoteTraceback(f'\n"""\n{traceback}"""')
    return made


_IN_POOL: dict[type[Exception], type[Exception]] = {
    TaskExited: PoolExited,
    UnpicklableResult: PoolUnpicklable,
    WorkerDied: PoolWorkerDied,
}
