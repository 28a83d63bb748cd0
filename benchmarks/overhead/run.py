"""Microseconds a no-op task in stencil graphs of two widths, on two warm workers.

What counts is the run of a graph that is declared already; declaring is a column of its own. A ratio compares systems
on the same graph: an engine that batches gains from width, one that does not stays as it is. Systems for which the
wide graph takes minutes run the narrow one only. Targets hold for the wide one.

    python -m benchmarks.overhead.run [--small] [--systems forgepar,joblib]
"""

from __future__ import annotations

import statistics

from benchmarks._common import Row, main, target
from benchmarks._measure import Outcome, compared, spread, timed_run, warm
from benchmarks.patterns import noop, stencil
from benchmarks.systems import load
from benchmarks.systems.base import System

TITLE = "Overhead: microseconds a no-op task, stencil graph, 2 workers"
WORKERS = 2
DEPTH = 20
COLUMN = "us a task"
RATIO = "x forgepar"
MOST_US = 4.0
LEAST_RATIO = {"joblib": 12.0, "process_pool": 50.0}
WIDTHS = (500, 5000)
SMALL_WIDTHS = (50, 500)
AFFORDABLE_SECONDS = 30.0
SMALL_AFFORDABLE_SECONDS = 3.0


def rows(small: bool, repeat: int, systems: list[str] | None = None) -> list[Row]:
    """Measure every system on each graph that it can afford."""
    widths = SMALL_WIDTHS if small else WIDTHS
    most_seconds = SMALL_AFFORDABLE_SECONDS if small else AFFORDABLE_SECONDS
    found: list[Row] = []
    for width in widths:
        affordable = most_seconds / (width * DEPTH)
        chosen = {key: system for key, system in load(systems).items() if affordable >= system.TYPICAL_US * 1e-6}
        outcomes = compared(chosen, repeat, costs, width)
        made = {key: row(chosen[key], width, outcome) for key, outcome in outcomes.items()}
        base = made.get("forgepar", {}).get(COLUMN)
        found += [compare(key, one, base, judged=width == widths[-1]) for key, one in made.items()]
    return found


def costs(key: str, width: int) -> tuple[float, float]:
    """Return microseconds a task for declaring and for running."""
    pattern = stencil(width, DEPTH)
    with warm(key, WORKERS) as runner:
        declaring, running = timed_run(runner, pattern, noop)
    return declaring / pattern.n_tasks * 1e6, running / pattern.n_tasks * 1e6


def row(system: System, width: int, outcome: Outcome[tuple[float, float]]) -> Row:
    """Lay out one system's figures on one graph."""
    found: Row = {"system": system.NAME, "graph": f"{DEPTH} x {width:,}"}
    if isinstance(outcome, str):
        return {**found, "note": outcome}
    declaring = statistics.median(declaring for declaring, _ in outcome)
    return {**found, **spread(COLUMN, [running for _, running in outcome]), "declaring us": declaring}


def compare(key: str, made: Row, base: float | None, *, judged: bool) -> Row:
    """Return a row with its ratio to forgepar's cost on the same graph, and with its target if it is judged."""
    if COLUMN not in made:
        return made
    if key == "forgepar":
        return target(made, COLUMN, MOST_US) if judged else made
    if base is None:
        return made
    made = {**made, RATIO: made[COLUMN] / base}
    return target(made, RATIO, LEAST_RATIO[key], at_least=True) if judged and key in LEAST_RATIO else made


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
