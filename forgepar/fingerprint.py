"""What makes a task the same task as last time: its callable, its arguments, and what it waits for, as 16 bytes.

    callable ──┐
    version  ──┼──> head, once a template ──┐
    constants that all share ──┘            ├──> BLAKE2b ──> fingerprint ──> those that follow
    constants of its own ───────────────────┤
    fingerprints of what it waits for ──────┘

Of tasks that are alike in all of this, the first declared is the first, and so on. A task whose callable may ask for
its `TaskContext` counts with its name and the run's seed, too. Cost: O(n + m) and the size of the arguments, each of
which is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from forgepar.digests import ATOMS, DIGEST_BYTES, Digest, NoDigest, atoms_data, digest_of
from forgepar.plan import IntArray, Plan
from forgepar.tasks import Task, base_name


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
        self._code: dict[int, Digest | str] = {}
        self._constants: dict[int, bytes | NoDigest] = {}
        self.grow(plan)

    def grow(self, plan: Plan) -> None:
        """Take in the tasks that a plan has behind those of the last one."""
        first = len(self.of_task)
        self.of_task += [None] * (plan.n_tasks - first)
        self._heads += [self._head(plan, template) for template in range(len(self._heads), len(plan.templates))]
        order = plan.order if not first else plan.order[plan.order >= first]
        self._walk(plan, order)

    def _walk(self, plan: Plan, order: IntArray) -> None:
        of_task, alike, heads = self.of_task, self._alike, self._heads
        constants, references = plan.constants, plan.references.tolist()
        waits_for = _order_only(plan)
        is_plain = ATOMS.issuperset(map(type, constants))
        columns = (plan.template_of, plan.constant_start, plan.constant_start[1:], plan.reference_start)
        rows = zip(
            order.tolist(),
            *(column[order].tolist() for column in columns),
            plan.reference_start[order + 1].tolist(),
            strict=True,
        )
        for task, template, first_constant, end_constant, first_reference, end_reference in rows:
            head = heads[template]
            if head.reason is not None:
                self._refuse(task, head.reason, is_declared=head.is_declared)
                continue
            before = references[first_reference:end_reference]
            if task in waits_for:
                before += waits_for[task]
            data = [head.data]
            if first_constant != end_constant:
                own = tuple(constants[first_constant:end_constant])
                if is_plain:
                    data.append(atoms_data(own))
                else:
                    try:
                        data += [self._of_constant(value) for value in own]
                    except NoDigest as error:
                        self._refuse(task, f"its arguments: {error}")
                        continue
            try:
                data += [of_task[other] for other in before]  # a None among them is what join raises at
                found = blake2b(b"".join(data), digest_size=DIGEST_BYTES).digest()
            except TypeError:
                other = next(other for other in before if of_task[other] is None)
                self._refuse(task, f"it follows {plan.name(other)!r}", is_declared=other in self.declared)
                continue
            if head.asks_context:
                found = blake2b(
                    f"{plan.name(task)} {self._seed}".encode(), key=found, digest_size=DIGEST_BYTES
                ).digest()
            n_alike = alike.get(found, 0)
            alike[found] = n_alike + 1
            if n_alike:
                found = blake2b(b"%d" % n_alike, key=found, digest_size=DIGEST_BYTES).digest()
            of_task[task] = found

    def _refuse(self, task: int, reason: str, *, is_declared: bool = False) -> None:
        self.reasons[task] = reason
        if is_declared:
            self.declared.add(task)

    def _of_constant(self, value: object) -> bytes:
        """Return the digest of an argument; the plan holds it, so that no other gets its id."""
        if type(value) in ATOMS:
            return digest_of(value).data
        if (known := self._constants.get(id(value))) is None:
            try:
                known = digest_of(value).data
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
        try:
            shared = digest_of((row.layout, dict(row.shared), options.version))
        except NoDigest as error:
            return _Head(reason=f"its arguments: {error}")
        return _Head(code.data + shared.data, code.asks_context)

    def _of_callable(self, number: int, fn: Callable[..., object], *, is_vouched: bool) -> Digest | str:
        key = 2 * number + is_vouched
        if key not in self._code:
            try:
                self._code[key] = digest_of(fn, is_vouched=is_vouched)
            except NoDigest as error:
                plain = base_name(fn.fn if isinstance(fn, Task) else fn)
                self._code[key] = f"the code of {plain!r}: {error}"
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


def _order_only(plan: Plan) -> dict[int, list[int]]:
    """Return what tasks wait for without taking its value, in order; tasks that do not are left out."""
    before, after = plan.order_only
    found: dict[int, list[int]] = {}
    for one, other in sorted(zip(after.tolist(), before.tolist(), strict=True)):
        found.setdefault(one, []).append(other)
    return found


def followers(plan: Plan, tasks: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which tasks are these, or follow them."""
    found = plan.graph.descendants(list(tasks)) if tasks else np.zeros(plan.n_tasks, np.bool_)
    found[list(tasks)] = True
    return found
