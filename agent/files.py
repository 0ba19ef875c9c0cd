"""The methods `file.*`: reads, atomic writes, lists and removals inside the workspace, bounded in size.

A write is seen whole or not at all, and lasts once it is answered (written, fsynced, renamed, the directory
fsynced). Everything here blocks and runs in threads; only regular files are opened, so nothing blocks for ever.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from agent.content import Encoding, decode, encode
from agent.rpc import INVALID_PARAMS, Failed, Params, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.workspace import Place, Workspace

# JSON can take six bytes for one (a control character): an answer stays below the message limit of 16 MiB.
MAX_READ_BYTES = 2 * 1024 * 1024
MAX_LISTED = 10_000

_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


class Read(Params):
    path: str
    offset: Annotated[int, Meta(ge=0, le=2**62)] = 0
    length: Annotated[int, Meta(ge=0, le=MAX_READ_BYTES)] = MAX_READ_BYTES
    encoding: Encoding = "utf-8"


class Write(Params):
    path: str
    data: str
    encoding: Encoding = "utf-8"
    # Permission bits; without them the old file's, or those of the umask.
    mode: Annotated[int, Meta(ge=0, le=0o777)] | None = None
    # Makes the directories above it.
    parents: bool = False


class List(Params):
    path: str = "."
    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] = MAX_LISTED


class Stat(Params):
    path: str


class Remove(Params):
    path: str
    # A directory with all that it holds.
    recursive: bool = False


class Files:
    """What `file.*` does in one workspace. Every method raises Failed, or RpcError for bad parameters."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def read(self, params: Read) -> dict[str, Any]:
        """A part of a file; `eof` tells that it reaches the end."""
        with self._workspace.resolve(params.path) as place, _open_file(place, params.path) as fd:
            parts, offset, missing = [], params.offset, params.length
            while missing and (part := os.pread(fd, missing, offset)):
                parts.append(part)
                offset += len(part)
                missing -= len(part)
            size = os.fstat(fd).st_size
        text, encoding = encode(b"".join(parts), params.encoding)
        return {"data": text, "encoding": encoding, "size": size, "eof": offset >= size}

    def write(self, params: Write) -> dict[str, Any]:
        """Replaces the file, or makes it; a link at the end of the path is followed, and stays."""
        data = decode(params.data, params.encoding)
        with self._workspace.resolve(params.path, make=params.parents) as place:
            mode = params.mode
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(place.name, dir_fd=place.directory, follow_symlinks=False)
                if not stat.S_ISREG(old.st_mode):
                    raise Failed(_not_a_file(old), f"{params.path}: is no regular file")
                mode = stat.S_IMODE(old.st_mode) & 0o777 if mode is None else mode
            _replace(place, data, mode)
        return {"size": len(data)}

    def list(self, params: List) -> dict[str, Any]:
        """The names in a directory, sorted; `truncated` if there are more than `limit`."""
        with self._workspace.resolve(params.path) as place:
            fd = os.open(place.name, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=place.directory)
            try:
                with os.scandir(fd) as found:
                    names = [entry.name for entry in islice(found, params.limit + 1)]
                entries = [entry for name in sorted(names[: params.limit]) if (entry := _entry(name, fd))]
            finally:
                os.close(fd)
        return {"entries": entries, "truncated": len(names) > params.limit}

    def stat(self, params: Stat) -> dict[str, Any]:
        """Of the name itself: a symlink is told as one, with its `target`."""
        with self._workspace.resolve(params.path, follow=False) as place:
            described = _describe(place.name, place.directory)
            if described["type"] == "symlink":
                target = os.fsencode(os.readlink(place.name, dir_fd=place.directory))
                described["target"], described["target_encoding"] = encode(target)
        return described

    def remove(self, params: Remove) -> dict[str, Any]:
        """Removes a file, a symlink (never what it points to), or a directory."""
        with self._workspace.resolve(params.path, follow=False) as place:
            if place.name == ".":
                raise RpcError(INVALID_PARAMS, "the workspace itself cannot be removed")
            found = os.stat(place.name, dir_fd=place.directory, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(place.name, dir_fd=place.directory)
            elif params.recursive:
                try:
                    shutil.rmtree(place.name, dir_fd=place.directory)
                except RecursionError:
                    why = "its directories are nested too deeply; remove it by a command, such as rm -r"
                    raise Failed("too_deep", f"{params.path}: {why}") from None
            else:
                os.rmdir(place.name, dir_fd=place.directory)
        return {}


# O_NONBLOCK: the open of a FIFO returns at once, and is then refused.
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@contextlib.contextmanager
def _open_file(place: Place, path: str) -> Iterator[int]:
    fd = os.open(place.name, os.O_RDONLY | _SAFE, dir_fd=place.directory)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Failed(_not_a_file(found), f"{path}: is no regular file")
        yield fd
    finally:
        os.close(fd)


def _not_a_file(found: os.stat_result) -> str:
    return "is_a_directory" if stat.S_ISDIR(found.st_mode) else "not_a_file"


def _replace(place: Place, data: bytes, mode: int | None) -> None:
    """Writes beside the name, then renames over it. What it made is removed if it fails."""
    temporary = f".tenantry-{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
    fd = os.open(temporary, flags, 0o666 if mode is None else 0o600, dir_fd=place.directory)
    try:
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, place.name, src_dir_fd=place.directory, dst_dir_fd=place.directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=place.directory)
        raise
    # The directory that `place` holds is open by path alone, which cannot be synced.
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place.directory)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _describe(name: str, directory: int) -> dict[str, Any]:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return {
        "type": _KINDS.get(stat.S_IFMT(found.st_mode), "other"),
        "size": found.st_size,
        "mode": stat.S_IMODE(found.st_mode),
        "mtime": found.st_mtime,
    }


def _entry(name: str, directory: int) -> dict[str, Any] | None:
    """None for a name that went away meanwhile. One that is not UTF-8 is told in base64."""
    try:
        described = _describe(name, directory)
    except FileNotFoundError:
        return None
    shown, encoding = encode(os.fsencode(name))
    return {"name": shown, **({} if encoding == "utf-8" else {"encoding": encoding}), **described}
