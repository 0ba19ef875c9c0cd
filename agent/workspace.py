"""Paths that cannot leave the workspace, whatever symlinks say and whoever renames meanwhile.

`Workspace.resolve` walks a path name by name from the workspace's own descriptor, opens no name that is a
symlink, follows links by itself and answers `..` from its own stack; so every directory that it returns was
reached from the workspace alone.

Why a walk: considered openat2(RESOLVE_BENEATH) (one call, but gVisor and older seccomp profiles refuse it, and
absolute links into the workspace fail) and realpath with a comparison (a race). Go's os.Root does the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from typing import TYPE_CHECKING

import attrs

from agent.rpc import INVALID_PARAMS, Failed, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40

_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_a_directory",
    errno.EISDIR: "is_a_directory",
    errno.EEXIST: "exists",
    errno.ENOTEMPTY: "not_empty",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.EROFS: "not_permitted",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "too_large",
    errno.ENAMETOOLONG: "name_too_long",
    errno.EMFILE: "busy",
    errno.ENFILE: "busy",
    # A name became a symlink between the look and the open.
    errno.ELOOP: "changed",
}


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turns an OSError of the body into Failed with the stable word for it."""
    try:
        yield
    except OSError as error:
        code = _CODES.get(error.errno or 0, "io_error")
        raise Failed(code, f"{path}: {os.strerror(error.errno or errno.EIO)}") from error


@attrs.frozen
class Place:
    """A name in an open directory of the workspace. The name may not exist, and is never followed here.

    `name` is "." for the workspace itself; `path` is where it lies, as the processes see it.
    """

    directory: int
    name: str
    path: str


class Workspace:
    """One directory, held open; a rename of it or above it changes nothing."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._root)

    @contextlib.contextmanager
    def resolve(self, path: str, *, follow: bool = True, make: bool = False) -> Iterator[Place]:
        """The place of `path`, valid inside the block. `follow` follows a link at its end, `make` makes directories.

        An absolute path, or link, is good if it begins with the workspace's own path. Raises Failed with
        `outside_workspace`, or with the word for an OSError on the way or in the block. Blocks: for threads.
        """
        if "\0" in path or not path:
            raise RpcError(INVALID_PARAMS, "a path must not be empty or contain NUL")
        todo = deque(self._below(path))
        stack: list[tuple[int, str]] = []
        links = 0
        try:
            with os_errors(path):
                while todo:
                    name = todo.popleft()
                    if name == "..":
                        if not stack:
                            raise Failed("outside_workspace", f"{path}: leads out of the workspace")
                        os.close(stack.pop()[0])
                        continue
                    here = stack[-1][0] if stack else self._root
                    target = _link_target(here, name) if todo or follow else None
                    if target is not None:
                        links += 1
                        if links > _MAX_LINKS:
                            raise Failed("changed", f"{path}: too many symlinks")
                        if target.startswith("/"):
                            _close_all(stack)
                        todo.extendleft(reversed(self._below(target)))
                        continue
                    if not todo:
                        yield Place(here, name, self._path_of(stack, name))
                        return
                    stack.append((_enter(here, name, make), name))
                # It ended at `..` or at the workspace itself: the last directory entered, by its own name.
                if not stack:
                    yield Place(self._root, ".", self.path)
                    return
                fd, name = stack.pop()
                os.close(fd)
                yield Place(stack[-1][0] if stack else self._root, name, self._path_of(stack, name))
        finally:
            _close_all(stack)

    def _below(self, path: str) -> list[str]:
        """The names of `path`, the workspace's own taken off an absolute one."""
        names = [name for name in path.split("/") if name not in ("", ".")]
        if not path.startswith("/"):
            return names
        own = [name for name in self.path.split("/") if name]
        if names[: len(own)] != own:
            raise Failed("outside_workspace", f"{path}: lies outside the workspace")
        return names[len(own) :]

    def _path_of(self, stack: list[tuple[int, str]], name: str) -> str:
        return "/".join([self.path.rstrip("/"), *(entered for _, entered in stack), name])


def _link_target(directory: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _enter(directory: int, name: str, make: bool) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=directory)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=directory)
    return os.open(name, _DIRECTORY, dir_fd=directory)


def _close_all(stack: list[tuple[int, str]]) -> None:
    while stack:
        os.close(stack.pop()[0])
