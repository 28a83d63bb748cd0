"""The census example: its measures on snippets with known answers, and one small tree through the engine."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

from forgepar.examples import census

TREE = {
    "alone.py": "import os.path\nfrom shop import till\n\ndef f(x):\n    return x and 1 or 2\n",
    "broken.py": "def f(:\n",
    "shop/__init__.py": "from . import till, missing\nfrom .goods import *\n",
    "shop/till.py": "from .goods import price\nfrom ..out import x\n\nclass Till:\n    def add(self): pass\n",
    "shop/goods.py": "import shop.till as t\nif t:\n    import shop.goods\n",
    "shop/back/__init__.py": "",
    "shop/back/room.py": "def f():\n    from ..till import Till\n    from ... import alone\n",
    "site-packages/hidden.py": "import alone\n",
    "shop/__pycache__/hidden.py": "import alone\n",
    "notes.txt": "no module\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def measure_all(root: Path) -> list[census.Module]:
    base, paths = census.find_modules(root)
    return [census.measure_module(path, base=str(base), count=10) for path in paths]


def complexities(source: str) -> dict[str, int]:
    functions = census.measure_functions(ast.parse(source), "m")
    return {function.name: function.complexity for function in functions}


# Finding.


def test_modules_are_found_below_all_folders_but_the_skipped_largest_first(tree: Path) -> None:
    base, paths = census.find_modules(tree)
    assert base == tree.resolve()
    assert sorted(paths) == sorted(path for path in TREE if path.endswith(".py") and "hidden" not in path)
    sizes = [len(TREE[path]) for path in paths]
    assert sizes == sorted(sizes, reverse=True)


def test_modules_of_equal_size_are_in_order_of_name(tmp_path: Path) -> None:
    for name in "bca":
        (tmp_path / f"{name}.py").write_text("1\n")
    assert census.find_modules(tmp_path)[1] == ["a.py", "b.py", "c.py"]


def test_a_package_as_root_keeps_the_names_of_its_modules(tree: Path) -> None:
    base, paths = census.find_modules(tree / "shop" / "back")
    assert base == tree.resolve()
    assert sorted(paths) == ["shop/back/__init__.py", "shop/back/room.py"]


def test_a_link_back_to_a_folder_around_is_not_followed(tree: Path) -> None:
    found = census.find_modules(tree)
    (tree / "shop" / "loop").symlink_to(tree, target_is_directory=True)
    assert census.find_modules(tree) == found


def test_a_root_that_is_not_a_folder_is_refused_when_declaring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^root must be a folder, got '.*nowhere'\.$"):
        census.find_modules(tmp_path / "nowhere")


def test_a_root_without_modules_is_refused_when_declaring(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"^root must be a folder with \.py files, got '.*'\.$"):
        census.find_modules(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("a.py", "a"), ("a/__init__.py", "a"), ("a/b.py", "a.b"), ("__init__.py", "__init__"), ("py.py", "py")],
)
def test_module_name(path: str, name: str) -> None:
    assert census.module_name(path) == name


# Complexity.


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", 1),
        ("if a: pass", 2),
        ("if a: pass\n  else: pass", 2),
        ("if a: pass\n  elif b: pass\n  else: pass", 3),
        ("if a and b and c: pass", 4),
        ("if a and b or c: pass", 4),
        ("if 0 < a < 9: pass", 2),
        ("return 1 if a else 2", 2),
        ("for x in y: pass\n  else: pass", 2),
        ("while a: pass", 2),
        ("try: pass\n  except A: pass\n  except B: pass\n  finally: pass", 3),
        ("try: pass\n  except* A: pass", 2),
        ("with a: pass", 1),
        ("assert a, b or c", 3),
        ("return [x for x in y]", 2),
        ("return {x: z for x in y if x if z for w in x}", 5),
        ("return sum(x for x in y if x or z)", 4),
        ("return lambda x: x or 1", 2),
        ("match a:\n    case 1: pass\n    case _: pass", 2),
        ("match a:\n    case 1 | 2 | 3: pass\n    case x if x: pass", 5),
        ("match a:\n    case [x] if x and y: pass", 4),
        ("class A:\n    if a: pass", 2),
    ],
)
def test_complexity_of_a_function(body: str, expected: int) -> None:
    assert complexities(f"def f(a):\n  {body}\n") == {"f": expected}


def test_async_functions_count_their_decisions() -> None:
    source = "async def f():\n  async for x in y:\n    async with x: pass\n  return [z async for z in y if z]"
    assert complexities(source) == {"f": 4}


def test_nested_functions_count_for_themselves_under_qualified_names() -> None:
    source = """
class A:
    class B:
        def f(self):
            if self: pass
    @wrap(1 if a else 2)
    def g(self):
        def inner(x=1 or 2):
            class C:
                def h(self): return 1 or 2 or 3
            while x: pass
        return inner
"""
    nested = "A.g.<locals>.inner"
    assert complexities(source) == {"A.B.f": 2, "A.g": 2, nested: 2, f"{nested}.<locals>.C.h": 3}


def test_qualified_names_are_those_of_python() -> None:
    def nested() -> None: ...

    source = Path(__file__).read_bytes()
    names = {function.name for function in census.measure_functions(ast.parse(source), "m")}
    assert nested.__qualname__ in names


def test_code_outside_of_functions_is_no_function() -> None:
    assert complexities("if a and b: pass\nx = [y for y in z]") == {}


def test_nesting_deeper_than_python_recurses_is_measured() -> None:
    chain: ast.expr = ast.Constant(1)
    for _ in range(5000):
        chain = ast.IfExp(chain, ast.Constant(2), ast.Constant(3))
    function = ast.parse("def f(): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [ast.Expr(chain)]
    assert census.measure_functions(function, "m") == [census.Function(5001, "m", "f", 1)]


# One module.


def test_a_module_is_measured(tree: Path) -> None:
    module = census.measure_module("alone.py", base=str(tree), count=10)
    assert module == census.Module(
        path="alone.py",
        n_lines=5,
        complexities=(3,),
        most_complex=[census.Function(3, "alone", "f", 4)],
        imports=("os.path", "shop.till"),
    )


def test_of_many_functions_the_most_complex_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    lines = [f"def f{n}(): return {' or '.join('x' * (n + 1))}" for n in range(5)]
    (tmp_path / "m.py").write_text("\n".join(lines))
    module = census.measure_module("m.py", base=str(tmp_path), count=2)
    assert [function.name for function in module.most_complex] == ["f4", "f3"]
    assert (module.n_lines, module.complexities) == (5, (5, 4, 3, 2, 1))


def test_a_declared_encoding_is_respected(tmp_path: Path) -> None:
    source = "# coding: latin-1\ndef caf\xe9(): pass\n".encode("latin-1")
    (tmp_path / "m.py").write_bytes(source)
    module = census.measure_module("m.py", base=str(tmp_path), count=1)
    assert module.most_complex[0].name == "caf\xe9"


def test_warnings_of_the_parser_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("'\\d'\n")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert census.measure_module("m.py", base=str(tmp_path), count=1) == census.Module("m.py", 1, (), [], ())
    assert shown == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"print 1\n", r"SyntaxError: Missing parentheses.* \(line 1\)"),
        (b"# coding: uft-8\n", r"SyntaxError: unknown encoding: uft-8"),
        (b"x = '\xff'\n", r"SyntaxError: .*utf-8"),
        (b"x = 1\0\n", r"(SyntaxError|ValueError): source code .* null bytes"),
        (b"\tx = 1\n", r"IndentationError: unexpected indent \(line 1\)"),
        (b"x = " + b"(" * 500, r"SyntaxError: too many nested parentheses"),
        (b"x = " + b"-" * 100_000 + b"1", r"(RecursionError|MemoryError): \S"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_reported(tmp_path: Path, source: bytes, reason: str) -> None:
    (tmp_path / "bad.py").write_bytes(source)
    found = census.measure_module("bad.py", base=str(tmp_path), count=1)
    assert found == census.Module("bad.py", error=found.error)
    assert re.match(reason, found.error)


def test_a_file_that_is_gone_is_reported_without_its_place(tmp_path: Path) -> None:
    found = census.measure_module("gone.py", base=str(tmp_path), count=1)
    assert found == census.Module("gone.py", error="FileNotFoundError: No such file or directory")


# Imports.


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("a/b/c.py", "x.y", ["x.y.n"]),
        ("a/b/c.py", ".", ["a.b.n"]),
        ("a/b/c.py", ".d", ["a.b.d.n"]),
        ("a/b/c.py", "..d", ["a.d.n"]),
        ("a/b/c.py", "...d", []),
        ("a/b/__init__.py", ".d", ["a.b.d.n"]),
        ("c.py", ".d", []),
    ],
)
def test_a_relative_import_is_resolved(path: str, source: str, expected: list[str]) -> None:
    assert list(census.find_imports(ast.parse(f"from {source} import n"), path)) == expected


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a, b.c as d
def f():
    if x:
        from e import g, h
try: pass
except A: import i
match x:
    case 1:
        with y: import j
class B:
    from . import k
    import a
"""
    found = census.find_imports(ast.parse(source), "p/m.py")
    assert found == ("a", "b.c", "e.g", "e.h", "i", "j", "p.k")


def test_imports_lead_to_submodules_packages_and_known_parts_of_names(tree: Path) -> None:
    assert census.import_graph(measure_all(tree)) == {
        "alone": ("shop.till",),
        "broken": (),
        "shop": ("shop.goods", "shop.till"),  # and to itself, for `missing`, which is left out
        "shop.back": (),
        "shop.back.room": ("shop.till",),  # three dots lead out of its packages
        "shop.goods": ("shop.till",),
        "shop.till": ("shop.goods",),
    }


def test_what_is_no_module_leads_to_the_longest_known_part() -> None:
    modules = [
        census.Module("os.py"),
        census.Module("m.py", imports=("os.path", "sys.argv")),
    ]
    assert census.import_graph(modules) == {"m": ("os",), "os": ()}


@pytest.mark.parametrize(
    ("graph", "cycles"),
    [
        ({}, []),
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"]}, [("a", "b")]),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}, []),
        ({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"], "e": ["d"]}, [("a", "b", "c"), ("d", "e")]),
        ({"a": ["b"], "b": ["a", "c"], "c": ["b"]}, [("a", "b", "c")]),
        ({"d": ["c"], "c": ["d"], "b": ["a", "c"], "a": ["b", "d"]}, [("a", "b"), ("c", "d")]),
    ],
)
def test_cycles(graph: dict[str, list[str]], cycles: list[tuple[str, ...]]) -> None:
    assert census.strongly_connected(graph) == cycles


def test_a_cycle_longer_than_python_recurses_is_found() -> None:
    n_modules = 5000
    graph = {str(index): [str((index + 1) % n_modules)] for index in range(n_modules)}
    assert [len(cycle) for cycle in census.strongly_connected(graph)] == [n_modules]


# Summaries and the report.


def test_packages_are_added_up(tree: Path) -> None:
    shop, alone, total = ("5", "13", "2", "1.00", "1"), ("1", "5", "1", "3.00", "3"), ("6", "18", "3", "1.67", "3")
    rows = census.summarise_packages(measure_all(tree), count=2)
    assert rows == [("shop", *shop), ("alone", *alone), ("total", *total)]
    rows = census.summarise_packages(measure_all(tree), count=1)
    assert rows == [("shop", *shop), ("1 more", *alone), ("total", *total)]


def test_the_mean_of_no_functions_is_zero() -> None:
    assert census.package_row("p", []) == ("p", "0", "0", "0", "0.00", "0")
    assert census.package_row("p", [census.Module("p.py", 1_000, (2, 3))]) == ("p", "1", "1,000", "2", "2.50", "3")


def test_the_most_complex_functions_of_equal_complexity_are_in_order_of_place(tree: Path) -> None:
    functions = census.most_complex(measure_all(tree), count=2)
    assert functions == [
        census.Function(3, "alone", "f", 4),
        census.Function(1, "shop.back.room", "f", 1),
    ]


def test_no_function_depends_on_the_order_of_the_modules(tree: Path) -> None:
    modules = measure_all(tree)
    for summary in (census.import_graph, census.list_unparsed):
        assert summary(modules) == summary(modules[::-1])
    assert census.summarise_packages(modules, count=1) == census.summarise_packages(modules[::-1], count=1)
    assert census.most_complex(modules, count=3) == census.most_complex(modules[::-1], count=3)


def test_a_table_has_its_first_column_flush_left_and_the_others_flush_right() -> None:
    assert census.table(("name", "n"), [("a", "10"), ("longer", "7")]) == [
        "name     n",
        "------  --",
        "a       10",
        "longer   7",
    ]


REPORT = """\
Census of tree: 7 modules, 6 of them parsed, 6 imports among them

package  modules  lines  functions  mean  max
-------  -------  -----  ---------  ----  ---
shop           5     13          2  1.00    1
alone          1      5          1  3.00    3
total          6     18          3  1.67    3

The most complex functions
function            line  complexity
------------------  ----  ----------
alone:f                4           3
shop.back.room:f       1           1
shop.till:Till.add     5           1

Import cycles: 1
    2 modules: shop.goods, shop.till

Not parsed: 1
  broken.py: SyntaxError: invalid syntax (line 1)"""


def test_the_report(tree: Path) -> None:
    modules = measure_all(tree)
    graph = census.import_graph(modules)
    report = census.render(
        "tree",
        packages=census.summarise_packages(modules, count=10),
        functions=census.most_complex(modules, count=10),
        graph=graph,
        cycles=census.strongly_connected(graph),
        unparsed=census.list_unparsed(modules),
    )
    assert report == REPORT


def test_modules_of_a_cycle_beyond_the_first_are_counted() -> None:
    cycle = [f"p{index}" for index in range(census.N_NAMES + 3)]
    assert census.cycle_line(cycle) == "    7 modules: p0, p1, p2, p3 and 3 more"
    assert census.cycle_line(cycle[:4]) == "    4 modules: p0, p1, p2, p3"


# Through the engine.


def test_the_report_is_the_only_leaf_and_the_same_in_this_process_and_on_two_workers(tree: Path) -> None:
    wf = census.workflow(tree)
    assert [names[-1] for names in wf.execution_layers()][-1] == "render"
    assert wf.run(backend="inline")["render"] == REPORT
    assert wf.run(workers=2)["render"] == REPORT
