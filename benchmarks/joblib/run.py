"""joblib's own workers beside forgepar's: the same calls of `joblib.Parallel`, by turns, on warm workers.

One process has both, so that each round meets the same machine. The scores of the searches must be the same. "CPU" is
what this process and all workers used; on a machine that others keep busy it says more than the clock.

    python -m benchmarks.joblib.run [--small]
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks._common import Row, main, target
from benchmarks._measure import apart

TITLE = "joblib: seconds a call, 2 workers, backends by turns"
BACKENDS = ("loky", "forgepar")
MOST_RATIO = 1.0  # of loky's seconds
_LEAST_REPEAT = 15  # each takes a fraction of a second, and varies


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure each workload on both backends."""
    if importlib.util.find_spec("joblib") is None:
        return [{"call": "none", "note": "joblib is not installed"}]
    repeat = 2 if small else max(repeat, _LEAST_REPEAT)
    made: list[Row] = []
    for name in WORKLOADS:
        if name.startswith("GridSearchCV") and importlib.util.find_spec("sklearn") is None:
            made.append({"call": name, "note": "scikit-learn is not installed"})
            continue
        taken = apart(by_turns, name, small, repeat)
        row: Row = {"call": name}
        for what, column in enumerate(("", ", CPU")):
            for backend in BACKENDS:
                row[backend + column] = statistics.median(both[what] for both in taken[backend])
        pairs = zip(taken["forgepar"], taken["loky"], strict=True)
        row["forgepar to loky"] = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
        made.append(target(row, "forgepar to loky", MOST_RATIO) if name.startswith("GridSearchCV") else row)
    return made


def by_turns(name: str, small: bool, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds each backend took, by the clock and of CPU, round by round, after one round to warm up."""
    import joblib

    import forgepar.joblib

    call = WORKLOADS[name](small)
    found: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS}
    for round_number in range(repeat + 1):
        values = {}
        # Each goes first in every other round.
        for backend in BACKENDS[:: 1 if round_number % 2 else -1]:
            with joblib.parallel_config(backend=backend, n_jobs=2):
                begin, used = time.perf_counter(), cpu_seconds()
                values[backend] = call()
                found[backend].append((time.perf_counter() - begin, cpu_seconds() - used))
        assert values["loky"] == values["forgepar"], "backends must not change what comes out"
    forgepar.joblib.close()
    return {backend: rounds[1:] for backend, rounds in found.items()}


def cpu_seconds() -> float:
    """Return what this process and all that it started have used so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def search(small: bool) -> Callable[[], Any]:
    """Make a grid search: 60 short fits."""
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    features, classes = make_classification(200 if small else 2000, 40, random_state=0)
    grid = {"C": np.logspace(-3, 3, 3 if small else 12).tolist()}

    def call() -> Any:
        found = GridSearchCV(LogisticRegression(max_iter=200), grid, cv=5, n_jobs=2).fit(features, classes)
        return found.cv_results_["mean_test_score"].tolist()

    return call


def forest(small: bool) -> Callable[[], Any]:
    """Make a grid search: few long fits."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV

    features, classes = make_classification(200 if small else 1000, 20, random_state=0)
    grid = {"max_depth": [2, 4] if small else [2, 4, 8]}
    model = RandomForestClassifier(5 if small else 50, random_state=0)

    def call() -> Any:
        found = GridSearchCV(model, grid, cv=3, n_jobs=2).fit(features, classes)
        return found.cv_results_["mean_test_score"].tolist()

    return call


def short_calls(small: bool) -> Callable[[], Any]:
    """Make thousands of calls that do nothing."""
    import joblib

    n = 200 if small else 5000
    return lambda: joblib.Parallel()(joblib.delayed(abs)(i) for i in range(n))


def large_array(small: bool) -> Callable[[], Any]:
    """Make calls that all take one array of 32 MiB."""
    import joblib

    array = np.arange((1 << 18) if small else (1 << 22), dtype=float)
    return lambda: joblib.Parallel()(joblib.delayed(np.take)(array, i) for i in range(40))


WORKLOADS: dict[str, Callable[[bool], Callable[[], Any]]] = {
    "GridSearchCV, 60 short fits": search,
    "GridSearchCV, 9 forests": forest,
    "5,000 calls that do nothing": short_calls,
    "40 calls with one array of 32 MiB": large_array,
}


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
