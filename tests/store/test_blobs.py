"""Values in files: whole or not there, told by their content."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import PATIENCE

from forgepar.errors import StoreError
from forgepar.store.blobs import FileWriter, ValueFiles


def parts(*texts: bytes) -> list[memoryview]:
    return [memoryview(text) for text in texts]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    return ValueFiles(tmp_path / "files")


@pytest.mark.parametrize("texts", [(b"one",), (b"one", b"", b"three"), (b"",), (), (b"x" * 5_000_000, b"y")])
def test_what_is_written_is_read(files, texts):
    name = files.write(parts(*texts))
    assert [bytes(part) for part in files.read(name, [len(text) for text in texts])] == list(texts)


def test_equal_content_is_one_file(files):
    assert files.write(parts(b"one", b"two")) == files.write(parts(b"onetwo"))
    assert len(files.sizes()) == 1


def test_writing_what_is_there_marks_it_as_used(files):
    name = files.write(parts(b"one"))
    os.utime(files.path(name), (1.0, 1.0))
    files.write(parts(b"one"))
    assert files.sizes()[name][1] > 1.0


def test_a_torn_file_of_the_right_name_is_written_again(files):
    name = files.write(parts(b"one"))
    files.path(name).write_bytes(b"o")
    assert files.write(parts(b"one")) == name
    assert bytes(files.read(name, [3])[0]) == b"one"


def test_an_altered_file_of_the_right_size_is_written_again(files):
    name = files.write(parts(b"one"))
    files.path(name).write_bytes(b"onE")
    assert files.write(parts(b"one")) == name
    assert bytes(files.read(name, [3])[0]) == b"one"


def test_what_a_killed_writer_left_is_in_nobodys_way(files):
    """Not even in that of a process with the same number, as that of a container that is started again."""
    code = (
        "import os, sys; from pathlib import Path; from forgepar.store.blobs import ValueFiles; "
        "os.getpid = lambda: 7; os.fsync = lambda _: os._exit(0); "
        "ValueFiles(Path(sys.argv[1])).write([memoryview(b'one')])"
    )
    subprocess.run([sys.executable, "-c", code, str(files.folder)], check=True)
    assert len(list(files.folder.glob("??/.writing-*"))) == 1
    code = code.replace("os.fsync = lambda _: os._exit(0); ", "")
    subprocess.run([sys.executable, "-c", code, str(files.folder)], check=True)
    assert len(files.sizes()) == 1


@pytest.mark.parametrize(("content", "fault"), [(b"on", "2 bytes instead of 3"), (b"onE", "altered")])
def test_damage_is_told(files, content, fault):
    name = files.write(parts(b"one"))
    files.path(name).write_bytes(content)
    with pytest.raises(StoreError, match=fault):
        files.read(name, [3])


def test_a_missing_file_is_told(files):
    with pytest.raises(StoreError, match="cannot be read"):
        files.read(b"\0" * 32, [3])


def test_a_failed_write_leaves_nothing(files, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(parts(b"one"))
    assert list(files.folder.glob("??/*")) == []


def test_what_dead_writers_left_is_removed(files):
    name = files.write(parts(b"one"))
    torn = files.path(name).parent / ".writing-1-1"
    torn.write_bytes(b"o")
    files.remove_partial(time.time() - 60)
    assert torn.exists()
    files.remove_partial(time.time() + 60)
    assert not torn.exists()
    assert set(files.sizes()) == {name}


def test_the_writer_hands_back_what_it_wrote_in_order(files):
    writer = FileWriter(files)
    for key in range(20):
        writer.put(key, parts(b"%d" % key))
    assert writer.is_busy
    writer.close()
    done = writer.done()
    assert [written.key for written in done] == list(range(20))
    assert [bytes(files.read(written.name, written.lengths)[0]) for written in done] == [b"%d" % i for i in range(20)]
    assert not writer.is_busy


def test_the_writer_tells_what_went_wrong_and_goes_on(files, monkeypatch):
    write, calls = files.write, []

    def flaky(given):
        calls.append(given)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(given)

    monkeypatch.setattr(files, "write", flaky)
    writer = FileWriter(files)
    writer.put(1, parts(b"one"))
    writer.put(2, parts(b"two"))
    writer.close()
    first, second = writer.done()
    assert (first.key, first.error.errno, second.key, second.error) == (1, 28, 2, None)


def test_many_are_written_side_by_side_and_handed_back_in_order(files, monkeypatch):
    write, inside, both = files.write, [], threading.Event()

    def met(given):
        inside.append(given)
        if len(inside) == 2:
            both.set()
        assert both.wait(PATIENCE)
        return write(given)

    monkeypatch.setattr(files, "write", met)
    writer = FileWriter(files)
    for key in range(20):
        writer.put(key, parts(b"%d" % key))
    writer.close()
    done = writer.done()
    assert [(written.key, written.error) for written in done] == [(key, None) for key in range(20)]


def test_the_writer_survives_whatever_goes_wrong(files, monkeypatch):
    monkeypatch.setattr("forgepar.store.blobs._MOST_WAITING", 10)
    monkeypatch.setattr(files, "write", lambda _: [].pop())
    writer = FileWriter(files)
    for key in range(3):
        writer.put(key, parts(b"x" * 8))
    writer.close()
    assert [type(written.error) for written in writer.done()] == [IndexError] * 3


def test_no_more_waits_than_may(files, monkeypatch):
    monkeypatch.setattr("forgepar.store.blobs._MOST_WAITING", 10)
    gate, write = threading.Event(), files.write
    monkeypatch.setattr(files, "write", lambda given: (gate.wait(), write(given))[1])
    writer = FileWriter(files)
    writer.put(1, parts(b"x" * 8))
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (writer.put(2, parts(b"y" * 8)), passed.set()))
    thread.start()
    assert not passed.wait(0.05)  # it cannot have passed: the first is still there
    gate.set()
    thread.join()
    assert passed.is_set()
    writer.close()
    assert [written.key for written in writer.done()] == [1, 2]
