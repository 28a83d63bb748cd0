"""What a run would take, by known task durations: the run's own state machine, driven by a clock that only counts.

No process starts and no time passes. Batches are of one task, so messages cost nothing: this tells what a schedule
allows, not what an engine adds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgepar.plan import Plan
from forgepar.runstate import RunPolicy, RunState


def simulated_seconds(
    plan: Plan, durations: ArrayLike, workers: int, schedule: Literal["layers", "eager"] = "layers"
) -> float:
    """Return the wall time of a run on so many workers, in seconds.

    Each worker that is free takes the next ready task (list scheduling, R. L. Graham, 1966); under "eager" that is the
    one with the longest path behind it. Cost: O((n + m) log n).

    Args:
        plan: the workflow, frozen.
        durations: (n_tasks,) seconds, by task number.
        workers: how many.
        schedule: "layers" or "eager".

    Raises:
        ValueError: durations of another number, negative or nan; workers below 1.
    """
    seconds = np.asarray(durations, np.float64)
    if seconds.shape != (plan.n_tasks,) or not bool((seconds >= 0).all()):
        raise ValueError(f"durations must be {plan.n_tasks} numbers that are not negative, got shape {seconds.shape}.")
    if workers < 1:
        raise ValueError(f"workers={workers!r} is no number of workers. Give 1 or more.")
    state = RunState(plan, RunPolicy(schedule=schedule))
    state.begin()
    state.weigh_tasks(seconds)
    now, running = 0.0, list[tuple[float, int]]()
    while True:
        while len(running) < workers and state.head() is not None:
            task = int(state.take(1)[0])
            heapq.heappush(running, (now + float(seconds[task]), task))
        if not running:
            return now
        now, task = heapq.heappop(running)
        state.completed(range(task, task + 1))


def expected_seconds(plan: Plan, known: Mapping[str, Mapping[str, float]]) -> NDArray[np.float64]:
    """Return what each task is expected to take, from an earlier run's `RunResult.durations`.

    Args:
        plan: the workflow, frozen.
        known: seconds by task name ("tasks") and by base name ("callables"); a task that is in neither is expected to
            take as long as the callables do on average.

    Raises:
        ValueError: nothing is known at all.
    """
    tasks, callables = known.get("tasks", {}), known.get("callables", {})
    if not callables:
        raise ValueError("no durations are known. Run the workflow once and keep what RunResult.durations() returns.")
    typical = sum(callables.values()) / len(callables)
    by_template = [callables.get(plan.specs[template.spec].base, typical) for template in plan.templates]
    seconds: NDArray[np.float64] = np.array(by_template)[plan.template_of]
    for task in range(plan.n_tasks) if tasks else ():
        seconds[task] = tasks.get(plan.name(task), seconds[task])
    return seconds
