"""A file as an argument: a path like any other, to the function that gets it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import forgepar as fp


def read(path):
    return Path(path).read_text()


def test_it_is_a_path():
    file = fp.File("a/b")
    assert os.fspath(file) == str(file) == file.path == "a/b"
    assert Path(file) == Path("a/b")
    assert repr(file) == "File('a/b')"
    assert file == fp.File(Path("a/b")) == fp.File(b"a/b") != fp.File("a/c")
    assert file != "a/b"
    assert len({file, fp.File("a/b"), fp.File("a/c")}) == 2
    assert pickle.loads(pickle.dumps(file)) == file


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="path must be the path of a file, got"):
        fp.File(path)


def test_tasks_and_programs_read_it(either_backend, tmp_path):
    (tmp_path / "in").write_text("what is in it")
    wf = fp.Workflow()
    text = wf.add(read, fp.File(tmp_path / "in"))
    said = wf.add(fp.shell("cat {path}", path=fp.File(tmp_path / "in")))
    result = wf.run(**either_backend, outputs="all")
    assert result[text] == result[said].stdout == "what is in it"
