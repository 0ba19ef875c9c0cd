"""Agents written as functions, for `MemoryLauncher`: a WebSocket server over any stream, and the drain of the contract.

`serving(converse)` makes a program that keeps an agent's contract out of one function for one connection.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TYPE_CHECKING

import trio
import wsproto
import wsproto.events as ws
from wsproto.connection import ConnectionState
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from supervisor.testing.launcher import AgentContext, Program

# From SIGTERM to the exit, as the contract has it.
DRAIN_S = 0.5
MAX_HEAD_BYTES = 64 * 1024
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class AgentConnection(AsyncIterator[str | bytes]):
    """One connection at the agent's end: first a request, then messages. Any task may send."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, context: AgentContext) -> None:
        self.stream = stream
        self.context = context
        # Set before `serving` calls its function.
        self.target = ""
        self.headers: list[tuple[str, str]] = []
        self._protocol = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        self._sending = trio.Lock()
        self._subprotocols: list[str] = []
        self._early = b""
        self._parts: list[str | bytes] = []
        self._closed_by_peer = False

    def header(self, name: str) -> str | None:
        """The first value of that name, in lower case, or None."""
        return next((value for key, value in self.headers if key == name), None)

    async def read_request(self) -> bool:
        """Reads the upgrade. False if the peer left first; raises wsproto's RemoteProtocolError if it is none."""
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0 and len(received) < MAX_HEAD_BYTES:
            data = await self.stream.receive_some(65536)
            if not data:
                return False
            received += data
        # wsproto, as a server, loses what comes with the request: it gets that after the answer.
        self._early = bytes(received[end + 4 :])
        self._protocol.receive_data(bytes(received[: end + 4]) if end >= 0 else b"")
        for event in self._protocol.events():
            assert isinstance(event, ws.Request)
            self.target = event.target
            self.headers = [("host", event.host)]
            self.headers += [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.extra_headers]
            self._subprotocols = event.subprotocols
            return True
        raise RemoteProtocolError("no request within 64 KiB")

    def accept_head(self) -> bytes:
        """The 101, with the first subprotocol that was offered, for those who send it in their own way."""
        subprotocol = self._subprotocols[0] if self._subprotocols else None
        head = self._protocol.send(ws.AcceptConnection(subprotocol=subprotocol))
        self._protocol.receive_data(self._early)
        return head

    async def accept(self) -> None:
        await self.send_bytes(self.accept_head())

    async def answer(self, status: int, body: bytes = b"") -> None:
        """Refuses the upgrade with a whole HTTP answer."""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        await self.send_bytes(head.encode() + body)

    async def send_bytes(self, data: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(data)

    async def send(self, message: str | bytes) -> None:
        """One message in one frame."""
        event = ws.TextMessage(message) if isinstance(message, str) else ws.BytesMessage(message)
        async with self._sending:
            if self._protocol.state is ConnectionState.OPEN:
                await self.stream.send_all(self._protocol.send(event))

    async def close(self, code: int, reason: str = "") -> None:
        """Sends Close, once, if the upgrade was accepted. `messages` ends when the peer has answered it."""
        async with self._sending:
            if self._protocol.state is ConnectionState.OPEN:
                await self.stream.send_all(self._protocol.send(ws.CloseConnection(code, reason)))

    # Why no async generator: one that is left half-way, by a cancellation inside the loop, waits for the garbage
    # collector to be finalized, and Trio warns of that.

    def messages(self) -> AsyncIterator[str | bytes]:
        """Whole messages until the Close or the end; pings and the Close are answered."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | bytes:
        while not self._closed_by_peer:
            for event in self._protocol.events():
                if isinstance(event, ws.Ping):
                    await self._answer(event.response())
                elif isinstance(event, ws.CloseConnection):
                    self._closed_by_peer = True
                    await self._answer(event.response())
                    break
                elif isinstance(event, (ws.TextMessage, ws.BytesMessage)):
                    self._parts.append(event.data if isinstance(event.data, str) else bytes(event.data))
                    if event.message_finished:
                        parts, self._parts = self._parts, []
                        return _joined(parts)
            else:
                data = await self.stream.receive_some(65536)
                self._closed_by_peer = not data
                if data:
                    self._protocol.receive_data(bytes(data))
        raise StopAsyncIteration

    async def _answer(self, event: ws.Event) -> None:
        async with self._sending:
            try:
                data = self._protocol.send(event)
            except LocalProtocolError:
                return  # our Close has gone out: nothing is owed any more
            await self.stream.send_all(data)


def _joined(parts: list[str | bytes]) -> str | bytes:
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if texts else b"".join(part for part in parts if isinstance(part, bytes))


def serving(converse: Callable[[AgentConnection], Awaitable[None]], *, heeds_sigterm: bool = True) -> Program:
    """A program that calls `converse` for each upgrade, in a task of its own, and closes the stream after it.

    On SIGTERM it answers new upgrades with 503, closes every connection with 1012, and exits with 0 after 0.5 s at
    most. With `heeds_sigterm=False` it takes the signal and does nothing. A peer that leaves ends its own connection;
    anything else that `converse` raises is a crash of the agent, status 1.
    """

    async def program(context: AgentContext) -> int:
        sigterm = context.catch_sigterm()
        open_now: set[AgentConnection] = set()
        changed = trio.Event()

        async def serve_one(stream: trio.abc.HalfCloseableStream) -> None:
            nonlocal changed
            connection = AgentConnection(stream, context)
            open_now.add(connection)
            try:
                if await connection.read_request():
                    if heeds_sigterm and sigterm.is_set():
                        await connection.answer(503)
                    else:
                        await converse(connection)
            except RemoteProtocolError:
                with contextlib.suppress(*_GONE):
                    await connection.answer(400)
            except _GONE:
                pass
            # Not in a `finally`: a process that was stopped keeps its streams, and the end of one closes them anyway.
            await stream.aclose()
            open_now.discard(connection)
            changed.set()
            changed = trio.Event()

        async def accept_all() -> None:
            while True:
                nursery.start_soon(serve_one, await context.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_all)
            await sigterm.wait()
            if not heeds_sigterm:
                await trio.sleep_forever()
            with trio.move_on_after(DRAIN_S):
                for connection in tuple(open_now):
                    nursery.start_soon(_restart, connection)
                while open_now:
                    await changed.wait()
            nursery.cancel_scope.cancel(reason="the agent has drained")
        return 0

    return program


async def _restart(connection: AgentConnection) -> None:
    with contextlib.suppress(*_GONE):
        await connection.close(1012, "Server restarting")


async def echo(connection: AgentConnection) -> None:
    """Sends every message back."""
    await connection.accept()
    async for message in connection.messages():
        await connection.send(message)


async def echo_agent(context: AgentContext) -> int | None:
    """The well-behaved agent: echoes on every path, 1012 on SIGTERM."""
    return await serving(echo)(context)


def in_turn(*programs: Program) -> Program:
    """A tenant's first start runs the first program, its second the second, and so on; the last one stays."""
    starts: Counter[str] = Counter()

    async def program(context: AgentContext) -> int | None:
        number = starts[context.spec.tenant]
        starts[context.spec.tenant] += 1
        return await programs[min(number, len(programs) - 1)](context)

    return program
