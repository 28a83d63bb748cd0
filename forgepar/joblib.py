"""joblib on forgepar's workers: ``import forgepar.joblib``, then ``joblib.parallel_config(backend="forgepar")``.

What runs `joblib.Parallel`, scikit-learn's ``n_jobs`` among it, runs on a `ForgeExecutor` then. Its workers stay warm
from one call to the next as long as these ask for the same number; `close` ends them before the program does.

Arguments are as joblib has them: arrays of up to ``max_nbytes`` (1 MiB) are private copies; larger ones are written
once per call and are read-only to the tasks; a `numpy.memmap` stands for its file, so that what a task writes to it is
there. Results can be written. A task that calls `joblib.Parallel` itself does so in one process.

    submit ──> pickle of the batch, and its buffers beside it ──> _run: buffers copied or not, each call as if alone
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from forgepar.backends.joblibname import NAME
from forgepar.backends.worker import inside_worker
from forgepar.forking import fork_safe, in_one_process
from forgepar.jobs import JobFuture
from forgepar.machine import available_cpus, set_variables
from forgepar.pickling import Found, Prepared, dumps_by_value, pickler_with
from forgepar.pool import ForgeExecutor
from forgepar.poolerrors import PoolBroken
from forgepar.sharing import Sharing
from forgepar.validation import as_list, check_count, is_number, refusal, shown
from forgepar.values.fresh import fresh_rows, renewing

_OF_WORKERS = ("initializer", "initargs", "idle_worker_timeout", "maxtasksperchild")
_OF_ARRAYS = ("max_nbytes", "mmap_mode")
_WITHOUT_EFFECT = ("temp_folder", "verbose", "context", "prefer", "require", "prewarm")
_MAX_NBYTES = "1M"  # joblib's own
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ForgeparBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """What joblib asks to run batches of calls.

    Its keywords are those of `joblib.parallel_config`, or, from joblib 1.5 on, of `joblib.Parallel`.

    Args:
        executor: whose workers to use, which stay the caller's; None: workers that all calls share.
        initializer: called in each worker first. A call with another initializer, or other ``initargs``, gets other
            workers.
        initargs: its arguments.
        idle_worker_timeout: seconds without a call after which the workers end; None: they stay until `close`.
        maxtasksperchild: replace a worker by a new one after so many batches.
        max_nbytes: an array of more bytes than that is read-only to tasks, a smaller one a private copy; a number, or
            text such as "1M", which is the default; None: all are copies.
        mmap_mode: how arrays above ``max_nbytes`` are: "r", the default: read-only; "c" or None: private copies. "r+"
            and "w+" are refused: tasks do not share memory that they may write to. Give a `numpy.memmap` for that.
        **others: ``nesting_level`` and ``inner_max_num_threads``, as joblib passes them. ``temp_folder``, ``context``,
            ``verbose`` and ``prewarm`` are taken and mean nothing: there are no temporary files of arrays, and workers
            start as those of `ForgeExecutor` do. joblib itself acts on ``prefer`` and ``require``.

    Raises:
        TypeError: a keyword that is none of these.
        ValueError: a value that cannot be, or one for workers beside ``executor``, which has its own.
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
        self._sharing: Sharing | None = None
        self._futures: set[JobFuture] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Tell how many workers a call gets that asks for ``n_jobs``; -1 is all, -2 all but one."""
        if n_jobs == 0:
            raise ValueError("n_jobs=0 is no number of workers. Give 1 or more, -1 for all, or None for one.")
        if n_jobs is None or inside_worker() or not (self.in_main_thread() or self.nesting_level == 0):
            return 1
        most = available_cpus() if self._given is None else self._given.workers
        wanted = n_jobs if n_jobs > 0 else max(most + 1 + n_jobs, 1)
        return wanted if self._given is None else min(wanted, most)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **others: Any) -> int:
        """Begin a call; return how many workers it has.

        Args:
            n_jobs: how many to have, as `effective_n_jobs` takes it.
            parallel: the `joblib.Parallel` that calls.
            **others: keywords of this class, which hold for the call.

        Raises:
            FallbackToBackend: it has one, which is this process.
            TypeError: a keyword that is not known.
            ValueError: a value that cannot be.
        """
        self._check(others)
        keywords = {**self._keywords, **others}
        limit = _limit(keywords.get("max_nbytes", _MAX_NBYTES), keywords.get("mmap_mode", "r"))
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self._limit, self._idle_seconds = limit, keywords.get("idle_worker_timeout")
        self.parallel = parallel
        self._sharing = self._open(n_jobs, keywords)
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> JobFuture:
        """Have a worker call a batch of calls."""
        assert self._sharing is not None, "configure comes first"
        buffers: list[pickle.PickleBuffer] = []
        found = Found()
        data = dumps_by_value(func, buffers.append, found, _pickler())
        rest = (self._limit, buffers) if buffers else ()
        future = self._sharing.submit_pickled(found, _run, data, *rest)
        future.copies = True
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name until joblib 1.5

    def retrieve_result_callback(self, future: JobFuture) -> Any:
        """Return what a batch came to, or raise what it failed with."""
        return future.result()

    def terminate(self) -> None:
        """End a call; its workers stay for the next."""
        if self._sharing is not None:
            self._sharing.close()
            self._sharing = None
            if self._given is None:
                _workers.rest(self._idle_seconds)
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002  (other workers are always ready)
        """Cancel what is queued, and end what runs of this call, with its workers, which start again."""
        for future in list(self._futures):
            future.kill()

    def _check(self, keywords: Mapping[str, Any]) -> None:
        known = (*_OF_WORKERS, *_OF_ARRAYS, *_WITHOUT_EFFECT)
        for name in keywords:
            if name == "timeout":
                raise TypeError("timeout= is not known to workers. Give idle_worker_timeout= for when they are idle.")
            if name not in known:
                raise TypeError(
                    f"{name}= is not known to the backend {NAME!r}. Leave it out, or give one of {', '.join(known)}."
                )
            if name in _OF_WORKERS and self._given is not None:
                raise ValueError(
                    f"{name}= is for workers that calls share, and executor= has its own. Leave one of them out."
                )
        initializer, idle = keywords.get("initializer"), keywords.get("idle_worker_timeout")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, or None; got {initializer!r}.")
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
        wanted = _Wanted(
            n_jobs,
            self.inner_max_num_threads,
            os.getpid(),
            keywords.get("maxtasksperchild"),
            keywords.get("initializer"),
            tuple(keywords["initargs"]) if keywords.get("initargs") is not None else (),
        )
        try:
            return _workers.of(wanted).sharing()
        except PoolBroken:
            _workers.rest(None)
            _workers.close()
        try:
            return _workers.of(wanted).sharing()
        except BaseException:
            _workers.rest(None)
            raise


class _Wanted(NamedTuple):
    """What a call wants of its workers."""

    n_jobs: int
    n_threads: int | None
    process: int
    most_tasks: int | None
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]

    def is_had_by(self, other: _Wanted | None) -> bool:
        """Tell whether workers that were started for another call do for this one."""
        if other is None:
            return False
        mine, others = (*self[:-1], *self.initargs), (*other[:-1], *other.initargs)
        return len(mine) == len(others) and all(map(_are_equal, mine, others))

    def start(self) -> ForgeExecutor:
        """Start them."""
        limits = dict.fromkeys(ForgeparBackend.MAX_NUM_THREADS_VARS, str(self.n_threads)) if self.n_threads else {}
        # What unpickles it may load numpy, which reads the variables: that comes after they are set.
        then = None if self.initializer is None else Prepared(self.initializer, self.initargs)
        return ForgeExecutor(
            self.n_jobs, initializer=set_variables, initargs=(limits, then), max_tasks_per_child=self.most_tasks
        )


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # arrays do not say
        return False


class _Workers:
    """The executor that calls share, one after the other."""

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())
        self._executor: ForgeExecutor | None = None
        self._had: _Wanted | None = None
        self._n_calls = 0
        self._alarm: threading.Timer | None = None

    def of(self, wanted: _Wanted) -> ForgeExecutor:
        """Return an executor for a call, which ends by `rest`."""
        with self._lock:
            self._n_calls += 1
            self._stop_alarm()
            if self._executor is None or not wanted.is_had_by(self._had):
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                self._executor, self._had = wanted.start(), wanted
            return self._executor

    def rest(self, seconds: float | None) -> None:
        """Note that a call has ended; have the workers end if none begins within some seconds."""
        with self._lock:
            self._n_calls -= 1
            self._stop_alarm()
            if seconds is not None:
                self._alarm = threading.Timer(seconds, self._end_if_idle)
                self._alarm.daemon = True
                with suppress(RuntimeError):  # there are no more threads: the workers end with the program
                    self._alarm.start()

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._stop_alarm()
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def _end_if_idle(self) -> None:
        if not self._n_calls:
            self.close()

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


# In workers


def _run(data: bytes, limit: float = 0, buffers: Sequence[Any] = ()) -> Any:
    """Call a batch, each call of it with arguments that no other has changed.

    Args:
        data: its pickle.
        limit: an array of no more bytes is copied, so that it can be written.
        buffers: of its arrays.
    """
    own = [memoryview(part).toreadonly() if len(part) > limit else bytearray(part) for part in buffers]
    batch = pickle.loads(data, buffers=own)
    if isinstance(batch, BatchedCalls):
        batch.items = _each_alone(batch.items)
    return batch()


def _each_alone(items: Sequence[tuple[Any, Any, Any]]) -> Iterable[tuple[Any, Any, Any]]:
    functions = {id(fn): renewing(fn, owns=True) for fn, _, _ in items}
    rows = fresh_rows([(args, keywords) for _, args, keywords in items])
    calls = ((functions[id(fn)], *row) for (fn, _, _), row in zip(items, rows, strict=True))
    return in_one_process(calls)


# Arguments


def _limit(max_nbytes: Any, mmap_mode: Any) -> float:
    """Return up to how many bytes an array is copied for a task."""
    if mmap_mode is not None and not isinstance(mmap_mode, str):
        raise refusal("mmap_mode", "'r', 'c' or None", mmap_mode)
    if mmap_mode in ("r+", "w+"):
        raise ValueError(
            f"mmap_mode={mmap_mode!r} has tasks write to memory that they share, which the backend {NAME!r} does not "
            "have. Give a numpy.memmap of mode 'r+' as an argument, or mmap_mode='c' for private copies."
        )
    if mmap_mode not in ("r", "c", None):
        raise ValueError(f"mmap_mode must be 'r', 'c' or None; got {mmap_mode!r}.")
    if max_nbytes is None or mmap_mode != "r":
        return math.inf
    if isinstance(max_nbytes, str):
        try:
            return int(_UNITS[max_nbytes[-1:]] * float(max_nbytes[:-1]))
        except (KeyError, ValueError):
            raise ValueError(f"max_nbytes must be bytes, text such as '1M', or None; got {max_nbytes!r}.") from None
    if not is_number(max_nbytes) or max_nbytes < 0:
        raise refusal("max_nbytes", "bytes, text such as '1M', or None", max_nbytes)
    return min(float(max_nbytes), math.inf)


@functools.cache
def _pickler() -> Any:
    """Return what pickles batches: an array in a file that is mapped is meant by the file, as it may be written to."""
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
    """Return the addresses at which an array's memory begins and ends."""
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
    """End the workers that calls share; the next call starts others."""
    _workers.close()


_workers = _Workers()
register_parallel_backend(NAME, ForgeparBackend)
