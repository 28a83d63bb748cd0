"""Runs as WfFormat 1.5: valid, and with the same tasks, edges and runtimes as what they are of.

The schema here says in its own words what that of the format, version 1.5, demands: fields, types, patterns, bounds.
It is stricter in that the ids of tasks and files follow the pattern wherever they stand, and links must lead somewhere.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.report.export.wfformat import ids_of, machine_here, wfformat_pieces, write_wfformat
from forgepar.scheduling.run_state import Status

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra test")

FOLDER = Path(os.environ.get("FORGEPAR_TRACES", Path(__file__).parents[4] / "shared" / "data" / "wfinstances"))
TRACES = [
    "epigenomics-chameleon-hep-6seq-50k-001",
    "seismology-chameleon-1100p-001",
    "soykb-chameleon-50fastq-20ch-001",
    "viralrecon-dirt02-001",
]


def text(**more):
    return {"type": "string", "minLength": 1, **more}


def listed(items, **more):
    return {"type": "array", "items": items, **more}


def fields(required, **properties):
    return {"type": "object", "required": required.split(), "properties": properties}


def at_least(kind, least):
    return {"type": kind, "minimum": least}


ID = text(pattern="^[0-9a-zA-Z-_.]*$")
NUMBER = {"type": "number"}
SPECIFIED = fields(
    "name id parents children",
    name=text(),
    id=ID,
    parents=listed(ID),
    children=listed(ID),
    inputFiles=listed(ID),
    outputFiles=listed(ID),
)
EXECUTED = fields(
    "id runtimeInSeconds",
    id=ID,
    runtimeInSeconds=NUMBER,
    executedAt=text(format="date-time"),
    command=fields("", program=text(), arguments=listed(text())),
    coreCount=at_least("number", 1),
    avgCPU=NUMBER,
    readBytes=NUMBER,
    writtenBytes=NUMBER,
    memoryInBytes=NUMBER,
    energyInKWh=NUMBER,
    avgPowerInW=NUMBER,
    priority=NUMBER,
    machine=text(),
    machines=listed(text()),
)
MACHINE = fields(
    "nodeName",
    system={"enum": ["linux", "macos", "windows"]},
    architecture=text(),
    nodeName=text(format="hostname"),
    release=text(),
    memoryInBytes=at_least("integer", 1),
    cpu=fields("", coreCount=at_least("integer", 1), speedInMHz=at_least("integer", 1), vendor=text()),
)
SCHEMA = fields(
    "name schemaVersion workflow",
    name=text(),
    description=text(),
    createdAt=text(format="date-time"),
    schemaVersion={"enum": ["1.5"]},
    runtimeSystem=fields("name version", name=text(), version=text(), url=text(format="uri")),
    author=fields("name email", name=text(), email=text(format="email"), institution=text(), country=text()),
    workflow=fields(
        "specification",
        specification=fields(
            "tasks",
            tasks=listed(SPECIFIED, minItems=1),
            files=listed(fields("id sizeInBytes", id=ID, sizeInBytes=at_least("integer", 0))),
        ),
        execution=fields(
            "makespanInSeconds executedAt tasks",
            makespanInSeconds=NUMBER,
            executedAt=text(format="date-time"),
            tasks=listed(EXECUTED, minItems=1),
            machines=listed(MACHINE, minItems=1),
        ),
    ),
)


def checked(pieces):
    """Parse an instance and hold it against the schema, and against what a schema cannot say."""
    document = json.loads("".join(pieces), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    kind = jsonschema.Draft202012Validator
    kind(SCHEMA, format_checker=kind.FORMAT_CHECKER).validate(document)
    specification, execution = document["workflow"]["specification"], document["workflow"]["execution"]
    tasks = {task["id"]: task for task in specification["tasks"]}
    assert len(tasks) == len(specification["tasks"])
    assert [task["id"] for task in execution["tasks"]] == list(tasks)
    parents = [(parent, task["id"]) for task in tasks.values() for parent in task["parents"]]
    children = [(task["id"], child) for task in tasks.values() for child in task["children"]]
    assert sorted(parents) == sorted(children)
    assert len(set(parents)) == len(parents)
    assert {identity for pair in parents for identity in pair} <= set(tasks)
    check_files(specification)
    nodes = {machine["nodeName"] for machine in execution["machines"]}
    assert {node for task in execution["tasks"] for node in task.get("machines", ())} <= nodes
    return document


def check_files(specification):
    """Each file is told of once, is one task's output, and goes to children of that task alone."""
    files = [file["id"] for file in specification["files"]]
    made = {file: task for task in specification["tasks"] for file in task["outputFiles"]}
    assert sorted(files) == sorted(made)
    assert len(set(files)) == len(files)
    for task in specification["tasks"]:
        for file in task["inputFiles"]:
            assert made[file]["id"] in task["parents"]


def load(number):
    return b"x" * number


def size(*values):
    return len(values)


def some_run():
    wf = fp.Workflow("some run")
    loaded = wf.map(load, [10_000, 1, 50_000])
    joined = wf.add(size, *loaded)
    wf.add(fp.task(size).options(name="the last/one", after=[loaded[0]]), joined)
    return wf.run(backend="inline")


def test_a_run_is_an_instance(tmp_path):
    result = some_run()
    write_wfformat(result.table(), tmp_path / "run.json")
    document = checked([(tmp_path / "run.json").read_text()])
    assert document["name"] == "some run"
    assert result.run_id in document["description"]
    assert document["runtimeSystem"] == {"name": "forgepar", "version": fp.__version__}
    specified = {task["name"]: task for task in document["workflow"]["specification"]["tasks"]}
    assert list(specified) == ["load-0", "load-1", "load-2", "size", "the last/one"]
    assert specified["size"]["parents"] == ["load-0", "load-1", "load-2"]
    assert specified["size"]["inputFiles"] == ["load-0.value", "load-2.value"]
    assert specified["the last/one"]["id"] == "the_last_one"
    assert specified["the last/one"]["parents"] == ["load-0", "size"]
    sizes = {file["id"]: file["sizeInBytes"] for file in document["workflow"]["specification"]["files"]}
    assert sizes == {f"load-{n}.value": result.record(f"load-{n}").bytes for n in (0, 2)}
    execution = document["workflow"]["execution"]
    assert execution["makespanInSeconds"] == result.wall_seconds
    for task, record in zip(execution["tasks"], result.records, strict=True):
        assert task["runtimeInSeconds"] == record.duration
        assert "status" not in task
    assert [task["command"]["program"] for task in execution["tasks"]] == ["load"] * 3 + ["size"] * 2


def test_tasks_that_did_not_run_say_why():
    wf = fp.Workflow()
    wf.add(size, wf.add(load, "many"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False)
    document = checked(wfformat_pieces(caught.value.result.table()))
    failed, skipped = document["workflow"]["execution"]["tasks"]
    assert failed["status"] == "failed"
    assert failed["runtimeInSeconds"] > 0
    assert (skipped["status"], skipped["runtimeInSeconds"]) == ("skipped", 0)
    assert "executedAt" not in skipped


@pytest.mark.parametrize("status", list(Status))
def test_any_status_is_valid_with_times_and_without(status):
    table = some_run().table()
    ended = replace(table, status_of=np.full(len(table), status, np.int8))
    checked(wfformat_pieces(ended))
    nothing = np.full(len(table), np.nan)
    document = checked(wfformat_pieces(replace(ended, start=nothing, seconds=nothing)))
    assert {task["status"] for task in document["workflow"]["execution"]["tasks"]} == {status.name.lower()}


def test_a_run_without_tasks_is_refused(tmp_path):
    table = some_run().table()
    empty = replace(table, names=[], layer=table.layer[:0])
    path = tmp_path / "run.json"
    with pytest.raises(ValueError, match="has no tasks, and WfFormat requires at least one"):
        write_wfformat(empty, path)
    assert not path.exists()


@given(st.lists(st.text(max_size=6) | st.sampled_from(["a/b", "a b", "a_b", "a_b-2", "", "task-2"]), unique=True))
def test_ids_are_plain_and_distinct_and_names_that_are_plain_stay(names):
    ids = ids_of(names)
    assert len(set(ids)) == len(names)
    for name, identity in zip(names, ids, strict=True):
        jsonschema.validate(identity, ID)
        if name.isascii() and name.replace("-", "").replace(".", "").replace("_", "x").isalnum():
            assert identity == name


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(st.characters(), min_size=1, max_size=8), min_size=1, max_size=5, unique=True), st.text(max_size=5)
)
def test_no_name_breaks_it(names, name):
    wf = fp.Workflow(name)
    for given_name in names:
        wf.add(fp.task(load).options(name=given_name), 3)
    document = checked(wfformat_pieces(wf.run(backend="inline").table()))
    assert [task["name"] for task in document["workflow"]["specification"]["tasks"]] == names


def test_a_large_run_is_written_in_pieces():
    wf = fp.Workflow()
    wf.map(size, wf.map(load, range(2_000)))
    pieces = list(wfformat_pieces(wf.run(backend="inline").table()))
    assert len(pieces) > 10
    assert max(map(len, pieces)) < 400_000
    assert len(checked(pieces)["workflow"]["specification"]["tasks"]) == 4_000


@pytest.mark.parametrize("node", ["host", "host.example", "-odd_name-", "", "ünï"])
@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows", "FreeBSD", ""])
def test_machines_are_described_as_the_format_has_it(monkeypatch, node, system):
    monkeypatch.setattr("platform.node", lambda: node)
    monkeypatch.setattr("platform.system", lambda: system)
    kind = jsonschema.Draft202012Validator
    kind(MACHINE, format_checker=kind.FORMAT_CHECKER).validate(machine_here())


# What the schema here is worth


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d.pop("name"),
        lambda d: d.update(schemaVersion="1.4"),
        lambda d: d["workflow"].pop("specification"),
        lambda d: d["workflow"]["specification"].update(tasks=[]),
        lambda d: d["workflow"]["specification"]["tasks"][0].pop("parents"),
        lambda d: d["workflow"]["specification"]["tasks"][1].update(id="load-0"),
        lambda d: d["workflow"]["specification"]["tasks"][0].update(children=[]),
        lambda d: d["workflow"]["specification"]["tasks"][0].update(outputFiles=["a b"]),
        lambda d: d["workflow"]["specification"]["files"][0].update(sizeInBytes=1.5),
        lambda d: d["workflow"]["execution"].pop("executedAt"),
        lambda d: d["workflow"]["execution"]["tasks"][0].update(runtimeInSeconds="1"),
        lambda d: d["workflow"]["execution"]["tasks"][0].update(machines=["elsewhere"]),
        lambda d: d["workflow"]["execution"]["machines"][0].update(system="BSD"),
        lambda d: d["runtimeSystem"].pop("version"),
    ],
)
def test_what_is_wrong_is_found(break_it):
    document = checked(wfformat_pieces(some_run().table()))
    break_it(document)
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        checked([json.dumps(document)])


# There and back


def instance(name):
    path = FOLDER / f"{name}.json"
    if not path.exists():
        pytest.skip(f"there is no {path}; set FORGEPAR_TRACES to the folder of the traces")
    return json.loads(path.read_text())


def as_table(document):
    """The run of a workflow of an instance's tasks and dependencies, with its runtimes in the place of its own."""
    tasks = {task["id"]: task for task in document["workflow"]["specification"]["tasks"]}
    wf, handles = fp.Workflow(document["name"]), {}
    waiting = [*tasks]
    while waiting:
        for identity in waiting:
            if all(parent in handles for parent in tasks[identity]["parents"]):
                before = [handles[parent] for parent in tasks[identity]["parents"]]
                handles[identity] = wf.add(fp.task(size).options(name=identity), *before)
        waiting = [identity for identity in waiting if identity not in handles]
    table = wf.run(backend="inline").table()
    runtimes = {task["id"]: task["runtimeInSeconds"] for task in document["workflow"]["execution"]["tasks"]}
    return replace(table, seconds=np.array([runtimes[name] for name in table.names], np.float64))


def said(document):
    """Tasks, edges and runtimes of an instance."""
    workflow = document["workflow"]
    return (
        {task["id"] for task in workflow["specification"]["tasks"]},
        {(parent, task["id"]) for task in workflow["specification"]["tasks"] for parent in task["parents"]},
        {task["id"]: task["runtimeInSeconds"] for task in workflow["execution"]["tasks"]},
    )


@pytest.mark.parametrize("name", TRACES)
def test_real_instances_come_back_as_they_were(name):
    given_instance = instance(name)
    back = checked(wfformat_pieces(as_table(given_instance)))
    assert said(back) == said(given_instance)
    assert back["name"] == given_instance["name"]


@pytest.mark.parametrize("name", TRACES)
def test_the_schema_here_takes_real_instances(name):
    """But for the ids, in which real ones have slashes and colons, and for dates without separators."""
    loose = json.loads(json.dumps(SCHEMA).replace(json.dumps(ID["pattern"]), '"."'))
    jsonschema.Draft202012Validator(loose).validate(instance(name))
