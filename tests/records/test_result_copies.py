"""Copies of a result: its values, records, events and errors, without its arena and its functions."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import own_arenas

import forgepar as fp

HOW = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda result, n=n: pickle.loads(pickle.dumps(result, n)) for n in (2, 4, 5)},
}
BACKENDS = {"inline": {"backend": "inline"}, "fork": {"workers": 1, "start_method": "fork"}}


@pytest.fixture(params=HOW)
def copied(request):
    return HOW[request.param]


@pytest.fixture(params=BACKENDS)
def rules(request):
    return BACKENDS[request.param]


class Refusal(Exception):
    """One that plain pickle cannot make again."""

    def __init__(self, where, *, why):
        super().__init__(f"{where}: {why}")
        self.why = why


def declared():
    wf = fp.Workflow("copied")
    return wf, {
        "number": wf.add(abs, -1),
        "text": wf.add(fp.task(str).options(name="text"), "x" * 5000),
        "array": wf.add(np.arange, 100_000),
        "mixed": wf.add(lambda: {"a": [1, (2, "b")], "c": np.ones(50_000)}),
        "function": wf.add(lambda: lambda: 7),
        "many": wf.map(lambda i: [i], range(3)),
    }


def test_values_records_events_and_names_are_equal(copied, rules):
    wf, handles = declared()
    result = wf.run(**rules)
    twin = copied(result)
    assert twin[handles["number"]] == 1
    assert twin["text"] == "x" * 5000
    assert np.array_equal(twin[handles["array"]], np.arange(100_000))
    assert twin[handles["mixed"]]["a"] == [1, (2, "b")]
    assert twin[handles["mixed"]]["c"].sum() == 50_000
    assert twin[handles["function"]]() == 7
    assert twin[handles["many"]] == [[0], [1], [2]]
    assert list(twin.records) == list(result.records)
    assert list(twin.events) == list(result.events)
    assert twin.summary() == result.summary()
    assert (twin.run_id, twin.bytes, twin.standing()) == (result.run_id, result.bytes, result.standing())
    assert twin.table().columns() == result.table().columns()
    assert copied(result.table()).columns() == result.table().columns()
    with pytest.raises(fp.ForeignHandle):
        twin[fp.Workflow().add(abs, 1)]
    with pytest.raises(fp.UnknownTask, match="after this run began"):
        twin[wf.add(abs, 1)]


def test_a_copy_of_a_copy_is_as_good(copied):
    wf, handles = declared()
    twin = copied(copied(wf.run(backend="inline")))
    assert twin[handles["many"]] == [[0], [1], [2]]
    assert twin[handles["function"]]() == 7


def test_no_arena_is_left_that_a_copy_would_need():
    wf, handles = declared()
    data = pickle.dumps(wf.run(workers=1, start_method="fork"))
    assert own_arenas() == set()
    assert pickle.loads(data)[handles["array"]][-1] == 99_999


def test_what_was_changed_after_it_was_looked_up_stays_changed():
    wf, handles = declared()
    result = wf.run(backend="inline")
    result[handles["many"]][1].append("more")
    twin = pickle.loads(pickle.dumps(result))
    assert twin[handles["many"]] == [[0], [1, "more"], [2]]
    twin[handles["many"]][0].append("of the copy")
    assert result[handles["many"]][0] == [0]


@pytest.mark.parametrize("detaches", ["before", "after", "both"])
def test_detached_values_can_be_written_in_a_copy(detaches):
    wf, handles = declared()
    result = wf.run(backend="inline")
    if detaches != "after":
        result.detach()[handles["array"]][0] = 5
    twin = pickle.loads(pickle.dumps(result))
    if detaches != "before":
        twin.detach()
    assert twin[handles["array"]][0] == (0 if detaches == "after" else 5)
    twin[handles["array"]][0] = 9
    assert result[handles["array"]][0] == (0 if detaches == "after" else 5)


def test_a_failed_run_keeps_its_errors_and_what_was_undone(copied):
    def undo(value):
        raise Refusal("undo", why="of no use")

    def refuse():
        raise Refusal("here", why="no room")

    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(compensate=undo), -1)
    second = wf.add(fp.task(neg).options(name="second"), first)
    wf.add(fp.task(refuse).options(after=second))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", outputs="all")
    result = caught.value.result
    twin = copied(result)
    assert {name: (type(error), str(error), error.why) for name, error in twin.errors.items()} == {
        "refuse": (Refusal, "here: no room", "no room")
    }
    assert twin.rollback.failed["abs"].why == "of no use"
    assert twin.rollback.skipped == result.rollback.skipped == ("second",)
    assert (twin.ok, twin.status, twin[first]) == (False, "failed", 1)
    with pytest.raises(fp.MissingResult, match="it failed"):
        twin["refuse"]


def neg(x):
    return -x


def test_the_error_of_a_failed_run_can_be_pickled_with_its_result():
    wf = fp.Workflow()
    first = wf.add(abs, -1)
    wf.add(divmod, first, 0)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", outputs="all")
    twin = pickle.loads(pickle.dumps(caught.value))
    assert twin.result[first] == 1


def test_arguments_do_not_travel_with_a_result():
    wf = fp.Workflow()
    total = wf.add(len, b"\0" * 1_000_000)
    data = pickle.dumps(wf.run(backend="inline"))
    assert len(data) < 100_000
    assert pickle.loads(data)[total] == 1_000_000


def test_another_program_can_load_what_a_script_has_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pickle, sys
        import forgepar as fp
        class Point:
            def __init__(self, x): self.x = x
        wf = fp.Workflow()
        wf.map(lambda x: Point(x), range(3))
        with open(sys.argv[1], "wb") as file:
            pickle.dump(wf.run(workers=1, start_method="fork"), file)
        """)
    )
    subprocess.run([sys.executable, str(script), str(tmp_path / "result")], check=True)
    result = pickle.loads((tmp_path / "result").read_bytes())
    assert [result[f"lambda-{i}"].x for i in range(3)] == [0, 1, 2]
