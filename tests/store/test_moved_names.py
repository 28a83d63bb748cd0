"""A store that was written before modules of forgepar were in packages."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import forgepar as fp
from forgepar.store.moved_names import with_new_names

DATA = Path(__file__).parent / "data"
MADE_BY = (3, 11)  # the Python that wrote the store


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the store, and the module of its workflow."""
    for path in DATA.glob("kept_run*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for path in tmp_path.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    spec = importlib.util.spec_from_file_location("kept_run", tmp_path / "kept_run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kept_run", module)
    monkeypatch.syspath_prepend(tmp_path)
    spec.loader.exec_module(module)
    return tmp_path / "kept_run.db", module


def test_its_values_are_read(kept):
    path, module = kept
    with fp.Store.open(path) as store:
        run = store.run("last")
        assert run.value("numbers") == [0, 1, 2, 3]
        assert run.value("sum") == 20_000.0
        assert np.array_equal(run.value("ones"), np.ones(20_000))
        assert run.value("point") == module.Point(0, 3)
        if sys.version_info[:2] == MADE_BY:  # a lambda is kept as the bytecode of its Python
            assert run.value("adder")(1) == 6
        echo = run.value("echo")
        assert (type(echo), echo.stdout) == (fp.ToolResult, "three\n")
        made = run.value("options")
        assert made["backoff"] == fp.Backoff(2)
        assert made["file"] == fp.File("/tmp/a")
        assert made["options"] == fp.Options(retries=2)


@pytest.mark.skipif(sys.version_info[:2] != MADE_BY, reason="fingerprints are those of the Python that wrote the store")
def test_a_run_resumes_from_it(kept):
    path, module = kept
    with pytest.raises(fp.WorkflowFailed) as caught:
        module.declare().run(workers=1, store=path, resume=True, outputs="all", fail_fast=False)
    result = caught.value.result
    status = {record.name: record.status for record in result.records}
    assert status.pop("fail") == "failed"
    assert status == dict.fromkeys(status, "cached")
    assert result["adder"](1) == 6
    assert result["options"]["backoff"] == fp.Backoff(2)


@pytest.mark.parametrize(
    "value",
    [
        fp.ToolResult,
        "forgepar.tools",
        ["forgepar.tools", "ToolResult"],
        {"forgepar.tools": b"forgepar.tasks"},
        "x" * 300,
    ],
)
def test_what_is_no_name_of_a_moved_module_stays_as_it_is(value):
    assert pickle.loads(with_new_names(pickle.dumps(value, 5))) == value


@pytest.mark.parametrize("n", [1, 1000, 100_000])
def test_pickles_of_any_length_are_read(n):
    old = pickle.dumps([fp.Backoff(1), "x" * n, [fp.Backoff(2)] * 3, bytes(n)], 5)
    assert pickle.loads(with_new_names(old)) == pickle.loads(old)
    data = b"\x80\x05\x8c\x0eforgepar.tasks\x94\x8c\x07Options\x94\x93\x94."
    assert pickle.loads(with_new_names(data)) is fp.Options
