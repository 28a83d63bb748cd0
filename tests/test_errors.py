"""The tree of exceptions is as its module draws it, and every one of them travels."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re

import cloudpickle
import pytest

from forgepar import errors
from forgepar.errors import (
    ArenaFull,
    CodeMismatch,
    CyclicWorkflow,
    DuplicateTaskName,
    EmptyWorkflow,
    ForeignHandle,
    ForgeparError,
    InsufficientMemory,
    MissingResult,
    NotInTask,
    RemoteError,
    ResultReleased,
    RunTimeout,
    StoreBusy,
    StoreError,
    StoreUntrusted,
    StoreWarning,
    TaskError,
    TaskExited,
    TaskMemoryExceeded,
    TaskTimeout,
    ToolFailed,
    ToolNotFound,
    UnknownTask,
    UnpicklableArgument,
    UnpicklableCallable,
    UnpicklableResult,
    WorkerDied,
    WorkerStartFailed,
    WorkflowError,
    WorkflowFailed,
    WorkingFolderGone,
    WrongProcess,
)

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == "forgepar"
}
SAMPLES = [
    ArenaFull("text"),
    ForgeparError("text"),
    WorkflowError("text"),
    EmptyWorkflow("text"),
    CyclicWorkflow("text", cycle=["a", "b"]),
    DuplicateTaskName("text", name="a"),
    ForeignHandle("text"),
    UnknownTask("text"),
    UnpicklableCallable("text", task="a"),
    UnpicklableArgument("text", task="a", position="args[1]"),
    TaskError("text"),
    UnpicklableResult("text"),
    RemoteError("text", type_name="m.E", text="why"),
    TaskExited("text", code=3),
    TaskTimeout("text", seconds=1.5),
    CodeMismatch("text", module="m", name="n"),
    TaskMemoryExceeded("text", used=3, limit=2),
    ToolFailed("text", command=("false", "a b"), exit_code=1, stderr="why"),
    ToolNotFound("text", program="a", searched="/bin"),
    InsufficientMemory("text", task="a", needed=3, available=2),
    NotInTask("text"),
    RunTimeout("text", seconds=1.5, running=["a", "b"], stacks={"a": "line"}),
    WorkerDied("text", exit_code=-9, pid=7),
    WorkerStartFailed("text"),
    WorkingFolderGone("text", folder="/gone"),
    StoreError("text", path="runs.db"),
    StoreBusy("text", path="runs.db"),
    StoreUntrusted("text", path="runs.db"),
    StoreWarning("text"),
    ResultReleased("text"),
    MissingResult("text"),
    WrongProcess("text", owner=7),
]


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Each name in the docstring's drawing, with what it hangs from and the builtin beside it."""
    found: dict[str, tuple[str | None, str | None]] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?(?:  .*| a run .*)?", line)
        if match:
            depth = len(match[1]) // 4
            above[depth] = match[2]
            found[match[2]] = (above.get(depth - 1) if depth else None, match[3])
    return found


def data_of(error: BaseException) -> dict[str, object]:
    return {name: value for name, value in vars(error).items() if name != "__notes__"}


def test_the_drawing_names_every_class_and_no_other():
    assert set(drawn_tree()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_parents_are_as_drawn(name):
    above, builtin = drawn_tree()[name]
    kind = CLASSES[name]
    bases = {base.__name__ for base in kind.__bases__}
    assert bases == ({builtin or "Exception"} if above is None else {above, builtin} - {None})
    assert builtin is None or issubclass(kind, getattr(builtins, builtin))


def test_there_is_a_sample_of_every_class():
    assert {type(error).__name__ for error in SAMPLES} | {"WorkflowFailed"} == set(CLASSES)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_message_data_and_notes_survive_pickling(error, pickler):
    error = copy.copy(error)
    error.__notes__ = ["a note"]  # a list of its own: where tblib is loaded, copies of an error share their notes
    loaded = pickle.loads(pickler.dumps(error))
    assert type(loaded) is type(error)
    assert str(loaded) == "text"
    assert vars(loaded) == vars(error)
    assert loaded.__notes__ == ["a note"]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_data_has_defaults(error):
    bare = type(error)("text")
    assert set(data_of(bare)) == set(data_of(error))
    assert str(bare) == "text"


@pytest.mark.parametrize("kind", [kind for kind in CLASSES.values() if issubclass(kind, KeyError)])
def test_key_errors_say_their_message_without_quotes(kind):
    assert str(kind("no task 'a'.")) == "no task 'a'."


def failed() -> WorkflowFailed:
    failure = WorkflowFailed("two failed", [KeyError("a"), ValueError("b"), CyclicWorkflow("c", cycle=["d"])])
    failure.result = ["what was done"]
    return failure


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_workflow_failed_survives_pickling(pickler):
    loaded = pickle.loads(pickler.dumps(failed()))
    assert type(loaded) is WorkflowFailed
    assert str(loaded) == str(failed())
    assert [repr(error) for error in loaded.exceptions] == [repr(error) for error in failed().exceptions]
    assert loaded.exceptions[2].cycle == ["d"]
    assert loaded.result == ["what was done"]


def test_parts_of_workflow_failed_keep_the_result():
    failure = failed()
    matching, rest = failure.split(KeyError)
    parts = [matching, rest, failure.subgroup(ValueError), failure.derive([OSError()])]
    assert [type(part) for part in parts] == [WorkflowFailed] * 4
    assert all(part.result is failure.result for part in parts)
    assert [len(part.exceptions) for part in parts] == [1, 2, 2, 1]


def test_except_star_sees_the_result():
    seen = []
    try:
        raise failed()
    except* ValueError as group:
        seen.append(group.result)
    except* KeyError as group:
        seen.append(group.result)
    assert seen == [["what was done"]] * 2


def test_a_part_of_a_failure_without_a_result_has_none():
    part = WorkflowFailed("text", [KeyError("a")]).derive([KeyError("a")])
    assert part.result is None
