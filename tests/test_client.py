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
    done, error = False, None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs)
        try:
            with trio.fail_after(1000):
                async with open_websocket(ours, host="tenants.test", target="/x?y=1", **kwargs) as websocket:
                    yield websocket
            done = True
        except Exception as raised:
            error = raised
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"")
        # The peer's own assertions come before the end, and several of its steps may be left.
        for _ in range(5):
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    assert done, "the context ended by a stray cancellation"


async def test_messages_come_back_as_they_were_sent(autojump_clock):
    async with connected(echo) as websocket:
        for message in ("", "text", "é" * 70_000, b"", b"bytes", bytes(200_000)):
            await websocket.send(message)
            assert await websocket.receive() == message
        assert websocket.close_code is None
    assert (websocket.close_code, websocket.close_reason) == (1000, "")


@pytest.mark.parametrize("split", [1, 2, 3, 7])
async def test_every_split_of_the_peers_bytes_is_the_same_to_us(split, autojump_clock):
    async def serve(stream):
        peer = Peer(stream, split=split)
        await peer.accept(subprotocol="b", extra_headers=[(b"x-kept", b"1")])
        await peer.send(
            TextMessage("gr", message_finished=False),
            Ping(b"p"),
            TextMessage("üß", message_finished=True),
            BytesMessage(bytes(130)),
            CloseConnection(1012, "Server restarting"),
        )
        assert await peer.next() == Pong(b"p")
        assert await peer.next() == CloseConnection(1012, "Server restarting")

    async with connected(serve, subprotocols=["a", "b"]) as websocket:
        assert websocket.subprotocol == "b"
        assert dict(websocket.response_headers)["x-kept"] == "1"
        assert await websocket.receive() == "grüß"
        assert await websocket.receive() == bytes(130)
        for _ in range(2):
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.receive()
            assert (caught.value.code, caught.value.reason) == (1012, "Server restarting")
        with pytest.raises(ConnectionClosed, match="1012"):
            await websocket.send("late")


async def test_frames_in_the_segment_of_the_101_are_received(autojump_clock):
    async def serve(stream):
        peer = Peer(stream)
        request = await peer.next()
        head = peer.ws.send(AcceptConnection())
        await stream.send_all(head + peer.ws.send(TextMessage("eager")))
        assert request.target == "/x?y=1"
        assert request.host == "tenants.test"

    async with connected(serve) as websocket:
        assert await websocket.receive() == "eager"


async def test_the_request_carries_our_headers_and_offers_no_extension(autojump_clock):
    seen = []

    async def serve(stream):
        seen.append(bytes(await stream.receive_some()))
        await stream.aclose()

    with pytest.raises(HandshakeFailed):
        async with connected(serve, headers=[("Authorization", "Bearer x")], subprotocols=["a", "b"]):
            pass
    assert b"\r\nAuthorization: Bearer x\r\n" in seen[0]
    assert b"\r\nSec-WebSocket-Protocol: a, b\r\n" in seen[0]
    assert b"extensions" not in seen[0].lower()


# ---- the handshake -------------------------------------------------------------------------------------------


def answers(*chunks, then="close"):
    async def serve(stream):
        await stream.receive_some()
        with contextlib.suppress(trio.BrokenResourceError):
            for chunk in chunks:
                await stream.send_all(chunk)
        if then == "close":
            await stream.aclose()
        else:
            await trio.sleep_forever()

    return serve


def forged(**changes):
    """A 101 whose accept token belongs to another request."""
    headers = {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": "bm90IHRoZSB0b2tlbiBhdCBhbGw=",
    } | changes
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
    return f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode()


@pytest.mark.parametrize(
    ("serve", "words", "within_s"),
    [
        (answers(), "ended before an answer", 0),
        (answers(b"HTTP/1.1 101 Swi"), "ended before an answer", 0),
        (answers(b"\x00\xff garbage\r\n\r\n"), "no answer of HTTP/1.1", 0),
        (answers(b"HTTP/1.1 101 X\r\na: " + b"x" * 70_000, then="silence"), "no answer of HTTP/1.1", 0),
        (answers(then="silence"), "within 3 s", 3),
        (answers(b"HTTP/1.1 10", then="silence"), "within 3 s", 3),
        (answers(b"HTTP/1.1 103 Early Hints\r\n\r\n", then="silence"), "within 3 s", 3),
        (answers(forged()), "header: Sec-WebSocket-Accept$", 0),
        (answers(forged(upgrade="")), "header: Upgrade, ", 0),
        (answers(forged(connection="close")), "Connection", 0),
        (answers(forged(**{"sec-websocket-protocol": "mqtt"})), "Sec-WebSocket-Protocol", 0),
        (answers(forged(**{"sec-websocket-extensions": "x-deflate"})), "Sec-WebSocket-Extensions", 0),
    ],
)
async def test_a_bad_answer_to_the_upgrade_fails_in_time(serve, words, within_s, autojump_clock):
    begun = trio.current_time()
    with pytest.raises(HandshakeFailed, match=words):
        async with connected(serve, handshake_timeout_s=3):
            pytest.fail("no handshake took place")
    assert trio.current_time() - begun == pytest.approx(within_s)


async def test_a_peer_that_resets_fails_the_handshake_at_once():
    ours, theirs = map(trio.SocketStream, map(trio.socket.from_stdlib_socket, socket.socketpair()))

    async def reset():
        await theirs.socket.recv(1)
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reset)
        with trio.fail_after(2), pytest.raises(HandshakeFailed, match=r"broke before an answer.*104"):
            async with open_websocket(ours, host="x", target="/"):
                pass
    assert ours.socket.fileno() == -1


async def test_a_refusal_is_told_with_status_headers_and_body(autojump_clock):
    async def serve(stream):
        peer = Peer(stream, split=9)
        await peer.next()
        await peer.send(
            RejectConnection(status_code=503, headers=[(b"retry-after", b"1")], has_body=True),
            RejectData(b"not ", body_finished=False),
            RejectData(b"now", body_finished=True),
        )

    with pytest.raises(ConnectionRejected) as caught:
        async with connected(serve):
            pass
    assert (caught.value.status, caught.value.body) == (503, b"not now")
    assert ("retry-after", "1") in caught.value.headers


@pytest.mark.parametrize(
    ("rest", "then", "within_s", "size"),
    [
        (b"half", "silence", 3, 4),
        (b"half", "close", 0, 4),
        (b"x" * 100_000, "silence", 0, 64 * 1024),
    ],
)
async def test_a_refusal_whose_body_does_not_end_is_told_all_the_same(rest, then, within_s, size, autojump_clock):
    serve = answers(b"HTTP/1.1 403 No\r\ncontent-length: 1000000\r\n\r\n", rest, then=then)
    begun = trio.current_time()
    with pytest.raises(ConnectionRejected) as caught:
        async with connected(serve, handshake_timeout_s=3):
            pass
    assert (caught.value.status, len(caught.value.body)) == (403, size)
    assert trio.current_time() - begun == pytest.approx(within_s)


async def test_a_header_that_http_cannot_carry_is_our_error(autojump_clock):
    with pytest.raises(ValueError, match="not a request that HTTP can carry"):
        async with connected(answers(), headers=[("X", "a\r\nb: c")]):
            pass


async def test_a_cancelled_handshake_closes_the_stream(autojump_clock):
    with trio.move_on_after(1) as scope:
        async with connected(answers(then="silence")):
            pytest.fail("no handshake took place")
    assert scope.cancelled_caught


# ---- peers that break the rules ------------------------------------------------------------------------------


def after_upgrade(*chunks, then="close"):
    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        for chunk in chunks:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(chunk)
        if then == "close":
            await stream.aclose()
        else:
            await trio.sleep_forever()

    return serve


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", 1006),
        (b"\x82", 1006),
        (b"\x82\x7e\x01", 1006),
        (b"\x82\x05abc", 1006),
        (b"\x02\x03abc", 1006),
        (b"\x88\x00", 1005),
        (b"\x88\x01\x03", 1002),
        (b"\x88\x02\x03\xed", 1002),
        (b"\x83\x00", 1002),
        (b"\xc1\x00", 1002),
        (b"\x81\x81\x00\x00\x00\x00a", 1002),
        (b"\x80\x01a", 1002),
        (b"\x09\x00", 1002),
        (b"\x89\x7e\x00\x80" + bytes(128), 1002),
        (b"\x81\x02\xff\xff", 1007),
        (b"\x82\x7e\x04\x01" + bytes(1025), 1009),
        (b"\x02\x7e\x03\xff" + bytes(1023) + b"\x80\x02ab", 1009),
        (b"\x81\x7e\x04\x01" + "é".encode() * 512 + b"!", 1009),
    ],
)
async def test_the_code_says_how_the_peer_ended(sent, code, autojump_clock):
    then = "close" if code == 1006 else "silence"
    async with connected(after_upgrade(sent, then=then), max_message_bytes=1024) as websocket:
        with pytest.raises(ConnectionClosed) as caught:
            await websocket.receive()
        assert caught.value.code == websocket.close_code == code


async def test_a_message_of_the_limit_passes(autojump_clock):
    sent = b"\x82\x7e\x04\x00" + bytes(1024)
    async with connected(after_upgrade(sent), max_message_bytes=1024) as websocket:
        assert await websocket.receive() == bytes(1024)


async def test_a_peer_that_breaks_the_protocol_is_told(autojump_clock):
    told = []

    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        await stream.send_all(b"\x82\x02ab\x83\x00")
        told.append(await peer.next())

    async with connected(serve) as websocket:
        assert await websocket.receive() == b"ab"
        with pytest.raises(ConnectionClosed, match="1002"):
            await websocket.receive()
        await trio.testing.wait_all_tasks_blocked()
    assert told[0].code == 1002


async def test_closing_waits_for_the_peers_close_no_longer_than_told(autojump_clock):
    """A peer that never answers the Close, and one that never stops talking, cost the same."""

    async def flood(stream):
        await Peer(stream).accept()
        while True:
            await stream.send_all(b"\x82\x01x")
            await trio.sleep(0.1)

    for serve in (after_upgrade(then="silence"), flood):
        async with connected(serve, close_timeout_s=2) as websocket:
            begun = trio.current_time()
            await websocket.aclose()
            assert trio.current_time() - begun == pytest.approx(2)
        assert websocket.close_code == 1006


async def test_our_close_says_its_code_and_gets_the_peers(autojump_clock):
    told = []

    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        told.append(await peer.next())
        # A last word before its own Close is allowed to the peer, and wsproto does not know that.
        await stream.send_all(b"\x81\x04word\x88\x06\x0f\xa1mine")

    async with connected(serve) as websocket:
        begun = trio.current_time()
        await websocket.aclose(4000, "yours")
        assert trio.current_time() == begun
        assert (websocket.close_code, websocket.close_reason) == (4001, "mine")
    assert told == [CloseConnection(4000, "yours")]


# ---- cancellation and concurrency ----------------------------------------------------------------------------


async def test_a_cancelled_receive_loses_nothing(autojump_clock):
    """Cut after every byte of two messages with a ping between: the third call goes on where the first was."""
    frames = b"\x02\x02ab\x89\x01p\x80\x02cd\x81\x02ok"

    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        for byte in frames:
            await stream.send_all(bytes([byte]))
            await trio.sleep(1)
        assert await peer.next() == Pong(b"p")

    async with connected(serve) as websocket:
        got = []
        while len(got) < 2:
            with trio.move_on_after(0.3):
                got.append(await websocket.receive())
        assert got == [b"abcd", "ok"]


class FullStream(trio.abc.Stream):
    """Takes `room` bytes and then none, as the socket of a peer that does not read; what it reads is scripted."""

    def __init__(self, stream):
        self.stream = stream
        self.room = 1 << 30
        self.sent = bytearray()
        self.closed = False

    async def send_all(self, data):
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise trio.ClosedResourceError
        part, rest = data[: self.room], data[self.room :]
        self.room -= len(part)
        self.sent += part
        await self.stream.send_all(part)
        if rest:
            await trio.sleep_forever()

    async def wait_send_all_might_not_block(self):
        if not self.room:
            await trio.sleep_forever()

    async def receive_some(self, max_bytes=None):
        return await self.stream.receive_some(max_bytes)

    async def aclose(self):
        self.closed = True
        await self.stream.aclose()


@contextlib.asynccontextmanager
async def full(serve, **kwargs):
    ours, theirs = memory_stream_pair()
    stream = FullStream(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, theirs)
        with trio.fail_after(1000):
            async with open_websocket(stream, host="x", target="/", **kwargs) as websocket:
                yield stream, websocket
        assert stream.closed
        nursery.cancel_scope.cancel()


async def test_a_send_cancelled_inside_a_frame_ends_the_connection(autojump_clock):
    async with full(after_upgrade(then="silence")) as (stream, websocket):
        stream.room = 5
        with trio.move_on_after(1) as scope:
            await websocket.send("longer than five bytes")
        assert scope.cancelled_caught
        assert stream.closed
        for call in (websocket.receive, partial(websocket.send, "x"), websocket.ping):
            with pytest.raises(ConnectionClosed, match="cancelled inside a frame"):
                await call()


async def test_a_send_cancelled_before_its_first_byte_costs_nothing(autojump_clock):
    async with connected(echo) as websocket:
        with trio.CancelScope() as scope:
            scope.cancel()
            await websocket.send("never")
        await websocket.send("still here")
        assert await websocket.receive() == "still here"


async def test_a_receiver_is_woken_when_another_tasks_send_ends_the_connection(autojump_clock):
    ended = []

    async def receive(websocket):
        with pytest.raises(ConnectionClosed) as caught:
            await websocket.receive()
        ended.append(caught.value.code)

    async with full(after_upgrade(then="silence")) as (stream, websocket), trio.open_nursery() as nursery:
        nursery.start_soon(receive, websocket)
        await trio.testing.wait_all_tasks_blocked()
        stream.room = 5
        with trio.move_on_after(1):
            await websocket.send("longer than five bytes")
    assert ended == [1006]


async def test_receiving_goes_on_while_the_peer_takes_no_pong(autojump_clock):
    """A peer that is stuck in its own send reads nothing: who waited for room for a Pong would never read either."""
    sent = b"".join(b"\x89\x01" + bytes([mark]) + b"\x81\x01" + bytes([mark]) for mark in b"abc")
    async with full(after_upgrade(sent, then="silence")) as (stream, websocket):
        stream.room = 0
        begun = trio.current_time()
        assert [await websocket.receive() for _ in "abc"] == ["a", "b", "c"]
        assert trio.current_time() - begun < 1
        stream.room = 1000
        stream.sent.clear()
        await websocket.send("x")
        # One Pong, the newest, goes with the next frame; both masked.
        assert (stream.sent[0], stream.sent[7]) == (0x8A, 0x81)
        mask, pong = stream.sent[2:6], stream.sent[6]
        assert mask[0] ^ pong == ord("c")


async def test_pongs_go_between_the_frames_of_a_sender(autojump_clock):
    """Two tasks, a full-duplex load and pings: no deadlock, no torn frame, every message once and in order."""
    count = 300

    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        seen = pongs = 0
        for number in range(count):
            await peer.send(Ping(str(number).encode()), TextMessage(str(number)))
            while peer.events or number == count - 1:
                event = await peer.next()
                if isinstance(event, TextMessage):
                    assert event.data == str(seen)
                    seen += 1
                elif isinstance(event, Pong):
                    pongs += 1
                elif isinstance(event, CloseConnection):
                    assert seen == count
                    assert pongs >= 1
                    await peer.send(event.response())
                    return

    async with connected(serve) as websocket:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send_all():
                for number in range(count):
                    await websocket.send(str(number))

            for number in range(count):
                assert await websocket.receive() == str(number)
        await websocket.aclose()
        assert websocket.close_code == 1000


async def test_the_tail_is_received_after_a_send_failed():
    """The peer said why it went (1012) before it went: that word is not lost to our broken pipe."""
    ours, theirs = map(trio.SocketStream, map(trio.socket.from_stdlib_socket, socket.socketpair()))

    async def serve():
        peer = Peer(theirs)
        await peer.accept()
        await peer.send(TextMessage("tail"), CloseConnection(1012, "Server restarting"))
        await theirs.aclose()
        gone.set()

    gone = trio.Event()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with open_websocket(ours, host="x", target="/") as websocket:
                await gone.wait()
                with pytest.raises(ConnectionClosed, match="takes no more data"):
                    await websocket.send("x")
                assert await websocket.receive() == "tail"
                with pytest.raises(ConnectionClosed) as caught:
                    await websocket.receive()
                assert caught.value.code == 1012
    assert ours.socket.fileno() == -1


@pytest.mark.parametrize("how", ["exception", "cancellation"])
async def test_leaving_otherwise_than_by_the_end_says_1001_and_waits_for_no_answer(how, autojump_clock):
    ours, theirs = memory_stream_pair()
    told = []

    async def serve():
        peer = Peer(theirs)
        await peer.accept()
        told.append(await peer.next())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        begun = trio.current_time()
        with contextlib.suppress(KeyError), trio.move_on_after(1) as scope:
            async with open_websocket(ours, host="x", target="/") as websocket:
                if how == "exception":
                    raise KeyError
                await websocket.receive()
        assert scope.cancelled_caught is (how == "cancellation")
        assert trio.current_time() - begun == pytest.approx(0 if how == "exception" else 1)
        assert websocket.close_code == 1006
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert told[0].code == 1001


async def test_closing_beside_a_stuck_send_is_bounded(autojump_clock):
    serve = after_upgrade(then="silence")
    async with full(serve, close_timeout_s=2) as (stream, websocket), trio.open_nursery() as nursery:
        stream.room = 3
        nursery.start_soon(websocket.send, "stuck for ever")
        await trio.testing.wait_all_tasks_blocked()
        begun = trio.current_time()
        await websocket.aclose()
        assert trio.current_time() - begun == pytest.approx(2)
        nursery.cancel_scope.cancel()


async def test_a_close_that_finds_no_room_is_given_up(autojump_clock):
    async with full(after_upgrade(then="silence"), close_timeout_s=2) as (stream, websocket):
        stream.room = 3
        begun = trio.current_time()
        await websocket.aclose()
        assert trio.current_time() - begun == pytest.approx(2)
        assert websocket.close_reason == "the peer does not read"


async def test_a_peers_close_is_seen_although_a_sender_is_stuck(autojump_clock):
    serve = after_upgrade(b"\x88\x02\x03\xf4", then="silence")
    async with full(serve, close_timeout_s=2) as (stream, websocket), trio.open_nursery() as nursery:
        stream.room = 3

        @nursery.start_soon
        async def stuck():
            with pytest.raises(ConnectionClosed):
                await websocket.send("stuck until the end")

        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionClosed, match="1012"):
            await websocket.receive()
        nursery.cancel_scope.cancel()


async def test_no_task_is_left_by_any_of_it(autojump_clock):
    before = trio.lowlevel.current_statistics().tasks_living
    async with connected(echo) as websocket:
        assert trio.lowlevel.current_statistics().tasks_living == before + 1  # the peer
        await websocket.ping(b"x")
        await websocket.send("a")
        await trio.sleep(3)
        assert await websocket.receive() == "a"
        assert websocket.heard_at == trio.current_time()
    assert trio.lowlevel.current_statistics().tasks_living == before


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda ws: ws.ping(bytes(126)), ValueError),
        (lambda ws: ws.send("\ud800"), ValueError),
        (lambda ws: ws.send(3.5), TypeError),
    ],
)
async def test_what_cannot_be_sent_is_our_error_and_costs_nothing(call, error, autojump_clock):
    async with connected(echo) as websocket:
        with pytest.raises(error):
            await call(websocket)
        await websocket.send("fine")
        assert await websocket.receive() == "fine"


# ---- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://x/", "ws:///x", "ws://user:pw@x/", "x", ""])
async def test_what_is_no_address_is_our_error(url):
    with pytest.raises(ValueError, match="not the address of a WebSocket"):
        async with open_websocket_url(url):
            pass


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_an_address_leads_to_a_websocket(kind, tmp_path):
    requests = []

    async def serve(stream):
        peer = Peer(stream)
        await peer.accept()
        requests.append(peer.request)
        await peer.send(await peer.next())
        await peer.send((await peer.next()).response())
        await stream.aclose()

    if kind == "tcp":
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        where = {}
    else:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(str(tmp_path / "s"))
        sock.listen()
        listeners, host, where = [trio.SocketListener(sock)], "localhost", {"unix_path": tmp_path / "s"}
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            async with open_websocket_url(f"ws://{host}/v1?a=b", token="secret", **where) as websocket:
                await websocket.send("hello")
                assert await websocket.receive() == "hello"
            nursery.cancel_scope.cancel()
    assert requests[0].target == "/v1?a=b"
    assert requests[0].host == host
    assert (b"authorization", b"Bearer secret") in requests[0].extra_headers


async def test_an_address_where_nobody_listens_is_a_clear_failure(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for where in ({}, {"unix_path": tmp_path / "none"}):
            with trio.fail_after(5), pytest.raises(HandshakeFailed, match="cannot connect to"):
                async with open_websocket_url(f"ws://127.0.0.1:{port}/", **where):
                    pass


async def test_a_server_without_tls_behind_wss_fails_in_time():
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    async def serve(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            with pytest.raises(HandshakeFailed, match=r"(?i)wrong.version|record layer|ssl"):
                async with open_websocket_url(f"wss://127.0.0.1:{port}/", ssl_context=ssl.create_default_context()):
                    pass
            nursery.cancel_scope.cancel()
