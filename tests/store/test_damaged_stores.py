"""A store in which anything is damaged: whoever reads it is told so by a StoreError, or computes again."""

from __future__ import annotations

import shutil
import sqlite3
import sys

import pytest

import forgepar as fp
from forgepar.cli.main import main

WRONG = {"bytes": b"\xff\x00garbage", "text": "x", "NULL": None, "huge": 2**62, "negative": -3, "inf": float("inf")}
TABLES = ["runs", "tasks", "attempts", "events", "values"]


def fail(_):
    raise ValueError("no")


def declared():
    wf = fp.Workflow("kept")
    first = wf.add(abs, -1)
    many = wf.map(str, [first, 2])
    wf.add(bytes, 100_000)
    wf.add(fp.task(fail).options(after=many, name="bad", retries=1), first)
    wf.add(fp.task(abs).options(name="given"), first)
    return wf


def run_again():
    with pytest.raises(fp.WorkflowFailed) as caught:
        declared().run(backend="inline", store="runs.db", resume=True, fail_fast=False)
    result = caught.value.result
    assert (result["given"], result["str-1"], len(result["bytes"])) == (1, "2", 100_000)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return the folder of a store with two runs, the second of which took values over."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_again()
        run_again()
    with sqlite3.connect(folder / "runs.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return folder


def columns_of(table):
    from forgepar.store.schema import MIGRATIONS

    with sqlite3.connect(":memory:") as connection:
        for script in MIGRATIONS:
            connection.executescript(script)
        found = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    connection.close()
    return found


def damage(sound, folder, statement, *values):
    """Copy a store and change it; tell whether the database takes the change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    connection = sqlite3.connect(folder / "runs.db")
    try:
        connection.execute(statement, values)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except (sqlite3.IntegrityError, OverflowError):
        return False
    finally:
        connection.close()
    return True


def looks():
    """Yield every way to read a store, by name."""

    def of_run(look):
        def call():
            with fp.Store.open("runs.db") as store:
                for run in store.runs():
                    look(store.run(run.number))

        return call

    yield "facts", of_run(lambda run: run.facts)
    yield "table", of_run(lambda run: (list(run.table()), run.table().layer_table(), run.table().slowest()))
    yield "failures", of_run(lambda run: run.failures())
    yield "events", of_run(lambda run: list(run.events()))
    yield "stored values", of_run(lambda run: run.stored_values())
    for name in ("abs", "str-1", "bytes", "given"):
        yield f"value of {name}", of_run(lambda run, name=name: run.value(name))
    yield "resume", run_again
    yield "collect", lambda: fp.collect("runs.db", keep=1, max_bytes=10)


def faults_of(calls):
    faults = []
    for name, call in calls:
        try:
            call()
        except (fp.StoreError, fp.MissingResult, fp.UnknownTask):
            continue
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    return faults


@pytest.mark.filterwarnings("ignore::forgepar.StoreWarning")
@pytest.mark.parametrize(("table", "column"), [(table, column) for table in TABLES for column in columns_of(table)])
def test_a_damaged_column_is_told_of(sound, tmp_path, monkeypatch, table, column):
    faults = []
    folder = tmp_path / "copy"
    update = f'UPDATE OR IGNORE "{table}" SET "{column}" = '  # noqa: S608  (names of this program)
    changes = [(label, f"{update}?", (value,)) for label, value in WRONG.items()]
    cut = f'{update}substr("{column}", 1, length("{column}") / 2)'
    for label, statement, values in (*changes, ("cut", cut, ())):
        if damage(sound, folder, statement, *values):
            monkeypatch.chdir(folder)
            faults += [f"{label}: {fault}" for fault in faults_of(looks())]
    assert not faults, f"{table}.{column}\n  " + "\n  ".join(faults)


@pytest.mark.filterwarnings("ignore::forgepar.StoreWarning")
@pytest.mark.parametrize("table", TABLES)
def test_rows_that_are_missing_are_told_of(sound, tmp_path, monkeypatch, table):
    assert damage(sound, tmp_path / "copy", f'DELETE FROM "{table}"')  # noqa: S608  (as above)
    monkeypatch.chdir(tmp_path / "copy")
    assert faults_of(looks()) == []


COMMANDS = [
    ["runs", "runs.db"],
    ["runs", "runs.db", "--json"],
    ["show", "runs.db"],
    ["values", "runs.db", "1"],
    ["values", "runs.db", "1", "abs"],
    ["export", "runs.db", "1"],
    ["export", "runs.db", "2", "--format", "wfformat"],
    ["export", "runs.db", "2", "--format", "chrome"],
    ["plan", "runs.db"],
    ["gc", "runs.db", "--keep", "1"],
]


@pytest.mark.filterwarnings("ignore::forgepar.StoreWarning")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_say_it_in_a_line(sound, tmp_path, monkeypatch, capsys, command):
    places = [("runs", "began"), ("runs", "workers"), ("runs", "edges"), ("runs", "bases"), ("tasks", "seconds")]
    for table, column in [*places, ("tasks", "status"), ("values", "payload"), ("attempts", "worker")]:
        for value in ("x", b"\xff", 2**62):
            update = f'UPDATE OR IGNORE "{table}" SET "{column}" = ?'  # noqa: S608  (as above)
            damage(sound, tmp_path / "copy", update, value)
            monkeypatch.chdir(tmp_path / "copy")
            code = main(command)
            assert code in (0, 1, 2), f"{table}.{column} = {value!r}: exit code {code}"
            told = capsys.readouterr().err
            assert "Traceback" not in told
            assert (code == 0) or len(told.strip().splitlines()) == 1, told
    assert sys.exc_info()[0] is None
