"""What `Workflow.check` says, and of what it says nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.workflow import checks


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
    finding = only(wf)
    assert (finding.kind, finding.is_fatal, finding.tasks) == ("duplicate name", True, ("abs",))


def test_all_that_is_wrong_is_told_at_once():
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(effects=True), 1)
    second = wf.add(fp.task(abs).options(name="abs"), first)
    wf.add_dependency(first, after=second)
    told = ["cycle", "duplicate name", "no timeout", "no compensation"]
    assert kinds(wf, layer_timeout=1) == told


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


def test_the_order_that_costs_most_by_itself_is_told_first():
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first"), 1)
    side = [wf.add(fp.task(abs).options(name=f"side-{i}", after=first), 1) for i in range(2)]
    joined = wf.add(fp.task(sum).options(name="joined"), side)
    late = wf.add(fp.task(abs).options(name="late", after=[joined, joined]), 1)
    fp.sequence(wf, late, abs, abs)
    finding = only(wf, workers=1)
    assert finding.tasks == ("side-0", "side-1", "late")
    assert "'late' after 'joined' (3 by itself), 'side-0' after 'first', 'side-1' after 'first':" in finding.message
    assert "3 of 6 layers less" in finding.message


def test_order_behind_a_task_with_effects_has_its_reason():
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first", effects=True, compensate=print), 1)
    wf.add(fp.task(abs).options(name="second", after=first), 1)
    assert wf.check(workers=1) == []


def test_that_a_branch_waits_for_what_decides_is_no_needless_order():
    wf = fp.Workflow()
    flag = wf.add(bool, 1)
    either = fp.when(wf, flag, lambda: fp.sequence(wf, 1, abs, abs, abs), lambda: wf.add(abs, 2))
    assert wf.check(workers=1) == []
    wf.add(fp.task(str).options(name="late", after=either), 1)
    assert only(wf, workers=1).tasks == ("late",)


@st.composite
def orders_and_data(draw):
    """For each task, which earlier ones it takes the value of, and which it merely waits for."""
    n = draw(st.integers(2, 9))
    return [[draw(st.sets(st.integers(0, i - 1), max_size=2)) if i else set() for _ in range(2)] for i in range(n)]


def depth(rows, left_out=frozenset()):
    """How many layers there are without some of the orders: (waited for, waits)."""
    layers = []
    for waits, (data, order) in enumerate(rows):
        before = data | {first for first in order if (first, waits) not in left_out}
        layers.append(max((layers[first] + 1 for first in before), default=0))
    return max(layers) + 1


@settings(deadline=None, max_examples=200)
@given(orders_and_data())
def test_what_order_costs_is_what_there_is_without_it(rows):
    wf = fp.Workflow()
    handles = []
    for number, (data, order) in enumerate(rows):
        options = fp.task(list).options(name=f"t{number}", after=[handles[i] for i in sorted(order)])
        handles.append(wf.add(options, [handles[i] for i in sorted(data)]))
    loose = {(first, waits) for waits, (data, order) in enumerate(rows) for first in order - data}
    saved = depth(rows) - depth(rows, loose)
    findings = wf.check(workers=1)
    assert len(findings) == bool(saved)
    if saved:
        message = findings[0].message
        assert f"{saved} of {depth(rows)} layers less" in message
        told = re.findall(r"'t(\d)' after 't(\d)' \((\d) by itself\)", message)
        alone = {(int(first), int(waits)): int(cost) for waits, first, cost in told}
        expected = {order: cost for order in loose if (cost := depth(rows) - depth(rows, {order}))}
        assert alone.items() <= expected.items()
        assert len(alone) == min(len(expected), 3)
        assert {f"t{waits}" for _, waits in expected} <= set(findings[0].tasks)


def test_layers_narrower_than_the_workers():
    wf = fp.Workflow()
    handle = wf.add(abs, 1)
    for _ in range(3):
        handle = wf.add(abs, handle)
    finding = only(wf, workers=4)
    assert finding.kind == "narrow layers"
    assert "4 of 4 layers have fewer tasks than the 4 workers, so 75% of the worker time is idle" in finding.message
    assert "100% of the tasks are in such layers" in finding.message
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


def test_memory_of_another_machine():
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(memory="2GiB"), 1)
    assert wf.check(workers=1, available_memory="2GiB") == []
    finding = only(wf, workers=1, available_memory=1 << 30)
    assert (finding.kind, finding.tasks) == ("too much memory", ("abs",))
    assert "declare up to 2.0 GiB, but the machine has only 1.0 GiB in all" in finding.message


def test_effects_without_compensation():
    wf = fp.Workflow()
    wf.add(fp.task(abs).options(name="undone", effects=True, compensate=print), 1)
    wf.add(fp.task(abs).options(name="left", effects=True), 1)
    wf.add(abs, 1)
    finding = only(wf, workers=1)
    assert (finding.kind, finding.tasks) == ("no compensation", ("left",))
    assert "1 of 2 such tasks have a compensate=" in finding.message
    assert wf.check(workers=1, rollback="none") == []
    assert wf.check(workers=1, rollback=lambda name: name == "undone") == []
    assert only(wf, workers=1, rollback=lambda name: name == "left").tasks == ("left",)


@pytest.mark.parametrize(
    "rules", [{"workers": 0}, {"workers": "2"}, {"layer_timeout": 0}, {"rollback": "some"}, {"available_memory": "x"}]
)
def test_what_a_run_would_refuse_is_refused(rules):
    ((name, value),) = rules.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        fp.Workflow().check(**rules)


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
    assert capsys.readouterr().out.startswith("no compensation: 'print'" if code == 0 else "empty: Workflow")
    assert cli.main(["check", target, "-p", "layers=1", "-w", "1", "--rollback", "none"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["check", target, "-p", "layers=1", "-w", "1", "--layer-timeout", "5"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["no timeout", "no compensation"]


def test_the_command_line_tells_a_bad_workflow_from_bad_usage(tmp_path, capsys):
    path = tmp_path / "large.py"
    path.write_text("import forgepar as fp\nworkflow = fp.Workflow()\nworkflow.add(fp.task(memory='8MiB')(print))\n")
    assert cli.main(["check", str(path), "--available-memory", "8MiB"]) == 0
    assert cli.main(["check", str(path), "--available-memory", "4MiB"]) == 2
    assert "'print' declare up to 8.0 MiB, but the machine has only 4.0 MiB" in capsys.readouterr().out
    assert cli.main(["check", str(path), "--available-memory", "some"]) == 2
    assert cli.main(["check", str(path), "--workers", "0"]) == 2
    assert cli.main(["check", f"{path}:missing"]) == 2
