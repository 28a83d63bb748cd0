"""Workflows of real runs, replayed on 8 workers with their own durations scaled down, beside a perfect engine.

Each task sleeps for its duration, so that 8 workers work on any number of cores. Durations are scaled so that the
barrier's ideal is `IDEAL_SECONDS`; none is below `SHORTEST_SECONDS` (traces round short ones to zero, and a sleep of
less is mostly the timer's own slack). The layered run is compared with `barrier_ideal`, tasks in the order in which the
engine hands them out (within a layer by template, then by number), the eager one with `greedy`, which knows all
durations beforehand; see simulate.py.

Traces are WfFormat 1.5 files, from --traces, the environment's FORGEPAR_TRACES, or ../shared/data/wfinstances.

    python -m benchmarks.replay.run [--small] [--traces FOLDER]
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import interleaved, timed
from benchmarks.replay.simulate import barrier_ideal, greedy
from benchmarks.replay.trace import Trace, folder, load

TITLE = "Replay: real workflows with their durations scaled down, 8 workers, beside a perfect engine"
WORKERS = 8
IDEAL_SECONDS = 6.0
SMALL_IDEAL_SECONDS = 1.0
SHORTEST_SECONDS = 0.001
SCHEDULES = {"forgepar": "layers", "forgepar_eager": "eager"}
MOST_RATIO = 1.05


@dataclass(frozen=True)
class Program:
    """What tasks of one kind run: a sleep, known by the kind's name."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, seconds: float, *_inputs: None) -> None:
        time.sleep(seconds)


def rows(small: bool, repeat: int, systems: list[str] | None = None) -> list[Row]:
    """Replay each trace under each schedule."""
    schedules = [schedule for key, schedule in SCHEDULES.items() if systems is None or key in systems]
    paths = sorted(folder().glob("*.json"))
    if not paths:
        return [{"trace": "none", "note": "skipped: no *.json there; give --traces FOLDER or set FORGEPAR_TRACES"}]
    ideal_seconds = SMALL_IDEAL_SECONDS if small else IDEAL_SECONDS
    found = []
    with fp.WorkflowExecutor(workers=WORKERS) as executor:
        executor.run(declare(Trace("warm", ["warm"] * 8 * WORKERS, [0.001] * 8 * WORKERS, [[]] * 8 * WORKERS)))
        for path in paths:
            found += replayed(executor, to_length(load(path), ideal_seconds), schedules, repeat)
    return found


def to_length(trace: Trace, ideal_seconds: float) -> Trace:
    """Scale a trace so that with a barrier it ideally takes so long."""
    return trace.scaled(ideal_seconds / barrier_ideal(trace.durations, trace.layers(), WORKERS), SHORTEST_SECONDS)


def replayed(executor: fp.WorkflowExecutor, trace: Trace, schedules: list[str], repeat: int) -> list[Row]:
    """Run a trace under each schedule, a row each."""
    workflow = declare(trace)
    ideals = {
        "layers": barrier_ideal(trace.durations, handed_out(workflow), WORKERS),
        "eager": greedy(trace.durations, trace.edges, WORKERS),
    }
    runs = {name: functools.partial(executor.run, workflow, schedule=name) for name in schedules}
    walls = interleaved({name: functools.partial(_wall, run) for name, run in runs.items()}, repeat)
    return [row(trace, name, walls[name], ideals[name]) for name in schedules]


def _wall(run: functools.partial[fp.RunResult]) -> float:
    seconds, _ = timed(run)
    return seconds


def declare(trace: Trace) -> fp.Workflow:
    """Write a trace as a workflow, tasks in its order; a task takes the values of those it waited for."""
    workflow = fp.Workflow(trace.name)
    programs = {kind: Program(kind) for kind in trace.kinds}
    handles: list[fp.TaskHandle] = []
    for kind, seconds, parents in zip(trace.kinds, trace.durations, trace.parents, strict=True):
        handles.append(workflow.add(programs[kind], seconds, *[handles[parent] for parent in parents]))
    return workflow


def handed_out(workflow: fp.Workflow) -> list[list[int]]:
    """Return the tasks of each layer in the order in which the engine hands them out."""
    plan = workflow.plan()
    return [plan.order[start:end].tolist() for start, end in pairwise(plan.layer_start)]


def row(trace: Trace, schedule: str, walls: list[float], ideal: float) -> Row:
    ratios = [wall / ideal for wall in walls]
    found: Row = {
        "trace": trace.name,
        "tasks": len(trace.durations),
        "schedule": schedule,
        "wall s": statistics.median(walls),
        "ideal s": ideal,
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }
    return target(found, "ratio", MOST_RATIO)


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
