"""A run as an instance of WfFormat 1.5, the JSON format of WfCommons (https://github.com/wfcommons/WfFormat)."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from forgepar.graph import Adjacency
from forgepar.machine import total_memory
from forgepar.report.writing import write_pieces
from forgepar.runstate import Status
from forgepar.runtable import RunTable
from forgepar.version import __version__

SCHEMA_VERSION = "1.5"
_NOT_IN_IDS = re.compile(r"[^0-9a-zA-Z\-_.]")
_NOT_IN_HOSTS = re.compile(r"[^0-9a-zA-Z\-.]")
_SYSTEMS = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}  # those that the format knows
_PIECE = 1_000  # tasks written at once
_STATUSES = [status.name.lower() for status in Status]
_WENT_WELL = (Status.COMPLETED, Status.CACHED)


def write_wfformat(table: RunTable, path: Path | str) -> None:
    """Write a run to a file as an instance of WfFormat 1.5. Cost: O(n + m log m) for n tasks and m dependencies.

    A task's id is its name, with ``_`` for what ids must not hold and a number where that is another's. Values other
    than None, numbers and short text are the files: each an output of its task, and an input of all that depend on
    that, as a table does not tell which of them wait for order alone. A task that did not run has a runtime of 0 and
    its ``status`` beside it, as has one that failed. The machine is taken to be this one.

    Args:
        table: the run.
        path: the file; it is replaced only when all is written.

    Raises:
        ValueError: the run has no task, for which the format has no words.
        OSError: the file cannot be written.
    """
    write_pieces(path, wfformat_pieces(table))


def wfformat_pieces(table: RunTable) -> Iterator[str]:
    """Yield the text of an instance, some hundred tasks at a time."""
    if not len(table):
        raise ValueError(f"run {table.run_id!r} has no task, and WfFormat needs one. Export another run.")
    ids = ids_of(table.names)
    machine = machine_here()
    yield f"{{{_fields(_about(table))},\n"
    yield '"workflow": {"specification": {"tasks": [\n'
    yield from _joined(_specified(table, ids))
    yield '\n], "files": [\n'
    yield from _joined(_files(table, ids))
    yield f'\n]}},\n"execution": {{{_fields(_execution(table))}, "machines": {json.dumps([machine])}, "tasks": [\n'
    yield from _joined(_executed(table, ids, machine["nodeName"]))
    yield "\n]}}}\n"


def ids_of(names: Sequence[str]) -> list[str]:
    """Return an id for each name: of letters, digits, ``-``, ``_`` and ``.`` alone, and no two the same.

    Example:
        >>> ids_of(["load", "a/b", "a b", "a_b"])
        ['load', 'a_b-2', 'a_b-3', 'a_b']
    """
    plain = [_NOT_IN_IDS.sub("_", name) for name in names]
    taken = {name for name, made in zip(names, plain, strict=True) if name and name == made}  # these keep their names
    found, number = [], 2
    for name, made in zip(names, plain, strict=True):
        identity = made or "task"
        while identity != name and identity in taken:
            identity = f"{made or 'task'}-{number}"
            number += 1
        taken.add(identity)
        found.append(identity)
    return found


def machine_here() -> dict[str, Any]:
    """Describe this machine as the format does."""
    host = _NOT_IN_HOSTS.sub("-", platform.node()).strip("-.") or "localhost"
    machine: dict[str, Any] = {"nodeName": host, "release": platform.release(), "architecture": platform.machine()}
    machine = {name: value for name, value in machine.items() if value}
    if platform.system() in _SYSTEMS:
        machine["system"] = _SYSTEMS[platform.system()]
    return {**machine, "memoryInBytes": total_memory(), "cpu": {"coreCount": os.cpu_count() or 1}}


def _about(table: RunTable) -> dict[str, Any]:
    return {
        "name": table.workflow or "workflow",
        "description": f"run {table.run_id} of forgepar, {table.status}, {table.n_workers} workers, {table.schedule}",
        "createdAt": datetime.now(UTC).isoformat(),
        "schemaVersion": SCHEMA_VERSION,
        "runtimeSystem": {"name": "forgepar", "version": __version__},
    }


def _execution(table: RunTable) -> dict[str, Any]:
    return {
        "makespanInSeconds": table.wall_seconds,
        "executedAt": datetime.fromtimestamp(table.began_at, UTC).isoformat(),
    }


def _specified(table: RunTable, ids: Sequence[str]) -> Iterator[str]:
    """Yield each task with those before and after it, and the values it took and made."""
    n = len(table)
    pairs = np.unique(table.sources.astype(np.int64) * n + table.targets)
    after = Adjacency.from_edges(n, *np.divmod(pairs, n))
    before = after.reversed()
    sizes = table.bytes.tolist()
    for task, identity in enumerate(ids):
        parents = before.successors(task).tolist()
        yield json.dumps(
            {
                "name": table.names[task] or identity,
                "id": identity,
                "parents": [ids[parent] for parent in parents],
                "children": [ids[child] for child in after.successors(task).tolist()],
                "inputFiles": [_file(ids[parent]) for parent in parents if sizes[parent]],
                "outputFiles": [_file(identity)] if sizes[task] else [],
            }
        )


def _files(table: RunTable, ids: Sequence[str]) -> Iterator[str]:
    for task in np.flatnonzero(table.bytes).tolist():
        yield json.dumps({"id": _file(ids[task]), "sizeInBytes": int(table.bytes[task])})


def _executed(table: RunTable, ids: Sequence[str], machine: str) -> Iterator[str]:
    """Yield how each task went."""
    ran = np.isfinite(table.seconds)
    seconds = np.where(ran, table.seconds, 0.0).tolist()
    callables = table.callable_of.tolist()
    for task, (identity, status) in enumerate(zip(ids, table.status_of.tolist(), strict=True)):
        told: dict[str, Any] = {"id": identity, "runtimeInSeconds": seconds[task], "coreCount": 1}
        if program := table.callables[callables[task]]:
            told["command"] = {"program": program}
        if ran[task]:
            started = table.began_at + float(table.start[task])
            told |= {"executedAt": datetime.fromtimestamp(started, UTC).isoformat(), "machines": [machine]}
        if status not in _WENT_WELL or not ran[task]:
            told["status"] = _STATUSES[status]
        yield json.dumps(told)


def _file(identity: str) -> str:
    return f"{identity}.value"


def _fields(values: dict[str, Any]) -> str:
    """Return the inside of a JSON object, to which more is to be added."""
    return json.dumps(values)[1:-1]


def _joined(rows: Iterator[str]) -> Iterator[str]:
    """Yield rows with commas between them, many at a time."""
    comma = ""
    while piece := list(islice(rows, _PIECE)):
        yield comma + ",\n".join(piece)
        comma = ",\n"
