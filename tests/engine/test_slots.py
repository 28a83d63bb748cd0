"""The slot scheduler, with fakes for everything around it."""

from __future__ import annotations

import math

import pytest
from fake_backend import Clock, Machine

from forgepar.backends.base import Joined
from forgepar.backends.worker_board import NO_LIMIT


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_tasks_are_handed_out_breadth_first_in_even_shares(clock):
    machine = Machine(clock, 3, range(10))
    machine.slots.hand_out()
    assert [len(batch.tasks) for _, batch in machine.backend.sent] == [4, 4, 2]
    assert [slot for slot, _ in machine.backend.sent] == [0, 1, 2]
    assert sorted(task for _, batch in machine.backend.sent for task in batch.tasks) == list(range(10))


def test_a_slot_gets_two_batches_of_short_tasks_and_no_third(clock):
    machine = Machine(clock, 1, range(3))
    machine.slots.hand_out()
    for more in range(3, 6):
        machine.source.ready.append(more)
        machine.slots.hand_out()
    assert machine.tasks_of(0) == [[0, 1, 2], [3]]
    assert machine.source.ready == [4, 5]


@pytest.mark.parametrize("seconds", [None, 0.2])
def test_nothing_waits_behind_a_task_that_is_long_or_unknown(clock, seconds):
    machine = Machine(clock, 2, range(5), seconds=seconds)
    machine.slots.hand_out()
    assert [machine.tasks_of(slot) for slot in (0, 1)] == [[[0]], [[1]]]
    assert machine.source.ready == [2, 3, 4]


def test_a_slot_without_a_worker_gets_nothing(clock):
    machine = Machine(clock, 2, range(4))
    machine.slots.hand_out()
    machine.begin(0, 0)
    machine.lose(0)
    sent = len(machine.backend.sent)
    machine.source.ready = [7, 8, 9]
    machine.slots.hand_out()
    assert {slot for slot, _ in machine.backend.sent[sent:]} == {1}


# Recycling: seven tasks at three per worker, so that no count coincides with another


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_a_worker_gets_exactly_as_many_tasks_as_it_may_and_is_then_replaced(clock, most):
    machine = Machine(clock, 1, range(7), most_tasks=most)
    lives, life = [], 0
    for _ in range(30):
        machine.slots.hand_out()
        if not machine.source.ready and not machine.slots.flights[0]:
            break
        if machine.backend.renewed:
            machine.backend.renewed.clear()
            lives.append(life)
            life = 0
            machine.slots.join(Joined(0, 200))
            continue
        n = len(machine.slots.flights[0][0].tasks)
        machine.begin(0, n - 1)
        machine.reply(0, n, ended=True)
        life += n
    assert [*lives, life] == [most] * (7 // most) + ([7 % most] if 7 % most else [])
    assert machine.source.settled == list(range(7))


def test_a_worker_is_not_replaced_while_nothing_is_ready_nor_while_it_has_work(clock):
    machine = Machine(clock, 1, range(3), most_tasks=3)
    machine.slots.hand_out()
    machine.source.ready = [3]
    machine.slots.hand_out()
    assert machine.backend.renewed == []  # it has work
    machine.source.ready = []
    machine.reply(0, 3, ended=True)
    machine.slots.hand_out()
    assert machine.backend.renewed == []  # nothing for a new one
    machine.source.ready = [3]
    machine.slots.hand_out()
    assert (machine.backend.renewed, machine.source.forgotten) == ([0], [0])
    assert not machine.slots.flights[0]  # it has not joined


# Losses


def test_a_lost_worker_fails_the_task_that_it_ran_and_the_others_run_again(clock):
    machine = Machine(clock, 1, range(5))
    machine.slots.hand_out()
    machine.begin(0, 2)
    machine.reply(0, 1, ended=False)
    machine.lose(0)
    assert [task for task, _ in machine.source.failures] == [2]
    assert machine.source.ready == [1, 3, 4]  # 1 may have run; its outcome was lost
    assert machine.source.settled == [0]


def test_a_slot_that_was_limited_is_not_limited_after_its_worker_died(clock):
    machine = Machine(clock, 2, range(2), seconds=None)
    machine.slots.hand_out()
    machine.begin(0, 0)
    machine.slots.stealing.claim(0)
    assert machine.slots.stealing.is_limited(0)
    machine.lose(0)
    assert not machine.slots.stealing.is_limited(0)
    assert machine.backend.limits[0] == NO_LIMIT
    machine.slots.join(Joined(0, 300))
    machine.source.ready = [5]
    machine.slots.hand_out()
    assert machine.tasks_of(0) == [[5]]


def test_a_reply_of_a_batch_that_a_slot_no_longer_has_is_ignored(clock):
    machine = Machine(clock, 1, range(2))
    machine.slots.hand_out()
    machine.begin(0, 0)
    late = machine.slots.flights[0][0]
    machine.lose(0)
    machine.slots.flights[0].append(late)
    reply_of = machine.slots.take
    replies = []
    machine.slots.take = replies.extend
    machine.reply(0, 2, ended=True)
    machine.slots.flights[0].clear()
    reply_of(replies)
    assert machine.source.settled == []


# What the loop waits for


@pytest.mark.parametrize("which", ["cancel_at", "end_at"])
def test_the_next_look_is_no_later_than_a_cancellation_or_an_end(clock, which):
    machine = Machine(clock, 1, [])
    assert machine.slots.patience() is None
    assert machine.deadlines.is_idle
    setattr(machine.deadlines, which, clock.now + 0.75)
    assert machine.slots.patience() == pytest.approx(0.75)
    assert machine.deadlines.next_look() == clock.now + 0.75
    assert not machine.deadlines.is_idle
    machine.deadlines.begin_rollback(clock.now)
    assert machine.deadlines.next_look() == math.inf


def test_the_caller_is_woken_for_what_it_has_to_do_itself(clock):
    machine = Machine(clock, 1, [])
    machine.deadlines.cancel_at = clock.now + 9.0
    assert machine.slots.patience(clock.now + 2.0) == pytest.approx(2.0)
    assert machine.slots.patience(clock.now - 1.0) == 0.0
