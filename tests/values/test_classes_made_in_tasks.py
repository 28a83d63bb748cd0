"""Classes that a task defines in a function are, in the caller, what they are in the task."""

from __future__ import annotations

import textwrap

import pytest
from test_namespaces import run_script

METHODS = ["forkserver", "spawn", "fork"]

SCRIPT = """
    import abc, dataclasses, enum, sys, typing
    import forgepar as fp

    def plain(n):
        shared = [n]
        class A:
            names = ["a"]
            class Inner:
                def __init__(self): self.z = 7
            def __init__(self): self.x = n
            def total(self): return shared[0] + self.x
            @property
            def tenfold(self): return n * 10
            @classmethod
            def named(cls): return cls.__qualname__, n
        class B(A):
            def total(self): return super().total() * 100
        one = A()
        one.inner = A.Inner()
        return one, B()

    def told_of_plain(pair):
        one, other = pair
        return one.x, one.total(), one.tenfold, one.named(), one.names, one.inner.z, other.total(), repr(type(other))

    def data(n):
        @dataclasses.dataclass
        class P:
            x: int
            y: list = dataclasses.field(default_factory=list)
        @dataclasses.dataclass(frozen=True, slots=True)
        class Q:
            x: int
        class T(typing.NamedTuple):
            a: int
            b: int = 2
        class S:
            __slots__ = ("x", "__dict__")
            def __init__(self): self.x, self.y = n, n + 1
            def both(self): return self.x, self.y
        return P(n), Q(n), T(n), S(), {Q(n): n}

    def told_of_data(made):
        p, q, t, s, d = made
        return repr((p, q, t)), t.b, s.both(), d[q], hash(q) == hash(type(q)(q.x))

    def enumeration(n):
        class Colour(enum.Enum):
            RED = 1
            BLUE = n + 5
            def twice(self): return self.value * 2
        class Flags(enum.Flag):
            A = 1
            B = 2
            def told(self): return "told"
        return Colour.BLUE, Flags.A | Flags.B, {Colour.RED: n}

    def told_of_enumeration(made):
        blue, both, keys = made
        return str(blue), blue.twice(), str(both), both.told(), keys[type(blue).RED]

    def error(n):
        class Failed(Exception):
            code = 5
            def __init__(self, message):
                super().__init__(message)
                self.detail = [n]
            def told(self): return self.detail, self.code
        return [Failed("no")]

    def told_of_error(made):
        return made[0].args, made[0].told(), repr(type(made[0]))

    def special(n):
        class Meta(type):
            def __call__(cls, *a):
                made = super().__call__(*a)
                made.mark = n
                return made
        class W(metaclass=Meta):
            def told(self): return self.mark
        class Base(abc.ABC):
            @abc.abstractmethod
            def told(self): ...
        class Whole(Base):
            def told(self): return n + 1
        class State:
            def __init__(self): self.x = n
            def __getstate__(self): return {"kept": self.x}
            def __setstate__(self, state): self.x = state["kept"]
            def told(self): return self.x
        return W(), Whole(), State()

    def told_of_special(made):
        return [one.told() for one in made], isinstance(made[1], type(made[1]).__mro__[1])

    KINDS = [
        (plain, told_of_plain), (data, told_of_data), (enumeration, told_of_enumeration), (error, told_of_error),
        (special, told_of_special),
    ]

    if __name__ == "__main__":
        method = sys.argv[1]
        with (
            fp.WorkflowExecutor(workers=1, start_method=method) as runs,
            fp.ForgeExecutor(1, start_method=method) as pool,
        ):
            for make, told in KINDS:
                for n in (1, 2):
                    wf = fp.Workflow()
                    made = wf.add(make, n)
                    there = wf.add(told, made)
                    expected = told(make(n))
                    result = runs.run(wf, outputs="all")
                    assert told(result[made]) == expected, (make, told(result[made]), expected)
                    assert result[there] == expected, (make, result[there], expected)
                    assert told(pool.submit(make, n).result()) == expected, make
                    back = pool.submit(told, pool.submit(make, n).result()).result()
                    assert back == expected, (make, back, expected)
        print("alike")
"""


@pytest.mark.parametrize("method", METHODS)
def test_instances_of_classes_that_a_task_of_a_script_defines_are_whole_in_the_caller(tmp_path, method):
    assert run_script(tmp_path, SCRIPT, method) == ["alike"]


@pytest.mark.parametrize("method", METHODS)
def test_instances_of_classes_that_a_task_of_a_module_defines_are_whole_in_the_caller(tmp_path, method):
    head, main = SCRIPT.split('    if __name__ == "__main__":\n')
    (tmp_path / "made_in_tasks.py").write_text(textwrap.dedent(head))
    script = f"""    import sys
    import forgepar as fp
    from made_in_tasks import KINDS
    if __name__ == "__main__":
{main}"""
    assert run_script(tmp_path, script, method) == ["alike"]
