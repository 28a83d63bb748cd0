"""How near simulated times are to measured ones: real workflows replayed, and the census.

`forgepar.report.forecast` lays a run out from the durations and delays that it measured, on as many workers and by the
same schedule: that is what the target is about. Beside it stands what a layered run on 8 workers tells of other runs,
measured as well: without barriers, and on 4 workers. Tasks of the traces sleep for their scaled durations (see the
workload replay), so that any number of workers has processors enough; those of the census work, on as many workers as
there are processors.

    python -m benchmarks simulate [--small] [--traces FOLDER]
"""

from __future__ import annotations

import functools
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path

import forgepar as fp
from benchmarks._common import Row, cores, main, target
from benchmarks._measure import interleaved
from benchmarks.replay.run import declare, to_length
from benchmarks.replay.trace import Trace, folder, load
from forgepar.examples import census
from forgepar.records.table import RunTable
from forgepar.report.forecast import Forecast, Schedule

TITLE = "Simulate: seconds of a run by simulation, beside those measured"
WORKERS, FEWER = 8, 4
IDEAL_SECONDS = 3.0
SMALL_IDEAL_SECONDS = 0.5
SMALL_CENSUS = "asyncio"
MOST_OFF = 0.10
SCHEDULES: tuple[Schedule, ...] = ("layers", "eager")

Runs = dict[str, list[RunTable]]


def rows(small: bool, repeat: int) -> list[Row]:
    """Run each workflow, and lay each run out."""
    found: list[Row] = []
    ideal_seconds = SMALL_IDEAL_SECONDS if small else IDEAL_SECONDS
    traces = [to_length(load(path), ideal_seconds) for path in sorted(folder().glob("*.json"))]
    if not traces:
        found.append({"workflow": "none", "note": "no traces: give --traces FOLDER or set FORGEPAR_TRACES"})
    with fp.WorkflowExecutor(workers=WORKERS) as executor, fp.WorkflowExecutor(workers=FEWER) as fewer:
        for warmed in (executor, fewer):
            warmed.run(declare(Trace("warm", ["warm"] * 64, [0.001] * 64, [[]] * 64)))
        for trace in traces:
            found += replayed(trace, executor, fewer, repeat)
    return [*found, *counted(small, repeat)]


def replayed(trace: Trace, executor: fp.WorkflowExecutor, fewer: fp.WorkflowExecutor, repeat: int) -> list[Row]:
    """Run a trace in three ways; return a row for each layout."""
    workflow = declare(trace)
    runs = measured(
        {
            "layers": lambda: executor.run(workflow),
            "eager": lambda: executor.run(workflow, schedule="eager"),
            "fewer": lambda: fewer.run(workflow),
        },
        repeat,
    )
    return [
        *(judged(row(trace.name, runs, name, name, WORKERS, name)) for name in SCHEDULES),
        row(trace.name, runs, "layers", "eager", WORKERS, "eager"),
        row(trace.name, runs, "layers", "fewer", FEWER, "layers"),
    ]


def counted(small: bool, repeat: int) -> list[Row]:
    """Run the census under both schedules, each with workers of its own."""
    root = Path(sysconfig.get_path("stdlib"), SMALL_CENSUS if small else "")
    workflow = census.workflow(root)
    ways = {name: functools.partial(workflow.run, workers=cores(), schedule=name) for name in SCHEDULES}
    runs = measured(ways, repeat)
    return [judged(row("census", runs, name, name, cores(), name)) for name in SCHEDULES]


def measured(ways: dict[str, Callable[[], fp.RunResult]], repeat: int) -> Runs:
    """Run in each way, interleaved."""
    return interleaved({name: lambda way=way: way().table() for name, way in ways.items()}, repeat)


def row(workflow: str, runs: Runs, source: str, wanted: str, workers: int, schedule: Schedule) -> Row:
    """Lay runs of one kind out as those of another kind went, and compare.

    Args:
        workflow: its name.
        runs: by kind.
        source: the kind that is laid out.
        wanted: the kind that it is compared with.
        workers: of that.
        schedule: of that.
    """
    simulated = [Forecast(table).seconds(workers, schedule) for table in runs[source]]
    walls = [table.wall_seconds for table in runs[wanted]]
    ratios = [told / wall for told, wall in zip(simulated, walls, strict=True)]
    return {
        "workflow": workflow,
        "tasks": len(runs[source][0]),
        "from": f"{runs[source][0].n_workers} {runs[source][0].schedule}",
        "to": f"{workers} {schedule}",
        "measured s": statistics.median(walls),
        "simulated s": statistics.median(simulated),
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }


def judged(found: Row) -> Row:
    """Return a row with how far off its worst ratio is, and whether that is near enough."""
    return target({**found, "off": max(abs(found["min"] - 1), abs(found["max"] - 1))}, "off", MOST_OFF)


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
