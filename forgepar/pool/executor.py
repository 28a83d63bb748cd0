"""`ForgeExecutor`: forgepar's workers behind the interface of `concurrent.futures`."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, TypeVar

from forgepar._validate import (
    MOST_WORKERS,
    as_list,
    check_callable,
    is_count,
    is_number,
    iterator_of,
    names_checked,
    refusal,
    shown,
)
from forgepar.backends.process import ProcessBackend
from forgepar.backends.surroundings import PackedSurroundings
from forgepar.errors import WorkflowError, WorkingFolderGone, add_note, is_system_error
from forgepar.machine import as_bytes, available_cpus
from forgepar.pool.errors import without_frames
from forgepar.pool.jobs import JobFuture, SentCallable
from forgepar.pool.scheduler import PoolScheduler, check_not_exiting
from forgepar.pool.shared_arrays import Sharing
from forgepar.pool.submissions import Submissions
from forgepar.system.forking import fork_safe
from forgepar.values.module_state import pickled_parts
from forgepar.values.pickling import Dependencies, PickledCall
from forgepar.values.segments import SegmentSlice
from forgepar.version import public
from forgepar.workflow.fresh_values import EachOf
from forgepar.workflow.tasks import Task, is_prepared, unfold

R = TypeVar("R")

_LONGEST = threading.TIMEOUT_MAX  # most seconds that a wait accepts


@public
class ForgeExecutor(Executor):
    """A `concurrent.futures.Executor` that survives the death of a worker.

    Differences from `ProcessPoolExecutor`: when a worker dies, only the job that it was running fails, with an error
    that is both a `WorkerDied` and a `BrokenProcessPool`; the executor continues. Lambdas, closures and functions of
    the script work with all start methods, and ``if __name__ == "__main__"`` is not needed. Pass a task instead of a
    function, as in ``submit(task(fn, timeout=...), ...)``, to set the options ``name``, ``timeout``, ``retries``,
    ``backoff``, ``retry_on``, ``memory`` and ``writable``. Futures of the executor among the arguments, also in lists
    and dicts, stand for their values: the job runs when they are done, and fails if they fail. Arrays and other large
    values are sent in shared memory and are read-only for the receiver; with ``writable=True``, the job gets copies.

    A job gets the environment, working directory, `sys.path`, warning filters and logger levels that this process had
    when the job was submitted, or when `map` was called. Changes that a job makes to these stay in its worker until
    this process changes the same setting.

    Args:
        workers: the number of processes; None for one per CPU that this process may use. They start when needed.
        mp_context: a multiprocessing context; its start method is used. Not together with ``start_method``.
        initializer: called once per worker, before its first job. If it fails, the executor is broken.
        initargs: the arguments of the initializer.
        max_workers: another name for ``workers``, as in other executors.
        max_tasks_per_child: the number of jobs after which a worker is replaced; None for no limit.
        start_method: "forkserver", "spawn" or "fork"; None for forkserver if it is available, else spawn.
        memory_budget: most bytes of large values in shared memory, or text such as "2GiB"; see `WorkflowExecutor`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> with ForgeExecutor(workers=2) as executor:
        ...     square = executor.submit(pow, 7, 2)
        ...     executor.submit(lambda number: number + 1, square).result()
        50
    """

    @names_checked
    def __init__(
        self,
        workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_workers: int | None = None,
        max_tasks_per_child: int | None = None,
        start_method: str | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable or None, got {shown(initializer)}.")
        if mp_context is not None and start_method is not None:
            raise ValueError("Pass either mp_context or start_method, not both.")
        if max_tasks_per_child is not None and not is_count(max_tasks_per_child, 1):
            raise ValueError(
                f"max_tasks_per_child must be a positive integer or None, got {shown(max_tasks_per_child)}."
            )
        if mp_context is not None:
            if not isinstance(mp_context, BaseContext):
                raise refusal("mp_context", "a context of multiprocessing, or None", mp_context)
            start_method = mp_context.get_start_method()
        initargs = tuple(as_list("initargs", initargs))
        prepare = PickledCall(initializer, initargs, pickled_parts) if initializer is not None else None
        budget = None if memory_budget is None else as_bytes(memory_budget, "memory_budget")
        backend = ProcessBackend(_n_workers(workers, max_workers), start_method, budget, prepare, gives_way=False)
        # The thread must not refer to the executor: the thread ends when the executor is collected.
        self._scheduler = PoolScheduler(backend, max_tasks_per_child)
        self._start_lock = fork_safe(threading.RLock())
        self._submissions: Submissions | None = None
        self._n_at_once = backend.n_slots if backend.start_method == "fork" else 1
        weakref.finalize(self, self._scheduler.close).atexit = False

    @property
    def _max_workers(self) -> int:
        """The same as ``workers``. Libraries read this attribute of the standard library's executors."""
        return self.workers

    @property
    def workers(self) -> int:
        """The largest number of workers."""
        return self._scheduler.backend.n_slots

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> JobFuture[R]:
        """Call a function in a worker.

        Args:
            fn: any callable, or a task with options.
            *args: positional arguments. Futures of this executor in them stand for their values.
            **kwargs: keyword arguments, treated as ``args`` are.

        Returns:
            A future. If the callable or an argument cannot be pickled, the future has that error.

        Raises:
            RuntimeError: the executor was shut down.
            WrongProcess: this process is a forked child of the one that started the workers.
            BrokenProcessPool: the executor cannot run any more jobs.
            WorkflowError: the task has an option that is for workflows.
            WorkingFolderGone: the working directory of this process was deleted.
        """
        return self._submit(fn, args, kwargs)

    def _submit(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: Callable[[memoryview], SegmentSlice | None] | None = None,
        found: Dependencies | None = None,
    ) -> JobFuture:
        if self._submissions is None:
            check_callable("fn", fn, WorkflowError)  # before any worker is started
        submissions = self._started()
        future = JobFuture(self._scheduler, self._scheduler.new_number())
        try:
            if is_prepared(fn.fn if isinstance(fn, Task) else fn):
                fn, kwargs = unfold(fn, len(args), kwargs)
            sent_callable, surroundings = (
                fn.sent(submissions)
                if isinstance(fn, _PickledOnce)
                else (submissions.sent_callable(fn), submissions.look())
            )
            job = future.job = submissions.job(future, sent_callable, surroundings, args, kwargs, where, found)
        except (WorkflowError, WorkingFolderGone):
            raise
        except Exception as error:
            future.set_running_or_notify_cancel()
            future.set_exception(without_frames(error))
            return future
        self._scheduler.put(job)
        return future

    def put(self, value: Any) -> JobFuture:
        """Pickle a value once, and return a future that stands for it in the arguments of any number of jobs.

        Raises:
            Exception: the error of pickling the value, with a note.

        Example:
            >>> with ForgeExecutor(workers=2) as executor:
            ...     words = executor.put(["a", "b", "c"])
            ...     [executor.submit(len, words).result(), executor.submit(max, words).result()]
            [3, 'c']
        """
        submissions = self._started()
        future = JobFuture(self._scheduler, self._scheduler.new_number())
        found = Dependencies()
        try:
            wire = submissions.encode(value, found=found)
        except Exception as error:
            reason = "could not be read or written when it was" if is_system_error(error) else "cannot be"
            add_note(error, f"value is a {type(value).__name__} that {reason} pickled")
            raise
        future.parts = submissions.parts_of(found)
        future.fulfil_with(value, wire)
        return future

    def sharing(self) -> Sharing:
        """Return an object that submits jobs and writes large arrays that several of them take only once.

        Example:
            >>> import numpy
            >>> table = numpy.arange(1_000_000)
            >>> with ForgeExecutor(workers=2) as executor, executor.sharing() as sharing:
            ...     rows = [sharing.submit(lambda table, i: int(table[i]), table, i) for i in range(5)]
            ...     [row.result() for row in rows]
            [0, 1, 2, 3, 4]
        """
        submissions = self._started()
        return Sharing(submissions.arena, submissions, self._submit)

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **more: Any,
    ) -> Iterator[R]:
        """Call a function for each row of some iterables, and return an iterator over the results in that order.

        Args:
            fn: any callable, or a task with options. It is pickled once.
            *iterables: the positional arguments, one iterable for each.
            timeout: most seconds from now for all results; then the iterator raises `TimeoutError`.
            chunksize: the number of rows per job. Queued jobs are sent in batches in any case. Larger chunks need fewer
                futures, but when a row fails, its whole chunk does.
            **more: ``buffersize``, if `Executor.map` of this Python version has it.

        Raises:
            ValueError: ``chunksize`` is below 1.
        """
        if not is_count(chunksize, 1):
            raise ValueError(f"chunksize must be >= 1, got {shown(chunksize)}.")
        if timeout is not None and not is_number(timeout):
            raise refusal("timeout", "a number of seconds, or None", timeout)
        timeout = None if timeout is None or timeout > _LONGEST else timeout
        check_callable("fn", fn, TypeError)
        iterables = tuple(
            iterator_of(f"iterables[{place}]", iterable, kind=TypeError) for place, iterable in enumerate(iterables)
        )
        if is_prepared(fn.fn if isinstance(fn, Task) else fn):
            return super().map(fn, *iterables, timeout=timeout, **more)
        if chunksize == 1:
            return super().map(_PickledOnce(fn), *iterables, timeout=timeout, **more)
        each = Task(EachOf(fn.fn), fn.task_options) if isinstance(fn, Task) else EachOf(fn)
        chunksize = min(chunksize, sys.maxsize)
        rows = iter(zip(*iterables, strict=False))
        chunks = iter(lambda: list(itertools.islice(rows, chunksize)), [])
        return _flattened(super().map(_PickledOnce(each), chunks, timeout=timeout, **more))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs, and end the workers when all jobs are done. In a forked child, do nothing.

        Processes that jobs started and did not wait for keep running, except daemonic ones of `multiprocessing`, which
        end with their worker. At exit, the program shuts all executors down; if an interrupt ends the program, running
        jobs are killed.

        Args:
            wait: return only after the workers have ended.
            cancel_futures: cancel the jobs that no worker has yet.
        """
        for name, value in (("wait", wait), ("cancel_futures", cancel_futures)):
            if not isinstance(value, int):
                raise refusal(name, "True or False", value)
        self._scheduler.close(cancels=bool(cancel_futures))
        if wait:
            self._scheduler.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down and wait. After an interrupt, kill the running jobs instead of waiting for them."""
        if kind is not None and issubclass(kind, (KeyboardInterrupt, GeneratorExit)):
            self._scheduler.close(kills=True)
        try:
            self.shutdown()
        except KeyboardInterrupt:
            self._scheduler.close(kills=True)
            self._scheduler.join()
            raise

    def _started(self) -> Submissions:
        """Start the scheduler's thread if necessary, and return the `Submissions`."""
        check_not_exiting()
        self._scheduler.check_open()
        if self._submissions is None:
            with self._start_lock:
                if self._submissions is None:
                    self._submissions = Submissions(self._scheduler, self._scheduler.start(self._n_at_once))
        return self._submissions


class _PickledOnce:
    """A function that is pickled by the first of many jobs; all get the surroundings of that moment."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._sent: tuple[SentCallable, PackedSurroundings] | None = None

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("Submit this object; do not call it.")

    def sent(self, submissions: Submissions) -> tuple[SentCallable, PackedSurroundings]:
        """Return the pickled function and the surroundings of its jobs."""
        if self._sent is None:
            self._sent = submissions.sent_callable(self._fn), submissions.look()
        return self._sent


def _flattened(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    """Yield the items of lists, without keeping references to yielded items."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _n_workers(workers: int | None, max_workers: int | None) -> int:
    if workers is not None and max_workers is not None:
        raise ValueError(
            f"Pass either workers or max_workers, not both; got {shown(workers)} and {shown(max_workers)}."
        )
    count = max_workers if workers is None else workers
    if count is None:
        return available_cpus()
    if not is_count(count, 1) or count > MOST_WORKERS:
        name = "max_workers" if workers is None else "workers"
        raise ValueError(
            f"{name} must be greater than 0 and at most {MOST_WORKERS}, or None for one per CPU; got {shown(count)}."
        )
    return count
