"""Resuming: which tasks of a plan need not run, because the store has values for their fingerprints.

    fingerprints ──> values found ──> without tasks to run again, and branches that are not taken
                                  ──> without values that are needed but damaged ──> restored tasks, loaded later

A value with a wrong checksum is not used: a warning is given, and the task runs again.
"""

from __future__ import annotations

import pickle
import sqlite3
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import as_list, check_flag, shown
from forgepar.errors import StoreError, StoreWarning, UnknownTask, WorkflowError, report
from forgepar.store.blobs import NAME_BYTES, ValueFiles
from forgepar.store.fingerprint.tasks import followers
from forgepar.store.moved_names import with_new_names
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment
from forgepar.version import public
from forgepar.workflow.plan import IntArray, Plan

SCALAR, BLOB, FILE = 0, 1, 2  # kinds of payloads: a small pickle, a pickle, or the name of a file
_MOST_NAMED = 3  # tasks in a warning
_SHORT = 64  # bytes of the longest payload that is kept in memory until it is needed
_PER_STATEMENT = 500  # fingerprints looked up in one statement
_FIND = (  # only the newest of each: a store may have a hundred
    'WITH wanted(one) AS (VALUES %s) SELECT fingerprint, run, kind, checksum, payload FROM wanted CROSS JOIN "values" '
    'ON fingerprint = one AND run = (SELECT max(run) FROM "values" AS other WHERE other.fingerprint = one)'
)
_FIND_ALL = 'SELECT fingerprint, run, kind, checksum, payload FROM "values" WHERE fingerprint = ? ORDER BY run DESC'
_READ = 'SELECT checksum, payload FROM "values" WHERE fingerprint = ? AND run = ?'
_OF_COMPLETED = (
    "SELECT fingerprint, coalesce(source, run) FROM tasks JOIN runs ON run = id "
    "WHERE run > ? AND runs.status = 'completed' AND fingerprint IS NOT NULL"
)


@public
@dataclass(frozen=True, slots=True)
class Resume:
    """How a run uses the values of earlier runs in its store.

    Names may contain wildcards, as in ``load-*``.

    Attributes:
        rerun: names of tasks to run again; tasks that depend on them keep their values.
        start_from: names of tasks to run again together with all tasks that depend on them.
        wait: whether to wait until another run of the same workflow in the store has ended; if False, `StoreBusy` is
            raised.

    Raises:
        WorkflowError: an argument is of the wrong type.

    Example:
        >>> Resume(start_from="join").start_from
        ('join',)
    """

    rerun: Sequence[str] = ()
    start_from: Sequence[str] = ()
    wait: bool = False

    def __post_init__(self) -> None:
        for field in ("rerun", "start_from"):
            given = getattr(self, field)
            is_one = isinstance(given, str) or not isinstance(given, Iterable)
            names = (given,) if is_one else tuple(as_list(field, given, "names of tasks", WorkflowError))
            if not all(isinstance(name, str) for name in names):
                raise WorkflowError(f"{field} of Resume must be names of tasks, got {shown(given)}.")
            object.__setattr__(self, field, names)
        check_flag("wait", self.wait, WorkflowError)

    def forced(self, plan: Plan) -> NDArray[np.bool_]:
        """Return which tasks of a plan run again: (n_tasks,).

        A task of a subflow, such as ``split/part-3``, may join the plan only during the run. Until then the tasks that
        depend on ``split`` are those that depend on it.

        Raises:
            UnknownTask: there is no task of a given name.
        """
        named, within = _named(plan, self.start_from)
        found = followers(plan, named + within)
        found[_named(plan, self.rerun)[0]] = True
        return found


class CachedResult(NamedTuple):
    """A value that an earlier run computed.

    Attributes:
        fingerprint: of the task.
        run: number of that run in the store.
        kind: SCALAR, BLOB or FILE.
        payload: as stored; None: it is read when it is needed.
    """

    fingerprint: bytes
    run: int
    kind: int
    payload: bytes | None


class CachedResults:
    """The values that earlier runs computed for a plan's tasks.

    Args:
        connection: to the store.
        files: its large values.
        path: of the store, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, files: ValueFiles, path: Path) -> None:
        self._connection = connection
        self._files = files
        self._path = path
        self._found: dict[int, CachedResult] = {}
        self._statuses: dict[int, str] = {}

    def find(
        self, plan: Plan, fingerprints: Sequence[bytes | None], tasks: range, may: NDArray[np.bool_], kept: IntArray
    ) -> IntArray:
        """Return which of some tasks need not run.

        Args:
            plan: the workflow.
            fingerprints: of all its tasks.
            tasks: to look up.
            may: (n_tasks,) whether a stored value may be used.
            kept: tasks that keep their values in the run's result.
        """
        if not self._statuses:
            self._statuses = dict(self._connection.execute("SELECT id, status FROM runs"))
        wanted: dict[bytes, int] = {}
        for task in tasks:
            if may[task] and (fingerprint := fingerprints[task]) is not None:
                wanted[fingerprint] = task
        self._look_up(plan, wanted)
        self._prune_branches(plan, tasks)
        self._check_needed(plan, tasks, kept)
        return np.array([task for task in tasks if task in self._found], np.int32)

    def source(self, task: int) -> int:
        """Return the number of the run that computed the value of a found task."""
        return self._found[task].run

    def unfinished(self, tasks: Sequence[int]) -> list[int]:
        """Return the found tasks that no completed run has computed or restored.

        A task is left out if the run that computed its value was removed from the store.
        """
        found = {self._found[task][:2]: task for task in tasks}
        left = {pair: task for pair, task in found.items() if self._statuses.get(pair[1], "completed") != "completed"}
        if left:
            oldest = min(run for _, run in left)
            for pair in self._connection.execute(_OF_COMPLETED, (oldest,)):
                left.pop(pair, None)
        return sorted(left.values())

    def load(self, task: int, arena: Arena) -> Wire:
        """Return the encoded value of a found task; a large one is written to the arena.

        Raises:
            StoreError: the value was damaged after it was found.
        """
        cached = self._found[task]
        payload = self._payload(cached)
        try:
            return wire_of(cached.kind, payload, self._files, arena)
        except StoreError as error:
            raise StoreError(
                f"a value of the run store {str(self._path)!r} was damaged during the run: {error}. "
                "Resume the run to compute it again.",
                path=str(self._path),
            ) from error

    def _look_up(self, plan: Plan, wanted: dict[bytes, int]) -> None:
        """Find the newest undamaged value of each fingerprint."""
        altered: dict[int, int] = {}
        names = list(wanted)
        for first in range(0, len(names), _PER_STATEMENT):
            some = names[first : first + _PER_STATEMENT]
            for row in self._connection.execute(_FIND % ",".join(["(?)"] * len(some)), some):
                if not self._use_row(wanted[row[0]], row):
                    altered[wanted[row[0]]] = row[1]
        lost, fingerprint_of = {}, {task: fingerprint for fingerprint, task in wanted.items()}
        for task, run in altered.items():
            rows = self._connection.execute(_FIND_ALL, (fingerprint_of[task],))
            if not any(self._use_row(task, row) for row in rows):
                lost[task] = f"the value that run {run} stored was altered"
        _warn_of_damage(plan, lost)

    def _use_row(self, task: int, row: tuple[bytes, int, int, int, bytes]) -> bool:
        """Use a value for a task if its checksum is right; return whether it is."""
        fingerprint, run, kind, checksum, payload = row
        if not is_whole(fingerprint, kind, checksum, payload):
            return False
        is_kept = len(payload) <= _SHORT or kind == FILE
        self._found[task] = CachedResult(fingerprint, run, kind, payload if is_kept else None)
        return True

    def _payload(self, cached: CachedResult) -> bytes:
        fingerprint, run, kind, payload = cached
        if payload is not None:
            return payload
        with closing(self._connection.execute(_READ, (fingerprint, run))) as rows:
            row = rows.fetchone()
        if row is None or not is_whole(fingerprint, kind, *row):
            raise StoreError(
                f"a value of the run store {str(self._path)!r} was removed or damaged during the run. "
                "Resume the run to compute it again.",
                path=str(self._path),
            )
        stored: bytes = row[1]
        return stored

    def _value(self, task: int) -> Any:
        """Return the value of a found task."""
        cached = self._found[task]
        return value_of(cached.kind, self._payload(cached), self._files)

    def _prune_branches(self, plan: Plan, tasks: range) -> None:
        """Drop the branches that are not taken; drop both branches if the condition has no value."""
        for gate, branching in sorted(plan.branchings.items(), key=lambda pair: int(plan.layers[pair[0]])):
            if gate not in tasks:
                continue
            cached = self._found.get(gate)
            if cached is None:
                left: Sequence[int] = (*branching.then, *branching.otherwise, branching.join)
            else:
                try:
                    left = branching.otherwise if self._value(gate) else branching.then
                except StoreError as error:
                    _warn_of_damage(plan, {gate: str(error)})
                    del self._found[gate]
                    left = (*branching.then, *branching.otherwise, branching.join)
            for task in left:
                self._found.pop(task, None)

    def _check_needed(self, plan: Plan, tasks: range, kept: IntArray) -> None:
        """Check the files of needed values; if one is damaged, the values that its task takes become needed too."""
        unchecked = {task for task in tasks if task in self._found and self._found[task].kind == FILE}
        while unchecked:
            done = np.zeros(plan.n_tasks, np.bool_)
            done[list(self._found)] = True
            takes = np.repeat(~done, np.diff(plan.reference_start))
            needed = unchecked & (set(plan.references[takes].tolist()) | set(kept.tolist()))
            if not needed:
                return
            unchecked -= needed
            damage = {task: why for task in sorted(needed) if (why := self._damage(task)) is not None}
            _warn_of_damage(plan, damage)
            for task in damage:
                del self._found[task]

    def _damage(self, task: int) -> str | None:
        """Return what is wrong with the file of a task's value; None: it is undamaged."""
        payload = self._found[task].payload
        assert payload is not None
        try:
            self._files.read(*name_and_lengths(payload))
        except StoreError as error:
            return str(error)
        return None


def checksum_of(fingerprint: bytes, kind: int, payload: bytes) -> int:
    """Return the CRC-32 of a row of table ``values``: it detects damage, not forgery."""
    return crc32(payload, crc32(fingerprint, kind))


def is_whole(fingerprint: Any, kind: Any, checksum: Any, payload: Any) -> bool:
    """Return whether a row of table ``values`` is undamaged; its columns may have any type."""
    if kind not in (SCALAR, BLOB, FILE) or not isinstance(payload, bytes) or not isinstance(fingerprint, bytes):
        return False
    is_malformed = kind == FILE and (len(payload) < NAME_BYTES + 8 or (len(payload) - NAME_BYTES) % 8)
    return not is_malformed and bool(checksum_of(fingerprint, int(kind), payload) == checksum)


def payload_of_file(name: bytes, lengths: Sequence[int]) -> bytes:
    """Return the payload of a value that is in a file: its digest and the lengths of its parts."""
    return name + struct.pack(f"<{len(lengths)}q", *lengths)


def name_and_lengths(payload: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Return the digest and the lengths from a payload of `payload_of_file`."""
    lengths = payload[NAME_BYTES:]
    return payload[:NAME_BYTES], struct.unpack(f"<{len(lengths) // 8}q", lengths)


def wire_of(kind: int, payload: bytes, files: ValueFiles, arena: Arena) -> Wire:
    """Return a stored value encoded for workers; one from a file is written to the arena.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if kind == SCALAR:
        return pickle.loads(payload)
    if kind == BLOB:
        return (with_new_names(payload),)
    stream, *buffers = files.read(*name_and_lengths(payload))
    segment = arena.write([with_new_names(stream), *buffers])
    assert is_segment(segment)
    return segment


def value_of(kind: int, payload: bytes, files: ValueFiles) -> Any:
    """Return a stored value.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if kind == FILE:
        stream, *buffers = files.read(*name_and_lengths(payload))
        return pickle.loads(with_new_names(stream), buffers=buffers)
    return pickle.loads(with_new_names(payload))


def _named(plan: Plan, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tasks of some names, and for names without a task the tasks that may still expand into it."""
    found: list[int] = []
    within: list[int] = []
    for name in names:
        if matching := _matching(plan, name):
            found += matching
        elif outer := _outer(plan, name):
            within += outer
        else:
            raise UnknownTask(
                f"workflow {shown(plan.workflow_name)} has no task named {shown(name)} to run again. "
                "List the names with Workflow.execution_layers()."
            )
    return found, within


def _outer(plan: Plan, name: str) -> list[int]:
    """Return the innermost existing tasks that a task of this name would be part of."""
    while "/" in name:
        name = name.rpartition("/")[0]
        if matching := _matching(plan, name):
            return matching
    return []


def _matching(plan: Plan, name: str) -> list[int]:
    if any(mark in name for mark in "*?["):
        return [task for task in range(plan.n_tasks) if fnmatchcase(plan.name(task), name)]
    with suppress(UnknownTask):
        return [plan.find(name)]
    return []


def _warn_of_damage(plan: Plan, damage: Mapping[int, str]) -> None:
    if not damage:
        return
    names = [repr(plan.name(task)) for task in list(damage)[:_MOST_NAMED]]
    more = f" and {len(damage) - len(names)} more" if len(damage) > len(names) else ""
    one, many = f"the stored value of task {names[0]} is", f"the stored values of {', '.join(names)}{more} are"
    fault = next(iter(damage.values()))
    report(f"{one if len(damage) == 1 else many} not used and will be computed again: {fault}.", StoreWarning)
