"""Types of a user's program, as mypy and pyright tell them; and what runs with an argument of a wrong name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forgepar as fp
from forgepar.engine.run_options import RunOptions

PROGRAM = Path(__file__).parent / "typed" / "program.py"
LINES = PROGRAM.read_text().splitlines()
TYPES = {i: line.partition("  # ")[2] for i, line in enumerate(LINES, 1) if "reveal_type(" in line}
ERRORS = {i for i, line in enumerate(LINES, 1) if line.endswith("# error")}


def told(*command: str) -> str:
    """Return what a type checker prints of the program."""
    pytest.importorskip(command[0])
    done = subprocess.run(
        [sys.executable, "-m", *command, str(PROGRAM)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr  # it found the errors
    return done.stdout


def plain(name: str) -> str:
    """Return a type without the modules in it."""
    return re.sub(r"\b\w+\.(?=\w)", "", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "revealed", "error"),
    [
        (("mypy", "--strict"), r'program\.py:(\d+): note: Revealed type is "(.*)"', r"program\.py:(\d+): error: "),
        (
            ("pyright",),
            r'program\.py:(\d+):\d+ - information: Type of ".*" is "(.*)"',
            r"program\.py:(\d+):\d+ - error: ",
        ),
    ],
    ids=["mypy", "pyright"],
)
def test_type_checkers_infer_types_of_values_and_refuse_wrong_arguments(command, revealed, error):
    output = told(*command)
    assert {int(line): plain(name) for line, name in re.findall(revealed, output)} == TYPES
    assert {int(line) for line in re.findall(error, output)} == ERRORS


def test_the_program_asks_for_types_and_has_errors():
    assert len(TYPES) >= 15
    assert len(ERRORS) >= 7
    assert (Path(fp.__file__).parent / "py.typed").exists()


def test_options_of_a_run_are_those_of_an_executor_and_of_its_run():
    parameters = {
        **inspect.signature(fp.WorkflowExecutor).parameters,
        **inspect.signature(fp.WorkflowExecutor.run).parameters,
    }
    expected = {name: p.annotation for name, p in parameters.items() if name not in ("self", "workflow")}
    assert {name: kind.__forward_arg__ for name, kind in RunOptions.__annotations__.items()} == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda wf: wf.run(worker=2),
            r"Workflow.run\(\) got an unexpected keyword argument 'worker'. Did you mean workers=\?",
        ),
        (lambda wf: wf.run(failfast=True), r"Did you mean fail_fast=\?"),
        (
            lambda wf: wf.run(n_jobs=2),
            r"got an unexpected keyword argument 'n_jobs'. Valid arguments are audit, backend, ",
        ),
        (
            lambda _: fp.WorkflowExecutor(worker=2),
            r"WorkflowExecutor\(\) got an unexpected keyword argument 'worker'. Did you mean workers=",
        ),
        (
            lambda _: fp.ForgeExecutor(max_worker=2),
            r"ForgeExecutor\(\) got an unexpected keyword argument 'max_worker'. Did you mean max_",
        ),
        (
            lambda wf: fp.WorkflowExecutor(backend="inline").run(wf, sedule="eager"),
            r"WorkflowExecutor.run\(\) got an unexpected keyword argument 'sedule'. Did you mean schedule=\?",
        ),
    ],
)
def test_an_argument_of_a_wrong_name_is_refused_with_the_nearest_right_one(call, message):
    wf = fp.Workflow()
    wf.add(abs, -1)
    with pytest.raises(TypeError, match=message):
        call(wf)
