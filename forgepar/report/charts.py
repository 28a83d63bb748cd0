"""The charts of a report, drawn by bokeh: the only room that imports it, loaded when a report is written.

Colours can be told apart by all kinds of colour vision (M. Okabe and K. Ito, 2008; the last two after P. Tol). Text
and lines are of a grey that can be read on white and on black; page.js gives them the page's colours once it is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import (
    AdaptiveTicker,
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    CustomJSHover,
    CustomJSTickFormatter,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    LinearColorMapper,
    PanTool,
    Range1d,
    ResetTool,
    Span,
    WheelZoomTool,
    ZoomInTool,
    ZoomOutTool,
)
from bokeh.plotting import figure
from numpy.typing import NDArray

from forgepar.forecast import PlanRow
from forgepar.report.analysis import Bars, Names, Spans, Steps, callables_by_work, n_rows, smallest
from forgepar.runstate import Status
from forgepar.runtable import LayerRow, RunTable

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
WINE, OLIVE, GREY, INK = "#882255", "#8F8F33", "#9AA0A8", "#7C828B"
CALLABLE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, WINE, OLIVE)  # of what took most time; others are grey
STATUS_COLOURS = {
    Status.PENDING: GREY,
    Status.RUNNING: SKY,
    Status.COMPLETED: BLUE,
    Status.FAILED: VERMILION,
    Status.SKIPPED: GREY,
    Status.CANCELLED: ORANGE,
    Status.COMPENSATED: PINK,
    Status.CACHED: GREEN,
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_BAR = 0.84  # of a worker's row
_TOP = -1.05  # where the first row begins, with room for the numbers of layers above it
_LABELLED = 0.035  # share of the timeline, from which a layer's band has its number on it
_MOST_TICKS = 16  # workers that are all numbered

# In the page's own script: 100,000 texts would be megabytes, so that the browser writes those that are looked at.
_SECONDS_JS, _BYTES_JS = "return forgepar.seconds(value)", "return forgepar.bytes(value)"
_TICK_JS = "return forgepar.tick(tick, ticks)"


@dataclass(frozen=True)
class Colouring:
    """What a legend tells: a text and a colour each."""

    keys: list[tuple[str, str]]


def timeline(
    table: RunTable, bars: Bars, layers: Spans, waited: Spans, path: Sequence[int], end: float
) -> tuple[figure, Colouring, Colouring]:
    """Draw the tasks on their workers; return the legends of both ways to colour them as well.

    Args:
        table: the run.
        bars: its tasks that ran.
        layers: the bands behind them; none for an eager run.
        waited: the idle time at the barriers.
        path: tasks of the critical path.
        end: of the run, seconds.
    """
    n_workers = n_rows(table)
    plot = _figure(
        "timeline",
        height=int(np.clip(90 + 34 * n_workers, 190, 620)),
        x_range=Range1d(-0.005 * end, 1.01 * end, bounds=(-0.05 * end - 1e-9, 1.05 * end + 1e-9)),
        y_range=Range1d(n_workers - 0.45, _TOP),
    )
    plot.yaxis.axis_label = "worker"
    plot.xaxis.axis_label = "time since the run began"
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.yaxis.ticker = FixedTicker(ticks=_worker_ticks(n_workers))
    plot.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    plot.ygrid.visible = False
    _draw_layers(plot, layers, end, n_workers)
    if len(waited):
        _rectangles(plot, "idle", waited.left, waited.right, waited.row, fill_color=GREY, fill_alpha=0.3)
    by_callable, codes = _callable_colours(table, bars)
    tasks, names = _draw_tasks(plot, table, bars, codes)
    tried = _draw_attempts(plot, table)
    _draw_path(plot, table, path)
    _add_tools(plot, _task_hover(table, tasks, names), tried)
    occurring = np.unique(table.status_of[bars.task]).tolist()
    by_status = Colouring([(Status(s).name.lower(), STATUS_COLOURS[Status(s)]) for s in occurring])
    return plot, by_callable, by_status


def use_over_time(busy: Steps, n_workers: int, shared: figure) -> figure:
    """Draw how many workers are busy over time, along the timeline's range."""
    plot = _figure("use", height=190, x_range=shared.x_range, y_range=Range1d(0, 1.08 * n_workers))
    plot.yaxis.axis_label = "busy workers"
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.yaxis.ticker = AdaptiveTicker(min_interval=1, desired_num_ticks=4)
    plot.add_layout(Span(location=n_workers, dimension="width", line_color=INK, line_dash="dashed", line_alpha=0.7))
    _draw_steps(plot, busy, BLUE)
    return plot


def memory_over_time(held: Steps, shared: figure) -> figure:
    """Draw the bytes of values held over time, along the timeline's range."""
    most = float(held.value.max(initial=0.0))
    plot = _figure("memory", height=190, x_range=shared.x_range, y_range=Range1d(0, 1.08 * most or 1))
    plot.yaxis.axis_label = "held"
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.yaxis.ticker = AdaptiveTicker(base=1024, mantissas=[2**i for i in range(10)], desired_num_ticks=4)
    plot.yaxis.formatter = CustomJSTickFormatter(code="return forgepar.bytes(tick).replace('.0 ', ' ')")
    _draw_steps(plot, held, GREEN)
    return plot


def layer_walls(rows: Sequence[LayerRow]) -> figure:
    """Draw each layer's wall time, and the longest of its tasks within it."""
    places = np.arange(len(rows))
    columns = {
        "x": places,
        "layer": np.array([row.layer for row in rows]),
        "wall": np.array([row.wall_seconds for row in rows]),
        "longest": np.array([row.longest_seconds for row in rows]),
        "tasks": np.array([row.n_tasks for row in rows]),
        "name": [row.longest_task for row in rows],
    }
    source = ColumnDataSource(columns)
    most = max((row.wall_seconds for row in rows), default=0.0) or 1.0
    plot = _figure("layers", height=230, x_range=Range1d(-0.7, len(rows) - 0.3), y_range=Range1d(0, 1.06 * most))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "layer", "time"
    plot.yaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.xgrid.visible = False
    shown = places[:: -(-len(rows) // 24)] if len(rows) else places
    plot.xaxis.ticker = FixedTicker(ticks=shown.tolist())
    plot.xaxis.major_label_overrides = {int(i): str(rows[i].layer) for i in shown}
    wide = plot.vbar("x", 0.82, "wall", source=source, fill_color=SKY, fill_alpha=0.5, line_color=None)
    plot.vbar("x", 0.42, "longest", source=source, fill_color=BLUE, line_color=None)
    times = {name: CustomJSHover(code=_SECONDS_JS) for name in ("@wall", "@longest")}
    tips = [
        ("layer", "@layer"),
        ("tasks", "@tasks"),
        ("wall", "@wall{custom}"),
        ("longest task", "@longest{custom}"),
        ("which", "@name"),
    ]
    plot.add_tools(HoverTool(renderers=[wide], tooltips=tips, formatters=times, point_policy="follow_mouse"))
    return plot


def other_workers(rows: Sequence[PlanRow], table: RunTable) -> figure:
    """Draw what the run would take on other numbers of workers, and what it took."""
    workers = np.array([row.workers for row in rows])
    layered, eager = (np.array([getattr(row, f"{name}_seconds") for row in rows]) for name in ("layered", "eager"))
    most = max(float(layered.max(initial=0)), float(eager.max(initial=0)), table.wall_seconds) or 1.0
    low, high = min(workers.min(), table.n_workers, 1), max(workers.max(), table.n_workers)
    plot = _figure(
        "forecast",
        height=260,
        x_axis_type="log",
        x_range=Range1d(0.85 * max(low, 1), 1.18 * high),
        y_range=Range1d(0, 1.08 * most),
    )
    plot.xaxis.axis_label, plot.yaxis.axis_label = "workers", "wall time"
    plot.yaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.xaxis.ticker = FixedTicker(ticks=workers.tolist())
    plot.xaxis.formatter = BasicTickFormatter(use_scientific=False)
    drawn = []
    for kind, seconds, colour, dash in (("by layers", layered, BLUE, "solid"), ("eager", eager, ORANGE, "dashed")):
        source = ColumnDataSource({"workers": workers, "seconds": seconds, "kind": [kind] * len(workers)})
        plot.line("workers", "seconds", source=source, line_color=colour, line_width=2, line_dash=dash)
        drawn.append(plot.scatter("workers", "seconds", source=source, size=7, fill_color=colour, line_color=None))
    if table.n_workers > 0:
        measured = {"workers": [table.n_workers], "seconds": [table.wall_seconds], "kind": ["measured"]}
        source = ColumnDataSource(measured)
        mark = plot.scatter(
            "workers", "seconds", source=source, marker="diamond", size=15, fill_color=None, line_color=VERMILION
        )
        mark.glyph.line_width = 2
        drawn.append(mark)
    tips = [("", "@kind"), ("workers", "@workers"), ("takes", "@seconds{custom}")]
    times = {"@seconds": CustomJSHover(code=_SECONDS_JS)}
    plot.add_tools(HoverTool(renderers=drawn, tooltips=tips, formatters=times))
    return plot


def _figure(name: str, **options: Any) -> figure:
    """Make an empty chart in the report's style."""
    plot = figure(
        name=name,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=64,
        min_border_right=12,
        **options,
    )
    for axis in plot.axis:
        axis.update(axis_line_color=INK, major_tick_line_color=INK, minor_tick_line_color=None)
        axis.update(major_label_text_color=INK, axis_label_text_color=INK, axis_label_text_font_style="normal")
        axis.update(major_label_text_font=_FONT, axis_label_text_font=_FONT)
        axis.update(major_label_text_font_size="12px", axis_label_text_font_size="12px")
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = INK, 0.18
    return plot


def _rectangles(
    plot: figure,
    name: str,
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    row: NDArray[Any],
    more: dict[str, Any] | None = None,
    **style: Any,
) -> GlyphRenderer:
    """Draw bars on the rows of workers; each has its columns in the smallest types, sent as bytes."""
    source = ColumnDataSource({"left": left, "right": right, "row": smallest(row), **(more or {})}, name=name)
    style = {"line_color": None, **style}
    made: GlyphRenderer = plot.hbar(y="row", left="left", right="right", height=_BAR, source=source, name=name, **style)
    made.nonselection_glyph = made.selection_glyph = made.hover_glyph = made.muted_glyph = None
    return made


def _draw_layers(plot: figure, layers: Spans, end: float, n_workers: int) -> None:
    if not len(layers):
        return
    shade = np.where(np.arange(len(layers)) % 2 == 0, 0.10, 0.03)
    columns = {"left": layers.left, "right": layers.right, "alpha": shade.astype(np.float32)}
    plot.quad(
        "left", "right", _TOP, n_workers - 0.45, fill_color=INK, fill_alpha="alpha", line_color=None,
        source=ColumnDataSource(columns), name="layers", level="underlay",
    )  # fmt: skip
    wide = layers.right - layers.left >= _LABELLED * end
    texts = [f"layer {layer}" for layer in layers.row[wide].tolist()]
    labels = ColumnDataSource({"x": layers.left[wide], "y": np.full(len(texts), _TOP), "text": texts})
    plot.text(
        "x", "y", "text", source=labels, name="layer labels", x_offset=4, y_offset=2, text_baseline="top",
        text_color=INK, text_font_size="11px", text_font=value(_FONT),
    )  # fmt: skip


def _callable_colours(table: RunTable, bars: Bars) -> tuple[Colouring, NDArray[np.uint8]]:
    """Return the legend of the callables, and the place of each task's colour."""
    order = callables_by_work(table, bars)
    places = np.full(len(table.callables), len(CALLABLE_COLOURS), np.uint8)
    n_shown = len(order) if len(order) <= len(CALLABLE_COLOURS) else len(CALLABLE_COLOURS)
    places[order[:n_shown]] = np.arange(n_shown)
    keys = [(table.callables[number], CALLABLE_COLOURS[place]) for place, number in enumerate(order[:n_shown].tolist())]
    if (n_more := len(order) - n_shown) > 0:
        keys.append((f"{n_more:,} more", GREY))
    return Colouring(keys), places[table.callable_of[bars.task]]


def _draw_tasks(plot: figure, table: RunTable, bars: Bars, codes: NDArray[np.uint8]) -> tuple[GlyphRenderer, Names]:
    task = bars.task
    names = Names.of([table.names[i] for i in task.tolist()])
    columns = {
        "stem": smallest(names.stem_of),
        "number": names.number_of,
        "callable": smallest(table.callable_of[task]),
        "layer": smallest(table.layer[task]),
        "attempt": smallest(table.attempt[task]),
        "status": table.status_of[task].astype(np.uint8),
        "bytes": smallest(table.bytes[task]),
        "by_callable": codes,
    }
    by_callable, by_status = (
        LinearColorMapper(palette=list(palette), low=-0.5, high=len(palette) - 0.5, name=name)
        for name, palette in (("callables", (*CALLABLE_COLOURS, GREY)), ("statuses", STATUS_COLOURS.values()))
    )
    made = _rectangles(
        plot, "tasks", bars.left, bars.right, table.worker[task], columns,
        fill_color={"field": "by_callable", "transform": by_callable},
    )  # fmt: skip
    # page.js finds both there, to change from one to the other.
    plot.tags = [{"by_callable": by_callable, "status": by_status}]
    return made, names


def _draw_attempts(plot: figure, table: RunTable) -> GlyphRenderer:
    """Draw the attempts that failed before the last one, where it is known when they were."""
    known = [
        failed
        for failed in table.failures
        if failed.attempt < table.attempt[failed.task]
        and failed.worker >= 0
        and isfinite(failed.start + failed.seconds)
    ]
    left = np.array([failed.start for failed in known], np.float64)
    right = left + np.array([failed.seconds for failed in known], np.float64)
    columns = {
        "name": [table.names[failed.task] for failed in known],
        "attempt": np.array([failed.attempt for failed in known], np.int32),
        "error": [failed.error[:300] for failed in known],
    }
    worker = np.array([failed.worker for failed in known], np.int32)
    style: dict[str, Any] = {"fill_color": VERMILION, "hatch_pattern": "/", "hatch_color": "white", "hatch_alpha": 0.6}
    return _rectangles(plot, "failed attempts", left, right, worker, columns, **style)


def _draw_path(plot: figure, table: RunTable, path: Sequence[int]) -> None:
    tasks = np.array([task for task in path if table.worker[task] >= 0 and np.isfinite(table.start[task])], np.int32)
    left, right = table.start[tasks], table.start[tasks] + table.seconds[tasks]
    style: dict[str, Any] = {"fill_color": None, "line_color": "#111418", "line_width": 2, "visible": False}
    _rectangles(plot, "critical path", left, right, table.worker[tasks], **style)


def _add_tools(plot: figure, hover: HoverTool, tried: GlyphRenderer) -> None:
    pan, box = PanTool(dimensions="width"), BoxZoomTool(dimensions="width")
    # Without a key the wheel scrolls the page, as it does everywhere else on it.
    wheel = WheelZoomTool(dimensions="width", modifiers="ctrl")
    steps = ZoomInTool(dimensions="width", factor=0.5), ZoomOutTool(dimensions="width", factor=0.5)
    plot.add_tools(pan, box, wheel, *steps, ResetTool())
    plot.toolbar_location, plot.toolbar.logo, plot.toolbar.autohide = "above", None, False
    plot.toolbar.active_drag, plot.toolbar.active_scroll = pan, wheel
    plot.add_tools(hover)
    tips = [("failed attempt", "@attempt"), ("task", "@name"), ("error", "@error")]
    plot.add_tools(HoverTool(renderers=[tried], tooltips=tips, point_policy="follow_mouse", visible=False))


def _task_hover(table: RunTable, tasks: GlyphRenderer, names: Names) -> HoverTool:
    source = tasks.data_source
    named = {"source": source, "stems": names.stems}
    name = "const n = source.data.number[special_vars.index]; return stems[value] + (n < 0 ? '' : n)"
    lasted = "const i = special_vars.index; return forgepar.seconds(source.data.right[i] - source.data.left[i])"
    formatters: dict[str, Any] = {
        "@stem": CustomJSHover(args=named, code=name),
        "@callable": CustomJSHover(args={"texts": list(table.callables)}, code="return texts[value]"),
        "@status": CustomJSHover(args={"texts": [s.name.lower() for s in Status]}, code="return texts[value]"),
        "@right": CustomJSHover(args={"source": source}, code=lasted),
        "@left": CustomJSHover(code=_SECONDS_JS),
        "@bytes": CustomJSHover(code=_BYTES_JS),
    }
    tips = [
        ("task", "@stem{custom}"),
        ("callable", "@callable{custom}"),
        ("layer", "@layer"),
        ("attempt", "@attempt"),
        ("status", "@status{custom}"),
        ("began after", "@left{custom}"),
        ("took", "@right{custom}"),
        ("value", "@bytes{custom}"),
    ]
    return HoverTool(
        renderers=[tasks], tooltips=tips, formatters=formatters, point_policy="follow_mouse", limit=1, name="task hover"
    )


def _draw_steps(plot: figure, steps: Steps, colour: str) -> None:
    source = ColumnDataSource({"at": steps.at, "value": np.append(steps.value, steps.value[-1:])})
    plot.varea_step("at", 0, "value", source=source, step_mode="after", fill_color=colour, fill_alpha=0.22)
    plot.step("at", "value", source=source, mode="after", line_color=colour, line_width=1.25, name="steps")


def _worker_ticks(n_workers: int) -> list[int]:
    return list(range(0, n_workers, -(-n_workers // _MOST_TICKS)))
