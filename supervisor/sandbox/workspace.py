"""A tenant's home on disk: the workspace, the lock that one agent at a time holds, and the agent's listener.

    home/workspace    the agent's directory, its HOME
    home/lock         locked by the shim for as long as anything of an agent lives

Both are made with mode 0700. Nothing else stays there: the listening socket has no name once it is bound.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_LISTENER: Final = "listener"
# More than any net.core.somaxconn, which is what the kernel makes of it.
_BACKLOG: Final = 2**31 - 1


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


def address(path_fd: int) -> str:
    """How the kernel finds what an O_PATH descriptor of this process holds, named or not."""
    return f"/proc/self/fd/{path_fd}"
