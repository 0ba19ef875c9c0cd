"""One HTTP/1.1 connection, read by our parser and answered by the app, until it ends or asks for an upgrade.

Guarantees: every head is judged before the app sees it, every wait for the client has a deadline, no write
outlives `answer_stall_s` without progress, the app ends when its client leaves, and a connection that is
done is closed so that its last bytes arrive. Never raises for what a client does. After an upgrade was
asked for, nothing of HTTP is left: the caller has the stream, the request and the bytes behind it.
"""

from __future__ import annotations

import contextlib
import enum
import math
import socket
import struct
import time
from typing import TYPE_CHECKING

import attrs
import h11
import trio
from hypercorn.events import Closed, RawData, Updated

from supervisor.gateway import heads
from supervisor.gateway.parser import (
    Flag,
    Message,
    Parser,
    Phase,
    RequestRefused,
    UpgradeRequested,
    hypercorn_config,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.config import Config
    from hypercorn.events import Event

    from supervisor.gateway.parser import App
    from supervisor.settings import LimitSettings
    from supervisor.telemetry import Telemetry

_RECEIVE_BYTES = 64 * 1024
# What must go out within `answer_stall_s` to count as progress.
_WRITE_BYTES = 16 * 1024
# From our end of the stream until the peer's, so that a reset does not overtake the last bytes.
_LINGER_S = 2.0
# A client that sent its request and shut down its writing (`nc -N`) looks like one that left: a quick answer
# still reaches it, and a long one does not run on for nobody.
_HALF_CLOSED_S = 1.0


@attrs.frozen
class Takeover:
    """What is left of HTTP after an upgrade was asked for."""

    request: h11.Request
    trailing: bytes


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


def body_deadline(since: float, received_bytes: int, limits: LimitSettings) -> float:
    """When a body that began at `since` and has come that far is too slow: its minimum rate, after a start."""
    earned_s = limits.head_timeout_s + received_bytes / limits.body_min_rate_bytes
    return since + min(limits.body_timeout_s, earned_s)


class _Ending(enum.Enum):
    CLOSE = enum.auto()  # nothing is under way
    LINGER = enum.auto()  # an answer was written that must arrive
    ABORT = enum.auto()  # the peer left, does not read, or would take half an answer for a whole one


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
        self._parser: Parser | None = Parser(
            self,
            service.app,
            service.config,
            service.limits,
            service.ending,
            client=client,
            tls=scheme == "https",
        )

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
                assert self._parser is not None
                outcome = await self._read(self._parser)
                answerable = self._parser.may_refuse
                # An app that goes on writing while it is cancelled writes nowhere.
                self._ending = self._ending or _Ending.ABORT
                self._nursery.cancel_scope.cancel()
        finally:
            # The two hold each other, and a spliced connection lives long.
            self._parser = self._nursery = None
        return outcome, answerable

    # ---- from the client ----

    async def _read(self, parser: Parser) -> Takeover | RequestRefused | _Ending:
        try:
            return await self._read_requests(parser)
        except RequestRefused as refused:
            return self._ending or refused
        except UpgradeRequested as upgrade:
            return Takeover(upgrade.request, upgrade.trailing)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return _Ending.ABORT

    async def _read_requests(self, parser: Parser) -> Takeover | RequestRefused | _Ending:
        limits = self.service.limits
        waiting_for: object = None
        since = trio.current_time()
        left_at = math.inf
        while True:
            if self._ending is None:
                began = trio.current_time()
                await parser.advance()
                now = trio.current_time()
            if self._ending is not None:
                return self._ending
            phase = parser.phase
            if waiting_for != (parser.keep_alive_requests, phase):
                waiting_for, since = (parser.keep_alive_requests, phase), now
            else:
                since += now - began  # The app's slowness to take a body is not the client's.
            left = left_at != math.inf
            if left and parser.stream is None:
                return _Ending.CLOSE
            if phase is Phase.IDLE and self.service.ending.is_set():
                return _Ending.CLOSE
            full = len(parser.buffer) > limits.max_head_bytes
            if left:
                deadline = left_at + _HALF_CLOSED_S
            elif full:
                deadline = now + limits.body_timeout_s  # Who is not read from is not seen to leave either.
            else:
                deadline = self._deadline(parser, phase, since)

            self._woken = False
            with trio.CancelScope(deadline=deadline) as self._reading:
                if left or full:
                    await trio.sleep_forever()  # Until woken by the end of the answer.
                data = await self._stream.receive_some(_RECEIVE_BYTES)
            if self._reading.cancelled_caught:
                if not self._woken:
                    return self._overdue(parser, phase)
                continue
            if not data:
                left_at = trio.current_time()
            parser.connection.receive_data(bytes(data))

    def _deadline(self, parser: Parser, phase: Phase, since: float) -> float:
        limits = self.service.limits
        match phase:
            case Phase.IDLE:
                return since + limits.keep_alive_s
            case Phase.HEAD:
                return since + limits.head_timeout_s
            case Phase.BODY:
                return body_deadline(since, parser.body_bytes, limits)
            case Phase.ANSWER:
                return math.inf

    def _overdue(self, parser: Parser, phase: Phase) -> RequestRefused | _Ending:
        if phase is Phase.ANSWER:
            return _Ending.ABORT
        if phase is Phase.BODY:
            detail = "The body did not come fast enough."
        elif parser.buffer:
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
        assert self._parser is not None
        connection = self._parser.connection
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
