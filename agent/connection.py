"""One WebSocket connection, server side: trio-websocket's, with the corners that a server cannot leave as they are.

It guarantees that a broken frame is answered with its close code, that no half frame is ever followed by
another, that memory for one client is bounded, and that `close` and `keep_alive` are bounded in time.

Why a subclass: considered `wrap_server_stream` (its faults below stay, and its handshake has no deadline) and
a connection of our own on wsproto (as long as the library, and handlers written for trio-websocket would not
fit); chose to override the few methods that matter. The dependency is pinned to 0.12 and
tests/agent/test_connection.py guards each override.
"""

from __future__ import annotations

import trio
from trio_websocket import CloseReason, ConnectionClosed, WebSocketConnection, WebSocketRequest
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Request, TextMessage
from wsproto.utilities import LocalProtocolError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# Messages that wait for the handler; with the one being assembled this bounds a connection's memory.
MAX_QUEUED_MESSAGES = 4
PING_EVERY_S = 20.0
PONG_WITHIN_S = 120.0
_RECEIVE_BYTES = 64 * 1024


class Connection(WebSocketConnection):
    """What a handler gets. `get_message` and `send_message` are trio-websocket's.

    A cancelled `send_message` ends the connection, since half of its frame may be out (after it everything
    raises ConnectionClosed). `handshake_headers` holds the client's headers, names in lower case.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(
            stream,
            WSConnection(ConnectionType.SERVER),
            message_queue_size=MAX_QUEUED_MESSAGES,
            max_message_size=MAX_MESSAGE_BYTES,
            receive_buffer_size=_RECEIVE_BYTES,
        )
        # Counts what the peer sent, frame by frame in parts: any of it shows that the peer lives.
        self._heard = 0

    async def run_reader(self) -> None:
        """Reads until the connection ends, however it ends. Runs as a task of the connection's nursery.

        A head that not even the parser expected (such as a Host outside ASCII) is answered with 400.
        """
        try:
            await self._reader_task()
        except (UnicodeError, LocalProtocolError):
            if self._wsproto.state is not ConnectionState.CONNECTING:
                raise
            await self._stream.send_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")

    async def wait_request(self) -> WebSocketRequest:
        """Returns the client's opening handshake; the caller owns the deadline and watches `run_reader`."""
        return await self._get_request()

    async def close(self, code: int, reason: str, timeout_s: float) -> None:
        """Sends Close, waits at most `timeout_s` for the peer's, and closes the stream whatever happened.

        May be called by any number of tasks, side by side; the first code counts. A message that is being sent
        goes out whole before the Close, within the same time. Cancelled, it closes the stream at once.
        """
        try:
            with trio.move_on_after(timeout_s):
                await self.aclose(code, reason)
                await self._close_handshake.wait()
        finally:
            await trio.aclose_forcefully(self._stream)

    async def keep_alive(self) -> bool:
        """Pings every 20 s until the connection ends; True if it was ended here, as its peer is silent (S3-18).

        Silent means: 120 s after a ping neither its pong nor anything else has come. It does not count while
        our own handler is what holds the reader up: that says nothing of the peer.
        """
        while True:
            await trio.sleep(PING_EVERY_S)
            heard = self._heard
            try:
                with trio.move_on_after(PONG_WITHIN_S) as waiting:
                    await self.ping()
            except ConnectionClosed:
                return False
            if waiting.cancelled_caught and heard == self._heard and not self._handler_is_late():
                await trio.aclose_forcefully(self._stream)
                return True

    def _handler_is_late(self) -> bool:
        """The queue is full, and the handler is not waiting for the peer to read."""
        reader_waits = self._send_channel.statistics().tasks_waiting_send > 0
        return reader_waits and not self._stream_lock.locked()

    async def _send(self, event: Event) -> None:
        # The library's drops what follows a half-sent frame in silence; here nothing can follow it.
        data = self._wsproto.send(event)
        async with self._stream_lock:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self._abort_web_socket()
                raise ConnectionClosed(self._close_reason) from None
            except trio.Cancelled:
                await trio.aclose_forcefully(self._stream)
                raise

    async def _handle_request_event(self, event: Request) -> None:
        # The library shows a server no headers, and loses frames that came in one segment with the head:
        # the reader waits here until we have answered, and then takes them up.
        self._handshake_headers = tuple(event.extra_headers)
        await super()._handle_request_event(event)
        await self._open_handshake.wait()
        eager, _ = self._wsproto.handshake._h11_connection.trailing_data
        if eager:
            self._wsproto.receive_data(eager)

    async def _handle_message_event(self, event: BytesMessage | TextMessage) -> None:
        self._heard += 1
        if self._close_reason is not None:
            return  # After our Close the peer's data is dropped (RFC 6455, 1.4), and only its Close awaited.
        data = event.data
        # The library counts characters.
        size = len(data) if isinstance(data, (bytes, bytearray)) or data.isascii() else len(data.encode())
        if self._message_size + size <= MAX_MESSAGE_BYTES:
            self._message_size += size - len(data)
            await super()._handle_message_event(event)
            return
        self._message_parts = []
        reason = f"a message is larger than {MAX_MESSAGE_BYTES} bytes"
        self._close_reason = CloseReason(1009, reason)
        await self._send(CloseConnection(code=1009, reason=reason))
        await self._recv_channel.aclose()

    async def _handle_ping_event(self, event: Ping) -> None:
        # A Pong after our Close is forbidden, and the library raises out of its reader for it.
        self._heard += 1
        if self._close_reason is None:
            await super()._handle_ping_event(event)

    async def _handle_close_connection_event(self, event: CloseConnection) -> None:
        # wsproto tells a broken frame as a Close of the peer, but stays OPEN; the library then hangs up
        # without a word. The peer is owed the code (RFC 6455, 7.1.7).
        if self._wsproto.state is ConnectionState.OPEN:
            self._close_reason = CloseReason(event.code, event.reason or None)
            await self._send(CloseConnection(code=event.code, reason=event.reason))
        await super()._handle_close_connection_event(event)
