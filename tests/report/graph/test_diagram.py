"""Pictures of workflows: what is drawn, where, and that no name can break them."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.examples import census
from forgepar.report.graph import layout
from forgepar.report.graph.boxes import drawing_of
from forgepar.report.graph.colours import STATUS_COLOURS
from forgepar.report.graph.diagram import draw
from forgepar.report.graph.svg import as_svg
from forgepar.report.text import cleaned, columns, shortened
from forgepar.scheduling.run_state import Status

SVG = "{http://www.w3.org/2000/svg}"
NASTY = [
    'a<b>&"c"',
    "new\nline\r\n",
    "semi;colon#35;#quot;",
    "br[a]c{k}(e)t|pipe|",
    "end",
    "日本語テスト",
    "`tick` **bold**",
    "style:x#y;z",
    "\\N back\\slash\\",
    "it's $x^2$",
    "%%{init: {}}%%",
    "]]><!--",
    "\x00\x07control",
    "\ud800lone",
    "e\u0301\u202eabc",
    "\ufffe\uffff",
    "x" * 500,
]


def cell(*inputs):
    return len(inputs)


def diamond():
    wf = fp.Workflow("diamond")
    first = wf.add(abs, 1)
    wf.add(max, wf.add(round, first), wf.add(hash, first))
    return wf


def stencil(width, depth):
    wf = fp.Workflow("stencil")
    row = list(wf.map(cell, range(width)))
    for _ in range(depth - 1):
        row = [wf.add(cell, *row[max(0, i - 1) : i + 2]) for i in range(width)]
    return wf


def grid(width, depth):
    """Layers of equal width, each task taking that above it: all by `map`, so that it is quickly declared."""
    wf = fp.Workflow("grid")
    row = wf.map(cell, range(width))
    for _ in range(depth - 1):
        row = wf.map(cell, row)
    return wf


def named(names):
    wf = fp.Workflow('na"me<>\n;\\')
    handles = [wf.add(fp.task(cell).options(name=name)) for name in names]
    wf.add(max, handles)
    return wf


def parse(svg):
    return ET.fromstring(svg.encode())  # noqa: S314  (it was made here)


def faces(root):
    """The rectangle of each box, in order, beside its texts' x places."""
    for group in root.iter(f"{SVG}g"):
        face = next(rect for rect in group.iter(f"{SVG}rect") if not rect.get("class"))
        yield group, [float(face.get(key)) for key in ("x", "y", "width", "height")]


# What is drawn


def test_a_box_a_task_and_an_arrow_a_dependency():
    drawing = drawing_of(diamond().plan())
    assert [(box.label, box.layer, box.n_tasks) for box in drawing.boxes] == [
        ("abs", 0, 1),
        ("round", 1, 1),
        ("hash", 1, 1),
        ("max", 2, 1),
    ]
    assert list(zip(drawing.sources.tolist(), drawing.targets.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 3),
        (2, 3),
    ]
    assert drawing.tasks_by_layer == [1, 2, 1]


def test_a_value_taken_twice_is_one_arrow():
    wf = fp.Workflow()
    first = wf.add(abs, 1)
    wf.add(max, first, first, [first])
    assert len(drawing_of(wf.plan()).sources) == 1


def test_order_without_data_is_dashed_unless_a_value_goes_too():
    wf = fp.Workflow()
    first, second = wf.add(abs, 1), wf.add(round, 1)
    both = wf.add(hash, first)
    for before in (first, second):
        wf.add_dependency(both, after=before)
    drawing = drawing_of(wf.plan())
    assert drawing.order_only.tolist() == [False, True]
    assert 'class="arrow order"' in draw(wf)
    assert re.findall(r"b\d (\S+) b\d", draw(wf, "mermaid")) == ["-->", "-.->"]
    assert draw(wf, "dot").count("style=dashed") == 1


def test_large_workflows_are_collapsed_unless_told_otherwise():
    for wf, n_boxes in ((stencil(10, 10), 100), (stencil(10, 11), 11), (stencil(50, 2), 100)):
        assert len(drawing_of(wf.plan()).boxes) == n_boxes
    assert len(drawing_of(stencil(10, 11).plan(), collapse=False).boxes) == 110
    assert len(drawing_of(stencil(3, 2).plan(), collapse=True).boxes) == 2
    many_arrows = fp.Workflow()
    first = many_arrows.map(cell, range(30))
    many_arrows.map(cell, [list(first) for _ in range(30)])
    assert [box.described() for box in drawing_of(many_arrows.plan()).boxes] == [
        "cell: 30 tasks of layer 0",
        "cell: 30 tasks of layer 1",
    ]


def test_what_is_one_function_to_a_reader_is_one_box():
    wf = fp.Workflow()
    for number in range(3):
        wf.add(lambda: number)  # noqa: B023  (three functions of one place)
        wf.add(fp.task(cell).options(name=f"cell of {number}"))
    wf.add(lambda: None)
    boxes = drawing_of(wf.plan(), collapse=True).boxes
    assert [(box.label, box.n_tasks) for box in boxes] == [("lambda", 3), ("cell", 3), ("lambda-3", 1)]


def test_included_workflows_keep_their_names_where_they_are_alone():
    wf, inner = fp.Workflow(), diamond()
    wf.include(inner, prefix="left")
    assert {box.label for box in drawing_of(wf.plan(), collapse=True).boxes} == {
        f"left/{name}" for name in ("abs", "round", "hash", "max")
    }
    wf.include(inner, prefix="right")
    assert {box.label for box in drawing_of(wf.plan(), collapse=True).boxes} == {"abs", "round", "hash", "max"}


def test_the_census_is_a_handful_of_boxes():
    workflow = census.workflow()
    drawing = drawing_of(workflow.plan())
    assert drawing.is_collapsed
    assert len(drawing.boxes) < 12
    assert sum(box.n_tasks for box in drawing.boxes) == len(workflow)
    parse(draw(workflow))


# What became of a run


def run_with_failure(n=10):
    def load(number):
        if number == 7:
            raise LookupError(number)
        return number

    wf = fp.Workflow("run")
    wf.add(cell, wf.map(cell, wf.map(load, range(n))))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False)
    return wf, caught.value.result.table()


def test_boxes_have_the_colour_of_their_status_and_a_legend_counts():
    wf, table = run_with_failure()
    root = parse(wf.diagram(table=table))
    classes = [group.get("class") for group, _ in faces(root)]
    assert classes.count("box s-failed") == 1
    assert classes.count("box s-skipped") == 2
    assert classes.count("box s-completed") == 18
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    assert labels[-3:] == ["1 failed", "2 skipped", "18 completed"]
    assert wf.diagram(table=table) == draw(table)


def test_a_collapsed_box_shows_failures_and_the_share_of_each_status():
    wf, table = run_with_failure()
    load, clean, last = (group for group, _ in faces(parse(wf.diagram(table=table, collapse=True))))
    assert [group.get("class") for group in (load, clean, last)] == ["box s-failed", "box s-completed", "box s-skipped"]
    assert load.find(f"{SVG}title").text == "load: 10 tasks of layer 0 (1 failed, 9 completed)"
    shares = {r.get("class"): float(r.get("width")) for r in load.iter(f"{SVG}rect") if "share" in r.get("class", "")}
    assert shares["share f-completed"] > shares["share f-failed"] >= 3
    assert not [r for r in last.iter(f"{SVG}rect") if "share" in r.get("class", "")]


def test_every_status_has_a_colour():
    assert set(STATUS_COLOURS) == {status.name.lower() for status in Status}
    _, table = run_with_failure(8)
    table = replace(table, status_of=np.arange(len(table), dtype=np.int8) % len(Status))
    for form in ("svg", "mermaid", "dot"):
        text = draw(table, form)
        assert all(colours[0] in text for colours in STATUS_COLOURS.values())


def test_a_table_of_another_workflow_is_refused():
    _, table = run_with_failure()
    with pytest.raises(ValueError, match="has other tasks"):
        diamond().diagram(table=table)


def test_a_run_that_grew_is_drawn_as_it_grew():
    def grow():
        inner = fp.Workflow("inner")
        inner.add(max, inner.map(abs, range(3)))
        return fp.Subflow(inner)

    wf = fp.Workflow("outer")
    wf.add(cell, wf.add(grow))
    table = wf.run(backend="inline").table()
    assert len(table) > len(wf)
    assert len(list(faces(parse(wf.diagram(table=table))))) == len(table)


# Where it is drawn


def crossings_one_by_one(group, tails, heads):
    rows = list(zip(group, tails, heads, strict=True))
    return sum(g == h and (a - c) * (b - d) < 0 for (g, a, b), (h, c, d) in itertools.combinations(rows, 2))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_crossings_are_counted(rows):
    group, tails, heads = (np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ((), (), ())))
    assert layout.crossings(group, tails, heads) == crossings_one_by_one(group, tails, heads)


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_rising_numbers_rise_and_keep_what_rises_already(rows):
    values, weights = zip(*rows, strict=True)
    found = layout._rising(values, weights)
    assert (np.diff(found) >= 0).all()
    assert np.average(found, weights=weights) == pytest.approx(np.average(values, weights=weights), abs=1e-9)
    assert layout._rising(sorted(values), weights).tolist() == pytest.approx(sorted(values))


def some_graph(seed, n=60):
    rng = random.Random(seed)
    wf = fp.Workflow()
    handles = []
    for number in range(n):
        handles.append(wf.add(cell, *rng.sample(handles, min(number, rng.choice([0, 1, 1, 2, 3])))))
    return wf


def laid_out(wf):
    drawing = drawing_of(wf.plan(), collapse=False)
    sizes = np.array([50.0 + 10 * (number % 5) for number in range(len(drawing.boxes))])
    arguments = (drawing.layers, drawing.sources, drawing.targets, drawing.order_only)
    return drawing, sizes, layout.placed(*arguments, sizes, 16.0)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_and_bends_of_a_layer_never_overlap(seed):
    drawing, sizes, found = laid_out(some_graph(seed))
    size = np.append(sizes, np.zeros(len(found.layer) - len(sizes)))
    for layer in range(len(drawing.tasks_by_layer)):
        mine = np.flatnonzero(found.layer == layer)
        mine = mine[np.argsort(found.centre[mine])]
        room = np.diff(found.centre[mine]) - (size[mine][1:] + size[mine][:-1]) / 2
        assert (room >= 8 - 1e-6).all()


@pytest.mark.parametrize("seed", range(8))
def test_every_arrow_can_be_followed_through_the_bends(seed):
    drawing, _, found = laid_out(some_graph(seed))
    n = len(drawing.boxes)
    assert (found.layer[found.heads] - found.layer[found.tails] == 1).all()
    behind = {}
    for tail, head in zip(found.tails.tolist(), found.heads.tolist(), strict=True):
        behind.setdefault(tail, []).append(head)

    def reached(node):
        return {box for head in behind.get(node, ()) for box in ([head] if head < n else reached(head))}

    wanted = {}
    for source, target in zip(drawing.sources.tolist(), drawing.targets.tolist(), strict=True):
        wanted.setdefault(source, set()).add(target)
    for box in range(n):
        # Arrows that share bends may be followed from one box into another's, but never to a box that none leads to.
        assert wanted.get(box, set()) <= reached(box)
    assert {head for head in found.heads.tolist() if head < n} == set(drawing.targets.tolist())
    assert {tail for tail in found.tails.tolist() if tail < n} == set(drawing.sources.tolist())


def test_sorting_takes_crossings_away():
    wf = fp.Workflow()
    first = wf.map(cell, range(12))
    wf.map(cell, list(first)[::-1])
    _, _, found = laid_out(wf)
    tails, heads = (found.centre[ends].argsort().argsort() for ends in (found.tails, found.heads))
    assert layout.crossings(found.layer[found.tails], tails, heads) == 0
    assert found.centre[found.tails] == pytest.approx(found.centre[found.heads], abs=20)


def test_a_chain_is_a_line_past_which_long_arrows_go():
    wf = fp.Workflow()
    first = handle = wf.add(cell)
    for _ in range(8):
        handle = wf.add(cell, handle)
    wf.add(cell, first, handle)
    _, _, found = laid_out(wf)
    bends = found.centre[10:]
    assert len(bends) == 8
    assert np.ptp(bends) < 5  # a tenth of a box
    assert (np.abs(found.centre[1:9] - bends) >= 25).all()


def test_bends_are_bounded(monkeypatch):
    monkeypatch.setattr(layout, "MOST_BENDS", 5)
    drawing, _, found = laid_out(some_graph(1))
    assert len(found.layer) <= len(drawing.boxes) + 5
    assert (found.layer[found.heads] > found.layer[found.tails]).all()
    parse(draw(some_graph(1)))


def test_ports_lie_side_by_side_within_the_room():
    nodes, others = np.array([0, 0, 0, 1]), np.array([30.0, 10.0, 20.0, 5.0])
    assert layout.spread_ports(nodes, others, np.full(4, 100.0), 9.0).tolist() == [9, -9, 0, 0]
    assert layout.spread_ports(nodes, others, np.full(4, 8.0), 9.0).tolist() == [4, -4, 0, 0]


# SVG


def test_svg_is_self_contained_and_says_what_it_is():
    svg = draw(diamond())
    root = parse(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("aria-label") == "workflow diamond: 4 tasks in 3 layers"
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"\bhref|url\(|<script|<image|@import", svg)
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]
    assert not [element for element in root.iter() if element.get("id")]  # two pictures may be in one page


def test_rules_hold_for_the_picture_alone():
    style = parse(draw(diamond())).find(f"{SVG}style").text
    rules = style.replace("@media (prefers-color-scheme:dark){", "").replace("}}", "}")
    selectors = [part for rule in rules.split("}") if rule for part in rule.partition("{")[0].split(",")]
    assert selectors
    assert all(selector.startswith(".forgepar ") for selector in selectors)


@pytest.mark.parametrize("direction", ["down", "right"])
@pytest.mark.parametrize("seed", range(3))
def test_everything_lies_within_the_picture_and_boxes_apart(direction, seed):
    root = parse(draw(some_graph(seed), direction=direction))
    _, _, width, height = map(float, root.get("viewBox").split())
    boxes = [box for _, box in faces(root)]
    assert len(boxes) == 60
    for x, y, w, h in boxes:
        assert min(x, y) >= 0
        assert x + w <= width
        assert y + h <= height
    for (x, y, w, h), (u, v, p, q) in itertools.combinations(boxes, 2):
        assert x + w <= u or u + p <= x or y + h <= v or v + q <= y
    for path in root.iter(f"{SVG}path"):
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d", path.get("d"))]
        assert min(numbers) > -1
        assert max(numbers) < max(width, height)


@pytest.mark.parametrize("direction", ["down", "right"])
def test_layers_follow_each_other(direction):
    boxes = list(faces(parse(draw(diamond(), direction=direction))))
    along = [box[1] if direction == "down" else box[0] for _, box in boxes]
    assert along[0] < along[1] == along[2] < along[3]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_the_svg(name):
    root = parse(draw(named([name, "plain"])))
    titles = [group.find(f"{SVG}title").text for group, _ in faces(root)]
    assert titles == [cleaned(name), "plain", "max"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=4, unique=True))
def test_no_text_overflows_its_box(names):
    for group, (x, _, width, _) in faces(parse(draw(named(names)))):
        text = group.find(f"{SVG}text")
        shown = text.text or ""
        assert columns(shown) <= 30
        half = columns(shown) * 12 * 0.605 / 2  # the widest of the fonts that are asked for
        assert x <= float(text.get("x")) - half
        assert float(text.get("x")) + half <= x + width
        assert shown.isascii() or float(text.get("textLength")) <= width


def test_counts_do_not_touch_names():
    wf = fp.Workflow()
    wf.map(fp.task(cell), range(1_234_567))
    (group, (x, _, width, _)) = next(faces(parse(draw(wf))))
    name, count = group.iter(f"{SVG}text")
    assert count.text == "\N{MULTIPLICATION SIGN}1,234,567"
    name_ends = float(name.get("x")) + columns(name.text) * 12 * 0.605 / 2
    count_begins = float(count.get("x")) - columns(count.text) * 12 * 0.605
    assert name_ends < count_begins
    assert float(count.get("x")) < x + width


def test_shortened_names_keep_their_ends():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 8) == "abcd…ijk"
    assert columns(shortened("日本語テスト日本語", 9)) <= 9
    assert columns("e\u0301") == 1
    assert columns("日本") == 4


def test_one_task_alone():
    wf = fp.Workflow()
    wf.add(abs, 1)
    root = parse(draw(wf))
    assert len(list(faces(root))) == 1
    assert not list(root.iter(f"{SVG}path"))


def test_a_hundred_thousand_tasks():
    wf = grid(10_000, 10)
    root = parse(draw(wf))
    assert [group.find(f"{SVG}title").text for group, _ in faces(root)] == [
        f"cell: 10,000 tasks of layer {layer}" for layer in range(10)
    ]
    assert len(draw(wf)) < 20_000
    assert draw(grid(1_000, 10), collapse=False).count('class="box') == 10_000


@pytest.mark.parametrize("wf", [stencil(5, 6), some_graph(3), some_graph(4, 300)], ids=["stencil", "some", "many"])
def test_the_same_workflow_gives_the_same_picture(wf):
    assert as_svg(drawing_of(wf.plan(), collapse=False)) == as_svg(drawing_of(wf.plan(), collapse=False))


# Mermaid and Graphviz


def mermaid_labels(text):
    """Labels by box, entities read as Mermaid reads them; what is not escaped must mean nothing to it."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r'    b(\d+)(\["|\[\[")(.*?)("\]|"\]\])', line)
        if match:
            assert not re.search(r'["<>\[\]{}|`\\:&%$@^~\x00-\x1f]|#(?!\d+;)|(?<!\d);', match[3])
            found[int(match[1])] = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), match[3])
    return found


def test_names_come_through_mermaid():
    labels = mermaid_labels(draw(named(NASTY), "mermaid"))
    assert [labels[number] for number in range(len(NASTY))] == [shortened(cleaned(name), 60) for name in NASTY]


def test_mermaid_has_a_subgraph_a_layer_and_double_boxes_for_many():
    wf = fp.Workflow()
    wf.add(max, wf.map(cell, range(200)))
    assert draw(wf, "mermaid", direction="right").splitlines() == [
        "flowchart LR",
        '  subgraph layer0["layer 0"]',
        '    b0[["cell \N{MULTIPLICATION SIGN}200"]]',
        "  end",
        '  subgraph layer1["layer 1"]',
        '    b1["max"]',
        "  end",
        "  b0 --> b1",
    ]


def test_mermaid_colours_by_status():
    _, table = run_with_failure()
    text = draw(table, "mermaid")
    assert "  class b7 failed" in text.splitlines()
    assert re.search(r"classDef failed fill:#\w+,stroke:#\w+,color:#\w+$", text, re.MULTILINE)


def unquoted(text):
    """Quoted texts of a Graphviz graph; outside of them, only what it is made of."""
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert re.fullmatch(r"[\w\s{}\[\]=,;.>-]*", rest)
    return [re.sub(r"\\(.)", r"\1", found) for found in texts]


def test_names_come_through_dot():
    texts = unquoted(draw(named(NASTY), "dot"))
    assert texts[0] == cleaned('na"me<>\n;\\')
    for name in NASTY:
        assert shortened(cleaned(name), 60) in texts


def laid_out_by_graphviz(text):
    """What Graphviz makes of a graph: its objects, by name."""
    program = shutil.which("dot")
    if program is None:
        pytest.skip("Graphviz (dot) is not installed")
    done = subprocess.run([program, "-Tjson"], input=text.encode(), capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    return {item["name"]: item for item in json.loads(done.stdout)["objects"] if "pos" in item}


def test_graphviz_reads_it():
    boxes = laid_out_by_graphviz(draw(named(NASTY), "dot"))
    labels = [re.sub(r"\\(.)", r"\1", box["label"]) for box in boxes.values()]
    assert sorted(labels) == sorted([*(shortened(cleaned(name), 60) for name in NASTY), "max"])


def test_graphviz_keeps_the_layers():
    boxes = laid_out_by_graphviz(draw(some_graph(2), "dot", direction="down"))
    layers = drawing_of(some_graph(2).plan()).layers
    heights = [
        {boxes[f"b{box}"]["pos"].split(",")[1] for box in np.flatnonzero(layers == layer)}
        for layer in range(layers.max() + 1)
    ]
    assert [len(row) for row in heights] == [1] * len(heights)
    in_order = [float(row.pop()) for row in heights]
    assert in_order == sorted(in_order, reverse=True)


# From the public face


def test_a_workflow_shows_itself_in_a_notebook():
    wf = diamond()
    assert wf._repr_svg_() == wf.diagram()
    assert fp.Workflow()._repr_svg_() is None
    wf.add_dependency("abs", after="max")
    assert wf._repr_svg_() is None


def test_bad_arguments_are_told():
    wf = diamond()
    with pytest.raises(ValueError, match="form must be one of 'svg', 'mermaid', 'dot', got 'png'"):
        wf.diagram("png")
    with pytest.raises(ValueError, match=r"direction must be one of .*, got 'up'"):
        wf.diagram(direction="up")
    with pytest.raises(fp.EmptyWorkflow):
        fp.Workflow().diagram()
    wf.add_dependency("abs", after="max")
    with pytest.raises(fp.CyclicWorkflow, match="abs -> "):
        wf.diagram("dot")


def test_drawing_is_loaded_when_something_is_drawn():
    code = "import sys, forgepar; forgepar.Workflow; print('forgepar.report.graph.diagram' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
