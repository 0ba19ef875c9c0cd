"""The agent's listening socket, as the contract gives it: inherited as fd 3, or made at `TENANTRY_LISTEN`.

It takes the names of the hand-over out of the environment, so that no child believes that they are for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

_INHERITED_FD = 3
_BACKLOG = 4096
_UNIX = "unix:"


class NoSocket(Exception):
    """The environment hands over no listening socket; the message says what is missing."""


@contextlib.contextmanager
def open_listening_socket(environ: MutableMapping[str, str]) -> Iterator[socket.socket]:
    """The listening socket that `environ` names (sd_listen_fds(3), or `TENANTRY_LISTEN=unix:/path`).

    A path's socket is removed at the end. Raises NoSocket.
    """
    path = environ.pop("TENANTRY_LISTEN", None)
    names = [environ.pop(name, None) for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")]
    with _inherited(names[0], names[1]) if path is None else _bound(path) as listener:
        try:
            yield listener
        finally:
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path.removeprefix(_UNIX))


def _inherited(count: str | None, pid: str | None) -> socket.socket:
    if count is None:
        raise NoSocket("no socket to serve: give fd 3 with LISTEN_FDS and LISTEN_PID, or TENANTRY_LISTEN=unix:/path")
    if pid != str(os.getpid()):
        raise NoSocket(f"LISTEN_PID is {pid!r}, and this process is {os.getpid()}: fd 3 is not meant for it")
    try:
        listener = socket.socket(fileno=_INHERITED_FD)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise NoSocket(f"fd 3 is no socket: {error}") from error
    if not listens:
        listener.close()
        raise NoSocket("fd 3 is a socket that does not listen")
    listener.set_inheritable(False)
    return listener


def _bound(address: str) -> socket.socket:
    if not address.startswith(_UNIX + "/"):
        raise NoSocket(f"TENANTRY_LISTEN is {address!r}; it must be unix:/path")
    path = address.removeprefix(_UNIX)
    listener = socket.socket(socket.AF_UNIX)
    previous = os.umask(0o177)
    try:
        # What lies there is of an earlier generation: a workspace has one agent at a time.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise NoSocket(f"TENANTRY_LISTEN is {address!r}, which cannot be bound: {error}") from error
    finally:
        os.umask(previous)
    return listener
