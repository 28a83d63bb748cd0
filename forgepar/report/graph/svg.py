"""A drawing as SVG: layers as bands, boxes with names, arrows as curves. The file refers to no other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from forgepar.report.graph.boxes import Box, Drawing
from forgepar.report.graph.colours import KIND_COLOURS, STATUS_COLOURS
from forgepar.report.graph.layout import Floats, Layout, placed, spread_ports
from forgepar.report.text import TIMES, cleaned, columns, shortened, titled

_MOST_COLUMNS = 30  # columns of a name in a box
_LETTER = 7.3  # width of a letter of 12 px in a fixed-width font, rounded up: these have 0.55 to 0.605 em
_PADDING = 12.0  # on both sides of a name
_HEIGHT = 30.0  # height of a box
_CARD = 6.0  # offset of the stacked cards of a box of several tasks
_GAP = 16.0  # between boxes of a layer
_MARGIN = 16.0
_BAND = 14.0  # from a box to the edge of the band of its layer
_HEAD = 18.0  # room for the name of a layer above a column; beside a row it is _SIDE
_SIDE = 74.0
_LEAST_BETWEEN, _MOST_BETWEEN = 26.0, 130.0  # distance of two bands
_LEAST_SHARE = 3.0  # least width of a status in the bar of a box
_PORT = 9.0  # distance of two arrows at a box
_PAGE = (1200.0, 800.0)  # size of the page for which the direction is chosen

_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"


class _Frame(NamedTuple):
    """The bands of the layers."""

    is_down: bool
    begin: Sequence[float]  # where the band of each layer begins, in the direction of the layers
    depth: Sequence[float]  # extent of the boxes of each layer in this direction
    across: tuple[float, float]  # where all bands begin and end in the other direction

    def middle(self, layer: int) -> float:
        """Return the middle of the boxes of a layer."""
        return self.begin[layer] + _BAND + self.depth[layer] / 2

    def end(self, layer: int) -> float:
        """Return where the band of a layer ends."""
        return self.begin[layer] + 2 * _BAND + self.depth[layer]


def as_svg(drawing: Drawing, is_down: bool | None = None) -> str:
    """Return a drawing as SVG text.

    Args:
        drawing: the boxes and arrows.
        is_down: whether layers run from top to bottom, or from left to right; None: as it fits a page better.
    """
    widths = np.array([_box_width(box) for box in drawing.boxes])
    if is_down is None:
        is_down = fits_down(drawing, widths)
    sizes = widths if is_down else np.array([_HEIGHT] * len(widths))
    layout = placed(drawing.layers, drawing.sources, drawing.targets, drawing.order_only, sizes, _GAP)
    frame, layout = _framed(drawing, layout, sizes, widths, is_down)
    if not is_down:  # boxes of one column are equally wide
        widths = np.array(frame.depth)[drawing.layers]
    parts = [*_bands(drawing, frame), *_arrows(drawing, layout, frame, sizes), *_boxes(drawing, layout, frame, widths)]
    along, across = frame.end(len(frame.begin) - 1) + _MARGIN, frame.across[1] + _MARGIN
    width, height = (across, along) if is_down else (along, across)
    if statuses := drawing.statuses():
        parts += _legend(statuses, height)
        width, height = max(width, _legend_width(statuses)), height + 26
    label = quoteattr(
        f"workflow {titled(drawing.name)}: {sum(drawing.tasks_by_layer):,} tasks in {len(frame.begin)} layers"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="forgepar" role="img" aria-label={label} '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n'
        f"<style>{_style(drawing)}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def fits_down(drawing: Drawing, widths: Floats | None = None) -> bool:
    """Return whether a drawing fits a page better with its layers from top to bottom than from left to right."""
    if widths is None:
        widths = np.array([_box_width(box) for box in drawing.boxes])
    layers = drawing.layers
    n_layers = len(drawing.tasks_by_layer)
    row = float((np.bincount(layers, widths + _GAP)).max())
    widest = np.zeros(n_layers)
    np.maximum.at(widest, layers, widths)
    column = float(np.bincount(layers).max()) * (_HEIGHT + _GAP)
    between = 2 * _BAND + _LEAST_BETWEEN
    down = max((row + _SIDE) / _PAGE[0], n_layers * (_HEIGHT + between) / _PAGE[1])
    right = max((float(widest.sum()) + n_layers * between) / _PAGE[0], column / _PAGE[1])
    return down <= right


def _box_width(box: Box) -> float:
    wide = columns(shortened(cleaned(box.label), _MOST_COLUMNS))
    wide += -wide % 4  # so that boxes with similar names have the same width and are aligned
    return max(wide, 4) * _LETTER + _count_width(box) + 2 * _PADDING


def _count(box: Box) -> str:
    return f"{TIMES}{box.n_tasks:,}" if box.n_tasks > 1 else ""


def _count_width(box: Box) -> float:
    return (len(_count(box)) + 1) * _LETTER if box.n_tasks > 1 else 0.0


def _framed(drawing: Drawing, layout: Layout, sizes: Floats, widths: Floats, is_down: bool) -> tuple[_Frame, Layout]:
    """Place the bands of the layers, further apart where arrows go far to the side."""
    n_layers = len(drawing.tasks_by_layer)
    depth = np.full(n_layers, _HEIGHT)
    if not is_down:
        depth[:] = 0
        np.maximum.at(depth, drawing.layers, widths)
    n = len(sizes)
    low, high = (layout.centre[:n] - sizes / 2).min(), (layout.centre[:n] + sizes / 2).max()
    low, high = min(low, layout.centre.min() - 4), max(high, layout.centre.max() + 4)
    first = _MARGIN + (_SIDE if is_down else _HEAD) + _BAND
    layout = layout._replace(centre=layout.centre - low + first)
    aside = np.zeros(n_layers)
    np.maximum.at(aside, layout.layer[layout.tails], np.abs(layout.centre[layout.tails] - layout.centre[layout.heads]))
    between = np.clip(_LEAST_BETWEEN + 0.11 * aside, _LEAST_BETWEEN, _MOST_BETWEEN)
    begin = accumulate((2 * _BAND + depth + between)[:-1].tolist(), initial=_MARGIN)
    across = (_MARGIN, float(high - low) + first + _BAND)
    return _Frame(is_down, list(begin), depth.tolist(), across), layout


def _bands(drawing: Drawing, frame: _Frame) -> Iterator[str]:
    low, high = frame.across
    for layer, n_tasks in enumerate(drawing.tasks_by_layer):
        begin, thickness = frame.begin[layer], frame.end(layer) - frame.begin[layer]
        x, y, width, height = low, begin, high - low, thickness
        if not frame.is_down:
            x, y, width, height = begin, low, thickness, high - low
        yield f'<rect class="band" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8"/>'
        count = f"{n_tasks:,} task{'s' * (n_tasks != 1)}"
        if frame.is_down:
            middle = frame.middle(layer)
            yield f'<text class="label" x="{x + 12:.1f}" y="{middle - 3:.1f}">layer {layer}</text>'
            yield f'<text class="label" x="{x + 12:.1f}" y="{middle + 11:.1f}">{count}</text>'
        else:
            head = f"layer {layer}" + (f" · {count}" if thickness > 24 + 6.2 * (10 + len(count) + 3) else "")
            yield f'<text class="label" x="{x + 10:.1f}" y="{y + 17:.1f}">{head}</text>'


def _boxes(drawing: Drawing, layout: Layout, frame: _Frame, widths: Floats) -> Iterator[str]:
    rows = zip(drawing.boxes, layout.centre.tolist(), widths.tolist(), strict=False)
    for box, centre, width in rows:
        along = frame.middle(box.layer)
        x, y = (centre, along) if frame.is_down else (along, centre)
        yield _box(box, x - width / 2, y - _HEIGHT / 2, width)


def _box(box: Box, x: float, y: float, width: float) -> str:
    sort = f"s-{box.status}" if box.status else f"k{box.kind % len(KIND_COLOURS)}"
    shape = f'width="{width:.1f}" height="{_HEIGHT:.0f}" rx="6"'
    name = shortened(cleaned(box.label), _MOST_COLUMNS)
    count = _count(box)
    middle = x + (width - _count_width(box)) / 2
    cards = [
        f'<rect class="card" x="{x + shift:.1f}" y="{y + shift:.1f}" {shape}/>'
        for shift in ((_CARD, _CARD / 2) if count else ())
    ]
    texts = [f'<text x="{middle:.1f}" y="{y + 19:.1f}"{_forced(name)}>{escape(name)}</text>']
    if count:
        texts.append(f'<text class="n" x="{x + width - _PADDING + 2:.1f}" y="{y + 19:.1f}">{count}</text>')
    face = f'<rect x="{x:.1f}" y="{y:.1f}" {shape}/>'
    shares = _shares(box, x, y, width) if len(box.statuses) > 1 else []
    title = f"<title>{escape(titled(box.described()))}</title>"
    return "".join([f'<g class="box {sort}">', title, *cards, face, *shares, *texts, "</g>"])


def _forced(name: str) -> str:
    """Return attributes that fix the width of a name with letters that may not be in the fixed-width font."""
    return "" if name.isascii() else f' textLength="{columns(name) * _LETTER:.1f}" lengthAdjust="spacingAndGlyphs"'


def _shares(box: Box, x: float, y: float, width: float) -> Iterator[str]:
    """Yield a bar at the bottom of a box, in the colours of the statuses of its tasks."""
    at, room = x + 6, width - 12 - _LEAST_SHARE * len(box.statuses)
    for status, n_tasks in box.statuses.items():
        part = _LEAST_SHARE + room * n_tasks / box.n_tasks  # so that one task of a thousand is visible
        yield f'<rect class="share f-{status}" x="{at:.2f}" y="{y + _HEIGHT - 6:.1f}" width="{part:.2f}" height="3"/>'
        at += part


def _arrows(drawing: Drawing, layout: Layout, frame: _Frame, sizes: Floats) -> Iterator[str]:
    """Yield a path of all solid arrows, one of all dashed arrows and one of their heads."""
    n, tails, heads = len(sizes), layout.tails, layout.heads
    if not len(tails):
        return
    room = np.zeros(len(layout.layer))
    room[:n] = np.maximum(sizes * 0.7 - 8, 0)
    centre = layout.centre
    begin = centre[tails] + spread_ports(tails, centre[heads], room[tails], _PORT)
    end = centre[heads] + spread_ports(heads, centre[tails], room[heads], _PORT)
    middle = np.array([frame.middle(layer) for layer in range(len(frame.begin))])
    half = np.array(frame.depth) / 2
    cards = np.array([_CARD if box.n_tasks > 1 else 0.0 for box in drawing.boxes] + [0.0] * (len(layout.layer) - n))
    out = middle[layout.layer[tails]] + half[layout.layer[tails]] + cards[tails]
    into = middle[layout.layer[heads]] - half[layout.layer[heads]]
    # A bend is a straight line through the band of its layer.
    bends = np.arange(n, len(layout.layer))
    through = np.stack([middle[layout.layer[bends]] - half[layout.layer[bends]], centre[bends]] * 2, axis=1)
    through[:, 2] += 2 * half[layout.layer[bends]]
    bend_dashed = np.zeros(len(layout.layer), np.bool_)
    bend_dashed[heads] = layout.dashed
    at_box = heads < n
    for dashed, sort in ((False, "arrow"), (True, "arrow order")):
        mine = layout.dashed == dashed
        if mine.any():
            # Curves end before the tips of the heads, which would not cover their ends.
            tips = into[mine] - np.where(at_box[mine], 4.0, 0.0)
            curves = _curves(out[mine], begin[mine], tips, end[mine], is_down=frame.is_down)
            lines = _lines(through[bend_dashed[bends] == dashed], is_down=frame.is_down)
            yield f'<path class="{sort}" d="{"".join([*curves, *lines])}"/>'
    tips = _tips(into[at_box], end[at_box], is_down=frame.is_down)
    yield f'<path class="head" d="{"".join(tips)}"/>'


def _curves(out: Floats, begin: Floats, into: Floats, end: Floats, *, is_down: bool) -> Iterator[str]:
    bend = (into - out) / 2
    columns_of = zip(out.tolist(), begin.tolist(), into.tolist(), end.tolist(), bend.tolist(), strict=True)
    for a, b, c, d, pull in columns_of:
        if is_down:
            yield f"M{b:.1f} {a:.1f}C{b:.1f} {a + pull:.1f} {d:.1f} {c - pull:.1f} {d:.1f} {c:.1f}"
        else:
            yield f"M{a:.1f} {b:.1f}C{a + pull:.1f} {b:.1f} {c - pull:.1f} {d:.1f} {c:.1f} {d:.1f}"


def _lines(ends: NDArray[np.float64], *, is_down: bool) -> Iterator[str]:
    for a, b, c, d in ends.tolist():
        yield f"M{b:.1f} {a:.1f}L{d:.1f} {c:.1f}" if is_down else f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"


def _tips(into: Floats, end: Floats, *, is_down: bool) -> Iterator[str]:
    for a, b in zip(into.tolist(), end.tolist(), strict=True):
        yield f"M{b - 3:.1f} {a - 6:.1f}h6l-3 6z" if is_down else f"M{a - 6:.1f} {b - 3:.1f}v6l6-3z"


def _legend(statuses: dict[str, int], top: float) -> Iterator[str]:
    x = _MARGIN
    for status, n_tasks in statuses.items():
        text = f"{n_tasks:,} {status}"
        yield f'<rect class="share f-{status}" x="{x:.1f}" y="{top - 3:.1f}" width="12" height="12" rx="3"/>'
        yield f'<text class="label" x="{x + 18:.1f}" y="{top + 7:.1f}">{text}</text>'
        x += 36 + 6.7 * len(text)


def _legend_width(statuses: dict[str, int]) -> float:
    return _MARGIN * 2 + sum(36 + 6.7 * len(f"{n:,} {status}") for status, n in statuses.items())


def _style(drawing: Drawing) -> str:
    """Return the style rules, limited to one class, as the rules of an embedded SVG apply to the whole page."""
    used = {box.kind % len(KIND_COLOURS) for box in drawing.boxes if not box.statuses}
    colours = {f"k{kind}": KIND_COLOURS[kind] for kind in sorted(used)}
    statuses = drawing.statuses()
    colours |= {f"s-{status}": STATUS_COLOURS[status] for status in statuses}
    rules = [
        f"text{{font:12px {_FONT};fill:#1c2430;text-anchor:middle}}",
        ".n{fill-opacity:.65;text-anchor:end}",
        # Text outside of boxes has a grey that is visible on white and on black.
        ".label{font-size:11px;fill:#7f8896;text-anchor:start}",
        ".band{fill:#8a94a6;fill-opacity:.1}",
        ".arrow{fill:none;stroke:#8a94a6;stroke-width:1.3}",
        ".order{stroke-dasharray:4 3}",
        ".head{fill:#8a94a6}",
        ".box rect{stroke-width:1.2}",
        ".box .share,.share{stroke:none}",
    ]
    light = [f".{name} rect{{fill:{fill};stroke:{line}}}" for name, (fill, line, _, _) in colours.items()]
    light += [f".f-{status},.box .f-{status}{{fill:{STATUS_COLOURS[status][1]}}}" for status in statuses]
    dark = [".box text{fill:#eef2f8}"]
    dark += [f".{name} rect{{fill:{fill};stroke:{line}}}" for name, (_, _, fill, line) in colours.items()]
    dark += [f".f-{status},.box .f-{status}{{fill:{STATUS_COLOURS[status][3]}}}" for status in statuses]
    return f"{_scoped([*rules, *light])}@media (prefers-color-scheme:dark){{{_scoped(dark)}}}"


def _scoped(rules: Sequence[str]) -> str:
    found = []
    for rule in rules:
        selectors, brace, body = rule.partition("{")
        found.append(",".join(f".forgepar {selector}" for selector in selectors.split(",")) + brace + body)
    return "".join(found)
