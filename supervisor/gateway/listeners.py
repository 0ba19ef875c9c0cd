"""The sockets that clients connect to: made from addresses, adopted from a parent, closed without a trace.

Owns the listening sockets and the files of unix sockets. A stale file is replaced and a live one refused;
nothing is inheritable by children. Accepting takes several connections each time it wakes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from supervisor.settings import TlsSettings

_BACKLOG = 0xFFFF  # the kernel cuts it to net.core.somaxconn
_ACCEPT_BATCH = 64
_UNIX_PATH_MAX_BYTES = 107
_UNIX_MODE = 0o660
# A peer whose machine died is found within about two minutes; accepted sockets inherit these on Linux.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3))
# accept(2): errors of the one connection that was to be accepted.
_OF_THE_CONNECTION = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ENOSYS,
    }
)


@attrs.define(eq=False)
class Listener:
    """One listening socket. `address` is printable: "http://127.0.0.1:8000" or "unix:/path"."""

    address: str
    tls: ssl.SSLContext | None
    _socket: socket.socket
    # The unix socket's file and its (device, inode), if we made it.
    _file: tuple[Path, tuple[int, int]] | None = None

    async def accept_some(self) -> list[tuple[trio.SocketStream, str]]:
        """Waits for clients and takes those that are there, each with its address ("unix" on a unix socket).

        Raises OSError when accepting fails for want of something (EMFILE, ENFILE, ENOBUFS, ENOMEM), with none
        taken, and trio.ClosedResourceError once the listener is closed. Cancellation loses no client.
        """
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the listener was closed")
            await trio.lowlevel.wait_readable(self._socket)
            accepted = [
                (trio.SocketStream(trio.socket.from_stdlib_socket(client)), peer)
                for client, peer in self._accept_nowait()
            ]
            if accepted:
                return accepted

    def _accept_nowait(self) -> Iterator[tuple[socket.socket, str]]:
        for taken in range(_ACCEPT_BATCH):
            try:
                client, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OF_THE_CONNECTION:
                    continue
                if taken:
                    return  # Those taken are served first; the error will come again.
                raise
            yield client, _peer(client.family, address)

    def close(self) -> None:
        """Idempotent. Ends `accept_some`, and removes the unix socket's file if it is still ours."""
        if self._socket.fileno() < 0:
            return
        if self._file is not None:
            path, identity = self._file
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    path.unlink()
        with contextlib.suppress(RuntimeError):  # outside of Trio nobody waits
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


async def open_listeners(
    binds: Sequence[str], *, tls: ssl.SSLContext | None = None
) -> tuple[list[Listener], list[str]]:
    """Opens "host:port" (port 0: any; "[::1]:8000"; "*:8000": all), "unix:/path" or "fd://3", in order.

    Returns the listeners and their printable addresses. TLS is spoken on all but unix sockets. Raises
    ConfigError that names the address, with every socket closed again. A name is resolved in a thread.
    """
    listeners: list[Listener] = []
    try:
        for bind in binds:
            if bind.startswith("unix:"):
                listeners.append(_open_unix(Path(bind.removeprefix("unix:").removeprefix("//"))))
            elif bind.startswith("fd://"):
                listeners.append(_adopt(bind, tls))
            else:
                listeners += await _open_tcp(bind, tls)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners, [listener.address for listener in listeners]


def tls_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """TLS 1.2 or later with HTTP/1.1 as its only protocol; None without a certificate. Raises ConfigError."""
    if settings.certificate is None or settings.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would have OpenSSL ask on the terminal.
        context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"tls.certificate {settings.certificate} with tls.key {settings.key}: {error}. Both must be PEM, "
            "readable, without a password, and belong together"
        ) from error
    return context


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


async def _open_tcp(bind: str, tls: ssl.SSLContext | None) -> list[Listener]:
    host, port = _split(bind)
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise ConfigError(f"bind {bind!r}: the host cannot be resolved: {error}") from error
    listeners: list[Listener] = []
    refused: OSError | None = None
    try:
        for family, kind, protocol, _, address in found:
            try:
                listeners.append(_listen(socket.socket(family, kind, protocol), address, tls))
            except OSError as error:
                # A name such as localhost may have an address of a family that this machine lacks.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                refused = error
        if not listeners:
            raise refused or OSError(errno.EADDRNOTAVAIL, "no address")
    except OSError as error:
        for listener in listeners:
            listener.close()
        mend = "; end what listens there, or bind another port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"bind {bind!r}: {os.strerror(error.errno or 0)}{mend}") from error
    return listeners


def _split(bind: str) -> tuple[str | None, int]:
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f'bind {bind!r}: neither "host:port", "unix:/path" nor "fd://N"')
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ConfigError(f'bind {bind!r}: an IPv6 address is written in brackets, such as "[::1]:8000"')
    return (host[1:-1] if bracketed else host if host not in ("", "*") else None), int(port)


def _listen(sock: socket.socket, address: object, tls: ssl.SSLContext | None) -> Listener:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
        return _made(sock, tls)
    except BaseException:
        sock.close()
        raise


def _made(sock: socket.socket, tls: ssl.SSLContext | None) -> Listener:
    """A listening TCP socket, ours or adopted, as a listener."""
    sock.setblocking(False)
    sock.set_inheritable(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return Listener(f"{'http' if tls is None else 'https'}://{host}:{port}", tls, sock)


def _open_unix(path: Path) -> Listener:
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"bind unix:{path}: its directory: {error.strerror}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The kernel takes 107 bytes of a path; through the directory's fd every path is short.
        near = str(path) if len(os.fsencode(path)) <= _UNIX_PATH_MAX_BYTES else None
        near = near or f"/proc/self/fd/{directory}/{path.name}"
        _remove_stale(path, near)
        os.fchmod(sock.fileno(), _UNIX_MODE)  # before bind: there is no instant with another mode
        sock.bind(near)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return Listener(f"unix:{path}", None, sock, (path.absolute(), _identity(path)))
    except OSError as error:
        sock.close()
        raise ConfigError(f"bind unix:{path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)


def _remove_stale(path: Path, near: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError(f"bind unix:{path}: there is a file that is no socket; remove it or choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(near)
        except ConnectionRefusedError:
            path.unlink()  # nobody listens: its maker was killed
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody listens
    raise ConfigError(f"bind unix:{path}: another process listens there; end it or choose another path")


def _identity(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _adopt(bind: str, tls: ssl.SSLContext | None) -> Listener:
    """Takes an inherited fd over; one that is not what it must be stays open, as it is somebody else's."""
    number = bind.removeprefix("fd://")
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f'bind {bind!r}: "fd://" is followed by the number of an inherited socket')
    try:
        sock = socket.socket(fileno=int(number))
    except OSError as error:
        raise ConfigError(f"bind {bind!r}: {error.strerror}; was the socket passed on to this process?") from error
    try:
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.type != socket.SOCK_STREAM or not is_listening:
            raise ConfigError(f"bind {bind!r}: not a listening stream socket")
        if sock.family == socket.AF_UNIX:
            sock.setblocking(False)
            sock.set_inheritable(False)
            name = sock.getsockname()
            return Listener(f"unix:{os.fsdecode(name)}", None, sock)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise ConfigError(f"bind {bind!r}: neither a TCP nor a unix socket")
        return _made(sock, tls)
    except BaseException:
        sock.detach()
        raise


def _peer(family: int, address: object) -> str:
    if family == socket.AF_UNIX or not isinstance(address, tuple):
        return "unix"
    return str(address[0]).removeprefix("::ffff:")
