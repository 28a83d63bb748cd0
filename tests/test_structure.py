"""Sizes and names: short modules and functions, a small dispatcher, and a class name that stands for one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import forgepar

ROOT = Path(forgepar.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 500
MOST_FUNCTION_LINES = 50  # without the docstring


def lines_of(function):
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    n_docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - n_docstring


def gives_reason(node):
    text = ast.get_docstring(node) or ""
    return "long" in text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short_or_say_why_not(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= MOST_LINES or gives_reason(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert lines_of(node) <= MOST_FUNCTION_LINES or gives_reason(node), node.name


def test_the_dispatcher_is_small():
    tree = ast.parse((ROOT / "engine" / "dispatcher.py").read_text())
    assert tree.body[-1].end_lineno < 350
    attributes = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert len(attributes) < 20


def test_a_class_name_stands_for_one_thing():
    homes = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
