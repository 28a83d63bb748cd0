"""`Workflow.check`: likely errors and slowdowns of a workflow, found without running it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import check_choice, check_seconds, check_workers
from forgepar.errors import CyclicWorkflow, DuplicateTaskName, EmptyWorkflow, WorkflowError
from forgepar.graph import Adjacency, longest_path_layers
from forgepar.machine import as_bytes, as_text, available_cpus, available_memory, total_memory
from forgepar.values.arena import Arena
from forgepar.values.codec import ATOMIC, dumps
from forgepar.version import public
from forgepar.workflow.fresh_values import Original, is_frozen
from forgepar.workflow.plan import Plan
from forgepar.workflow.tasks import Task
from forgepar.workflow.workflow import Workflow

FATAL = frozenset(("empty", "cycle", "duplicate name", "too much memory"))  # kinds with which no run can start
_MOST_NAMED = 3
_MANY_TASKS = 1000  # copies of a constant, from which on it is reported, or
_LARGE_COPY = Arena.blob_limit  # bytes of one copy
_NARROW_SHARE = 0.25  # of the layers: fewer narrow layers are not reported


@public
@dataclass(frozen=True)
class Finding:
    """One finding about a workflow.

    Attributes:
        kind: "empty", "cycle", "duplicate name", "too much memory", "much memory", "order without need",
            "narrow layers", "no timeout", "no compensation", "copied constant".
        message: the problem, and what to do about it.
        tasks: names of the tasks that it is about.
    """

    kind: str
    message: str
    tasks: tuple[str, ...] = ()

    @property
    def is_fatal(self) -> bool:
        """Whether it keeps a run from starting."""
        return self.kind in FATAL

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def check(
    workflow: Workflow,
    workers: int | None = None,
    layer_timeout: float | None = None,
    rollback: Any = "all",
    available_memory: int | str | None = None,
) -> list[Finding]:
    """Return the findings about a workflow; see `Workflow.check`."""
    layer_timeout = _check_rules(workers, layer_timeout, rollback)
    memory = None if available_memory is None else as_bytes(available_memory, "available_memory")
    if not len(workflow):
        return list(_findings_of(EmptyWorkflow, "empty", workflow.check_runnable))
    plan: Plan = workflow.plan()
    cycle = list(_findings_of(CyclicWorkflow, "cycle", lambda: plan.layers))
    return [
        *cycle,
        *_findings_of(DuplicateTaskName, "duplicate name", plan.check_names),
        *_memory(plan, memory),
        *(() if cycle else _needless_order(plan)),
        *(() if cycle else _narrow_layers(plan, workers or available_cpus())),
        *(_without_timeout(plan, layer_timeout) if layer_timeout is not None else ()),
        *_without_compensation(plan, rollback),
        *_copied_constants(plan),
    ]


def _check_rules(workers: Any, layer_timeout: Any, rollback: Any) -> float | None:
    """Check the arguments as a run would; return the timeout as a run would use it."""
    check_workers("workers", workers)
    check_choice("rollback", rollback, ("all", "upstream", "none"), or_callable=True)
    seconds: float | None = check_seconds("layer_timeout", layer_timeout)
    return seconds


def _findings_of(error_type: type[WorkflowError], kind: str, look: Callable[[], object]) -> Iterator[Finding]:
    """Yield a finding for the error that a check of the workflow raises, if it raises one."""
    try:
        look()
    except error_type as error:
        tasks = error.cycle if isinstance(error, CyclicWorkflow) else [getattr(error, "name", "")]
        yield Finding(kind, str(error), tuple(filter(None, tasks)))


def _memory(plan: Plan, given: int | None) -> Iterator[Finding]:
    needs = np.array(plan.memories, np.int64)[plan.template_of]
    if not needs.any():
        return
    total, available = (given, given) if given is not None else (total_memory(), available_memory())
    never = needs > total
    if never.any():
        yield _finding(
            "too much memory",
            plan,
            never,
            f"declare up to {as_text(int(needs.max()))}, but the machine has only {as_text(total)} in all. "
            "Declare less (memory=), or use a larger machine.",
        )
    later = (needs > available) & ~never
    if later.any():
        yield _finding(
            "much memory",
            plan,
            later,
            f"declare more than the {as_text(available)} that are available now. Free some before the run.",
        )


def _needless_order(plan: Plan) -> Iterator[Finding]:
    """Find the dependencies without data that add layers, and how many.

    Cost: four passes over the graph, plus one for each reported dependency that all longest paths use.
    """
    if not len(plan.order_only[0]):
        return
    loose = _loose_orders(plan)
    saved = plan.n_layers - _depth_without(plan, loose)
    if not saved:
        return
    crossing = _on_a_longest_path(plan, _keys(plan, plan.graph.sources(), plan.graph.indices))
    costly = np.intersect1d(loose, crossing, assume_unique=True)
    # Every longest path uses one of these edges between two layers; if there is only one, all of them use it.
    n_crossing = np.bincount(plan.layers[crossing // plan.n_tasks])
    is_only = n_crossing[plan.layers[costly // plan.n_tasks]] == 1
    named = [*costly[is_only], *costly[~is_only]][:_MOST_NAMED]
    listed = ", ".join(_order_in_words(plan, order, is_only=n < is_only.sum()) for n, order in enumerate(named))
    more = f" and {len(costly) - len(named)} more" if len(costly) > len(named) else ""
    yield Finding(
        "order without need",
        f"{listed}{more}: these dependencies pass no value (after=, add_dependency), and without them the workflow has "
        f"{saved} of {plan.n_layers} layers less. Remove those that nothing outside of the workflow needs. For others, "
        "set effects=True on the task that runs first.",
        tuple(map(plan.name, np.unique(costly % plan.n_tasks).tolist())),
    )


def _order_in_words(plan: Plan, order: np.int64, *, is_only: bool) -> str:
    """Name the tasks of a dependency, and how many layers it adds by itself, if any: other paths may be as long."""
    first, waits = divmod(int(order), plan.n_tasks)
    words = f"{plan.name(waits)!r} after {plan.name(first)!r}"
    cost = plan.n_layers - _depth_without(plan, np.array([order])) if is_only else 0
    return f"{words} ({cost} by itself)" if cost else words


def _keys(plan: Plan, sources: NDArray[np.integer[Any]], targets: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return distinct, ascending numbers for edges: source * n_tasks + target."""
    keys: NDArray[np.int64] = np.unique(sources.astype(np.int64) * plan.n_tasks + targets)
    return keys


def _takers(plan: Plan) -> NDArray[np.int32]:
    """Return, for each reference, the task that takes its value."""
    return np.repeat(np.arange(plan.n_tasks, dtype=np.int32), np.diff(plan.reference_start))


def _loose_orders(plan: Plan) -> NDArray[np.int64]:
    """Return the dependencies that may be unnecessary, as `_keys`.

    They pass no value, and the task that runs first neither decides a branch nor has effects.
    """
    sources, targets = plan.order_only
    effects = np.array([plan.specs[row.spec].options.effects for row in plan.templates])
    stays = effects[plan.template_of[sources]] | np.isin(sources, list(plan.branchings))
    orders = _keys(plan, sources[~stays], targets[~stays])
    loose: NDArray[np.int64] = np.setdiff1d(orders, _keys(plan, plan.references, _takers(plan)), assume_unique=True)
    return loose


def _depth_without(plan: Plan, orders: NDArray[np.int64]) -> int:
    """Count the layers of the workflow without these dependencies."""
    sources, targets = plan.order_only
    stays = ~np.isin(sources.astype(np.int64) * plan.n_tasks + targets, orders)
    graph = Adjacency.from_edges(
        plan.n_tasks,
        np.concatenate([plan.references, sources[stays]]),
        np.concatenate([_takers(plan), targets[stays]]),
    )
    return int(longest_path_layers(graph).max()) + 1


def _on_a_longest_path(plan: Plan, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the edges that lie on a path through all layers."""
    n_after = longest_path_layers(plan.graph.reversed())
    through = plan.layers[edges // plan.n_tasks] + n_after[edges % plan.n_tasks]
    found: NDArray[np.int64] = edges[through == plan.n_layers - 2]
    return found


def _narrow_layers(plan: Plan, workers: int) -> Iterator[Finding]:
    widths = np.diff(plan.layer_start)
    is_narrow = widths < workers
    narrow = int(is_narrow.sum())
    if workers > 1 and plan.n_layers > 1 and narrow > _NARROW_SHARE * plan.n_layers:
        idle = 1 - np.minimum(widths, workers).sum() / (workers * plan.n_layers)
        yield Finding(
            "narrow layers",
            f"{narrow} of {plan.n_layers} layers have fewer tasks than the {workers} workers, so {idle:.0%} of the "
            f"worker time is idle if all tasks take equally long. {widths[is_narrow].sum() / plan.n_tasks:.0%} of the "
            "tasks are in such layers. Split tasks, use fewer workers, or run(schedule='eager').",
        )


def _without_timeout(plan: Plan, layer_timeout: float) -> Iterator[Finding]:
    timeouts = np.array([timeout is None for timeout in plan.timeouts])
    without = timeouts[plan.template_of]
    if without.any():
        yield _finding(
            "no timeout",
            plan,
            without,
            f"have no timeout= of their own: if one hangs, the whole run ends at the layer's {layer_timeout:g} s. "
            "Set a shorter timeout= on each, and retries= if a retry may help.",
        )


def _without_compensation(plan: Plan, rollback: Any) -> Iterator[Finding]:
    options = [plan.specs[row.spec].options for row in plan.templates]
    effects = np.array([option.effects for option in options])[plan.template_of]
    for task in np.flatnonzero(effects).tolist() if callable(rollback) else ():
        effects[task] = bool(rollback(plan.name(task)))
    undoable = np.array([option.compensate is not None for option in options])[plan.template_of]
    without = effects & ~undoable
    if without.any() and rollback != "none":
        covered = int((effects & undoable).sum())
        yield _finding(
            "no compensation",
            plan,
            without,
            f"change something outside of the run (effects=True), and a rollback does not undo it: {covered} of "
            f"{int(effects.sum())} such tasks have a compensate=. Set it on the others, or run(rollback='none').",
        )


def _copied_constants(plan: Plan) -> Iterator[Finding]:
    """Find mutable constants, which are copied for each task, and measure the copying."""
    takers: dict[tuple[str, int], tuple[Any, list[int]]] = {}
    for number in np.flatnonzero(np.bincount(plan.template_of)).tolist():
        row = plan.templates[number]
        constants = [(f"the constant {name!r}", id(value), value) for name, value in row.shared.items()]
        fn = plan.callables[plan.callable_of[number]]
        fn = fn.fn if isinstance(fn, Task) else fn
        if isinstance(fn, functools.partial):
            constants.append(("the arguments of their partial", id(fn), (fn.args, tuple(fn.keywords.values()))))
        for what, identity, value in constants:
            if type(value) not in ATOMIC and not is_frozen(value):
                takers.setdefault((what, identity), (value, []))[1].append(number)
    for (what, _), (value, templates) in takers.items():
        which = np.isin(plan.template_of, templates)
        n_tasks = int(which.sum())
        copying = _copying(value)
        if copying is not None and n_tasks > 1 and (n_tasks >= _MANY_TASKS or copying[0] >= _LARGE_COPY):
            n_bytes, seconds = copying
            yield _finding(
                "copied constant",
                plan,
                which,
                f"each get a copy of {what}, as a task could change it: {as_text(n_bytes)} and {seconds * 1e6:,.0f} us "
                f"per task, {n_tasks * seconds:.2g} s in all. Pass something immutable (a tuple, a frozenset, a large "
                "array by itself), or let the function load and cache it (functools.cache).",
            )


def _copying(value: Any) -> tuple[int, float] | None:
    """Return the bytes and seconds of one copy of a constant; None if workers have it in immutable form."""
    buffers: list[Any] = []
    try:
        n_bytes = len(dumps(value, buffers)) + sum(len(buffer.raw()) for buffer in buffers)
        original = Original(value, limit=0 if n_bytes > Arena.blob_limit else None)
        if is_frozen(original.copy()):
            return None
        began = time.perf_counter()
        original.copy()
        return original.n_bytes, time.perf_counter() - began
    except Exception:
        return None  # a run raises this error


def _finding(kind: str, plan: Plan, which: NDArray[np.bool_], text: str) -> Finding:
    """Return a finding about several tasks; its message names the first of them."""
    numbers = np.flatnonzero(which).tolist()
    names = tuple(map(plan.name, numbers))
    named = ", ".join(map(repr, names[:_MOST_NAMED]))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return Finding(kind, f"{named}{more} {text}", names)
