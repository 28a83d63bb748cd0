"""METG(50%): the smallest task granularity at which half of the cores' time is useful work, as Task Bench defines it.

Granularity is wall time x cores / tasks; efficiency is the time that kernels spin / (cores x wall time). Kernels are
made shorter, half each time, until efficiency falls below 50%; between the last two runs it is interpolated.

Kernels spin by the clock. Where the engine's own process takes a core from a worker, that worker's clock goes on, so
that efficiency is a little better than by counted instructions: by as much as the engine's time a task (see overhead)
is of the granularity.

    python -m benchmarks.metg.run [--small] [--systems forgepar,process_pool]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import Outcome, compared, spread, timed_run, warm
from benchmarks.patterns import PATTERNS, Pattern, spin
from benchmarks.systems import load
from benchmarks.systems.base import Runner, System

TITLE = "METG(50%): microseconds of the smallest task that keeps the cores half busy"
COLUMN = "METG us"
MOST_US = {1: 250.0, 8: 100.0}  # stencil, by how many times the workers the width is
_HALF = 0.5
_FIRST_SECONDS = 1e-3
_SHORTEST_SECONDS = 1e-7  # shorter than a look at the clock
_LONGEST_SECONDS = 1.0
_DEPTHS = (20, 2000)
_RUNS_A_POINT = 3


class Case(NamedTuple):
    """A pattern and how many times the workers its width is."""

    pattern: str
    times: int


class Point(NamedTuple):
    """One run of a sweep."""

    granularity: float
    efficiency: float


def rows(small: bool, repeat: int, systems: list[str] | None = None) -> list[Row]:
    """Sweep every system: ours on all patterns, peers on the stencil."""
    workers = cores()
    budget = 0.03 if small else 0.1
    found = []
    for case in [Case(pattern, times) for times in MOST_US for pattern in PATTERNS]:
        chosen = {key: system for key, system in load(systems).items() if takes_part(key, case)}
        outcomes = compared(chosen, repeat, sweep, *case, workers, budget)
        found += [row(key, chosen[key], case, workers, outcome) for key, outcome in outcomes.items()]
    return found


def takes_part(key: str, case: Case) -> bool:
    return case.pattern == "stencil" or key.startswith("forgepar")


def sweep(key: str, pattern: str, times: int, workers: int, budget_seconds: float) -> float:
    """Return METG(50%) in microseconds; each run spins for about ``budget_seconds`` on all cores."""
    n_cores = workers if load([key])[key].PARALLEL else 1
    with warm(key, workers) as runner:

        def point(seconds: float) -> Point:
            width = times * workers
            depth = min(max(int(budget_seconds * n_cores / (seconds * width)), _DEPTHS[0]), _DEPTHS[1])
            return measured(runner, PATTERNS[pattern](width, depth), seconds, n_cores)

        return smallest_granularity(point) * 1e6


def measured(runner: Runner, pattern: Pattern, seconds: float, n_cores: int) -> Point:
    """Run kernels of some seconds a few times and take the median: a busy neighbour must not bend the sweep."""
    wall = statistics.median(timed_run(runner, pattern, spin(seconds))[1] for _ in range(_RUNS_A_POINT))
    available = wall * n_cores
    return Point(available / pattern.n_tasks, seconds * pattern.n_tasks / available)


def smallest_granularity(point: Callable[[float], Point]) -> float:
    """Sweep kernel durations to where efficiency crosses one half, and return the granularity there.

    Args:
        point: runs kernels of some seconds.

    Raises:
        RuntimeError: kernels of a second do not reach it.
    """
    seconds = _FIRST_SECONDS
    above = below = point(seconds)
    while above.efficiency < _HALF:
        seconds *= 2
        if seconds > _LONGEST_SECONDS:
            raise RuntimeError(f"kernels of {_LONGEST_SECONDS} s keep the cores busy for {above.efficiency:.0%} only")
        below, above = above, point(seconds)
    while below.efficiency >= _HALF:
        seconds /= 2
        if seconds < _SHORTEST_SECONDS:
            return below.granularity
        above, below = below, point(seconds)
    return interpolated(above, below)


def interpolated(above: Point, below: Point) -> float:
    """Return the granularity at one half between two points, on a logarithmic scale."""
    share = (_HALF - below.efficiency) / (above.efficiency - below.efficiency)
    return math.exp(math.log(below.granularity) + share * math.log(above.granularity / below.granularity))


def row(key: str, system: System, case: Case, workers: int, outcome: Outcome[float]) -> Row:
    found: Row = {"system": system.NAME, "pattern": case.pattern, "width": case.times * workers}
    if isinstance(outcome, str):
        return {**found, "note": outcome}
    found |= spread(COLUMN, outcome)
    judged = key == "forgepar" and case.pattern == "stencil"
    return target(found, COLUMN, MOST_US[case.times]) if judged else found


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
