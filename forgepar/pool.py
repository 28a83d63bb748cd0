"""`ForgeExecutor`: forgepar's workers for whoever writes for `concurrent.futures`."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

from forgepar.backends.process import ProcessBackend
from forgepar.backends.surroundings import Moment
from forgepar.errors import WorkflowError, WorkingFolderGone
from forgepar.feeder import Feeder, is_over
from forgepar.forking import fork_safe
from forgepar.jobs import Called, JobFuture
from forgepar.machine import as_bytes, available_cpus
from forgepar.pickling import Found, Prepared
from forgepar.recipes import Recipes
from forgepar.sharing import Sharing
from forgepar.tasks import Task, is_prepared, unfold
from forgepar.validation import (
    MOST_WORKERS,
    as_list,
    check_callable,
    check_iterable,
    is_count,
    is_number,
    refusal,
    shown,
)
from forgepar.values.fresh import EachOf
from forgepar.values.modulestate import pickled_parts
from forgepar.values.segment import Part

_LONGEST = threading.TIMEOUT_MAX  # seconds that a wait may be told


class ForgeExecutor(Executor):
    """A `concurrent.futures.Executor` on workers that live and die each for itself.

    What differs from `ProcessPoolExecutor`: a worker that dies fails the one job it was at, with an error that is both
    a `WorkerDied` and a `BrokenProcessPool`, and the executor goes on. Lambdas, closures and functions of the script
    work under all start methods, and no ``if __name__ == "__main__"`` is needed. ``submit(task(fn, timeout=...), ...)``
    takes the options ``name``, ``timeout``, ``retries``, ``backoff``, ``retry_on``, ``memory`` and ``writable``.
    Futures of the executor among the arguments, in lists and dicts too, stand for their values: the job is run when
    they are done, and fails as they do. Arrays and other large values go through shared memory and are read-only on the
    other side, unless ``writable=True`` has the job get copies.

    A job sees the environment, working directory, `sys.path`, filters of warnings and levels of loggers that this
    process had when it was submitted, at a call of `map` when that was called. What a job changes of these in its
    worker stays there until this process changes the same.

    Args:
        workers: how many processes; None: one for each CPU this process may use. They start as they are needed.
        mp_context: its start method is taken; in place of ``start_method``.
        initializer: called in each worker first; where it fails, the executor is broken.
        initargs: its arguments.
        max_workers: another name for ``workers``, as other executors have it.
        max_tasks_per_child: replace a worker by a new one after so many jobs.
        start_method: "forkserver", "spawn" or "fork"; None: forkserver where there is one, else spawn.
        memory_budget: most bytes of large values in shared memory, or text such as "2GiB"; see `WorkflowExecutor`.

    Raises:
        ValueError: an argument that cannot be.

    Example:
        >>> with ForgeExecutor(workers=2) as executor:
        ...     square = executor.submit(pow, 7, 2)
        ...     executor.submit(lambda number: number + 1, square).result()
        50
    """

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
            raise TypeError(f"initializer={shown(initializer)} cannot be called. Give a function, or None.")
        if mp_context is not None and start_method is not None:
            raise ValueError("mp_context= and start_method= say the same. Give one of them.")
        if max_tasks_per_child is not None and not is_count(max_tasks_per_child, 1):
            raise ValueError(f"max_tasks_per_child={max_tasks_per_child!r} is no count. Give 1 or more, or None.")
        if mp_context is not None:
            if not isinstance(mp_context, BaseContext):
                raise refusal("mp_context", "a context of multiprocessing, or None", mp_context)
            start_method = mp_context.get_start_method()
        initargs = tuple(as_list("initargs", initargs))
        prepare = Prepared(initializer, initargs, pickled_parts) if initializer is not None else None
        budget = None if memory_budget is None else as_bytes(memory_budget, "memory_budget")
        backend = ProcessBackend(_n_workers(workers, max_workers), start_method, budget, prepare, gives_way=False)
        # Nothing that the thread holds refers to this, so that it may be collected, and the thread ends then.
        self._feeder = Feeder(backend, max_tasks_per_child)
        self._start_lock = fork_safe(threading.RLock())
        self._recipes: Recipes | None = None
        self._n_at_once = backend.n_slots if backend.start_method == "fork" else 1
        weakref.finalize(self, self._feeder.close).atexit = False

    @property
    def _max_workers(self) -> int:
        """The same as ``workers``: libraries read it of the standard library's executors by this name."""
        return self.workers

    @property
    def workers(self) -> int:
        """How many workers there are at most."""
        return self._feeder.backend.n_slots

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> JobFuture:
        """Have a function called by a worker.

        Args:
            fn: any callable, or a task with options.
            *args: its arguments. Futures of this executor in them are waited for and stand for their values.
            **kwargs: likewise.

        Returns:
            A future. What cannot be pickled is its error.

        Raises:
            RuntimeError: the executor was shut down.
            WrongProcess: this process was forked from the one that the executor's workers belong to.
            BrokenProcessPool: it can run nothing more.
            WorkflowError: an option that is for workflows.
            WorkingFolderGone: the working directory of this process was deleted.
        """
        return self._submit(fn, args, kwargs)

    def _submit(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: Callable[[memoryview], Part | None] | None = None,
        found: Found | None = None,
    ) -> JobFuture:
        if self._recipes is None:
            check_callable("fn", fn, WorkflowError)  # no worker is started for it
        recipes = self._started()
        future = JobFuture(self._feeder, self._feeder.new_number())
        try:
            if is_prepared(fn.fn if isinstance(fn, Task) else fn):
                fn, kwargs = unfold(fn, len(args), kwargs)
            called, surroundings = fn.taken(recipes) if isinstance(fn, _Once) else (recipes.called(fn), recipes.look())
            job = future.job = recipes.job(future, called, surroundings, args, kwargs, where, found)
        except (WorkflowError, WorkingFolderGone):
            raise
        except Exception as error:
            future.set_running_or_notify_cancel()
            future.set_exception(error)
            return future
        self._feeder.put(job)
        return future

    def put(self, value: Any) -> JobFuture:
        """Write a value once for however many jobs, which get it by the future that stands for it.

        Example:
            >>> with ForgeExecutor(workers=2) as executor:
            ...     words = executor.put(["a", "b", "c"])
            ...     [executor.submit(len, words).result(), executor.submit(max, words).result()]
            [3, 'c']
        """
        recipes = self._started()
        future = JobFuture(self._feeder, self._feeder.new_number())
        found = Found()
        wire = recipes.encode(value, found=found)
        future.parts = recipes.parts_of(found)
        future.fulfil_with(value, wire)
        return future

    def sharing(self) -> Sharing:
        """Return what submits jobs that take the same large arrays, so that these are written once.

        Example:
            >>> import numpy
            >>> table = numpy.arange(1_000_000)
            >>> with ForgeExecutor(workers=2) as executor, executor.sharing() as sharing:
            ...     rows = [sharing.submit(lambda table, i: int(table[i]), table, i) for i in range(5)]
            ...     [row.result() for row in rows]
            [0, 1, 2, 3, 4]
        """
        recipes = self._started()
        return Sharing(recipes.arena, recipes, self._submit)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **more: Any,
    ) -> Iterator[Any]:
        """Return an iterator of what a function returns for each row of some iterables, in their order.

        Args:
            fn: any callable, or a task with options. It is pickled once.
            *iterables: of its positional arguments.
            timeout: seconds that all may take together, from now; what is not done by then raises `TimeoutError`.
            chunksize: how many rows make one job. What is queued travels together in any case; with more there are
                fewer futures, and a row that fails takes those of its chunk with it.
            **more: ``buffersize``, where this Python's `Executor.map` has it.

        Raises:
            ValueError: a chunk size below 1.
        """
        if not is_count(chunksize, 1):
            raise ValueError(f"chunksize must be >= 1, got {shown(chunksize)}.")
        if timeout is not None and not is_number(timeout):
            raise refusal("timeout", "a number of seconds, or None", timeout)
        timeout = None if timeout is None or timeout > _LONGEST else timeout
        check_callable("fn", fn, TypeError)
        for place, iterable in enumerate(iterables):
            check_iterable(f"iterables[{place}]", iterable, TypeError)
        if is_prepared(fn.fn if isinstance(fn, Task) else fn):
            return super().map(fn, *iterables, timeout=timeout, **more)
        if chunksize == 1:
            return super().map(_Once(fn), *iterables, timeout=timeout, **more)
        each = Task(EachOf(fn.fn), fn.task_options) if isinstance(fn, Task) else EachOf(fn)
        chunksize = min(chunksize, sys.maxsize)
        rows = iter(zip(*iterables, strict=False))
        chunks = iter(lambda: list(itertools.islice(rows, chunksize)), [])
        return _flattened(super().map(_Once(each), chunks, timeout=timeout, **more))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, and end the workers when those there are have ended; nothing in a forked child.

        Args:
            wait: come back only then.
            cancel_futures: cancel the jobs that no worker has yet.
        """
        for name, value in (("wait", wait), ("cancel_futures", cancel_futures)):
            if not isinstance(value, int):
                raise refusal(name, "True or False", value)
        self._feeder.close(cancels=bool(cancel_futures))
        if wait:
            self._feeder.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down; at an interrupt, end what runs instead of waiting for it."""
        if kind is not None and issubclass(kind, (KeyboardInterrupt, GeneratorExit)):
            self._feeder.close(kills=True)
        self.shutdown()

    def _started(self) -> Recipes:
        """Have the workers' thread run; return what makes jobs."""
        if is_over():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        self._feeder.check_open()
        if self._recipes is None:
            with self._start_lock:
                if self._recipes is None:
                    self._recipes = Recipes(self._feeder, self._feeder.start(self._n_at_once))
        return self._recipes


class _Once:
    """A function that is pickled once for many jobs, by the first of them; all find around them what is there then."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._taken: tuple[Called, Moment] | None = None

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("this is to be submitted, not called")

    def taken(self, recipes: Recipes) -> tuple[Called, Moment]:
        """Return it as it travels, and the surroundings of its jobs."""
        if self._taken is None:
            self._taken = recipes.called(self._fn), recipes.look()
        return self._taken


def _flattened(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    """Yield the items of lists, and refer to none that was yielded."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _n_workers(workers: int | None, max_workers: int | None) -> int:
    if workers is not None and max_workers is not None:
        raise ValueError(f"workers={workers!r} and max_workers={max_workers!r} say the same. Give one of them.")
    count = max_workers if workers is None else workers
    if count is None:
        return available_cpus()
    if not is_count(count, 1) or count > MOST_WORKERS:
        name = "max_workers" if workers is None else "workers"
        raise ValueError(
            f"{name} must be greater than 0, and at most {MOST_WORKERS}, and is {shown(count)}. Give 1 or more, or "
            "None for one a CPU."
        )
    return count
