"""A registry knows where its tools are, says which are not, and puts them in the place of their names."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import cloudpickle
import pytest

import forgepar as fp


@pytest.fixture
def script(tmp_path) -> Path:
    """A program that prints its arguments and a variable."""
    path = tmp_path / "own folder" / "script"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nprintf "%s|" "$LEVEL" "$@"\n')
    path.chmod(0o700)
    return path


@pytest.fixture
def tools(script) -> fp.ToolRegistry:
    tools = fp.ToolRegistry()
    tools.add("show", script, arguments=["-quiet", "a b"], env={"LEVEL": "1"})
    tools.add("cat")
    return tools


def test_a_tool_is_known_with_where_it_is(tools, script):
    found = tools.find("show")
    assert (found.name, found.path, found.arguments) == ("show", str(script), ("-quiet", "a b"))
    assert os.access(tools.find("cat").path, os.X_OK)
    assert tools.find("cat").searched == os.pathsep.join(os.get_exec_path())
    assert tools.missing() == []
    tools.check()


def test_a_tool_may_have_another_programs_name():
    assert fp.ToolRegistry().add("list", "ls").path.endswith("/ls")


def test_a_path_stays_the_same_file_in_other_folders(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    tools = fp.ToolRegistry()
    tools.add("show", "./script")
    monkeypatch.chdir("/")
    assert tools.find("show").path == str(script)


def test_all_that_is_missing_is_named_at_once(tools, tmp_path):
    tools.add("gone", tmp_path / "gone")
    tools.add("never", "no-such-program")
    assert tools.missing() == ["gone", "never"]
    assert tools.find("gone").path is None
    with pytest.raises(fp.ToolNotFound) as caught:
        tools.check()
    message = str(caught.value)
    assert "2 of 4 tools are missing" in message
    assert f"'gone': no program '{tmp_path}/gone' in {tmp_path}/gone" in message
    assert f"'never': no program 'no-such-program' in {os.environ['PATH']}" in message
    assert caught.value.program == f"{tmp_path}/gone, no-such-program"
    with pytest.raises(fp.ToolNotFound):
        tools.shell("gone")()


def test_a_tool_found_later_is_found(tools, tmp_path, script):
    later = tmp_path / "later"
    assert tools.add("later", later).path is None
    script.rename(later)
    assert tools.find("later").path == str(later)


def test_its_arguments_go_in_front_and_its_variables_beside(any_backend, tools, script):
    wf = fp.Workflow()
    value = wf.add(str, "c d")
    one = wf.add(tools.shell("show {x} end", x=value))
    two = wf.add(tools.shell("show {x}", env={"LEVEL": 2}), "e")
    result = wf.run(**any_backend, outputs="all")
    assert result[one].stdout == "1|-quiet|a b|c d|end|"
    assert result[two].stdout == "2|-quiet|a b|e|"
    assert result[one].command == (str(script), "-quiet", "a b", "c d", "end")
    assert [one.name, two.name] == ["show", "show-1"]


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_task_may_hold_one(tools, pickler):
    loaded = pickle.loads(pickler.dumps(tools))
    assert loaded.find("show") == tools.find("show")
    wf = fp.Workflow()
    handle = wf.add(lambda word: tools.shell("show {x}", x=word)().stdout, "in")
    assert wf.run(workers=1)[handle] == "1|-quiet|a b|in|"


def test_names_that_it_does_not_have_are_refused(tools):
    with pytest.raises(fp.WorkflowError, match="has no tool 'convert'; it has 'show', 'cat'"):
        tools.find("convert")
    with pytest.raises(fp.WorkflowError, match="has no tool 'convert', which is the first word of the command"):
        tools.shell("convert {src}", src="a")
    with pytest.raises(fp.WorkflowError, match="already has a tool 'cat'"):
        tools.add("cat")
    with pytest.raises(fp.WorkflowError, match="has no tool 'x'; it has none"):
        fp.ToolRegistry().find("x")


@pytest.mark.parametrize("line", ["{tool} a", "a{tool} a"])
def test_a_line_begins_with_a_tool(tools, line):
    with pytest.raises(fp.WorkflowError, match=r"must begin with a tool, not a field: 'show', 'cat'"):
        tools.shell(line, tool="cat")


def test_a_shell_knows_no_tools(tools):
    with pytest.raises(fp.WorkflowError, match="through_shell= must be left out for tools"):
        tools.shell("show | cat", through_shell=True)


def test_it_shows_its_names(tools):
    assert repr(tools) == "<ToolRegistry of 'show', 'cat'>"
