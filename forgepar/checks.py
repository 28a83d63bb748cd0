"""What is likely to go wrong, or slower than need be, in a workflow; told before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import CyclicWorkflow, DuplicateTaskName, EmptyWorkflow
from forgepar.graph import Adjacency, longest_path_layers
from forgepar.machine import as_text, available_cpus, available_memory, total_memory
from forgepar.plan import Plan
from forgepar.workflow import Engine, Workflow

FATAL = frozenset(("empty", "cycle", "duplicate name", "too much memory"))  # kinds with which no run can begin
_MOST_NAMED = 3
_NARROW_SHARE = 0.25  # of the layers: below it, barriers that leave workers idle are not worth a word


@dataclass(frozen=True)
class Finding:
    """One thing about a workflow.

    Attributes:
        kind: "empty", "cycle", "duplicate name", "too much memory", "much memory", "order without need",
            "narrow layers", "no timeout", "no compensation".
        message: what it is, and what to do about it.
        tasks: names of the tasks it is about.
    """

    kind: str
    message: str
    tasks: tuple[str, ...] = ()

    @property
    def is_fatal(self) -> bool:
        """Whether no run could begin."""
        return self.kind in FATAL

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def check(
    workflow: Workflow, workers: int | None = None, layer_timeout: float | None = None, rollback: Any = "all"
) -> list[Finding]:
    """Return what is to be said about a workflow; see `Workflow.check`."""
    try:
        workflow.check_runnable()
    except EmptyWorkflow as error:
        return [Finding("empty", str(error))]
    except CyclicWorkflow as error:
        return [Finding("cycle", str(error), tuple(error.cycle))]
    except DuplicateTaskName as error:
        return [Finding("duplicate name", str(error), (error.name,))]
    plan: Plan = workflow.plan()
    return [
        *_memory(plan),
        *_needless_order(plan),
        *_narrow_layers(plan, workers or available_cpus()),
        *(_without_timeout(plan, layer_timeout) if layer_timeout is not None else ()),
        *(_without_compensation(plan) if rollback != "none" else ()),
    ]


def _memory(plan: Plan) -> Iterator[Finding]:
    needs = np.array(plan.memories, np.int64)[plan.template_of]
    if not needs.any():
        return
    total, available = total_memory(), available_memory()
    never = needs > total
    if never.any():
        yield _finding(
            "too much memory",
            plan,
            never,
            f"declare up to {as_text(int(needs.max()))}, but there are {as_text(total)} in all. "
            "Declare less (memory=), or run them on a larger machine.",
        )
    later = (needs > available) & ~never
    if later.any():
        yield _finding(
            "much memory",
            plan,
            later,
            f"declare more than the {as_text(available)} that can be had now. Free some before the run.",
        )


def _needless_order(plan: Plan) -> Iterator[Finding]:
    """Find tasks that are in a later layer only because of an order without data, and what that costs in layers.

    Cost: two passes over the graph.
    """
    sources, targets = plan.order_only
    is_decision = np.isin(sources, list(plan.branchings))  # a branch waits for what decides, though it takes no value
    if is_decision.all():
        return
    takers = np.repeat(np.arange(plan.n_tasks, dtype=np.int32), np.diff(plan.reference_start))
    before = np.concatenate([plan.references, sources[is_decision]])
    after = np.concatenate([takers, targets[is_decision]])
    targets = targets[~is_decision]
    free = longest_path_layers(Adjacency.from_edges(plan.n_tasks, before, after))
    moved = np.zeros(plan.n_tasks, np.bool_)
    moved[targets] = plan.layers[targets] > free[targets]
    saved = plan.n_layers - int(free.max()) - 1
    if saved and moved.any():
        yield _finding(
            "order without need",
            plan,
            moved,
            "take no value from what they wait for (after=, add_dependency): without that order the workflow has "
            f"{saved} of {plan.n_layers} layers less. Take it out where nothing outside depends on it.",
        )


def _narrow_layers(plan: Plan, workers: int) -> Iterator[Finding]:
    widths = np.diff(plan.layer_start)
    narrow = int((widths < workers).sum())
    if workers > 1 and plan.n_layers > 1 and narrow > _NARROW_SHARE * plan.n_layers:
        idle = 1 - np.minimum(widths, workers).sum() / (workers * plan.n_layers)
        yield Finding(
            "narrow layers",
            f"{narrow} of {plan.n_layers} layers have fewer tasks than the {workers} workers, so that {idle:.0%} "
            "of them idle if all tasks take as long. Split tasks, use fewer workers, or run(schedule='eager').",
        )


def _without_timeout(plan: Plan, layer_timeout: float) -> Iterator[Finding]:
    timeouts = np.array([timeout is None for timeout in plan.timeouts])
    without = timeouts[plan.template_of]
    if without.any():
        yield _finding(
            "no timeout",
            plan,
            without,
            f"have no timeout= of their own: one that hangs ends the whole run after the layer's {layer_timeout:g} s. "
            "Give each a shorter one, and retries= if that helps.",
        )


def _without_compensation(plan: Plan) -> Iterator[Finding]:
    options = [plan.specs[row.spec].options for row in plan.templates]
    effects = np.array([option.effects for option in options])[plan.template_of]
    undoable = np.array([option.compensate is not None for option in options])[plan.template_of]
    without = effects & ~undoable
    if without.any():
        covered = int((effects & undoable).sum())
        yield _finding(
            "no compensation",
            plan,
            without,
            f"change something outside (effects=True), and a rollback leaves that as it is: {covered} of "
            f"{int(effects.sum())} such tasks have a compensate=. Give them one, or run(rollback='none').",
        )


def _finding(kind: str, plan: Plan, which: NDArray[np.bool_], text: str) -> Finding:
    """Say something of several tasks, of which the first few are named."""
    numbers = np.flatnonzero(which).tolist()
    names = tuple(map(plan.name, numbers))
    named = ", ".join(map(repr, names[:_MOST_NAMED]))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return Finding(kind, f"{named}{more} {text}", names)


def _check(workflow: Workflow, rules: dict[str, Any]) -> Sequence[Finding]:
    return check(workflow, **rules)


Engine.check = _check
