"""A plain loop in this process: what the tasks cost without any engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.patterns import Kernel
from benchmarks.systems.base import LayerRunner, Runner

NAME = "serial"
TYPICAL_US = 0.5
PARALLEL = False


def available() -> str | None:
    return None


@contextmanager
def open(workers: int) -> Iterator[Runner]:  # noqa: A001, ARG001
    yield LayerRunner(_run_layer)


def _run_layer(kernel: Kernel, inputs: Sequence[tuple[int, ...]]) -> list[int]:
    return [kernel(*values) for values in inputs]
