"""Work stealing: what is reclaimed from slots, and when the loop wakes up for it. Slots and clock are fakes."""

from __future__ import annotations

import pytest
from fake_backend import Clock, Machine

from forgepar.backends.base import Joined
from forgepar.backends.worker_board import NO_LIMIT, mark

STALL, CLAIM = 0.005, 0.001


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def stalled(clock, **traits):
    """Two slots with four tasks each; the first is stuck at its second task, the other is done with all."""
    machine = Machine(clock, 2, range(8), **traits)
    machine.slots.hand_out()
    machine.begin(0, 1)
    machine.begin(1, 3)
    machine.reply(1, 4, ended=True)
    return machine


def test_a_stall_is_seen_after_its_time_and_not_before(clock):
    machine = stalled(clock)
    assert machine.slots.patience() == STALL
    clock.now += STALL * 0.9
    machine.slots.hand_out()
    assert machine.backend.limits == [NO_LIMIT] * 2
    clock.now += STALL * 0.2
    machine.slots.hand_out()
    assert machine.backend.limits == [mark(1, 2), NO_LIMIT]
    assert machine.slots.patience() == CLAIM


def test_what_has_not_begun_goes_to_the_idle_slot_once_the_limit_is_seen(clock):
    machine = stalled(clock)
    clock.now += STALL * 1.1
    machine.slots.hand_out()
    clock.now += CLAIM * 0.5
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1, 2, 3]]  # the slot may not have seen it
    clock.now += CLAIM * 0.6
    machine.slots.hand_out()
    assert (machine.tasks_of(0), machine.tasks_of(1)) == ([[0, 1]], [[2], [3]])
    machine.reply(0, 2, ended=True)
    assert machine.backend.limits[0] == NO_LIMIT
    assert sorted(machine.source.settled) == [0, 1, 4, 5, 6, 7]


def test_the_loop_sleeps_while_a_slot_is_limited_and_the_other_has_nothing_to_do(clock):
    machine = stalled(clock)
    for _ in range(2):
        clock.now += STALL * 1.1
        machine.slots.hand_out()
    for _ in range(2):
        machine.reply(1, 1, ended=True)  # what was reclaimed is done; the first slot still runs
    machine.slots.flights[0][0].n_own = 4  # as if the slot had something more that it cannot begin
    machine.slots.hand_out()
    assert machine.slots.stealing.is_limited(0)
    assert machine.slots.patience() is None


def test_a_slot_that_began_one_more_task_before_it_saw_its_limit_is_limited_again(clock):
    machine = stalled(clock)
    clock.now += STALL * 1.1
    machine.slots.hand_out()
    machine.begin(0, 2)  # it had not seen the limit
    clock.now += CLAIM * 1.1
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1, 2, 3]]
    assert machine.backend.limits[0] == mark(1, 3)
    clock.now += CLAIM * 1.1
    machine.slots.hand_out()
    assert (machine.tasks_of(0), machine.tasks_of(1)) == ([[0, 1, 2]], [[3]])


@pytest.mark.parametrize("again", ["claim", "limit_all"])
def test_no_later_limit_lets_a_slot_begin_what_was_reclaimed(clock, again):
    machine = stalled(clock)
    for _ in range(2):
        clock.now += STALL * 1.1
        machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1]]
    machine.begin(0, 2)  # it looks at its limit now
    if again == "claim":
        machine.slots.stealing.claim(0)
    else:
        machine.slots.stealing.limit_all()
    assert machine.backend.limits[0] == mark(1, 2)


@pytest.mark.parametrize("end", ["reply", "loss"])
def test_what_a_slot_once_lost_does_not_limit_its_later_batches(end, clock):
    machine = stalled(clock)
    for _ in range(2):
        clock.now += STALL * 1.1
        machine.slots.hand_out()
    if end == "reply":
        machine.reply(0, 2, ended=True)
    else:
        machine.lose(0)
        machine.slots.join(Joined(0, 300))
    machine.source.ready = [20, 21, 22]
    machine.slots.hand_out()
    later = machine.slots.flights[0][0].id
    machine.begin(0, 0)
    machine.slots.stealing.claim(0)
    assert machine.backend.limits[0] == mark(later, 1)


def test_a_claim_needs_no_idle_slot(clock):
    machine = Machine(clock, 1, range(3))
    machine.slots.hand_out()
    machine.source.ready = [3]
    machine.slots.hand_out()
    machine.begin(0, 0)
    assert machine.slots.patience() is None
    machine.slots.stealing.claim(0)
    assert machine.slots.patience() == CLAIM
    clock.now += CLAIM * 1.1
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0], []]
    assert machine.source.ready == [1, 2, 3]
    assert len(machine.backend.sent) == 2  # a limited slot gets no more


def test_nothing_is_reclaimed_from_a_far_slot_before_it_has_answered(clock):
    machine = stalled(clock, is_far=True)
    clock.now += STALL * 1.1
    machine.slots.hand_out()
    clock.now += CLAIM * 1.1
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1, 2, 3]]
    machine.backend.answers[0] = mark(1, 1)
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1]]


def test_outcomes_of_reclaimed_tasks_do_not_count_for_the_slot_that_lost_them(clock):
    machine = stalled(clock)
    for _ in range(2):
        clock.now += STALL * 1.1
        machine.slots.hand_out()
    machine.reply(0, 4, ended=True)
    assert machine.source.settled == [4, 5, 6, 7, 0, 1]
    for _ in range(2):
        machine.reply(1, 1, ended=True)
    assert machine.source.settled == [4, 5, 6, 7, 0, 1, 2, 3]
