"""What a system's file offers, and what those share that run a graph layer by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from benchmarks.patterns import Kernel, Layers, Pattern


class Runner(Protocol):
    """Runs patterns on workers that are up already."""

    def declare(self, pattern: Pattern, kernel: Kernel) -> Any:
        """Build the graph in the system's own terms; what is built is run once."""

    def run(self, declared: Any) -> list[int]:
        """Run it and return the values of the last layer."""


class System(Protocol):
    """One ``system_*.py``.

    Attributes:
        NAME: what tables call it.
        TYPICAL_US: about what a no-op task costs, microseconds, measured on two cores: which sizes are affordable.
        PARALLEL: whether it uses the workers it is given.
    """

    NAME: str
    TYPICAL_US: float
    PARALLEL: bool

    def available(self) -> str | None:
        """Return why it cannot run here, None if it can."""

    def open(self, workers: int) -> AbstractContextManager[Runner]:
        """Start workers, and end them when the context does."""


def missing(*packages: str) -> str | None:
    """Return a reason that names the first package which is not there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return "not installed"
    return None


# Runs one layer: the kernel and the inputs of each task, to the values.
RunLayer: TypeAlias = Callable[[Kernel, Sequence[tuple[int, ...]]], list[int]]


class LayerRunner:
    """Runs layer by layer and hands the values from one to the next, for systems that have no graphs.

    Args:
        run_layer: runs all tasks of a layer.
    """

    def __init__(self, run_layer: RunLayer) -> None:
        self._run_layer = run_layer

    def declare(self, pattern: Pattern, kernel: Kernel) -> tuple[Kernel, Layers]:
        return kernel, pattern.layers()

    def run(self, declared: tuple[Kernel, Layers]) -> list[int]:
        kernel, layers = declared
        values: list[int] = []
        for layer in layers:
            before = values
            values = self._run_layer(kernel, [tuple([before[i] for i in inputs]) for inputs in layer])
        return values
