"""What the README and the docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_exports import names_for_type_checkers
from test_imports import MODULES

import forgepar as fp
from forgepar.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HOMES = names_for_type_checkers()
SECURITY = (ROOT / ".github" / "SECURITY.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_readmes_program_prints_what_the_readme_says(tmp_path):
    path = tmp_path / "diamond.py"
    path.write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (blocks("text")[0], "")


@pytest.mark.parametrize("text", [README, SECURITY], ids=["README", "SECURITY"])
def test_the_tests_that_are_named_exist(text):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    found = {path.name: path for path in Path(__file__).parent.rglob("test_*.py")}
    assert named
    for file, test in named:
        assert f"def {test}(" in found[file].read_text()


def test_each_of_the_two_commands_is_on_one_line():
    census, tests, cluster = [block for block in blocks("sh") if "venv" in block]
    assert census.count("\n") == tests.count("\n") == cluster.count("\n") == 1
    assert "forgepar run forgepar.examples.census" in census
    assert "pytest" in tests
    assert "forgepar run forgepar.examples.census --dask local" in cluster


def test_arguments_that_the_readme_names_exist():
    for name in ("outputs", "fail_fast", "schedule"):
        assert f"{name}=" in README
        assert name in inspect.signature(fp.WorkflowExecutor.run).parameters
    options = set(fp.Options.__dataclass_fields__)
    assert {"retries", "name", "after"} <= options


def test_the_security_page_names_what_exists_and_is_one_page():
    commands = cli._parser()._subparsers._group_actions[0].choices
    told = re.search(r"`forgepar runs`, (.*?) without a", SECURITY, flags=re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", told)) < set(commands)
    assert hasattr(fp, "StoreUntrusted")
    assert len(SECURITY.split()) < 800


def test_command_lines_that_the_readme_shows_parse():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("forgepar ")]
    assert lines
    for line in lines:
        assert cli._parser().parse_args(shlex.split(line, comments=True)[1:]).command


class Finder(doctest.DocTestFinder):
    """Finds the examples of a module, also those of public names, which say that `forgepar` is their module."""

    def _from_module(self, module, value):
        if getattr(value, "__module__", None) == "forgepar":
            return HOMES.get(value.__name__) == module.__name__
        return super()._from_module(module, value)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__main__"}))
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"forgepar.{name}".removesuffix(".__init__"))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in Finder().find(module, module.__name__):
        runner.run(example)
    assert runner.failures == 0


def test_examples_of_public_names_are_run():
    found = [test.name for test in Finder().find(importlib.import_module(HOMES["Workflow"])) if test.examples]
    assert {f"{HOMES['Workflow']}.Workflow{method}" for method in ("", ".add", ".map")} <= set(found)
