"""Random workflows and jobs under random faults: see `chaos.py`, which runs single seeds as well."""

from __future__ import annotations

import chaos
import pytest
from chaos_scenarios import Scenario


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_runs_under_random_faults(first):
    chaos.Conductor().run(range(first, first + 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 25))
def test_many_random_runs_under_random_faults(first, record_property):
    conductor = chaos.Conductor()
    conductor.run(range(first, first + 25))
    for name, n in conductor.counts.items():
        record_property(name, n)


def test_a_seed_always_gives_the_same():
    one, other = Scenario(5), Scenario(5)
    assert (repr(one), one.nodes) == (repr(other), other.nodes)


def test_seeds_are_told_one_by_one_or_from_first_to_last():
    assert chaos.seeds_in(["3", "7:10"]) == [3, 7, 8, 9]
