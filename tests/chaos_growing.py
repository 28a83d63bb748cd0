"""Makes the random nodes of a workflow of the chaos test."""

from __future__ import annotations

import random
from typing import Any

from chaos_graphs import COMMON, ERRORS, HARMLESS, LONG_SECONDS, MEMORY, SHAPES, SHORT_SECONDS, SLOW, Node, Spec


class Grower:
    """Makes random nodes.

    Args:
        chance: what decides.
        is_pool: only what a pool knows.
        permanent: how likely a task fails whatever is done.
        transient: how likely one fails a few times first.
        slow: how likely a fault is one that takes a while.
        more_retries: retries of every task beside those that its own faults need.
        seconds: most that a task takes.
        wide: whether values are large enough to fill a small file system.
    """

    def __init__(
        self,
        chance: random.Random,
        *,
        is_pool: bool = False,
        permanent: float = 0.0,
        transient: float = 0.0,
        slow: float = 0.0,
        more_retries: int = 0,
        seconds: float = 0.0,
        wide: bool = False,
    ) -> None:
        self.chance = chance
        self.is_pool = is_pool
        self.permanent, self.transient, self.slow = permanent, transient, slow
        self.more_retries = more_retries
        self.seconds = seconds
        self.shapes = [*SHAPES, *["wide"] * (6 if wide else 0)]
        self.count = 0

    def nodes(self, n_tasks: int, *, depth: int = 0, n_given: int = 0, only_tasks: bool = False) -> tuple[Node, ...]:
        """Make nodes of about so many tasks."""
        found: list[Node] = []
        known = [-1 - k for k in range(n_given)]
        lists: list[int] = []
        first = self.count
        while self.count - first < n_tasks:
            kind = self._kind(depth, only_tasks=only_tasks or self.is_pool)
            if kind == "map":
                new = self._group(known)
            elif kind == "when":
                new = self._branching(known)
            elif kind == "subflow":
                n_taken = self.chance.randint(0, min(3, len(known)))
                node = self._node("subflow", known, n_inputs=n_taken, plain=True)
                inner = self.nodes(self.chance.randint(1, 6), depth=depth + 1, n_given=len(node.inputs))
                new = [node._replace(parts=(inner,))]
            elif kind == "fan":
                if not lists:
                    source = self._node("task", known, shape="list", plain=True)
                    found.append(source)
                    lists.append(source.number)
                fan = self._node("fan", known, n_inputs=0)
                new = [fan._replace(inputs=(self.chance.choice(lists),))]
            else:
                new = [self._node(kind, known)]
            found += new
            known += [node.number for node in new]
        return tuple(found)

    def _kind(self, depth: int, *, only_tasks: bool) -> str:
        if only_tasks:
            return "task" if self.is_pool or self.chance.random() < 0.7 else "map"
        kinds = {"task": 10, "map": 4, "shell": 0.4, "fan": 1.5, "when": 1.5, "subflow": 1.5 if depth < 2 else 0}
        return self.chance.choices(list(kinds), list(kinds.values()))[0]

    def _number(self) -> int:
        self.count += 1
        return self.count

    def _node(
        self, kind: str, known: list[int], *, n_inputs: int | None = None, shape: str = "", plain: bool = False
    ) -> Node:
        chance, number = self.chance, self._number()
        recent = known[-12:] if chance.random() < 0.7 else known
        n_inputs = min(chance.choice([0, 1, 1, 2, 2, 3, 4]), len(recent)) if n_inputs is None else n_inputs
        inputs = tuple(chance.sample(recent, n_inputs)) if recent else ()
        if kind == "shell":
            inputs = ()
        pool_of_after = [other for other in recent if other >= 0]
        is_tied = not self.is_pool and pool_of_after and chance.random() < 0.15
        after = (chance.choice(pool_of_after),) if is_tied else ()
        spec, options, fallback, undone = self._fate(number, kind, shape, plain=plain)
        return Node(kind, spec, inputs, after, options, fallback, undone)

    def _fate(self, number: int, kind: str, shape: str, *, plain: bool) -> tuple[Spec, Any, str, bool]:
        """Decide what is to happen to a task, and which options let it."""
        chance = self.chance
        shape = shape or chance.choice(self.shapes)
        job_table, faults, always = chance.random(), [], ""
        if job_table < self.permanent:
            always = self._fault()
        elif job_table < self.permanent + self.transient:
            faults = [self._fault() for _ in range(chance.choice([1, 1, 2]))]
        elif job_table < self.permanent + self.transient + 0.04:
            faults, always = [], chance.choice(HARMLESS)
        if kind == "shell" or (kind == "subflow" and always == "unpicklable value"):
            faults, always = [], "raise" if always in ERRORS else ""
        if kind == "subflow":
            faults = [fault for fault in faults if fault != "unpicklable value"]
            always = "" if always in HARMLESS else always
        options: dict[str, Any] = {}
        wanted = len(faults) + self.more_retries
        hangs = {*faults, always} & {"hang", "stop"}
        wanted += 2 * bool(hangs)  # for attempts that are late because the machine is busy
        if wanted or chance.random() < 0.2:
            options["retries"] = wanted + chance.choice([0, 0, 1])
        if hangs:
            options["timeout"] = SHORT_SECONDS
        elif chance.random() < 0.1:
            options["timeout"] = LONG_SECONDS
        if "memory" in {*faults, always}:
            options["memory"] = MEMORY
        fallback, undone = "", False
        if not self.is_pool and kind != "shell" and not plain:
            if kind != "fan" and chance.random() < (0.5 if always in ERRORS else 0.06):
                fallback = chance.choice(["value", "call", "call", "skip", "again, call"])
            if chance.random() < 0.2:
                options["effects"] = True
                undone = chance.random() < 0.8
            if chance.random() < 0.05:
                options["cache"] = False
        seconds = chance.choice([0.0, 0.3, 1.0]) * self.seconds
        spec = Spec(number, shape, tuple(faults), always, round(seconds, 4))
        return spec, tuple(sorted(options.items())), fallback, undone

    def _fault(self) -> str:
        return self.chance.choice(SLOW) if self.chance.random() < self.slow else self.chance.choice(COMMON)

    def _group(self, known: list[int]) -> list[Node]:
        """Make tasks that are declared at once: their options are the same, their faults are not."""
        slow, self.slow = self.slow, 0.0  # a limit would be that of all
        first = self._node("map", known)
        group = [first]
        for _ in range(self.chance.choice([0, 1, 3, 6, 12, 40])):
            other = self._node("map", known)
            spec = other.spec
            retries = dict(first.options).get("retries", 0)
            if len(spec.faults) > retries:
                spec = spec._replace(faults=(), always="")
            group.append(first._replace(spec=spec, inputs=other.inputs))
        self.slow = slow
        return [node._replace(group=first.number) for node in group]

    def _branching(self, known: list[int]) -> list[Node]:
        condition = self._node("task", known, shape="bit")
        then = self._branch([*known, condition.number])
        otherwise = self._branch([*known, condition.number]) if self.chance.random() < 0.7 else ()
        node = Node("when", Spec(self._number(), "either"), (condition.number,), parts=(then, otherwise))
        return [condition, node]

    def _branch(self, known: list[int]) -> tuple[Node, ...]:
        found: list[Node] = []
        for _ in range(self.chance.randint(1, 3)):
            found.append(self._node("task", [*known, *(node.number for node in found)]))
        return tuple(found)
