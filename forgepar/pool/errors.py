"""The errors of jobs: subclasses of forgepar's errors and of those that users of `ProcessPoolExecutor` catch.

    WorkerDied         + BrokenProcessPool   PoolWorkerDied     the job's worker died
    WorkerStartFailed  + BrokenProcessPool   PoolBroken         the executor cannot run any more jobs
    TaskError          + BrokenProcessPool   PoolUnreadable     an argument or a result cannot be unpickled
    UnpicklableResult  + PicklingError       PoolUnpicklable    the job's result cannot be pickled
    TaskExited         + SystemExit          PoolExited         the job called sys.exit

All other exceptions of a job, `KeyboardInterrupt` included, become its future's exception unchanged, as with
`ProcessPoolExecutor`. Only `PoolBroken` means that the executor cannot be used any more.
"""

from __future__ import annotations

import pickle
import traceback
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

# The cause of errors of `ProcessPoolExecutor`: the traceback in the worker.
_RemoteTraceback: Any = getattr(process, "_RemoteTraceback", RuntimeError)


class PoolWorkerDied(WorkerDied, BrokenProcessPool):
    """The worker of one job died. The executor continues. Handlers of `BrokenProcessPool` catch it."""


class PoolBroken(WorkerStartFailed, BrokenProcessPool):
    """The executor cannot run any more jobs: its workers die before they take work, or its own thread failed."""


class PoolUnreadable(TaskError, BrokenProcessPool):
    """An argument or a result cannot be unpickled. The executor continues."""


class PoolUnpicklable(UnpicklableResult, pickle.PicklingError):
    """The result of a job cannot be pickled."""


class PoolExited(TaskExited, SystemExit):  # type: ignore[misc]  # both have a code, of any type
    """A job called ``sys.exit``. Its worker continues."""


def unreadable(error: BaseException) -> PoolUnreadable:
    """Return the error of a job with an argument that cannot be unpickled because of ``error``."""
    unread = PoolUnreadable(
        f"An argument cannot be unpickled in the worker ({type(error).__name__}: {text_of(error)}). "
        "Pass plain data, or objects of modules that workers can import."
    )
    unread.__cause__ = error
    return unread


def exited(error: SystemExit, message: str) -> PoolExited:
    """Return the error of a job that called ``sys.exit``, with the attributes of the `SystemExit`."""
    made = _with_attributes_of(error, PoolExited(message))
    made.code = error.code  # SystemExit.code is not in __dict__
    return made


def in_pool(error: Exception) -> Exception:
    """Return the pool's variant of an error, or the error itself if there is none.

    Args:
        error: the error that a task of a workflow would fail with.
    """
    kind = _IN_POOL.get(type(error))
    return error if kind is None else _with_attributes_of(error, kind(str(error)))


def with_traceback(error: AnyError, text: str, where: str = "in the worker") -> AnyError:
    """Return an error with a traceback, as text, as its cause, or as a note if it already has a cause."""
    if error.__cause__ is None:
        # Not by assignment: the class may refuse to set attributes.
        object.__setattr__(error, "__cause__", _RemoteTraceback(f'\n"""\n{text}"""'))
    else:
        add_note(error, f"traceback {where}:\n" + text.rstrip())
    return error


def without_frames(error: AnyError) -> AnyError:
    """Return the error of a submission with its traceback as text.

    Frames refer to their callers, and so to the executor: it would live as long as the future that has the error.
    """
    text = "".join(traceback.format_exception(error))
    found: BaseException | None = error
    while found is not None:
        # The context may be an exception that the caller handles now, and is left as it is.
        object.__setattr__(found, "__context__", None)
        object.__setattr__(found, "__traceback__", None)
        found = found.__cause__
    return with_traceback(error, text, "of the submission")


def _with_attributes_of(error: BaseException, made: AnyError) -> AnyError:
    made.__dict__.update(error.__dict__)
    made.__context__, made.__cause__ = error.__context__, error.__cause__
    made.__suppress_context__ = error.__suppress_context__
    return made


_IN_POOL: dict[type[Exception], type[Exception]] = {
    UnpicklableResult: PoolUnpicklable,
    WorkerDied: PoolWorkerDied,
}
