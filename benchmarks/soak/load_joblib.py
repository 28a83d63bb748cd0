"""joblib's backend: calls one after the other, with other numbers of workers, arrays and failures.

One half of the calls uses workers that all calls share, which start anew when another number is asked for. The other
half uses a `ForgeExecutor` that stays, so that some workers become old.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import joblib
import numpy as np

import forgepar as fp
import forgepar.joblib

WORKERS = 2

Piece = Callable[[int, bool], int]
_N_JOBS = (2, 2, 3, -1, 2)


@contextmanager
def opened() -> Iterator[Sequence[Piece]]:
    """Start the workers that stay; give the pieces of work, each of which returns how many calls it made."""
    kinds = (closures, arrays, failures, generated, left, timeouts, killed)
    with fp.ForgeExecutor(workers=WORKERS) as executor:
        try:
            yield [partial(_in_context, kind, given) for kind in kinds for given in ({}, {"executor": executor})]
        finally:
            forgepar.joblib.close()


def _in_context(kind: Callable[[int, int, bool], int], given: dict[str, Any], number: int, disturbs: bool) -> int:
    with joblib.parallel_config(backend="forgepar", **given):
        return kind(_N_JOBS[number // 4 % len(_N_JOBS)], number, disturbs)


def closures(n_jobs: int, number: int, _: bool) -> int:
    """Many short calls of a closure."""
    values = joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(lambda i: i + number)(i) for i in range(500))
    assert values == list(range(number, number + 500))
    return 500


def arrays(n_jobs: int, number: int, _: bool) -> int:
    """Arrays below and above the limit from which on they are read-only; large results."""
    table, small = np.full(1 << 18, float(number)), np.zeros(1000)
    calls = (joblib.delayed(_row)(table, small, i) for i in range(20))
    values = joblib.Parallel(n_jobs=n_jobs)(calls)
    assert [value[-1] for value in values] == [number + i for i in range(20)]
    return 20


def failures(n_jobs: int, number: int, _: bool) -> int:
    """A call that raises amid others."""
    try:
        joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(_fail_at)(i, number % 50, np.ones(1 << 15)) for i in range(50))
    except ValueError:
        return 50
    raise AssertionError("no call failed")


def generated(n_jobs: int, number: int, _: bool) -> int:
    """Values as they come, in whatever order."""
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    assert sum(parallel(joblib.delayed(abs)(i + number) for i in range(200))) == sum(range(200)) + 200 * number
    return 200


def left(n_jobs: int, number: int, _: bool) -> int:
    """Calls that use one `joblib.Parallel` twice, and tasks that use one themselves."""
    with joblib.Parallel(n_jobs=n_jobs, batch_size=4) as parallel:
        for _ in range(2):
            values = parallel(joblib.delayed(_nested)(number, i) for i in range(8))
            assert values == [4 * (number + i) for i in range(8)]
    return 16


def timeouts(n_jobs: int, number: int, disturbs: bool) -> int:
    """A call over its time; undisturbed, calls within it."""
    parallel = joblib.Parallel(n_jobs=n_jobs, timeout=0.05 if disturbs else 60.0)
    has_ended = True
    try:
        parallel(joblib.delayed(_wait)(3600.0 if disturbs and i == 3 else 0.001, number) for i in range(8))
    except multiprocessing.TimeoutError:
        has_ended = False
    assert has_ended != disturbs
    return 8


def killed(n_jobs: int, number: int, disturbs: bool) -> int:
    """A worker that dies."""
    has_ended = True
    try:
        joblib.Parallel(n_jobs=n_jobs, batch_size=1)(joblib.delayed(_die_at)(i, number, disturbs) for i in range(10))
    except fp.WorkerDied:
        has_ended = False
    assert has_ended != disturbs
    return 10


def _row(table: np.ndarray, small: np.ndarray, i: int) -> np.ndarray:
    small += i
    return table[: 1 << 15] + small[0]


def _fail_at(i: int, at: int, array: np.ndarray) -> float:
    if i == at:
        raise ValueError(i, array)
    return float(array.sum())


def _nested(number: int, i: int) -> int:
    return sum(joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(number + i) for _ in range(4)))


def _wait(seconds: float, _number: int) -> None:
    threading.Event().wait(seconds)


def _die_at(i: int, _number: int, disturbs: bool) -> int:
    if disturbs and i == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return i
