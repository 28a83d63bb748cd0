"""Microseconds and parent bytes a task from 1e3 to 1e6 tasks, stencil graph up to 1,000 wide.

Each figure comes from a process of its own, whose workers and code were warmed by a graph of 1,000 tasks. Bytes are
the parent's resident memory: what it grew by from before the graph was declared until after it was run, with the
result still held ("bytes"), and at its highest ("peak bytes"). Sizes that would take a system minutes are left out.

    python -m benchmarks.scaling.run [--small] [--systems forgepar]
"""

from __future__ import annotations

import functools
import gc
import resource
import statistics
import sys

import psutil

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import Outcome, apart, timed, tolerant, warm
from benchmarks.patterns import check, noop, stencil
from benchmarks.systems import load
from benchmarks.systems.base import System

TITLE = "Scaling: microseconds and parent bytes a task, stencil graph"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SMALL_SIZES = SIZES[:2]
WIDEST = 1000
BASE_SIZE = 10_000
MOST_GROWTH = 1.25
MOST_BYTES = 600.0
_AFFORDABLE_SECONDS = 15.0
_COLUMNS = {
    "us a task": "running_us",
    "declaring us": "declaring_us",
    "bytes": "held_bytes",
    "peak bytes": "peak_bytes",
}
_GROWTH = "x us at 1e4"


def rows(small: bool, repeat: int, systems: list[str] | None = None) -> list[Row]:
    """Measure every system at each size that it can afford."""
    chosen = load(systems)
    reasons = {key: system.available() for key, system in chosen.items()}
    sizes = SMALL_SIZES if small else SIZES
    subjects = {
        (key, n): functools.partial(apart, figures, key, *shape(n))
        for key, system in chosen.items()
        for n in sizes
        if not reasons[key] and system.TYPICAL_US * 1e-6 * n <= _AFFORDABLE_SECONDS
    }
    found = {case: row(chosen[case[0]], case[1], outcome) for case, outcome in tolerant(subjects, repeat).items()}
    for (key, n), made in found.items():
        found[key, n] = judged(key, n, made, found.get((key, BASE_SIZE)))
    absent = [{"system": chosen[key].NAME, "note": reason} for key, reason in reasons.items() if reason]
    return [*found.values(), *absent]


def figures(key: str, width: int, depth: int) -> dict[str, float]:
    """Declare and run one graph; it and its result are held until memory is read."""
    pattern = stencil(width, depth)
    process = psutil.Process()
    with warm(key, cores()) as runner:
        gc.collect()
        before, peak_before = process.memory_info().rss, peak_rss()
        declaring, declared = timed(runner.declare, pattern, noop)
        running, last_row = timed(runner.run, declared)
        grown = process.memory_info().rss - before
        peak = max(grown, peak_rss() - before if peak_rss() > peak_before else 0)  # an earlier peak tells nothing
        check(pattern, last_row)
    n = pattern.n_tasks
    found = {"running_us": running * 1e6, "declaring_us": declaring * 1e6, "held_bytes": grown, "peak_bytes": peak}
    return {name: figure / n for name, figure in found.items()}


def peak_rss() -> int:
    """Return the most memory this process ever had resident, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def shape(n_tasks: int) -> tuple[int, int]:
    """Return width and depth of the graph of so many tasks: ten layers at least."""
    width = min(WIDEST, n_tasks // 10)
    return width, n_tasks // width


def row(system: System, n_tasks: int, outcome: Outcome[dict[str, float]]) -> Row:
    found: Row = {"system": system.NAME, "tasks": n_tasks}
    if isinstance(outcome, str):
        return {**found, "note": outcome}
    medians = {column: statistics.median(sample[name] for sample in outcome) for column, name in _COLUMNS.items()}
    return {**found, **medians}


def judged(key: str, n_tasks: int, made: Row, base: Row | None) -> Row:
    """Return a row with its cost beside that of 1e4 tasks, and forgepar's largest held against the targets."""
    us = "us a task"
    if base is None or us not in base or us not in made or n_tasks <= BASE_SIZE:
        return made
    made = {**made, _GROWTH: made[us] / base[us]}
    if key != "forgepar" or n_tasks != SIZES[-1]:
        return made
    grown, sized = target(made, _GROWTH, MOST_GROWTH), target(made, "bytes", MOST_BYTES)
    return {**made, "target": f"{grown['target']}, {sized['target']}", "met": grown["met"] and sized["met"]}


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
