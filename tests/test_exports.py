"""The public names are those in `forgepar/__init__.pyi`: they exist, are documented, and type checkers see the same."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import forgepar

STUB = Path(forgepar.__file__).with_suffix(".pyi")


def names_for_type_checkers() -> dict[str, str]:
    """Each name that the stub exports, with its module."""
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    found = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert len(found) == sum(len(node.names) for node in imports), "a name is there twice, or is not exported"
    return found


@pytest.mark.parametrize("name", forgepar.__all__)
def test_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(forgepar, name))


@pytest.mark.parametrize("name", forgepar.__all__)
def test_public_name_says_where_users_find_it(name):
    named = getattr(forgepar, name)
    assert (named.__module__, named.__qualname__) == ("forgepar", name)
    assert pickle.loads(pickle.dumps(named)) is named


@pytest.mark.parametrize(("name", "module"), sorted(names_for_type_checkers().items()))
def test_type_checkers_see_what_runs(name, module):
    assert getattr(importlib.import_module(module), name) is getattr(forgepar, name)


def test_type_checkers_see_all_and_only_public_names():
    assert sorted(names_for_type_checkers()) == forgepar.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = forgepar.no_such_thing


def test_a_star_import_takes_the_public_names():
    taken = {}
    exec("from forgepar import *", taken)  # noqa: S102  (a star import is for module level alone)
    assert taken.keys() - {"__builtins__"} == set(forgepar.__all__)


def test_dir_lists_the_public_names():
    assert set(forgepar.__all__) <= set(dir(forgepar))


def test_public_face_type_checks_as_users_write_it(tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the extra dev")
    (tmp_path / "user.py").write_text(
        "import forgepar as fp\n"
        "@fp.task(retries=2)\n"
        "def load(path: str) -> int:\n"
        "    return len(path)\n"
        "n: int = load('x')\n"
        "wf = fp.Workflow('w')\n"
        "handles = wf.map(load, ['a', 'b'])\n"
        "first: fp.TaskHandle = handles[0]\n"
        "with fp.WorkflowExecutor(workers=2) as executor:\n"
        "    result: fp.RunResult = executor.run(wf, outputs=[first])\n"
        "seconds: float = result.records[0].duration\n"
        "load(3)  # an error\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith("user.py:12:")
