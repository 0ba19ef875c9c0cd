"""What we take from Hypercorn's and h11's insides. A failure here means: read `supervisor/gateway/parser.py` again."""

from __future__ import annotations

import importlib.metadata
import inspect
import re

import h11
import pytest
from h11._receivebuffer import ReceiveBuffer
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import EventWrapper
from hypercorn.typing import ConnectionState

PLAIN = b"GET /a%20b?q=1 HTTP/1.1\r\nHost: x\r\nX-Y: Z\r\n\r\n"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


class Context:
    event_class = EventWrapper

    def __init__(self):
        self.terminated = self
        self.marked = 0

    def is_set(self):
        return False

    async def mark_request(self):
        self.marked += 1


class TaskGroup:
    """Takes what the protocol spawns, and runs nothing."""

    def __init__(self):
        self.scopes, self.messages, self.sends = [], [], []

    async def spawn_app(self, app, config, scope, send):
        self.scopes.append(scope)
        self.sends.append(send)

        async def put(message):
            self.messages.append(message)

        return put


class Harness:
    """A protocol with fakes around it: what it sends, spawns and puts."""

    def __init__(self):
        self.sent = []
        self.tasks = TaskGroup()
        self.context = Context()
        config = Config()
        config.include_server_header = False

        async def send(event):
            self.sent.append(event)

        self.protocol = H11Protocol(
            "app", config, self.context, self.tasks, ConnectionState({}), False, ("9.9.9.9", 1), None, send
        )

    def said(self) -> bytes:
        return b"".join(event.data for event in self.sent if isinstance(event, RawData))


def test_the_versions_are_those_that_were_read():
    assert re.match(r"0\.18\.", importlib.metadata.version("hypercorn"))
    assert re.match(r"0\.16\.", importlib.metadata.version("h11"))


def test_the_signatures_that_we_call_or_override():
    assert parameters(H11Protocol.__init__) == [
        *["self", "app", "config", "context", "task_group", "connection_state", "ssl", "client", "server", "send"]
    ]
    for method in ("_handle_events", "_maybe_recycle", "_close_stream"):
        assert parameters(getattr(H11Protocol, method)) == ["self"]
        assert inspect.iscoroutinefunction(getattr(H11Protocol, method))
    assert parameters(H11Protocol._check_protocol) == ["self", "event"]
    assert parameters(H11Protocol._create_stream) == ["self", "request"]
    assert parameters(H11Protocol._send_h11_event) == ["self", "event"]
    assert parameters(H11Protocol.stream_send) == ["self", "event"]
    assert parameters(HTTPStream.handle) == ["self", "event"]
    assert parameters(ReceiveBuffer._extract) == ["self", "count"]
    assert parameters(ReceiveBuffer.maybe_extract_lines) == ["self"]


def test_hypercorn_reads_no_setting_that_we_do_not_set():
    """Every `config.` in the two modules that we run is one that `hypercorn_config` sets, or has no effect."""
    from hypercorn.protocol import h11 as protocol
    from hypercorn.protocol import http_stream

    source = inspect.getsource(protocol) + inspect.getsource(http_stream)
    assert set(re.findall(r"config\.(\w+)", source)) == {
        "h11_max_incomplete_size",
        "h11_pass_raw_headers",
        "keep_alive_max_requests",
        "log",  # accesslog, errorlog
        "response_headers",  # include_date_header, include_server_header, alt_svc_headers
        "root_path",
    }


async def test_a_request_becomes_one_app_with_its_scope():
    harness = Harness()
    await harness.protocol.handle(RawData(PLAIN))
    (scope,) = harness.tasks.scopes
    assert scope["type"] == "http"
    assert (scope["method"], scope["path"], scope["query_string"]) == ("GET", "/a b", b"q=1")
    assert scope["headers"] == [(b"host", b"x"), (b"x-y", b"Z")]
    assert (scope["client"], scope["server"], scope["scheme"]) == (("9.9.9.9", 1), None, "http")
    assert harness.tasks.messages == [{"type": "http.request", "body": b"", "more_body": False}]
    assert harness.protocol.keep_alive_requests == 1
    assert harness.context.marked == 1
    assert isinstance(harness.sent[0], Updated)
    assert harness.sent[0].idle is False


async def test_an_answer_recycles_the_connection_and_says_that_it_is_idle():
    harness = Harness()
    await harness.protocol.handle(RawData(PLAIN))
    (send,) = harness.tasks.sends
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
    assert harness.said().startswith(b"HTTP/1.1 200 ")
    assert harness.said().endswith(b"\r\n\r\nok")
    assert harness.protocol.stream is None
    assert harness.protocol.connection.their_state is h11.IDLE
    assert harness.tasks.messages[-1] == {"type": "http.disconnect"}
    assert isinstance(harness.sent[-1], Updated)
    assert harness.sent[-1].idle is True
    await send(None)  # the app has ended: nothing more happens
    assert harness.sent[-1].idle is True


@pytest.mark.parametrize("last", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"])
async def test_a_last_answer_says_closed(last):
    harness = Harness()
    await harness.protocol.handle(RawData(last))
    (send,) = harness.tasks.sends
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
    assert isinstance(harness.sent[-1], Closed)
    assert harness.protocol.connection.our_state is not h11.SEND_BODY


async def test_half_an_answer_says_closed_in_the_state_that_we_look_at():
    harness = Harness()
    await harness.protocol.handle(RawData(PLAIN))
    (send,) = harness.tasks.sends
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await send(None)
    assert isinstance(harness.sent[-1], Closed)
    assert harness.protocol.connection.our_state is h11.SEND_BODY
    assert harness.protocol.connection.their_http_version == b"1.1"


async def test_an_app_without_an_answer_gets_500_from_hypercorn_unless_we_are_first():
    harness = Harness()
    await harness.protocol.handle(RawData(PLAIN))
    await harness.tasks.sends[0](None)
    assert harness.said().startswith(b"HTTP/1.1 500 ")


async def test_the_stream_takes_bodies_by_these_events():
    harness = Harness()
    await harness.protocol.handle(RawData(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"))
    assert harness.tasks.messages == [{"type": "http.request", "body": b"abc", "more_body": True}]
    await harness.protocol.stream.handle(Body(stream_id=STREAM_ID, data=b"d"))
    await harness.protocol.stream.handle(EndBody(stream_id=STREAM_ID))
    assert [message["more_body"] for message in harness.tasks.messages] == [True, True, False]
    assert Response(stream_id=STREAM_ID, headers=[], status_code=200).status_code == 200


async def test_hypercorn_takes_no_request_for_a_websocket_that_we_do_not():
    """Its own WebSockets must be unreachable: `wants_upgrade` covers whatever it would take for one."""
    from supervisor.gateway.heads import wants_upgrade

    for upgrade in (b"websocket", b"WebSocket", b" websocket ", b"h2c"):
        harness = Harness()
        head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n"
        harness.protocol.connection.receive_data(head)
        request = harness.protocol.connection.next_event()
        await harness.protocol._create_stream(request)
        assert wants_upgrade(request) or isinstance(harness.protocol.stream, HTTPStream), upgrade


def test_h11_reads_heads_and_trailers_through_its_buffer():
    """Our buffer takes the place of h11's, and sees raw lines exactly where h11 reads them."""
    seen = []

    class Spy(ReceiveBuffer):
        def maybe_extract_lines(self):
            seen.append(bytes(self._data))
            return super().maybe_extract_lines()

    connection = h11.Connection(h11.SERVER)
    assert type(connection._receive_buffer) is ReceiveBuffer
    connection._receive_buffer = Spy()
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert isinstance(connection.next_event(), h11.Request)
    connection.receive_data(b"1\r\nx\r\n0\r\nA: b\r\n\r\nrest")
    assert isinstance(connection.next_event(), h11.Data)
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert len(seen) == 2
    assert seen[1].startswith(b"A: b")
    assert connection.trailing_data == (b"rest", False)
    assert bytes(connection._receive_buffer) == b"rest"


def test_h11_lets_an_error_of_the_buffer_through_and_is_in_error_then():
    class Broken(ReceiveBuffer):
        def maybe_extract_lines(self):
            raise LookupError

    connection = h11.Connection(h11.SERVER)
    connection._receive_buffer = Broken()
    connection.receive_data(b"GET")
    with pytest.raises(LookupError):
        connection.next_event()
    assert connection.their_state is h11.ERROR
    assert connection.our_state is h11.IDLE


def test_h11_has_the_states_that_our_phases_are_read_from():
    connection = h11.Connection(h11.SERVER)
    assert connection.their_state is h11.IDLE
    connection.receive_data(b"POST / HTTP/1.0\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
    connection.next_event()
    assert connection.their_state is h11.SEND_BODY
    assert connection.our_state is h11.SEND_RESPONSE
    connection.receive_data(b"x" + b"behind")
    connection.next_event()
    assert connection.next_event().__class__ is h11.EndOfMessage
    assert connection.their_state is h11.MUST_CLOSE
    with pytest.raises(h11.RemoteProtocolError):
        connection.next_event()  # why we discard what follows a last request
