"""A workflow of 200 tasks whose program is edited between runs: what changed runs again, and what follows it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from conftest import PATIENCE

HELPERS = """
def scale(x):
    return factor() * x


def factor():
    return 2


def unused():
    return 0
"""

PROGRAM = """
import json
import sys

import forgepar as fp
import helpers


def first(i):
    # A comment.
    value = helpers.scale(i)
    return value


def second(x):
    return x + 1


def third(x, y):
    return x * y


def beside(i):
    return -i


def last(values):
    return sum(values)


wf = fp.Workflow("edited")
firsts = wf.map(first, range(50))
seconds = wf.map(second, firsts)
thirds = wf.map(third, seconds, firsts)
others = wf.map(beside, range(48))
wf.add(last, thirds)
wf.add(last, others)
assert len(wf) == 200
result = wf.run(backend="inline", store="runs.db", resume=True)
print(json.dumps([record.name.partition("-")[0] for record in result.records if record.status == "completed"]))
"""


class Project:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = {"program": textwrap.dedent(PROGRAM), "helpers": textwrap.dedent(HELPERS)}

    def run(self) -> dict[str, int]:
        """Write the files and run the program; tell how many tasks ran, by what they call."""
        for name, text in self.texts.items():
            (self.folder / f"{name}.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-B", "program.py"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return dict(Counter(json.loads(done.stdout)))

    def edit(self, name: str, old: str, new: str) -> None:
        assert self.texts[name].count(old) == 1
        self.texts[name] = self.texts[name].replace(old, new)


@pytest.fixture(scope="module")
def done_once(tmp_path_factory):
    """The folder of a project that was run."""
    folder = tmp_path_factory.mktemp("project")
    assert Project(folder).run() == {"first": 50, "second": 50, "third": 50, "beside": 48, "last": 2}
    return folder


@pytest.fixture
def project(done_once, tmp_path):
    """A project as it was left by its first run."""
    source, target = done_once / "runs.db", tmp_path / "runs.db"
    target.touch(mode=0o600)
    target.write_bytes(source.read_bytes())
    (tmp_path / "runs.db.files").mkdir(mode=0o700)
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("program", "    # A comment.\n", "    # Another comment,\n    # which is longer.\n"),
        (
            "program",
            "    value = helpers.scale(i)\n    return value",
            "    renamed = helpers.scale(i)\n    return renamed",
        ),
        ("program", "def second(x):", 'def second(x: int) -> "int":\n    """Add one."""'),
        ("program", "import helpers\n", "import helpers\n\n\nclass Other:\n    pass\n"),
        ("helpers", "    return 0", "    return 1"),
        ("program", "wf = fp.Workflow", "print_nothing = None\nwf = fp.Workflow"),
    ],
)
def test_what_changes_nothing_runs_nothing(project, name, old, new):
    project.edit(name, old, new)
    assert project.run() == {}


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("program", "x + 1", "x + 2", {"second": 50, "third": 50, "last": 1}),
        ("program", "x * y", "x - y", {"third": 50, "last": 1}),
        ("program", "-i", "-i - 1", {"beside": 48, "last": 1}),
        ("helpers", "return 2", "return 3", {"first": 50, "second": 50, "third": 50, "last": 1}),
        ("helpers", "factor() * x", "x * factor()", {"first": 50, "second": 50, "third": 50, "last": 1}),
        ("program", "range(48))", "[*range(47), 470])", {"beside": 1, "last": 1}),
        ("program", "wf.map(beside,", "wf.map(fp.task(beside).options(version=2),", {"beside": 48, "last": 1}),
    ],
)
def test_what_changes_runs_and_what_follows_it(project, name, old, new, expected):
    project.edit(name, old, new)
    assert project.run() == expected
    assert project.run() == {}
