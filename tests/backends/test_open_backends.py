"""Backends of executors that were garbage collected are closed, without a trace in later errors."""

from __future__ import annotations

import sys
import threading
import traceback

import pytest

from forgepar.backends import open_backends


class Backend:
    """A backend that counts how often it is closed.

    Args:
        error: what closing it raises; None for nothing.
    """

    def __init__(self, error=None):
        self.n_closed = 0
        self._error = error
        self._lock = threading.Lock()
        open_backends.register(self)

    def close(self):
        with self._lock:
            if self.n_closed:
                return  # as a backend: closing it again does nothing
            self.n_closed += 1
            open_backends.unregister(self)
            if self._error is not None:
                raise self._error

    def give_up(self):
        pass

    def leave_to_parent(self):
        pass


def test_closing_what_was_dropped_raises_nothing_inside_that_an_interrupt_could_name():
    backends = [Backend(), Backend()]
    for backend in backends:
        open_backends.drop(backend)
    raised = []

    def trace(frame, event, argument):
        if event == "exception":
            raised.append(argument[0])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        open_backends.close_dropped()
    finally:
        sys.settrace(before)
    assert raised == []
    assert [backend.n_closed for backend in backends] == [1, 1]


@pytest.mark.parametrize("error", [IndexError("of the backend"), OSError("of the backend")])
def test_an_error_of_closing_is_raised_without_another_one_before_it(error):
    open_backends.drop(Backend(error))
    with pytest.raises(type(error), match="of the backend") as caught:
        open_backends.close_dropped()
    assert "During handling" not in "".join(traceback.format_exception(caught.value))


def test_threads_that_close_what_was_dropped_close_all():
    backends = [Backend() for _ in range(500)]
    for backend in backends:
        open_backends.drop(backend)
    ready = threading.Barrier(4)

    def close():
        ready.wait()
        open_backends.close_dropped()

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {backend.n_closed for backend in backends} == {1}
