"""What tasks print, log and warn of arrives in the parent: whole lines, each known to be its task's."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest
from conftest import wait_until
from hypothesis import given
from hypothesis import strategies as st

import forgepar as fp
from forgepar.backends.output_capture import (
    _FRAME,
    _PIECE,
    LOG,
    STDERR,
    STDOUT,
    UNKNOWN_TASK,
    FrameReader,
    FrameWriter,
    OutputRecord,
)

PROCESSES = ["forkserver", "spawn", "fork"]


# The wire


def frames_of(*said: tuple[int, int, bytes]) -> bytes:
    """What a writer writes."""
    reading, writing = os.pipe()
    try:
        for kind, task, payload in said:
            FrameWriter(writing, lambda: -7).write(kind, payload, task)
        os.write(writing, b"end")
        return os.read(reading, 1 << 16)[: -len(b"end")]
    finally:
        os.close(reading)
        os.close(writing)


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(min_size=1, max_size=40)), max_size=20), st.integers(1, 50))
def test_lines_come_out_whole_however_they_are_cut(parts, step):
    data = frames_of(*[(STDOUT, task, payload) for task, payload in parts])
    reader, heard = FrameReader(), []
    for at in range(0, len(data), step):
        heard += reader.feed(0, data[at : at + step])
    assert all(said.payload.endswith(b"\n") for said in heard)
    heard += reader.rest()
    for task in range(4):
        told = b"".join(payload for of, payload in parts if of == task)
        whole = told if told.endswith(b"\n") or not told else told + b"\n"
        assert b"".join(said.payload for said in heard if said.task == task) == whole


@given(st.binary(min_size=1, max_size=5 * _PIECE))
def test_records_of_any_length_come_out_as_one(payload):
    data = frames_of((LOG, 5, payload))
    assert FrameReader().feed(0, data) == [OutputRecord(LOG, 5, payload)]


def test_no_frame_is_longer_than_what_the_kernel_keeps_whole():
    writes = []
    writer = FrameWriter(-1, lambda: 3)
    real, os.write = os.write, lambda _, data: writes.append(data)
    try:
        writer.write(STDERR, b"x" * 10_000)
    finally:
        os.write = real
    assert max(map(len, writes)) <= 4096
    assert [_FRAME.unpack_from(data)[2] for data in writes] == [3] * len(writes)


def test_what_no_frame_tells_is_of_no_task():
    assert FrameReader().feed(1, b"a\nb") == [OutputRecord(STDOUT, UNKNOWN_TASK, b"a\n")]


def test_a_line_without_end_does_not_grow_for_ever():
    reader = FrameReader()
    heard = [said for _ in range(40) for said in reader.feed(2, b"x" * 65536)]
    assert sum(len(said.payload) for said in heard) > 1 << 20


# What is printed


def talk(i):
    print("out", i)
    print("err", i, file=sys.stderr)
    os.write(1, b"raw\n")
    return i


@pytest.mark.parametrize("start_method", PROCESSES)
def test_what_tasks_print_is_printed_here(capsys, start_method):
    wf = fp.Workflow()
    wf.map(talk, range(5))
    wf.run(workers=2, start_method=start_method)
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == sorted([f"out {i}" for i in range(5)] + ["raw"] * 5)
    assert sorted(shown.err.splitlines()) == [f"err {i}" for i in range(5)]


def test_lines_carry_the_names_of_their_tasks(any_backend):
    lines = []
    wf = fp.Workflow()
    wf.map(lambda i: print(f"one {i}\ntwo", i), range(30))
    wf.add(fp.task(print).options(name="said"), "bytes", end="")  # a line that is not ended
    wf.run(**any_backend, show=lines.append)
    expected = [fp.OutputLine(f"lambda-{i}", "stdout", f"{word} {i}") for i in range(30) for word in ("one", "two")]
    expected.append(fp.OutputLine("said", "stdout", "bytes"))
    assert sorted(lines, key=str) == sorted(expected, key=str)


def test_lines_are_tagged_on_request(any_backend, capsys):
    wf = fp.Workflow()
    wf.add(fp.task(print).options(name="said"), "a\nb")
    wf.run(**any_backend, show="tagged")
    assert capsys.readouterr().out == "[said] a\n[said] b\n"


def test_threads_and_forked_children_print_whole_lines():
    def shout():
        line = "x" * 3000
        threads = [threading.Thread(target=print, args=(line,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from 3.12 on: of a fork beside threads, which is what is tested
            child = os.fork()
        if not child:
            for _ in range(20):
                print(line)
            sys.stdout.flush()
            os._exit(0)
        for _ in range(20):
            print(line)
        for thread in threads:
            thread.join()
        os.waitpid(child, 0)

    lines = []
    wf = fp.Workflow()
    wf.map(lambda _: shout(), range(2))
    wf.run(workers=2, show=lines.append)
    assert len(lines) == 2 * 44
    assert {len(line.text) for line in lines} == {3000}


def test_child_processes_are_heard_too():
    lines = []
    wf = fp.Workflow()
    wf.add(fp.task(lambda: subprocess.run([sys.executable, "-c", "print('child')"], check=True)).options(name="own"))
    wf.run(workers=1, show=lines.append)
    assert fp.OutputLine("own", "stdout", "child") in lines


def test_much_is_printed_without_loss():
    wf = fp.Workflow()
    wf.map(lambda _: [print("y" * 100) for _ in range(5000)] and None, range(4))
    lines = []
    wf.run(workers=2, show=lines.append)
    assert len(lines) == 20_000


def test_a_line_is_shown_before_its_task_is_done(tmp_path):
    def first(path):
        print("now")
        wait_until(path.exists, "the line to be shown")

    wf = fp.Workflow()
    wf.add(first, tmp_path / "shown")
    wf.run(workers=1, show=lambda line: (tmp_path / "shown").touch())


def test_what_cannot_be_encoded_or_is_bytes_is_printed_as_well():
    def odd():
        print("\udc80")
        sys.stdout.buffer.write(b"\xff\n")
        sys.stdout.close()

    lines = []
    wf = fp.Workflow()
    wf.add(odd)
    after = wf.add(abs, -1)
    assert wf.run(workers=1, show=lines.append)[after] == 1
    assert [line.text for line in lines] == ["\\udc80", "\\xff"]


def test_a_function_that_shows_may_raise(any_backend, capsys):
    """It gets all lines; those it does not take are shown plainly, and the first is told of."""
    seen = []

    def refuse(line):
        seen.append(line.text)
        if line.text != "fine":
            raise RuntimeError(line.text)

    wf = fp.Workflow()
    wf.map(print, ["this", "fine", "that"])
    with pytest.warns(RuntimeWarning, match=r"show= raised RuntimeError \((this|that)\)") as told:
        assert wf.run(**any_backend, show=refuse).ok
    assert len(told) == 1
    assert sorted(seen) == ["fine", "that", "this"]
    assert sorted(capsys.readouterr().out.split()) == ["that", "this"]


def spoil(how):
    """Do to this worker's standard output what its next task is not to suffer from."""
    print("before", how)
    if how == "close":
        sys.stdout.close()
    elif how == "with":
        with sys.stdout:
            pass
    elif how == "replace":
        sys.stdout = io.StringIO()
        sys.stdout.close()
    elif how == "descriptor":
        os.close(1)
        os.close(2)
    else:
        with contextlib.suppress(io.UnsupportedOperation):
            sys.stdout.detach()


def speak(_, path):
    """Print, and have a child process print, while a file is open that could have taken the place of descriptor 1."""
    with open(path, "w") as file:  # noqa: PTH123
        print("after")
        subprocess.run(["echo", "echoed"], check=True)
        return file.fileno()


@pytest.mark.parametrize("how", ["close", "with", "replace", "descriptor", "detach"])
def test_what_a_task_does_to_its_standard_output_harms_no_later_task(how, tmp_path, capsys):
    wf = fp.Workflow()
    path = tmp_path / "file"
    number = wf.add(speak, wf.add(spoil, how), path)
    result = wf.run(workers=1, start_method="fork")
    assert result[number] > 2
    assert path.read_text() == ""
    assert sorted(capsys.readouterr().out.splitlines()) == ["after", f"before {how}", "echoed"]


def test_there_are_three_ways_to_show():
    wf = fp.Workflow()
    wf.add(abs, 1)
    with pytest.raises(ValueError, match=r"show must be one of .*, got 'loud'"):
        wf.run(backend="inline", show="loud")


def test_what_a_dead_worker_wrote_last_is_told():
    def die():
        print("not this", file=sys.stdout)
        os.write(2, b"terminate called\n")
        print("for this reason", file=sys.stderr)
        os._exit(7)

    def fine():
        print("another task's", file=sys.stderr)

    wf = fp.Workflow()
    wf.add(fp.task(die).options(after=wf.add(fine)))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1)
    (note,) = [note for note in caught.value.exceptions[0].__notes__ if "stderr" in note]
    assert sorted(note.splitlines()[1:]) == ["for this reason", "terminate called"]


# What is logged


@pytest.mark.parametrize("start_method", PROCESSES)
def test_records_arrive_with_level_task_and_traceback(caplog, start_method):
    def log():
        logger = logging.getLogger("tests.output")
        logger.debug("unheard")
        logger.info("counted %d", 3, extra={"key": [1]})
        try:
            raise KeyError("lost")
        except KeyError:
            logger.exception("failed")

    caplog.set_level(logging.INFO, "tests.output")
    wf = fp.Workflow()
    wf.add(log)
    wf.run(workers=1, start_method=start_method)
    first, second = [record for record in caplog.records if record.name == "tests.output"]
    assert (first.levelno, first.getMessage(), first.task, first.worker, first.key) == (
        logging.INFO,
        "counted 3",
        "log",
        0,
        [1],
    )
    assert first.process != os.getpid()
    assert "KeyError: 'lost'" in second.exc_text


def test_levels_follow_those_of_the_parent_from_run_to_run(caplog):
    wf = fp.Workflow()
    wf.add(lambda: logging.getLogger("tests.levels").info("said"))
    with fp.WorkflowExecutor(workers=1) as executor:
        for level, expected in ((logging.INFO, 1), (logging.WARNING, 0), (logging.DEBUG, 1)):
            caplog.clear()
            caplog.set_level(level, "tests.levels")
            executor.run(wf)
            assert len(caplog.records) == expected


def test_a_record_that_cannot_travel_whole_travels_plain(caplog):
    wf = fp.Workflow()
    wf.add(lambda: logging.getLogger("tests.plain").warning("said", extra={"lock": threading.Lock()}))
    wf.run(workers=1)
    (record,) = [record for record in caplog.records if record.name == "tests.plain"]
    assert record.getMessage() == "said"
    assert not hasattr(record, "lock")


def test_the_context_has_a_logger(caplog, any_backend):
    wf = fp.Workflow("nightly")
    wf.add(lambda: fp.context().log.warning("careful"))
    wf.run(**any_backend)
    assert [record.name for record in caplog.records] == ["forgepar.tasks.nightly"]


# What is warned of


class OwnWarning(UserWarning):
    pass


@pytest.mark.parametrize("start_method", PROCESSES)
def test_warnings_arrive_once_with_their_class_and_place(start_method):
    def warn(_):
        warnings.warn("careful", OwnWarning, stacklevel=1)

    wf = fp.Workflow()
    wf.map(warn, range(40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        wf.run(workers=2, start_method=start_method)
    (warning,) = caught
    assert warning.category is OwnWarning
    assert str(warning.message) == "careful"
    assert warning.filename == __file__


def test_a_filter_that_makes_errors_makes_them_in_the_task():
    wf = fp.Workflow()
    wf.add(warnings.warn, "careful", OwnWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OwnWarning)
        with pytest.raises(fp.WorkflowFailed) as caught:
            wf.run(workers=1)
    assert isinstance(caught.value.exceptions[0], OwnWarning)


def test_what_is_ignored_here_is_ignored_there(recwarn):
    wf = fp.Workflow()
    wf.add(warnings.warn, "careful", OwnWarning)
    warnings.simplefilter("ignore", OwnWarning)
    wf.run(workers=1)
    assert not list(recwarn)
