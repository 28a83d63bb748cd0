"""The command that draws."""

from __future__ import annotations

import sys
import textwrap
import xml.etree.ElementTree as ET

import pytest

from forgepar.cli import main as cli

PIPELINE = """
    import forgepar as fp

    workflow = fp.Workflow("sums")
    workflow.add(sum, workflow.map(abs, range(5)))

    def cyclic():
        wf = fp.Workflow("circle")
        first = wf.add(abs, 1)
        wf.add_dependency(first, after=wf.add(round, first))
        return wf
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    name = f"graphs_{tmp_path.name}".replace("-", "_")
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(PIPELINE))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield str(path)
    sys.modules.pop(name, None)


def graph(*arguments):
    return cli.main(["graph", *map(str, arguments)])


@pytest.mark.parametrize(
    ("ending", "begins"),
    [("svg", "<svg "), ("SVG", "<svg "), ("mmd", "flowchart "), ("dot", "digraph "), ("gv", "digraph ")],
)
def test_the_ending_says_what_is_written(target, tmp_path, capsys, ending, begins):
    path = tmp_path / f"graph.{ending}"
    assert graph(target, "-o", path) == 0
    assert path.read_text(encoding="utf-8").startswith(begins)
    assert capsys.readouterr() == ("", "")


def test_without_a_file_it_is_printed_as_mermaid(target, capsys):
    assert graph(target) == 0
    assert capsys.readouterr().out.startswith("flowchart ")
    assert graph(target, "--format", "svg") == 0
    ET.fromstring(capsys.readouterr().out)  # noqa: S314  (it was made here)


def test_format_goes_before_the_ending(target, tmp_path):
    path = tmp_path / "graph.txt"
    assert graph(target, "-o", path, "--format", "dot") == 0
    assert path.read_text(encoding="utf-8").startswith("digraph ")


def test_collapsing_and_direction_can_be_told(target, capsys):
    for arguments, n_boxes in (((), 6), (("--collapse",), 2), (("--no-collapse",), 6)):
        assert graph(target, "--format", "dot", *arguments) == 0
        assert capsys.readouterr().out.count("label=") == n_boxes
    assert graph(target, "--direction", "right") == 0
    assert capsys.readouterr().out.startswith("flowchart LR")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-o", "graph.png"), "--output must end in one of .svg, .mmd, .mermaid, .dot, .gv, got graph.png"),
        (("-o", "no/such/folder/graph.svg"), "-o: no/such/folder/graph.svg cannot be written: there is no folder"),
    ],
)
def test_what_cannot_be_written_is_told(target, capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert graph(target, *arguments) == 2
    assert told in capsys.readouterr().err


def test_a_circle_is_told(target, capsys):
    assert graph(f"{target}:cyclic") == 2
    assert "round -> abs -> round" in capsys.readouterr().err
