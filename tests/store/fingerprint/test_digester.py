"""Digests are the same in every process: whatever the hash seed, the order of imports, or the way a script is run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from forgepar.store.fingerprint.digester import ATOMS, Digests, atoms_data, digest_of

HELPERS = """
    import logging

    log = logging.getLogger(__name__)
    LIMITS = {"low": 1, "high": {2, 3}}

    def scale(x):
        log.debug("scaling")
        return x * LIMITS["low"] if x in {"a", "b", "c", "d"} else frozenset(LIMITS["high"])

    class Base:
        names = {"p", "q", "r", "s"}

        def even(self, n):
            return n == 0 or self.odd(n - 1)

        def odd(self, n):
            return n != 0 and Base.even(self, n - 1)
"""

FLOW = """
    from __future__ import annotations

    import dataclasses
    import enum
    import functools
    import re
    import typing
    from pathlib import Path

    import numpy as np

    import forgepar as fp
    import helpers
    from helpers import Base, scale

    WORDS = {"x", "y", "z", "w"}
    PATTERN = re.compile("[a-z]+")
    TABLE = {word: len(word) for word in ("a", "b")}

    class Kind(enum.Flag):
        ONE = enum.auto()
        TWO = enum.auto()

    @dataclasses.dataclass(order=True)
    class Record:
        a: int
        b: set = dataclasses.field(default_factory=set)
        kind: Kind = Kind.ONE | Kind.TWO

        def reach(self):
            return self.a, self.b, self.kind

    class Pair(typing.NamedTuple):
        left: int
        right: str = "r"

    class Derived(Base):
        __slots__ = ("one", "two")

        @property
        def both(self):
            return self.one, self.two

        @classmethod
        def make(cls):
            return cls()

        def __init__(self):
            self.one = self.two = self.three = 0

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    def words(x):
        return x in WORDS, x in {"one", "two", "three", "four"}, TABLE, PATTERN.match(x)

    def modules(x):
        return helpers.scale(x), scale(x), np.linalg.norm(x), helpers.Base.names

    def lazily(x):
        import helpers as h
        from os import path

        return h.scale(path.join(x))

    def classes():
        class Local:
            "What it is."

            names = {"k", "l", "m"}

            def __init__(self):
                self.alpha = self.beta = self.gamma = self.delta = 1

        return Local(), Record(1), Pair(1), Derived.make()

    def closing(n, names):
        def inner(x):
            return x + n, names, inner
        return inner

    @functools.lru_cache(maxsize=3)
    def cached(x):
        return words(x)

    @functools.singledispatch
    def general(x):
        return 0

    @general.register
    def _(x: str):
        return words(x)

    @fp.task(retries=2, version=1)
    def task(x):
        return Record(x).reach(), cached(x)

    VALUES = {
        "even": even,
        "odd": odd,
        "words": words,
        "modules": modules,
        "lazily": lazily,
        "classes": classes,
        "closing": closing(1, {"n", "m", frozenset({"o", "p"})}),
        "cached": cached,
        "general": general,
        "task": task,
        "partial": functools.partial(task, {"t", "u", "v"}),
        "lambda": lambda *x: sorted(WORDS) + list(x),
        "method": Derived().even,
        "record": Record(1, {"i", "j", "k"}),
        "pair": Pair(2),
        "kind": Kind.TWO,
        "kinds": [Kind, Record, Pair, Derived],
        "sets": [{("a", 1), ("b", 2)}, {frozenset({"a", "b"}), "c", None}],
        "dict": {"a": WORDS, "b": (1, [2, {3.0}])},
        "array": np.array([WORDS, "x", None], object),
        "fold": [(1, (2, 3)), (1, (2, 3))],
        "path": Path("a") / "b",
        "shell": fp.shell("sort {x}", x=["a"]),
        "module": helpers,
    }

    def workflow():
        from forgepar.store.fingerprint.digester import digest_of

        for name, value in VALUES.items():
            digest = digest_of(value)
            assert digest_of(value) == digest
            print(name, digest.data.hex(), digest.asks_context)
        wf = fp.Workflow()
        wf.add(abs, 1)
        return wf

    if __name__ == "__main__":
        workflow()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("flow")
    (found / "helpers.py").write_text(textwrap.dedent(HELPERS))
    (found / "flow.py").write_text(textwrap.dedent(FLOW))
    return found


def digests(folder, *arguments: str, seed: str = "0", **env: str) -> dict[str, str]:
    """Run Python and return what it prints: names and digests."""
    known = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1", **env}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=known, cwd=folder, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    return dict(line.split(" ", 1) for line in lines)


@pytest.fixture(scope="module")
def as_script(folder):
    return digests(folder, "flow.py")


def test_all_have_a_digest_of_their_own(as_script):
    n_values = sum(line.startswith('        "') for line in FLOW.partition("VALUES = ")[2].splitlines())
    assert len(as_script) == len(set(as_script.values())) == n_values > 20
    assert [name for name, text in as_script.items() if text.endswith("True")] == []


@pytest.mark.parametrize("seed", ["1", "12345"])
def test_the_hash_seed_makes_no_difference(folder, as_script, seed):
    assert digests(folder, "flow.py", seed=seed) == as_script


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import flow; flow.workflow()"],
        ["-c", "import helpers, pandas, concurrent.futures, flow; flow.workflow()"],
        ["-m", "flow"],
        ["-m", "forgepar", "layers", "flow.py:workflow"],
        ["-m", "forgepar", "layers", "flow:workflow"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_the_way_it_is_run_makes_no_difference(folder, as_script, arguments):
    assert digests(folder, *arguments, seed="random") == as_script


def test_compiled_files_make_no_difference(folder, as_script):
    env = {"PYTHONPYCACHEPREFIX": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(2):
        assert digests(folder, "-c", "import flow; flow.workflow()", **env) == as_script
    assert list((folder / "cache").rglob("flow*.pyc"))


def test_without_docstrings_all_is_the_same(folder, as_script):
    assert digests(folder, "-OO", "flow.py") == as_script


def test_another_folder_and_other_lines_make_no_difference(folder, as_script, tmp_path):
    (tmp_path / "helpers.py").write_text("# Moved.\n\n" + textwrap.dedent(HELPERS))
    moved = (
        textwrap.dedent(FLOW).replace("def even(n):", "# Moved.\n\ndef even(n):").replace("\n\nclass", "\n\n\n\nclass")
    )
    (tmp_path / "renamed.py").write_text(moved)
    assert digests(tmp_path, "renamed.py") == as_script


def test_what_comes_back_from_a_worker_is_the_same(folder, as_script):
    lines = (
        "import cloudpickle, flow, sys, helpers, types; from forgepar.store.fingerprint.digester import digest_of;"
        "cloudpickle.register_pickle_by_value(flow);"
        "print(cloudpickle.dumps({n: v for n, v in flow.VALUES.items() if n not in ('cached', 'general', 'module')})"
        ".hex())"
    )
    # Those that call `cached` cannot travel by value, as cloudpickle takes what caches by name; it also puts the slots
    # of an object whose class travels by value into its dict.
    lines = lines.replace("'module')", "'module', 'task', 'partial', 'method')")
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=folder, check=True)
    (folder / "values.hex").write_text(done.stdout)
    found = digests(
        folder,
        "-c",
        "import sys, pickle; from forgepar.store.fingerprint.digester import digest_of\n"
        "values = pickle.loads(bytes.fromhex(open('values.hex').read()))\n"
        "assert 'flow' not in sys.modules\n"
        "sys.modules['flow'] = None\n"
        "for name, value in values.items(): print(name, digest_of(value).data.hex(), False)",
    )
    assert len(found) > 15
    assert found == {name: as_script[name] for name in found}


def test_atoms_are_told_apart():
    values = [None, True, 1, 1.0, 1 + 0j, "1", b"1", 0.0, -0.0, 2**100, "\udcff"]
    assert set(map(type, values)) == ATOMS
    assert len({atoms_data([value]) for value in values}) == len(values)
    assert len({atoms_data(part) for part in ([], [1], [1, 1], [1, 2], ["1", "2"], ["12"])}) == 6


def test_those_that_are_kept_are_the_same_as_those_that_are_not():
    def f(n):
        return g(n)

    def g(n):
        return f(n) + len(names)

    names = {"a", "b"}
    together = Digests()
    for value in (g, f, [f, g], (g, names)):
        assert together.of(value) == digest_of(value)
        assert together.of(value, is_vouched=True).data == digest_of(value, is_vouched=True).data
    assert digest_of(f) != digest_of(g)
    names.add("c")
    assert digest_of(f) != together.of(f)  # as it was when it was first looked at


def test_large_graphs_take_no_recursion():
    lines = ["def f0(n): return n"] + [f"def f{i}(n): return f{i - 1}(n) + f{(i * 7) % i}(n)" for i in range(1, 1500)]
    scope = {"__name__": "made"}
    exec("\n".join(lines), scope)  # noqa: S102
    assert digest_of(scope["f1499"]) != digest_of(scope["f1498"])
