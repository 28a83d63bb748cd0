"""What a run of random nodes may come to: statuses, values, errors, executions, compensations, events.

A node's outcome is judged by those of the nodes that it waits for, as they were: so the same rules hold for runs that
failed, were called off, or lost workers to whatever is outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chaos_graphs as graphs
from chaos_graphs import ERRORS, Node

import forgepar as fp
from forgepar.records import events as kinds

RAN = {"completed", "cached", "compensated"}


class Found(NamedTuple):
    """What became of a node: whether it has a value, and the one that it is to have."""

    has: bool
    value: Any = None


class Rules(NamedTuple):
    """What may become of a run.

    Attributes:
        halts: it may end before all is done.
        is_disturbed: workers are killed from outside.
        survives: tasks have retries enough for all of those kills.
        is_mended: tasks meet no faults.
        is_resumed: an earlier run left values in its store.
        others: what tasks may fail with besides.
    """

    halts: bool = False
    is_disturbed: bool = False
    survives: bool = False
    is_mended: bool = False
    is_resumed: bool = False
    others: tuple[type[BaseException], ...] = ()

    @property
    def disturbs(self) -> bool:
        """Whether tasks may fail though they meet no fault of their own."""
        return (self.is_disturbed and not self.survives) or bool(self.others)


class Judge:
    """Goes through the nodes of a run in their order.

    Args:
        records: a record a task, by name.
        errors: what tasks failed with, by name.
        rules: what may become of the run.
    """

    def __init__(self, records: dict[str, Any], errors: dict[str, Exception], rules: Rules) -> None:
        self._records, self._errors, self._rules = records, errors, rules
        self.values: dict[str, Any] = {}  # by task name, what those are to have that have one
        self.nodes: dict[str, Node] = {}

    def workflow(self, nodes: Sequence[Node], prefix: str = "", given: Sequence[Found] = ()) -> Found:
        """Judge the nodes of a workflow; return what became of the last."""
        found: dict[int, Found] = {-1 - k: value for k, value in enumerate(given)}
        places: Counter[int] = Counter()
        self._level(nodes, prefix, found, places, gate=Found(has=True, value=True), n_joins=[0])
        return found[nodes[-1].number]

    def _level(
        self,
        nodes: Sequence[Node],
        prefix: str,
        found: dict[int, Found],
        places: Counter[int],
        *,
        gate: Found,
        n_joins: list[int],
        is_taken: bool = True,
    ) -> None:
        for node in nodes:
            name = f"{prefix}t{node.number}"
            if node.kind == "map":
                name = f"{prefix}m{node.group}-{places[node.group]}"
                places[node.group] += 1
            waits_for = [found[number] for number in (*node.inputs, *node.after)]
            is_ready = gate.has and all(other.has for other in waits_for)
            inputs = [found[number].value for number in node.inputs]
            if node.kind == "when":
                found[node.number] = self._branching(node, prefix, found, places, n_joins)
            elif node.kind == "fan":
                found[node.number] = self._fan(node, name, inputs, is_ready=is_ready)
            elif node.kind == "subflow":
                given = [found[number] for number in node.inputs]
                found[node.number] = self._subflow(node, name, given, is_ready=is_ready)
            else:
                found[node.number] = self._task(node, name, inputs, is_ready=is_ready, is_taken=is_taken)

    def _branching(
        self, node: Node, prefix: str, found: dict[int, Found], places: Counter[int], n_joins: list[int]
    ) -> Found:
        number = n_joins[0]
        n_joins[0] += 1
        suffix = f"-{number}" if number else ""
        condition = found[node.inputs[0]]
        gate = self._own(f"{prefix}condition{suffix}", is_ready=condition.has)
        chosen = bool(condition.value)
        for part, is_chosen in zip(node.parts, (chosen, not chosen), strict=True):
            is_taken = not gate.has or is_chosen
            self._level(part, prefix, found, places, gate=gate, n_joins=n_joins, is_taken=is_taken)
        part = node.parts[0] if chosen else node.parts[1]
        value = found[part[-1].number] if part else Found(has=True)
        joined = self._own(f"{prefix}either{suffix}", is_ready=gate.has and value.has)
        if joined.has:
            self.values[f"{prefix}either{suffix}"] = value.value
        return Found(joined.has, value.value)

    def _fan(self, node: Node, name: str, inputs: list[Any], *, is_ready: bool) -> Found:
        if not self._own(name, is_ready=is_ready).has:
            return Found(has=False)
        items: list[Found] = []
        for place, value in enumerate(inputs[0]):
            spec = node.spec if value % 100 == 0 else node.spec._replace(faults=(), always="")
            part = node._replace(spec=spec, kind="task")
            items.append(self._task(part, f"{name}/{name.rpartition('/')[2]}-{place}", [value], is_ready=True))
        has = self._own(f"{name}/output", is_ready=all(part.has for part in items)).has
        if has:
            self.values[name] = [part.value for part in items]
        return Found(has, [part.value for part in items])

    def _subflow(self, node: Node, name: str, given: list[Found], *, is_ready: bool) -> Found:
        if not self._task(node, name, [], is_ready=is_ready).has:
            return Found(has=False)
        del self.values[name]
        last = self.workflow(node.parts[0], f"{name}/", given)
        has = self._own(f"{name}/output", is_ready=last.has).has
        if has:
            self.values[name] = last.value
        return Found(has, last.value)

    def _own(self, name: str, *, is_ready: bool) -> Found:
        """Judge one of forgepar's own tasks."""
        return self._task(Node("own", graphs.Spec(0, "none")), name, [], is_ready=is_ready)

    def _task(self, node: Node, name: str, inputs: list[Any], *, is_ready: bool, is_taken: bool = True) -> Found:
        rules, record = self._rules, self._records.pop(name, None)
        assert record is not None, f"task {name!r} has no record"
        self.nodes[name] = node
        if not (is_taken and is_ready):
            allowed = {"skipped"} | ({"cancelled"} if rules.halts else set())
            assert record.status in allowed, f"{name!r} is {record.status}, though it cannot run: {node}"
            return Found(has=False)
        is_mended = rules.is_mended and node.kind != "shell"  # a command line stays what it is
        fails = "" if is_mended or node.spec.always not in ERRORS else node.spec.always
        allowed = self._allowed(node, fails)
        assert record.status in allowed, f"{name!r} is {record.status}, not one of {sorted(allowed)}: {node} {record}"
        if record.status == "failed":
            self._judge_error(name, node, fails)
        if record.status not in RAN:
            return Found(has=False)
        assert node.undone or record.status != "compensated", f"{name!r} is compensated by nothing"
        if record.fallback not in (None, "retry", "skip") and record.status != "cached":
            assert fails or rules.disturbs or node.is_rushed, (
                f"{name!r} took its fallback, though it has no fault: {node}"
            )
            value = "a value instead" if node.fallback == "value" else "stands in"
        elif node.kind == "shell":
            value = fp.ToolResult("", 0, f"{node.number} {inputs[0] if inputs else 0}\n", "", 0.0)
        else:
            large = [graphs.LARGE] if node.kind == "map" and node.group % 3 == 0 else []
            value = graphs.build(node.spec, [*inputs, *large])
        if node.kind != "own":
            self.values[name] = value
        return Found(has=True, value=value)

    def _allowed(self, node: Node, fails: str) -> set[str]:
        """Return what may be the status of a task that has all that it waits for."""
        rules = self._rules
        allowed = {"completed", "compensated"}
        if rules.is_resumed and not fails:
            allowed.add("cached")
        if fails:
            allowed = {"": {"failed"}, "skip": {"skipped"}}.get(node.fallback, allowed)
        if rules.disturbs or node.is_rushed:
            allowed |= {"failed"} | ({"skipped"} if node.fallback == "skip" else set())
        if rules.halts:
            allowed.add("cancelled")
            if fails or node.spec.faults:  # nothing is tried again then
                allowed.add("failed")
        return allowed

    def _judge_error(self, name: str, node: Node, fails: str) -> None:
        rules, error = self._rules, self._errors[name]
        expected = ERRORS.get(fails, ()) + rules.others
        if rules.halts:
            expected += tuple(kind for fault in node.spec.faults for kind in ERRORS[fault])
        if fails and node.kind == "shell":
            expected = (fp.ToolFailed,)
        if node.is_rushed:
            expected += (fp.TaskTimeout,)
        if rules.is_disturbed:
            expected += (fp.WorkerDied,)
        assert isinstance(error, expected), f"{name!r} failed with {error!r}, not with one of {expected}: {node}"


class Notes(NamedTuple):
    """What tasks wrote down while they ran, in order.

    Attributes:
        begun: task and attempt.
        ended: the same.
        undone: task and digest of its value.
    """

    begun: list[tuple[str, int]]
    ended: list[tuple[str, int]]
    undone: list[tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> Notes:
        notes = cls([], [], [])
        for line in path.read_text().splitlines() if path.exists() else ():
            what, *words = line.split(" ")
            if what in ("begun", "ended"):
                getattr(notes, what).append((words[0], int(words[1])))
            elif what == "undone":
                notes.undone.append((words[0], words[1]))
        return notes

    def of(self, *, is_pool: bool) -> Notes:
        """Return those of a pool's jobs, whose names begin with a p, or of tasks."""
        return Notes(*([line for line in lines if line[0].startswith("p") == is_pool] for lines in self))


def check_run(result: Any, nodes: Sequence[Node], notes: Notes, rules: Rules) -> None:
    """See that all that a run's result tells is what its nodes may come to, and what they noted themselves."""
    notes = notes.of(is_pool=False)
    records = {record.name: record for record in result.records}
    assert len(records) == len(result.records)
    rest = dict(records)
    judge = Judge(rest, result.errors, rules)
    judge.workflow(nodes)
    assert not rest, f"tasks that nobody declared: {sorted(rest)}"
    _check_values(result, records, judge)
    _check_executions(result, records, judge, notes, rules)
    _check_rollback(result, records, judge, notes, rules)
    assert fp.AuditLog(result.events).replay() == result.standing()


def check_end(result: Any, others: Sequence[Exception], *, is_late: bool) -> None:
    """See that a run failed by its tasks, and by the clock where it was given little time."""
    assert result.status == "failed" or is_late, f"a run that failed is {result.status}"
    assert len(others) <= is_late, others
    assert all(isinstance(error, fp.RunTimeout) for error in others), others


def _check_values(result: Any, records: dict[str, Any], judge: Judge) -> None:
    for name, value in judge.values.items():
        try:
            got = result[name]
        except (fp.ResultReleased, fp.MissingResult):
            continue
        assert graphs.brief(got) == graphs.brief(value), f"{name!r} has another value: {got!r}, not {value!r}"
    for name, record in records.items():
        if record.status not in RAN:
            try:
                got = result[name]
            except (fp.ResultReleased, fp.MissingResult):
                continue
            raise AssertionError(f"{name!r} is {record.status} and has a value: {got!r}")


def _check_executions(result: Any, records: dict[str, Any], judge: Judge, notes: Notes, rules: Rules) -> None:
    begun = Counter(notes.begun)
    assert max(begun.values(), default=1) == 1, f"attempts that began twice: {begun.most_common(3)}"
    told = {(event.task, event.attempt) for event in result.events if isinstance(event, kinds.WorkflowTaskStarted)}
    starts = Counter((e.task, e.attempt) for e in result.events if isinstance(e, kinds.WorkflowTaskStarted))
    called = Counter(
        (e.task, e.attempt) for e in result.events if isinstance(e, kinds.WorkflowToolFallback) and e.kind == "call"
    )  # a worker begins with that as well
    twice = {start: n for start, n in starts.items() if n > 1 + called[start]}
    assert not twice, f"starts told twice: {twice}"
    done = Counter(event.task for event in result.events if isinstance(event, kinds.WorkflowTaskCompleted))
    assert max(done.values(), default=1) == 1, f"completed twice: {done.most_common(3)}"
    for name, attempt in begun:
        record = records[name]
        assert record.status not in ("cached",), f"{name!r} ran, though it was taken from the store"
        assert attempt <= max(record.attempt, 1), f"attempt {attempt} of {name!r} began; {record}"
        is_told = (name, attempt) in told or record.status == "cancelled"
        assert is_told, f"attempt {attempt} of {name!r} began, and no event tells; {record}"
    for name, record in records.items():
        if record.status in ("completed", "compensated") and name in judge.nodes:
            node = judge.nodes[name]
            if node.kind in ("own", "shell", "fan") or record.fallback is not None:
                continue
            assert (name, record.attempt) in begun, f"{name!r} is completed, and did not run; {record}"
            n_ended = sum(other == name for other, _ in notes.ended)
            has_effects = dict(node.options).get("effects", False)
            assert n_ended >= 1, f"{name!r} is completed, and did not come to its end; {record}"
            is_once = n_ended == 1 or rules.is_disturbed  # a worker may be killed between its note and its report
            assert is_once or not has_effects, f"{name!r}, which has effects, ended {n_ended} times; {record}"
    tries = Counter(name for name, _ in begun)
    for name, n_tries in tries.items():
        node, options = judge.nodes[name], dict(judge.nodes[name].options)
        if options.get("effects"):
            most = 1 + options.get("retries", 0) + (node.fallback == "again, call")
            assert n_tries <= most, f"{name!r}, which has effects, ran {n_tries} times, {most} at most allowed"


def _check_rollback(result: Any, records: dict[str, Any], judge: Judge, notes: Notes, rules: Rules) -> None:
    undone = Counter(name for name, _ in notes.undone)
    assert max(undone.values(), default=1) == 1, f"undone twice: {undone.most_common(3)}"
    report = result.rollback
    assert set(report.compensated) == {name for name, record in records.items() if record.status == "compensated"}
    assert set(report.compensated) <= set(undone), f"{set(report.compensated) - set(undone)} not undone"
    assert set(undone) <= {*report.compensated, *report.failed}
    assert rules.disturbs or not report.failed, f"not undone: {report.failed}"
    layers = [records[name].layer for name, _ in notes.undone]
    assert layers == sorted(layers, reverse=True), f"undone in another order: {notes.undone}"
    for name, digest in notes.undone:
        assert digest == graphs.brief(judge.values[name]), f"{name!r} was undone with another value"


def must_be_cached(done: Container[str], nodes: Iterable[Node]) -> set[str]:
    """Return the names of tasks that a later run of the same store must not run again.

    Args:
        done: the tasks that have a value of their own in the store.
        nodes: the workflow; of its subflows, fan-outs and branches nothing is said.
    """
    found: set[str] = set()
    sure: dict[int, bool] = {}
    places: Counter[int] = Counter()
    for node in nodes:
        name = f"t{node.number}"
        if node.kind == "map":
            name = f"m{node.group}-{places[node.group]}"
            places[node.group] += 1
        is_kept = node.kind in ("task", "map") and name in done and dict(node.options).get("cache", True)
        sure[node.number] = is_kept and all(sure[number] for number in (*node.inputs, *node.after))
        if sure[node.number]:
            found.add(name)
    return found


def kept_by(result: Any) -> set[str]:
    """Return the names of the tasks whose values a run's store has."""
    records = (record for record in result.records if record.status in ("completed", "cached"))
    return {record.name for record in records if record.fallback is None} - set(result.not_stored)


def check_jobs(futures: dict[int, Any], nodes: Sequence[Node], notes: Notes, rules: Rules) -> None:
    """See the same of jobs of a `ForgeExecutor`, all of which are done."""
    notes = notes.of(is_pool=True)
    begun = Counter(notes.begun)
    assert max(begun.values(), default=1) == 1, f"attempts that began twice: {begun.most_common(3)}"
    ended = Counter(name.rpartition("-")[0] for name, _ in notes.ended)
    values: dict[int, Found] = {}
    for node in nodes:
        future = futures[node.number]
        assert future.done(), f"job {node.number} is not done"
        inputs = [values[number] for number in node.inputs]
        error = future.exception()
        fails = node.spec.always if node.spec.always in ERRORS else ""
        if not all(value.has for value in inputs):
            assert error is not None, f"job {node.number} has a value, though it takes that of one that failed"
            assert not ended[f"p{node.number}"], f"job {node.number} ran without its inputs"
        elif error is not None:
            expected = ERRORS.get(fails, ()) + (fp.WorkerDied,) * rules.is_disturbed + rules.others
            expected += (fp.TaskTimeout,) * node.is_rushed
            assert fails or rules.disturbs or node.is_rushed, f"job {node.number} failed with {error!r}: {node}"
            assert isinstance(error, expected), f"job {node.number} failed with {error!r}, not with {expected}: {node}"
        else:
            assert not fails, f"job {node.number} has a value, though it fails: {node}"
            value = graphs.build(node.spec, [value.value for value in inputs])
            got = future.result()
            assert graphs.brief(got) == graphs.brief(value), f"job {node.number}: {got!r}, not {value!r}; {node}"
            assert ended[f"p{node.number}"] >= 1
            values[node.number] = Found(has=True, value=value)
            continue
        values[node.number] = Found(has=False)
