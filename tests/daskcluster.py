"""A Dask cluster for tests: a scheduler and two workers, each a process of its own, on the loopback interface."""

from __future__ import annotations

import copyreg
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def restore_exceptions() -> None:
    """Have exceptions pickled as ever: to import Dask changes that for all classes there are, by way of tblib.

    Other tests of the same process are about exceptions without it, and it adds notes twice.
    """
    import dask.multiprocessing  # noqa: F401  (what changes it)

    for kind in list(copyreg.dispatch_table):
        if isinstance(kind, type) and issubclass(kind, BaseException):
            del copyreg.dispatch_table[kind]


@contextmanager
def cluster(n_workers: int = 2, threads: int = 1) -> Iterator[str]:
    """Start a cluster in another process, and give its address; it ends with its standard input."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, __file__, str(n_workers), str(threads), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What a worker is fetching from one that is killed holds it up for as long; Dask's own default is 30 s.
            # Its workers import test modules of any folder.
            env={
                **os.environ,
                "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        address = program.stdout.readline().strip()
        assert address, "the cluster did not start; what it wrote to stderr says why"
        yield address
        program.stdin.close()


def main(n_workers: str, threads: str, folder: str) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=int(n_workers),
        threads_per_worker=int(threads),
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        local_directory=folder,
        silence_logs=logging.CRITICAL,
    ) as started:
        print(started.scheduler_address, flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
