"""The report as a file: what is in it and what is not, and how it is written. test_report_browser opens it."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from reports import a_large_table, a_table

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.errors import WorkflowFailed
from forgepar.records.events import WorkflowTaskParallelCompleted
from forgepar.records.table import FailedAttempt
from forgepar.report.html import report as html
from forgepar.report.html.report import report_html, write_report
from forgepar.scheduling.run_state import Status

pytest.importorskip("bokeh", reason="bokeh is in the extra report")

NAN = float("nan")
EVIL = """<script>alert("1")</script> 'x' & </script><!-- {{ 7*7 }}"""


class Page(HTMLParser):
    """A page's tags and texts, as a browser would take them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        inside = self.tags[-1][0] if self.tags else ""
        self.texts.append((inside, data))

    def text(self) -> str:
        """All that is to be read."""
        shown = [text for tag, text in self.texts if tag not in ("script", "style")]
        return " ".join(" ".join(shown).split())

    def models(self) -> dict[str, dict]:
        """Bokeh's models by name."""
        (documents,) = [
            text
            for (tag, attributes), text in self.scripts()
            if tag == "script" and attributes.get("type") == "application/json"
        ]
        found: dict[str, dict] = {}
        pending = [json.loads(documents.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))]
        while pending:
            part = pending.pop()
            if isinstance(part, dict):
                if isinstance(name := part.get("attributes", {}).get("name"), str):
                    found.setdefault(f"{part.get('name')} {name}", part["attributes"])
                pending += part.values()
            elif isinstance(part, list):
                pending += part
        return found

    def scripts(self):
        scripts = [(tag, attributes) for tag, attributes in self.tags if tag == "script"]
        texts = [text for tag, text in self.texts if tag == "script" and text.strip()]
        return list(zip(scripts, texts, strict=False))


def n_bars(page: Page, name: str) -> int:
    data = dict(page.models()[f"ColumnDataSource {name}"]["data"]["entries"])
    (n,) = data["left"]["shape"]
    return n


def test_it_holds_all_that_was_asked_for():
    page = Page(report_html(a_table()))
    text = page.text()
    for part in ("nightly", "completed", "Timeline", "Workers in use", "Memory", "Layers", "Other numbers of workers"):
        assert part in text
    assert "2 tasks, one after the other, took 4.50 s, 75% of the wall time" in text
    assert "Failures" not in text
    assert n_bars(page, "tasks") == 3
    assert n_bars(page, "idle") == 2


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_nothing_in_it_asks_for_anything_from_elsewhere(schedule):
    page = Page(report_html(a_table(schedule=schedule)))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert not (attributes.get(name) or "").startswith(("http", "//", "file")), (tag, attributes)
        assert tag not in ("link", "iframe", "base", "img", "object")
    (policy,) = [
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    assert "http" not in policy


def test_an_eager_run_has_no_bands_and_no_barriers():
    page = Page(report_html(a_table(schedule="eager")))
    models = page.models()
    assert "GlyphRenderer tasks" in models
    assert "GlyphRenderer layers" not in models
    assert "GlyphRenderer idle" not in models
    assert "no barriers" in page.text()
    assert "Bands are layers" not in page.text()


def test_names_with_markup_are_texts():
    failed = FailedAttempt(1, 1, 0.5, 1.0, 1, f"ValueError: {EVIL}", f"Traceback\n{EVIL}")
    table = a_table(
        workflow=EVIL,
        names=[EVIL, f"{EVIL}-1", "join"],
        callables=[EVIL, "join"],
        status="failed",
        status_of=np.array([Status.COMPLETED, Status.FAILED, Status.COMPLETED], np.int8),
        failures=[failed],
    )
    plain, evil = Page(report_html(a_table(failures=[failed]))), Page(report_html(table))
    assert sum(tag == "script" for tag, _ in evil.tags) == sum(tag == "script" for tag, _ in plain.tags)
    assert evil.text().count(EVIL) >= 5
    assert "49" not in evil.text().split("Timeline")[0]


def test_failures_are_told_with_their_tracebacks():
    wf = fp.Workflow("w")
    wf.map(lambda text: int(text), ["1", "x"])
    with pytest.raises(WorkflowFailed) as caught:
        wf.run(backend="inline")
    text = Page(report_html(caught.value.result.table())).text()
    assert "1 attempt failed." in text
    assert "lambda-1 attempt 1, layer 0, worker 0" in text
    assert "invalid literal for int() with base 10: 'x'" in text
    assert "Traceback (most recent call last)" in text


def test_attempts_that_failed_are_drawn_where_their_times_are_known():
    failures = [
        FailedAttempt(2, 1, 2.6, 0.2, 0, "OSError: once", ""),
        FailedAttempt(2, 2, NAN, NAN, -1, "OSError: twice", ""),
        FailedAttempt(2, 3, 3.0, 2.5, 1, "OSError: the last, which is the task's own bar", ""),
    ]
    table = a_table(failures=failures, attempt=np.array([1, 1, 3], np.int32))
    page = Page(report_html(table))
    assert n_bars(page, "failed attempts") == 1
    assert n_bars(page, "tasks") == 3


def test_a_resumed_run_shows_what_ran():
    table = a_table(
        start=np.array([NAN, NAN, 0.1]),
        seconds=np.array([NAN, NAN, 2.5]),
        worker=np.array([-1, -1, 0], np.int32),
        attempt=np.array([0, 0, 1], np.int32),
        status_of=np.array([Status.CACHED, Status.CACHED, Status.COMPLETED], np.int8),
    )
    page = Page(report_html(table))
    assert n_bars(page, "tasks") == 1
    assert "1 completed, 2 cached" in page.text()
    assert "Expected wall times of the tasks that ran" in page.text()


@pytest.mark.parametrize("status", [Status.CACHED, Status.CANCELLED, Status.PENDING])
def test_a_run_in_which_no_task_ran(status):
    nothing = {"start": np.full(3, NAN), "seconds": np.full(3, NAN), "worker": np.full(3, -1, np.int32)}
    page = Page(report_html(a_table(status_of=np.full(3, status, np.int8), attempt=np.zeros(3, np.int32), **nothing)))
    assert "No task of this run ran and ended" in page.text()
    assert ("the values are those of an earlier run" in page.text()) == (status is Status.CACHED)
    assert "Other numbers of workers" not in page.text()


def test_a_run_of_one_task(tmp_path):
    wf = fp.Workflow("one")
    wf.add(abs, -1)
    path = tmp_path / "run.html"
    wf.run(backend="inline").report(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert n_bars(page, "tasks") == 1
    assert "1 task took" in page.text()
    assert "which are sent in messages and not counted" in page.text()


def test_a_run_that_was_called_off():
    wf = fp.Workflow("off")
    token = fp.CancellationToken()
    last = wf.add(int)
    for _ in range(30):
        last = wf.add(abs, last)

    def call_off(event):
        if isinstance(event, WorkflowTaskParallelCompleted):
            token.cancel()

    page = Page(report_html(wf.run(backend="inline", cancel=token, audit=call_off).table()))
    n_done = n_bars(page, "tasks")
    assert 0 < n_done < 31
    assert "cancelled" in page.text()
    assert f"{n_done} completed, {31 - n_done} cancelled" in page.text()


def test_many_tasks_take_few_bytes_each():
    small, large = (len(report_html(a_large_table(20, width))) for width in (5, 500))
    assert (large - small) / (20 * 495) < 60


def test_a_file_is_replaced_once_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.html"
    write_report(a_table(), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    before = path.read_bytes()

    def torn(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", torn)
    with pytest.raises(OSError, match="disk full"):
        write_report(a_table(workflow="other"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_is_its_owners_alone_and_one_that_was_given_to_others_stays_so(tmp_path):
    path = tmp_path / "run.html"
    write_report(a_table(), str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    write_report(a_table(), str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_folder_that_is_not_there_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "report_html", lambda _: pytest.fail("was drawn"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(a_table(), tmp_path / "none" / "run.html")
    with pytest.raises(IsADirectoryError, match=r"run\.html"):
        write_report(a_table(), tmp_path)


@pytest.fixture
def no_bokeh(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bokeh" else find(name))


def test_without_bokeh_the_extra_is_named(no_bokeh, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'forgepar\[report\]'"):
        write_report(a_table(), tmp_path / "run.html")


PIPELINE = """
from pathlib import Path
import forgepar as fp

def workflow(mark, text="1"):
    wf = fp.Workflow("w")
    wf.add(lambda: Path(mark).touch())
    wf.add(int, text)
    return wf
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Runs a small pipeline with --report; gives its exit code, and whether a task ran."""
    source, mark = tmp_path / "reported_pipeline.py", tmp_path / "mark"
    source.write_text(PIPELINE)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(report: Path, text: str = "1") -> tuple[int, bool]:
        parameters = ["-p", f"mark={mark}", "-p", f"text={text}"]
        options = ["--backend", "inline", "--report", str(report)]
        return cli.main(["run", str(source), *parameters, *options]), mark.exists()

    yield run
    sys.modules.pop("reported_pipeline", None)


def test_the_command_line_writes_a_report(pipeline, tmp_path, capsys):
    path = tmp_path / "run.html"
    assert pipeline(path) == (0, True)
    assert f"report in {path}" in capsys.readouterr().err
    assert n_bars(Page(path.read_text(encoding="utf-8")), "tasks") == 2


def test_it_does_so_of_a_run_that_failed(pipeline, tmp_path):
    path = tmp_path / "run.html"
    assert pipeline(path, "x") == (1, True)
    assert "invalid literal" in path.read_text(encoding="utf-8")


def test_it_says_before_the_run_what_is_missing(pipeline, no_bokeh, tmp_path, capsys):
    assert pipeline(tmp_path / "run.html") == (2, False)
    assert re.search(r"pip install 'forgepar\[report\]'", capsys.readouterr().err)


def test_it_says_before_the_run_that_there_is_no_such_folder(pipeline, tmp_path, capsys):
    assert pipeline(tmp_path / "none" / "run.html") == (2, False)
    assert "there is no folder" in capsys.readouterr().err
