"""Where trio-websocket alone would hang, drop or crash, a connection of the agent does not."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from trio_websocket import ConnectionClosed

from agent import connection
from agent.connection import MAX_MESSAGE_BYTES
from tests.agent.wire import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Wire, close_frame, frame, head


async def test_text_stays_text_and_binary_binary(serve, autojump_clock):
    wire = await serve().open()
    for opcode, payload in [(TEXT, "é".encode()), (BINARY, b"\xff\0"), (TEXT, b""), (BINARY, b"")]:
        await wire.send(opcode, payload)
        assert await wire.frame() == (opcode, payload)
    await wire.send(CLOSE, b"\x03\xe8")
    assert await wire.frame() == (CLOSE, b"\x03\xe8")
    await wire.ends()


async def test_frames_in_one_segment_with_the_head_are_served(serve, autojump_clock):
    stream = serve().stream()
    await stream.send_all(head() + frame(TEXT, b"early") + frame(TEXT, b"bird")[:3])
    wire = Wire(stream)
    await wire.read_answer()
    assert wire.status == 101
    await stream.send_all(frame(TEXT, b"bird")[3:])
    assert [await wire.frame(), await wire.frame()] == [(TEXT, b"early"), (TEXT, b"bird")]


async def test_a_stream_cut_at_any_byte_is_the_same_stream(serve, autojump_clock):
    agent = serve()
    sent = head() + frame(TEXT, b"one") + frame(PING, b"p") + frame(BINARY, b"2" * 200)
    for cut in range(1, len(sent)):
        stream = agent.stream()
        await stream.send_all(sent[:cut])
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(sent[cut:])
        wire = Wire(stream)
        await wire.read_answer()
        frames = [await wire.frame() for _ in range(3)]
        assert sorted(frames) == sorted([(TEXT, b"one"), (PONG, b"p"), (BINARY, b"2" * 200)])
        await stream.send_all(close_frame())
        assert await wire.frame() == (CLOSE, b"\x03\xe8")
        await wire.ends()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x01a", 1002),  # unmasked
        (frame(TEXT, b"\xff"), 1007),
        (frame(CONTINUATION, b"a"), 1002),
        (frame(0x3, b"a"), 1002),
        (frame(PING, b"a" * 126), 1002),
        (frame(PING, b"a", fin=False), 1002),
        (b"\xc1" + frame(TEXT, b"a")[1:], 1002),  # a reserved bit
        (close_frame(1005), 1002),
        (close_frame(999), 1002),
        (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    ],
)
async def test_a_broken_frame_is_answered_with_its_code(serve, autojump_clock, sent, code):
    """RFC 6455, 7.1.7: a connection that is failed is closed with a code, not hung up on."""
    agent = serve()
    wire, other = await agent.open(), await agent.open()
    await wire.stream.send_all(sent)
    assert (await wire.closed_with())[0] == code
    await other.send(TEXT, b"still here")
    assert await other.frame() == (TEXT, b"still here")


async def test_a_message_over_the_limit_closes_with_1009_and_one_at_the_limit_passes(serve, autojump_clock):
    """S3-18: the limit is 16 MiB."""
    ended = trio.Event()

    async def count(ws):
        try:
            while True:
                await ws.send_message(str(len(await ws.get_message())))
        finally:
            ended.set()

    wire = await serve(count=count).open("/count")
    await wire.send(BINARY, b"a" * MAX_MESSAGE_BYTES)
    assert await wire.frame() == (TEXT, str(MAX_MESSAGE_BYTES).encode())
    await wire.send(BINARY, b"a" * MAX_MESSAGE_BYTES, fin=False)
    await wire.send(CONTINUATION, b"a", fin=True)
    assert (await wire.closed_with())[0] == 1009
    await ended.wait()


async def test_text_is_measured_in_bytes(serve, autojump_clock):
    wire = await serve().open()
    await wire.send(TEXT, "€".encode() * (MAX_MESSAGE_BYTES // 3 + 1))
    assert (await wire.closed_with())[0] == 1009


async def test_what_comes_after_1009_is_dropped_until_the_peer_closes(serve, autojump_clock, capsys):
    wire = await serve().open()
    await wire.send(BINARY, b"a" * (MAX_MESSAGE_BYTES + 1))
    for _ in range(3):
        await wire.send(BINARY, b"a" * 1000)
        await wire.send(PING)
    await wire.send(BINARY, b"a" * (MAX_MESSAGE_BYTES + 1))
    assert (await wire.closed_with())[0] == 1009
    await trio.testing.wait_all_tasks_blocked()
    assert capsys.readouterr().err == ""


async def test_a_ping_that_crosses_our_close_does_not_break_the_close(serve, autojump_clock, capsys):
    """The library raises out of its reader for it."""

    async def leave(ws):
        return

    wire = await serve(leave=leave).open("/leave")
    await trio.testing.wait_all_tasks_blocked()
    await wire.send(PING, b"crossing")
    assert await wire.closed_with() == (1000, "")
    await trio.testing.wait_all_tasks_blocked()
    assert capsys.readouterr().err == ""


async def test_a_peer_that_answers_pings_stays_for_an_hour(serve, autojump_clock):
    """S3-18: a ping every 20 s."""
    wire = await serve().open()
    start = trio.current_time()
    for n in range(1, 181):
        opcode, payload = await wire.frame()
        assert (opcode, trio.current_time() - start) == (PING, pytest.approx(20.0 * n))
        await wire.send(PONG, payload)
    await wire.send(TEXT, b"after an hour")
    assert await wire.frame() == (TEXT, b"after an hour")


async def test_a_peer_without_a_pong_is_dropped_after_120_s(serve, autojump_clock, capsys):
    """S3-18: the deadline for the pong."""
    wire = await serve().open()
    start = trio.current_time()
    assert (await wire.frame())[0] == PING
    await wire.ends()
    assert trio.current_time() - start == pytest.approx(140.0)
    await trio.testing.wait_all_tasks_blocked()
    assert "connection 1 on /echo was ended" in capsys.readouterr().err


async def test_a_peer_that_does_not_read_is_dropped_too(serve, autojump_clock):
    """It sends, and never reads: the echo waits for it, and the reader for the echo."""
    # A memory stream has no size; one whose sends wait shows a full socket.
    ours, theirs = trio.testing.lockstep_stream_pair()
    ended = trio.Event()
    agent = serve()

    async def run():
        await agent.server.serve_stream(theirs)
        ended.set()

    agent.nursery.start_soon(run)
    wire = await Wire.open(ours)
    start = trio.current_time()
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await wire.send(BINARY, b"a" * 1000)
    assert trio.current_time() - start == pytest.approx(140.0)
    await ended.wait()


async def test_a_peer_that_is_heard_is_not_dropped_for_its_pongs(serve, autojump_clock):
    """A long upload in one frame leaves no room for a pong."""
    wire = await serve().open()
    message = frame(BINARY, b"a" * 10_000)
    for start in range(0, len(message), 500):
        await wire.stream.send_all(message[start : start + 500])
        await trio.sleep(30)
    while (got := await wire.frame())[0] == PING:
        pass
    assert got == (BINARY, b"a" * 10_000)


async def test_a_slow_handler_does_not_make_its_peer_look_dead(serve, autojump_clock):
    """With a full queue the reader sees no pong; that is not the peer's fault."""

    async def slow(ws):
        await trio.sleep(1000)
        for _ in range(20):
            await ws.send_message(await ws.get_message())

    wire = await serve(slow=slow).open("/slow")
    for _ in range(20):
        await wire.send(TEXT, b"patience")
    answers = 0
    while answers < 20:
        opcode, payload = await wire.frame()
        if opcode == PING:
            await wire.send(PONG, payload)
        else:
            assert (opcode, payload) == (TEXT, b"patience")
            answers += 1
    assert await wire.closed_with() == (1000, "")


async def test_the_queue_of_a_connection_is_bounded(serve, autojump_clock):
    """A handler that reads nothing stops its peer, and nothing piles up."""

    async def deaf(ws):
        await trio.sleep_forever()

    ours, theirs = trio.testing.lockstep_stream_pair()
    agent = serve(deaf=deaf)
    agent.nursery.start_soon(agent.server.serve_stream, theirs)
    wire = await Wire.open(ours, "/deaf")
    sent = 0
    with trio.move_on_after(10):
        for _ in range(100):
            await wire.send(TEXT, b"a")
            sent += 1
    assert sent <= connection.MAX_QUEUED_MESSAGES + 2
    assert connection.MAX_QUEUED_MESSAGES * MAX_MESSAGE_BYTES <= 64 * 1024 * 1024


async def test_nothing_follows_half_a_frame(serve, autojump_clock):
    """After a cancelled send the library would swallow the next in silence."""
    results = []

    async def impatient(ws):
        with trio.move_on_after(1):
            await ws.send_message(b"a" * 1000)
        try:
            await ws.send_message(b"b")
        except ConnectionClosed as closed:
            results.append(closed.reason.code)
            raise

    ours, theirs = trio.testing.lockstep_stream_pair()
    agent = serve(impatient=impatient)
    agent.nursery.start_soon(agent.server.serve_stream, theirs)
    wire = await Wire.open(ours, "/impatient")
    with trio.fail_after(1):
        assert await ours.receive_some(100) == b"\x82\x7e\x03\xe8" + b"a" * 96
    await trio.sleep(2)
    got = b""
    try:
        while data := await ours.receive_some(100):
            got += data
    except trio.BrokenResourceError:
        pass
    assert set(got) <= {ord("a")}
    assert results == [1006]
    assert wire.status == 101


async def test_close_is_bounded_and_closes_the_stream_whatever_the_peer_does(serve, autojump_clock):
    """Aclose alone waits for the peer for ever."""

    async def leave(ws):
        return

    wire = await serve(leave=leave).open("/leave")
    start = trio.current_time()
    assert (await wire.frame())[0] == CLOSE
    await wire.ends()
    assert trio.current_time() - start == pytest.approx(2.0)


async def test_a_handler_sees_path_headers_and_its_subprotocol(serve, autojump_clock):
    async def tell(ws):
        headers = dict(ws.handshake_headers)
        await ws.send_message(f"{ws.path} {headers[b'tenantry-tenant'].decode()} {ws.subprotocol}")

    tell.subprotocols = ("two", "one")
    wire = await serve(tell=tell).open(
        "/tell?a=1", extra=["Tenantry-Tenant: acme", "Sec-WebSocket-Protocol: none, one, two"]
    )
    assert wire.headers["sec-websocket-protocol"] == "one"
    assert await wire.frame() == (TEXT, b"/tell?a=1 acme one")
    assert await wire.closed_with() == (1000, "")
