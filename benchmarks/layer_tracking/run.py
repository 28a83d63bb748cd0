"""Wall time beside the sum over layers of max(longest task, the layer's work / workers).

That sum is what a barrier between layers allows at best. The ratio is to the sum over durations as measured in the
workers; "to declared" is to the sum over those that were asked for, which sleeps overshoot, and computing does where
others use the cores. Two workloads: tasks of uneven length that sleep, on more workers than there are cores, and tasks
that compute, on the cores there are.

    python -m benchmarks.layer_tracking.run [--small]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

import forgepar as fp
from benchmarks._common import Row, main
from forgepar.machine import available_cpus

TITLE = "Layer tracking: wall time beside the longest task of each layer"
TARGET = 1.05


def nap(seconds: float, *_: object) -> float:
    time.sleep(seconds)
    return seconds


def compute(seconds: float, *_: object) -> float:
    """Compute for so much CPU time: what a busy neighbour takes of the core does not count as work done."""
    end = time.thread_time() + seconds
    x = 0.5
    while time.thread_time() < end:
        for _i in range(1000):
            x = 3.9 * x * (1 - x)
    return x


def declare(work: Callable[..., float], layers: Sequence[Sequence[float]]) -> fp.Workflow:
    """Layers of tasks; each takes two values of the layer before."""
    wf = fp.Workflow("layer tracking")
    before: fp.TaskHandles | None = None
    for lengths in layers:
        if before is None:
            before = wf.map(work, lengths)
        else:
            n = len(before)
            parents = [[before[i % n], before[(i + 1) % n]] for i in range(len(lengths))]
            before = wf.map(work, lengths, parents)
    return wf


def uneven(n_layers: int, width: int, shortest: float, longest: float) -> list[list[float]]:
    """Draw log-uniform task lengths in seconds, the same at every run."""
    rng = np.random.default_rng(7)
    lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), (n_layers, width)))
    return [sorted(layer, reverse=True) for layer in lengths.tolist()]


def ideal(result: fp.RunResult, workers: int) -> float:
    """Sum over layers of max(longest task, work / workers), of the durations measured in the workers."""
    return sum(max(row.longest_seconds, row.work_seconds / workers) for row in result.layer_table())


def declared_ideal(layers: Sequence[Sequence[float]], workers: int) -> float:
    """The same sum over the durations that tasks were asked to take."""
    return sum(max(max(layer), sum(layer) / workers) for layer in layers)


def measure(name: str, work: Callable[..., float], layers: Sequence[Sequence[float]], workers: int, repeat: int) -> Row:
    wf = declare(work, layers)
    walls, ideals = [], []
    with fp.WorkflowExecutor(workers=workers) as executor:
        executor.run(declare(work, [[0.001] * workers]))  # warm
        for _ in range(repeat):
            result = executor.run(wf)
            walls.append(result.wall_seconds)
            ideals.append(ideal(result, workers))
    ratio = statistics.median(wall / best for wall, best in zip(walls, ideals, strict=True))
    return {
        "workload": name,
        "workers": workers,
        "layers": len(layers),
        "tasks": sum(map(len, layers)),
        "wall s": statistics.median(walls),
        "ideal s": statistics.median(ideals),
        "to declared": statistics.median(walls) / declared_ideal(layers, workers),
        "ratio": ratio,
        "target": f"<= {TARGET}",
        "met": ratio <= TARGET,
    }


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure both workloads."""
    cores = available_cpus()
    n_layers = 3 if small else 10
    one_each = uneven(n_layers, 8, 0.05, 0.4)
    many = [[0.05] * (8 * cores) for _ in range(n_layers)]
    computing = [[0.05 + 0.01 * i] * cores for i in range(2 * n_layers)]
    return [
        measure("sleeping, uneven, one a worker", nap, one_each, 8, repeat),
        measure("sleeping, even, eight a worker", nap, many, cores, repeat),
        measure("computing, one a core", compute, computing, cores, repeat),
    ]


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
