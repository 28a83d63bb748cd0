"""What `Workflow.check` says, and of what it says nothing."""

from __future__ import annotations

import numpy as np
import pytest

import forgepar as fp
from forgepar import checks, cli


def kinds(wf, **rules):
    return [finding.kind for finding in wf.check(**rules)]


def only(wf, **rules):
    (finding,) = wf.check(**rules)
    return finding


def test_a_fine_workflow_has_no_findings():
    wf = fp.Workflow()
    wf.map(abs, wf.map(abs, range(10)))
    assert wf.check(workers=2) == []


def test_an_empty_one_and_a_cycle_are_findings_and_fatal():
    wf = fp.Workflow()
    assert only(wf).is_fatal
    a, b = wf.add(fp.task(abs).options(name="a"), 1), wf.add(fp.task(abs).options(name="b"), 1)
    wf.add_dependency(a, after=b)
    wf.add_dependency(b, after=a)
    finding = only(wf)
    assert (finding.kind, finding.is_fatal, set(finding.tasks)) == ("cycle", True, {"a", "b"})
    assert "a -> b -> a" in str(finding) or "b -> a -> b" in str(finding)


def test_a_name_twice_is_a_finding():
    wf = fp.Workflow()
    wf.add(abs, 1)
    wf.add(fp.task(abs).options(name="abs"), 1)
    assert kinds(wf) == ["duplicate name"]


def test_order_without_data_that_makes_layers_more():
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first"), 1)
    second = wf.add(fp.task(abs).options(name="second", after=first), 1)
    wf.add(fp.task(abs).options(name="third"), second)
    finding = only(wf, workers=1)
    assert (finding.kind, finding.tasks) == ("order without need", ("second",))
    assert "1 of 3 layers less" in finding.message


def test_order_that_costs_nothing_is_not_told():
    wf = fp.Workflow()
    first = wf.add(abs, 1)
    wf.add(fp.task(abs).options(name="taker", after=first), first)
    assert wf.check(workers=1) == []


def test_that_a_branch_waits_for_what_decides_is_no_needless_order():
    wf = fp.Workflow()
    flag = wf.add(bool, 1)
    fp.when(wf, flag, lambda: wf.add(abs, 1), lambda: wf.add(abs, 2))
    assert wf.check(workers=1) == []


def test_layers_narrower_than_the_workers():
    wf = fp.Workflow()
    handle = wf.add(abs, 1)
    for _ in range(3):
        handle = wf.add(abs, handle)
    finding = only(wf, workers=4)
    assert finding.kind == "narrow layers"
    assert "4 of 4 layers have fewer tasks than the 4 workers, so that 75% of them idle" in finding.message
    assert wf.check(workers=1) == []


def test_tasks_without_timeout_under_a_layer_timeout():
    wf = fp.Workflow()
    wf.map(fp.task(abs).options(name="free"), range(5))
    wf.add(fp.task(abs).options(name="timed", timeout=3), 1)
    assert wf.check(workers=1) == []
    finding = only(wf, workers=1, layer_timeout=10)
    assert finding.kind == "no timeout"
    assert finding.tasks == tuple(f"free-{i}" for i in range(5))
    assert "'free-0', 'free-1', 'free-2' and 2 more have no timeout= of their own" in finding.message
    assert "10 s" in finding.message


def test_memory_that_cannot_be_had(monkeypatch):
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="never", memory=200), 1)
    wf.add(fp.task(abs).options(name="later", memory=80), 1)
    wf.add(fp.task(abs).options(name="now", memory=10), 1)
    monkeypatch.setattr(checks, "total_memory", lambda: 100)
    monkeypatch.setattr(checks, "available_memory", lambda: 50)
    never, later = wf.check(workers=1)
    assert (never.kind, never.tasks, never.is_fatal) == ("too much memory", ("never",), True)
    assert (later.kind, later.tasks, later.is_fatal) == ("much memory", ("later",), False)


def test_effects_without_compensation():
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="undone", effects=True, compensate=print), 1)
    wf.add(fp.task(abs).options(name="left", effects=True), 1)
    wf.add(abs, 1)
    finding = only(wf, workers=1)
    assert (finding.kind, finding.tasks) == ("no compensation", ("left",))
    assert "1 of 2 such tasks have a compensate=" in finding.message
    assert wf.check(workers=1, rollback="none") == []


def test_a_large_workflow_is_checked_too():
    wf = fp.Workflow()
    row = wf.map(abs, range(50_000))
    wf.map(fp.task(abs).options(effects=True), row)
    finding = only(wf, workers=2)
    assert len(finding.tasks) == 50_000
    assert len(finding.message) < 400
    assert np.array(finding.tasks)[-1] == "abs-99999"


@pytest.mark.parametrize(("layers", "code"), [("1", 0), ("0", 2)])
def test_the_command_line_prints_findings(tmp_path, capsys, layers, code):
    name = f"checked_{layers}"
    (tmp_path / f"{name}.py").write_text(
        "import forgepar as fp\n"
        "def flow(layers):\n"
        "    wf = fp.Workflow()\n"
        "    for _ in range(int(layers)):\n"
        "        wf.add(fp.task(print).options(effects=True))\n"
        "    return wf\n"
    )
    target = f"{tmp_path / name}.py:flow"
    assert cli.main(["check", target, "-p", f"layers={layers}", "-w", "1"]) == code
    assert capsys.readouterr().out.startswith("no compensation: 'print'" if code == 0 else "empty: workflow")
    assert cli.main(["check", target, "-p", "layers=1", "-w", "1", "--rollback", "none"]) == 0
    assert capsys.readouterr().out == ""
