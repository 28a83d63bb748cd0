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
from forgepar.records.table import RunTable
from forgepar.report.export.writing import write_pieces
from forgepar.scheduling.run_state import Status
from forgepar.version import __version__

SCHEMA_VERSION = "1.5"
_NOT_IN_IDS = re.compile(r"[^0-9a-zA-Z\-_.]")
_NOT_IN_HOSTS = re.compile(r"[^0-9a-zA-Z\-.]")
_SYSTEMS = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}  # the systems of the format
_PIECE = 1_000  # tasks written at once
_STATUSES = [status.name.lower() for status in Status]
_WENT_WELL = (Status.COMPLETED, Status.CACHED)


def write_wfformat(table: RunTable, path: Path | str) -> None:
    """Write a run to a file as an instance of WfFormat 1.5. Cost: O(n + m log m) for n tasks and m dependencies.

    The id of a task is its name, with ``_`` for characters that ids must not have, and a number if the id is taken.
    Values are the files, except None, numbers and short text. Each is an output of its task and an input of all tasks
    that depend on it, as a table does not record dependencies without a value. A task that did not run has a runtime of
    0 and a ``status``, as does one that failed. The machine is assumed to be this one.

    Args:
        table: the run.
        path: the file; it is replaced once the new one is complete.

    Raises:
        ValueError: the run has no tasks, which the format requires.
        OSError: the file cannot be written.
    """
    write_pieces(path, wfformat_pieces(table))


def wfformat_pieces(table: RunTable) -> Iterator[str]:
    """Yield the text of an instance, some hundred tasks at a time."""
    if not len(table):
        raise ValueError(f"Run {table.run_id!r} has no tasks, and WfFormat requires at least one. Export another run.")
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
    """Return a unique id for each name, of letters, digits, ``-``, ``_`` and ``.``.

    Example:
        >>> ids_of(["load", "a/b", "a b", "a_b"])
        ['load', 'a_b-2', 'a_b-3', 'a_b']
    """
    plain = [_NOT_IN_IDS.sub("_", name) for name in names]
    taken = {name for name, made in zip(names, plain, strict=True) if name and name == made}  # these names are ids
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
    """Describe this machine in the terms of the format."""
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
    """Yield each task with its parents and children, and its input and output files."""
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
    """Yield the execution of each task."""
    ran = np.isfinite(table.seconds)
    seconds = np.where(ran, table.seconds, 0.0).tolist()
    callables = table.callable_of.tolist()
    for task, (identity, status) in enumerate(zip(ids, table.status_of.tolist(), strict=True)):
        entry: dict[str, Any] = {"id": identity, "runtimeInSeconds": seconds[task], "coreCount": 1}
        if program := table.callables[callables[task]]:
            entry["command"] = {"program": program}
        if ran[task]:
            started = table.began_at + float(table.start[task])
            entry |= {"executedAt": datetime.fromtimestamp(started, UTC).isoformat(), "machines": [machine]}
        if status not in _WENT_WELL or not ran[task]:
            entry["status"] = _STATUSES[status]
        yield json.dumps(entry)


def _file(identity: str) -> str:
    return f"{identity}.value"


def _fields(values: dict[str, Any]) -> str:
    """Return the members of a JSON object without its braces, so that more can be added."""
    return json.dumps(values)[1:-1]


def _joined(rows: Iterator[str]) -> Iterator[str]:
    """Yield rows with commas between them, many at a time."""
    comma = ""
    while piece := list(islice(rows, _PIECE)):
        yield comma + ",\n".join(piece)
        comma = ",\n"
