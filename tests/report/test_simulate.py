"""What runs would take, against cases worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.report.simulate import expected_seconds, simulated_seconds


def two_chains():
    """A slow chain and a quick one, and a task that joins them."""
    wf = fp.Workflow()
    slow = quick = None
    for _ in range(3):
        slow = wf.add(fp.task(abs).options(name=f"slow{len(wf)}"), slow if slow is not None else 1)
        quick = wf.add(fp.task(abs).options(name=f"quick{len(wf)}"), quick if quick is not None else 1)
    wf.add(max, slow, quick)
    return wf.plan()


@pytest.mark.parametrize(
    ("schedule", "workers", "expected"),
    [("layers", 1, 19.0), ("layers", 2, 16.0), ("eager", 2, 13.0), ("eager", 1, 19.0), ("eager", 9, 13.0)],
)
def test_barriers_cost_where_tasks_of_a_layer_differ(schedule, workers, expected):
    # Chains of 5, 1, 5 and of 1, 4, 1 seconds, then 2: barriers cost 5 + 4 + 5 + 2, eager the slow chain and 2.
    durations = [5.0, 1.0, 1.0, 4.0, 5.0, 1.0, 2.0]
    assert simulated_seconds(two_chains(), durations, workers, schedule) == expected


def test_wide_layers_share_their_work():
    wf = fp.Workflow()
    wf.add(sum, wf.map(abs, range(10)))
    assert simulated_seconds(wf.plan(), [1.0] * 10 + [3.0], 4) == 3 + 3
    assert simulated_seconds(wf.plan(), [1.0] * 10 + [3.0], 100) == 1 + 3


@pytest.mark.parametrize("durations", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_durations_that_cannot_be(durations):
    wf = fp.Workflow()
    wf.map(abs, range(2))
    with pytest.raises(ValueError, match=r"^durations must be 2 non-negative numbers, got shape \(.,\)\.$"):
        simulated_seconds(wf.plan(), durations, 1)


def test_workers_that_cannot_be():
    with pytest.raises(ValueError, match=r"^workers must be an integer of at least 1, got 0\.$"):
        simulated_seconds(two_chains(), [1.0] * 7, 0)


def test_expected_seconds_go_by_task_then_callable_then_typical():
    wf = fp.Workflow()
    wf.map(abs, range(2))
    wf.add(max, 1, 2)
    wf.add(min, 1, 2)
    known = {"tasks": {"abs-1": 7.0}, "callables": {"abs": 1.0, "max": 3.0}}
    np.testing.assert_array_equal(expected_seconds(wf.plan(), known), [1.0, 7.0, 3.0, 2.0])
    with pytest.raises(ValueError, match=r"^No durations are known\."):
        expected_seconds(wf.plan(), {})


def test_a_run_tells_its_durations():
    wf = fp.Workflow()
    wf.map(abs, range(3))
    wf.add(max, 1, 2)
    result = wf.run(backend="inline")
    durations = result.durations()
    assert set(durations["tasks"]) == {"abs-0", "abs-1", "abs-2", "max"}
    assert durations["callables"]["abs"] == pytest.approx(sum(durations["tasks"][f"abs-{i}"] for i in range(3)) / 3)
    np.testing.assert_allclose(expected_seconds(wf.plan(), durations), [r.duration for r in result.records])


def test_the_command_line_estimates_from_saved_durations(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "durations.json"
    target = "forgepar.examples.census"
    (tmp_path / "one.py").write_text("def f(x):\n    return x if x else 1\n")
    root = f"root={tmp_path}"
    assert cli.main(["run", target, "-p", root, "--backend", "inline", "--save-durations", str(path)]) == 0
    assert "callables" in json.loads(path.read_text())
    capsys.readouterr()
    assert cli.main(["layers", target, "-p", root, "--durations", str(path), "-w", "3"]) == 0
    assert "expected with 3 workers: " in capsys.readouterr().out
    path.write_text("{")
    assert cli.main(["layers", target, "-p", root, "--durations", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
