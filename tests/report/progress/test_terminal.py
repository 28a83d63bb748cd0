"""Frames and printed lines on one terminal, as a person sees them."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from conftest import wait_until
from pseudo_terminal import pseudo_terminal

from forgepar.report.progress.terminal import Diverted, Footer, Frame, FullScreen, Keys, is_terminal, size_of


@contextmanager
def on_terminal():
    """Have the standard streams of this process be a terminal: within the test, as pytest replaces them before it."""
    with (
        pseudo_terminal(40, 10) as terminal,
        redirect_stdout(terminal.stream),
        redirect_stderr(terminal.stream),
    ):
        yield terminal


@contextmanager
def with_footer():
    with on_terminal() as terminal:
        footer = Footer(terminal.stream)
        footer.open()
        try:
            yield terminal, footer
        finally:
            footer.close()


@pytest.fixture(autouse=True)
def known_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def frame(*lines):
    return Frame("".join(f"{line}\n" for line in lines), [len(line) for line in lines])


def test_a_frame_takes_the_place_of_the_last():
    with with_footer() as (terminal, footer):
        footer.show(frame("one", "two", "three"))
        footer.show(frame("1", "2"))
        terminal.settle()
        assert terminal.lines == ["1", "2"]


def test_what_is_printed_goes_above():
    with with_footer() as (terminal, footer):
        footer.show(frame("====", "----"))
        print("first")
        print("second", file=sys.stderr)
        sys.stdout.writelines(["third\n", "fourth\n"])
        terminal.settle()
        assert terminal.lines == ["first", "second", "third", "fourth", "====", "----"]


def test_more_lines_than_the_screen_has_scroll_away_whole():
    with with_footer() as (terminal, footer):
        for number in range(50):
            footer.show(frame("====", f"{number}"))
            print(f"line {number}")
        terminal.settle()
        assert terminal.text.splitlines() == [*(f"line {number}" for number in range(50)), "====", "49"]


def test_amid_a_line_the_frame_waits_for_its_end():
    with with_footer() as (terminal, footer):
        footer.show(frame("===="))
        print("password? ", end="")
        footer.show(frame("----"))
        terminal.settle()
        assert terminal.lines == ["password?"]
        print("thanks")
        terminal.settle()
        assert terminal.lines == ["password? thanks", "----"]


def test_log_handlers_that_kept_the_stream_write_above():
    with on_terminal() as terminal:
        logger = logging.getLogger("test.terminal")
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        footer = Footer(terminal.stream)
        try:
            footer.open()
            footer.show(frame("===="))
            logger.warning("careful")
            terminal.settle()
            assert terminal.lines == ["careful", "===="]
            footer.close()
            assert handler.stream is terminal.stream
        finally:
            logger.removeHandler(handler)


def test_threads_print_whole_lines():
    with with_footer() as (terminal, footer):
        footer.show(frame("===="))

        def talk(name):
            for number in range(100):
                sys.stdout.write(f"{name} {number}\n")

        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for number in range(100):
            footer.show(frame(f"==== {number}"))
        for thread in threads:
            thread.join()
        terminal.settle()
        lines = terminal.text.splitlines()
        assert lines[-1] == "==== 99"
        assert sorted(lines[:-1]) == sorted(f"{name} {number}" for name in "abc" for number in range(100))


def test_a_narrower_terminal_wraps_the_frame_which_is_erased_all_the_same():
    with with_footer() as (terminal, footer):
        # pyte cuts lines where most terminals wrap them, so the rows that are erased are counted in what was written.
        footer.show(frame("=" * 30, "-" * 10))
        terminal.settle()
        terminal.resize(20, 10)
        footer.show(frame("==", "--"))
        terminal.settle()
        assert terminal.raw.rindex(b"\x1b[3A\r\x1b[J") > terminal.raw.rindex(b"-" * 10)
        assert terminal.lines == ["==", "--"]
        assert footer.size == (20, 10)


def test_closing_takes_the_frame_away_and_leaves_a_last_line():
    with on_terminal() as terminal:
        footer = Footer(terminal.stream)
        footer.open()
        kept = sys.stdout
        assert isinstance(kept, Diverted)
        footer.show(frame("====", "----"))
        footer.close("done\n")
        footer.close()
        assert sys.stdout is sys.stderr is terminal.stream
        kept.write("later\n")  # by whoever kept it
        terminal.settle()
        assert terminal.lines == ["done", "later"]
        assert not terminal.screen.cursor.hidden


def test_closing_leaves_alone_what_others_put_there(monkeypatch):
    with on_terminal() as terminal:
        footer = Footer(terminal.stream)
        footer.open()
        other = io.StringIO()
        monkeypatch.setattr(sys, "stdout", other)
        footer.close()
        assert sys.stdout is other


def test_a_file_is_not_diverted(monkeypatch):
    with on_terminal() as terminal:
        file = io.StringIO()
        monkeypatch.setattr(sys, "stdout", file)
        footer = Footer(terminal.stream)
        footer.open()
        footer.show(frame("===="))
        print("into the file")
        footer.close()
        assert file.getvalue() == "into the file\n"


def test_a_diverted_stream_is_in_all_else_the_stream():
    with with_footer() as (terminal, _):
        assert sys.stdout.fileno() == terminal.stream.fileno()
        assert sys.stdout.isatty()
        assert sys.stdout.encoding == "utf-8"


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_what_cannot_move_its_cursor_is_no_terminal(monkeypatch, kind):
    with on_terminal() as terminal:
        assert is_terminal(terminal.stream)
        monkeypatch.setenv("TERM", kind)
        assert not is_terminal(terminal.stream)


def test_files_and_nothing_are_no_terminals(tmp_path):
    with (tmp_path / "file").open("w") as file:
        assert not is_terminal(file)
    assert not is_terminal(file)  # closed
    assert not is_terminal(None)
    assert size_of(io.StringIO()) == (80, 24)


def test_a_full_screen_holds_back_what_is_printed():
    with on_terminal() as terminal:
        screen = FullScreen(terminal.stream, None)
        print("before")
        screen.open()
        screen.show(frame("whole", "screen"))
        print("meanwhile")
        print("more", file=sys.stderr)
        terminal.settle()
        assert b"\x1b[?1049h" in terminal.raw
        assert b"meanwhile" not in terminal.raw
        assert screen.last_lines(5) == ["meanwhile", "more"]
        assert screen.last_lines(0) == []
        screen.close()
        screen.close()
        print("after")
        terminal.settle()
        assert b"\x1b[?25h\x1b[?1049lmeanwhile\r\nmore\r\nafter\r\n" in terminal.raw
        assert not terminal.screen.cursor.hidden


def test_of_very_much_held_back_the_last_is_kept(monkeypatch):
    with on_terminal() as terminal:
        monkeypatch.setattr("forgepar.report.progress.terminal._MOST_HELD", 100)
        screen = FullScreen(terminal.stream, None)
        screen.open()
        for number in range(1000):
            print(f"line {number}")
        assert screen.last_lines(2) == ["line 998", "line 999"]
        screen.close()
        terminal.settle()
        assert re.search(
            r"forgepar: dropped the first [\d,]+ characters of the output", terminal.text.replace("\n", "")
        )
        assert "line 999" in terminal.text
        assert "line 900" not in terminal.text


def test_keys_are_read_one_by_one_and_the_terminal_is_as_before():
    with on_terminal() as terminal:
        keys = Keys(terminal.stream)
        keys.open()
        assert keys.read(0.0) == ""
        terminal.type("q")
        found = []
        wait_until(lambda: found.append(keys.read(0.01)) or "q" in found, "the key")
        keys.close()
        terminal.type("line\n")
        wait_until(lambda: "line" in terminal.text, "echo, which is on again")
        assert "q" not in terminal.text


def test_without_a_terminal_there_are_no_keys():
    keys = Keys(io.StringIO())
    keys.open()
    assert keys.read(0.0) == ""
    keys.close()


def test_a_job_in_the_background_is_not_stopped_for_keys(monkeypatch):
    monkeypatch.setattr("os.tcgetpgrp", lambda _: 1)
    with on_terminal() as terminal:
        keys = Keys(terminal.stream)
        keys.open()
        terminal.type("q\n")
        terminal.wait_for("q")  # echoed, as nothing was changed
        assert keys.read(0.0) == ""
        keys.close()
