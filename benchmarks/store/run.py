"""What a run store costs: a no-op task with its run kept, beside the same run without, and what taking it up costs.

"added" is what the store adds to a task, fingerprint and value included: the target is about that. Each figure is of
one process that runs with and without, in turns.

    python -m benchmarks.store.run [--small]
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import apart, interleaved, spread, timed
from benchmarks.patterns import noop, stencil
from benchmarks.systems.system_forgepar import ForgeparRunner

TITLE = "Run store: microseconds a no-op task, 100,000 tasks, 2 workers"
COLUMN = "added us a task"
N_TASKS = 100_000
SMALL_N_TASKS = 5_000
DEPTH = 20
TURNS = 3
MOST_US = 10.0
MOST_BYTES = 300.0
GRAPHS = ("map", "stencil")


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure both graphs."""
    n = SMALL_N_TASKS if small else N_TASKS
    samples = interleaved({graph: partial(apart, cost, graph, n) for graph in GRAPHS}, repeat)
    found: list[Row] = []
    for graph, costs in samples.items():
        plain, _, resumed, n_bytes = (statistics.median(column) for column in zip(*costs, strict=True))
        made: Row = {"graph": graph, "tasks": n, "without, us": plain, **spread(COLUMN, [cost[1] for cost in costs])}
        made |= {"resumed us a task": resumed, "bytes a task": n_bytes}
        if not small:
            made = target(made, COLUMN, MOST_US)
        found.append(made)
        found.append(target({"graph": graph, "tasks": n, "bytes a task": n_bytes}, "bytes a task", MOST_BYTES))
    return found


def cost(graph: str, n: int) -> tuple[float, float, float, float]:
    """Return microseconds a task without a store, what one adds, those of a resumed run, and bytes a task."""
    plain, kept, resumed = [], [], []
    n_bytes = 0.0
    with fp.WorkflowExecutor(workers=2) as executor, tempfile.TemporaryDirectory() as folder:
        workflow = declared(executor, graph, n)
        executor.run(workflow)
        for turn in range(TURNS):
            store = Path(folder, f"runs-{turn}.db")
            plain.append(timed(lambda: executor.run(workflow))[0])
            kept.append(timed(lambda store=store: executor.run(workflow, store=store))[0])
            n_bytes = sum(path.stat().st_size for path in Path(folder).glob(f"{store.name}*") if path.is_file()) / n
            resumed.append(timed(lambda store=store: executor.run(workflow, store=store, resume=True))[0])
    without = statistics.median(plain)
    added = statistics.median(kept) - without
    return without / n * 1e6, added / n * 1e6, statistics.median(resumed) / n * 1e6, n_bytes


def declared(executor: fp.WorkflowExecutor, graph: str, n: int) -> fp.Workflow:
    """Return a workflow of so many tasks."""
    if graph == "map":
        workflow = fp.Workflow("map")
        workflow.map(abs, range(n))
        return workflow
    made, _ = ForgeparRunner(executor, "layers").declare(stencil(n // DEPTH, DEPTH), noop)
    return made


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
