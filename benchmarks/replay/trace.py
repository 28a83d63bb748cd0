"""Reads workflow traces in WfFormat 1.5 (https://github.com/wfcommons/WfFormat): who waited for whom, and how long."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.replay.simulate import layers_of

_DEFAULT_FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "wfinstances"
_ONE_WORD = re.compile(r"[\w./-]+")
_NUMBERING = re.compile(r"_\d+$")  # by which Nextflow's names tell tasks of a kind apart


@dataclass(frozen=True)
class Trace:
    """One run of a workflow; tasks are numbered layer by layer.

    Attributes:
        name: the file's, without its ending.
        kinds: what each task is one of, such as the program it ran.
        durations: of each task, seconds.
        parents: for each task those it waited for; they have lower numbers.
    """

    name: str
    kinds: list[str]
    durations: list[float]
    parents: list[list[int]]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Pairs of a task and one that waited for it."""
        return [(parent, task) for task, parents in enumerate(self.parents) for parent in parents]

    def layers(self) -> list[list[int]]:
        """Return the tasks of each layer."""
        return layers_of(len(self.durations), self.edges)

    def scaled(self, factor: float, shortest: float) -> Trace:
        """Return the trace with durations scaled, none below ``shortest`` seconds."""
        return replace(self, durations=[max(seconds * factor, shortest) for seconds in self.durations])


def folder() -> Path:
    """Return where traces are looked for: FORGEPAR_TRACES, else beside the repository."""
    return Path(os.environ.get("FORGEPAR_TRACES", _DEFAULT_FOLDER))


def load(path: Path) -> Trace:
    """Read one file.

    Raises:
        ValueError: a file of another schema, or one whose tasks wait for each other in a circle.
    """
    document = json.loads(path.read_text())
    if document.get("schemaVersion") != "1.5":
        raise ValueError(f"{path} has schemaVersion {document.get('schemaVersion')!r}; this reads WfFormat 1.5.")
    tasks = document["workflow"]["specification"]["tasks"]
    executed = {task["id"]: task for task in document["workflow"]["execution"]["tasks"]}
    numbers = {task["id"]: number for number, task in enumerate(tasks)}
    edges = [(numbers[parent], numbers[task["id"]]) for task in tasks for parent in task["parents"]]
    order = [number for layer in layers_of(len(tasks), edges) for number in layer]
    renumbered = {tasks[old]["id"]: new for new, old in enumerate(order)}
    return Trace(
        path.stem,
        [kind(tasks[old]["name"], executed[tasks[old]["id"]]) for old in order],
        [float(executed[tasks[old]["id"]]["runtimeInSeconds"]) for old in order],
        [[renumbered[parent] for parent in tasks[old]["parents"]] for old in order],
    )


def kind(task_name: str, executed: dict[str, Any]) -> str:
    """Return what a task is one of: the program it ran; where that is a script, its name without its number."""
    program = executed.get("command", {}).get("program", "")
    return program if _ONE_WORD.fullmatch(program) else _NUMBERING.sub("", task_name)
