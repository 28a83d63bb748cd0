"""What of a function's code counts: what it does and refers to, not how it is written."""

from __future__ import annotations

import functools
import importlib
import operator
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

import forgepar as fp
from forgepar.store.fingerprint import names
from forgepar.store.fingerprint.digester import digest_of
from forgepar.store.fingerprint.merkle import NoDigest
from forgepar.values import modules as libraries


def made(source: str, *, module: str = "made", path: str = "<made>", lines: int = 0) -> dict[str, object]:
    """Run a source as a module that is not imported, some lines further down; return what it defines."""
    scope: dict[str, object] = {"__name__": module, "__file__": path}
    exec(compile("\n" * lines + textwrap.dedent(source), path, "exec", dont_inherit=True), scope)  # noqa: S102
    return scope


def of(source: str, name: str = "f", **how: object) -> bytes:
    return digest_of(made(source, **how)[name]).data


SAME = {
    "comment": ("def f(x):\n    return x + 1", "def f(x):\n    # why\n\n    return x + 1  # one more"),
    "docstring": ("def f(x):\n    x + 1", 'def f(x):\n    """What it does."""\n    x + 1'),
    "other docstring": ('def f(x):\n    "a"\n    return (x, None, 7)', 'def f(x):\n    "b"\n    return (x, None, 7)'),
    "annotation": ("def f(x, *, y=1):\n    return x", "def f(x: int, *, y: 'str' = 1) -> list[int]:\n    return x"),
    "local annotation": ("def f():\n    x = 1\n    return x", "def f():\n    x: int = 1\n    return x"),
    "local name": (
        "def f(a):\n    b = a\n    for c in b:\n        b += c\n    return b",
        "def f(a):\n    zz = a\n    for y in zz:\n        zz += y\n    return zz",
    ),
    "captured name": (
        "def f(x):\n    n = x\n    return lambda: n + 1",
        "def f(x):\n    other = x\n    return lambda: other + 1",
    ),
    "name of the function": ("def g(x):\n    return x\nf = g", "def h(x):\n    return x\nf = h"),
    "layout": (
        "def f(x):\n    return max(x, 1, 2)",
        "def f(x):\n    return max(\n        x,\n        1,\n\n        2,\n    )",
    ),
    "pass": (
        "def f(x):\n    if x:\n        return 1\n    pass\n    return 2",
        "def f(x):\n    if x:\n        return 1\n    return 2",
    ),
    "other function": ("def f(x):\n    return x", "def g():\n    return 7\n\ndef f(x):\n    return x"),
    "future annotations": (
        "def f(x: int):\n    return x",
        "from __future__ import annotations\ndef f(x: int):\n    return x",
    ),
    "docstring of a class within": (
        "def f():\n    class C:\n        x = 1\n    return C",
        "def f():\n\n\n    class C:\n        'What it is.'\n        x = 1\n    return C",
    ),
    "comment in a method": (
        "class C:\n    def m(self):\n        return 1\ndef f(): return C().m()",
        "class C:\n    'Doc.'\n    def m(self) -> int:\n        'Doc.'\n        return 1  # 1\ndef f(): return C().m()",
    ),
    "order in a class": (
        "class C:\n    def m(self): return 1\n    x = 2\nf = C",
        "class C:\n    x = 2\n    def m(self): return 1\nf = C",
    ),
    "global it does not read": ("x = 1\ndef f():\n    return 2", "x = 3\ndef f():\n    return 2"),
    "where it is": ("def f():\n    return __file__", "\n\ndef f():\n    return __file__"),
}

CHANGED = {
    "operator": ("def f(x):\n    return x + 1", "def f(x):\n    return x - 1"),
    "constant": ("def f(x):\n    return x + 1", "def f(x):\n    return x + 2"),
    "type of a constant": ("def f(x):\n    return 1", "def f(x):\n    return True"),
    "sign of nothing": ("def f(x):\n    return 0.0", "def f(x):\n    return -0.0"),
    "set of constants": ("def f(x):\n    return x in {'a', 'b'}", "def f(x):\n    return x in {'a', 'c'}"),
    "comparison": ("def f(x):\n    return x < 1", "def f(x):\n    return x <= 1"),
    "argument's name": ("def f(x):\n    return x", "def f(y):\n    return y"),
    "keyword only": ("def f(x=1):\n    return x", "def f(*, x=1):\n    return x"),
    "arguments swapped": ("def f(x, y):\n    return x - y", "def f(x, y):\n    return y - x"),
    "default": ("def f(x=1):\n    return x", "def f(x=2):\n    return x"),
    "keyword default": ("def f(*, x=1):\n    return x", "def f(*, x=2):\n    return x"),
    "default that changes": ("def f(x=[1]):\n    return x", "def f(x=[2]):\n    return x"),
    "attribute": ("def f(x):\n    return x.real", "def f(x):\n    return x.imag"),
    "method": ("def f(x):\n    return x.upper()", "def f(x):\n    return x.lower()"),
    "builtin": ("def f(x):\n    return min(x)", "def f(x):\n    return max(x)"),
    "target of a jump": (
        "def f(x):\n    while x:\n        x -= 1\n        if x == 3: continue\n        x -= 1\n    return x",
        "def f(x):\n    while x:\n        x -= 1\n        if x == 3: break\n        x -= 1\n    return x",
    ),
    "what is tried": (
        "def f(x):\n    a = x()\n    try:\n        b = x()\n    except OSError:\n        return 1\n    return a, b",
        "def f(x):\n    try:\n        a = x()\n        b = x()\n    except OSError:\n        return 1\n    return a, b",
    ),
    "generator": ("def f(x):\n    return x\n", "def f(x):\n    yield x\n"),
    "coroutine": ("def f(x):\n    return x\n", "async def f(x):\n    return x\n"),
    "global": ("N = 1\ndef f():\n    return N", "N = 2\ndef f():\n    return N"),
    "global in a list": ("N = [1, [2]]\ndef f():\n    return N", "N = [1, [3]]\ndef f():\n    return N"),
    "global function in a dict": (
        "def g(): return 1\nD = {'g': g}\ndef f(): return D['g']()",
        "def g(): return 2\nD = {'g': g}\ndef f(): return D['g']()",
    ),
    "helper": ("def g():\n    return 1\ndef f():\n    return g()", "def g():\n    return 2\ndef f():\n    return g()"),
    "helper of a helper": (
        "def h(): return 1\ndef g(): return h()\ndef f(): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(): return g()",
    ),
    "default of a helper": (
        "def g(x=1): return x\ndef f(): return g()",
        "def g(x=2): return x\ndef f(): return g()",
    ),
    "closure": (
        "def outer(n):\n    def inner(): return n\n    return inner\nf = outer(1)",
        "def outer(n):\n    def inner(): return n\n    return inner\nf = outer(2)",
    ),
    "nested function": (
        "def f():\n    def g(): return 1\n    return g()",
        "def f():\n    def g(): return 2\n    return g()",
    ),
    "global of a nested function": (
        "N = 1\ndef f():\n    def g(): return N\n    return g()",
        "N = 2\ndef f():\n    def g(): return N\n    return g()",
    ),
    "global of a comprehension": (
        "N = 1\ndef f(x): return [N + y for y in x]",
        "N = 2\ndef f(x): return [N + y for y in x]",
    ),
    "comprehension": ("def f(x): return [y + 1 for y in x]", "def f(x): return [y + 2 for y in x]"),
    "global of a generator": (
        "N = 1\ndef f(x): return sum(N + y for y in x)",
        "N = 2\ndef f(x): return sum(N + y for y in x)",
    ),
    "lambda": ("f = lambda x: x + 1", "f = lambda x: x + 2"),
    "lambda that is a default": ("def f(g=lambda: 1): return g()", "def f(g=lambda: 2): return g()"),
    "method of an object": (
        "class C:\n    def m(self): return 1\nc = C()\ndef f(): return c.m()",
        "class C:\n    def m(self): return 2\nc = C()\ndef f(): return c.m()",
    ),
    "state of an object": (
        "class C:\n    def __init__(self, n): self.n = n\nc = C(1)\ndef f(): return c.n",
        "class C:\n    def __init__(self, n): self.n = n\nc = C(2)\ndef f(): return c.n",
    ),
    "class attribute": ("class C:\n    n = 1\ndef f(): return C.n", "class C:\n    n = 2\ndef f(): return C.n"),
    "class method": (
        "class C:\n    @classmethod\n    def m(cls): return 1\ndef f(): return C.m()",
        "class C:\n    @classmethod\n    def m(cls): return 2\ndef f(): return C.m()",
    ),
    "static method": (
        "class C:\n    @staticmethod\n    def m(): return 1\ndef f(): return C.m()",
        "class C:\n    @staticmethod\n    def m(): return 2\ndef f(): return C.m()",
    ),
    "class method or static method": (
        "class C:\n    @classmethod\n    def m(*a): return a\ndef f(): return C.m()",
        "class C:\n    @staticmethod\n    def m(*a): return a\ndef f(): return C.m()",
    ),
    "property": (
        "class C:\n    @property\n    def p(self): return 1\ndef f(): return C().p",
        "class C:\n    @property\n    def p(self): return 2\ndef f(): return C().p",
    ),
    "setter": (
        "class C:\n    def g(self, v): self.v = v\n    p = property(None, g)\ndef f(): return C()",
        "class C:\n    def g(self, v): self.v = -v\n    p = property(None, g)\ndef f(): return C()",
    ),
    "cached property": (
        "import functools\nclass C:\n    @functools.cached_property\n    def p(self): return 1\ndef f(): return C().p",
        "import functools\nclass C:\n    @functools.cached_property\n    def p(self): return 2\ndef f(): return C().p",
    ),
    "base class": (
        "class A:\n    def m(self): return 1\nclass B(A): pass\ndef f(): return B().m()",
        "class A:\n    def m(self): return 2\nclass B(A): pass\ndef f(): return B().m()",
    ),
    "order of the bases": (
        "class A: pass\nclass B: pass\nclass C(A, B): pass\nf = C",
        "class A: pass\nclass B: pass\nclass C(B, A): pass\nf = C",
    ),
    "metaclass": (
        "class M(type):\n    def __call__(cls): return 1\nclass C(metaclass=M): pass\nf = C",
        "class M(type):\n    def __call__(cls): return 2\nclass C(metaclass=M): pass\nf = C",
    ),
    "inner class": (
        "class C:\n    class D:\n        n = 1\ndef f(): return C.D.n",
        "class C:\n    class D:\n        n = 2\ndef f(): return C.D.n",
    ),
    "global of a method": (
        "N = 1\nclass C:\n    def m(self): return N\ndef f(): return C().m()",
        "N = 2\nclass C:\n    def m(self): return N\ndef f(): return C().m()",
    ),
    "dataclass default": (
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\ndef f(): return C()",
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 2\ndef f(): return C()",
    ),
    "dataclass factory": (
        "import dataclasses as d\n@d.dataclass\nclass C:\n    x: int = d.field(default_factory=lambda: 1)\nf = C",
        "import dataclasses as d\n@d.dataclass\nclass C:\n    x: int = d.field(default_factory=lambda: 2)\nf = C",
    ),
    "dataclass field": (
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int\ndef f(): return C(1)",
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    y: int\ndef f(): return C(1)",
    ),
    "dataclass metadata": (
        "from dataclasses import dataclass, field\n@dataclass\nclass C:\n    x: int = field(metadata={'a': 1})\nf = C",
        "from dataclasses import dataclass, field\n@dataclass\nclass C:\n    x: int = field(metadata={'a': 2})\nf = C",
    ),
    "frozen dataclass": (
        "from dataclasses import dataclass\n@dataclass(frozen=False)\nclass C:\n    x: int\nf = C",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C:\n    x: int\nf = C",
    ),
    "member of an enum": (
        "import enum\nclass E(enum.Enum):\n    A = 1\n    B = 2\ndef f(): return E.A",
        "import enum\nclass E(enum.Enum):\n    A = 3\n    B = 2\ndef f(): return E.A",
    ),
    "method of an enum": (
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def m(self): return 1\ndef f(): return E.A.m()",
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def m(self): return 2\ndef f(): return E.A.m()",
    ),
    "text of an enum": (
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def __str__(self): return 'a'\ndef f(): return str(E.A)",
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def __str__(self): return 'b'\ndef f(): return str(E.A)",
    ),
    "named tuple": (
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int = 1\ndef f(): return P()",
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int = 2\ndef f(): return P()",
    ),
    "decorator": (
        """
        import functools
        def twice(g):
            @functools.wraps(g)
            def inner(*a): return g(*a) * 2
            return inner
        @twice
        def f(): return 1
        """,
        """
        import functools
        def twice(g):
            @functools.wraps(g)
            def inner(*a): return g(*a) * 3
            return inner
        @twice
        def f(): return 1
        """,
    ),
    "decorated": (
        "import functools\n@functools.lru_cache\ndef f(): return 1",
        "import functools\n@functools.lru_cache\ndef f(): return 2",
    ),
    "decorated by a library": (
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 1",
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 2",
    ),
    "dispatched": (
        "import functools\n@functools.singledispatch\ndef f(x): return 1\n@f.register(int)\ndef g(x): return 1",
        "import functools\n@functools.singledispatch\ndef f(x): return 1\n@f.register(int)\ndef g(x): return 2",
    ),
    "partial": (
        "import functools\ndef g(x): return x\nf = functools.partial(g, 1)",
        "import functools\ndef g(x): return x\nf = functools.partial(g, 2)",
    ),
    "partial of a changed function": (
        "import functools\ndef g(x): return x\nf = functools.partial(g, 1)",
        "import functools\ndef g(x): return -x\nf = functools.partial(g, 1)",
    ),
    "partial keyword": (
        "import functools\nf = functools.partial(int, base=2)",
        "import functools\nf = functools.partial(int, base=3)",
    ),
    "bound method": (
        "class C:\n    def m(self): return 1\nf = C().m",
        "class C:\n    def m(self): return 2\nf = C().m",
    ),
    "callable object": (
        "class C:\n    def __call__(self): return 1\nf = C()",
        "class C:\n    def __call__(self): return 2\nf = C()",
    ),
    "attribute of the function": (
        "def f(): return f.n\nf.n = 1",
        "def f(): return f.n\nf.n = 2",
    ),
    "task": (
        "import forgepar as fp\n@fp.task\ndef f(): return 1",
        "import forgepar as fp\n@fp.task\ndef f(): return 2",
    ),
    "version of a helper": (
        "import forgepar as fp\n@fp.task(version=1)\ndef g(): return 1\ndef f(): return g()",
        "import forgepar as fp\n@fp.task(version=2)\ndef g(): return 1\ndef f(): return g()",
    ),
    "imported name": (
        "def f():\n    from math import floor as g\n    return g",
        "def f():\n    from math import ceil as g\n    return g",
    ),
    "imported module": (
        "def f():\n    import math as m\n    return m",
        "def f():\n    import cmath as m\n    return m",
    ),
    "names that are looked at": (
        "def f():\n    a = 1\n    return locals()",
        "def f():\n    b = 1\n    return locals()",
    ),
    "recursion": (
        "def f(n): return n and f(n - 1)",
        "def f(n): return n and f(n - 2)",
    ),
    "mutual recursion": (
        "def f(n): return n and g(n - 1)\ndef g(n): return h(n)\ndef h(n): return f(n - 1)",
        "def f(n): return n and g(n - 1)\ndef g(n): return h(n)\ndef h(n): return f(n - 2)",
    ),
    "module of an array function": (
        "import numpy as np\ndef f(x): return np.linalg.norm(x)",
        "import numpy as np\ndef f(x): return np.linalg.det(x)",
    ),
    "pattern": (
        "import re\nP = re.compile('a')\ndef f(x): return P.match(x)",
        "import re\nP = re.compile('b')\ndef f(x): return P.match(x)",
    ),
    "match arguments": (
        "class C:\n    __match_args__ = ('a', 'b')\nf = C",
        "class C:\n    __match_args__ = ('b', 'a')\nf = C",
    ),
    "vectorised": (
        "import numpy as np\ndef g(x): return x\nf = np.vectorize(g)",
        "import numpy as np\ndef g(x): return -x\nf = np.vectorize(g)",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_how_it_is_written_makes_no_difference(case):
    before, after = SAME[case]
    assert of(before) == of(after)


@pytest.mark.parametrize("case", CHANGED)
def test_what_it_does_makes_a_difference(case):
    before, after = CHANGED[case]
    assert of(before) == of(before)
    assert of(before) != of(after)


@pytest.mark.parametrize("case", CHANGED)
def test_neither_place_nor_line_nor_module_makes_a_difference(case):
    source = CHANGED[case][0]
    there = of(source, module="__main__", path="/elsewhere/script.py", lines=300)
    assert of(source) == there


# cloudpickle cannot take these along by value.
PORTABLE = sorted(set(CHANGED) - {"cached property", "decorated", "dispatched"})


@pytest.mark.parametrize("case", PORTABLE)
def test_what_came_by_value_is_the_same(case):
    found = made(CHANGED[case][0])["f"]
    assert digest_of(cloudpickle.loads(cloudpickle.dumps(found))) == digest_of(found)


@pytest.mark.parametrize("case", PORTABLE)
def test_looking_twice_and_pickling_between_makes_no_difference(case):
    found = made(CHANGED[case][0])["f"]
    first = digest_of(found)
    cloudpickle.dumps(found)
    assert digest_of(found) == first


# Code that ran


def hot(x):
    total = 0
    for i in range(x):
        total += i * 2 if i % 3 else len(str(i))
    return total, [y + 1 for y in range(3)], {"a": 1}["a"]


def test_code_that_ran_hot_is_the_same():
    before = digest_of(types.FunctionType(hot.__code__.replace(), hot.__globals__))
    for _ in range(200):
        hot(50)
    assert digest_of(hot) == before
    assert digest_of(types.FunctionType(hot.__code__, hot.__globals__)) == before


def test_code_that_is_traced_is_the_same():
    before = digest_of(hot)
    seen = []

    def trace(frame, event, arg):
        seen.append(event)
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        hot(3)
        during = digest_of(hot)
    finally:
        sys.settrace(old)
    assert "line" in seen
    assert during == before == digest_of(hot)


def test_asserts_that_are_compiled_away_make_a_difference():
    source = "def f(x):\n    assert x\n    return x"
    scopes = []
    for level in (0, 1, 2):
        scope = {"__name__": "made"}
        exec(compile(source, "made", "exec", optimize=level, dont_inherit=True), scope)  # noqa: S102
        scopes.append(digest_of(scope["f"]))
    assert scopes[0] != scopes[1] == scopes[2]


# Imported modules


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to import from; what was imported there is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(sys.modules)
    libraries.is_users.cache_clear()
    yield tmp_path
    libraries.is_users.cache_clear()
    for name in [name for name in sys.modules if sys.modules[name] is not before.get(name)]:
        del sys.modules[name]


def write(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
    importlib.invalidate_caches()


def imported(folder: Path, name: str = "dg_flow", **sources: str) -> object:
    """Import a module afresh from what is written, and return its ``f``."""
    for module in [module for module in sys.modules if module.startswith("dg_")]:
        del sys.modules[module]
    write(folder, **sources)
    sys.dont_write_bytecode, old = True, sys.dont_write_bytecode
    try:
        return importlib.import_module(name).f
    finally:
        sys.dont_write_bytecode = old


MODULE_CASES = {
    "function of a module": "import dg_helpers\ndef f(): return dg_helpers.g()",
    "function by name": "from dg_helpers import g\ndef f(): return g()",
    "import within": "def f():\n    import dg_helpers\n    return dg_helpers.g()",
    "name imported within": "def f():\n    from dg_helpers import g\n    return g()",
    "looked up by name": "import dg_helpers\ndef f(name): return getattr(dg_helpers, name)()",
    "module handed on": "import dg_helpers\ndef f():\n    m = dg_helpers\n    return m.g()",
    "all of a module": "from dg_helpers import *\ndef f(): return eval('g()')",
    "module in a dict": "import dg_helpers\nM = {'m': dg_helpers}\ndef f(): return M['m'].g()",
    "module as a default": "import dg_helpers\ndef f(m=dg_helpers): return m.g()",
}


@pytest.mark.parametrize("case", MODULE_CASES)
@pytest.mark.parametrize("level", [0, 1])
def test_a_change_in_another_module_counts_and_a_comment_there_does_not(folder, case, level):
    helpers = {"dg_helpers": "from dg_deeper import h\ndef g(): return h() + 1", "dg_deeper": "def h(): return 1"}
    changed = dict(helpers)
    name = list(helpers)[level]
    changed[name] = helpers[name].replace("1", "2")
    commented = {name: f"# said\n\n{source}  # more\n" for name, source in helpers.items()}
    flow = MODULE_CASES[case]
    first = digest_of(imported(folder, dg_flow=flow, **helpers))
    assert digest_of(imported(folder, dg_flow=flow, **commented)) == first
    assert digest_of(imported(folder, dg_flow=flow, **changed)) != first


@pytest.mark.parametrize("attribute", ["__firstlineno__", "__static_attributes__", "__slotnames__"])
def test_what_python_or_pickle_writes_into_a_class_counts_for_nothing(tmp_path, monkeypatch, attribute):
    name = f"written_{attribute.strip('_')}"
    text = "class Point:\n    scale = 2\n    def move(self):\n        self.x = self.scale\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    use = made(f"def use():\n    from {name} import Point\n    return Point")["use"]
    before = digest_of(use)
    point = importlib.import_module(name).Point
    try:
        assert digest_of(use) == before
        setattr(point, attribute, ())
        assert digest_of(use) == before
        point.scale = 3
        assert digest_of(use) != before
    finally:
        del sys.modules[name]


def test_imports_within_count_the_same_whether_imported_or_not(folder):
    flow = "def f():\n    from dg_pack.sub import g\n    return g()"
    pack = {"__init__": "", "sub": "from . import deep\ndef g(): return deep.n", "deep": "n = 1"}
    found = imported(folder, dg_flow=flow, **{f"dg_pack/{name}": text for name, text in pack.items()})
    assert not any(name.startswith("dg_pack") for name in sys.modules)
    before = digest_of(found)
    assert not any(name.startswith("dg_pack") for name in sys.modules)
    assert found() == 1
    assert digest_of(found) == before
    write(folder, **{"dg_pack/deep": "n = 2"})
    assert digest_of(found) != before


def test_a_module_that_is_not_there_counts_until_it_is(folder):
    found = imported(folder, dg_flow="def f():\n    try:\n        import dg_extra\n    except ImportError: return 0")
    before = digest_of(found)
    assert digest_of(found) == before
    write(folder, dg_extra="x = 1")
    assert digest_of(found) != before


def test_modules_that_import_each_other_end(folder):
    flow = "import dg_a\ndef f(name): return getattr(dg_a, name)"
    first = digest_of(imported(folder, dg_flow=flow, dg_a="import dg_b", dg_b="import dg_a\nx = 1"))
    assert digest_of(imported(folder, dg_flow=flow, dg_a="import dg_b", dg_b="import dg_a\nx = 2")) != first


def test_a_module_named_as_one_of_pythons_is_the_users(folder):
    flow = "import colorsys\ndef f(): return colorsys.g()"
    sys.modules.pop("colorsys", None)
    first = digest_of(imported(folder, dg_flow=flow, colorsys="def g(): return 1"))
    sys.modules.pop("colorsys", None)
    assert digest_of(imported(folder, dg_flow=flow, colorsys="def g(): return 2")) != first


def test_a_module_that_a_program_made_is_the_users(monkeypatch):
    digests = set()
    for n in (1, 2):
        module = types.ModuleType("dg_made")
        monkeypatch.setitem(sys.modules, "dg_made", module)
        exec(f"def g(): return {n}", vars(module))  # noqa: S102
        digests.add(digest_of(module.g))
    assert len(digests) == 2


def test_a_broken_module_counts_by_its_text(folder):
    found = imported(folder, dg_flow="def f():\n    import dg_broken", dg_broken="def (:")
    before = digest_of(found)
    write(folder, dg_broken="def (: #")
    assert digest_of(found) != before


# Libraries


def test_of_a_library_the_name_counts_and_the_release(monkeypatch):
    import colorsys

    before = digest_of(colorsys.rgb_to_hls)
    assert digest_of(colorsys.rgb_to_hsv) != before
    twin = types.FunctionType((lambda: 1).__code__.replace(co_qualname="rgb_to_hls"), vars(colorsys), "rgb_to_hls")
    assert digest_of(twin) == before
    monkeypatch.setattr(names, "release_of", lambda module: "another")
    assert digest_of(colorsys.rgb_to_hls) != before


def test_the_release_of_forgepar_does_not_count(monkeypatch):
    from forgepar import version

    before = digest_of(fp.Workflow), digest_of(fp.shell)
    monkeypatch.setattr(version, "__version__", "99")
    monkeypatch.setattr(fp, "__version__", "99")
    assert (digest_of(fp.Workflow), digest_of(fp.shell)) == before


# Classes that are not what they say


def test_classes_that_a_library_makes_are_told_apart():
    from dataclasses import make_dataclass

    assert digest_of(make_dataclass("P", [("x", int, 1)])) != digest_of(make_dataclass("P", [("x", int, 2)]))
    one, two = (types.new_class("K", (), {}, lambda scope, n=n: scope.update(n=n)) for n in (1, 2))
    assert digest_of(one) != digest_of(two)


def test_using_a_class_makes_no_difference():
    scope = made(
        """
        import abc, enum, dataclasses, typing
        class Slotted:
            __slots__ = ("a",)
        @dataclasses.dataclass
        class Data:
            a: int = 0
        class Base(abc.ABC):
            @abc.abstractmethod
            def m(self): ...
        class Derived(Base):
            def m(self): return 1
        class Colour(enum.Flag):
            RED = enum.auto()
            BLUE = enum.auto()
        T = typing.TypeVar("T")
        class Box(typing.Generic[T]):
            def __init__(self, x=None): self.x = x
        """
    )
    kinds = [scope[name] for name in ("Slotted", "Data", "Base", "Derived", "Colour", "Box")]
    before = [digest_of(kind) for kind in kinds]
    used = scope["Slotted"]()
    used.a = 1
    values = [used, scope["Data"](), scope["Derived"](), scope["Box"][int](3)]
    for value in values:
        digest_of(value)
        cloudpickle.dumps(value)
    assert isinstance(values[2], scope["Base"])
    assert scope["Colour"].RED | scope["Colour"].BLUE in scope["Colour"].RED | scope["Colour"].BLUE
    assert [digest_of(kind) for kind in kinds] == before


# Callables that are not functions


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (len, abs),
        (str.upper, str.lower),
        ("a".upper, "b".upper),
        ("a".upper, "a".lower),
        ([1].count, [2].count),
        (dict.fromkeys, dict.get),
        (operator.itemgetter(1), operator.itemgetter(2)),
        (operator.attrgetter("a"), operator.attrgetter("b")),
        (operator.methodcaller("a", 1), operator.methodcaller("a", 2)),
        (np.add, np.subtract),
        (np.add.reduce, np.add.accumulate),
        (np.mean, np.median),
        (np.linalg.norm, np.linalg.det),
        (int, float),
        ((1).__add__, (2).__add__),
        (np.array([1]).sum, np.array([2]).sum),
        (functools.partial(int, base=2), functools.partial(int, base=3)),
        (list[int], list[str]),
        (int | str, int | bytes),
        (threading, subprocess),
        (property(len), property(abs)),
        (fp.shell("a {x}"), fp.shell("b {x}")),
        (fp.shell("a {x}", x=1), fp.shell("a {x}", x=2)),
    ],
)
def test_callables_of_other_kinds(one, other):
    assert digest_of(one) == digest_of(one)
    assert digest_of(one) != digest_of(other)


def test_two_that_are_made_of_python_functions_are_not_taken_for_each_other():
    with pytest.raises(NoDigest, match=r"numpy\.ufunc cannot be compared"):
        digest_of(np.frompyfunc(lambda x: x, 1, 1))


def test_calling_what_is_vectorised_makes_no_difference():
    found = np.vectorize(lambda x: x + 1)
    before = digest_of(found)
    found([1, 2])
    assert digest_of(found) == before


def test_dispatching_makes_no_difference():
    scope = made(CHANGED["dispatched"][0])
    before = digest_of(scope["f"])
    scope["f"](1.5), scope["f"](True)
    assert digest_of(scope["f"]) == before


def test_a_logger_of_another_name_makes_no_difference():
    source = "import logging\nlog = logging.getLogger(__name__)\ndef f(): log.info('x')"
    assert of(source, module="__main__") == of(source, module="flow")


def test_the_environment_does_not_count(monkeypatch):
    source = "from os import environ\ndef f(): return environ['HOME']"
    before = of(source)
    monkeypatch.setenv("SOMETHING", "else")
    assert of(source) == before


# What cannot be compared


LOCKED = "import threading\nLOCK = threading.Lock()\ndef f():\n    with LOCK: return 1"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOCKED, r"its global 'LOCK': a _thread\.lock cannot be compared"),
        (LOCKED + "\ng = f\ndef f(): return g()", r"its global 'g': its global 'LOCK': a _thread\.lock"),
        ("import threading\ndef f(x=threading.Lock()): return x", r"its defaults: a _thread\.lock"),
        ("x = (i for i in 'a')\ndef f(): return x", "its global 'x': a generator"),
        (
            "import threading\nclass C:\n    lock = threading.Lock()\nf = C",
            "the attribute 'lock' of class C: a _thread",
        ),
        ("import threading\nD = {'k': [threading.Lock()]}\ndef f(): return D", "its global 'D': its 'k': a _thread"),
        (
            "def o(x):\n    def f(): return x\n    return f\nf = o(i for i in 'a')",
            "its closure variable 'x': a generator",
        ),
        ("def f(): return eval('1')", r"its whole module, which eval\(\) may use"),
    ],
)
def test_what_cannot_be_compared_is_named(source, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "dg_nowhere", types.ModuleType("dg_nowhere"))
    with pytest.raises(NoDigest, match=reason):
        of(source, module="dg_nowhere")


def test_a_version_stands_for_what_cannot_be_compared_and_for_nothing_else():
    scope, other = made(LOCKED), made(LOCKED.replace("return 1", "return 2"))
    assert digest_of(scope["f"], is_vouched=True) == digest_of(made(LOCKED)["f"], is_vouched=True)
    assert digest_of(scope["f"], is_vouched=True) != digest_of(other["f"], is_vouched=True)


def test_a_helper_with_a_version_vouches_for_itself_alone():
    helper = "import forgepar as fp\n" + LOCKED.replace("def f", "@fp.task(version=1)\ndef g")
    assert of(helper + "\ndef f(): return g()") == of(helper + "\ndef f(): return g()")
    with pytest.raises(NoDigest, match="its global 'LOCK'"):
        of(helper + "\ndef f():\n    LOCK\n    return g()")


# The context


@pytest.mark.parametrize(
    ("source", "asks"),
    [
        ("import forgepar as fp\ndef f(): return fp.context().rng()", True),
        ("from forgepar import context\ndef f(): return context()", True),
        ("from forgepar import context\ndef g(): return context()\ndef f(): return g()", True),
        ("import forgepar.workflow.context\ndef f(): return forgepar.workflow.context.context()", True),
        ("from forgepar.workflow import context\ndef f(): return context.context()", True),
        ("import forgepar as fp\ndef f(): return getattr(fp, 'context')()", True),
        ("def f():\n    from forgepar import context\n    return context()", True),
        ("def f():\n    import forgepar.workflow.context as c\n    return c.context()", True),
        ("import forgepar as fp\ndef f(): return fp.empty(3)", False),
        ("import forgepar as fp\n@fp.task\ndef f(): return 1", False),
        ("def context(): return 1\ndef f(): return context()", False),
    ],
)
def test_who_asks_for_the_context_is_known(source, asks):
    assert digest_of(made(source)["f"]).asks_context is asks


# What libraries share


@pytest.mark.parametrize(
    "source",
    [
        "from random import choice\ndef f(x): return choice(x)",
        "from random import random\ndef f(x): return random()",
        "from numpy.random import rand\ndef f(x): return rand()",
        "import random\nR = random._inst\ndef f(x): return R",
        "from os import environ\ndef f(x): return environ",
    ],
)
def test_what_all_share_counts_by_its_name(source, monkeypatch):
    import random

    before = of(source)
    random.random()
    np.random.rand()
    monkeypatch.setenv("SOMETHING", "else")
    assert of(source) == before


def test_a_source_of_random_numbers_of_ones_own_counts():
    for made_by in ("random.Random({})", "np.random.RandomState({})", "np.random.default_rng({})"):
        source = f"import random\nimport numpy as np\nR = {made_by}\ndef f(): return R"
        assert of(source.format(1)) == of(source.format(1)) != of(source.format(2))


def test_an_object_that_a_library_has_under_its_name_counts_by_that(monkeypatch):
    import decimal

    source = "from decimal import {0}\ndef f(): return {0}"
    before = of(source.format("DefaultContext"))
    assert of(source.format("BasicContext")) != before
    monkeypatch.setattr(decimal.DefaultContext, "prec", 99)
    assert of(source.format("DefaultContext")) == before
    assert of("from decimal import DefaultContext as D\ndef f(): return D") != before  # its content is what is known
