"""A run in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

There is one row per worker, one slice per attempt and one arrow per dependency. Above the rows are the starts of the
layers, the bytes of values in memory and the number of tasks that are ready but not running. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from forgepar.records.table import RunTable
from forgepar.report.export.slices import (
    AttemptSlices,
    CounterTrack,
    DependencyArrows,
    arrows_of,
    bytes_held,
    layer_begins,
    queue_length,
    slices_of,
    thinned,
)
from forgepar.report.export.writing import write_pieces
from forgepar.scheduling.run_state import Status
from forgepar.version import __version__

MOST_ARROWS = 25_000  # viewers are slow with more, and a trace of 100,000 tasks is larger by half
_MOST_POINTS = 20_000  # points of a counter
_PID = 1  # all rows belong to one process
_LAYERS_TID, _FIRST_TID = 1, 2
_PIECE = 2_000  # events written at once
_SLICE, _LEAVES, _ENTERS, _HELD, _QUEUE, _LAYER = range(6)  # also the order of events at the same time: slices first
_STATUSES = [status.name.lower() for status in Status]


def write_trace(table: RunTable, path: Path | str) -> None:
    """Write a run to a file as a trace. Cost: O((n + m) log (n + m)) for n tasks and m dependencies.

    Failed attempts without known times are listed in the arguments of the slice of their task. With more than
    `MOST_ARROWS` dependencies, the trace has those that tasks waited for last; its metadata have the number of those
    that are left out.

    Args:
        table: the run, which may be running; running tasks are drawn up to the current time.
        path: the file; it is replaced once the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    write_pieces(path, trace_pieces(table))


def trace_pieces(table: RunTable, most_arrows: int = MOST_ARROWS) -> Iterator[str]:
    """Yield the text of a trace, a few thousand events at a time."""
    slices = slices_of(table)
    arrows = arrows_of(table, slices, most_arrows)
    events = _Events(table, slices, arrows)
    about = json.dumps(_about(table, slices, arrows, events))
    yield f'{{"displayTimeUnit":"ms","otherData":{about},"traceEvents":[\n'
    yield ",\n".join(_names(table, slices))
    for piece in events.pieces():
        yield ",\n" + piece
    yield "\n]}\n"


def _about(table: RunTable, slices: AttemptSlices, arrows: DependencyArrows, events: _Events) -> dict[str, Any]:
    """Return the metadata: the run, and how much is left out."""
    n_unknown = len(table.failures) - sum(1 for failure in slices.failure.tolist() if failure >= 0)
    n_unknown -= sum(1 for failure in table.failures if _is_last(table, slices, failure.task, failure.attempt))
    return {
        "program": f"forgepar {__version__}",
        "run_id": table.run_id,
        "workflow": table.workflow,
        "status": table.status,
        "schedule": table.schedule,
        "workers": table.n_workers,
        "began_at": datetime.fromtimestamp(table.began_at, UTC).isoformat(),
        "wall_seconds": table.wall_seconds,
        "tasks": len(table),
        "tasks_by_status": table.status_counts(),
        "arrows": len(arrows.source),
        "arrows_left_out": arrows.n_left_out,
        "failed_attempts_without_times": n_unknown,
        "counters_thinned": events.are_thinned,
    }


def _is_last(table: RunTable, slices: AttemptSlices, task: int, attempt: int) -> bool:
    return bool(slices.last_of[task] >= 0) and attempt == table.attempt[task]


def _names(table: RunTable, slices: AttemptSlices) -> Iterator[str]:
    """Yield the events that name the process and its rows, and order the rows."""
    yield _metadata("process_name", _LAYERS_TID, name=f"{table.workflow} (run {table.run_id})")
    yield _metadata("thread_name", _LAYERS_TID, name="layers")
    yield _metadata("thread_sort_index", _LAYERS_TID, sort_index=0)
    for row, worker in enumerate(slices.rows):
        name = f"worker {worker}" if worker >= 0 else "worker unknown"
        again = row - slices.rows.index(worker)
        yield _metadata("thread_name", _FIRST_TID + row, name=name + (f" ({again + 1})" if again else ""))
        yield _metadata("thread_sort_index", _FIRST_TID + row, sort_index=row + 1)


def _metadata(event: str, tid: int, **arguments: Any) -> str:
    return json.dumps({"ph": "M", "name": event, "pid": _PID, "tid": tid, "ts": 0, "args": arguments})


class _Events:
    """All events except the names of rows, sorted by time, as pieces of text."""

    def __init__(self, table: RunTable, slices: AttemptSlices, arrows: DependencyArrows) -> None:
        self.table, self.slices, self.arrows = table, slices, arrows
        whole = (bytes_held(table, slices), queue_length(table, slices))
        self.held, self.queue = (thinned(counter, _MOST_POINTS) for counter in whole)
        self.are_thinned = len(self.held.at) + len(self.queue.at) < sum(len(counter.at) for counter in whole)
        self.layers, self.layer_at = layer_begins(table, slices)
        self.layer_sizes = np.bincount(table.layer)
        self.failed: dict[int, list[str]] = {}
        for failure in table.failures:
            self.failed.setdefault(failure.task, []).append(f"attempt {failure.attempt}: {failure.error}")

    def pieces(self) -> Iterator[str]:
        """Yield the events in the order of their times."""
        slices, arrows = self.slices, self.arrows
        enters = slices.begin[arrows.target]
        times = (slices.begin, arrows.leaves, enters, self.held.at, self.queue.at, self.layer_at)
        kind = np.repeat(np.arange(len(times)), [len(column) for column in times])
        number = np.concatenate([np.arange(len(column)) for column in times])
        at = np.concatenate(times)
        order = np.lexsort((number, kind, at))
        make = {
            _SLICE: self._slice,
            _LEAVES: lambda i, at: self._arrow("s", int(arrows.source[i]), i, at),
            _ENTERS: lambda i, at: self._arrow("f", int(arrows.target[i]), i, at),
            _HELD: lambda i, at: _counted("values in memory", "bytes", self.held, i, at),
            _QUEUE: lambda i, at: _counted("queue", "tasks", self.queue, i, at),
            _LAYER: self._layer,
        }
        for begin in range(0, len(order), _PIECE):
            part = order[begin : begin + _PIECE]
            rows = zip(kind[part].tolist(), number[part].tolist(), at[part].tolist(), strict=True)
            yield ",\n".join([make[sort](i, when) for sort, i, when in rows])

    def _slice(self, i: int, at: int) -> str:
        table, slices = self.table, self.slices
        task, failure, attempt = int(slices.task[i]), int(slices.failure[i]), int(slices.attempt[i])
        status = "failed" if failure >= 0 else _STATUSES[table.status_of[task]]
        arguments = {"callable": table.callables[table.callable_of[task]], "layer": int(table.layer[task])}
        arguments |= {"attempt": attempt, "status": status, "bytes": 0 if failure >= 0 else int(table.bytes[task])}
        if failure >= 0:
            arguments["error"] = table.failures[failure].error
        elif task in self.failed:
            arguments["failed_attempts"] = self.failed[task]
        sort = "task" if status != "failed" else "failed"
        colour = ',"cname":"terrible"' if status == "failed" else ""
        return (
            f'{{"ph":"X","name":{json.dumps(table.names[task])},"cat":"{sort}","pid":{_PID},'
            f'"tid":{_FIRST_TID + int(slices.row[i])},"ts":{_us(at)},"dur":{_us(int(slices.end[i]) - at)}{colour},'
            f'"args":{json.dumps(arguments)}}}'
        )

    def _arrow(self, phase: str, where: int, i: int, at: int) -> str:
        bound = ',"bp":"e"' if phase == "f" else ""  # bind to the enclosing slice, not to the next one
        return (
            f'{{"ph":"{phase}","name":"value","cat":"dependency","id":{i + 1},"pid":{_PID},'
            f'"tid":{_FIRST_TID + int(self.slices.row[where])},"ts":{_us(at)}{bound}}}'
        )

    def _layer(self, i: int, at: int) -> str:
        layer = int(self.layers[i])
        return (
            f'{{"ph":"i","s":"t","name":"layer {layer}","cat":"layer","pid":{_PID},"tid":{_LAYERS_TID},"ts":{_us(at)},'
            f'"args":{{"layer":{layer},"tasks":{self.layer_sizes[layer]}}}}}'
        )


def _counted(name: str, unit: str, counter: CounterTrack, i: int, at: int) -> str:
    return (
        f'{{"ph":"C","name":"{name}","pid":{_PID},"tid":{_LAYERS_TID},"ts":{_us(at)},'
        f'"args":{{"{unit}":{counter.value[i]}}}}}'
    )


def _us(nanoseconds: int) -> str:
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
