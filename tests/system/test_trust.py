"""Which places on disk another user can change."""

from __future__ import annotations

import grp
import os
import pwd
import struct
from pathlib import Path

import pytest

from forgepar.system import trust
from forgepar.system.trust import distrust_of

ME = os.geteuid()
OTHER = 4321


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def account(name: str, uid: int, gid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))


@pytest.fixture
def accounts(monkeypatch, folder):
    """Have this machine know the users and groups that a test names; the folder is of group 77, and so is this user."""
    folder.chmod(0o775)
    real = os.lstat
    as_77 = lambda path: _as_group(real(path), 77) if str(path) == str(folder) else real(path)  # noqa: E731
    monkeypatch.setattr(os, "lstat", as_77)
    monkeypatch.setattr(os, "getegid", lambda: 77)

    def know(users: list[pwd.struct_passwd], groups: dict[int, tuple[str, list[str]]]) -> None:
        def group(gid: int) -> grp.struct_group:
            name, members = groups[gid]
            return grp.struct_group((name, "x", gid, members))

        def user(uid: int) -> pwd.struct_passwd:
            return next(entry for entry in users if entry.pw_uid == uid)

        def known(uid: int) -> pwd.struct_passwd:
            try:
                return user(uid)
            except StopIteration:
                raise KeyError(uid) from None

        monkeypatch.setattr(trust.pwd, "getpwall", lambda: users)
        monkeypatch.setattr(trust.pwd, "getpwuid", known)
        monkeypatch.setattr(trust.grp, "getgrgid", group)

    return know


def _as_group(found: os.stat_result, gid: int) -> os.stat_result:
    return os.stat_result([gid if place == 5 else value for place, value in enumerate(found)])


def test_a_folder_of_ones_own_is_trusted(folder):
    for mode in (0o700, 0o755, 0o711):
        folder.chmod(mode)
        assert distrust_of(folder / "file") is None
        assert distrust_of(folder / "none" / "file") is None


def test_relative_paths_and_links_are_followed(folder, tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (folder / "link").symlink_to("../open/file")
    (folder / "absolute").symlink_to(tmp_path / "open")
    monkeypatch.chdir(folder)
    for path in ("link", "absolute/file", "../open/file", "./../folder/link", folder / "link"):
        found = distrust_of(path)
        assert str(found) == f"'{tmp_path}/open' can be written by all users (mode 777)"
        assert found.remedy == f"Use another folder, or: chmod go-w {tmp_path}/open"
    assert distrust_of("file") is None


def test_links_in_a_circle_end(folder):
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        distrust_of(folder / "one")


def test_a_folder_above_that_all_may_write_to_is_found(folder):
    (folder / "own").mkdir()
    folder.chmod(0o777)
    assert distrust_of(folder / "own" / "file").place == str(folder)


def test_a_sticky_folder_will_do_above_but_not_for_the_file(folder):
    (folder / "own").mkdir()
    folder.chmod(0o1777)
    assert distrust_of(folder / "own" / "file") is None
    assert distrust_of(folder / "file").remedy == f"Use a folder of your own in it: mkdir -m 700 {folder}/NAME"
    assert distrust_of(folder / "new", is_shared=True) is None


@pytest.mark.skipif(ME != 0, reason="only root can give a file away")
def test_what_another_user_owns_is_found(folder):
    (folder / "theirs").mkdir()
    os.chown(folder / "theirs", OTHER, -1)
    found = distrust_of(folder / "theirs" / "file")
    assert str(found) == f"'{folder}/theirs' belongs to another user (uid {OTHER})"
    assert f"sudo -u '#{OTHER}'" in found.remedy
    (folder / "link").symlink_to(folder)
    os.chown(folder / "link", OTHER, -1, follow_symlinks=False)
    assert distrust_of(folder / "link" / "file") is None, "only this user can put a link here"
    folder.chmod(0o1777)
    (folder / "link" / "own").mkdir()
    assert str(distrust_of(folder / "link" / "own" / "file")) == (
        f"'{folder}/link' is a link that belongs to another user (uid {OTHER})"
    )
    assert str(distrust_of(folder / "theirs" / "file")) == f"'{folder}/theirs' belongs to another user (uid {OTHER})"


def test_a_private_group_may_write(folder, accounts):
    accounts([account("ada", ME, 77), account("bob", OTHER, 78)], {77: ("ada", [])})
    assert distrust_of(folder / "file") is None


def test_a_group_whose_only_member_is_this_user_may_write(folder, accounts):
    accounts([account("ada", ME, 70), account("bob", OTHER, 78)], {77: ("project", ["ada"])})
    assert distrust_of(folder / "file") is None


def test_a_group_without_a_name_may_write_where_no_account_has_it(folder, accounts):
    """As in a container that runs as a number."""
    accounts([account("root", 0, 0)], {})
    assert distrust_of(folder / "file") is None


@pytest.mark.parametrize(
    ("users", "groups", "who"),
    [
        ([account("ada", ME, 77), account("bob", OTHER, 77)], {77: ("ada", [])}, "'ada', which has 'bob' as a member"),
        (
            [account("ada", ME, 77), account("bob", OTHER, 1)],
            {77: ("ada", ["bob"])},
            "'ada', which has 'bob' as a member",
        ),
        ([account("ada", ME, 77)], {77: ("users", [])}, "'users', which may have other members"),
        ([account("ada", ME, 70)], {77: ("lab", ["ada", "eve"])}, "'lab', which has 'eve' as a member"),
        ([account("bob", OTHER, 77)], {}, "'77', which has 'bob' as a member"),
    ],
    ids=["first of another", "has another", "first of many", "unknown account", "nameless"],
)
def test_a_group_of_others_is_found(users, groups, who, folder, accounts):
    accounts(users, groups)
    found = distrust_of(folder / "file")
    assert found.reason == f"can be written by group {who} (mode 775)"
    folder.chmod(0o755)
    assert distrust_of(folder / "file") is None


def test_a_group_that_this_user_is_not_in_is_found(folder, accounts, monkeypatch):
    accounts([account("ada", ME, 70)], {77: ("staff", [])})
    monkeypatch.setattr(os, "getegid", lambda: 70)
    monkeypatch.setattr(os, "getgroups", lambda: [70])
    assert "group 'staff', which may have other members" in distrust_of(folder / "file").reason


def access_list(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
OWNER, GROUP, MASK, REST = (1, 7, NOBODY), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([OWNER, (2, 7, OTHER), GROUP, MASK, REST], f"uid {OTHER}, by its access list"),
        ([OWNER, GROUP, (8, 7, 99), MASK, REST], "group 'lab', which has 'bob' as a member"),
        ([OWNER, (2, 5, OTHER), GROUP, MASK, REST], None),
        ([OWNER, (2, 7, OTHER), GROUP, (16, 5, NOBODY), REST], None),
        ([OWNER, (2, 7, ME), (2, 7, 0), GROUP, MASK, REST], None),
        ([OWNER, (4, 7, NOBODY), MASK, REST], None),
    ],
    ids=["user", "group", "user that may read", "masked", "this user and root", "private group"],
)
def test_access_lists_are_read(entries, reason, folder, accounts, monkeypatch):
    accounts([account("ada", ME, 77), account("bob", OTHER, 78)], {77: ("ada", []), 99: ("lab", ["bob"])})
    monkeypatch.setattr(os, "getxattr", lambda path, name: access_list(*entries), raising=False)
    found = distrust_of(folder / "file")
    assert (found and found.reason) == (reason and f"can be written by {reason} (mode 775)")


def test_a_real_access_list_is_found(folder):
    folder.chmod(0o755)
    try:
        os.setxattr(folder, "system.posix_acl_access", access_list(OWNER, (2, 7, OTHER), (4, 5, NOBODY), MASK, REST))
    except (AttributeError, OSError) as error:
        pytest.skip(f"no access lists here ({error})")
    assert f"uid {OTHER}, by its access list" in distrust_of(folder / "file").reason
