"""One HTTP/1.1 connection, served by Hypercorn's protocol class and our rules, until it ends or asks for an upgrade.

Guarantees: every head is judged before the app sees it, every wait for the client has a deadline, no write
outlives `answer_stall_s` without progress, the app ends when its client leaves, and a connection that is
done is closed so that its last bytes arrive. Never raises for what a client does. After an upgrade was
asked for, nothing of HTTP is left: the caller has the stream, the request and the bytes behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import math
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NoReturn, cast

import attrs
import h11
import trio
from h11._receivebuffer import ReceiveBuffer
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.trio.worker_context import EventWrapper
from hypercorn.typing import ConnectionState

from supervisor.gateway import heads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent

    from supervisor.settings import LimitSettings
    from supervisor.telemetry import Telemetry

    App = Callable[..., Awaitable[None]]

Message = dict[str, Any]  # of ASGI

_RECEIVE_BYTES = 64 * 1024
# What must go out within `answer_stall_s` to count as progress.
_WRITE_BYTES = 16 * 1024
# From our end of the stream until the peer's, so that a reset does not overtake the last bytes.
_LINGER_S = 2.0
# A client that sent its request and shut down its writing (`nc -N`) looks like one that left: a quick answer
# still reaches it, and a long one does not run on for nobody.
_HALF_CLOSED_S = 1.0

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


@attrs.frozen
class Takeover:
    """What is left of HTTP after an upgrade was asked for."""

    request: h11.Request
    trailing: bytes


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


@attrs.frozen(kw_only=True)
class HttpService:
    """What all connections of one front share."""

    app: App
    limits: LimitSettings
    telemetry: Telemetry
    trusted: Sequence[heads.Network | str] = ()
    # From when it is set, each connection gets at most one more answer.
    ending: Flag = attrs.field(factory=Flag)
    config: Config = attrs.field()

    @config.default
    def _config(self) -> Config:
        return hypercorn_config(self.limits)


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


def body_deadline(since: float, received_bytes: int, limits: LimitSettings) -> float:
    """When a body that began at `since` and has come that far is too slow: its minimum rate, after a start."""
    earned_s = limits.head_timeout_s + received_bytes / limits.body_min_rate_bytes
    return since + min(limits.body_timeout_s, earned_s)


class _Phase(enum.Enum):
    """What the connection waits for; each has its own deadline."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()


class _Ending(enum.Enum):
    CLOSE = enum.auto()  # nothing is under way
    LINGER = enum.auto()  # an answer was written that must arrive
    ABORT = enum.auto()  # the peer left, does not read, or would take half an answer for a whole one


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, with a look at the raw lines of a head before h11 unfolds, merges or forgives them."""

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

    def _extract(self, count: int) -> bytearray:
        self._judged = 0
        return super()._extract(count)

    def discard(self) -> None:
        self._extract(len(self))


class _Protocol(H11Protocol):
    """Hypercorn's HTTP/1.1, never HTTP/2, never its WebSockets: it hands upgrades over and refuses by our table."""

    connection: h11.Connection

    def __init__(self, owner: HttpConnection, client: tuple[str, int] | None, *, tls: bool) -> None:
        service = owner.service
        super().__init__(
            cast("Any", service.app),
            service.config,
            cast("Any", _Context(service.ending)),
            cast("Any", owner),
            ConnectionState({}),
            tls,
            client,
            None,
            owner.send,
        )
        self.max_body_bytes = service.limits.max_body_bytes
        self.buffer = _StrictBuffer(service.limits.max_head_bytes)
        self.connection._receive_buffer = self.buffer
        self.body_bytes = 0

    @property
    def phase(self) -> _Phase:
        state = self.connection.their_state
        if state is h11.IDLE:
            # Before the first request nothing is kept alive: the head is due from the connect on.
            return _Phase.HEAD if self.buffer or not self.keep_alive_requests else _Phase.IDLE
        return _Phase.BODY if state is h11.SEND_BODY else _Phase.ANSWER

    @property
    def may_refuse(self) -> bool:
        """Whether no byte of an answer to the present request was written."""
        return self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE)

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


class HttpConnection:
    """One connection. It is also the task group that Hypercorn's protocol spawns the app in."""

    def __init__(self, service: HttpService, stream: trio.abc.Stream, *, peer: str, scheme: str) -> None:
        self.service = service
        self._stream = stream
        self._peer = peer
        self._scheme = scheme
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._woken = False
        self._writing = trio.Lock()
        self._ending: _Ending | None = None
        self._nursery: trio.Nursery | None = None
        client = None if peer in ("unix", "memory") else (peer, 0)
        self._protocol: _Protocol | None = _Protocol(self, client, tls=scheme == "https")

    def wake(self) -> None:
        """Makes the reader look again at what it waits for: a request may go on, or the connection end."""
        self._woken = True
        self._reading.cancel()

    def hurry(self, deadline: float) -> None:
        """The connection ends by then, whatever is under way. Does nothing to one that was taken over."""
        self._scope.deadline = min(self._scope.deadline, deadline)
        self.wake()

    async def run(self) -> Takeover | None:
        """Serves requests until the connection has ended (None) or is to be taken over.

        The caller closes the stream in either case. Cancellation ends the app and leaves the stream as it is.
        """
        with self._scope:
            if not await self._handshake():
                return None
            outcome, answerable = await self._serve()
            if isinstance(outcome, Takeover):
                return outcome
            if isinstance(outcome, RequestRefused):
                await self._refuse(outcome, answerable=answerable)
            elif outcome is _Ending.LINGER:
                await say_and_close(self._stream)
            elif outcome is _Ending.ABORT:
                reset(self._stream)
        return None

    async def _handshake(self) -> bool:
        if not isinstance(self._stream, trio.SSLStream):
            return True
        try:
            with trio.fail_after(self.service.limits.head_timeout_s):
                await self._stream.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
            self.service.telemetry.metrics.refused.labels(reason="tls_handshake_failed").inc()
            self.service.telemetry.log.debug("tls_handshake_failed", peer=self._peer, error=repr(error))
            return False
        return True

    async def _serve(self) -> tuple[Takeover | RequestRefused | _Ending, bool]:
        outcome: Takeover | RequestRefused | _Ending = _Ending.ABORT  # a writer that gives up cancels us
        answerable = False
        try:
            async with trio.open_nursery() as self._nursery:
                assert self._protocol is not None
                outcome = await self._read(self._protocol)
                answerable = self._protocol.may_refuse
                # An app that goes on writing while it is cancelled writes nowhere.
                self._ending = self._ending or _Ending.ABORT
                self._nursery.cancel_scope.cancel()
        finally:
            # The two hold each other, and a spliced connection lives long.
            self._protocol = self._nursery = None
        return outcome, answerable

    # ---- from the client ----

    async def _read(self, protocol: _Protocol) -> Takeover | RequestRefused | _Ending:
        try:
            return await self._read_requests(protocol)
        except RequestRefused as refused:
            return self._ending or refused
        except UpgradeRequested as upgrade:
            return Takeover(upgrade.request, upgrade.trailing)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return _Ending.ABORT

    async def _read_requests(self, protocol: _Protocol) -> Takeover | RequestRefused | _Ending:
        limits = self.service.limits
        waiting_for: object = None
        since = trio.current_time()
        left_at = math.inf
        while True:
            if self._ending is None:
                began = trio.current_time()
                await protocol._handle_events()
                now = trio.current_time()
            if self._ending is not None:
                return self._ending
            phase = protocol.phase
            if waiting_for != (protocol.keep_alive_requests, phase):
                waiting_for, since = (protocol.keep_alive_requests, phase), now
            else:
                since += now - began  # The app's slowness to take a body is not the client's.
            left = left_at != math.inf
            if left and protocol.stream is None:
                return _Ending.CLOSE
            if phase is _Phase.IDLE and self.service.ending.is_set():
                return _Ending.CLOSE
            full = len(protocol.buffer) > limits.max_head_bytes
            if left:
                deadline = left_at + _HALF_CLOSED_S
            elif full:
                deadline = now + limits.body_timeout_s  # Who is not read from is not seen to leave either.
            else:
                deadline = self._deadline(protocol, phase, since)

            self._woken = False
            with trio.CancelScope(deadline=deadline) as self._reading:
                if left or full:
                    await trio.sleep_forever()  # Until woken by the end of the answer.
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            if self._reading.cancelled_caught:
                if not self._woken:
                    return self._overdue(protocol, phase)
                continue
            if not data:
                left_at = trio.current_time()
            protocol.connection.receive_data(bytes(data))

    def _deadline(self, protocol: _Protocol, phase: _Phase, since: float) -> float:
        limits = self.service.limits
        match phase:
            case _Phase.IDLE:
                return since + limits.keep_alive_s
            case _Phase.HEAD:
                return since + limits.head_timeout_s
            case _Phase.BODY:
                return body_deadline(since, protocol.body_bytes, limits)
            case _Phase.ANSWER:
                return math.inf

    def _overdue(self, protocol: _Protocol, phase: _Phase) -> RequestRefused | _Ending:
        if phase is _Phase.ANSWER:
            return _Ending.ABORT
        if phase is _Phase.BODY:
            detail = "The body did not come fast enough."
        elif protocol.buffer:
            detail = f"The head was not complete after {self.service.limits.head_timeout_s:g} s."
        else:
            return _Ending.CLOSE
        return RequestRefused(heads.Refusal(408, "request_timeout", detail))

    # ---- to the client: what Hypercorn's protocol calls ----

    async def send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._answered_last()
        elif isinstance(event, Updated) and event.idle:
            self.wake()

    def _answered_last(self) -> None:
        assert self._protocol is not None
        connection = self._protocol.connection
        # To HTTP/1.0 the end of the stream is the end of the body: half a body must not end like that.
        broken = connection.our_state is h11.SEND_BODY and connection.their_http_version == b"1.0"
        self._end(_Ending.ABORT if broken else _Ending.LINGER)

    def _end(self, ending: _Ending) -> None:
        if self._ending is None:
            self._ending = ending
            self.wake()
        if ending is _Ending.ABORT and self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _write(self, data: bytes) -> None:
        """Writes all of it, or ends the connection.

        Why no shield, as Hypercorn has: considered a bounded one; chose that a write that is given up, for
        whatever reason, ends the connection, as nothing whole can follow half a write. So an app's timeout
        around a send works at once, and no cancellation waits for a client.
        """
        view = memoryview(data)
        try:
            async with self._writing:
                while view and self._ending is None:
                    with trio.fail_after(self.service.limits.answer_stall_s):
                        await self._stream.send_all(view[:_WRITE_BYTES])
                    view = view[_WRITE_BYTES:]
        except trio.TooSlowError:
            self.service.telemetry.metrics.refused.labels(reason="answer_stalled").inc()
            self.service.telemetry.log.info("answer_stalled", peer=self._peer)
            self._end(_Ending.ABORT)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._end(_Ending.ABORT)
        except BaseException:
            self._end(_Ending.ABORT)
            raise

    async def _refuse(self, refused: RequestRefused, *, answerable: bool) -> None:
        refusal = refused.refusal
        self.service.telemetry.metrics.refused.labels(reason=refusal.code).inc()
        self.service.telemetry.log.debug(
            "request_refused", peer=self._peer, status=refusal.status, code=refusal.code, answered=answerable
        )
        if not answerable:
            reset(self._stream)
            return
        response = problem(refusal)
        if refused.head_only:
            response = response[: response.index(b"\r\n\r\n") + 4]
        await say_and_close(self._stream, response)

    # ---- the app: Hypercorn's TaskGroup ----

    async def spawn_app(
        self, app: App, config: Config, scope: Message, send: Callable[[Message | None], Awaitable[None]]
    ) -> Callable[[Message], Awaitable[None]]:
        assert self._nursery is not None
        if self.service.trusted:
            headers, trusted = scope["headers"], self.service.trusted
            peer = heads.peer_address(self._peer, headers, trusted)
            scope["client"] = scope["client"] and (peer, 0)
            scope["scheme"] = heads.peer_scheme(self._scheme, self._peer, headers, trusted)
        to_app, from_client = trio.open_memory_channel[Message](config.max_app_queue_size)
        self._nursery.start_soon(self._run_app, app, scope, from_client, send)

        async def put(message: Message) -> None:
            # Never waits for an app that has ended, and never to tell it that its client left.
            if message["type"] == "http.disconnect":
                to_app.close()
                return
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await to_app.send(message)

        return put

    async def _run_app(
        self,
        app: App,
        scope: Message,
        from_client: trio.MemoryReceiveChannel[Message],
        send: Callable[[Message | None], Awaitable[None]],
    ) -> None:
        telemetry = self.service.telemetry
        began = trio.current_time()
        status: int | None = None
        crash: ExceptionGroup[Exception] | None = None
        method, path = scope["method"], scope["path"]

        async def receive() -> Message:
            try:
                return await from_client.receive()
            except trio.EndOfChannel:
                return {"type": "http.disconnect"}

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            try:
                with from_client:
                    await app(scope, receive, send_noted)
                if status is None:
                    raise RuntimeError("the app returned without an answer")
            except* Exception as group:
                crash = group
            if crash is not None:
                telemetry.log.error("http_app_crashed", method=method, path=path, exc_info=crash)
                if status is None:
                    await self._answer_crash(send_noted)
            await send(None)
        finally:
            if status is not None:
                telemetry.metrics.count_http(method, status)
            telemetry.log.debug(
                "http_request",
                method=method,
                path=path,
                status=status,
                duration_s=round(trio.current_time() - began, 6),
                peer=self._peer,
            )

    @staticmethod
    async def _answer_crash(send: Callable[[Message], Awaitable[None]]) -> None:
        body = heads.problem_body(500, "internal", "An error of the supervisor; its log tells which.")
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def problem(refusal: heads.Refusal, *, retryable: bool = False, retry_after_s: float | None = None) -> bytes:
    """The response to a refused request; the connection closes behind it."""
    return heads.problem_response(
        refusal.status,
        refusal.code,
        refusal.detail,
        retryable=retryable or refusal.status == 408,
        retry_after_s=retry_after_s,
        extra_headers=refusal.headers,
        now=time.time(),
    )


async def say_and_close(stream: trio.abc.Stream, data: bytes = b"", *, limit_s: float = _LINGER_S) -> None:
    """Writes last bytes, ends our side, and reads the peer's to its end, all within `limit_s`.

    Closing at once would answer what the peer still sends with a reset, which can overtake the last bytes
    (RFC 9112 section 9.6). The caller closes the stream. Cancellation leaves at once.
    """
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    with trio.move_on_after(limit_s), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if data:
            await stream.send_all(data)
        if isinstance(stream, trio.SSLStream):
            # close_notify, and the peer's; one that sends data instead is read raw below.
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.unwrap()
        if isinstance(transport, trio.abc.HalfCloseableStream):
            await transport.send_eof()
        while await transport.receive_some(_RECEIVE_BYTES):
            pass


def reset(stream: trio.abc.Stream) -> None:
    """Makes the coming close of a TCP stream a reset, which also frees what the peer never read."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if isinstance(transport, trio.SocketStream):
        with contextlib.suppress(OSError, trio.ClosedResourceError):
            transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
