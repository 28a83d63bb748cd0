"""Fingerprints of tasks: 16 bytes that identify a task by its callable, its arguments and its dependencies.

    callable ──┐
    version  ──┼──> head, once per template ──┐
    shared constants ──┘                      ├──> BLAKE2b ──> fingerprint ──> those of dependent tasks
    constants of the task ────────────────────┤
    fingerprints of its dependencies ─────────┘

Tasks that are equal in all of this are numbered in the order in which they are declared, and the number is part of the
fingerprint. If the callable, or a function among the arguments, may use the `TaskContext`, so are the name of the task
and the seed of the run. Cost: O(n + m) and the size of the arguments, each of which is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.store.fingerprint.digester import ATOMS, Digests, atoms_data
from forgepar.store.fingerprint.merkle import DIGEST_BYTES, Digest, NoDigest
from forgepar.workflow.plan import Plan
from forgepar.workflow.tasks import Task, base_name

_NO_ATOM = b"\xff"  # precedes the digest of a constant; `marshal` writes the type letter of an atom there


class Fingerprints:
    """The fingerprints of a plan's tasks.

    Args:
        plan: the workflow.
        seed: the run's.

    Attributes:
        of_task: 16 bytes per task; None: the task has no fingerprint.
        reasons: for each task without a fingerprint, why.
        declared: tasks that were declared with ``cache=False``, or that depend on such tasks.

    Example:
        >>> from forgepar.workflow.workflow import Workflow
        >>> wf = Workflow()
        >>> total = wf.add(sum, wf.map(abs, [-1, 2]))
        >>> [len(fingerprint) for fingerprint in Fingerprints(wf.plan(), 0).of_task]
        [16, 16, 16]
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.of_task: list[bytes | None] = []
        self.reasons: dict[int, str] = {}
        self.declared: set[int] = set()
        self._seed = seed
        self._alike: dict[bytes, int] = {}
        self._heads: list[_Head] = []
        self._digests = Digests()
        self._code: dict[tuple[int, bool], Digest | str] = {}
        self._constants: dict[int, Digest | NoDigest] = {}
        self.grow(plan)

    def grow(self, plan: Plan) -> None:
        """Add the tasks that a plan has in addition to those of the last one."""
        first = len(self.of_task)
        self.of_task += [None] * (plan.n_tasks - first)
        used = np.zeros(len(plan.templates), np.bool_)
        used[plan.template_of[first:]] = True
        for template in range(len(self._heads), len(plan.templates)):
            # Fallbacks have templates too, but no tasks.
            self._heads.append(self._head(plan, template) if used[template] else _Head())
        # Within a layer in the order of declaration, in which equal tasks are numbered.
        self._walk(plan, first + np.argsort(plan.layers[first:], kind="stable"), first)
        if first:
            self._refuse_waiting(plan, first)

    def _walk(self, plan: Plan, order: NDArray[np.int64], first: int) -> None:
        """Compute the fingerprints of the tasks from ``first``, each after those of its dependencies."""
        of_task: list[Any] = self.of_task
        alike, heads = self._alike, self._heads
        constants, waits_for = plan.constants, _order_only(plan, first)
        are_atoms = ATOMS.issuperset(map(type, constants[int(plan.constant_start[first]) :]))
        reference_start = plan.reference_start - plan.reference_start[first]
        references = plan.references[int(plan.reference_start[first]) :].tolist()
        starts = (plan.constant_start, plan.constant_start[1:], reference_start, reference_start[1:])
        columns = (column[order].tolist() for column in (plan.template_of, *starts))
        for task, template, constant, constant_end, reference, reference_end in zip(
            order.tolist(), *columns, strict=True
        ):
            head = heads[template]
            if head.reason is not None:
                self._refuse(task, head.reason, is_declared=head.is_declared)
                continue
            data, asks_context = head.data, head.asks_context
            before = references[reference:reference_end]
            try:
                if constant != constant_end:
                    own = constants[constant:constant_end]
                    if are_atoms:
                        data += atoms_data(own)
                    else:
                        data, asks_context = self._with_constants(head, own)
                data += b"".join([of_task[other] for other in before])  # a None raises TypeError
                if task in waits_for:
                    before = waits_for[task]
                    data += b"".join(sorted([of_task[other] for other in before]))
            except NoDigest as error:
                self._refuse(task, f"its arguments: {error}")
                continue
            except TypeError:
                self._refuse_following(plan, task, before)
                continue
            found = blake2b(data, digest_size=DIGEST_BYTES).digest()
            if asks_context:
                found = _mixed(found, f"{plan.name(task)} {self._seed}")
            if found in alike:
                alike[found] += 1
                found = _mixed(found, str(alike[found]))
            else:
                alike[found] = 1
            of_task[task] = found

    def _with_constants(self, head: _Head, own: list[object]) -> tuple[bytes, bool]:
        """Return the data of a task with constants of any type, and whether it may use its context."""
        if ATOMS.issuperset(map(type, own)):
            return head.data + atoms_data(own), head.asks_context
        parts, asks_context = [head.data], head.asks_context
        for value in own:
            if type(value) in ATOMS:
                parts.append(atoms_data([value]))
            else:
                found = self._of_constant(value)
                parts += (_NO_ATOM, found.data)
                asks_context |= found.asks_context
        return b"".join(parts), asks_context

    def _refuse(self, task: int, reason: str, *, is_declared: bool = False) -> None:
        self.of_task[task] = None
        self.reasons[task] = reason
        if is_declared:
            self.declared.add(task)

    def _refuse_following(self, plan: Plan, task: int, before: Sequence[int]) -> None:
        """Refuse a task that depends on a refused task."""
        other = next(other for other in before if self.of_task[other] is None)
        self._refuse(task, f"it follows {plan.name(other)!r}", is_declared=other in self.declared)

    def _refuse_waiting(self, plan: Plan, first: int) -> None:
        """Refuse earlier tasks that depend on a task that expanded into new tasks, one of which was refused."""
        refused = [task for task in range(first, plan.n_tasks) if self.of_task[task] is None]
        if refused:
            for task in np.flatnonzero(plan.graph.descendants(refused)[:first]).tolist():
                if self.of_task[task] is not None:
                    self._refuse_following(plan, task, refused)

    def _of_constant(self, value: object) -> Digest:
        """Return the digest of a constant; the plan has a reference to it, so its id is not reused."""
        known = self._constants.get(id(value))
        if known is None:
            try:
                known = self._digests.of(value)
            except NoDigest as error:
                known = error
            self._constants[id(value)] = known
        if isinstance(known, NoDigest):
            raise known
        return known

    def _head(self, plan: Plan, template: int) -> _Head:
        """Return the data that all tasks of a template share."""
        row = plan.templates[template]
        spec = plan.specs[row.spec]
        options = spec.options
        if not options.cache:
            return _Head(reason="it is declared with cache=False", is_declared=True)
        code = self._of_callable(plan.callable_of[template], spec.fn, is_vouched=options.version is not None)
        if isinstance(code, str):
            return _Head(reason=code)
        form = self._digests.of((tuple(row.layout), tuple(row.shared), options.version))
        try:
            shared = [self._of_constant(value) for value in row.shared.values()]
        except NoDigest as error:
            return _Head(reason=f"its arguments: {error}")
        digests = (code, form, *shared)
        data = b"".join([found.data for found in digests])
        return _Head(blake2b(data, digest_size=DIGEST_BYTES).digest(), any(found.asks_context for found in digests))

    def _of_callable(self, number: int, fn: Callable[..., object], *, is_vouched: bool) -> Digest | str:
        """Return the digest of a callable without its task options, or the reason why it has none."""
        key = (number, is_vouched)
        if key not in self._code:
            plain = fn.fn if isinstance(fn, Task) else fn
            try:
                self._code[key] = self._digests.of(plain, is_vouched=is_vouched)
            except NoDigest as error:
                self._code[key] = f"the code of {base_name(plain)!r}: {error}"
        return self._code[key]


class _Head(NamedTuple):
    """The data that all tasks of a template share, or the reason why they have no fingerprints."""

    data: bytes = b""
    asks_context: bool = False
    reason: str | None = None
    is_declared: bool = False


def _mixed(fingerprint: bytes, text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), key=fingerprint, digest_size=DIGEST_BYTES).digest()


def _order_only(plan: Plan, first: int) -> dict[int, list[int]]:
    """Return the order-only dependencies of the tasks from ``first``; tasks without any are left out."""
    before, after = plan.order_only
    before, after = before[after >= first], after[after >= first]
    found: dict[int, list[int]] = {}
    for one, other in sorted(set(zip(after.tolist(), before.tolist(), strict=True))):
        found.setdefault(one, []).append(other)
    return found


def followers(plan: Plan, tasks: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return the mask of some tasks and all tasks that depend on them: (n_tasks,)."""
    found = plan.graph.descendants(list(tasks)) if tasks else np.zeros(plan.n_tasks, np.bool_)
    found[list(tasks)] = True
    return found
