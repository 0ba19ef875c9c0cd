"""A WebSocket client over any Trio stream: RFC 6455 without extensions, and without a task of its own.

`receive` drives the protocol: it answers pings and sees the peer's Close. Every wait is bounded or can be
cancelled, whatever the peer does; the stream is closed when the context is left, on every path.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import h11
import trio
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage
from wsproto.utilities import generate_accept_token, generate_nonce

if TYPE_CHECKING:
    from pathlib import Path

Headers = Iterable[tuple[str, str]]

# The peer, or another task of ours, has closed the stream.
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)
_LOOK_FOR_ROOM_S: Final = 0.05
_MAX_REJECTION_BYTES: Final = 64 * 1024
_MAX_HEAD_BYTES: Final = 64 * 1024


class WebSocketError(Exception):
    """The peer did not do what a WebSocket server does."""


class HandshakeFailed(WebSocketError):
    """No connection, or no HTTP answer to the upgrade in time, or one that breaks RFC 6455 section 4.1."""


class ConnectionRejected(WebSocketError):
    """The peer answered the upgrade with another status than 101. `body` is cut after 64 KiB."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        super().__init__(f"the upgrade was refused with status {status}")
        self.status = status
        self.headers = headers
        self.body = body


class ConnectionClosed(WebSocketError):
    """The WebSocket has ended: the peer's close code and reason; 1005 if it gave none, 1006 if no Close came.

    When this side ends it over a fault of the peer, the code is the one that was sent to it (1002, 1007, 1009).
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the WebSocket was closed with code {code}{reason and ': '}{reason}")
        self.code = code
        self.reason = reason


@contextlib.asynccontextmanager
async def open_websocket(
    stream: trio.abc.Stream,
    *,
    host: str,
    target: str,
    headers: Headers = (),
    subprotocols: Sequence[str] = (),
    handshake_timeout_s: float = 10.0,
    close_timeout_s: float = 2.0,
    max_message_bytes: int = 16 * 1024 * 1024,
) -> AsyncIterator[WebSocket]:
    """Upgrades `stream`, which it owns from here on; leaving closes with 1000 as `WebSocket.aclose` does.

    Raises ConnectionRejected, HandshakeFailed, and ValueError for a header or target that HTTP cannot carry.
    Leaving by an exception or a cancellation sends a Close 1001 if the peer takes it within `close_timeout_s`,
    and waits for no answer.
    """
    try:
        handshake = _Handshake(host, target, headers, subprotocols)
        await _shake_hands(stream, handshake, handshake_timeout_s)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    websocket = WebSocket(stream, handshake, close_timeout_s, max_message_bytes)
    try:
        yield websocket
    except BaseException:
        with trio.move_on_after(close_timeout_s, shield=True):
            await websocket._end(1006, "this side left", CloseConnection(1001))
        raise
    else:
        await websocket.aclose()


@contextlib.asynccontextmanager
async def open_websocket_url(
    url: str,
    *,
    token: str | None = None,
    unix_path: Path | None = None,
    ssl_context: ssl.SSLContext | None = None,
    headers: Headers = (),
    subprotocols: Sequence[str] = (),
    handshake_timeout_s: float = 10.0,
    close_timeout_s: float = 2.0,
    max_message_bytes: int = 16 * 1024 * 1024,
) -> AsyncIterator[WebSocket]:
    """Connects to a ws:// or wss:// address and upgrades; with `unix_path` over that socket instead of TCP.

    `token` goes into an `Authorization: Bearer` header. The handshake's time includes connecting. Raises as
    `open_websocket` does, and ValueError for an address that is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"not the address of a WebSocket: {url!r}; it reads ws://host:port/path or wss://...")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    deadline = trio.current_time() + handshake_timeout_s
    stream: trio.abc.Stream | None = None
    with trio.move_on_at(deadline):
        try:
            if unix_path is not None:
                stream = await trio.open_unix_socket(str(unix_path))
            else:
                stream = await trio.open_tcp_stream(
                    parts.hostname, parts.port or (443 if parts.scheme == "wss" else 80)
                )
        except OSError as error:
            # Trio tells of each address that it tried, and here the first tells enough.
            inner = getattr(error.__cause__, "exceptions", [error.__cause__ or error])[0]
            # Trio's own words name the address once more. Those of the resolver, whose number is below 0, do not.
            why = os.strerror(inner.errno) if (inner.errno or 0) > 0 else inner.strerror or inner
            raise HandshakeFailed(f"cannot connect to {unix_path or parts.netloc}: {why}") from error
    if stream is None:
        raise HandshakeFailed(f"cannot connect to {unix_path or parts.netloc} within {handshake_timeout_s:g} s")
    if parts.scheme == "wss":
        stream = trio.SSLStream(
            stream,
            ssl_context or ssl.create_default_context(),
            server_hostname=parts.hostname,
            https_compatible=True,
        )
    async with open_websocket(
        stream,
        host=parts.netloc,
        target=target,
        headers=[*headers, *([("Authorization", f"Bearer {token}")] if token else [])],
        subprotocols=subprotocols,
        handshake_timeout_s=max(0.0, deadline - trio.current_time()),
        close_timeout_s=close_timeout_s,
        max_message_bytes=max_message_bytes,
    ) as websocket:
        yield websocket


class WebSocket:
    """An open WebSocket. Any task may send, and any may receive; messages are whole in both directions."""

    def __init__(
        self, stream: trio.abc.Stream, handshake: _Handshake, close_timeout_s: float, max_message_bytes: int
    ) -> None:
        self.subprotocol: Final = handshake.subprotocol
        self.response_headers: Final = handshake.response_headers
        # None while it is open.
        self.close_code: int | None = None
        self.close_reason: str | None = None
        # trio.current_time() of the last byte that the peer sent.
        self.heard_at = trio.current_time()
        self._stream = stream
        self._protocol = Connection(ConnectionType.CLIENT, trailing_data=handshake.trailing_data)
        self._close_timeout_s = close_timeout_s
        self._max_message_bytes = max_message_bytes
        self._parts: list[Any] = []
        self._message_bytes = 0
        self._pong: Pong | None = None
        self._write = trio.Lock()
        self._read = trio.Lock()

    async def send(self, message: str | bytes) -> None:
        """Sends one message, text or binary, and returns when the stream has taken it.

        Raises ConnectionClosed if the connection has ended; what the peer sent before can still be received.
        Cancellation after the first byte ends the connection, since half a frame is on the wire.
        """
        await self._send(TextMessage(message) if isinstance(message, str) else BytesMessage(bytes(message)))

    async def ping(self, payload: bytes = b"") -> None:
        """Sends a Ping. Whoever receives sees the Pong, as `heard_at`; nothing waits for it."""
        await self._send(Ping(payload))

    async def receive(self) -> str | bytes:
        """Returns the next message. Cancellation loses nothing: the next call goes on where this one was.

        Raises ConnectionClosed at the end, and then each time.
        """
        async with self._read:
            while True:
                message = await self._next()
                if message is not None:
                    return message

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Sends Close, waits for the peer's, and closes the stream, all within `close_timeout_s`. Never fails.

        Messages that still arrive are dropped, unless another task receives them. Cancellation ends the wait for
        the peer's Close, but ours is sent if there is room for it.
        """
        deadline = trio.current_time() + self._close_timeout_s
        try:
            with trio.move_on_at(deadline):
                self._raise_if_closed()
                await self._send_control(CloseConnection(code, reason), deadline)
                async with self._read:
                    while True:
                        await self._next()
        except ConnectionClosed:
            pass
        finally:
            with trio.move_on_after(self._close_timeout_s, shield=True):
                await self._end(1006, "the peer did not answer our Close")

    async def _next(self) -> str | bytes | None:
        # One step: what the peer said last, or else some more bytes of it. Gives a message that is complete now.
        self._raise_if_closed()
        event = next(self._protocol.events(), None)
        if isinstance(event, TextMessage | BytesMessage):
            return await self._add_to_message(event)
        if isinstance(event, Ping):
            # Only the newest is owed an answer (RFC 6455 section 5.5.3).
            self._pong = event.response()
            await self._send_pong()
        elif isinstance(event, CloseConnection):
            # The peer's Close, or wsproto's word for a breach of the protocol: answered with the same code.
            await self._end(event.code, event.reason or "", event.response())
        elif event is None:
            await self._read_some()
        return None

    async def _read_some(self) -> None:
        try:
            data = await self._stream.receive_some()
        except _GONE:
            data = b""
        if data:
            self.heard_at = trio.current_time()
            self._protocol.receive_data(bytes(data))
        else:
            await self._end(1006, "")

    async def _add_to_message(self, event: TextMessage | BytesMessage) -> str | bytes | None:
        data = event.data
        self._message_bytes += len(data.encode() if isinstance(data, str) and not data.isascii() else data)
        if self._message_bytes > self._max_message_bytes:
            reason = f"a message above {self._max_message_bytes} bytes"
            await self._end(1009, reason, CloseConnection(1009, reason))
            return None
        self._parts.append(data)
        if not event.message_finished:
            return None
        parts, self._parts, self._message_bytes = self._parts, [], 0
        return "".join(parts) if isinstance(data, str) else b"".join(parts)

    async def _send(self, event: Event) -> None:
        async with self._write:
            self._raise_if_closed()
            if self._protocol.state is not ConnectionState.OPEN:
                raise ConnectionClosed(1006, "a send after this side's Close")
            data = self._protocol.send(event)
            if self._pong is not None:
                data, self._pong = self._protocol.send(self._pong) + data, None
            try:
                await self._stream.send_all(data)
            except _GONE as error:
                # Nothing is closed here: the peer may have said why, and that is still to be received.
                self._raise_if_closed()
                raise ConnectionClosed(1006, "the peer takes no more data") from error
            except BaseException:
                with trio.move_on_after(self._close_timeout_s, shield=True):
                    await self._end(1006, "a send was cancelled inside a frame")
                raise
        await self._send_pong()

    async def _send_pong(self) -> None:
        # Why a Pong may be left waiting: when the stream has no room, the peer does not read, perhaps because it is
        # itself stuck in a send until we read on. So `receive` must not wait here; the next frame takes it along.
        while self._pong is not None and not self._write.locked():
            async with self._write:
                with trio.move_on_after(_LOOK_FOR_ROOM_S) as scope:
                    try:
                        await self._stream.wait_send_all_might_not_block()
                    except _GONE:
                        return
                if scope.cancelled_caught:
                    return
                pong, self._pong = self._pong, None
                if pong is not None:
                    await self._write_control(pong, trio.current_time() + self._close_timeout_s)

    async def _send_control(self, event: Event, deadline: float) -> None:
        with trio.move_on_at(deadline):
            try:
                self._write.acquire_nowait()
            except trio.WouldBlock:
                await self._write.acquire()
            try:
                await self._write_control(event, deadline)
            finally:
                self._write.release()

    async def _write_control(self, event: Event, deadline: float) -> None:
        # Shielded, so that the cancellation of a caller who only receives never tears a frame.
        state = self._protocol.state
        closes = isinstance(event, CloseConnection)
        if state is not ConnectionState.OPEN and not (closes and state is ConnectionState.REMOTE_CLOSING):
            return
        with trio.move_on_at(deadline, shield=True) as scope, contextlib.suppress(*_GONE):
            await self._stream.send_all(self._protocol.send(event))
        if scope.cancelled_caught:
            await self._end(1006, "the peer does not read")

    async def _end(self, code: int, reason: str, answer: CloseConnection | None = None) -> None:
        # What was the end is noted first, so that a cancellation while the peer is told does not lose it.
        if self.close_code is None:
            self.close_code, self.close_reason = int(code), reason
        try:
            if answer is not None:
                await self._send_control(answer, trio.current_time() + self._close_timeout_s)
        finally:
            await trio.aclose_forcefully(self._stream)

    def _raise_if_closed(self) -> None:
        if self.close_code is not None:
            raise ConnectionClosed(self.close_code, self.close_reason or "")


class _Handshake:
    """The client's half of RFC 6455 section 4.1, without I/O."""

    def __init__(self, host: str, target: str, headers: Headers, subprotocols: Sequence[str]) -> None:
        self._nonce = generate_nonce()
        self._offered = subprotocols
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        lines = [
            ("Host", host),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", self._nonce.decode()),
            ("Sec-WebSocket-Version", "13"),
            *([("Sec-WebSocket-Protocol", ", ".join(subprotocols))] if subprotocols else []),
            *headers,
        ]
        try:
            self.request = self._http.send(h11.Request(method="GET", target=target, headers=lines)) or b""
        except h11.LocalProtocolError as error:
            raise ValueError(f"not a request that HTTP can carry: {error}") from error
        self.done = False
        self.subprotocol: str | None = None
        self.status: int | None = None
        self.response_headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.trailing_data = b""

    def receive(self, data: bytes) -> None:
        """Takes bytes of the answer, empty at its end. Raises HandshakeFailed if they are none."""
        try:
            self._http.receive_data(data)
            while not self.done:
                event = self._http.next_event()
                if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                    break
                self._take(event)
        except h11.RemoteProtocolError as error:
            if self.status is None and data:
                raise HandshakeFailed(f"no answer of HTTP/1.1 to the upgrade: {error}") from error
            self.done = True
        if not data:
            if self.status is None:
                raise HandshakeFailed("the connection ended before an answer to the upgrade")
            self.done = True

    def _take(self, event: object) -> None:
        if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            self._accept(event)
        elif isinstance(event, h11.Response):
            self.status = event.status_code
            self.response_headers = _as_text(event.headers)
        elif isinstance(event, h11.Data):
            self.body += event.data
            self.done = len(self.body) > _MAX_REJECTION_BYTES
        elif isinstance(event, h11.EndOfMessage):
            self.done = True

    def _accept(self, event: h11.InformationalResponse) -> None:
        headers = dict(received := _as_text(event.headers))
        subprotocol = headers.get("sec-websocket-protocol")
        wrong = [
            name
            for name, right in (
                ("Upgrade", headers.get("upgrade", "").lower() == "websocket"),
                ("Connection", "upgrade" in headers.get("connection", "").lower().replace(" ", "").split(",")),
                (
                    "Sec-WebSocket-Accept",
                    headers.get("sec-websocket-accept", "").encode() == generate_accept_token(self._nonce),
                ),
                ("Sec-WebSocket-Protocol", subprotocol is None or subprotocol in self._offered),
                ("Sec-WebSocket-Extensions", not headers.get("sec-websocket-extensions")),
            )
            if not right
        ]
        if wrong:
            raise HandshakeFailed(f"the 101 answer has a wrong or missing header: {', '.join(wrong)}")
        self.status = 101
        self.subprotocol = subprotocol
        self.response_headers = received
        self.trailing_data = self._http.trailing_data[0]
        self.done = True


async def _shake_hands(stream: trio.abc.Stream, handshake: _Handshake, timeout_s: float) -> None:
    with trio.move_on_after(timeout_s):
        broken: trio.BrokenResourceError | None = None
        try:
            await stream.send_all(handshake.request)
        except trio.BrokenResourceError as error:
            # A peer may answer, with 431 say, before it has read all: then its answer counts.
            broken = error
        try:
            while not handshake.done:
                handshake.receive(bytes(await stream.receive_some()))
        except trio.BrokenResourceError as error:
            if handshake.status is None:
                cause = (broken or error).__cause__ or "no reason given"
                raise HandshakeFailed(f"the connection broke before an answer to the upgrade: {cause}") from error
    if handshake.status is None:
        raise HandshakeFailed(f"no answer to the upgrade within {timeout_s:g} s")
    if handshake.status != 101:
        body = bytes(handshake.body[:_MAX_REJECTION_BYTES])
        raise ConnectionRejected(handshake.status, handshake.response_headers, body)


def _as_text(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("ascii"), value.decode("latin-1")) for name, value in headers]
