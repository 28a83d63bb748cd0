"""The boxes of a picture: one per task, or one for all tasks of a layer that call the same function.

Plan ───────┐
            ├──> Drawing ──> svg, mermaid, dot text
RunTable ───┘
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.records.table import RunTable
from forgepar.scheduling.run_state import Status
from forgepar.workflow.plan import Plan
from forgepar.workflow.tasks import Task, base_name

MOST_BOXES = 100  # tasks; more are collapsed by default, as their names would be too small to read
MOST_ARROWS = 400  # the same for dependencies; Mermaid draws at most 500 by default
# The order of statuses in pictures.
STATUSES = ("failed", "running", "cancelled", "skipped", "pending", "compensated", "completed", "cached")


@dataclass(frozen=True, slots=True)
class Box:
    """One box of a picture.

    Attributes:
        label: the name of its task; of several tasks, the name of their callable.
        n_tasks: number of its tasks.
        kind: number of their callable; boxes of the same kind have the same colour.
        layer: their layer.
        statuses: number of tasks of each status, in the order of `STATUSES`; empty without a run.
    """

    label: str
    n_tasks: int
    kind: int
    layer: int
    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def status(self) -> str | None:
        """The status that colours the box: "failed" or "running" if any task has it, else the most frequent one."""
        if {"failed", "running"} & self.statuses.keys():
            return next(iter(self.statuses))
        return max(self.statuses, key=self.statuses.__getitem__, default=None)

    def described(self) -> str:
        """Return a one-line description for a tooltip."""
        many = f": {self.n_tasks:,} tasks of layer {self.layer}" if self.n_tasks > 1 else ""
        statuses = [f"{n:,} {status}" if self.n_tasks > 1 else status for status, n in self.statuses.items()]
        return f"{self.label}{many}" + (f" ({', '.join(statuses)})" if statuses else "")


@dataclass(frozen=True, eq=False)
class Drawing:
    """Boxes and the arrows between them.

    Attributes:
        name: the name of the workflow.
        boxes: the boxes, sorted by layer.
        sources: (m,) the box where each arrow begins; no two arrows connect the same boxes.
        targets: (m,) the box where each arrow ends, in a later layer.
        order_only: (m,) bool, whether an arrow is a dependency without a value.
        tasks_by_layer: number of tasks of each layer.
        is_collapsed: whether a box can have several tasks.
    """

    name: str
    boxes: Sequence[Box]
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    order_only: NDArray[np.bool_]
    tasks_by_layer: Sequence[int]
    is_collapsed: bool

    @property
    def layers(self) -> NDArray[np.int64]:
        """The layer of each box."""
        return np.array([box.layer for box in self.boxes], np.int64)

    def statuses(self) -> dict[str, int]:
        """Count the tasks of each status, in the order of `STATUSES`; empty without a run."""
        counts = {status: sum(box.statuses.get(status, 0) for box in self.boxes) for status in STATUSES}
        return {status: n for status, n in counts.items() if n}


class _GraphColumns(NamedTuple):
    """The graph of a plan or a run as columns: one row per task, and one per dependency."""

    name: str
    task_name: Callable[[int], str]
    layer: NDArray[np.integer[Any]]
    kind: NDArray[np.integer[Any]]
    kind_names: Sequence[str]
    sources: NDArray[np.integer[Any]]
    targets: NDArray[np.integer[Any]]
    order_only: NDArray[np.bool_]
    status: NDArray[np.int8] | None


def drawing_of(subject: Plan | RunTable, table: RunTable | None = None, collapse: bool | None = None) -> Drawing:
    """Decide which boxes and arrows to draw. Cost: O(n log n + m log m).

    Args:
        subject: a frozen workflow, or a run.
        table: a run of the workflow, to show statuses; ignored if the subject is a run.
        collapse: whether the tasks of a layer that call the same function are one box; None: if there are more than
            `MOST_BOXES` tasks or `MOST_ARROWS` dependencies.

    Raises:
        ValueError: the table is of another workflow.
    """
    columns = _of_run(subject) if isinstance(subject, RunTable) else _of_plan(subject)
    if table is not None and columns.status is None:
        _check_same(columns, table)
        # A run has more tasks than its workflow if tasks returned workflows. Then the graph of the run is drawn.
        same = len(table) == len(columns.layer)
        columns = columns._replace(status=table.status_of) if same else _of_run(table)
    if collapse is None:
        collapse = len(columns.layer) > MOST_BOXES or len(columns.sources) > MOST_ARROWS
    return _drawn(columns, collapse=collapse)


def _of_plan(plan: Plan) -> _GraphColumns:
    takers = np.repeat(np.arange(plan.n_tasks), np.diff(plan.reference_start))
    before, after = plan.order_only
    kind_of, names = _kinds(plan)
    return _GraphColumns(
        plan.workflow_name,
        plan.name,
        plan.layers,
        np.array(kind_of, np.int64)[plan.template_of],
        names,
        np.concatenate([plan.references, before]),
        np.concatenate([takers, after]),
        np.repeat([False, True], [len(takers), len(after)]),
        None,
    )


def _of_run(table: RunTable) -> _GraphColumns:
    return _GraphColumns(
        table.workflow,
        lambda task: table.names[task],
        table.layer,
        table.callable_of,
        table.callables,
        table.sources,
        table.targets,
        np.zeros(len(table.sources), np.bool_),  # a run does not record which dependencies have no value
        table.status_of,
    )


def _kinds(plan: Plan) -> tuple[list[int], list[str]]:
    """Number and name the callables of the templates: by their tasks if all have the same name, else by function."""
    numbers: dict[object, int] = {}
    names: list[str] = []
    kind_of: list[int] = []
    for row in plan.templates:
        spec = plan.specs[row.spec]
        number = numbers.setdefault(_identity(spec.fn), len(names))
        if number == len(names):
            names.append(spec.base)
        elif names[number] != spec.base:
            names[number] = base_name(spec.fn)
        kind_of.append(number)
    return kind_of, names


def _identity(fn: Callable[..., Any]) -> object:
    """Return a key that is equal for functions that look the same: lambdas of one place, partials of one function."""
    name = base_name(fn)
    plain: Any = fn
    while isinstance(plain, (Task, functools.partial)):
        plain = plain.fn if isinstance(plain, Task) else plain.func
    code = getattr(plain, "__code__", None)
    home = (type(plain), getattr(plain, "__module__", None), getattr(plain, "__qualname__", None))
    return name, home if code is None else id(code)


def _check_same(columns: _GraphColumns, table: RunTable) -> None:
    n = len(columns.layer)
    if len(table) < n or any(columns.task_name(task) != name for task, name in enumerate(table.names[:n])):
        raise ValueError(
            f"table must be that of a run of workflow {columns.name!r}, got that of run {table.run_id!r} of "
            f"{table.workflow!r}, which has other tasks. Draw the table itself, or give one of a run of this workflow."
        )


def _drawn(columns: _GraphColumns, *, collapse: bool) -> Drawing:
    n, kinds = len(columns.layer), max(len(columns.kind_names), 1)
    layer = columns.layer.astype(np.int64)
    key = layer * kinds + columns.kind if collapse else layer * max(n, 1) + np.arange(n)
    _, first, box_of = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(layer[first] * max(n, 1) + first)  # within a layer in the order of declaration
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    box_of, first = place[box_of], first[order]
    sizes = np.bincount(box_of, minlength=len(first)).tolist()
    boxes = [
        Box(_label(columns, task, size), size, int(columns.kind[task]), int(layer[task]))
        for task, size in zip(first.tolist(), sizes, strict=True)
    ]
    if columns.status is not None:
        boxes = _with_statuses(boxes, box_of, columns.status)
    return Drawing(columns.name, boxes, *_arrows(columns, box_of, len(boxes)), np.bincount(layer).tolist(), collapse)


def _label(columns: _GraphColumns, task: int, n_tasks: int) -> str:
    return columns.task_name(task) if n_tasks == 1 else columns.kind_names[int(columns.kind[task])]


def _arrows(
    columns: _GraphColumns, box_of: NDArray[np.int64], n_boxes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the distinct pairs of boxes with a dependency, and whether no value is passed between them."""
    key = box_of[columns.sources] * n_boxes + box_of[columns.targets]
    pairs, arrow_of = np.unique(key, return_inverse=True)
    with_value = np.bincount(arrow_of, ~columns.order_only, minlength=len(pairs)) > 0
    sources, targets = np.divmod(pairs, max(n_boxes, 1))
    return sources, targets, ~with_value


def _with_statuses(boxes: list[Box], box_of: NDArray[np.int64], status: NDArray[np.int8]) -> list[Box]:
    numbers = [(name, int(Status[name.upper()])) for name in STATUSES]
    counts = np.bincount(box_of * len(Status) + status, minlength=len(boxes) * len(Status))
    rows = counts.reshape(len(boxes), len(Status)).tolist()
    by_box = [{name: row[number] for name, number in numbers if row[number]} for row in rows]
    return [replace(box, statuses=statuses) for box, statuses in zip(boxes, by_box, strict=True)]
