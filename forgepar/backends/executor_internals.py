"""Operations on a `ProcessPoolExecutor` that use its private parts.

tests/backends/test_starting.py checks these on each version of Python.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import process as futures_process
from concurrent.futures.process import ProcessPoolExecutor
from typing import Any


def start_thread(executor: ProcessPoolExecutor) -> None:
    """Start the thread with which an executor sends its job to the process.

    By default another thread of the executor starts it: there a failure is lost, and the job waits forever.

    Raises:
        RuntimeError: no thread can be started.
    """
    queue: Any = executor._call_queue  # type: ignore[attr-defined]
    with queue._notempty:
        queue._start_thread()


def shut_down(executor: ProcessPoolExecutor) -> None:
    """Shut an executor down without waiting; if its start has failed, close what it has."""
    thread: Any = executor._executor_manager_thread
    if thread is None or thread.ident is None:
        _discard(executor)
    else:
        executor.shutdown(wait=False, cancel_futures=True)


def _discard(executor: ProcessPoolExecutor) -> None:
    """Close what an executor has created before its manager thread failed to start."""
    parts: Any = executor
    if parts._call_queue is None:
        return  # it was shut down
    queue, results, wakeup = parts._call_queue, parts._result_queue, parts._executor_manager_thread_wakeup
    executor.shutdown(wait=False, cancel_futures=True)
    queue.close()
    queue.join_thread()
    queue._thread = None  # a thread that was not started refers to the queue
    wakeup.close()
    for end in (queue._reader, queue._writer, results._reader, results._writer):
        end.close()


def abandon(threads: Iterable[threading.Thread]) -> None:
    """In a forked child, keep its exit and garbage collection from waking executors of the parent.

    Args:
        threads: the executors' threads, which do not exist in the child.
    """
    for thread in threads:
        wakeup: Any = futures_process._threads_wakeups.pop(thread, None)
        if wakeup is not None and not wakeup._closed:
            wakeup._closed = True
            wakeup._writer.close()
            wakeup._reader.close()
        for lock in (getattr(thread, "shutdown_lock", None), getattr(wakeup, "_lock", None)):
            if lock is not None:
                lock._at_fork_reinit()
