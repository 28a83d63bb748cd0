"""The ideal that replays are held against: small cases by hand, random ones against the engine's own simulator."""

from __future__ import annotations

import random

import pytest

import forgepar as fp
from benchmarks.replay.simulate import barrier_ideal, greedy, layers_of, longest_remaining
from forgepar.report.simulate import simulated_seconds


def test_a_layer_takes_what_its_fullest_worker_does():
    assert barrier_ideal([3, 2, 2, 1], [[0, 1, 2, 3]], 2) == 4  # 3 + 1 beside 2 + 2
    assert barrier_ideal([3, 2, 2, 1], [[3, 2, 1, 0]], 2) == 5  # 1 + 2 beside 2 + 3


def test_barriers_add_up():
    assert barrier_ideal([5, 1, 1, 5], [[0, 1], [2, 3]], 2) == 10


def test_without_barriers_a_task_waits_for_its_own_only():
    assert greedy([5, 1, 1, 5], [(0, 2), (1, 3)], 2) == 6


def test_the_longest_path_goes_first():
    # One worker free at a time: the chain 1 -> 2 before the lone task 0, though that has the lower number.
    assert greedy([2, 1, 3], [(1, 2)], 1) == 6
    assert greedy([2, 1, 3], [(1, 2)], 2) == 4


def test_a_pair_that_comes_twice_counts_once():
    assert greedy([1, 1], [(0, 1), (0, 1)], 2) == 2
    assert layers_of(3, [(0, 1), (0, 1), (1, 2), (0, 2)]) == [[0], [1], [2]]


def test_what_remains_is_the_longest_way_to_the_end():
    assert longest_remaining([1, 2, 4, 8], [[1, 2], [3], [3], []], [0, 1, 1, 2]) == [13, 10, 12, 8]


def test_a_circle_is_told():
    with pytest.raises(ValueError, match="in a circle"):
        greedy([1, 1], [(0, 1), (1, 0)], 2)


@pytest.mark.parametrize("seed", range(10))
def test_it_agrees_with_the_engine_driven_by_a_clock_that_only_counts(seed):
    chance = random.Random(seed)
    n, workers = chance.randrange(1, 60), chance.randrange(1, 9)
    edges = sorted({(a, b) for b in range(n) for a in chance.sample(range(b), min(b, chance.randrange(3)))})
    durations = [chance.uniform(0.1, 5.0) for _ in range(n)]
    wf = fp.Workflow()
    handles = wf.map(abs, range(n))
    for before, after in edges:
        wf.add_dependency(handles[after], after=handles[before])
    layers = layers_of(n, edges)
    assert simulated_seconds(wf.plan(), durations, workers) == pytest.approx(barrier_ideal(durations, layers, workers))
    eager = simulated_seconds(wf.plan(), durations, workers, "eager")
    assert eager == pytest.approx(greedy(durations, edges, workers))
