"""Each example prints what its docstring says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import forgepar
from forgepar.cli import main as cli

RUNS = {
    "chain": [()],
    "side_by_side": [()],
    "tree": [()],
    "composed": [()],
    "branch": [(), ("-p", "number=97")],
    "caught": [()],
    "fan_out": [()],
    "recursive": [()],
}
APART = {"census", "undone", "words"}  # tested by themselves: here, in test_census.py and test_wording.py


def promised(name: str) -> list[str]:
    """The lines of output in an example's docstring: what is indented at its end."""
    doc = importlib.import_module(f"forgepar.examples.{name}").__doc__
    return [line.strip() for line in doc.rsplit("::", 1)[1].strip().splitlines()]


def test_every_example_is_run():
    found = {path.stem for path in (Path(forgepar.__file__).parent / "examples").glob("[a-z]*.py")}
    assert found == set(RUNS) | APART


@pytest.mark.parametrize(
    "how", [("--backend", "inline"), ("--workers", "2"), ("--schedule", "eager", "--workers", "2")]
)
@pytest.mark.parametrize("name", RUNS)
def test_an_example_prints_what_it_says(capsys, name, how):
    printed = []
    for arguments in RUNS[name]:
        assert cli.main(["run", f"forgepar.examples.{name}", *arguments, *how]) == 0
        printed += capsys.readouterr().out.splitlines()
    assert printed == promised(name)


def test_what_is_undone_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "forgepar.examples.undone"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == promised("undone")
    assert done.stderr == ""
