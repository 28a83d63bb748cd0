"""The command ``graph``: draws a workflow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from forgepar.cli.base import DONE, Commands, add_target_command, check_output, complain, path_of
from forgepar.report.export.writing import write_pieces
from forgepar.report.graph.diagram import DIRECTIONS, FORMS, draw
from forgepar.workflow.workflow import Workflow

_FORM_OF = {".svg": "svg", ".mmd": "mermaid", ".mermaid": "mermaid", ".dot": "dot", ".gv": "dot"}


def add_to(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_target_command(
        commands,
        "graph",
        graph,
        "draw the layers of a workflow, without running it",
        ["pipeline.py:nightly -o graph.svg", "pipeline.py:nightly --collapse"],
    )
    command.add_argument(
        "-o",
        "--output",
        type=path_of,
        metavar="FILE",
        help="write to this file: .svg, .mmd (Mermaid), .dot (Graphviz)",
    )
    command.add_argument(
        "--format",
        dest="form",
        choices=FORMS,
        help="the format (default: by the suffix of FILE; mermaid on standard output)",
    )
    command.add_argument(
        "--collapse",
        action=argparse.BooleanOptionalAction,
        help="draw one box for all tasks of a layer that call the same function, or one per task "
        "(default: collapse above 100 tasks or 400 dependencies)",
    )
    command.add_argument(
        "--direction", choices=DIRECTIONS, help="the direction of the layers (default: what fits a page)"
    )


def graph(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Write the diagram of a workflow to a file or to standard output."""
    path: Path | None = arguments.output
    check_output("-o", path)
    form = arguments.form or ("mermaid" if path is None else _FORM_OF.get(path.suffix.lower()))
    if form is None:
        known = ", ".join(_FORM_OF)
        return complain(ValueError(f"--output must end in one of {known}, got {path}. Rename it, or give --format."))
    text = draw(workflow, form, collapse=arguments.collapse, direction=arguments.direction)
    if path is None:
        sys.stdout.write(text)
        return DONE
    try:
        write_pieces(path, [text])
    except OSError as error:
        return complain(ValueError(f"{path} cannot be written: {error.strerror}. Give another -o."))
    return DONE
