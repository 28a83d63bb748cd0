"""What the soak calls flat, and what not."""

from __future__ import annotations

import pytest

from benchmarks._common import misses
from benchmarks.soak.run import BOUNDS, _columns, _judged

USUAL = {"jobs": 1.0, **{name: 2.0 * floor for name, (_, floor) in BOUNDS.items()}}


def judged(end, *, judges_memory=True):
    return _judged("any", [USUAL, USUAL, USUAL, {**USUAL, **end}], _columns(600.0), judges_memory=judges_memory)


def test_what_stays_or_shrinks_is_flat():
    assert not misses(judged({}))
    assert not misses(judged(dict.fromkeys(BOUNDS, 0.0)))


@pytest.mark.parametrize("name", BOUNDS)
def test_what_grows_is_not(name):
    most, _ = BOUNDS[name]
    rows = judged({name: USUAL[name] * (most + 0.01)})
    assert [row["held"] for row in rows if not row.get("met", True)] == [name]


def test_the_small_form_does_not_judge_memory():
    grown = {name: 9 * value for name, value in USUAL.items() if "MiB" in name}
    assert not misses(judged(grown, judges_memory=False))
    assert misses(judged({"parent descriptors": 1000.0}, judges_memory=False))


def test_what_is_below_its_floor_is_not_judged():
    low = dict.fromkeys(USUAL, 1.0)
    marks = [low, low, low, {name: 0.9 * floor for name, (_, floor) in BOUNDS.items()} | {"jobs": 1.0}]
    assert not misses(_judged("any", marks, _columns(600.0), judges_memory=True))
