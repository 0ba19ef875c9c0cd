"""Hypercorn's HTTP/1.1 protocol class, made strict: every head is judged, no WebSocket and no HTTP/2 is ever spoken.

Owns what we take from the insides of Hypercorn and h11; `tests/gateway/test_hypercorn_contract.py` guards it.
Raises UpgradeRequested where a client rightly asks for a WebSocket, and RequestRefused for what is not served.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import attrs
import h11
from h11._receivebuffer import ReceiveBuffer
from hypercorn.config import Config
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.trio.worker_context import EventWrapper
from hypercorn.typing import ConnectionState

from supervisor.gateway import heads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent

    from supervisor.settings import LimitSettings

    App = Callable[..., Awaitable[None]]

Message = dict[str, Any]  # of ASGI

_PARSER_DETAILS = {
    400: ("malformed_request", "The request is not valid HTTP/1.1."),
    431: ("head_too_large", "The request's head is too long."),
    501: ("transfer_coding_not_implemented", "The only transfer coding is chunked, given once."),
}


class UpgradeRequested(Exception):
    """A request asks for a WebSocket, rightly; `trailing` are the bytes that came behind its head."""

    def __init__(self, request: h11.Request, trailing: bytes) -> None:
        super().__init__("a client asks for a WebSocket")
        self.request = request
        self.trailing = trailing


class RequestRefused(Exception):
    """A request that gets no further than its head, or a body that breaks the rules."""

    def __init__(self, refusal: heads.Refusal, *, head_only: bool = False) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal
        self.head_only = head_only


@attrs.define(eq=False)
class Flag:
    """Set once, and read by whoever passes by. Hypercorn reads it where it expects an event."""

    _is_set: bool = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True


class _Context:
    """What Hypercorn's protocol asks of a worker: whether it is ending, and an event that we never wait for."""

    event_class = EventWrapper

    def __init__(self, ending: Flag) -> None:
        self.terminated = ending

    async def mark_request(self) -> None:
        """Counts nothing: no number of requests ends us."""


def hypercorn_config(limits: LimitSettings) -> Config:
    """Hypercorn's bag of settings, with what its protocol reads. Raises AttributeError for a key that it lacks."""
    config = Config()
    values: dict[str, object] = {
        "accesslog": None,
        "errorlog": logging.getLogger("tenantry.http"),
        "h11_max_incomplete_size": limits.max_head_bytes,
        "h11_pass_raw_headers": False,
        "include_date_header": True,
        "include_server_header": False,
        "keep_alive_max_requests": 10_000,
        "max_app_queue_size": 10,
        "server_names": [],
    }
    for key, value in values.items():
        if not hasattr(Config, key):
            raise AttributeError(f"hypercorn's Config has no {key!r}: this version is not the one we know")
        setattr(config, key, value)
    return config


class Phase(enum.Enum):
    """What the connection waits for; each has its own deadline."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()


class Owner(Protocol):
    """The connection that a parser serves: it writes, and runs the app."""

    async def send(self, event: Event) -> None:
        """Writes bytes (RawData), or hears that the last answer is out (Closed) or one of several (Updated)."""

    async def spawn_app(
        self, app: App, config: Config, scope: Message, send: Callable[[Message | None], Awaitable[None]]
    ) -> Callable[[Message], Awaitable[None]]:
        """Runs the app for one request; what it returns takes the app's messages."""


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, with a look at the raw lines of heads and chunks before h11 unfolds, merges or forgives them."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__()
        self._max_head_bytes = max_head_bytes
        self._judged = 0

    def maybe_extract_lines(self) -> list[bytearray] | None:
        data = self._data
        if data[:2] != b"\r\n":
            end = data.find(b"\r\n\r\n", max(0, self._judged - 3))
            head = data[: end + 4] if end >= 0 else data
            refusal = heads.lax_line(head, self._judged)
            if len(head) > self._max_head_bytes:
                refusal = heads.Refusal(
                    431, "head_too_large", f"The request's head is longer than {self._max_head_bytes} bytes."
                )
            if refusal is None and end >= 0:
                refusal = heads.raw_refusal(head)
            if refusal is not None:
                raise RequestRefused(refusal)
            self._judged = len(data)
        return super().maybe_extract_lines()

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line before a chunk, whose extensions h11 does not look at."""
        line = super().maybe_extract_next_line()
        if line is not None and (refusal := heads.chunk_refusal(line)) is not None:
            raise RequestRefused(refusal)
        return line

    def _extract(self, count: int) -> bytearray:
        self._judged = 0
        return super()._extract(count)

    def discard(self) -> None:
        self._extract(len(self))


class Parser(H11Protocol):
    """Hypercorn's HTTP/1.1, never HTTP/2, never its WebSockets: it hands upgrades over and refuses by our table."""

    connection: h11.Connection

    def __init__(
        self,
        owner: Owner,
        app: App,
        config: Config,
        limits: LimitSettings,
        ending: Flag,
        *,
        client: tuple[str, int] | None,
        tls: bool,
    ) -> None:
        super().__init__(
            cast("Any", app),
            config,
            cast("Any", _Context(ending)),
            cast("Any", owner),
            ConnectionState({}),
            tls,
            client,
            None,
            owner.send,
        )
        self.max_body_bytes = limits.max_body_bytes
        self.buffer = _StrictBuffer(limits.max_head_bytes)
        self.connection._receive_buffer = self.buffer
        self.body_bytes = 0

    @property
    def phase(self) -> Phase:
        state = self.connection.their_state
        if state is h11.IDLE:
            # Before the first request nothing is kept alive: the head is due from the connect on.
            return Phase.HEAD if self.buffer or not self.keep_alive_requests else Phase.IDLE
        return Phase.BODY if state is h11.SEND_BODY else Phase.ANSWER

    @property
    def may_refuse(self) -> bool:
        """Whether no byte of an answer to the present request was written."""
        return self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    async def advance(self) -> None:
        """Takes all events that the buffer holds. Raises UpgradeRequested and RequestRefused."""
        await self._handle_events()

    async def _handle_events(self) -> None:
        """Takes all events that the buffer holds; unlike its model never waits for the answer to be done.

        Why: considered to leave the reader parked while a request is answered, as Hypercorn does; chose to
        return, so that the reader goes on reading and sees the client leave, also behind a pipelined request.
        """
        while True:
            if self.connection.they_are_waiting_for_100_continue:
                await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))
            if self.connection.their_state is h11.MUST_CLOSE:
                self.buffer.discard()  # What follows a last request is nobody's (RFC 9112 section 9.6).
            try:
                event = self.connection.next_event()
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint)
            if isinstance(event, h11.Request):
                await self._check_protocol(event)
                self.body_bytes = 0
                await self._create_stream(event)
            elif self.stream is None:
                return
            elif isinstance(event, h11.Data):
                self.body_bytes += len(event.data)
                if self.body_bytes > self.max_body_bytes:
                    raise RequestRefused(_too_large(self.max_body_bytes))
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            else:
                return

    def _refuse(self, status: int) -> NoReturn:
        # The parser's own words quote what it read, which may be a token.
        code, detail = _PARSER_DETAILS.get(status, _PARSER_DETAILS[400])
        raise RequestRefused(heads.Refusal(status, code, detail)) from None

    async def _check_protocol(self, event: h11.Request) -> None:
        refusal = heads.refusal(event)
        upgrade = heads.wants_upgrade(event)
        if refusal is None and upgrade:
            refusal = heads.upgrade_refusal(event)
        if refusal is None:
            length = dict(event.headers).get(b"content-length", b"0")
            if int(length) > self.max_body_bytes:
                refusal = _too_large(self.max_body_bytes)
        if refusal is not None:
            raise RequestRefused(refusal, head_only=event.method == b"HEAD")
        if upgrade:
            raise UpgradeRequested(event, bytes(self.buffer))

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and event.status_code >= 200 and self.context.terminated.is_set():
            event = dataclasses.replace(event, headers=[*event.headers, (b"connection", b"close")])
        await super().stream_send(event)


def _too_large(max_bytes: int) -> heads.Refusal:
    return heads.Refusal(413, "body_too_large", f"The request's body is longer than {max_bytes} bytes.")
