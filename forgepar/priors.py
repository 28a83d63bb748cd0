"""What earlier runs did: which tasks of a plan need not run, as the store has a value for their fingerprint.

    fingerprints ──> found in the store ──> less those that are to run again, less branches that are not taken
                                        ──> less those whose value is needed but damaged ──> restored, loaded later

A value counts only when its checksum does: a damaged one is told of and computed again.
"""

from __future__ import annotations

import pickle
import sqlite3
import struct
from collections.abc import Mapping, Sequence
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
from forgepar.valuefiles import NAME_BYTES, ValueFiles
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment

SCALAR, BLOB, FILE = 0, 1, 2  # what a payload is
_MOST_NAMED = 3  # tasks in a warning
_SHORT = 64  # bytes of a payload that is kept in memory until it is needed
_AT_ONCE = 500  # fingerprints asked for in one statement
_FIND = 'SELECT fingerprint, run, kind, checksum, payload FROM "values" WHERE fingerprint IN (%s) ORDER BY run DESC'
_READ = 'SELECT checksum, payload FROM "values" WHERE fingerprint = ? AND run = ?'


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
            names = (given,) if isinstance(given, str) else tuple(given)
            if not all(isinstance(name, str) for name in names):
                raise WorkflowError(f"Resume({field}={given!r}) holds no names. Give names of tasks.")
            object.__setattr__(self, field, names)

    def forced(self, plan: Plan) -> NDArray[np.bool_]:
        """Return which tasks of a plan are to run again: (n_tasks,).

        A name of a task within one that is there, as ``split/part-3``, may become known only while the run goes.

        Raises:
            UnknownTask: a name is that of no task.
        """
        found = followers(plan, _named(plan, self.start_from))
        found[_named(plan, self.rerun)] = True
        return found


class Prior(NamedTuple):
    """A value that an earlier run made.

    Attributes:
        run: that run's number in the store.
        kind: SCALAR, BLOB or FILE.
        payload: what is stored of it; None: to be read when it is needed.
    """

    run: int
    kind: int
    payload: bytes | None


class Priors:
    """The values that earlier runs made of a plan's tasks.

    Args:
        connection: of the store.
        files: its large values.
        path: of the store, to be told.

    Attributes:
        completed_runs: numbers of the runs that came to a good end.
    """

    def __init__(self, connection: sqlite3.Connection, files: ValueFiles, path: Path) -> None:
        self._connection = connection
        self._files = files
        self._path = path
        self._found: dict[int, Prior] = {}
        self._fingerprints: Sequence[bytes | None] = ()
        self.completed_runs: frozenset[int] = frozenset()

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
        self._fingerprints = fingerprints
        rows = self._connection.execute("SELECT id FROM runs WHERE status = 'completed'")
        self.completed_runs = frozenset(number for (number,) in rows)
        wanted: dict[bytes, int] = {}
        for task in tasks:
            if may[task] and (fingerprint := fingerprints[task]) is not None:
                wanted[fingerprint] = task
        self._look_up(plan, wanted)
        self._prune_branches(plan, tasks)
        self._check_needed(plan, kept)
        return np.array([task for task in tasks if task in self._found], np.int32)

    def source(self, task: int) -> int:
        """Return the number of the run that made the value of a task that was found."""
        return self._found[task].run

    def load(self, task: int, arena: Arena) -> Wire:
        """Return the value of a task that was found, as it travels; a large one is put into the arena.

        Raises:
            StoreError: it was damaged since it was found.
        """
        run, kind, payload = self._found[task]
        if payload is None:
            payload = self._read(task, run, kind)
        try:
            return wire_of(kind, payload, self._files, arena)
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
            rows = self._connection.execute(_FIND % ",".join("?" * len(some)), some)
            for fingerprint, run, kind, checksum, payload in rows:
                task = wanted[fingerprint]
                if task in self._found:
                    continue
                if checksum_of(fingerprint, kind, payload) == checksum:
                    self._found[task] = Prior(run, kind, payload if len(payload) <= _SHORT or kind == FILE else None)
                else:
                    altered[task] = run
        lost = {task: f"what the store has of run {run} was altered" for task, run in altered.items()}
        _tell_damage(plan, {task: why for task, why in lost.items() if task not in self._found})

    def _read(self, task: int, run: int, kind: int) -> bytes:
        fingerprint = self._fingerprints[task]
        assert fingerprint is not None
        with closing(self._connection.execute(_READ, (fingerprint, run))) as rows:
            row = rows.fetchone()
        if row is None or checksum_of(fingerprint, kind, row[1]) != row[0]:
            raise StoreError(
                f"a value of the run store {str(self._path)!r} was removed or damaged while the run went. "
                "Resume the run: it will be computed again.",
                path=str(self._path),
            )
        payload: bytes = row[1]
        return payload

    def _value(self, task: int) -> Any:
        """Return the value of a task that was found."""
        run, kind, payload = self._found[task]
        if payload is None:
            payload = self._read(task, run, kind)
        return value_of(kind, payload, self._files)

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

    def _check_needed(self, plan: Plan, kept: IntArray) -> None:
        """Read the files whose values are needed; each that is damaged may make others needed."""
        checked: set[int] = set()
        while True:
            done = np.zeros(plan.n_tasks, np.bool_)
            done[list(self._found)] = True
            takes = np.repeat(~done, np.diff(plan.reference_start))
            needed = set(plan.references[takes].tolist()) | set(kept.tolist())
            files = [task for task, prior in self._found.items() if prior.kind == FILE and task in needed - checked]
            if not files:
                return
            checked.update(files)
            damage = {task: why for task in files if (why := self._damage(task)) is not None}
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


def _named(plan: Plan, names: Sequence[str]) -> list[int]:
    found: list[int] = []
    for name in names:
        matching = _matching(plan, name)
        if not matching and not ("/" in name and _matching(plan, name.partition("/")[0])):
            raise UnknownTask(
                f"workflow {plan.workflow_name!r} has no task named {name!r}, to run it again. "
                "Workflow.execution_layers() lists the names."
            )
        found += matching
    return found


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
