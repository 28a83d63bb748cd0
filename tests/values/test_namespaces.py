"""What a script defines is one module in each worker, as it is in the caller: globals, classes, caches."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

METHODS = ["forkserver", "spawn", "fork"]
PATIENCE = 100  # seconds


def run_script(folder, text, *arguments, **options):
    """Run a script that is to end well; return what it printed."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=PATIENCE, cwd=folder, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "name",
    [
        "values.namespaces.Home",
        "values.namespaces.Key",
        "values.namespaces.KeptAsIs",
        "values.namespaces.make_function",
        "values.namespaces.fill_function",
        "values.namespaces.make_cached",
        "values.namespaces.make_dispatch",
        "values.namespaces.fill_dispatch",
        "values.namespaces.make_dispatch_method",
        "values.namespaces.make_cached_property",
        "values.namespaces.make_class",
        "values.namespaces.fill_class",
        "values.by_value._as_code",
        "values.exceptions.put_together",
        "values.exception_fields.NotSent",
    ],
)
def test_names_in_the_pickles_of_stores_are_found(name):
    module, _, attribute = name.rpartition(".")
    assert pickle.loads(f"cforgepar.{module}\n{attribute}\n.".encode()).__name__ == attribute


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


class TestGlobals:
    def test_what_an_initializer_assigns_jobs_read(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, multiprocessing, forgepar as fp
            MODEL = None
            TABLE = {}
            class Config:
                size = 1
            lock = queue = None
            def init(value, shared_lock, shared_queue):
                global MODEL, lock, queue
                MODEL = value
                TABLE["key"] = value
                Config.size = 3
                lock, queue = shared_lock, shared_queue
            def work(i):
                with lock:
                    queue.put(i)
                return MODEL, dict(TABLE), Config.size
            context = multiprocessing.get_context(sys.argv[1])
            shared = context.Queue()
            arguments = ("loaded", context.Lock(), shared)
            with fp.ForgeExecutor(1, initializer=init, initargs=arguments, start_method=sys.argv[1]) as executor:
                assert executor.submit(work, 5).result() == ("loaded", {"key": "loaded"}, 3)
                assert executor.submit(lambda: MODEL).result() == "loaded"
                assert list(executor.map(work, [6, 7])) == [("loaded", {"key": "loaded"}, 3)] * 2
                assert sorted(shared.get() for _ in range(3)) == [5, 6, 7]
            assert MODEL is None and TABLE == {} and Config.size == 1
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_jobs_of_one_worker_see_one_module(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, forgepar as fp
            HELD, SEEN, count = {}, [], 0
            class Registry:
                names = []
            def put(k, v):
                global count
                HELD[k] = v
                SEEN.append(k)
                Registry.names.append(k)
                count += 1
            def get(k): return HELD.get(k), SEEN, Registry.names, count
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as executor:
                executor.submit(put, "a", 1).result()
                executor.submit(put, "b", 2).result()
                assert executor.submit(get, "a").result() == (1, ["a", "b"], ["a", "b"], 2)
                assert executor.submit(lambda: count).result() == 2
            assert HELD == {} and Registry.names == []
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_what_the_caller_assigns_later_arrives(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, forgepar as fp
            SCALE, OPTIONS = 1, {"add": 0}
            class Config:
                power = 1
            def work(x): return (x * SCALE + OPTIONS["add"]) ** Config.power
            def helper(x): return work(x)
            def indirect(x): return helper(x) + eval("SCALE")
            jobs = []
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as executor:
                for step in range(6):
                    SCALE, Config.power = step % 3, 1 + step % 2
                    OPTIONS["add"] = step
                    jobs.append((executor.submit(work, 5), work(5)))
                    jobs.append((executor.submit(indirect, 5), indirect(5)))
                for future, expected in jobs:
                    assert future.result() == expected, (future.result(), expected)
            with fp.WorkflowExecutor(1, start_method=sys.argv[1]) as executor:
                for step in range(3):
                    SCALE, OPTIONS["add"], Config.power = step, step, 2
                    wf = fp.Workflow()
                    handle = wf.add(indirect, 5)
                    assert executor.run(wf)[handle] == indirect(5)
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_a_run_begins_with_what_the_caller_has(self, tmp_path):
        said = run_script(
            tmp_path,
            """
            import forgepar as fp
            SEEN = []
            class Config:
                size = 1
            def note(x):
                SEEN.append(x)
                Config.size += 1
                return list(SEEN), Config.size
            with fp.WorkflowExecutor(1) as executor:
                for x in range(3):
                    wf = fp.Workflow()
                    handle = wf.add(note, x)
                    assert executor.run(wf)[handle] == ([x], 2), executor.run(wf)[handle]
            print("good")
            """,
        )
        assert said == ["good"]

    def test_a_function_redefined_in_a_session_is_the_new_one(self, tmp_path):
        said = run_script(
            tmp_path,
            """
            import forgepar as fp
            def f(): return g()
            def g(): return 1
            class C:
                def m(self): return 1
            with fp.ForgeExecutor(1) as executor:
                assert executor.submit(f).result() == 1
                assert type(executor.submit(lambda: C()).result()) is C
                def g(): return 2
                class C:
                    def m(self): return 2
                assert executor.submit(f).result() == 2
                made = executor.submit(lambda: C()).result()
                assert type(made) is C and made.m() == 2
            print("good")
            """,
        )
        assert said == ["good"]

    def test_tasks_pickle_and_find_what_the_script_defines(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import pickle, sys, typing, forgepar as fp
            class Point(typing.NamedTuple):
                x: "Number"
            Number = int
            def work():
                copy = pickle.loads(pickle.dumps(Point(1)))
                hints = typing.get_type_hints(Point)
                return type(copy) is Point, sys.modules[__name__].Point is Point, hints == {"x": Number}, __name__
            wf = fp.Workflow()
            handle = wf.add(work)
            result = wf.run(workers=1, start_method=sys.argv[1])[handle]
            assert result == (True, True, True, "__main__"), result
            print("good")
            """,
            method,
        )
        assert said == ["good"]


CLASSES = """
import abc, dataclasses, enum, functools, sys, threading, typing, forgepar as fp
class Vec:
    __slots__ = ("x", "__y", "__weakref__")
    def __init__(self, x, y): self.x, self.__y = x, y
    def y(self): return self.__y
@dataclasses.dataclass(slots=True)
class Slotted:
    a: int = 1
    b: list = dataclasses.field(default_factory=list)
@dataclasses.dataclass(frozen=True, slots=True)
class Derived(Slotted.__mro__[1] if False else object):
    a: int
class Sub(Vec):
    __slots__ = ("z",)
class Loose(Vec):
    pass
class Base(abc.ABC):
    registry = []
    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Base.registry.append(cls.__name__)
    @abc.abstractmethod
    def go(self): ...
class Impl(Base):
    def go(self): return super().__init__, 5
class Colour(enum.Enum):
    RED = 1
    def twice(self): return self.value * 2
class Flag(enum.IntFlag):
    A = 1
    B = 2
class Meta(type):
    def __call__(cls, *args): return super().__call__(*args)
class WithMeta(metaclass=Meta):
    n = 20
class Generic(typing.Generic[typing.TypeVar("T")]):
    def __init__(self, v): self.v = v
class Cached:
    made = 0
    @functools.cached_property
    def v(self): return 7
    @functools.lru_cache
    def c(self, x): return x + 1
    @functools.singledispatchmethod
    def d(self, x): return "any"
    @d.register
    def _(self, x: int): return "int"
    @property
    def p(self): return 3
    @classmethod
    def k(cls): return cls.__name__
    @staticmethod
    def s(): return 4
@functools.lru_cache(maxsize=8)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
@functools.cache
def slow(x): return x * 2
@functools.singledispatch
def area(x): return "any"
@area.register
def _(x: int): return fib(x)
@area.register(list)
def _(x): return [area(i) for i in x]
def make():
    cached = Cached()
    return (Vec(1, 2), Slotted(3), Derived(1), Sub(1, 2), Loose(1, 2), Impl(), Colour.RED, Flag.A | Flag.B, WithMeta(),
            Generic(5), cached)
def use(values):
    vec, slotted, derived, sub, loose, impl, colour, flags, meta, generic, cached = values
    try:
        vec.other = 1
        return "slots are lost"
    except AttributeError:
        pass
    return (vec.x, vec.y(), slotted.a, derived.a, sub.y(), loose.x, impl.go()[1], colour.twice(), int(flags), meta.n,
            generic.v, cached.v, cached.c(1), cached.d(1), cached.d("a"), cached.p, cached.k(), cached.s(), fib(15),
            slow(4), area([3, "a"]))
"""


class TestClasses:
    def test_values_of_all_kinds_of_classes_go_and_come_back_as_what_they_are(self, tmp_path, method):
        said = run_script(
            tmp_path,
            CLASSES
            + textwrap.dedent("""
            expected = use(make())
            registry = list(Base.registry)
            wf = fp.Workflow()
            made = wf.add(make)
            used = wf.add(use, made)
            given = wf.add(use, make())
            result = wf.run(workers=2, start_method=sys.argv[1], outputs="all")
            assert result[used] == expected, (result[used], expected)
            assert result[given] == expected
            assert [type(value) for value in result[made]] == [type(value) for value in make()]
            assert use(result[made]) == expected
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as executor:
                values = executor.submit(make).result()
                assert [type(value) for value in values] == [type(value) for value in make()]
                assert executor.submit(use, values).result() == expected
            assert Base.registry == registry, Base.registry
            print("good")
            """),
            method,
        )
        assert said == ["good"]

    def test_reading_a_result_changes_no_class_of_the_caller(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, forgepar as fp
            class Counter:
                n = 10
                names = ["a"]
            def work():
                Counter.n = 999
                Counter.names.append("b")
                Counter.extra = 1
                return Counter()
            Counter.n = 20
            wf = fp.Workflow()
            handle = wf.add(work)
            made = wf.run(workers=1, start_method=sys.argv[1])[handle]
            assert type(made) is Counter
            assert (Counter.n, Counter.names, hasattr(Counter, "extra")) == (20, ["a"], False)
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_inline_runs_the_functions_and_classes_of_the_script_itself(self, tmp_path):
        said = run_script(
            tmp_path,
            """
            import forgepar as fp
            class Point: pass
            def work(): return Point(), globals() is vars(__import__("__main__"))
            wf = fp.Workflow()
            handle = wf.add(work)
            made, is_same = wf.run(backend="inline")[handle]
            assert type(made) is Point and is_same
            print("good")
            """,
        )
        assert said == ["good"]

    @pytest.mark.parametrize(
        ("name", "made", "kind"),
        [
            ("STATE", "threading.Lock()", "lock"),
            ("STATE", "open(__file__)", "TextIOWrapper"),
            ("STATE", "open(__file__, 'rb')", "BufferedReader"),
            ("STATE", "threading.local()", "local"),
            ("STATE", "contextvars.ContextVar('v')", "ContextVar"),
            ("STATE", "(i for i in range(3))", "generator"),
            ("STATE", "socket.socket()", "socket"),
        ],
    )
    def test_what_cannot_travel_is_refused_by_name_before_workers_start(self, tmp_path, name, made, kind):
        said = run_script(
            tmp_path,
            f"""
            import contextvars, multiprocessing, socket, threading, forgepar as fp
            {name} = {made}
            def work(): return inner()
            def inner(): return {name}
            wf = fp.Workflow()
            wf.add(work)
            try:
                wf.run(workers=1)
            except fp.UnpicklableCallable as error:
                assert "global {name!r} of function 'inner'" in str(error) and {kind!r} in str(error), error
            with fp.ForgeExecutor(1) as executor:
                try:
                    executor.submit(work).result()
                except TypeError as error:
                    assert any("global {name!r} of function 'inner'" in note for note in error.__notes__)
                    print("good")
            """,
        )
        assert said == ["good"]

    def test_where_something_hangs_is_told_for_closures_classes_and_arguments(self, tmp_path):
        said = run_script(
            tmp_path,
            """
            import threading, forgepar as fp
            def closing():
                lock = threading.Lock()
                def inner(): return lock
                return inner
            class Holder:
                LOCK = threading.Lock()
            class Instance:
                def __init__(self): self.inner = {"deep": [threading.Lock()]}
            def use_class(): return Holder
            def ignore(x): pass
            def told(fn, *args):
                wf = fp.Workflow()
                wf.add(fn, *args)
                try:
                    wf.run(workers=1)
                except fp.WorkflowError as error:
                    return str(error)
            assert "'lock', which function 'inner' closes over," in told(closing())
            assert "attribute 'LOCK' of class 'Holder'" in told(use_class)
            assert "item 0 of item 'deep' of attribute 'inner' of the Instance" in told(ignore, Instance())
            assert "args[0]" in told(ignore, Instance())
            print("good")
            """,
        )
        assert said == ["good"]


class TestMaking:
    def test_making_a_class_in_a_worker_repeats_nothing_that_its_bases_did(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, forgepar as fp
            class Base:
                known = {}
                def __init_subclass__(cls, name=None, **more):
                    super().__init_subclass__(**more)
                    if name in Base.known:
                        raise RuntimeError(f"{name} registered twice")
                    Base.known[name] = cls
            class A(Base, name="a"): pass
            class B(Base, name="b"): pass
            class Meta(type):
                made = []
                def __new__(meta, name, bases, body):
                    Meta.made.append(name)
                    return super().__new__(meta, name, bases, body)
            class S(metaclass=Meta): pass
            def look(): return sorted(Base.known), A().__class__.__name__, Meta.made, S.__name__
            def subclasses(): return sorted(kind.__name__ for kind in Base.__subclasses__())
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as executor:
                assert executor.submit(look).result() == look(), executor.submit(look).result()
                assert executor.submit(subclasses).result() == ["A", "B"]
                assert executor.submit(look).result() == look()
            assert Meta.made == ["S"] and len(Base.known) == 2
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_what_the_caller_deletes_is_gone(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, forgepar as fp
            X = 1
            class Config:
                size = 1
                def method(self): pass
            def look():
                try: x = X
                except NameError: x = "gone"
                return x, hasattr(Config, "size"), hasattr(Config, "method")
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as pool, fp.WorkflowExecutor(1) as runs:
                def both():
                    wf = fp.Workflow()
                    handle = wf.add(look)
                    return pool.submit(look).result(), runs.run(wf)[handle]
                assert both() == (look(), look())
                del X, Config.size, Config.method
                assert look() == ("gone", False, False)
                assert both() == (look(), look()), both()
            print("good")
            """,
            method,
        )
        assert said == ["good"]


class TestTargets:
    @pytest.mark.parametrize("method", METHODS)
    def test_the_body_of_a_file_runs_once(self, tmp_path, method):
        (tmp_path / "helper.py").write_text("def plus(i): return i + 1\n")
        (tmp_path / "pay.py").write_text(
            textwrap.dedent(
                f"""
                import forgepar as fp, helper
                open("bodies", "a").write("x")
                RATE = 2
                class Bill:
                    __slots__ = ("total",)
                def charge(i):
                    open("charges", "a").write("x")
                    bill = Bill()
                    bill.total = helper.plus(i) * RATE
                    return bill
                def total(bills): return sum(bill.total for bill in bills)
                def flow():
                    wf = fp.Workflow("f")
                    wf.add(total, wf.map(charge, range(2)))
                    return wf
                flow().run(workers=1, start_method={method!r})
                """
            )
        )
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "forgepar", "run", "pay.py:flow", "-w", "2", "--summary"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "bodies").read_text() == "x"
        assert (tmp_path / "charges").read_text() == "xxxx"


class TestWhatTheCallerHasBehindItsNames:
    def test_what_is_assigned_is_assigned_and_what_is_changed_in_place_is_changed_for_all_names(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import functools, sys, forgepar as fp
            LISTED = [1]
            TABLE = {"it": LISTED}
            def default(it=LISTED): return list(it)
            def counted(fn):
                @functools.wraps(fn)
                def inner(): return inner.n, fn()
                inner.n = 0
                return inner
            @counted
            def noted(): return len(LISTED)
            made = {"N": 1}
            exec("def read(): return N", made)
            read = made["read"]
            def told(): return list(LISTED), list(TABLE["it"]), default(), noted(), read()
            def change(n):
                global LISTED
                if n == 0: LISTED = [9]
                elif n == 1: LISTED.append(2)
                elif n == 2: TABLE["it"].append(3)
                elif n == 3: noted.n = 5
                elif n == 4: made["N"] = 2
            method = sys.argv[1]
            with fp.ForgeExecutor(1, start_method=method) as pool, fp.WorkflowExecutor(1, start_method=method) as runs:
                for n in range(-1, 5):
                    change(n)
                    wf = fp.Workflow()
                    handle = wf.add(told)
                    kept = runs.run(wf, store="runs.db", resume=True)[handle]
                    got = pool.submit(told).result(), runs.run(wf)[handle], kept
                    assert got == (told(),) * 3, (n, told(), got)
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_members_of_an_enumeration_have_what_its_constructor_and_the_caller_gave_them(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import enum, sys, forgepar as fp
            class Planet(enum.Enum):
                EARTH = (1, 2)
                def __init__(self, mass, radius): self.mass, self.seen = mass, []
            def told(): return Planet.EARTH.mass, Planet.EARTH.seen
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as pool:
                for mass in (1, 7, 8):
                    Planet.EARTH.mass = mass
                    Planet.EARTH.seen.append(mass)
                    assert pool.submit(told).result() == told(), pool.submit(told).result()
            print("good")
            """,
            method,
        )
        assert said == ["good"]

    def test_a_module_that_the_script_made_is_imported_as_it_is(self, tmp_path, method):
        said = run_script(
            tmp_path,
            """
            import sys, types, forgepar as fp
            settings = sys.modules["made_settings"] = types.ModuleType("made_settings")
            exec("def scaled(x): return x * SCALE", vars(settings))
            def told():
                import made_settings
                return made_settings.SCALE, made_settings.scaled(2), hasattr(made_settings, "extra")
            method = sys.argv[1]
            with fp.ForgeExecutor(1, start_method=method) as pool, fp.WorkflowExecutor(1, start_method=method) as runs:
                for n in range(3):
                    settings.SCALE = n
                    settings.__dict__.pop("extra", None) or settings.__dict__.update(extra=n)
                    wf = fp.Workflow()
                    handle = wf.add(told)
                    got = pool.submit(told).result(), runs.run(wf)[handle]
                    assert got == (told(), told()), (told(), got)
            print("good")
            """,
            method,
        )
        assert said == ["good"]
