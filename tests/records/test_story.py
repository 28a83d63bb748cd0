"""What `RunResult.story` tells of a task."""

from __future__ import annotations

import re

import pytest

import forgepar as fp


def fail(value):
    raise ValueError(f"no\x1b[31m {value}")


@pytest.fixture
def result():
    wf = fp.Workflow()
    first = wf.add(abs, -3)
    failing = wf.add(fp.task(fail).options(name="failing", retries=1), first)
    wf.add(fp.task(abs).options(name="last"), failing)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline", fail_fast=False)
    return caught.value.result


def events_in(story):
    return re.findall(r"^ +\d+\.\d{4} s  (\w+)", story, flags=re.MULTILINE)


def test_each_attempt_is_told_between_the_ends_of_its_layer(result):
    story = result.story("failing")
    assert story.splitlines()[0] == "task 'failing', layer 1, failed, after 'abs'"
    assert events_in(story) == [
        "WorkflowTaskParallelStarted",
        "WorkflowTaskStarted",
        "WorkflowTaskRetried",
        "WorkflowTaskStarted",
        "WorkflowTaskFailed",
        "WorkflowTaskParallelCompleted",
    ]
    assert "attempt=2 error=" in story
    assert "\x1b" not in story  # a terminal would obey it


def test_a_skipped_task_names_what_it_waited_for(result):
    story = result.story("last")
    assert story.splitlines()[0] == "task 'last', layer 2, skipped, after 'failing'"
    assert "WorkflowTaskSkipped waited_for='failing'" in story


def test_a_wrong_name_is_refused(result):
    with pytest.raises(fp.UnknownTask, match="nobody"):
        result.story("nobody")
