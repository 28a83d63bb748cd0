"""How many tasks travel together, by what was seen of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.scheduling.durations import TARGET_SECONDS, Durations

MANY = 10**9
positive = st.floats(1e-7, 1e3)


def after(*observations: tuple[float, int], template: int = 0, n_templates: int = 1) -> Durations:
    """Durations that have seen mean seconds of so many tasks, one after the other."""
    durations = Durations(n_templates)
    for mean, n_tasks in observations:
        durations.observe(template, mean * n_tasks, n_tasks)
    return durations


def test_one_task_while_nothing_is_known():
    durations = Durations(3)
    assert all(math.isnan(seconds) for seconds in durations.seconds)
    assert durations.batch_size(1, MANY, 1) == 1


def test_templates_are_known_apart():
    durations = after((1e-6, 1000), template=0, n_templates=2)
    assert durations.batch_size(0, MANY, 1) > 1
    assert durations.batch_size(1, MANY, 1) == 1


@pytest.mark.parametrize("mean", [1e-6, 1e-5, 3e-4, 1e-3])
def test_a_batch_aims_at_the_target(mean):
    durations = after((mean, 100_000))
    size = durations.batch_size(0, MANY, 1)
    assert size * mean <= TARGET_SECONDS * 1.001
    assert (size + 1) * mean > TARGET_SECONDS * 0.999


@pytest.mark.parametrize("mean", [TARGET_SECONDS, 10 * TARGET_SECONDS, 60.0])
def test_long_tasks_go_one_by_one(mean):
    assert after((mean, 100)).batch_size(0, MANY, 1) == 1


def test_tasks_that_take_no_measurable_time():
    assert after((0.0, 10**9)).batch_size(0, 1000, 4) == 250


@pytest.mark.parametrize(("n_ready", "n_slots", "expected"), [(100, 4, 25), (101, 4, 26), (3, 8, 1), (1, 1, 1)])
def test_never_more_than_an_even_share(n_ready, n_slots, expected):
    assert after((1e-7, 10**6)).batch_size(0, n_ready, n_slots) == expected


def test_a_rise_counts_at_once():
    durations = after((1e-5, 100), (1e-3, 100))
    assert durations.seconds[0] == pytest.approx(1e-3)
    assert durations.batch_size(0, MANY, 1) == 5


def test_a_fall_counts_by_degrees():
    durations = after((1e-3, 100), (1e-5, 100))
    assert 1e-5 < durations.seconds[0] < 1e-3
    for _ in range(60):
        durations.observe(0, 1e-5 * 100, 100)
    assert durations.seconds[0] == pytest.approx(1e-5)


def test_one_quick_task_proves_little():
    durations = after((1e-7, 1))
    assert durations.batch_size(0, MANY, 1) == 8
    durations.observe(0, 8e-7, 8)
    assert durations.batch_size(0, MANY, 1) == 64


def test_a_small_batch_does_not_take_back_what_larger_ones_proved():
    durations = after((1e-6, 1000), (1e-6, 1))
    assert durations.batch_size(0, MANY, 1) == after((1e-6, 1000)).batch_size(0, MANY, 1)


@given(
    st.lists(st.tuples(positive, st.integers(1, 10**5)), min_size=1),
    st.integers(1, 10**6),
    st.integers(1, 256),
)
def test_bounds_hold_whatever_was_observed(observations, n_ready, n_slots):
    durations = after(*observations)
    means = [mean for mean, _ in observations]
    assert min(means) * 0.999 <= durations.seconds[0] <= max(means) * 1.001
    size = durations.batch_size(0, n_ready, n_slots)
    assert 1 <= size <= math.ceil(n_ready / n_slots)
    assert size == 1 or size * durations.seconds[0] <= TARGET_SECONDS * 1.001


def test_the_target_can_be_another():
    durations = Durations(1, target_seconds=1.0)
    durations.observe(0, 1000 * 0.001, 1000)
    assert durations.batch_size(0, MANY, 1) == 1000
