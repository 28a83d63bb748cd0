"""What it takes to show a run of many small tasks: pictures, a trace, an instance of WfFormat.

The ratio is to writing the columns of the run's table as plain JSON, which is the least that a text of all tasks takes.

    python -m benchmarks.exports.run [--small]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import interleaved, spread, timed
from benchmarks.patterns import noop, stencil
from benchmarks.systems.system_forgepar import ForgeparRunner
from forgepar.records.table import RunTable
from forgepar.report.export.trace import write_trace
from forgepar.report.export.wfformat import write_wfformat
from forgepar.report.graph.diagram import draw

TITLE = "Exports: a run of no-op tasks, stencil graph, as text"
DEPTH, WIDTH, SMALL_WIDTH = 10, 10_000, 500
MOST_SECONDS = 1.0  # for a collapsed picture
COLLAPSED = "diagram, collapsed (SVG)"
PLAIN = "columns as JSON"


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure each way to write one run, one after the other in this process."""
    width = SMALL_WIDTH if small else WIDTH
    table = table_of(width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        writers: dict[str, Callable[[], object]] = {
            PLAIN: lambda: path.write_text(json.dumps(table.columns())),
            COLLAPSED: lambda: path.write_text(draw(table)),
            "diagram, a box a task (SVG)": lambda: path.write_text(draw(table, collapse=False)),
            "trace": lambda: write_trace(table, path),
            "WfFormat": lambda: write_wfformat(table, path),
        }
        sizes: dict[str, int] = {}

        def measured(name: str) -> float:
            seconds, _ = timed(writers[name])
            sizes[name] = path.stat().st_size
            return seconds

        samples = interleaved({name: lambda name=name: measured(name) for name in writers}, repeat)
    found: list[Row] = []
    for name, seconds in samples.items():
        made: Row = {"what": name, "graph": f"{DEPTH} x {width:,}", **spread("seconds", seconds)}
        made["bytes a task"] = sizes[name] / len(table)
        made["ratio"] = min(seconds) / min(samples[PLAIN])
        found.append(target(made, "seconds", MOST_SECONDS) if name == COLLAPSED else made)
    return found


def table_of(width: int) -> RunTable:
    """Run a stencil and return its table."""
    with fp.WorkflowExecutor(workers=2) as executor:
        runner = ForgeparRunner(executor, "layers")
        workflow, _ = runner.declare(stencil(width, DEPTH), noop)
        return executor.run(workflow).table()


if __name__ == "__main__":
    main(TITLE, rows)
