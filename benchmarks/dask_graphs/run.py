"""Graphs of Dask's on local workers: `forgepar.dask_get` beside Dask's own scheduler of processes, in one process.

Two arrays multiplied, a singular value decomposition (all three factors), a data frame grouped. The runs take turns;
`dask_get` keeps its workers, Dask's starts some for each call unless it is given a pool, which is the row beside.
Numerical libraries run on one thread everywhere. Values are compared.

    python -m benchmarks.dask_graphs.run [--small]
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import interleaved, run_python, timed
from benchmarks.systems.base import missing

TITLE = "Dask graphs: seconds on local workers"
LEAST_TIMES = 1.5
PROCESSES, POOL = 'scheduler="processes"', 'scheduler="processes", a pool kept'
EAGER, LAYERED = "forgepar.dask_get", 'forgepar.dask_get, schedule="layers"'
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM")}


def matrix_product(small: bool) -> tuple[Any, ...]:
    """A random matrix times its own transpose, summed up by column."""
    import dask.array as da

    size = 600 if small else 3000
    matrix = da.random.default_rng(0).random((size, size), chunks=(size // 6, size // 6))
    return ((matrix @ matrix.T).sum(axis=0),)


def decomposition(small: bool) -> tuple[Any, ...]:
    """A tall and skinny random matrix taken apart."""
    import dask.array as da

    rows = 20_000 if small else 100_000
    left, values, right = da.linalg.svd(da.random.default_rng(0).random((rows, 64), chunks=(rows // 20, 64)))
    return left, values, right


def grouped(small: bool) -> tuple[Any, ...]:
    """Mean, sum and deviation of a column by another."""
    import dask.dataframe as dd
    import numpy as np
    import pandas as pd

    n_rows = 100_000 if small else 4_000_000
    numbers = np.arange(n_rows)
    frame = pd.DataFrame({"key": numbers % 1000, "value": numbers * 0.5, "name": (numbers % 7).astype(str)})
    return (dd.from_pandas(frame, npartitions=16).groupby("key").agg({"value": ["mean", "sum", "std"]}),)


GRAPHS: dict[str, Callable[[bool], tuple[Any, ...]]] = {
    "matrix product": matrix_product,
    "SVD": decomposition,
    "group-by": grouped,
}


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure every graph on every scheduler."""
    if reason := missing("dask", "pandas", "pyarrow"):
        return [{"scheduler": EAGER, "note": reason}]
    found = []
    for graph in GRAPHS:
        command = ("-m", "benchmarks.dask_graphs.run", "--alone", graph, str(int(small)), str(repeat))
        by_scheduler: dict[str, list[float]] = run_python(*command, environment=os.environ | _ONE_THREAD)
        base = statistics.median(by_scheduler[PROCESSES])
        for name, taken in by_scheduler.items():
            median = statistics.median(taken)
            made: Row = {"graph": graph, "scheduler": name, "seconds": median, "min": min(taken), "max": max(taken)}
            made["times as fast"] = base / median
            is_judged = name == EAGER and not small
            found.append(target(made, "times as fast", LEAST_TIMES, at_least=True) if is_judged else made)
    return found


def seconds(graph: str, small: bool, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of a graph on each scheduler."""
    import dask

    import forgepar as fp
    from forgepar.integrations.dask_graphs import close_workers

    n_workers = cores()
    collections = GRAPHS[graph](small)
    references = dask.compute(*collections, scheduler="synchronous")

    def run(keywords: dict[str, Any]) -> float:
        taken, values = timed(lambda: dask.compute(*collections, num_workers=n_workers, **keywords))
        for value, reference in zip(values, references, strict=True):
            check(value, reference)
        return taken

    with ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        schedulers = {
            EAGER: {"scheduler": fp.dask_get},
            LAYERED: {"scheduler": fp.dask_get, "schedule": "layers"},
            PROCESSES: {"scheduler": "processes"},
            POOL: {"scheduler": "processes", "pool": pool},
        }
        for name in (EAGER, POOL):
            run(schedulers[name])  # modules are loaded by the first
        found = interleaved({name: lambda k=k: run(k) for name, k in schedulers.items()}, repeat)
    close_workers()
    return found


def check(value: Any, reference: Any) -> None:
    """Raise unless two values are equal, but for the order of a frame's rows and the last bits of sums."""
    import numpy as np
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        pd.testing.assert_frame_equal(value.sort_index(), reference.sort_index())
    else:
        np.testing.assert_allclose(value, reference)


if __name__ == "__main__":
    import json
    import sys

    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(seconds(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]))))
        raise SystemExit(0)
    raise SystemExit(main(TITLE, rows))
