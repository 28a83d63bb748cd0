"""No-op tasks on one Dask cluster: in batches by forgepar, and as tasks of Dask's own.

A stencil graph (three dependencies a task) of 20,000 tasks, on a cluster of as many worker processes as cores. The runs
take turns on the same workers. "delayed" is the same graph written with `dask.delayed`, "graph" the dictionary that
Dask's scheduler gets in the end. Only running is timed: what it takes to declare is a column beside.

    python -m benchmarks.dask.run [--small]
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import apart, timed_run
from benchmarks.patterns import Kernel, Pattern, noop, stencil
from benchmarks.systems.base import Runner, missing
from benchmarks.systems.system_dask import DaskRunner
from benchmarks.systems.system_forgepar import ForgeparRunner

TITLE = "Dask: seconds for no-op tasks on one cluster, stencil graph"
WIDTH, DEPTH = 1000, 20
SMALL_WIDTH, SMALL_DEPTH = 50, 4
LEAST_TIMES = 10.0
DELAYED = "dask.delayed"
BATCHES, EAGER = "forgepar on dask", "forgepar on dask, eager"


class DelayedRunner:
    """Runs patterns written with `dask.delayed`.

    Args:
        client: a `distributed.Client`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def declare(self, pattern: Pattern, kernel: Kernel) -> list[Any]:
        import dask

        task = dask.delayed(kernel, pure=False)
        before: list[Any] = []
        for layer in pattern.layers():
            before = [task(*[before[i] for i in inputs]) for inputs in layer]
        return before

    def run(self, declared: list[Any]) -> list[int]:
        import dask

        return list(dask.compute(*declared, scheduler=self._client))


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure all on one cluster."""
    if reason := missing("distributed"):
        return [{"system": BATCHES, "note": reason}]
    width, depth = (SMALL_WIDTH, SMALL_DEPTH) if small else (WIDTH, DEPTH)
    taken: list[dict[str, list[float]]] = [apart(seconds, width, depth) for _ in range(repeat)]
    samples = {name: [sample[name] for sample in taken] for name in taken[0]}
    medians = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in samples.items()
    }
    found = []
    for name, (declaring, running) in medians.items():
        made: Row = {
            "system": name,
            "tasks": width * depth,
            "seconds": running,
            "min": min(sample[1] for sample in samples[name]),
            "max": max(sample[1] for sample in samples[name]),
            "to declare": declaring,
            "times as fast as delayed": medians[DELAYED][1] / running,
        }
        is_judged = name == BATCHES and not small
        found.append(target(made, "times as fast as delayed", LEAST_TIMES, at_least=True) if is_judged else made)
    return found


def seconds(width: int, depth: int) -> dict[str, tuple[float, float]]:
    """Return the seconds that declaring and running took, by system, on a new cluster."""
    pattern = stencil(width, depth)
    with runners() as all_runners:
        for runner in all_runners.values():
            timed_run(runner, stencil(50, 4), noop)
        return {name: timed_run(runner, pattern, noop) for name, runner in all_runners.items()}


@contextmanager
def runners() -> Iterator[dict[str, Runner]]:
    """Start a cluster, and all that runs on it."""
    from distributed import Client, LocalCluster

    import forgepar as fp

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=cores(),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                local_directory=folder,
                silence_logs=logging.ERROR,
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        executor = stack.enter_context(fp.WorkflowExecutor(backend=fp.DaskBackend(client)))
        yield {
            BATCHES: ForgeparRunner(executor, "layers"),
            EAGER: ForgeparRunner(executor, "eager"),
            DELAYED: DelayedRunner(client),
            "dask graph": DaskRunner(client),
        }


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
