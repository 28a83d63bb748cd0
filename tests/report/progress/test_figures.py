"""What is told of a run that goes, from columns that say how it stands: no run and no clock is needed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import forgepar as fp
from forgepar.records.display import RunningTask, RunView
from forgepar.report.progress.figures import MOST_LAYERS, RunMeter, smoothed
from forgepar.scheduling.run_state import Status


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
    return RunView(
        "w", status, layers, template, range(len(seconds)), seconds, by_layers, told, [1] * workers, 0, 0.0, now, began
    )


def test_a_new_estimate_moves_what_is_shown_by_degrees():
    assert smoothed(None, 1.0, 60.0) == 60.0
    assert smoothed((1.0, 60.0), 2.0, 59.0) == 59.0
    assert 59.0 < smoothed((1.0, 60.0), 2.0, 100.0) < 100.0
    assert smoothed((1.0, 60.0), 2.0, 0.0) == 0.0
    assert smoothed((1.0, math.nan), 2.0, 7.0) == 7.0


def test_figures_of_a_moment():
    figures = RunMeter().of_view(look([2, 2, 3, 7, 2, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 2], running=[3.0]))
    assert (figures.n_tasks, figures.n_done, figures.n_failed) == (8, 5, 1)
    assert figures.counts == {"pending": 2, "running": 1, "completed": 3, "failed": 1, "cached": 1}
    assert (figures.n_layers, figures.n_layers_done, figures.n_open) == (3, 1, 1)
    assert figures.layers == ((1, 1, 3),)
    assert figures.fraction == 5 / 8
    assert [task.task for task in figures.running] == ["t-0"]
    assert 0 < figures.seconds_left < math.inf


def test_few_of_many_open_layers_are_shown():
    figures = RunMeter().of_view(look([2, 0] * 500, np.repeat(np.arange(500), 2), by_layers=False))
    assert figures.n_open == 500
    assert [layer.layer for layer in figures.layers] == list(range(MOST_LAYERS))


def test_throughput_is_that_of_late():
    meter = RunMeter()
    assert math.isnan(meter.of_view(look([0] * 1000, [0] * 1000, now=5.0)).rate)  # workers start: not counted
    rates = []
    for second in range(1, 31):
        n = min(10 * second, 100)  # ten a second for ten seconds, then none
        status = [2] * n + [0] * (1000 - n)
        rates.append(meter.of_view(look(status, [0] * 1000, now=5.0 + second, start=5.0)).rate)
    assert rates[0] == rates[8] == pytest.approx(10.0)
    assert 0 < rates[14] < 10
    assert rates[-1] == 0.0


def test_the_end_has_counts_and_no_estimate():
    figures = RunMeter.of_end(look([2, 2, 3, 4], [0, 0, 1, 2], now=12.5))
    assert (figures.n_tasks, figures.n_done, figures.n_layers) == (4, 4, 3)
    assert figures.counts == {"completed": 2, "failed": 1, "skipped": 1}
    assert (figures.seconds_left, figures.elapsed_seconds) == (0.0, 12.5)


def test_a_table_tells_the_same_as_the_run():
    wf = fp.Workflow("w")
    wf.map(abs, wf.map(abs, range(6)))
    figures = RunMeter().of_table(wf.run(backend="inline").table())
    assert (figures.n_tasks, figures.n_done, figures.n_layers_done, figures.seconds_left) == (12, 12, 2, 0.0)
    assert figures.n_workers == 1


def test_a_run_that_grows_is_counted_anew():
    meter = RunMeter()
    assert meter.of_view(look([2, 1], [0, 1])).n_tasks == 2
    figures = meter.of_view(look([2, 2, 2, 0], [0, 1, 1, 2]))
    assert (figures.n_tasks, figures.n_done, figures.n_layers) == (4, 3, 3)


def test_tasks_of_a_kind_of_which_none_is_done_take_what_those_that_run_show():
    # 8 tasks of 1 s are done; one of another callable runs for 20 s now, and nine like it are to come.
    status, template = [2] * 8 + [1] + [0] * 9, [0] * 8 + [1] * 10
    how = {"template": template, "seconds": (1.0, math.nan), "running": [20.0], "workers": 1, "now": 28.0}
    assert RunMeter().of_view(look(status, [0] * 18, **how)).seconds_left == pytest.approx(180.0)
    assert RunMeter().of_view(look(status, [0] * 18, fraction=0.5, **how)).seconds_left == pytest.approx(380.0)
