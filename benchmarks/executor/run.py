"""Executors side by side: what a job that does nothing costs, and how long one takes there and back.

"submit" and "map" queue all jobs at once. "round trip" submits the next when the last is done. "8 MiB" is an array as
an argument, and its sum back. Two workers each, warm.

    python -m benchmarks.executor.run [--small]
"""

from __future__ import annotations

import importlib.util
import operator
import statistics
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from benchmarks._common import Row, main, target
from benchmarks._measure import apart, interleaved, timed

TITLE = "Executors: microseconds a no-op job, 2 workers"
SYSTEMS = {"forgepar": "ForgeExecutor", "process_pool": "ProcessPoolExecutor", "loky": "loky"}
COLUMNS = ("submit", "map", "map, chunks of 100", "round trip", "8 MiB")
WORKERS = 2
LEAST_SHARE = 1.0  # of what a job costs with ProcessPoolExecutor, at most


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure each executor in a process of its own, interleaved."""
    n_jobs = 500 if small else 10_000
    missing = {"loky"} if importlib.util.find_spec("loky") is None else set()
    subjects = {key: partial(apart, costs, key, n_jobs) for key in SYSTEMS if key not in missing}
    found = {
        key: {column: statistics.median(sample[column] for sample in samples) for column in COLUMNS}
        for key, samples in interleaved(subjects, repeat).items()
    }
    made: list[Row] = []
    for key, medians in found.items():
        row: Row = {"executor": SYSTEMS[key], **medians}
        row["submit to its"] = medians["submit"] / found["process_pool"]["submit"]
        made.append(target(row, "submit to its", LEAST_SHARE) if key == "forgepar" else row)
    return made + [{"executor": SYSTEMS[key], "note": "not installed"} for key in missing]


def costs(key: str, n_jobs: int) -> dict[str, float]:
    """Return what jobs cost, microseconds each."""
    array = np.ones(1 << 20)
    with make(key) as executor:
        for _ in range(3):
            list(executor.map(abs, range(100)))
        subjects: dict[str, tuple[Callable[[], Any], int]] = {
            "submit": (lambda: [f.result() for f in [executor.submit(abs, i) for i in range(n_jobs)]], n_jobs),
            "map": (lambda: list(executor.map(abs, range(n_jobs))), n_jobs),
            "map, chunks of 100": (lambda: list(executor.map(abs, range(n_jobs), chunksize=100)), n_jobs),
            "round trip": (lambda: [executor.submit(abs, i).result() for i in range(n_jobs // 10)], n_jobs // 10),
            "8 MiB": (lambda: [executor.submit(operator.methodcaller("sum"), array).result() for _ in range(10)], 10),
        }
        return {name: timed(call)[0] / n * 1e6 for name, (call, n) in subjects.items()}


def make(key: str) -> Executor:
    """Open an executor."""
    if key == "forgepar":
        from forgepar import ForgeExecutor

        return ForgeExecutor(WORKERS)
    if key == "loky":
        import loky

        executor: Executor = loky.ProcessPoolExecutor(WORKERS)
        return executor
    return ProcessPoolExecutor(WORKERS)


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
