"""What a task raises reaches the caller as it was: its class, its data, its text, and what it came from."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import urllib.error
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import BACKENDS, PATIENCE, executor_arguments, wait_until

import forgepar as fp
from forgepar.errors import add_note, text_of
from forgepar.values.exception_fields import NotSent, fields_of
from forgepar.values.exceptions import dumps, is_kind

START_METHODS = ["forkserver", "spawn", "fork"]


class TwoArguments(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


class KeywordsOnly(Exception):
    def __init__(self, *, status, reason="none"):
        self.status = status
        self.reason = reason

    def __str__(self):
        return f"{self.status} {self.reason}"


class NoArgumentsPassedOn(Exception):
    def __init__(self, a, b, c):
        self.parts = [a, b, c]


class OwnNew(Exception):
    def __new__(cls, first, second):
        self = super().__new__(cls, first)
        self.second = second
        return self

    def __init__(self, first, second):  # noqa: ARG002
        super().__init__(first)


class Slotted(Exception):
    __slots__ = ("axis", "unset")

    def __init__(self, axis):
        super().__init__("out of bounds")
        self.axis = axis


@dataclasses.dataclass
class OfFields(Exception):
    code: int
    detail: str = "none"


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Reduced(Exception):
    """Pickles by its own means, and needs to: its data is in none of the places where others have it."""

    known: ClassVar[dict[int, str]] = {}

    def __init__(self, text):
        super().__init__()
        self.known[id(self)] = text

    def __str__(self):
        return self.known[id(self)]

    def __reduce__(self):
        return Reduced, (str(self),)


class MissingFile(FileNotFoundError):
    def __init__(self, name):
        super().__init__(2, "no such table", name)
        self.name = name


class Batch(ExceptionGroup):
    def __new__(cls, excs, *, label):
        self = super().__new__(cls, f"batch {label}", excs)
        self.label = label
        return self

    def __init__(self, excs, *, label):
        pass

    def derive(self, excs):
        return Batch(excs, label=self.label)


class Mute(Exception):
    def __str__(self):
        raise KeyboardInterrupt("mute")


class Ending(BaseException):
    def __init__(self, code, why):
        super().__init__(why)
        self.code = code


class Refusing(LookupError):
    def __reduce__(self):
        raise TypeError("not me")


def made_in_a_factory():
    class Made(Exception):
        pass

    return Made


FromFactory = made_in_a_factory()


def fail_with(error):
    raise error


def fail_from_another():
    try:
        raise TwoArguments(404, "gone")
    except TwoArguments as error:
        raise KeyError("page") from error


def fail_while_handling():
    try:
        raise TwoArguments(404, "gone")
    except TwoArguments:
        raise KeywordsOnly(status=500)  # noqa: B904


def fail_from_none():
    try:
        raise ValueError("hidden")
    except ValueError:
        raise KeyError("page") from None


def fail_in_a_circle():
    first, second = TwoArguments(1, "first"), TwoArguments(2, "second")
    first.__cause__, second.__cause__ = second, first
    raise first


def fail_with_itself():
    error = TwoArguments(1, "self")
    error.me = error
    error.others = {"all": [error]}
    raise error


def fail_with_what_it_wraps():
    try:
        raise TwoArguments(1, "inner")
    except TwoArguments as error:
        outer = ValueError("outer", error)
        outer.inner = error
        raise outer from error


def fail_with_notes(notes):
    error = ValueError("noted")
    error.__notes__ = notes
    raise error


def fail_in_groups():
    inner = ExceptionGroup("inner", [TwoArguments(2, "b"), MissingFile("t")])
    inner.add_note("of the inner")
    raise ExceptionGroup("outer", [TwoArguments(1, "a"), inner]) from KeyError("k")


def fail_with_a_cause_in_a_member():
    member = TwoArguments(1, "a")
    member.__cause__ = KeywordsOnly(status=1)
    raise Batch([member], label="x")


def in_script(code):
    exec(code, {})  # noqa: S102


# Each raises an exception that must come back equal.
KINDS = {
    "plain": lambda: fail_with(ValueError("no", 1)),
    "no arguments": lambda: fail_with(RuntimeError()),
    "two arguments": lambda: fail_with(TwoArguments(503, "busy")),
    "keywords only": lambda: fail_with(KeywordsOnly(status=418, reason="teapot")),
    "nothing passed on": lambda: fail_with(NoArgumentsPassedOn(1, [2], {3})),
    "own __new__": lambda: fail_with(OwnNew("one", "two")),
    "slots": lambda: fail_with(Slotted(3)),
    "dataclass": lambda: fail_with(OfFields(7)),
    "frozen dataclass": lambda: fail_with(Frozen(7)),
    "key error": lambda: {}["no such key"],
    "index error": lambda: [][3],
    "zero division": lambda: 1 / 0,
    "stop iteration": lambda: fail_with(StopIteration({"value": 3})),
    "stop async iteration": lambda: fail_with(StopAsyncIteration("done")),
    "attribute error": lambda: object.__getattribute__(3, "nothing"),
    "name error": lambda: no_such_name,  # noqa: F821
    "import error": lambda: __import__("json").no_such_thing,
    "no module": lambda: __import__("no_such_module"),
    "import error of a name": lambda: in_script("from json import no_such_name"),
    "syntax error": lambda: in_script("a b"),
    "indentation error": lambda: in_script("if 1:\nx"),
    "unicode decoding": lambda: b"\xff".decode("utf-8"),
    "unicode encoding": lambda: "\xe4".encode("ascii"),
    "unicode translation": lambda: fail_with(UnicodeTranslateError("abc", 1, 2, "why")),
    "missing file": lambda: Path("/no/such/file").read_text(),
    "os error of two files": lambda: Path("/no/such").rename("/no/such/either"),
    "os error of a text": lambda: fail_with(OSError("text alone")),
    "os error without a file": lambda: fail_with(OSError(13, "denied")),
    "os error with None for a file": lambda: fail_with(OSError(13, "denied", None)),
    "blocking io": lambda: fail_with(BlockingIOError(11, "full", 5)),
    "subclass of an os error": lambda: fail_with(MissingFile("table")),
    "timeout": lambda: fail_with(TimeoutError("late")),
    "url error": lambda: fail_with(urllib.error.URLError("unreachable")),
    "json": lambda: json.loads("{"),
    "process": lambda: subprocess.run([sys.executable, "-c", "exit(3)"], check=True, capture_output=True),
    "process that takes too long": lambda: fail_with(subprocess.TimeoutExpired(["sleep"], 3.0, b"out")),
    "assertion": lambda: fail_with(AssertionError("not so")),
    "recursion": lambda: fail_with(RecursionError("deep")),
    "pickled by its own means": lambda: fail_with(Reduced("kept elsewhere")),
    "of a factory": lambda: fail_with(FromFactory("made")),
    "of forgepar": lambda: fail_with(fp.ToolFailed("text", command=("a",), exit_code=2, stderr="e")),
    "cause": fail_from_another,
    "context": fail_while_handling,
    "suppressed context": fail_from_none,
    "circle of causes": fail_in_a_circle,
    "refers to itself": fail_with_itself,
    "wraps another": fail_with_what_it_wraps,
    "notes": lambda: fail_with_notes(["one", "two"]),
    "group": fail_in_groups,
    "subclass of a group": fail_with_a_cause_in_a_member,
    "group in a chain": lambda: fail_with(ExceptionGroup("g", [ExceptionGroup("h", [Slotted(1), FromFactory(2)])])),
}


def raised_by(fn):
    try:
        fn()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def own_notes(error):
    """The notes that the caller's process did not add."""
    notes = getattr(error, "__notes__", [])
    return [note for note in notes if not str(note).startswith(("task '", "traceback in the worker"))]


def picture(error, seen=None):
    """All that is to be the same of an exception, and of those that it refers to."""
    seen = {} if seen is None else seen
    if id(error) in seen:
        return f"exception {seen[id(error)]}"
    seen[id(error)] = len(seen)

    def look(value):
        if isinstance(value, BaseException):
            return picture(value, seen)
        if isinstance(value, (list, tuple)):
            return type(value), [look(part) for part in value]
        if isinstance(value, dict):
            return {name: look(part) for name, part in value.items()}
        return value

    return {
        "type": type(error),
        "text": text_of(error),
        "args": look(error.args),
        "attributes": look({name: value for name, value in vars(error).items() if name != "__notes__"}),
        "fields": look(fields_of(error)),
        "notes": own_notes(error),
        "members": look(getattr(error, "exceptions", ())),
        "cause": look(error.__cause__),
        "context": look(error.__context__),
        "suppressed": error.__suppress_context__,
    }


def errors_of(tasks, **rules):
    """What each of some tasks fails with, by name."""
    wf = fp.Workflow()
    handles = {name: wf.add(fp.task(fn).options(name=name)) for name, fn in tasks.items()}
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules, fail_fast=False)
    return {name: caught.value.result.errors[handle.name] for name, handle in handles.items()}


def error_of(fn, **rules):
    return errors_of({"one": fn}, **rules)["one"]


@pytest.fixture(scope="module", params=BACKENDS)
def errors(request):
    """What every kind comes back as, for each backend."""
    return errors_of(KINDS, **executor_arguments(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_equal(errors, kind):
    assert picture(errors[kind]) == picture(raised_by(KINDS[kind]))


def test_what_one_exception_refers_to_twice_is_one_object(either_backend):
    error = error_of(fail_with_what_it_wraps, **either_backend)
    assert error.inner is error.__cause__ is error.__context__ is error.args[1]
    itself = error_of(fail_with_itself, **either_backend)
    assert itself.me is itself.others["all"][0] is itself


def test_a_constructor_is_not_called_again(any_backend, tmp_path):
    def fail():
        class Counting(Exception):
            def __init__(self, path):
                super().__init__(path)
                with path.open("a") as file:
                    file.write("x")

        raise Counting(tmp_path / "calls")

    assert error_of(fail, **any_backend).args == (tmp_path / "calls",)
    assert (tmp_path / "calls").read_text() == "x"


# Attributes that cannot travel


class Response:
    def __init__(self):
        self.status = 503
        self.lock = threading.Lock()


class HTTPError(Exception):
    def __init__(self, response):
        super().__init__("request failed")
        self.response = response
        self.url = "http://host"

    def __str__(self):
        return f"{self.response.status} for {self.url}"


class Asking(Exception):
    def __init__(self, ask):
        super().__init__("asked")
        self.ask = ask

    def __str__(self):
        return next(self.ask.gi_frame.f_locals["texts"])


class Heard(Exception):
    def __init__(self):
        super().__init__("heard")
        self.lock = threading.Lock()

    def __init_subclass__(cls, *, code):
        pass

    def __str__(self):
        return f"locked: {self.lock.locked()}"


def texts_of(texts):
    yield from texts


def fail_holding():
    error = ValueError("held")
    error.lock = threading.Lock()
    error.file = sys.stdout
    error.numbers = (i for i in range(3))
    error.nested = {"at": [1, threading.Lock()], "kept": (1, 2)}
    error.code = 5
    raise error


def test_attributes_that_cannot_travel_are_left_out_one_by_one(any_backend):
    error = error_of(fail_holding, **any_backend)
    assert type(error) is ValueError
    assert error.args == ("held",)
    assert error.code == 5
    assert repr(error.lock) == "<not sent: _thread.lock>"
    assert repr(error.numbers) == "<not sent: builtins.generator>"
    assert isinstance(error.file, NotSent)
    assert repr(error.nested) == "{'at': [1, <not sent: _thread.lock>], 'kept': (1, 2)}"
    with pytest.raises(AttributeError, match=r"'acquire' of a _thread\.lock was not sent from the worker"):
        error.lock.acquire()


def test_an_argument_that_cannot_travel_leaves_the_text_as_it_was(either_backend):
    error = error_of(lambda: fail_with(ValueError(threading.Lock())), **either_backend)
    assert type(error) is ValueError
    assert repr(error.args) == "(<not sent: _thread.lock>,)"
    assert "unlocked _thread.lock object" in str(error)


def test_text_made_of_an_attribute_that_cannot_travel_stays(any_backend):
    error = error_of(lambda: fail_with(HTTPError(Response())), **any_backend)
    assert type(error) is HTTPError
    assert str(error) == "503 for http://host"
    assert error.response.status == 503
    assert repr(error.response) == "<not sent: test_exceptions.Response>"


def test_text_that_only_the_worker_can_make_stays(either_backend):
    two = error_of(lambda: fail_with(ValueError("x", threading.Lock())), **either_backend)
    assert isinstance(two, ValueError)
    assert type(two).__qualname__ == "ValueError"
    assert "unlocked _thread.lock object" in str(two)
    again = pickle.loads(dumps(two))
    assert (type(again).__name__, str(again)) == ("ValueError", str(two))
    heard = error_of(lambda: fail_with(Heard()), **either_backend)
    assert type(heard) is Heard
    assert "Its text in the worker: locked: False" in heard.__notes__


@pytest.mark.parametrize("notes", ["text", 5, ("one", "two"), ["one", 5], [threading.Lock], None, ["lock"]])
def test_notes_of_any_kind_break_nothing(notes, either_backend):
    def fail():
        fail_with_notes([threading.Lock()] if notes == ["lock"] else notes)

    error = error_of(fail, **either_backend)
    assert type(error) is ValueError
    said = [str(note) for note in error.__notes__]
    assert any(note.startswith("task 'one'") for note in said)
    given = notes if isinstance(notes, (list, tuple)) else [notes]
    for note in given if notes != ["lock"] else ["<unlocked _thread.lock"]:
        assert any(str(note) in one for one in said)


def test_a_note_is_added_to_any_exception():
    for error in (Frozen(3), Slotted(1), raised_by(lambda: fail_with_notes(("a",)))):
        add_note(error, "b")
        assert error.__notes__[-1] == "b"


def test_an_exception_without_a_text_keeps_its_class(any_backend):
    error = error_of(lambda: fail_with(Mute()), **any_backend)
    assert type(error) is Mute


def test_an_object_without_the_attribute_travels_unless_it_is_large(either_backend):
    class Thing:
        def __init__(self, content):
            self.content = content

    small = error_of(lambda: Thing("x" * 1000).nothing, **either_backend)
    assert small.obj.content == "x" * 1000
    large = error_of(lambda: Thing("x" * 3_000_000).nothing, **either_backend)
    assert (large.name, str(large)) == ("nothing", "'Thing' object has no attribute 'nothing'")
    assert isinstance(large.obj, NotSent)


# Classes of a script, of functions, and of modules that one side has


def test_a_class_of_a_function_is_the_callers_own(any_backend):
    class Local(Exception):
        count = 1

        def __init__(self, code, *, detail):
            super().__init__(detail)
            self.code = code

    def fail():
        Local.count = 999
        raise Local(5, detail="d")

    wf = fp.Workflow()
    wf.add(fail)
    try:
        wf.run(**any_backend)
    except* Local as group:
        (error,) = group.exceptions
        assert (type(error), error.code, str(error)) == (Local, 5, "d")
    if any_backend["backend"] == "process":
        assert Local.count == 1


def test_a_class_that_only_the_worker_made_travels(any_backend):
    def fail():
        class Inner(OSError):
            def __init__(self, code, path):
                super().__init__(2, "inner", path)
                self.code = code

        raise Inner(5, "p")

    error = error_of(fail, **any_backend)
    assert (type(error).__name__, error.code, error.filename) == ("Inner", 5, "p")
    assert isinstance(error, OSError)


def write_module(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "late_errors.py").write_text(textwrap.dedent(text))


def fail_by_module(folder):
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import late_errors

    raise late_errors.Late(1, "x")


@pytest.fixture
def late_folder(tmp_path, monkeypatch):
    write_module(
        tmp_path / "late",
        """
        class Late(LookupError):
            def __init__(self, code, detail):
                super().__init__(detail)
                self.code = code
        """,
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield str(tmp_path / "late")
    sys.modules.pop("late_errors", None)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_module_that_the_caller_has_not_imported_is_imported(start_method, late_folder):
    sys.path.insert(0, late_folder)
    error = error_of(lambda: fail_by_module(late_folder), workers=1, start_method=start_method)
    assert type(error) is sys.modules["late_errors"].Late
    assert error.code == 1


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_module_that_the_caller_cannot_import_leaves_a_remote_error(start_method, late_folder):
    error = error_of(lambda: fail_by_module(late_folder), workers=1, start_method=start_method)
    assert type(error) is fp.RemoteError
    assert (error.type_name, error.text) == ("late_errors.Late", "x")
    assert error.bases == ("late_errors.Late", "builtins.LookupError", "builtins.Exception", "builtins.BaseException")
    assert "ModuleNotFoundError" in str(error)
    assert "raise late_errors.Late" in "".join(error.__notes__)


def test_one_member_that_cannot_travel_is_stood_for_alone(any_backend):
    def fail():
        raise ExceptionGroup("g", [TwoArguments(1, "a"), Refusing("r"), ExceptionGroup("h", [Refusing("s")])])

    error = error_of(fail, **any_backend)
    assert type(error) is ExceptionGroup
    first, second, third = error.exceptions
    assert first.code == 1
    assert (type(second), second.text) == (fp.RemoteError, "r")
    assert (type(third), third.exceptions[0].text) == (ExceptionGroup, "s")


def test_a_cause_that_cannot_travel_is_stood_for_alone(any_backend):
    def fail():
        raise TwoArguments(1, "a") from Refusing("r")

    error = error_of(fail, **any_backend)
    assert error.code == 1
    assert (type(error.__cause__), error.__cause__.text) == (fp.RemoteError, "r")


def test_what_cannot_travel_keeps_its_cause_and_notes(any_backend):
    def fail():
        error = Refusing("r")
        error.add_note("a note of its own")
        raise error from TwoArguments(1, "a")

    error = error_of(fail, **any_backend)
    assert type(error) is fp.RemoteError
    assert error.__cause__.code == 1
    assert "a note of its own" in error.__notes__


# Hostile classes


class Hostile(Exception):
    """Ends whatever unpickles it, unless that is the process that made it."""

    end: type[BaseException] = SystemExit

    def __init__(self):
        super().__init__("hostile")
        self.home = os.getpid()

    def __reduce__(self):
        return _made_at, (type(self), self.home)


class Interrupting(Hostile):
    end = KeyboardInterrupt


def _made_at(kind, home):
    if os.getpid() != home:
        raise kind.end("ended by an exception that was unpickled")
    return kind()


@pytest.mark.parametrize("kind", [Hostile, Interrupting])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_unpickling_raises_ends_no_more_than_the_task(kind, start_method):
    wf = fp.Workflow()
    bad = wf.add(lambda: fail_with(kind()))
    good = wf.add(abs, -1)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, start_method=start_method, fail_fast=False)
    error = caught.value.result.errors[bad.name]
    assert type(error) is fp.RemoteError
    assert error.type_name.endswith(kind.__name__)
    assert caught.value.result[good] == 1
    with fp.ForgeExecutor(1, start_method=start_method) as executor:
        assert type(executor.submit(fail_with_new, kind).exception(PATIENCE)) is fp.RemoteError
        assert executor.submit(abs, -1).result(PATIENCE) == 1


def fail_with_new(kind):
    raise kind()


def test_putting_together_raises_nothing():
    unknown = pickle.loads(dumps(TwoArguments(1, "x")).replace(b"TwoArguments", b"TwoArgumentz"))
    assert type(unknown) is fp.RemoteError


# Deciding by the class


def failing_twice(folder, fail):
    """A task that fails with an exception of its own at its first two attempts."""

    def attempt():
        n_tries = len(list(folder.glob("try*")))
        (folder / f"try{n_tries}").touch()
        if n_tries < 2:
            fail()
        return n_tries

    return attempt


def test_retry_on_sees_an_exception_of_two_arguments(any_backend, tmp_path):
    class Busy(Exception):
        def __init__(self, code, detail):
            super().__init__(f"{code}: {detail}")
            self.code = code

    def fail():
        raise Busy(503, "busy")

    get = failing_twice(tmp_path, fail)
    wf = fp.Workflow()
    handle = wf.add(fp.task(get).options(retries=3, retry_on=Busy))
    assert wf.run(**any_backend)[handle] == 2


def test_retry_on_decides_by_the_class_of_what_cannot_travel(any_backend, tmp_path):
    get = failing_twice(tmp_path, lambda: fail_with(Refusing("r")))
    wf = fp.Workflow()
    handle = wf.add(fp.task(get).options(retries=3, retry_on=LookupError))
    assert wf.run(**any_backend)[handle] == 2
    other = fp.Workflow()
    other.add(fp.task(lambda: fail_with(Refusing("r"))).options(retries=3, retry_on=(ValueError, OSError)))
    with pytest.raises(fp.WorkflowFailed) as caught:
        other.run(**any_backend)
    assert "attempt 1" in "".join(caught.value.exceptions[0].__notes__)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_retry_on_in_an_executor(start_method, tmp_path):
    class Busy(Exception):
        def __init__(self, code, detail):
            super().__init__(f"{code}: {detail}")

    with fp.ForgeExecutor(1, start_method=start_method) as executor:
        for number, (fail, kind) in enumerate(
            [(lambda: fail_with(Busy(1, "b")), Busy), (lambda: fail_with(Refusing("r")), LookupError)]
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            job = fp.task(failing_twice(folder, fail)).options(retries=3, retry_on=kind)
            assert executor.submit(job).result(PATIENCE) == 2


def test_classes_that_each_process_makes_are_compared_by_name():
    one, other = made_in_a_factory(), made_in_a_factory()
    assert is_kind(one("x"), (other,))
    assert not is_kind(one("x"), (TwoArguments, ValueError))
    assert not is_kind(ValueError("x"), (TwoArguments,))
    assert is_kind(KeyboardInterrupt(), (Exception,))
    assert not is_kind(KeyboardInterrupt(), (ValueError,))


def test_what_handles_an_error_gets_it_whole(any_backend):
    def fail():
        raise TwoArguments(1, "a") from KeywordsOnly(status=2)

    def handle(error):
        return type(error), error.code, type(error.__cause__), error.__cause__.status

    wf = fp.Workflow()
    caught = wf.add(fp.attempt(fail, catch=handle))
    group = wf.add(fp.attempt(fail_in_groups, catch=lambda error: error.exceptions[1].exceptions[1].filename))
    result = wf.run(**any_backend)
    assert result[caught] == (TwoArguments, 1, KeywordsOnly, 2)
    assert result[group] == "t"


@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_handles_an_error_may_know_it_where_the_caller_does_not(start_method, late_folder):
    wf = fp.Workflow()
    handled = wf.add(fp.attempt(lambda: fail_by_module(late_folder), catch=lambda error: (repr(error), error.code)))
    assert wf.run(workers=1, start_method=start_method)[handled] == ("Late('x')", 1)


def test_what_handling_raises_comes_from_what_was_handled(any_backend):
    def handle(error):
        raise Frozen(error.code)

    error = error_of(fp.attempt(lambda: fail_with(TwoArguments(7, "a")), catch=handle), **any_backend)
    assert (type(error), error.code) == (Frozen, 7)
    assert error.__context__.code == 7

    def chain(error):
        raise KeywordsOnly(status=1) from error

    error = error_of(fp.attempt(lambda: fail_with(TwoArguments(7, "a")), catch=chain), **any_backend)
    assert (error.status, error.__cause__.code) == (1, 7)


def test_what_undoing_raises_keeps_its_class(any_backend):
    def undo(value):
        raise TwoArguments(value, "undo") from Refusing("r")

    wf = fp.Workflow()
    done = wf.add(fp.task(abs).options(compensate=undo), -4)
    wf.add(fp.task(lambda: fail_with(Mute())).options(after=[done]))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**any_backend)
    error = caught.value.result.rollback.failed[done.name]
    assert (type(error), error.code, type(error.__cause__)) == (TwoArguments, 4, fp.RemoteError)


# What is no Exception


def raise_interrupt():
    raise KeyboardInterrupt("by hand")


def raise_exit_in_a_chain():
    try:
        raise TwoArguments(1, "a")
    except TwoArguments as error:
        raise SystemExit(3) from error


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize(
    "fail",
    [
        raise_interrupt,
        lambda: fail_with(GeneratorExit("g")),
        lambda: fail_with(asyncio.CancelledError("c")),
        lambda: fail_with(Ending(5, "e")),
        lambda: fail_with(BaseExceptionGroup("g", [KeyboardInterrupt("k"), TwoArguments(1, "a")])),
    ],
    ids=["interrupt", "generator", "cancelled", "own", "group"],
)
def test_a_workflow_has_task_exited_for_what_is_no_exception(fail, start_method):
    error = error_of(fail, workers=1, start_method=start_method)
    assert type(error) is fp.TaskExited
    assert not isinstance(error, SystemExit)
    assert error.code == str(raised_by(fail))


def test_task_exited_keeps_the_chain(any_backend):
    error = error_of(raise_exit_in_a_chain, **any_backend)
    assert (type(error), error.code) == (fp.TaskExited, 3)
    assert error.__cause__.code == 1


JOBS = {
    "interrupt": raise_interrupt,
    "generator exit": lambda: fail_with(GeneratorExit("g")),
    "cancelled": lambda: fail_with(asyncio.CancelledError("c")),
    "own": lambda: fail_with(Ending(5, "e")),
    "group": lambda: fail_with(BaseExceptionGroup("g", [KeyboardInterrupt("k"), TwoArguments(1, "a")])),
    "subclass of exit": lambda: fail_with(type("Leaving", (SystemExit,), {})(4)),
    **KINDS,
}


@pytest.fixture(scope="module", params=START_METHODS)
def jobs_errors(request):
    """What each job's future fails with."""
    with fp.ForgeExecutor(1, start_method=request.param) as executor:
        futures = {name: executor.submit(fn) for name, fn in JOBS.items()}
        return {name: future.exception(PATIENCE) for name, future in futures.items()}


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_fails_with_what_it_raised(jobs_errors, kind):
    error, own = picture(jobs_errors[kind]), picture(raised_by(JOBS[kind]))
    remote = jobs_errors[kind].__cause__
    if own["cause"] is None:
        assert type(remote).__name__ == "_RemoteTraceback"
        assert "Traceback (most recent call last)" in str(remote)
        del error["cause"], own["cause"], error["suppressed"], own["suppressed"]
    else:
        assert "Traceback (most recent call last)" in "".join(jobs_errors[kind].__notes__)
    if kind == "subclass of exit":
        assert error.pop("type").__bases__ == own.pop("type").__bases__ == (SystemExit,)
    assert error == own


def test_sys_exit_in_a_job_is_as_in_the_pool_of_the_standard_library():
    with fp.ForgeExecutor(1) as executor:
        error = executor.submit(raise_exit_in_a_chain).exception(PATIENCE)
    assert isinstance(error, SystemExit)
    assert error.code == 3
    assert error.__cause__.code == 1


def test_task_exited_that_a_job_raises_itself_ends_nobody():
    with fp.ForgeExecutor(1) as executor:
        error = executor.submit(fail_with, fp.TaskExited("of a workflow in a job", code=3)).exception(PATIENCE)
    assert type(error) is fp.TaskExited


@pytest.mark.parametrize("start_method", START_METHODS)
def test_an_interrupt_in_a_job_surfaces_as_one(start_method, tmp_path):
    (tmp_path / "script.py").write_text(
        textwrap.dedent(f"""
        import forgepar as fp

        def job():
            raise KeyboardInterrupt

        with fp.ForgeExecutor(1, start_method={start_method!r}) as executor:
            future = executor.submit(job)
            try:
                future.result()
            except SystemExit:
                print("an exit")
            except KeyboardInterrupt:
                print("an interrupt", executor.submit(abs, -1).result())
        """)
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "an interrupt 1\n", done.stderr


def test_callbacks_that_raise_anything_leave_the_executor_well(tmp_path):
    heard = []
    with fp.ForgeExecutor(1) as executor:
        first = executor.submit(wait_until, (tmp_path / "go").exists, "the callbacks to be there")
        for job in (raise_interrupt, sys.exit, lambda: fail_with(Ending(1, "e"))):
            future = executor.submit(job)
            future.add_done_callback(lambda done: done.result())
            future.add_done_callback(heard.append)
        (tmp_path / "go").touch()
        first.result(PATIENCE)
        assert executor.submit(abs, -2).result(PATIENCE) == 2
        assert executor.submit(abs, -3).result(PATIENCE) == 3
    assert len(heard) == 3


def test_jobs_that_take_the_value_of_one_that_was_interrupted_fail_with_it():
    with fp.ForgeExecutor(1) as executor:
        first = executor.submit(raise_interrupt)
        second = executor.submit(abs, first)
        assert isinstance(second.exception(PATIENCE), KeyboardInterrupt)


def test_a_module_that_exits_when_it_is_imported_fails_the_task_alone(tmp_path, monkeypatch):
    (tmp_path / "exits_at_import.py").write_text(
        "import os\nif os.environ['HOME_PID'] != str(os.getpid()): exit(3)\ndef fn(): return 1\n"
    )
    monkeypatch.setenv("HOME_PID", str(os.getpid()))
    monkeypatch.syspath_prepend(tmp_path)
    import exits_at_import

    with fp.WorkflowExecutor(1, start_method="spawn") as executor:
        wf = fp.Workflow()
        bad = wf.add(exits_at_import.fn)
        good = wf.add(abs, -1)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf, fail_fast=False)
        assert type(caught.value.result.errors[bad.name]) is fp.TaskExited
        assert caught.value.result[good] == 1


# Other ways to the workers


def test_joblib_raises_what_a_call_raised():
    joblib = pytest.importorskip("joblib")
    import forgepar.joblib

    try:
        with joblib.parallel_config(backend="forgepar", n_jobs=2):
            for kind in ("two arguments", "keywords only", "cause", "group", "interrupt", "own"):
                error = raised_by(lambda kind=kind: joblib.Parallel()(joblib.delayed(JOBS[kind])() for _ in range(2)))
                own = raised_by(JOBS[kind])
                assert (type(error), error.args, str(error)) == (type(own), own.args, str(own)) or kind == "group"
                assert type(error) is type(own)
    finally:
        forgepar.joblib.close()


def test_dask_get_raises_what_a_node_raised():
    pytest.importorskip("dask")
    from daskcluster import restore_exceptions

    restore_exceptions()
    with fp.WorkflowExecutor(1) as executor:
        for kind in ("two arguments", "keywords only", "cause", "slots", "json"):
            error = raised_by(lambda kind=kind: fp.dask_get({"x": (KINDS[kind],)}, "x", pool=executor))
            own = raised_by(KINDS[kind])
            assert (type(error), error.args, str(error)) == (type(own), own.args, str(own))
            assert any("key of the Dask graph: 'x'" in note for note in error.__notes__)


@pytest.mark.parametrize("pool", [concurrent.futures.ThreadPoolExecutor, concurrent.futures.ProcessPoolExecutor])
def test_others_workers_send_the_same(pool):
    with pool(1) as workers:
        errors = errors_of(KINDS, backend=fp.FuturesBackend(workers, workers=1))
    for kind, error in errors.items():
        assert picture(error) == picture(raised_by(KINDS[kind])), kind
