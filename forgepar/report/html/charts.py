"""The charts of a report, drawn by bokeh. Only this module and report.py import it, and only to write a report.

Colours are distinct for all kinds of colour vision (M. Okabe and K. Ito, 2008; the last two after P. Tol). Text and
lines have a grey that is readable on white and on black; page.js replaces it by the colours of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, TypeAlias

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

from forgepar.records.table import LayerRow, RunTable
from forgepar.report.forecast import PlanRow
from forgepar.report.html.analysis import (
    NameParts,
    RowIntervals,
    StepLine,
    TaskIntervals,
    callables_by_work,
    n_rows,
    smallest,
)
from forgepar.scheduling.run_state import Status

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
WINE, OLIVE, GREY, INK = "#882255", "#8F8F33", "#9AA0A8", "#7C828B"
CALLABLE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, WINE, OLIVE)  # by total time; others are grey
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
_TOP = -1.05  # top of the first row, with room for the numbers of layers
_LABELLED = 0.035  # least share of the timeline for a layer's band to show its number
_MOST_TICKS = 16  # numbers on the axis of workers

# Functions of page.js. The browser formats what it shows, as 100,000 texts in the file would take megabytes.
_SECONDS_JS, _BYTES_JS = "return forgepar.seconds(value)", "return forgepar.bytes(value)"
_TICK_JS = "return forgepar.tick(tick, ticks)"

Legend: TypeAlias = list[tuple[str, str]]  # pairs of text and colour


def timeline(
    table: RunTable,
    intervals: TaskIntervals,
    layers: RowIntervals,
    waited: RowIntervals,
    path: Sequence[int],
    end: float,
) -> tuple[figure, Legend, Legend]:
    """Draw the tasks on their workers; return the chart and the legends by callable and by status.

    Args:
        table: the run.
        intervals: its tasks that ran.
        layers: the bands in the background; none for an eager run.
        waited: the idle time at the barriers.
        path: tasks of the critical path.
        end: end of the run, in seconds.
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
        _draw_rectangles(plot, "idle", waited.left, waited.right, waited.row, fill_color=GREY, fill_alpha=0.3)
    by_callable, codes = _callable_colours(table, intervals)
    tasks, names = _draw_tasks(plot, table, intervals, codes)
    tried = _draw_attempts(plot, table)
    _draw_path(plot, table, path)
    _add_tools(plot, _task_hover(table, tasks, names), tried)
    occurring = np.unique(table.status_of[intervals.task]).tolist()
    by_status = [(Status(s).name.lower(), STATUS_COLOURS[Status(s)]) for s in occurring]
    return plot, by_callable, by_status


def use_over_time(busy: StepLine, n_workers: int, shared: figure) -> figure:
    """Draw how many workers are busy over time, with the x range of the timeline."""
    plot = _figure("use", height=190, x_range=shared.x_range, y_range=Range1d(0, 1.08 * n_workers))
    plot.yaxis.axis_label = "busy workers"
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.yaxis.ticker = AdaptiveTicker(min_interval=1, desired_num_ticks=4)
    plot.add_layout(Span(location=n_workers, dimension="width", line_color=INK, line_dash="dashed", line_alpha=0.7))
    _draw_steps(plot, busy, BLUE)
    return plot


def memory_over_time(held: StepLine, shared: figure) -> figure:
    """Draw the bytes of values in memory over time, with the x range of the timeline."""
    most = float(held.value.max(initial=0.0))
    plot = _figure("memory", height=190, x_range=shared.x_range, y_range=Range1d(0, 1.08 * most or 1))
    plot.yaxis.axis_label = "in memory"
    plot.xaxis.formatter = CustomJSTickFormatter(code=_TICK_JS)
    plot.yaxis.ticker = AdaptiveTicker(base=1024, mantissas=[2**i for i in range(10)], desired_num_ticks=4)
    plot.yaxis.formatter = CustomJSTickFormatter(code="return forgepar.bytes(tick).replace('.0 ', ' ')")
    _draw_steps(plot, held, GREEN)
    return plot


def layer_walls(rows: Sequence[LayerRow]) -> figure:
    """Draw the wall time and the longest task of each layer."""
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
        ("its name", "@name"),
    ]
    plot.add_tools(HoverTool(renderers=[wide], tooltips=tips, formatters=times, point_policy="follow_mouse"))
    return plot


def other_workers(rows: Sequence[PlanRow], table: RunTable) -> figure:
    """Draw the expected wall times with other numbers of workers, and the measured one."""
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
    """Return an empty chart in the style of the report."""
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


def _draw_rectangles(
    plot: figure,
    name: str,
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    row: NDArray[Any],
    more: dict[str, Any] | None = None,
    **style: Any,
) -> GlyphRenderer:
    """Draw rectangles on the rows of workers, from columns in the smallest types, which are embedded as bytes."""
    source = ColumnDataSource({"left": left, "right": right, "row": smallest(row), **(more or {})}, name=name)
    style = {"line_color": None, **style}
    made: GlyphRenderer = plot.hbar(y="row", left="left", right="right", height=_BAR, source=source, name=name, **style)
    made.nonselection_glyph = made.selection_glyph = made.hover_glyph = made.muted_glyph = None
    return made


def _draw_layers(plot: figure, layers: RowIntervals, end: float, n_workers: int) -> None:
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


def _callable_colours(table: RunTable, intervals: TaskIntervals) -> tuple[Legend, NDArray[np.uint8]]:
    """Return the legend of the callables, and the index of each task's colour."""
    order = callables_by_work(table, intervals)
    places = np.full(len(table.callables), len(CALLABLE_COLOURS), np.uint8)
    n_shown = len(order) if len(order) <= len(CALLABLE_COLOURS) else len(CALLABLE_COLOURS)
    places[order[:n_shown]] = np.arange(n_shown)
    keys = [(table.callables[number], CALLABLE_COLOURS[place]) for place, number in enumerate(order[:n_shown].tolist())]
    if (n_more := len(order) - n_shown) > 0:
        keys.append((f"{n_more:,} more", GREY))
    return keys, places[table.callable_of[intervals.task]]


def _draw_tasks(
    plot: figure, table: RunTable, intervals: TaskIntervals, codes: NDArray[np.uint8]
) -> tuple[GlyphRenderer, NameParts]:
    task = intervals.task
    names = NameParts.of([table.names[i] for i in task.tolist()])
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
    made = _draw_rectangles(
        plot, "tasks", intervals.left, intervals.right, table.worker[task], columns,
        fill_color={"field": "by_callable", "transform": by_callable},
    )  # fmt: skip
    # page.js reads both from the tags to switch between them.
    plot.tags = [{"by_callable": by_callable, "status": by_status}]
    return made, names


def _draw_attempts(plot: figure, table: RunTable) -> GlyphRenderer:
    """Draw the attempts that failed before the last one, if their times are known."""
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
    return _draw_rectangles(plot, "failed attempts", left, right, worker, columns, **style)


def _draw_path(plot: figure, table: RunTable, path: Sequence[int]) -> None:
    tasks = np.array([task for task in path if table.worker[task] >= 0 and np.isfinite(table.start[task])], np.int32)
    left, right = table.start[tasks], table.start[tasks] + table.seconds[tasks]
    style: dict[str, Any] = {"fill_color": None, "line_color": "#111418", "line_width": 2, "visible": False}
    _draw_rectangles(plot, "critical path", left, right, table.worker[tasks], **style)


def _add_tools(plot: figure, hover: HoverTool, tried: GlyphRenderer) -> None:
    pan, box = PanTool(dimensions="width"), BoxZoomTool(dimensions="width")
    # The wheel alone scrolls the page.
    wheel = WheelZoomTool(dimensions="width", modifiers="ctrl")
    steps = ZoomInTool(dimensions="width", factor=0.5), ZoomOutTool(dimensions="width", factor=0.5)
    plot.add_tools(pan, box, wheel, *steps, ResetTool())
    plot.toolbar_location, plot.toolbar.logo, plot.toolbar.autohide = "above", None, False
    plot.toolbar.active_drag, plot.toolbar.active_scroll = pan, wheel
    plot.add_tools(hover)
    tips = [("failed attempt", "@attempt"), ("task", "@name"), ("error", "@error")]
    plot.add_tools(HoverTool(renderers=[tried], tooltips=tips, point_policy="follow_mouse", visible=False))


def _task_hover(table: RunTable, tasks: GlyphRenderer, names: NameParts) -> HoverTool:
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


def _draw_steps(plot: figure, steps: StepLine, colour: str) -> None:
    source = ColumnDataSource({"at": steps.at, "value": np.append(steps.value, steps.value[-1:])})
    plot.varea_step("at", 0, "value", source=source, step_mode="after", fill_color=colour, fill_alpha=0.22)
    plot.step("at", "value", source=source, mode="after", line_color=colour, line_width=1.25, name="steps")


def _worker_ticks(n_workers: int) -> list[int]:
    return list(range(0, n_workers, -(-n_workers // _MOST_TICKS)))
