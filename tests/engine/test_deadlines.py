"""The clock's part of a run, with a clock that the tests turn."""

from __future__ import annotations

import math
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import strategies as st

import forgepar as fp
from forgepar.backends.base import Traits
from forgepar.backends.worker_board import mark
from forgepar.engine.deadlines import _SECOND_LOOK_SECONDS, TERM_SECONDS, Deadlines
from forgepar.scheduling.run_state import RunPolicy


class Slots:
    """A backend that tells what a test puts in."""

    traits = Traits()

    def __init__(self, n):
        self.positions = [0] * n
        self.starts = [0.0] * n

    def position(self, slot):
        return self.positions[slot]

    def started(self, slot):
        return self.starts[slot]


def watch_of(*options, policy=None, n_slots=1):
    """A watch over one task for each of some options, in layer 0."""
    wf = fp.Workflow()
    for number, given in enumerate(options):
        wf.add(fp.task(abs).options(name=f"t{number}", **given), number)
    backend = Slots(n_slots)
    return Deadlines(wf.plan(), policy or RunPolicy(), backend), backend


def batch(number, template, tasks=(0,)):
    return SimpleNamespace(id=number, template=template, tasks=tasks)


def test_without_times_there_is_nothing_to_look_at():
    watch, _ = watch_of({})
    watch.begin(100.0)
    watch.layer_begins(0, 100.0)
    assert watch.is_idle
    assert watch.next_look() == math.inf


# Timeouts


def test_a_stop_of_the_program_is_no_matter_to_a_slot_that_has_begun_nothing():
    """The batch of the second slot was sent after the stop, and its worker has no position so far."""
    watch, backend = watch_of({"timeout": 5.0}, n_slots=2)
    backend.positions[0], backend.starts[0] = mark(1, 0), 100.0
    watch.slept(1.0, 101.0, 104.0, [batch(1, 0), None])
    assert watch.overdue([batch(1, 0), batch(2, 0)], 104.0) == []


def test_a_task_is_overdue_at_the_second_look_after_its_timeout():
    watch, backend = watch_of({"timeout": 5.0})
    backend.positions, backend.starts = [mark(1, 0)], [100.0]
    held = [batch(1, 0)]
    assert watch.overdue(held, 101.0) == []
    assert watch.next_look() == 105.0
    assert watch.overdue(held, 105.0) == []
    assert watch.next_look() == pytest.approx(105.0 + _SECOND_LOOK_SECONDS)
    assert watch.overdue(held, 105.1) == [(0, 0)]


def test_a_task_that_ended_between_the_looks_is_not_overdue():
    watch, backend = watch_of({"timeout": 5.0})
    held = [batch(1, 0, (4, 5))]
    backend.positions, backend.starts = [mark(1, 0)], [100.0]
    watch.overdue(held, 105.0)
    backend.positions, backend.starts = [mark(1, 1)], [105.0]
    assert watch.overdue(held, 105.1) == []
    assert watch.next_look() == 110.0
    watch.overdue(held, 110.0)
    assert watch.overdue(held, 110.1) == [(0, 5)]


def test_a_batch_that_has_not_begun_is_not_measured_by_the_one_before():
    watch, backend = watch_of({"timeout": 5.0})
    backend.positions, backend.starts = [mark(1, 3)], [0.0]
    for now in (100.0, 100.1):
        assert watch.overdue([batch(2, 0)], now) == []
    assert watch.next_look() == pytest.approx(105.1)


def test_time_for_which_the_program_was_stopped_does_not_count():
    """As by Ctrl-Z: a wait of at most a second takes three, and the task goes on with what it had left."""
    watch, backend = watch_of({"timeout": 5.0}, {"timeout": 5.0}, n_slots=2)
    held = [batch(1, 0), batch(2, 1)]
    backend.positions[:] = mark(1, 0), mark(2, 0)
    backend.starts[:] = 100.0, 100.0
    assert watch.overdue(held, 101.0) == []
    assert watch.patience(watch.next_look(), 101.0) == 1.0
    watch.slept(1.0, 101.0, 104.0, held)
    watch.slept(1.0, 104.0, 105.2, held)  # late, as on a busy machine
    backend.positions[1] = mark(2, 1)  # begun since
    backend.starts[1] = 105.2
    for now in (106.9, 106.95):
        assert watch.overdue(held, now) == []
    assert watch.overdue(held, 107.0) == []
    assert watch.overdue(held, 107.1) == [(0, 0)]
    assert watch.plan_kill(0, 0, 107.1).seconds == 5.0


def test_a_batch_that_is_being_unpickled_is_looked_at_again_when_its_task_could_be_overdue():
    watch, backend = watch_of({"timeout": 5.0})
    backend.positions, backend.starts = [mark(1, 0)], [160.0]  # as long as it is; then it is 101
    assert watch.overdue([batch(1, 0)], 100.0) == []
    assert watch.next_look() == 105.0


def test_tasks_without_timeout_and_idle_slots_are_left_alone():
    watch, backend = watch_of({"timeout": 5.0}, {}, n_slots=2)
    backend.positions = [mark(1, 0)] * 2
    assert watch.overdue([batch(1, 1), None], 1e9) == []
    assert watch.next_look() == math.inf


def test_a_sentence_is_carried_out_once_after_the_grace():
    watch, backend = watch_of({"timeout": 5.0})
    backend.positions = [mark(1, 0)]
    error = watch.plan_kill(0, 0, 100.0)
    assert error.seconds == 5.0
    assert "task 't0' took longer than its timeout of 5 s" in str(error)
    assert watch.overdue([batch(1, 0)], 200.0) == []
    assert watch.due_kills(100.0) == []
    assert watch.next_look() == 100.0 + TERM_SECONDS
    assert watch.due_kills(100.0 + TERM_SECONDS) == [0]
    assert watch.due_kills(200.0) == []
    assert watch.pending_kills[0].error is error


# Retries


def test_tasks_wait_as_their_backoff_says():
    watch, _ = watch_of({"backoff": 2.0}, {"backoff": fp.Backoff(1.0, factor=3.0)})
    watch.delay(0, 1, 100.0)
    watch.delay(1, 2, 100.0)
    assert watch.next_look() == 102.0
    assert list(watch.due_retries(101.9)) == []
    assert list(watch.due_retries(102.0)) == [0]
    assert list(watch.due_retries(103.0)) == [1]
    assert watch.is_idle


def test_chance_in_a_wait_comes_from_the_seed():
    options = {"backoff": fp.Backoff(1.0, jitter=0.5)}
    waits = set()
    for seed in (0, 0, 1, 2):
        watch, _ = watch_of(options, policy=RunPolicy(seed=seed))
        watch.delay(0, 1, 0.0)
        waits.add(watch.next_look())
    assert len(waits) == 3
    assert all(0.5 <= wait <= 1.5 for wait in waits)


@pytest.mark.parametrize(
    ("backoff", "waits"),
    [
        (fp.Backoff(0.5), [0.5, 1.0, 2.0, 4.0]),
        (fp.Backoff(1.0, factor=1.0), [1.0] * 4),
        (fp.Backoff(1.0, factor=10.0, most_seconds=50.0), [1.0, 10.0, 50.0, 50.0]),
        (fp.Backoff(0.0), [0.0] * 4),
    ],
)
def test_waits_grow_by_the_factor_to_the_most(backoff, waits):
    assert [backoff.wait_seconds(attempt) for attempt in (1, 2, 3, 4)] == waits


NUMBERS = st.one_of(st.floats(0.0, allow_nan=False, allow_infinity=False), st.integers(0, 2**1000))


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    NUMBERS,
    NUMBERS,
    st.floats(0.0, 1.0),
    st.one_of(NUMBERS, st.just(math.inf)),
    st.integers(1, 10**30),
    st.floats(0.0, 1.0),
)
@hypothesis.example(0.0, 2.0, 0.0, 300.0, 1101, 0.5)
@hypothesis.example(1.0, 10.0, 0.0, math.inf, 310, 0.5)
@hypothesis.example(1.0, 2.0, 1.0, 300.0, 10, 1.0)
@hypothesis.example(0.0, 10.0, 1.0, math.inf, 10**6, 0.0)
def test_no_numbers_make_a_wait_that_is_none(seconds, factor, jitter, most_seconds, attempt, chance):
    wait = fp.Backoff(seconds, factor, jitter, most_seconds).wait_seconds(attempt, chance)
    assert 0.0 <= wait <= min(most_seconds, 1e9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, "1", True, None])
@pytest.mark.parametrize("name", ["seconds", "factor"])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(fp.WorkflowError, match=rf"{name} of Backoff must be a finite number of at least 0, got"):
        fp.Backoff(**{"seconds": 1.0, name: value})


# The run as a whole


@pytest.mark.parametrize(("policy", "layer"), [(RunPolicy(timeout=3.0), -1), (RunPolicy(layer_timeout=3.0), 7)])
def test_time_runs_out_once(policy, layer):
    watch, _ = watch_of({}, policy=policy)
    watch.begin(100.0)
    watch.layer_begins(7, 100.0)
    assert not watch.is_idle
    assert watch.run_out(102.9) is None
    assert watch.run_out(103.0) == (layer, 3.0)
    assert watch.run_out(200.0) is None


def test_each_layer_has_its_own_time():
    watch, _ = watch_of({}, policy=RunPolicy(layer_timeout=3.0))
    watch.layer_begins(0, 100.0)
    watch.layer_begins(1, 102.0)
    assert watch.run_out(104.0) is None
    assert watch.run_out(105.0) == (1, 3.0)
