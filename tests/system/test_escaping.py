"""What a terminal would obey is shown as text: in what the command line, summaries, bars and logs tell."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest

import forgepar as fp
from forgepar.cli.main import main
from forgepar.engine.console import Console, Escaping
from forgepar.records.display import FailedTask
from forgepar.report.progress import wording
from forgepar.system.escaping import escaped, escaped_line, escaped_output

CLEAR = "\x1b[2J"
TITLE = "\x1b]0;owned\x07"
NASTY = f"a{CLEAR}b{TITLE}c\x9b1md\u202ee"
SHOWN = r"a\x1b[2Jb\x1b]0;owned\x07c\x9b1md\u202ee"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e", "\r", "\b")


def assert_harmless(text: str) -> None:
    assert not [letter for letter in OBEYED if letter in text]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NASTY, SHOWN),
        ("plain, ünïcödé, 名前, 👩\u200d👩, no\u00a0break", None),
        ("two\nlines\tand a tab\r\n", None),
        ("over\rwritten\b", r"over\rwritten\x08"),
        ("\u2028\u2066\u200e\udc80\x00\x7f", r"\u2028\u2066\u200e\udc80\x00\x7f"),
    ],
)
def test_only_what_a_terminal_would_obey_is_escaped(text, shown):
    assert escaped(text) == (text if shown is None else shown)


def test_a_line_stays_one():
    assert escaped_line("a\nb\r\n\tc") == "a\\nb\\r\\n\tc"


def test_output_that_went_back_to_the_start_of_a_line_goes_on_in_the_next():
    assert escaped_output("10 %\r20 %\r\n\x1b[A") == "10 %\n20 %\r\n\\x1b[A"


def talk() -> str:
    print(f"told {NASTY}")  # noqa: T201
    print(f"erred {NASTY}", file=sys.stderr)  # noqa: T201
    logging.getLogger("forgepar.tasks").warning("logged %s", NASTY)
    warnings.warn(f"warned {NASTY}", stacklevel=1)
    return NASTY


def fail() -> None:
    raise ValueError(f"failed {NASTY}")


def good() -> fp.Workflow:
    wf = fp.Workflow(NASTY)
    wf.add(fp.task(talk).options(name=f"talk {NASTY}"))
    wf.add(fp.task(abs).options(name=f"more {NASTY}"), -1)
    return wf


def bad() -> fp.Workflow:
    wf = fp.Workflow(NASTY)
    wf.add(fp.task(fail).options(name=f"fail {NASTY}"))
    return wf


def broken() -> fp.Workflow:
    fail()
    raise AssertionError("it failed before")


@pytest.mark.parametrize("backend", [["--backend", "inline"], ["-w", "1"]], ids=["inline", "process"])
@pytest.mark.parametrize("tags", [[], ["--tag-output"]], ids=["plain", "tagged"])
def test_run_shows_names_output_logs_and_warnings_escaped(backend, tags, capfd, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", _printed)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["run", "test_escaping:good", "--summary", "-v", "--progress", *backend, *tags]) == 0
    out, err = capfd.readouterr()
    assert_harmless(out + err)
    for begin, text in (("told", out), ("erred", err), ("logged", err), ("warned", err), ("talk", out + err)):
        assert f"{begin} {SHOWN}" in text
    assert (f"[talk {SHOWN}] told" in out) == bool(tags)


def _printed(message, category, filename, lineno, file=None, line=None):
    """Show a warning as Python does, where pytest would keep it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


@pytest.mark.parametrize("what", ["bad", "broken"])
def test_run_shows_errors_escaped(what, capfd):
    assert main(["run", f"test_escaping:{what}", "--backend", "inline", "--summary", "-q"]) == (
        1 if what == "bad" else 2
    )
    out, err = capfd.readouterr()
    assert_harmless(out + err)
    assert f"failed {SHOWN}" in err


def test_layers_and_check_show_names_escaped(capfd):
    assert main(["layers", "test_escaping:good"]) == 0
    assert main(["check", "test_escaping:good"]) == 0
    out, err = capfd.readouterr()
    assert_harmless(out + err)
    assert f"talk {SHOWN}, more {SHOWN}" in out


@pytest.fixture
def store(tmp_path, capfd) -> str:
    path = str(tmp_path / "runs.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["run", "test_escaping:good", "--backend", "inline", "-q", "--store", path]) == 0
    assert main(["run", "test_escaping:bad", "--backend", "inline", "-q", "--store", path]) == 1
    capfd.readouterr()
    return path


@pytest.mark.parametrize(
    "command",
    [["runs"], ["show"], ["show", "1"], ["values"], ["values", "1"], ["plan", "1"], ["top"], ["export"],
     ["export", "--format", "chrome"], ["show", "--json"], ["values", "1", f"more {NASTY}"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_of_a_store_show_escaped(command, store, capfd):
    assert main([command[0], store, *command[1:]]) == 0
    out, err = capfd.readouterr()
    assert_harmless(out + err)


def test_show_tells_failures_escaped(store, capfd):
    main(["show", store, "last"])
    assert f"ValueError: failed {SHOWN}" in capfd.readouterr().out


def test_a_lone_text_is_data_in_a_pipe_and_escaped_on_a_terminal(store, capfd, monkeypatch):
    name = f"talk {NASTY}"
    assert main(["values", store, "1", name]) == 0
    assert capfd.readouterr().out == f"{NASTY}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["values", store, "1", name]) == 0
    assert capfd.readouterr().out == f"{SHOWN}\n"


def test_what_a_display_says_is_escaped():
    assert wording.one_line(f"\n{NASTY}\nmore") == SHOWN
    failure = FailedTask(NASTY, 1, f"ValueError: {NASTY}", goes_on=False)
    assert_harmless(wording.of_failure(failure))


def test_the_screen_of_top_is_escaped():
    pytest.importorskip("rich")
    from forgepar.report.progress.bars import Artist
    from forgepar.report.progress.figures import RunMeter
    from forgepar.report.progress.live import screen, table_rows

    wf = fp.Workflow(NASTY)
    wf.add(fp.task(abs).options(name=NASTY), -1)
    table = wf.run(backend="inline").table()
    stream = io.StringIO()
    parts = screen(RunMeter().of_table(table), table_rows(table), [], [NASTY], 120, 40, "q leaves")
    frame = Artist(stream).frame(parts, 120, 40)
    assert_harmless(frame.text)
    assert frame.text.count(SHOWN) >= 2


def test_a_summary_is_escaped(any_backend):
    wf = fp.Workflow(NASTY)
    wf.add(fp.task(abs).options(name=f"good {NASTY}"), -1)
    wf.add(fp.task(fail).options(name=f"bad {NASTY}"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**any_backend, fail_fast=False)
    summary = caught.value.result.summary()
    assert_harmless(summary)
    assert f"failed: bad {SHOWN}: ValueError: failed {SHOWN}" in summary


def test_tags_of_lines_are_escaped_and_the_lines_of_a_program_are_its_own(capsys):
    wf = fp.Workflow()
    wf.add(fp.task(talk).options(name=NASTY))
    console = Console(wf.plan(), "tagged")
    console.show(NASTY, "stdout", f"{CLEAR}\n")
    assert capsys.readouterr().out == f"[{SHOWN}] {CLEAR}\n"


def test_lines_are_shown_escaped_one_by_one_or_many_at_once(capsys):
    show = Escaping(has_tags=True)
    show(fp.OutputLine("a", "stderr", NASTY))
    Console(_plan(), show).show("a", "stdout", f"{NASTY}\n10 %\r20 %\n")
    out, err = capsys.readouterr()
    assert err == f"[a] {SHOWN}\n"
    assert out == f"[a] {SHOWN}\n[a] 10 %\n[a] 20 %\n"


def _plan():
    wf = fp.Workflow()
    wf.add(abs, -1)
    return wf.plan()
