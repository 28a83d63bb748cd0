"""dask.distributed: a cluster of processes on this machine, one thread each, given the whole graph at once."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.patterns import Kernel, Pattern
from benchmarks.systems.base import Runner, missing

NAME = "dask.distributed"
TYPICAL_US = 1400.0
PARALLEL = True


def available() -> str | None:
    return missing("distributed")


class DaskRunner:
    """Runs patterns as graphs of a client.

    Args:
        client: a `distributed.Client`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._graphs = itertools.count()

    def declare(self, pattern: Pattern, kernel: Kernel) -> tuple[dict[Any, Any], list[Any]]:
        """Write the graph with keys of its own, as the scheduler may still hold results of an earlier one."""
        graph_name = f"graph-{next(self._graphs)}"
        layers = pattern.layers()
        graph = {
            (graph_name, at, i): (kernel, *[(graph_name, at - 1, j) for j in inputs])
            for at, layer in enumerate(layers)
            for i, inputs in enumerate(layer)
        }
        return graph, [(graph_name, len(layers) - 1, i) for i in range(len(layers[-1]))]

    def run(self, declared: tuple[dict[Any, Any], list[Any]]) -> list[int]:
        graph, last_row = declared
        return list(self._client.get(graph, last_row))


@contextmanager
def open(workers: int) -> Iterator[Runner]:  # noqa: A001
    from distributed import Client, LocalCluster

    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
            local_directory=folder,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield DaskRunner(client)
