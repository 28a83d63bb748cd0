"""What earlier runs did: which tasks of a plan need not run, as the store has a value for their fingerprint.

    fingerprints ──> found in the store ──> less those that are to run again, less branches that are not taken
                                        ──> less those whose value is needed but damaged ──> restored, loaded later

A value counts only when its checksum does: a damaged one is told of and computed again.
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

from forgepar.errors import StoreError, StoreWarning, UnknownTask, WorkflowError
from forgepar.fingerprint import followers
from forgepar.plan import IntArray, Plan
from forgepar.sinks import report
from forgepar.validation import check_flag
from forgepar.valuefiles import NAME_BYTES, ValueFiles
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment

SCALAR, BLOB, FILE = 0, 1, 2  # what a payload is
_MOST_NAMED = 3  # tasks in a warning
_SHORT = 64  # bytes of a payload that is kept in memory until it is needed
_AT_ONCE = 500  # fingerprints asked for in one statement
_FIND = (  # the newest alone: a store may have a hundred of each
    'WITH wanted(one) AS (VALUES %s) SELECT fingerprint, run, kind, checksum, payload FROM wanted CROSS JOIN "values" '
    'ON fingerprint = one AND run = (SELECT max(run) FROM "values" AS other WHERE other.fingerprint = one)'
)
_FIND_ALL = 'SELECT fingerprint, run, kind, checksum, payload FROM "values" WHERE fingerprint = ? ORDER BY run DESC'
_READ = 'SELECT checksum, payload FROM "values" WHERE fingerprint = ? AND run = ?'
_OF_COMPLETED = (
    "SELECT fingerprint, coalesce(source, run) FROM tasks JOIN runs ON run = id "
    "WHERE run > ? AND runs.status = 'completed' AND fingerprint IS NOT NULL"
)


@dataclass(frozen=True, slots=True)
class Resume:
    """How a run takes up what earlier ones in its store did.

    Names may hold wildcards, as ``load-*`` does.

    Attributes:
        rerun: names of tasks to run again; what follows them keeps its values.
        start_from: names of tasks to run again with all that follows them.
        wait: whether to wait for another run of the same workflow in the store to end; else it is refused.

    Raises:
        WorkflowError: one of them cannot be.

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
            names = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
            if not all(isinstance(name, str) for name in names):
                raise WorkflowError(f"Resume({field}={given!r}) holds no names. Give names of tasks.")
            object.__setattr__(self, field, names)
        check_flag("wait", self.wait, WorkflowError)

    def forced(self, plan: Plan) -> NDArray[np.bool_]:
        """Return which tasks of a plan are to run again: (n_tasks,).

        A name of a task within one that is there, as ``split/part-3``, may become known only while the run goes; what
        follows it then follows the one that is there.

        Raises:
            UnknownTask: a name is that of no task.
        """
        named, within = _named(plan, self.start_from)
        found = followers(plan, named + within)
        found[_named(plan, self.rerun)[0]] = True
        return found


class Prior(NamedTuple):
    """A value that an earlier run made.

    Attributes:
        fingerprint: of the task.
        run: that run's number in the store.
        kind: SCALAR, BLOB or FILE.
        payload: what is stored of it; None: to be read when it is needed.
    """

    fingerprint: bytes
    run: int
    kind: int
    payload: bytes | None


class Priors:
    """The values that earlier runs made of a plan's tasks.

    Args:
        connection: of the store.
        files: its large values.
        path: of the store, to be told.
    """

    def __init__(self, connection: sqlite3.Connection, files: ValueFiles, path: Path) -> None:
        self._connection = connection
        self._files = files
        self._path = path
        self._found: dict[int, Prior] = {}
        self._statuses: dict[int, str] = {}

    def find(
        self, plan: Plan, fingerprints: Sequence[bytes | None], tasks: range, may: NDArray[np.bool_], kept: IntArray
    ) -> IntArray:
        """Find which of some tasks need not run.

        Args:
            plan: the workflow.
            fingerprints: of all its tasks.
            tasks: which to look for.
            may: (n_tasks,) those that need not run if there is a value.
            kept: those whose value the run's result keeps.
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
        """Return the number of the run that made the value of a task that was found."""
        return self._found[task].run

    def unfinished(self, tasks: Sequence[int]) -> list[int]:
        """Return which of some tasks that were found no run has that completed: neither made nor taken over by one.

        Where the run that made a value was removed from the store, nobody knows, and the task is not among them.
        """
        found = {self._found[task][:2]: task for task in tasks}
        left = {pair: task for pair, task in found.items() if self._statuses.get(pair[1], "completed") != "completed"}
        if left:
            oldest = min(run for _, run in left)
            for pair in self._connection.execute(_OF_COMPLETED, (oldest,)):
                left.pop(pair, None)
        return sorted(left.values())

    def load(self, task: int, arena: Arena) -> Wire:
        """Return the value of a task that was found, as it travels; a large one is put into the arena.

        Raises:
            StoreError: it was damaged since it was found.
        """
        prior = self._found[task]
        payload = self._payload(prior)
        try:
            return wire_of(prior.kind, payload, self._files, arena)
        except StoreError as error:
            raise StoreError(
                f"a value of the run store {str(self._path)!r} was damaged while the run went: {error}. "
                "Resume the run: it will be computed again.",
                path=str(self._path),
            ) from error

    def _look_up(self, plan: Plan, wanted: dict[bytes, int]) -> None:
        """Find the newest value of each fingerprint that is what it was when it was written."""
        altered: dict[int, int] = {}
        names = list(wanted)
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            for row in self._connection.execute(_FIND % ",".join(["(?)"] * len(some)), some):
                if not self._take_row(wanted[row[0]], row):
                    altered[wanted[row[0]]] = row[1]
        lost, fingerprint_of = {}, {task: fingerprint for fingerprint, task in wanted.items()}
        for task, run in altered.items():
            rows = self._connection.execute(_FIND_ALL, (fingerprint_of[task],))
            if not any(self._take_row(task, row) for row in rows):
                lost[task] = f"what the store has of run {run} was altered"
        _tell_damage(plan, lost)

    def _take_row(self, task: int, row: tuple[bytes, int, int, int, bytes]) -> bool:
        """Take a value as that of a task, if it is what it was when it was written; tell whether it is."""
        fingerprint, run, kind, checksum, payload = row
        if not is_whole(fingerprint, kind, checksum, payload):
            return False
        is_held = len(payload) <= _SHORT or kind == FILE
        self._found[task] = Prior(fingerprint, run, kind, payload if is_held else None)
        return True

    def _payload(self, prior: Prior) -> bytes:
        fingerprint, run, kind, payload = prior
        if payload is not None:
            return payload
        with closing(self._connection.execute(_READ, (fingerprint, run))) as rows:
            row = rows.fetchone()
        if row is None or not is_whole(fingerprint, kind, *row):
            raise StoreError(
                f"a value of the run store {str(self._path)!r} was removed or damaged while the run went. "
                "Resume the run: it will be computed again.",
                path=str(self._path),
            )
        stored: bytes = row[1]
        return stored

    def _value(self, task: int) -> Any:
        """Return the value of a task that was found."""
        prior = self._found[task]
        return value_of(prior.kind, self._payload(prior), self._files)

    def _prune_branches(self, plan: Plan, tasks: range) -> None:
        """Leave to the run what depends on a decision that is not known, or was decided against."""
        for gate, branching in sorted(plan.branchings.items(), key=lambda pair: int(plan.layers[pair[0]])):
            if gate not in tasks:
                continue
            prior = self._found.get(gate)
            if prior is None:
                left: Sequence[int] = (*branching.then, *branching.otherwise, branching.join)
            else:
                try:
                    left = branching.otherwise if self._value(gate) else branching.then
                except StoreError as error:
                    _tell_damage(plan, {gate: str(error)})
                    del self._found[gate]
                    left = (*branching.then, *branching.otherwise, branching.join)
            for task in left:
                self._found.pop(task, None)

    def _check_needed(self, plan: Plan, tasks: range, kept: IntArray) -> None:
        """Read the files whose values are needed; each that is damaged may make others needed."""
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
            _tell_damage(plan, damage)
            for task in damage:
                del self._found[task]

    def _damage(self, task: int) -> str | None:
        """Tell what is wrong with the file that holds a task's value."""
        payload = self._found[task].payload
        assert payload is not None
        try:
            self._files.read(*name_and_lengths(payload))
        except StoreError as error:
            return str(error)
        return None


def checksum_of(fingerprint: bytes, kind: int, payload: bytes) -> int:
    """Return what tells an altered row of values: 32 bits, as it is to tell what broke, not what was forged."""
    return crc32(payload, crc32(fingerprint, kind))


def is_whole(fingerprint: Any, kind: Any, checksum: Any, payload: Any) -> bool:
    """Tell whether a row of values is what was written; its columns may hold anything."""
    if kind not in (SCALAR, BLOB, FILE) or not isinstance(payload, bytes) or not isinstance(fingerprint, bytes):
        return False
    is_file = kind == FILE and (len(payload) < NAME_BYTES + 8 or (len(payload) - NAME_BYTES) % 8)
    return not is_file and bool(checksum_of(fingerprint, int(kind), payload) == checksum)


def payload_of_file(name: bytes, lengths: Sequence[int]) -> bytes:
    """Return what is stored of a value that is in a file."""
    return name + struct.pack(f"<{len(lengths)}q", *lengths)


def name_and_lengths(payload: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Turn back what `payload_of_file` made."""
    lengths = payload[NAME_BYTES:]
    return payload[:NAME_BYTES], struct.unpack(f"<{len(lengths) // 8}q", lengths)


def wire_of(kind: int, payload: bytes, files: ValueFiles, arena: Arena) -> Wire:
    """Return a stored value as it travels.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if kind == SCALAR:
        return pickle.loads(payload)
    if kind == BLOB:
        return (payload,)
    segment = arena.write(files.read(*name_and_lengths(payload)))
    assert is_segment(segment)
    return segment


def value_of(kind: int, payload: bytes, files: ValueFiles) -> Any:
    """Return a stored value.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if kind == FILE:
        stream, *buffers = files.read(*name_and_lengths(payload))
        return pickle.loads(stream, buffers=buffers)
    return pickle.loads(payload)


def _named(plan: Plan, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tasks of these names; and those within which there may yet be tasks of names that nobody has."""
    found: list[int] = []
    within: list[int] = []
    for name in names:
        if matching := _matching(plan, name):
            found += matching
        elif outer := _outer(plan, name):
            within += outer
        else:
            raise UnknownTask(
                f"workflow {plan.workflow_name!r} has no task named {name!r}, to run it again. "
                "Workflow.execution_layers() lists the names."
            )
    return found, within


def _outer(plan: Plan, name: str) -> list[int]:
    """Return the innermost tasks that are there within which one of this name would be."""
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


def _tell_damage(plan: Plan, damage: Mapping[int, str]) -> None:
    if not damage:
        return
    names = [repr(plan.name(task)) for task in list(damage)[:_MOST_NAMED]]
    more = f" and {len(damage) - len(names)} more" if len(damage) > len(names) else ""
    told = f"the stored value of task {names[0]} is" if len(damage) == 1 else f"the stored values of {', '.join(names)}"
    are = "" if len(damage) == 1 else f"{more} are"
    report(f"{told}{are} not used, and computed again: {next(iter(damage.values()))}.", StoreWarning)
