"""What the record of a run costs: a no-op task with events in memory, as always, and with each a line in a file.

"books alone" is what the parent does to write down what replies tell, columns and events, fed again with the replies
of a run: the target is about that. Its bytes are what columns and events keep of a task until somebody looks.

    python -m benchmarks.audit.run [--small]
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import apart, interleaved, spread, timed
from benchmarks.patterns import noop, stencil
from benchmarks.systems.system_forgepar import ForgeparRunner
from forgepar.backends.inline import InlineBackend
from forgepar.engine.recorder import Recorder
from forgepar.records.keeper import NullKeeper

TITLE = "Audit: microseconds a no-op task, stencil graph, 2 workers"
COLUMN = "us a task"
DEPTH = 20
WIDTH = 5000
SMALL_WIDTH = 500
MOST_US = 1.0
MOST_BYTES = 600.0
ONE_BY_ONE = "books alone, a reply a task"
LOOK = "looking at every event afterwards"


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure runs with and without a file, the books alone, and what it takes to look at all events."""
    width = SMALL_WIDTH if small else WIDTH
    subjects: dict[str, Callable[[], Any]] = {
        "run, events in memory": lambda: apart(run_cost, width, False),
        "run, audit=JSON lines": lambda: apart(run_cost, width, True),
        "books alone": lambda: apart(books_cost, width, False),
        ONE_BY_ONE: lambda: apart(books_cost, width, True),
    }
    samples = interleaved(subjects, repeat)
    found: list[Row] = []
    for name, costs in samples.items():
        made: Row = {"what": name, "graph": f"{DEPTH} x {width:,}", **spread(COLUMN, [cost[0] for cost in costs])}
        if name.startswith("books"):
            made["bytes a task"] = statistics.median(cost[1] for cost in costs)
        if name == ONE_BY_ONE:
            made = target(made, "bytes a task", MOST_BYTES)
        if name == "books alone":
            made = target(made, COLUMN, MOST_US)
        found.append(made)
    looks = [cost[1] for cost in samples["run, events in memory"]]
    return [*found, {"what": LOOK, "graph": f"{DEPTH} x {width:,}", **spread(COLUMN, looks)}]


def run_cost(width: int, to_file: bool) -> tuple[float, float]:
    """Return microseconds a task for a run, and for going through its events afterwards."""
    pattern = stencil(width, DEPTH)
    with tempfile.TemporaryDirectory() as folder, fp.WorkflowExecutor(workers=2) as executor:
        runner = ForgeparRunner(executor, "layers")
        runner.run(runner.declare(stencil(100, 10), noop))
        workflow, _ = runner.declare(pattern, noop)
        running, result = timed(lambda: executor.run(workflow, audit=Path(folder, "run.jsonl") if to_file else None))
    looking, _ = timed(lambda: sum(1 for _ in result.events))
    return running / pattern.n_tasks * 1e6, looking / pattern.n_tasks * 1e6


def books_cost(width: int, one_by_one: bool) -> tuple[float, float]:
    """Return microseconds and bytes a task that the books of a run take, without the run."""
    pattern = stencil(width, DEPTH)
    rounds, plan, status = recorded(pattern)
    if one_by_one:
        rounds = [[part for told in one_round for part in split(*told)] for one_round in rounds]
    backend = InlineBackend()
    backend.open()
    try:
        spent = kept(Recorder(plan, "", (), 2, backend.arena, NullKeeper()), rounds, status)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        recorder = Recorder(plan, "", (), 2, backend.arena, NullKeeper())
        kept(recorder, rounds, status)
        n_bytes = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    finally:
        backend.close()
    return spent / pattern.n_tasks * 1e6, n_bytes / pattern.n_tasks


def recorded(pattern: Any) -> tuple[list[list[tuple[str, Any]]], Any, Any]:
    """Run a pattern; return what its books were told, from one `keep` to the next, and its plan and outcome."""
    rounds: list[list[tuple[str, Any]]] = [[]]
    ends: list[Any] = []

    class Recorded(Recorder):
        def reply(self, *told: Any) -> None:
            rounds[-1].append(("reply", told))
            super().reply(*told)

        def effects(self, *told: Any) -> None:
            rounds[-1].append(("effects", told))
            super().effects(*told)

        def keep(self) -> None:
            rounds.append([])
            super().keep()

        def end(self, status: Any) -> None:
            ends.append(status)
            super().end(status)

    from forgepar.engine import dispatcher as dispatch

    dispatch.Recorder = Recorded  # type: ignore[misc]
    with fp.WorkflowExecutor(workers=2) as executor:
        runner = ForgeparRunner(executor, "layers")
        workflow, _ = runner.declare(pattern, noop)
        executor.run(workflow)
    return rounds, workflow.plan(), ends[0]


def split(name: str, told: Any) -> list[tuple[str, Any]]:
    """Make a reply about many tasks one for each."""
    if name != "reply":
        return [(name, told)]
    tasks, reply = told
    return [
        (
            name,
            (tasks[i : i + 1], reply._replace(values=reply.values[i : i + 1], marks=reply.marks[8 * i : 8 * i + 16])),
        )
        for i in range(len(tasks))
    ]


def kept(recorder: Recorder, rounds: list[list[tuple[str, Any]]], status: Any) -> float:
    """Return the seconds that books take to be told all that."""
    begin = time.perf_counter()
    recorder.start_clock()
    recorder.begin()
    for told in rounds:
        for name, arguments in told:
            getattr(recorder, name)(*arguments)
        recorder.keep()
    recorder.end(status)
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
