"""The command that draws a workflow: ``graph``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from forgepar.commands.base import DONE, Commands, add_target_command, complain
from forgepar.report.diagram import DIRECTIONS, FORMS, draw
from forgepar.report.writing import write_pieces
from forgepar.workflow import Workflow

_FORM_OF = {".svg": "svg", ".mmd": "mermaid", ".mermaid": "mermaid", ".dot": "dot", ".gv": "dot"}


def add_to(commands: Commands) -> None:
    """Add this command to the command line."""
    command = add_target_command(
        commands,
        "graph",
        graph,
        "draw a workflow by its layers, without running it",
        ["pipeline.py:nightly -o graph.svg", "pipeline.py:nightly --collapse"],
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to: .svg, .mmd (Mermaid) or .dot (Graphviz)"
    )
    command.add_argument(
        "--format",
        dest="form",
        choices=FORMS,
        help="what to write (default: as FILE ends; without FILE it is printed, as mermaid)",
    )
    command.add_argument(
        "--collapse",
        action=argparse.BooleanOptionalAction,
        help="one box for all tasks of a layer that call the same function, or one a task "
        "(default: collapse above 100 tasks or 400 dependencies)",
    )
    command.add_argument(
        "--direction", choices=DIRECTIONS, help="in which layers follow each other (default: as it fits a page)"
    )


def graph(workflow: Workflow, arguments: argparse.Namespace) -> int:
    """Write a workflow's picture to a file, or print it."""
    path: Path | None = arguments.output
    form = arguments.form or ("mermaid" if path is None else _FORM_OF.get(path.suffix.lower()))
    if form is None:
        known = ", ".join(_FORM_OF)
        return complain(ValueError(f"{path} ends in none of {known}. Name it so, or give --format."))
    text = draw(workflow, form, collapse=arguments.collapse, direction=arguments.direction)
    if path is None:
        sys.stdout.write(text)
        return DONE
    try:
        write_pieces(path, [text])
    except OSError as error:
        return complain(ValueError(f"{path} cannot be written: {error.strerror}. Give another -o."))
    return DONE
