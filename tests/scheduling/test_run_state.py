"""The pure machine, driven without a process or a clock."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forgepar as fp
from forgepar.scheduling.effects import FellBack, Halted, LayerCompleted, LayerStarted, Retried, Skipped, TaskFailed
from forgepar.scheduling.run_state import InvalidState, RunPolicy, RunState, Status, kept_tasks
from forgepar.workflow.plan import Plan, as_tasks


def work(*values):
    return values


def other_work(*values):
    return values


@st.composite
def parents_of(draw):
    n = draw(st.integers(1, 25))
    return [draw(st.lists(st.integers(0, node - 1), max_size=3)) if node else [] for node in range(n)]


def plan_of(parents, retries=0, fallback=0):
    """A plan of two callables in turn, so that layers have several templates."""
    wf = fp.Workflow()
    options = {"retries": retries} if retries else {}
    if fallback:
        options["fallback"] = fp.SkipFallback()
    fns = [fp.task(**options)(work), fp.task(**options)(other_work)]
    handles = []
    for node, mine in enumerate(parents):
        handles.append(wf.add(fns[node % 2], *[handles[parent] for parent in mine]))
    return Plan(wf)


def numbers(tasks):
    return [int(task) for task in tasks]


def drive(state, plan, choose):
    """Run the machine to its end: `choose` draws how many to take and which running task ends next."""
    order, running = [], []
    effects = list(state.begin())
    while not state.finished:
        head = state.head()
        if head is not None and (not running or choose(2)):
            template, ready = head
            assert ready >= 1
            tasks = numbers(state.take(1 + choose(4)))
            assert {int(plan.template_of[task]) for task in tasks} == {template}
            assert tasks == sorted(tasks)
            order += tasks
            running.append(tasks)
        else:
            done = running.pop(choose(len(running)))
            for task in done:  # one by one: outcomes may come in any parts
                yield "done", task
                effects += state.completed(range(task, task + 1))
    yield "end", (order, effects)


@given(parents_of(), st.data(), st.sampled_from(["layers", "eager"]))
def test_each_task_is_handed_out_once_after_its_parents(parents, data, schedule):
    plan = plan_of(parents)
    state = RunState(plan, RunPolicy(schedule=schedule))
    done = []
    handed_out = None
    for what, value in drive(state, plan, lambda n: data.draw(st.integers(0, n - 1))):
        if what == "done":
            done.append(value)
            assert set(parents[value]) <= set(done[:-1])
        else:
            handed_out, _ = value
    assert sorted(handed_out) == sorted(done) == list(range(len(parents)))
    assert (state.status == Status.COMPLETED).all()


@given(parents_of(), st.data())
def test_a_layer_begins_only_when_the_last_is_settled(parents, data):
    plan = plan_of(parents)
    state = RunState(plan, RunPolicy())
    *steps, (_, (order, effects)) = list(drive(state, plan, lambda n: data.draw(st.integers(0, n - 1))))
    layers = plan.layers[order].tolist()
    assert layers == sorted(layers)
    done = [plan.layers[task] for _, task in steps]
    assert done == sorted(done)
    counts = np.bincount(plan.layers).tolist()
    expected = []
    for layer, count in enumerate(counts):
        expected += [LayerStarted(layer, count), LayerCompleted(layer, count)]
    assert effects == expected


TRANSITION = re.compile(r"^ +([A-Z]+) +([A-Z]+) +([a-z_, ]+)$", re.MULTILINE)
TRANSITIONS = {
    (before, after, method)
    for before, after, methods in TRANSITION.findall(RunState.__doc__)
    for method in methods.split(", ")
}


class Watched:
    """A run state that is checked after each call, and whose changes of status are noted."""

    def __init__(self, state, seen):
        self.state = state
        self.seen = seen

    def __getattr__(self, name):
        found = getattr(self.state, name)
        if not callable(found):
            return found

        def watched(*args, **kwargs):
            before = self.state.status.copy()
            returned = found(*args, **kwargs)
            changed = np.flatnonzero(before != self.state.status[: len(before)])
            self.seen |= {(Status(before[i]).name, Status(self.state.status[i]).name, name) for i in changed}
            self.state.validate()
            return returned

        return watched


OUTCOMES = ["completed", "completed", "failed", "put_back", "repeated", "cancelled", "replaced", "left_out"]


def play(parents, choose, seen, *, schedule, fail_fast):
    """Drive a machine at random, as a run may."""
    plan = plan_of(parents, retries=choose(2), fallback=choose(2))
    state = Watched(RunState(plan, RunPolicy(schedule=schedule, fail_fast=fail_fast)), seen)
    if choose(3) == 0:
        state.restore(np.flatnonzero(plan.layers == 0).astype(np.int32)[:1])
        state.pass_on(np.flatnonzero(plan.layers == 0).astype(np.int32)[:1])
    state.begin()
    while not state.finished:
        if state.head() is None:
            assert state.halted or state.n_out, "nothing runs and nothing is ready"
        tasks = numbers(state.take(1 + choose(3))) if state.head() is not None else []
        if choose(20) == 0 and not state.halted:
            state.halt()
        for task in tasks:
            what = OUTCOMES[choose(len(OUTCOMES))]
            if what == "completed" or (what == "cancelled" and not state.halted):
                state.completed(range(task, task + 1))
            elif what == "put_back":
                state.put_back(int(plan.template_of[task]), range(task, task + 1))
            elif what == "repeated":
                state.repeated(task)
                state.put_back(int(plan.template_of[task]), range(task, task + 1))
            elif what == "cancelled":
                state.cancelled(range(task, task + 1))
            else:
                effects = state.failed(task)
                fell_back = any(isinstance(effect, FellBack) for effect in effects)
                if fell_back and what == "replaced":
                    state.replaced(task)
                elif fell_back:
                    state.left_out(task)
                elif any(isinstance(effect, Retried) for effect in effects):
                    state.retry(task)
    done = np.flatnonzero(state.status == Status.COMPLETED)
    if state.halted and len(done):
        state.compensated(as_tasks(done[-1:].astype(np.int32)))
    state.end()


@given(parents_of(), st.data(), st.sampled_from(["layers", "eager"]), st.booleans())
def test_no_call_breaks_an_invariant_or_makes_a_change_that_is_not_in_the_table(parents, data, schedule, fail_fast):
    seen = set()
    play(parents, lambda n: data.draw(st.integers(0, n - 1)), seen, schedule=schedule, fail_fast=fail_fast)
    assert seen <= TRANSITIONS


def test_every_change_in_the_table_happens():
    seen = set()
    for seed in range(400):
        rng = random.Random(seed)
        parents = [[rng.randrange(node) for _ in range(rng.randrange(3))] if node else [] for node in range(8)]
        play(parents, rng.randrange, seen, schedule=["layers", "eager"][seed % 2], fail_fast=seed % 3 == 0)
    state = Watched(RunState(plan_of([[], []]), RunPolicy()), seen)
    state.begin()
    state.take(1)
    state.halt()
    state.end()
    gate = fp.Workflow()
    fp.when(gate, gate.add(bool, 1), lambda: gate.add(work), lambda: gate.add(other_work))
    plan = gate.plan()
    state = Watched(RunState(plan, RunPolicy()), seen)
    state.begin()
    state.take(1)
    (number,) = plan.branchings
    state.decide(number, is_true=True)
    assert seen == TRANSITIONS


def test_broken_invariants_are_told():
    state = RunState(plan_of([[], [0]]), RunPolicy())
    state.begin()
    state.status[1] = Status.RUNNING
    with pytest.raises(InvalidState, match="1 tasks are running, but 0 are handed out"):
        state.validate()
    state.take(1)
    state.completed(range(1))
    state.status[:] = [Status.PENDING, Status.COMPLETED]
    with pytest.raises(InvalidState, match="Task 'other_work' has started, but its dependency 'work' is not done"):
        state.validate()
    state.halt()
    state.status[0] = Status.PENDING
    with pytest.raises(InvalidState, match="The run was halted, but task 'work' is still pending"):
        state.validate()


def test_tasks_put_back_are_handed_out_again():
    plan = plan_of([[]] * 6)
    state = RunState(plan, RunPolicy())
    state.begin()
    template, ready = state.head()
    assert ready == 6
    tasks = state.take(3)
    assert state.head()[1] == 3
    state.put_back(template, tasks[1:])
    assert state.head() == (template, 5)
    assert numbers(state.take(1)) == numbers(tasks[1:2])
    assert numbers(state.take(9)) == numbers(tasks[2:])


def test_a_failure_is_retried_as_often_as_allowed():
    plan = plan_of([[]], retries=2)
    state = RunState(plan, RunPolicy())
    state.begin()
    for attempt in (2, 3):
        state.take(1)
        assert state.failed(0) == [Retried(0, attempt)]
        assert state.status[0] == Status.PENDING
        assert state.head() is None
        assert not state.finished
        state.retry(0)
    state.take(1)
    assert state.failed(0) == [TaskFailed(0, 3), Halted()]
    assert state.finished


def test_a_failure_that_is_not_worth_it_is_not_retried():
    state = RunState(plan_of([[]], retries=2), RunPolicy())
    state.begin()
    state.take(1)
    assert state.failed(0, may_retry=False) == [TaskFailed(0, 1), Halted()]


def test_what_waits_for_a_retry_is_cancelled_with_the_run():
    plan = plan_of([[], []], retries=1)
    state = RunState(plan, RunPolicy())
    state.begin()
    state.take(1)
    state.failed(0)
    state.halt()
    state.retry(0)
    assert state.head() is None
    assert state.finished
    assert state.status.tolist() == [Status.CANCELLED] * 2


def test_fail_fast_hands_out_nothing_more():
    plan = plan_of([[], [], [], [0]])
    state = RunState(plan, RunPolicy())
    state.begin()
    running = numbers(state.take(1)) + numbers(state.take(1))
    assert Halted() in state.failed(running[0])
    assert state.head() is None
    assert not state.finished
    state.completed(range(running[1], running[1] + 1))
    assert state.finished
    assert sorted(Status(s).name for s in state.status.tolist()) == ["CANCELLED", "CANCELLED", "COMPLETED", "FAILED"]


def test_what_comes_back_after_the_end_is_cancelled():
    plan = plan_of([[], []])
    state = RunState(plan, RunPolicy())
    state.begin()
    first, second = numbers(state.take(1)), numbers(state.take(1))
    state.failed(first[0])
    state.put_back(int(plan.template_of[second[0]]), range(second[0], second[0] + 1))
    assert state.status[second[0]] == Status.CANCELLED
    assert state.finished


@given(parents_of(), st.data(), st.sampled_from(["layers", "eager"]))
def test_without_fail_fast_descendants_are_skipped_and_all_else_runs(parents, data, schedule):
    plan = plan_of(parents)
    failing = data.draw(st.sets(st.integers(0, len(parents) - 1), max_size=3))
    state = RunState(plan, RunPolicy(fail_fast=False, schedule=schedule))
    effects = list(state.begin())
    while not state.finished:
        for task in numbers(state.take(data.draw(st.integers(1, 4)))):
            effects += state.failed(task) if task in failing else state.completed(range(task, task + 1))
    doomed = set()
    for node, mine in enumerate(parents):
        if any(parent in doomed or parent in failing for parent in mine):
            doomed.add(node)
    expected = [
        Status.SKIPPED if node in doomed else Status.FAILED if node in failing else Status.COMPLETED
        for node in range(len(parents))
    ]
    assert state.status.tolist() == expected
    told = {int(task) for effect in effects if isinstance(effect, Skipped) for task in effect.tasks}
    assert told == doomed


def test_eager_takes_the_longest_remaining_path_first():
    # 0 -> 3 -> 4 is a long way after weighing; 1 and 2 are alone.
    plan = plan_of([[], [], [], [0], [3]])
    state = RunState(plan, RunPolicy(schedule="eager"))
    state.begin()
    assert numbers(state.take(1)) == [0]
    state.weigh_tasks(np.array([1.0, 2.0, 9.0, 1.0, 1.0]))
    assert numbers(state.take(1)) == [2]
    state.completed(range(1))
    assert numbers(state.take(1)) == [1]  # as long as what is behind 3, and the lower number


def test_weighing_takes_what_is_unknown_for_typical():
    plan = plan_of([[], [], [0], [1]])
    state = RunState(plan, RunPolicy(schedule="eager"))
    state.begin()
    state.weigh([float("nan")] * len(plan.templates))
    seconds = [float("nan")] * len(plan.templates)
    seconds[int(plan.template_of[1])] = 4.0
    state.weigh(seconds)
    assert state.head()[1] == 2


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_taking_is_bounded_and_counts_what_is_left(schedule):
    plan = plan_of([[]] * 10)
    state = RunState(plan, RunPolicy(schedule=schedule))
    state.begin()
    assert state.head()[1] == 10
    taken = len(state.take(3))
    assert 1 <= taken <= 3
    assert state.head()[1] == 10 - taken


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_what_is_set_aside_lets_others_go_first_and_comes_back(schedule):
    wf = fp.Workflow()
    large, small = wf.map(abs, range(3)), wf.map(len, ["a", "b"])
    wf.add(max, [large, small])
    state = RunState(wf.plan(), RunPolicy(schedule=schedule))
    state.begin()
    first = state.head()
    assert first[1] == 5
    state.park()
    other, ready = state.head()
    assert other != first[0]
    taken = list(state.take(10))
    assert ready in (2, 3)
    assert len(taken) == ready
    assert state.head() is None
    assert not state.finished
    state.unpark()
    assert state.head() == (first[0], 5 - ready)
    state.completed(as_tasks(np.array(taken, np.int32)))
    back = state.take(10)
    assert sorted([*taken, *back]) == [0, 1, 2, 3, 4]
    state.completed(back)
    assert list(state.take(10)) == [5]


# What an earlier run did


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@given(parents=parents_of(), data=st.data())
def test_what_an_earlier_run_did_is_not_handed_out_and_nothing_waits_for_it(schedule, parents, data):
    plan = plan_of(parents)
    done = data.draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, unique=True))
    state = RunState(plan, RunPolicy(schedule=schedule))
    state.restore(np.array(sorted(done), np.int32))
    state.pass_on(np.array(sorted(done), np.int32))
    *_, (_, (order, _)) = drive(state, plan, lambda n: data.draw(st.integers(0, n - 1)))
    assert sorted(order) == sorted(set(range(len(parents))) - set(done))
    assert state.finished


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("is_true", [False, True])
@pytest.mark.parametrize("with_join", [False, True])
def test_a_branch_that_an_earlier_run_decided_against_is_not_handed_out(schedule, is_true, with_join):
    wf = fp.Workflow()
    gate = fp.when(wf, wf.add(work, is_true), lambda: wf.add(work, 1), lambda: wf.add(other_work, 2))
    wf.add(work, gate)
    plan = Plan(wf)
    ((condition, branching),) = plan.branchings.items()
    taken, left = (branching.then, branching.otherwise) if is_true else (branching.otherwise, branching.then)
    done = np.array([0, condition, *taken, *([branching.join] * with_join)], np.int32)
    state = RunState(plan, RunPolicy(schedule=schedule))
    state.restore(done)
    state.decide(condition, is_true=is_true)
    state.pass_on(done)
    *_, (_, (order, _)) = drive(state, plan, lambda n: n - 1)
    assert order == [task for task in range(plan.n_tasks) if task not in {*done.tolist(), *left}]
    assert state.finished
    assert [int(task) for task in np.flatnonzero(state.status == Status.SKIPPED)] == list(left)


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("decision", [True, False])
@pytest.mark.parametrize("fails_first", [True, False])
def test_what_a_branch_lacks_matters_if_it_runs_and_whenever_that_is_known(schedule, decision, fails_first):
    wf = fp.Workflow()
    bad, condition = wf.add(work), wf.add(other_work)
    join = fp.when(wf, condition, lambda: wf.add(work), lambda: wf.add(work, wf.add(work, bad)))
    behind = wf.add(work, join)
    plan = Plan(wf)
    state = RunState(plan, RunPolicy(fail_fast=False, schedule=schedule))
    state.begin()
    gate, running, ended = next(iter(plan.branchings)), set(), []
    if not fails_first and schedule == "layers":
        pytest.skip("a layer that has not ended decides nothing")
    while not state.finished:
        while state.head() is not None:
            running.update(numbers(state.take(10)))
        is_time = fails_first or running == {bad.index}
        if bad.index in running and is_time:
            running.remove(bad.index)
            state.failed(bad.index)
            continue
        task = min(running - {bad.index})
        running.remove(task)
        if task == gate:
            state.decide(gate, is_true=decision)
        state.completed(range(task, task + 1))
        ended.append(task)
    expected = Status.COMPLETED if decision else Status.SKIPPED
    assert {state.status[join.index], state.status[behind.index]} == {expected}
    assert (behind.index in ended) == decision


# Figures and fallbacks


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_the_state_counts_what_is_out_and_what_is_settled(schedule):
    state = RunState(plan_of([[], [], [0], [], [1]]), RunPolicy(schedule=schedule, fail_fast=False))
    state.begin()
    assert (state.n_out, state.n_settled, state.status_is_bad, state.finished) == (0, 0, False, False)
    taken = [task for _ in range(2) for task in numbers(state.take(5))]
    assert sorted(taken) == [0, 1, 3]
    assert (state.n_out, state.n_settled) == (3, 0)
    state.completed(range(2))
    assert (state.n_out, state.n_settled, state.status_is_bad) == (1, 2, False)
    state.failed(3)
    assert (state.n_out, state.n_settled, state.status_is_bad, state.finished) == (0, 3, True, False)
    assert state.layer == (1 if schedule == "layers" else None)


def with_fallbacks(*steps, retries=0):
    wf = fp.Workflow()
    first = wf.add(fp.task(work).options(fallback=fp.ChainFallback(*steps), retries=retries))
    wf.add(other_work, wf.add(other_work, first))
    wf.add(work)
    return Plan(wf)


def failed_once_more(state, **how):
    """Fail the first task; hand it out again if there is another attempt."""
    effects = state.failed(0, **how)
    if isinstance(effects[0], Retried):
        state.retry(0)
        while numbers(state.take(1)) != [0]:
            pass
    return effects


def test_the_steps_of_a_fallback_are_taken_one_after_the_other_behind_the_retries():
    state = RunState(with_fallbacks(fp.RetryFallback(2), len, 5, retries=1), RunPolicy(fail_fast=False))
    state.begin()
    while state.n_out < 2:
        state.take(1)
    assert failed_once_more(state) == [Retried(0, 2)]
    stand_in = int(state._plan.template_of[0])
    for attempt, step, next_attempt, make_ready in (
        (2, 0, 3, lambda: state.retry(0)),
        (3, 1, 4, lambda: state.retry(0)),
        (4, 2, 4, lambda: state.stand_in(0, stand_in)),
    ):
        assert state.failed(0) == [FellBack(0, attempt, step)]
        assert (state.status[0], state.attempts[0]) == (Status.PENDING, next_attempt)
        make_ready()
        assert numbers(state.take(1)) == [0]
    assert state.failed(0) == [FellBack(0, 4, 3)]
    state.validate()
    assert state.replaced(0)[-1:] == []
    assert (state.status[0], state.n_out, state.n_settled) == (Status.COMPLETED, 1, 1)


@pytest.mark.parametrize("fail_fast", [False, True])
def test_once_the_steps_are_used_up_the_task_has_failed(fail_fast):
    state = RunState(with_fallbacks(len), RunPolicy(fail_fast=fail_fast, schedule="eager"))
    state.begin()
    while state.n_out < 2:
        state.take(1)
    assert state.failed(0) == [FellBack(0, 1, 0)]
    state.stand_in(0, int(state._plan.template_of[0]))
    assert numbers(state.take(1)) == [0]
    failed, after = state.failed(0)
    assert failed == TaskFailed(0, 1)
    if fail_fast:
        assert after == Halted()
        assert state.status.tolist() == [Status.FAILED, Status.CANCELLED, Status.CANCELLED, Status.RUNNING]
    else:
        assert (after.tasks.tolist(), after.cause) == ([1, 2], 0)
        assert state.status.tolist() == [Status.FAILED, Status.SKIPPED, Status.SKIPPED, Status.RUNNING]


def test_a_halted_run_takes_no_step_and_tries_nothing_again():
    for plan in (with_fallbacks(fp.RetryFallback(2), len), with_fallbacks(len, retries=3)):
        state = RunState(plan, RunPolicy())
        state.begin()
        while state.n_out < 2:
            state.take(1)
        state.halt()
        assert state.failed(0) == [TaskFailed(0, 1)]
        state.retry(0)
        state.stand_in(0, 0)
        assert state.head() is None
        state.validate()


def test_a_task_that_its_fallback_skips_takes_its_descendants_along():
    state = RunState(with_fallbacks(fp.SkipFallback()), RunPolicy())
    state.begin()
    while state.n_out < 2:
        state.take(1)
    assert state.failed(0) == [FellBack(0, 1, 0)]
    skipped, *_ = state.left_out(0)
    assert (skipped.tasks.tolist(), skipped.cause) == ([1, 2], 0)
    assert (state.n_settled, state.finished, state.status_is_bad) == (3, False, False)
    state.completed(range(3, 4))
    assert state.finished


def test_attempts_for_lost_workers_do_not_count_and_retries_do():
    state = RunState(plan_of([[]], retries=2), RunPolicy())
    state.begin()
    state.take(1)
    assert (state.tries(0), state.repeated(0), state.tries(0)) == (1, 2, 1)
    state.put_back(0, range(1))
    state.take(1)
    assert failed_once_more(state) == [Retried(0, 3)]
    assert (state.tries(0), state.repeated(0), state.tries(0)) == (2, 4, 2)
    assert failed_once_more(state) == [Retried(0, 5)]
    assert state.failed(0)[0] == TaskFailed(0, 5)


def test_callables_of_unknown_duration_weigh_as_the_mean_of_the_others(monkeypatch):
    wf = fp.Workflow()
    for fn in (work, other_work, abs, len):
        wf.add(fn, 1)
    state, given = RunState(Plan(wf), RunPolicy(schedule="eager")), []
    monkeypatch.setattr(state, "weigh_tasks", lambda seconds: given.append(seconds.tolist()))
    nan = float("nan")
    state.weigh([nan] * 4)
    state.weigh([2.0, nan, 7.0, nan])
    assert given == [[1.0] * 4, [2.0, 4.5, 7.0, 4.5]]


@pytest.mark.parametrize(("outputs", "kept"), [("leaves", [2, 3]), ("all", [0, 1, 2, 3]), ((1, 2), [1, 2]), ((), [])])
def test_the_result_keeps_the_outputs(outputs, kept):
    assert np.flatnonzero(kept_tasks(plan_of([[], [], [0], [1]]), RunPolicy(outputs=outputs))).tolist() == kept
