"""``ProcessPoolExecutor.submit``, one message a task, a barrier after each layer."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from benchmarks.patterns import Kernel
from benchmarks.systems.base import LayerRunner, Runner

NAME = "ProcessPoolExecutor"
TYPICAL_US = 300.0
PARALLEL = True


def available() -> str | None:
    return None


@contextmanager
def open(workers: int) -> Iterator[Runner]:  # noqa: A001
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")  # as forgepar does
    pool = ProcessPoolExecutor(workers, mp_context=context)

    def run_layer(kernel: Kernel, inputs: Sequence[tuple[int, ...]]) -> list[int]:
        futures = [pool.submit(kernel, *values) for values in inputs]
        return [future.result() for future in futures]

    try:
        yield LayerRunner(run_layer)
    finally:
        pool.shutdown(cancel_futures=True)
