"""What a report shows, as columns, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from reports import a_large_table, a_table

from forgepar.report.html import analysis
from forgepar.report.html.analysis import NameParts, TaskIntervals
from forgepar.scheduling.run_state import Status

NAN = np.nan


def shown(steps) -> list[tuple[float, float]]:
    """When each value of a line begins, and the value."""
    return list(zip(steps.at.tolist(), steps.value.tolist(), strict=False))


@pytest.mark.parametrize(
    "names",
    [
        ["load-0", "load-1", "load"],
        ["", "0", "00", "a00", "a10", "a-05"],
        ["file123456789012345678901234567890", "x999999999", "x1000000000"],
        ["line\nbreak-3", "٣", "a²", "<b>7"],
    ],
)
def test_names_are_put_together_again(names):
    parts = NameParts.of(names)
    numbers = parts.number_of.tolist()
    again = [parts.stems[stem] + ("" if n < 0 else str(n)) for stem, n in zip(parts.stem_of, numbers, strict=True)]
    assert again == names
    assert len(set(parts.stems)) == len(parts.stems)


def test_names_that_are_numbered_share_their_stem():
    assert NameParts.of([f"load-{i}" for i in range(1000)]).stems == ["load-"]


def test_names_that_are_too_long_together_are_cut_in_the_middle():
    names = [f"{chr(97 + i % 26)}{'x' * 500}{'y' * i}z" for i in range(9_000)]
    stems = NameParts.of(names).stems
    assert sum(map(len, stems)) <= 4_000_000
    assert all("…" in stem and stem[-1] == "z" for stem in stems)


def test_bars_are_what_ran_by_their_start():
    table = a_table(start=np.array([1.0, 0.5, NAN]), seconds=np.array([2.0, 1.0, NAN]))
    bars = TaskIntervals.of(table)
    assert bars.task.tolist() == [1, 0]
    assert bars.left.tolist() == [0.5, 1.0]
    assert bars.right.tolist() == [1.5, 3.0]


def test_bands_go_from_a_layers_first_start_to_its_last_end():
    table = a_table()
    bands = analysis.bands(table, TaskIntervals.of(table))
    assert list(zip(bands.row, bands.left, bands.right, strict=True)) == [(0, 0.5, 2.5), (1, 3.0, 5.5)]
    eager = a_table(schedule="eager")
    assert not len(analysis.bands(eager, TaskIntervals.of(eager)))


def test_workers_wait_at_a_barrier_from_their_last_task_on():
    table = a_table()
    bars = TaskIntervals.of(table)
    waited, total = analysis.idle(table, bars, analysis.bands(table, bars))
    found = sorted(zip(waited.row.tolist(), waited.left.tolist(), waited.right.tolist(), strict=True))
    # Worker 1 is done with load-1 at 1.5; worker 0 has nothing in layer 1.
    assert found == [(0, 3.0, 5.5), (1, 1.5, 2.5)]
    assert total == 3.5


def test_only_the_longest_waits_are_drawn_but_all_are_counted(monkeypatch):
    monkeypatch.setattr(analysis, "MOST_IDLE", 1)
    table = a_table()
    bars = TaskIntervals.of(table)
    waited, total = analysis.idle(table, bars, analysis.bands(table, bars))
    assert (waited.row.tolist(), total) == ([0], 3.5)


def test_busy_workers_step_by_step():
    bars = TaskIntervals.of(a_table())
    assert shown(analysis.busy_workers(bars, 6.0)) == [(0, 0), (0.5, 2), (1.5, 1), (2.5, 0), (3, 1), (5.5, 0)]


def test_values_are_held_until_their_last_consumer_ends():
    table = a_table()
    held = analysis.held_bytes(table, TaskIntervals.of(table), 6.0)
    # load-1 from 1.5, load-0 from 2.5, both to the end of join at 5.5, whose own value stays.
    assert shown(held) == [(0, 0), (1.5, 1000), (2.5, 1100), (5.5, 50)]
    assert held.at[-1] == 6.0


def test_values_whose_consumer_did_not_run_are_held_to_the_end():
    table = a_table(
        start=np.array([0.5, 0.5, NAN]),
        seconds=np.array([2.0, 1.0, NAN]),
        status_of=np.array([Status.COMPLETED, Status.FAILED, Status.SKIPPED], np.int8),
    )
    assert shown(analysis.held_bytes(table, TaskIntervals.of(table), 6.0)) == [(0, 0), (2.5, 100)]


def test_long_runs_are_told_in_steps_that_keep_the_area_and_the_peak():
    table = a_large_table(20, 500)
    bars = TaskIntervals.of(table)
    end = analysis.end_of(table, bars)
    busy = analysis.busy_workers(bars, end)
    assert len(busy.value) == analysis.MOST_STEPS
    assert (busy.value * np.diff(busy.at)).sum() == pytest.approx(table.seconds.sum())
    assert busy.value.max() <= 8
    held = analysis.held_bytes(table, bars, end)
    ends, last = table.start + table.seconds, np.full(len(table), -np.inf)
    np.maximum.at(last, table.sources, ends[table.targets])
    last[np.isinf(last)] = end
    changes = sorted([*zip(ends, table.bytes, strict=True), *zip(last, -table.bytes, strict=True)])
    assert held.value.max() == np.cumsum([change for _, change in changes]).max()


def test_the_critical_path_leaves_out_what_did_not_run():
    assert analysis.heaviest_path(a_table()) == ([0, 2], 4.5)
    resumed = a_table(seconds=np.array([NAN, NAN, 2.5]), start=np.array([NAN, NAN, 0.1]))
    assert analysis.heaviest_path(resumed) == ([2], 2.5)


def test_callables_by_how_long_they_took():
    table = a_table(callables=["load", "join", "unused"])
    assert analysis.callables_by_work(table, TaskIntervals.of(table)).tolist() == [0, 1]
    slow = a_table(seconds=np.array([1.0, 1.0, 2.5]))
    assert analysis.callables_by_work(slow, TaskIntervals.of(slow)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([], "uint8"),
        ([0, 255], "uint8"),
        ([256], "uint16"),
        ([-1], "int32"),
        ([70_000], "int32"),
        ([1 << 31], "uint32"),
        ([1 << 40], "float64"),
    ],
)
def test_the_smallest_type_that_holds_all(values, dtype):
    found = analysis.smallest(np.array(values, np.int64))
    assert (found.dtype, found.tolist()) == (dtype, values)


def test_a_run_without_tasks_that_ran_has_nothing_to_show():
    table = a_table(start=np.full(3, NAN), seconds=np.full(3, NAN), worker=np.full(3, -1, np.int32))
    bars = TaskIntervals.of(table)
    assert (len(bars), analysis.end_of(table, bars), analysis.n_rows(table)) == (0, 6.0, 2)
    assert analysis.heaviest_path(table) == ([], 0.0)
    assert shown(analysis.busy_workers(bars, 6.0)) == [(0, 0)]
