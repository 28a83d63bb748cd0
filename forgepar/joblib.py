"""joblib on forgepar's workers: ``import forgepar.joblib``, then ``joblib.parallel_config(backend="forgepar")``.

What runs `joblib.Parallel`, scikit-learn's ``n_jobs`` among it, runs on a `ForgeExecutor` then. Its workers stay warm
from one call to the next as long as these ask for the same number; `close` ends them before the program does.

Large arrays among the arguments are written once a call and are read-only to the tasks, as joblib has those of more
than 1 MiB anyway. Results can be written. A task that calls `joblib.Parallel` itself does so in one process.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from typing import Any

try:
    from joblib.parallel import (
        AutoBatchingMixin,
        FallbackToBackend,
        ParallelBackendBase,
        SequentialBackend,
        register_parallel_backend,
    )
except ImportError as missing:
    raise ImportError("forgepar.joblib needs joblib 1.4 or later: pip install 'forgepar[joblib]'") from missing

from forgepar.backends.worker import inside_worker
from forgepar.forking import fork_safe
from forgepar.jobs import JobFuture
from forgepar.machine import available_cpus, set_variables
from forgepar.pool import ForgeExecutor
from forgepar.poolerrors import PoolBroken
from forgepar.sharing import Sharing

NAME = "forgepar"


class ForgeparBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """What joblib asks to run batches of calls.

    Args:
        executor: whose workers to use, which stay the caller's; None: workers that all calls share.
        **others: as joblib passes them: ``nesting_level``, ``inner_max_num_threads``.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(self, *, executor: ForgeExecutor | None = None, **others: Any) -> None:
        super().__init__(**others)
        self._given = executor
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

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Begin a call; return how many workers it has.

        Raises:
            FallbackToBackend: it has one, which is this process.
        """
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._sharing = self._open(n_jobs)
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], Any] | None = None) -> JobFuture:
        """Have a worker call a batch of calls."""
        assert self._sharing is not None, "configure comes first"
        future = self._sharing.submit(operator.call, func)
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
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002  (other workers are always ready)
        """Cancel what is queued, and end what runs of this call, with its workers, which start again."""
        for future in list(self._futures):
            future.kill()

    def _open(self, n_jobs: int) -> Sharing:
        if self._given is not None:
            return self._given.sharing()
        try:
            return _workers.of(n_jobs, self.inner_max_num_threads).sharing()
        except PoolBroken:
            _workers.close()
            return _workers.of(n_jobs, self.inner_max_num_threads).sharing()


class _Workers:
    """The executor that calls share, one after the other."""

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())
        self._executor: ForgeExecutor | None = None
        self._key: tuple[int, int | None, int] | None = None

    def of(self, n_jobs: int, n_threads: int | None) -> ForgeExecutor:
        """Return an executor of so many workers, each of which lets numerical libraries use so many threads."""
        key = (n_jobs, n_threads, os.getpid())
        with self._lock:
            if self._executor is None or key != self._key:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                limits = dict.fromkeys(ForgeparBackend.MAX_NUM_THREADS_VARS, str(n_threads)) if n_threads else {}
                self._executor = ForgeExecutor(n_jobs, initializer=set_variables, initargs=(limits,))
                self._key = key
            return self._executor

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()


def close() -> None:
    """End the workers that calls share; the next call starts others."""
    _workers.close()


_workers = _Workers()
register_parallel_backend(NAME, ForgeparBackend)
