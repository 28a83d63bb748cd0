"""What jobs of a `ForgeExecutor` fail with: errors of forgepar that are also those that users of other pools catch.

    WorkerDied         + BrokenProcessPool   PoolWorkerDied     the job's worker ended under it
    WorkerStartFailed  + BrokenProcessPool   PoolBroken         nothing more can be run
    TaskError          + BrokenProcessPool   PoolUnreadable     an argument or a result cannot be unpickled
    UnpicklableResult  + PicklingError       PoolUnpicklable    it returned what cannot be pickled
    TaskExited         + SystemExit          PoolExited         it called sys.exit

What else a job raises is its future's exception as it is, as with the standard library's pool; `KeyboardInterrupt` and
its like, too. Only `PoolBroken` means that the executor is of no more use.
"""

from __future__ import annotations

import pickle
from concurrent.futures import process
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from forgepar.errors import (
    TaskError,
    TaskExited,
    UnpicklableResult,
    WorkerDied,
    WorkerStartFailed,
    add_note,
    text_of,
)

AnyError = TypeVar("AnyError", bound=BaseException)

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


def unreadable(error: BaseException) -> PoolUnreadable:
    """Return what a job fails with where an argument cannot be unpickled because of this error."""
    unread = PoolUnreadable(
        f"an argument cannot be unpickled in the worker ({type(error).__name__}: {text_of(error)}). "
        "Give plain data, or what workers can import."
    )
    unread.__cause__ = error
    return unread


def exited(error: SystemExit, message: str) -> PoolExited:
    """Return what a job fails with that called ``sys.exit``, with all that the error has."""
    made = _made_of(error, PoolExited(message))
    made.code = error.code  # SystemExit's own is no entry of its __dict__
    return made


def in_pool(error: Exception) -> Exception:
    """Return what a job fails with.

    Args:
        error: what it would fail with as a task.
    """
    kind = _IN_POOL.get(type(error))
    return error if kind is None else _made_of(error, kind(str(error)))


def with_traceback(error: AnyError, traceback: str) -> AnyError:
    """Return an error with the traceback in the worker as its cause; as a note, where it has a cause of its own."""
    if error.__cause__ is None:
        # Past its class, which may not let attributes be set.
        object.__setattr__(error, "__cause__", _RemoteTraceback(f'\n"""\n{traceback}"""'))
    else:
        add_note(error, "traceback in the worker:\n" + traceback.rstrip())
    return error


def _made_of(error: BaseException, made: AnyError) -> AnyError:
    made.__dict__.update(error.__dict__)
    made.__context__, made.__cause__ = error.__context__, error.__cause__
    made.__suppress_context__ = error.__suppress_context__
    return made


_IN_POOL: dict[type[Exception], type[Exception]] = {
    UnpicklableResult: PoolUnpicklable,
    WorkerDied: PoolWorkerDied,
}
