"""Task graphs described neutrally, for every system to build its own way; and the kernels that their tasks run.

A pattern is a grid of layers: a task takes the values of some tasks of the layer before. The five are those of Task
Bench (Slaughter et al., "Task Bench: A Parameterized Benchmark for Evaluating Parallel Runtime Performance", SC 2020).
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

# For each layer, for each of its tasks, the columns in the layer before whose values it takes.
Layers: TypeAlias = list[list[tuple[int, ...]]]
Kernel: TypeAlias = Callable[..., int]


@dataclass(frozen=True)
class Pattern:
    """A task graph of some depth.

    Attributes:
        name: what tables call it.
        width: tasks in its widest layer.
        depth: how many layers.
        dependencies: gives for a layer (1 or later) and column the columns in the layer before that it depends on.
        width_at: gives how many tasks a layer has; None: ``width`` in all of them.
    """

    name: str
    width: int
    depth: int
    dependencies: Callable[[int, int], tuple[int, ...]]
    width_at: Callable[[int], int] | None = None

    def layers(self) -> Layers:
        """Spell out the dependencies of each task of each layer."""
        return [
            [self.dependencies(layer, i) if layer else () for i in range(self.width_of(layer))]
            for layer in range(self.depth)
        ]

    def width_of(self, layer: int) -> int:
        return self.width if self.width_at is None else self.width_at(layer)

    @property
    def n_tasks(self) -> int:
        """How many tasks there are in all layers."""
        return sum(map(self.width_of, range(self.depth)))


def stencil(width: int, depth: int) -> Pattern:
    """Take the task above and its two neighbours; at the edges there is one neighbour only."""

    def dependencies(_layer: int, i: int) -> tuple[int, ...]:
        return tuple(range(max(0, i - 1), min(width, i + 2)))

    return Pattern("stencil", width, depth, dependencies)


def fft(width: int, depth: int) -> Pattern:
    """Take the task above and those 1, 2, 4, ... columns away from it, the distance cycling from layer to layer."""
    n_distances = max(1, (width - 1).bit_length())

    def dependencies(layer: int, i: int) -> tuple[int, ...]:
        distance = 1 << (layer - 1) % n_distances
        return tuple(j for j in (i - distance, i, i + distance) if 0 <= j < width)

    return Pattern("fft", width, depth, dependencies)


def tree(width: int, depth: int) -> Pattern:
    """Fan out from one task, each to two, until the width is reached; from there on column i takes i // 2."""
    return Pattern("tree", width, depth, lambda _, i: (i // 2,), lambda layer: min(width, 1 << min(layer, 62)))


def all_to_all(width: int, depth: int) -> Pattern:
    """Take all tasks of the layer before."""
    return Pattern("all_to_all", width, depth, lambda _, i: tuple(range(width)))  # noqa: ARG005


def random_nearest(width: int, depth: int, radix: int = 5, share: float = 0.25, seed: int = 0) -> Pattern:
    """Take the task above and a share of the ``radix`` nearest, drawn anew for each task, the same at every run."""

    def dependencies(layer: int, i: int) -> tuple[int, ...]:
        rng = random.Random(f"{seed}/{layer}/{i}")
        near = range(max(0, i - radix // 2), min(width, i + (radix + 1) // 2))
        return tuple(j for j in near if j == i or rng.random() < share)

    return Pattern("random_nearest", width, depth, dependencies)


PATTERNS = {make.__name__: make for make in (stencil, fft, tree, all_to_all, random_nearest)}


def noop(*inputs: int) -> int:
    """Do nothing but count the layers, by which `check` knows that values arrived."""
    return inputs[0] + 1 if inputs else 0


def spin(seconds: float) -> Kernel:
    """Make a kernel that keeps its core busy for so long, by the clock: it overshoots by one look at it, 0.1 us."""
    return functools.partial(_spin, seconds)


def _spin(seconds: float, *inputs: int) -> int:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return noop(*inputs)


def check(pattern: Pattern, last_row: list[int]) -> None:
    """Raise unless the last layer's values show that every layer ran after the one before."""
    right = pattern.depth - 1
    if len(last_row) != pattern.width_of(right) or any(value != right for value in last_row):
        raise RuntimeError(f"{pattern.name} {pattern.width} x {pattern.depth} gave a wrong last row: {last_row[:5]}...")
