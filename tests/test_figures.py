"""What is told of a run that goes, from columns that say how it stands: no run and no clock is needed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import forgepar as fp
from forgepar.displays import Look, RunningTask
from forgepar.report.figures import MOST_LAYERS, Groups, Meter, seconds_left, smoothed
from forgepar.runstate import Status


def look(
    status,
    layer,
    template=None,
    *,
    seconds=(1.0,),
    now=10.0,
    start=0.0,
    running=(),
    fraction=math.nan,
    workers=2,
    by_layers=True,
):
    status = np.array(status, np.int8)
    template = np.zeros(len(status), np.int32) if template is None else np.array(template, np.int32)
    began = np.where(status > Status.RUNNING, start, math.nan)
    at = np.flatnonzero(status == Status.RUNNING).tolist()
    told = [(at[i], RunningTask(f"t-{i}", i, 100 + i, ran, fraction, "")) for i, ran in enumerate(running)]
    layers = np.array(layer, np.int32)
    return Look(
        "w", status, layers, template, range(len(seconds)), seconds, by_layers, told, [1] * workers, 0, 0.0, now, began
    )


def left(layer, seconds, done, todo, *, workers=2, elapsed=10.0, ahead=()):
    columns = (np.array(layer), np.array(seconds, float), np.array(done), np.array(todo))
    return seconds_left(*columns, workers, elapsed, ahead)


def test_what_is_left_takes_as_long_as_what_is_done_took():
    # 10 s for 10 of 20 tasks, whatever they are said to take: a clock that is off by a factor does not matter.
    assert left([0], [2.0], [10], [10]) == pytest.approx(10.0)
    assert left([0], [0.5], [10], [10]) == pytest.approx(10.0)
    assert left([0], [2.0], [10], [30]) == pytest.approx(30.0)


def test_callables_count_by_their_own_durations():
    # Of one layer: 10 tasks of 1 s on 2 workers took the 5 s they should; 10 tasks of 8 s are left.
    assert left([0, 0], [1.0, 8.0], [10, 0], [0, 10], elapsed=5.0) == pytest.approx(40.0)


def test_a_narrow_layer_takes_a_round_however_many_workers_there_are():
    # A chain of 5 tasks of 1 s, 2 of them done in 2 s: eight workers do not make the others quicker.
    assert left(range(5), [1.0] * 5, [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], workers=8, elapsed=2.0) == pytest.approx(3.0)
    assert left([0, 1], [1.0, 1.0], [8, 0], [0, 9], workers=8, elapsed=1.0) == pytest.approx(2.0)


def test_overhead_is_part_of_what_is_left():
    # Tasks of 1 us that are done at a hundredth of the speed that they would allow.
    assert left([0], [1e-6], [50_000], [50_000], elapsed=2.5) == pytest.approx(2.5, rel=0.1)


def test_what_runs_already_is_taken_off():
    # Rounds of 10 s; both workers are 5 s into the second of three.
    assert left([0], [10.0], [2], [4], elapsed=15.0, ahead=[5.0, 5.0]) == pytest.approx(15.0)


def test_one_that_runs_for_ever_does_not_make_it_negative():
    assert left([0], [1.0], [1], [1], elapsed=1000.0, ahead=[999.0]) >= 0


def test_while_nothing_is_known_nothing_is_told():
    assert math.isnan(left([0], [math.nan], [0], [10]))
    assert math.isnan(left([0], [1.0], [1], [10], elapsed=math.nan))
    assert left([0], [1.0], [10], [0]) == 0.0


def test_a_new_estimate_moves_what_is_shown_by_degrees():
    assert smoothed(None, 1.0, 60.0) == 60.0
    assert smoothed((1.0, 60.0), 2.0, 59.0) == 59.0
    assert 59.0 < smoothed((1.0, 60.0), 2.0, 100.0) < 100.0
    assert smoothed((1.0, 60.0), 2.0, 0.0) == 0.0
    assert smoothed((1.0, math.nan), 2.0, 7.0) == 7.0


def test_groups_count_each_status_by_layer_and_template():
    groups = Groups(np.array([0, 0, 1, 1, 1], np.int32), np.array([0, 1, 1, 1, 0], np.int32))
    counts = groups.counts(np.array([2, 0, 2, 3, 1], np.int8))
    found = {(a, b): row.tolist() for a, b, row in zip(groups.layer, groups.template, counts, strict=True)}
    assert found == {
        (0, 0): [0, 0, 1, 0, 0, 0, 0, 0],
        (0, 1): [1, 0, 0, 0, 0, 0, 0, 0],
        (1, 0): [0, 1, 0, 0, 0, 0, 0, 0],
        (1, 1): [0, 0, 1, 1, 0, 0, 0, 0],
    }


def test_figures_of_a_moment():
    figures = Meter().of_look(look([2, 2, 3, 7, 2, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 2], running=[3.0]))
    assert (figures.n_tasks, figures.n_done, figures.n_failed) == (8, 5, 1)
    assert figures.counts == {"pending": 2, "running": 1, "completed": 3, "failed": 1, "cached": 1}
    assert (figures.n_layers, figures.n_layers_done, figures.n_open) == (3, 1, 1)
    assert figures.layers == ((1, 1, 3),)
    assert figures.fraction == 5 / 8
    assert [task.task for task in figures.running] == ["t-0"]
    assert 0 < figures.seconds_left < math.inf


def test_few_of_many_open_layers_are_shown():
    figures = Meter().of_look(look([2, 0] * 500, np.repeat(np.arange(500), 2), by_layers=False))
    assert figures.n_open == 500
    assert [layer.layer for layer in figures.layers] == list(range(MOST_LAYERS))


def test_throughput_is_that_of_late():
    meter = Meter()
    assert math.isnan(meter.of_look(look([0] * 1000, [0] * 1000, now=5.0)).rate)  # workers start: not counted
    rates = []
    for second in range(1, 31):
        n = min(10 * second, 100)  # ten a second for ten seconds, then none
        status = [2] * n + [0] * (1000 - n)
        rates.append(meter.of_look(look(status, [0] * 1000, now=5.0 + second, start=5.0)).rate)
    assert rates[0] == rates[8] == pytest.approx(10.0)
    assert 0 < rates[14] < 10
    assert rates[-1] == 0.0


def test_the_end_has_counts_and_no_estimate():
    figures = Meter.of_end(look([2, 2, 3, 4], [0, 0, 1, 2], now=12.5))
    assert (figures.n_tasks, figures.n_done, figures.n_layers) == (4, 4, 3)
    assert figures.counts == {"completed": 2, "failed": 1, "skipped": 1}
    assert (figures.seconds_left, figures.elapsed_seconds) == (0.0, 12.5)


def test_a_table_tells_the_same_as_the_run():
    wf = fp.Workflow("w")
    wf.map(abs, wf.map(abs, range(6)))
    figures = Meter().of_table(wf.run(backend="inline").table())
    assert (figures.n_tasks, figures.n_done, figures.n_layers_done, figures.seconds_left) == (12, 12, 2, 0.0)
    assert figures.n_workers == 1


def test_a_run_that_grows_is_counted_anew():
    meter = Meter()
    assert meter.of_look(look([2, 1], [0, 1])).n_tasks == 2
    figures = meter.of_look(look([2, 2, 2, 0], [0, 1, 1, 2]))
    assert (figures.n_tasks, figures.n_done, figures.n_layers) == (4, 3, 3)


def test_tasks_of_a_kind_of_which_none_is_done_take_what_those_that_run_show():
    # 8 tasks of 1 s are done; one of another callable runs for 20 s now, and nine like it are to come.
    status, template = [2] * 8 + [1] + [0] * 9, [0] * 8 + [1] * 10
    how = {"template": template, "seconds": (1.0, math.nan), "running": [20.0], "workers": 1, "now": 28.0}
    assert Meter().of_look(look(status, [0] * 18, **how)).seconds_left == pytest.approx(180.0)
    assert Meter().of_look(look(status, [0] * 18, fraction=0.5, **how)).seconds_left == pytest.approx(380.0)
