"""Asking a store: which runs, which tasks, which values; what runs and tasks are called there."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import numpy as np
import pytest

import forgepar as fp
from forgepar.store.database import files_of
from forgepar.store.gc import collect


def workflow(name: str = "small") -> fp.Workflow:
    wf = fp.Workflow(name)
    total = wf.add(fp.task(sum).options(name="total of all"), wf.map(abs, [-3, 4]))
    wf.add(np.full, 50_000, total)
    return wf


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "runs.db"
    for name in ("first", "second"):
        workflow(name).run(backend="inline", store=path)
    with fp.Store.open(path) as opened:
        yield opened


def test_the_facts_of_runs_in_order(store):
    first, second = store.runs()
    assert (first.number, first.workflow, first.status, first.n_tasks, first.n_layers) == (
        1,
        "first",
        "completed",
        4,
        3,
    )
    assert (first.n_workers, first.schedule, first.is_resumed, first.pid) == (1, "layers", False, os.getpid())
    assert second.began_at >= first.began_at
    assert 0 < first.wall_seconds < 60
    assert first.forgepar == fp.__version__


def test_a_run_by_its_number_its_id_or_a_part_of_it(store):
    first, second = store.runs()
    assert store.run(1).number == store.run("1").number == store.run(first.run_id).number == 1
    assert store.run(second.run_id[:9]).number == store.run().number == store.run("last").number == 2


@pytest.mark.parametrize("which", [3, "nobody", 0, "", "0"])
def test_no_such_run_is_told(store, which):
    with pytest.raises(fp.StoreError, match=r"has (no run|2 runs with ids that begin)"):
        store.run(which)


def test_values_by_name(store):
    run = store.run(2)
    assert run.value("abs-1") == 4
    assert run.value("total of all") == 7
    np.testing.assert_array_equal(run.value("full"), np.full(50_000, 7))
    listed = {value.name: (value.n_bytes, value.made_by) for value in run.stored_values()}
    assert set(listed) == {"abs-0", "abs-1", "total of all", "full"}
    assert listed["full"][0] >= 400_000
    assert listed["full"][1] == 2


def test_values_of_cached_tasks_are_those_of_the_run_that_made_them(tmp_path):
    path = tmp_path / "runs.db"
    for _ in range(2):
        workflow().run(backend="inline", store=path, resume=True)
    with fp.Store.open(path) as opened:
        run = opened.run(2)
        assert run.value("abs-0") == 3
        assert {value.made_by for value in run.stored_values()} == {1}


def test_what_has_no_value_is_told(tmp_path):
    wf = fp.Workflow()
    wf.add(fp.task(lambda: 1).options(cache=False, name="now"))
    wf.run(backend="inline", store=tmp_path / "runs.db")
    with fp.Store.open(tmp_path / "runs.db") as opened:
        with pytest.raises(fp.MissingResult, match="has no value of task 'now'"):
            opened.run().value("now")
        with pytest.raises(fp.UnknownTask, match="has no task named 'then'"):
            opened.run().value("then")


def test_the_value_of_a_task_that_became_others_is_told_where_to_find(tmp_path):
    wf = fp.Workflow()
    wf.add(sum, wf.map(abs, wf.add(fp.task(list).options(name="items"), (-1, 2))))
    wf.run(backend="inline", store=tmp_path / "runs.db")
    with fp.Store.open(tmp_path / "runs.db") as opened:
        with pytest.raises(
            fp.MissingResult, match=r"'abs' .* was replaced by other tasks. Ask for the value of 'abs/output'"
        ):
            opened.run().value("abs")
        assert opened.run().value("abs/output") == [1, 2]


def test_a_run_that_is_removed_meanwhile_is_told(store):
    run = store.run(1)
    collect(store.path, keep=1)
    for look in (lambda: run.facts, run.table, run.events, run.stored_values, lambda: run.value("abs-0")):
        with pytest.raises(fp.StoreError, match="run 1 was removed from"):
            look()
    assert len(store.run(2).table()) == 4


def test_altered_values_are_told(store):
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute('UPDATE "values" SET checksum = checksum + 1')
        connection.commit()
    with pytest.raises(fp.StoreError, match="was altered"):
        store.run(2).value("abs-1")
    for path in files_of(store.path).glob("??/*"):
        path.write_bytes(b"")
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute('UPDATE "values" SET checksum = checksum - 1')
        connection.commit()
    with pytest.raises(fp.StoreError, match="has 0 bytes instead of"):
        store.run(2).value("full")


def test_a_byte_altered_in_the_database_is_never_a_wrong_value(tmp_path):
    path = tmp_path / "runs.db"
    wf = fp.Workflow()
    made = wf.map(lambda i: f"value of task {i} " * 20, range(20))
    expected = wf.run(backend="inline", store=path)[made]
    data = path.read_bytes()
    place = data.index(b"value of task 7 ") + 9
    path.write_bytes(data[:place] + b"F" + data[place + 1 :])
    with pytest.warns(
        fp.StoreWarning, match=r"the stored value of task 'lambda-7' is not used and will be computed again"
    ):
        again = wf.run(backend="inline", store=path, resume=True)
    assert again[made] == expected
    assert again.status_counts() == {"cached": 19, "completed": 1}


def test_a_run_whose_program_is_gone_was_interrupted(store):
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("UPDATE runs SET status = 'running', pid_started = 'another one', wall_seconds = NULL")
        connection.commit()
    facts = store.run(1).facts
    assert facts.status == "interrupted"
    assert 0 < facts.wall_seconds < 60
    assert store.run(1).table().status == "interrupted"


def test_a_table_is_what_pandas_takes(store):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(store.run(1).table().columns())
    assert frame["name"].tolist() == ["abs-0", "abs-1", "total of all", "full"]
    assert set(frame.status) == {"completed"}


def test_names_come_back_whatever_they_are(tmp_path):
    names = ["a-1", 'with "quotes" and <tags>', "näme", "7", "a\nb"]
    wf = fp.Workflow()
    for name in names:
        wf.add(fp.task(abs).options(name=name), 1)
    wf.map(abs, range(2))
    wf.run(backend="inline", store=tmp_path / "runs.db")
    with fp.Store.open(tmp_path / "runs.db") as opened:
        assert list(opened.run().table().names) == [*names, "abs-0", "abs-1"]
        assert opened.run().value("a\nb") == 1


def test_nothing_is_unpickled_but_for_a_value(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("open(%r, 'w').close()" % str(tmp_path / "sprung"),))  # noqa: UP031

    wf = fp.Workflow()
    wf.add(lambda: 1)
    wf.run(backend="inline", store=tmp_path / "runs.db")
    import pickle

    from forgepar.store.resume import BLOB, checksum_of

    with closing(sqlite3.connect(tmp_path / "runs.db")) as connection:
        ((fingerprint,),) = connection.execute('SELECT fingerprint FROM "values"').fetchall()
        data = pickle.dumps(Trap())
        row = (BLOB, checksum_of(fingerprint, BLOB, data), data)
        connection.execute('UPDATE "values" SET kind = ?, checksum = ?, payload = ?', row)
        connection.commit()
    with fp.Store.open(tmp_path / "runs.db") as opened:
        run = opened.run()
        assert opened.runs()
        assert len(run.table()) == 1
        assert list(run.events())
        assert run.stored_values()
        assert not (tmp_path / "sprung").exists()
        run.value("lambda")
        assert (tmp_path / "sprung").exists()
