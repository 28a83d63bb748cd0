"""Output of threads that run batches, and of threads that do not, in one process."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings

import pytest

from forgepar.backends.hosted_output import HostedOutput, OutputRouter, _RoutedStream
from forgepar.backends.output_capture import LOG, STDERR, STDOUT, WARNING, rules_here
from forgepar.backends.worker import inside_worker


@pytest.fixture
def router():
    return OutputRouter()


@pytest.fixture
def output():
    made = HostedOutput(lambda: 5)
    made.thread = threading.get_ident()
    return made


def texts(output, kind):
    return [record.payload for record in output.records.take() if record.kind == kind]


def in_thread(call, name=None):
    thread = threading.Thread(target=call, name=name)
    thread.start()
    thread.join()


@pytest.mark.parametrize("as_caller", [False, True])
def test_lines_of_a_batch_are_records_of_its_task(router, output, as_caller):
    with router.capturing(output, rules_here(), as_caller=as_caller):
        sys.stdout.write("one\ntw")
        sys.stdout.buffer.write(b"o\xff\nthree")
        sys.stderr.write("error\n")
        output.flush()
    found = output.records.take()
    assert {record.task for record in found} == {5}
    assert [(record.kind, record.payload) for record in found] == [
        (STDOUT, b"one\n"),
        (STDOUT, b"two\xff\n"),
        (STDERR, b"error\n"),
        (STDOUT, b"three\n"),
    ]


@pytest.mark.parametrize("as_caller", [False, True])
def test_logs_and_warnings_are_captured_and_all_is_restored(router, output, as_caller):
    root = logging.getLogger()
    before = sys.stdout, sys.stderr, warnings.showwarning, root.handlers[:], root.level, warnings.filters[:]
    with router.capturing(output, rules_here(), as_caller=as_caller):
        assert inside_worker()
        logging.getLogger("forgepar.tasks").error("logged")
        warnings.simplefilter("always")
        warnings.warn("warned", UserWarning, stacklevel=1)
        warnings.filters[:] = before[-1]
    assert [record.kind for record in output.records.take()] == [LOG, WARNING]
    assert (sys.stdout, sys.stderr, warnings.showwarning, root.handlers, root.level, warnings.filters) == before
    assert not inside_worker()


def test_a_thread_belongs_to_the_only_batch_unless_it_is_the_hosts(router, output, capsys):
    with router.capturing(output, rules_here(), as_caller=False):
        in_thread(lambda: sys.stdout.write("task\n"))
        in_thread(lambda: sys.stdout.write("host\n"), "IO loop")
    assert texts(output, STDOUT) == [b"task\n"]
    assert capsys.readouterr().out == "host\n"


def test_two_batches_have_their_own_output(router, output, capsys):
    other = HostedOutput(lambda: 6)

    def run_other():
        other.thread = threading.get_ident()
        with router.capturing(other, rules_here(), as_caller=False):
            sys.stdout.write("other\n")
            in_thread(lambda: sys.stdout.write("neither\n"))

    with router.capturing(output, rules_here(), as_caller=False):
        in_thread(run_other)
        sys.stdout.write("this\n")
    assert texts(output, STDOUT) == [b"this\n"]
    assert texts(other, STDOUT) == [b"other\n"]
    assert capsys.readouterr().out == "neither\n"


def test_logs_of_the_host_reach_its_handlers_while_those_of_the_caller_replace_them(router, output, caplog):
    with router.capturing(output, rules_here(), as_caller=True):
        in_thread(lambda: logging.getLogger("some.host").error("of the host"), "IO loop")
    assert texts(output, LOG) == []
    assert [record.getMessage() for record in caplog.records] == ["of the host"]


@pytest.mark.parametrize("is_absent", [False, True])
def test_a_stream_of_the_host_may_be_closed_before_a_routed_one_is_collected(router, is_absent):
    original = io.TextIOWrapper(io.BytesIO())
    routed = _RoutedStream(router, STDOUT, None if is_absent else original)
    if is_absent:
        assert (routed.write("text"), routed.buffer.write(b"bytes")) == (4, 5)
        with pytest.raises(io.UnsupportedOperation):
            routed.fileno()
    original.close()
    for stream in (routed.buffer, routed):
        stream.flush()
        stream.close()
        assert not stream.closed  # later tasks use it
