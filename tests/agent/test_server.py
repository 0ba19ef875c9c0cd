"""One connection's fault is its own, and the drain is one timeline."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from agent.routes import echo
from agent.server import Server
from tests.agent.wire import CLOSE, TEXT, Wire, head


class MemoryListener(trio.abc.Listener):
    """Hands out the server's ends of memory streams."""

    def __init__(self):
        self._send, self._receive = trio.open_memory_channel(1000)
        self.closed = False

    def connect(self):
        ours, theirs = trio.testing.memory_stream_pair()
        self._send.send_nowait(theirs)
        return ours

    async def accept(self):
        return await self._receive.receive()

    async def aclose(self):
        self.closed = True
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"nonsense\r\n\r\n", 400),
        (head(host="\xe9"), 400),
        (head().replace(b"Version: 13", b"Version: 8"), 426),
        (head("/elsewhere"), 404),
        (head("/echo/"), 404),
        (head("/%65cho"), 404),
    ],
)
async def test_a_request_that_is_no_upgrade_is_refused_and_the_stream_closed(serve, autojump_clock, sent, status):
    agent = serve()
    other = await agent.open()
    stream = agent.stream()
    await stream.send_all(sent)
    wire = Wire(stream)
    await wire.read_answer()
    assert wire.status == status
    await wire.ends()
    await other.send(TEXT, b"still here")
    assert await other.frame() == (TEXT, b"still here")


@pytest.mark.parametrize("sent", [b"", b"GET /echo HT", head()[:-2]])
async def test_a_slow_head_is_given_up_after_10_s(serve, autojump_clock, sent):
    """The library's server side has no deadline of its own."""
    stream = serve().stream()
    start = trio.current_time()
    await stream.send_all(sent)
    assert await stream.receive_some(100) == b""
    assert trio.current_time() - start == pytest.approx(10.0)


@pytest.mark.parametrize("sent", [b"", b"GET /echo HT", head()])
async def test_a_peer_that_leaves_in_the_handshake_is_let_go_at_once(autojump_clock, capsys, sent):
    """The library waits for ever."""
    server = Server({"/echo": echo}.get)
    ours, theirs = trio.testing.memory_stream_pair()
    start = trio.current_time()
    await ours.send_all(sent)
    await ours.aclose()
    await server.serve_stream(theirs)
    assert trio.current_time() == start
    assert capsys.readouterr().err == ""


async def test_a_handler_that_crashes_closes_its_connection_with_1011_and_no_other(serve, autojump_clock, capsys):
    """S3-13: failure closes with 1011."""

    async def crash(ws):
        await ws.get_message()
        raise ValueError("the reason")

    agent = serve(crash=crash)
    wire, other = await agent.open("/crash"), await agent.open()
    await wire.send(TEXT, b"go")
    assert await wire.closed_with() == (1011, "the handler failed")
    await other.send(TEXT, b"still here")
    assert await other.frame() == (TEXT, b"still here")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "agent: the handler of connection 1 on /crash failed: ValueError('the reason')"
    assert any("in crash" in line for line in lines)


async def test_a_crash_inside_the_handlers_nursery_is_told_by_its_cause(serve, autojump_clock, capsys):
    async def fail():
        raise ValueError("the reason")

    async def crash(ws):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await ws.get_message()

    wire = await serve(crash=crash).open("/crash")
    assert (await wire.closed_with())[0] == 1011
    assert "failed: ValueError('the reason')" in capsys.readouterr().err


async def test_a_handler_that_returns_closes_with_1000_and_its_own_code_wins(serve, autojump_clock):
    """S3-13: a normal end closes with 1000."""

    async def leave(ws):
        await ws.send_message("bye")

    async def own(ws):
        await ws.aclose(4001, "own reason")

    agent = serve(leave=leave, own=own)
    wire = await agent.open("/leave")
    assert await wire.frame() == (TEXT, b"bye")
    assert await wire.closed_with() == (1000, "")
    assert await (await agent.open("/own")).closed_with() == (4001, "own reason")


async def test_a_peer_that_leaves_ends_its_handler_without_a_word(serve, autojump_clock, capsys):
    ended = trio.Event()

    async def wait(ws):
        async with trio.open_nursery():
            try:
                await ws.get_message()
            finally:
                ended.set()

    wire = await serve(wait=wait).open("/wait")
    await wire.stream.aclose()
    with trio.fail_after(1):
        await ended.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert capsys.readouterr().err == ""


async def test_the_drain_closes_every_connection_with_1012_side_by_side(nursery, autojump_clock):
    """S3-14: 1012 "Server restarting" to all, 500 ms at most; those that do not answer delay nobody."""
    listener, server, stopped = MemoryListener(), Server({"/echo": echo}.get), trio.Event()

    async def run():
        await server.serve([listener])
        stopped.set()

    nursery.start_soon(run)
    wires = [await Wire.open(listener.connect()) for _ in range(20)]
    silent = [await Wire.open(listener.connect()) for _ in range(3)]
    start = trio.current_time()
    server.drain()
    for wire in wires:
        assert await wire.closed_with() == (1012, "Server restarting")
    assert trio.current_time() == start
    for wire in silent:
        assert await wire.frame() == (CLOSE, b"\x03\xf4Server restarting")
    await stopped.wait()
    assert trio.current_time() - start == pytest.approx(0.5)
    assert listener.closed


async def test_the_drain_ends_as_soon_as_all_are_closed(nursery, autojump_clock):
    listener, server, stopped = MemoryListener(), Server({"/echo": echo}.get), trio.Event()

    async def run():
        await server.serve([listener])
        stopped.set()

    nursery.start_soon(run)
    wire = await Wire.open(listener.connect())
    start = trio.current_time()
    server.drain()
    server.drain()
    assert (await wire.closed_with())[0] == 1012
    await stopped.wait()
    assert trio.current_time() == start


async def test_an_upgrade_during_the_drain_is_refused_with_503(nursery, autojump_clock):
    """S3-14: new upgrades are refused while draining; also one that had begun before."""
    listener, server = MemoryListener(), Server({"/echo": echo}.get)
    nursery.start_soon(server.serve, [listener])
    holding = await Wire.open(listener.connect())
    begun = listener.connect()
    await begun.send_all(head()[:20])
    await trio.testing.wait_all_tasks_blocked()
    server.drain()
    await trio.testing.wait_all_tasks_blocked()
    await begun.send_all(head()[20:])
    late = Wire(begun)
    await late.read_answer()
    assert (late.status, late.headers["retry-after"]) == (503, "1")
    assert (await Wire.open(listener.connect())).status == 503
    assert (await holding.closed_with())[0] == 1012


async def test_an_upgrade_that_is_being_answered_at_the_signal_gets_its_1012(nursery, autojump_clock):
    listener, server = MemoryListener(), Server({"/echo": echo}.get)
    nursery.start_soon(server.serve, [listener])
    ours, theirs = trio.testing.lockstep_stream_pair()
    listener._send.send_nowait(theirs)
    await ours.send_all(head())
    await trio.testing.wait_all_tasks_blocked()  # The 101 waits for its reader.
    server.drain()
    await trio.testing.wait_all_tasks_blocked()
    wire = Wire(ours)
    await wire.read_answer()
    assert wire.status == 101
    assert await wire.closed_with() == (1012, "Server restarting")


async def test_a_connection_that_fails_to_close_does_not_stop_the_others(nursery, autojump_clock, monkeypatch, capsys):
    """S3-14: one socket that fails to close does not stop the rest."""
    listener, server = MemoryListener(), Server({"/echo": echo}.get)
    nursery.start_soon(server.serve, [listener])
    wires = [await Wire.open(listener.connect()) for _ in range(3)]
    broken = next(iter(server._open))

    async def fail(code, reason):
        raise RuntimeError("cannot")

    monkeypatch.setattr(broken, "aclose", fail)
    server.drain()
    codes = []
    for wire in wires:
        try:
            codes.append((await wire.closed_with())[0])
        except EOFError:
            codes.append(None)
    assert sorted(codes, key=str) == [1012, 1012, None]
    assert "failed to close" in capsys.readouterr().err


async def test_a_message_that_is_being_sent_goes_out_whole_before_the_1012(nursery, autojump_clock):
    async def send(ws):
        await ws.send_message(b"a" * 1000)
        await trio.sleep_forever()

    listener, server = MemoryListener(), Server({"/send": send}.get)
    nursery.start_soon(server.serve, [listener])
    ours, theirs = trio.testing.lockstep_stream_pair()
    listener._send.send_nowait(theirs)
    wire = await Wire.open(ours, "/send")
    await trio.testing.wait_all_tasks_blocked()
    server.drain()
    await trio.testing.wait_all_tasks_blocked()
    assert await wire.frame() == (0x2, b"a" * 1000)
    assert await wire.closed_with() == (1012, "Server restarting")


async def test_handlers_that_do_not_end_are_cancelled_at_the_end_of_the_drain(nursery, autojump_clock):
    cancelled = []

    async def stay(ws):
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append(trio.current_time())
            raise

    listener, server = MemoryListener(), Server({"/stay": stay}.get)
    nursery.start_soon(server.serve, [listener])
    wire = await Wire.open(listener.connect(), "/stay")
    start = trio.current_time()
    server.drain()
    assert (await wire.closed_with())[0] == 1012
    await trio.sleep(1)
    assert cancelled == [pytest.approx(start + 0.5)]


async def test_cancelling_the_server_ends_every_connection_at_once(nursery, autojump_clock):
    listener, server = MemoryListener(), Server({"/echo": echo}.get)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(server.serve, [listener])
            wire = await Wire.open(listener.connect())
            scope.cancel()
    assert server._open == set()
    await wire.ends()
