"""Files for people: whole or as they were, and never through what somebody else put in the way."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from forgepar.report.export.writing import check_target, write_pieces


def test_text_and_bytes_are_written_in_order(tmp_path):
    write_pieces(tmp_path / "file", iter(["é", b"\xff", "\n"]))
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\xff\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_new_files_are_their_owners_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        write_pieces(tmp_path / "file", ["text"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_the_name_of_a_file_under_way_cannot_be_guessed_nor_anything_be_in_its_place(tmp_path, monkeypatch):
    names = []

    def pieces():
        names.extend(entry.name for entry in tmp_path.iterdir())
        yield "text"

    for _ in range(2):
        write_pieces(tmp_path / "file", pieces())
        (tmp_path / "file").unlink()
    assert len(set(names)) == 2
    assert not [name for name in names if "file" in name or str(os.getpid()) in name]
    (tmp_path / "precious").write_text("as it was")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    for name in (f".{bytes(8).hex()}.part", f".file.{os.getpid()}.part"):
        (tmp_path / name).symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_pieces(tmp_path / "file", ["text"])
    assert (tmp_path / "precious").read_text() == "as it was"
    assert not (tmp_path / "file").exists()


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    def pieces():
        yield "text"
        raise ZeroDivisionError

    (tmp_path / "file").write_text("as it was")
    with pytest.raises(ZeroDivisionError):
        write_pieces(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_link_of_ones_own_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "other").symlink_to(tmp_path / "folder" / "file")
    write_pieces(tmp_path / "link", ["text"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "text"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many levels"):
        write_pieces(tmp_path / "circle", ["text"])


def test_a_pipe_of_ones_own_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_pieces(tmp_path / "pipe", ["te", "xt"])
    reader.join()
    assert found == ["text"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_pieces(tmp_path, ["text"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_another_user_put_there_is_not_written_to(what, tmp_path):
    (tmp_path / "precious").write_text("as it was")
    place = tmp_path / "file"
    if what == "link":
        place.symlink_to("precious")
    else:
        os.mkfifo(place)
    os.chown(place, 65534, 65534, follow_symlinks=False)
    with pytest.raises(PermissionError, match=rf"This {what} belongs to another user \(uid 65534\)"):
        write_pieces(place, ["text"])
    assert (tmp_path / "precious").read_text() == "as it was"


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("none/file", FileNotFoundError, "there is no folder"),
        (".", IsADirectoryError, "is a folder"),
        ("file/below", FileNotFoundError, "there is no folder"),
        ("n" * 300, OSError, "File name too long"),
        ("link", FileNotFoundError, "there is no folder"),
        ("/proc/file", OSError, r"No such file or directory: '/proc/file'"),
        ("/dev/full", None, ""),
        ("file", None, ""),
        ("other", None, ""),
    ],
)
def test_what_cannot_be_written_is_told_before_and_nothing_is_changed(tmp_path, monkeypatch, name, kind, said):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("as it was")
    Path("link").symlink_to(tmp_path / "gone" / "file")
    if kind is None:
        check_target(name)
    else:
        with pytest.raises(kind, match=said):
            check_target(name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link"]
    assert Path("file").read_text() == "as it was"


@pytest.mark.parametrize("name", ["/dev/full", "none/file"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as caught:
        write_pieces(name, ["text"])
    assert caught.value.filename == name
