"""The expected wall time of a run from known task durations: the scheduler's state machine with a simulated clock.

No process starts. Every batch is one task and messages take no time, so this is the time of the schedule without the
overhead of the engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgepar._validate import check_count
from forgepar.scheduling.run_state import RunPolicy, RunState
from forgepar.workflow.plan import Plan


def simulated_seconds(
    plan: Plan, durations: ArrayLike, workers: int, schedule: Literal["layers", "eager"] = "layers"
) -> float:
    """Return the wall time of a run, in seconds.

    Each free worker takes the next ready task (list scheduling, R. L. Graham, 1966); with "eager", the one with the
    longest remaining path. Cost: O((n + m) log n).

    Args:
        plan: the frozen workflow.
        durations: (n_tasks,) seconds, by task number.
        workers: number of workers.
        schedule: "layers" or "eager".

    Raises:
        ValueError: durations have another shape, or are negative or nan; workers is below 1.
    """
    seconds = np.asarray(durations, np.float64)
    if seconds.shape != (plan.n_tasks,) or not bool((seconds >= 0).all()):
        raise ValueError(f"durations must be {plan.n_tasks} non-negative numbers, got shape {seconds.shape}.")
    check_count("workers", workers)
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
    """Return the expected duration of each task in seconds, from `RunResult.durations` of an earlier run.

    Args:
        plan: the frozen workflow.
        known: seconds by task name ("tasks") and by callable ("callables"). A task in neither is expected to take the
            mean of all callables.

    Raises:
        ValueError: no durations are known.
    """
    tasks, callables = known.get("tasks", {}), known.get("callables", {})
    if not callables:
        raise ValueError("No durations are known. Run the workflow once and pass RunResult.durations().")
    typical = sum(callables.values()) / len(callables)
    by_template = [callables.get(plan.specs[template.spec].base, typical) for template in plan.templates]
    seconds: NDArray[np.float64] = np.array(by_template)[plan.template_of]
    for task in range(plan.n_tasks) if tasks else ():
        seconds[task] = tasks.get(plan.name(task), seconds[task])
    return seconds
