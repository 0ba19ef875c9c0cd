"""A tenant's home on disk: the workspace, the lock that one agent at a time holds, and the agent's listener.

    home/workspace    the agent's directory, its HOME
    home/lock         locked by the shim for as long as anything of an agent lives

Both are made with mode 0700. Nothing else stays there: the listening socket has no name once it is bound.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LISTENER: Final = "listener"
# More than any net.core.somaxconn, which is what the kernel makes of it.
_BACKLOG: Final = 2**31 - 1
_BATCH: Final = 1000


def prepare_home(home: Path) -> Path:
    """Makes what is missing, and returns the workspace's absolute path. Raises OSError."""
    workspace = home.absolute() / "workspace"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    workspace.mkdir(mode=0o700, exist_ok=True)
    return workspace


def open_lock(home: Path) -> int:
    """A descriptor to lock: an open file of its own each time, so that no two calls share a lock."""
    return os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def open_listener(home: Path) -> tuple[socket.socket, int]:
    """A listening unix socket without a name, and an O_PATH descriptor through which it is connected to.

    It is bound below a descriptor of the home, so a long path is no matter, and unlinked at once: no stale
    file, and nothing for a neighbour to find. Connect to `address(fd)`.
    """
    with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as always:
        directory = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        always.callback(os.close, directory)
        listener = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # Left behind by a supervisor that was killed between the bind and the unlink.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_LISTENER, dir_fd=directory)
        listener.bind(f"{address(directory)}/{_LISTENER}")
        try:
            path_fd = os.open(_LISTENER, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.unlink(_LISTENER, dir_fd=directory)
        on_failure.callback(os.close, path_fd)
        listener.listen(_BACKLOG)
        on_failure.pop_all()
    return listener, path_fd


def remove_home(home: Path) -> None:
    """Removes the home and all that an agent, of which nothing is alive, made in it. Follows no link. Blocks.

    Why not shutil.rmtree: it holds a descriptor and a frame for each level, so that one tenant's tree, a thousand
    directories deep, could not be removed and would use up the supervisor's descriptors. Here each directory is
    lifted to the top before it is emptied. Raises OSError; called again, it goes on. Without a home it does nothing.
    """
    if not os.path.lexists(home):
        return
    with _opened(home) as top:
        for name, is_directory in _entries(top):
            if not is_directory:
                os.unlink(name, dir_fd=top)
                continue
            with _opened(name, top) as inside:
                for below, has_more in _entries(inside):
                    if not has_more:
                        os.unlink(below, dir_fd=inside)
                        continue
                    # Opened for its mode's sake: a directory that may not be written to cannot be moved.
                    with _opened(below, inside):
                        os.rename(below, secrets.token_hex(16), src_dir_fd=inside, dst_dir_fd=top)
            os.rmdir(name, dir_fd=top)
    os.rmdir(home)


def _entries(directory: int) -> Iterator[tuple[str, bool]]:
    """The names, and whether each is a directory, until there are none: the caller removes what it gets."""
    while True:
        with os.scandir(directory) as found:
            batch = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(found, _BATCH)]
        if not batch:
            return
        yield from batch


@contextlib.contextmanager
def _opened(path: Path | str, directory: int | None = None) -> Iterator[int]:
    """A directory to read, whatever mode its owner gave it."""
    handle = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.chmod(address(handle), 0o700)
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
    try:
        yield readable
    finally:
        os.close(readable)


def address(path_fd: int) -> str:
    """How the kernel finds what an O_PATH descriptor of this process holds, named or not."""
    return f"/proc/self/fd/{path_fd}"
