"""What a command line names becomes a workflow, and what it gives becomes arguments."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from forgepar.cli.targets import TargetError, load_workflow
from forgepar.workflow.workflow import Workflow

_numbers = itertools.count()

SOURCE = '''
from __future__ import annotations
from pathlib import Path
from typing import Any, Optional, Union
from forgepar import Workflow

GIVEN = {}
workflow = Workflow("default")
nightly = Workflow("nightly")
number = 3

class Flows:
    inner = Workflow("inner")

def make(
    n: int = 1, ratio: float = 0.5, name: str = "", path: Path = Path(), flag: bool = False, items: list[int] = (),
    maybe: Optional[int] = None, either: int | str = 0, old: Union[float, None] = None, whatever: Any = None, bare=None,
    unresolved: Missing = None,
):
    """Keep what was given."""
    GIVEN.update(locals())
    return Workflow("made")

def hinted(n: int = 1, maybe: Optional[int] = None, either: int | str = 0, old: Union[float, None] = None,
    ratio: float = 0.5, name: str = "", path: Path = Path(), flag: bool = False, items: list[int] = (),
    whatever: Any = None, bare=None, table: dict = {}):
    GIVEN.update(locals())
    return Workflow("hinted")

def needs(first: int, second, *, third: str, fourth=4):
    return Workflow("needs")

def takes_all(n: int = 1, **rest):
    GIVEN.update(n=n, **rest)
    return Workflow("all")

def takes_none():
    return Workflow("none")

def returns_number():
    return 3

def fails():
    raise LookupError("from inside")
'''


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch, tmp_path):
    """What a test imports is gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def stem() -> str:
    """The name of a module that no other test has."""
    return f"flow_of_test_{next(_numbers)}"


@pytest.fixture
def file(tmp_path, stem) -> Path:
    path = tmp_path / f"{stem}.py"
    path.write_text(SOURCE)
    return path


def given(file: Path, attribute: str, **parameters: str) -> dict[str, Any]:
    """What a function of the file got for these texts."""
    load_workflow(f"{file}:{attribute}", parameters)
    return sys.modules[file.stem].GIVEN


# Places


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("", "default"),
        (":workflow", "default"),
        (":nightly", "nightly"),
        (":Flows.inner", "inner"),
        (":takes_none", "none"),
    ],
)
@pytest.mark.parametrize("as_module", [True, False])
def test_a_target_is_a_module_or_a_file_and_an_attribute(file, attribute, name, as_module):
    workflow = load_workflow(f"{file.stem if as_module else file}{attribute}", {})
    assert type(workflow) is Workflow
    assert workflow.name == name


def test_a_module_in_a_package_is_found_by_its_full_name(tmp_path, stem):
    (tmp_path / stem).mkdir()
    (tmp_path / stem / "__init__.py").touch()
    (tmp_path / stem / "flows.py").write_text(SOURCE)
    assert load_workflow(f"{stem}.flows:nightly", {}).name == "nightly"


def test_a_relative_file_is_found_from_the_current_folder(file):
    assert load_workflow(f"{file.name}:nightly", {}).name == "nightly"


def test_a_file_in_another_folder_may_import_its_neighbours(tmp_path, stem):
    folder = tmp_path / "flows"
    folder.mkdir()
    (folder / f"{stem}_helper.py").write_text("NAME = 'helped'")
    (folder / f"{stem}.py").write_text(
        f"from {stem}_helper import NAME\nfrom forgepar import Workflow\nworkflow = Workflow(NAME)"
    )
    assert load_workflow(f"flows/{stem}.py", {}).name == "helped"
    assert str(folder) in sys.path


def test_a_path_is_added_once(file):
    load_workflow(str(file), {})
    load_workflow(str(file), {})
    assert sys.path.count(str(file.parent)) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:flow", r"there is no file .*nowhere\.py.*Give path/to/file\.py:attr"),
        ("nowhere_at_all:flow", "there is no module 'nowhere_at_all'.*Give package.module:attr"),
        ("nowhere_at_all.inside:flow", "there is no module 'nowhere_at_all.inside'"),
        ("json.nowhere:flow", "there is no module 'json.nowhere'"),
        ("", "must be package.module:attr"),
        (":flow", "must be package.module:attr"),
        (".relative:flow", "must be package.module:attr"),
    ],
)
def test_what_is_not_there_is_told(target, message):
    with pytest.raises(TargetError, match=message):
        load_workflow(target, {})


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("nigthly", r"has no attribute 'nigthly'. Did you mean 'nightly'\?"),
        ("takes_non", r"Did you mean 'takes_none'\?"),
        ("zzz", "It has the workflows workflow, nightly."),
        ("Flows.zzz", "has no attribute 'Flows.zzz'"),
        ("number", r"must be a Workflow or a function that returns one, got int\."),
        ("returns_number", r"returns_number\(\) returned a int, not a Workflow"),
    ],
)
def test_what_is_no_workflow_is_told(file, attribute, message):
    with pytest.raises(TargetError, match=message):
        load_workflow(f"{file}:{attribute}", {})


def test_a_module_without_any_workflow_says_how_to_name_one(tmp_path, stem):
    (tmp_path / f"{stem}.py").write_text("")
    with pytest.raises(TargetError, match=r"has no attribute 'workflow'\. Add its name after a colon"):
        load_workflow(stem, {})


def test_a_file_with_the_name_of_a_loaded_module_is_told(tmp_path):
    (tmp_path / "json.py").write_text(SOURCE)
    with pytest.raises(TargetError, match=r"json\.py has the name of another module, .*Rename the file"):
        load_workflow("json.py", {})


def test_a_file_name_with_dots_is_told(tmp_path, stem):
    (tmp_path / f"{stem}.v2.py").write_text(SOURCE)
    with pytest.raises(TargetError, match="Rename the file"):
        load_workflow(f"{stem}.v2.py", {})


def test_a_module_that_another_one_misses_is_not_said_to_be_the_target(tmp_path, stem):
    (tmp_path / f"{stem}.py").write_text("import nowhere_at_all")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        load_workflow(stem, {})


def test_what_a_function_raises_comes_through(file):
    with pytest.raises(LookupError, match="from inside"):
        load_workflow(f"{file}:fails", {})


# Parameters


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "3", 3),
        ("n", "-3", -3),
        ("ratio", "3", 3.0),
        ("ratio", "1e-3", 0.001),
        ("name", "3", "3"),
        ("name", "", ""),
        ("path", "a/b", Path("a/b")),
        ("flag", "yes", True),
        ("flag", "True", True),
        ("flag", "1", True),
        ("flag", "off", False),
        ("flag", "FALSE", False),
        ("flag", "0", False),
        ("items", "[1, 2]", [1, 2]),
        ("table", "{'a': 1}", {"a": 1}),
        ("maybe", "3", 3),
        ("either", "3", 3),
        ("either", "three", "three"),
        ("old", "2", 2.0),
        ("whatever", "[1]", [1]),
        ("whatever", "text", "text"),
        ("bare", "3", 3),
        ("bare", "None", None),
        ("bare", "'3'", "3"),
        ("bare", "two words", "two words"),
    ],
)
def test_a_text_becomes_what_the_parameter_declares(file, name, text, value):
    got = given(file, "hinted", **{name: text})[name]
    assert got == value
    assert type(got) is type(value)


def test_what_is_not_given_has_its_default(file):
    got = given(file, "hinted", n="2")
    assert (got["n"], got["ratio"], got["name"], got["maybe"], got["bare"]) == (2, 0.5, "", None, None)


def test_annotations_that_cannot_be_resolved_do_not_hinder(file):
    got = given(file, "make", unresolved="[1]", n="3")
    assert (got["unresolved"], got["n"]) == ([1], 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n", "three", r"-p n must be int, got three\."),
        ("n", "3.5", r"-p n must be int, got 3\.5\."),
        ("ratio", "half", r"-p ratio must be float, got half\."),
        ("flag", "maybe", r"-p flag must be bool, got maybe\."),
        ("maybe", "three", r"-p maybe must be int, got three\."),
        ("items", "[1", r"-p items must be list, got \[1\."),
        ("items", "name", r"-p items must be list, got name\."),
        ("nn", "3", r"has no parameter 'nn'\. Its parameters: n, maybe, either"),
    ],
)
def test_a_text_that_does_not_fit_is_told(file, name, text, message):
    with pytest.raises(TargetError, match=message):
        given(file, "hinted", **{name: text})


def test_parameters_without_a_default_must_be_given(file):
    with pytest.raises(TargetError, match=r"needs second, third\. Give -p second=\.\.\. -p third="):
        load_workflow(f"{file}:needs", {"first": "1"})
    assert load_workflow(f"{file}:needs", {"first": "1", "second": "2", "third": "3"}).name == "needs"


def test_a_function_that_takes_none_says_so(file):
    with pytest.raises(TargetError, match=r"has no parameter 'n'\. Its parameters: none"):
        load_workflow(f"{file}:takes_none", {"n": "1"})


def test_a_function_may_take_any_parameters(file):
    assert given(file, "takes_all", n="2", more="[3]", text="abc") == {"n": 2, "more": [3], "text": "abc"}


def test_a_workflow_takes_no_parameters(file):
    with pytest.raises(TargetError, match="is a Workflow, not a function: it takes no -p n="):
        load_workflow(f"{file}:nightly", {"n": "3"})
