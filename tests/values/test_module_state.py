"""Workers have the code and the globals of the user's modules that the caller has, however these came to be."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import sys
import textwrap
import time
import types
import unittest.mock
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import forgepar as fp
from forgepar.values.module_state import ModuleState

METHODS = ["forkserver", "spawn", "fork"]
_names = itertools.count()


class Project:
    """A package of the user's in a folder of its own, on ``sys.path``."""

    def __init__(self, folder, monkeypatch):
        self.name = f"project_{os.getpid()}_{next(_names)}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.write("__init__", "")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(self, module, text):
        path = self.folder / f"{module}.py"
        path.write_text(textwrap.dedent(text).replace("PROJECT", self.name))
        stamp = time.time() + next(_names) + 5
        os.utime(path, (stamp, stamp))
        return path

    def load(self, module):
        importlib.invalidate_caches()
        return importlib.import_module(f"{self.name}.{module}")


@pytest.fixture
def project(tmp_path, monkeypatch):
    made = Project(tmp_path, monkeypatch)
    yield made
    for name in [name for name in sys.modules if name.startswith(made.name)]:
        del sys.modules[name]


SETTINGS = """
    import enum
    import numpy as np
    SCALE = 1
    OPTIONS = {'scale': 1}
    class Config:
        scale = 1
        def factor(self): return self.scale
    config = Config()
    NESTED = {"a": {"b": {}}}
    ARRAY = np.arange(3)
    class Colour(enum.Enum):
        RED = 1
    class Level(enum.IntEnum):
        HIGH = 2
    class Flag(enum.Flag):
        A = 1
        B = 2
"""


def global_of_another_module(project):
    steps = project.load("steps")
    return steps.scaled, lambda: setattr(project.load("settings"), "SCALE", 5)


def dict_changed_in_place(project):
    return project.load("steps").by_options, lambda: project.load("settings").OPTIONS.update(scale=7)


def attribute_of_an_instance(project):
    return project.load("steps").by_config, lambda: setattr(project.load("settings").config, "scale", 3)


def attribute_of_a_class(project):
    return project.load("steps").by_config, lambda: setattr(project.load("settings").Config, "scale", 4)


def method_replaced(project):
    return project.load("steps").by_config, lambda: setattr(
        project.load("settings").Config, "factor", lambda self: self.scale * 100
    )


def own_global(project):
    steps = project.load("steps")
    return steps.by_own, lambda: setattr(steps, "OWN", 11)


def name_imported_from_another_module(project):
    steps = project.load("steps")
    return steps.by_imported, lambda: setattr(steps, "SCALE", 12)


def function_replaced(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: setattr(steps, "helper", lambda x: x * 1000)


def code_replaced(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: setattr(steps.helper, "__code__", (lambda x: x - 5).__code__)


def defaults_replaced(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: setattr(steps.helper, "__defaults__", (6,))


def decorated(project):
    steps = project.load("steps")
    return steps.traced, lambda: setattr(steps, "OWN", 13)


def cached(project):
    steps = project.load("steps")

    def change():
        steps.OWN = 14
        steps.cached.cache_clear()

    return steps.by_cached, change


def partial(project):
    import functools

    steps = project.load("steps")
    return steps.by_partial, lambda: setattr(steps, "part", functools.partial(pow, 2))


def closure_of_the_module(project):
    steps = project.load("steps")
    return steps.closed, lambda: setattr(steps, "closed_over", 1) or steps.change_closure(50)


def import_within_a_function(project):
    project.load("settings")
    return project.load("steps").importing, lambda: setattr(project.load("settings"), "SCALE", 15)


def name_made_at_run_time(project):
    return project.load("steps").dynamic, lambda: setattr(project.load("settings"), "SCALE", 16)


def evaluated(project):
    steps = project.load("steps")
    return steps.evaluated, lambda: setattr(steps, "OWN", 17)


def array(project):
    steps = project.load("steps")
    return steps.by_array, lambda: steps.TABLE.__setitem__(0, 40)


def task_with_options(project):
    steps = project.load("steps")
    return steps.optioned, lambda: setattr(steps, "OWN", 18)


def lambda_of_the_module(project):
    steps = project.load("steps")
    return steps.LAMBDAS[0], lambda: setattr(steps, "OWN", 19)


def function_of_the_caller(project):
    steps = project.load("steps")
    return lambda x: steps.scaled(x) + 1, lambda: setattr(project.load("settings"), "SCALE", 20)


def name_deleted(project):
    return project.load("steps").guarded, lambda: delattr(project.load("steps"), "OWN")


def name_deleted_that_is_looked_for(project):
    return project.load("steps").dynamic, lambda: delattr(project.load("settings"), "SCALE")


def attribute_added_to_a_class(project):
    return project.load("steps").by_extra, lambda: setattr(project.load("settings").Config, "extra", 23)


def attribute_deleted_from_a_class(project):
    config = project.load("settings").Config
    config.extra = 24
    return project.load("steps").by_extra, lambda: delattr(config, "extra")


def deep_in_a_container(project):
    return project.load("steps").by_nested, lambda: project.load("settings").NESTED["a"].update(b={"c": 25})


def array_that_two_modules_share(project):
    steps = project.load("steps")
    return steps.by_shared, lambda: project.load("settings").ARRAY.__setitem__(0, 26)


def module_reloaded(project):
    steps = project.load("steps")

    def change():
        project.write("settings", SETTINGS.replace("SCALE = 1", "SCALE = 21"))
        importlib.reload(project.load("settings"))

    return steps.scaled, change


def edited_and_not_reloaded(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: project.write("steps", STEPS.replace("x + more", "x + 100000"))


def removed_after_import(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: (project.folder / "steps.py").unlink()


def broken_after_import(project):
    steps = project.load("steps")
    return steps.by_helper, lambda: project.write("steps", "this is no Python\n")


def bound_method(project):
    config = project.load("settings").Config()
    return types.MethodType(lambda self, x: self.factor() * x, config), lambda: setattr(
        project.load("settings").Config, "scale", 22
    )


STEPS = """
    import functools
    import numpy as np
    import forgepar as fp
    from PROJECT import settings
    from PROJECT.settings import ARRAY, SCALE
    OWN = 10
    TABLE = np.arange(3)
    LAMBDAS = [lambda x: x + OWN]
    part = functools.partial(pow, 3)
    def scaled(x): return x * settings.SCALE
    def by_options(x): return x * settings.OPTIONS["scale"]
    def by_config(x): return x * settings.config.factor()
    def by_own(x): return x * OWN
    def by_imported(x): return x * SCALE
    def helper(x, more=1): return x + more
    def by_helper(x): return helper(x)
    def trace(fn):
        @functools.wraps(fn)
        def wrapper(*args): return ("traced", fn(*args))
        return wrapper
    @trace
    def traced(x): return x * OWN
    @functools.lru_cache
    def cached(x): return x * OWN
    def by_cached(x): return cached(x)
    def by_partial(x): return part(x)
    def make():
        inner = 1
        def closed(x): return x * inner
        def change(value):
            nonlocal inner
            inner = value
        return closed, change
    closed, change_closure = make()
    def importing(x):
        from PROJECT import settings as found
        return x * found.SCALE
    def dynamic(x): return x, getattr(settings, "SCA" + "LE", "gone")
    def evaluated(x): return eval("x * OWN")
    def guarded(x):
        try: return x * OWN
        except NameError: return "gone"
    def by_extra(x): return x, getattr(settings.Config, "extra", "none")
    def by_nested(x): return x, settings.NESTED
    def by_shared(x): return x + int(settings.ARRAY[0]), settings.ARRAY is ARRAY
    def by_enum(x): return settings.Colour.RED.value + x, settings.Level.HIGH > x, settings.Flag.A | settings.Flag.B
    def by_array(x): return int(TABLE[0]) + x
    @fp.task(retries=1)
    def optioned(x): return x * OWN
"""
CHANGES = [
    global_of_another_module,
    dict_changed_in_place,
    attribute_of_an_instance,
    attribute_of_a_class,
    method_replaced,
    own_global,
    name_imported_from_another_module,
    function_replaced,
    code_replaced,
    defaults_replaced,
    decorated,
    cached,
    partial,
    closure_of_the_module,
    import_within_a_function,
    name_made_at_run_time,
    evaluated,
    array,
    task_with_options,
    lambda_of_the_module,
    function_of_the_caller,
    name_deleted,
    name_deleted_that_is_looked_for,
    attribute_added_to_a_class,
    attribute_deleted_from_a_class,
    deep_in_a_container,
    array_that_two_modules_share,
    module_reloaded,
    edited_and_not_reloaded,
    removed_after_import,
    broken_after_import,
    bound_method,
]


KEYWORDS = """
    class Names:
        first = 1
    def helper(x, *, scale=1, offset=2): return x * scale + offset
    helper.first = 1
    def by_keywords(x): return helper(x)
    def by_names(x): return [name for name in (*vars(Names), *vars(helper)) if not name.startswith("_")]
"""


def keyword_default_assigned_in_place(project):
    project.write("keywords", KEYWORDS)
    module = project.load("keywords")
    return module.by_keywords, lambda: module.helper.__kwdefaults__.update(scale=9)


def keyword_defaults_that_change_places(project):
    project.write("keywords", KEYWORDS)
    module = project.load("keywords")

    def change():
        module.helper.__kwdefaults__.clear()
        module.helper.__kwdefaults__.update(offset=1, scale=2)

    return module.by_keywords, change


def attribute_of_a_class_renamed(project):
    project.write("keywords", KEYWORDS)
    module = project.load("keywords")

    def change():
        del module.Names.first
        module.Names.second = 1

    return module.by_names, change


def attribute_of_a_function_renamed(project):
    project.write("keywords", KEYWORDS)
    module = project.load("keywords")

    def change():
        del module.helper.first
        module.helper.second = 1

    return module.by_names, change


def module_imported_again(project):
    project.write("dotted", "import PROJECT.settings\ndef by_dots(x): return x * PROJECT.settings.SCALE\n")
    dotted = project.load("dotted")

    def change():
        del sys.modules[f"{project.name}.settings"]
        project.load("settings").SCALE = 8

    return dotted.by_dots, change


CHANGES += [
    keyword_default_assigned_in_place,
    keyword_defaults_that_change_places,
    attribute_of_a_class_renamed,
    attribute_of_a_function_renamed,
    module_imported_again,
]


def in_workflow(executor, fn, x):
    wf = fp.Workflow()
    handle = wf.add(fn, x)
    return executor.run(wf)[handle]


@pytest.fixture(scope="module", params=METHODS)
def warm(request):
    """A warm executor of each kind; all changes are tried on the same workers, one after the other."""
    with (
        fp.WorkflowExecutor(workers=1, start_method=request.param) as runs,
        fp.ForgeExecutor(1, start_method=request.param) as pool,
    ):
        in_workflow(runs, abs, -1)
        pool.submit(abs, -1).result()
        yield runs, pool


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_the_caller_reaches_warm_workers(project, warm, change):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    fn, apply = change(project)
    runs, pool = warm
    before = fn(3)
    assert in_workflow(runs, fn, 3) == before
    assert pool.submit(fn, 3).result() == before
    apply()
    after = fn(3)
    assert in_workflow(runs, fn, 3) == after
    assert pool.submit(fn, 3).result() == after
    assert list(pool.map(fn, [3, 4])) == [after, fn(4)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_the_caller_reaches_new_workers(project, change):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    fn, apply = change(project)
    apply()
    after = fn(3)
    with fp.WorkflowExecutor(workers=1) as runs:
        assert in_workflow(runs, fn, 3) == after


def test_a_function_among_the_arguments_is_the_callers(project, warm):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, runs = project.load("steps"), warm[0]

    def call(fn, x):
        return fn(x)

    def run():
        wf = fp.Workflow()
        handle = wf.add(call, steps.by_helper, 3)
        return runs.run(wf)[handle], warm[1].submit(call, steps.by_helper, 3).result()

    assert run() == (4, 4)
    steps.helper = lambda x: x * 9
    assert run() == (27, 27)


BASES = """
    class Base:
        kind = 2
        names = ["a"]
        def greet(self): return 1
    class Model(Base):
        names = Base.names
        def value(self): return self.kind, list(self.names), self.greet()
    model = Model()
    def told(x): return x, model.value()
"""
CHAIN = """
    from PROJECT import bases
    last = {1: [bases.model]}
    def told(x): return x, last[1][0].value()
"""


@pytest.mark.parametrize("attribute", ["kind", "names", "greet"])
def test_a_class_that_repeats_an_attribute_of_its_base_keeps_it_when_that_changes(project, warm, attribute):
    project.write("bases", BASES)
    bases = project.load("bases")

    def check():
        assert in_workflow(warm[0], bases.told, 3) == bases.told(3) == warm[1].submit(bases.told, 3).result()

    check()
    setattr(bases.Model, attribute, getattr(bases.Base, attribute))
    check()
    setattr(bases.Base, attribute, {"kind": 5, "names": ["b"], "greet": lambda self: 3}[attribute])
    check()
    setattr(bases.Model, attribute, getattr(bases.Base, attribute))
    check()


@pytest.mark.parametrize("method", METHODS)
def test_a_class_of_the_script_that_repeats_an_attribute_of_its_base_keeps_it(method):
    class Base:
        kind = 2

    class Model(Base):
        kind = 2

    def told(x):
        return x, Model.kind

    with fp.WorkflowExecutor(workers=1, start_method=method) as runs:
        assert in_workflow(runs, told, 3) == (3, 2)
        Base.kind = 5
        assert in_workflow(runs, told, 3) == (3, 2)


@pytest.mark.parametrize("module", ["bases", "chain"])
def test_workers_have_a_class_before_its_instances_where_its_file_is_gone(project, warm, module):
    project.write("bases", BASES)
    project.write("chain", CHAIN)
    loaded = project.load(module)
    for name in ("bases", "chain"):
        (project.folder / f"{name}.py").unlink()
    assert in_workflow(warm[0], loaded.told, 3) == loaded.told(3)
    assert warm[1].submit(loaded.told, 3).result() == loaded.told(3)


def test_workers_have_a_class_before_its_instances_where_both_are_new(project, warm):
    project.write("bases", BASES)
    bases = project.load("bases")
    assert in_workflow(warm[0], bases.told, 3) == bases.told(3) == warm[1].submit(bases.told, 3).result()
    bases.Later = type("Later", (), {"__module__": bases.__name__, "value": lambda self: 8})
    bases.model = bases.Later()
    assert in_workflow(warm[0], bases.told, 3) == (3, 8) == warm[1].submit(bases.told, 3).result()


def test_a_package_whose_folder_is_gone_is_a_package_in_workers_too(project, warm):
    (project.folder / "inner").mkdir()
    (project.folder / "inner" / "__init__.py").write_text("SCALE = 3\ndef told(x): return x * SCALE, len(__path__)\n")
    inner = project.load("inner")
    shutil.rmtree(project.folder / "inner")
    assert in_workflow(warm[0], inner.told, 3) == (9, 1) == warm[1].submit(inner.told, 3).result()


def test_a_nested_function_that_reads_any_name_has_those_of_its_module(project, warm):
    project.write("dynamic", "import os\nSCALE = 3\ndef made():\n    return lambda x: (os.sep and eval('SCALE * x'))\n")
    fn = project.load("dynamic").made()
    assert in_workflow(warm[0], fn, 3) == 9 == warm[1].submit(fn, 3).result()


KINDS = """
    import collections, functools, threading
    import numpy as np
    SCALE = 2
    class Box:
        def __init__(self): self.n = 1
    def synced(fn):
        lock = threading.Lock()
        @functools.wraps(fn)
        def inner(*args):
            with lock: return fn(*args)
        return inner
    class Model:
        lock = threading.Lock() if LOCKED else None
        array = np.zeros(3)
        box = Box()
        items = collections.deque([1])
        table = {"box": Box()}
        limit = 3
        def value(self): return 1
        def default(self, x=[]): return len(x)
        @property
        def read(self): return 1
        @classmethod
        def of_class(cls): return 1
        @staticmethod
        def static(): return 1
        @functools.cached_property
        def once(self): return 1
        @functools.lru_cache
        def cached(self): return 1
        class Inner:
            n = 1
            def get(self): return 1
        dispatch = functools.singledispatchmethod(lambda self, x: 1)
        part = functools.partialmethod(value)
    class Config:
        factor = 1
        def __init__(self): self.lock, self.limit, self.names = threading.Lock(), 3, ["a"]
        def get(self): return self.limit * self.factor, list(self.names), hasattr(self, "extra")
    config = Config()
    STATE = {"lock": threading.Lock(), "limit": 3}
    @synced
    def sync(x): return x * SCALE
    def told(x):
        model, inner = Model(), Model.Inner()
        return (
            x, float(model.array[0]), model.box.n, list(model.items), model.table["box"].n, model.limit, model.value(),
            model.default(), model.read, model.of_class(), model.static(), model.once, model.cached(), inner.n,
            inner.get(), model.dispatch(2), model.part(), config.get(), STATE["limit"], "new" in STATE, sync(x),
        )
"""


def changes_within(kinds):
    """Yield what may change within a class, or beside something that cannot be pickled, without a name assigned."""
    model, own = kinds.Model, vars(kinds.Model)
    method, function = (lambda self: 2).__code__, (lambda: 2).__code__
    yield "array", lambda: model.array.__setitem__(0, 5)
    yield "attribute of an attribute", lambda: setattr(model.box, "n", 5)
    yield "deque", lambda: model.items.append(4)
    yield "deep in a dict", lambda: setattr(model.table["box"], "n", 9)
    yield "data", lambda: setattr(model, "limit", 9)
    yield "code of a method", lambda: setattr(model.value, "__code__", method)
    yield "default in place", lambda: model.default.__defaults__[0].append(1)
    yield "defaults", lambda: setattr(model.default, "__defaults__", ([1, 2, 3],))
    yield "code of a property", lambda: setattr(own["read"].fget, "__code__", method)
    yield "code of a class method", lambda: setattr(own["of_class"].__func__, "__code__", method)
    yield "code of a static method", lambda: setattr(own["static"].__func__, "__code__", function)
    yield "code of a cached property", lambda: setattr(own["once"].func, "__code__", method)
    yield "code of a cached method", lambda: setattr(model.cached.__wrapped__, "__code__", method)
    yield "nested class", lambda: setattr(model.Inner, "n", 5)
    yield "method of a nested class", lambda: setattr(model.Inner, "get", lambda self: 8)
    yield "dispatch", lambda: own["dispatch"].register(int, lambda self, x: 7)
    yield "global of a function with a lock", lambda: setattr(kinds, "SCALE", 5)
    yield "attribute beside a lock", lambda: setattr(kinds.config, "limit", 9)
    yield "list beside a lock", lambda: kinds.config.names.append("b")
    yield "new attribute beside a lock", lambda: setattr(kinds.config, "extra", 1)
    yield "attribute gone beside a lock", lambda: delattr(kinds.config, "extra")
    yield "class of what has a lock", lambda: setattr(kinds.Config, "factor", 4)
    yield "method of what has a lock", lambda: setattr(kinds.Config, "get", lambda self: self.limit)
    yield "item beside a lock", lambda: kinds.STATE.update(limit=8, new=1)
    yield "item gone beside a lock", lambda: kinds.STATE.pop("new")


@pytest.mark.parametrize("locked", [False, True])
def test_changes_within_classes_and_beside_locks_reach_warm_workers(project, warm, locked):
    project.write("kinds", KINDS.replace("LOCKED", str(locked)))
    kinds = project.load("kinds")
    wrong = {}
    for name, change in [("nothing", lambda: None), *changes_within(kinds)]:
        change()
        kinds.Model.cached.cache_clear()
        expected = kinds.told(3)
        got = in_workflow(warm[0], kinds.told, 3), warm[1].submit(kinds.told, 3).result()
        if got != (expected, expected):
            wrong[name] = (expected, *got)
    assert not wrong


def test_code_that_cannot_be_sent_and_differs_is_refused_by_name(project, warm):
    project.write("kinds", KINDS.replace("LOCKED", "True"))
    kinds = project.load("kinds")
    assert in_workflow(warm[0], kinds.told, 3) == kinds.told(3) == warm[1].submit(kinds.told, 3).result()
    kinds.sync.__wrapped__.__code__ = (lambda x: x + 7).__code__
    with pytest.raises(fp.WorkflowFailed, match=r"'sync' of module .* has different code") as failed:
        in_workflow(warm[0], kinds.told, 3)
    assert isinstance(failed.value.exceptions[0], fp.CodeMismatch)
    with pytest.raises(fp.CodeMismatch, match=r"'sync' of module .* has different code"):
        warm[1].submit(kinds.told, 3).result()


def test_the_class_of_a_value_that_passes_between_tasks_is_the_callers(project):
    project.write("settings", SETTINGS)
    settings = project.load("settings")
    settings.Config.factor = lambda self: 77
    wf = fp.Workflow()
    makers = wf.map(lambda _: settings.Config(), range(4))
    handles = wf.map(lambda config: config.factor(), makers)
    assert wf.run(workers=2)[handles] == [77] * 4


def test_the_class_of_a_value_that_passes_between_jobs_is_the_callers(project):
    project.write("settings", SETTINGS)
    settings = project.load("settings")
    settings.Config.factor = lambda self: 77
    with fp.ForgeExecutor(2) as pool:
        makers = [pool.submit(lambda _: settings.Config(), n) for n in range(4)]
        assert [pool.submit(lambda config: config.factor(), maker).result() for maker in makers] == [77] * 4
        kept = pool.put(settings.Config())
        assert [pool.submit(lambda config: config.factor(), kept).result() for _ in range(4)] == [77] * 4


def test_jobs_see_what_was_there_when_they_were_submitted(project, warm):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings, pool = project.load("steps"), project.load("settings"), warm[1]
    futures = []
    for number in range(60):
        settings.SCALE = number % 3
        futures.append((pool.submit(steps.scaled, 1), number % 3))
    assert [future.result() for future, _ in futures] == [scale for _, scale in futures]


def test_what_a_task_assigns_does_not_reach_the_next_run(project, warm):
    project.write("settings", "SEEN = []\ndef note(x):\n    SEEN.append(x)\n    return list(SEEN)\n")
    settings, runs = project.load("settings"), warm[0]
    assert in_workflow(runs, settings.note, 1) == [1]
    assert in_workflow(runs, settings.note, 2) == [2]


def test_what_a_job_assigns_stays_for_the_next_job(project, warm):
    project.write("settings", "SEEN = []\ndef note(x):\n    SEEN.append(x)\n    return list(SEEN)\n")
    settings, pool = project.load("settings"), warm[1]
    assert pool.submit(settings.note, 1).result() == [1]
    assert pool.submit(settings.note, 2).result() == [1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_an_initializer_of_a_module_sees_and_sets_its_globals(project, method):
    project.write(
        "settings",
        "SCALE = 1\nMODEL = None\ndef init():\n    global MODEL\n    MODEL = SCALE * 2\ndef work(): return MODEL\n",
    )
    settings = project.load("settings")
    settings.SCALE = 21
    with fp.ForgeExecutor(1, initializer=settings.init, start_method=method) as pool:
        assert pool.submit(settings.work).result() == 42


def test_a_large_global_that_differs_is_an_error_that_names_it(project, monkeypatch):
    monkeypatch.setattr("forgepar.values.module_state._LARGEST", 1000)
    project.write("settings", "BIG = list(range(10_000))\nNAMES = 1\ndef first(): return BIG[0]\n")
    settings = project.load("settings")
    with fp.WorkflowExecutor(workers=1) as runs:
        wf = fp.Workflow()
        wf.add(settings.first)
        runs.run(wf)
        settings.BIG[0] = 5
        with pytest.raises(fp.WorkflowFailed) as caught:
            runs.run(wf)
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.CodeMismatch)
    assert "'BIG' of module" in str(error)
    assert settings.__name__ in str(error)


def test_what_cannot_be_sent_and_differs_is_warned_of(project):
    project.write("settings", "CONNECTION = None\ndef ask(): return CONNECTION is None\n")
    settings = project.load("settings")
    settings.CONNECTION = (n for n in range(3))
    wf = fp.Workflow()
    handle = wf.add(settings.ask)
    with pytest.warns(RuntimeWarning, match="'CONNECTION' of module .* is a generator in the caller"):
        assert wf.run(workers=1)[handle] is True


def test_locks_of_a_module_are_each_processs_own(project):
    project.write("settings", "import threading\nLOCK = threading.Lock()\ndef locked():\n    with LOCK: return 1\n")
    wf = fp.Workflow()
    handle = wf.add(project.load("settings").locked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wf.run(workers=1)[handle] == 1


POINT = """
    class Point:
        __slots__ = ('x',)
        def __init__(self, x): self.x = x
    def make(): return Point(1).x
"""


def test_enumerations_of_modules_travel(project, warm):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    fn, (runs, pool) = project.load("steps").by_enum, warm
    assert in_workflow(runs, fn, 1) == fn(1)
    assert pool.submit(fn, 1).result() == fn(1)
    project.load("settings").Colour.RED.note = 5
    assert in_workflow(runs, fn, 1) == fn(1)


def test_a_part_that_cannot_be_taken_in_is_refused_by_name_and_harms_no_other_job(project, warm):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, (runs, pool) = project.load("steps"), warm
    with unittest.mock.patch.object(steps, "helper", return_value=5):
        steps.helper(1)  # its calls do not survive a pickle
        future = pool.submit(steps.by_helper, 3)
        with pytest.raises(fp.CodeMismatch, match="'helper' of module"):
            future.result()
        with pytest.raises(fp.WorkflowFailed, match="'helper' of module"):
            in_workflow(runs, steps.by_helper, 3)
        assert pool.submit(abs, -3).result() == 3
    assert pool.submit(steps.by_own, 3).result() == 30
    assert pool.submit(steps.by_helper, 3).result() == 4
    assert in_workflow(runs, steps.by_helper, 3) == 4


def test_a_class_with_other_slots_is_refused_by_name(project):
    project.write("settings", POINT)
    settings = project.load("settings")
    project.write("settings", POINT.replace("('x',)", "('x', 'y')"))
    wf = fp.Workflow()
    wf.add(settings.make)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1)
    assert isinstance(caught.value.exceptions[0], fp.CodeMismatch)
    assert "'Point' of module" in str(caught.value.exceptions[0])


def test_a_module_that_the_caller_has_not_imported_is_the_one_that_the_run_began_with(project):
    project.write("late", "X = 1\n")
    project.write("steps", "def use(gate):\n    from PROJECT import late\n    return late.X\n")
    steps = project.load("steps")
    with fp.WorkflowExecutor(workers=1) as runs:
        assert in_workflow(runs, steps.use, 0) == 1
        project.write("late", "X = 2  # longer\n")
        assert in_workflow(runs, steps.use, 0) == 2


EDITING = """
    def edit(path): open(path, 'w').write('X = 2  # longer')
    def use(_):
        from PROJECT import late
        return late.X
"""


def test_a_source_that_is_edited_amid_the_run_is_an_error(project):
    path = project.write("late", "X = 1\n")
    project.write("steps", EDITING)
    steps = project.load("steps")
    wf = fp.Workflow()
    wf.add(steps.use, wf.add(steps.edit, str(path)))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1)
    assert "was edited after the run began" in str(caught.value.exceptions[0])


REPLACED = """
    SCALE = 1
    NEW = "SCALE = 99\\ndef edit(p): pass\\ndef scaled(x, _): return x * SCALE * 2\\n"
    def edit(path):
        with open(path, "w") as file: file.write(NEW)
    def scaled(x, _): return x * SCALE
"""


def test_workers_that_are_replaced_amid_a_run_have_what_it_began_with(project, tmp_path):
    path = project.write("settings", REPLACED)
    settings = project.load("settings")
    settings.SCALE = 5

    def run():
        wf = fp.Workflow("p")
        edited = wf.add(settings.edit, str(path))
        handles = [wf.add(fp.task(settings.scaled).options(name=f"s{n}"), n, edited) for n in range(6)]
        with fp.WorkflowExecutor(workers=2, max_tasks_per_worker=1) as runs:
            result = runs.run(wf, store=tmp_path / "runs.db", resume=True)
        return [result[handle] for handle in handles], result.record(handles[0]).status

    assert run() == ([0, 5, 10, 15, 20, 25], "completed")
    assert run() == ([0, 5, 10, 15, 20, 25], "cached")


def test_a_thread_of_the_caller_has_its_own_modules(project):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings = project.load("steps"), project.load("settings")
    settings.SCALE = 5
    with ThreadPoolExecutor(1) as threads:
        wf = fp.Workflow()
        handle = wf.add(steps.scaled, 2)
        assert wf.run(backend=fp.FuturesBackend(threads))[handle] == 10
    assert settings.SCALE == 5


def test_a_value_is_found_in_the_store_only_under_what_made_it(project, tmp_path):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings = project.load("steps"), project.load("settings")
    store = tmp_path / "runs.db"

    def run():
        wf = fp.Workflow("p")
        handle = wf.add(steps.scaled, 10)
        result = wf.run(workers=1, store=store, resume=True)
        return result[handle], result.records[0].status

    settings.SCALE = 5
    assert run() == (50, "completed")
    assert run() == (50, "cached")
    settings.SCALE = 1
    assert run() == (10, "completed")
    settings.SCALE = 5
    assert run() == (50, "cached")


@pytest.mark.parametrize("fn", ["importing", "dynamic", "evaluated", "by_options", "by_config", "cached", "traced"])
def test_no_value_is_found_again_that_other_globals_made(project, tmp_path, fn):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings = project.load("steps"), project.load("settings")

    def run():
        wf = fp.Workflow("p")
        handle = wf.add(getattr(steps, fn), 10)
        return wf.run(workers=1, store=tmp_path / "runs.db", resume=True)[handle]

    before = run()
    settings.SCALE = settings.OPTIONS["scale"] = settings.config.scale = steps.OWN = 7
    steps.cached.cache_clear()
    after = getattr(steps, fn)(10)
    assert after != before
    assert run() == after


def test_parts_are_made_again_only_where_something_has_changed(project):
    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings = project.load("steps"), project.load("settings")
    state = ModuleState()
    roots = [(steps.__name__, "scaled"), (steps.__name__, "by_options")]
    first = state.parts_for(roots)
    assert state.parts_for(roots, renew=True) == first
    settings.OPTIONS["scale"] = np.float64(2.0)
    changed = [part.key for part in state.parts_for(roots, renew=True) if part not in first]
    assert changed == [(settings.__name__, "OPTIONS")]


def test_joblib_and_dask_see_what_the_caller_has(project):
    dask = pytest.importorskip("dask")
    joblib = pytest.importorskip("joblib")
    from forgepar.integrations.dask_graphs import close_workers
    from forgepar.joblib import close

    project.write("settings", SETTINGS)
    project.write("steps", STEPS)
    steps, settings = project.load("steps"), project.load("settings")
    names = ["scaled", "by_config", "by_options"]

    def by_joblib(x):
        with joblib.parallel_config(backend="forgepar"):
            return joblib.Parallel(n_jobs=2)(joblib.delayed(getattr(steps, name))(x) for name in names)

    def by_dask(x):
        return list(dask.compute(*[dask.delayed(getattr(steps, name))(x) for name in names], scheduler=fp.dask_get))

    try:
        for scale in (1, 5, 2):
            settings.SCALE = settings.Config.scale = settings.OPTIONS["scale"] = scale
            assert by_joblib(3) == [3 * scale] * 3
            assert by_dask(3) == [3 * scale] * 3
    finally:
        close()
        close_workers()


WITHIN = """
    import abc, enum, functools, sys
    def base(a): return a
    bound = functools.partial(base, 3)
    TABLE = {"base": base}
    def counted(fn):
        @functools.wraps(fn)
        def inner(*args): return len(inner.calls), fn(*args)
        inner.calls = []
        return inner
    @counted
    def noted(): return "one"
    made = {"N": 1}
    exec("def read(): return N", made)
    read = made["read"]
    class Planet(enum.Enum):
        EARTH = 1
        def __init__(self, mass): self.mass = mass
    SHARED = [0]
    held = {"it": SHARED}
    class Holder: pass
    holder = Holder()
    holder.it = SHARED
    def default(it=SHARED): return list(it)
    def by_name(): return getattr(sys.modules[__name__], "hidden")()
    def hidden(): return "hidden"
    class Base(abc.ABC): pass
    class Registered: pass
    class Root: pass
    def children(): return sorted(cls.__name__ for cls in Root.__subclasses__())
    def told():
        aliases = SHARED, held["it"], holder.it, default()
        return (
            bound(), TABLE["base"](4), noted(), read(), Planet.EARTH.mass, [list(it) for it in aliases], by_name(),
            children(), isinstance(Registered(), Base), isinstance(3, Base),
        )
"""


def replaced_code(a):
    return ("replaced", a)


def found_by_name():
    return "found"


def called(runs, fn, **options):
    wf = fp.Workflow("called")
    handle = wf.add(fn)
    return runs.run(wf, **options)[handle]


def changes_that_nothing_assigns(module):
    yield (
        "the code of a function in a partial and a dict",
        lambda: setattr(module.base, "__code__", replaced_code.__code__),
    )
    yield "an attribute of a decorated function, in place", lambda: module.noted.calls.append(1)
    yield "an attribute of a decorated function", lambda: setattr(module.noted, "calls", [1, 2, 3])
    yield "a global of a function that exec made", lambda: module.made.update(N=2)
    yield "an attribute of a member", lambda: setattr(module.Planet.EARTH, "mass", 7)
    yield "one of several names of a list", lambda: setattr(module, "SHARED", [5])
    yield "an item that was the same list", lambda: module.held["it"].append(8)
    yield "the list that was assigned, in place", lambda: module.SHARED.append(6)
    yield (
        "all names the same list again",
        lambda: (setattr(module, "SHARED", module.held["it"]), module.SHARED.append(9)),
    )
    yield "a class that is registered", lambda: module.Base.register(module.Registered)
    yield "a builtin that is registered", lambda: module.Base.register(int)
    yield "a function that is found by a text", lambda: setattr(module, "hidden", found_by_name)


def test_changes_behind_names_reach_warm_workers_and_the_store(project, warm, tmp_path):
    project.write("within", WITHIN)
    module = project.load("within")
    runs, pool = warm
    wrong = {}
    for name, change in [("nothing", lambda: None), *changes_that_nothing_assigns(module)]:
        change()
        expected = module.told()
        kept = called(runs, module.told, store=tmp_path / "runs.db", resume=True)
        got = called(runs, module.told), pool.submit(module.told).result(), kept
        if got != (expected,) * 3:
            wrong[name] = (expected, *got)
    assert not wrong


@pytest.mark.parametrize("method", METHODS)
def test_an_object_assigned_before_the_first_run_is_under_that_name_alone(project, method):
    project.write("within", WITHIN)
    module = project.load("within")
    module.SHARED = [5]
    with fp.WorkflowExecutor(workers=1, start_method=method) as runs:
        assert called(runs, module.told) == module.told()


def test_subclasses_that_the_caller_made_are_found(project, warm):
    project.write("within", WITHIN)
    module = project.load("within")
    runs, pool = warm
    module.Later = type("Later", (module.Root,), {"__module__": module.__name__})
    assert module.children() == ["Later"]
    assert called(runs, module.children) == pool.submit(module.children).result() == ["Later"]


WRAPPED = """
    import functools
    def wrapping(fn):
        @functools.wraps(fn)
        def inner(*args): return "wrapped", fn(*args)
        return inner
    class Model:
        @wrapping
        def get(self): return "VERSION"
        @property
        @wrapping
        def read(self): return "VERSION"
    def told(): return Model().get(), Model().read
"""


def test_methods_behind_one_decorator_are_the_reloaded_ones(project, warm):
    runs, pool = warm
    for version in ("first", "second"):
        project.write("wrapped", WRAPPED.replace("VERSION", version))
        module = importlib.reload(project.load("wrapped"))
        assert module.told() == (("wrapped", version),) * 2
        assert called(runs, module.told) == module.told()
        assert pool.submit(module.told).result() == module.told()
