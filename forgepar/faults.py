"""Exceptions made of what a worker told before, or as, it was lost to a task."""

from __future__ import annotations

import pickle

from forgepar.backends.base import Lost
from forgepar.backends.wire import Failure
from forgepar.errors import RemoteError, UnpicklableResult, WorkerDied, add_note, is_system_error, text_of
from forgepar.machine import as_text
from forgepar.poolerrors import exited, in_pool, unreadable, with_traceback
from forgepar.programs import how_it_ended


def raised(failure: Failure) -> Exception:
    """Return what a task raised, or what stands for it where that could not travel."""
    error = pickle.loads(failure.pickled) if failure.pickled is not None else None
    if isinstance(error, Exception):
        return error
    message = f"{failure.type_name}: {failure.text} (the exception itself cannot be sent)"
    return RemoteError(message, type_name=failure.type_name, text=failure.text)


def raised_by_job(failure: Failure) -> BaseException:
    """Return what a job's future fails with: as `raised`, but a `KeyboardInterrupt` and its like as they are."""
    error = raised(failure)
    if failure.is_unread:
        if is_system_error(error):
            add_note(error, "raised while an argument was being unpickled in the worker")
            return with_traceback(error, failure.traceback)
        return unreadable(error)
    if failure.original is None:
        return with_traceback(in_pool(error) if isinstance(error, UnpicklableResult) else error, failure.traceback)
    original: BaseException | None = pickle.loads(failure.original[0])
    traceback = failure.original[1]
    if type(original) is SystemExit:
        return with_traceback(exited(original, str(error)), traceback)
    if original is None or isinstance(original, RemoteError):  # it cannot travel
        original = error
    return with_traceback(original, traceback)


def worker_died(lost: Lost, task: str, peak_rss: int, address: str = "") -> WorkerDied:
    """Return what a task fails with whose worker ended under it.

    Args:
        lost: what is known of the end.
        task: the task's name.
        peak_rss: most memory that the worker told of, bytes; 0 if it had not.
        address: where the worker was, if that is known.
    """
    place = f"{address}, " if address else ""
    error = WorkerDied(
        f"worker {lost.slot} ({place}pid {lost.pid}) {_how_it_ended(lost)} while it ran task {task!r}. "
        "Look for os._exit, a crash in C code or a lack of memory there; retries= runs it again.",
        exit_code=lost.exit_code,
        pid=lost.pid,
        peak_rss=peak_rss,
    )
    error.__cause__ = lost.fault
    if peak_rss:
        error.add_note(f"the worker's memory before: {as_text(peak_rss)} at most")
    if lost.dump:
        error.add_note("what it was at, as it told when it crashed:\n" + lost.dump.rstrip())
    return error


def _how_it_ended(lost: Lost) -> str:
    exit_code = lost.exit_code
    if lost.fault is not None:
        return f"gave up ({type(lost.fault).__name__}: {text_of(lost.fault)})"
    if exit_code is None:
        return "ended"
    return how_it_ended(exit_code) + (", by the kernel for lack of memory," if lost.is_out_of_memory else "")
