"""Writes a run as one HTML file, which opens without a network, from its `RunTable`.

RunTable ──> analysis (columns) ──> charts (bokeh) ──┐
    └──────> page (text, tables) ────────────────────┴──> page.html, page.css, page.js ──> a file
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from forgepar.records.table import RunTable
from forgepar.report.export.writing import check_target, write_pieces

_NEEDED = ("bokeh", "jinja2")  # jinja2 comes with bokeh
_FOLDER = Path(__file__).parent


def check_report(path: str | os.PathLike[str]) -> None:
    """Check that a report can be written, before the run.

    Args:
        path: the file.

    Raises:
        ModuleNotFoundError: bokeh is not installed.
        FileNotFoundError: the folder of the file does not exist.
        IsADirectoryError: the path is a folder.
        PermissionError: the file cannot be written.
    """
    check_installed()
    check_target(path)


def write_report(table: RunTable, path: str | os.PathLike[str]) -> None:
    """Write a run as one HTML file; an existing file is replaced once the new one is complete.

    Args:
        table: the run, from `RunResult.table` or a store.
        path: the file. Its folder must exist.

    Raises:
        ModuleNotFoundError: bokeh is not installed.
        OSError: the file cannot be written.
    """
    check_report(path)
    write_pieces(Path(path), [report_html(table)])


def report_html(table: RunTable) -> str:
    """Return a run as the text of an HTML file.

    Raises:
        ModuleNotFoundError: bokeh is not installed.
    """
    check_installed()
    from bokeh.document import Document
    from bokeh.embed import file_html
    from bokeh.events import DocumentReady
    from bokeh.models import CustomJS
    from bokeh.resources import INLINE

    words, charts = _contents(table)
    if not charts:
        plain: str = _template().render(words)
        return plain
    document = Document(title=words["title"])
    for chart in charts.values():
        document.add_root(chart)
    document.js_on_event(DocumentReady, CustomJS(code="forgepar.ready()"))
    text: str = file_html(document, INLINE, words["title"], template=_template(), template_variables=words)
    return text


def _contents(table: RunTable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables of the template, and the charts by name."""
    from forgepar.report.forecast import plan_table
    from forgepar.report.html import analysis, page

    intervals = analysis.TaskIntervals.of(table)
    path, path_seconds = analysis.heaviest_path(table)
    rows = table.layer_table()
    plan = plan_table(table, page.plan_workers(table)) if len(intervals) else []
    failures = page.failure_lines(table)
    words: dict[str, Any] = {
        "title": f"{table.workflow}: {table.status}",
        "table": table,
        "n_bars": len(intervals),
        "facts": page.facts(table, intervals),
        "failed": [failure for failure in failures if failure.is_final],
        "handled": [failure for failure in failures if not failure.is_final],
        "n_failures": page.n_failures(table),
        "slowest": page.task_lines(table, table.slowest(), table.wall_seconds),
        "path": page.task_lines(table, page.path_shown(table, path), path_seconds),
        "n_path": len(path),
        "path_text": page.seconds_text(path_seconds),
        "path_share": page.share_text(path_seconds, table.wall_seconds),
        "plan": page.plan_lines(table, plan),
        "n_layers": len(rows),
        "css": _read("page.css"),
        "js": _read("page.js"),
    }
    if not len(intervals):
        return words, {}
    return words, _draw(table, intervals, path, page.layers_shown(rows), plan, words)


def _draw(
    table: RunTable, intervals: Any, path: list[int], rows: list[Any], plan: list[Any], words: dict[str, Any]
) -> dict[str, Any]:
    """Return the charts; add the variables of the text beside them to ``words``."""
    from forgepar.machine import as_text
    from forgepar.report.html import analysis, charts, page

    end = analysis.end_of(table, intervals)
    layers = analysis.bands(table, intervals)
    waited, waited_seconds = analysis.idle(table, intervals, layers)
    busy, held = analysis.busy_workers(intervals, end), analysis.held_bytes(table, intervals, end)
    most_held = float(held.value.max(initial=0.0))
    timeline, by_callable, by_status = charts.timeline(table, intervals, layers, waited, path, end)
    words |= {
        "by_callable": by_callable,
        "by_status": by_status,
        "has_bands": len(layers) > 0,
        "n_waited": len(waited) if len(waited) == analysis.MOST_IDLE else 0,
        "waited_text": page.seconds_text(waited_seconds),
        "waited_share": page.share_text(waited_seconds, end * analysis.n_rows(table)),
        "busy_note": page.step_text(busy, "mean"),
        "held_note": page.step_text(held, "most"),
        "held_most": as_text(most_held) if most_held else "",
        "peak_rss": as_text(table.peak_rss) if table.peak_rss else "",
        "n_layers_shown": len(rows),
    }
    memory = {"memory": charts.memory_over_time(held, timeline)} if most_held else {}
    return {
        "timeline": timeline,
        "use": charts.use_over_time(busy, analysis.n_rows(table), timeline),
        **memory,
        "layers": charts.layer_walls(rows),
        "forecast": charts.other_workers(plan, table),
    }


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = "{:,}".format
    return environment.from_string(_read("page.html"))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def check_installed() -> None:
    """Raise `ModuleNotFoundError` if bokeh is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"A report requires bokeh, and {' and '.join(missing)} cannot be imported. "
            "Install it: pip install 'forgepar[report]'.",
            name=missing[0],
        )
