"""Check that only this user and root can change a path.

A file can be trusted only if no other user can create or replace it, or put another file beside it (SQLite applies a
``-journal`` that lies beside a database). So `distrust_of` checks folders, not the file: each folder on the path from
the root folder, including those that links lead through.

    folder that holds the file   owned by this user or root; no other user may write to it, sticky or not
    each folder above            the same; or sticky, as ``/tmp`` is, and its entry on the path is this user's or root's

The walk starts at the root folder, so another user cannot undo a step that has been checked. A folder that its group
may write to is refused only if the group has, or may have, other members: many systems give each user a private group
and create group-writable folders (umask 002).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MOST_LINKS = 40  # the limit of Linux
_ACCESS_LIST = "system.posix_acl_access"
_LIST_HEAD_BYTES = 4
_OF_USER, _OF_OWNING_GROUP, _OF_GROUP, _MASK = 0x02, 0x04, 0x08, 0x10  # entry tags in an access list
_WRITE = 2


class Distrust(NamedTuple):
    """Place that another user can change.

    Attributes:
        place: the folder or link.
        reason: who can change it and how that shows; a predicate, to follow the name of the place.
        remedy: an instruction for the user.
    """

    place: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place!r} {self.reason}"


def distrust_of(path: str | os.PathLike[str], *, is_shared: bool = False) -> Distrust | None:
    """Find a folder on a path that another user can change.

    Args:
        path: path of a file, which need not exist. Links are followed.
        is_shared: whether the folder that holds the file may be a sticky one that all users write to, as for a new
            folder in ``/tmp``.

    Returns:
        The first such folder or link, or None. The walk ends at the first name that does not exist.

    Raises:
        OSError: the current folder was removed, or a folder may not be searched.
    """
    for step in _steps(path):
        if (found := _fault_of(step, is_shared=is_shared)) is not None:
            return found
    return None


def end_of_links(path: str | os.PathLike[str]) -> Path:
    """Follow links at the end of the path of a file to be written, while they can be trusted.

    Links to folders within the path are left to the system. A link to something other than a file, such as
    ``/dev/stdout``, is not followed: its target may have no name.

    Raises:
        PermissionError: a link, or the pipe that it leads to, belongs to another user.
        OSError: the links form a cycle, or cannot be read.
    """
    place = Path(path)
    for _ in range(_MOST_LINKS):
        try:
            found = place.lstat()
        except FileNotFoundError:
            return place
        is_link = stat.S_ISLNK(found.st_mode)
        if found.st_uid not in (0, os.geteuid()) and (is_link or stat.S_ISFIFO(found.st_mode)):
            raise PermissionError(
                errno.EPERM,
                f"This {'link' if is_link else 'pipe'} belongs to another user (uid {found.st_uid}), who would decide "
                "where the output goes",
                str(place),
            )
        if not is_link or (place.exists() and not place.is_file()):
            return place
        place = place.parent / place.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


class _PathStep(NamedTuple):
    """Folder on a path and the entry of it that comes next; ``found`` is None if that does not exist."""

    folder: str
    entry: str
    found: os.stat_result | None
    is_last: bool


def _steps(path: str | os.PathLike[str]) -> Iterator[_PathStep]:
    """Yield each folder on the way to a file, from the root folder, before looking at its content."""
    start = os.fspath(path)
    left = _names(start if start.startswith("/") else f"{Path.cwd()}/{start}")
    folder, n_links = "/", 0
    while left:
        name = left.pop()
        if name == "..":
            folder = str(Path(folder).parent)
            continue
        entry = f"{folder.rstrip('/')}/{name}"
        try:
            found = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError):
            yield _PathStep(folder, entry, None, not left)
            return
        if not stat.S_ISLNK(found.st_mode):
            yield _PathStep(folder, entry, found, not left)
            folder = entry
            continue
        yield _PathStep(folder, entry, found, is_last=False)
        if (n_links := n_links + 1) > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = os.readlink(entry)  # noqa: PTH115
        left += _names(target)
        folder = "/" if target.startswith("/") else folder


def _names(path: str) -> list[str]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _fault_of(step: _PathStep, *, is_shared: bool) -> Distrust | None:
    folder, me = os.lstat(step.folder), os.geteuid()
    trusted = {0, me}
    if not step.is_last or is_shared:
        # In a user namespace without root, root's folders appear to belong to the overflow user.
        trusted.add(os.lstat("/").st_uid)
    if folder.st_uid not in trusted:
        remedy = "Use a folder of your own"
        if me == 0:  # root must not run what a user put there
            remedy += f", or run this program as that user: sudo -u '#{folder.st_uid}'"
        return Distrust(step.folder, f"belongs to another user (uid {folder.st_uid})", remedy)
    writer = _other_writer(step.folder, folder)
    if writer is None:
        return None
    if folder.st_mode & stat.S_ISVTX and (is_shared or not step.is_last):
        if step.found is None or step.found.st_uid in trusted:
            return None
        what = "is a link that belongs" if stat.S_ISLNK(step.found.st_mode) else "belongs"
        return Distrust(
            step.entry, f"{what} to another user (uid {step.found.st_uid})", "Use a folder or link of your own"
        )
    if folder.st_mode & stat.S_ISVTX:
        remedy = f"Use a folder of your own in it: mkdir -m 700 {step.folder.rstrip('/')}/NAME"
    elif folder.st_uid == me:
        remedy = f"Use another folder, or: chmod go-w {step.folder}"
    else:
        remedy = "Use a folder of your own elsewhere"
    mode = stat.S_IMODE(folder.st_mode)
    return Distrust(step.folder, f"can be written by {writer} (mode {mode:03o})", remedy)


def _other_writer(place: str, found: os.stat_result) -> str | None:
    """Return who besides this user and root may write to a folder, or None."""
    if found.st_mode & stat.S_IWOTH:
        return "all users"
    if not found.st_mode & stat.S_IWGRP:  # with an access list, these bits are its mask
        return None
    entries = _access_list(place)
    if entries is None:
        return _other_member(found.st_gid)
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), _WRITE)
    for tag, rights, number in entries:
        if not rights & mask & _WRITE:
            continue
        if tag == _OF_USER and number not in (0, os.geteuid()):
            return f"uid {number}, by its access list"
        if tag in (_OF_OWNING_GROUP, _OF_GROUP):
            other = _other_member(found.st_gid if tag == _OF_OWNING_GROUP else number)
            if other is not None:
                return other
    return None


def _access_list(place: str) -> list[tuple[int, int, int]] | None:
    """Return tag, rights and number of each entry of a POSIX access list; None if there is no list."""
    try:
        data = os.getxattr(place, _ACCESS_LIST)
    except (AttributeError, OSError):
        return None
    return list(struct.iter_unpack("<HHI", data[_LIST_HEAD_BYTES:]))


def _other_member(gid: int) -> str | None:
    """Return a description of a group that has or may have other members than this user and root, or None."""
    me = os.geteuid()
    accounts = pwd.getpwall()
    mine = next((account for account in accounts if account.pw_uid == me), None) or _account(me)
    try:
        name, members = grp.getgrgid(gid).gr_name, grp.getgrgid(gid).gr_mem
    except KeyError:
        name, members = str(gid), []
    numbers = {account.pw_name: account.pw_uid for account in (*accounts, *([mine] if mine else ()))}
    others = {account.pw_name for account in accounts if account.pw_gid == gid and account.pw_uid not in (0, me)}
    others |= {member for member in members if numbers.get(member, -1) not in (0, me)}
    if others:
        return f"group {name!r}, which has {min(others)!r} as a member"
    # A directory service may not list the users that have a group as their primary one, so trust only a group with the
    # name of its user, as private groups have. A supplementary group of this user lists its members.
    is_member = gid == os.getegid() or gid in os.getgroups()
    is_shared_primary = mine is not None and mine.pw_gid == gid and mine.pw_name != name
    return None if is_member and not is_shared_primary else f"group {name!r}, which may have other members"


def _account(uid: int) -> pwd.struct_passwd | None:
    """Return a user's account, which a directory service may have, or None."""
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None
