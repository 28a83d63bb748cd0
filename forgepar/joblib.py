"""joblib on forgepar's workers: ``import forgepar.joblib``, then ``joblib.parallel_config(backend="forgepar")``.

`joblib.Parallel`, and scikit-learn's ``n_jobs`` with it, then runs on a `ForgeExecutor`. Its workers stay from one call
to the next, as long as the calls ask for the same number of them; `close` ends them. Threads may make calls at the same
time. Calls that ask for the same workers share them, other calls get their own. When all calls have ended, only the
workers of the last call stay.

Arguments are as in joblib: arrays of up to ``max_nbytes`` (1 MiB) are private copies; larger arrays are written once
per call and are read-only in tasks; a `numpy.memmap` refers to its file, so that tasks can write to the file. Results
are writable. A task that calls `joblib.Parallel` runs that call in one process.

    submit ──> pickle of the batch, and its buffers ──> _run: copies small buffers, isolates the calls of the batch
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

try:
    from joblib.parallel import (
        AutoBatchingMixin,
        BatchedCalls,
        FallbackToBackend,
        ParallelBackendBase,
        SequentialBackend,
        register_parallel_backend,
    )
except ImportError as missing:
    raise ImportError("forgepar.joblib needs joblib 1.4 or later: pip install 'forgepar[joblib]'") from missing

from forgepar._validate import as_list, check_count, is_number, refusal, shown
from forgepar.backends.joblib_name import NAME
from forgepar.backends.worker import inside_worker
from forgepar.machine import available_cpus, set_variables
from forgepar.pool.errors import PoolBroken
from forgepar.pool.executor import ForgeExecutor
from forgepar.pool.jobs import JobFuture
from forgepar.pool.shared_arrays import Sharing
from forgepar.system.forking import fork_safe, in_child, in_one_process
from forgepar.values.pickling import Dependencies, PickledCall, dumps_by_value, pickler_with
from forgepar.workflow.fresh_values import fresh_rows, renewing

_WORKER_OPTIONS = ("initializer", "initargs", "idle_worker_timeout", "maxtasksperchild")
_ARRAY_OPTIONS = ("max_nbytes", "mmap_mode")
_IGNORED_OPTIONS = ("temp_folder", "verbose", "context", "prefer", "require", "prewarm")
_MOST_IDLE = 4  # teams without a call that are kept while others have one: threads that alternate reuse them
_MAX_NBYTES = "1M"  # as in joblib
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ForgeparBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """The joblib backend "forgepar".

    Its keywords are those of `joblib.parallel_config` and, from joblib 1.5, of `joblib.Parallel`.

    Args:
        executor: an executor to run on, which stays open; None: workers that all calls share.
        initializer: called first in each worker. Calls with another initializer, or other ``initargs``, get other
            workers.
        initargs: arguments of ``initializer``.
        idle_worker_timeout: seconds without a call after which the workers end; None: they stay until `close`.
        maxtasksperchild: replace a worker by a new one after this many batches.
        max_nbytes: arrays of more bytes are read-only in tasks, smaller ones are private copies; a number, or text such
            as "1M", the default; None: all arrays are copies.
        mmap_mode: access to arrays above ``max_nbytes``. "r", the default: read-only; "c" or None: private copies. "r+"
            and "w+" are refused, as tasks do not share writable memory; use a `numpy.memmap` for that.
        **others: ``nesting_level`` and ``inner_max_num_threads``, as joblib passes them. ``temp_folder``, ``context``,
            ``verbose`` and ``prewarm`` have no effect: arrays use no temporary files, and workers start as those of
            `ForgeExecutor`. joblib itself acts on ``prefer`` and ``require``.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: a value is invalid, or an option of shared workers is combined with ``executor``.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(
        self,
        *,
        executor: ForgeExecutor | None = None,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._given = executor
        self._keywords = others
        self._check(others)
        if executor is not None and not isinstance(executor, ForgeExecutor):
            raise refusal("executor", "a ForgeExecutor, or None", executor)
        self._limit: float = 0
        self._idle_seconds: float | None = None
        self._is_taken = False  # whether a call uses this backend
        self._team: _Team | None = None
        self._sharing: Sharing | None = None
        self._futures: set[JobFuture] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers for a call with ``n_jobs``; -1 is all, -2 all except one."""
        if n_jobs == 0:
            raise ValueError("n_jobs must be a positive integer, -1 for all CPUs, or None for 1; got 0.")
        if n_jobs is None or inside_worker() or not (self.in_main_thread() or self.nesting_level == 0):
            return 1
        most = available_cpus() if self._given is None else self._given.workers
        wanted = n_jobs if n_jobs > 0 else max(most + 1 + n_jobs, 1)
        return wanted if self._given is None else min(wanted, most)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **others: Any) -> int:
        """Begin a call, and return how many workers it has.

        Args:
            n_jobs: how many workers to use, as in `effective_n_jobs`.
            parallel: the `joblib.Parallel` that calls.
            **others: keywords of this class, for this call alone.

        Raises:
            FallbackToBackend: one job is enough, so this process runs it; or another call uses this backend, so the
                call needs another one.
            TypeError: a keyword is unknown.
            ValueError: a value is invalid.
        """
        self._check(others)
        keywords = {**self._keywords, **others}
        limit = _limit(keywords.get("max_nbytes", _MAX_NBYTES), keywords.get("mmap_mode", "r"))
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        with _workers.lock:
            if self._is_taken:
                raise FallbackToBackend(self._another())
            self._is_taken = True
        try:
            self._limit, self._idle_seconds = limit, keywords.get("idle_worker_timeout")
            self.parallel = parallel
            self._sharing = self._open(n_jobs, keywords)
        except BaseException:
            self._end_call()
            raise
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> Future[Any]:
        """Submit a batch of calls.

        Returns:
            A future. If the batch cannot be submitted, the error is the future's exception: joblib also calls this from
            callbacks, and would wait forever for a batch if these raised.
        """
        future: Future[Any]
        try:
            future = self._submit(func)
        except BaseException as error:  # SystemExit, too: pickling an argument may raise it
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise
            future = Future()
            future.set_exception(error)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # the name before joblib 1.5

    def _submit(self, func: Callable[[], Any]) -> JobFuture:
        assert self._sharing is not None, "configure was not called"
        buffers: list[pickle.PickleBuffer] = []
        found = Dependencies()
        data = dumps_by_value(func, buffers.append, found, _pickler())
        rest = (self._limit, buffers) if buffers else ()
        future = self._sharing.submit_pickled(found, _run, data, *rest)
        future.copies = True
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """Return the result of a batch, or raise its exception."""
        return future.result()

    def terminate(self) -> None:
        """End a call; its workers stay for the next one."""
        self._end_call()
        self.reset_batch_stats()

    def _end_call(self) -> None:
        sharing, self._sharing = self._sharing, None
        team, self._team = self._team, None
        if sharing is not None:
            sharing.close()
        if team is not None:
            _workers.rest(team, self._idle_seconds)
        self._is_taken = False

    def _another(self) -> ForgeparBackend:
        return type(self)(
            executor=self._given,
            nesting_level=self.nesting_level,
            inner_max_num_threads=self.inner_max_num_threads,
            **self._keywords,
        )

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002  (forgepar restarts workers by itself)
        """Cancel the queued batches of this call, and kill the workers that run its batches; they restart."""
        for future in list(self._futures):
            future.kill()

    def _check(self, keywords: Mapping[str, Any]) -> None:
        known = (*_WORKER_OPTIONS, *_ARRAY_OPTIONS, *_IGNORED_OPTIONS)
        for name in keywords:
            if name == "timeout":
                raise TypeError("timeout= is not an option of workers. Pass idle_worker_timeout= to end idle workers.")
            if name not in known:
                raise TypeError(
                    f"{name}= is not an option of the backend {NAME!r}. Remove it, or pass one of {', '.join(known)}."
                )
            if name in _WORKER_OPTIONS and self._given is not None:
                raise ValueError(
                    f"{name}= is for workers that calls share, and executor= has its own. Remove one of them."
                )
        initializer, idle = keywords.get("initializer"), keywords.get("idle_worker_timeout")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, or None; got {shown(initializer)}.")
        if idle is not None and (not is_number(idle) or not idle > 0):
            raise ValueError(f"idle_worker_timeout must be a positive number of seconds, or None; got {shown(idle)}.")
        if keywords.get("initargs") is not None:
            as_list("initargs", keywords["initargs"])
        if keywords.get("maxtasksperchild") is not None:
            check_count("maxtasksperchild", keywords["maxtasksperchild"])
        _limit(keywords.get("max_nbytes", _MAX_NBYTES), keywords.get("mmap_mode", "r"))

    def _open(self, n_jobs: int, keywords: Mapping[str, Any]) -> Sharing:
        if self._given is not None:
            return self._given.sharing()
        options = _TeamOptions(
            n_jobs,
            self.inner_max_num_threads,
            keywords.get("maxtasksperchild"),
            keywords.get("initializer"),
            tuple(keywords["initargs"]) if keywords.get("initargs") is not None else (),
        )
        self._team = _workers.of(options)
        try:
            return self._team.executor.sharing()
        except PoolBroken:
            team, self._team = self._team, None
            _workers.discard(team)
        self._team = _workers.of(options)
        return self._team.executor.sharing()


class _TeamOptions(NamedTuple):
    """The workers that a call asks for."""

    n_jobs: int
    n_threads: int | None
    most_tasks: int | None
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]

    def fits(self, other: _TeamOptions) -> bool:
        """Return whether workers started with other options can be used."""
        mine, others = (*self[:-1], *self.initargs), (*other[:-1], *other.initargs)
        return len(mine) == len(others) and all(map(_are_equal, mine, others))

    def start(self) -> ForgeExecutor:
        """Start the workers."""
        limits = dict.fromkeys(ForgeparBackend.MAX_NUM_THREADS_VARS, str(self.n_threads)) if self.n_threads else {}
        # Unpickling the initializer may load numpy, which reads the variables, so it happens after they are set.
        then = None if self.initializer is None else PickledCall(self.initializer, self.initargs)
        return ForgeExecutor(
            self.n_jobs, initializer=set_variables, initargs=(limits, then), max_tasks_per_child=self.most_tasks
        )


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # a comparison of arrays has no truth value
        return False


class _Team:
    """Workers, shared by calls with equal options."""

    def __init__(self, options: _TeamOptions) -> None:
        self.options = options
        self.executor = options.start()
        self.n_calls = 0


class _Teams:
    """The teams of this process.

    Only its calls refer to a team in use: if a call is abandoned, its team ends with it.

    Attributes:
        lock: held while teams are added, removed or handed out.
    """

    def __init__(self) -> None:
        self.lock = fork_safe(threading.RLock())
        self.forget()

    def forget(self) -> None:
        """Forget all teams: after a fork they belong to the parent process."""
        self._teams: weakref.WeakSet[_Team] = weakref.WeakSet()  # teams that calls can get
        self._idle: list[_Team] = []  # teams of these without a call, longest idle first
        self._alarm: threading.Timer | None = None

    def of(self, options: _TeamOptions) -> _Team:
        """Return a team for a call, until the call ends by `rest` or `discard`."""
        with self.lock:
            self._stop_alarm()
            team = next((team for team in self._teams if options.fits(team.options)), None)
            if team is None:
                team = _Team(options)
                self._teams.add(team)
            if team in self._idle:
                self._idle.remove(team)
            self._end_idle(_MOST_IDLE if self._n_calls() else 0)
            team.n_calls += 1
            return team

    def rest(self, team: _Team, seconds: float | None) -> None:
        """Note that a call has ended; end the workers if no call begins within ``seconds``."""
        with self.lock:
            team.n_calls -= 1
            if team.n_calls:
                return
            if team not in self._teams:
                team.executor.shutdown(wait=False)
                return
            self._idle.append(team)
            if self._n_calls():
                self._end_idle(_MOST_IDLE)
                return
            self._end_idle(1)
            if seconds is not None:
                self._stop_alarm()
                self._alarm = threading.Timer(seconds, self._end_if_idle)
                self._alarm.daemon = True
                with suppress(RuntimeError):  # no more threads can start: the workers end with the program
                    self._alarm.start()

    def discard(self, team: _Team) -> None:
        """Note that the team of a call is broken, so that no other call gets it."""
        with self.lock:
            team.n_calls -= 1
            self._teams.discard(team)
        team.executor.shutdown()

    def close(self) -> None:
        """End the idle workers; workers of calls that run end with their calls."""
        with self.lock:
            self._stop_alarm()
            idle = list(self._idle)
            self._end_idle(0)
            self._teams.clear()
        for team in idle:
            team.executor.shutdown()

    def _n_calls(self) -> int:
        return sum(team.n_calls for team in self._teams)

    def _end_idle(self, n_left: int) -> None:
        """End idle teams, except the ``n_left`` last used."""
        while len(self._idle) > n_left:
            team = self._idle.pop(0)
            self._teams.discard(team)
            team.executor.shutdown(wait=False)

    def _end_if_idle(self) -> None:
        if not self._n_calls():
            self.close()

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


# In workers


def _run(data: bytes, limit: float = 0, buffers: Sequence[Any] = ()) -> Any:
    """Run a batch of calls; each gets arguments that no other call has changed.

    Args:
        data: the pickled batch.
        limit: arrays of at most this many bytes are copied, so that they are writable.
        buffers: of the arrays.
    """
    own = [memoryview(part).toreadonly() if len(part) > limit else bytearray(part) for part in buffers]
    batch = pickle.loads(data, buffers=own)
    if isinstance(batch, BatchedCalls):
        batch.items = _isolated(batch.items)
    return batch()


def _isolated(items: Sequence[tuple[Any, Any, Any]]) -> Iterable[tuple[Any, Any, Any]]:
    functions = {id(fn): renewing(fn, owns=True) for fn, _, _ in items}
    rows = fresh_rows([(args, keywords) for _, args, keywords in items])
    calls = ((functions[id(fn)], *row) for (fn, _, _), row in zip(items, rows, strict=True))
    return in_one_process(calls)


# Arguments

_MOST_NBYTES = 1e18  # more than any array has; an int above 1.8e308 cannot be converted to float


def _limit(max_nbytes: Any, mmap_mode: Any) -> float:
    """Return the largest size of arrays that are copied for a task, bytes."""
    if mmap_mode is not None and not isinstance(mmap_mode, str):
        raise refusal("mmap_mode", "'r', 'c' or None", mmap_mode)
    if mmap_mode in ("r+", "w+"):
        raise ValueError(
            f"mmap_mode must be 'r', 'c' or None, got {shown(mmap_mode)}: tasks of the backend {NAME!r} share no "
            "writable memory. Pass a numpy.memmap of mode 'r+' as an argument, or mmap_mode='c' for private copies."
        )
    if mmap_mode not in ("r", "c", None):
        raise ValueError(f"mmap_mode must be 'r', 'c' or None; got {shown(mmap_mode)}.")
    if max_nbytes is None or mmap_mode != "r":
        return math.inf
    if isinstance(max_nbytes, str):
        try:
            return int(_UNITS[max_nbytes[-1:]] * float(max_nbytes[:-1]))
        except (KeyError, ValueError, OverflowError):
            raise ValueError(
                f"max_nbytes must be bytes, text such as '1M', or None; got {shown(max_nbytes)}."
            ) from None
    if not is_number(max_nbytes) or max_nbytes < 0:
        raise refusal("max_nbytes", "bytes, text such as '1M', or None", max_nbytes)
    return float(min(max_nbytes, _MOST_NBYTES))


@functools.cache
def _pickler() -> Any:
    """Return the pickler class of batches; it pickles arrays in mapped files as references to the files."""
    import numpy as np

    return pickler_with({np.memmap: _reduce_array, np.ndarray: _reduce_array})


def _reduce_array(array: Any) -> Any:
    import numpy as np

    mapped = array
    while not isinstance(getattr(mapped, "base", None), mmap.mmap):
        mapped = getattr(mapped, "base", None)
        if mapped is None:
            return array.__reduce_ex__(5)
    name, mode = getattr(mapped, "filename", None), getattr(mapped, "mode", "c")
    if name is None or mode == "c" or array.dtype.hasobject or not array.size:
        return array.__reduce_ex__(5)
    begin, end = _bounds(array)
    offset = mapped.offset + begin - _bounds(mapped)[0]
    first = array.__array_interface__["data"][0] - begin
    kind = np.memmap if isinstance(array, np.memmap) else np.ndarray
    mode = "r+" if mode == "w+" else mode
    if not array.flags.writeable:
        mode = "r"
    return _mapped, (os.fspath(name), mode, offset, end - begin, array.shape, array.dtype, first, array.strides, kind)


def _bounds(array: Any) -> tuple[int, int]:
    """Return the addresses of the begin and the end of an array's memory."""
    begin = end = array.__array_interface__["data"][0]
    for n, step in zip(array.shape, array.strides, strict=True):
        begin, end = (begin + (n - 1) * step, end) if step < 0 else (begin, end + (n - 1) * step)
    return begin, end + array.itemsize


def _mapped(
    name: str, mode: Any, offset: int, n_bytes: int, shape: Any, dtype: Any, first: int, strides: Any, kind: Any
) -> Any:
    import numpy as np

    memory = np.memmap(name, np.uint8, mode, offset, (n_bytes,))
    return np.ndarray(shape, dtype, memory, first, strides).view(kind)


def close() -> None:
    """End the workers that calls share; workers of calls that run end with their calls. Later calls start new ones."""
    _workers.close()


_workers = _Teams()
in_child(_workers.forget)
register_parallel_backend(NAME, ForgeparBackend)
