"""One HTTP upgrade spoken to an agent: a head goes out, the answer comes back, and what may go on to the client.

The agent is not trusted: what it answers is parsed and written anew, so that no client and no proxy in front of us
can be made to read two answers where there was one (RFC 9112 section 11.1).
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


# Of one hop, or for a whole origin that tenants share.
_NOT_PASSED_ON = frozenset({b"keep-alive", b"proxy-connection", b"set-cookie", b"te", b"trailer", b"transfer-encoding"})
_MAX_ERROR_CHARS = 200


@attrs.define(eq=False)
class Answer:
    """What an agent answered to an upgrade. `head` is for the client; after a 101, `rest` are its first bytes."""

    status: int
    head: bytes
    rest: bytes
    _http: h11.Connection

    async def body(self, stream: trio.abc.Stream) -> AsyncGenerator[bytes, None]:
        """A refusal's body, and nothing that the agent sent after it. Ends with the connection, as `head` says.

        Raises h11.RemoteProtocolError if its framing is wrong or it ends early, trio.BrokenResourceError.
        """
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif event is h11.NEED_DATA:
                self._http.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
            else:
                return


def _head(event: h11.InformationalResponse | h11.Response) -> bytes:
    """The agent's head in its own order and spelling, without what must not go on."""
    switching = event.status_code == 101
    lines = [b"HTTP/1.1 %d %s" % (event.status_code, event.reason)]
    for name, value in event.headers.raw_items():
        key = name.lower()
        if key in _NOT_PASSED_ON or (key in (b"connection", b"upgrade") and not switching):
            continue
        lines.append(b"%s: %s" % (name, value))
    if not switching:
        lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _agent_said(http: h11.Connection) -> h11.InformationalResponse | h11.Response | None:
    try:
        event = http.next_event()
    except h11.RemoteProtocolError as error:
        raise AgentProtocolError(f"the agent's answer is not HTTP/1.1: {str(error)[:_MAX_ERROR_CHARS]}") from None
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
                if len(received) - len(rest) > MAX_HEAD_BYTES:
                    raise AgentProtocolError(
                        f"the agent's answer is not HTTP/1.1: its head is longer than {MAX_HEAD_BYTES} bytes"
                    )
                if event.status_code == 101 or event.status_code >= 200:
                    return Answer(event.status_code, _head(event), rest, http)
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
