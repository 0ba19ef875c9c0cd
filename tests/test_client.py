from __future__ import annotations

import contextlib
import socket
import ssl
from functools import partial

import pytest
import trio
from trio.testing import memory_stream_pair
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from supervisor.client import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeFailed,
    open_websocket,
    open_websocket_url,
)


class Peer:
    """A server over a stream, driven by hand: what it does next is the test's choice."""

    def __init__(self, stream, *, split=None):
        self.stream = stream
        self.ws = WSConnection(ConnectionType.SERVER)
        self.split = split
        self.events = []

    async def write(self, data):
        if self.split is None:
            await self.stream.send_all(data)
            return
        for start in range(0, len(data), self.split):
            await self.stream.send_all(data[start : start + self.split])
            await trio.testing.wait_all_tasks_blocked()

    async def send(self, *events):
        await self.write(b"".join(bytes(self.ws.send(event)) for event in events))

    async def next(self):
        while not self.events:
            data = await self.stream.receive_some()
            if not data:
                return None
            self.ws.receive_data(data)
            self.events.extend(self.ws.events())
        return self.events.pop(0)

    async def accept(self, **kwargs):
        self.request = await self.next()
        assert isinstance(self.request, Request)
        await self.send(AcceptConnection(**kwargs))


async def echo(stream):
    peer = Peer(stream)
    await peer.accept()
    while (event := await peer.next()) is not None:
        match event:
            case TextMessage() | BytesMessage():
                await peer.send(event)
            case Ping():
                await peer.send(event.response())
            case CloseConnection():
                await peer.send(event.response())
                await stream.aclose()
                return


@contextlib.asynccontextmanager
async def connected(serve, **kwargs):
    """A WebSocket whose other end runs `serve(stream)`; asserts at the end that our stream is closed."""
    ours, theirs = memory_stream_pair()
    done = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs)
        try:
            with trio.fail_after(1000):
                async with open_websocket(ours, host="tenants.test", target="/x?y=1", **kwargs) as websocket:
                    yield websocket
            done = True
        finally:
            with pytest.raises(trio.ClosedResourceError):
                await ours.send_all(b"")
            nursery.cancel_scope.cancel()
    assert done, "the context ended by a stray cancellation"


async def test_messages_come_back_as_they_were_sent(autojump_clock):
    async with connected(echo) as websocket:
        for message in ("", "text", "é" * 70_000, b"", b"bytes", bytes(200_000)):
            await websocket.send(message)
            assert await websocket.receive() == message
        assert websocket.close_code is None
    assert (websocket.close_code, websocket.close_reason) == (1000, "")


