"""A pair of connected streams in memory that behave as a socket pair does: bounded buffers, half-close, resets.

Why not `trio.testing.memory_stream_pair`: it buffers without bound, so that an agent that floods never waits and one
that stops reading holds nobody up; and the lockstep pair buffers nothing, so that a program cannot write its last
words and end. A kernel's socket does what lies between.
"""

from __future__ import annotations

import operator

import trio

# About what the kernel gives a unix socket.
BUFFER_BYTES = 128 * 1024


def open_stream_pair(*, buffer_bytes: int = BUFFER_BYTES) -> tuple[MemoryStream, MemoryStream]:
    """Two ends; each holds `buffer_bytes` of the other's that were not received yet."""
    if buffer_bytes < 1:
        raise ValueError("buffer_bytes is at least 1")
    there, back = _Direction(buffer_bytes), _Direction(buffer_bytes)
    return MemoryStream(there, back), MemoryStream(back, there)


class _Direction:
    """Bytes on their way from one sender to one receiver."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self.data = bytearray()
        self.ended = False  # the sender sends no more
        self.refused = False  # the receiver takes no more
        self.changed = trio.Event()

    def look(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemoryStream(trio.abc.HalfCloseableStream):
    """One end. `close` is the synchronous `aclose`: what the kernel does when a process ends."""

    def __init__(self, outgoing: _Direction, incoming: _Direction) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False
        self._sending = False
        self._receiving = False

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return self._closed

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Returns once the buffer has taken it all. A cancelled send may have sent a part of it.

        Raises trio.BrokenResourceError if the other end is closed, trio.ClosedResourceError if this one is or has
        sent its end-of-file.
        """
        await self._send(memoryview(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Returns once there is room, or the connection is broken."""
        await self._send(None)

    async def _send(self, data: memoryview | None) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        outgoing = self._outgoing
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed or outgoing.ended:
                    raise trio.ClosedResourceError("this end is closed for sending")
                if outgoing.refused:
                    if data is None:
                        return
                    raise trio.BrokenResourceError("the other end is closed")
                room = outgoing.buffer_bytes - len(outgoing.data)
                if data is None:
                    if room > 0:
                        return
                else:
                    if room > 0 and data:
                        outgoing.data += data[:room]
                        data = data[room:]
                        outgoing.look()
                    if not data:
                        return
                await outgoing.changed.wait()
        finally:
            self._sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Returns what is there, at least one byte, or nothing at the other end's end-of-file.

        A cancelled call loses nothing. Raises trio.ClosedResourceError if this end is closed.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes is at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        incoming = self._incoming
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this end is closed")
                if incoming.data or incoming.ended:
                    received = bytes(incoming.data[:max_bytes])
                    del incoming.data[:max_bytes]
                    incoming.look()
                    return received
                await incoming.changed.wait()
        finally:
            self._receiving = False

    async def send_eof(self) -> None:
        """Ends this direction; the other goes on. Raises trio.ClosedResourceError if this end is closed."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("this end is closed")
        self._outgoing.ended = True
        self._outgoing.look()

    def close(self) -> None:
        """Closes at once. What was sent can still be received at the other end; what it sent is gone. Idempotent."""
        if not self._closed:
            self._closed = True
            self._outgoing.ended = True
            self._incoming.refused = True
            self._incoming.data.clear()
            self._outgoing.look()
            self._incoming.look()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()
