"""The graph of a workflow as SVG, or as text for Mermaid or Graphviz.

Workflow ──> Plan ──> boxes.Drawing ──> svg.as_svg (layout.placed) | as_mermaid | as_dot
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, TypeAlias, get_args

from forgepar._validate import check_choice, check_flag, check_instance
from forgepar.errors import EmptyWorkflow
from forgepar.records.table import RunTable
from forgepar.report.graph.boxes import Box, Drawing, drawing_of
from forgepar.report.graph.colours import KIND_COLOURS, STATUS_COLOURS
from forgepar.report.graph.svg import as_svg, fits_down
from forgepar.report.text import ELLIPSIS, TIMES, cleaned, shortened, titled
from forgepar.workflow.plan import Plan
from forgepar.workflow.workflow import Workflow

Form: TypeAlias = Literal["svg", "mermaid", "dot"]
Direction: TypeAlias = Literal["down", "right"]
FORMS: tuple[str, ...] = get_args(Form)
DIRECTIONS: tuple[str, ...] = get_args(Direction)
# Characters besides letters and digits that have no special meaning in Mermaid.
_PLAIN = frozenset(f" _-.,/+=()'*!?{ELLIPSIS}{TIMES}")
_LABEL = 60  # columns of a name in Mermaid and Graphviz, which make boxes as wide as their names


def draw(
    subject: Workflow | Plan | RunTable,
    form: str = "svg",
    *,
    collapse: bool | None = None,
    direction: str | None = None,
    table: RunTable | None = None,
) -> str:
    """Draw the graph of a workflow or of a run, by its layers.

    Args:
        subject: a workflow, a frozen workflow, or the table of a run, which is coloured by the status of its tasks.
        form: "svg", "mermaid" or "dot".
        collapse: whether the tasks of a layer that call the same function are one box with their number; None: if there
            are more than 100 tasks or 400 dependencies.
        direction: the direction of the layers, "down" or "right"; None: the one that fits a page better.
        table: a run of the workflow, to colour the tasks by their status.

    Returns:
        The text of an SVG file, a Mermaid flow chart or a Graphviz graph.

    Raises:
        EmptyWorkflow: there is no task.
        CyclicWorkflow: the workflow has a dependency cycle.
        ValueError: unknown form or direction, or the table is of another workflow.
    """
    check_choice("form", form, FORMS)
    if direction is not None:
        check_choice("direction", direction, DIRECTIONS)
    if collapse is not None:
        check_flag("collapse", collapse)
    if table is not None:
        check_instance("table", table, RunTable, "the RunTable of a run, or None")
    source = subject.plan() if isinstance(subject, Workflow) else subject
    if not (len(source) if isinstance(source, RunTable) else source.n_tasks):
        raise EmptyWorkflow("The workflow has no tasks to draw. Add one with Workflow.add or map.")
    drawing = drawing_of(source, table, collapse)
    is_down = None if direction is None else direction == "down"
    if form == "svg":
        return as_svg(drawing, is_down)
    is_down = fits_down(drawing) if is_down is None else is_down
    return "\n".join((as_mermaid if form == "mermaid" else as_dot)(drawing, is_down)) + "\n"


def as_mermaid(drawing: Drawing, is_down: bool) -> Iterator[str]:
    """Yield the lines of a Mermaid flow chart, with one subgraph per layer.

    By default, Mermaid refuses more than 500 arrows or 50,000 characters; its page can raise these limits.
    """
    yield f"flowchart {'TD' if is_down else 'LR'}"
    numbered = list(enumerate(drawing.boxes))
    for layer, boxes in groupby(numbered, key=lambda pair: pair[1].layer):
        yield f'  subgraph layer{layer}["layer {layer}"]'
        for number, box in boxes:
            left, right = ('["', '"]') if box.n_tasks == 1 else ('[["', '"]]')
            yield f"    b{number}{left}{_mermaid_text(_named(box))}{right}"
        yield "  end"
    arrows = zip(drawing.sources.tolist(), drawing.targets.tolist(), drawing.order_only.tolist(), strict=True)
    for source, target, is_order in arrows:
        yield f"  b{source} {'-.->' if is_order else '-->'} b{target}"
    for status in drawing.statuses():
        fill, line = STATUS_COLOURS[status][:2]
        mine = [f"b{number}" for number, box in numbered if box.status == status]
        yield f"  classDef {status} fill:{fill},stroke:{line},color:#1c2430"
        if mine:
            yield f"  class {','.join(mine)} {status}"


def as_dot(drawing: Drawing, is_down: bool) -> Iterator[str]:
    """Yield the lines of a Graphviz graph, with the boxes of a layer at the same rank."""
    yield f"digraph {_dot_text(drawing.name)} {{"
    yield f"  rankdir={'TB' if is_down else 'LR'}; newrank=true; bgcolor=transparent; ranksep=0.6;"
    yield '  node [shape=box, style="rounded,filled", fontname="monospace", fontsize=10, height=0.35];'
    yield '  edge [color="#8a94a6", arrowsize=0.6];'
    for layer, boxes in groupby(enumerate(drawing.boxes), key=lambda pair: pair[1].layer):
        yield f"  subgraph layer{layer} {{ rank=same;"
        for number, box in boxes:
            fill, line = _colours(box)
            peripheries = ", peripheries=2" if box.n_tasks > 1 else ""
            yield (
                f"    b{number} [label={_dot_text(_named(box))}, tooltip={_dot_text(titled(box.described()))}, "
                f'fillcolor="{fill}", color="{line}"{peripheries}];'
            )
        yield "  }"
    arrows = zip(drawing.sources.tolist(), drawing.targets.tolist(), drawing.order_only.tolist(), strict=True)
    for source, target, is_order in arrows:
        yield f"  b{source} -> b{target}{' [style=dashed]' if is_order else ''};"
    yield "}"


def _named(box: Box) -> str:
    name = shortened(cleaned(box.label), _LABEL)
    return f"{name} {TIMES}{box.n_tasks:,}" if box.n_tasks > 1 else name


def _colours(box: Box) -> tuple[str, str]:
    fill, line, _, _ = STATUS_COLOURS[box.status] if box.status else KIND_COLOURS[box.kind % len(KIND_COLOURS)]
    return fill, line


def _mermaid_text(text: str) -> str:
    """Escape a text for Mermaid: special characters become ``#number;``."""
    return "".join(letter if letter.isalnum() or letter in _PLAIN else f"#{ord(letter)};" for letter in text) or " "


def _dot_text(text: str) -> str:
    """Quote a text for Graphviz. Backslashes are doubled, as they begin escapes."""
    return '"' + cleaned(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
