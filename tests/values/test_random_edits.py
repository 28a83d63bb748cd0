"""Random modules, edited, reloaded and patched at random between runs with one store: every value is the caller's."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import sys
import time

import pytest
from conftest import SLOW_SHARE

import forgepar as fp

# Where a source is gone that all of may count, a value is not kept, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore::forgepar.errors.StoreWarning")
_stamps = itertools.count(1)
FUNCTIONS = {
    "plain": "def plain(x): return x + {0}",
    "by_global": "def by_global(x): return x * SCALE + {0}",
    "by_other": "def by_other(x): return other.shift(x) + SCALE",
    "by_imported": "def by_imported(x): return shift(x) - {0}",
    "by_dict": "def by_dict(x): return x + OPTIONS['add'] * {0}",
    "by_list": "def by_list(x): return [x] + LIST",
    "by_class": "def by_class(x): return Model(x).value() + {0}",
    "by_nested": "def by_nested(x): return Model.Inner.n + x, len(Model.table), Model.counts['n']",
    "by_locked": "def by_locked(x): return x * locked.limit + {0}",
    "synced": "@with_lock\ndef synced(x): return x + SCALE",
    "by_instance": "def by_instance(x): return x + model.value()",
    "by_default": "def by_default(x, more={0}, names=('a', {0})): return x + more, names",
    "cached": "@functools.lru_cache\ndef cached(x): return x * SCALE + {0}",
    "decorated": "@twice\ndef decorated(x): return x + SCALE",
    "closed": "closed = closing({0})",
    "partial": "partial = functools.partial(pow, {0} % 7)",
    "inside": "def inside(x):\n    from {1} import other as found\n    return found.shift(x)",
    "dynamic": "def dynamic(x): return getattr(other, 'SH' + 'IFT') + x",
    "evaluated": "def evaluated(x): return eval('x + SCALE')",
    "calls": "def calls(x): return plain(x), by_global(x)",
    "optioned": "@fp.task(retries=1)\ndef optioned(x): return x + SCALE + {0}",
    "in_set": "def in_set(x): return x in {{'a', 'b', {0}}}, SCALE",
}
HEAD = """
import functools
import threading
import forgepar as fp
from {1} import other
from {1}.other import shift
SCALE = {0}
OPTIONS = {{'add': {0}, 'more': [1, {0}]}}
LIST = [{0}, {2}]
class Base:
    kind = {2}
class Model(Base):
    scale = {0}
    def __init__(self, x=1): self.x = x
    def value(self): return self.x * self.scale + self.kind
    table = [{2}]
    counts = {{'n': {0}}}
    class Inner:
        n = {2}
model = Model({2})
class Locked:
    def __init__(self): self.lock, self.limit = threading.Lock(), {0}
locked = Locked()
def with_lock(fn):
    lock = threading.Lock()
    @functools.wraps(fn)
    def wrapper(x):
        with lock: return fn(x)
    return wrapper
def twice(fn):
    @functools.wraps(fn)
    def wrapper(x): return fn(fn(x)) + {2}
    return wrapper
def closing(n):
    def closed(x): return x + n
    return closed
"""
OTHER = "SHIFT = {0}\ndef shift(x): return x + SHIFT + {2}\n"


class Project:
    """A package of random modules, as the caller has it."""

    def __init__(self, folder, chance):
        self.chance = chance
        self.name = f"edited_{os.getpid()}_{next(_stamps)}"
        self.folder = folder / self.name
        self.folder.mkdir()
        (self.folder / "__init__.py").write_text("")
        self.names = chance.sample(sorted(FUNCTIONS), 7)
        if "calls" in self.names:
            self.names = [*{"plain", "by_global"}.difference(self.names), *self.names]
        self.write("other")
        self.write("steps")
        importlib.invalidate_caches()
        self.other = importlib.import_module(f"{self.name}.other")
        self.steps = importlib.import_module(f"{self.name}.steps")

    def number(self):
        return self.chance.randrange(2, 6)

    def write(self, module):
        text = OTHER if module == "other" else HEAD
        text = text.format(self.number(), self.name, self.number())
        if module == "steps":
            order = [name for name in FUNCTIONS if name in self.names]
            text += "\n".join(FUNCTIONS[name].format(self.number(), self.name) for name in order) + "\n"
        path = self.folder / f"{module}.py"
        path.write_text(text)
        stamp = time.time() + next(_stamps) * 2
        os.utime(path, (stamp, stamp))

    # What may happen between two runs

    def edit(self):
        self.write(self.chance.choice(["steps", "other"]))

    def edit_and_reload(self):
        module = self.chance.choice([self.steps, self.other])
        self.write(module.__name__.rpartition(".")[2])
        importlib.reload(module)

    def assign(self):
        self.steps.SCALE = self.number()

    def assign_in_other(self):
        self.other.SHIFT = self.number()

    def change_dict(self):
        self.steps.OPTIONS["add"] = self.number()

    def change_list(self):
        self.steps.LIST.append(self.number())

    def change_class(self):
        self.chance.choice([self.steps.Model, self.steps.Base]).kind = self.number()

    def change_instance(self):
        self.steps.model.x = self.number()

    def change_method(self):
        number = self.number()
        self.steps.Model.value = lambda model: model.x - number

    def change_within_class(self):
        model = self.steps.Model
        change = self.chance.choice(["table", "counts", "inner", "code"])
        if change == "table":
            model.table.append(1)
        elif change == "counts":
            model.counts["n"] = self.number()
        elif change == "inner":
            model.Inner.n = self.number()
        elif not model.value.__closure__:
            model.value.__code__ = (lambda self: self.x + self.kind).__code__

    def change_locked(self):
        self.steps.locked.limit = self.number()

    def replace_function(self):
        number, name = self.number(), self.chance.choice(["plain", "by_global", "by_class"])
        if name in self.names:
            setattr(self.steps, name, lambda x: (x, number))

    def replace_code(self):
        self.other.shift.__code__ = self.chance.choice([lambda x: x * 3, lambda x: x * SHIFT]).__code__  # noqa: F821

    def replace_imported(self):
        number = self.number()
        self.steps.shift = lambda x: x - number

    def replace_default(self):
        if "by_default" in self.names:
            self.steps.by_default.__defaults__ = (self.number(), "new")

    def replace_closure(self):
        if "closed" in self.names:
            self.steps.closed = self.steps.closing(self.number())

    def remove_file(self):
        (self.folder / "steps.py").unlink(missing_ok=True)

    def forget(self):
        for name in [name for name in sys.modules if name.startswith(self.name)]:
            del sys.modules[name]


CHANGES = [name for name, value in vars(Project).items() if callable(value) and name[0] != "_"]
CHANGES = [name for name in CHANGES if name not in ("number", "write", "forget")]


def functions_of(project):
    found = [getattr(project.steps, name) for name in project.names]
    number = project.number()
    return [*found, lambda x: (project.steps.__name__ and x, found[0](x), number)]


def inline(functions, x):
    for fn in functions:
        if hasattr(fn, "cache_clear"):
            fn.cache_clear()
    return [fn(x) for fn in functions]


def run(executor, functions, x, **options):
    wf = fp.Workflow("edited")
    handles = [wf.add(fp.task(fn).options(name=f"t{n}"), x) for n, fn in enumerate(functions)]
    result = executor.run(wf, **options)
    return [result[handle] for handle in handles]


def submit(pool, functions, x):
    return [future.result() for future in [pool.submit(fn, x) for fn in functions]]


def play(folder, executor, store, seed, n_steps, values_of=run):
    """Play a sequence of changes and runs; return how many values were compared."""
    chance = random.Random(seed)
    project = Project(folder, chance)
    n_values, told = 0, []
    try:
        for _ in range(n_steps):
            functions = functions_of(project)[:-1]
            x = chance.randrange(2, 4)
            expected = inline(functions, x)
            options = {"store": store, "resume": True} if store is not None else {}
            got = values_of(executor, functions, x, **options)
            names = dict(zip(project.names, zip(expected, got, strict=True), strict=True))
            wrong = {name: pair for name, pair in names.items() if pair[0] != pair[1]}
            assert not wrong, (seed, told, wrong)
            n_values += len(got)
            for change in chance.choices(CHANGES, k=chance.randrange(1, 3)):
                told.append(change)
                getattr(project, change)()
    finally:
        project.forget()
    return n_values


def play_all(tmp_path, monkeypatch, seeds, method, n_steps=5, store="runs.db"):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seeds, n_values = list(seeds), 0
    store = tmp_path / store if store else None
    for first in range(0, len(seeds), 50):  # new workers now and then
        with contextlib.ExitStack() as stack:
            executor = stack.enter_context(fp.WorkflowExecutor(workers=1, start_method=method))
            for seed in seeds[first : first + 50]:
                n_values += play(tmp_path, executor, store, seed, n_steps)
    assert n_values > len(seeds) * n_steps


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_values_are_those_of_the_caller_whatever_it_changes(tmp_path, monkeypatch, method):
    play_all(tmp_path, monkeypatch, range(12), method)


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_jobs_see_what_the_caller_has_whatever_it_changes(tmp_path, monkeypatch, method):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with fp.ForgeExecutor(1, start_method=method) as pool:
        for seed in range(500, 512):
            assert play(tmp_path, pool, None, seed, 5, submit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "store", "seeds"),
    [
        ("forkserver", "runs.db", range(1000, 1300)),
        ("spawn", "runs.db", range(2000, 2100)),
        ("fork", "runs.db", range(3000, 3100)),
        ("forkserver", None, range(4000, 4050)),
    ],
)
def test_values_are_those_of_the_caller_at_length(tmp_path, monkeypatch, method, store, seeds):
    play_all(tmp_path, monkeypatch, seeds[::SLOW_SHARE], method, store=store)
