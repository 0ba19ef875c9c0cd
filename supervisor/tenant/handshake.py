"""One HTTP upgrade spoken to an agent: a head goes out, the answer's head comes back; nothing is interpreted beyond it.

The agent's own bytes are kept as they came, so that the client gets them unchanged.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import attrs
import h11
import trio

from supervisor.errors import AgentProtocolError, AgentUnreachable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

MAX_HEAD_BYTES = 64 * 1024
_RECEIVE_BYTES = 64 * 1024


@attrs.define(eq=False)
class Answer:
    """What an agent answered to an upgrade. `head` are its bytes; `rest` what came after them."""

    status: int
    head: bytes
    rest: bytes
    _http: h11.Connection

    async def body(self, stream: trio.abc.Stream) -> AsyncGenerator[bytes, None]:
        """The bytes of a refusal's body as they stand on the wire, until HTTP says that it is whole.

        Raises trio.BrokenResourceError if the agent ends it early. Cancellation loses nothing that was yielded.
        """
        data = self.rest
        while True:
            # The head was parsed already, so what h11 still holds is the body from its beginning.
            if data:
                yield data
            while True:
                event = self._http.next_event()
                if isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)) or event is h11.PAUSED:
                    return
                if event is h11.NEED_DATA:
                    break
            data = bytes(await stream.receive_some(_RECEIVE_BYTES))
            self._http.receive_data(data)


def _agent_said(http: h11.Connection) -> h11.InformationalResponse | h11.Response | None:
    try:
        event = http.next_event()
    except h11.RemoteProtocolError as error:
        raise AgentProtocolError(f"the agent's answer is not HTTP/1.1: {error}") from None
    if event is h11.NEED_DATA:
        return None
    assert isinstance(event, (h11.InformationalResponse, h11.Response))
    return event


async def exchange(stream: trio.abc.Stream, head: bytes) -> Answer:
    """Sends `head`, returns the agent's final answer: 101, or a refusal.

    Raises AgentUnreachable if the stream breaks or ends first, AgentProtocolError if what comes is no HTTP.
    Has no deadline of its own. After a cancellation the stream is of no more use.
    """
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    http.send(
        h11.Request(
            method="GET",
            target="/",
            headers=[("Host", "agent"), ("Connection", "Upgrade"), ("Upgrade", "websocket")],
        )
    )
    http.send(h11.EndOfMessage())
    received = b""
    try:
        await stream.send_all(head)
        while True:
            data = bytes(await stream.receive_some(_RECEIVE_BYTES))
            if not data:
                raise AgentUnreachable("the agent closed the connection before it answered")
            received += data
            http.receive_data(data)
            while (event := _agent_said(http)) is not None:
                rest = http.trailing_data[0]
                answer_head = received[: len(received) - len(rest)]
                if len(answer_head) > MAX_HEAD_BYTES:
                    raise AgentProtocolError(
                        f"the agent's answer is not HTTP/1.1: its head is longer than {MAX_HEAD_BYTES} bytes"
                    )
                if event.status_code == 101 or event.status_code >= 200:
                    return Answer(event.status_code, answer_head, rest, http)
                received = rest  # 100, 103: not the answer yet
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        raise AgentUnreachable("the agent broke the connection before it answered") from None


def probe_head(tenant: str) -> bytes:
    """A WebSocket upgrade of our own to `/`: what `wake` asks, since ready is an answered handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET / HTTP/1.1\r\nHost: agent\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        f"Tenantry-Tenant: {tenant}\r\nTenantry-Subject: supervisor\r\nTenantry-Connection: wake\r\n\r\n"
    ).encode("ascii")
