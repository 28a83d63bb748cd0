"""What makes a task the same task as last time: its callable, its arguments, and what it waits for, as 16 bytes.

    callable ──┐
    version  ──┼──> head, once a template ──┐
    constants that all share ──┘            ├──> BLAKE2b ──> fingerprint ──> those that follow
    constants of its own ───────────────────┤
    fingerprints of what it waits for ──────┘

Of tasks that are alike in all of this, the first declared is the first, and so on. A task whose callable, or a function
among whose arguments, may ask for its `TaskContext` counts with its name and the run's seed, too. Cost: O(n + m) and
the size of the arguments, each of which is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgepar.digests import ATOMS, Digests, atoms_data
from forgepar.merkle import DIGEST_BYTES, Digest, NoDigest
from forgepar.plan import Plan
from forgepar.tasks import Task, base_name

_NO_ATOM = b"\xff"  # before the digest of a constant, where for an atom `marshal` has the letter of its type


class Fingerprints:
    """The fingerprints of a plan's tasks.

    Args:
        plan: the workflow.
        seed: the run's.

    Attributes:
        of_task: 16 bytes a task; None: it has none.
        reasons: why, of those that have none.
        declared: those among them that were declared with ``cache=False``, or follow such.

    Example:
        >>> from forgepar.workflow import Workflow
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
        """Take in the tasks that a plan has behind those of the last one."""
        first = len(self.of_task)
        self.of_task += [None] * (plan.n_tasks - first)
        used = np.zeros(len(plan.templates), np.bool_)
        used[plan.template_of[first:]] = True
        for template in range(len(self._heads), len(plan.templates)):
            # What stands in for tasks has templates, too, but no task of its own.
            self._heads.append(self._head(plan, template) if used[template] else _Head())
        # Within a layer as declared: so are tasks alike numbered.
        self._walk(plan, first + np.argsort(plan.layers[first:], kind="stable"), first)
        if first:
            self._refuse_waiting(plan, first)

    def _walk(self, plan: Plan, order: NDArray[np.int64], first: int) -> None:
        """Find the fingerprints of tasks from one on, each behind those that it waits for."""
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
                data += b"".join([of_task[other] for other in before])  # which raises at None
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
        """Return the data of a task with arguments of its own, of any type, and whether it may ask for its context."""
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
        """Refuse a task that follows one that was refused."""
        other = next(other for other in before if self.of_task[other] is None)
        self._refuse(task, f"it follows {plan.name(other)!r}", is_declared=other in self.declared)

    def _refuse_waiting(self, plan: Plan, first: int) -> None:
        """Refuse what waits for a task that turned out to be several, of which one was refused."""
        refused = [task for task in range(first, plan.n_tasks) if self.of_task[task] is None]
        if refused:
            for task in np.flatnonzero(plan.graph.descendants(refused)[:first]).tolist():
                if self.of_task[task] is not None:
                    self._refuse_following(plan, task, refused)

    def _of_constant(self, value: object) -> Digest:
        """Return the digest of an argument; the plan holds it, so that no other gets its id."""
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
        """Return what tasks of a template have in common."""
        row = plan.templates[template]
        spec = plan.specs[row.spec]
        options = spec.options
        if not options.cache:
            return _Head(reason="it is declared with cache=False", is_declared=True)
        code = self._of_callable(plan.callable_of[template], spec.fn, is_vouched=options.version is not None)
        if isinstance(code, str):
            return _Head(reason=code)
        told = self._digests.of((tuple(row.layout), tuple(row.shared), options.version))
        try:
            shared = [self._of_constant(value) for value in row.shared.values()]
        except NoDigest as error:
            return _Head(reason=f"its arguments: {error}")
        digests = (code, told, *shared)
        data = b"".join([found.data for found in digests])
        return _Head(blake2b(data, digest_size=DIGEST_BYTES).digest(), any(found.asks_context for found in digests))

    def _of_callable(self, number: int, fn: Callable[..., object], *, is_vouched: bool) -> Digest | str:
        """Return the digest of what tasks call, without the options that they have, or why it has none."""
        key = (number, is_vouched)
        if key not in self._code:
            plain = fn.fn if isinstance(fn, Task) else fn
            try:
                self._code[key] = self._digests.of(plain, is_vouched=is_vouched)
            except NoDigest as error:
                self._code[key] = f"the code of {base_name(plain)!r}: {error}"
        return self._code[key]


class _Head:
    """What tasks of one template have in common: the data, or the reason why there is none."""

    __slots__ = ("asks_context", "data", "is_declared", "reason")

    def __init__(
        self, data: bytes = b"", asks_context: bool = False, *, reason: str | None = None, is_declared: bool = False
    ) -> None:
        self.data = data
        self.asks_context = asks_context
        self.reason = reason
        self.is_declared = is_declared


def _mixed(fingerprint: bytes, text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), key=fingerprint, digest_size=DIGEST_BYTES).digest()


def _order_only(plan: Plan, first: int) -> dict[int, list[int]]:
    """Return what tasks from one on wait for without taking its value; tasks that do not are left out."""
    before, after = plan.order_only
    before, after = before[after >= first], after[after >= first]
    found: dict[int, list[int]] = {}
    for one, other in sorted(set(zip(after.tolist(), before.tolist(), strict=True))):
        found.setdefault(one, []).append(other)
    return found


def followers(plan: Plan, tasks: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which tasks are these, or follow them."""
    found = plan.graph.descendants(list(tasks)) if tasks else np.zeros(plan.n_tasks, np.bool_)
    found[list(tasks)] = True
    return found
